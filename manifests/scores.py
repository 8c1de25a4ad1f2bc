"""Score label maps: a confusion matrix that is filled image by image, and what is read from it.

IoU as in Everingham et al., "The Pascal Visual Object Classes Challenge" and the Cityscapes benchmark
(arXiv 1604.01685): true positives / (true positives + false positives + false negatives), over all pixels of the set.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.classes import IGNORE


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
        self.matrix: NDArray[np.int64] = np.zeros((classes, classes + 1), np.int64)

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

    def iou(self) -> NDArray[np.float64]:
        """IoU per class (C,), NaN where the class is in neither truth nor prediction."""
        hits = np.diagonal(self.matrix).astype(np.float64)
        union = self.matrix.sum(axis=1) + self.matrix[:, :-1].sum(axis=0) - hits
        iou: NDArray[np.float64] = np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)
        return iou

    def mean_iou(self) -> float:
        """Mean of the IoUs that exist, NaN if none does."""
        iou = self.iou()
        return float(np.nanmean(iou)) if np.isfinite(iou).any() else float("nan")

    def pixel_accuracy(self) -> float:
        """Share of the true pixels that are predicted right, NaN without any."""
        total = self.matrix.sum()
        return float(np.trace(self.matrix[:, :-1]) / total) if total else float("nan")
