"""Read a run again and compare everything with what was committed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c

from autolabel.manifests.files import sha256
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.run.folder import RUN, About, Lock, read_about, write_about
from autolabel.manifests.run.labels import LABELS, RunLabels, stored_labels, zarr_folder
from autolabel.manifests.run.shards import DamagedLabel, create_zarr, damaged_metadata
from autolabel.manifests.samples import open_manifest
from autolabel.manifests.tables import BadTable
from autolabel.pipeline.publish import TABLES
from autolabel.pipeline.records import UNITS, Row, read_record
from autolabel.pipeline.run import zarr_layers
from autolabel.pipeline.units import Plan, Unit, gained, write_plan


@dataclass
class Verified:
    """What was read, what is wrong with it, and how many units `repair` has put back to undone."""

    units: int = 0
    samples: int = 0
    labels: int = 0
    undone: int = 0
    faults: list[str] = field(default_factory=list)


def verify(run: Path, repair: bool, on_unit: Callable[[int, int], None]) -> Verified:
    """Check plan, records, shards, labels and tables. With `repair`, exactly the damaged units are to be done again.

    Raises FileNotFoundError if this is no run, ValueError if it cannot be understood or somebody works on it.
    """
    about = read_about(run)
    found = Verified()
    with Lock(run, None).held():
        plan = _plan(run, about, repair, found)
        if plan is None:
            return found
        found.faults += _damaged_tables(run, about)
        if about["store"] == "zarr":
            for layer, attributes in zarr_layers(about).items():
                metadata = (run / zarr_folder(layer), plan.rows(), about["unit_size"], attributes)
                damaged = damaged_metadata(*metadata)
                found.faults += [f"{path} differs from what was written" for path in damaged]
                if damaged and repair:
                    create_zarr(*metadata)
        space = LabelSpace.of(about["label_space"])
        undone = []
        records = {path.name for path in (run / UNITS).glob("*.parquet")}
        for number, unit in enumerate(plan, start=1):
            if unit.record in records:
                records.discard(unit.record)
                found.units += 1
                faults = list(_faults(run, unit, zarr_layers(about), space, found))
                found.faults += faults
                undone += [unit.record] if faults else []
            on_unit(number, len(plan))
        found.faults += [f"{run / UNITS / name} belongs to no unit of the plan" for name in sorted(records)]
        accounts = about["accounts"]
        if accounts and not undone and found.samples != accounts["labelled"] + accounts["quarantined"]:
            found.faults.append(
                f"{run / UNITS} holds {found.samples} samples, {RUN} accounts for others: a record is gone"
            )
        if repair and found.faults:
            for name in (*undone, *records):
                (run / UNITS / name).unlink()
            found.undone = len(undone)
            write_about(run, {**about, "plan": plan.path.name, "state": "partial", "accounts": None, "tables": None})
    return found


def _plan(run: Path, about: About, repair: bool, found: Verified) -> Plan | None:
    """The plan, compared with the manifest where that is still the same; `repair` makes it again from there."""
    path, size = Path(about["manifest"]), about["unit_size"]
    unchanged = path.is_file() and sha256(path) == about["manifest_sha256"]
    manifest = open_manifest(path) if unchanged else None
    roots = (manifest.image_root, manifest.label_root) if manifest else (Path(), Path())
    try:
        plan = Plan(run / about["plan"], size, *roots)
        if manifest and gained(plan, manifest):
            raise BadTable(f"{plan.path} lacks samples of {path}")
        return plan
    except ValueError as error:
        found.faults.append(str(error))
    if manifest is None or not repair:
        return None
    return Plan(write_plan(run, manifest, size), size, *roots)


def _damaged_tables(run: Path, about: About) -> list[str]:
    """Published tables that are not what was published; the next generate writes them again."""
    digests: dict[str, str] = about["tables"] or {}
    return [
        f"{run / name} differs from what was published"
        for name in TABLES
        if name in digests and not ((run / name).is_file() and sha256(run / name) == digests[name])
    ]


def _faults(run: Path, unit: Unit, layers: Iterable[str], space: LabelSpace, found: Verified) -> Iterator[str]:
    path = run / UNITS / unit.record
    try:
        record, shards = read_record(path)
    except BadTable as error:
        yield str(error)
        return
    rows = record.to_pylist()
    found.samples += len(rows)
    places = {s.sample_id: unit.first_row + k for k, s in enumerate(unit.samples)}
    if len({row["sample_id"] for row in rows}) < len(rows) or not all(_in_place(row, places) for row in rows):
        yield f"{path} lists other samples than its unit, or in other places"
        return
    for layer, shard in shards.items():
        file = run / zarr_folder(layer) / unit.bucket / shard["file"]
        if not file.is_file():
            yield f"{file} is missing"
            return
        data = file.read_bytes()
        if len(data) != shard["bytes"] or google_crc32c.value(data) != shard["crc32c"]:
            yield f"{file} differs from what was committed"
            return
    for layer in layers:
        maps = RunLabels(stored_labels(run, rows, layer), space if layer == LABELS else None)
        found.labels += len(maps) if layer == LABELS else 0
        for name in maps:
            try:
                maps[name]
            except DamagedLabel as error:
                yield str(error)


def _in_place(row: Row, places: dict[str, int]) -> bool:
    return row["sample_id"] in places and row["label_index"] in (None, places[row["sample_id"]])
