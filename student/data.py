"""Images and labels for training and scoring, from any manifest.

`ManifestDataset` is a plain torch dataset of whole images. `TrainingCrops` is a seeded sequence of augmented crops of
it: crop n depends on the request and n alone, so a resumed training sees the crops of an uninterrupted one, whatever
the number of loading processes. `sampling.Draws` chooses the sample of every crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter
from torch.utils.data import Dataset

from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.reading import fetch_photograph, picture_of, read_photograph
from autolabel.manifests.run.labels import CERTAIN, PROBABILITY
from autolabel.manifests.run.sample_labels import FetchedLabel, fetch_label, fetch_layer, read_sample_label
from autolabel.manifests.run.shards import CHUNK, Label, Window
from autolabel.manifests.samples import Manifest, Sample, load_manifest
from autolabel.manifests.schemas import AUTO
from autolabel.student.sampling import Centroid, Draw, Draws

PADDING = (124, 116, 104)  # RGB; the mean colour that normalisation subtracts, so that padding becomes zero
_BLUR = (0.15, 1.3)  # pixels; the published code's range of the Gaussian's standard deviation


class ManifestDataset(Dataset[dict[str, Any]]):
    """The labelled samples of a manifest, as whole images.

    An item is {"image": (3, H, W) uint8 RGB tensor, "label": (H, W) uint8 tensor of train ids, "sample_id": str}.
    Samples without a label, or whose image was unreadable at scan time, are left out. Raises ValueError if no sample
    remains; reading an item raises ValueError, naming the file, if it is damaged or not of the manifest's size.
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
    # Tensors need writable, contiguous memory; these calls copy where an array has none.
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return {"image": pixels, "label": torch.from_numpy(np.array(label)), "sample_id": sample_id}


@dataclass(frozen=True)
class Augmentation:
    """Random crop of `crop` = (height, width) after scaling by a factor in `scale`, flip, and colour jitter.

    published: augment as github.com/NVIDIA/semantic-segmentation does. The scale is uniform instead of its logarithm;
    resizing is bicubic instead of bilinear; a window over a class is drawn first and moved into the image then; padding
    is black and even on both sides, instead of the mean colour and at random, and the jitter changes it too; the hue
    turns by up to `jitter` of a circle, and the four changes of colour come in random order.
    blur: blur every crop by a Gaussian with a random standard deviation of 0.15 to 1.3 pixels (Pillow's three boxes).
    """

    crop: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)  # arXiv 2005.10821, section 4: random scaling 0.5 to 2
    jitter: float = 0.25  # factors of brightness, contrast and saturation lie within 1 - jitter and 1 + jitter
    published: bool = False
    blur: bool = False


class Fetched(NamedTuple):
    """The stored bytes behind a draw. weight: the probability of an automatic label, if it is asked."""

    draw: Draw
    image: bytes
    label: FetchedLabel
    weight: FetchedLabel | None


