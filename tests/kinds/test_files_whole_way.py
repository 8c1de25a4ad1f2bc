"""The whole way with files of torch.export and ONNX: labelled here and by Ray, killed, resumed, audited, shown."""

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
import torch.nn.functional as F
from browser import CHROMIUM, playwright
from conftest import autolabel, labels_of, refused
from small_networks import ANY, Tiny, export, sidecar

from autolabel.manifests.label_space import CITYSCAPES, IGNORE
from autolabel.manifests.reading import read_photograph
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import load_manifest

EXAMPLE = torch.rand(2, 3, 32, 48)


def network() -> Tiny:
    """A network of 19 classes that is sure of some pixels."""
    return Tiny(classes=len(CITYSCAPES), scale=60.0)


def written(folder: Path, suffix: str, *, seen: Path) -> Path:
    """Write the network as torch writes it, with weights beside it where it can, and its sidecar."""
    folder.mkdir()
    path = folder / f"net{suffix}"
    if suffix == ".pt2":
        export(path, network(), EXAMPLE, ANY)
    else:
        sizes = {0: "b", 2: "h", 3: "w"}
        torch.onnx.export(network(), (EXAMPLE,), path, dynamo=True, dynamic_shapes=(sizes,), verbose=False)
        assert path.with_name("net.onnx.data").exists()
    return sidecar(path, classes="cityscapes", trained_on=str(seen))


def expected(image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Return the module's own labels (H, W) above a confidence of 0.5, and which pixels are clear."""
    with torch.inference_mode():
        logits = F.interpolate(network()(image[None] / 255), image.shape[1:], mode="bilinear", align_corners=False)
    first, second = logits.softmax(dim=1)[0].topk(2, dim=0).values
    clear = (first - second > 1e-4) & ((first - 0.5).abs() > 1e-4)
    return torch.where(first > 0.5, logits[0].argmax(dim=0), IGNORE).numpy(), clear.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_the_whole_way(suffix: str, city: Path, tmp_path: Path) -> None:
    net = written(tmp_path / "net", suffix, seen=city / "val.parquet")
    command = ("generate", city / "fine.parquet", "--unit-size", 1)
    here, killed, ray = (tmp_path / name for name in ("here", "killed", "ray"))

    # Here, and by two workers of Ray: the same bytes, and the module's own labels.
    local = autolabel(*command, "--teacher", net, "--out", here, "--engine", "local")
    assert local.exit_code == 0, local.output
    assert autolabel(*command, "--teacher", net, "--out", ray, "--workers", 2).exit_code == 0
    assert len(labels_of(here)) == 6
    assert labels_of(ray) == labels_of(here)
    labels, kept = Run.open(here).labels, 0
    for sample in load_manifest(city / "fine.parquet").samples:
        own, clear = expected(torch.tensor(read_photograph(sample)).permute(2, 0, 1))
        assert clear.mean() > 0.9
        assert np.array_equal(labels[sample.sample_id][clear], own[clear])
        kept += int((own != IGNORE).sum())
    assert kept > 0

    # Killed in the middle, and resumed with the network elsewhere: its files decide which it is.
    words = [sys.executable, "-m", "autolabel", *map(str, command), "--teacher", str(net), "--out", str(killed)]
    process = subprocess.Popen([*words, "--engine", "local"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(killed.glob("units/*.parquet")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0)
    elsewhere = shutil.copytree(net.parent, tmp_path / "elsewhere") / net.name
    again = autolabel(*command, "--teacher", elsewhere, "--out", killed, "--engine", "local")
    assert again.exit_code == 0, again.output
    assert labels_of(killed) == labels_of(here)
    with elsewhere.with_suffix(".toml").open("a") as file:
        file.write("std = [1, 1, 0.5]\n")
    assert "teacher" in refused(*command, "--teacher", elsewhere, "--out", killed)

    # Audited, but not against what it has seen; verified, and shown.
    audit = autolabel("audit", here, "--truth", city / "fine.parquet")
    assert audit.exit_code == 0, audit.output
    assert "trained on" in refused("evaluate", net, city / "val.parquet")
    assert autolabel("verify", ray).exit_code == 0
    assert autolabel("report", here).exit_code == 0
    if CHROMIUM is None:
        pytest.skip("needs Chromium on the PATH to look at the report")
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page()
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto((here / "report" / "index.html").as_uri())
        assert str(net) in page.inner_text("body")
        assert page.locator("img").count() >= 6
        browser.close()
    assert complaints == []
