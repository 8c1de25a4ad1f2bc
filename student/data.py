"""Images and labels for training and scoring, from any manifest.

`ManifestDataset` is a plain torch dataset of whole pictures. `TrainingCrops` is a seeded sequence of augmented crops
drawn from it: the n-th crop depends on the seed and n alone, so a resumed training sees exactly what an uninterrupted
one would have seen, whatever the number of loading processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch.utils.data import Dataset

from autolabel.manifests.classes import IGNORE
from autolabel.manifests.images import read_image
from autolabel.manifests.stores import read_sample_label
from autolabel.manifests.tables import Manifest, Sample, load_manifest

_PADDING = (124, 116, 104)  # the mean colour that normalisation takes away: padding becomes zero


class ManifestDataset(Dataset[dict[str, Any]]):
    """The labelled samples of a manifest, whole.

    An item is {"image": (3, H, W) uint8 RGB tensor, "label": (H, W) uint8 tensor of train ids, "sample_id": str}.
    Samples without a label, or whose image was unreadable at scan time, are not part of it.
    """

    def __init__(self, manifest: Manifest | str | Path) -> None:
        self.manifest = manifest if isinstance(manifest, Manifest) else load_manifest(manifest)
        self.samples = self.manifest.labelled
        self.label_space = self.manifest.label_space
        if not self.samples:
            raise ValueError("the manifest has no labelled sample: nothing to train on or to score")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        image = read_sample_image(sample)
        label = read_sample_label(sample, self.label_space)
        return _item(image, label, sample.sample_id)


def read_sample_image(sample: Sample) -> NDArray[np.uint8]:
    """(H, W, 3) uint8. Raises ValueError, naming the file, when it is damaged or not of the manifest's size."""
    try:
        image = read_image(sample.image)
    except (ValueError, OSError) as error:
        raise ValueError(f"image {sample.image}: {error}") from error
    if image.shape[:2] != (sample.height, sample.width):
        raise ValueError(
            f"image {sample.image} is {image.shape[1]} x {image.shape[0]} but its manifest says"
            f" {sample.width} x {sample.height}: scan again"
        )
    return image


def _item(image: NDArray[np.uint8], label: NDArray[np.uint8], sample_id: str) -> dict[str, Any]:
    # Copies where needed: torch tensors own writable, contiguous memory.
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return {"image": pixels, "label": torch.from_numpy(np.array(label)), "sample_id": sample_id}


@dataclass(frozen=True)
class Augmentation:
    """Random crop of `crop` = (height, width) after scaling by a factor in `scale`, flip, and colour jitter."""

    crop: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)  # arXiv 2005.10821, section 4: random scaling 0.5 to 2
    jitter: float = 0.25  # brightness, contrast and saturation each within 1 +- jitter
    class_uniform: float = 0.5  # share of the crops around a pixel of a class drawn evenly: section 4, too


class TrainingCrops(Dataset[dict[str, Any]]):
    """Item n is the n-th augmented crop: {"image": (3, h, w) uint8, "label": (h, w) uint8, "sample_id": str}.

    In every epoch (as many draws as samples) a sample is drawn in proportion to its weight: once if all are equal.
    """

    def __init__(self, dataset: ManifestDataset, augmentation: Augmentation, seed: int, length: int) -> None:
        self.dataset, self.augmentation, self.seed, self.length = dataset, augmentation, seed, length
        self.weights = np.array([s.weight for s in dataset.samples], np.float64)
        if not (self.weights >= 0).all() or self.weights.sum() == 0:
            raise ValueError("sample weights must not be negative, and one at least must be above 0")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, n: int) -> dict[str, Any]:
        epoch, place = divmod(n, len(self.weights))
        sample = self.dataset.samples[_epoch_order(self.weights.tobytes(), self.seed, epoch)[place]]
        return self._augmented(sample, np.random.default_rng((self.seed, n)))

    def _augmented(self, sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        crop_height, crop_width = self.augmentation.crop
        low, high = np.log(self.augmentation.scale)
        scale = float(np.exp(rng.uniform(low, high)))
        whole = read_sample_label(sample, self.dataset.label_space)
        y, x = _focus(whole, rng) if rng.random() < self.augmentation.class_uniform else (None, None)
        top, height, place_y, out_height = _window(sample.height, crop_height, scale, y, rng)
        left, width, place_x, out_width = _window(sample.width, crop_width, scale, x, rng)
        picture = Image.fromarray(read_sample_image(sample)).resize(
            (out_width, out_height), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
        )
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            factor = 1 + rng.uniform(-self.augmentation.jitter, self.augmentation.jitter)
            picture = enhance(picture).enhance(factor)
        found = np.ascontiguousarray(whole[top : top + height, left : left + width])
        ids = Image.fromarray(found).resize((out_width, out_height), Image.Resampling.NEAREST)

        image = np.full((crop_height, crop_width, 3), _PADDING, np.uint8)
        label = np.full((crop_height, crop_width), IGNORE, np.uint8)
        place = np.s_[place_y : place_y + out_height, place_x : place_x + out_width]
        image[place], label[place] = np.asarray(picture), np.asarray(ids)
        if rng.random() < 0.5:
            image, label = image[:, ::-1], label[:, ::-1]
        return _item(image, label, sample.sample_id)


def _focus(label: NDArray[np.uint8], rng: np.random.Generator) -> tuple[int, int] | tuple[None, None]:
    """A random pixel (y, x) of a random class of the label (H, W), every class as likely; none if all is ignored."""
    present = np.flatnonzero(np.bincount(label.ravel(), minlength=256)[:IGNORE])
    if not len(present):
        return None, None
    pixels = np.flatnonzero(label.ravel() == rng.choice(present))
    y, x = divmod(int(rng.choice(pixels)), label.shape[1])
    return y, x


def _window(
    side: int, crop: int, scale: float, focus: int | None, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Along one axis: first source pixel, source pixels, first crop pixel, crop pixels.

    The source window of crop / scale pixels lies anywhere inside the picture, over the focus if there is one; a window
    longer than the picture has it anywhere inside.
    """
    wanted = max(1, round(crop / scale))
    if wanted <= side:
        low, high = (0, side - wanted) if focus is None else (max(0, focus - wanted + 1), min(focus, side - wanted))
        return int(rng.integers(low, high + 1)), wanted, 0, crop
    out = max(1, min(crop, round(side * scale)))
    return 0, side, int(rng.integers(crop - out + 1)), out


@lru_cache(maxsize=4)
def _epoch_order(weights: bytes, seed: int, epoch: int) -> NDArray[np.intp]:
    """Sample index of every draw of an epoch: systematic sampling by weight, then shuffled."""
    share = np.frombuffer(weights, np.float64)
    rng = np.random.default_rng((seed, epoch, len(share)))
    edges = np.cumsum(share) / share.sum() * len(share)
    edges[-1] = len(share)  # against rounding: the last draw must find a sample
    draws = np.searchsorted(edges, np.arange(len(share)) + rng.random(), side="right")
    return rng.permutation(np.minimum(draws, len(share) - 1))
