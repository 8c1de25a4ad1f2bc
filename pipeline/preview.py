"""The time, memory and bytes that a run would take, told before anything is labelled: `generate --dry-run`."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autolabel.manifests import storage
from autolabel.manifests.cluster import cluster_address
from autolabel.manifests.machine import cores
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import Sample
from autolabel.manifests.wording import Progress, Shown, Table, counted, duration, size
from autolabel.pipeline.cutting import extend_plan, write_plan
from autolabel.pipeline.engine import Crew, local_labeller, teacher_predictor
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.pace import HostNeeds
from autolabel.pipeline.predictor import TeacherPredictor
from autolabel.pipeline.prepare import (
    Left,
    Request,
    TeacherSource,
    new_run,
    open_plan,
    require_fitting,
    settle,
    survey,
    worker_bytes,
)
from autolabel.pipeline.progress import at_once, memory_needed
from autolabel.pipeline.records import Row
from autolabel.pipeline.run import choose_engine
from autolabel.pipeline.units import Plan, Unit
from autolabel.teacher.predict import Teacher

PROBED = 16  # images that are labelled on trial
PROBED_ON_GPU = 64  # which takes them in batches, two at a time
_WORKERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Probe:
    """The result of labelling some images on trial, by one worker (or this whole process, with engine local).

    budget: `Labeller.budget`. milliseconds: mean of decode, infer and encode over the labelled images. label_bytes:
    mean size of a label. Both are None if no image could be labelled. workers: numbers of workers to reckon with.
    needs: what a GPU asks of the cores beside it.
    """

    images: int
    refused: int
    images_per_s: float
    budget: dict[str, Any]
    milliseconds: dict[str, float] | None
    label_bytes: float | None
    workers: tuple[int, ...]
    needs: HostNeeds | None = None


@dataclass(frozen=True)
class Preview(Shown):
    """The work that a call would do. sizes: images of every (height, width), the most frequent first."""

    samples: int
    sizes: dict[tuple[int, int], int]
    units: int
    unit_size: int
    units_left: int
    done: int
    wanted: int
    device: str
    precision: str
    probe: Probe | None = None
    notes: tuple[str, ...] = ()

    def hours(self, workers: int) -> float:
        """The time for all that is left, if workers do not hold each other up."""
        assert self.probe is not None
        return self.wanted / self.probe.images_per_s / workers / 3600

    def lines(self) -> list[str]:
        """The findings in words."""
        sizes = [f"{f'{w} x {h}' if h else 'unreadable'}: {n}" for (h, w), n in self.sizes.items()]
        shown = ", ".join(sizes[:5]) + (f", {len(sizes) - 5} more" if sizes[5:] else "")
        lines = [
            f"images  {self.samples} ({shown})",
            f"units   {self.units} of up to {counted(self.unit_size, 'image')}, {self.units_left} of them left",
            f"done    {counted(self.done, 'image')}; this call would do {self.wanted}",
            f"device  {self.device}, {self.precision}",
            *(f"note    {note}" for note in self.notes),
        ]
        probe = self.probe
        if probe is None:
            return lines
        budget = probe.budget
        together = ", ".join(f"{images} of {name}" for name, images in at_once(budget).items()) or "none"
        lines.append(f"memory  {memory_needed(budget)}, {size(budget['free_bytes'])} free; images at once: {together}")
        if probe.label_bytes is not None and probe.milliseconds is not None:
            steps = ", ".join(f"{name} {ms:.0f} ms" for name, ms in probe.milliseconds.items())
            refused = f"; {probe.refused} would be quarantined" if probe.refused else ""
            lines.append(f"labels  {size(probe.label_bytes)} each, {size(probe.label_bytes * self.wanted)} to come")
            lines.append(
                f"probe   {counted(probe.images, 'image')}, {probe.images_per_s:.2f} images/s by one worker;"
                f" each {steps}{refused}"
            )
        if probe.needs is not None and probe.images > probe.refused:
            lines.append(f"cores   {cores_in_words(probe.needs)}")
        return lines

    def tables(self) -> list[Table]:
        """The expected time for several numbers of workers."""
        if self.probe is None:
            return []
        rows = [
            [str(n), f"{n * self.probe.images_per_s:.1f}", duration(3600 * self.hours(n))] for n in self.probe.workers
        ]
        return [Table("expected, if workers do not hold each other up", ["workers", "images/s", "time"], rows)]


def cores_in_words(needs: HostNeeds) -> str:
    """One line on the time that an image takes of cores and GPU, with advice where the cores are too few."""
    beside = f"{needs.cpu_ms:.0f} ms of CPU time beside {needs.device_ms:.0f} ms of the GPU an image"
    if needs.wanted <= needs.cores:
        return f"{beside}: {counted(needs.wanted, 'core')} of {needs.cores} keep it busy"
    return (
        f"{beside}: {counted(needs.cores, 'core')} can keep it busy for at most {100 * needs.busy:.0f} % of the time,"
        f" {needs.wanted} would do; give it more cores, or use JPEGs, or for PNGs pip install 'autolabel[fast]'"
    )


def preview(job: LabelJob, *, teacher: Teacher | None = None, progress: Progress | None = None) -> Preview:
    """Plan a run, or the rest of it, and label some images spread over it; nothing is written to `job.out`.

    They are `PROBED`, or `PROBED_ON_GPU` after a warm-up that does not count. progress hears of the images that are
    labelled; a worker of Ray tells of all at its end. Raises as `generate` does.
    """
    teachers = TeacherSource(job, teacher)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        request, run = settle(teachers.job, teachers.sha256(), scratch)
        job, recipe = request.job, request.recipe
        if run is None:
            require_fitting(request, teachers.load("cpu", recipe))
        plan = _plan(request, run, scratch)
        trial = new_run(request, plan.path.name, scratch)
        left = survey(run or trial, job.portion, plan)
        sizes: Counter[tuple[int, int]] = Counter()
        for table in request.manifest.tables():
            sizes.update(zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True))
        result = Preview(
            plan.samples, dict(sizes.most_common()), len(plan), recipe.unit_size, len(left.units), left.before.done,
            left.wanted, recipe.device, recipe.precision, notes=request.notes,
        )  # fmt: skip
        bucket, samples = _spread(left, PROBED if recipe.device == "cpu" else PROBED_ON_GPU)
        if not samples:
            return result
        if progress:
            progress(0, len(samples))
        unit = Unit("probe", bucket, 0, tuple(samples))
        return replace(result, probe=_probe(request, trial, left, unit, teachers=teachers, progress=progress))


def _spread(left: Left, most: int) -> tuple[str, list[Sample]]:
    """Up to `most` readable samples, spread over the units that are left, and a bucket of theirs."""
    if not left.wanted:
        return "", []
    step = max(1, len(left.units) // most)
    each = -(-most // len(left.units))
    units = [left.plan[number] for number in left.units[::step]]
    samples = [s for unit in units for s in unit.samples[:: max(1, len(unit.samples) // each)][:each] if s.readable]
    return units[0].bucket, samples[:most]


def _probe(
    request: Request, trial: Run, left: Left, unit: Unit, *, teachers: TeacherSource, progress: Progress | None
) -> Probe:
    machine, recipe, samples = request.job.machine, request.recipe, list(unit.samples)
    engine, _ = choose_engine(request, in_process=teachers.handed_in)
    crew = Crew(trial, machine.most)
    if engine == "local":
        crew = replace(
            crew,
            device=request.device,
            predictor=lambda run, device: TeacherPredictor(teachers.load(device, recipe), recipe),
        )
        labeller = local_labeller(crew)
        found = labeller.probe(samples, unit, progress=progress)
    else:
        from autolabel.pipeline.ray_engine import probe_ray

        memory = worker_bytes(request, left, lambda: teachers.load("cpu", recipe))
        crew = replace(crew, predictor=teacher_predictor, worker_bytes=memory)
        found = probe_ray(crew, samples, unit, machine.address)
        if progress:
            progress(len(found.rows), len(samples))
    rows, good = found.rows, [row for row in found.rows if row.labelled]
    return Probe(
        len(rows),
        len(rows) - len(good),
        len(rows) / found.seconds,
        found.budget,
        _milliseconds(good) if good else None,
        sum(row.label_bytes or 0 for row in good) / len(good) if good else None,
        _workers(request, engine),
        found.needs,
    )


def _milliseconds(rows: Sequence[Row]) -> dict[str, float]:
    steps = ("decode", "infer", "encode")
    return {name: sum(getattr(row, f"{name}_ms") for row in rows) / len(rows) for name in steps}


def _plan(request: Request, run: Run | None, scratch: Path) -> Plan:
    if run is None:
        path = write_plan(scratch, request.manifest, request.recipe.unit_size)
    else:
        copied = replace(run, path=scratch)
        storage.copy(run.plan_path, copied.plan_path)
        path = extend_plan(open_plan(copied, request.manifest), request.manifest)
    return open_plan(new_run(request, path.name, scratch), request.manifest)


def _workers(request: Request, engine: str) -> tuple[int, ...]:
    if engine == "local":
        return (1,)
    machine = request.job.machine
    if request.recipe.device == "cpu" and cluster_address(machine.address) is None:  # more than the cores do not help
        return tuple(n for n in _WORKERS if n <= cores())
    return _WORKERS
