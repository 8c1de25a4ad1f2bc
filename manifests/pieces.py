"""Connected pieces of one value in a map, as runs of pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.uint8] | NDArray[np.int16] | NDArray[np.int32]


@dataclass(frozen=True)
class Pieces:
    """The 4-connected pieces of one value in a map (H, W).

    A row is cut into runs of one value, in the order of the pixels. By run, each (R,): starts, its first pixel;
    lengths; values; piece, the number of the first run of its piece.
    """

    shape: tuple[int, int]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    values: Values
    piece: NDArray[np.int64]

    def pixels(self) -> NDArray[np.int64]:
        """The number of pixels of each piece, at the place of its first run; 0 elsewhere (R,)."""
        return np.bincount(self.piece, self.lengths, minlength=len(self.starts)).astype(np.int64)

    def painted(self, by_run: NDArray[np.generic]) -> NDArray[np.generic]:
        """The map (H, W) in which every pixel has what `by_run` (R,) says of its run."""
        return np.repeat(by_run, self.lengths).reshape(self.shape)


def pieces(values: Values) -> Pieces:
    """Find the 4-connected pieces of one value in a map (H, W) with at least one pixel.

    Runs that touch in neighbouring rows join their pieces until all of them agree; a piece goes by the number of its
    first run. About 4 ms for 1024 x 2048, 25,000 runs.
    """
    width = values.shape[1]
    begins = np.ones(values.shape, np.bool_)
    np.not_equal(values[:, 1:], values[:, :-1], out=begins[:, 1:])
    starts = np.flatnonzero(begins)
    lengths, own, piece = np.diff(starts, append=values.size), values.ravel()[starts], np.arange(len(starts))
    # Two runs touch in the column where the one or the other begins.
    second, last = np.searchsorted(starts, (width, values.size - width))
    above = np.concatenate([piece[:last], np.searchsorted(starts, starts[second:] - width, "right") - 1])
    below = np.concatenate([np.searchsorted(starts, starts[:last] + width, "right") - 1, piece[second:]])
    same = own[above] == own[below]
    first, other = above[same], below[same]
    while len(first):
        piece[other] = first  # take one of several; the next turn joins the rest
        while not np.array_equal(piece, further := piece[piece]):
            piece = further
        first, other = piece[first], piece[other]
        differ = first != other
        first, other = np.minimum(first, other)[differ], np.maximum(first, other)[differ]
    return Pieces(values.shape, starts, lengths, own, piece)
