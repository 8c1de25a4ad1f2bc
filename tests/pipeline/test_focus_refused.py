"""A focus that cannot be had is refused in one line, before anything is written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import refused
from focused import certificate, columns, drive_of, job
from PIL import Image

from autolabel.manifests import notes, storage
from autolabel.manifests.documents import BadDocument
from autolabel.manifests.focus import Focus, parse_focus
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import load_manifest, save_manifest
from autolabel.manifests.scan import scan
from autolabel.pipeline.job import Portion
from autolabel.pipeline.preview import preview
from autolabel.pipeline.run import generate
from autolabel.teacher.checkpoints import save_checkpoint
from autolabel.teacher.networks.build import build


@pytest.fixture(scope="module")
def drive(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drive_of(city, tmp_path_factory.mktemp("focus"))


@pytest.mark.parametrize("text", ["0", "-0.5", "1.5", "nan", "inf", "half", "nowhere.json"])
def test_what_is_no_share_and_no_file_is_refused_in_one_line(drive: Path, tmp_path: Path, text: str) -> None:
    said = refused("generate", drive, "--teacher", tmp_path / "net.pt", "--out", tmp_path / "run", "--focus", text)
    expected = "expected a share of the rows in (0, 1], such as 0.25, or the file of `autolabel focus`"
    assert said == f"--focus {text}: {expected}" and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"scales": (1.0,)}, "focus with scales 1: expected a scale above 1 besides, such as 0.5,1,2"),
        ({"scales": (0.5, 1.0)}, "focus with scales 0.5,1: expected a scale above 1 besides, such as 0.5,1,2"),
        ({"focus": Focus(0.4)}, "focus 0.4: images of 192 x 96 are too small, a band with what has to be seen around"
         " it would be the whole of them: leave --focus out, or give a smaller share"),
    ],
)  # fmt: skip
def test_scales_and_images_that_allow_no_focus_are_refused_before_anything_is_written(
    drive: Path, teacher: Path, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    asked = job(drive, teacher, tmp_path / "run", **settings)
    for call in (generate, preview):
        with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
            call(asked)
    assert not asked.out.exists()


@pytest.mark.parametrize("arch", ["hrnet18s_ocr_mscale2", "hrnet18s_ocr_explicit_pairs"])
def test_networks_that_weigh_the_highest_scale_by_what_they_see_there_are_refused(
    drive: Path, tmp_path: Path, arch: str
) -> None:
    save_checkpoint(tmp_path / "net.pt", build(arch, len(CITYSCAPES)), arch=arch, space=CITYSCAPES)
    with pytest.raises(
        ValueError,
        match=r"^focus: this network weighs its highest scale by what it sees there, so it .* leave focus out$",
    ):
        generate(job(drive, tmp_path / "net.pt", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_images_that_are_too_small_are_seen_whole_and_counted_in_a_note(
    drive: Path, teacher: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "drive"
    folder.mkdir()
    image = Image.open(load_manifest(drive).samples[0].image)
    for name, size in (("large", (192, 96)), ("small", (96, 48))):
        image.resize(size).save(folder / f"{name}.png")
    said: list[str] = []
    with notes.heard(said.append):
        generate(job(scanned_alone(folder), teacher, tmp_path / "run"))
    assert said == ["1 of 2 images are too small for a focus and are seen whole: 96 x 48"]
    assert dict(
        (name, rows) for name, *rows in columns(tmp_path / "run", "images", "sample_id", "focus_top", "focus_bottom")
    )["small"] == [0, 48]


def scanned_alone(folder: Path) -> Path:
    """The manifest of a folder of photographs."""
    path = folder.with_suffix(".parquet")
    save_manifest(path, scan(folder, layout="folder", label_space=CITYSCAPES)[0])
    return path


def test_a_run_goes_on_only_with_its_own_focus_and_format_8_is_refused_by_name(
    drive: Path, teacher: Path, tmp_path: Path
) -> None:
    asked = job(drive, teacher, tmp_path / "run", focus=certificate(teacher), portion=Portion(limit=1))
    generate(asked)
    for focus, reason in (
        (None, "null"),
        (Focus(0.2), r"0\.2"),
        (Focus(0.25), r"0\.25"),
    ):
        with pytest.raises(
            ValueError, match=rf'differently \(focus was "0\.25, certified by [0-9a-f]{{8}}", now {reason}\)'
        ):
            generate(replace(asked, focus=focus))
    document = json.loads((asked.out / "run.json").read_text(encoding="utf-8"))
    storage.write_json(asked.out / "run.json", document | {"format": "autolabel-run/8"})
    with pytest.raises(ValueError, match=r"has format 'autolabel-run/8', written by autolabel .*, this program knows"):
        Run.open(asked.out)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"teacher_sha256": "0" * 64}, "the focus was measured with another teacher"),
        ({"scales": (0.5, 1.0, 2.0)}, "the focus was measured with scales (0.5, 1.0, 2.0), now (1.0, 2.0)"),
        ({"flip": True}, "the focus was measured with flip True, now False"),
        ({"combine": "average"}, "the focus was measured with combine average, now network"),
        ({"classes": tuple(f"{name}s" for name in CITYSCAPES.names)}, "the focus was measured for 19 classes, not for"),
    ],
)
def test_the_file_of_another_focus_is_refused(
    drive: Path, teacher: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    certificate(teacher, **changes).write(tmp_path / "focus.json")
    said = refused("generate", drive, "--teacher", teacher, "--out", tmp_path / "run", "--scales", "1,2",
                   "--focus", tmp_path / "focus.json")  # fmt: skip
    assert said.startswith(reason) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"format": "autolabel focus 0"}', "nan", "negative", "cut"])
def test_a_damaged_file_is_refused(teacher: Path, tmp_path: Path, damage: bytes | str) -> None:
    path = tmp_path / "focus.json"
    certificate(teacher).write(path)
    if isinstance(damage, str):
        good = path.read_text(encoding="utf-8")
        bad = {"nan": good.replace("0.25", "NaN"), "negative": good.replace("0.5", "-0.5"), "cut": good[:200]}
        damage = bad[damage].encode()
    path.write_bytes(damage)
    with pytest.raises(BadDocument, match=re.escape(str(path))):
        parse_focus(str(path))
