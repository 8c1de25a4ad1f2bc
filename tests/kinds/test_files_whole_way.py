"""Files of torch.export and ONNX go the whole way, and the labels are the module's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import way
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
    net = written(tmp_path / way.OWN, suffix, seen=city / "val.parquet")
    here = way.go(str(net), city / "fine.parquet", tmp_path, seen=city / "val.parquet", changed="net.toml")
    labels, kept = Run.open(here).labels, 0
    for sample in load_manifest(city / "fine.parquet").samples:
        own, clear = expected(torch.tensor(read_photograph(sample)).permute(2, 0, 1))
        assert clear.mean() > 0.9
        assert np.array_equal(labels[sample.sample_id][clear], own[clear])
        kept += int((own != IGNORE).sum())
    assert kept > 0
