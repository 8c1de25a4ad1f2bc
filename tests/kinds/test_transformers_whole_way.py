"""The whole way with models of transformers: labelled here and by Ray, killed, resumed, audited, shown in a browser."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import CHROMIUM, playwright
from conftest import autolabel, labels_of
from small_transformers import network_and_processor, post_processed, save

from autolabel.manifests.label_space import CITYSCAPES, IGNORE
from autolabel.manifests.reading import read_photograph
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import load_manifest

BOTH = ("segformer", "mask2former")


def expected(architecture: str, network: Any, processor: Any, image: torch.Tensor) -> tuple[Any, Any]:
    """Return the labels (H, W) that transformers gives, above a confidence of 0.5, and which pixels are clear."""
    labels, scores = post_processed(architecture, network, processor, image)
    p = scores / scores.sum(dim=0).clamp(min=1) if architecture == "mask2former" else scores.softmax(dim=0)
    first, second = p.topk(2, dim=0).values
    none = 1 - p.sum(dim=0)
    confidence = torch.where(none > first, 0, first) if architecture == "mask2former" else first
    clear = (first - second > 1e-5) & ((first - 0.5).abs() > 1e-5) & ((none - first).abs() > 1e-5)
    return torch.where(confidence > 0.5, labels, IGNORE).numpy(), clear.numpy()


@pytest.mark.parametrize("architecture", ["segformer", pytest.param("mask2former", marks=pytest.mark.thorough)])
@torch.inference_mode()
def test_a_run_holds_the_labels_that_transformers_gives(architecture: str, city: Path, tmp_path: Path) -> None:
    network, processor = network_and_processor(architecture, CITYSCAPES.names)
    net, run = save(tmp_path / "net", architecture, CITYSCAPES.names), tmp_path / "run"
    made = autolabel("generate", city / "val.parquet", "--teacher", net, "--out", run, "--engine", "local")
    assert (made.exit_code, made.stdout.splitlines()[0]) == (
        0,
        "3 samples: 3 labelled, 0 quarantined, 0 left for later",
    )
    labels, kept = Run.open(run).labels, 0
    for sample in load_manifest(city / "val.parquet").samples:
        image = torch.tensor(read_photograph(sample)).permute(2, 0, 1)
        own, clear = expected(architecture, network, processor, image)
        assert clear.mean() > 0.9
        assert np.array_equal(labels[sample.sample_id][clear], own[clear])
        kept += int((own != IGNORE).sum())
    assert kept > 0


@pytest.mark.slow
@pytest.mark.parametrize("architecture", BOTH)
def test_the_whole_way(architecture: str, city: Path, tmp_path: Path) -> None:
    net = save(tmp_path / "net", architecture, CITYSCAPES.names)
    command = ("generate", city / "fine.parquet", "--teacher", net, "--unit-size", 1)
    here, killed, ray = (tmp_path / name for name in ("here", "killed", "ray"))

    # Here, and by two workers of Ray: the same bytes.
    local = autolabel(*command, "--out", here, "--engine", "local")
    assert local.exit_code == 0, local.output
    assert autolabel(*command, "--out", ray, "--workers", 2).exit_code == 0
    assert len(labels_of(here)) == 6
    assert labels_of(ray) == labels_of(here)

    # Killed in the middle, and resumed from a folder elsewhere, because the files decide which teacher it is.
    words = [sys.executable, "-m", "autolabel", *map(str, command), "--out", str(killed), "--engine", "local"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(killed.glob("units/*.parquet")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0)
    elsewhere = shutil.copytree(net, tmp_path / "elsewhere")
    again = autolabel("generate", city / "fine.parquet", "--teacher", f"hf:{elsewhere}", "--unit-size", 1,
                      "--out", killed, "--engine", "local")  # fmt: skip
    assert again.exit_code == 0, again.output
    assert labels_of(killed) == labels_of(here)
    (elsewhere / "preprocessor_config.json").write_text((net / "preprocessor_config.json").read_text() + " ")
    changed = autolabel("generate", city / "fine.parquet", "--teacher", elsewhere, "--out", killed)
    assert (changed.exit_code, "teacher" in changed.stderr) == (2, True)

    # Audited, verified, compared, and shown.
    audit = autolabel("audit", here, "--truth", city / "fine.parquet")
    assert audit.exit_code == 0, audit.output
    assert autolabel("verify", ray).exit_code == 0
    assert autolabel("diff", here, ray).exit_code == 0
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
