"""Cut a manifest into units, once; later by the samples that it has gained.

A bucket's samples fill its units in the order of the manifest. Samples that a manifest gains later come into new units
behind the old ones, so what is labelled stays where it is. Of every sample, sixteen bytes are in memory at once.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.run.shards import bucket_of
from autolabel.manifests.samples import ManifestFile
from autolabel.manifests.schemas import ROWS_AT_ONCE
from autolabel.pipeline.names import marks, require_distinct
from autolabel.pipeline.units import KEPT, PLAN_SCHEMA, UNIT_SIZE, Plan, bucket_sizes, plan_name


def write_plan(folder: Path, manifest: ManifestFile, unit_size: int) -> Path:
    """Cut a manifest into units. Returns the file, whose name is its checksum: a plan is never changed, only replaced.

    Raises ValueError where the manifest lists a sample twice, BadTable if it cannot be read.
    """
    _require_distinct(manifest)
    return _write(folder, (), manifest.tables(), Counter(), unit_size)


def _require_distinct(manifest: ManifestFile) -> None:
    require_distinct(
        lambda: (table["sample_id"] for table in manifest.tables(("sample_id",))),
        lambda name: f"{manifest.path} lists sample {name!r} more than once: every sample may appear once in a run",
    )


def extend_plan(plan: Plan, manifest: ManifestFile) -> Path:
    """A plan with the samples that the manifest has gained, in new units. Raises as `gained`."""
    new = gained(plan, manifest)
    if not new:
        return plan.path
    return _write(plan.path.parent, plan.tables(), new.tables(), Counter(plan.rows(unreadable=True)), plan.unit_size)


@dataclass(frozen=True)
class Gained:
    """The samples of a manifest that a plan lacks, piece by piece. known: the marks of the plan's ids, sorted."""

    manifest: ManifestFile
    known: NDArray[np.uint64]
    count: int

    def __len__(self) -> int:
        return self.count

    def tables(self) -> Iterator[pa.Table]:
        """The samples in the manifest's order."""
        for table in self.manifest.tables():
            new = _places(self.known, marks(table["sample_id"])) < 0
            if new.any():
                yield table.filter(pa.array(new))


def gained(plan: Plan, manifest: ManifestFile) -> Gained:
    """The samples of a manifest that a plan lacks.

    Raises ValueError if a sample that is planned is gone, or is another now: its label would belong to nothing.
    """
    _require_distinct(manifest)
    found = [(marks(table["sample_id"]), _about(table)) for table in plan.tables()]
    known, about = (np.concatenate(column) for column in zip(*found, strict=True))
    del found
    order = np.argsort(known)
    known, about = known[order], about[order]
    seen, new = np.zeros(len(known), np.bool_), 0
    for table in manifest.tables(KEPT):
        place = _places(known, marks(table["sample_id"]))
        old = place >= 0
        seen[place[old]] = True
        new += int((~old).sum())
        changed = np.flatnonzero(old)[about[place[old]] != _about(table)[old]]
        if len(changed):
            raise ValueError(_change(plan, manifest, table.slice(int(changed[0]), 1)))
    if not seen.all():
        first = int(order[~seen].min())
        raise ValueError(
            f"{int((~seen).sum())} samples of this run are not in {manifest.path} any more"
            f" (the first is {_name(plan, first)!r}): give back the old manifest, or choose another --out"
        )
    return Gained(manifest, known, new)


