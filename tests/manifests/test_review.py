"""The review list, and what `manifest fuse` leaves out by it. If this fails, people look at good labels and train on
bad ones."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import autolabel

from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.run.review import writing_review
from autolabel.manifests.samples import load_manifest
from autolabel.manifests.schemas import ROWS_AT_ONCE
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.run import generate

Rows = list[dict[str, Any]]
NAMES = ("road", "pole", "sky")
IMAGES = pa.schema(
    [
        ("sample_id", pa.string()),
        ("mean_confidence", pa.float64()),
        ("coarse_pixels", pa.int64()),
        ("agreement_with_coarse", pa.float64()),
        ("ignored_fraction", pa.float64()),
    ]
)
CLASSES = pa.schema([("sample_id", pa.string()), ("class_id", pa.int32()), ("contradicted_pixels", pa.int64())])


def image(name: str, confidence: float, coarse: int = 0, agreement: float | None = None) -> dict[str, Any]:
    return dict(zip(IMAGES.names, (name, confidence, coarse, agreement, 0.25), strict=True))


def contradicted(name: str, *pixels: int) -> Rows:
    return [{"sample_id": name, "class_id": c, "contradicted_pixels": n} for c, n in enumerate(pixels)]


def ranked(path: Path, *units: tuple[Rows, Rows]) -> Rows:
    with writing_review(path, NAMES) as add:
        for images, classes in units:
            add(pa.Table.from_pylist(images, IMAGES), pa.Table.from_pylist(classes, CLASSES))
    rows: Rows = pq.read_table(path).to_pylist()
    return rows


# --- the ranking ------------------------------------------------------------------------------------------------------


def test_ranks_of_four_images_equal_those_computed_by_hand(tmp_path: Path) -> None:
    images = [
        image("sure", 0.9, 100, 0.9),
        image("contradicted", 0.8, 100, 0.25),
        image("alone", 0.5),
        image("tie b", 0.875, 4, 0.0),
        image("tie a", 0.875, 4, 0.0),
    ]
    classes = contradicted("sure", 0, 10) + contradicted("contradicted", 20, 10, 20) + contradicted("alone", 0, 0)
    classes += contradicted("tie a", 0, 0, 1) + contradicted("tie b", 1)
    found = ranked(tmp_path / "review.parquet", (images[:2], classes[:5]), ([], []), (images[2:], classes[5:]))
    keys = ("rank", "sample_id", "trust", "agreement_with_coarse", "disagreement", "worst_class")
    assert [tuple(row[key] for key in keys) for row in found] == [
        (1, "contradicted", 0.5 * 0.8, 0.25, 0.5, "road"),  # as many of road as of sky: the first
        (2, "alone", 0.5, None, None, None),  # no human drew anything: confidence alone
        (3, "tie a", 0.75 * 0.875, 0.0, 0.25, "sky"),
        (4, "tie b", 0.75 * 0.875, 0.0, 0.25, "road"),
        (5, "sure", 0.9 * 0.9, 0.9, 0.1, "pole"),
    ]
    assert {row["ignored_fraction"] for row in found} == {0.25}


def test_an_image_of_which_no_class_is_known_is_ranked_too(tmp_path: Path) -> None:
    (row,) = ranked(tmp_path / "review.parquet", ([image("a", 0.5, 10, 1.0)], []))
    assert (row["trust"], row["disagreement"], row["worst_class"]) == (0.5, 0.0, None)


def test_a_run_without_images_has_an_empty_list(tmp_path: Path) -> None:
    assert ranked(tmp_path / "review.parquet") == []


def test_more_images_than_are_written_at_once_are_ranked_as_one(tmp_path: Path) -> None:
    count = ROWS_AT_ONCE + 100
    images = [image(f"{k:06}", (k * 7919 % count) / count) for k in range(count)]
    found = ranked(tmp_path / "review.parquet", *((images[k : k + 500], []) for k in range(0, count, 500)))
    assert [row["rank"] for row in found] == list(range(1, count + 1))
    assert [row["trust"] for row in found] == [k / count for k in range(count)]
    assert len({row["sample_id"] for row in found}) == count


def test_a_killed_ranking_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writing_review(tmp_path / "review.parquet", NAMES):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def run(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images in units of four, one of them without a coarse label."""
    folder = tmp_path_factory.mktemp("review")
    manifest = pq.read_table(city / "coarse.parquet")
    rows = manifest.to_pylist()
    rows[4]["coarse_label"] = None
    for row in rows:
        row["source"] = "none" if row["coarse_label"] is None else row["source"]
        row["label"] = None
    root = shutil.copytree(city, folder / "city")
    pq.write_table(pa.Table.from_pylist(rows, manifest.schema), root / "coarse.parquet")
    generate(LabelJob(root / "coarse.parquet", teacher, folder / "run", (1.0,), unit_size=4))
    return folder / "run"


