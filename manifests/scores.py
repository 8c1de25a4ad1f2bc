"""Scores of label maps: counts that are filled image by image, and the figures that follow from them.

IoU as in Everingham et al., "The Pascal Visual Object Classes Challenge" and the Cityscapes benchmark
(arXiv 1604.01685): true positives / (true positives + false positives + false negatives), over all pixels of the set.
Boundary F after Csurka et al., "What is a good evaluation measure for semantic segmentation?" (BMVC 2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.label_space import IGNORE

Counts = NDArray[np.int64]
Shares = NDArray[np.float64]


def shares(part: NDArray[Any], whole: NDArray[Any]) -> Shares:
    """part / whole, NaN where the whole is 0."""
    part, whole = np.broadcast_arrays(part, np.asarray(whole, np.float64))
    ratio: Shares = np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
    return ratio


def count_pairs(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Count the pixels of two label maps (H, W) uint8 of one size by both ids: (256, 256) int64."""
    keys = a.astype(np.uint16) << 8 | b
    return np.bincount(keys.ravel(), minlength=1 << 16).reshape(256, 256)


class Confusion:
    """Pixel counts by truth and prediction; memory does not grow with the number of images.

    `matrix` is (C, C + 1) int64; its last column counts pixels that the prediction ignores. They are misses of the
    true class. Pixels that the truth ignores are not counted.
    """

    def __init__(self, classes: int) -> None:
        self.matrix: Counts = np.zeros((classes, classes + 1), np.int64)

    def add(self, truth: NDArray[np.uint8], prediction: NDArray[np.uint8]) -> None:
        """Count two label maps (H, W) uint8 of train ids. Raises ValueError for different shapes or unknown ids."""
        if truth.shape != prediction.shape:
            raise ValueError(f"truth is {truth.shape} but prediction {prediction.shape}: expected the same size")
        classes = len(self.matrix)
        table = count_pairs(truth, prediction)
        stray = table[classes:IGNORE].sum() + table[:classes, classes:IGNORE].sum()
        if stray:
            raise ValueError(f"{stray} pixels have ids outside 0..{classes - 1} and {IGNORE}")
        self.matrix[:, :classes] += table[:classes, :classes]
        self.matrix[:, classes] += table[:classes, IGNORE]

    def merge(self, other: Confusion) -> None:
        """Add the counts of other images."""
        self.matrix += other.matrix

    @property
    def true_pixels(self) -> Counts:
        """Pixels of each class in the truth (C,) int64."""
        return np.asarray(self.matrix.sum(axis=1))

    @property
    def predicted_pixels(self) -> Counts:
        """Pixels of each class in the prediction (C,) int64, without those that the truth ignores."""
        return np.asarray(self.matrix[:, :-1].sum(axis=0))

    def iou(self) -> Shares:
        """IoU by class (C,), NaN for a class that is in neither truth nor prediction."""
        return self._share_of(self._union())

    def iou_of_kept(self) -> Shares:
        """IoU by class (C,) over the pixels that the prediction does not ignore; NaN for a class that is in neither."""
        return self._share_of(self._union() - self.matrix[:, -1])

    def precision(self) -> Shares:
        """Share of the pixels predicted as a class that are truly of it (C,), NaN without any."""
        return self._share_of(self.predicted_pixels)

    def recall(self) -> Shares:
        """Share of the true pixels of a class that are predicted as it (C,), NaN without any; ignore is a miss."""
        return self._share_of(self.true_pixels)

    def _union(self) -> Counts:
        return self.true_pixels + self.predicted_pixels - np.diagonal(self.matrix)

    def _share_of(self, whole: Counts) -> Shares:
        return shares(np.diagonal(self.matrix), whole)

    def mean_iou(self) -> float:
        """Mean of the IoUs that exist, NaN if none does."""
        iou = self.iou()
        return float(np.nanmean(iou)) if np.isfinite(iou).any() else float("nan")

    def commonest_mean_iou(self) -> float:
        """Mean IoU of a prediction that names the commonest true class everywhere, NaN without any true pixel."""
        true = self.true_pixels
        return float(true.max() / true.sum() / np.count_nonzero(true)) if true.any() else float("nan")

    def pixel_accuracy(self) -> float:
        """Share of the true pixels that are predicted right, NaN without any."""
        total = self.matrix.sum()
        return float(np.trace(self.matrix[:, :-1]) / total) if total else float("nan")


class PairedGain(NamedTuple):
    """A difference, and the ends of its 95 % interval."""

    low: float
    middle: float
    high: float


