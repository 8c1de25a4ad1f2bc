"""The whole way with a class of the user's own, and with students of timm and smp: labelled here and by Ray, killed,
resumed, audited, shown in a browser."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, playwright
from conftest import autolabel, labels_of, refused

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
    made = own_class(tmp_path / "own", city) if own else student(tmp_path / "own", city, kind, 1 + ("timm" in kind))
    target, seen = ("fine", "val") if own else ("val", "fine")
    command = ("generate", city / f"{target}.parquet", "--unit-size", 1, "--threshold", 0.05)
    here, killed, ray = (tmp_path / name for name in ("here", "killed", "ray"))

    # Here, and by two workers of Ray: the same bytes.
    local = autolabel(*command, "--teacher", made, "--out", here, "--engine", "local")
    assert local.exit_code == 0, local.output
    assert autolabel(*command, "--teacher", made, "--out", ray, "--workers", 2).exit_code == 0
    assert len(labels_of(here)) == (6 if own else 3)
    assert labels_of(ray) == labels_of(here)
    assert any((label != IGNORE).any() for label in Run.open(here).labels.values())

    # Killed in the middle, and resumed with the teacher elsewhere: its file decides which it is.
    words = [sys.executable, "-m", "autolabel", *map(str, command), "--teacher", made, "--out", str(killed)]
    process = subprocess.Popen([*words, "--engine", "local"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(killed.glob("units/*.parquet")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0)
    shutil.copytree(tmp_path / "own", tmp_path / "elsewhere")
    elsewhere = made.replace(str(tmp_path / "own"), str(tmp_path / "elsewhere"))
    again = autolabel(*command, "--teacher", elsewhere, "--out", killed, "--engine", "local")
    assert again.exit_code == 0, again.output
    assert labels_of(killed) == labels_of(here)
    if own:
        with (tmp_path / "elsewhere" / "my_teacher.py").open("a") as file:
            file.write("# changed\n")
        assert "teacher" in refused(*command, "--teacher", elsewhere, "--out", killed)

    # Audited; scored, but not on what it has seen; verified, and shown.
    named = ("--teacher", made) if own else ()  # code runs only where it is named
    audit = autolabel("audit", here, "--truth", city / f"{target}.parquet", *named)
    assert audit.exit_code == 0, audit.output
    assert "trained on" in refused("evaluate", made, city / f"{seen}.parquet")
    scored = autolabel("evaluate", made, city / f"{target}.parquet")
    assert scored.exit_code == 0, scored.output
    assert autolabel("verify", ray).exit_code == 0
    assert autolabel("report", here, *named).exit_code == 0
    if CHROMIUM is None:
        pytest.skip("needs Chromium on the PATH to look at the report")
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page()
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto((here / "report" / "index.html").as_uri())
        assert made in page.inner_text("body")
        assert page.locator("img").count() >= 3
        browser.close()
    assert complaints == []