class TrainingCrops(Dataset[dict[str, Any]]):
    """A dataset whose item n is the augmented crop of draw n: what `fetch` reads, `crop` decodes and augments.

    An item is {"image": (3, h, w) uint8, "label": (h, w) uint8, "sample_id": str, "automatic": bool}, the last true for
    labels of source auto. With `weights` it also has "weight" (h, w) uint8: the probability of an automatic label, in
    255ths, and 255 for labels that people made. `draws` choose from the dataset's samples; their seed also decides the
    augmentation. Reading an item raises ValueError as `ManifestDataset` does.
    """

    def __init__(
        self, dataset: ManifestDataset, draws: Draws, *, augmentation: Augmentation, weights: bool = False
    ) -> None:
        self.dataset, self.draws, self.augmentation, self.weights = dataset, draws, augmentation, weights

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, n: int) -> dict[str, Any]:
        return self.crop(n, self.fetch(self.draws[n]))

    def fetch(self, draw: Draw) -> Fetched:
        """Read what a draw needs: the photograph's bytes, and one range for its label. Threads may do it ahead."""
        sample = self.dataset.samples[draw.sample]
        weight = fetch_layer(sample, PROBABILITY) if self.weights and sample.source == AUTO else None
        return Fetched(draw, fetch_photograph(sample), fetch_label(sample, self.dataset.label_space), weight)

    def crop(self, n: int, fetched: Fetched) -> dict[str, Any]:
        """Make the item of draw n of what was read for it."""
        rng = np.random.default_rng((self.draws.seed, n))
        sample, around = self.dataset.samples[fetched.draw.sample], fetched.draw.around
        published, (crop_height, crop_width) = self.augmentation.published, self.augmentation.crop
        low, high = self.augmentation.scale if published else np.log(self.augmentation.scale)
        scale = float(rng.uniform(low, high) if published else np.exp(rng.uniform(low, high)))
        read = fetched.label.crop
        y, x = _focus(sample, around, read) if around else (None, None)
        window = _published_window if published else window_along
        top, height, place_y, out_height = window(sample.height, crop_height, scale, y, rng)
        left, width, place_x, out_width = window(sample.width, crop_width, scale, x, rng)

        # Image and label go through the same geometry; the image's colours are changed after it.
        needed = min(sample.height, top + height + _beyond(height / out_height, published=published))
        whole, by = picture_of(sample, fetched.image, shrink=1 / scale, rows=needed)
        box = (left / by, top / by, (left + width) / by, (top + height) / by)
        by_colour = Image.Resampling.BICUBIC if published else Image.Resampling.BILINEAR
        picture = whole.resize((out_width, out_height), by_colour, box=box)
        flipped = rng.random() < 0.5
        if flipped:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if not published:
            picture = self._recoloured(picture, rng)
        crop = Image.new("RGB", (crop_width, crop_height), "black" if published else PADDING)
        crop.paste(picture, (place_x, place_y))
        if published:
            crop = self._recoloured(crop, rng)

        def placed(values: Label) -> Label:
            """The window's bytes as they lie in the crop, and 255 around them."""
            there = Image.fromarray(np.ascontiguousarray(values))
            there = there.resize((out_width, out_height), Image.Resampling.NEAREST)
            there = there.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else there
            out = np.full((crop_height, crop_width), IGNORE, np.uint8)
            out[place_y : place_y + out_height, place_x : place_x + out_width] = np.asarray(there)
            return out

        inside = (top, left, height, width)
        item = _item(np.asarray(crop), placed(read(inside)), sample.sample_id) | {"automatic": sample.source == AUTO}
        if self.weights:
            sure = np.full(inside[2:], CERTAIN, np.uint8) if fetched.weight is None else fetched.weight.crop(inside)
            item["weight"] = torch.from_numpy(placed(sure))
        return item

    def _recoloured(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        changes = [_brightened, _contrasted, _saturated]
        if self.augmentation.published:
            changes = [[*changes, _turned][n] for n in rng.permutation(4)]
        for change in changes:
            picture = change(picture, rng.uniform(-self.augmentation.jitter, self.augmentation.jitter))
        if self.augmentation.blur:
            picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(*_BLUR)))
        return picture


def _beyond(reduction: float, *, published: bool) -> int:
    """How many rows below a window Pillow's resizing looks at, or a few more: 1 or 2 times the reduction, at least."""
    return math.ceil((2 if published else 1) * max(reduction, 1)) + 2


def _brightened(picture: Image.Image, by: float) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(1 + by)


def _contrasted(picture: Image.Image, by: float) -> Image.Image:
    return ImageEnhance.Contrast(picture).enhance(1 + by)


def _saturated(picture: Image.Image, by: float) -> Image.Image:
    return ImageEnhance.Color(picture).enhance(1 + by)


def _turned(picture: Image.Image, by: float) -> Image.Image:
    """Turn all hues by a share of the circle."""
    hue, saturation, value = picture.convert("HSV").split()
    turned = hue.point([(n + round(256 * by)) % 256 for n in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def _focus(sample: Sample, around: Centroid, read: Callable[[Window], Label]) -> tuple[int, int]:
    """Return the pixel (y, x) of the centroid's class, in the centroid's tile, that is nearest to the centroid.

    The centroid itself may lie between two objects of its class. Raises ValueError if the tile has no such pixel.
    """
    top, left = (int(place) // CHUNK * CHUNK for place in (around.y, around.x))
    tile = read((top, left, min(CHUNK, sample.height - top), min(CHUNK, sample.width - left)))
    ys, xs = np.nonzero(tile == around.class_id)
    if not len(ys):
        raise ValueError(
            f"{sample.label}: the label of {sample.sample_id!r} has changed since the training began: start it again"
        )
    nearest = int(np.argmin((ys + top - around.y) ** 2 + (xs + left - around.x) ** 2))
    return top + int(ys[nearest]), left + int(xs[nearest])


def window_along(
    side: int, crop: int, scale: float, focus: int | None, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Place a crop along one axis: return first source pixel, source pixels, first crop pixel, crop pixels.

    The window of crop / scale source pixels lies at random inside the image, over `focus` if that is given. A window
    longer than the image covers all of it, and the image lies at random inside the crop.
    """
    length = max(1, round(crop / scale))
    if length <= side:
        low, high = (0, side - length) if focus is None else (max(0, focus - length + 1), min(focus, side - length))
        return int(rng.integers(low, high + 1)), length, 0, crop
    out = max(1, min(crop, round(side * scale)))
    return 0, side, int(rng.integers(crop - out + 1)), out


def _published_window(
    side: int, crop: int, scale: float, focus: int | None, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Place a crop as the published code does: over `focus`, then moved into the image; a small image in the middle."""
    first, length, _, out = window_along(side, crop, scale, focus, rng)
    if focus is not None and length < side:
        first = min(max(0, int(rng.integers(focus - length + 1, focus + 1))), side - length)
    return first, length, (crop - out) // 2, out