def paired_gain(before: Counts, after: Counts, *, times: int = 1000) -> PairedGain:
    """Return how much mean IoU `after` has more than `before`, and its interval by the bootstrap over images.

    Both are the matrices of `Confusion` by image, (N, C, C + 1). Images are drawn with replacement, N at a time and the
    same for both (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13); the draws have a fixed
    seed. NaN where no pixel has a class.
    """
    images, classes = before.shape[:2]
    draws = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), size=times)
    draws = np.concatenate([np.ones((1, images), np.int64), draws])
    lower, upper = (_mean_ious(draws @ x.reshape(images, -1), classes) for x in (before, after))
    gains = upper - lower
    low, high = np.nanquantile(gains[1:], (0.025, 0.975)) if np.isfinite(gains[1:]).any() else (np.nan, np.nan)
    return PairedGain(float(low), float(gains[0]), float(high))


def _mean_ious(matrices: NDArray[Any], classes: int) -> Shares:
    """The mean IoU of each matrix (M, C * (C + 1))."""
    matrices = matrices.reshape(-1, classes, classes + 1)
    hits = np.diagonal(matrices, axis1=1, axis2=2)
    iou = shares(hits, matrices.sum(axis=2) + matrices[..., :-1].sum(axis=1) - hits)
    known = np.isfinite(iou)
    return shares(np.where(known, iou, 0).sum(axis=1), known.sum(axis=1))


def boundary(label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) uint8 train ids -> the same ids at pixels with one of their four neighbours of another class, else 255.

    Ignored pixels neither are nor make a boundary: a class need not end where its label does.
    """
    edge = np.zeros(label.shape, bool)
    for one, other in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differs = (label[one] != label[other]) & (label[one] != IGNORE) & (label[other] != IGNORE)
        edge[one] |= differs
        edge[other] |= differs
    return np.where(edge, label, np.uint8(IGNORE))


class BoundaryF:
    """Counts of class boundaries that are met within `distances` pixels (Euclidean, ascending).

    A predicted boundary pixel is a hit if a true one of its class is that near: the share of hits is the precision. The
    same share of the true boundary pixels is the recall. Counts are summed over all images; predicted pixels that the
    truth ignores are not counted. `pixels` (2, C) int64 are boundary pixels, predicted and true, `hits` (2, D, C) int64
    those that are hits.
    """

    def __init__(self, classes: int, distances: Sequence[int] = (1, 2, 4)) -> None:
        self.distances = tuple(distances)
        self.pixels: Counts = np.zeros((2, classes), np.int64)
        self.hits: Counts = np.zeros((2, len(self.distances), classes), np.int64)

    def add(self, truth: NDArray[np.uint8], prediction: NDArray[np.uint8]) -> None:
        """Count two label maps (H, W) uint8 of train ids of the same size."""
        reach, classes = self.distances[-1], self.pixels.shape[1]
        true, predicted = (np.pad(boundary(label), reach, constant_values=IGNORE) for label in (truth, prediction))
        counted = np.where(np.pad(truth, reach, constant_values=IGNORE) == IGNORE, IGNORE, predicted)
        # Look at the pixels around, ring by ring. Boundaries are thin: looking around each of their pixels is less work
        # than widening a map of every class.
        dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
        squared = dy**2 + dx**2
        steps = dy * true.shape[1] + dx
        for side, (mine, other) in enumerate(((counted, true), (true, predicted))):
            place = np.flatnonzero(mine != IGNORE)
            ids = mine.ravel()[place]
            hits = np.zeros(classes, np.int64)
            self.pixels[side] += np.bincount(ids, minlength=classes)
            around = other.ravel()
            for k, (nearer, distance) in enumerate(pairwise((-1, *self.distances))):
                for step in steps[(squared > nearer * abs(nearer)) & (squared <= distance**2)].tolist():
                    hit = around[place + step] == ids
                    hits += np.bincount(ids[hit], minlength=classes)
                    place, ids = place[~hit], ids[~hit]
                self.hits[side, k] += hits

    def merge(self, other: BoundaryF) -> None:
        """Add the counts of other images, at the same distances."""
        self.pixels += other.pixels
        self.hits += other.hits

    def f(self) -> Shares:
        """F = 2PR / (P + R) by distance and class (D, C); NaN for a class without a boundary in either map."""
        precision, recall = np.nan_to_num(shares(self.hits, self.pixels[:, None]))
        f = np.nan_to_num(shares(2 * precision * recall, precision + recall))
        return np.where(self.pixels.any(axis=0), f, np.nan)
