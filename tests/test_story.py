"""The whole system on one page. If this fails, the README's promise is false.

Streets are drawn, a teacher has learnt from the fine labels, two Ray actors label the coarse images, a crash loses
nothing, the labels are counted, a person corrects some of them, and a student is trained and compared.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from conftest import HEIGHT, WIDTH, autolabel
from PIL import Image

from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.samples import load_manifest


def test_from_coarse_labels_to_a_compared_student(city: Path, teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "auto"
    generate = ("generate", city / "coarse.parquet", "--teacher", teacher, "--out", run)

    # First four of ten images, in units of three: the second unit is left half done.
    first = autolabel(*generate, "--unit-size", 3, "--limit", 4, "--workers", 2)
    assert (first.exit_code, first.stdout.splitlines()[0]) == (
        0,
        "10 samples: 4 labelled, 0 quarantined, 6 left for later",
    )
    before = {name: label.tobytes() for name, label in Run.open(run).labels.items()}
    assert len(before) == 4

    # The same again, without the limit: only the rest is done, and what was there stays byte for byte.
    second = autolabel(*generate, "--unit-size", 3, "--workers", 2)
    assert (second.exit_code, second.stdout.splitlines()[0]) == (
        0,
        "10 samples: 10 labelled, 0 quarantined, 0 left for later",
    )
    labels = Run.open(run).labels
    assert {name: labels[name].tobytes() for name in before} == before
    about = json.loads((run / "run.json").read_text())
    assert about["state"] == "complete"
    assert about["accounts"] == {"asked": 10, "labelled": 10, "quarantined": 0, "left": 0}

    # The statistics say what the labels say.
    images = RunFolder(run).statistics("images").to_pylist()
    assert sorted(row["sample_id"] for row in images) == sorted(labels)
    for row in images:
        label = labels[row["sample_id"]]
        assert label.shape == (row["height"], row["width"]) == (HEIGHT, WIDTH)
        assert row["labelled_pixels"] == int((label != 255).sum())
    for row in RunFolder(run).statistics("classes").to_pylist():
        assert row["pixels"] == int((labels[row["sample_id"]] == row["class_id"]).sum())
        assert sum(row["confidence_hist"][10:]) == row["pixels"]  # threshold 0.5 keeps the upper ten bins
    assert "pixels with a class" in autolabel("stats", run).stdout

    # Two labels go out, somebody repaints a part of one, and exactly these pixels come home as a person's.
    sent, fixed, people = tmp_path / "sent", tmp_path / "fixed.parquet", tmp_path / "people.parquet"
    assert autolabel("export", run, "--to", "png", "--worst", 2, "-o", sent).exit_code == 0
    painted = sorted((sent / "labels").rglob("*.png"))[0]
    repainted = np.array(Image.open(painted))
    repainted[10:20, 10:30] = 11 - repainted[10, 10] % 2  # person or sky, whichever is another class
    Image.fromarray(repainted).save(painted)
    came_back = autolabel("import", "png", sent, "--run", run, "-o", fixed)
    assert came_back.exit_code == 0, came_back.output
    name = painted.relative_to(sent / "labels").with_suffix("").as_posix()
    origin = np.array(Image.open(tmp_path / "fixed" / "origin" / f"{name}.png"))
    assert np.array_equal(origin == 1, repainted != labels[name])
    assert 0 < np.count_nonzero(origin) <= 200
    joined = autolabel("manifest", "fuse", fixed, run / "manifest.parquet", "-o", people)
    assert joined.exit_code == 0, joined.output
    assert sorted(s.source for s in load_manifest(people).samples) == ["auto"] * 8 + ["corrected"] * 2

    # The labels train a student, beside the fine ones.
    auto, fused = run / "manifest.parquet", tmp_path / "fused.parquet"
    assert {s.source for s in load_manifest(auto).samples} == {"auto"}
    joined = autolabel(
        "manifest", "fuse", city / "fine.parquet", auto, "-o", fused, "--leak-check", city / "val.parquet"
    )
    assert joined.exit_code == 0, joined.output
    assert [s.source for s in load_manifest(fused).samples] == ["fine"] * 6 + ["auto"] * 10
    compared = autolabel(
        "compare", "--fine", city / "fine.parquet", "--coarse", city / "coarse.parquet", "--auto", run,
        "--val", city / "val.parquet", "--out", tmp_path / "compare", "--steps", 2, "--batch-size", 2,
    )  # fmt: skip
    assert compared.exit_code == 0, compared.output
    assert "fine + coarse" in compared.stdout and "mean IoU" in compared.stdout
    assert pq.read_table(tmp_path / "compare" / "fine-auto.parquet").num_rows == 16

    # And a page shows it.
    assert autolabel("report", run, "--images", 2).exit_code == 0
    assert (run / "report" / "index.html").is_file()
