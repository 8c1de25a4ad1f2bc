"""The demo is the first thing that a stranger sees. If this fails, it breaks, or says that the idea does not work."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import autolabel

from autolabel import cli
from autolabel.pipeline.analysis.audit_record import Audit


@pytest.mark.thorough
def test_the_demo_labels_most_of_a_city_that_its_teacher_has_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = autolabel("demo", "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    run = tmp_path / "demo" / "runs" / "auto"
    audit = Audit.read(run / "audit.json")
    assert (audit.images, audit.leaked) == (48, 0)
    assert audit.human is not None and audit.human.labelled is not None and 0.6 < audit.human.labelled < 0.75
    assert audit.auto is not None and audit.auto.labelled is not None and audit.auto.right is not None
    assert audit.auto.labelled > 0.95 and audit.auto.right > 0.95
    by_name = {c.name: c for c in audit.classes}
    assert (by_name["pole"].outlined or 0) < 0.2 and (by_name["pole"].coverage or 0) > 0.75
    assert result.stdout.count(audit.lines()[0]) == 1  # as the last word
    table = result.stdout.rpartition("labelled  right")[2]
    rows = {row[0]: row[1:] for row in re.findall(r"^ (\S+)" + r" +([\d.]+)" * 5, table, re.MULTILINE)}
    iou, f = ({name: float(row[column]) for name, row in rows.items()} for column in (3, 4))
    assert list(rows) == ["coarse", "paper", "human-first", "dense-fitted"]
    assert iou["dense-fitted"] > max(iou["paper"], iou["human-first"]) + 3 and iou["coarse"] < 60
    assert f["dense-fitted"] > max(f["paper"], f["human-first"])
    assert (run / "report" / "index.html").is_file()
    only = [line for line in cli._DEMO.replace("\n ", " ").splitlines() if line.startswith("generate")]
    monkeypatch.setattr(cli, "_DEMO", "\n{}\n".format(*only))  # the other commands would only do the same again
    again = autolabel("demo", "--out", tmp_path / "demo")
    assert again.exit_code == 0 and "48 labelled" in again.stdout


def test_the_demo_of_another_seed_is_refused_in_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "seed-0").touch()
    result = autolabel("demo", "--out", tmp_path / "demo", "--seed", 1)
    assert (result.exit_code, result.stderr) == (
        2,
        f"autolabel: {tmp_path}/demo is not empty and holds no demo of seed 1: choose another --out\n",
    )


@pytest.mark.slow
def test_the_demo_compares_students_of_three_seeds_with_intervals(tmp_path: Path) -> None:
    result = autolabel("demo", "--out", tmp_path / "demo", "--students")
    assert result.exit_code == 0, result.output
    arms = json.loads((tmp_path / "demo" / "compare" / "compare.json").read_text())["arms"]
    assert {arm: len(scores) for arm, scores in arms.items()} == {"fine": 3, "fine + coarse": 3, "fine + auto": 3}
    assert "±" in result.stdout
