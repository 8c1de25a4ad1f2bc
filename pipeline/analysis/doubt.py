"""Doubts about human labels: the connected pieces in which a teacher says another class, and how much that means.

A teacher that has not seen an image, and that says car where a person said road, may be wrong itself. How often it is,
its own disagreements tell: they are counted by human class, top class and level of confidence, over all images, and a
doubt weighs as much as

    log P(teacher says j at this level | people say j) - log P(teacher says j at this level | people say c)

for every pixel of human class c: a class at which the teacher is bad has a large second term, so it does not flood the
ranking. This is the class-conditional noise of confident learning (arXiv 1911.00068), with levels in place of its one
threshold a class. Pixels count nowhere if people say j within a few rows and columns: borders are no mistakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.run.shards import Label
from autolabel.pipeline.rules import pieces

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Mask = NDArray[np.bool_]

MOST = 50  # pieces of an image that are kept, the largest
LIKELY = 0.5  # scores above it are called likely mistakes; docs/errors.md says how many of them were
_SMOOTHING = 10.0  # as much as one region of 100 pixels that shows what the teacher says anywhere
_AT_ONCE = 1 << 16  # doubts whose scores are computed at a time
_TOGETHER = 256  # images whose doubts are joined at a time
_WORD = 32  # classes whose neighbourhood is found at once


@dataclass(frozen=True)
class Doubts:
    """Connected pieces (N) of an image, or of many, in which people say one class and the teacher says another one.

    box (N, 4): top, left, height, width. human, suggested (N,): the classes. pixels (N,): of the piece. region_pixels
    (N,): of the connected region of the human class in which it lies, without those beside the suggested class.
    image_pixels (N,): of the image. levels (N, L): the piece's pixels by level of confidence.
    """

    box: Ints
    human: Ints
    suggested: Ints
    pixels: Ints
    region_pixels: Ints
    image_pixels: Ints
    levels: Ints

    def __len__(self) -> int:
        return len(self.pixels)


def beside(human: Label, top: Label, reach: int) -> Mask:
    """(H, W) bool: people name the teacher's class `top` within `reach` rows and columns; all are (H, W) uint8."""
    found = np.zeros(human.shape, np.bool_)
    for first in range(0, int(top.max(initial=0)) + 1, _WORD):
        words = np.zeros(256, np.uint32)
        words[first : min(first + _WORD, IGNORE)] = 1 << np.arange(min(_WORD, IGNORE - first), dtype=np.uint32)
        near = words[human]
        for axis in (0, 1):
            near = _spread(near, reach, axis)
        found |= (near & words[top]) > 0
    return found


def _spread(bits: NDArray[np.uint32], reach: int, axis: int) -> NDArray[np.uint32]:
    """The union of the bits within `reach` along an axis, in twice as many steps as `reach` has digits."""
    before, length = (slice(None),) * axis, bits.shape[axis]
    forth, back, width = bits.copy(), bits.copy(), 1
    while width <= min(reach, length - 1):
        step = min(width, reach + 1 - width)
        later, earlier = (*before, slice(step, None)), (*before, slice(None, -step))
        np.bitwise_or(forth[later], forth[earlier].copy(), out=forth[later])
        np.bitwise_or(back[earlier], back[later].copy(), out=back[earlier])
        width += step
    return np.bitwise_or(forth, back, out=forth)


