"""Chapters: the records of a thousand whole units in a row, in one file, so that listing them costs one name.

`chapters/00012.records` is created once and never changed. It holds the records as they were, byte for byte, one after
the other; then an index, a sealed parquet table; then the index's length and `END`. So one unit is one ranged read, and
its record's own seal tells of every flipped bit. To write them as row groups of one parquet file would cost 35
times the CPU, and a footer of 4 MB where the index has 0.01 to 0.1.

manifests/run/ledger.py says which records count: a later generation in `units/` is newer than that in a chapter.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.tables import BadTable, sealed_table, table_bytes

CHAPTERS = "chapters"  # the folder of the chapters in a run
UNITS_OF_A_CHAPTER = 1000
END = b"CHAPTER1"
_NAME = re.compile(r"([0-9]{5,9})\.records")
_AHEAD = 1 << 22  # bytes that are read at once where records are read one after the other
_TAIL = 1 << 18  # bytes that are read at first: most indices are smaller
_INDEX = pa.schema(
    [
        pa.field("unit", pa.string(), nullable=False),
        pa.field("generation", pa.int64(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),  # where its record lies in the file
        pa.field("length", pa.int64(), nullable=False),
        pa.field("crc32c", pa.uint32(), nullable=False),
        pa.field("done", pa.int64(), nullable=False),
        pa.field("quarantined", pa.int64(), nullable=False),
        pa.field("pixels", pa.int64(), nullable=False),
        pa.field("classes", pa.list_(pa.int32()), nullable=False),  # those that occur, and their pixels
        pa.field("kept", pa.list_(pa.int64()), nullable=False),
    ]
)


@dataclass(frozen=True)
class Totals:
    """Counts of a unit's samples, or of several units': done, quarantined (among the done), and pixels.

    pixels: all pixels of the labelled images. kept: pixels with a label, by class id.
    """

    done: int
    quarantined: int
    pixels: int
    kept: Counter[int]


@dataclass(frozen=True)
class Leaf:
    """A record for a chapter."""

    unit: str
    generation: int
    record: bytes
    totals: Totals


class Span(NamedTuple):
    """A record in a chapter: its file, its begin and length in bytes, and the version of the file."""

    path: Path
    start: int
    length: int
    version: storage.Stat

    def read(self) -> bytes:
        """Return the record. Raises FileNotFoundError or ChangedFile if the chapter is another one now.

        Who reads one record after the other gets them in few requests: the next ones are read with it.
        """
        before = _last.block
        if before is not None and before.of == (self.path, self.version):
            data = before.data[self.start - before.start :] if self.start >= before.start else b""
            if len(data) >= self.length:
                _last.next = self.start + self.length
                return data[: self.length]
        follows = before is not None and before.of == (self.path, self.version) and self.start == _last.next
        data = storage.read_range(
            self.path, self.start, max(self.length, _AHEAD if follows else 0), unchanged=self.version
        )
        _last.block, _last.next = _Block((self.path, self.version), self.start, data), self.start + self.length
        return data[: self.length]


class _Block(NamedTuple):
    of: tuple[Path, storage.Stat]
    start: int
    data: bytes


class _Last(threading.local):
    """The bytes that a thread has read last of a chapter, and the place behind the record that it has taken last."""

    def __init__(self) -> None:
        self.block: _Block | None = None
        self.next = 0


_last = _Last()


class Chapter:
    """One chapter: the names of its units, in order, and where each one's record lies.

    Raises BadTable unless its index is as written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        version = storage.stat(path)
        if version is None:
            raise _damaged(path, "it is gone")
        self._version = version
        self._index = _index(path, version)
        self.units: list[str] = self._index["unit"].to_pylist()
        self._numbers = {name: self._index[name].to_numpy() for name in ("generation", "start", "length")}

    def generation(self, place: int) -> int:
        """The generation of the unit at a place."""
        return int(self._numbers["generation"][place])

    def span(self, place: int) -> Span:
        """The record of the unit at a place."""
        start, length = (int(self._numbers[name][place]) for name in ("start", "length"))
        return Span(self.path, start, length, self._version)

    @property
    def quarantined(self) -> NDArray[np.int64]:
        """The number of quarantined samples of every unit."""
        return np.asarray(self._index["quarantined"].to_numpy())

    def sum(self, places: NDArray[np.bool_] | None = None) -> Totals:
        """The counts of all units together, or of some of them: a flag for each."""
        some = self._index if places is None else self._index.filter(pa.array(places))
        done, quarantined, pixels = (int(some[name].to_numpy().sum()) for name in ("done", "quarantined", "pixels"))
        classes, kept = (pc.list_flatten(some[name]).to_numpy() for name in ("classes", "kept"))
        numbers = np.unique(classes)
        sums = np.zeros(len(numbers), np.int64)
        np.add.at(sums, np.searchsorted(numbers, classes), kept)
        return Totals(done, quarantined, pixels, Counter(dict(zip(numbers.tolist(), sums.tolist(), strict=True))))

    def totals(self, place: int) -> Totals:
        """The counts of the unit at a place."""
        (row,) = self._index.slice(place, 1).to_pylist()
        kept = Counter(dict(zip(row["classes"], row["kept"], strict=False)))
        return Totals(row["done"], row["quarantined"], row["pixels"], kept)

    def mark(self) -> bytes:
        """Bytes that differ for other records, or other generations of them."""
        return b"".join(np.asarray(self._index[name]).tobytes() for name in ("generation", "crc32c"))


