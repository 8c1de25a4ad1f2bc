"""Drawn photographs with labels, and a run made of them: what an export sends, small and known pixel by pixel."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from conftest import autolabel
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests.label_space import CAMVID, IGNORE, LabelSpace
from autolabel.manifests.samples import Manifest, Sample, save_manifest

Map = NDArray[np.uint8]
SIZES = {"train/a/1": (24, 40), "train/a/2": (24, 40), "train/b/1": (40, 24), "val/c.1": (17, 33), "val/d": (1, 1)}


def street(seed: int, size: tuple[int, int], classes: int) -> Map:
    """Blocks of classes (H, W), a fifth of them ignored; no two seeds give the same."""
    dice = np.random.default_rng(seed)
    blocks = dice.integers(0, classes, (-(-size[0] // 8), -(-size[1] // 8)), np.uint8)
    blocks[dice.random(blocks.shape) < 0.2] = IGNORE
    label = np.ascontiguousarray(np.kron(blocks, np.ones((8, 8), np.uint8))[: size[0], : size[1]])
    label[0, 0] = seed % classes
    return label


def labels(space: LabelSpace = CAMVID, names: Sequence[str] = tuple(SIZES), *, seed: int = 0) -> dict[str, Map]:
    """A drawn label for every name."""
    sizes = [SIZES.get(name, (24, 40)) for name in names]
    return {
        name: street(seed + place, size, len(space))
        for place, (name, size) in enumerate(zip(names, sizes, strict=True))
    }


def photograph(path: Path, size: tuple[int, int], seed: int) -> Path:
    """A photograph of noise, of this height and width, in the format that its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


def people(folder: Path, drawn: Mapping[str, Map], *, space: LabelSpace = CAMVID, suffix: str = ".png") -> Path:
    """A manifest of fine labels in FOLDER/fine.parquet; the first part of a name is its split, the next its group."""
    samples = []
    for name, label in drawn.items():
        path = folder / "labels" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(label).save(path)
        image = photograph(folder / "images" / f"{name}{suffix}", label.shape, zlib.crc32(name.encode()))
        split, *groups = name.split("/")
        samples.append(
            Sample(name, image, *label.shape, split=split, group="/".join(groups[:-1]), source="fine", label=path)
        )
    save_manifest(folder / "fine.parquet", Manifest.of(space, tuple(samples)))
    return folder / "fine.parquet"


def machine(folder: Path, drawn: Mapping[str, Map], *, store: str = "zarr", keep: bool = True) -> Path:
    """A run in FOLDER/run with these labels of CamVid, where its confidence is above 0.9; else they are ignored."""
    manifest = people(folder, drawn)
    for seed, (name, label) in enumerate(drawn.items()):
        path = folder / "sure" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sure = np.random.default_rng(100 + seed).integers(0, 256, label.shape, np.uint8)
        Image.fromarray(sure).save(path)
    more = ("--confidence", folder / "sure", *(("--keep-confidence", "8") if keep else ()))
    adopted = autolabel(
        "adopt", folder / "labels", "--manifest", manifest, "--out", folder / "run", "--store", store, *more
    )
    assert adopted.exit_code == 0, adopted.output
    return folder / "run"
