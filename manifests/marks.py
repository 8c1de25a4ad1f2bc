"""Labelled samples by a few bytes each: marks of 64 bits, and the way to the samples themselves.

Where marks of ids meet, the ids are read again and compared. The mark of an image is its whole fingerprint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.samples import Sample, fingerprints, in_pieces
from autolabel.manifests.schemas import SOURCES

Marks = NDArray[np.uint64]
Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]
Key = tuple[str, str]
_PARTS = 16  # of all marks, which are sorted one after the other
_ODD = np.uint64(0x9E3779B97F4A7C15)  # spreads the few sources over 64 bits


class SampleRows(Protocol):
    """Some samples of a manifest in its order, by numbers from 0, wherever they lie."""

    name: str

    def __len__(self) -> int: ...

    @property
    def sources(self) -> NDArray[np.uint8]:
        """Places in SOURCES; len(SOURCES) for one that is not there."""

    def ids(self) -> Iterator[Sequence[str]]:
        """The sample ids, piece by piece."""

    def samples(self, rows: Rows | None = None) -> Iterator[Sample]:
        """All samples, or those of some rows, which ascend."""

    def keep(self, mask: Mask) -> None:
        """Leave out all samples but some."""


class HeldSamples:
    """Samples in memory."""

    def __init__(self, name: str, samples: Sequence[Sample]) -> None:
        self.name, self._samples = name, samples

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def sources(self) -> NDArray[np.uint8]:
        """Places in SOURCES."""
        return np.fromiter((SOURCES.index(s.source) for s in self._samples), np.uint8, len(self))

    def ids(self) -> Iterator[Sequence[str]]:
        """The sample ids, all at once."""
        yield [s.sample_id for s in self._samples]

    def samples(self, rows: Rows | None = None) -> Iterator[Sample]:
        """All samples, or those of some rows."""
        return iter(self._samples) if rows is None else (self._samples[row] for row in rows.tolist())

    def keep(self, mask: Mask) -> None:
        """Leave out all samples but some."""
        self._samples = [self._samples[row] for row in np.flatnonzero(mask).tolist()]


def image_marks(samples: SampleRows) -> Marks:
    """The fingerprints of all images. Raises BadTable naming the first image that is gone."""
    marks, first = np.empty(len(samples), np.uint64), 0
    for piece in in_pieces(samples.samples()):
        marks[first : first + len(piece)] = [int(mark, 16) for mark in fingerprints(piece)]
        first += len(piece)
    return marks


def key_marks(samples: SampleRows) -> Marks:
    """Marks of sources and ids. Equal keys have equal marks; other keys hardly ever have."""
    marks, first = np.empty(len(samples), np.uint64), 0
    for ids in samples.ids():
        marks[first : first + len(ids)] = np.fromiter(map(hash, ids), np.int64, len(ids)).view(np.uint64)
        first += len(ids)
    marks += samples.sources * _ODD
    return marks


def meetings(parts: Sequence[Marks]) -> Iterator[tuple[Rows, Rows, Rows]]:
    """Yield where marks meet: the part, the row and the number of the mark, by mark, part and row.

    The marks are sorted in 16 turns, so that little more than themselves is in memory.
    """
    width = (1 << 64) // _PARTS
    for turn in range(_PARTS):
        least, most = np.uint64(turn * width), np.uint64((turn + 1) * width - 1)
        rows = [np.flatnonzero((marks >= least) & (marks <= most)) for marks in parts]
        part, row = np.repeat(np.arange(len(parts)), [*map(len, rows)]), np.concatenate(rows)
        mark = np.concatenate([marks[some] for marks, some in zip(parts, rows, strict=True)])
        if not len(mark):
            continue
        order = np.argsort(mark, kind="stable")
        mark = mark[order]
        same = np.concatenate([[False], mark[1:] == mark[:-1], [False]])
        meets = same[1:] | same[:-1]
        yield part[order[meets]], row[order[meets]], np.cumsum(~same[:-1])[meets]


def _joined(rows: Sequence[Rows]) -> Rows:
    return np.concatenate([np.zeros(0, np.int64), *rows])


def listed_twice(samples: SampleRows) -> dict[Key, int]:
    """Sources and ids that several samples have, in the order of the first of each, and how many have them."""
    rows = np.sort(_joined([row for _, row, _ in meetings([key_marks(samples)])]))
    counts = Counter(sample.key for sample in samples.samples(rows)) if len(rows) else {}
    return {key: count for key, count in counts.items() if count > 1}


def shared_keys(earlier: SampleRows, later: SampleRows) -> list[Key]:
    """Sources and ids that both have, in the order of `earlier`."""
    found: tuple[list[Rows], list[Rows]] = ([], [])
    for part, row, mark in meetings([key_marks(earlier), key_marks(later)]):
        both = np.intersect1d(mark[part == 0], mark[part == 1])
        meets = np.isin(mark, both)
        for place, rows in enumerate(found):
            rows.append(row[meets & (part == place)])
    first, second = (np.sort(_joined(rows)) for rows in found)
    keys = {sample.key for sample in later.samples(second)} if len(second) else set()
    return [sample.key for sample in earlier.samples(first) if sample.key in keys] if keys else []
