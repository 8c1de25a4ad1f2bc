"""A recipe of docs/recipes does not run, or trains something else than it says: days on eight GPUs for nothing.

Every command of the pages is run as it stands there, on drawn scenes; only sizes are replaced. Every training is read
as the command line reads it, and compared, setting by setting, with the table of the published ones.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, autolabel
from PIL import Image

from autolabel.cli import main
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.samples import load_manifest
from autolabel.manifests.scenes import EGO
from autolabel.manifests.settings import build_job, job_fields
from autolabel.student.evaluate import Scores
from autolabel.student.job import TrainJob, TrainMachine
from autolabel.teacher.checkpoints import read_checkpoint, save_checkpoint
from autolabel.teacher.networks.build import build

SMALL = "hrnet18s_ocr_mscale"
SIZES = {"--arch": SMALL, "--steps": "2", "--crop": "64x64", "--batch-size": "2", "--workers": "1",
         "--precision": "float32", "--device": "cpu", "--validations": "1"}  # fmt: skip
NO_SETTINGS = (
    {"manifest", "val", "out", "seed"} | {f.name for f in job_fields(TrainMachine)} - {"workers"} | {"device", "log"}
)  # data and machine
# Images of an epoch, GPUs, crops of a step on each, epochs.
EPOCHS = {
    "cityscapes_fine": (2975, 8, 1, 175),
    "cityscapes_sota": (2975, 16, 1, 175),
    "mapillary": (18000, 8, 2, 200),
}
POLYGONS = "cityscapes_polygons"  # a test of labels, with the training of cityscapes_fine on two thirds of the cities

torch.set_num_threads(1)


def page(name: str) -> str:
    return (ROOT / "docs" / "recipes" / f"{name}.md").read_text(encoding="utf-8")


def commands(name: str) -> list[list[str]]:
    """The words of every command of a page, without the program's name."""
    lines = re.findall(r"^autolabel .+", page(name).replace("\\\n", " "), flags=re.MULTILINE)
    return [shlex.split(line)[1:] for line in lines]


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def trainings(name: str) -> list[list[str]]:
    return [words for words in commands(name) if words[0] == "train"]


# --- what the pages ask for -------------------------------------------------------------------------------------------


def test_every_recipe_is_listed_with_its_figures() -> None:
    listed = {path.stem for path in (ROOT / "docs" / "recipes").glob("*.md")} - {"README"}
    assert listed == EPOCHS.keys() | {POLYGONS}
    index = page("README")
    for name, (images, gpus, each, epochs) in EPOCHS.items():
        (training,) = trainings(name)
        steps = epochs * math.ceil(math.ceil(images / gpus) / each)
        assert option(training, "--steps") == str(steps)
        assert option(training, "--workers") == str(gpus)
        assert option(training, "--batch-size") == str(gpus * each)
        row = f"]({name}.md) | "
        assert row in index
        assert (
            f"{images * epochs:,} | {steps:,} x {gpus * each} | {gpus} |" in index[index.index(row) :].splitlines()[0]
        )
        assert f"**{steps:,}**" in page(name)


def table(name: str, heading: str) -> list[list[str]]:
    """The cells of the first table of a page after a heading, or after any line, without its header."""
    text = page(name)
    lines = text[text.index(heading) :].splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("|"))
    end = next((n for n in range(start, len(lines)) if not lines[n].startswith("|")), len(lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : end]]


def read_as_typed(words: list[str]) -> dict[str, Any]:
    """The settings of a `train` command, as the command line reads them, by option."""
    command = main.commands["train"]
    job = build_job(TrainJob, command.make_context("train", list(words[1:])).params)
    return {
        field.flag: functools.reduce(getattr, field.path, job)
        for field in job_fields(TrainJob)
        if field.name not in NO_SETTINGS
    }


def published(name: str) -> dict[str, Any]:
    """The settings of a recipe in the table of README.md, read by the command line as well."""
    words = ["train", "there.parquet", "--val", "val.parquet", "--out", "out"]
    for row in table("README", "## The settings"):
        value = row[2 + list(EPOCHS).index(name)]
        if value != "no":
            words += [row[0].strip("`")] + ([] if value == "yes" else [value])
    return read_as_typed(words)


