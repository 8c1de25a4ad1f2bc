"""Calibrate a teacher: compare its confidences with how often it is right.

After Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks" (arXiv 1706.04599): the reliability
diagram, the expected calibration error, and the one temperature that the logits are divided by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.schemas import CONFIDENCE_BINS
from autolabel.manifests.scores import Counts, Shares, shares
from autolabel.manifests.wording import percent

GRID = tuple(k / 100 for k in range(100))  # thresholds to choose from
ESTIMABLE = 100  # least number of pixels above a threshold whose precision is believed
TEMPERATURES = tuple(0.25 * 16 ** (k / 40) for k in range(41))  # 0.25 to 4, each 7 % above the one before


class Reliability(NamedTuple):
    """Counts in 20 equal bins of confidence over (0, 1]: pixels, right pixels, and the sum of their confidences."""

    pixels: Counts
    correct: Counts
    confidence: Shares

    def ece(self) -> Shares:
        """Expected calibration error: |accuracy - mean confidence| weighted by a bin's pixels; NaN without pixels."""
        return shares(abs(self.correct - self.confidence).sum(axis=-1), self.pixels.sum(axis=-1))


class Suggestion(NamedTuple):
    """For each class (C,): a threshold, the precision above it, and the share of the pixels above it.

    `reached` is True if this precision is at least the target. The others are NaN for a class that was the top class of
    too few pixels.
    """

    threshold: Shares
    precision: Shares
    kept: Shares
    reached: NDArray[np.bool_]


def suggested_thresholds(names: Sequence[str], found: Suggestion) -> tuple[dict[str, float], dict[str, str]]:
    """The threshold of every class that can have one, and a comment on each, by name."""
    thresholds, comments = dict[str, float](), dict[str, str]()
    for name, threshold, above, kept, reached in zip(names, *found, strict=True):
        if not math.isnan(threshold):
            thresholds[name] = float(threshold)
            share = "no pixels" if math.isnan(above) else f"precision {percent(above)} %, keeps {percent(kept)} %"
            comments[name] = share + ("" if reached else "; no threshold reaches the target")
    return thresholds, comments


class Calibration:
    """Counts confidences by top class, before any threshold, in memory that does not grow with the images.

    `grid` holds the thresholds to choose from, ascending. Pixels whose truth is ignored are counted apart.
    """

    def __init__(self, classes: int, grid: Sequence[float] = GRID) -> None:
        self._grid = tuple(grid)
        self._twentieths = tuple(k / CONFIDENCE_BINS for k in range(CONFIDENCE_BINS))
        self._edges = np.array(sorted({*self._grid, *self._twentieths}))  # bin k holds edge k < p <= edge k + 1
        shape = classes, len(self._edges)
        self._counts = Reliability(np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape))
        self._unknown = np.zeros(shape, np.int64)

    def add(self, truth: NDArray[np.uint8], top: NDArray[np.uint8], *, confidence: NDArray[np.float32]) -> None:
        """Count an image: truth and top class (H, W) uint8, and the probability of the top class (H, W) float32."""
        bins = np.searchsorted(self._edges[1:].astype(np.float32), confidence, side="left")
        place = top.astype(np.intp) * len(self._edges) + bins
        known = truth != IGNORE
        self._unknown += np.bincount(place[~known], minlength=self._unknown.size).reshape(self._unknown.shape)
        truth, top, confidence, place = truth[known], top[known], confidence[known], place[known]
        for table, counted in zip(
            self._counts,
            (np.bincount(place, minlength=self._counts.pixels.size),
             np.bincount(place[truth == top], minlength=self._counts.pixels.size),
             np.bincount(place, confidence, minlength=self._counts.pixels.size)),
            strict=True,
        ):  # fmt: skip
            table += counted.reshape(table.shape)

    def reliability(self) -> Reliability:
        """The counts by class, (C, 20)."""
        return Reliability(*(np.add.reduceat(t, self._places(self._twentieths), axis=1) for t in self._counts))

    def unknown(self) -> Counts:
        """Pixels whose truth is ignored, by class and bin (C, 20)."""
        return np.asarray(np.add.reduceat(self._unknown, self._places(self._twentieths), axis=1))

    def overall(self) -> Reliability:
        """The counts of all classes together, (20,)."""
        return Reliability(*(table.sum(axis=0) for table in self.reliability()))

    def suggest(self, precision: float) -> Suggestion:
        """Suggest the lowest threshold above which `ESTIMABLE` pixels or more have this precision, else the highest."""
        pixels, correct, _ = (table[:, ::-1].cumsum(axis=1)[:, ::-1] for table in self._counts)  # above each edge
        places = self._places(self._grid)
        good = (pixels >= ESTIMABLE) & (correct >= precision * pixels)
        reached: NDArray[np.bool_] = np.asarray(good[:, places].any(axis=1))
        choice = np.where(reached, good[:, places].argmax(axis=1), len(places) - 1)
        at = np.arange(len(pixels)), places[choice]
        found = self._edges[at[1]], shares(correct[at], pixels[at]), shares(pixels[at], pixels[:, 0])
        threshold, above, kept = (np.where(pixels[:, 0] >= ESTIMABLE, numbers, np.nan) for numbers in found)
        return Suggestion(threshold, above, kept, reached)

    def _places(self, some: Sequence[float]) -> NDArray[np.intp]:
        return np.searchsorted(self._edges, some)


class TemperatureFit:
    """Finds the temperature T that makes softmax(logits / T) most likely to say the truth, in one pass over images."""

    def __init__(self, now: float) -> None:
        """Compare with `now`, the temperature in use."""
        self._temperatures = (*TEMPERATURES, now)
        self._losses, self._pixels = np.zeros(len(self._temperatures)), 0

    def add(self, truth: NDArray[np.uint8], logits: NDArray[np.float32]) -> None:
        """Count the pixels of an image: truth (h, w) uint8, logits (C, h, w) float32."""
        known = truth != IGNORE
        ids, logits = truth[known], logits[:, known]
        below = logits - logits.max(axis=0, initial=-np.inf)
        true = np.take_along_axis(below, ids[None].astype(np.intp), axis=0)[0]
        for k, temperature in enumerate(self._temperatures):
            spread = np.log(np.exp(below / np.float32(temperature)).sum(axis=0))
            self._losses[k] += (spread - true / np.float32(temperature)).sum(dtype=np.float64)
        self._pixels += len(ids)

    def loss_now(self) -> float:
        """Mean negative log likelihood, in nats a pixel, at the temperature in use; NaN without pixels."""
        return float(self._losses[-1] / self._pixels) if self._pixels else float("nan")

    def best(self) -> tuple[float, float]:
        """The best temperature, and its mean negative log likelihood.

        Both come from a parabola over the logarithm of the temperature, through the best that was tried and its
        neighbours. If an end of `TEMPERATURES` is best, it is returned. Raises ValueError without pixels.
        """
        if not self._pixels:
            raise ValueError("no pixel whose truth is known: there is nothing to fit a temperature to")
        losses = self._losses[:-1] / self._pixels
        k = int(losses.argmin())
        if not 0 < k < len(losses) - 1:
            return TEMPERATURES[k], float(losses[k])
        left, middle, right = losses[k - 1 : k + 2].tolist()
        bend, slope = left - 2 * middle + right, (right - left) / 2
        shift = -slope / bend if bend > 0 else 0.0
        return TEMPERATURES[k] * (TEMPERATURES[1] / TEMPERATURES[0]) ** shift, middle + slope * shift / 2