def test_a_run_ranks_its_images_by_what_its_other_tables_say(run: Path) -> None:
    images = {row["sample_id"]: row for row in RunFolder(run).statistics("images").to_pylist()}
    lost: dict[str, dict[str, int]] = {name: {} for name in images}
    for row in RunFolder(run).statistics("classes").to_pylist():
        lost[row["sample_id"]][row["class_name"]] = row["contradicted_pixels"]
    found = RunFolder(run).statistics("review").to_pylist()
    assert [row["rank"] for row in found] == list(range(1, 11))
    assert [row["trust"] for row in found] == sorted(row["trust"] for row in found)
    assert sum(row["disagreement"] is None for row in found) == 1
    for row in found:
        source, by_class = images[row["sample_id"]], lost[row["sample_id"]]
        disagreement = sum(by_class.values()) / source["coarse_pixels"] if source["coarse_pixels"] else None
        assert row["disagreement"] == disagreement
        assert row["trust"] == (1 - (disagreement or 0)) * source["mean_confidence"]
        assert row["worst_class"] == (max(by_class, key=lambda name: by_class[name]) if disagreement else None)
        for name in ("agreement_with_coarse", "mean_confidence", "ignored_fraction"):
            assert row[name] == source[name]


# --- fuse leaves images out -------------------------------------------------------------------------------------------


def fused(run: Path, out: Path, *options: object) -> tuple[list[str], str, dict[str, Any]]:
    """Ids of the automatic labels that are left; what was printed of those dropped; what provenance keeps."""
    fine, auto = run.parent / "city" / "fine.parquet", run / "manifest.parquet"
    result = autolabel("manifest", "fuse", fine, auto, "-o", out / "fused.parquet", *options)
    assert result.exit_code == 0, result.output
    manifest = load_manifest(out / "fused.parquet")
    assert sum(s.source == "fine" for s in manifest.samples) == 6  # nothing is known about them: untouched
    (told,) = [line.strip() for line in result.stdout.splitlines() if line.startswith("  dropped")]
    ids = [s.sample_id for s in manifest.samples if s.source == "auto"]
    return ids, told, manifest.provenance["selection"]


@pytest.mark.parametrize("share", ["30%", "0.3", "39%"])
def test_the_least_trusted_share_is_dropped(run: Path, tmp_path: Path, share: str) -> None:
    kept, told, selection = fused(run, tmp_path, "--drop-worst", share)
    review = [row["sample_id"] for row in RunFolder(run).statistics("review").to_pylist()]
    listed = [s.sample_id for s in load_manifest(run / "manifest.parquet").samples]
    assert kept == [name for name in listed if name not in review[:3]]
    assert told == "dropped: 3 by --drop-worst"
    assert selection == {
        "drop_worst": pytest.approx(0.39 if share == "39%" else 0.3),
        "keep_if": None,
        "dropped": {str(run / "manifest.parquet"): {"worst": 3, "failed": 0, "missing": 0}},
    }


def test_a_condition_keeps_what_meets_it_and_not_what_lacks_the_value(run: Path, tmp_path: Path) -> None:
    images = {row["sample_id"]: row["agreement_with_coarse"] for row in RunFolder(run).statistics("images").to_pylist()}
    middle = sorted(value for value in images.values() if value is not None)[3]
    condition = f"agreement_with_coarse > {middle!r}"
    kept, told, selection = fused(run, tmp_path, "--keep-if", condition)
    assert set(kept) == {name for name, value in images.items() if value is not None and value > middle}
    assert told == "dropped: 4 by --keep-if, 1 because the value is missing"
    assert selection["keep_if"] == condition and selection["drop_worst"] is None


def test_drop_worst_and_keep_if_together_count_every_image_once(run: Path, tmp_path: Path) -> None:
    kept, told, _ = fused(run, tmp_path, "--drop-worst", "20%", "--keep-if", "rank > 5")
    review = [row["sample_id"] for row in RunFolder(run).statistics("review").to_pylist()]
    assert set(kept) == set(review[5:])
    assert told == "dropped: 2 by --drop-worst, 3 by --keep-if, 0 because the value is missing"


def refused(*arguments: object) -> str:
    result = autolabel("manifest", "fuse", *arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    return result.stderr.removeprefix("autolabel: ").rstrip()


@pytest.mark.parametrize("share", ["5", "0", "100%", "-1%", "five", "nan", "%"])
def test_a_share_that_is_no_number_from_0_to_1_is_refused(run: Path, tmp_path: Path, share: str) -> None:
    line = refused(run / "manifest.parquet", "-o", tmp_path / "f.parquet", f"--drop-worst={share}")
    assert line == f"--drop-worst {share}: expected a share between 0 and 1, such as 5% or 0.05"


@pytest.mark.parametrize("options", [("--drop-worst", "5%"), ("--keep-if", "trust > 0.5")])
def test_manifests_without_statistics_cannot_be_chosen_from(city: Path, tmp_path: Path, options: Sequence[str]) -> None:
    line = refused(city / "fine.parquet", "-o", tmp_path / "f.parquet", *options)
    assert line.startswith(f"nothing is known about the images of {city}/fine.parquet: to leave some out, give the")


def test_a_condition_that_nothing_meets_leaves_nothing_to_fuse(run: Path, tmp_path: Path) -> None:
    line = refused(run / "manifest.parquet", "-o", tmp_path / "f.parquet", "--keep-if", "trust > 1")
    assert line == "no labelled sample in these manifests after --keep-if: nothing to fuse"
    assert not (tmp_path / "f.parquet").exists()


def test_a_run_without_its_review_table_says_what_to_do(run: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(run, tmp_path / "old"))
    (old / "stats" / "review.parquet").unlink()
    line = refused(old / "manifest.parquet", "-o", tmp_path / "f.parquet", "--drop-worst", "5%")
    assert line == f"{old}/stats/review.parquet does not exist: finish the run first with `autolabel generate`"
