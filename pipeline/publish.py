"""Publish a run: derive statistics, manifest and quarantine list from its commit records."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from autolabel.manifests import storage
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.run.folder import Accounts, Run
from autolabel.manifests.run.review import writing_review
from autolabel.manifests.samples import Sample, writing_manifest
from autolabel.manifests.schemas import QUARANTINE_SCHEMA, STATISTICS
from autolabel.manifests.tables import writing_table
from autolabel.pipeline.records import LABELLED, QUARANTINED, read_unit
from autolabel.pipeline.units import Plan, Unit

_MERGED = {name: schema for name, schema in STATISTICS.items() if name != "review"}  # the records hold their rows


def publish(
    run: Run,
    plan: Plan,
    space: LabelSpace,
    image_root: Path,
    provenance: dict[str, Any],
    *,
    before_end: Callable[[], None] = lambda: None,
) -> tuple[Accounts, dict[str, str]]:
    """Write the run's tables, one unit at a time. Returns the accounts, and every table's sha256. Raises BadTable.

    before_end: called when all tables are written, just before they appear.
    """
    labelled = quarantined = left = 0  # all counted, none inferred from the others: the balance is a check
    with contextlib.ExitStack() as stack:
        tables = {
            name: stack.enter_context(writing_table(run.statistics_path(name), schema))
            for name, schema in _MERGED.items()
        }
        bad = stack.enter_context(writing_table(run.quarantine_path, QUARANTINE_SCHEMA))
        review = stack.enter_context(writing_review(run.statistics_path("review"), space.names))
        add = stack.enter_context(
            writing_manifest(
                run.manifest_path, space, image_root=image_root, label_root=run.path, runs=[run.path],
                provenance=provenance,
            )
        )  # fmt: skip
        for unit in plan:
            if storage.stat(run.units / unit.record) is None:
                left += len(unit.samples)
                continue
            record, _ = read_unit(run, unit)
            labelled_rows = record.filter(pc.equal(record["status"], LABELLED))
            rows = {name: _statistics(name, labelled_rows, schema) for name, schema in _MERGED.items()}
            for name in _MERGED:
                tables[name](rows[name])
            review(rows["images"], rows["classes"])
            add(_auto_samples(unit, labelled_rows, run.path))
            refused = _quarantined(unit, record)
            bad(refused)
            labelled, quarantined = labelled + len(labelled_rows), quarantined + len(refused)
            left += len({s.sample_id for s in unit.samples}.difference(record["sample_id"].to_pylist()))
        before_end()
    accounts = Accounts(plan.samples, labelled, quarantined, left)
    return accounts, {name: storage.sha256(path) for name, path in run.table_paths().items()}


def _statistics(name: str, rows: pa.Table, schema: pa.Schema) -> pa.Table:
    if name == "images":
        return rows.select(schema.names).cast(schema)
    nested = rows[name].combine_chunks()
    inner = pc.list_flatten(nested)
    ids = rows["sample_id"].take(pc.list_parent_indices(nested))
    columns = [ids, *(pc.struct_field(inner, field) for field in schema.names[1:])]
    return pa.table(columns, schema=schema)


def _auto_samples(unit: Unit, rows: pa.Table, run: Path) -> list[Sample]:
    by_id = {s.sample_id: s for s in unit.samples}
    return [
        replace(
            by_id[row["sample_id"]], source="auto", label=storage.under(run, row["label"]),
            label_index=row["label_index"], label_ids="train", coarse_label=None, weight=1.0,
        )
        for row in rows.select(["sample_id", "label", "label_index"]).to_pylist()
    ]  # fmt: skip


def _quarantined(unit: Unit, record: pa.Table) -> pa.Table:
    images = {s.sample_id: str(s.image) for s in unit.samples}
    rows = record.filter(pc.equal(record["status"], QUARANTINED)).select(["sample_id", "reason"]).to_pylist()
    return pa.Table.from_pylist([{**row, "image": images[row["sample_id"]]} for row in rows], schema=QUARANTINE_SCHEMA)
