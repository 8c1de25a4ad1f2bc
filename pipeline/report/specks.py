"""The specks of a label: small pieces of one class, which `smallest_piece` of a policy drops or would drop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.policy import Policy
from autolabel.manifests.schemas import FATES
from autolabel.pipeline.report.layers import Layers
from autolabel.pipeline.rules import pieces

SPECKS = 64  # pieces of fewer pixels are marked, if the policy has no number of its own
_MARKED = 500  # specks of an image that are marked, the largest; all are counted
_DROPPED = FATES.index("in_small_piece")


@dataclass(frozen=True)
class Specks:
    """The specks of one image: pieces of fewer than `fewest` pixels.

    dropped: the policy has dropped them; else they are in the label. pixels: of all of them. places (n, 3) int32: x and
    y of the middle and the pixels of the largest ones.
    """

    fewest: int
    dropped: bool
    count: int
    pixels: int
    places: NDArray[np.int32]

    def data(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        return {
            "fewest": self.fewest, "dropped": self.dropped, "count": self.count, "pixels": self.pixels,
            "marked": len(self.places),
        }  # fmt: skip


def find_specks(layers: Layers, policy: Policy, fewest: int) -> Specks | None:
    """Find the specks that the policy has dropped, or those of fewer than `fewest` pixels if it drops none.

    None where that cannot be told: dropped pieces are known from the fates alone. Touching pieces of several classes
    that were dropped count as one.
    """
    dropped = policy.smallest_piece > 0
    if dropped:
        if not isinstance(layers.fates, np.ndarray):
            return None
        label, limit = np.where(layers.fates == _DROPPED, 0, IGNORE).astype(np.uint8), layers.fates.size + 1
    elif isinstance(layers.auto, np.ndarray):
        label, limit = layers.auto, fewest
    else:
        return None
    lengths, classes, piece = pieces(label, IGNORE)
    small = (np.bincount(piece, lengths)[piece] < limit) & (classes != IGNORE)
    starts, lengths, piece = ((np.cumsum(lengths) - lengths)[small], lengths[small], piece[small])
    _, which, runs = np.unique(piece, return_inverse=True, return_counts=True)
    pixels = np.bincount(which, lengths, minlength=len(runs))
    rows, columns = np.divmod(starts, label.shape[1])
    x = np.bincount(which, lengths * (columns + lengths / 2), minlength=len(runs)) / np.maximum(pixels, 1)
    y = np.bincount(which, lengths * (rows + 0.5), minlength=len(runs)) / np.maximum(pixels, 1)
    largest = np.argsort(-pixels, kind="stable")[:_MARKED]
    places = np.stack([x, y, pixels], axis=1)[largest].astype(np.int32)
    return Specks(policy.smallest_piece or fewest, dropped, len(runs), int(pixels.sum()), places)
