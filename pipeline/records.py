"""Commit records: the only truth about finished work.

A unit is done when its record says so: a row for every sample, labelled or quarantined, with the digest of its shard
and of itself. It is written last, and never written over: manifests/run/ledger.py knows where the newest one lies.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, json_of
from autolabel.manifests.run.chapters import Totals
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.run.labels import LAYERS, in_layer, stored_labels
from autolabel.manifests.run.ledger import Commit, Ledger, create_record, read_newest
from autolabel.manifests.run.shards import DamagedLabel, WrittenShard, shard_path
from autolabel.manifests.tables import BadTable, OtherVersion, sealed_table, table_bytes
from autolabel.pipeline.rows import BRIEF, PLACE
from autolabel.pipeline.rows import LABELLED as LABELLED
from autolabel.pipeline.rows import QUARANTINED as QUARANTINED
from autolabel.pipeline.rows import RECORD_SCHEMA as RECORD_SCHEMA
from autolabel.pipeline.rows import Row as Row
from autolabel.pipeline.units import Tally, Unit

_SHARDS = b"shards"  # the key of a record's metadata that lists its shards
RecordWriter = Callable[[RunFolder, Unit, Sequence[Row], Mapping[str, WrittenShard], Commit | None], Commit]


@dataclass(frozen=True)
class Known:
    """The knowledge of a driver about a unit that it hands out, so that its worker lists nothing.

    commit: its newest record, None without one. careful: an earlier process has died at it, or may have. noted: there
    may be notes of earlier attempts.
    """

    commit: Commit | None = None
    careful: bool = False
    noted: bool = False


FRESH = Known()  # a unit at which nobody has been


def write_record(
    run: RunFolder, unit: Unit, rows: Sequence[Row], shards: Mapping[str, WrittenShard], before: Commit | None = None
) -> Commit:
    """Commit a unit behind the record `before`. Raises Overtaken if another writer has done so.

    shards: its shard of every layer, nothing where labels are PNGs or there are none.
    """
    return create_record(run.path, unit.name, record_bytes(rows, shards), before=before)


def record_bytes(rows: Sequence[Row], shards: Mapping[str, WrittenShard]) -> bytes:
    """The bytes of a record."""
    table = pa.Table.from_pylist([vars(row) for row in rows], schema=RECORD_SCHEMA)
    files = {name: {"bytes": s.bytes, "crc32c": s.crc32c} for name, s in shards.items()}
    metadata = {_SHARDS: json.dumps(files).encode()}
    return table_bytes(table.replace_schema_metadata(metadata))


def read_record(commit: Commit, columns: list[str] | None = None) -> tuple[pa.Table, dict[str, dict[str, Any]]]:
    """A unit's newest record, and by layer its shard's size and checksum. Raises BadTable unless it is as written."""
    commit, data = read_newest(commit)
    return parse_record(commit.path, data, columns)


def parse_record(
    path: Path, data: bytes, columns: list[str] | None = None
) -> tuple[pa.Table, dict[str, dict[str, Any]]]:
    """Take a record from the bytes that were read of a path, as `read_record`. Raises BadTable."""
    try:
        table = sealed_table(path, data, columns, schema=RECORD_SCHEMA)
        metadata = table.schema.metadata or {}
        shards = json_of(metadata.get(_SHARDS, b""), dict[str, dict[str, Any]], name="its list of shards")
    except OtherVersion:
        raise
    except (BadTable, BadDocument) as error:
        raise _damaged(path, str(error).removeprefix(f"{path} is ").removeprefix("damaged: ")) from error
    return table, shards


def read_unit(
    run: Run, unit: Unit, commit: Commit, columns: list[str] | None = None
) -> tuple[pa.Table, dict[str, dict[str, Any]]]:
    """The record of a unit as `read_record` gives it, with `columns` that hold those of `PLACE`, or all.

    A checksum is no signature: no place is taken from a record. Raises BadTable unless it lists samples of this unit,
    each once and of its size, with their labels where they belong, and shards of layers that the run has.
    """
    commit, data = read_newest(commit)
    path = commit.path
    table, shards = parse_record(path, data, columns)
    places = {sample.sample_id: number for number, sample in enumerate(unit.samples)}
    for row in table.select(PLACE).to_pylist():
        name = row["sample_id"]
        number = places.pop(name, None)
        if number is None:
            raise _damaged(path, f"sample {name!r} is not of this unit, or comes twice")
        if row["status"] not in (LABELLED, QUARANTINED):
            raise _damaged(path, f"sample {name!r} is neither labelled nor quarantined")
        if row["status"] == QUARANTINED:
            continue
        sample, (label, index) = unit.samples[number], unit.place(number, run.recipe.store)
        if (row["height"], row["width"]) != (sample.height, sample.width):
            raise _damaged(path, f"sample {name!r} has another size")
        if (row["label"], row["label_index"]) != (label, index):
            raise _damaged(path, f"the label of {name!r} lies elsewhere: at {row['label']!r}, {row['label_index']}")
    layers = run.zarr_layers() if run.recipe.store == "zarr" else {}
    if not shards.keys() <= layers.keys():
        raise _damaged(path, f"it names a layer {min(shards.keys() - layers.keys())!r}")
    return table, shards


def shard_file(run: Run, unit: Unit, layer: str) -> Path:
    """The shard of a unit in a layer. Raises ValueError for a link on the way."""
    file = shard_path(run.layer(layer) / unit.bucket, unit.first_row // run.recipe.unit_size)
    return storage.inside(run.path, file.relative_to(run.path).as_posix())


def read_rows(commit: Commit, columns: list[str] | None = None) -> list[Row]:
    """The rows of a unit's newest record, with all columns or some. Raises BadTable."""
    return [Row(**row) for row in read_record(commit, columns)[0].to_pylist()]


