"""Who does the units: this process alone, or Ray actors. The only file of this room that imports Ray.

Plain actors and one small `ray.wait` loop. An actor takes one unit, labels and commits it, and asks for the next; only
the list of its samples goes in and counts come out. Actors are never restarted by Ray: a dead one is replaced here and
its unit goes to the back of the queue. What our own crashes and what lost machines cost a unit is budgeted apart.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from autolabel.manifests.cluster import cluster_address, ray_session
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.samples import Sample
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.label import DEATHS, Labeller
from autolabel.pipeline.records import Row, excuse, note_of
from autolabel.pipeline.units import Tally, Unit

_STOPS_THE_RUN = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}  # no other worker fares better


class EngineFailed(RuntimeError):
    """Labelling cannot go on; the message says why. Finished units are kept."""


@dataclass(frozen=True)
class Limits:
    """When to give up. Seconds, and times per unit.

    crashes: three images of a unit may each kill their `DEATHS` processes, besides the first one that nobody watched.
    """

    crashes: int = 3 * DEATHS + 2
    lost: int = 20  # machines, under the same unit
    bad_starts: int = 3  # of workers, in a row
    start_s: float = 900.0  # an autoscaler may need this long to bring a node
    stall_s: float = 600.0  # without a finished image


@dataclass(frozen=True)
class Work:
    """A unit and the ids of its samples that are to be done now."""

    unit: Unit
    wanted: tuple[str, ...]


@dataclass(frozen=True)
class Crew:
    """What a worker needs to be built. worker_bytes: memory that one needs at once on a CPU; 0 where unknown."""

    job: LabelJob
    space: LabelSpace
    image_root: Path
    worker_bytes: int = 0
    labeller: Callable[..., Labeller] = Labeller
    limits: Limits = field(default_factory=Limits)


class Monitor(Protocol):
    """Who is told how it goes."""

    def unit(self, name: str, tally: Tally, whole: bool = False) -> None:
        """What has become of a unit's samples so far; `whole` when the unit is left."""

    def workers(self, alive: int) -> None:
        """So many workers have a unit."""

    def plan(self, plan: dict[str, Any]) -> None:
        """`Labeller.plan`, after a unit."""

    def note(self, message: str) -> None:
        """Something that a person should know."""

    def now(self) -> Any:
        """The counters: a dataclass with `done`, `quarantined`, `images_per_s` and `workers`."""


@dataclass
class Outcome:
    """failed: units that failed too often, with the last reason. stopped: somebody asked to stop."""

    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


# --- stopping ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stoppable(on_stop: Callable[[], None]) -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; the second one raises KeyboardInterrupt.

    `on_stop` is called from another thread: a handler interrupts the main thread anywhere, also where it holds a lock.
    Signals reach the main thread only; elsewhere the event stays unset.
    """
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        threading.Thread(target=on_stop, daemon=True).start()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_STOPPING = "stopping: images under way are finished, the rest is left for later; press Ctrl-C again to stop at once"


# --- this process -----------------------------------------------------------------------------------------------------


def _local_labeller(crew: Crew) -> Labeller:
    threads = crew.job.workers or os.cpu_count() or 1
    return crew.labeller(crew.job, crew.space, crew.image_root, crew.job.device, threads)


def run_local(crew: Crew, work: Iterator[Work], monitor: Monitor) -> Outcome:
    """Do all work in this process."""
    labeller = _local_labeller(crew)

    def on_stop() -> None:
        labeller.stop()
        monitor.note(_STOPPING)

    with _stoppable(on_stop) as stop:
        for item in work:
            if stop.is_set():
                break
            monitor.workers(1)
            tally = Tally()
            for tally in labeller.run(item.unit, item.wanted):
                monitor.unit(item.unit.name, tally)
            monitor.unit(item.unit.name, tally, whole=True)
            monitor.plan(labeller.plan())
        monitor.workers(0)
        return Outcome(stopped=stop.is_set())


# --- Ray --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tick:
    """A sign of life: what has become of the unit so far. The last one of a unit brings the plan."""

    tally: Tally
    plan: dict[str, Any] | None = None


class Worker:
    """What an actor is made of: a `Labeller` on the device that Ray gave it."""

    def __init__(self, crew: Crew, version: str) -> None:
        import ray

        found = importlib.metadata.version("autolabel")
        if found != version:
            raise EngineFailed(f"a node has autolabel {found}, the driver {version}: install the same on all nodes")
        device, threads = "cpu", 1
        if ray.get_gpu_ids():  # an actor without GPUs may see them all the same
            device = "cuda"
            here = ray.get_runtime_context().get_node_id()
            has = next(node["Resources"] for node in _nodes(ray) if node["NodeID"] == here)
            threads = max(1, int(has.get("CPU", 1) // has.get("GPU", 1)))
        self.labeller = crew.labeller(crew.job, crew.space, crew.image_root, device, threads)

    def ready(self) -> str:
        """The id of its node, once the teacher is loaded."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def stop(self) -> None:
        """`Labeller.stop`, from another thread than `run`."""
        self.labeller.stop()

    def probe(self, samples: list[Sample], unit: Unit) -> tuple[list[Row], float, dict[str, Any]]:
        """`Labeller.probe` and `Labeller.plan`."""
        return *self.labeller.probe(samples, unit), self.labeller.plan()

    def run(self, item: Work) -> Iterator[Tick]:
        """`Labeller.run`, with a tick at most once a second: each one is a message to the driver."""
        last, tally = time.monotonic(), Tally()
        for tally in self.labeller.run(item.unit, item.wanted):
            if time.monotonic() - last > 1:
                last = time.monotonic()
                yield Tick(tally)
        yield Tick(tally, self.labeller.plan())


