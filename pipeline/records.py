"""Commit records: the only truth about what is done.

A unit is done when `units/NAME.parquet` says so: a row for every sample, labelled or quarantined, with the digest of
its shard and of itself. It is written last. While a unit is under way, `attempts/NAME.jsonl` tells who is at it:
if that process dies, the next one works carefully, and an image that keeps killing its process is found.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq

from autolabel.manifests.files import fingerprint, write_bytes
from autolabel.manifests.run.labels import CONFIDENCE, LABELS, TOP, in_layer, zarr_folder
from autolabel.manifests.run.shards import WrittenShard
from autolabel.manifests.schemas import CENTROIDS_SCHEMA, CLASSES_SCHEMA, IMAGES_SCHEMA
from autolabel.manifests.tables import BadTable
from autolabel.pipeline.units import Tally, Unit

LABELLED, QUARANTINED = "labelled", "quarantined"
UNITS = "units"  # folder of the records in a run
ATTEMPTS = "attempts"  # folder of the notes about units under way
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
        pa.field("top_crc32c", pa.uint32()),  # of the teacher's top class and level of confidence, where they are kept
        pa.field("confidence_crc32c", pa.uint32()),
        pa.field("image_bytes", pa.int64()),
        pa.field("image_mtime_ns", pa.int64()),
        pa.field("image_fingerprint", pa.string()),
        pa.field("classes", _nested(CLASSES_SCHEMA)),
        pa.field("centroids", _nested(CENTROIDS_SCHEMA)),
    ]
)
# What tells whether a sample is done, and what was kept of it; a small part of a record.
_BRIEF = ["sample_id", "status", "height", "width", "label", "label_index", "image_bytes", "image_mtime_ns"]
_BRIEF += [
    "top_crc32c",
    "confidence_crc32c",
    "image_fingerprint",
    "classes.list.element.class_id",
    "classes.list.element.pixels",
]

Row = dict[str, Any]


def write_record(run: Path, unit: Unit, rows: Sequence[Row], shards: Mapping[str, WrittenShard]) -> None:
    """Commit a unit. `shards` has its shard of every layer, nothing where labels are PNGs or there are none."""
    table = pa.Table.from_pylist(list(rows), schema=RECORD_SCHEMA)
    about = {name: {"file": s.file, "bytes": s.bytes, "crc32c": s.crc32c} for name, s in shards.items()}
    file = io.BytesIO()
    metadata = {b"shards": json.dumps(about).encode(), b"seal": _OPEN}
    pq.write_table(table.replace_schema_metadata(metadata), file, compression="zstd")
    data = file.getvalue()
    write_bytes(run / UNITS / unit.record, data.replace(_OPEN, _seal(data)))


# In the footer of a record; its digits become the checksum that the file has while they are zeros.
_OPEN = b"crc32c of this file: 00000000"
_SEAL = re.compile(rb"crc32c of this file: [0-9a-f]{8}")


def _seal(data: bytes) -> bytes:
    return b"crc32c of this file: %08x" % google_crc32c.value(_SEAL.sub(_OPEN, data))


def read_record(path: Path, columns: list[str] | None = None) -> tuple[pa.Table, dict[str, dict[str, Any]]]:
    """A commit record, and by layer its shard's file, size and checksum. Raises BadTable unless it is as written."""
    try:
        data = path.read_bytes()
        if _SEAL.findall(data) != [_seal(data)]:
            raise _damaged(path, "its checksum is another")
        file = pq.ParquetFile(pa.BufferReader(data))
        metadata = file.schema_arrow.metadata or {}
        if not file.schema_arrow.equals(RECORD_SCHEMA):
            raise BadTable(f"{path} is not a unit record of this version: start a new run folder")
        return file.read(columns), json.loads(metadata[b"shards"])
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, type(error).__name__) from error


def _damaged(path: Path, why: str) -> BadTable:
    return BadTable(
        f"{path} is damaged ({why}): `autolabel verify --repair` puts its unit back to undone, then generate again"
    )


