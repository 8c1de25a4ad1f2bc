"""Wrong input gives one clear line and exit code 2: it names the value, what was expected and what to do.

If this fails, somebody reads a traceback at night, or worse, reads nothing.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, autolabel, refused
from PIL import Image

from autolabel.manifests.label_space import CAMVID
from autolabel.manifests.samples import load_manifest
from autolabel.manifests.settings import GROUPS, job_fields
from autolabel.manifests.wording import Table
from autolabel.pipeline.job import LabelJob
from autolabel.student.job import TrainJob


def scan(images: Path, output: Path, *more: object) -> tuple[object, ...]:
    return ("manifest", "scan", images, "--label-space", "camvid", "-o", output, *more)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two 8 x 6 photographs with fine labels, CamVid ids."""
    for name in ("one", "two"):
        for kind, mode, value in (("images", "RGB", (9, 9, 9)), ("labels", "L", 3)):
            path = tmp_path / kind / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new(mode, (8, 6), value).save(path)  # type: ignore[arg-type]
    return tmp_path


TABLE = (
    " class       images  pixels    share",
    " ───────────────────────────────────",
    *(f" {name:<10}       0       0    0.0 %" for name in ("sky", "building", "pole")),
    " road             2      96  100.0 %",
    *(f" {c.name:<10}       0       0    0.0 %" for c in CAMVID.classes[4:]),
    "10 classes in no label",
)


def test_a_scan_counts_images_labels_and_sizes(pictures: Path) -> None:
    (pictures / "images" / "zero.jpg").write_bytes(b"")
    Image.new("L", (8, 6)).save(pictures / "labels" / "orphan.png")
    output = pictures / "m.parquet"
    result = autolabel(*scan(pictures / "images", output, "--labels", pictures / "labels"))
    assert result.exit_code == 0
    orphan = f"{pictures}/labels/orphan.png"
    aside = Table("", ["reason", "number", "first"], [["labels without their image", "1", orphan]])
    assert result.stdout.splitlines() == [
        "3 images, 11 classes of label space 'camvid'",
        f"  layout              folder in {pictures}/images",
        "  with fine labels    2",
        "  with coarse labels  0 (0 of them have no fine label)",
        "  without a label     1",
        f"  labels without their image  1: {pictures}/labels/orphan.png",
        "  sizes               8 x 6 (2)",
        f"  unreadable images   1: {pictures}/images/zero.jpg: the file is empty",
        "",
        "classes in the labels",
        *TABLE,
        "",
        "left aside",
        *aside.lines(),
        "",
        "SUSPICIOUS: 2 things to look at before you go on",
        f"  - 2 of 2 photographs are of one colour, such as {pictures}/images/one.png: leave out what is no photograph",
        f"  - 2 photographs are copies of one another, such as {pictures}/images/one.png and {pictures}/images/two.png:"
        " copies in training and validation are a leak",
        f"wrote {output}",
    ]
    shown = autolabel("manifest", "show", output)
    assert "3 samples, label space 'camvid'" in shown.stdout
    assert not load_manifest(output).samples[2].readable


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("cityscapes", "no Cityscapes images of split train, val, test, train_extra under"),
        ("mapillary", "no config.json under"),
    ],
)
def test_a_wrong_layout_is_named(pictures: Path, layout: str, message: str) -> None:
    assert message in refused("manifest", "scan", pictures, "--layout", layout, "-o", pictures / "m.parquet")
    assert "is not a folder that exists" in refused(
        "manifest", "scan", "nowhere", "--layout", layout, "-o", "m.parquet"
    )


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refused(*scan(tmp_path / "empty", tmp_path / "m.parquet")).startswith(f"no images under {tmp_path}/empty")


def test_labels_with_unknown_ids_are_refused(pictures: Path) -> None:
    Image.new("L", (8, 6), 77).save(pictures / "labels" / "two.png")
    line = refused(*scan(pictures / "images", pictures / "m.parquet", "--labels", pictures / "labels"))
    assert line == (
        f"{pictures}/labels/two.png: ids [77] are not in label space 'camvid' (train ids): repair or remove it, or name"
        " the right label space and ids"
    )
    assert not (pictures / "m.parquet").exists()


