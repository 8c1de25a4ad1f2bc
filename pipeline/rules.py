"""A policy applied: from what the teacher says of an image, and the human's coarse label, to the label and its account.

What the teacher says of a pixel is one small number, and what the human says another. Rules that look at one pixel only
are therefore one table, made once for a run: a lookup gives every pixel its label, and counting how often each entry is
asked for gives all statistics. Rules that look around (boundary, area, size) mark pixels beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.images import id_counts
from autolabel.manifests.label_space import IGNORE, VOID, LabelSpace
from autolabel.manifests.pieces import pieces as pieces
from autolabel.manifests.policy import Policy
from autolabel.manifests.run.labels import CERTAIN
from autolabel.manifests.run.shards import Label
from autolabel.manifests.schemas import FATES

Codes = NDArray[np.uint8] | NDArray[np.int16]
Keys = NDArray[np.integer[Any]]
Counts = NDArray[np.int64]
_Item = TypeVar("_Item", bound=np.generic)
_AT_ONCE = 1 << 16  # pixels that are looked up at once, for their keys to stay in a core's cache

_KEPT, _BELOW, _BOUNDARY, _SMALL, _OUTSIDE, _HUMAN = range(len(FATES))
# What marks a pixel of the teacher; the fate it then has.
_MARKS = (_KEPT, _BOUNDARY, _SMALL, _OUTSIDE)
_INSIDE, _NEAR, _PIECE, _BEYOND = range(len(_MARKS))
_BYTE = np.array([0, CERTAIN], np.uint8)


@dataclass(frozen=True)
class Outcome:
    """A label (H, W) uint8 and where its pixels come from. All counts are int64, by class.

    fates (C, 6): what became of the pixels whose top class it is, in the order of FATES; they sum to H * W, or less
    where the teacher is silent.
    from_human (C,): pixels of the label that have this class because the coarse label decided.
    probability (H, W) uint8: of the label's class, in 255ths; 255 where people named it and the policy asks them, 0
    without a class; None unless asked for.
    certified (C,): kept pixels whose label the highest scale could not change; None unless asked for.
    The others compare the coarse label with the teacher's own decision, before the coarse label is asked (all (C,), by
    the coarse label's class): coarse, its pixels; agreeing, where the teacher kept the same; contradicted, another.
    """

    label: Label
    fates: Counts
    from_human: Counts
    coarse: Counts
    agreeing: Counts
    contradicted: Counts
    probability: Label | None = None
    certified: Counts | None = None

    @property
    def pixels(self) -> Counts:
        """Pixels of the label by class (C,)."""
        return self.fates[:, _KEPT] + self.from_human


class Rules:
    """A policy ready for the images of one run.

    edges: the confidences that the teacher's codes tell apart; every threshold of the policy is among them. silent:
    level 0 means that the teacher gives no class, whatever its code says, so no class's fates count such a pixel.
    """

    def __init__(self, policy: Policy, space: LabelSpace, edges: Sequence[float], *, silent: bool = False) -> None:
        self.policy = policy
        self.classes, self.levels = len(space), len(edges) + 1
        # From this level on a class is kept.
        needed = np.array([edges.index(t) + 1 for t in policy.class_thresholds(space)], np.uint8)
        self._needed = needed
        rules = [policy.coarse_rules.get(name, policy.coarse) for name in space.names]
        self._unions = [h for h, rule in enumerate(rules) if rule == "union"]
        self._around = bool(policy.area or policy.boundary or policy.smallest_piece)
        # Axes of every table: human class (and then: none; drawn, but of no class), mark, top class, level.
        self._humans = np.minimum(np.arange(256), len(space)).astype(np.intp)
        if policy.polygons is not None:
            self._humans[VOID] += 1
        shape = int(self._humans.max()) + 1, len(_MARKS) if self._around else 1, len(space), self.levels
        human, mark, top, level = (x.ravel() for x in np.indices(shape, np.uint8))
        self._shape, self._top, self._human = shape, top, human
        self._believed = np.array([*(rule != "ignore" for rule in rules), False, False])[human]
        self._spoken = level > 0 if silent else np.ones_like(level, np.bool_)
        self._teacher, self._fate = _teachers_own(mark, top, level, needed)
        without_union = ["ignore" if rule == "union" else rule for rule in rules]
        self._seen = self._table(rules, level, needed)
        self._unseen = self._table(without_union, level, needed)

    def _table(self, rules: Sequence[str], level: Label, needed: Label) -> tuple[Label, Label]:
        """Label and fate of every case, where the coarse label counts as told by rule and class."""
        rule = np.array([*rules, "ignore", "ignore"])
        human, top, kept = self._human, self._top, self._teacher != IGNORE
        label, fate = self._teacher.copy(), self._fate.copy()
        named = human < self.classes
        by_human = rule[human]
        agreed = kept & (top == human)
        sure = (
            level >= np.append(needed, np.zeros(2, np.uint8))[human]
        )  # the teacher's confidence exceeds the threshold of the human's class

        def decide(where: NDArray[np.bool_], to: Label) -> None:
            label[where], fate[where] = to[where], _HUMAN

        ignored = np.full_like(label, IGNORE)
        decide(named & kept & (top != human) & ((by_human == "agree") | (rule[top] == "agree")), ignored)
        decide((by_human == "union") & ~agreed & sure, human)
        decide((by_human == "union") & kept & (top != human) & ~sure, ignored)
        decide((by_human == "human-wins") & ~agreed, human)
        decide((by_human == "teacher-wins") & ~kept, human)
        decide(human > self.classes, ignored)
        return label, fate

    def apply(
        self, codes: Codes, coarse: Label | None, probability: Label | None = None, *, least: Label | None = None
    ) -> Outcome:
        """The label of an image: codes, probability, least (H, W) of `Prediction`, coarse (H, W) uint8 ids or None.

        Raises ValueError if the policy's area leaves the image.
        """
        classes, (keys, first) = self.classes, self._keys(codes, coarse)
        asked = self._asked(keys, first)
        spoken = asked * self._spoken
        labels, fate = self._tables(spoken, coarse)
        human, teacher = asked * (self._human < classes), self._teacher

        def by_class(of: Label, counts: Counts) -> Counts:
            return np.bincount(of, counts, minlength=IGNORE + 1)[:classes].astype(np.int64)

        return Outcome(
            label=_looked_up(labels[first:], keys),
            fates=np.bincount(self._top.astype(np.intp) * len(FATES) + fate, spoken, minlength=classes * len(FATES))
            .astype(np.int64)
            .reshape(classes, len(FATES)),
            from_human=by_class(labels, asked * (fate == _HUMAN)),
            coarse=by_class(self._human, human),
            agreeing=by_class(self._human, human * (teacher == self._human)),
            contradicted=by_class(self._human, human * ((teacher != self._human) & (teacher != IGNORE))),
            probability=None if probability is None else self._of_label(probability, (keys, first), labels, fate),
            certified=None if least is None else self._certified(codes, least, (keys, first)),
        )

    def _certified(self, codes: Codes, least: Label, cases: tuple[Keys, int]) -> Counts:
        """Kept pixels by class that stay so, whatever becomes of pixels that reach a lower level than they need.

        Those that have such a pixel near, or too few of their own kind around, may come to lie near a boundary, or in
        too small a piece. A class whose rule is `union` may come to be seen, or no longer.
        """
        keys, first = cases
        policy, code = self.policy, np.arange(self.classes * self.levels)
        stays = _looked_up(self._needed[code // self.levels], codes) <= least
        if policy.boundary:
            around: Codes = stays.view(np.uint8)
            for axis in (0, 1):
                around = _slide(np.minimum, around, policy.boundary, axis)
            stays = around.view(np.bool_)
        kept = _looked_up((self._seen[1] == _KEPT)[first:], keys)
        label = np.where(stays & kept, _looked_up((code // self.levels).astype(np.uint8), codes), np.uint8(IGNORE))
        if policy.smallest_piece:
            label[small_pieces(label, policy.smallest_piece)] = IGNORE
        return id_counts(label)[: self.classes]

    def _of_label(self, probability: Label, cases: tuple[Keys, int], labels: Label, fate: Label) -> Label:
        """The probability of the label's class, in 255ths, from that of the top class; labels and fate are tables."""
        keys, first = cases
        named = labels != IGNORE
        certain = named & ((fate == _HUMAN) | (self._believed & (labels == self._human)))
        found = _looked_up(_BYTE[named.view(np.uint8)][first:], keys)
        found &= probability
        found |= _looked_up(_BYTE[certain.view(np.uint8)][first:], keys)
        return found

    def fates(self, codes: Codes, coarse: Label | None) -> Label:
        """The fate of every pixel (H, W) uint8, places in FATES; the arguments are those of `apply`."""
        keys, first = self._keys(codes, coarse)
        _, fate = self._tables(self._asked(keys, first) * self._spoken, coarse)
        return _looked_up(fate.astype(np.uint8)[first:], keys)

    def _keys(self, codes: Codes, coarse: Label | None) -> tuple[Keys, int]:
        """The case of every pixel: its place in the tables (H, W) from the second number on.

        Without a coarse label these are few, so that a byte holds each of up to 256.
        """
        cases = len(self._top) // self._shape[0]
        keys: Keys = codes
        if self._around:
            keys = self._marks(codes).astype(np.min_scalar_type(cases - 1))
            keys *= self.classes * self.levels
            keys += codes.astype(keys.dtype, copy=False)
        if coarse is None:
            return keys, self.classes * cases
        humans = (self._humans * cases).astype(np.min_scalar_type(len(self._top) - 1))
        keys = keys.astype(humans.dtype, copy=False)
        found = _looked_up(humans, coarse)
        found += keys
        return found, 0

    def _asked(self, keys: Keys, first: int) -> Counts:
        """How many pixels each case of the tables has."""
        is_byte = keys.dtype == np.uint8
        counts = id_counts(keys.astype(np.uint8, copy=False)) if is_byte else np.bincount(keys.ravel())
        asked = np.zeros(len(self._top), np.int64)
        found = int(np.flatnonzero(counts)[-1]) + 1
        asked[first : first + found] = counts[:found]
        return asked

    def _tables(self, spoken: Counts, coarse: Label | None) -> tuple[Label, Label]:
        """Label and fate of every case in an image: `union` waits for the teacher to see the class."""
        if coarse is None or not self._unions:
            return self._seen
        inside = spoken.reshape(self._shape)[:, :_BEYOND].sum(axis=(0, 1, 3))
        absent = np.isin(self._human, [h for h in self._unions if not inside[h]])
        (label, fate), (label_then, fate_then) = self._seen, self._unseen
        return np.where(absent, label_then, label), np.where(absent, fate_then, fate)

    def _marks(self, codes: Codes) -> Label:
        """Return, for each pixel (H, W), the neighbourhood rule (area, boundary, smallest_piece) that drops it."""
        policy = self.policy
        marks = np.full(codes.shape, _BEYOND if policy.area else _INSIDE, np.uint8)
        if policy.area:
            marks[policy.area.box(*codes.shape)] = _INSIDE
        if policy.boundary:
            class_of = (np.arange(self.classes * self.levels) // self.levels).astype(np.uint8)
            top = _looked_up(class_of, codes)
            np.putmask(marks, near_boundary(top, policy.boundary) & (marks == _INSIDE), _NEAR)
        if policy.smallest_piece:
            own = _looked_up(self._teacher, codes)  # the table begins with the cases of unmarked pixels
            np.putmask(own, marks != _INSIDE, IGNORE)
            np.putmask(marks, small_pieces(own, policy.smallest_piece), _PIECE)
        return marks


def _looked_up(table: NDArray[_Item], keys: Keys) -> NDArray[_Item]:
    """The entry of a table for every key (H, W), all of which it has.

    A piece at a time, for numpy makes numbers of 8 bytes of the keys: a third of the time of `table[keys]`.
    """
    found = np.empty(keys.shape, table.dtype)
    flat, flat_keys = found.reshape(-1), keys.reshape(-1)
    for start in range(0, len(flat), _AT_ONCE):
        piece = slice(start, start + _AT_ONCE)
        table.take(flat_keys[piece], out=flat[piece], mode="clip")  # "raise" would copy the piece once more
    return found


def _teachers_own(mark: Label, top: Label, level: Label, needed: Label) -> tuple[Label, Label]:
    """Label and fate of every case before the coarse label is asked."""
    fate = np.array(_MARKS, np.uint8)[mark]
    fate[(level < needed[top]) & (fate != _OUTSIDE)] = _BELOW
    return np.where(fate == _KEPT, top, IGNORE).astype(np.uint8), fate


def near_boundary(top: Codes, width: int) -> NDArray[np.bool_]:
    """(H, W) bool: whether a pixel is within so many rows and columns of one with another value."""
    least, most = top, top
    for axis in (0, 1):
        least, most = _slide(np.minimum, least, width, axis), _slide(np.maximum, most, width, axis)
    differs: NDArray[np.bool_] = least != most
    return differs


def _slide(pick: np.ufunc, values: Codes, width: int, axis: int) -> Codes:
    """The least or greatest value within `width` along an axis; what lies outside the image counts for nothing."""
    found, before = values.copy(), (slice(None),) * axis
    for step in range(1, min(width, values.shape[axis] - 1) + 1):
        later, earlier = (*before, slice(step, None)), (*before, slice(None, -step))
        pick(found[later], values[earlier], out=found[later])
        pick(found[earlier], values[later], out=found[earlier])
    return found


def small_pieces(label: Label, fewest: int) -> NDArray[np.bool_]:
    """(H, W) bool: the pixels of 4-connected pieces of one class that have fewer pixels than that.

    About 4 ms for 1024 x 2048, 25,000 runs.
    """
    lengths, classes, piece = pieces(label, IGNORE)
    few = (np.bincount(piece, lengths)[piece] < fewest) & (classes != IGNORE)
    return np.repeat(few, lengths).reshape(label.shape)
