"""A student leaves for the car as one file, and there it must give the labels that it was scored with here.

If this fails, a car sees another road than the one that the scores were measured on.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import autolabel
from formula import network_by_formula
from numpy.typing import NDArray

from autolabel.manifests.images import read_image
from autolabel.manifests.label_space import CITYSCAPES, LabelSpace
from autolabel.manifests.samples import load_manifest
from autolabel.manifests.scores import Confusion
from autolabel.student.data import ManifestDataset
from autolabel.teacher import export
from autolabel.teacher.checkpoints import save_checkpoint

torch.set_num_threads(1)

FIVE = LabelSpace.named("five", ("road", "car", "sky", "pole", "tree"))


def made_by_formula(folder: Path, arch: str) -> Path:
    path = folder / "best.pt"
    save_checkpoint(path, network_by_formula(arch, len(FIVE)), arch=arch, space=FIVE)
    return path


def told(exported: export.Exported) -> list[str]:
    """The lines of a result, without the folder and what depends on rounding."""
    text = "\n".join(exported.lines()).replace(f"{exported.files[0].parent}/", "")
    text = re.sub(r"difference [\d.e+-]+", "difference D", text)
    return re.sub(r"\([\d,]+ pixels are\)|\([\d.]+ MB\)", "(…)", text).splitlines()


# --- onnxruntime alone ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher of the tests as ONNX, for any size."""
    folder = tmp_path_factory.mktemp("student")
    shutil.copyfile(teacher, folder / "best.pt")
    result = autolabel("export-model", folder / "best.pt", "-o", folder / "student.onnx")
    assert result.exit_code == 0, result.output
    lines = result.stdout.replace(f"{folder}/", "").splitlines()
    assert (lines[0], result.stderr) == (
        "takes RGB images (uint8) of any height and width from 66 on, looks at scales 0.5,1, gives each pixel 19"
        " logits (float32)", ""
    )  # fmt: skip
    assert lines[2].endswith(", student.toml, student.seen.txt")
    return folder / "student.onnx"


def by_onnxruntime(path: Path, images: NDArray[np.uint8]) -> NDArray[Any]:
    """Do what a car does: onnxruntime and numpy, nothing of ours."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    output: NDArray[Any] = session.run(None, {name: images.transpose(0, 3, 1, 2)})[0]
    return output


def test_onnxruntime_alone_gives_the_labels_that_evaluate_scored(student: Path, city: Path) -> None:
    scores = city / "scores.json"
    assert autolabel("evaluate", student.with_name("best.pt"), city / "val.parquet", "-o", scores).exit_code == 0
    confusion = Confusion(len(CITYSCAPES))
    truths, labels = [], []
    for sample in load_manifest(city / "val.parquet").samples:
        logits = by_onnxruntime(student, read_image(sample.image)[None])
        truths.append(sample)
        labels.append(logits[0].argmax(axis=0).astype(np.uint8))
    for item, label in zip(ManifestDataset(city / "val.parquet"), labels, strict=True):
        confusion.update(item["label"].numpy(), label)
    expected = json.loads(scores.read_text())
    iou = {name: None if np.isnan(v) else float(v) for name, v in zip(CITYSCAPES.names, confusion.iou(), strict=True)}
    assert (iou, confusion.mean_iou(), confusion.pixel_accuracy()) == (
        expected["iou"], expected["miou"], expected["pixel_accuracy"]
    )  # fmt: skip