def test_labels_of_another_size_are_refused(pictures: Path) -> None:
    Image.new("L", (9, 6)).save(pictures / "labels" / "two.png")
    line = refused(*scan(pictures / "images", pictures / "m.parquet", "--labels", pictures / "labels"))
    assert line.startswith(f"{pictures}/labels/two.png: the label is 9 x 6 but its image 8 x 6 pixels")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threshold", "1.5"), "threshold 1.5: expected a probability in [0, 1), such as 0.5"),
        (("--scales", "0.5,2"), "scales 0.5,2: expected distinct numbers in (0, 4] with 1 among them"),
        (("--scales", "one"), "--scales one: expected numbers separated by commas, such as 0.5,1,2"),
        (("--workers", "0"), "workers 0: expected 1 or more"),
        (("--workers", "8..2"), "workers 8..2: expected MIN..MAX with MIN from 1 to MAX, such as 2..8"),
        (("--workers", "0..3"), "workers 0..3: expected MIN..MAX with MIN from 1 to MAX, such as 2..8"),
        (("--workers", "two..8"), "--workers two..8: expected a number, or MIN..MAX such as 2..8"),
        (("--workers", "2.."), "--workers 2..: expected a number, or MIN..MAX such as 2..8"),
        (("--workers", "1.5"), "--workers 1.5: expected a number, or MIN..MAX such as 2..8"),
        (
            ("--workers", "2..8", "--engine", "local"),
            "workers 2..8 and engine local: workers that come and go are Ray's; give engine ray, or one number",
        ),
        (
            ("--workers", "2..8", "--device", "cuda:1"),
            "device 'cuda:1': it is one GPU, and Ray gives each worker its own",
        ),
        (("--limit", "-3"), "limit -3: expected 1 or more"),
        (("--precision", "int4"), "unknown precision 'int4': expected auto, float32, bfloat16, float16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_outside_their_range_are_refused(
    city: Path, teacher: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    asked = ("generate", city / "coarse.parquet", "--teacher", teacher, "--out", tmp_path / "run")
    assert message in refused(*asked, *options)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_none_is_refused(city: Path, teacher: Path, tmp_path: Path) -> None:
    asked = ("generate", city / "coarse.parquet", "--out", tmp_path / "run", "--teacher")
    empty, text = tmp_path / "empty.pt", tmp_path / "text.pt"
    empty.write_bytes(b"")
    text.write_text("weights, honestly")
    assert refused(*asked, empty) == f"{empty} is empty (0 bytes): it was cut off while it was written or copied"
    assert refused(*asked, text).startswith(f"{text} is not a loadable checkpoint")
    assert refused(*asked, tmp_path / "gone.pt").startswith(f"{tmp_path}/gone.pt does not exist: expected a")


def test_a_teacher_of_another_label_space_is_refused(pictures: Path, teacher: Path) -> None:
    manifest = pictures / "m.parquet"
    autolabel(*scan(pictures / "images", manifest))
    line = refused("generate", manifest, "--teacher", teacher, "--out", pictures / "run")
    assert "predicts 19 classes of 'cityscapes'" in line and "'camvid' with 11" in line


def test_a_manifest_that_is_none_is_refused(tmp_path: Path, teacher: Path) -> None:
    (tmp_path / "bad.parquet").write_text("PAR1, or so")
    for command in (("manifest", "show"), ("stats",)):
        refused(*command, tmp_path / "bad.parquet" if command[0] == "manifest" else tmp_path)
    assert "is not a readable parquet file" in refused("manifest", "show", tmp_path / "bad.parquet")
    assert refused("manifest", "show", tmp_path / "no.parquet") == f"{tmp_path}/no.parquet does not exist"


def test_scoring_on_training_images_is_refused_unless_allowed(city: Path, teacher: Path, tmp_path: Path) -> None:
    asked = ("evaluate", teacher, city / "fine.parquet", "--scales", "1")
    assert "was trained on 6 of the 6 images" in refused(*asked)
    output = tmp_path / "scores.json"
    allowed = autolabel(*asked, "--allow-overlap", "-o", output)
    assert allowed.exit_code == 0 and "mean IoU" in allowed.stdout
    assert json.loads(output.read_text())["images"] == 6


def test_too_many_quarantined_samples_give_exit_code_3(city: Path, teacher: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for sample in load_manifest(city / "coarse.parquet").samples[:3]:
        shutil.copyfile(sample.image, images / sample.image.name)
    broken = images / "broken.png"
    broken.write_bytes(next(images.glob("*.png")).read_bytes()[:-200])
    manifest, run = tmp_path / "m.parquet", tmp_path / "run"
    space = ("manifest", "scan", images, "--label-space", "cityscapes", "-o", manifest)
    assert autolabel(*space).exit_code == 0
    asked = ("generate", manifest, "--teacher", teacher, "--out", run, "--engine", "local")
    result = autolabel(*asked, "--scales", "1")
    assert result.exit_code == 3
    assert result.stdout.startswith("4 samples: 3 labelled, 1 quarantined, 0 left for later")
    assert "1 of 4 samples are quarantined, more than --max-quarantined 0.001" in result.stderr
    assert autolabel(*asked, "--scales", "1", "--max-quarantined", "0.3").exit_code == 0


def test_the_page_of_all_commands_is_what_the_program_prints() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "make_cli.py"))["page"]()
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == page, "run: python docs/make_cli.py"


