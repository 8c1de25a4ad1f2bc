"""The list of what to correct names the wrong images, or the command writes over other people's files."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from conftest import autolabel, contents, refused
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests import storage
from autolabel.manifests.run.folder import Run
from autolabel.manifests.tables import read_table
from autolabel.pipeline.review.lists import WORTH_SCHEMA
from autolabel.pipeline.review.review import review

pytestmark = pytest.mark.thorough

NAMES = ("a_1", "a_2", "b_1", "b_2", "c_1")
SIZE = 48, 64
SKY, ROAD, BICYCLIST = 0, 3, 10
BLOB = np.s_[10:30, 10:40]


def save(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Road under sky; a_1, a_2 and b_1 have an unsure cyclist. a_2 is the photograph of a_1, a bit brighter."""
    folder = tmp_path_factory.mktemp("drive")
    dice = np.random.default_rng(0)
    label = np.full(SIZE, ROAD, np.uint8)
    label[:8] = SKY
    for name in NAMES:
        image = dice.integers(0, 200, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        if name == "a_2":
            image = np.asarray(Image.open(folder / "images/a_1.png")) + np.uint8(5)
        save(folder / f"images/{name}.png", image)
        mine, sure = label.copy(), np.full(SIZE, 250, np.uint8)
        if name in ("a_1", "a_2", "b_1"):
            mine[BLOB] = BICYCLIST
            sure[BLOB] = 110 if name == "b_1" else 100
        save(folder / f"pngs/{name}.png", mine)
        save(folder / f"sure/{name}.png", sure)
    images, manifest = folder / "images", folder / "drive.parquet"
    assert autolabel("manifest", "scan", images, "--label-space", "camvid", "-o", manifest).exit_code == 0
    for run, keep in (("kept", ("--keep-confidence", 24)), ("bare", ())):
        done = autolabel(
            "adopt", folder / "pngs", "--confidence", folder / "sure", "--manifest", manifest, "--out", folder / run,
            "--threshold", 0.3, *keep,
        )  # fmt: skip
        assert done.exit_code == 0, done.output
    return folder


def test_images_are_listed_by_gain_and_a_frame_that_repeats_another_is_left_out(drive: Path, tmp_path: Path) -> None:
    done = autolabel("review", drive / "kept", "--budget", 2, "-o", tmp_path / "fix")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "fix/ids.txt").read_text() == "a_1\nb_1\n"  # a_2 gains more than b_1, but shows what a_1 does
    rows = read_table(tmp_path / "fix/review.parquet", WORTH_SCHEMA).to_pylist()
    assert [(row["rank"], row["sample_id"], row["class"]) for row in rows] == [
        (1, "a_1", "bicyclist"), (2, "b_1", "bicyclist"),
    ]  # fmt: skip
    assert all(row["region"] is None and row["pixels"] == 48 * 64 for row in rows)
    told = [float(row["expected_gain"]) for row in csv.DictReader((tmp_path / "fix/review.csv").open())]
    assert told == [row["expected_gain"] for row in rows]
    assert f"expected gain +{100 * sum(told):.2f} points" in done.output
    assert "No audit: the teacher's confidences are taken at their word" in done.output


def test_regions_are_mapped_and_take_no_more_than_the_time(drive: Path, tmp_path: Path) -> None:
    result = review(drive / "kept", "1min", out=tmp_path / "fix")
    rows = result.rows.to_pylist()
    assert result.seconds == sum(row["seconds"] for row in rows) <= 60
    assert {row["sample_id"] for row in rows} == {"a_1", "b_1"} and all(row["class"] == "bicyclist" for row in rows)
    for name in ("a_1", "b_1"):
        places = np.asarray(Image.open(tmp_path / f"fix/regions/{name}.png"))
        mine = [row for row in rows if row["sample_id"] == name]
        assert np.bincount(places.ravel())[1:].tolist() == [row["pixels"] for row in mine]
        assert not np.delete(places, np.r_[BLOB[0]], 0).any() and not np.delete(places, np.r_[BLOB[1]], 1).any()
        for row in mine:
            ys, xs = np.nonzero(places == row["region"])
            assert (row["top"], row["left"]) == (ys.min(), xs.min())
            assert (row["height"], row["width"]) == (np.ptp(ys) + 1, np.ptp(xs) + 1)


@pytest.mark.parametrize("budget", ["3", "2min"])
def test_the_same_again_writes_the_same_bytes_and_another_request_is_refused(
    drive: Path, tmp_path: Path, budget: str
) -> None:
    ask = ("review", drive / "kept", "--budget", budget, "-o", tmp_path / "fix")
    assert autolabel(*ask).exit_code == 0
    before = contents(tmp_path / "fix")
    assert autolabel(*ask).exit_code == 0
    assert contents(tmp_path / "fix") == before
    assert "asked for differently: choose another folder" in refused(*ask, "--seconds", "1,1,1")
    assert contents(tmp_path / "fix") == before


