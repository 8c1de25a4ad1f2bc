"""Draw the layers of a sample and write them as WebP: photograph, labels, confidence, disagreement and fates."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
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
    draw_kinds,
    draw_label,
    encode_flat,
    encode_smooth,
    rgba,
    shrink,
    shrink_label,
    write_picture,
)
from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.places import without_void
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.shards import Label
from autolabel.pipeline.report.charts import FATE_COLOURS
from autolabel.pipeline.report.layers import Confidence, Layers, Missing
from autolabel.pipeline.report.specks import Specks, find_specks

THUMB = 480  # longer side of the pictures on a card, pixels
FULL = 4096  # longer side of the largest pictures; a browser holds four bytes for each of their pixels
_FEW_COLOURS = 64  # a picture of at most so many colours is small without loss
KINDS = ("photograph", "coarse", "auto", "confidence", "disagreement", "fates")  # the layers that the viewer shows
# Where a pixel is kept, the photograph shows through.
FATE_OVERLAY = {fate: (0, 0, 0, 0) if fate == "kept" else rgba(colour) for fate, colour in FATE_COLOURS.items()}
_NO_FATES = "the run has kept no confidence: --keep-confidence shows the fate of every pixel; the shares are beside"


@dataclass(frozen=True)
class Drawn:
    """The pictures of one sample on disk; `missing` has the reasons for the `kinds` that are not there.

    size: width and height of its full pictures. disagreement: the shares of all pixels that the auto label confirms,
    drops, or gives to another class, and of those without a coarse label. specks: None if they cannot be told.
    """

    stem: str
    kinds: tuple[str, ...]
    thumb: tuple[int, int] | None  # width, height of `stem`-thumb.webp
    size: tuple[int, int] = (0, 0)
    missing: dict[str, str] = field(default_factory=dict)
    disagreement: dict[str, float] = field(default_factory=dict)
    specks: Specks | None = None


def draw_share(share: Confidence) -> Image.Image:
    """Draw (H, W) float32 in the colours of viridis, from 0 to 1. Values outside are drawn as the nearer end."""
    small = np.asarray(shrink(Image.fromarray(share.clip(0, 1)), LONGEST, how=Image.Resampling.BOX))
    steps = np.frombuffer(VIRIDIS, np.uint8).reshape(-1, 3)
    channels = [np.interp(small, np.linspace(0, 1, len(steps)), channel) for channel in steps.T]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def mark_rows(picture: Image.Image, rows: tuple[int, int] | None, *, height: int) -> Image.Image:
    """Mark rows of an image of this height in its picture by a white and a black line at each end; none for None."""
    if rows is None:
        return picture
    pixels = np.array(picture.convert("RGB"))
    width = max(1, len(pixels) // 180)
    for row, outwards in ((rows[0], -1), (rows[1], 1)):
        if 0 < row < height:
            edge = round(row * len(pixels) / height)
            for colour, near in ((255, 0), (0, width)):
                first, last = sorted((edge + outwards * near, edge + outwards * (near + width)))
                pixels[max(0, first) : max(0, last)] = colour
    return Image.fromarray(pixels)


def write_pictures(folder: Path, layers: Layers, *, stem: str, run: Run, longest: int, specks: int) -> Drawn:
    """Draw every layer of a sample into `folder`.

    The photograph has `longest` pixels at most. All others are small, for the cards of the gallery, because the viewer
    draws its layers from `stem`-ids.js: a picture of ids as large as the photograph, and the specks, as a script. A
    page opened from disk may run a script but not read the pixels of a file.
    """
    missing: dict[str, str] = {}
    files: dict[str, bytes] = {}
    thumb = None
    shares: dict[str, float] = {}
    coarse, auto, fates, space = layers.coarse, layers.auto, layers.fates, run.label_space
    if isinstance(coarse, np.ndarray):
        coarse = without_void(coarse)
    if isinstance(layers.photograph, Missing):
        missing["photograph"] = layers.photograph
    else:
        picture = shrink(Image.fromarray(layers.photograph), longest, how=Image.Resampling.LANCZOS)
        small = shrink(picture, THUMB, how=Image.Resampling.LANCZOS)
        files |= {"photograph": encode_smooth(picture), "thumb": encode_smooth(small)}
        thumb = small.size
    for kind, label in (("coarse", coarse), ("auto", auto)):
        if isinstance(label, Missing):
            missing[kind] = label
        elif label is not None:
            files[kind] = encode_flat(draw_label(label, space, THUMB))
    if isinstance(layers.confidence, Missing):
        missing["confidence"] = layers.confidence
    elif layers.confidence is not None:
        picture = draw_share(layers.confidence)
        few = picture.getcolors(_FEW_COLOURS) is not None  # levels, not a smooth field
        files["confidence"] = encode_flat(picture) if few else encode_smooth(picture)
    if isinstance(coarse, np.ndarray) and isinstance(auto, np.ndarray):
        files["disagreement"] = encode_flat(draw_disagreement(coarse, auto, THUMB))
        counts = np.bincount(disagreement(coarse, auto).ravel(), minlength=len(DISAGREEMENT))
        shares = dict(zip(DISAGREEMENT, (counts / counts.sum()).tolist(), strict=True))
    elif coarse is not None:
        missing["disagreement"] = str(coarse if isinstance(coarse, Missing) else auto)
    if isinstance(fates, np.ndarray):
        files["fates"] = encode_flat(draw_kinds(shrink_label(fates, THUMB), list(FATE_OVERLAY.values())))
    else:
        missing["fates"] = fates or _NO_FATES
    found = find_specks(layers, run.policy, specks)
    for kind, data in files.items():
        write_picture(folder / f"{stem}-{kind}.webp", data)
    ids, size = _ids_script(stem, [auto, coarse, fates], found, longest)
    write_picture(folder / f"{stem}-ids.js", ids)
    return Drawn(stem, tuple(kind for kind in KINDS if kind in files), thumb, size, missing, shares, found)


def _ids_script(
    stem: str, labels: Sequence[Label | Missing | None], specks: Specks | None, longest: int
) -> tuple[bytes, tuple[int, int]]:
    """`classIds(stem, url, specks)`: a lossless picture of auto label, coarse label and fates; its width and height."""
    small = [shrink_label(label, longest) if isinstance(label, np.ndarray) else None for label in labels]
    shape = next((label.shape for label in small if label is not None), (1, 1))
    ids = np.full((*shape, 3), IGNORE, np.uint8)
    for channel, label in enumerate(small):
        if label is not None:
            ids[..., channel] = label
    url = "data:image/webp;base64," + base64.b64encode(encode_flat(Image.fromarray(ids))).decode()
    places = [] if specks is None else specks.places.tolist()
    return f'classIds("{stem}", "{url}", {json.dumps(places, separators=(",", ":"))})\n'.encode(), (shape[1], shape[0])
