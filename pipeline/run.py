"""One labelling run, from a request to a finished folder: prepare, label, publish, account."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from autolabel.manifests import storage
from autolabel.manifests.cluster import cluster_address, is_connected, require_gpus
from autolabel.manifests.run.folder import Accounts, Run, RunFolder
from autolabel.manifests.run.ledger import Ledger
from autolabel.manifests.samples import ManifestFile
from autolabel.manifests.tables import parts_of
from autolabel.manifests.wording import Shown, counted
from autolabel.pipeline.by_hand import set_aside
from autolabel.pipeline.closing import Closing
from autolabel.pipeline.engine import Crew, Ended, EngineFailed, Limits, PredictorFactory, run_local, teacher_predictor
from autolabel.pipeline.focus_counts import FocusCounts
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.kept_predictor import KeptPredictor
from autolabel.pipeline.lock import Lock, remove_leftovers
from autolabel.pipeline.predictor import TeacherPredictor
from autolabel.pipeline.prepare import (
    Left,
    Request,
    TeacherSource,
    is_prepared,
    prepare,
    require_fitting,
    settle,
    survey,
    worker_bytes,
)
from autolabel.pipeline.progress import Counters, Meter
from autolabel.pipeline.publish import publish
from autolabel.pipeline.records import RecordWriter, write_record
from autolabel.pipeline.units import Plan
from autolabel.teacher.predict import Teacher


@dataclass(frozen=True)
class Labelling(Shown):
    """The end of a call. `done` samples were finished by it; failed units are left, each with its reason."""

    run: Run
    accounts: Accounts
    done: int
    failed: dict[str, str]
    stopped: bool
    focus: FocusCounts | None = None

    def lines(self) -> list[str]:
        """The accounts in words."""
        a = self.accounts
        nothing = "" if self.done else "; nothing was to be done"
        return [
            f"{counted(a.asked, 'sample')}: {a.labelled} labelled, {a.quarantined} quarantined, {a.left} left for later"
            + nothing,
            *([str(self.focus)] if self.focus else []),
            f"run {self.run.path}   look: autolabel stats {self.run.path} · autolabel report {self.run.path}",
        ]

    def require_success(self) -> Run:
        """Return the run. Raises KeyboardInterrupt if the call was stopped, EngineFailed if units failed."""
        if self.stopped:
            raise KeyboardInterrupt
        if self.failed:
            name, reason = next(iter(self.failed.items()))
            raise EngineFailed(
                f"{len(self.failed)} units failed (the first, {name}: {reason}); run the same again to retry them"
            )
        return self.run


def generate(
    job: LabelJob,
    *,
    teacher: Teacher | None = None,
    source: Run | None = None,
    predictor: PredictorFactory | None = None,
    write: RecordWriter = write_record,
    limits: Limits | None = None,
    on_progress: Callable[[Counters], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Labelling:
    """Label what is left of a run and publish it.

    teacher: a loaded teacher, in place of the checkpoint; it labels in this process. source: a run whose kept
    confidence stands in for the teacher. predictor, write, limits: other sources of predictions, writers of records and
    patience than the usual ones. Raises ValueError for a request that cannot be met or differs from the one the folder
    holds, EngineFailed, ClusterFailed, OSError.
    """
    teachers = TeacherSource(job, teacher)
    digest = teachers.sha256() if source is None else source.recipe.teacher_sha256
    with tempfile.TemporaryDirectory() as scratch:
        request, run = settle(teachers.job, digest, Path(scratch), source)
    job, recipe = request.job, request.recipe
    known = bool(job.teacher.places)  # else predictions are adopted
    in_process = teacher is not None or source is not None or not known
    engine, reason = choose_engine(request, in_process=in_process)
    if run is None and source is None and known:
        require_fitting(request, teachers.load(request.device if engine == "local" else "cpu", recipe))
    if source is not None:
        predictor = predictor or (lambda run, device: KeptPredictor(source, run.recipe))
    elif engine == "local":
        predictor = predictor or (lambda run, device: TeacherPredictor(teachers.load(device, recipe), recipe))
    with Lock(job.out, job.portion.part, prepared=is_prepared(run, request)).held() as lock:
        if run is None and RunFolder(job.out).exists():  # another part has made it meanwhile
            request, run = settle(job, digest, job.out, source)
        elif run is not None:
            run = Run.open(job.out)  # as another driver may have left it
            run.require_same(recipe)
        run, plan = prepare(request, run, lock, source)
        lock.share()
        # Ray's workers ended with their driver, which knew of every death before; one without Ray may itself have died.
        left = survey(run, job.portion, plan, died=lock.after_death and run.engine == "local")

        def on_tick(counters: Counters) -> None:
            lock.require()
            if on_progress:
                on_progress(counters)

        closing = Closing(run, plan, left.whole, on_note)
        meter = Meter(
            run, recipe.label_space.names, asked=plan.samples, wanted=left.wanted, before=left.before,
            on_progress=on_tick, on_note=on_note, on_unit=closing.unit, budgets=run.budgets,
        )  # fmt: skip
        meter.tick()
        for note in request.notes:
            meter.note(note)
        ended = Ended()
        if left.units:
            place = run.input_manifest
            run = lock.update(
                lambda now: replace(
                    now, engine=engine, state="running", input_manifest=place, accounts=None, tables_sha256=None
                )
            )
            if reason:
                meter.note(f"engine {engine}: {reason}")
            crew = Crew(
                run, job.machine.most, 0, job.portion.retry_quarantined,
                predictor or teacher_predictor, write, limits or Limits(), request.device, job.machine.least,
            )  # fmt: skip
            work = closing.watch(left.units, left.work())
            try:
                if engine == "local":
                    ended = run_local(crew, work, meter)
                else:
                    from autolabel.pipeline.ray_engine import run_ray

                    if predictor is None:
                        memory = worker_bytes(request, left, lambda: teachers.load("cpu", recipe))
                        crew = replace(crew, worker_bytes=memory)
                    ended = run_ray(crew, work, len(left.units), meter, job.machine.address)
            finally:
                closing.end()
        lock.require(surely=True)
        closing.end()
        meter.tick(last=True)
        if moved := set_aside(run):
            meter.note(moved)
        with lock.publishing():
            run = _publish(lock, request.manifest, plan, meter.budgets, left)
        if lock.alone:
            _tidy(run, whole=run.state == "complete")
    assert run.accounts is not None
    focus = FocusCounts.of(run) if run.recipe.focus else None
    return Labelling(run, run.accounts, meter.now().done, ended.failed, ended.stopped, focus)


def choose_engine(request: Request, *, in_process: bool = False) -> tuple[str, str]:
    """The engine of a call, "local" or "ray", and the reason if it was left to us or leaves GPUs idle.

    `in_process` says that the predictor lives in this process. Raises ValueError if Ray was asked for all the same, or
    if this machine has fewer GPUs than workers.
    """
    machine, device = request.job.machine, request.recipe.device
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if in_process:
        if machine.engine == "ray":
            raise ValueError("engine ray cannot use a predictor of this process: give the checkpoint's path instead")
        return "local", ""
    if device == "mps" and machine.engine == "ray":  # of a run that began so; a job that asks for both is refused
        raise ValueError("engine ray: this run began with device mps, Apple's GPU, which only one process reaches")
    if machine.engine == "local" or request.job.one_gpu or device == "mps":
        one = f"{request.device if request.job.one_gpu else 'cuda:0'} of {gpus} GPUs does all the work"
        return "local", f"{one}; --engine ray uses all of them, --device cuda:N another" if gpus > 1 else ""
    address = cluster_address(machine.address)
    private = not (address or is_connected())
    needed = machine.least or machine.most
    if device == "cuda" and private and needed and needed > 1:
        require_gpus(needed, gpus)
    if machine.engine != "auto":
        return machine.engine, ""
    if address:
        return "ray", f"the cluster at {address}"
    if (machine.most or 1) > 1:
        return "ray", f"{machine.most} workers"
    several = gpus > 1 and machine.workers is None
    if several and any(islice(request.manifest.samples(), request.recipe.unit_size, None)):
        return "ray", f"one worker for each of {gpus} GPUs"
    return "local", "one unit of images needs one GPU only" if several else "this process does all the work"


def _tidy(run: Run, *, whole: bool) -> None:
    """Remove what killed workers left: temporary files, old records, and notes about units that they had committed."""
    remove_leftovers(run)
    for old in Ledger(run.path).old:
        storage.remove(old)
    if whole:
        for note in storage.list(run.attempts):
            storage.remove(note)


def _publish(lock: Lock, manifest: ManifestFile, plan: Plan, budgets: list[dict[str, object]], left: Left) -> Run:
    """Derive the tables and write the accounts; not again where nothing has changed since."""
    run = Run.open(left.run.path)  # as another part may have left it
    moved = run.input_manifest != manifest.path  # then the published manifest names the old place of the images
    tables = run.table_paths().values()
    published = run.accounts and run.tables_sha256 and not (left.units or moved) and all(map(parts_of, tables))
    if run.accounts and published and run.accounts.labelled + run.accounts.quarantined == left.before.done:
        return run
    provenance = {"manifest": str(manifest.path), "policy": run.policy.name}
    try:
        accounts, digests = publish(
            run, plan, manifest.image_root, provenance, before_end=lambda: lock.require(surely=True)
        )
    except OSError:
        lock.require(surely=True)  # a successor removes the temporary files of a driver that it takes for dead
        raise
    kinds = {budget["device"] for budget in budgets}
    run = lock.update(
        lambda now: replace(
            now,
            input_manifest=manifest.path,
            state="complete" if accounts.left == 0 else "partial",
            accounts=accounts,
            budgets=(*(budget for budget in now.budgets if budget["device"] not in kinds), *budgets),
            tables_sha256=digests,
        ),
        last=True,
    )
    if not accounts.balanced():
        raise EngineFailed(f"the accounts of {run.path} do not balance: {accounts}")
    return run
