"""A run folder from a stranger may not lead a command out of it: a checksum is no signature, so every text may be evil.

Files are watched through Python's audit events: whatever is opened, made, renamed or removed outside the run is noted.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import autolabel
from PIL import Image

from autolabel.manifests import storage
from autolabel.manifests.images import encode_label
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.record import _checksum
from autolabel.manifests.tables import table_bytes
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.records import RECORD_SCHEMA, Row, parse_record, record_bytes
from autolabel.pipeline.run import generate

WATCHED = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.listdir",
)
_seen: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and event in WATCHED:
        _seen.extend(os.fsdecode(value) for value in arguments if isinstance(value, str | bytes | os.PathLike))


sys.addaudithook(_note)


class Trap:
    """A finished run of three images, a victim beside it, and everything that a command touched."""

    def __init__(self, folder: Path, job: LabelJob) -> None:
        self.folder, self.job, self.run = folder, job, job.out
        self.victim = folder / "outside" / "victim.png"
        self.record = next((self.run / "units").glob("*.parquet"))
        self.evil = [
            "../../outside/victim.png",
            "labels/../../outside/victim.png",
            str(self.victim),
            "labels.zarr/../../outside",
            "..\\..\\outside\\victim.png",
            f"C:{self.victim}",
            "a\0b",
            "",
        ]

    def rows(self) -> list[dict[str, Any]]:
        return parse_record(self.record, self.record.read_bytes())[0].to_pylist()

    def commit(self, rows: list[dict[str, Any]]) -> None:
        """Write the record again, with good checksums."""
        shards = parse_record(self.record, self.record.read_bytes())[1]
        written = {name: _Shard(**shard) for name, shard in shards.items()}
        self.record.write_bytes(record_bytes([Row(**row) for row in rows], written))  # type: ignore[arg-type]

    def request(self) -> tuple[object, ...]:
        """The command that made the run."""
        return (
            "generate", self.job.manifest, "--teacher", self.job.teacher, "--out", self.run, "--engine", "local",
            "--scales", "1", "--store", self.job.store, "--keep-confidence", 4, "--unit-size", 4,
        )  # fmt: skip

    def spring(self) -> list[str]:
        """Let the commands read the run; return what they touched near the victim."""
        global _seen
        before = self._outside()
        _seen = []
        try:
            for command in (
                self.request(),
                ("verify", self.run),
                ("stats", self.run),
            ):
                made = autolabel(*command)
                assert made.exit_code in (0, 2, 3), (command, made.output, made.exception)
                assert "Traceback" not in made.output
            try:
                run = Run.open(self.run)
                for labels in (run.labels, run.confidence):
                    for name in labels:
                        assert len(labels[name]) == 2 or labels[name].shape == (64, 64)  # type: ignore[union-attr]
            except (ValueError, OSError, RuntimeError):
                pass  # refused, which is as good
        finally:
            touched, _seen = _seen, None
        assert self._outside() == before
        return [name for name in touched if "outside" in name]

    def _outside(self) -> dict[str, tuple[int, int, bytes]]:
        return {
            path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
            for path in (self.folder / "outside").iterdir()
        }


class _Shard:
    def __init__(self, **about: Any) -> None:
        self.bytes, self.crc32c = about["bytes"], about["crc32c"]


@pytest.fixture(scope="module")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with images, manifest and a finished run, by store."""
    made = {}
    for store in ("zarr", "png"):
        folder = made[store] = tmp_path_factory.mktemp(store)
        (folder / "images").mkdir()
        for k in range(3):
            noise = np.random.default_rng(k).integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(noise).save(folder / "images" / f"{k}.png")
        assert autolabel("manifest", "scan", folder / "images", "--label-space", "cityscapes",
                         "-o", folder / "m.parquet").exit_code == 0  # fmt: skip
    return made


@pytest.fixture(params=["zarr", "png"])
def trap(request: pytest.FixtureRequest, finished: dict[str, Path], teacher: Path) -> Iterator[Trap]:
    folder = finished[request.param]
    shutil.rmtree(folder / "a", ignore_errors=True)
    shutil.rmtree(folder / "outside", ignore_errors=True)
    (folder / "outside").mkdir()
    job = LabelJob(
        folder / "m.parquet", teacher, folder / "a" / "run", scales=(1.0,), store=request.param, keep_confidence=4,
        unit_size=4,
    )  # fmt: skip
    if not (folder / "kept").exists():
        generate(replace(job, out=folder / "kept"))
    shutil.copytree(folder / "kept", job.out)
    (folder / "outside" / "victim.png").write_bytes(encode_label(np.zeros((64, 64), np.uint8)))
    yield Trap(folder, job)


def test_what_a_command_touches_is_noted(trap: Trap) -> None:
    global _seen
    _seen = []
    storage.write(trap.victim, storage.read(trap.victim))
    touched, _seen = _seen, None
    assert touched.count(str(trap.victim)) == 2  # read, and renamed over


TEXTS = [field.name for field in RECORD_SCHEMA if field.type == pa.string()]


@pytest.mark.parametrize("column", TEXTS)
def test_no_text_of_a_record_leads_out_of_the_run(trap: Trap, column: str) -> None:
    rows = trap.rows()
    for value in trap.evil:
        trap.commit([{**rows[0], column: value}, *rows[1:]])
        assert trap.spring() == [], value


