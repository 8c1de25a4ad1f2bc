"""Engines do the units: this process with its threads, or Ray's workers (pipeline/ray_engine.py)."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Protocol

from autolabel.manifests.machine import cores
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.run.ledger import find_commit
from autolabel.pipeline.label import DEATHS, Labeller
from autolabel.pipeline.predictor import Predictor, TeacherPredictor, load_for
from autolabel.pipeline.records import FRESH, Known, RecordWriter, write_record
from autolabel.pipeline.units import Packed, Tally

PredictorFactory = Callable[[Run, str], Predictor]  # called with the run and a device


class EngineFailed(RuntimeError):
    """Labelling cannot go on; the message says why. Finished units are kept."""


@dataclass(frozen=True)
class Limits:
    """When to give up: seconds, and numbers of failures of one unit.

    crashes: DEATHS for each of three bad images, the first one, before any image was noted, and the one that ends it.
    lost: machines that were lost under the same unit. bad_starts: workers in a row that did not start. start_s: wait
    for a worker; an autoscaler may need that long to bring a node. stall_s: wait for a finished image.
    """

    crashes: int = 3 * DEATHS + 2
    lost: int = 20
    bad_starts: int = 3
    start_s: float = 900.0
    stall_s: float = 600.0


@dataclass(frozen=True)
class Work:
    """A unit, the ids of its samples that are to be done now, and what is known of it."""

    unit: Packed
    wanted: tuple[str, ...]
    known: Known = FRESH

    def again(self, run: RunFolder, *, careful: bool) -> Work:
        """Return the same work, for another worker after one was lost at it."""
        return replace(self, known=Known(find_commit(run.path, self.unit.name), careful or self.known.careful, True))

    def rest(self, run: RunFolder, done: int) -> Work | None:
        """Return the rest of the work, `done` samples of which are; None unless another worker has overtaken this one.

        That one may have been given up as lost, and have committed less than was wanted before it really was.
        """
        if done >= len(self.wanted):
            return None
        again = self.again(run, careful=False)
        return None if again.known.commit == self.known.commit else again


def teacher_predictor(run: Run, device: str) -> Predictor:
    """Load the run's teacher onto a device."""
    assert run.teacher is not None
    return TeacherPredictor(load_for(run.teacher, run.recipe, device=device, labels=True), run.recipe)


@dataclass(frozen=True)
class Crew:
    """Everything that a worker is built from.

    workers: their number, or None for as many as the machine is good for. worker_bytes: memory that one needs at once
    on a CPU; 0 where unknown. predictor: makes the source of predictions. device: that of this process, such as
    "cuda:1"; empty for the recipe's kind. least: the number of Ray's workers to begin with, where `workers` is the most
    of a range; None for the first one that comes.
    """

    run: Run
    workers: int | None = None
    worker_bytes: int = 0
    retry_quarantined: bool = False
    predictor: PredictorFactory = teacher_predictor
    write: RecordWriter = write_record
    limits: Limits = field(default_factory=Limits)
    device: str = ""
    least: int | None = None

    def needs(self) -> str:
        """A worker's machine in words."""
        if self.run.recipe.device == "cuda":
            return "1 GPU and 1 CPU"
        return "1 CPU" + (f" and {self.worker_bytes / 2**30:.1f} GiB of memory" if self.worker_bytes else "")

    def labeller(self, device: str, threads: int) -> Labeller:
        """A labeller with a predictor on this device, and so many threads."""
        return Labeller(
            self.run, self.predictor(self.run, device), threads=threads,
            retry_quarantined=self.retry_quarantined, write=self.write,
        )  # fmt: skip


class Monitor(Protocol):
    """Somebody who is told about the progress."""

    def unit(self, name: str, tally: Tally, *, whole: bool = False) -> None:
        """Report the finished samples of a unit so far; `whole` when the unit is left."""

    def workers(self, alive: int) -> None:
        """Report the number of workers that have a unit."""

    def budget(self, budget: dict[str, Any]) -> None:
        """Report `Labeller.budget` after a unit."""

    def note(self, message: str) -> None:
        """Tell something that a person should know."""

    def now(self) -> Any:
        """The counters: a dataclass with `done`, `quarantined`, `images_per_s` and `workers`."""


@dataclass
class Ended:
    """The end of a call. failed: units that failed too often, with the last reason. stopped: somebody asked to stop."""

    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


@contextlib.contextmanager
def stoppable(on_stop: Callable[[], None]) -> Iterator[threading.Event]:
    """Give an event that Ctrl-C or SIGTERM sets; the second one raises KeyboardInterrupt.

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


STOPPING = "stopping: images under way are finished, the rest is left for later; press Ctrl-C again to stop at once"


def local_labeller(crew: Crew) -> Labeller:
    """The labeller of this process."""
    workers = crew.workers if crew.run.recipe.device == "cpu" else None  # a GPU's threads are no workers
    return crew.labeller(crew.device or crew.run.recipe.device, workers or cores())


def run_local(crew: Crew, work: Iterator[Work], monitor: Monitor) -> Ended:
    """Do all work in this process."""
    labeller = local_labeller(crew)

    def on_stop() -> None:
        labeller.stop()
        monitor.note(STOPPING)

    with stoppable(on_stop) as stop:
        for item in work:
            if stop.is_set():
                break
            monitor.workers(1)
            left: Work | None = item
            while left is not None:
                name, tally = left.unit.name, Tally()
                for tally in labeller.run(left.unit.unit(), left.wanted, left.known):
                    monitor.unit(name, tally)
                left = None if stop.is_set() else left.rest(crew.run, tally.done)
                monitor.unit(name, tally, whole=left is None)
                monitor.budget(labeller.budget())
        monitor.workers(0)
        return Ended(stopped=stop.is_set())