def deviations(name: str, words: list[str]) -> set[str]:
    """The options whose value is not the published one."""
    there, here = published(name), read_as_typed(words)
    assert there.keys() == here.keys()
    return {option for option, value in here.items() if value != there[option]}


def admitted(name: str) -> set[str]:
    """The options that the tables of differences name, with a reason."""
    rows = table("README", "## Where ours differs")
    if "What differs besides" in page(name):
        rows += table(name, "What differs besides")
    assert all(row[3] for row in rows), "a difference without a reason"
    return {option for row in rows for option in re.findall(r"`(--[a-z-]+)", row[0])}


def test_every_setting_of_a_training_has_its_row_in_the_table() -> None:
    rows = [row[0].strip("`") for row in table("README", "## The settings")]
    assert sorted(rows) == sorted(field.flag for field in job_fields(TrainJob) if field.name not in NO_SETTINGS)


@pytest.mark.parametrize("name", EPOCHS)
def test_every_setting_of_a_recipe_is_the_published_one_or_named_as_a_difference(name: str) -> None:
    (training,) = trainings(name)
    assert deviations(name, training) == admitted(name)
    assert option(training, "--device") == "cuda"  # it never trains on CPUs without a word


def test_the_test_of_polygons_trains_as_on_all_cities_for_as_many_epochs() -> None:
    (mine,), (whole,) = trainings(POLYGONS), trainings("cityscapes_fine")
    steps = 175 * math.ceil(2975 * 2 // 3 / 8)
    assert option(mine, "--steps") == str(steps) and f"**{steps:,}**" in page(POLYGONS)
    assert read_as_typed(mine) == read_as_typed(whole) | {"--steps": steps}


def test_a_setting_that_is_forgotten_or_mistyped_is_noticed() -> None:
    (training,) = trainings("mapillary")
    for flag, other in (("--weight-decay", "0.0005"), ("--power", "2"), ("--crop", "1024x1025"), ("--workers", "16")):
        typed = [other if before == flag else word for before, word in zip(["", *training], training, strict=False)]
        assert deviations("mapillary", typed) == {flag}
    for flag in ("--published-crops", "--blur"):
        assert deviations("mapillary", [word for word in training if word != flag]) == {flag}


def test_the_share_of_automatic_labels_follows_from_the_published_numbers() -> None:
    """A class gets 78 aimed crops an epoch; of the 13 boosted ones the automatic share of all places."""
    (training,) = trainings("cityscapes_sota")
    images, automatic = 2975, 19998
    aimed = int(images * 0.5 / 19)
    assert aimed == 78
    share = 13 * aimed * automatic / (automatic + images) / images
    assert float(option(training, "--auto-share")) == round(share, 2) == 0.3
    assert f"{round(share * images)} / 2,975 = **0.30**" in page("cityscapes_sota")


def test_the_boosted_classes_are_the_published_ones() -> None:
    (training,) = trainings("cityscapes_sota")
    names = option(training, "--auto-classes").split(",")
    assert [CITYSCAPES.names.index(name) for name in names] == [3, 4, 6, 7, 9, 11, 12, 13, 14, 15, 16, 17, 18]


# --- and that it runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(city: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which somebody begins: data sets and weights under the names of the pages."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cityscapes").symlink_to(city / "data")
    draw_vistas(city, tmp_path / "data" / "vistas")
    torch.manual_seed(0)
    mapillary = build("hrnet18s_ocr", 65).state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in mapillary.items()}}, "ocrnet.HRNet_industrious-chicken.pth")
    trunk = {k.removeprefix("backbone."): v for k, v in mapillary.items() if k.startswith("backbone.")}
    torch.save(trunk | {"classifier.weight": torch.zeros(2, 2)}, "hrnetv2_w48_imagenet_pretrained.pth")
    teacher = build(SMALL, len(CITYSCAPES))
    with torch.no_grad():
        teacher.ocr.cls_head.weight.mul_(1000)  # sure of everything that it says
    save_checkpoint(Path("fine-only/best.pt"), teacher, arch=SMALL, space=CITYSCAPES)
    return tmp_path