def look(
    human: Label,
    top: Label,
    *,
    level: Label,
    shape: tuple[int, int],
    reach: int,
    smallest: int,
    spoken: Mask | None = None,
) -> tuple[Floats, Doubts]:
    """Count one image and find its doubts: human (H, W) uint8 train ids, top and level (H, W) uint8 of the teacher.

    shape: numbers of classes and of levels. reach: see `beside`. smallest: pixels of a piece. spoken (H, W): the pixels
    of which the teacher says anything, all by default. Returns counts (C, C, L) by human class, top class and level, in
    which a region of n pixels weighs sqrt(n) in all, and the doubts, the largest first; of equal ones the upper one.
    """
    classes, levels = shape
    other = top != human
    counted = (human < classes) & ~(other & beside(human, top, reach))
    if spoken is not None:
        counted &= spoken
    lengths, _, region = pieces(human, IGNORE)
    starts = np.cumsum(lengths) - lengths
    by_run = np.add.reduceat(counted.ravel(), starts, dtype=np.int64)
    region_pixels = np.bincount(region, by_run, minlength=len(starts)).astype(np.int64)
    weight = 1 / np.sqrt(np.maximum(region_pixels, 1))[region]
    where = np.flatnonzero(counted)
    told, levels_there = top.ravel()[where].astype(np.int32), level.ravel()[where]
    said = human.ravel()[where].astype(np.int32)
    cells = (said * np.int32(classes) + told) * np.int32(levels) + levels_there
    weights = np.repeat(weight, lengths)[where]
    counts: Floats = np.bincount(cells, weights, minlength=classes * classes * levels).astype(np.float64)

    pairs: Ints = np.full(human.shape, -1, np.int32)
    pairs.ravel()[where] = np.where(said == told, np.int32(-1), said * np.int32(classes) + told)
    lengths, pair, piece = pieces(pairs, -1)
    run_starts = np.cumsum(lengths) - lengths
    pixels = np.bincount(piece, lengths, minlength=len(lengths)).astype(np.int64)  # at the place of the first run
    chosen = np.flatnonzero((pixels >= smallest) & (pair >= 0))
    chosen = chosen[np.argsort(-pixels[chosen], kind="stable")][:MOST]
    rank = np.full(len(lengths), -1, np.int64)
    rank[chosen] = np.arange(len(chosen))
    ranks, count = rank[piece], len(chosen)
    runs = np.flatnonzero(ranks >= 0)
    box = _boxes(ranks[runs], run_starts[runs], lengths[runs], width=human.shape[1], count=count)
    by_pixel = np.repeat(ranks, lengths)
    inside = np.flatnonzero(by_pixel >= 0)
    by_level = np.bincount(by_pixel[inside] * levels + level.ravel()[inside], minlength=count * levels)
    at = np.searchsorted(starts, run_starts[chosen], "right") - 1
    return counts.reshape(classes, classes, levels), Doubts(
        box=box.astype(np.int32),
        human=(pair[chosen] // classes).astype(np.int32),
        suggested=(pair[chosen] % classes).astype(np.int32),
        pixels=pixels[chosen].astype(np.int32),
        region_pixels=region_pixels[region[at]].astype(np.int32),
        image_pixels=np.full(count, human.size, np.int32),
        levels=by_level.reshape(count, levels).astype(np.int32),
    )


def _boxes(ranks: Longs, starts: Longs, lengths: Longs, *, width: int, count: int) -> Longs:
    """The boxes (N, 4) of pieces 0 to count - 1, from the runs that they consist of."""
    rows, left = np.divmod(starts, width)
    low = np.full((2, count), np.iinfo(np.int64).max)
    high = np.zeros((2, count), np.int64)
    for axis, (first, last) in enumerate(((rows, rows + 1), (left, left + lengths))):
        np.minimum.at(low[axis], ranks, first)
        np.maximum.at(high[axis], ranks, last)
    return np.stack([*low, *(high - low)], axis=1).reshape(count, 4)


class Gathered:
    """The counts (C, C, L) of many images, and their doubts, of which at most twice `most` are kept at a time.

    An image takes the bytes of its doubts, no more. Above that number, those whose score is lowest by the counts so far
    are forgotten, so that `most` remain.
    """

    def __init__(self, classes: int, levels: int, *, most: int = 1_000_000) -> None:
        self.counts: Floats = np.zeros((classes, classes, levels))
        self._levels, self._most = levels, most
        self._joined: list[tuple[Ints, Doubts]] = []
        self._waiting: list[tuple[Ints, Doubts]] = []

    def add(self, place: int, counts: Floats, doubts: Doubts) -> None:
        """Add an image by its place among all."""
        self.counts += counts
        self._waiting.append((np.full(len(doubts), place, np.int32), doubts))
        if len(self._waiting) == _TOGETHER:  # every array has memory of its own around it
            self._joined.append(self._join(self._waiting))
            self._waiting = []
            if sum(len(places) for places, _ in self._joined) > 2 * self._most:
                self._forget()

    def _forget(self) -> None:
        places, doubts = self._join(self._joined)
        best = np.argsort(-scores(doubts, self.counts), kind="stable")[: self._most]
        best.sort()
        self._joined = [(places[best], _taken(doubts, best))]

    def all(self) -> tuple[Ints, Doubts]:
        """The place of the image of each doubt (N,), and the doubts, in the order in which they came; once."""
        parts = [*self._joined, *self._waiting]
        self._joined, self._waiting = [], []
        return self._join(parts)

    def _join(self, parts: Sequence[tuple[Ints, Doubts]]) -> tuple[Ints, Doubts]:
        none = np.zeros(0, np.int32)
        box, levels = np.zeros((0, 4), np.int32), np.zeros((0, self._levels), np.int32)
        nothing = Doubts(box, none, none, none, none, none, levels)
        doubts = [nothing, *(doubt for _, doubt in parts)]
        return np.concatenate([none, *(place for place, _ in parts)]), Doubts(
            **{name: np.concatenate([getattr(doubt, name) for doubt in doubts]) for name in vars(nothing)}
        )


def _taken(doubts: Doubts, places: Longs) -> Doubts:
    return Doubts(**{name: values[places] for name, values in vars(doubts).items()})


def evidence(counts: Floats) -> Floats:
    """How much a pixel speaks for the teacher's class j against the human class c, by level: (C, C, L) in nats.

    counts (C, C, L): sums of what `look` counts. See the formula above; what a class has rarely or never shown is
    smoothed towards what the teacher says anywhere.
    """
    anywhere = counts.sum(axis=0) / max(counts.sum(), 1.0)
    rates = (counts + _SMOOTHING * anywhere) / (counts.sum(axis=(1, 2), keepdims=True) + _SMOOTHING)
    logs = np.log(np.maximum(rates, np.finfo(float).tiny))
    classes = np.arange(len(counts))
    return np.asarray(logs[classes, classes][None] - logs)


def scores(doubts: Doubts, counts: Floats) -> Floats:
    """How likely each doubt is a mistake of people, 0 to 1 (N,); 0 where the teacher's word is no evidence.

    score = 1 - 4 ** -(e * sqrt(share) * size ** (1/4)) with e, the mean evidence of its pixels; share, its part of the
    region; size, its part of the image.
    """
    weights, mean = evidence(counts), np.zeros(len(doubts))
    for first in range(0, len(doubts), _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        weight = weights[doubts.human[some], doubts.suggested[some]]
        mean[some] = np.einsum("nl,nl->n", weight, doubts.levels[some]) / np.maximum(doubts.pixels[some], 1)
    share = np.minimum(doubts.pixels / np.maximum(doubts.region_pixels, 1), 1)
    size = doubts.pixels / np.maximum(doubts.image_pixels, 1)
    return np.asarray(1 - 4.0 ** -(np.maximum(mean, 0) * np.sqrt(share) * size**0.25))
