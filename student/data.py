"""Images and labels for training and scoring, from any manifest.

`ManifestDataset` is a plain torch dataset of whole pictures. `TrainingCrops` is a seeded sequence of augmented crops
drawn from it: the n-th crop depends on what was asked and n alone, so a resumed training sees exactly what an
uninterrupted one would have seen, whatever the number of loading processes. Which crop is the n-th, `sampling` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch.utils.data import Dataset

from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.reading import read_photograph, read_picture
from autolabel.manifests.run.labels import Window, read_sample_label
from autolabel.manifests.run.shards import CHUNK, Label
from autolabel.manifests.samples import Manifest, Sample, load_manifest
from autolabel.student.sampling import Centroid, Draws, Mix

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
            name = "the manifest" if isinstance(manifest, Manifest) else manifest
            raise ValueError(f"{name} has no labelled sample: nothing to train on or to score")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        image = read_photograph(sample)
        label = read_sample_label(sample, self.label_space)
        return _item(image, label, sample.sample_id)


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


class TrainingCrops(Dataset[dict[str, Any]]):
    """Item n is the n-th augmented crop: {"image": (3, h, w) uint8, "label": (h, w) uint8, "sample_id": str}.

    `mix` says which samples and classes come how often; see `sampling.Draws`. `on_label` hears (done, all) of the
    labels that are read for it once, before the first crop. Raises ValueError.
    """

    def __init__(
        self,
        dataset: ManifestDataset,
        augmentation: Augmentation,
        seed: int,
        length: int,
        mix: Mix | None = None,
        on_label: Callable[[int, int], None] | None = None,
    ) -> None:
        self.dataset, self.augmentation, self.seed = dataset, augmentation, seed
        self.draws = Draws(dataset.samples, dataset.label_space, mix or Mix(), seed, length, on_label)

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, n: int) -> dict[str, Any]:
        draw, rng = self.draws[n], np.random.default_rng((self.seed, n))
        return self._augmented(self.dataset.samples[draw.sample], draw.around, rng)

    def reader(self, sample: Sample) -> Callable[[Window], Label]:
        """Reads windows of a label: of a Zarr store only the chunks that they touch, of a PNG all, but once."""
        space = self.dataset.label_space
        if sample.label_index is not None:
            return lambda window: read_sample_label(sample, space, window)
        whole = read_sample_label(sample, space)
        return lambda window: whole[window[0] : window[0] + window[2], window[1] : window[1] + window[3]]

    def _augmented(self, sample: Sample, around: Centroid | None, rng: np.random.Generator) -> dict[str, Any]:
        crop_height, crop_width = self.augmentation.crop
        low, high = np.log(self.augmentation.scale)
        scale = float(np.exp(rng.uniform(low, high)))
        read = self.reader(sample)
        y, x = _focus(sample, around, read) if around else (None, None)
        top, height, place_y, out_height = _window(sample.height, crop_height, scale, y, rng)
        left, width, place_x, out_width = _window(sample.width, crop_width, scale, x, rng)

        # Geometry first, of both alike; colours are changed only then.
        whole, by = read_picture(sample, shrink=1 / scale)
        box = (left / by, top / by, (left + width) / by, (top + height) / by)
        picture = whole.resize((out_width, out_height), Image.Resampling.BILINEAR, box=box)
        found = Image.fromarray(np.ascontiguousarray(read((top, left, height, width))))
        ids = found.resize((out_width, out_height), Image.Resampling.NEAREST)
        if rng.random() < 0.5:
            picture, ids = (one.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for one in (picture, ids))
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            factor = 1 + rng.uniform(-self.augmentation.jitter, self.augmentation.jitter)
            picture = enhance(picture).enhance(factor)

        image = np.full((crop_height, crop_width, 3), _PADDING, np.uint8)
        label = np.full((crop_height, crop_width), IGNORE, np.uint8)
        place = np.s_[place_y : place_y + out_height, place_x : place_x + out_width]
        image[place], label[place] = np.asarray(picture), np.asarray(ids)
        return _item(image, label, sample.sample_id)


def _focus(sample: Sample, around: Centroid, read: Callable[[Window], Label]) -> tuple[int, int]:
    """The pixel (y, x) of the centroid's class, in its tile, that is nearest to it: between two poles there is none."""
    top, left = (int(place) // CHUNK * CHUNK for place in (around.y, around.x))
    tile = read((top, left, min(CHUNK, sample.height - top), min(CHUNK, sample.width - left)))
    ys, xs = np.nonzero(tile == around.class_id)
    if not len(ys):
        raise ValueError(
            f"{sample.label}: the label of {sample.sample_id!r} has changed since the training began: start it again"
        )
    nearest = int(np.argmin((ys + top - around.y) ** 2 + (xs + left - around.x) ** 2))
    return top + int(ys[nearest]), left + int(xs[nearest])


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
