"""One labelling run, from a manifest to a finished folder: plan, resume, label, publish, account.

run.json            what was asked, with which versions; and, at the end, the accounts
labels.zarr/ or labels/    see manifests/stores.py
units/*.parquet     the commit records: the only truth about what is done (pipeline/units.py)
stats/*.parquet, manifest.parquet, quarantine.parquet    derived from the records when the run ends
progress.json       live counters
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from autolabel.manifests.files import remove_leftovers, write_json, writing
from autolabel.manifests.stores import PNG, ZARR, create_zarr, png_name
from autolabel.manifests.tables import (
    QUARANTINE_SCHEMA,
    STATISTICS,
    Manifest,
    Sample,
    load_manifest,
    save_manifest,
    with_roots,
    write_table,
)
from autolabel.pipeline.engine import Crew, EngineFailed, Failed, Work, run_local, run_ray
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.units import (
    LABELLED,
    QUARANTINED,
    UNITS,
    Row,
    Unit,
    bucket_rows,
    committed_rows,
    plan_digest,
    plan_units,
    read_record,
)
from autolabel.teacher.predict import Teacher, load_teacher, pick_device, pick_precision

FORMAT = "autolabel-run/1"
_PACKAGES = ("autolabel", "torch", "numpy", "zarr", "ray", "pillow", "pyarrow")


@dataclass(frozen=True)
class Accounts:
    """Where every sample went: asked = labelled + quarantined + left."""

    asked: int
    labelled: int
    quarantined: int
    left: int

    def balanced(self) -> bool:
        """Whether no sample is lost and none counted twice."""
        return self.asked == self.labelled + self.quarantined + self.left


@dataclass(frozen=True)
class Progress:
    """Live counters. `before` were done when this call started; images_per_s is over the last minute."""

    asked: int
    before: int
    done: int
    wanted: int
    images_per_s: float


OnProgress = Callable[[Progress], None]


def generate(
    job: LabelJob, on_progress: OnProgress | None = None, address: str | None = None
) -> tuple[Accounts, Failed]:
    """Label what is left of a run and publish it. Returns the accounts, and the units that failed with their reasons.

    Raises ValueError for a request that cannot be met or differs from the one the folder holds, EngineFailed, OSError.
    """
    job = replace(job, manifest=job.manifest.absolute(), teacher=job.teacher.absolute(), out=job.out.absolute())
    manifest = load_manifest(job.manifest)
    units = plan_units(manifest.samples, job.shard_size)
    teacher = load_teacher(job.teacher, "cpu", job.precision, job.combine)
    identity = _identity(job, manifest, units, teacher)
    _require_distinct_labels(job, manifest)
    job.out.mkdir(parents=True, exist_ok=True)
    with _locked(job.out):
        _require_same(job.out, identity)
        remove_leftovers(job.out)
        asked = {
            "format": FORMAT,
            **identity,
            "manifest": str(job.manifest),
            "teacher": str(job.teacher),
            "engine": job.engine,
            "limit": job.limit,
            "max_quarantined": job.max_quarantined,
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "machine": platform.machine(),
        }
        plans = _plans_so_far(job.out)
        write_json(job.out / "run.json", {**asked, "state": "running", "accounts": None, "plans": plans})
        if job.store == "zarr":
            about = {"label_space": identity["label_space"], "ignore": 255, "threshold": job.threshold}
            create_zarr(job.out / ZARR, bucket_rows(units), job.shard_size, about)
        work, before = _left(job, units)
        failed: Failed = {}
        if work:
            meter = _Meter(job.out, len(manifest.samples), before, sum(len(w.wanted) for w in work), on_progress)
            able = replace(job, workers=_fitting_workers(job, teacher, work))
            crew = Crew(able, manifest.label_space, manifest.image_root)
            if job.engine == "ray":
                failed = run_ray(crew, work, meter.unit, partial(_add_plan, plans), address)
            else:
                failed = run_local(crew, work, meter.unit, partial(_add_plan, plans))
        accounts = publish(job, manifest, units)
        state = "complete" if accounts.left == 0 else "partial"
        write_json(job.out / "run.json", {**asked, "state": state, "accounts": asdict(accounts), "plans": plans})
        if not accounts.balanced():
            raise EngineFailed(f"the accounts of {job.out} do not balance: {accounts}")
    return accounts, failed


Plans = list[dict[str, Any]]  # `Labeller.plan`, one per kind of device


def _plans_so_far(out: Path) -> Plans:
    path = out / "run.json"
    return list(json.loads(path.read_text(encoding="utf-8")).get("plans", ())) if path.is_file() else []


def _add_plan(plans: Plans, plan: dict[str, Any]) -> None:
    """Keep the latest plan of every kind of device: workers on equal devices plan alike."""
    plans[:] = [*(p for p in plans if p["device"] != plan["device"]), plan]


def _fitting_workers(job: LabelJob, teacher: Teacher, work: Sequence[Work]) -> int | None:
    """`job.workers`, or fewer where each computes on this machine's CPU and their images would not fit its memory.

    What an image takes is told by the teacher on this machine; other machines of a cluster are taken to be like it. A
    twentieth of the images may be larger than what is reckoned with: one panorama must not hold up all the rest.
    """
    sizes = sorted((s.height * s.width, s.height, s.width) for item in work for s in item.unit.samples)
    pixels, height, width = sizes[len(sizes) * 19 // 20]
    if pick_device("auto") != "cpu" or not pixels:
        return job.workers
    asked = job.workers or os.cpu_count() or 1
    fitting = teacher.plan(job.scales, job.flip).at_once(height, width, asked)
    return job.workers if fitting == asked else fitting


def _identity(job: LabelJob, manifest: Manifest, units: Sequence[Unit], teacher: Teacher) -> dict[str, Any]:
    """What must be the same for two calls to work on one run. Checks the teacher on the way."""
    if not manifest.samples:
        raise ValueError(f"{job.manifest} lists no samples: nothing to label")
    device = pick_device("auto")
    teacher.require_space(manifest.label_space, str(job.teacher), str(job.manifest))
    teacher.combination.require(job.scales)
    return {
        "teacher_sha256": teacher.sha256,
        "scales": list(job.scales),
        "flip": job.flip,
        "combine": job.combine,
        "policy": {"threshold": job.threshold},
        "precision": pick_precision(job.precision, device),
        "device": device,
        "store": job.store,
        "shard_size": job.shard_size,
        "label_space": json.loads(manifest.label_space.to_json()),
        "manifest_digest": plan_digest(units, manifest.image_root),
    }


def _require_same(out: Path, identity: dict[str, Any]) -> None:
    """Raise ValueError, naming both values, if the folder holds a run that was asked for differently."""
    path = out / "run.json"
    if not path.is_file():
        if any(child.name != ".lock" for child in out.iterdir()):
            raise ValueError(f"{out} is not empty and not a run (no run.json): choose another --out")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: restore it, or choose another --out") from error
    words = {"manifest_digest": "manifest", "teacher_sha256": "teacher"}
    different = [
        f"{words.get(key, key)} was {_short(before.get(key))}, now {_short(value)}"
        for key, value in identity.items()
        if before.get(key) != value
    ]
    if different:
        raise ValueError(
            f"{out} holds a run that was asked for differently ({'; '.join(different)}):"
            " ask the same again to go on with it, or choose another --out"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:12] + "…" + text[-4:]


def _require_distinct_labels(job: LabelJob, manifest: Manifest) -> None:
    names: dict[str, Sample] = {}
    for sample in manifest.samples if job.store == "png" else ():
        name = png_name(sample.image.relative_to(manifest.image_root).as_posix())
        if name in names:
            raise ValueError(
                f"{names[name].image} and {sample.image} would both write {PNG}/{name}: use --store zarr, or rename one"
            )
        names[name] = sample


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One driver per run folder. The lock goes with the process that holds it, however it ends."""
    with open(out / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ValueError(f"another generate is at work in {out} ({file.read().strip()}): wait for it") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _left(job: LabelJob, units: Sequence[Unit]) -> tuple[list[Work], int]:
    """The work that is left, within --limit, and how many samples are done already."""
    work: list[Work] = []
    before, room = 0, job.limit
    for unit in units:
        ids = [s.sample_id for s in unit.samples]
        asked = ids if room is None else ids[:room]
        room = None if room is None else room - len(asked)
        done = committed_rows(job.out, unit)
        before += len(done)
        wanted = tuple(i for i in asked if i not in done)
        if wanted:
            work.append(Work(unit, wanted))
    return work, before


class _Meter:
    """Counts finished samples, writes `progress.json` about once a second, and tells the caller."""

    def __init__(self, out: Path, asked: int, before: int, wanted: int, on_progress: OnProgress | None) -> None:
        self.out, self.asked, self.before, self.wanted = out, asked, before, wanted
        self.on_progress = on_progress
        self.by_unit: dict[str, int] = {}
        self.history = [(time.monotonic(), 0)]  # (time, samples done in this call), the last minute of it
        self.written = 0.0

    def unit(self, name: str, done: int) -> None:
        """A unit has `done` finished samples."""
        self.by_unit[name] = done
        now, total = time.monotonic(), sum(self.by_unit.values())
        self.history = [h for h in self.history if now - h[0] < 60] or self.history[-1:]
        self.history.append((now, total))
        then, past = self.history[0]
        rate = (total - past) / (now - then) if now > then else 0.0
        progress = Progress(self.asked, self.before, total, self.wanted, rate)
        if now - self.written > 1:
            self.written = now
            stamp = datetime.now(UTC).isoformat(timespec="seconds")
            write_json(self.out / "progress.json", {**asdict(progress), "updated": stamp})
        if self.on_progress:
            self.on_progress(progress)


def publish(job: LabelJob, manifest: Manifest, units: Sequence[Unit]) -> Accounts:
    """Derive statistics, auto manifest and quarantine list from the commit records, one unit at a time."""
    samples: list[Sample] = []
    quarantined: list[Row] = []
    left = 0  # counted, not inferred from the others: the balance is a check
    with contextlib.ExitStack() as stack:
        writers = {}
        for name, schema in STATISTICS.items():
            temporary = stack.enter_context(writing(job.out / "stats" / f"{name}.parquet"))
            writers[name] = stack.enter_context(pq.ParquetWriter(temporary, schema, compression="zstd"))
        for unit in units:
            path = job.out / UNITS / unit.record
            rows = read_record(path)[0] if path.is_file() else []
            by_id = {s.sample_id: s for s in unit.samples}
            left += len(by_id.keys() - {row["sample_id"] for row in rows})
            labelled = [row for row in rows if row["status"] == LABELLED]
            for name, schema in STATISTICS.items():
                writers[name].write_table(pa.Table.from_pylist(_statistics_rows(name, labelled), schema=schema))
            samples += [_auto_sample(by_id[row["sample_id"]], row, job.out) for row in labelled]
            quarantined += [
                {"sample_id": row["sample_id"], "image": str(by_id[row["sample_id"]].image), "reason": row["reason"]}
                for row in rows
                if row["status"] == QUARANTINED
            ]
    provenance = {"run": "run.json", "manifest": str(job.manifest), "threshold": job.threshold}
    save_manifest(job.out / "manifest.parquet", with_roots(manifest.label_space, tuple(samples), provenance))
    write_table(job.out / "quarantine.parquet", pa.Table.from_pylist(quarantined, schema=QUARANTINE_SCHEMA))
    return Accounts(len(manifest.samples), len(samples), len(quarantined), left)


def _statistics_rows(name: str, rows: Sequence[Row]) -> list[Row]:
    columns = STATISTICS[name].names
    if name == "images":
        return [{column: row[column] for column in columns} for row in rows]
    return [{"sample_id": row["sample_id"], **entry} for row in rows for entry in row[name] or ()]


def _auto_sample(sample: Sample, row: Row, out: Path) -> Sample:
    return replace(
        sample, source="auto", label=out / row["label"], label_index=row["label_index"], label_ids="train",
        coarse_label=None, weight=1.0,
    )  # fmt: skip
