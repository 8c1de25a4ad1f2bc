"""People train on a run with loops of their own. If this fails, image and label of a crop slip against each other."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from noise import noise_run
from PIL import Image
from torch.utils.data import DataLoader

import autolabel as al
from autolabel.manifests.tables import BadTable

SIZES = [(96, 128), (64, 200), (600, 700), (96, 128)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> al.Run:
    return noise_run(tmp_path_factory.mktemp("run"), SIZES, keep_confidence=8, keep_probability=True)


@pytest.mark.parametrize("store", ["zarr", "png"])
def test_whole_images_have_the_pixels_of_the_run(store: str, tmp_path: Path) -> None:
    run = noise_run(tmp_path, SIZES, store=store)
    data = run.to_torch()
    assert len(data) == 4
    for item in (data[n] for n in range(4)):
        name = item["sample_id"]
        assert set(item) == {"image", "label", "sample_id"}
        assert (item["image"].dtype, item["label"].dtype) == (torch.uint8, torch.int64)
        photograph = np.asarray(Image.open(tmp_path / "photographs" / f"{name}.png"))
        assert np.array_equal(item["image"].permute(1, 2, 0).numpy(), photograph)
        assert np.array_equal(item["label"].numpy(), run.labels[name])


def test_a_crop_holds_the_same_window_of_all_maps_and_255_where_the_image_ends(run: al.Run) -> None:
    data, corners = run.to_torch(crop=(80, 160), weights=True), set()
    for n in [0, 1, 2] * 8:
        item = data[n]
        name, label, image = item["sample_id"], item["label"], item["image"]
        size = run.labels[name].shape
        height, width = min(80, size[0]), min(160, size[1])
        assert (image.shape, label.shape) == ((3, 80, 160), (80, 160))
        inside = (image != torch.tensor([124, 116, 104])[:, None, None]).any(0)
        rows, columns = (int(axis.sum()) for axis in (inside.any(1), inside.any(0)))
        assert (rows, columns) == (height, width)
        assert (label[~inside] == 255).all() and (item["weight"][~inside] == 0).all()
        assert torch.equal(label[inside][label[inside] != 255], image[0][inside].long()[label[inside] != 255])
        corners.add((n, *(int(x) for x in inside.nonzero()[0]), int(image[2][inside][0])))
        sure = image[1][inside].double() / 255
        levels = sum((sure > edge).long() for edge in run.confidence.edges)
        assert torch.equal(item["confidence"][inside].long(), levels)
        assert item["weight"].dtype == torch.float32 and item["weight"].max() <= 1
    assert len(corners) > 12  # anywhere


def test_torchs_seed_decides_the_crops_and_a_transform_what_the_loader_gets(run: al.Run) -> None:
    data = run.to_torch(crop=(32, 32), transform=lambda item: (item["image"], item["label"]))
    taken = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        taken.append([data[n] for n in range(4)])
    for (image, label), (again, same), (other, _) in zip(*taken, strict=True):
        assert torch.equal(image, again) and torch.equal(label, same) and not torch.equal(image, other)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_loader_reads_it_in_processes_of_any_kind(run: al.Run, method: str) -> None:
    """Also after this process has read from it, and after a journey as bytes."""
    data = pickle.loads(pickle.dumps(run.to_torch(crop=(64, 128))))
    _ = data[0]
    loader = DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context=method)
    batches = list(loader)
    assert [batch["image"].shape for batch in batches] == [(2, 3, 64, 128)] * 2
    assert [name for batch in batches for name in batch["sample_id"]] == [sample.sample_id for sample in data.samples]
    for batch in batches:
        seen = batch["label"] != 255
        assert torch.equal(batch["label"][seen], batch["image"][:, 0][seen].long())


def test_the_lines_of_python_on_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of torch and of zarr-python; Ray Data's are those of tests/manifests/test_ray_source.py."""
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8").partition("## Runs in other programs")[2]
    of_torch, _, of_zarr = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:3]
    run = noise_run(tmp_path, SIZES)
    (tmp_path / "runs").mkdir()
    run.path.rename(tmp_path / "runs/auto")
    (tmp_path / "photographs").rename(tmp_path / "runs/photographs")  # a run names its photographs from its own folder
    monkeypatch.chdir(tmp_path)
    known: dict[str, object] = {}
    exec(of_torch, known)
    item = known["item"]
    assert isinstance(item, dict) and item["image"].shape == (2, 3, 128, 256) and item["label"].dtype == torch.int64
    exec(of_zarr, known)
    first = known["first"]
    assert isinstance(first, np.ndarray) and np.array_equal(first[:96, :128], al.open_run("runs/auto").labels["p00"])


def test_what_a_run_cannot_give_is_refused(run: al.Run, tmp_path: Path) -> None:
    plain = noise_run(tmp_path, SIZES)
    with pytest.raises(ValueError, match=r"run has kept no probabilities: generate or relabel with --keep-probability"):
        plain.to_torch(weights=True)
    with pytest.raises(ValueError, match=r"crop \(0, 32\): expected a height and a width of 1 or more"):
        plain.to_torch(crop=(0, 32))
    plain.manifest_path.unlink()
    with pytest.raises(BadTable, match=r"manifest\.parquet does not exist"):
        plain.to_torch()
