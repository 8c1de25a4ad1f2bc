"""`autolabel teacher show` is read before anything is labelled. If this fails, it says too little."""

from __future__ import annotations

import hashlib
from pathlib import Path

from conftest import autolabel, refused

from autolabel.manifests.class_map import load_class_map
from autolabel.manifests.label_space import CAMVID, CITYSCAPES
from autolabel.teacher.checkpoints import DRAWN_STREETS


def test_a_teacher_says_its_kind_its_classes_what_it_has_seen_and_its_digest(teacher: Path) -> None:
    result = autolabel("teacher", "show", teacher)
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        f"teacher  {teacher}",
        "kind     checkpoint",
        f"classes  19 classes: {', '.join(CITYSCAPES.names)}",
        "seen     6 images",
        f"sha256   {hashlib.sha256(teacher.read_bytes()).hexdigest()}",
    ]
    assert "seen     1,500 images" in autolabel("teacher", "show", DRAWN_STREETS).output


def test_the_draft_on_stdout_is_a_class_map(teacher: Path, tmp_path: Path) -> None:
    result = autolabel("teacher", "show", teacher, "--against", "camvid")
    (tmp_path / "map.toml").write_text(result.stdout, encoding="utf-8")
    assert result.stdout.startswith(f"# teacher {teacher}\n# kind checkpoint\n")
    assert load_class_map(str(tmp_path / "map.toml")).indices(CITYSCAPES.names, CAMVID, teacher="t") == load_class_map(
        "cityscapes-to-camvid"
    ).indices(CITYSCAPES.names, CAMVID, teacher="t")


def test_a_teacher_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    assert "does not exist" in refused("teacher", "show", tmp_path / "no.pt")
