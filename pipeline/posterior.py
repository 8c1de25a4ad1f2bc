"""Polygons weighed beside what a run has kept of its teacher: top classes, levels of confidence, second classes.

The evidence asks for the probabilities of all classes (manifests/evidence.py). A run keeps the top class and the level
that its probability lies in, and in unnamed pixels the second class. Here the level's middle stands for the
probability of the top class; the second class gets a fixed share of what is left, the others the rest, evenly.
`benchmarks/kept_evidence.py` measures how far labels are from those of all probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.evidence import NOWHERE, PolygonEvidence
from autolabel.manifests.label_space import IGNORE, LabelSpace
from autolabel.manifests.run.shards import Label
from autolabel.manifests.schemas import CONFIDENCE_BINS
from autolabel.teacher.decide import Prediction

Places = NDArray[np.int16]
Codes = NDArray[np.uint8] | NDArray[np.int16]
Floats = NDArray[np.float32]

_AT_ONCE = 1 << 16  # pixels that stay in a core's cache
SECOND_SHARE = 0.6  # of what the top class leaves, in the mean over CamVid's unnamed pixels


class _Asked(NamedTuple):
    """What is kept of n pixels, all (n,); second is None where nobody knows the second class."""

    top: Label
    level: Label
    place: Places
    second: Label | None


class KeptPosterior:
    """The posterior of classes at every place, from top class, level and second class.

    middles: (L,) the probability of the top class that stands for each level. silent: level 0 means that the teacher
    gives no class, and stays so. Raises ValueError as `PolygonEvidence.factors`.
    """

    def __init__(
        self, evidence: PolygonEvidence, space: LabelSpace, middles: NDArray[np.float64], *, silent: bool = False
    ) -> None:
        self.classes, self.middles, self.silent = len(space), middles.astype(np.float32), silent
        factors = evidence.factors(space)
        classes, places = self.classes, len(factors)
        # One more class stands for none: its factor is 0, so it never wins.
        factor = np.zeros((places, classes + 1), np.float32)
        factor[:, :-1] = np.exp(factors - factors.max(axis=1, keepdims=True))
        self._factor, self._sum = factor.ravel(), factor.sum(axis=1, dtype=np.float32)
        # By place and top class: the class with the largest factor of all others, and the one after it.
        others = np.repeat(factor[:, None], classes, axis=1)
        others[:, range(classes), range(classes)] = -1
        self._first = others.argmax(axis=2)
        np.put_along_axis(others, self._first[..., None], -1, axis=2)
        self._next = others.argmax(axis=2).astype(np.uint8).ravel()
        self._first = self._first.astype(np.uint8).ravel()
        left = np.clip(1 - middles, 0, 1)
        # p ** weight of a level's top class, second class, and each other one; without a second class there is none.
        with_second = (middles, left * SECOND_SHARE, left * (1 - SECOND_SHARE) / max(1, classes - 2))
        without = (middles, 0 * left, left / max(1, classes - 1))
        self._with, self._without = (
            [(np.asarray(p, np.float64) ** evidence.teacher_weight).astype(np.float32) for p in shares]
            for shares in (with_second, without)
        )

    def __call__(
        self, top: Label, level: Label, place: Places, second: Label | None = None
    ) -> tuple[NDArray[np.intp], Label, Floats]:
        """Places of pixels in the flat image, their likeliest classes, and the probabilities of these; all (n,).

        top, level, second: (H, W) uint8, second 255 where it is unknown; place: (H, W) int16. Pixels at NOWHERE, and
        those of which a silent teacher says nothing, are left out: they stay as they are.
        """
        asked = place != NOWHERE
        if self.silent:
            asked &= level > 0
        pixels = np.flatnonzero(asked)
        of = [x.ravel()[pixels] for x in (top, level, place)]
        if second is None:
            return pixels, *self._decide(_Asked(*of, None))
        seconds = second.ravel()[pixels]
        unknown = seconds >= self.classes
        if not unknown.any():
            return pixels, *self._decide(_Asked(*of, seconds))
        winner, p = np.empty(len(pixels), np.uint8), np.empty(len(pixels), np.float32)
        for which, known in ((np.flatnonzero(unknown), None), (np.flatnonzero(~unknown), seconds)):
            part = _Asked(*(x[which] for x in of), None if known is None else known[which])
            winner[which], p[which] = self._decide(part)
        return pixels, winner, p

    def _decide(self, asked: _Asked) -> tuple[Label, Floats]:
        top, second, classes = asked.top, asked.second, self.classes
        place = asked.place.astype(np.intp)
        row, pair = place * (classes + 1), place * classes + top
        weight, weight_second, weight_other = (
            table.take(asked.level) for table in (self._without if second is None else self._with)
        )
        of_top, others = self._factor.take(row + top), self._sum.take(place)
        others -= of_top
        best = self._first.take(pair)
        of_second = np.zeros_like(of_top)
        if second is not None:
            best = np.where(best == second, self._next.take(pair), best)
            of_second = self._factor.take(row + second)
            others -= of_second
            of_second *= weight_second
        of_best = self._factor.take(row + best)
        np.maximum(others, of_best, out=others)  # a difference of two sums is rounded
        of_top *= weight
        of_best *= weight_other
        others *= weight_other
        # Of equals, the teacher's order stands.
        winner, largest = top, of_top
        total = of_top + of_second + others
        if second is not None:
            winner, largest = np.where(of_second > largest, second, winner), np.maximum(largest, of_second)
        winner, largest = np.where(of_best > largest, best, winner), np.maximum(largest, of_best)
        total[total == 0] = 1  # nothing is known of the pixel
        return winner, largest / total


def from_levels(codes: Codes, levels: int, middles: NDArray[np.float64], *, classes: int) -> Prediction:
    """A prediction whose statistics follow from the codes (H, W) alone: every confidence is its level's middle."""
    counts = np.bincount(codes.ravel(), minlength=classes * levels).reshape(classes, levels)
    histogram = np.zeros((classes, CONFIDENCE_BINS), np.int64)
    np.add.at(histogram, (slice(None), confidence_bins(middles.astype(np.float32))), counts)
    return Prediction(codes, levels, histogram, counts @ middles)