def draw_vistas(city: Path, root: Path) -> None:
    """Street scenes in the folders of Mapillary Vistas v1.2, with 65 classes in stripes and one that is void."""
    entries = [{"name": f"class {n}", "color": [n, 0, 0], "evaluate": n < 65} for n in range(66)]
    root.mkdir()
    (root / "config_v1.2.json").write_text(json.dumps({"labels": entries}))
    for split, manifest in (("training", "fine"), ("validation", "val")):
        folders = root / split / "images", root / split / "v1.2" / "labels"
        for folder in folders:
            folder.mkdir(parents=True)
        for sample in load_manifest(city / f"{manifest}.parquet").samples:
            Image.open(sample.image).save(folders[0] / f"{sample.sample_id}.jpg")
            stripes = np.broadcast_to(np.arange(sample.width) * 66 // sample.width, (sample.height, sample.width))
            label = Image.fromarray(stripes.astype(np.uint8)).convert("P")
            label.save(folders[1] / f"{sample.sample_id}.png")


def run(words: list[str]) -> str:
    """Run a command with small sizes, in this process, for classes that two steps have taught; return its text."""
    words = [SIZES.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    if words[0] == "generate":
        words += ["--engine", "local"]
    if "--auto-classes" in words:
        rows = RunFolder(Path("runs/auto")).statistics("classes").to_pylist()
        found = sorted({row["class_name"] for row in rows if row["pixels"]})
        words[words.index("--auto-classes") + 1] = ",".join(found)
    done = autolabel(*words)
    assert done.exit_code == 0, f"{shlex.join(words)}\n{done.output}"
    return done.output


@pytest.mark.thorough
@pytest.mark.parametrize("name", EPOCHS)
def test_every_command_of_a_recipe_runs(name: str, prepared: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", page(name), flags=re.DOTALL):
        exec(code.replace("2177", "128").replace("vistas128", "vistas2177"), {})
    for words in commands(name):
        run(words)
    (training,) = trainings(name)
    out = Path(option(training, "--out"))
    asked = json.loads((out / "train.json").read_text())
    for flag, value in published(name).items():
        if flag not in SIZES and flag != "--auto-classes":
            assert asked[flag.removeprefix("--").replace("-", "_")] == (str(value) if flag == "--init" else value)
    classes = 65 if name == "mapillary" else 19
    assert read_checkpoint(out / "best.pt").classes == classes
    fresh = "the trunk; ocr, scale_attn" if classes == 65 else "ocr.aux_head.2, ocr.cls_head, scale_attn"
    assert f"{fresh} start fresh" in asked["started_from"]
    evaluation = commands(name)[-1]
    scores = Scores.read(Path(option(evaluation, "-o")))
    assert scores.request["scales"] == [float(s) for s in option(evaluation, "--scales").split(",")]
    assert scores.images == 3


@pytest.mark.thorough
def test_the_test_of_polygons_labels_cities_that_its_teacher_has_not_seen_and_leaves_the_ego_vehicle_void(
    prepared: Path,
) -> None:
    printed = [run(words) for words in commands(POLYGONS)]
    part, rest = (load_manifest(f"folds/{name}-1.parquet").samples for name in ("part", "rest"))
    assert {s.group for s in part}.isdisjoint(s.group for s in rest) and len(part) + len(rest) == 6
    assert all(s.source == "fine" and s.coarse_label for s in (*part, *rest))
    rows = [line.split()[0] for line in printed[-1].splitlines() if line.startswith(" ")]
    assert rows[2:] == ["coarse", "paper", "human-first", "dense-fitted"]
    labels = {name: Run.open(f"runs/{name}").labels for name in ("dense", "paper")}
    drawn = {s.sample_id: np.asarray(Image.open(s.coarse_label)) for s in part if s.coarse_label}
    ego = sum(int((ids == EGO).sum()) for ids in drawn.values())
    assert ego > 0
    for sample_id, ids in drawn.items():
        assert (labels["dense"][sample_id][ids == EGO] == 255).all()


def test_the_prepared_vistas_are_of_one_size_and_keep_their_ids(prepared: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", page("mapillary"), flags=re.DOTALL)
    exec(code.replace("(side * 2177", "(side * 384"), {})
    labels = sorted(Path("data/vistas2177").glob("*/v1.2/labels/*.png"))
    assert len(labels) == 6 + 3
    for label in labels:
        with Image.open(label) as after, Image.open("data/vistas" / label.relative_to("data/vistas2177")) as before:
            assert (before.size, after.size) == ((192, 96), (384, 192))
            assert (np.asarray(after)[::2, ::2] == np.asarray(before)).all()
