"""`generate FOLDER` scans by itself, and the same command goes on. If this fails, a second call starts from nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from conftest import autolabel, labels_of, photograph, refused
from PIL import Image

from autolabel.manifests.label_space import BUILT_IN
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import load_manifest
from autolabel.teacher.checkpoints import read_checkpoint


def label(source: Path, teacher: Path, out: Path, *more: object) -> str:
    """Label a folder in this process at one scale; return the accounts."""
    result = autolabel("generate", source, "--teacher", teacher, "--out", out, "--scales", 1, *more)
    assert result.exit_code == 0, result.output
    return next((line for line in str(result.stdout).splitlines() if re.match(r"\d+ samples?: ", line)), "")


def test_a_folder_is_labelled_with_the_classes_of_the_teacher(city: Path, teacher: Path, tmp_path: Path) -> None:
    photograph(city, tmp_path / "drive", ["a_1", "a_2"])
    assert label(tmp_path / "drive", teacher, tmp_path / "run").startswith("2 samples: 2 labelled")
    assert sorted(labels_of(tmp_path / "run")) == ["a_1", "a_2"]
    assert Run.open(tmp_path / "run").label_space == read_checkpoint(teacher).label_space
    assert load_manifest(tmp_path / "run" / "input.parquet").image_root == tmp_path / "drive"


def test_the_account_of_the_folder_is_shown_before_it_is_labelled(city: Path, teacher: Path, tmp_path: Path) -> None:
    photograph(city, tmp_path / "drive", ["a_1", "a_2"])
    shutil.copy(tmp_path / "drive" / "a_1.png", tmp_path / "drive" / "b_1.png")
    (tmp_path / "drive" / "film.mp4").write_bytes(b"?")
    (tmp_path / "drive" / ".thumbnails").mkdir()
    options = ("--teacher", teacher, "--out", tmp_path / "run", "--scales", 1, "--dry-run")
    lines = autolabel("generate", tmp_path / "drive", *options).stdout.splitlines()
    assert lines[0] == "3 images, 19 classes of label space 'cityscapes'"
    assert [line.split("  ")[0] for line in lines[lines.index("left aside") + 3 :][:2]] == [
        " hidden files, and folders of other programs",
        " other files, .mp4",
    ]
    assert lines[lines.index("SUSPICIOUS: 1 thing to look at before you go on") + 1].startswith(
        "  - 2 photographs are copies of one another"
    )


def test_the_same_command_goes_on_when_the_folder_has_gained_images_elsewhere_in_it(
    city: Path, teacher: Path, tmp_path: Path
) -> None:
    photograph(city, tmp_path / "drive" / "monday", ["a_1", "a_2"])
    label(tmp_path / "drive", teacher, tmp_path / "run")
    assert label(tmp_path / "drive", teacher, tmp_path / "run").endswith("nothing was to be done")
    before = labels_of(tmp_path / "run")
    photograph(city, tmp_path / "drive" / "tuesday", ["x_1", "x_2", "b_3"])
    shutil.move(tmp_path / "drive" / "tuesday" / "b_3.png", tmp_path / "drive" / "b_3.png")
    (tmp_path / "drive" / "tuesday" / "x_1.png").unlink()  # it shows the same as a_1
    assert label(tmp_path / "drive", teacher, tmp_path / "run").startswith("4 samples: 4 labelled")
    after = labels_of(tmp_path / "run")
    assert sorted(after) == ["b_3", "monday/a_1", "monday/a_2", "tuesday/x_2"]
    assert {name: after[name] for name in before} == before


def test_the_run_may_lie_inside_the_folder(city: Path, teacher: Path, tmp_path: Path) -> None:
    photograph(city, tmp_path, ["a_1", "a_2"])
    run = tmp_path / "runs" / "auto"
    options = ("--store", "png")  # its labels are PNGs, which look like images
    assert label(tmp_path, teacher, run, *options).startswith("2 samples: 2 labelled")
    assert label(tmp_path, teacher, run, *options).endswith("nothing was to be done")
    assert autolabel("report", run).exit_code == 0  # draws pictures into the run
    assert label(tmp_path, teacher, run, *options).endswith("nothing was to be done")


def test_a_dry_run_writes_nothing(city: Path, teacher: Path, tmp_path: Path) -> None:
    photograph(city, tmp_path / "drive", ["a_1"])
    label(tmp_path / "drive", teacher, tmp_path / "run", "--dry-run")
    assert not (tmp_path / "run").exists()


def test_parts_of_a_run_share_the_manifest_of_the_folder(city: Path, teacher: Path, tmp_path: Path) -> None:
    photograph(city, tmp_path / "drive", ["a_1", "a_2"])
    options = ("--unit-size", 1, "--part")
    assert label(tmp_path / "drive", teacher, tmp_path / "run", *options, "1/2").startswith("2 samples: 1 labelled")
    assert label(tmp_path / "drive", teacher, tmp_path / "run", *options, "2/2").startswith("2 samples: 2 labelled")


def test_an_image_that_is_gone_is_named(city: Path, teacher: Path, tmp_path: Path) -> None:
    photograph(city, tmp_path / "drive", ["a_1", "a_2"])
    label(tmp_path / "drive", teacher, tmp_path / "run")
    (tmp_path / "drive" / "a_2.png").unlink()
    line = refused("generate", tmp_path / "drive", "--teacher", teacher, "--out", tmp_path / "run", "--scales", 1)
    assert "samples of this run are not in" in line and "'a_2'" in line


def test_a_source_that_cannot_be_labelled_is_refused(city: Path, teacher: Path, tmp_path: Path) -> None:
    def line(source: Path, *more: object) -> str:
        return refused("generate", source, "--teacher", teacher, "--out", tmp_path / "run", *more)

    (tmp_path / "empty").mkdir()
    assert line(tmp_path / "gone") == f"{tmp_path}/gone does not exist: expected a folder of images, or a manifest"
    assert line(tmp_path / "empty").startswith(f"no images under {tmp_path}/empty; tried Cityscapes (")
    assert line(city / "coarse.parquet", "--label-space", "camvid") == (
        f"--label-space is for a folder of images: the manifest {city}/coarse.parquet names its own classes"
    )
    photograph(city, tmp_path / "drive", ["a_1"])
    label(tmp_path / "drive", teacher, tmp_path / "other")
    assert line(tmp_path / "other") == (
        f"{tmp_path}/other is a run: expected a folder of images, or a manifest such as"
        f" {tmp_path}/other/manifest.parquet"
    )
    assert "predicts 19 classes of 'cityscapes'" in line(tmp_path / "drive", "--label-space", "camvid")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    other = refused("generate", tmp_path / "drive", "--teacher", teacher, "--out", tmp_path / "notes")
    assert other == f"{tmp_path}/notes is not empty and not a run (no run.json): choose another --out"
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["todo.txt"]


def test_a_folder_of_several_data_sets_is_refused(teacher: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        for kind, mode in (("images", "RGB"), ("labels", "L")):
            (tmp_path / "all" / name / kind).mkdir(parents=True)
            Image.new(mode, (64, 64)).save(tmp_path / "all" / name / kind / "a.png")
    line = refused("generate", tmp_path / "all", "--teacher", teacher, "--out", tmp_path / "run")
    assert line.startswith(f"{tmp_path}/all holds 2 data sets: {tmp_path}/all/one")
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_does_not_name_its_classes_needs_a_label_space(
    city: Path, teacher: Path, tmp_path: Path
) -> None:
    photograph(city, tmp_path / "drive", ["a_1"])
    published = tmp_path / "published.pth"
    torch.save({"state_dict": read_checkpoint(teacher).state_dict}, published)
    line = refused("generate", tmp_path / "drive", "--teacher", published, "--out", tmp_path / "run")
    assert line == (
        f"{published} does not name its classes: give --label-space ({', '.join(BUILT_IN)}, or a JSON file) to label"
        f" {tmp_path}/drive"
    )
    run = label(tmp_path / "drive", published, tmp_path / "run", "--label-space", "cityscapes")
    assert run.startswith("1 sample: 1 labelled")
