"""Read a run again and compare everything with what was committed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from autolabel.manifests import storage
from autolabel.manifests.run.folder import PREPARING, Run
from autolabel.manifests.run.labels import LABELS, ChangedLabel, stored_labels
from autolabel.manifests.run.ledger import Commit, Ledger
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.run.shards import DamagedLabel, crc32c, create_zarr, damaged_metadata
from autolabel.manifests.samples import open_manifest
from autolabel.manifests.schemas import EXACT
from autolabel.manifests.tables import BadTable, parts_of, table_sha256
from autolabel.manifests.wording import Progress, Shown, counted
from autolabel.pipeline.adopted import Adopted
from autolabel.pipeline.by_hand import edited_label, is_whole_picture, set_aside
from autolabel.pipeline.cutting import gained, write_plan
from autolabel.pipeline.lock import Lock
from autolabel.pipeline.records import Row, changed_images, read_unit, shard_file, write_record
from autolabel.pipeline.units import Plan, Unit


@dataclass
class Verification(Shown):
    """The numbers of things that were read, the faults, and the units that a repair put back.

    gone: labelled images that are not where the manifest says, or cannot be read. Their labels are as good as before,
    so that is no fault. unread: the reason if no image could be compared. changed: label PNGs that people have changed
    in place, by sample id; foreign: whole pictures in the place of a label that are none of this run. Both are no
    damage, and no repair replaces them. kept: a sentence about labels that were set aside. advice: one line that says
    what to do, empty if nothing is wrong or it was repaired.
    """

    units: int = 0
    samples: int = 0
    labels: int = 0
    images: int = 0
    gone: list[Path] = field(default_factory=list)
    unread: str = ""
    undone: int = 0
    faults: list[str] = field(default_factory=list)
    changed: dict[str, Path] = field(default_factory=dict)
    foreign: dict[str, Path] = field(default_factory=dict)
    kept: str = ""
    repaired: bool = False
    advice: str = ""

    def lines(self) -> list[str]:
        """The findings in words."""
        lines = [f"damaged: {fault}" for fault in self.faults]
        lines += [f"changed by hand: {path}" for path in self.changed.values()]
        lines += [f"put there by another program, and no label of this run: {path}" for path in self.foreign.values()]
        lines += [self.kept] if self.kept else []
        if self.gone:
            lines.append(f"gone, so not compared: {counted(len(self.gone), 'image')} (the first is {self.gone[0]})")
        if self.unread:
            lines.append(f"no image was compared: {self.unread}")
        lines.append(
            f"labels read: {self.labels}, images: {self.images}, units: {self.units}, faults: {len(self.faults)}"
            + (f", changed by hand: {len(self.changed) + len(self.foreign)}" if self.changed or self.foreign else "")
        )
        if self.repaired:
            again = "run the same command again to label them"
            lines.append(f"units put back to undone: {self.undone}; {again}")
        return lines


def verify(
    path: Path, *, repair: bool = False, imported: Sequence[Path] = (), progress: Progress | None = None
) -> Verification:
    """Check plan, records, shards, labels, tables and images. With `repair`, the damaged units are to be done again.

    Every file is read whole. A unit is damaged too if one of its images is another one than was labelled. Nothing is
    repaired while label PNGs are there that people have changed, unless the manifests `imported` hold the same labels:
    then their units are to be done again too. `progress` counts units. Raises FileNotFoundError if this is no run,
    ValueError if it cannot be understood or somebody works on it.
    """
    run, result = Run.open(path), Verification()
    if run.state == PREPARING and not repair:
        raise ValueError(f"{path} is not whole yet: its command was stopped at once; run the same again, then verify")
    with Lock(path, None, only_read=not repair).held() as lock:
        plan = _plan(run, result, repair=repair)
        if plan is None:
            again = "`, then the same generate again" if not repair else f"` needs {run.input_manifest}: put it back"
            result.advice = f"{path} is damaged: `autolabel verify {path} --repair{again}"
            return result
        result.faults += _damaged_tables(run)
        if run.recipe.store == "zarr":
            for layer, attributes in run.zarr_layers().items():
                group, arrays, size = run.layer(layer), plan.rows(), run.recipe.unit_size
                damaged = damaged_metadata(group, arrays, shard_rows=size, attributes=attributes)
                result.faults += [f"{file} differs from what was written" for file in damaged]
                if damaged and repair:
                    create_zarr(group, arrays, shard_rows=size, attributes=attributes)
        undone, obsolete = list[tuple[Unit, Commit]](), list[Path]()
        adopted = _adopted(run, result)
        ledger = Ledger(run.path, only_whole=False)
        result.faults += map(str, ledger.damaged.values())
        strays = {commit.unit: commit.path for commit in ledger.values()}
        for number, unit in enumerate(plan, start=1):
            commit = ledger.get(unit.name)
            if commit is not None:
                del strays[unit.name]
                result.units += 1
                own, peoples = list[Path](), len(result.changed)
                faults = list(_faults(run, unit, commit, result, adopted, own))
                result.faults += faults
                if faults or len(result.changed) > peoples:
                    undone.append((unit, commit))
                    obsolete += own
            if progress:
                progress(number, len(plan))
        foreign = sorted([*strays.values(), *ledger.strays])
        result.faults += [f"{path} belongs to no unit of the plan" for path in foreign]
        accounts = run.accounts
        if accounts and not undone and result.samples != accounts.labelled + accounts.quarantined:
            result.faults.append(
                f"{run.units} holds {counted(result.samples, 'sample')}, {run.record.name} accounts for others:"
                " a record is gone"
            )
        result.kept = set_aside(run)
        result.advice = _advice(run, result, imported) if repair else _advice(run, result)
        if repair and not result.advice and (result.faults or result.changed):
            for file in (*obsolete, *result.changed.values()):  # before its record: a unit that lacks a label is undone
                storage.remove(file)
            for unit, commit in undone:
                write_record(run, unit, (), {}, commit)  # a newer record, without a sample
            for path in (*foreign, *ledger.damaged):
                storage.remove(path)
            result.undone, result.repaired = len(undone), True
            reset = replace(run, plan=plan.path.name, state="partial", accounts=None, tables_sha256=None)
            lock.update(reset, last=True)
    return result


def _advice(run: Run, result: Verification, imported: Sequence[Path] | None = None) -> str:
    """One line about the next step; of a repair, given what was `imported`, the reason to refuse it, or nothing."""
    repair = f"autolabel verify {run.path} --repair"
    if result.foreign:
        first, count = next(iter(result.foreign.values())), counted(len(result.foreign), "picture")
        return (
            f"{count} of another program in {run.path} (the first is {first}): move it out of the run, then `{repair}`"
        )
    missing = _not_held(run, result.changed, imported or ())
    if missing:
        lacking = f", not in {', '.join(map(str, imported))} as they are now" if imported else ""
        return (
            f"{counted(len(missing), 'label')} of {run.path} changed by hand (the first is {missing[0]}){lacking}:"
            f" `autolabel import png {run.path / LABELS} --run {run.path} -o fixed.parquet`, then"
            f" `{repair} --imported fixed.parquet`"
        )
    if imported is None and result.faults:
        return f"{run.path} is damaged: `{repair}`, then the same generate again"
    return ""


def _not_held(run: Run, changed: Mapping[str, Path], imported: Sequence[Path]) -> list[Path]:
    """The labels changed by hand that no manifest `imported` holds as they are now, outside of the run."""
    missing = dict(changed)
    for path in imported:
        manifest = open_manifest(path)
        if manifest.label_space != run.label_space:
            raise ValueError(
                f"{path} uses label space {manifest.label_space.name!r}, {run.path} {run.label_space.name!r}"
            )
        for sample in manifest.samples():
            file = missing.get(sample.sample_id)
            if file is None or sample.label is None or sample.source not in EXACT:
                continue
            if sample.label.resolve().is_relative_to(run.path.resolve()):
                continue
            now = edited_label(storage.read(file), run.label_space, (sample.height, sample.width))
            if now is not None and np.array_equal(read_sample_label(sample, run.label_space), now):
                del missing[sample.sample_id]
    return list(missing.values())


def _plan(run: Run, result: Verification, *, repair: bool) -> Plan | None:
    """The plan, compared with the manifest if that is still the same; `repair` makes it again from there."""
    unchanged = parts_of(run.input_manifest) and table_sha256(run.input_manifest) == run.input_sha256
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
        if name in digests and (not parts_of(path) or table_sha256(path) != digests[name])
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


def _faults(
    run: Run, unit: Unit, commit: Commit, result: Verification, adopted: Adopted | None, own: list[Path]
) -> Iterator[str]:
    try:
        yield from _differences(run, unit, commit, result, adopted, own)
    except BadTable as error:
        yield str(error)
    except ValueError as error:  # a link in the folder
        yield f"{commit.path}: {error}"


def _differences(
    run: Run, unit: Unit, commit: Commit, result: Verification, adopted: Adopted | None, own: list[Path]
) -> Iterator[str]:
    """Every difference in words; `own` gains the label PNGs that are as committed."""
    record, shards = read_unit(run, unit, commit)
    rows = [Row(**row) for row in record.to_pylist()]
    result.samples += len(rows)
    result.units -= not rows  # a repair has put it back to undone
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
        maps, space = stored_labels(run.path, map(vars, rows), layer=layer), run.label_space
        result.labels += len(maps) if layer == LABELS else 0
        for name, stored in maps.items():
            png = stored.path if layer == LABELS and stored.index is None else None
            try:
                stored.read(name, space if layer == LABELS else None)
                own += [png] if png else []
            except ChangedLabel:
                result.changed[name] = stored.path
            except DamagedLabel as error:
                data = storage.read(png) if png and storage.stat(png) else b""
                if png is None or not is_whole_picture(data):
                    yield str(error)
                    continue
                label = edited_label(data, space, (stored.height, stored.width))
                if label is not None and crc32c(label) == stored.crc32c:
                    own.append(png)
                    yield f"{png} was saved in another form, with the same pixels"
                else:
                    (result.foreign if label is None else result.changed)[name] = png


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
