"""The work, cut into units, and kept in a file.

A unit is the samples of one shard. `plan-CHECKSUM.arrow` in the run folder says which sample belongs to which unit and
row: record batches of whole units, compressed, read when they are needed, so that twenty million samples take little
more memory than a thousand. pipeline/cutting.py writes it.
"""

from __future__ import annotations

import fnmatch
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.run.labels import png_place, zarr_place
from autolabel.manifests.run.shards import bucket_of, whole_chunks
from autolabel.manifests.samples import Sample, samples_of
from autolabel.manifests.schemas import MANIFEST_SCHEMA
from autolabel.manifests.tables import BadTable

KEPT = ("sample_id", "image", "height", "width", "split", "group", "label_ids", "coarse_label")
PLAN_SCHEMA = pa.schema([pa.field("row", pa.int64()), *(MANIFEST_SCHEMA.field(name) for name in KEPT)])
UNIT_SIZE = b"unit_size"  # the key of a plan's metadata
_PLACES = [PLAN_SCHEMA.get_field_index(name) for name in ("row", "height", "width")]
_PIECE = 1 << 22


@dataclass(frozen=True)
class Unit:
    """Samples that fill one shard: rows first_row, first_row + 1, … of their bucket's array.

    images: the paths of their images as the manifest has them, relative to its root; PNG labels are named after them.
    """

    name: str
    bucket: str
    first_row: int
    samples: tuple[Sample, ...]
    images: tuple[str, ...] = ()

    def place(self, number: int, store: str) -> tuple[str, int | None]:
        """The place of a sample's label in the run folder: its Zarr array and the row in it, or its PNG and None."""
        if store == "png":
            return png_place(self.images[number]), None
        return zarr_place(self.bucket), self.first_row + number


@dataclass(frozen=True)
class Packed:
    """A unit as it is handed out: its rows of the plan in Arrow's own bytes, and the roots of their paths.

    Who labels it makes the samples. A driver of a thousand workers would have no time for that.
    """

    name: str
    bucket: str
    first_row: int
    rows: bytes
    image_root: Path
    label_root: Path

    def _batch(self) -> pa.RecordBatch:
        return pa.ipc.read_record_batch(self.rows, PLAN_SCHEMA)

    def ids(self) -> list[str]:
        """The ids of the samples, in order."""
        return list(self._batch()["sample_id"].to_pylist())

    def rows_of(self, sample_ids: pa.ChunkedArray) -> pa.Table:
        """The rows of the plan about some of the samples, in the order of their ids."""
        batch = self._batch()
        return pa.Table.from_batches([batch.take(pc.index_in(sample_ids.combine_chunks(), batch["sample_id"]))])

    def unit(self) -> Unit:
        """The unit with its samples. Raises ValueError for a path that leaves its root."""
        batch = self._batch().select(list(KEPT))
        samples = samples_of(batch, image_root=self.image_root, label_root=self.label_root)
        return Unit(self.name, self.bucket, self.first_row, tuple(samples), tuple(batch["image"].to_pylist()))


@dataclass(frozen=True)
class Tally:
    """Counts of some samples: done, quarantined (among the done), and pixels.

    pixels: all pixels of the labelled images. kept: pixels with a label, by class id.
    """

    done: int = 0
    quarantined: int = 0
    pixels: int = 0
    kept: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.done + other.done,
            self.quarantined + other.quarantined,
            self.pixels + other.pixels,
            self.kept + other.kept,
        )

    def __sub__(self, other: Tally) -> Tally:
        return Tally(
            self.done - other.done,
            self.quarantined - other.quarantined,
            self.pixels - other.pixels,
            self.kept - other.kept,
        )


