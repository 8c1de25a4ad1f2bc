"""The mean IoU of the labels, as it is expected now and after corrections: what a correction gains.

For a class there are, over all images of the run, expected pixels that are hits (labelled and true), truth (true), and
union (labelled or true). A corrected pixel that was wrongly labelled c and is t takes one pixel from the union of c,
and adds one hit to t; one that was ignored adds a hit. So a pixel gains 1 / union(t), and IoU(c) / union(c) where a
wrong label vanishes: rare classes gain most by the measure itself.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autolabel.pipeline.review.belief import MISSED, OTHER, VOID, WRONG, Doubt, Floats

_RAREST = 1e-4  # classes with a smaller share of the pixels weigh as if they had it: nobody can tell that they exist


class Worth:
    """Expected counts of all labels of a run; `correct` moves them.

    labelled (C,): pixels of the labels. doubt (4, C): of the whole run. confused (C, C): see `confusions`. weights
    (C,): of the classes in the mean; only classes that are expected to be labelled or true at all count.
    """

    def __init__(self, labelled: Floats, doubt: Doubt, confused: Floats, weights: Floats | None = None) -> None:
        self._confused = confused
        labelled = labelled - doubt[VOID]
        self._hits = labelled - doubt[WRONG]
        missing = doubt[MISSED] + (doubt[WRONG] + doubt[OTHER]) @ confused
        self._union = labelled + missing
        self.truth = self._hits + missing
        counts = self._union > 0
        share = np.where(counts, 1.0 if weights is None else weights, 0.0)
        self._weights = share / share.sum() if share.sum() else share
        self._least = max(1.0, _RAREST * self.truth.sum())

    def _parts(self) -> tuple[Floats, Floats]:
        """Hits and union by class, a union of at least `_least` pixels."""
        return self._hits, np.maximum(self._union, self._least)

    def mean_iou(self) -> float:
        """The expected mean IoU of the labels, where an ignored pixel is a miss."""
        hits, union = self._parts()
        return float(self._weights @ (hits / union))

    def rates(self) -> Doubt:
        """The gain in mean IoU of correcting one expected pixel of each kind (4, C), 0 of pixels that have no truth."""
        hits, union = self._parts()
        hit = self._weights / union
        vanished = self._weights * hits / union**2
        found = self._confused @ hit
        return np.array([found + vanished, hit, found, np.zeros_like(hit)])

    def by_class(self, doubt: NDArray[np.float32]) -> Floats:
        """The gain of correcting items with these doubts (N, 4, C), by the class whose IoU it is (N, C)."""
        hits, union = self._parts()
        found = doubt[:, MISSED] + (doubt[:, WRONG] + doubt[:, OTHER]) @ self._confused
        return np.asarray(self._weights * (found / union + doubt[:, WRONG] * hits / union**2))

    def correct(self, doubt: Doubt) -> None:
        """Take pixels as corrected."""
        self._hits = self._hits + doubt[MISSED] + (doubt[WRONG] + doubt[OTHER]) @ self._confused
        self._union = self._union - doubt[WRONG]