def committed(run: Path, unit: Unit, retry_quarantined: bool) -> dict[str, Row]:
    """What is done of a unit: its rows, in brief, by sample id.

    Left out, so that they are done again: quarantined samples whose file has since been replaced, or all of them with
    `retry_quarantined`, and everything whose label file is gone.

    Raises ValueError if the image of a labelled sample has changed: its label belongs to another picture; BadTable.
    """
    path = run / UNITS / unit.record
    if not path.is_file():
        return {}
    table, shards = read_record(path, _BRIEF)
    for layer, shard in shards.items():
        if not _has_size(run / zarr_folder(layer) / unit.bucket / shard["file"], shard["bytes"]):
            return {}
    images = {s.sample_id: s.image for s in unit.samples}
    kept: dict[str, Row] = {}
    for row in table.to_pylist():
        image = images.get(row["sample_id"])
        if image is None:
            raise _damaged(path, f"sample {row['sample_id']!r} is not of this unit")
        if row["status"] == LABELLED and not shards and not all(map(Path.is_file, _files(run, row))):
            continue
        if row["status"] == QUARANTINED and retry_quarantined:
            continue
        if not _changed(image, row):
            kept[row["sample_id"]] = row
        elif row["status"] == LABELLED:
            raise ValueError(
                f"image {image} has changed since it was labelled: put the old one back, or label into a new --out"
            )
    return kept


def tally(rows: Iterable[Row]) -> Tally:
    """The sum of a unit's rows."""
    done = quarantined = pixels = 0
    kept: Counter[int] = Counter()
    for row in rows:
        done += 1
        if row["status"] == QUARANTINED:
            quarantined += 1
            continue
        pixels += row["height"] * row["width"]
        for entry in row["classes"]:
            kept[entry["class_id"]] += entry["pixels"]
    return Tally(done, quarantined, pixels, kept)


def _files(run: Path, row: Row) -> list[Path]:
    """The PNGs of a labelled sample."""
    layers = [LABELS] + [layer for layer in (TOP, CONFIDENCE) if row[f"{layer}_crc32c"] is not None]
    return [run / in_layer(row["label"], layer) for layer in layers]


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _changed(image: Path, row: Row) -> bool:
    """Whether an image file differs from the one recorded; its content is read only if size or time differ."""
    known = row["image_fingerprint"]
    with contextlib.suppress(OSError):
        now = image.stat()
        if known is not None and (now.st_size, now.st_mtime_ns) == (row["image_bytes"], row["image_mtime_ns"]):
            return False
    return bool(fingerprint_of(image) != known)


def fingerprint_of(image: Path) -> str | None:
    """`fingerprint` of a regular file that can be read, else None; to open a pipe would wait for its writer."""
    try:
        return fingerprint(image) if stat.S_ISREG(image.stat().st_mode) else None
    except OSError:
        return None


def note_of(run: Path, unit: Unit) -> Path:
    """Where the attempts at a unit are noted."""
    return run / ATTEMPTS / f"{unit.name}.jsonl"


def excuse(path: Path) -> None:
    """Whoever began last at a unit is gone, but not for an image's sake: its machine was lost, or its driver."""
    with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
        last = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])["attempt"]
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"attempt": last, "ended": True}) + "\n")


class Attempt:
    """One process at one unit, noted so that its death leaves a trace. Lines are not forced to disk: they must outlive
    a process, not a power cut.

    deaths: how often an earlier process died while it was at a sample, by sample id.
    careful: some earlier process died at this unit, so every sample is noted before it is touched.
    """

    def __init__(self, run: Path, unit: Unit) -> None:
        self.path = note_of(run, unit)
        self._tag = uuid4().hex[:12]
        last: dict[str, str | None] = {}  # by attempt that was not ended in order: the sample it was at
        for line in self._lines():
            if line.get("ended"):
                last.pop(line["attempt"], None)
            else:
                last[line["attempt"]] = line.get("sample")
        self.careful = bool(last)
        self.deaths = Counter(sample for sample in last.values() if sample is not None)
        self._note({})

    def _lines(self) -> Iterable[dict[str, Any]]:
        try:
            written = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return
        for line in written:
            try:
                yield json.loads(line)
            except ValueError:  # a process died in the middle of writing it
                continue

    def _note(self, what: dict[str, Any]) -> None:
        self.path.parent.mkdir(exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"attempt": self._tag, **what}) + "\n")

    def begin(self, sample_id: str) -> None:
        """This sample is next."""
        self._note({"sample": sample_id})

    def end(self, committed: bool) -> None:
        """No death: the unit is whole, or was left in order."""
        if committed:
            self.path.unlink(missing_ok=True)
        else:
            self._note({"ended": True})
