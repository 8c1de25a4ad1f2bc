"""The tables of a run, or of a chapter of it, from its commit records; and processes that make several at once.

`python -m autolabel.pipeline.parts` is such a process: it reads from its standard input what to do, a line each.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from autolabel.manifests.documents import json_of
from autolabel.manifests.locations import location
from autolabel.manifests.metadata import metadata_bytes
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.ledger import Ledger
from autolabel.manifests.samples import writing_rows
from autolabel.manifests.schemas import MANIFEST_SCHEMA, QUARANTINE_SCHEMA, STATISTICS
from autolabel.manifests.tables import BadTable, part_path, writing_table
from autolabel.pipeline.records import LABELLED, QUARANTINED, read_unit
from autolabel.pipeline.units import Packed, Plan

MERGED = {name: schema for name, schema in STATISTICS.items() if name != "review"}  # the records hold their rows


@dataclass(frozen=True)
class Counts:
    """Samples of some units: all counted, none inferred from the others, since the balance is a check."""

    labelled: int = 0
    quarantined: int = 0
    left: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.labelled + other.labelled, self.quarantined + other.quarantined, self.left + other.left
        )  # fmt: skip


@dataclass(frozen=True)
class Heading:
    """All that the tables say beside the records. image_root: as in the input manifest; provenance: of the labels."""

    image_root: Path
    provenance: Mapping[str, Any]

    def metadata(self, run: Run, path: Path) -> bytes:
        """The metadata of a manifest of the run's labels at `path`."""
        return metadata_bytes(
            path, space=run.label_space, image_root=self.image_root, label_root=run.path,
            provenance=self.provenance, runs=[run.path],
        )  # fmt: skip


@dataclass(frozen=True)
class Made:
    """The tables of a chapter. files: sha256 and bytes of each, by the table's name in `run.json`."""

    counts: Counts
    files: Mapping[str, tuple[str, int]]


def table_name(run: Run, path: Path) -> str:
    """The name of a table in `run.json`."""
    return path.relative_to(run.path).as_posix()


Files = dict[str, tuple[str, int]]  # sha256 and bytes of tables, by their names in `run.json`


def write_tables(
    run: Run, plan: Plan, ledger: Ledger, units: range, paths: Mapping[str, Path], head: Heading, *, files: Files
) -> Iterator[tuple[Counts, dict[str, pa.Table]]]:
    """Write the tables of some units to `paths`, by their names in `run.json`; `files` has them when all are through.

    Yields the counts of every unit and its rows of the statistics. Raises BadTable.
    """
    names = {name: table_name(run, run.statistics_path(name)) for name in MERGED}
    manifest, quarantine = table_name(run, run.manifest_path), table_name(run, run.quarantine_path)
    with contextlib.ExitStack() as stack:
        add = {
            names[name]: stack.enter_context(writing_table(paths[names[name]], schema))
            for name, schema in MERGED.items()
        }
        add[quarantine] = stack.enter_context(writing_table(paths[quarantine], QUARANTINE_SCHEMA))
        add[manifest] = stack.enter_context(writing_rows(paths[manifest], head.metadata(run, paths[manifest])))
        for number in units:
            packed = plan.packed(number)
            commit = ledger.get(packed.name)
            if commit is None:
                yield Counts(left=plan.count(number)), {}
                continue
            record, _ = read_unit(run, packed.unit(), commit)
            labelled = record.filter(pc.equal(record["status"], LABELLED))
            rows = {name: _statistics(name, labelled, schema) for name, schema in MERGED.items()}
            for name in MERGED:
                add[names[name]](rows[name])
            planned = packed.rows_of(record["sample_id"])
            add[manifest](_auto_rows(planned.filter(pc.equal(record["status"], LABELLED)), labelled))
            refused = _quarantined(packed, planned, record)
            add[quarantine](refused)
            left = plan.count(number) - pc.count_distinct(record["sample_id"]).as_py()
            yield Counts(len(labelled), len(refused), left), rows
    files.update({name: (table.sha256, table.bytes) for name, table in add.items()})


def _statistics(name: str, rows: pa.Table, schema: pa.Schema) -> pa.Table:
    if name == "images":
        return rows.select(schema.names).cast(schema)
    nested = rows[name].combine_chunks()
    inner = pc.list_flatten(nested)
    ids = rows["sample_id"].take(pc.list_parent_indices(nested))
    columns = [ids, *(pc.struct_field(inner, field) for field in schema.names[1:])]
    return pa.table(columns, schema=schema)


def _auto_rows(planned: pa.Table, rows: pa.Table) -> pa.Table:
    """The rows of the manifest about labelled samples, from those of the plan and of the record."""
    known = {
        "source": pa.repeat("auto", len(rows)), "label": rows["label"], "label_index": rows["label_index"],
        "label_ids": pa.repeat("train", len(rows)), "coarse_label": pa.nulls(len(rows), pa.string()),
        "weight": pa.array(np.ones(len(rows), np.float32)),
    }  # fmt: skip
    return pa.table([known.get(name, planned[name] if name in planned.column_names else None)
                     for name in MANIFEST_SCHEMA.names], schema=MANIFEST_SCHEMA)  # fmt: skip


