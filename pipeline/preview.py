"""What a run would take, told before anything is labelled: `generate --dry-run`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autolabel.manifests.cluster import cluster_address
from autolabel.manifests.run.folder import RUN, About, read_about, require_new_or_run, require_same
from autolabel.manifests.samples import open_manifest
from autolabel.pipeline.engine import Crew, probe
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.records import LABELLED
from autolabel.pipeline.run import absolute, identity, require_fitting, require_policy, settled, survey, worker_bytes
from autolabel.pipeline.units import Plan, Unit, extend_plan, write_plan

PROBED = 16  # images
_WORKERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Preview:
    """sizes: images of every (height, width), the most frequent first.

    memory: `Labeller.plan` of the worker that probed. milliseconds: mean of decode, infer and encode over the probed
    images. images_per_s: of that one worker. label_bytes: mean size of a label, None if none could be made.
    workers: how many to reckon with; one stands for the whole process with `--engine local`.
    """

    samples: int
    sizes: dict[tuple[int, int], int]
    units: int
    units_left: int
    done: int
    wanted: int
    device: str
    precision: str
    memory: dict[str, Any] | None = None
    probed: int = 0
    unreadable: int = 0
    milliseconds: dict[str, float] | None = None
    images_per_s: float = 0.0
    label_bytes: float | None = None
    workers: tuple[int, ...] = ()

    def hours(self, workers: int) -> float:
        """For all that is left, where workers do not hold each other up."""
        return self.wanted / self.images_per_s / workers / 3600


def preview(job: LabelJob, address: str | None = None) -> Preview:
    """Plan a run, or what is left of it, and label `PROBED` images spread over it; nothing is written to `job.out`.

    Raises as `generate` does.
    """
    job = absolute(job)
    manifest = open_manifest(job.manifest)
    if job.out.is_dir():
        require_new_or_run(job.out)
    before = read_about(job.out) if (job.out / RUN).is_file() else None
    with tempfile.TemporaryDirectory() as scratch:
        job = settled(job, before, address, Path(scratch))
        if before is not None:
            require_same(job.out, before, identity(job, manifest))
        else:
            require_policy(job, manifest)
            require_fitting(job, manifest)
        plan = _plan(job, Path(scratch), before)
        left = survey(job, plan)
        sizes: Counter[tuple[int, int]] = Counter()
        for table in manifest.tables():
            sizes.update(zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True))
        found = Preview(
            plan.samples, dict(sizes.most_common()), len(plan), len(left.units), left.before.done, left.wanted,
            job.device, job.precision,
        )  # fmt: skip
        if not left.wanted:
            return found
        step = max(1, len(left.units) // PROBED)
        each = -(-PROBED // len(left.units))
        units = [plan[number] for number in left.units[::step]]
        samples = [s for unit in units for s in unit.samples[:: max(1, len(unit.samples) // each)][:each] if s.readable]
        if not samples:
            return found
        crew = Crew(
            replace(job, out=Path(scratch)), manifest.label_space, manifest.image_root, worker_bytes(job, plan, left)
        )
        unit = Unit("probe", units[0].bucket, 0, tuple(samples[:PROBED]))
        rows, seconds, memory = probe(crew, list(unit.samples), unit, address)
    good = [row for row in rows if row["status"] == LABELLED]
    if good:
        steps = ("decode", "infer", "encode")
        found = replace(
            found,
            milliseconds={name: sum(row[f"{name}_ms"] for row in good) / len(good) for name in steps},
            label_bytes=sum(row["label_bytes"] for row in good) / len(good),
        )
    return replace(
        found, memory=memory, probed=len(rows), unreadable=len(rows) - len(good), images_per_s=len(rows) / seconds,
        workers=_workers(job, address),
    )  # fmt: skip


def _plan(job: LabelJob, folder: Path, before: About | None) -> Plan:
    manifest = open_manifest(job.manifest)
    roots = manifest.image_root, manifest.label_root
    if before is None:
        path = write_plan(folder, manifest, job.unit_size)
    else:
        path = Path(shutil.copy(job.out / before["plan"], folder))
        path = extend_plan(Plan(path, job.unit_size, *roots), manifest)
    return Plan(path, job.unit_size, *roots)


def _workers(job: LabelJob, address: str | None) -> tuple[int, ...]:
    if job.engine == "local":
        return (1,)
    if job.device == "cpu" and cluster_address(address) is None:  # more than the cores do not help
        return tuple(n for n in _WORKERS if n <= (os.cpu_count() or 1))
    return _WORKERS
