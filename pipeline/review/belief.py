"""How likely each pixel of a label is wrong, and which class it then has: from kept confidence, and an audit if any.

A pixel has one of three kinds of doubt, by its top class c, of which the teacher is right with probability p:

wrong     it is labelled c, and with 1 - p it is another class
missed    it is ignored, and with p it is c
other     it is ignored, and with 1 - p it is another class

Where the label says another class than the teacher, or has a class although the teacher was not sure enough, a person
decided, and there is no doubt.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.shards import Label
from autolabel.pipeline.analysis.audit_record import Audit

Floats = NDArray[np.float64]
Doubt = NDArray[np.float64]  # (3, C): expected pixels of each kind, by top class
WRONG, MISSED, OTHER = range(3)
_LABELLED, _IGNORED, _DECIDED = range(3)  # states of a pixel
_BELIEVED = 1000.0  # pixels of an audit that weigh as much as what is assumed without one


def middles(edges: tuple[float, ...]) -> Floats:
    """The middle of every level of confidence (L,)."""
    return np.array([(low + high) / 2 for low, high in pairwise((0.0, *edges, 1.0))])


def right(edges: tuple[float, ...], names: tuple[str, ...], audit: Audit | None) -> Floats:
    """Probability that the top class is right, by class and level (C, L).

    It is the middle of the level; with an audit, the share that was right among the audited pixels of this class and
    confidence, which count as far as there are any.
    """
    middle = middles(edges)
    found = np.tile(middle, (len(names), 1))
    if audit is None or audit.reliability is None:
        return found
    diagram = audit.reliability
    place = np.clip(np.searchsorted(diagram.edges, middle) - 1, 0, len(diagram.edges) - 2)
    # What all classes have together stands in for a class that was seen too rarely.
    pixels, correct = (np.array(getattr(diagram.all, name), float)[place] for name in ("pixels", "correct"))
    assumed = (correct + _BELIEVED * middle) / (pixels + _BELIEVED)
    for c, name in enumerate(names):
        found[c] = assumed
        if name in diagram.classes:
            bins = diagram.classes[name]
            pixels, correct = (np.array(getattr(bins, field), float)[place] for field in ("pixels", "correct"))
            found[c] = (correct + _BELIEVED * assumed) / (pixels + _BELIEVED)
    return found


@dataclass(frozen=True)
class Belief:
    """Doubts by state, class and level: `chances` (3 kinds, 3 states * C * L); see the module."""

    classes: int
    levels: int
    chances: Floats

    @classmethod
    def of(cls, run: Run, edges: tuple[float, ...], audit: Audit | None) -> Belief:
        """The belief about the labels of a run whose confidence has these edges."""
        space = run.label_space
        p = right(edges, space.names, audit)
        sure = np.searchsorted(edges, run.policy.class_thresholds(space)) + 1  # from this level on a class is kept
        by_person = np.arange(len(edges) + 1) < sure[:, None]
        nothing = np.zeros_like(p)
        chances = np.array(
            [
                [np.where(by_person, 0, 1 - p), nothing, nothing],
                [nothing, p, nothing],
                [nothing, 1 - p, nothing],
            ]
        )
        return cls(len(space), len(edges) + 1, chances.reshape(3, -1))

    def keys(self, label: Label, top: Label, level: Label) -> NDArray[np.intp]:
        """The place of every pixel in the table (H, W), from its label, top class and level of confidence."""
        state = np.where(label == IGNORE, _IGNORED, np.where(label == top, _LABELLED, _DECIDED)).astype(np.intp)
        return (state * self.classes + top) * self.levels + level

    def doubt(self, keys: NDArray[np.intp]) -> Doubt:
        """Expected pixels of every kind by top class (3, C)."""
        counts = np.bincount(keys.ravel(), minlength=self.chances.shape[1])
        by_class = (self.chances * counts).reshape(3, 3, self.classes, self.levels)
        return np.asarray(by_class.sum(axis=(1, 3)))

    @property
    def unsure(self) -> Floats:
        """The probability that a pixel would be changed by a person (3 * C * L,)."""
        return np.asarray(self.chances.sum(axis=0))


def confusions(around: NDArray[np.int64], truth: Floats, audit: Audit | None, names: tuple[str, ...]) -> Floats:
    """The true class of a pixel that is not of its top class: probabilities (C, C), by top class and true class.

    around: pairs of neighbouring pixels of two classes (C, C). truth: expected pixels by class. A class is mostly
    mistaken for what lies around it; an audit that has counted confusions knows better, as far as it has seen them.
    """
    classes = len(names)
    others = 1 - np.eye(classes)

    def shares(counts: Floats, fallback: Floats) -> Floats:
        counts = counts * others
        total = counts.sum(axis=1, keepdims=True)
        return np.asarray(np.divide(counts, total, out=fallback.copy(), where=total > 0))

    equal = others / max(1, classes - 1)
    by_truth = shares(np.tile(truth, (classes, 1)), equal)
    near = 0.9 * shares((around + around.T).astype(float), by_truth) + 0.1 * by_truth
    if audit is None or not audit.confusion:
        return near
    place = {row.name: k for k, row in enumerate(audit.classes)}
    known = [place.get(name) for name in names]
    counted = np.array(audit.confusion, float)
    seen = np.zeros((classes, classes))
    for c, mine in enumerate(known):
        for t, true in enumerate(known):
            if mine is not None and true is not None:
                seen[c, t] = counted[true, mine]
    return shares(seen + _BELIEVED * near, near)
