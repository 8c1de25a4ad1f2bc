"""The pictures of a report: photograph, labels, confidence and disagreement, drawn small and written as WebP.

What cannot be drawn is no error: its reason takes its place, because a report is also for runs that were moved or
whose photographs are gone.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests.drawing import (
    DISAGREEMENT,
    LONGEST,
    disagreement,
    draw_disagreement,
    draw_label,
    encode_flat,
    encode_smooth,
    shrink,
    shrink_label,
    write_picture,
)
from autolabel.manifests.images import BadImage
from autolabel.manifests.label_space import IGNORE, LabelSpace
from autolabel.manifests.reading import read_coarse
from autolabel.manifests.run.shards import DamagedLabel, Label
from autolabel.manifests.samples import Sample

THUMB = 320  # of a thumbnail's
_FEW_COLOURS = 64  # of a picture that is small without loss
KINDS = ("photograph", "coarse", "auto", "confidence", "disagreement")  # of the layers that the viewer shows
# Viridis at equal steps: perceptually uniform, readable in grey and for colour-blind eyes.
VIRIDIS = bytes.fromhex("440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725")

Photograph = NDArray[np.uint8]
Confidence = NDArray[np.float32]
T = TypeVar("T")


class Missing(str):
    """Why there is no picture."""


@dataclass(frozen=True)
class Seen:
    """What there is of one sample; a `Missing` says why there is not. What the whole run lacks is None.

    photograph (H, W, 3) uint8; coarse and auto (H, W) uint8 train ids; confidence (H, W) float32 in 0..1.
    """

    photograph: Photograph | Missing
    auto: Label | Missing
    coarse: Label | Missing | None
    confidence: Confidence | Missing | None


@dataclass(frozen=True)
class Drawn:
    """The pictures of one sample on disk: `kinds` lie at `stem`-KIND.webp, the others have their reason.

    shares: of the pixels that have a coarse label, how many the auto label confirms, drops, or gives to another class.
    """

    stem: str
    kinds: tuple[str, ...]
    thumb: tuple[int, int] | None  # width, height of `stem`-thumb.webp
    missing: dict[str, str] = field(default_factory=dict)
    disagreement: dict[str, float] = field(default_factory=dict)


def attempt(read: Callable[[], T]) -> T | Missing:
    """What `read` gives, or why it does not."""
    try:
        return read()
    except (BadImage, DamagedLabel) as error:
        return Missing(error)
    except FileNotFoundError as error:
        return Missing(f"{error.filename} is gone")


def coarse_label(asked: Sample | None, space: LabelSpace) -> Label:
    """(H, W) uint8 train ids of a sample as the run was asked to label it. Raises BadImage where there is none."""
    if asked is None or asked.coarse_label is None:
        raise BadImage("this image has no coarse label" if asked else "the run's manifest lists it no more")
    label = read_coarse(asked, space)
    assert label is not None
    return label


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw_share(share: Confidence) -> Image.Image:
    """(H, W) float32 in the colours of viridis, 0 to 1; what lies outside is drawn as the nearer of the two."""
    small = np.asarray(shrink(Image.fromarray(share.clip(0, 1)), LONGEST, Image.Resampling.BOX))
    steps = np.frombuffer(VIRIDIS, np.uint8).reshape(-1, 3)
    channels = [np.interp(small, np.linspace(0, 1, len(steps)), channel) for channel in steps.T]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def from_levels(level: NDArray[np.uint8], edges: Sequence[float]) -> Confidence:
    """(H, W) uint8 levels between ascending edges -> (H, W) float32, each the middle of its level, 0 and 1 outermost.

    Level k holds the confidences above the k-th edge, as the run's confidence store keeps them.
    """
    whole = [0.0, *edges, 1.0]
    middles: Confidence = np.array([(low + high) / 2 for low, high in pairwise(whole)], np.float32)
    return middles[level]


# --- files ------------------------------------------------------------------------------------------------------------


def write_pictures(folder: Path, stem: str, seen: Seen, space: LabelSpace) -> Drawn:
    """Draw every layer of a sample and its thumbnail into `folder`.

    Beside them lies `stem`-ids.js, a picture of the class ids as a script: a page opened from disk may run a script
    but not read the pixels of a file, and the viewer names the class under the pointer.
    """
    missing: dict[str, str] = {}
    layers: dict[str, bytes] = {}
    thumb = None
    shares: dict[str, float] = {}
    if isinstance(seen.photograph, Missing):
        missing["photograph"] = seen.photograph
    else:
        picture = shrink(Image.fromarray(seen.photograph), LONGEST, Image.Resampling.LANCZOS)
        small = shrink(picture, THUMB, Image.Resampling.LANCZOS)
        layers |= {"photograph": encode_smooth(picture), "thumb": encode_smooth(small)}
        thumb = small.size
    for kind, label in (("coarse", seen.coarse), ("auto", seen.auto)):
        if isinstance(label, Missing):
            missing[kind] = label
        elif label is not None:
            layers[kind] = encode_flat(draw_label(label, space))
    if isinstance(seen.confidence, Missing):
        missing["confidence"] = seen.confidence
    elif seen.confidence is not None:
        picture = draw_share(seen.confidence)
        few = picture.getcolors(_FEW_COLOURS) is not None  # levels, not a smooth field
        layers["confidence"] = encode_flat(picture) if few else encode_smooth(picture)
    if isinstance(seen.coarse, np.ndarray) and isinstance(seen.auto, np.ndarray):
        layers["disagreement"] = encode_flat(draw_disagreement(seen.coarse, seen.auto))
        counts = np.bincount(disagreement(seen.coarse, seen.auto).ravel(), minlength=len(DISAGREEMENT))
        shares = dict(zip(DISAGREEMENT, (counts / counts.sum()).tolist(), strict=True))
    elif seen.coarse is not None:
        missing["disagreement"] = str(seen.coarse if isinstance(seen.coarse, Missing) else seen.auto)
    for kind, data in layers.items():
        write_picture(folder / f"{stem}-{kind}.webp", data)
    write_picture(folder / f"{stem}-ids.js", _ids_script(stem, seen))
    return Drawn(stem, tuple(kind for kind in KINDS if kind in layers), thumb, missing, shares)


def _ids_script(stem: str, seen: Seen) -> bytes:
    """`classIds(stem, url)`: a lossless picture whose red is the auto label and whose green the coarse one."""
    labels = [shrink_label(x) if isinstance(x, np.ndarray) else None for x in (seen.auto, seen.coarse)]
    shape = next((label.shape for label in labels if label is not None), (1, 1))
    ids = np.full((*shape, 3), IGNORE, np.uint8)
    for channel, label in enumerate(labels):
        if label is not None:
            ids[..., channel] = label
    url = "data:image/webp;base64," + base64.b64encode(encode_flat(Image.fromarray(ids))).decode()
    return f'classIds("{stem}", "{url}")\n'.encode()
