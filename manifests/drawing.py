"""Draw photographs and label maps small, in colours that everybody can tell apart, as WebP."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests import storage
from autolabel.manifests.images import colourise
from autolabel.manifests.label_space import IGNORE, LabelSpace

LONGEST = 960  # longer side of a picture, pixels
# The palette of Okabe and Ito, "Color universal design" (2008), distinct for every kind of colour vision.
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


def shrink(image: Image.Image, longest: int, *, how: Image.Resampling) -> Image.Image:
    """Resize a picture so that its longer side has at most `longest` pixels; never enlarge it."""
    factor = min(1.0, longest / max(image.size))
    return image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), how)


def shrink_label(label: NDArray[np.uint8], longest: int = LONGEST) -> NDArray[np.uint8]:
    """Resize a label (H, W) uint8 to the size of its picture; every pixel keeps the id of some pixel."""
    return np.asarray(shrink(Image.fromarray(label), longest, how=Image.Resampling.NEAREST))


def draw_label(label: NDArray[np.uint8], space: LabelSpace, longest: int = LONGEST) -> Image.Image:
    """Draw (H, W) uint8 train ids in the label space's colours. Ignore is hatched: some classes are nearly black."""
    small = shrink_label(label, longest)
    colours = colourise(small, space)
    y, x = np.indices(small.shape)
    period = max(8, max(small.shape) // 40)
    colours[(small == IGNORE) & ((x + y) % period < period // 4)] = 56
    return Image.fromarray(colours)


def disagreement(reference: NDArray[np.uint8], label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Compare two labels (H, W) uint8 pixel by pixel: (H, W) uint8, places in DISAGREEMENT."""
    kinds = np.where(label == reference, 0, np.where(label == IGNORE, 1, 2))
    return np.where(reference == IGNORE, 3, kinds).astype(np.uint8)


def draw_disagreement(reference: NDArray[np.uint8], label: NDArray[np.uint8], longest: int = LONGEST) -> Image.Image:
    """Draw the comparison of two labels (H, W) uint8 as RGBA in the colours of DISAGREEMENT."""
    kinds = disagreement(shrink_label(reference, longest), shrink_label(label, longest))
    return draw_kinds(kinds, list(DISAGREEMENT.values()))


def draw_kinds(kinds: NDArray[np.uint8], colours: Sequence[tuple[int, int, int, int]]) -> Image.Image:
    """Draw (H, W) uint8 places in a list of colours as RGBA."""
    return Image.fromarray(np.array(colours, np.uint8)[kinds], "RGBA")


def encode_smooth(image: Image.Image) -> bytes:
    """Encode a photograph, or a smooth field of confidence, as lossy WebP."""
    return _webp(image, quality=80, method=2)


def encode_flat(image: Image.Image) -> bytes:
    """Encode a picture of few colours as lossless WebP, in a fifth of the time that the smallest file would take."""
    return _webp(image, lossless=True, quality=50, method=0)


def _webp(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", **options)
    return buffer.getvalue()


def write_picture(path: Path, data: bytes) -> None:
    """Write a picture that no page shows yet. It is not forced to disk, which would take most of the time."""
    storage.write(path, data, durable=False)
