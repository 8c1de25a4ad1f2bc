"""Counts and factors of polygons for tests: any numbers do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.evidence import INSIDE, OUTSIDE, Factors, PolygonCounts
from autolabel.manifests.label_space import LabelSpace

BINS = len(OUTSIDE) + 1


def drawn_counts(space: LabelSpace, *, sizes: dict[str, int] | None = None) -> PolygonCounts:
    """Counts of any polygons: rare and frequent neighbours of every class."""
    dice, count = np.random.default_rng(0), len(space)
    outside = np.floor(dice.lognormal(3, 2.5, (count, BINS, count))).astype(np.int64)
    inside = dice.integers(1, 1000, (count, len(INSIDE) + 1, 2))
    return PolygonCounts.of(space, sizes or {"192x96": 40}, outside, inside)


def drawn_factors(classes: int, *, seed: int = 0, teacher_weight: float = 0.75) -> Factors:
    """Factors that turn many labels."""
    table = np.random.default_rng(seed).normal(0, 2, (1 + classes * BINS, classes)).astype(np.float32)
    table[0] = 0
    return Factors(table, teacher_weight)


def drawn_places(size: tuple[int, ...], classes: int, *, seed: int = 0, share: float = 0.5) -> NDArray[np.int16]:
    """Places anywhere, in a share of the pixels."""
    dice = np.random.default_rng(seed)
    found = dice.integers(1, 1 + classes * BINS, size, np.int16)
    return np.where(dice.random(size) < share, found, 0).astype(np.int16)
