"""Publish a run: derive statistics, manifest and quarantine list from its commit records.

A run of one chapter gets one file for each table. A longer one gets a folder with a part for each chapter; those of
chapters that are closed are made once. `stats/parts.json` says what each part was made from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, read_json
from autolabel.manifests.machine import cores
from autolabel.manifests.run import chapters
from autolabel.manifests.run.folder import Accounts, Run
from autolabel.manifests.run.ledger import Ledger
from autolabel.manifests.run.review import writing_review
from autolabel.manifests.schemas import STATISTICS
from autolabel.manifests.tables import digest_of_parts, part_path, parts_of, read_pieces, table_sha256
from autolabel.pipeline.parts import Counts, Files, Heading, Made, table_name, write_parts, write_tables
from autolabel.pipeline.units import Plan

_PARTS = "stats/parts.json"


def publish(
    run: Run, plan: Plan, image_root: Path, provenance: dict[str, Any], *, before_end: Callable[[], None] = lambda: None
) -> tuple[Accounts, dict[str, str]]:
    """Write the run's tables. Returns the accounts, and every table's sha256. Raises BadTable.

    before_end: called when tables are written, just before they appear.
    """
    ledger, head = Ledger(run.path), Heading(image_root, provenance)
    paths = run.table_paths()
    in_parts = len(plan) > chapters.UNITS_OF_A_CHAPTER
    for path in paths.values():  # a run grows, or a repair cuts it anew: nobody reads a table in two shapes
        if in_parts and storage.exists(path):
            storage.remove(path)
        elif not in_parts and storage.is_folder(path):
            storage.remove_folder(path)
    counts, digests = (_in_parts if in_parts else _whole)(run, plan, ledger, head, before_end)
    accounts = Accounts(plan.samples, counts.labelled, counts.quarantined, counts.left)
    return accounts, {name: digests[name] for name in paths}


def _whole(
    run: Run, plan: Plan, ledger: Ledger, head: Heading, before_end: Callable[[], None]
) -> tuple[Counts, dict[str, str]]:
    """One file for each table."""
    counts, files = Counts(), Files()
    with writing_review(run.statistics_path("review"), run.label_space.names) as review:
        units, paths = range(len(plan)), run.table_paths()
        written = write_tables(run, plan, ledger, units, paths, head, files=files)
        for number, (some, rows) in enumerate(written, start=1):
            counts += some
            if rows:
                review(rows["images"], rows["classes"])
            if number == len(plan):
                before_end()
    name = table_name(run, run.statistics_path("review"))
    digests = {name: digest for name, (digest, _) in files.items()}
    return counts, {**digests, name: table_sha256(run.path / name)}


def _in_parts(
    run: Run, plan: Plan, ledger: Ledger, head: Heading, before_end: Callable[[], None]
) -> tuple[Counts, dict[str, str]]:
    """A folder for each table, with a part for each chapter."""
    size = chapters.UNITS_OF_A_CHAPTER
    numbers = range(-(-len(plan) // size))
    sources = {chapter: _source(ledger, chapter, head) for chapter in numbers}
    known = _known_parts(run)
    made: dict[int, tuple[str, Made]] = {
        chapter: (source, known[chapter][1])
        for chapter, source in sources.items()
        if source and chapter in known and known[chapter][0] == source and _there(run, chapter, known[chapter][1])
    }
    missing = {
        chapter: range(chapter * size, min(len(plan), (chapter + 1) * size))
        for chapter in numbers
        if chapter not in made
    }
    for chapter, part in write_parts(run, plan, ledger, missing, head, processes=cores()):
        made[chapter] = sources[chapter], part
        before_end()
    _remove_others(run, len(numbers))
    storage.write_json(
        run.path / _PARTS,
        {
            str(k): {"source": made[k][0], "counts": asdict(made[k][1].counts), "files": made[k][1].files}
            for k in numbers
        },
    )
    _rank(run, len(numbers))
    counts = sum((part.counts for _, part in made.values()), Counts())
    review = table_name(run, run.statistics_path("review"))
    digests = {
        name: digest_of_parts({part_path(path, k).name: made[k][1].files[name][0] for k in numbers})
        for name, path in run.table_paths().items()
        if name != review
    }
    return counts, {**digests, review: table_sha256(run.path / review)}


def _source(ledger: Ledger, chapter: int, head: Heading) -> str:
    """A mark of all that the tables of a closed chapter are made from; empty for a chapter that is open."""
    closed = ledger.mark(chapter)
    if closed is None:
        return ""
    return hashlib.sha256(json.dumps([closed, str(head.image_root), head.provenance]).encode()).hexdigest()


def _known_parts(run: Run) -> dict[int, tuple[str, Made]]:
    """The parts that an earlier call has made, with the marks of their sources; nothing that cannot be read counts."""
    try:
        found: Mapping[str, Any] = read_json(run.path / _PARTS, dict[str, Any])
        return {
            int(number): (
                str(about["source"]),
                Made(Counts(**about["counts"]), {name: (str(d), int(n)) for name, (d, n) in about["files"].items()}),
            )
            for number, about in found.items()
        }
    except (BadDocument, OSError, KeyError, TypeError, ValueError):
        return {}


def _there(run: Run, chapter: int, part: Made) -> bool:
    found = {name: storage.stat(part_path(run.path / name, chapter)) for name in part.files}
    return all(stat is not None and stat.size == part.files[name][1] for name, stat in found.items())


def _remove_others(run: Run, count: int) -> None:
    """Remove parts of chapters that the plan has no more."""
    for path in run.table_paths().values():
        for part in parts_of(path):
            if part.name >= part_path(path, count).name and path != run.statistics_path("review"):
                storage.remove(part)


def _rank(run: Run, count: int) -> None:
    """Write the review list from the other tables: a ranking is of the whole run, so no part of it is ever done."""
    columns = {
        "images": ("sample_id", "agreement_with_coarse", "mean_confidence", "ignored_fraction", "coarse_pixels"),
        "classes": ("sample_id", "class_id", "contradicted_pixels"),
    }
    schemas = {name: pa.schema([STATISTICS[name].field(c) for c in of]) for name, of in columns.items()}
    with writing_review(run.statistics_path("review"), run.label_space.names, parts=True) as add:
        for chapter in range(count):
            images, classes = (
                pa.concat_tables(
                    [schema.empty_table(), *read_pieces(part_path(run.statistics_path(name), chapter), schema)]
                )
                for name, schema in schemas.items()
            )
            add(images, classes)
