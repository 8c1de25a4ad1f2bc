"""A run summed up from its tables alone. If this fails, people choose a threshold by numbers that are not so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import autolabel

from autolabel.manifests.label_space import CAMVID
from autolabel.manifests.policy import Policy
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.samples import Manifest, writing_manifest
from autolabel.manifests.schemas import CLASSES_SCHEMA, IMAGES_SCHEMA, ROWS_AT_ONCE
from autolabel.manifests.tables import writing_table
from autolabel.pipeline.analysis.stats import at_threshold, summarise
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.run import generate

Rows = list[dict[str, Any]]


def filled(schema: pa.Schema, rows: Rows) -> pa.Table:
    """A table of a run; of what is not said, numbers are 0."""
    zeros = {f.name: 0 for f in schema if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)}
    return pa.Table.from_pylist([{**zeros, **row} for row in rows], schema=schema)


def written(run: Path, images: Rows, classes: Rows) -> Path:
    """A run of CamVid's classes with these tables, as far as summing up needs one."""
    empty = Manifest.of(CAMVID, ())
    with writing_manifest(run / "manifest.parquet", CAMVID, image_root=empty.image_root, label_root=empty.label_root):
        pass
    for name, schema, rows in (("images", IMAGES_SCHEMA, images), ("classes", CLASSES_SCHEMA, classes)):
        with writing_table(run / "stats" / f"{name}.parquet", schema) as add:
            add(filled(schema, rows))
    return run


def image(sample_id: str, **more: Any) -> dict[str, Any]:
    return {"sample_id": sample_id, "height": 10, "width": 10, "label_bytes": 50, **more}


def bins(**counts: int) -> list[int]:
    """bins(b7=40): 40 pixels in the bin of confidences above 0.35."""
    return [counts.get(f"b{k}", 0) for k in range(20)]


