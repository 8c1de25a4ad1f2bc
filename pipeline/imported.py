"""The account of an import: what people changed, what became of the machine's pixels, and how sure it had been."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from autolabel.manifests.corrected import (
    CHANGE_FATES,
    CHANGED,
    CHANGES_SCHEMA,
    CONFIRMED,
    ERASED,
    GIVEN,
    LEFT,
    NOBODY,
    UNKNOWN,
    CorrectedFolder,
)
from autolabel.manifests.documents import BadDocument, shaped
from autolabel.manifests.label_space import IGNORE, LabelSpace
from autolabel.manifests.locations import location
from autolabel.manifests.metadata import CORRECTS
from autolabel.manifests.run.labels import middles
from autolabel.manifests.run.shards import Label
from autolabel.manifests.samples import open_manifest
from autolabel.manifests.schemas import FATES
from autolabel.manifests.tables import BadTable, read_pieces
from autolabel.manifests.wording import MISSING, Shown, Table, counted, number, percent, probability
from autolabel.pipeline.before import Before

KEY = "corrections"  # of a manifest's provenance
_IGNORED = "ignored"
_MOST_MOVES = 8
BY_PEOPLE = (CHANGED, GIVEN, ERASED)
_WORDS = {
    CONFIRMED: "class confirmed",
    CHANGED: "class changed",
    GIVEN: "ignored, given a class",
    ERASED: "class erased to ignore",
    LEFT: "ignored, left so",
    UNKNOWN: "nobody knows what it was",
}
_WORDS_PARTIAL = _WORDS | {CONFIRMED: "class left as it was"}


def changes_of(sample_id: str, before: Before, after: Label, origin: Label, space: LabelSpace) -> pa.Table:
    """The rows of `CHANGES_SCHEMA` of one image: its pixels counted by class before, class now, and level.

    after: the corrected label (H, W) uint8. origin: (H, W) uint8.
    """
    known = before.label is not None and not (origin == NOBODY).any()
    old = before.label if known and before.label is not None else after
    # Class, level and rule as one number: most pixels are as they were, and counted by these alone.
    levels, rules = 1 + (0 if before.level is None else int(before.level.max(initial=0))), len(FATES)
    ranks = np.minimum(np.arange(256), len(space)).astype(np.int32)
    now = ranks[after] * np.int32(levels * rules)
    if before.level is not None:
        now += before.level * np.int32(rules)
    if before.fate is not None:
        now += before.fate
    right = np.zeros(after.shape, np.bool_) if before.top is None else (before.top == after) & (after != IGNORE)
    differ, size = old != after, (len(space) + 1) * levels * rules
    same, same_right = (
        np.bincount(all_of_them, minlength=size) - np.bincount(moved, minlength=size)
        for all_of_them, moved in ((now.ravel(), now[differ]), (now[right], now[differ & right]))
    )
    as_was = np.flatnonzero(same)
    keys_as_was = as_was // (levels * rules) * size + as_was
    counts = list(zip(keys_as_was.tolist(), same[as_was], same_right[as_was], strict=True))
    places, keys = pd.factorize(ranks[old[differ]] * np.int64(size) + now[differ])
    moved = (np.bincount(some, minlength=len(keys)) for some in (places, places[right[differ]]))
    counts += zip(keys.tolist(), *moved, strict=True)
    names, ids = [*space.names, _IGNORED], [*range(len(space)), IGNORE]
    rows = []
    for key, pixels, true in sorted(counts):
        was, rest = divmod(key, size)
        then, rest = divmod(rest, levels * rules)
        level, rule = divmod(rest, rules)
        rows.append(
            {
                "sample_id": sample_id,
                "fate": _fate(ids[was], ids[then]) if known else UNKNOWN,
                "from_id": ids[was] if known else None,
                "from_class": names[was] if known else None,
                "to_id": ids[then],
                "to_class": names[then],
                "rule": None if before.fate is None else FATES[rule],
                "level": None if before.level is None else level,
                "pixels": int(pixels),
                "right_pixels": None if before.top is None else int(true),
            }
        )
    return pa.Table.from_pylist(rows, schema=CHANGES_SCHEMA)


def _fate(was: int, now: int) -> str:
    if was == now:
        return LEFT if was == IGNORE else CONFIRMED
    return GIVEN if was == IGNORE else ERASED if now == IGNORE else CHANGED


@dataclass(frozen=True)
class MachineAtLevel:
    """Pixels at one level of confidence that have a class in the corrected labels.

    looked: all of them. right: those whose class is the teacher's top class. changed: those that people changed, also
    to ignore.
    """

    low: float
    high: float
    looked: int
    right: int
    changed: int


class ChangeTally:
    """Sums up rows of `CHANGES_SCHEMA`, in memory that grows with the number of images alone."""

    def __init__(self, edges: list[float] | None) -> None:
        self.fates: dict[str, int] = dict.fromkeys(CHANGE_FATES, 0)
        self.moves = Counter[tuple[str, str]]()
        self.dropped: dict[str, list[int]] = {}  # ignored pixels by rule: left so, and given a class
        self.changed_images: set[str] = set()
        self._images: set[str] = set()
        self._edges = edges
        levels = len(edges or []) + 1
        self._by_fate = {fate: np.zeros(levels, np.int64) for fate in CHANGE_FATES}
        self._looked, self._right = np.zeros(levels, np.int64), np.zeros(levels, np.int64)

    @property
    def images(self) -> int:
        """The images that have rows."""
        return len(self._images)

    def add(self, rows: pa.Table) -> None:
        """Add rows of the table. Raises BadTable for a fate or a level that nobody knows."""
        for row in rows.to_pylist():
            fate, level, pixels = row["fate"], row["level"], row["pixels"]
            if fate not in self.fates or (level is not None and not 0 <= level < len(self._looked)):
                raise BadTable(f"changes.parquet has a row of fate {fate!r} and level {level!r}: import again")
            self._images.add(row["sample_id"])
            self.fates[fate] += pixels
            if fate in BY_PEOPLE or fate == UNKNOWN:
                self.changed_images.add(row["sample_id"])
            if fate in BY_PEOPLE:
                self.moves[row["from_class"], row["to_class"]] += pixels
            if row["rule"] is not None and fate in (LEFT, GIVEN):
                self.dropped.setdefault(row["rule"], [0, 0])[fate == GIVEN] += pixels
            if level is not None and self._edges:
                self._by_fate[fate][level] += pixels
                if row["to_id"] != IGNORE:
                    self._looked[level] += pixels
                    self._right[level] += row["right_pixels"] or 0

    def confidence(self) -> dict[str, float]:
        """The mean confidence of the pixels of each fate, each counted with the middle of its level."""
        if not self._edges:
            return {}
        middle = middles(self._edges)
        return {fate: float(n @ middle / n.sum()) for fate, n in self._by_fate.items() if n.any()}

    def levels(self) -> tuple[MachineAtLevel, ...]:
        """The machine at each level, none where no confidence was kept."""
        if not self._edges:
            return ()
        changed: NDArray[np.int64] = np.sum([self._by_fate[fate] for fate in BY_PEOPLE], axis=0)
        numbers = zip(self._looked.tolist(), self._right.tolist(), changed.tolist(), strict=True)
        bounds = pairwise([0.0, *self._edges, 1.0])
        return tuple(MachineAtLevel(*both, *three) for both, three in zip(bounds, numbers, strict=True))


@dataclass(frozen=True)
class Found:
    """The findings of an import beside the table of changes.

    disagreeing_images, disagreeing_pixels: those that two people changed to different classes. damaged: PNGs of the run
    that are no labels. left_out: images in which nothing was changed, where such images do not count. edges: the
    confidences that the run tells apart, None if it kept none.
    """

    partial: bool
    disagreeing_images: int
    disagreeing_pixels: int
    damaged: list[str]
    left_out: int
    edges: list[float] | None


@dataclass(frozen=True)
class Imported(Shown):
    """A manifest of corrections of a run, and what it counts; see docs/corrections.md. new: it was written just now."""

    path: Path
    run: Path
    found: Found
    tally: ChangeTally
    new: bool = True

    @classmethod
    def read(cls, path: Path, *, new: bool = False) -> Imported:
        """Read the account of a manifest of corrections. Raises BadTable."""
        file = open_manifest(path)
        try:
            about = shaped(dict[str, Any], file.provenance.get(KEY), f"{path}: its provenance, {KEY!r}")
            found: Found = shaped(Found, about.get("found"), f"{path}: its provenance, {KEY!r}, 'found'")
        except BadDocument as error:
            raise BadTable(f"{path} is no manifest of corrections: {error}") from error
        tally = ChangeTally(found.edges)
        for piece in read_pieces(CorrectedFolder.of(path).changes, CHANGES_SCHEMA):
            tally.add(piece)
        (run,) = map(location, file.provenance.get(CORRECTS, [""]))
        return cls(path, run, found, tally, new)

    @property
    def changed_pixels(self) -> int:
        """The pixels in which the corrected labels differ from the machine's."""
        return sum(self.tally.fates[fate] for fate in BY_PEOPLE)

    @property
    def unchanged(self) -> int:
        """The images that came back as they were."""
        return self.tally.images - len(self.tally.changed_images)

    def lines(self) -> list[str]:
        """Images, pixels, and what a person should know."""
        tally, found = self.tally, self.found
        pixels, changed = sum(tally.fates.values()), self.changed_pixels
        came = counted(tally.images + found.left_out, "image")
        lines = [f"{self.path} holds these corrections already: nothing was written"] if not self.new else []
        lines += [
            f"{came} came back: {number(len(tally.changed_images))} changed, {number(self.unchanged)} confirmed as they"
            f" were{f', {number(found.left_out)} left out, as nothing in them was changed' if found.left_out else ''}",
            f"{counted(changed, 'pixel')} changed, {percent(changed / pixels if pixels else None, 2)} % of the images",
        ]
        if 2 * changed > pixels and not found.partial:
            painted = 2 * tally.fates[ERASED] > changed
            lines.append(
                "that is most of them, and they have no class now: if people painted only some pixels, say --partial"
                if painted
                else f"that is most of them: were these labels exported from {self.run}?"
            )
        if 2 * self.unchanged > tally.images:
            lines.append("images that nobody has looked at are no confirmation: --only-changed leaves them out")
        if found.disagreeing_images:
            lines.append(
                f"people disagree in {counted(found.disagreeing_images, 'image')},"
                f" {counted(found.disagreeing_pixels, 'pixel')}: the later one stands;"
                f" {CorrectedFolder.of(self.path).disagreements} lists them"
            )
        if tally.fates[UNKNOWN]:
            lines.append(
                f"{counted(tally.fates[UNKNOWN], 'pixel')} are of labels that were written over: nobody knows what the"
                " machine had said"
            )
        if found.damaged:
            lines.append(
                f"{counted(len(found.damaged), 'PNG')} of the run cannot be read as labels, and did not come along (the"
                f" first is {found.damaged[0]}): `autolabel verify {self.run}` names them"
            )
        return lines

    def tables(self) -> list[Table]:
        """The pixels by their fate, the largest changes of class, and how right the teacher was by its confidence."""
        tally, words = self.tally, _WORDS_PARTIAL if self.found.partial else _WORDS
        total, means = sum(tally.fates.values()), tally.confidence()
        rows = [
            [words[fate], number(n), percent(n / total, 2), probability(means.get(fate))]
            for fate, n in tally.fates.items() if n
        ]  # fmt: skip
        tables = [Table("the machine's pixels", ["", "pixels", "%", "mean confidence"], rows)]
        moves, changed = sorted(tally.moves.items(), key=lambda move: -move[1]), self.changed_pixels
        if moves:
            shown = [[f"{a} → {b}", number(n), percent(n / changed)] for (a, b), n in moves[:_MOST_MOVES]]
            rest = sum(n for _, n in moves[_MOST_MOVES:])
            shown += [[f"{len(moves) - _MOST_MOVES} others", number(rest), percent(rest / changed)]] if rest else []
            tables.append(Table("changes of class, the largest first", ["from → to", "pixels", "% of changed"], shown))
        if tally.dropped and not self.found.partial:
            rows = [
                [rule.replace("_", " "), number(left + given), number(given), percent(given / (left + given))]
                for rule, (left, given) in sorted(tally.dropped.items(), key=lambda entry: -sum(entry[1]))
            ]
            title = "pixels that the policy had ignored, by its rule"
            tables.append(Table(title, ["rule", "ignored", "given a class", "%"], rows))
        levels = tally.levels()
        if levels and not self.found.partial:  # else nobody has looked at the other pixels
            rows = [
                [
                    f"{level.low:g} to {level.high:g}", number(level.looked),
                    percent(level.right / level.looked) if level.looked else MISSING, number(level.changed),
                ]
                for level in levels if level.looked or level.changed
            ]  # fmt: skip
            title = "how right the teacher was in these images, by its confidence"
            tables.append(Table(title, ["confidence", "pixels with a class", "right %", "changed"], rows))
        return tables
