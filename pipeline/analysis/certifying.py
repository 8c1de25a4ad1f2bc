"""The swings of a certificate, from images seen with a focus and whole; and the labels that they certify.

A class's swing is the largest that an image has needed, and `SPARE` more. A class that few images show has told little
of how far it swings: it takes the largest swing of all classes. Both numbers were chosen once, by one teacher on CamVid
(benchmarks/RESULTS.md), and held against two others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.scores import Counts
from autolabel.teacher.contrast import PER_UNIT, STEPS, Contrast

ENOUGH = 20  # images that show a class, below which its swing is the largest of all classes
SPARE = 0.05

Floats = NDArray[np.float64]


class Certified(NamedTuple):
    """The number of labels that are certified, and of those that differ all the same."""

    labels: int
    changed: int


class ContrastTally:
    """Images seen both ways, summed up. By (within the rows seen, beyond them) and class, like `Contrast`.

    images, pixels: compared; differing: labels; rows: shares of the rows seen, summed. needed: the largest swings.
    shown: images that show a class. labels, changed: see `Contrast`.
    """

    def __init__(self, classes: int) -> None:
        self.images = self.pixels = self.differing = 0
        self.rows = 0.0
        self.needed: Floats = np.zeros((2, classes))
        self.shown: Counts = np.zeros((2, classes), np.int64)
        self.labels: Counts = np.zeros((2, classes, STEPS), np.int64)
        self.changed: Counts = np.zeros_like(self.labels)

    def add(self, image: Contrast) -> None:
        """Add one image."""
        first, last = image.rows
        self.images += 1
        self.pixels += image.top.size
        self.differing += image.differing
        self.rows += (last - first) / len(image.top)
        self.needed = np.maximum(self.needed, image.needed)
        self.shown += image.labels.any(axis=2)
        self.labels += image.labels
        self.changed += image.changed

    @classmethod
    def of(cls, parts: Iterable[ContrastTally], classes: int) -> ContrastTally:
        """The sum of parts."""
        total = cls(classes)
        for part in parts:
            total.images += part.images
            total.pixels += part.pixels
            total.differing += part.differing
            total.rows += part.rows
            total.needed = np.maximum(total.needed, part.needed)
            total.shown += part.shown
            total.labels += part.labels
            total.changed += part.changed
        return total

    def swings(self) -> Floats:
        """The swings (2, C), multiples of 1/64."""
        common = np.maximum(self.needed, self.needed.max(axis=1, keepdims=True))
        swings: Floats = np.ceil(np.where(self.shown >= ENOUGH, self.needed, common) * (1 + SPARE) * PER_UNIT)
        return swings / PER_UNIT

    def certified(self, swings: Floats) -> Certified:
        """Count the labels of these images whose quotient exceeds the swing of their class."""
        exceeds = np.arange(STEPS) >= (swings * PER_UNIT)[..., None]
        return Certified(int(self.labels[exceeds].sum()), int(self.changed[exceeds].sum()))
