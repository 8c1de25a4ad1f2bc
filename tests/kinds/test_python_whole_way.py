"""A class of the user's own, and students of timm and smp, go the whole way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import way
from conftest import autolabel

from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.reading import read_photograph
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import load_manifest

# Confident in what a formula says of the three colours; the file beside it is found by Ray's workers too.
OWN = """
import torch
from formula_of_mine import weights

class Teacher:
    trained_on = {seen!r}

    def __init__(self, device):
        from autolabel.manifests.label_space import CITYSCAPES
        self.classes, self.weights = CITYSCAPES, weights().to(device)

    def predict(self, images):
        return torch.einsum("kc,bchw->bkhw", self.weights, images.float() / 255)
"""
FORMULA = """
import torch

def weights():
    return torch.linspace(-40, 40, 3 * 19).sin().view(19, 3) * 60
"""


def own_class(folder: Path, city: Path) -> str:
    folder.mkdir()
    (folder / "formula_of_mine.py").write_text(FORMULA)
    (folder / "my_teacher.py").write_text(OWN.format(seen=str(city / "val.parquet")))
    return f"{folder / 'my_teacher.py'}:Teacher"


def student(folder: Path, city: Path, arch: str, workers: int) -> str:
    """Train a network for two steps."""
    made = autolabel(
        "train", city / "fine.parquet", "--val", city / "val.parquet", "--out", folder, "--arch", arch, "--steps", 2,
        "--batch-size", 2, "--crop", "64x64", "--validations", 1, "--device", "cpu", "--workers", workers,
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    return str(folder / "best.pt")


def test_a_run_holds_the_labels_that_the_class_gives(city: Path, tmp_path: Path) -> None:
    teacher, run = own_class(tmp_path / "own", city), tmp_path / "run"
    made = autolabel("generate", city / "fine.parquet", "--teacher", teacher, "--out", run, "--engine", "local")
    assert (made.exit_code, made.stdout.splitlines()[0]) == (
        0,
        "6 samples: 6 labelled, 0 quarantined, 0 left for later",
    )
    weights: dict[str, object] = {}
    exec(FORMULA, weights)
    matrix, labels, kept = weights["weights"](), Run.open(run).labels, 0  # type: ignore[operator]
    for sample in load_manifest(city / "fine.parquet").samples:
        image = torch.tensor(read_photograph(sample)).permute(2, 0, 1) / 255
        first, second = torch.einsum("kc,chw->khw", matrix, image).softmax(dim=0).topk(2, dim=0)[0]
        own = torch.einsum("kc,chw->khw", matrix, image).argmax(dim=0)
        clear = ((first - second > 1e-4) & ((first - 0.5).abs() > 1e-4)).numpy()
        wanted = torch.where(first > 0.5, own, IGNORE).numpy()
        assert np.array_equal(labels[sample.sample_id][clear], wanted[clear])
        kept += int((wanted[clear] != IGNORE).sum())
    assert kept > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own class", "timm:test_efficientnet", "smp:FPN/tu-test_efficientnet"])
def test_the_whole_way(kind: str, city: Path, tmp_path: Path) -> None:
    own = kind == "own class"
    made = own_class(tmp_path / way.OWN, city) if own else student(tmp_path / way.OWN, city, kind, 1 + ("timm" in kind))
    target, seen = ("fine", "val") if own else ("val", "fine")
    way.go(
        made, city / f"{target}.parquet", tmp_path, seen=city / f"{seen}.parquet",
        changed="my_teacher.py" if own else "", more=("--threshold", 0.05),
    )  # fmt: skip
