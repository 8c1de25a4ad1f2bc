"""Polygons filled: a pixel is inside if its centre is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autolabel.manifests.formats.exchange import BadReturn
from autolabel.manifests.run.shards import Label

_FARTHEST = 1 << 20  # pixels; a corner beyond is a mistake


def fill(label: Label, corners: Sequence[float], value: int, where: str) -> None:
    """Set the pixels of a label (H, W) inside a polygon x1, y1, x2, y2, …, in pixels from the top left corner.

    Where it overlaps itself, what lies inside an even number of times is outside. Raises BadReturn for fewer than three
    corners and for corners far from any image.
    """
    points = np.array(corners, np.float64)
    if len(points) < 6 or len(points) % 2 or np.abs(points).max() > _FARTHEST:
        shown = str([round(float(x), 1) for x in points[:4]])[1:-1]
        raise BadReturn(f"{where}: the polygon {shown}, … has {len(points)} numbers: expected x and y of 3 corners")
    (x1, y1), (x2, y2) = points.reshape(-1, 2).T, np.roll(points.reshape(-1, 2), -1, axis=0).T
    height, width = label.shape
    first, last = (np.ceil(pick(y1, y2) - 0.5).clip(0, height).astype(np.int64) for pick in (np.minimum, np.maximum))
    edge = np.repeat(np.arange(len(x1)), last - first)  # once for every row whose middle it crosses
    row = np.arange(len(edge)) - np.repeat(np.cumsum(last - first) - (last - first), last - first) + first[edge]
    slope = (x2 - x1)[edge] / (y2 - y1)[edge]
    crossing = np.ceil(x1[edge] + (row + 0.5 - y1[edge]) * slope - 0.5).clip(0, width).astype(np.int64)
    turns = np.zeros((height, width + 1), np.int32)
    np.add.at(turns, (row, crossing), 1)
    top, bottom = int(first.min()), int(last.max())
    inside = np.cumsum(turns[top:bottom, :-1], axis=1) % 2 == 1
    label[top:bottom][inside] = value