class Plan:
    """The units of a run by number. Raises BadTable unless the file is what was written, for this shard size."""

    def __init__(self, path: Path, unit_size: int, image_root: Path, label_root: Path) -> None:
        self.path, self.unit_size, self.roots = path, unit_size, (image_root, label_root)
        self._latest: tuple[int, pa.RecordBatch] | None = None
        try:
            file = storage.near(path)
            weakref.finalize(self, file.close)
            if path.name != plan_name(file):  # asked first: Arrow trusts what it reads
                raise self._damaged("its checksum is another")
            self._reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(use_threads=False))
            if not self._reader.schema.equals(PLAN_SCHEMA):
                raise BadTable(f"{path} is not a plan of this version: start a new run folder")
            cut = (self._reader.schema.metadata or {}).get(UNIT_SIZE, b"").decode()
            if cut != str(unit_size):
                raise self._damaged(f"it has units of {cut} samples, not of {unit_size}")
            self._find_units(file)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(str(getattr(error, "strerror", None) or error)) from error

    def _damaged(self, why: str) -> BadTable:
        return BadTable(f"{self.path} is damaged ({why}): `autolabel verify --repair` makes it again from the manifest")

    def _find_units(self, file: BinaryIO) -> None:
        """Read bucket, first row and number of samples of every unit, from three columns of the file.

        A unit's rows follow each other within one shard; where another shard begins, so does another unit.
        """
        options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=_PLACES)
        places = pa.ipc.open_file(file, options=options)
        found: list[tuple[NDArray[np.int64], ...]] = []
        for number in range(places.num_record_batches):
            batch = places.get_batch(number)
            rows, sizes = batch["row"].to_numpy(), bucket_sizes(batch)
            shards = rows // self.unit_size
            begins = np.append(True, (np.diff(shards) != 0) | (np.diff(sizes) != 0).any(axis=0))[: len(rows)]
            starts = np.flatnonzero(begins)
            counts = np.diff(starts, append=len(rows))
            expected = np.repeat(shards[starts] * self.unit_size - starts, counts) + np.arange(len(rows))
            if not np.array_equal(rows, expected):
                raise self._damaged(f"unit of row {rows[int(np.argmax(rows != expected))]}")
            found.append((*sizes[:, starts], rows[starts], counts, starts, np.full(len(starts), number)))
        columns = [np.concatenate(column) for column in zip(*found, strict=True)] or [np.empty(0, np.int64)] * 6
        height, width, self._first, self._count, self._start, self._batch = columns
        sizes, self._bucket = np.unique(height << 32 | width, return_inverse=True)
        self._names = [bucket_of(int(size) >> 32, int(size) & 0xFFFFFFFF) for size in sizes]
        if len(np.unique(np.stack([self._bucket, self._first]), axis=1).T) < len(self._first):
            raise self._damaged("a unit comes twice")

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, number: int) -> Unit:
        return self.packed(number).unit()

    def _rows(self, number: int) -> pa.RecordBatch:
        place, latest = int(self._batch[number]), self._latest
        if latest is None or latest[0] != place:  # units are mostly asked for in order
            self._latest = latest = place, self._reader.get_batch(place)
        return latest[1].slice(int(self._start[number]), int(self._count[number]))

    def packed(self, number: int) -> Packed:
        """A unit as it is handed out."""
        rows = self._rows(number).serialize().to_pybytes()
        bucket, first_row = self._names[self._bucket[number]], int(self._first[number])
        return Packed(self.name(number), bucket, first_row, rows, *self.roots)

    def __iter__(self) -> Iterator[Unit]:
        return map(self.__getitem__, range(len(self)))

    def name(self, number: int) -> str:
        """Name of a unit, such as b1024x2048.000017: its bucket and which shard of it."""
        return f"{self._names[self._bucket[number]]}.{self._first[number] // self.unit_size:06d}"

    @property
    def samples(self) -> int:
        """Samples of all units."""
        return int(self._count.sum())

    def count(self, number: int) -> int:
        """Samples of one unit."""
        return int(self._count[number])

    def rows(self, *, unreadable: bool = False) -> dict[str, int]:
        """Rows of every bucket's array; samples whose header was unreadable (0 x 0) need none in the store."""
        ends = np.zeros(len(self._names), np.int64)
        np.maximum.at(ends, self._bucket, self._first + self._count)
        found = dict(zip(self._names, ends.tolist(), strict=True))
        return {name: rows for name, rows in sorted(found.items()) if unreadable or name != bucket_of(0, 0)}

    def tables(self) -> Iterator[pa.Table]:
        """The rows of some units at a time as a table, in order."""
        for number in range(self._reader.num_record_batches):
            yield pa.Table.from_batches([self._reader.get_batch(number)])


def bucket_sizes(samples: pa.Table | pa.RecordBatch) -> NDArray[np.int64]:
    """(2, n) heights and widths, as far as they decide the bucket."""
    return whole_chunks(np.stack([samples["height"].to_numpy(), samples["width"].to_numpy()]).astype(np.int64))


def plan_name(file: BinaryIO) -> str:
    """The name of a plan: its checksum, since a plan is never changed, only replaced."""
    checksum = 0
    file.seek(0)
    while piece := file.read(_PIECE):
        checksum = google_crc32c.extend(checksum, piece)
    file.seek(0)
    return f"plan-{checksum:08x}.arrow"


def in_part(number: int, part: tuple[int, int] | None) -> bool:
    """Return True if a unit belongs to part I of N, as (I, N); every unit belongs to None."""
    return part is None or number % part[1] == part[0] - 1


def matcher(glob: str | None) -> Callable[[str], bool]:
    """Return a test of sample ids for the glob of --only; None takes all."""
    if glob is None:
        return lambda name: True
    pattern = re.compile(fnmatch.translate(glob))
    return lambda name: pattern.match(name) is not None