def with_polygons(
    posterior: KeptPosterior, edges: Sequence[float], top: Label, level: Label, *, place: Places, second: Label | None
) -> Prediction:
    """A prediction with the polygons' evidence weighed in, whose codes and statistics are the posterior's.

    edges: ascending confidences that codes tell apart, before and after. The maps are those of `KeptPosterior`.
    """
    classes, levels, ends = posterior.classes, len(edges) + 1, np.array(edges, np.float32)
    codes = np.empty(top.shape, np.int16)
    histogram, confidence = np.zeros(classes * CONFIDENCE_BINS, np.int64), np.zeros(classes)
    unasked = np.zeros(classes * levels, np.int64)
    rows = max(1, _AT_ONCE // top.shape[1])
    for band in (np.s_[row : row + rows] for row in range(0, len(top), rows)):
        code = (top[band].astype(np.int16) * np.int16(levels) + level[band]).ravel()
        pixels, winner, p = posterior(top[band], level[band], place[band], None if second is None else second[band])
        unasked += np.bincount(code, minlength=len(unasked)) - np.bincount(code[pixels], minlength=len(unasked))
        code[pixels] = winner * np.int16(levels) + np.searchsorted(ends, p).astype(np.int16)
        codes[band] = code.reshape(codes[band].shape)
        place_of = winner * np.int16(CONFIDENCE_BINS) + confidence_bins(p)
        histogram += np.bincount(place_of, minlength=len(histogram))
        confidence += np.bincount(winner, p, minlength=classes)
    rest = unasked.reshape(classes, levels)
    histogram = histogram.reshape(classes, CONFIDENCE_BINS)
    np.add.at(histogram, (slice(None), confidence_bins(posterior.middles)), rest)
    return Prediction(codes, levels, histogram, confidence + rest @ posterior.middles.astype(np.float64))


def confidence_bins(p: Floats) -> NDArray[np.int16]:
    """The bin k of each probability, k/20 < p <= (k+1)/20."""
    return np.searchsorted(_INNER, p).astype(np.int16)


_INNER = (np.arange(1, CONFIDENCE_BINS, dtype=np.float32) / np.float32(CONFIDENCE_BINS)).astype(np.float32)
assert IGNORE == 255
