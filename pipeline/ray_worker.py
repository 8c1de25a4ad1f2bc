"""A worker of Ray: an actor that labels units and tells of them. The driver's loop is pipeline/ray_engine.py."""

from __future__ import annotations

import importlib.metadata
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from autolabel.manifests.samples import Sample
from autolabel.pipeline.engine import Crew, EngineFailed, Work
from autolabel.pipeline.label import Trial
from autolabel.pipeline.units import Tally, Unit


@dataclass(frozen=True)
class Tick:
    """A sign of life: the finished samples of a unit so far. The last one brings the memory budget.

    leaves: the worker was told to stop, so the unit may be unfinished, and it takes no other.
    """

    tally: Tally
    budget: dict[str, Any] | None = None
    leaves: bool = False


@dataclass
class Slot:
    """A worker and its work, which is None while it starts or waits. beat: the time of its last sign of life.

    leaves: it was told to stop.
    """

    actor: Any
    node: str | None = None
    work: Work | None = None
    beat: float = field(default_factory=time.monotonic)
    stalled: bool = False
    leaves: bool = False


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
        on_sigterm(self.labeller.stop)

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
        yield Tick(tally, self.labeller.budget(), self.labeller.stopping.is_set())


def on_sigterm(call: Callable[[], None]) -> None:
    """Call a function, from a thread of its own, when this process is sent SIGTERM; in the main thread only.

    The main thread of an actor with several threads waits within Ray and runs no handler of Python's. The interpreter
    writes to a socket all the same.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    ours, interpreters = socket.socketpair()
    interpreters.setblocking(False)
    signal.set_wakeup_fd(interpreters.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)

    def wait(keep: socket.socket = interpreters) -> None:
        while ours.recv(1) != bytes([signal.SIGTERM]):
            pass
        call()

    threading.Thread(target=wait, daemon=True).start()


def actor_of(ray: Any, crew: Crew) -> Callable[[], Any]:
    """Make a function that asks Ray for a new worker."""
    needs: dict[str, Any] = {"num_cpus": 1, "num_gpus": int(crew.run.recipe.device == "cuda")}
    if crew.run.recipe.device == "cpu" and crew.worker_bytes:
        needs["memory"] = crew.worker_bytes  # so that Ray puts no more of them on a node than fit
    remote = ray.remote(Worker).options(**needs, max_restarts=0, max_task_retries=0, max_concurrency=2)
    sent, version = ray.put(crew), importlib.metadata.version("autolabel")
    return lambda: remote.remote(sent, version)
