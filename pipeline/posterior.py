"""Polygons weighed beside what a run has kept of its teacher: top classes, levels of confidence, second classes.

The evidence asks for the probabilities of all classes (manifests/evidence.py). A run keeps the top class and the level
that its probability lies in, and in unnamed pixels the second class. Here the level's middle stands for the
probability of the top class; the second class gets a fixed share of what is left, the others the rest, evenly.
`benchmarks/kept_evidence.py` measures how far labels are from those of all probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.evidence import PolygonEvidence
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.places import NOWHERE, Places, places
from autolabel.manifests.policy import Policy
from autolabel.manifests.run.labels import middles
from autolabel.manifests.run.shards import Label
from autolabel.manifests.schemas import CONFIDENCE_BINS
from autolabel.teacher.decide import Prediction

Floats = NDArray[np.float32]

_AT_ONCE = 1 << 16  # pixels that stay in a core's cache
SECOND_SHARE = 0.6  # of what the top class leaves, in the mean over CamVid's unnamed pixels


class _Asked(NamedTuple):
    """All that is kept of some pixels, maps of one shape; second is None where nobody knows the second class."""

    top: Label
    level: Label
    place: Places
    second: Label | None

    def take(self, pixels: NDArray[np.intp]) -> _Asked:
        """Some of the pixels, by their places in the flat maps."""
        second = None if self.second is None else self.second.ravel()[pixels]
        return _Asked(self.top.ravel()[pixels], self.level.ravel()[pixels], self.place.ravel()[pixels], second)


class KeptPosterior:
    """The likeliest classes of pixels around polygons, from top class, level and second class.

    middles: (L,) the probability of the top class that stands for each level. silent: level 0 means that the teacher
    gives no class, and stays so. Raises ValueError as `PolygonEvidence.factors`.
    """

    def __init__(
        self, evidence: PolygonEvidence, space: LabelSpace, middles: NDArray[np.float64], *, silent: bool = False
    ) -> None:
        self.classes, self.silent = len(space), silent
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
        of = _Asked(top, level, place, second).take(pixels)
        unknown = np.zeros(len(pixels), np.bool_) if of.second is None else of.second >= self.classes
        if not unknown.any():
            return pixels, *self._decide(of)
        winner, p = np.empty(len(pixels), np.uint8), np.empty(len(pixels), np.float32)
        for which, part in ((~unknown, of), (unknown, of._replace(second=None))):
            winner[which], p[which] = self._decide(part.take(np.flatnonzero(which)))
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


class FromLevels:
    """Predictions from what a run has kept, under a policy; polygons are weighed in if it asks for that.

    edges: the ascending confidences between levels, which the codes of a prediction tell apart, too. silent: see
    `KeptPosterior`. Raises ValueError as `PolygonEvidence.require`.
    """

    def __init__(self, policy: Policy, space: LabelSpace, edges: Sequence[float], *, silent: bool = False) -> None:
        self.classes, self.edges = len(space), tuple(edges)
        self._ends, self._middles = np.array(edges, np.float32), middles(edges)
        self._bins = confidence_bins(self._middles.astype(np.float32))
        self.weighs = policy.polygons is not None
        self._posterior: KeptPosterior | None = None
        if policy.polygons is not None:
            self._posterior = KeptPosterior(policy.polygons, space, self._middles, silent=silent)

    def places(self, coarse: Label | None) -> Places | None:
        """The places of pixels around the polygons of a coarse label; None if they change nothing."""
        if self._posterior is None or coarse is None:
            return None
        place = places(coarse, self.classes)
        return place if place.any() else None

    def __call__(
        self,
        top: Label,
        level: Label,
        *,
        place: Places | None = None,
        second: Label | None = None,
        probability: bool = False,
    ) -> Prediction:
        """The prediction of an image; all maps are (H, W), place from `places`, second 255 where it is unknown.

        Its statistics are the posterior's, and elsewhere those of the middles of levels; so is its `probability`, if it
        is asked for.
        """
        classes, levels = self.classes, len(self.edges) + 1
        codes = np.empty(top.shape, np.int16)
        histogram, confidence = np.zeros(classes * CONFIDENCE_BINS, np.int64), np.zeros(classes)
        unweighed = np.zeros(classes * levels, np.int64)
        sure = _in_bytes(self._middles)[level] if probability else None
        rows = max(1, _AT_ONCE // max(1, top.shape[1]))
        for band in (np.s_[row : row + rows] for row in range(0, len(top), rows)):
            code = (top[band].astype(np.int16) * np.int16(levels) + level[band]).ravel()
            unweighed += np.bincount(code, minlength=len(unweighed))
            if place is not None and self._posterior is not None:
                known = None if second is None else second[band]
                weighed, winner, p = self._posterior(top[band], level[band], place[band], known)
                unweighed -= np.bincount(code[weighed], minlength=len(unweighed))
                code[weighed] = winner * np.int16(levels) + np.searchsorted(self._ends, p).astype(np.int16)
                bins = winner * np.int16(CONFIDENCE_BINS) + confidence_bins(p)
                histogram += np.bincount(bins, minlength=len(histogram))
                confidence += np.bincount(winner, p, minlength=classes)
                if sure is not None:
                    sure[band].reshape(-1)[weighed] = _in_bytes(p)
            codes[band] = code.reshape(-1, top.shape[1])
        rest, counts = unweighed.reshape(classes, levels), histogram.reshape(classes, CONFIDENCE_BINS)
        for level_bin, counted in zip(self._bins, rest.T, strict=True):
            counts[:, level_bin] += counted
        return Prediction(codes, levels, counts, confidence + rest @ self._middles, probability=sure)


def _in_bytes(p: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Probabilities in 255ths."""
    rounded: NDArray[np.uint8] = np.rint(255 * p).astype(np.uint8)
    return rounded


def confidence_bins(p: Floats) -> NDArray[np.int16]:
    """The bin k of each probability, k/20 < p <= (k+1)/20."""
    return np.searchsorted(_INNER, p).astype(np.int16)


_INNER = (np.arange(1, CONFIDENCE_BINS, dtype=np.float32) / np.float32(CONFIDENCE_BINS)).astype(np.float32)
