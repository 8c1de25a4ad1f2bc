"""Chapters are closed in the course of a run: the records of a thousand whole units in a row become one file.

The driver does so, in a thread of its own. A kill anywhere loses nothing: the records are removed after their chapter
is there, and until then the next call finds the same units whole and closes it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.run import chapters
from autolabel.manifests.run.chapters import Chapter, Leaf, Totals, create_chapter
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.ledger import Commit, Ledger, read_newest, record_path
from autolabel.manifests.run.shards import shard_path
from autolabel.manifests.tables import BadTable
from autolabel.manifests.wording import kind_and_reason
from autolabel.pipeline.engine import Work
from autolabel.pipeline.records import parse_record, tally, tally_of
from autolabel.pipeline.rows import BRIEF, Row
from autolabel.pipeline.units import Plan, Tally

_READERS = 16  # records that are read at once


def closed_units(ledger: Ledger, plan: Plan) -> tuple[NDArray[np.bool_], Tally]:
    """The units whose chapter vouches for every label, which are not looked at again, as flags (U,), and their counts.

    Units with quarantined samples are not among them: their images may have been replaced.
    """
    closed, before = np.zeros(len(plan), np.bool_), Tally()
    for number, chapter in ledger.chapters.items():
        first = number * chapters.UNITS_OF_A_CHAPTER
        numbers = range(first, min(first + len(chapter.units), len(plan)))
        vouched = np.zeros(len(chapter.units), np.bool_)
        for place, (unit, planned) in enumerate(zip(chapter.units, numbers, strict=False)):
            commit = ledger.get(unit)
            vouched[place] = commit is not None and commit.chapter is not None and unit == plan.name(planned)
        vouched &= chapter.quarantined == 0
        closed[numbers.start : numbers.stop] = vouched[: len(numbers)]
        before += tally_of(chapter.sum(vouched))
    return closed, before


class Closing:
    """Counts whole units, and closes every chapter whose last one is whole.

    whole: the numbers of units that were whole before. note: is told if a chapter cannot be written.
    """

    def __init__(self, run: Run, plan: Plan, whole: Iterable[int], note: Callable[[str], None] | None) -> None:
        self._run, self._plan, self._note = run, plan, note
        self._size = chapters.UNITS_OF_A_CHAPTER
        self._whole: dict[int, set[int]] = {}  # by the number of the chapter
        self._handed: dict[str, tuple[int, int]] = {}  # the number of a unit, and how many of its samples are wanted
        self._thread = ThreadPoolExecutor(1)
        self._closing: list[Future[None]] = []
        for number in whole:
            self._add(number)

    def watch(self, units: Iterable[int], work: Iterable[Work]) -> Iterator[Work]:
        """Pass on the work of these units, and remember what would make them whole."""
        for number, item in zip(units, work, strict=True):
            self._handed[item.unit.name] = number, len(item.wanted)
            yield item

    def unit(self, name: str, done: int) -> None:
        """Take a unit that is left, of which `done` samples of the wanted ones are done."""
        number, wanted = self._handed.get(name, (0, -1))
        if done == wanted:
            del self._handed[name]
            self._add(number)

    def _add(self, number: int) -> None:
        chapter = number // self._size
        if (chapter + 1) * self._size > len(self._plan):
            return  # the last units of a plan, which may grow
        here = self._whole.setdefault(chapter, set())
        here.add(number)
        if len(here) == self._size:
            del self._whole[chapter]
            self._closing = [one for one in self._closing if not one.done()]
            self._closing.append(self._thread.submit(self._close, chapter))

    def end(self) -> None:
        """Wait until all chapters are written that can be."""
        self._thread.shutdown()

    def _close(self, number: int) -> None:
        try:
            close_chapter(self._run, self._plan, number)
        except (BadTable, OSError, ValueError) as error:  # the records are as good as before
            if self._note:
                self._note(f"chapter {number} was not written, the next call tries again: {kind_and_reason(error)}")


def close_chapter(run: Run, plan: Plan, number: int) -> bool:
    """Write a chapter of whole units and remove their records; False if one of them is not whole.

    Raises BadTable, OSError; nothing is lost then.
    """
    size = chapters.UNITS_OF_A_CHAPTER
    units = range(number * size, (number + 1) * size)
    ledger = Ledger(run.path)
    if number in ledger.chapters:
        _remove_records(run, ledger.chapters[number])
        return True
    commits = [ledger.get(plan.name(unit)) for unit in units]

    def leaf(unit: int, commit: Commit | None) -> Leaf | None:
        return None if commit is None else _leaf(run, plan, unit, commit)

    with ThreadPoolExecutor(_READERS) as pool:
        leaves = [one for one in pool.map(leaf, units, commits) if one is not None]
    if len(leaves) < size:
        return False
    _remove_records(run, create_chapter(run.path, number, leaves))
    return True


def _leaf(run: Run, plan: Plan, number: int, commit: Commit) -> Leaf | None:
    """The record of a unit for its chapter, None unless it is whole and its shards are as long as it says."""
    commit, data = read_newest(commit)
    table, shards = parse_record(commit.path, data, BRIEF)
    if len(table) != plan.count(number):
        return None
    bucket, _, index = commit.unit.rpartition(".")
    for layer, shard in shards.items():
        there = storage.stat(shard_path(run.layer(layer) / bucket, int(index)))
        if there is None or there.size != shard["bytes"]:
            return None
    t = tally(Row(**row) for row in table.to_pylist())
    return Leaf(commit.unit, commit.generation, data, Totals(t.done, t.quarantined, t.pixels, t.kept))


def _remove_records(run: Run, chapter: Chapter) -> None:
    """Remove the records that a chapter holds. One that cannot be removed does no harm."""

    def remove(place: int) -> None:
        with contextlib.suppress(OSError):
            storage.remove(record_path(run.path, chapter.units[place], chapter.generation(place)))

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(remove, range(len(chapter.units))))