def all_rows(run: Path, columns: list[str] | None = None) -> Iterator[Row]:
    """The rows of all records of a run, with all columns or some. Raises BadTable."""
    for commit in Ledger(run).values():
        yield from read_rows(commit, columns)


def _damaged(path: Path, why: str) -> BadTable:
    return BadTable(
        f"{path} is damaged ({why}): `autolabel verify --repair` puts its unit back to undone, then generate again"
    )


def committed(
    run: Run, unit: Unit, commit: Commit | None, *, retry_quarantined: bool, trusted: bool = False
) -> dict[str, Row]:
    """The finished samples of a unit: their rows in brief, by sample id; nothing without a commit.

    Left out, so that they are done again: quarantined samples whose file has since been replaced, or all of them with
    `retry_quarantined`, and everything whose label file is gone. trusted: of a whole unit in a chapter, nothing but the
    files of quarantined samples is looked at.

    Raises ValueError if the image of a labelled sample has changed: its label belongs to another picture; BadTable.
    """
    if commit is None:
        return {}
    table, shards = read_unit(run, unit, commit, BRIEF)
    rows = [Row(**values) for values in table.to_pylist()]
    if not trusted and any(_differs(shard_file(run, unit, layer), shard["bytes"]) for layer, shard in shards.items()):
        # A writer died between a shard and its record. A unit that the record calls whole is not: it is made again.
        rows = _whole_in_store(run, rows) if len(rows) < len(unit.samples) else []
    done = []
    for row in rows:
        whole = trusted or shards or all(map(storage.exists, _files(run, row)))
        if whole if row.labelled else not retry_quarantined:
            done.append(row)
    images = {s.sample_id: s.image for s in unit.samples}
    changed = changed_images([(images[row.sample_id], row) for row in done if not (trusted and row.labelled)])
    for row in done:
        if row.labelled and row.sample_id in changed:
            image = images[row.sample_id]
            what = "has changed" if storage.stat(image) or image.exists() else "is gone"
            raise ValueError(
                f"image {image} {what} since it was labelled: put the old one back, or label into a new --out"
            )
    return {row.sample_id: row for row in done if row.sample_id not in changed}


def _differs(shard: Path, size: int) -> bool:
    there = storage.stat(shard)
    return there is None or there.size != size


def _whole_in_store(run: Run, rows: Sequence[Row]) -> list[Row]:
    """The rows whose maps can be read as they were committed."""
    whole = {row.sample_id: row for row in rows}
    for layer in LAYERS:
        for sample_id, stored in stored_labels(run.path, map(vars, rows), layer=layer).items():
            try:
                stored.read(sample_id, None)
            except DamagedLabel:
                whole.pop(sample_id, None)
    return list(whole.values())


def tally(rows: Iterable[Row]) -> Tally:
    """The sum of a unit's rows."""
    done = quarantined = pixels = 0
    kept: Counter[int] = Counter()
    for row in rows:
        done += 1
        if not row.labelled:
            quarantined += 1
            continue
        pixels += row.height * row.width
        for entry in row.classes or ():
            kept[entry["class_id"]] += entry["pixels"]
    return Tally(done, quarantined, pixels, kept)


def tally_of(totals: Totals) -> Tally:
    """Turn the counts of a chapter into those that a driver adds up."""
    return Tally(totals.done, totals.quarantined, totals.pixels, totals.kept)


def _files(run: RunFolder, row: Row) -> list[Path]:
    """The PNGs of a labelled sample."""
    return [storage.inside(run.path, in_layer(row.label or "", layer)) for layer in row.layers()]


# --- which image file it was ------------------------------------------------------------------------------------------


def identified(row: Row, image: Path) -> Row:
    """The row with the stat of the image file, None where there is no such file."""
    try:
        now = storage.stat(image)
    except OSError:
        return row
    return known_by(row, now) if now else row


def known_by(row: Row, now: storage.Stat) -> Row:
    """The row with this stat of its image file."""
    return replace(row, image_bytes=now.size, image_mtime_ns=now.mtime_ns, image_version=now.version)


def changed_images(images: Sequence[tuple[Path, Row]], *, read_all: bool = False) -> dict[str, str | None]:
    """The image files that differ from the ones in their rows: their fingerprints now by sample id, None if unreadable.

    A file with the same stat is surely the same. Any other one is read whole and compared by content, so a copied data
    set is recognised; `read_all` trusts no stat.
    """
    unsure = [(image, row) for image, row in images if read_all or not surely_same(image, row)]
    if not unsure:
        return {}
    with ThreadPoolExecutor(8) as pool:
        now = list(pool.map(fingerprint_of, (image for image, _ in unsure)))
    return {row.sample_id: mark for (_, row), mark in zip(unsure, now, strict=True) if mark != row.image_fingerprint}


def surely_same(image: Path, row: Row) -> bool:
    """True if the file has the stat that its row names: then it is the same, and need not be read."""
    try:
        now = storage.stat(image)
    except OSError:
        return False
    recorded = (row.image_bytes, row.image_mtime_ns, row.image_version)
    return row.image_fingerprint is not None and now is not None and tuple(now) == recorded


def fingerprint_of(image: Path) -> str | None:
    """The fingerprint of a file, None if it cannot be read."""
    try:
        return storage.fingerprint(image)
    except OSError:
        return None
