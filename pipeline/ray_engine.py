"""Ray's workers do the units. The only file of this room that imports Ray.

Plain actors and one small `ray.wait` loop. An actor takes one unit, labels and commits it, and asks for the next; only
the list of its samples goes in and counts come out. Actors are never restarted by Ray: a dead one is replaced here and
its unit goes to the back of the queue. Crashes of our own and lost machines are counted apart.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from autolabel.manifests.cluster import cluster_address, ray_session
from autolabel.manifests.samples import Sample
from autolabel.manifests.wording import kind_and_reason
from autolabel.pipeline.attempts import excuse, note_path
from autolabel.pipeline.engine import STOPPING, Crew, Ended, EngineFailed, Monitor, Work, stoppable
from autolabel.pipeline.label import Trial
from autolabel.pipeline.units import Tally, Unit
from autolabel.teacher.compiled import CompilationFailed
from autolabel.teacher.memory import MemoryTaken

_TICKS = 100  # a second, of all workers together
_PAUSE = 5e-5  # seconds between two looks at the workers, for each of them: a look costs 3e-6
_STOPS_THE_RUN = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}  # no other worker fares better


@dataclass(frozen=True)
class Tick:
    """A sign of life: the finished samples of a unit so far. The last one brings the memory budget."""

    tally: Tally
    budget: dict[str, Any] | None = None


class Worker:
    """An actor: a `Labeller` on the device that Ray gave it."""

    def __init__(self, crew: Crew, version: str) -> None:
        import ray

        mine = importlib.metadata.version("autolabel")
        if mine != version:
            raise EngineFailed(f"a node has autolabel {mine}, the driver {version}: install the same on all nodes")
        device, threads = "cpu", 1
        if ray.get_gpu_ids():  # an actor without GPUs may see them all the same
            device = "cuda"
            here = ray.get_runtime_context().get_node_id()
            nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
            resources = next(node["Resources"] for node in nodes if node["NodeID"] == here)
            threads = max(1, int(resources.get("CPU", 1) // resources.get("GPU", 1)))
        self.labeller = crew.labeller(device, threads)

    def ready(self) -> str:
        """Return the id of its node, once the teacher is loaded."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def stop(self) -> None:
        """Call `Labeller.stop`, from another thread than `run`."""
        self.labeller.stop()

    def probe(self, samples: list[Sample], unit: Unit) -> Trial:
        """Call `Labeller.probe`."""
        return self.labeller.probe(samples, unit)

    def run(self, item: Work, pause: float) -> Iterator[Tick]:
        """Run `Labeller.run` with a tick at most once in `pause` seconds: each one is a message to the driver."""
        last, tally = time.monotonic(), Tally()
        for tally in self.labeller.run(item.unit.unit(), item.wanted, item.known):
            if time.monotonic() - last > pause:
                last = time.monotonic()
                yield Tick(tally)
        yield Tick(tally, self.labeller.budget())


def _actor(ray: Any, crew: Crew) -> Callable[[], Any]:
    """Make a function that asks Ray for a new worker."""
    needs: dict[str, Any] = {"num_cpus": 1, "num_gpus": int(crew.run.recipe.device == "cuda")}
    if crew.run.recipe.device == "cpu" and crew.worker_bytes:
        needs["memory"] = crew.worker_bytes  # so that Ray puts no more of them on a node than fit
    remote = ray.remote(Worker).options(**needs, max_restarts=0, max_task_retries=0, max_concurrency=2)
    sent, version = ray.put(crew), importlib.metadata.version("autolabel")
    return lambda: remote.remote(sent, version)


def _has(ray: Any) -> str:
    resources = ray.cluster_resources()
    gpus, cpus, memory = (resources.get(name, 0) for name in ("GPU", "CPU", "memory"))
    return f"{gpus:g} GPU, {cpus:g} CPU and {memory / 2**30:.1f} GiB of memory"


def _no_worker(ray: Any, crew: Crew) -> str:
    return f"no worker started in {crew.limits.start_s:.0f} s: each needs {crew.needs()}, the cluster has {_has(ray)}"


def run_ray(crew: Crew, work: Iterator[Work], total: int, monitor: Monitor, address: str | None) -> Ended:
    """Do `total` units of work with Ray actors. Raises EngineFailed, ClusterFailed, OSError."""
    with ray_session(address, crew.run.path, workers=crew.workers) as ray:
        if not cluster_address(address) and crew.run.recipe.device == "cuda" and not ray.cluster_resources().get("GPU"):
            raise EngineFailed("no GPU can be had: Ray sees none on this machine (it has " + _has(ray) + ")")
        with stoppable(lambda: monitor.note(STOPPING)) as stop:
            return _Loop(ray, crew, work, total, monitor, stop).run()