def _actor(ray: Any, crew: Crew) -> Callable[[], Any]:
    """A function that asks Ray for a new worker."""
    needs: dict[str, Any] = {"num_cpus": 1, "num_gpus": int(crew.job.device == "cuda")}
    if crew.job.device == "cpu" and crew.worker_bytes:
        needs["memory"] = crew.worker_bytes  # so that Ray puts no more of them on a node than fit
    remote = ray.remote(Worker).options(**needs, max_restarts=0, max_task_retries=0, max_concurrency=2)
    sent, version = ray.put(crew), importlib.metadata.version("autolabel")
    return lambda: remote.remote(sent, version)


def _needs(crew: Crew) -> str:
    if crew.job.device == "cuda":
        return "1 GPU and 1 CPU"
    return "1 CPU" + (f" and {crew.worker_bytes / 2**30:.1f} GiB of memory" if crew.worker_bytes else "")


def _has(ray: Any) -> str:
    found = ray.cluster_resources()
    gpus, cpus, memory = (found.get(name, 0) for name in ("GPU", "CPU", "memory"))
    return f"{gpus:g} GPU, {cpus:g} CPU and {memory / 2**30:.1f} GiB of memory"


def _nodes(ray: Any) -> list[dict[str, Any]]:
    return list(ray.nodes())


def _no_worker(ray: Any, crew: Crew) -> str:
    waited = f"no worker started in {crew.limits.start_s:.0f} s"
    return f"{waited}: each needs {_needs(crew)}, the cluster has {_has(ray)}"


def run_ray(crew: Crew, work: Iterator[Work], total: int, monitor: Monitor, address: str | None) -> Outcome:
    """Do `total` units of work with Ray actors. Raises EngineFailed, ClusterFailed, OSError."""
    with ray_session(address, crew.job.out, workers=crew.job.workers) as ray:
        if cluster_address(address) is None and crew.job.device == "cuda" and not ray.cluster_resources().get("GPU"):
            raise EngineFailed("no GPU can be had: Ray sees none on this machine (it has " + _has(ray) + ")")
        with _stoppable(lambda: monitor.note(_STOPPING)) as stop:
            return _Loop(ray, crew, work, total, monitor, stop).run()


def probe(
    crew: Crew, samples: list[Sample], unit: Unit, address: str | None
) -> tuple[list[Row], float, dict[str, Any]]:
    """Rows of some samples that one worker labelled and threw away, the seconds it took, and its plan."""
    if crew.job.engine == "local":
        labeller = _local_labeller(crew)
        return *labeller.probe(samples, unit), labeller.plan()
    with ray_session(address, crew.job.out) as ray:
        actor = _actor(ray, crew)()
        try:
            ray.get(actor.ready.remote(), timeout=crew.limits.start_s)
        except ray.exceptions.GetTimeoutError as error:
            raise EngineFailed(_no_worker(ray, crew)) from error
        rows, seconds, plan = ray.get(actor.probe.remote(samples, unit))
        return rows, seconds, plan


@dataclass
class _Slot:
    """A worker, and what it is doing: `work` is None while it starts. beat: when it last gave a sign of life."""

    actor: Any
    node: str | None = None
    work: Work | None = None
    beat: float = field(default_factory=time.monotonic)
    tally: Tally = field(default_factory=Tally)
    stalled: bool = False


