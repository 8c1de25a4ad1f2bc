"""The work, cut into units, and kept in a file.

A unit is the samples of one shard. `plan-CHECKSUM.arrow` in the run folder says which sample belongs to which unit and
row: one record batch per unit, read when it is needed, so that a million samples take no more memory than a thousand. A
bucket's samples fill its units in the order of the manifest. Samples that a manifest gains later come into new units
behind the old ones, so what is labelled stays where it is.
"""

from __future__ import annotations

import fnmatch
import re
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.run.labels import png_place, zarr_place
from autolabel.manifests.run.shards import bucket_of, whole_chunks
from autolabel.manifests.samples import ManifestFile, Sample, samples_of
from autolabel.manifests.schemas import MANIFEST_SCHEMA
from autolabel.manifests.tables import BadTable
from autolabel.pipeline.names import require_distinct

_KEPT = ("sample_id", "image", "height", "width", "split", "group", "label_ids", "coarse_label")
_PLAN_SCHEMA = pa.schema([pa.field("row", pa.int64()), *(MANIFEST_SCHEMA.field(name) for name in _KEPT)])


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
        return pa.ipc.read_record_batch(self.rows, _PLAN_SCHEMA)

    def ids(self) -> list[str]:
        """The ids of the samples, in order."""
        return list(self._batch()["sample_id"].to_pylist())

    def unit(self) -> Unit:
        """The unit with its samples. Raises ValueError for a path that leaves its root."""
        batch = self._batch().select(list(_KEPT))
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
        self.path, self.unit_size, self._roots = path, unit_size, (image_root, label_root)
        try:
            if path.name != _name(path):  # asked first: Arrow trusts what it reads
                raise self._damaged("its checksum is another")
            file = storage.reading(path)
            weakref.finalize(self, file.close)
            self._reader = pa.ipc.open_file(file)
            if not self._reader.schema.equals(_PLAN_SCHEMA):
                raise BadTable(f"{path} is not a plan of this version: start a new run folder")
            heads = [self._head(self._reader.get_batch(k)) for k in range(self._reader.num_record_batches)]
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(str(getattr(error, "strerror", None) or error)) from error
        self._names: list[str] = sorted({name for name, _, _ in heads})
        place = {name: k for k, name in enumerate(self._names)}
        self._bucket = np.array([place[name] for name, _, _ in heads], np.int32)
        self._first = np.array([first for _, first, _ in heads], np.int64)
        self._count = np.array([count for _, _, count in heads], np.int64)

    def _damaged(self, why: str) -> BadTable:
        return BadTable(f"{self.path} is damaged ({why}): `autolabel verify --repair` makes it again from the manifest")

    def _head(self, batch: pa.RecordBatch) -> tuple[str, int, int]:
        """Bucket, first row and number of samples of a unit; its rows must follow each other within one shard."""
        rows = batch.column("row").to_numpy()
        (height, width), *others = np.unique(_bucket_sizes(batch), axis=1).T.tolist()
        first = int(rows[0])
        whole = not others and first % self.unit_size == 0 and len(rows) <= self.unit_size
        if not whole or not np.array_equal(rows, np.arange(first, first + len(rows))):
            raise self._damaged(f"unit of row {first}")
        return bucket_of(height, width), first, len(rows)

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, number: int) -> Unit:
        return self.packed(number).unit()

    def packed(self, number: int) -> Packed:
        """A unit as it is handed out."""
        rows = self._reader.get_batch(number).serialize().to_pybytes()
        bucket, first_row = self._names[self._bucket[number]], int(self._first[number])
        return Packed(self.name(number), bucket, first_row, rows, *self._roots)

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
        ends = self._first + self._count
        found = {name: int(ends[self._bucket == k].max()) for k, name in enumerate(self._names)}
        return {name: rows for name, rows in found.items() if unreadable or name != bucket_of(0, 0)}

    def tables(self) -> Iterator[pa.Table]:
        """Every unit's rows as a table, in order."""
        for k in range(len(self)):
            yield pa.Table.from_batches([self._reader.get_batch(k)])


def _bucket_sizes(samples: pa.Table | pa.RecordBatch) -> NDArray[np.int64]:
    """(2, n) heights and widths, as far as they decide the bucket."""
    return whole_chunks(np.stack([samples["height"].to_numpy(), samples["width"].to_numpy()]).astype(np.int64))


def _name(path: Path) -> str:
    return f"plan-{storage.crc32c(path)}.arrow"