def row(sample_id: str, class_id: int, histogram: list[int], **more: Any) -> dict[str, Any]:
    names = {"class_name": CAMVID.names[class_id], "confidence_hist": histogram}
    kept = more.get("pixels", 0)  # unless told otherwise, no human decided
    return {"sample_id": sample_id, "class_id": class_id, **names, "kept_pixels": kept, **more}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two images of 100 pixels; sky: 60 and 20, road: 40 and 80 by top class."""
    sky, road = CAMVID.names.index("sky"), CAMVID.names.index("road")
    images = [
        image("a", coarse_pixels=40, labelled_pixels=70),
        image("b", coarse_pixels=10, labelled_pixels=80),
    ]
    classes = [
        row("a", sky, bins(b8=20, b12=10, b19=30), pixels=40, mean_confidence=0.7, coarse_pixels=30,
            agreeing_pixels=15, contradicted_pixels=3),
        row("a", road, bins(b9=10, b13=30), pixels=30, mean_confidence=0.6, coarse_pixels=10, agreeing_pixels=10),
        row("b", sky, bins(b4=20), pixels=0, mean_confidence=0.2),
        row("b", road, bins(b19=80), pixels=80, mean_confidence=1.0, coarse_pixels=10, contradicted_pixels=5),
    ]  # fmt: skip
    return written(tmp_path / "run", images, classes)


def test_a_summary_of_two_images_equals_counts_by_hand(run: Path) -> None:
    found = summarise(run)
    assert (found.images, found.pixels, found.label_bytes) == (2, 200, 100)
    assert (found.coarse_coverage, found.auto_coverage, found.kept, found.agreement) == (0.25, 0.75, 0.75, 0.5)
    assert found.confidence == pytest.approx((60 * 0.7 + 40 * 0.6 + 20 * 0.2 + 80) / 200)
    sky, road, car = (found.classes.loc[name] for name in ("sky", "road", "car"))
    assert sky[["images", "coarse_pixels", "auto_pixels"]].tolist() == [1, 30, 40]
    assert sky[["coarse_share", "auto_share", "kept"]].tolist() == [30 / 50, 40 / 150, 40 / 80]
    assert sky[["agreement", "contradicted"]].tolist() == [0.5, 0.1]
    assert sky["confidence"] == pytest.approx((60 * 0.7 + 20 * 0.2) / 80)
    assert road[["images", "kept", "agreement", "contradicted"]].tolist() == [2, 110 / 120, 0.5, 0.25]
    assert car[["images", "coarse_pixels", "auto_pixels", "coarse_share", "auto_share"]].tolist() == [0, 0, 0, 0, 0]
    assert car[["kept", "confidence", "agreement", "contradicted"]].isna().all()
    assert found.histograms.shape == (11, 20)
    assert found.histogram.tolist() == bins(b4=20, b8=20, b9=10, b12=10, b13=30, b19=110)


def test_shares_at_another_threshold_equal_counts_by_hand(run: Path) -> None:
    found = at_threshold(summarise(run), 0.65).classes  # bins 13 and up
    sky, road, car = (found.loc[name] for name in ("sky", "road", "car"))
    assert sky.tolist() == [80, 40 / 80, 30 / 80, 40 / 150, 30 / 140]
    assert road.tolist() == [120, 110 / 120, 110 / 120, 110 / 150, 110 / 140]
    assert car[["pixels", "share"]].tolist() == [0, 0] and np.isnan(car["kept"])


@pytest.mark.parametrize("step", range(21))
def test_every_edge_of_the_histogram_is_a_threshold(run: Path, step: int) -> None:
    summary = summarise(run)
    found = at_threshold(summary, step / 20).classes
    assert (found["kept"] * found["pixels"]).sum() == pytest.approx(summary.histogram[step:].sum())
    assert at_threshold(summary, float(f"{step * 0.05:.2f}")).classes.equals(found)  # as a person types it


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        ("0.72", "threshold 0.72: the statistics count confidence in steps of 0.05; the nearest that they know are"
                 " 0.7 and 0.75"),
        ("0.999", "threshold 0.999: the statistics count confidence in steps of 0.05; the nearest that they know are"
                  " 0.95 and 1"),
        ("1.05", "threshold 1.05: expected a probability from 0 to 1, such as 0.7"),
        ("-0.1", "threshold -0.1: expected a probability from 0 to 1, such as 0.7"),
        ("nan", "threshold nan: expected a probability from 0 to 1, such as 0.7"),
    ],
)  # fmt: skip
def test_a_threshold_that_cannot_be_answered_is_refused(run: Path, threshold: str, message: str) -> None:
    refused = autolabel("stats", run, f"--threshold={threshold}")
    assert (refused.exit_code, refused.stderr) == (2, f"autolabel: {message}\n")


def test_tables_of_many_pieces_add_up_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random, count = np.random.default_rng(0), ROWS_AT_ONCE // 2
    classes = [
        row(f"{k}", c, random.multinomial(50, np.ones(20) / 20).tolist(), pixels=int(random.integers(1, 50)),
            mean_confidence=float(random.random()), coarse_pixels=20, contradicted_pixels=int(random.integers(20)))
        for k in range(count) for c in (0, 3, 8)
    ]  # fmt: skip
    run = written(tmp_path / "run", [image(f"{k}") for k in range(count)], classes)
    pieces: list[int] = []

    def watched(*arguments: Any) -> Any:
        for piece in stream(*arguments):
            pieces.append(len(piece))
            yield piece

    stream = RunFolder.stream_statistics
    monkeypatch.setattr(RunFolder, "stream_statistics", watched)
    found = summarise(run)
    assert max(pieces) <= ROWS_AT_ONCE < sum(pieces)  # never the whole table at once
    rows = pd.DataFrame(classes)
    sums = rows.groupby("class_name", sort=False)[["pixels", "contradicted_pixels"]].sum()
    ours = found.classes.loc[sums.index]
    assert ours["auto_pixels"].tolist() == sums["pixels"].tolist()
    assert (ours["contradicted"] * 20 * count).round().tolist() == sums["contradicted_pixels"].tolist()
    assert found.histograms.sum() == 50 * 3 * count
    weighted = (rows["mean_confidence"] * 50).groupby(rows["class_name"], sort=False).sum() / (50 * count)
    assert ours["confidence"].tolist() == pytest.approx(weighted.tolist())


def test_the_histograms_tell_exactly_what_a_run_at_that_threshold_keeps(
    city: Path, teacher: Path, tmp_path: Path
) -> None:
    for name, threshold in (("auto", 0.5), ("other", 0.35)):
        policy = Policy(threshold=threshold)
        generate(LabelJob(city / "coarse.parquet", teacher, tmp_path / name, (1.0,), policy=policy))
    told = at_threshold(summarise(tmp_path / "auto"), 0.35).classes
    pixels = np.concatenate([label.ravel() for label in Run.open(tmp_path / "other").labels.values()])
    counts = np.bincount(pixels, minlength=256)[:19]
    assert counts.sum() > 0 and (told["kept"].fillna(0) * told["pixels"]).round().tolist() == counts.tolist()
    assert told["share"].tolist() == (counts / counts.sum()).tolist()
    shown = autolabel("stats", "--threshold", "0.35", tmp_path / "auto")
    assert shown.exit_code == 0 and "at threshold 0.35" in shown.stdout


def test_a_run_without_a_labelled_image_has_nothing_to_show(tmp_path: Path) -> None:
    refused = autolabel("stats", written(tmp_path / "run", [], []))
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr.startswith(f"autolabel: {tmp_path}/run has no labelled image")


def test_a_run_may_be_called_as_a_command_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    for name in ("stats", "diff", "RUN"):
        run = run.rename(name)
        assert "a threshold would keep" in autolabel("stats", name).stdout
    assert autolabel("stats", "RUN", "--bins", "3").exit_code == 2
    assert "no_such_run" in autolabel("stats", "no_such_run").stderr


def test_a_run_that_kept_nothing_says_so_and_adds_up_to_nothing(tmp_path: Path) -> None:
    rows = [row("a", 0, bins(b2=60)), row("a", 3, bins(b4=40))]
    run = written(tmp_path / "run", [image("a", labelled_pixels=0)], rows)
    shown = autolabel("stats", run).stdout
    assert f"{run} keeps no pixel: every label is 'ignore' alone. Another --policy or --threshold keeps more." in shown
    (total,) = (line.split() for line in shown.splitlines() if line.split()[:1] == ["all"])
    assert total[1] == "–" and "100.00" not in shown


def test_a_class_without_coarse_pixels_leaves_the_total_of_the_labels_alone(run: Path) -> None:
    """Shares of the labels add up to 100 %, each in its own column."""
    (total,) = (line.split() for line in autolabel("stats", run).stdout.splitlines() if line.split()[:1] == ["all"])
    assert total[1:3] == ["100.00", "100.00"]


def test_the_table_of_fates_has_only_columns_that_occurred(tmp_path: Path) -> None:
    fates = {"kept_pixels": 6, "below_threshold_pixels": 3, "decided_by_human_pixels": 1}
    rows = [row("a", 0, bins(b19=10), pixels=8, **fates), row("a", 3, bins(b19=90), pixels=90)]
    run = written(tmp_path / "run", [image("a", labelled_pixels=98)], rows)
    found = summarise(run)
    assert found.fates.columns.tolist() == ["kept", "below_threshold", "decided_by_human"]
    assert found.fates.loc["sky"].tolist() == [0.6, 0.3, 0.1] and found.fates.loc["road"].tolist() == [1, 0, 0]
    assert (found.classes.loc["sky", "kept"], found.kept, found.auto_coverage) == (
        0.6,
        0.96,
        0.98,
    )  # what humans added is not the teacher's
    shown = autolabel("stats", run).stdout
    assert "what became of the pixels" in shown and "decided by a human" in shown and "too small" not in shown


def test_who_counts_polygons_here_is_told_where_unless_a_run_is_called_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in ((), ("fine.parquet", "-o", "polygons.json")):
        refused = autolabel("stats", "polygons", *arguments)
        assert (refused.exit_code, refused.stderr) == (
            2,
            "autolabel: there is no run 'polygons'; `autolabel polygons FINE_WITH_COARSE -o polygons.json` counts"
            " polygons\n",
        )
    run.rename(tmp_path / "polygons")
    assert "a threshold would keep" in autolabel("stats", "polygons").stdout
