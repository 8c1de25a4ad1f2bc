"""Pictures of likely mistakes: the photograph, what people say and what the teacher says, around a region."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from autolabel.manifests import storage
from autolabel.manifests.drawing import draw_label, encode_smooth, write_picture
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.run.shards import Label

FOLDER = "pictures"
_AROUND = 0.5  # of the box on each side
_LEAST = 96  # pixels of a side that are shown at least
_HEIGHT = 320  # of a picture, pixels
_FRAME = "#ffffff", "#000000"
_NAME = 60  # characters of a sample id in a file's name


def clear(folder: Path) -> None:
    """Remove the pictures of an earlier ranking."""
    for path in storage.list(folder, suffix=".webp"):
        storage.remove(path)


def picture_name(row: pd.Series) -> str:
    """RANK-ID-HUMAN-is-SUGGESTED.webp; in the id, all but letters, digits, . _ and - become _."""
    parts = (f"{row['rank']:03}", row["sample_id"][-_NAME:], row["human"], "is", row["suggested"])
    return "-".join(re.sub(r"[^A-Za-z0-9._-]+", "_", part) for part in parts) + ".webp"


def draw_region(
    image: NDArray[np.uint8], human: Label, top: Label, *, box: tuple[int, int, int, int], space: LabelSpace
) -> bytes:
    """Draw the surroundings of a box (top, left, height, width) three times, side by side, with the box framed.

    image (H, W, 3) uint8 RGB; human and top (H, W) uint8 train ids. Returns a WebP.
    """
    y, x, height, width = box
    rows, columns = _around(y, height, human.shape[0]), _around(x, width, human.shape[1])
    parts = [
        Image.fromarray(image[rows, columns]),
        draw_label(human[rows, columns], space),
        draw_label(top[rows, columns], space),
    ]
    factor = _HEIGHT / parts[0].height
    size = max(1, round(parts[0].width * factor)), _HEIGHT
    sheet = Image.new("RGB", (3 * size[0], size[1]))
    first, upper = (x - columns.start) * factor, (y - rows.start) * factor
    for place, part in enumerate(parts):
        how = Image.Resampling.BICUBIC if place == 0 else Image.Resampling.NEAREST
        sheet.paste(part.resize(size, how), (place * size[0], 0))
        for inset, colour in enumerate(_FRAME):
            left = place * size[0] + first + inset
            corner = left + width * factor - 2 * inset - 1, upper + height * factor - inset - 1
            ImageDraw.Draw(sheet).rectangle((left, upper + inset, *corner), outline=colour)
    return encode_smooth(sheet)


def write_region(folder: Path, row: pd.Series, picture: bytes) -> None:
    """Write the picture of a row of the ranking."""
    write_picture(folder / picture_name(row), picture)


def _around(first: int, length: int, whole: int) -> slice:
    """The part of an axis that is shown of a box."""
    more = max(length * _AROUND, (_LEAST - length) / 2)
    return slice(max(0, int(first - more)), min(whole, int(first + length + more)))