def test_a_mistyped_command_line_is_one_line_that_names_the_help() -> None:
    assert refused("generate", "drive", "--treshold", "0.7") == (
        "no such option '--treshold'; did you mean '--threshold'? `autolabel generate --help` lists the options"
    )
    assert refused("train", "fine.parquet", "--out", "teacher") == (
        "missing option '--val'; `autolabel train --help` lists the options"
    )
    assert refused("generate", "drive", "--teacher", "t.pt", "--out", "run", "--part", "3") == (
        "--part 3: expected I/N, such as 2/8 for the second of eight"
    )
    assert refused("lable").startswith("no such command 'lable'")


def test_the_help_has_every_setting_of_a_job_once_in_its_group() -> None:
    for command, job in (("generate", LabelJob), ("train", TrainJob)):
        text = autolabel(command, "--help").stdout
        parts = re.split("|".join(f"^{title}:$" for title in GROUPS.values()), text, flags=re.MULTILINE)[1:]
        sections = dict(zip(GROUPS, parts, strict=True))
        for field in job_fields(job):
            assert re.search(rf"^  {field.flag}\b", sections[field.words.group], re.MULTILINE), field.flag
            assert len(re.findall(rf"^  {field.flag}\b", text, re.MULTILINE)) == 1


def test_a_folder_where_a_manifest_is_meant_is_refused_with_the_way_to_make_one(city: Path, tmp_path: Path) -> None:
    line = refused("train", city / "data", "--val", city / "val.parquet", "--out", tmp_path / "out")
    assert line == (f"{city}/data is a folder: expected a manifest; `autolabel manifest scan {city}/data` makes one")
    run = tmp_path / "run"
    run.mkdir()
    shutil.copyfile(city / "coarse.parquet", run / "manifest.parquet")
    line = refused("manifest", "fuse", city / "fine.parquet", run, "-o", tmp_path / "fused.parquet")
    assert line == f"{run} is a folder: expected a manifest; this run's is {run}/manifest.parquet"


def test_a_layout_that_cannot_be_guessed_is_refused_with_those_that_were_tried(tmp_path: Path) -> None:
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive" / "notes.txt").write_text("no image")
    line = refused("manifest", "scan", tmp_path / "drive", "-o", tmp_path / "m.parquet")
    assert line.startswith(f"no images under {tmp_path}/drive; tried Cityscapes (leftImg8bit/")
    assert "Mapillary Vistas" in line and "any folder of .png" in line


def test_the_engine_that_was_chosen_is_said_in_one_line(city: Path, teacher: Path, tmp_path: Path) -> None:
    result = autolabel(
        "generate", city / "coarse.parquet", "--teacher", teacher, "--out", tmp_path / "run", "--limit", 1
    )
    lines = [line for line in result.stderr.splitlines() if "engine" in line]
    assert lines == ["labelling: engine local: this process does all the work"]


@pytest.mark.parametrize("chosen", [None, "ACTIVE"])
def test_threads_of_torch_sleep_while_they_wait_unless_told_otherwise(
    chosen: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY")
    if chosen:
        monkeypatch.setenv("OMP_WAIT_POLICY", chosen)
    autolabel("manifest", "show", tmp_path)
    assert os.environ["OMP_WAIT_POLICY"] == (chosen or "PASSIVE")
