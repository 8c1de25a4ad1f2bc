"""The choice: what gains most per second next, until the budget is spent.

Opening an image costs time once, so an image that is not open yet competes with the best bundle of its regions. After
every hundredth of the budget the gains are computed anew, since what was corrected changes what is rare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autolabel.pipeline.review.belief import Floats
from autolabel.pipeline.review.survey import Items
from autolabel.pipeline.review.worth import Worth

_PARTS = 100  # of a budget


class Likeness(Protocol):
    """Says how much of an image's gain is left beside those that were chosen."""

    def choose(self, image: int) -> None:
        """Remember an image that was chosen."""

    def left(self, image: int) -> float:
        """A share, 0..1."""


@dataclass(frozen=True)
class Chosen:
    """Items in the order of choice: places (K,) in the items, their gains (K,) in mean IoU, and their seconds (K,).

    The seconds include those for opening images. The gains add up to `gain`, the expected gain of all of them.
    """

    places: NDArray[np.int64]
    gains: Floats
    seconds: Floats

    @property
    def gain(self) -> float:
        """Expected gain in mean IoU."""
        return float(self.gains.sum())

    def __len__(self) -> int:
        return len(self.places)


def choose(
    items: Items, worth: Worth, budget: float, *, opening: float = 0.0, likeness: Likeness | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Chosen:  # fmt: skip
    """Choose items for a budget of seconds, of which `opening` go for every image that is opened.

    `worth` is moved to the state in which all of them are corrected.
    """
    if not len(items):
        return Chosen(np.empty(0, np.int64), np.empty(0), np.empty(0))
    images, starts = np.unique(items.image, return_index=True)
    ends = np.append(starts[1:], len(items))
    opened, left = np.zeros(len(images), np.bool_), np.ones(len(images))
    compared = np.full(len(images), -1)  # the number of chosen images that `left` knows of
    taken = np.zeros(len(items), np.bool_)
    places, gains, seconds = list[int](), list[float](), list[float]()
    spent, weighed, chosen_images = 0.0, -1.0, 0
    value, ratios = np.zeros(len(items)), np.zeros(len(images))

    def bundle_of(place: int) -> tuple[float, NDArray[np.int64]]:
        some = np.arange(starts[place], ends[place])[~taken[starts[place] : ends[place]]]
        return _bundle(some, value, items.seconds, 0.0 if opened[place] else opening, budget - spent)

    while True:
        if weighed < 0 or spent - weighed >= budget / _PARTS:
            value = (items.doubt * worth.rates()).sum(axis=(1, 2))
            weighed = spent
            ratios = _ratios(items, starts, np.where(taken, 0, value), np.where(opened, 0, opening), budget - spent)
        best = int(np.argmax(ratios * left))
        if ratios[best] * left[best] <= 0:
            break
        if likeness is not None and not opened[best] and compared[best] != chosen_images:
            left[best], compared[best] = likeness.left(int(images[best])), chosen_images
            continue
        ratios[best], bundle = bundle_of(best)
        if not len(bundle):  # more was left of the budget when this was weighed
            continue
        cost = items.seconds[bundle]
        if not opened[best]:
            cost = cost + opening * (np.arange(len(bundle)) == 0)
        before = worth.mean_iou()
        for item, needed in zip(bundle.tolist(), cost.tolist(), strict=True):
            worth.correct(items.doubt[item].astype(float))
            after = worth.mean_iou()
            places.append(item)
            gains.append(after - before)
            seconds.append(needed)
            before = after
        spent += float(cost.sum())
        taken[bundle] = True
        if not opened[best]:
            opened[best] = True
            chosen_images += 1
            if likeness is not None:
                likeness.choose(int(images[best]))
        ratios[best], _ = bundle_of(best)
        if on_progress:
            on_progress(spent)
    return Chosen(np.array(places, np.int64), np.array(gains), np.array(seconds))


def _ratios(items: Items, starts: NDArray[np.int64], value: Floats, opening: Floats, most: float) -> Floats:
    """The gain per second of the best bundle of every image (I,), 0 where none fits: `_bundle` for all at once."""
    per_second = value / items.seconds
    owner = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(items)))
    fits = (items.seconds + opening[owner] <= most * (1 + 1e-9)) & (value > 0)
    order = np.lexsort((-per_second, ~fits, owner))
    gain, cost = (np.cumsum(np.where(fits, numbers, 0)[order]) for numbers in (value, items.seconds))
    before = starts[owner] - 1
    gain, cost = (sums - np.where(before < 0, 0, sums[before]) for sums in (gain, cost))
    cost = cost + opening[owner]
    good = fits[order] & (cost <= most * (1 + 1e-9))
    return np.asarray(np.maximum.reduceat(np.where(good, gain / np.where(good, cost, 1), 0), starts))


def _bundle(
    some: NDArray[np.int64], value: Floats, seconds: Floats, opening: float, most: float
) -> tuple[float, NDArray[np.int64]]:
    """The items that together gain most per second with the time for opening, and how much; 0 if none fits."""
    some = some[seconds[some] + opening <= most * (1 + 1e-9)]
    some = some[value[some] > 0]
    if not len(some):
        return 0.0, some
    order = some[np.argsort(-value[some] / seconds[some], kind="stable")]
    cost = opening + np.cumsum(seconds[order])
    ratio = np.where(cost <= most * (1 + 1e-9), np.cumsum(value[order]) / cost, 0)
    last = int(np.argmax(ratio))
    return float(ratio[last]), order[: last + 1]
