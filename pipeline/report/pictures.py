"""Draw the layers of a sample small and write them as WebP: photograph, labels, confidence and disagreement."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from autolabel.manifests.drawing import (
    DISAGREEMENT,
    LONGEST,
    VIRIDIS,
    disagreement,
    draw_disagreement,
    draw_label,
    encode_flat,
    encode_smooth,
    shrink,
    shrink_label,
    write_picture,
)
from autolabel.manifests.label_space import IGNORE, LabelSpace
from autolabel.pipeline.report.layers import Confidence, Layers, Missing

THUMB = 320  # longer side of a thumbnail, pixels
_FEW_COLOURS = 64  # a picture of at most so many colours is small without loss
KINDS = ("photograph", "coarse", "auto", "confidence", "disagreement")  # the layers that the viewer shows


@dataclass(frozen=True)
class Drawn:
    """The pictures of one sample on disk: `kinds` lie at `stem`-KIND.webp; `missing` has the reasons for the others.

    disagreement: the shares of all pixels that the auto label confirms, drops, or gives to another class, and of those
    without a coarse label.
    """

    stem: str
    kinds: tuple[str, ...]
    thumb: tuple[int, int] | None  # width, height of `stem`-thumb.webp
    missing: dict[str, str] = field(default_factory=dict)
    disagreement: dict[str, float] = field(default_factory=dict)


def draw_share(share: Confidence) -> Image.Image:
    """Draw (H, W) float32 in the colours of viridis, from 0 to 1. Values outside are drawn as the nearer end."""
    small = np.asarray(shrink(Image.fromarray(share.clip(0, 1)), LONGEST, how=Image.Resampling.BOX))
    steps = np.frombuffer(VIRIDIS, np.uint8).reshape(-1, 3)
    channels = [np.interp(small, np.linspace(0, 1, len(steps)), channel) for channel in steps.T]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def write_pictures(folder: Path, layers: Layers, *, stem: str, space: LabelSpace) -> Drawn:
    """Draw every layer of a sample and its thumbnail into `folder`.

    Beside them lies `stem`-ids.js, a picture of the class ids as a script: a page opened from disk may run a script
    but not read the pixels of a file, and the viewer names the class under the pointer.
    """
    missing: dict[str, str] = {}
    files: dict[str, bytes] = {}
    thumb = None
    shares: dict[str, float] = {}
    if isinstance(layers.photograph, Missing):
        missing["photograph"] = layers.photograph
    else:
        picture = shrink(Image.fromarray(layers.photograph), LONGEST, how=Image.Resampling.LANCZOS)
        small = shrink(picture, THUMB, how=Image.Resampling.LANCZOS)
        files |= {"photograph": encode_smooth(picture), "thumb": encode_smooth(small)}
        thumb = small.size
    for kind, label in (("coarse", layers.coarse), ("auto", layers.auto)):
        if isinstance(label, Missing):
            missing[kind] = label
        elif label is not None:
            files[kind] = encode_flat(draw_label(label, space))
    if isinstance(layers.confidence, Missing):
        missing["confidence"] = layers.confidence
    elif layers.confidence is not None:
        picture = draw_share(layers.confidence)
        few = picture.getcolors(_FEW_COLOURS) is not None  # levels, not a smooth field
        files["confidence"] = encode_flat(picture) if few else encode_smooth(picture)
    if isinstance(layers.coarse, np.ndarray) and isinstance(layers.auto, np.ndarray):
        files["disagreement"] = encode_flat(draw_disagreement(layers.coarse, layers.auto))
        counts = np.bincount(disagreement(layers.coarse, layers.auto).ravel(), minlength=len(DISAGREEMENT))
        shares = dict(zip(DISAGREEMENT, (counts / counts.sum()).tolist(), strict=True))
    elif layers.coarse is not None:
        missing["disagreement"] = str(layers.coarse if isinstance(layers.coarse, Missing) else layers.auto)
    for kind, data in files.items():
        write_picture(folder / f"{stem}-{kind}.webp", data)
    write_picture(folder / f"{stem}-ids.js", _ids_script(stem, layers))
    return Drawn(stem, tuple(kind for kind in KINDS if kind in files), thumb, missing, shares)


def _ids_script(stem: str, layers: Layers) -> bytes:
    """`classIds(stem, url)`: a lossless picture whose red is the auto label and whose green the coarse one."""
    labels = [shrink_label(x) if isinstance(x, np.ndarray) else None for x in (layers.auto, layers.coarse)]
    shape = next((label.shape for label in labels if label is not None), (1, 1))
    ids = np.full((*shape, 3), IGNORE, np.uint8)
    for channel, label in enumerate(labels):
        if label is not None:
            ids[..., channel] = label
    url = "data:image/webp;base64," + base64.b64encode(encode_flat(Image.fromarray(ids))).decode()
    return f'classIds("{stem}", "{url}")\n'.encode()
