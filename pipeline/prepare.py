"""From a request to a run that is ready to be labelled: settle, check, resume, survey."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from autolabel.manifests import storage
from autolabel.manifests.cluster import ask_gpus, cluster_address, cluster_gpus, is_connected
from autolabel.manifests.machine import resident_memory
from autolabel.manifests.recipe import Recipe
from autolabel.manifests.run.folder import PREPARING, Run, RunFolder
from autolabel.manifests.run.ledger import Ledger
from autolabel.manifests.run.shards import create_zarr
from autolabel.manifests.samples import ManifestFile, open_manifest
from autolabel.manifests.tables import table_sha256
from autolabel.pipeline.attempts import excuse, noted_units
from autolabel.pipeline.closing import closed_units
from autolabel.pipeline.cutting import extend_plan, write_plan
from autolabel.pipeline.engine import Work
from autolabel.pipeline.fitting import focus_for, notes_on_polygons, require_large_enough, require_policy
from autolabel.pipeline.job import LabelJob, Portion
from autolabel.pipeline.lock import Lock, remove_leftovers
from autolabel.pipeline.names import require_png_names
from autolabel.pipeline.predictor import load_for
from autolabel.pipeline.records import FRESH, Known, Row, committed, tally
from autolabel.pipeline.units import Plan, Tally, in_part, matcher
from autolabel.teacher.device import common_precision, gpu_precisions, pick_device, pick_precision
from autolabel.teacher.memory import batch_pixels
from autolabel.teacher.predict import Teacher

_PACKAGES = ("autolabel", "torch", "numpy", "zarr", "ray", "pillow", "pyarrow")


class TeacherSource:
    """The teacher of a `job`: loaded once, when it is needed, or handed in. Raises ValueError if that one is unfit."""

    def __init__(self, job: LabelJob, loaded: Teacher | None) -> None:
        self.job = job if loaded is None else _as_loaded(job, loaded)
        self._loaded, self.handed_in = loaded, loaded is not None

    def sha256(self) -> str:
        """The digest of the teacher. Raises BadTeacher if there is none of that name."""
        return self.job.teacher.digest() if self._loaded is None else self._loaded.sha256

    def load(self, device: str, recipe: Recipe) -> Teacher:
        """The teacher on this device. Raises BadTeacher, BadCheckpoint, ValueError."""
        if self._loaded is None or not (self.handed_in or self._loaded.device == torch.device(device)):
            labels = torch.device(device).type == recipe.device  # else it only shows whether it fits
            recipe = recipe if labels else replace(recipe, precision="float32")
            self._loaded = load_for(self.job.teacher, recipe, device=device, labels=labels)
        return self._loaded


def _as_loaded(job: LabelJob, teacher: Teacher) -> LabelJob:
    """The job with the device and the precision of a loaded teacher. Raises ValueError if it asks for others."""
    if not teacher.sha256:
        raise ValueError("a teacher that was never in a file cannot be told from another: save it and load it again")
    for name, own in (
        ("device", teacher.device.type), ("precision", teacher.precision), ("combine", teacher.combine),
        ("window", teacher.window), ("class_map", teacher.class_map),
        ("compile", teacher.compile),
    ):  # fmt: skip
        if getattr(job, name) not in ("auto", own):
            raise ValueError(f"{name} {getattr(job, name)!r}: expected {own!r}, which the loaded teacher has")
    return replace(job, device=teacher.device.type, precision=teacher.precision)


@dataclass(frozen=True)
class Request:
    """A job whose open choices are settled: absolute paths, a manifest, a recipe.

    notes: sentences about a request that was never made before.
    """

    job: LabelJob
    manifest: ManifestFile
    recipe: Recipe
    input_sha256: str
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """The device of this process, such as "cuda:1"; the recipe has its kind."""
        return self.job.device if self.job.one_gpu else self.recipe.device


def settle(job: LabelJob, teacher_sha256: str, scratch: Path, source: Run | None = None) -> tuple[Request, Run | None]:
    """Settle device, precision and batches: those that the run, or its `source`, began with, or the best there are now.

    Returns the run too, if the folder holds one. `scratch` is a folder without Python files, for Ray. Raises ValueError
    if the run was asked for differently, or the policy does not fit.
    """
    job = replace(job, manifest=job.manifest.absolute(), teacher=job.teacher.absolute(), out=job.out.absolute())
    manifest = open_manifest(job.manifest)
    folder = RunFolder(job.out)
    folder.require_new_or_run()
    run = Run.open(job.out) if folder.exists() else None
    notes: tuple[str, ...] = ()
    if run is None:  # else this was checked when the run began
        require_policy(job, manifest)
        notes = notes_on_polygons(job.policy, manifest, teacher_sha256=teacher_sha256)
        device, precision = (job.device, job.precision) if source else _settle_device(job, scratch)
    else:
        device = run.recipe.device if job.device == "auto" else torch.device(job.device).type
        precision = run.recipe.precision if job.precision == "auto" else job.precision
    earlier = run or source
    pixels = batch_pixels(device) if earlier is None else earlier.recipe.batch_pixels
    edges = job.policy.edges(manifest.label_space, job.keep_confidence) if job.keep_confidence else None
    if edges and not job.teacher.places:
        edges = tuple(sorted({0.0, *edges}))  # PNGs also say that a pixel has no class
    scales = job.scales or (earlier.recipe.scales if earlier else job.teacher.scales)
    focus = focus_for(job, scales, teacher_sha256=teacher_sha256, space=manifest.label_space)
    recipe = Recipe(
        teacher_sha256, job.window, job.class_map, scales, job.flip, job.combine, focus, job.policy, edges,
        job.keep_probability, precision, device, pixels, job.store, job.unit_size, job.compile, manifest.label_space,
    )  # fmt: skip
    if run is not None:
        run.require_same(recipe)
    return Request(job, manifest, recipe, table_sha256(job.manifest), notes), run


def _settle_device(job: LabelJob, scratch: Path) -> tuple[str, str]:
    """The kind of device and the precision, as the devices that will compute tell. Raises ValueError, ClusterFailed."""
    address = cluster_address(job.machine.address)
    ray = job.machine.engine != "local" and not job.one_gpu
    if ray and (address or (job.machine.engine == "ray" and is_connected())):
        device = job.device
        if device == "auto":
            device = "cuda" if cluster_gpus(address, scratch) else "cpu"
        if device != "cuda" or job.precision != "auto":
            return device, pick_precision(job.precision, "cpu")  # the driver's machine has no say
        return device, common_precision(ask_gpus(address, scratch, question=gpu_precisions))
    device = pick_device(job.device)
    several = ray and device == "cuda" and job.precision == "auto"
    precision = common_precision(gpu_precisions()) if several else pick_precision(job.precision, device)
    return torch.device(device).type, precision


def require_fitting(request: Request, teacher: Teacher) -> None:
    """Raise ValueError if this teacher cannot do the job, which a model of another library has to try first."""
    job, recipe = request.job, request.recipe
    teacher.require_space(request.manifest.label_space, teacher=str(job.teacher), manifest=str(job.manifest))
    teacher.network.require(recipe.scales, flip=recipe.flip, focus=recipe.share)
    if not teacher.network.confident and job.asks_of_confidence:
        raise ValueError(
            f"{job.asks_of_confidence} was asked for, but {job.teacher} gives class ids without probabilities: leave it"
            " out"
        )
    if recipe.share is not None:
        require_large_enough(request.manifest, teacher, recipe.scales, share=recipe.share)
    teacher.require_sound(recipe.scales, flip=recipe.flip)


def is_prepared(run: Run | None, request: Request) -> bool:
    """True for a run in which `prepare` has nothing left to do."""
    return run is not None and run.state != PREPARING and run.input_sha256 == request.input_sha256


def prepare(request: Request, run: Run | None, lock: Lock, source: Run | None = None) -> tuple[Run, Plan]:
    """Make `run.json`, the plan and the folders of the labels, or bring those of a run up to date.

    The plan is cut anew, copied from `source`, or extended by the samples that the manifest has gained. A call that is
    killed anywhere is made good by the next one: the folder is claimed first, then the plan is written, then `run.json`
    that names it, then everything that follows from both.
    """
    job, manifest, folder = request.job, request.manifest, RunFolder(request.job.out)
    if not lock.alone:  # another part has prepared everything
        if run is None or run.input_sha256 != request.input_sha256:
            raise ValueError(f"another part of {job.out} works on another manifest: give all of them the same")
        return run, open_plan(run, manifest)
    remove_leftovers(folder)
    if run is not None and run.engine == "ray":  # its workers ended with their driver
        for note in storage.list(folder.attempts, suffix=".jsonl"):
            excuse(note)
    if run is None or run.input_sha256 != request.input_sha256:
        folder.claim()
        plan_path = _plan_path(request, run, source)
        before = run.budgets if run else ()
        run = replace(
            new_run(request, plan_path.name, job.out), budgets=before, source=source.path if source else None
        )  # fmt: skip
        plan = open_plan(run, manifest)
        _require_labels(run, plan, manifest)
        run = lock.update(run)
    else:
        plan = open_plan(run, manifest)
        run = replace(run, input_manifest=job.manifest)  # the data set may have moved; saved if the call gets that far
    _make_stores(run, plan)
    for old in storage.list(job.out, suffix=".arrow"):
        if old.name.startswith("plan-") and old.name != run.plan:
            storage.remove(old)
    return run, plan


def new_run(request: Request, plan: str, folder: Path) -> Run:
    """A run that has not begun, with this plan (the name of a file in `folder`)."""
    job = request.job
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    teacher = job.teacher if job.teacher.places else None
    return Run(
        folder, request.recipe, job.manifest, request.input_sha256, plan, teacher, "local", versions,
        platform.machine(), state=PREPARING,
    )  # fmt: skip


def _plan_path(request: Request, run: Run | None, source: Run | None) -> Path:
    job, manifest = request.job, request.manifest
    if run is not None:
        return extend_plan(open_plan(run, manifest), manifest)
    if source is None:
        return write_plan(job.out, manifest, job.unit_size)
    path = storage.under(job.out, source.plan)
    storage.copy(source.plan_path, path)
    return path


def open_plan(run: Run, manifest: ManifestFile) -> Plan:
    """The plan of a run. Raises BadTable."""
    return Plan(run.plan_path, run.recipe.unit_size, manifest.image_root, manifest.label_root)


def _require_labels(run: Run, plan: Plan, manifest: ManifestFile) -> None:
    """Raise ValueError if there is nothing to label, or a label could not be written under its name."""
    if not plan.samples:
        raise ValueError(f"{run.input_manifest} lists no samples: nothing to label")
    if run.recipe.store == "png":
        require_png_names(run.path, lambda: (table["image"] for table in manifest.tables(("image",))))


def _make_stores(run: Run, plan: Plan) -> None:
    """Write what the stores of the labels lack."""
    if run.recipe.store == "zarr":
        for layer, attributes in run.zarr_layers().items():
            create_zarr(run.layer(layer), plan.rows(), shard_rows=run.recipe.unit_size, attributes=attributes)


# --- the work that is left --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Left:
    """The work of this call: numbers of units, the number of samples in them; and the samples done before.

    room: the number of samples that --limit leaves of a unit that it cuts. known: what is known of units at which
    somebody has been, by name. whole: numbers of the units that are whole and in no chapter.
    """

    run: Run
    portion: Portion
    plan: Plan
    units: list[int]
    room: dict[int, int]
    wanted: int
    before: Tally
    known: Mapping[str, Known]
    whole: Sequence[int] = ()

    def work(self) -> Iterator[Work]:
        """Yield the units with their samples, made as they are needed."""
        for number in self.units:
            unit = self.plan.packed(number)
            known, done = self.known.get(unit.name, FRESH), dict[str, Row]()
            if known.commit is not None:
                retry = self.portion.retry_quarantined
                done = committed(self.run, unit.unit(), known.commit, retry_quarantined=retry)
            ids = _wanted_ids(self.portion, unit.ids(), self.room.get(number))
            yield Work(unit, tuple(name for name in ids if name not in done), known)


def _wanted_ids(portion: Portion, ids: Iterable[str], room: int | None) -> list[str]:
    return list(islice(filter(matcher(portion.only), ids), room))


def survey(run: Run, portion: Portion, plan: Plan, *, died: bool = False) -> Left:
    """Compare the plan with the commit records.

    died: the process of the call before may have died at an image: the unit at which it was is the first that is left.
    """
    ledger, noted = Ledger(run.path), noted_units(run)
    units: list[int] = []
    cut: dict[int, int] = {}
    known: dict[str, Known] = {}
    whole: list[int] = []
    wanted, room = 0, portion.limit
    closed, before = closed_units(ledger, plan)
    for number in range(len(plan)):
        mine = in_part(number, portion.part) and room != 0
        all_of_it = portion.only is None and (room is None or room >= plan.count(number))
        if all_of_it and closed[number]:
            room = room if room is None or not mine else room - plan.count(number)
            continue
        commit = ledger.get(plan.name(number))
        if all_of_it and commit is None:
            wanted_here = left = plan.count(number) if mine else 0
        else:
            unit, trusted = plan.packed(number), commit is not None and commit.chapter is not None
            retry = portion.retry_quarantined
            done = committed(run, unit.unit(), commit, retry_quarantined=retry, trusted=trusted) if commit else {}
            before = before if closed[number] else before + tally(done.values())
            if len(done) == plan.count(number) and not trusted:
                whole.append(number)
            ids = _wanted_ids(portion, unit.ids(), room) if mine else []
            wanted_here, left = len(ids), sum(name not in done for name in ids)
            if room is not None and room < len(_wanted_ids(portion, unit.ids(), None)):
                cut[number] = room
        room = None if room is None else room - wanted_here
        if left:
            name, careful = plan.name(number), died and not units
            if commit or careful or name in noted:
                known[name] = Known(commit, careful, name in noted)
            units.append(number)
            wanted += left
    return Left(run, portion, plan, units, cut, wanted, before, known, whole)


def worker_bytes(request: Request, left: Left, load: Callable[[], Teacher]) -> int:
    """The memory that a CPU worker of Ray needs: itself and one image, as the teacher tells on this machine.

    A twentieth of the images may be larger than that image: one panorama must not hold up all the rest.
    """
    if request.recipe.device != "cpu":
        return 0
    units = left.units[:: max(1, len(left.units) // 64)]
    sizes = sorted(s.height * s.width for number in units for s in left.plan[number].samples)
    pixels = sizes[len(sizes) * 19 // 20]
    if not pixels:
        return 0
    recipe = request.recipe
    budget = load().budget(scales=recipe.scales, flip=recipe.flip, focus=recipe.share)
    itself = resident_memory()
    return itself + int(budget.needs(1, pixels))
