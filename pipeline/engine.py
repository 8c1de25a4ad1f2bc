"""Who does the units: this process alone, or Ray actors. The only file of this room that imports Ray.

Plain actors and one small `ray.wait` loop. An actor takes one unit, labels and commits it, and asks for the next; only
the list of samples and a few counters pass through Ray. Actors are never restarted by Ray: a dead one is replaced here,
and its unit goes to the back of the queue, three times at most.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autolabel.manifests.classes import LabelSpace
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.label import Labeller
from autolabel.pipeline.units import Unit
from autolabel.teacher.predict import pick_device

MAX_TRIES = 3  # of one unit
MAX_BAD_STARTS = 3  # of workers, in a row
START_SECONDS = 900.0  # an autoscaler may need this long to bring a node


class EngineFailed(RuntimeError):
    """Labelling cannot go on; the message says why. Finished units are kept."""


@dataclass(frozen=True)
class Work:
    """A unit and the ids of its samples that are to be done now."""

    unit: Unit
    wanted: tuple[str, ...]


@dataclass(frozen=True)
class Crew:
    """What a worker needs to be built."""

    job: LabelJob
    space: LabelSpace
    image_root: Path


OnUnit = Callable[[str, int], None]  # unit name, wanted samples of it that are done
OnPlan = Callable[[dict[str, Any]], None]  # `Labeller.plan`, after a unit
Failed = dict[str, str]  # unit name -> why


def run_local(crew: Crew, work: Sequence[Work], on_unit: OnUnit, on_plan: OnPlan) -> Failed:
    """Do all work in this process."""
    threads = crew.job.workers or os.cpu_count() or 1
    labeller = Labeller(crew.job, crew.space, crew.image_root, "auto", threads)
    for item in work:
        for done in labeller.run(item.unit, item.wanted):
            on_unit(item.unit.name, done)
        on_plan(labeller.plan())
    return {}


class Worker:
    """What an actor is made of: a `Labeller` whose device is the one that Ray gave it."""

    def __init__(self, crew: Crew) -> None:
        import ray

        device = pick_device("auto") if ray.get_gpu_ids() else "cpu"
        self.labeller = Labeller(crew.job, crew.space, crew.image_root, device, threads=1)

    def ready(self) -> None:
        """Return once the teacher is loaded."""

    def plan(self) -> dict[str, Any]:
        """`Labeller.plan`."""
        return self.labeller.plan()

    def run(self, item: Work) -> Iterator[int]:
        """`Labeller.run`, with a count at most once a second: each one is a message to the driver."""
        last = time.monotonic()
        for done in self.labeller.run(item.unit, item.wanted):
            if time.monotonic() - last > 1:
                last = time.monotonic()
                yield done
        yield len(item.wanted)


@contextlib.contextmanager
def ray_session(address: str | None, folder: Path) -> Iterator[Any]:
    """A connection to the named cluster ($RAY_ADDRESS inside a Ray job), or a private Ray on this machine.

    `folder` becomes the workers' first import path, so it must hold no Python files.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address != "auto":
        _require_listener(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # a busy machine needs more than the usual 30
    if not address and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        # Ray's ports listen on every interface, even for a private session: only this process knows the token.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray

    settings: dict[str, Any] = {"address": address or "local", "logging_level": "ERROR", "log_to_driver": False}
    if not address:
        settings |= {"include_dashboard": False, "object_store_memory": 128 * 2**20}
    with contextlib.redirect_stdout(sys.stderr):  # Ray reports errors of nodes on stdout
        try:
            with contextlib.chdir(folder):
                ray.init(**settings)
        except (ConnectionError, RuntimeError, ValueError, SystemExit) as error:
            where = f"the Ray cluster at {address}" if address else "a local Ray"
            raise EngineFailed(f"cannot start or reach {where} ({error}); without Ray: --engine local") from error
        try:
            yield ray
        finally:
            ray.shutdown()


def _require_listener(address: str) -> None:
    """Raise EngineFailed if nobody is there: Ray itself would try for a minute and then end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise EngineFailed(
            f"nobody listens at {address} ({error}): expected HOST:PORT of a running Ray cluster; leave out --address,"
            " and unset RAY_ADDRESS, for a private Ray on this machine"
        ) from error


def run_ray(crew: Crew, work: Sequence[Work], on_unit: OnUnit, on_plan: OnPlan, address: str | None) -> Failed:
    """Do all work with Ray actors. Returns the units that failed too often. Raises EngineFailed, OSError."""
    with ray_session(address, crew.job.out) as ray:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        cpus = int(ray.cluster_resources().get("CPU", 1))
        workers = crew.job.workers or gpus or cpus
        needs = {"num_cpus": 1, "num_gpus": 1 if gpus else 0}
        actor = ray.remote(Worker).options(**needs, max_restarts=0, max_task_retries=0)
        return _Loop(ray, actor, crew, work, workers, on_unit, on_plan).run()


@dataclass
class _Slot:
    """A worker, and what it is doing: `work` is None while it starts."""

    actor: Any
    work: Work | None = None


class _Loop:
    """Keep `workers` actors busy until no work is left."""

    def __init__(
        self,
        ray: Any,
        actor: Any,
        crew: Crew,
        work: Sequence[Work],
        workers: int,
        on_unit: OnUnit,
        on_plan: OnPlan,
    ) -> None:
        self.ray, self.actor, self.crew, self.workers = ray, actor, crew, workers
        self.on_unit, self.on_plan = on_unit, on_plan
        self.todo = deque(work)
        self.live: dict[Any, _Slot] = {}  # pending reference or stream -> slot
        self.tries: Counter[str] = Counter()
        self.failed: Failed = {}
        self.bad_starts = 0
        self.last_life = time.monotonic()

    def run(self) -> Failed:
        crew = self.ray.put(self.crew)
        try:
            while self.todo or any(slot.work for slot in self.live.values()):
                busy = sum(slot.work is not None for slot in self.live.values())
                while len(self.live) < min(self.workers, len(self.todo) + busy):
                    actor = self.actor.remote(crew)
                    self.live[actor.ready.remote()] = _Slot(actor)
                ready, _ = self.ray.wait(list(self.live), num_returns=1, timeout=1.0)
                for reference in ready:
                    self._advance(reference)
                self._check_for_life()
        finally:
            for slot in self.live.values():
                self.ray.kill(slot.actor)
        return self.failed

    def _advance(self, reference: Any) -> None:
        from ray.exceptions import RayError, RayTaskError

        slot = self.live[reference]
        try:
            if slot.work is None:
                self.ray.get(reference)
                self.bad_starts = 0
                self._give(reference, slot)
            else:
                self.on_unit(slot.work.unit.name, self.ray.get(next(reference)))
            self.last_life = time.monotonic()
        except StopIteration:
            with contextlib.suppress(RayError):  # if the worker is gone, its next unit will tell
                self.on_plan(self.ray.get(slot.actor.plan.remote()))
            self._give(reference, slot)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
                raise cause from error  # no other worker will fare better
            self._lose(reference, slot, f"{type(cause).__name__}: {cause}")
        except RayError as error:
            self._lose(reference, slot, type(error).__name__ + ": " + str(error).strip().splitlines()[0])

    def _give(self, reference: Any, slot: _Slot) -> None:
        """Hand the worker its next unit, or let it go."""
        del self.live[reference]
        if self.todo:
            work = self.todo.popleft()
            stream = slot.actor.run.options(num_returns="streaming").remote(work)
            self.live[stream] = _Slot(slot.actor, work)
        else:
            self.ray.kill(slot.actor)

    def _lose(self, reference: Any, slot: _Slot, why: str) -> None:
        """A worker died or raised: drop it, and try its unit again later."""
        del self.live[reference]
        with contextlib.suppress(Exception):
            self.ray.kill(slot.actor)
        if slot.work is None:
            self.bad_starts += 1
            if self.bad_starts >= MAX_BAD_STARTS:
                raise EngineFailed(f"workers cannot start: {why}")
            return
        name = slot.work.unit.name
        self.tries[name] += 1
        self.on_unit(name, 0)
        if self.tries[name] >= MAX_TRIES:
            self.failed[name] = why
        else:
            self.todo.append(slot.work)  # at the back: healthy units go first

    def _check_for_life(self) -> None:
        working = any(slot.work for slot in self.live.values())
        if not working and time.monotonic() - self.last_life > START_SECONDS:
            raise EngineFailed(
                f"no worker started in {START_SECONDS:.0f} s: the cluster has {self.ray.cluster_resources()}"
            )
