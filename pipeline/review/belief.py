"""How likely each pixel of a label is wrong, and which class it then has: from kept confidence, and an audit if any.

A pixel has one of four kinds of doubt, by its top class c, of which the teacher is right with probability p:

wrong     it is labelled c, and with 1 - p it is another class
missed    it is ignored, and with p it is c
other     it is ignored, and with 1 - p it is another class
void      it is labelled c, and people would give it no class: neither right nor wrong

Of pixels that people would leave out, as an audit knows them by class and confidence, nothing is gained.
Where the label says another class than the teacher, or has a class although the teacher was not sure enough, a person
decided, and there is no doubt; neither is there where a person's coarse label says the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.labels import middles
from autolabel.manifests.run.shards import Label
from autolabel.pipeline.analysis.audit_record import Audit

Floats = NDArray[np.float64]
Doubt = NDArray[np.float64]  # (4, C): expected pixels of each kind, by top class
KINDS = 4
WRONG, MISSED, OTHER, VOID = range(KINDS)
_LABELLED, _IGNORED, _DECIDED = range(3)  # states of a pixel
_BELIEVED = 1000.0  # pixels of an audit that weigh as much as what is assumed without one


def shift(audit: Audit | None, names: tuple[str, ...], top: Floats) -> Floats:
    """How many times as often every class is a top class in a run as it was in the audited images (C,), 0.1 to 10.

    top: pixels of the run by top class (C,). An audit of other streets says how sure to be of a cyclist where there are
    many; this takes it to where there are few. It is 1 without an audit.
    """
    if audit is None or audit.reliability is None:
        return np.ones(len(names))
    bins = audit.reliability.classes
    audited = np.array([sum(bins[name].pixels) if name in bins else 0 for name in names], float)
    mine, theirs = top / max(1.0, top.sum()), audited / max(1.0, audited.sum())
    ratio = np.divide(mine, theirs, out=np.ones(len(names)), where=(theirs > 0) & (mine > 0))
    return np.asarray(np.clip(ratio, 0.1, 10))


def right(edges: tuple[float, ...], names: tuple[str, ...], audit: Audit | None, top: Floats) -> Floats:
    """Probability that the top class is right, by class and level (C, L).

    It is the middle of the level; with an audit, the share that was right among the audited pixels of this class and
    confidence, which count as far as there are any, and for so many pixels of each top class as the run has.
    """
    middle = middles(edges)
    found = np.tile(middle, (len(names), 1))
    if audit is None or audit.reliability is None:
        return found
    diagram = audit.reliability
    place = _bins(edges, audit)
    # What all classes have together stands in for a class that was seen too rarely.
    pixels, correct = (np.array(getattr(diagram.all, name), float)[place] for name in ("pixels", "correct"))
    assumed = (correct + _BELIEVED * middle) / (pixels + _BELIEVED)
    for c, name in enumerate(names):
        found[c] = assumed
        if name in diagram.classes:
            bins = diagram.classes[name]
            pixels, correct = (np.array(getattr(bins, field), float)[place] for field in ("pixels", "correct"))
            found[c] = (correct + _BELIEVED * assumed) / (pixels + _BELIEVED)
    often = shift(audit, names, top)[:, None]
    return np.asarray(found * often / (found * often + 1 - found))


def left_out(edges: tuple[float, ...], names: tuple[str, ...], audit: Audit | None) -> Floats:
    """Probability that people give a pixel no class, by top class and level (C, L): the share in an audit, else 0."""
    if audit is None or audit.reliability is None or not audit.unknown:
        return np.zeros((len(names), len(edges) + 1))
    diagram = audit.reliability
    place = _bins(edges, audit)
    unknown, pixels = (np.zeros((len(names), len(diagram.edges) - 1)) for _ in range(2))
    for c, name in enumerate(names):
        if name in diagram.classes and name in audit.unknown:
            unknown[c], pixels[c] = audit.unknown[name], diagram.classes[name].pixels
    pixels += unknown
    assumed = unknown.sum(axis=0) / np.maximum(1, pixels.sum(axis=0))
    return np.asarray(((unknown + _BELIEVED * assumed) / (pixels + _BELIEVED))[:, place])


def _bins(edges: tuple[float, ...], audit: Audit) -> NDArray[np.intp]:
    """The bin of an audit's diagram in which every level lies (L,)."""
    assert audit.reliability is not None
    known = audit.reliability.edges
    return np.clip(np.searchsorted(known, middles(edges)) - 1, 0, len(known) - 2)


@dataclass(frozen=True)
class Belief:
    """Doubts by state, class and level: `chances` (4 kinds, 3 states * C * L); see the module.

    sure (C,) uint8: the level from which on the policy keeps a class.
    """

    classes: int
    levels: int
    chances: Floats
    sure: NDArray[np.uint8]

    @classmethod
    def of(cls, run: Run, edges: tuple[float, ...], audit: Audit | None, top: Floats) -> Belief:
        """The belief about the labels of a run whose confidence has these edges; `top` as in `shift`."""
        space = run.label_space
        p = right(edges, space.names, audit, top)
        void = left_out(edges, space.names, audit)
        sure = (np.searchsorted(edges, run.policy.class_thresholds(space)) + 1).astype(np.uint8)
        by_person = np.arange(len(edges) + 1) < sure[:, None]
        nothing = np.zeros_like(p)
        chances = np.array(
            [
                [np.where(by_person, 0, (1 - p) * (1 - void)), nothing, nothing],
                [nothing, p * (1 - void), nothing],
                [nothing, (1 - p) * (1 - void), nothing],
                [np.where(by_person, 0, void), nothing, nothing],
            ]
        )
        return cls(len(space), len(edges) + 1, chances.reshape(KINDS, -1), sure)

    @property
    def decided(self) -> int:
        """A key without doubt."""
        return int(self.chances.shape[1]) - 1

    def keys(self, label: Label, top: Label, level: Label) -> NDArray[np.int32]:
        """The place of every pixel in the table (H, W), from its label, top class and level of confidence."""
        state = np.full(label.shape, _DECIDED, np.uint8)
        np.putmask(state, label == top, _LABELLED)
        np.putmask(state, label == IGNORE, _IGNORED)
        keys = (np.arange(3, dtype=np.int32) * (self.classes * self.levels)).take(state)
        keys += (np.arange(256, dtype=np.int32) * self.levels).take(top)
        keys += level
        return keys

    def doubt(self, keys: NDArray[np.int32]) -> Doubt:
        """Expected pixels of every kind by top class (4, C)."""
        counts = np.bincount(keys.ravel(), minlength=self.chances.shape[1])
        by_class = (self.chances * counts).reshape(KINDS, 3, self.classes, self.levels)
        return np.asarray(by_class.sum(axis=(1, 3)))

    @property
    def unsure(self) -> Floats:
        """The probability that a pixel would be changed by a person (3 * C * L,)."""
        return np.asarray(self.chances[:VOID].sum(axis=0))


def confusions(
    around: NDArray[np.int64], truth: Floats, audit: Audit | None, names: tuple[str, ...], often: Floats
) -> Floats:
    """The true class of a pixel that is not of its top class: probabilities (C, C), by top class and true class.

    around: pairs of neighbouring pixels of two classes (C, C). truth: expected pixels by class. often: see `shift`. A
    class is mostly mistaken for what lies around it; an audit that has counted confusions knows better, as far as it
    has seen them.
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
                seen[c, t] = counted[true, mine] * often[t]
    return shares(seen + _BELIEVED * near, near)
