"""Draw photographs and label maps small, in colours that everybody can tell apart, and write them as WebP."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests import storage
from autolabel.manifests.images import colourise
from autolabel.manifests.label_space import IGNORE, LabelSpace

LONGEST = 960  # pixels of a picture's longer side
# The palette of Okabe and Ito, "Color universal design" (2008): told apart with every kind of colour vision.
OKABE_ITO = {
    "blue": "#0072b2",
    "orange": "#e69f00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "sky": "#56b4e9",
    "vermilion": "#d55e00",
    "yellow": "#f0e442",
}
# Viridis at equal steps: perceptually uniform, readable in grey and for colour-blind eyes.
VIRIDIS = bytes.fromhex("440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725")


def rgba(colour: str) -> tuple[int, int, int, int]:
    """ "#0072b2" -> (0, 114, 178, 255)."""
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue, 255


# The colours of a label compared with another one: auto with coarse, predicted with true. The three differ in lightness
# too. Where there is nothing to compare, the photograph shows through, dimmed.
DISAGREEMENT = {
    "agree": rgba(OKABE_ITO["blue"]),
    "dropped": rgba(OKABE_ITO["yellow"]),
    "another class": rgba(OKABE_ITO["vermilion"]),
    "no coarse label": (0, 0, 0, 128),
}


def shrink(image: Image.Image, longest: int, how: Image.Resampling) -> Image.Image:
    """The picture with its longer side at most `longest`; never enlarged."""
    factor = min(1.0, longest / max(image.size))
    return image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), how)


def shrink_label(label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) uint8 at the size of its picture; no class appears that was not there."""
    return np.asarray(shrink(Image.fromarray(label), LONGEST, Image.Resampling.NEAREST))


def draw_label(label: NDArray[np.uint8], space: LabelSpace) -> Image.Image:
    """(H, W) uint8 train ids in the label space's colours. Ignore is hatched: some classes are nearly black."""
    small = shrink_label(label)
    colours = colourise(small, space)
    y, x = np.indices(small.shape)
    period = max(8, max(small.shape) // 40)
    colours[(small == IGNORE) & ((x + y) % period < period // 4)] = 56
    return Image.fromarray(colours)


def disagreement(reference: NDArray[np.uint8], label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) uint8: the place in DISAGREEMENT of what `label` makes of every pixel of `reference`."""
    found = np.where(label == reference, 0, np.where(label == IGNORE, 1, 2))
    return np.where(reference == IGNORE, 3, found).astype(np.uint8)


def draw_disagreement(reference: NDArray[np.uint8], label: NDArray[np.uint8]) -> Image.Image:
    """Two labels (H, W) uint8 -> RGBA in the colours of DISAGREEMENT."""
    colours = np.array(list(DISAGREEMENT.values()), np.uint8)
    return Image.fromarray(colours[disagreement(shrink_label(reference), shrink_label(label))], "RGBA")


def encode_smooth(image: Image.Image) -> bytes:
    """WebP of what a camera saw, or of a smooth field of confidence."""
    return _webp(image, quality=80, method=2)


def encode_flat(image: Image.Image) -> bytes:
    """Lossless WebP of a picture of few colours: edges stay where they are. A fifth of the time of the smallest."""
    return _webp(image, lossless=True, quality=50, method=0)


def _webp(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", **options)
    return buffer.getvalue()


def write_picture(path: Path, data: bytes) -> None:
    """Write a file that no page shows yet. Not forced to disk, which takes most of the time: it can be drawn again."""
    storage.write(path, data, durable=False)
