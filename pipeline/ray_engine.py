"""Ray's workers do the units.

Plain actors (pipeline/ray_worker.py) and one small `ray.wait` loop. An actor takes one unit, labels and commits it, and
asks for the next; only the list of its samples goes in and counts come out. Actors are never restarted by Ray: a dead
one is replaced here and its unit goes to the back of the queue. Crashes of our own and lost machines are counted apart.
A worker on a machine that is taken back finishes its images, commits them, and gives the rest of its unit back: that
goes to the front of the queue and counts as no failure.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

from autolabel.manifests.cluster import cluster_address, draining_nodes, ray_session
from autolabel.manifests.samples import Sample
from autolabel.manifests.wording import counted, kind_and_reason
from autolabel.pipeline.attempts import excuse, note_path
from autolabel.pipeline.engine import STOPPING, Crew, Ended, EngineFailed, Monitor, Work, stoppable
from autolabel.pipeline.label import Trial
from autolabel.pipeline.ray_worker import Slot, Tick, actor_of
from autolabel.pipeline.units import Tally, Unit
from autolabel.teacher.compiled import CompilationFailed
from autolabel.teacher.memory import MemoryTaken

_TICKS = 100  # a second, of all workers together
_PAUSE = 5e-5  # seconds between two looks at the workers, for each of them: a look costs 3e-6
_QUIET_S = 30  # without workers, or with too few, before a line says so
_STOPS_THE_RUN = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}  # no other worker fares better


def _has(ray: Any) -> str:
    resources = ray.cluster_resources()
    gpus, cpus, memory = (resources.get(name, 0) for name in ("GPU", "CPU", "memory"))
    return f"{gpus:g} GPU, {cpus:g} CPU and {memory / 2**30:.1f} GiB of memory"


def _no_worker(ray: Any, crew: Crew, there: str = "no worker") -> str:
    return f"{there} started in {crew.limits.start_s:.0f} s: each needs {crew.needs()}, the cluster has {_has(ray)}"


def run_ray(crew: Crew, work: Iterator[Work], total: int, monitor: Monitor, address: str | None) -> Ended:
    """Do `total` units of work with Ray actors. Raises EngineFailed, ClusterFailed, OSError."""
    with ray_session(address, crew.run.path, workers=crew.least or crew.workers) as ray:
        if not cluster_address(address) and crew.run.recipe.device == "cuda" and not ray.cluster_resources().get("GPU"):
            raise EngineFailed("no GPU can be had: Ray sees none on this machine (it has " + _has(ray) + ")")
        with stoppable(lambda: monitor.note(STOPPING)) as stop:
            return _Loop(ray, crew, work, total, monitor, stop).run()


def probe_ray(crew: Crew, samples: list[Sample], unit: Unit, address: str | None) -> Trial:
    """Label some samples with one of Ray's workers and keep nothing."""
    with ray_session(address, crew.run.path) as ray:
        actor = actor_of(ray, crew)()
        try:
            ray.get(actor.ready.remote(), timeout=crew.limits.start_s)
        except ray.exceptions.GetTimeoutError as error:
            raise EngineFailed(_no_worker(ray, crew)) from error
        trial: Trial = ray.get(actor.probe.remote(samples, unit))
        return trial