def _quarantined(unit: Packed, planned: pa.Table, record: pa.Table) -> pa.Table:
    bad = pc.equal(record["status"], QUARANTINED)
    images = planned["image"].filter(bad).to_pylist()
    rows = record.filter(bad).select(["sample_id", "reason"]).to_pylist()
    return pa.Table.from_pylist(
        [{**row, "image": str(unit.image_root / image)} for row, image in zip(rows, images, strict=True)],
        schema=QUARANTINE_SCHEMA,
    )


# --- chapters ---------------------------------------------------------------------------------------------------------


def write_part(run: Run, plan: Plan, ledger: Ledger, chapter: tuple[int, range], head: Heading) -> Made:
    """Write the tables of a chapter, its number and its units, all but the review. Raises BadTable."""
    number, units = chapter
    names = [name for name, path in run.table_paths().items() if path != run.statistics_path("review")]
    paths = {name: part_path(run.path / name, number) for name in names}
    files = Files()
    counts = sum((some for some, _ in write_tables(run, plan, ledger, units, paths, head, files=files)), Counts())
    return Made(counts, files)


def write_parts(
    run: Run, plan: Plan, ledger: Ledger, chapters: Mapping[int, range], head: Heading, *, processes: int
) -> Iterator[tuple[int, Made]]:
    """Write the tables of chapters in several processes. Yields each with its number when it is there, in any order.

    Raises BadTable and OSError as `write_part`.
    """
    if processes < 2 or len(chapters) < 2:
        for chapter in chapters.items():
            yield chapter[0], write_part(run, plan, ledger, chapter, head)
        return
    request = json.dumps(
        {"run": str(run.path), "plan": str(plan.path), "roots": [str(root) for root in plan.roots],
         "image_root": str(head.image_root), "provenance": head.provenance}
    )  # fmt: skip
    left: queue.SimpleQueue[tuple[int, range]] = queue.SimpleQueue()
    found: queue.SimpleQueue[tuple[int, Made] | BaseException | None] = queue.SimpleQueue()
    for chapter in chapters.items():
        left.put(chapter)
    children = [_child() for _ in range(min(processes, len(chapters)))]
    threads = [threading.Thread(target=_feed, args=(child, request, left, found)) for child in children]
    try:
        for thread in threads:
            thread.start()
        ended = 0
        while ended < len(threads):
            answer = found.get()
            if isinstance(answer, BaseException):
                raise answer
            if answer is None:
                ended += 1
            else:
                yield answer
    finally:
        for child in children:
            child.kill()
            child.wait()
        for thread in threads:
            thread.join()


def _child() -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def _feed(
    child: subprocess.Popen[str],
    request: str,
    left: queue.SimpleQueue[tuple[int, range]],
    found: queue.SimpleQueue[tuple[int, Made] | BaseException | None],
) -> None:
    """Give one process chapters until there are none left."""
    assert child.stdin and child.stdout
    try:
        _tell(child.stdin, request)
        while True:
            try:
                number, units = left.get_nowait()
            except queue.Empty:
                found.put(None)
                return
            _tell(child.stdin, f"{number} {units.start} {units.stop}")
            line = child.stdout.readline()
            if not line:
                raise OSError(f"a process that makes tables has ended by itself (status {child.wait()}): run it again")
            answer = json_of(line.encode(), dict[str, Any], name="the answer of a process that makes tables")
            if "damaged" in answer:
                raise BadTable(answer["damaged"])
            if "failed" in answer:
                raise OSError(*answer["failed"])
            files = {name: (digest, size) for name, (digest, size) in answer["files"].items()}
            found.put((number, Made(Counts(**answer["counts"]), files)))
    except Exception as error:
        found.put(error)


def _tell(other: IO[str], line: str) -> None:
    """Send a line to the process at the other end of a pipe."""
    other.write(f"{line}\n")
    other.flush()


def _serve(lines: Iterable[str]) -> None:
    """Make the tables of every chapter whose number comes."""
    asked = iter(lines)
    request = json_of(next(asked).encode(), dict[str, Any], name="the request for tables")
    run = Run.open(location(request["run"]))
    plan = Plan(location(request["plan"]), run.recipe.unit_size, *map(location, request["roots"]))
    head, ledger = Heading(location(request["image_root"]), request["provenance"]), Ledger(run.path)
    for line in asked:
        try:
            number, start, stop = map(int, line.split())
            part = write_part(run, plan, ledger, (number, range(start, stop)), head)
            answer: dict[str, Any] = {"counts": asdict(part.counts), "files": part.files}
        except BadTable as error:
            answer = {"damaged": str(error)}
        except OSError as error:
            answer = {"failed": [error.errno, error.strerror, str(error.filename)]}
        _tell(sys.stdout, json.dumps(answer))


if __name__ == "__main__":
    _serve(sys.stdin)
