"""One labelling run, from a manifest to a finished folder: plan, resume, label, publish, account."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autolabel.manifests.cluster import cluster_address, cluster_gpus
from autolabel.manifests.files import remove_leftovers, sha256, writing
from autolabel.manifests.run.folder import (
    FORMAT,
    RUN,
    About,
    Lock,
    read_about,
    require_new_or_run,
    require_same,
    write_about,
)
from autolabel.manifests.run.labels import CONFIDENCE, LABELS, TOP, png_name, zarr_folder
from autolabel.manifests.run.shards import create_zarr
from autolabel.manifests.samples import ManifestFile, open_manifest
from autolabel.pipeline.engine import (
    Crew,
    EngineFailed,
    Outcome,
    Work,
    run_local,
    run_ray,
)
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.progress import Meter, Progress
from autolabel.pipeline.publish import TABLES, Accounts, publish
from autolabel.pipeline.records import ATTEMPTS, UNITS, committed, excuse, tally
from autolabel.pipeline.units import (
    Plan,
    Tally,
    Unit,
    extend_plan,
    in_part,
    matcher,
    require_distinct,
    write_plan,
)
from autolabel.teacher.checkpoints import BadCheckpoint
from autolabel.teacher.predict import Teacher, load_teacher, pick_device, pick_precision

_PACKAGES = ("autolabel", "torch", "numpy", "zarr", "ray", "pillow", "pyarrow")


@dataclass(frozen=True)
class Result:
    """How a call ended. `done` samples were finished by it; failed units are left, each with its reason."""

    accounts: Accounts
    done: int
    failed: dict[str, str]
    stopped: bool


def generate(
    job: LabelJob,
    on_progress: Callable[[Progress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    address: str | None = None,
    **crew: Any,
) -> Result:
    """Label what is left of a run and publish it. `crew` replaces fields of `Crew`.

    Raises ValueError for a request that cannot be met or differs from the one the folder holds, ClusterFailed,
    EngineFailed, OSError.
    """
    job = absolute(job)
    manifest = open_manifest(job.manifest)
    if not (job.out / RUN).is_file():  # else this was found out when the run began
        require_policy(job, manifest)
        if job.source is None:
            require_fitting(job, manifest)
    job.out.mkdir(parents=True, exist_ok=True)
    with Lock(job.out, job.part).held() as lock:
        job, about, plan = _prepare(job, manifest, address, lock)
        lock.share()
        left = survey(job, plan)
        if left.units:
            running = {"engine": job.engine, "state": "running", "accounts": None, "tables": None}
            write_about(job.out, {**about, **running})
        meter = Meter(job.out, manifest.label_space.names, plan.samples, left.wanted, left.before, on_progress, on_note)
        meter.tick()
        outcome = Outcome()
        if left.units:
            able = Crew(job, manifest.label_space, manifest.image_root, worker_bytes(job, plan, left))
            able = replace(able, **crew)
            if job.engine == "ray":
                outcome = run_ray(able, left.work(), len(left.units), meter, address)
            else:
                outcome = run_local(able, left.work(), meter)
        meter.tick(last=True)
        with lock.publishing():
            accounts = _publish(job, manifest, plan, meter.plans, left)
        if lock.alone:
            _tidy(job.out, accounts.left == 0)
    return Result(accounts, meter.now().done, outcome.failed, outcome.stopped)


def absolute(job: LabelJob) -> LabelJob:
    """The job with absolute paths: workers run elsewhere."""
    return replace(job, manifest=job.manifest.absolute(), teacher=job.teacher.absolute(), out=job.out.absolute())


def _prepare(job: LabelJob, manifest: ManifestFile, address: str | None, lock: Lock) -> tuple[LabelJob, About, Plan]:
    """The job with device and precision settled, `run.json` and the plan, in a folder that is ready for its labels."""
    require_new_or_run(job.out)
    before = read_about(job.out) if (job.out / RUN).is_file() else None
    job = settled(job, before, address, job.out)
    asked = identity(job, manifest)
    digest = sha256(job.manifest)
    if before is not None:
        require_same(job.out, before, asked)
    if not lock.alone:  # another part has prepared everything
        if before is None or before["manifest_sha256"] != digest:
            raise ValueError(f"another part of {job.out} works on another manifest: give all of them the same")
        return job, before, _open_plan(job.out / before["plan"], job, manifest)
    remove_leftovers(job.out)
    if before is not None and before["engine"] == "ray":  # its workers ended with their driver
        for note in (job.out / ATTEMPTS).glob("*.jsonl"):
            excuse(note)
    if before is None:
        made = write_plan(job.out, manifest, job.unit_size) if job.source is None else _same_plan(job.source, job.out)
        plan = _open_plan(made, job, manifest)
    else:
        plan = _open_plan(job.out / before["plan"], job, manifest)
        if before["manifest_sha256"] != digest:
            plan = _open_plan(extend_plan(plan, manifest), job, manifest)
    if not plan.samples:
        raise ValueError(f"{job.manifest} lists no samples: nothing to label")
    if job.store == "zarr":
        for layer, attributes in zarr_layers(asked).items():
            create_zarr(job.out / zarr_folder(layer), plan.rows(), job.unit_size, attributes)
    else:
        _require_distinct_labels(manifest)
    (job.out / UNITS).mkdir(exist_ok=True)
    about = {
        "format": FORMAT,
        **asked,
        "manifest": str(job.manifest),
        "manifest_sha256": digest,
        "plan": plan.path.name,
        "teacher": str(job.teacher),
        "engine": job.engine,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "machine": platform.machine(),
        "plans": before["plans"] if before else [],
        "state": "partial",
        "accounts": None,
        "tables": None,
    }
    if before is None or before["manifest_sha256"] != digest:
        write_about(job.out, about)
    else:
        about = before
    for old in job.out.glob("plan*.arrow"):
        if old.name != about["plan"]:
            old.unlink()
    return job, about, plan


def _same_plan(source: Path, out: Path) -> Path:
    """The plan of another run: every sample gets its unit and row there."""
    path = out / str(read_about(source)["plan"])
    with writing(path) as temporary:
        shutil.copyfile(source / path.name, temporary)
    return path


def _open_plan(path: Path, job: LabelJob, manifest: ManifestFile) -> Plan:
    return Plan(path, job.unit_size, manifest.image_root, manifest.label_root)


def settled(job: LabelJob, before: About | None, address: str | None, folder: Path) -> LabelJob:
    """The job with its device and precision named: those that the run began with, or what there is now."""
    if before is not None:
        device = before["device"] if job.device == "auto" else job.device
        precision = before["precision"] if job.precision == "auto" else job.precision
        return replace(job, device=device, precision=precision)
    device = job.device
    cluster = cluster_address(address) if job.engine == "ray" else None
    if device == "auto" and cluster:
        device = "cuda" if cluster_gpus(cluster, folder) else "cpu"
    elif device == "auto":
        device = pick_device("auto")
    return replace(job, device=device, precision=pick_precision(job.precision, device))


def identity(job: LabelJob, manifest: ManifestFile) -> About:
    """What must be the same for two calls to work on one run."""
    if job.source is not None:
        teacher = str(read_about(job.source)["teacher_sha256"])
    elif job.teacher.is_file():
        teacher = sha256(job.teacher)
    else:
        raise BadCheckpoint(f"{job.teacher} does not exist: expected a checkpoint")
    kept = job.policy.edges(manifest.label_space, job.keep_confidence) if job.keep_confidence else None
    return {
        "teacher_sha256": teacher,
        "scales": list(job.scales),
        "flip": job.flip,
        "combine": job.combine,
        "policy": job.policy.to_dict(),
        "confidence_edges": list(kept) if kept else None,
        "precision": job.precision,
        "device": job.device,
        "store": job.store,
        "unit_size": job.unit_size,
        "label_space": json.loads(manifest.label_space.to_json()),
    }


def zarr_layers(about: About) -> dict[str, About]:
    """The layers that a run holds, and what the store of each says of itself."""
    space, edges = {"label_space": about["label_space"]}, about["confidence_edges"]
    layers = {LABELS: {**space, "ignore": 255, "policy": about["policy"]}}
    return layers if edges is None else {**layers, TOP: space, CONFIDENCE: {"edges": edges}}


def require_policy(job: LabelJob, manifest: ManifestFile) -> None:
    """Raise ValueError if the policy does not fit the label space, or an image of the manifest."""
    job.policy.require(manifest.label_space)
    job.policy.edges(manifest.label_space, job.keep_confidence)
    if job.policy.area is not None:
        for table in manifest.tables():
            sizes = zip(
                table["height"].to_pylist(), table["width"].to_pylist(), table["image"].to_pylist(), strict=True
            )
            for height, width, image in sizes:
                if height:  # else it cannot be read
                    try:
                        job.policy.area.box(height, width)
                    except ValueError as error:
                        raise ValueError(f"{image}: {error}") from error


def require_fitting(job: LabelJob, manifest: ManifestFile) -> None:
    """Raise ValueError if this teacher cannot do what is asked."""
    teacher = load_teacher(job.teacher, "cpu", job.precision, job.combine)
    teacher.require_space(manifest.label_space, str(job.teacher), str(job.manifest))
    teacher.combination.require(job.scales)


def _require_distinct_labels(manifest: ManifestFile) -> None:
    names = ([png_name(image) for image in table["image"].to_pylist()] for table in manifest.tables())
    require_distinct(
        names, lambda name: f"two images would both write {LABELS}/{name}: use --store zarr, or rename one of them"
    )


@dataclass(frozen=True)
class Left:
    """What this call is to do: numbers of units, and how many samples of them; and what was done before."""

    job: LabelJob
    plan: Plan
    units: list[int]
    room: dict[int, int]  # samples that --limit leaves of a unit that it cuts
    wanted: int
    before: Tally

    def work(self) -> Iterator[Work]:
        """The units with their samples, made as they are needed."""
        for number in self.units:
            unit = self.plan[number]
            done = committed(self.job.out, unit, self.job.retry_quarantined)
            yield Work(unit, tuple(name for name in _asked(self.job, unit, self.room.get(number)) if name not in done))


def _asked(job: LabelJob, unit: Unit, room: int | None) -> list[str]:
    wanted = matcher(job.only)
    return [s.sample_id for s in unit.samples if wanted(s.sample_id)][:room]


def survey(job: LabelJob, plan: Plan) -> Left:
    """Compare the plan with the commit records."""
    records = set(os.listdir(job.out / UNITS)) if (job.out / UNITS).is_dir() else set()
    units: list[int] = []
    cut: dict[int, int] = {}
    wanted, before, room = 0, Tally(), job.limit
    every = job.only is None
    for number in range(len(plan)):
        mine = in_part(number, job.part) and room != 0
        recorded = f"{plan.name(number)}.parquet" in records
        if every and not recorded and (room is None or room >= plan.count(number)):
            asked, left = plan.count(number) if mine else 0, plan.count(number) if mine else 0
        else:
            unit = plan[number]
            done = committed(job.out, unit, job.retry_quarantined) if recorded else {}
            before += tally(done.values())
            ids = _asked(job, unit, room) if mine else []
            asked, left = len(ids), sum(name not in done for name in ids)
            if room is not None and room < len(_asked(job, unit, None)):
                cut[number] = room
        room = None if room is None else room - asked
        if left:
            units.append(number)
            wanted += left
    return Left(job, plan, units, cut, wanted, before)


def worker_bytes(job: LabelJob, plan: Plan, left: Left) -> int:
    """Memory that a CPU worker needs, itself and one image of the sizes at hand, told by the teacher on this machine.

    A twentieth of the images may be larger than what is reckoned with: one panorama must not hold up all the rest.
    """
    if job.engine == "local" or job.device != "cpu":
        return 0
    sizes = sorted(s.height * s.width for k in left.units[:: max(1, len(left.units) // 64)] for s in plan[k].samples)
    pixels = sizes[len(sizes) * 19 // 20]
    if not pixels:
        return 0
    teacher: Teacher = load_teacher(job.teacher, "cpu", job.precision, job.combine)
    itself = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return itself + int(teacher.plan(job.scales, job.flip).needs(1, pixels))


def _tidy(run: Path, whole: bool) -> None:
    """Remove what killed workers left: temporary files, and notes about units that they had just committed."""
    remove_leftovers(run)
    if whole:
        for note in (run / ATTEMPTS).glob("*.jsonl"):
            note.unlink(missing_ok=True)


def _publish(job: LabelJob, manifest: ManifestFile, plan: Plan, plans: list[dict[str, Any]], left: Left) -> Accounts:
    """Derive the tables and write the accounts; not again where nothing has changed since."""
    about = read_about(job.out)  # as another part may have left it
    if about["tables"] and not left.units and all((job.out / name).is_file() for name in TABLES):
        told = Accounts(**about["accounts"])
        if told.labelled + told.quarantined == left.before.done:
            return told
    provenance = {"manifest": str(job.manifest), "policy": job.policy.name}
    accounts, tables = publish(job.out, plan, manifest.label_space, manifest.image_root, provenance)
    kinds = {p["device"] for p in plans}
    about |= {
        "state": "complete" if accounts.left == 0 else "partial",
        "accounts": asdict(accounts),
        "plans": [*(p for p in about["plans"] if p["device"] not in kinds), *plans],
        "tables": tables,
    }
    write_about(job.out, about)
    if not accounts.balanced():
        raise EngineFailed(f"the accounts of {job.out} do not balance: {accounts}")
    return accounts