class _Loop:
    """The loop that keeps all workers busy until no work is left."""

    def __init__(
        self, ray: Any, crew: Crew, work: Iterator[Work], total: int, monitor: Monitor, stop: threading.Event
    ) -> None:
        self.ray, self.crew, self.monitor, self.stop, self.limits = ray, crew, monitor, stop, crew.limits
        self.new_worker = actor_of(ray, crew)
        self.work, self.unseen = work, total  # number of units that nobody has taken yet
        self.given_back: deque[Work] = deque()  # by workers that left in order
        self.again: deque[Work] = deque()  # units to be tried again
        self.live: dict[Any, Slot] = {}  # pending reference or stream -> slot
        self.least = min(crew.least or 1, total)  # workers to begin with
        self.waiting: list[Slot] = []  # workers that are ready before as many are there
        self.begun = False
        self.draining: set[str] = set()  # nodes that are taken back
        self.home = ray.get_runtime_context().get_node_id()
        self.crashes: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.ended = Ended()
        self.bad_starts = 0
        self.full = 0  # units in a row that failed because another process held their GPU's memory
        self.fewer = 0  # workers that are not replaced, because memory ran out or their machine is unfit
        self.last_life, self.last_look = time.monotonic(), float("-inf")
        self.wanted = 0  # number of workers to keep
        self.said_waiting, self.enough, self.said_fewer = False, time.monotonic(), False
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
            for slot in [*self.live.values(), *self.waiting]:
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
        return self.unseen + len(self.given_back) + len(self.again)

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
        self._leave_machines()
        if not self.stop.is_set():
            self._check_for_life(now)
        self.wanted = max(1, (self.crew.workers or self._fitting()) - self.fewer)

    def _fitting(self) -> int:
        """Count the workers that there is room for now: nodes come and go."""
        name = "GPU" if self.crew.run.recipe.device == "cuda" else "CPU"
        room = self.ray.cluster_resources().get(name, name == "CPU")
        if self.draining:
            room -= sum(node["Resources"].get(name, 0) for node in self._nodes() if node["NodeID"] in self.draining)
        return int(room)

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    def _leave_machines(self) -> None:
        """Let workers on machines that are taken back finish their images; nobody is hired there, by Ray's own care."""
        known, self.draining = self.draining, draining_nodes(self.ray)
        if self.waiting:  # one whose machine is gone has nothing to tell it by
            alive = {node["NodeID"] for node in self._nodes()}
            for slot in [slot for slot in self.waiting if slot.node in self.draining or slot.node not in alive]:
                self.waiting.remove(slot)
                self._dismiss(slot)
        leaving = [slot for slot in self.live.values() if slot.node in self.draining and slot.work and not slot.leaves]
        for slot in leaving:
            slot.leaves = True
            slot.actor.stop.remote()
        if leaving:
            self.monitor.note(
                f"{counted(len({slot.node for slot in leaving}), 'machine')} will be taken back: workers there finish"
                " the images under way, and others go on with their units"
            )
        if self.home in self.draining - known and not self.stop.is_set():
            self.monitor.note(f"the machine of this command will be taken back; {STOPPING}")
            self.stop.set()

    def _hire(self) -> None:
        """Replace workers that are gone; those that wait for a machine are what an autoscaler looks at."""
        room = min(self.wanted, self._left() + self._busy())
        while not self.stop.is_set() and len(self.live) + len(self.waiting) < room:
            actor = self.new_worker()
            self.live[actor.ready.remote()] = Slot(actor)
        starting = [reference for reference, slot in self.live.items() if slot.work is None]
        for reference in starting[::-1][: max(0, len(self.live) + len(self.waiting) - room)]:
            self._dismiss(self.live.pop(reference))  # else an autoscaler would bring machines for no work

    def _check_for_life(self, now: float) -> None:
        busy = self._busy()
        if busy >= min(self.least, self._left() + busy):
            self.enough, self.said_fewer = now, False
        elif self.begun and busy and now - self.enough > _QUIET_S and not self.said_fewer:
            self.said_fewer = True
            self.monitor.note(f"going on with {counted(busy, 'worker')} of at least {self.least}, and waiting for more")
        if busy:
            return
        waited = now - self.last_life
        there = f"only {len(self.waiting)} of at least {counted(self.least, 'worker')}" if self.waiting else "no worker"
        if waited > self.limits.start_s:
            raise EngineFailed(_no_worker(self.ray, self.crew, there))
        if waited > _QUIET_S and not self.said_waiting:
            self.said_waiting = True
            awaited = f"{self.least} workers, {len(self.waiting)} so far" if self.least > 1 else "a worker"
            self.monitor.note(
                f"waiting for {awaited}: each needs {self.crew.needs()}, the cluster has {_has(self.ray)};"
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
                rest = None if tick.budget is None or self.stop.is_set() else self._rest(slot.work, tick)
                self.monitor.unit(slot.work.unit.name, tick.tally, whole=tick.budget is not None and rest is None)
                if rest is not None:
                    self.given_back.append(rest)
                if tick.budget is not None:
                    self.full = 0
                    slot.leaves |= tick.leaves
                    self.monitor.budget(tick.budget)
                    self._give(reference, slot)  # the end of its stream says no more
            slot.beat = time.monotonic()
            if self.begun:
                self.last_life = slot.beat
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

    def _rest(self, work: Work, tick: Tick) -> Work | None:
        """Return the work that a worker gives back: it leaves, or another one was at its unit."""
        if tick.leaves and tick.tally.done < len(work.wanted):
            return work.again(self.crew.run, careful=False)
        return work.rest(self.crew.run, tick.tally.done)

    def _judge(self, error: Exception, slot: Slot) -> tuple[str, bool]:
        """Return why a worker is gone, and True if its machine is to blame."""
        from ray.exceptions import ActorUnavailableError, OutOfMemoryError

        if slot.stalled:
            return f"no image finished in {self.limits.stall_s:.0f} s", False
        if isinstance(error, OutOfMemoryError):
            self.fewer += 1
            self.monitor.note("a machine ran out of memory: going on with one worker less")
            return "the machine ran out of memory", False
        alive = {node["NodeID"] for node in self._nodes()} - self.draining
        gone = isinstance(error, ActorUnavailableError) or getattr(error, "preempted", False)
        gone = gone or "node has died" in str(error) or (slot.node is not None and slot.node not in alive)
        if gone:
            return "its machine was lost", True
        lines = str(error).strip().splitlines()
        # What an actor's own start-up raised comes last, below its traceback.
        told = lines[-1 if getattr(error, "actor_init_failed", False) else 0] if lines else "an error without words"
        return f"{type(error).__name__}: {told}", False

    def _give(self, reference: Any, slot: Slot) -> None:
        """Hand the worker its next unit, or let it go."""
        del self.live[reference]
        if self.stop.is_set() or not self._left() or slot.leaves or slot.node in self.draining:
            self._dismiss(slot)
            return
        self.waiting.append(slot)
        self.begun = self.begun or len(self.waiting) >= self.least
        while self.begun and self.waiting and self._left():
            self._send(self.waiting.pop(0))

    def _send(self, slot: Slot) -> None:
        if self.given_back:
            work = self.given_back.popleft()
        elif self.unseen:
            work = next(self.work)
            self.unseen -= 1
        else:
            work = self.again.popleft()
        pause = max(1.0, self.wanted / _TICKS)
        stream = slot.actor.run.options(num_returns="streaming").remote(work, pause)
        self.live[stream] = Slot(slot.actor, slot.node, work)

    def _lose(self, reference: Any, slot: Slot, why: str, infrastructure: bool) -> None:
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

    def _dismiss(self, slot: Slot) -> None:
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
