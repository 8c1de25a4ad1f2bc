"""Connected pieces of a label: pixels of one class that hang together by their edges."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.run.shards import Label


class Pieces(NamedTuple):
    """A label as runs, row by row: how long each is, its class, and its piece, the number of a run of that piece.

    Every run of ignored pixels is a piece of its own.
    """

    lengths: NDArray[np.int64]
    classes: Label
    piece: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Pixels of the piece of every run."""
        sizes: NDArray[np.int64] = np.bincount(self.piece, self.lengths).astype(np.int64)[self.piece]
        return sizes


def pieces(label: Label) -> Pieces:
    """The 4-connected pieces of one class, of a label (H, W) uint8 train ids.

    A row is cut into runs of one class. Runs that touch in neighbouring rows join their pieces until all of them agree;
    a piece goes by the number of one of its runs. About 4 ms for 1024 x 2048, 25,000 runs.
    """
    width = label.shape[1]
    begins = np.ones(label.shape, np.bool_)
    np.not_equal(label[:, 1:], label[:, :-1], out=begins[:, 1:])
    starts = np.flatnonzero(begins)
    lengths, classes, piece = np.diff(starts, append=label.size), label.ravel()[starts], np.arange(len(starts))
    # Two runs touch in the column where the one or the other begins.
    second, last = np.searchsorted(starts, (width, label.size - width))
    above = np.concatenate([piece[:last], np.searchsorted(starts, starts[second:] - width, "right") - 1])
    below = np.concatenate([np.searchsorted(starts, starts[:last] + width, "right") - 1, piece[second:]])
    same = (classes[above] == classes[below]) & (classes[above] != IGNORE)
    first, other = above[same], below[same]
    while len(first):
        piece[other] = first  # take one of several; the next turn joins the rest
        while not np.array_equal(piece, further := piece[piece]):
            piece = further
        first, other = piece[first], piece[other]
        differ = first != other
        first, other = np.minimum(first, other)[differ], np.maximum(first, other)[differ]
    return Pieces(lengths, classes, piece)
