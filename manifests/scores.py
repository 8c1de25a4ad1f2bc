"""Score label maps: counts that are filled image by image, and what is read from them.

IoU as in Everingham et al., "The Pascal Visual Object Classes Challenge" and the Cityscapes benchmark
(arXiv 1604.01685): true positives / (true positives + false positives + false negatives), over all pixels of the set.
Boundary F after Csurka et al., "What is a good evaluation measure for semantic segmentation?" (BMVC 2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.label_space import IGNORE

Counts = NDArray[np.int64]
Shares = NDArray[np.float64]


def shares(part: NDArray[Any], whole: NDArray[Any]) -> Shares:
    """part / whole, NaN where there is no whole."""
    part, whole = np.broadcast_arrays(part, np.asarray(whole, np.float64))
    found: Shares = np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
    return found


def count_pairs(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Pixels by their ids in two label maps (H, W) uint8 of the same size: (256, 256) int64."""
    # uint16 keys: a * 256 + b, 65,536 of them at most.
    keys = a.astype(np.uint16) << 8 | b
    return np.bincount(keys.ravel(), minlength=1 << 16).reshape(256, 256)


class Confusion:
    """Pixel counts by (truth, prediction), memory constant in the number of images.

    `matrix` is (C, C + 1) int64; its last column counts pixels that the prediction ignores. They are misses of the
    true class. Pixels that the truth ignores count nowhere.
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

    @property
    def true_pixels(self) -> Counts:
        """Pixels that are truly of each class (C,)."""
        return np.asarray(self.matrix.sum(axis=1))

    @property
    def predicted_pixels(self) -> Counts:
        """Pixels predicted as each class (C,), where the truth is known."""
        return np.asarray(self.matrix[:, :-1].sum(axis=0))

    def iou(self) -> Shares:
        """IoU per class (C,), NaN where the class is in neither truth nor prediction."""
        return self._share_of(self._union())

    def iou_of_kept(self) -> Shares:
        """IoU per class (C,) over the pixels that the prediction does not ignore, NaN where the class is in neither."""
        return self._share_of(self._union() - self.matrix[:, -1])

    def precision(self) -> Shares:
        """Share of the pixels predicted as a class that are (C,), NaN without any."""
        return self._share_of(self.predicted_pixels)

    def recall(self) -> Shares:
        """Share of the pixels of a class that are predicted so (C,), NaN without any; an ignored one is a miss."""
        return self._share_of(self.true_pixels)

    def _union(self) -> Counts:
        return self.true_pixels + self.predicted_pixels - np.diagonal(self.matrix)

    def _share_of(self, whole: Counts) -> Shares:
        return shares(np.diagonal(self.matrix), whole)

    def mean_iou(self) -> float:
        """Mean of the IoUs that exist, NaN if none does."""
        iou = self.iou()
        return float(np.nanmean(iou)) if np.isfinite(iou).any() else float("nan")

    def pixel_accuracy(self) -> float:
        """Share of the true pixels that are predicted right, NaN without any."""
        total = self.matrix.sum()
        return float(np.trace(self.matrix[:, :-1]) / total) if total else float("nan")


def boundary(label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) train ids -> the same where one of the four neighbours is of another class, else 255.

    Ignored pixels neither are nor make a boundary: where a label ends, no class has been seen to.
    """
    edge = np.zeros(label.shape, bool)
    for one, other in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differs = (label[one] != label[other]) & (label[one] != IGNORE) & (label[other] != IGNORE)
        edge[one] |= differs
        edge[other] |= differs
    return np.where(edge, label, np.uint8(IGNORE))


class BoundaryF:
    """How well the borders of the classes are met, within `distances` ascending pixels (Euclidean).

    A predicted boundary pixel is a hit if a true one of the same class is that near: their share is the precision. The
    same from the truth's side is the recall. Sums over the set; predicted ones where the truth ignores count nowhere.
    `pixels` (2, C) int64 are the boundary pixels, predicted and true, and `hits` (2, D, C) those that are hits.
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
        # The pixels around, in rings. Boundaries are thin: to ask round each of their pixels is less work than to
        # widen a map of every class.
        dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
        squared = dy**2 + dx**2
        steps = dy * true.shape[1] + dx
        for side, (mine, other) in enumerate(((counted, true), (true, predicted))):
            place = np.flatnonzero(mine != IGNORE)
            ids = mine.ravel()[place]
            found = np.zeros(classes, np.int64)
            self.pixels[side] += np.bincount(ids, minlength=classes)
            around = other.ravel()
            for k, (nearer, distance) in enumerate(pairwise((-1, *self.distances))):
                for step in steps[(squared > nearer * abs(nearer)) & (squared <= distance**2)].tolist():
                    hit = around[place + step] == ids
                    found += np.bincount(ids[hit], minlength=classes)
                    place, ids = place[~hit], ids[~hit]
                self.hits[side, k] += found

    def f(self) -> Shares:
        """F = 2PR / (P + R) by distance and class (D, C); NaN where neither map has a boundary of the class."""
        precision, recall = np.nan_to_num(shares(self.hits, self.pixels[:, None]))
        f = np.nan_to_num(shares(2 * precision * recall, precision + recall))
        return np.where(self.pixels.any(axis=0), f, np.nan)