def probe_ray(crew: Crew, samples: list[Sample], unit: Unit, address: str | None) -> Trial:
    """Label some samples with one of Ray's workers and keep nothing."""
    with ray_session(address, crew.run.path) as ray:
        actor = _actor(ray, crew)()
        try:
            ray.get(actor.ready.remote(), timeout=crew.limits.start_s)
        except ray.exceptions.GetTimeoutError as error:
            raise EngineFailed(_no_worker(ray, crew)) from error
        trial: Trial = ray.get(actor.probe.remote(samples, unit))
        return trial


@dataclass
class _Slot:
    """A worker and its work, which is None while it starts. beat: the time of its last sign of life."""

    actor: Any
    node: str | None = None
    work: Work | None = None
    beat: float = field(default_factory=time.monotonic)
    stalled: bool = False


class _Loop:
    """The loop that keeps all workers busy until no work is left."""

    def __init__(
        self, ray: Any, crew: Crew, work: Iterator[Work], total: int, monitor: Monitor, stop: threading.Event
    ) -> None:
        self.ray, self.crew, self.monitor, self.stop, self.limits = ray, crew, monitor, stop, crew.limits
        self.new_worker = _actor(ray, crew)
        self.work, self.unseen = work, total  # number of units that nobody has taken yet
        self.again: deque[Work] = deque()  # units to be tried again
        self.live: dict[Any, _Slot] = {}  # pending reference or stream -> slot
        self.crashes: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.ended = Ended()
        self.bad_starts = 0
        self.full = 0  # units in a row that failed because another process held their GPU's memory
        self.fewer = 0  # workers that are not replaced, because memory ran out or their machine is unfit
        self.last_life, self.last_look = time.monotonic(), float("-inf")
        self.wanted = 0  # number of workers to keep
        self.said_waiting = False
        self.metrics = _metrics()

    def run(self) -> Ended:
        try:
            while self._busy() or (self._left() and not self.stop.is_set()):
                if self.stop.is_set() and not self.ended.stopped:
                    self._stop()
                if time.monotonic() - self.last_look > 2:
                    self._look()
                self._hire()
                for reference in self._ready():
                    self._advance(reference)
                self.monitor.workers(self._busy())
        finally:
            for slot in self.live.values():
                self._dismiss(slot)
            self.monitor.workers(0)
        self.ended.stopped = self.stop.is_set()
        return self.ended

    def _ready(self) -> list[Any]:
        """Wait for workers that have something to tell, and return all of them.

        A look passes over all workers, so the pause before it grows with their number. A few are answered at once.
        """
        waiting, ready = list(self.live), list[Any]()
        time.sleep(_PAUSE * len(waiting))
        for number, timeout in ((len(waiting), 0), (1, 0.5)):
            if waiting and not ready:
                ready, _ = self.ray.wait(waiting, num_returns=number, timeout=timeout)
        return ready

    def _stop(self) -> None:
        """Hand out nothing more, and let the workers finish the images that they are at."""
        self.ended.stopped = True
        for slot in self.live.values():
            if slot.work is not None:
                slot.actor.stop.remote()

    def _busy(self) -> int:
        return sum(slot.work is not None for slot in self.live.values())

    def _left(self) -> int:
        return self.unseen + len(self.again)

    def _look(self) -> None:
        """Now and then, end workers that hang, set the metrics and count how many workers there is room for."""
        self.last_look = now = time.monotonic()
        for slot in self.live.values():
            if slot.work and now - slot.beat > self.limits.stall_s and not slot.stalled:
                slot.stalled = True  # its stream will now tell of a dead actor
                self._dismiss(slot)
        counters = self.monitor.now()
        for name, gauge in self.metrics.items():
            gauge.set(getattr(counters, name))
        if not self._busy() and not self.stop.is_set():
            self._check_for_life(now)
        resources = self.ray.cluster_resources()  # nodes come and go
        fitting = int(resources.get("GPU", 0) if self.crew.run.recipe.device == "cuda" else resources.get("CPU", 1))
        self.wanted = max(1, (self.crew.workers or fitting) - self.fewer)

    def _hire(self) -> None:
        """Replace workers that are gone; those that wait for a machine are what an autoscaler looks at."""
        room = min(self.wanted, self._left() + self._busy())
        while not self.stop.is_set() and len(self.live) < room:
            actor = self.new_worker()
            self.live[actor.ready.remote()] = _Slot(actor)

    def _check_for_life(self, now: float) -> None:
        waited = now - self.last_life
        if waited > self.limits.start_s:
            raise EngineFailed(_no_worker(self.ray, self.crew))
        if waited > 30 and not self.said_waiting:
            self.said_waiting = True
            self.monitor.note(
                f"waiting for a worker: each needs {self.crew.needs()}, the cluster has {_has(self.ray)};"
                f" giving up after {self.limits.start_s / 60:.0f} min"
            )

    def _advance(self, reference: Any) -> None:
        from ray.exceptions import RayError, RayTaskError

        slot = self.live[reference]
        try:
            if slot.work is None:
                slot.node = self.ray.get(reference)
                self.bad_starts = 0
                self._give(reference, slot)
            else:
                tick: Tick = self.ray.get(next(reference))
                whole, tally = tick.budget is not None, tick.tally
                if whole and not self.stop.is_set() and (rest := slot.work.rest(self.crew.run, tally.done)):
                    self.again.append(rest)
                    tally = Tally()
                self.monitor.unit(slot.work.unit.name, tally, whole=whole)
                if tick.budget is not None:
                    self.full = 0
                    self.monitor.budget(tick.budget)
                    self._give(reference, slot)  # the end of its stream says no more
            slot.beat = self.last_life = time.monotonic()
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, CompilationFailed) or (isinstance(cause, OSError) and cause.errno in _STOPS_THE_RUN):
                raise cause from error
            self._lose(reference, slot, kind_and_reason(cause), infrastructure=False)
            if isinstance(cause, MemoryTaken):  # its GPU will be as full for the next unit
                self.full = (self.full + 1) % self.limits.bad_starts
                if not self.full:
                    self._do_without(str(cause))
        except RayError as error:  # not only RayActorError: a worker that the system ended for its memory is none
            self._lose(reference, slot, *self._judge(error, slot))

    def _judge(self, error: Exception, slot: _Slot) -> tuple[str, bool]:
        """Return why a worker is gone, and True if its machine is to blame."""
        from ray.exceptions import ActorUnavailableError, OutOfMemoryError

        if slot.stalled:
            return f"no image finished in {self.limits.stall_s:.0f} s", False
        if isinstance(error, OutOfMemoryError):
            self.fewer += 1
            self.monitor.note("a machine ran out of memory: going on with one worker less")
            return "the machine ran out of memory", False
        alive = {node["NodeID"] for node in self.ray.nodes() if node["Alive"]}
        gone = isinstance(error, ActorUnavailableError) or getattr(error, "preempted", False)
        gone = gone or "node has died" in str(error) or (slot.node is not None and slot.node not in alive)
        if gone:
            return "its machine was lost", True
        lines = str(error).strip().splitlines()
        # What an actor's own start-up raised comes last, below its traceback.
        told = lines[-1 if getattr(error, "actor_init_failed", False) else 0] if lines else "an error without words"
        return f"{type(error).__name__}: {told}", False

    def _give(self, reference: Any, slot: _Slot) -> None:
        """Hand the worker its next unit, or let it go."""
        del self.live[reference]
        if self.stop.is_set() or not self._left():
            self._dismiss(slot)
            return
        if self.unseen:
            work = next(self.work)
            self.unseen -= 1
        else:
            work = self.again.popleft()
        pause = max(1.0, self.wanted / _TICKS)
        stream = slot.actor.run.options(num_returns="streaming").remote(work, pause)
        self.live[stream] = _Slot(slot.actor, slot.node, work)

    def _lose(self, reference: Any, slot: _Slot, why: str, infrastructure: bool) -> None:
        """A worker died or raised: drop it, and try its unit again later."""
        del self.live[reference]
        self._dismiss(slot)
        if slot.work is None:
            self.bad_starts += not infrastructure
            if self.bad_starts >= self.limits.bad_starts:
                from_file = os.environ.get("RAY_AUTH_MODE") == "token" and "RAY_AUTH_TOKEN" not in os.environ
                hint = "; if this cluster asks for no token: RAY_AUTH_MODE=disabled" if from_file else ""
                self.bad_starts = 0
                self._do_without(f"workers cannot start: {why}{hint}")
            return
        name = slot.work.unit.name
        self.monitor.unit(name, Tally(), whole=True)
        counter, limit = (self.lost, self.limits.lost) if infrastructure else (self.crashes, self.limits.crashes)
        counter[name] += 1
        if infrastructure:
            excuse(note_path(self.crew.run, slot.work.unit))
        work = slot.work.again(self.crew.run, careful=not infrastructure)
        if counter[name] >= limit:
            self.ended.failed[name] = why
            self.monitor.note(f"unit {name} failed {counter[name]} times, it is left for another call ({why})")
        else:
            self.again.append(work)  # it goes behind all others: healthy units go first
            self.monitor.note(f"unit {name} will be tried again ({why})")

    def _do_without(self, why: str) -> None:
        """Go on with one worker less. Raises EngineFailed if no other one works."""
        if not self._busy():
            raise EngineFailed(why)
        self.fewer += 1
        self.wanted = max(1, self.wanted - 1)
        self.monitor.note(f"going on with one worker less ({why})")

    def _dismiss(self, slot: _Slot) -> None:
        with contextlib.suppress(Exception):
            self.ray.kill(slot.actor)


def _metrics() -> dict[str, Any]:
    """Make Ray's gauges, by the counter that they show; Prometheus finds them where Ray's agent runs."""
    from ray.util.metrics import Gauge

    return {
        "done": Gauge("autolabel_images_done", "Samples that this call has labelled or quarantined"),
        "quarantined": Gauge("autolabel_images_quarantined", "Samples of the run that are quarantined"),
        "images_per_s": Gauge("autolabel_images_per_second", "Samples done per second over the last minute"),
        "workers": Gauge("autolabel_workers", "Workers that have a unit"),
    }
