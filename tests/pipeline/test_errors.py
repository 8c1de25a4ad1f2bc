"""Likely mistakes in human labels. If this fails, people look at the wrong images, or trust labels that are wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import autolabel, contents, refused
from PIL import Image
from pyarrow import csv

from autolabel.manifests import storage
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.policy import PAPER, Policy
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.samples import Manifest, Sample, load_manifest, save_manifest
from autolabel.manifests.scan import scan
from autolabel.pipeline.adopt import Pngs, adopt, adopting_job
from autolabel.pipeline.analysis.errors import find_errors
from autolabel.pipeline.analysis.errors_table import ERRORS_SCHEMA
from autolabel.pipeline.analysis.judges import SEEN, UNKNOWN, UNSEEN, Judge, judge_of
from autolabel.pipeline.job import LabelJob, Portion
from autolabel.pipeline.relabel import relabel
from autolabel.pipeline.run import generate

ROAD, BUILDING = (CITYSCAPES.names.index(name) for name in ("road", "building"))


@pytest.fixture(scope="module")
def place(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """both.parquet: 6 images that the teacher has seen and 3 that it has not; `run` over them; planted.parquet.

    In planted.parquet, the road of the last image is called building.
    """
    folder = tmp_path_factory.mktemp("errors")
    both = scan(city / "data", layout="cityscapes", splits=["train", "val"])[0]
    save_manifest(folder / "both.parquet", both)
    generate(LabelJob(folder / "both.parquet", teacher, folder / "run", scales=(1.0,), keep_confidence=16))
    planted = relabelled(
        both.samples[-1], folder / "planted.png", lambda label: np.where(label == ROAD, BUILDING, label)
    )
    save_manifest(folder / "planted.parquet", Manifest.of(CITYSCAPES, (*both.samples[:-1], planted)))
    return folder


def relabelled(sample: Sample, path: Path, change: Callable[[np.ndarray], np.ndarray]) -> Sample:
    """The sample with another label, which is written to `path` as train ids."""
    Image.fromarray(change(read_sample_label(sample, CITYSCAPES)).astype(np.uint8)).save(path)
    return replace(sample, label=path, label_ids="train", coarse_label=None)


def test_a_road_that_is_called_building_comes_first_with_its_box(place: Path, tmp_path: Path) -> None:
    ranking = find_errors(place / "planted.parquet", tmp_path / "out", runs=[place / "run"])
    sample = load_manifest(place / "both.parquet").samples[-1]
    first = ranking.table.iloc[0]
    assert (first["rank"], first["sample_id"]) == (1, sample.sample_id)
    assert (first["human"], first["suggested"]) == ("building", "road")
    road = np.argwhere(read_sample_label(sample, CITYSCAPES) == ROAD)
    assert abs(first[["top", "left"]].to_numpy(float) - road.min(axis=0)).max() <= 3
    assert first["pixels"] > 0.9 * len(road) and first["region_pixels"] >= first["pixels"]
    assert first["score"] > 0.9 and first["confidence"] > 0.8
    assert ("building", "road") in ranking.likely
    assert (tmp_path / "out" / "ids.txt").read_text().splitlines()[0] == sample.sample_id
    clean = find_errors(place / "both.parquet", tmp_path / "clean", runs=[place / "run"])
    assert ("building", "road") not in clean.likely


def test_the_same_bytes_come_of_any_number_of_threads_and_the_csv_has_the_rows_of_the_table(
    place: Path, tmp_path: Path
) -> None:
    for workers in (1, 3):
        find_errors(
            place / "planted.parquet", tmp_path / str(workers), runs=[place / "run"], workers=workers, min_pixels=1
        )
    ranking = find_errors(place / "planted.parquet", tmp_path / "3", runs=[place / "run"], min_pixels=1)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert sorted(contents(tmp_path / "1")) == ["errors.csv", "errors.parquet", "ids.txt"]
    table = ranking.table
    assert len(table) == ranking.regions > 20
    assert table["rank"].tolist() == list(range(1, len(table) + 1))
    assert table["score"].is_monotonic_decreasing and table["score"].between(0, 1).all()
    written = csv.read_csv(tmp_path / "1" / "errors.csv").cast(ERRORS_SCHEMA)
    assert written.to_pandas().equals(table)
    ids = (tmp_path / "1" / "ids.txt").read_text().splitlines()
    assert ids == table["sample_id"].drop_duplicates().tolist()


def test_a_run_judges_its_own_input_and_says_how_many_images_its_teacher_has_seen(place: Path, tmp_path: Path) -> None:
    said = autolabel("errors", place / "run", "-o", tmp_path / "out").output
    assert "was trained on 6 of the images that it judges" in said and "manifest fold" in said
    assert "9 images: 9 judged\n" in said
    coarse = autolabel("errors", place / "run", "--coarse", "-o", tmp_path / "out").output
    assert "9 images: 9 judged\n" in coarse and coarse != said


def test_a_relabelled_run_judges_with_the_confidence_of_the_run_that_it_comes_from(place: Path, tmp_path: Path) -> None:
    relabel(Run.open(place / "run"), Policy(threshold=0.9), out=tmp_path / "strict")
    for name, run in (("a", place / "run"), ("b", tmp_path / "strict")):
        find_errors(Run.open(run), tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_worst_keeps_the_first_images_and_pictures_show_the_first_regions(place: Path, tmp_path: Path) -> None:
    command = ("errors", place / "planted.parquet", "--run", place / "run", "-o", tmp_path / "out", "--min-pixels", 1)
    assert autolabel(*command).exit_code == 0
    ids = (tmp_path / "out" / "ids.txt").read_text().splitlines()
    assert autolabel(*command, "--worst", 2, "--pictures", 3).exit_code == 0
    assert (tmp_path / "out" / "ids.txt").read_text().splitlines() == ids[:2]
    pictures = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert [name[:4] for name in pictures] == ["001-", "002-", "003-"]
    assert pictures[0].endswith("-building-is-road.webp")
    with Image.open(tmp_path / "out" / "pictures" / pictures[0]) as picture:
        assert picture.height == 320
    assert autolabel(*command, "--pictures", 1).exit_code == 0
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 1


def test_an_image_is_judged_by_the_run_whose_teacher_has_not_seen_it(place: Path, tmp_path: Path) -> None:
    """An adopted run, of whose teacher nobody knows, judges the images that the teacher has seen."""
    both = load_manifest(place / "both.parquet")
    for sample in both.samples:
        name = sample.image.relative_to(both.image_root).with_suffix(".png")
        (tmp_path / "pngs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "confidence" / name).parent.mkdir(parents=True, exist_ok=True)
        label = read_sample_label(sample, CITYSCAPES)
        Image.fromarray(label).save(tmp_path / "pngs" / name)
        Image.fromarray(np.full_like(label, 250)).save(tmp_path / "confidence" / name)
    job = adopting_job(place / "both.parquet", tmp_path / "adopted", PAPER, keep_confidence=8)
    adopt(Pngs(tmp_path / "pngs", tmp_path / "confidence"), job)
    judges = [Judge.of(Run.open(path)) for path in (place / "run", tmp_path / "adopted")]
    moved = replace(both.samples[0], sample_id="another", image=tmp_path / "copy.png")
    shutil.copy(both.samples[0].image, moved.image)
    gone = replace(moved, image=tmp_path / "gone.png")
    found = [judge_of(sample, judges) for sample in (*both.samples, moved, gone)]
    expected = [(1, s.sample_id, UNKNOWN) if s.split == "train" else (0, s.sample_id, UNSEEN) for s in both.samples]
    assert found == [*expected, (1, both.samples[0].sample_id, UNKNOWN), None]
    assert [judge_of(s, judges[:1]) for s in both.samples[:1]] == [(0, both.samples[0].sample_id, SEEN)]
    ranking = find_errors(place / "planted.parquet", tmp_path / "out", runs=[place / "run", tmp_path / "adopted"])
    (note,) = ranking.notes
    assert "adopted has seen these images (no teacher is known)" in note
    alone = find_errors(place / "planted.parquet", tmp_path / "out", runs=[tmp_path / "adopted"])
    assert alone.table[["sample_id", "human", "suggested"]].to_numpy().tolist() == [
        [both.samples[-1].sample_id, "building", "road"]
    ]


def test_images_without_label_without_run_and_with_a_damaged_label_are_counted(place: Path, tmp_path: Path) -> None:
    samples = load_manifest(place / "planted.parquet").samples
    (tmp_path / "damaged.png").write_bytes(b"no PNG")
    Image.fromarray(np.zeros((3, 3, 3), np.uint8)).save(tmp_path / "strange.png")
    small = replace(samples[4], label=tmp_path / "small.png", label_ids="train")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "small.png")
    save_manifest(
        tmp_path / "some.parquet",
        Manifest.of(
            CITYSCAPES,
            (
                samples[-1],
                replace(samples[0], source="none", label=None, coarse_label=None),
                replace(samples[1], sample_id="strange", image=tmp_path / "strange.png"),
                replace(samples[2], label=tmp_path / "damaged.png"),
                small,
            ),
        ),
    )
    result = autolabel("errors", tmp_path / "some.parquet", "--run", place / "run", "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "5 images: 1 judged, 1 without a human label, 1 not in these runs, 2 unreadable\n" in result.output
    assert "left out, the first of 2: " in result.output and "damaged.png" in result.output


def refusal(place: Path, tmp_path: Path, *arguments: object) -> str:
    """Run the command, which must fail and write nothing; return its line with the folders named."""
    line = refused("errors", *arguments, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return line.replace(str(place), "PLACE").replace(str(tmp_path), "TMP")


def test_input_that_cannot_be_judged_is_refused_in_one_line(
    place: Path, teacher: Path, camvid: Path, city: Path, tmp_path: Path
) -> None:
    def said(*arguments: object) -> str:
        return refusal(place, tmp_path, *arguments)

    run, both = place / "run", place / "both.parquet"
    generate(LabelJob(both, teacher, tmp_path / "plain", scales=(1.0,), portion=Portion(limit=1)))
    assert said(tmp_path / "plain") == "TMP/plain has kept no confidence: generate with --keep-confidence 8 does"
    bare = tuple(replace(s, source="none", label=None, coarse_label=None) for s in load_manifest(both).samples)
    save_manifest(tmp_path / "bare.parquet", Manifest.of(CITYSCAPES, bare))
    assert said(tmp_path / "bare.parquet", "--run", run) == (
        "TMP/bare.parquet has no human labels, fine or coarse: nothing to look for mistakes in"
    )
    assert said(run / "manifest.parquet", "--run", run) == (
        "PLACE/run/manifest.parquet has no human labels, fine or coarse: nothing to look for mistakes in"
    )
    assert said(city / "coarse.parquet", "--run", run).startswith(
        f"none of the 10 images of {city / 'coarse.parquet'} that have a human label is among the labelled images of"
    )
    assert said(camvid, "--run", run) == (
        f"PLACE/run has label space 'cityscapes' (19 classes) but the labels of {camvid} 'camvid' (11):"
        " compare labels of one label space"
    )
    assert said(both).startswith("PLACE/both.parquet is a manifest: name the runs over its images with --run")
    assert said(run, "--run", run).startswith("PLACE/run is a run and --run names PLACE/run: give a run alone")
    assert said(run, "--worst", 0) == "--worst 0: expected 1 or more"
    assert said(run, "--workers", 0) == "--workers 0: expected 1 or more"
    assert said(run, "--border", -1) == "--border -1: expected 0 or more"
    assert said(tmp_path / "nothing", "--run", run) == "TMP/nothing does not exist"


def test_a_folder_that_holds_something_else_is_left_as_it_is(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert refused("errors", place / "run", "-o", tmp_path / "out").endswith(
        "out holds notes.txt, which is no ranking of label errors: choose another -o"
    )
    line = refused("errors", place / "run", "-o", place / "run" / "errors")
    assert str(place / "run") in line and not (place / "run" / "errors").exists()
    assert contents(tmp_path / "out") == {"notes.txt": b"mine"}


def test_a_folder_in_which_a_command_was_killed_is_written_anew(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".errors.csv.0123456789ab{storage.TEMPORARY}").write_text("half")
    find_errors(place / "run", tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["errors.csv", "errors.parquet", "ids.txt"]
