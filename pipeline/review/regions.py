"""Regions of a label that a person could correct: connected pieces of unsure pixels, cut by a grid of cells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autolabel.pipeline.rules import pieces

UNSURE = 0.2  # pixels that are as likely as this to be changed belong to a region
CELLS = 8  # cells along the shorter side of an image, so that no region is a net over all of it
SMALLEST = 16  # pixels; what is smaller is left out


@dataclass(frozen=True)
class Regions:
    """The regions of an image, numbered from 0 in reading order.

    places (H, W) int32: the region of each pixel, -1 for none. pixels, boundary (R,): how many it has, and how many of
    them have one of their four neighbours outside it or outside the image. boxes (R, 4): top, left, height, width.
    """

    places: NDArray[np.int32]
    pixels: NDArray[np.int64]
    boundary: NDArray[np.int64]
    boxes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.pixels)


def find_regions(unsure: NDArray[np.bool_]) -> Regions:
    """The 4-connected pieces of True (H, W) within each cell of the grid that have `SMALLEST` pixels or more."""
    height, width = unsure.shape
    side = max(SMALLEST, -(-min(height, width) // CELLS))
    rows, columns = np.arange(height) // side, np.arange(width) // side
    across = int(columns[-1]) + 1
    cells = np.where(unsure, rows[:, None] * across + columns, -1).astype(np.int32)
    lengths, ids, piece = pieces(cells, -1)
    sizes = np.bincount(piece, lengths)[piece].astype(np.int64)
    kept = (ids >= 0) & (sizes >= SMALLEST)
    first = np.unique(piece[kept])
    number = np.full(len(piece), -1, np.int32)
    number[kept] = np.searchsorted(first, piece[kept])
    places = np.repeat(number, lengths).reshape(unsure.shape)
    inside = places >= 0
    counts = np.bincount(number[kept], lengths[kept], minlength=len(first)).astype(np.int64)
    edge = np.bincount(places[inside & _on_edge(places)], minlength=len(first))
    boxes = np.zeros((len(first), 4), np.int64)
    if len(first):
        order = np.argsort(number[kept], kind="stable")  # runs, region by region
        begin = (np.cumsum(lengths) - lengths)[kept][order]
        y, x = np.divmod(begin, width)
        starts = np.searchsorted(number[kept][order], np.arange(len(first)))
        boxes[:, 0], boxes[:, 1] = np.minimum.reduceat(y, starts), np.minimum.reduceat(x, starts)
        boxes[:, 2] = np.maximum.reduceat(y, starts) - boxes[:, 0] + 1
        boxes[:, 3] = np.maximum.reduceat(x + lengths[kept][order], starts) - boxes[:, 1]
    return Regions(places, counts, edge, boxes)


def _on_edge(places: NDArray[np.int32]) -> NDArray[np.bool_]:
    """(H, W) bool: one of the four neighbours is of another region, of none, or outside."""
    framed = np.pad(places, 1, constant_values=-2)
    middle = framed[1:-1, 1:-1]
    around = (framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:])
    edge = np.zeros(places.shape, np.bool_)
    for neighbour in around:
        edge |= neighbour != middle
    return edge