class _Loop:
    """Keep all workers busy until no work is left."""

    def __init__(
        self, ray: Any, crew: Crew, work: Iterator[Work], total: int, monitor: Monitor, stop: threading.Event
    ) -> None:
        self.ray, self.crew, self.monitor, self.stop, self.limits = ray, crew, monitor, stop, crew.limits
        self.new_worker = _actor(ray, crew)
        self.work, self.unseen = work, total  # units that nobody has taken yet
        self.again: deque[Work] = deque()  # units to be tried again
        self.live: dict[Any, _Slot] = {}  # pending reference or stream -> slot
        self.crashes: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.outcome = Outcome()
        self.bad_starts = 0
        self.fewer = 0  # workers not replaced, because memory ran out
        self.last_life, self.last_look = time.monotonic(), float("-inf")
        self.wanted = 0  # workers
        self.told_of_waiting = False
        self.metrics = _metrics()

    def run(self) -> Outcome:
        try:
            while self._busy() or (self._left() and not self.stop.is_set()):
                if self.stop.is_set() and not self.outcome.stopped:
                    self._stop()
                if time.monotonic() - self.last_look > 2:
                    self._look()
                self._hire()
                ready, _ = self.ray.wait(list(self.live), num_returns=1, timeout=0.5) if self.live else ([], [])
                for reference in ready:
                    self._advance(reference)
                self.monitor.workers(self._busy())
        finally:
            for slot in self.live.values():
                self._dismiss(slot)
            self.monitor.workers(0)
        self.outcome.stopped = self.stop.is_set()
        return self.outcome

    def _stop(self) -> None:
        """Hand out nothing more, and let the workers finish the images that they are at."""
        self.outcome.stopped = True
        for slot in self.live.values():
            if slot.work is not None:
                slot.actor.stop.remote()

    def _busy(self) -> int:
        return sum(slot.work is not None for slot in self.live.values())

    def _left(self) -> int:
        return self.unseen + len(self.again)

    def _look(self) -> None:
        """Now and then: end workers that hang, tell the metrics, count how many workers there is room for."""
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
        found = self.ray.cluster_resources()  # nodes come and go
        fitting = int(found.get("GPU", 0) if self.crew.job.device == "cuda" else found.get("CPU", 1))
        self.wanted = max(1, (self.crew.job.workers or fitting) - self.fewer)

    def _hire(self) -> None:
        """Replace workers that are gone; those that wait for a machine are what an autoscaler looks at."""
        while not self.stop.is_set() and len(self.live) < min(self.wanted, self._left() + self._busy()):
            actor = self.new_worker()
            self.live[actor.ready.remote()] = _Slot(actor)

    def _check_for_life(self, now: float) -> None:
        waited = now - self.last_life
        if waited > self.limits.start_s:
            raise EngineFailed(_no_worker(self.ray, self.crew))
        if waited > 30 and not self.told_of_waiting:
            self.told_of_waiting = True
            self.monitor.note(
                f"waiting for a worker: each needs {_needs(self.crew)}, the cluster has {_has(self.ray)};"
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
                slot.tally = tick.tally
                self.monitor.unit(slot.work.unit.name, tick.tally)
                if tick.plan:
                    self.monitor.plan(tick.plan)
            slot.beat = self.last_life = time.monotonic()
        except StopIteration:
            assert slot.work is not None
            self.monitor.unit(slot.work.unit.name, slot.tally, whole=True)
            self._give(reference, slot)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, OSError) and cause.errno in _STOPS_THE_RUN:
                raise cause from error
            self._lose(reference, slot, f"{type(cause).__name__}: {cause}", infrastructure=False)
        except RayError as error:  # not only RayActorError: a worker that the system ended for its memory is none
            self._lose(reference, slot, *self._judge(error, slot))

    def _judge(self, error: Exception, slot: _Slot) -> tuple[str, bool]:
        """Why a worker is gone, and whether its machine is to blame."""
        from ray.exceptions import ActorUnavailableError, OutOfMemoryError

        if slot.stalled:
            return f"no image finished in {self.limits.stall_s:.0f} s", False
        if isinstance(error, OutOfMemoryError):
            self.fewer += 1
            self.monitor.note("a machine ran out of memory: going on with one worker less")
            return "the machine ran out of memory", False
        alive = {node["NodeID"] for node in _nodes(self.ray) if node["Alive"]}
        gone = isinstance(error, ActorUnavailableError) or getattr(error, "preempted", False)
        gone = gone or "node has died" in str(error) or (slot.node is not None and slot.node not in alive)
        if gone:
            return "its machine was lost", True
        lines = str(error).strip().splitlines()
        # What an actor's own start-up raised comes last, below its traceback.
        return f"{type(error).__name__}: {lines[-1 if getattr(error, 'actor_init_failed', False) else 0]}", False

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
        stream = slot.actor.run.options(num_returns="streaming").remote(work)
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
                raise EngineFailed(f"workers cannot start: {why}{hint}")
            return
        name = slot.work.unit.name
        self.monitor.unit(name, Tally(), whole=True)
        counter, limit = (self.lost, self.limits.lost) if infrastructure else (self.crashes, self.limits.crashes)
        counter[name] += 1
        if infrastructure:
            excuse(note_of(self.crew.job.out, slot.work.unit))
        if counter[name] >= limit:
            self.outcome.failed[name] = why
            self.monitor.note(f"unit {name} failed {counter[name]} times, it is left for another call ({why})")
        else:
            self.again.append(slot.work)  # behind all others: healthy units go first
            self.monitor.note(f"unit {name} will be tried again ({why})")

    def _dismiss(self, slot: _Slot) -> None:
        with contextlib.suppress(Exception):
            self.ray.kill(slot.actor)


def _metrics() -> dict[str, Any]:
    """Ray's gauges by the name of the counter that they show; Prometheus finds them where Ray's agent runs."""
    from ray.util.metrics import Gauge

    return {
        "done": Gauge("autolabel_images_done", "Samples that this call has labelled or quarantined"),
        "quarantined": Gauge("autolabel_images_quarantined", "Samples of the run that are quarantined"),
        "images_per_s": Gauge("autolabel_images_per_second", "Samples done per second over the last minute"),
        "workers": Gauge("autolabel_workers", "Workers that have a unit"),
    }