def chapter_path(run: Path, number: int) -> Path:
    """The file of a chapter: that of units number * 1000, number * 1000 + 1, … of the plan."""
    return run / CHAPTERS / f"{number:05d}.records"


def chapters_of(run: Path) -> Iterator[tuple[int, Path]]:
    """The numbers and files of a run's chapters, in order."""
    for path in storage.list(run / CHAPTERS):
        if name := _NAME.fullmatch(path.name):
            yield int(name[1]), path


def create_chapter(run: Path, number: int, leaves: Sequence[Leaf]) -> Chapter:
    """Write a chapter, unless there is one: then that one counts, and is returned. Raises BadTable if it is damaged."""
    start, rows = 0, []
    for leaf in leaves:
        t = leaf.totals
        rows.append(
            {
                "unit": leaf.unit,
                "generation": leaf.generation,
                "start": start,
                "length": len(leaf.record),
                "crc32c": google_crc32c.value(leaf.record),
                "done": t.done,
                "quarantined": t.quarantined,
                "pixels": t.pixels,
                "classes": sorted(t.kept),
                "kept": [t.kept[c] for c in sorted(t.kept)],
            }
        )
        start += len(leaf.record)
    index = table_bytes(pa.Table.from_pylist(rows, schema=_INDEX))
    path = chapter_path(run, number)
    data = b"".join([*(leaf.record for leaf in leaves), index, len(index).to_bytes(8, "little"), END])
    try:
        storage.create(path, data)
    except (ConnectionError, TimeoutError):
        if storage.stat(path) is None:
            raise
    return Chapter(path)


@lru_cache(maxsize=512)  # 0.1 MB each; a chapter never changes
def _index(path: Path, version: storage.Stat) -> pa.Table:
    def tail(length: int) -> bytes:
        start = max(0, version.size - length)
        return storage.read_range(path, start, version.size - start, unchanged=version)

    try:
        data = tail(_TAIL)
        length = int.from_bytes(data[-16:-8], "little")
        if data[-8:] != END or not 0 < length <= version.size - 16:
            raise _damaged(path, "its end is missing")
        if length + 16 > len(data):
            data = tail(length + 16)
        table = sealed_table(path, data[-16 - length : -16], schema=_INDEX)
    except storage.ChangedFile as error:
        raise _damaged(path, "somebody has changed it") from error
    except BadTable as error:
        raise _damaged(path, str(error).removeprefix(f"{path} is ").removeprefix("damaged: ")) from error
    return table


def _damaged(path: Path, why: str) -> BadTable:
    return BadTable(
        f"{path} is damaged ({why}): `autolabel verify --repair` puts its units back to undone, then generate again"
    )
