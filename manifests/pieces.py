"""Connected pieces of a map: pixels of one value that hang together by their edges."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


def pieces(values: NDArray[Any], nothing: int) -> tuple[Counts, NDArray[Any], Counts]:
    """The 4-connected pieces of one value in (H, W); those of the value `nothing` are not joined.

    A row is cut into runs of one value. Given for every run, in reading order: its length, value and piece. Runs that
    touch in neighbouring rows join their pieces until all of them agree; a piece goes by the number of its first run.
    """
    width = values.shape[1]
    begins = np.ones(values.shape, np.bool_)
    np.not_equal(values[:, 1:], values[:, :-1], out=begins[:, 1:])
    starts = np.flatnonzero(begins)
    lengths, ids, piece = np.diff(starts, append=values.size), values.ravel()[starts], np.arange(len(starts))
    # Two runs touch in the column where the one or the other begins.
    second, last = np.searchsorted(starts, (width, values.size - width))
    above = np.concatenate([piece[:last], np.searchsorted(starts, starts[second:] - width, "right") - 1])
    below = np.concatenate([np.searchsorted(starts, starts[:last] + width, "right") - 1, piece[second:]])
    same = (ids[above] == ids[below]) & (ids[above] != nothing)
    first, other = above[same], below[same]
    while len(first):
        piece[other] = first  # take one of several; the next turn joins the rest
        while not np.array_equal(piece, further := piece[piece]):
            piece = further
        first, other = piece[first], piece[other]
        differ = first != other
        first, other = np.minimum(first, other)[differ], np.maximum(first, other)[differ]
    return lengths, ids, piece
