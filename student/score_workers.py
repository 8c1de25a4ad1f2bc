"""Several processes score one checkpoint: Ray starts them, hands out images, and starts one again that has died.

Only places of images go in and counts come out. An actor keeps its network between two lots of images.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autolabel.manifests import notes
from autolabel.manifests.class_map import ClassMap
from autolabel.manifests.cluster import cluster_address, ray_session, require_gpus
from autolabel.manifests.machine import resident_memory
from autolabel.manifests.teachers import TeacherName
from autolabel.manifests.wording import Progress, counted
from autolabel.student.data import ManifestDataset
from autolabel.student.distributed import FAILURES, QUIET_S, START_S, WorkersFailed
from autolabel.student.job import ScoreMachine
from autolabel.student.scoring import ImageCounter, ScoreCounts
from autolabel.teacher.loading import load_teacher

_LOT = 32  # images that a GPU gets together; a CPU gets a quarter of them


@dataclass(frozen=True)
class ScoreRequest:
    """All that a worker needs: teacher (with paths that all machines have) and its sha256, images, and how to look."""

    teacher: TeacherName
    sha256: str
    window: tuple[int, int] | None
    class_map: ClassMap | None
    dataset: ManifestDataset
    scales: tuple[float, ...]
    flip: bool
    focus: float | None
    combine: str
    device: str
    version: str

    @classmethod
    def of(cls, counter: ImageCounter, device: str) -> ScoreRequest:
        """Return the request of what `counter` would count, on another device."""
        teacher = counter.teacher
        assert teacher.name is not None
        return cls(
            teacher.name.absolute(), teacher.sha256, teacher.window, teacher.class_map, counter.dataset,
            counter.scales, counter.flip, counter.focus, teacher.combine, device, _version(),
        )  # fmt: skip


def _version() -> str:
    return importlib.metadata.version("autolabel")


class Scorer:
    """An actor: a network on the device that Ray gave it. Calls also return True once it has died and begun again.

    The request comes with every call, as a reference in a list, which Ray does not follow. An actor that begins again
    cannot be sure to find it in Ray's memory if it is made from it.
    """

    def __init__(self) -> None:
        self._loaded: ImageCounter | None = None

    def _counter(self, request_at: list[Any]) -> ImageCounter:
        self._loaded = self._loaded or self._load(request_at)
        return self._loaded

    def _load(self, request_at: list[Any]) -> ImageCounter:
        import ray

        request: ScoreRequest = ray.get(request_at[0])
        if request.version != _version():
            raise WorkersFailed(
                f"a node has autolabel {_version()}, the driver {request.version}: install the same on all nodes"
            )
        teacher = load_teacher(
            request.teacher, device=request.device, combine=request.combine, window=request.window,
            class_map=request.class_map, space=request.dataset.label_space,
        )  # fmt: skip
        if teacher.sha256 != request.sha256:
            raise WorkersFailed(f"{request.teacher} is another file on a node than here: share one folder")
        return ImageCounter(teacher, request.dataset, request.scales, request.flip, request.focus, complete=True)

    def count(self, request_at: list[Any], places: Sequence[int]) -> tuple[ScoreCounts, bool]:
        """Return the counts of the images at these places; without any, only load the network."""
        counter = self._counter(request_at)
        counts = counter.counts()
        if places:
            for one in counter.each(places):
                counts.merge(one)
        return counts, self._again()

    def _again(self) -> bool:
        import ray

        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def count_by_workers(
    counter: ImageCounter, machine: ScoreMachine, *, device: str, progress: Progress | None = None
) -> ScoreCounts:
    """Count every image of a dataset by Ray's workers; `counter` is on this process's CPU.

    The images of a worker that dies are counted again, by it once it is back. Raises ValueError for workers that cannot
    be had, WorkersFailed, ClusterFailed, and the errors of `ImageCounter.each`.
    """
    images, workers = len(counter.dataset), machine.workers
    if workers > images:
        raise ValueError(f"workers {workers}: there {_are(images)} to score on, give at most as many workers")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {device} with workers: expected auto, cpu or cuda; Ray gives each worker its GPU")
    with (
        tempfile.TemporaryDirectory() as empty,
        ray_session(machine.address, Path(empty), workers=workers, otherwise="leave out --workers") as ray,
    ):
        kind = _kind(ray, machine, device)
        lot = min(_LOT if kind == "cuda" else _LOT // 4, math.ceil(images / workers))
        places = counter.by_size(range(images))
        lots = deque(places[first : first + lot] for first in range(0, images, lot))
        return _Crew(ray, counter, workers, kind, progress).count(lots)


def _are(images: int) -> str:
    return f"{'is' if images == 1 else 'are'} {counted(images, 'image')}"


def _kind(ray: Any, machine: ScoreMachine, device: str) -> str:
    """Return the kind of device that the workers compute on. Raises ValueError for GPUs that this machine lacks."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    private = cluster_address(machine.address) is None
    if device == "cuda" and private and not gpus:
        raise ValueError("device 'cuda' was asked for, but Ray finds no GPU on this machine: use cpu")
    if device == "cpu" or (device == "auto" and not gpus):
        if not private and device == "auto":
            notes.tell("the cluster has no GPU: its workers score on CPUs; --device cuda would wait for GPUs")
        return "cpu"
    if private:
        require_gpus(machine.workers, gpus)
    return "cuda"