def _places(known: NDArray[np.uint64], some: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The place of each mark among the sorted ones, -1 for one that is not there."""
    order = np.argsort(some)  # neighbours are searched after each other, which is quick in twenty million
    place = np.empty(len(some), np.int64)
    place[order] = np.searchsorted(known, some[order])
    place[place == len(known)] = 0
    return np.where(known[place] == some, place, -1) if len(known) else np.full(len(some), -1)


def _about(table: pa.Table) -> NDArray[np.uint64]:
    """A mark of everything that a plan knows of each sample but its id."""
    columns = [table[name].cast(pa.string()) for name in KEPT[1:]]
    return marks(pc.binary_join_element_wise(*columns, "\0", null_handling="replace", null_replacement="\0"))


def _change(plan: Plan, manifest: ManifestFile, row: pa.Table) -> str:
    (now,) = row.select(KEPT).to_pylist()
    same = (table.filter(pc.equal(table["sample_id"], now["sample_id"])) for table in plan.tables())
    was = next((found.select(KEPT).to_pylist()[0] for found in same if len(found)), {**now, "image": None})
    column = next(name for name in KEPT if was[name] != now[name])
    return (
        f"sample {now['sample_id']!r} of {manifest.path} has changed since this run was planned ({column} was"
        f" {was[column]!r}, now {now[column]!r}): give back the old manifest, or choose another --out"
    )


def _name(plan: Plan, place: int) -> str:
    """The id of a sample by its place in the plan."""
    for table in plan.tables():
        if place < len(table):
            return str(table["sample_id"][place].as_py())
        place -= len(table)
    raise IndexError(place)


# --- the file ---------------------------------------------------------------------------------------------------------


def _write(folder: Path, old: Iterable[pa.Table], new: Iterable[pa.Table], used: Counter[str], unit_size: int) -> Path:
    """Write a plan; it lies in a temporary folder until its checksum is known, which is its name."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, "plan.arrow")
        _cut(made, old, new, used, unit_size)
        with storage.reading(made) as file:
            path = folder / plan_name(file)
        storage.copy(made, path)
    return path


def _cut(path: Path, old: Iterable[pa.Table], new: Iterable[pa.Table], used: Counter[str], unit_size: int) -> None:
    """Copy old units, and cut new samples into units that begin behind the rows that are `used` by bucket."""
    waiting: dict[tuple[int, int], pa.Table] = {}
    next_row = {bucket: -(-rows // unit_size) * unit_size for bucket, rows in used.items()}
    schema = PLAN_SCHEMA.with_metadata({UNIT_SIZE: str(unit_size)})
    options = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
    with storage.writing(path) as file, pa.ipc.new_file(file, schema, options=options) as out:
        write = _in_batches(out)
        for table in old:
            write(table)
        for table in new:
            sizes = bucket_sizes(table)
            keys = sizes[0] << 32 | sizes[1]
            for key in np.unique(keys).tolist():
                bucket = key >> 32, key & 0xFFFFFFFF
                some = table.filter(pa.array(keys == key))
                some = pa.concat_tables([waiting.pop(bucket), some]) if bucket in waiting else some
                whole = len(some) // unit_size * unit_size
                if whole:
                    write(_numbered(bucket_of(*bucket), some.slice(0, whole), next_row, unit_size))
                if whole < len(some):
                    waiting[bucket] = some.take(np.arange(whole, len(some)))  # a copy, that holds no larger table
        for name, bucket in sorted((bucket_of(*bucket), bucket) for bucket in waiting):
            write(_numbered(name, waiting[bucket], next_row, unit_size))
        write(None)


def _numbered(bucket: str, samples: pa.Table, next_row: dict[str, int], unit_size: int) -> pa.Table:
    """Samples of one bucket with their rows, as a plan has them; the next ones begin a new shard."""
    first = next_row.get(bucket, 0)
    next_row[bucket] = first + -(-len(samples) // unit_size) * unit_size
    rows = pa.array(np.arange(first, first + len(samples)), pa.int64())
    return pa.table([rows, *(samples[name] for name in KEPT)], schema=PLAN_SCHEMA)


def _in_batches(out: pa.ipc.RecordBatchFileWriter) -> Callable[[pa.Table | None], None]:
    """Return a function that writes whole units, many in a batch; None writes those that still wait."""
    waiting: list[pa.Table] = []

    def write(units: pa.Table | None) -> None:
        if units is not None:
            waiting.append(units)
        if waiting and (units is None or sum(map(len, waiting)) >= ROWS_AT_ONCE):
            (batch,) = pa.concat_tables(waiting).replace_schema_metadata().combine_chunks().to_batches()
            out.write_batch(batch.cast(PLAN_SCHEMA))
            waiting.clear()

    return write