def write_plan(folder: Path, manifest: ManifestFile, unit_size: int) -> Path:
    """Cut a manifest into units. Returns the file, whose name is its checksum: a plan is never changed, only replaced.

    Raises ValueError where the manifest lists a sample twice, BadTable if it cannot be read.
    """
    require_distinct((t["sample_id"].to_pylist() for t in manifest.tables()), _listed_twice(manifest))
    return _write(folder, (), manifest.tables(), Counter(), unit_size)


def _listed_twice(manifest: ManifestFile) -> Callable[[str], str]:
    return lambda name: f"{manifest.path} lists sample {name!r} more than once: every sample may appear once in a run"


def extend_plan(plan: Plan, manifest: ManifestFile) -> Path:
    """A plan with the samples that the manifest has gained, in new units. Raises as `gained`."""
    new = gained(plan, manifest)
    if not new:
        return plan.path
    return _write(plan.path.parent, plan.tables(), new, Counter(plan.rows(unreadable=True)), plan.unit_size)


def gained(plan: Plan, manifest: ManifestFile) -> list[pa.Table]:
    """The samples of a manifest that a plan lacks.

    Raises ValueError if a sample that is planned is gone, or is another now: its label would belong to nothing.
    """
    require_distinct((t["sample_id"].to_pylist() for t in manifest.tables()), _listed_twice(manifest))
    known = {name: about for table in plan.tables() for name, *about in _rows(table)}
    found: list[pa.Table] = []
    for table in manifest.tables():
        new = []
        for place, (name, *about) in enumerate(_rows(table)):
            planned = known.pop(name, None)
            if planned is None:
                new.append(place)
            elif planned != about:
                column, was, now = next(
                    change for change in zip(_KEPT[1:], planned, about, strict=True) if change[1] != change[2]
                )
                raise ValueError(
                    f"sample {name!r} of {manifest.path} has changed since this run was planned ({column} was {was!r},"
                    f" now {now!r}): give back the old manifest, or choose another --out"
                )
        if new:
            found.append(table.take(new))
    if known:
        raise ValueError(
            f"{len(known)} samples of this run are not in {manifest.path} any more"
            f" (the first is {next(iter(known))!r}): give back the old manifest, or choose another --out"
        )
    return found


def _rows(table: pa.Table) -> Iterable[tuple[object, ...]]:
    return zip(*(table[name].to_pylist() for name in _KEPT), strict=True)


def _write(folder: Path, old: Iterable[pa.Table], new: Iterable[pa.Table], used: Counter[str], unit_size: int) -> Path:
    """Write a plan; it lies in a temporary folder until its checksum is known, which is its name."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, "plan.arrow")
        _cut(made, old, new, used, unit_size)
        path = folder / _name(made)
        storage.copy(made, path)
    return path


def _cut(path: Path, old: Iterable[pa.Table], new: Iterable[pa.Table], used: Counter[str], unit_size: int) -> None:
    """Copy old units, and cut new samples into units that begin behind the rows that are `used` by bucket."""
    waiting: dict[str, pa.Table] = {}
    next_row = {bucket: -(-rows // unit_size) * unit_size for bucket, rows in used.items()}
    with storage.writing(path) as file, pa.ipc.new_file(file, _PLAN_SCHEMA) as out:

        def unit(bucket: str, samples: pa.Table) -> None:
            first = next_row.get(bucket, 0)
            next_row[bucket] = first + unit_size
            rows = pa.array(np.arange(first, first + len(samples)), pa.int64())
            columns = [samples[name].combine_chunks() for name in _KEPT]
            out.write_batch(pa.RecordBatch.from_arrays([rows, *columns], schema=_PLAN_SCHEMA))

        for table in old:
            out.write_table(table)
        for table in new:
            sizes = _bucket_sizes(table)
            for height, width in np.unique(sizes, axis=1).T.tolist():
                bucket = bucket_of(height, width)
                some = table.filter(pa.array((sizes[0] == height) & (sizes[1] == width)))
                some = pa.concat_tables([waiting.pop(bucket), some]) if bucket in waiting else some
                whole = len(some) // unit_size * unit_size
                for first in range(0, whole, unit_size):
                    unit(bucket, some.slice(first, unit_size))
                if whole < len(some):
                    waiting[bucket] = some.slice(whole).combine_chunks()
        for bucket in sorted(waiting):
            unit(bucket, waiting[bucket])


def in_part(number: int, part: tuple[int, int] | None) -> bool:
    """Return True if a unit belongs to part I of N, as (I, N); every unit belongs to None."""
    return part is None or number % part[1] == part[0] - 1


def matcher(glob: str | None) -> Callable[[str], bool]:
    """Return a test of sample ids for the glob of --only; None takes all."""
    if glob is None:
        return lambda name: True
    pattern = re.compile(fnmatch.translate(glob))
    return lambda name: pattern.match(name) is not None