class _Crew:
    """The workers, and the lots of images that they are at."""

    def __init__(self, ray: Any, counter: ImageCounter, workers: int, kind: str, progress: Progress | None) -> None:
        self.ray, self.counter, self.progress = ray, counter, progress
        self.needs: dict[str, Any] = {"num_cpus": 1, "num_gpus": int(kind == "cuda")}
        if kind == "cpu":
            self.needs["memory"] = _worker_bytes(counter)  # so that Ray puts no more of them on a node than fit
        remote = ray.remote(Scorer).options(**self.needs, max_restarts=FAILURES, max_task_retries=FAILURES)
        self.request_at = [ray.put(ScoreRequest.of(counter, kind))]
        self.actors = [remote.remote() for _ in range(workers)]
        # A reference to a result that is awaited -> its actor, and the places of the images that it counts.
        self.pending: dict[Any, tuple[Any, Sequence[int]]] = {}

    def _give(self, actor: Any, lot: Sequence[int]) -> None:
        self.pending[actor.count.remote(self.request_at, lot)] = actor, lot

    def count(self, lots: deque[list[int]]) -> ScoreCounts:
        """Hand out the lots, and return the counts of all. Raises WorkersFailed."""
        counts, done, total = self.counter.counts(), 0, sum(map(len, lots))
        began, started, said = time.monotonic(), False, False
        try:
            for actor in self.actors:
                self._give(actor, [])
            while done < total:
                for reference in self.ray.wait(list(self.pending), num_returns=1, timeout=1)[0]:
                    actor, lot = self.pending.pop(reference)
                    found, again = self._result(reference, lot)
                    started = True
                    counts.merge(found)
                    done += len(lot)
                    if self.progress and lot:
                        self.progress(done, total)
                    if again:
                        number = self.actors.index(actor) + 1
                        notes.tell(f"worker {number} died and was started again; its images are counted again")
                    if lots:
                        self._give(actor, lots.popleft())
                said = said or self._wait(0.0 if started else time.monotonic() - began)
        finally:
            for actor in self.actors:
                with contextlib.suppress(Exception):
                    self.ray.kill(actor)
        return counts

    def _result(self, reference: Any, lot: Sequence[int]) -> Any:
        from ray.exceptions import RayError, RayTaskError

        try:
            return self.ray.get(reference)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            samples = self.counter.dataset.samples
            at = f" at images {samples[lot[0]].sample_id!r} to {samples[lot[-1]].sample_id!r}" if lot else ""
            why = next(iter(str(error).strip().splitlines()), "an error without words")
            raise WorkersFailed(
                f"a worker died {FAILURES + 1} times{at} ({why}): leave out --workers to see why, or use fewer"
            ) from error

    def _wait(self, waited: float) -> bool:
        """Say once that no worker has started yet, and give up in the end."""
        if waited < QUIET_S:
            return False
        memory = f", {self.needs['memory'] / 2**30:.1f} GiB of memory" if "memory" in self.needs else ""
        needs = f"each needs {'1 GPU, ' if self.needs['num_gpus'] else ''}1 CPU{memory}"
        resources = self.ray.cluster_resources()
        has = ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("GPU", "CPU"))
        has += f", {resources.get('memory', 0) / 2**30:.1f} GiB of memory"
        if waited > START_S:
            raise WorkersFailed(f"no worker started in {START_S:.0f} s: {needs}, the cluster has {has}")
        notes.tell(f"waiting for a worker: {needs}, the cluster has {has}; giving up after {START_S / 60:.0f} min")
        return True


def _worker_bytes(counter: ImageCounter) -> int:
    """Return the memory that a worker on a CPU needs: itself, and the largest image, as it is measured here."""
    pixels = max(s.height * s.width for s in counter.dataset.samples)
    budget = counter.teacher.budget(scales=counter.scales, flip=counter.flip, focus=counter.focus)
    return resident_memory() + int(budget.needs(1, pixels))
