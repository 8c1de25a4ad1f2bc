"""The work, cut into units, and the record of which are done.

A unit is the samples of one shard. Which sample goes where depends on the manifest and the shard size alone: samples
are ordered by size bucket and sample id, and every 64 of a bucket make a unit, whoever labels them and when. A unit is
done when its record `units/NAME.parquet` says so: a row for every sample, labelled or quarantined, written last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from autolabel.manifests.files import fingerprint
from autolabel.manifests.stores import ZARR, WrittenShard, bucket_of
from autolabel.manifests.tables import (
    CENTROIDS_SCHEMA,
    CLASSES_SCHEMA,
    IMAGES_SCHEMA,
    BadTable,
    Sample,
    write_table,
)

LABELLED, QUARANTINED = "labelled", "quarantined"
UNITS = "units"  # folder of the records in a run
_OWN = ("sample_id",)  # nested rows leave out what the outer row says


def _nested(schema: pa.Schema) -> pa.DataType:
    return pa.list_(pa.struct([f for f in schema if f.name not in _OWN]))


# One row per sample: what the statistics tables hold of it, where its label lies, and which image file it was.
RECORD_SCHEMA = pa.schema(
    [
        *IMAGES_SCHEMA,
        pa.field("status", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("label", pa.string()),  # path in the run folder: an array of the Zarr group, or a PNG
        pa.field("label_index", pa.int64()),
        pa.field("image_bytes", pa.int64()),
        pa.field("image_mtime_ns", pa.int64()),
        pa.field("image_fingerprint", pa.string()),
        pa.field("classes", _nested(CLASSES_SCHEMA)),
        pa.field("centroids", _nested(CENTROIDS_SCHEMA)),
    ]
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """Samples that fill one shard: rows first_row, first_row + 1, … of their bucket's array."""

    name: str
    bucket: str
    first_row: int
    samples: tuple[Sample, ...]

    @property
    def record(self) -> str:
        """File name of the commit record."""
        return f"{self.name}.parquet"


def plan_units(samples: Iterable[Sample], shard_size: int) -> list[Unit]:
    """Cut samples into units. Samples whose header was unreadable (0 x 0) share a bucket that is never written."""
    buckets: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda s: s.sample_id):
        buckets.setdefault(bucket_of(sample.height, sample.width), []).append(sample)
    return [
        Unit(f"{bucket}.{first // shard_size:06d}", bucket, first, tuple(members[first : first + shard_size]))
        for bucket, members in sorted(buckets.items())
        for first in range(0, len(members), shard_size)
    ]


def bucket_rows(units: Iterable[Unit]) -> dict[str, int]:
    """Rows of every bucket's array."""
    rows: dict[str, int] = {}
    for unit in units:
        if unit.samples[0].readable:
            rows[unit.bucket] = unit.first_row + len(unit.samples)
    return rows


def plan_digest(units: Sequence[Unit], image_root: Path) -> str:
    """Hex digest of which samples are asked for and in which order: sample ids, image paths under the root, sizes."""
    listed = [
        [unit.name, s.sample_id, s.image.relative_to(image_root).as_posix(), s.height, s.width]
        for unit in units
        for s in unit.samples
    ]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def write_record(run: Path, unit: Unit, rows: Sequence[Row], shard: WrittenShard | None) -> None:
    """Commit a unit. The shard's file, size and checksum go into the metadata; None for a unit without one."""
    table = pa.Table.from_pylist(list(rows), schema=RECORD_SCHEMA)
    about = {"file": shard.file, "bytes": shard.bytes, "crc32c": shard.crc32c} if shard else None
    write_table(run / UNITS / unit.record, table.replace_schema_metadata({b"shard": json.dumps(about).encode()}))


def read_record(path: Path) -> tuple[list[Row], dict[str, Any] | None]:
    """The rows of a commit record, and its shard's file, size and checksum. Raises BadTable if it cannot be read."""
    try:
        table = pq.read_table(path)
        if not table.schema.equals(RECORD_SCHEMA):
            raise BadTable(f"{path} is not a unit record of this version: start a new run folder")
        return table.to_pylist(), json.loads((table.schema.metadata or {}).get(b"shard", b"null"))
    except (pa.ArrowException, OSError) as error:
        raise BadTable(f"{path} is damaged ({type(error).__name__}): delete it to label its unit again") from error


def committed_rows(run: Path, unit: Unit) -> dict[str, Row]:
    """What is done of a unit: its committed rows by sample id.

    Left out, so that they are done again: quarantined samples whose file has since been replaced, and everything whose
    label file is gone. Raises ValueError if the image of a labelled sample has changed: its label belongs to another
    picture.
    """
    path = run / UNITS / unit.record
    if not path.is_file():
        return {}
    rows, shard = read_record(path)
    if shard is not None and not _has_size(run / ZARR / unit.bucket / shard["file"], shard["bytes"]):
        return {}
    images = {s.sample_id: s.image for s in unit.samples}
    kept: dict[str, Row] = {}
    for row in rows:
        image = images[row["sample_id"]]
        if row["status"] == LABELLED and row["label_index"] is None and not (run / row["label"]).is_file():
            continue
        if not _changed(image, row):
            kept[row["sample_id"]] = row
        elif row["status"] == LABELLED:
            raise ValueError(
                f"image {image} has changed since it was labelled: put the old one back, or label into a new --out"
            )
    return kept


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _changed(image: Path, row: Row) -> bool:
    """Whether an image file differs from the one recorded; its content is read only if size or time differ."""
    try:
        now = image.stat()
    except OSError:
        return row["image_fingerprint"] is not None
    if (now.st_size, now.st_mtime_ns) == (row["image_bytes"], row["image_mtime_ns"]):
        return False
    return bool(fingerprint(image) != row["image_fingerprint"])
