"""Read a run again and compare everything with what was committed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from autolabel.manifests import storage
from autolabel.manifests.run.folder import PREPARING, Run
from autolabel.manifests.run.labels import LABELS, RunLabels, stored_labels
from autolabel.manifests.run.shards import DamagedLabel, create_zarr, damaged_metadata
from autolabel.manifests.samples import open_manifest
from autolabel.manifests.tables import BadTable
from autolabel.manifests.wording import Progress, Shown, counted
from autolabel.pipeline.adopted import Adopted
from autolabel.pipeline.lock import Lock
from autolabel.pipeline.records import Row, changed_images, read_unit, shard_file
from autolabel.pipeline.units import Plan, Unit, gained, write_plan


@dataclass
class Verification(Shown):
    """The numbers of things that were read, the faults, and the units that a repair put back.

    gone: labelled images that are not where the manifest says, or cannot be read. Their labels are as good as before,
    so that is no fault. unread: the reason if no image could be compared.
    """

    units: int = 0
    samples: int = 0
    labels: int = 0
    images: int = 0
    gone: list[Path] = field(default_factory=list)
    unread: str = ""
    undone: int = 0
    faults: list[str] = field(default_factory=list)
    repaired: bool = False

    def lines(self) -> list[str]:
        """The findings in words."""
        lines = [f"damaged: {fault}" for fault in self.faults]
        if self.gone:
            lines.append(f"gone, so not compared: {counted(len(self.gone), 'image')} (the first is {self.gone[0]})")
        if self.unread:
            lines.append(f"no image was compared: {self.unread}")
        lines.append(
            f"labels read: {self.labels}, images: {self.images}, units: {self.units}, faults: {len(self.faults)}"
        )
        if self.repaired:
            again = "run the same command again to label them"
            lines.append(f"units put back to undone: {self.undone}; {again}")
        return lines


def verify(path: Path, *, repair: bool = False, progress: Progress | None = None) -> Verification:
    """Check plan, records, shards, labels, tables and images. With `repair`, the damaged units are to be done again.

    Every file is read whole. A unit is damaged too if one of its images is another one than was labelled. `progress`
    counts units. Raises FileNotFoundError if this is no run, ValueError if it cannot be understood or
    somebody works on it.
    """
    run, result = Run.open(path), Verification()
    if run.state == PREPARING and not repair:
        raise ValueError(f"{path} is not whole yet: its command was stopped at once; run the same again, then verify")
    with Lock(path, None, only_read=not repair).held():
        plan = _plan(run, result, repair=repair)
        if plan is None:
            return result
        result.faults += _damaged_tables(run)
        if run.recipe.store == "zarr":
            for layer, attributes in run.zarr_layers().items():
                group, arrays, size = run.layer(layer), plan.rows(), run.recipe.unit_size
                damaged = damaged_metadata(group, arrays, shard_rows=size, attributes=attributes)
                result.faults += [f"{file} differs from what was written" for file in damaged]
                if damaged and repair:
                    create_zarr(group, arrays, shard_rows=size, attributes=attributes)
        undone = []
        adopted = _adopted(run, result)
        records = {file.name for file in storage.list(run.units, suffix=".parquet")}
        for number, unit in enumerate(plan, start=1):
            if unit.record in records:
                records.discard(unit.record)
                result.units += 1
                faults = list(_faults(run, unit, result, adopted))
                result.faults += faults
                undone += [unit.record] if faults else []
            if progress:
                progress(number, len(plan))
        result.faults += [f"{run.units / name} belongs to no unit of the plan" for name in sorted(records)]
        accounts = run.accounts
        if accounts and not undone and result.samples != accounts.labelled + accounts.quarantined:
            result.faults.append(
                f"{run.units} holds {counted(result.samples, 'sample')}, {run.record.name} accounts for others:"
                " a record is gone"
            )
        if repair and result.faults:
            for name in (*undone, *records):
                storage.remove(run.units / name)
            result.undone, result.repaired = len(undone), True
            replace(run, plan=plan.path.name, state="partial", accounts=None, tables_sha256=None).save()
    return result


def _plan(run: Run, result: Verification, *, repair: bool) -> Plan | None:
    """The plan, compared with the manifest if that is still the same; `repair` makes it again from there."""
    unchanged = storage.exists(run.input_manifest) and storage.sha256(run.input_manifest) == run.input_sha256
    manifest = open_manifest(run.input_manifest) if unchanged else None
    roots = (manifest.image_root, manifest.label_root) if manifest else (Path(), Path())
    if manifest is None:
        result.unread = f"{run.input_manifest}, which says where they are, is gone or has changed"
    try:
        plan = Plan(run.plan_path, run.recipe.unit_size, *roots)
        if manifest and gained(plan, manifest):
            raise BadTable(f"{plan.path} lacks samples of {run.input_manifest}")
        return plan
    except ValueError as error:
        result.faults.append(str(error))
    if manifest is None or not repair:
        return None
    return Plan(write_plan(run.path, manifest, run.recipe.unit_size), run.recipe.unit_size, *roots)


def _damaged_tables(run: Run) -> list[str]:
    """Published tables that are not what was published; the next generate writes them again."""
    digests = run.tables_sha256 or {}
    return [
        f"{path} differs from what was published"
        for name, path in run.table_paths().items()
        if name in digests and (storage.stat(path) is None or storage.sha256(path) != digests[name])
    ]


def _adopted(run: Run, result: Verification) -> Adopted | None:
    """The PNGs that the labels were adopted from, if they were; a table of them that is damaged is a fault."""
    if run.teacher is not None or run.source is not None:
        return None
    try:
        return Adopted.of(run)
    except BadTable as error:
        result.faults.append(str(error))
        return None


def _faults(run: Run, unit: Unit, result: Verification, adopted: Adopted | None) -> Iterator[str]:
    path = run.units / unit.record
    try:
        yield from _differences(run, unit, result, adopted)
    except BadTable as error:
        yield str(error)
    except ValueError as error:  # a link in the folder
        yield f"{path}: {error}"


def _differences(run: Run, unit: Unit, result: Verification, adopted: Adopted | None) -> Iterator[str]:
    record, shards = read_unit(run, unit)
    rows = [Row(**row) for row in record.to_pylist()]
    result.samples += len(rows)
    for layer, shard in shards.items():
        file = shard_file(run, unit, layer)
        status = storage.stat(file)
        if status is None:
            yield f"{file} is missing"
            return
        if status.size != shard["bytes"] or storage.crc32c(file) != f"{shard['crc32c']:08x}":
            yield f"{file} differs from what was committed"
            return
    if not result.unread:
        yield from _changed_images(unit, rows, result)
    if adopted is not None:
        yield from _changed_pngs(adopted, rows, result)
    for layer in run.zarr_layers():
        maps = RunLabels(
            stored_labels(run.path, map(vars, rows), layer=layer), run.label_space if layer == LABELS else None
        )
        result.labels += len(maps) if layer == LABELS else 0
        for name in maps:
            try:
                maps[name]
            except DamagedLabel as error:
                yield str(error)


def _changed_pngs(adopted: Adopted, rows: list[Row], result: Verification) -> Iterator[str]:
    """Every PNG behind a label that is another one now, by content."""
    for path, there in adopted.changed([row.sample_id for row in rows if row.labelled], read_all=True).items():
        if there:
            yield f"{path} has changed since it was adopted"
        else:
            result.gone.append(path)


def _changed_images(unit: Unit, rows: list[Row], result: Verification) -> Iterator[str]:
    """Every labelled image that is another one now, by content."""
    paths = {s.sample_id: s.image for s in unit.samples}
    labelled = [(paths[row.sample_id], row) for row in rows if row.labelled and row.image_fingerprint]
    changed = changed_images(labelled, read_all=True)
    result.images += len(labelled) - sum(mark is None for mark in changed.values())
    for name, mark in changed.items():
        if mark is None:
            result.gone.append(paths[name])
        else:
            yield f"image {paths[name]} has changed since it was labelled"