def test_a_folder_of_other_things_is_left_alone(drive: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    said = refused("review", drive / "kept", "--budget", 2, "-o", tmp_path)
    assert "is not empty and holds no review" in said
    assert contents(tmp_path) == {"mine.txt": b"mine"}
    assert "is a run" in refused("review", drive / "kept", "--budget", 2, "-o", drive / "kept/fix")
    assert not (drive / "kept/fix").exists()


def test_a_run_without_confidence_has_images_by_its_statistics_and_no_regions(drive: Path, tmp_path: Path) -> None:
    done = autolabel("review", drive / "bare", "--budget", 2, "-o", tmp_path / "fix")
    assert done.exit_code == 0, done.output
    assert "No confidence was kept: the choice rests on the statistics of whole images." in done.output
    assert (tmp_path / "fix/ids.txt").read_text() == "a_1\nb_1\n"
    said = refused("review", drive / "bare", "--budget", "5min", "-o", tmp_path / "regions")
    assert "has kept no confidence, so nobody knows its regions: ask for a number of images" in said
    assert not (tmp_path / "regions").exists()


def test_more_images_than_there_are_and_more_time_than_is_needed_are_told(drive: Path, tmp_path: Path) -> None:
    said = refused("review", drive / "kept", "--budget", 6, "-o", tmp_path / "fix")
    assert f"a budget of 6 images: {drive / 'kept'} has 5 labelled images" in said
    assert not (tmp_path / "fix").exists()
    done = autolabel("review", drive / "kept", "--budget", "100h", "-o", tmp_path / "fix")
    assert "are enough: no other region gains anything in the time that is left." in done.output
    assert (
        autolabel("review", drive / "kept", "--budget", 5, "-o", tmp_path / "all").output.count("less than asked") == 1
    )


def test_a_student_turns_the_choice_to_what_it_gets_wrong(drive: Path, tmp_path: Path) -> None:
    scores = {"iou": {"bicyclist": 1.0, "road": 0.5, "sky": None}}
    storage.write_json(tmp_path / "scores.json", scores)
    ask = ("review", drive / "kept", "--budget", 1, "-o", tmp_path / "fix")
    assert autolabel(*ask, "--student", tmp_path / "scores.json").exit_code == 0
    assert "bicyclist" not in (tmp_path / "fix/review.csv").read_text()
    for content, said in (({}, "has no 'iou'"), ({"iou": {"tram": 0.5}}, "has scores of none of the classes")):
        storage.write_json(tmp_path / "scores.json", content)
        assert said in refused("review", drive / "kept", "--budget", 1, "-o", tmp_path / "x", "--student",
                               tmp_path / "scores.json")  # fmt: skip


def test_what_people_have_done_is_not_chosen_again_and_neither_are_frames_that_repeat_it(
    drive: Path, tmp_path: Path
) -> None:
    (tmp_path / "done.txt").write_text("a_1\nelsewhere\n")
    ask = ("review", drive / "kept", "-o", tmp_path / "fix", "--done", tmp_path / "done.txt")
    done = autolabel(*ask, "--budget", 1)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "fix/ids.txt").read_text() == "b_1\n"
    assert "1 of its 2 ids not labelled in" in done.output
    result = review(drive / "kept", "1h", out=tmp_path / "regions", done=tmp_path / "done.txt")
    assert result.rows["sample_id"].unique().to_pylist() == ["b_1"]
    assert result.iou > review(drive / "kept", "1h", out=tmp_path / "all").iou
    (tmp_path / "done.txt").write_text("elsewhere\n")
    assert "none of its 1 id is labelled in" in refused(*ask[:3], tmp_path / "x", *ask[4:], "--budget", 1)


def test_an_audit_of_another_teacher_is_refused(drive: Path, tmp_path: Path) -> None:
    said = refused("review", drive / "kept", "--budget", 1, "-o", tmp_path / "x", "--audit", tmp_path / "audit.json")
    assert "audit.json" in said
    assert not (tmp_path / "x").exists()


def test_photographs_that_are_gone_leave_the_order_of_ids(drive: Path, tmp_path: Path) -> None:
    hidden = drive / "images" / "a_2.png"
    hidden.rename(tmp_path / "a_2.png")
    try:
        result = review(Run.open(drive / "kept"), 2, out=tmp_path / "fix")
    finally:
        (tmp_path / "a_2.png").rename(hidden)
    assert result.rows["sample_id"].to_pylist() == ["a_1", "b_1"]
    assert any("1 photograph could not be read" in note for note in result.notes)


def test_nothing_is_to_be_gained_where_a_person_said_the_same_or_where_the_teacher_does_not_count(
    drive: Path, tmp_path: Path
) -> None:
    for name in NAMES:
        coarse = np.full(SIZE, 255, np.uint8)
        if name == "a_1":
            coarse[BLOB] = BICYCLIST
        save(tmp_path / f"coarse/{name}.png", coarse)
    (tmp_path / "policy.toml").write_text("threshold = 0.3\n[area]\nrows = [0, 48]\ncolumns = [0, 10]\n")
    scan = ("--coarse", tmp_path / "coarse", "--label-space", "camvid", "-o", tmp_path / "coarse.parquet")
    assert autolabel("manifest", "scan", drive / "images", *scan).exit_code == 0
    for run, how in (("confirmed", ("--threshold", 0.3)), ("outside", ("--policy", tmp_path / "policy.toml"))):
        done = autolabel(
            "adopt", drive / "pngs", "--confidence", drive / "sure", "--manifest", tmp_path / "coarse.parquet",
            "--out", tmp_path / run, "--keep-confidence", 24, *how,
        )  # fmt: skip
        assert done.exit_code == 0, done.output
    rows = review(tmp_path / "confirmed", "1h", out=tmp_path / "fix").rows
    assert set(rows["sample_id"].to_pylist()) == {"a_2", "b_1"}
    assert not len(review(tmp_path / "outside", "1h", out=tmp_path / "none").rows)