def test_no_layer_of_a_record_leads_out_of_the_run(trap: Trap) -> None:
    rows = trap.rows()
    for value in trap.evil:
        files = {value: {"file": value, "bytes": 100, "crc32c": 1}}
        trap.commit(rows)
        _reseal(trap.record, json.dumps(files).encode())
        assert trap.spring() == [], value


def _reseal(record: Path, shards: bytes) -> None:
    record.write_bytes(table_bytes(pq.read_table(record).replace_schema_metadata({b"shards": shards})))


def texts_of(document: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all texts in a JSON document."""
    if isinstance(document, str):
        yield place
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from texts_of(value, (*place, key))


@pytest.mark.parametrize("trap", ["png"], indirect=True)
def test_no_text_of_run_json_leads_out_of_the_run(trap: Trap) -> None:
    """The manifest, the teacher and a relabelled run's source are named by path: they are inputs, known by sha256."""
    path = trap.run / "run.json"
    whole = path.read_bytes()
    document = json.loads(whole)
    del document["crc32c"]
    inputs = {("input_manifest",), ("teacher",), ("source",)}
    places = [place for place in texts_of(document) if place not in inputs and place[0] != "versions"]
    assert ("plan",) in places and len(places) > 10
    for place in places:
        changed = json.loads(json.dumps(document))
        *way, last = place
        inner = changed
        for key in way:
            inner = inner[key]
        for value in trap.evil[:3] if place == ("plan",) else trap.evil[:1]:
            inner[last] = value
            storage.write_json(path, {**changed, "crc32c": _checksum(changed)})
            assert trap.spring() == [], (place, value)


@pytest.mark.parametrize("column", ["sample_id", "image", "coarse_label", "split"])
def test_no_text_of_a_plan_leads_out_of_the_data(trap: Trap, column: str) -> None:
    run = Run.open(trap.run)
    with pa.ipc.open_file(pa.BufferReader(run.plan_path.read_bytes())) as reader:
        batch = reader.get_batch(0)
    for value in trap.evil:
        rows = batch.to_pylist()
        rows[0][column] = value
        plan = trap.run / "plan-00000000.arrow"
        with pa.ipc.new_file(str(plan), batch.schema) as out:
            out.write_batch(pa.RecordBatch.from_pylist(rows, schema=batch.schema))
        named = plan.with_name(f"plan-{storage.crc32c(plan)}.arrow")
        plan.rename(named)
        replace(run, plan=named.name).save()
        assert trap.spring() == [], value


LINKS = {  # by store, what is moved out of the run and linked there
    "zarr": ["labels.zarr", "labels.zarr/b512x512", "top.zarr/zarr.json", "units", "stats", "stats/review.parquet",
             ".lock", "run.json", "units/b512x512.000000.0.parquet"],
    "png": ["labels", "confidence", "manifest.parquet", "progress.json"],
}  # fmt: skip


def move_out(trap: Trap, name: str) -> dict[Path, int]:
    """Put something of the run elsewhere and a link in its place; return the times of all that lies there."""
    place, elsewhere = trap.run / name, trap.folder / "outside" / Path(name).name
    shutil.move(place, elsewhere)
    place.symlink_to(elsewhere)
    return {path: path.stat().st_mtime_ns for path in (trap.folder / "outside").rglob("*")}


@pytest.mark.parametrize(
    ("trap", "name"), [(store, name) for store in LINKS for name in LINKS[store]], indirect=["trap"]
)
def test_a_link_in_a_run_is_refused_and_nothing_behind_it_is_touched(trap: Trap, name: str) -> None:
    before = move_out(trap, name)
    for command in (trap.request(), ("verify", trap.run), ("verify", trap.run, "--repair")):
        made = autolabel(*command)
        assert made.exit_code == 2, made.output
        assert "is a link: a run holds its own files" in made.output
    assert {path: path.stat().st_mtime_ns for path in (trap.folder / "outside").rglob("*")} == before


@pytest.mark.parametrize(
    ("trap", "name"), [("zarr", "labels.zarr/b512x512/c.0.0.0"), ("png", "labels/1.png"), ("png", "top/0.png")],
    indirect=["trap"],
)  # fmt: skip
def test_a_link_in_place_of_a_label_is_replaced_by_a_label_after_a_repair(trap: Trap, name: str) -> None:
    data = (trap.run / name).read_bytes()
    before = move_out(trap, name)
    for command in (trap.request(), ("verify", trap.run)):
        made = autolabel(*command)
        assert made.exit_code == 2, made.output
        assert "is a link: a run holds its own files" in made.output
    assert autolabel("verify", trap.run, "--repair").exit_code == 0
    assert autolabel(*trap.request()).exit_code == 0
    assert not (trap.run / name).is_symlink()
    assert (trap.run / name).read_bytes() == data
    assert {path: path.stat().st_mtime_ns for path in (trap.folder / "outside").rglob("*")} == before


def test_a_run_folder_that_is_a_link_itself_is_fine(trap: Trap) -> None:
    shutil.move(trap.run, trap.folder / "outside" / "run")
    trap.run.symlink_to(trap.folder / "outside" / "run")
    assert autolabel("verify", trap.run).exit_code == 0
