"""A recipe of docs/recipes does not run, or trains something else than it says: days on eight GPUs for nothing.

Every command of the pages is run as it stands there, on drawn scenes; only sizes are replaced.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, autolabel
from PIL import Image

from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.samples import load_manifest
from autolabel.student.evaluate import Scores
from autolabel.teacher.checkpoints import read_checkpoint, save_checkpoint
from autolabel.teacher.networks.build import build

SMALL = "hrnet18s_ocr_mscale"
SIZES = {"--arch": SMALL, "--steps": "2", "--crop": "64x64", "--batch-size": "2", "--workers": "1",
         "--precision": "float32"}  # fmt: skip
# Images of an epoch, GPUs, crops of a step on each, epochs.
EPOCHS = {
    "cityscapes_fine": (2975, 8, 1, 175),
    "cityscapes_sota": (2975, 16, 1, 175),
    "mapillary": (18000, 8, 2, 200),
}

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
    assert listed == EPOCHS.keys()
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


def run(words: list[str]) -> None:
    """Run a command with small sizes, in this process alone, for classes that two steps have taught."""
    words = [SIZES.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    if words[0] == "generate":
        words += ["--engine", "local"]
    if "--auto-classes" in words:
        rows = RunFolder(Path("runs/auto")).statistics("classes").to_pylist()
        found = sorted({row["class_name"] for row in rows if row["pixels"]})
        words[words.index("--auto-classes") + 1] = ",".join(found)
    done = autolabel(*words)
    assert done.exit_code == 0, f"{shlex.join(words)}\n{done.output}"


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
    for setting in ("loss", "optimizer", "init"):
        assert asked[setting] == option(training, f"--{setting}")
    assert asked["learning_rate"] == float(option(training, "--learning-rate"))
    assert asked["power"] == float(option(training, "--power"))
    classes = 65 if name == "mapillary" else 19
    assert read_checkpoint(out / "best.pt").classes == classes
    fresh = "the trunk; ocr, scale_attn" if classes == 65 else "ocr.aux_head.2, ocr.cls_head, scale_attn"
    assert f"{fresh} start fresh" in asked["started_from"]
    evaluation = commands(name)[-1]
    scores = Scores.read(Path(option(evaluation, "-o")))
    assert scores.request["scales"] == [float(s) for s in option(evaluation, "--scales").split(",")]
    assert scores.images == 3


def test_the_prepared_vistas_are_of_one_size_and_keep_their_ids(prepared: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", page("mapillary"), flags=re.DOTALL)
    exec(code.replace("(side * 2177", "(side * 384"), {})
    labels = sorted(Path("data/vistas2177").glob("*/v1.2/labels/*.png"))
    assert len(labels) == 6 + 3
    for label in labels:
        with Image.open(label) as after, Image.open("data/vistas" / label.relative_to("data/vistas2177")) as before:
            assert (before.size, after.size) == ((192, 96), (384, 192))
            assert (np.asarray(after)[::2, ::2] == np.asarray(before)).all()
