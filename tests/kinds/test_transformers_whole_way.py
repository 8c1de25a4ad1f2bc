"""A run holds the labels of transformers itself, and its models go the whole way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import way
from conftest import autolabel
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
    net = save(tmp_path / way.OWN, architecture, CITYSCAPES.names)
    way.go(f"hf:{net}", city / "fine.parquet", tmp_path, changed="preprocessor_config.json")
