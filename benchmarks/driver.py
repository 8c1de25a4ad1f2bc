"""What many workers cost the driver: `python benchmarks/driver.py [--workers N …] [--rate UNITS_A_SECOND]`.

The loop of `generate --engine ray` and the part of a worker that Ray calls are the real ones. Only the labelling is
simulated: a unit of 64 images takes its time asleep, and four processes play all workers, each with a thread for every
worker that it plays. So what is measured is the driver's share: units out, messages in, progress. What a thousand
processes and connections cost beside it is not.

CPU time is that of the driver's process with all threads of Ray's, from the moment at which every worker has a unit.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import ray
from engine import SHARD, job

from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.samples import Sample, writing_manifest
from autolabel.pipeline import ray_engine, ray_worker
from autolabel.pipeline.engine import Crew
from autolabel.pipeline.lock import Lock
from autolabel.pipeline.prepare import prepare, settle, survey
from autolabel.pipeline.progress import Counters, Meter
from autolabel.pipeline.records import Known
from autolabel.pipeline.units import Tally, Unit

PROCESSES, GOAL = 4, 390  # that play workers; units a second of a thousand workers at 25 images/s each
BUDGET = {
    "device": "NVIDIA H100", "precision": "bfloat16", "bytes_per_pixel": 900.0, "fixed_bytes": 10**8,
    "images_at_once": {"1024x2048": 8}, "batches_in_flight": {"1024x2048": 2},
}  # fmt: skip


@dataclass
class Sleeping:
    """A labeller that sleeps `seconds` for a unit, half as long to half as long again."""

    seconds: float
    stopping: threading.Event = field(default_factory=threading.Event)

    def run(self, unit: Unit, wanted: Sequence[str], known: Known) -> Iterator[Tally]:
        """Sleep, and say so four times."""
        pause = self.seconds * random.uniform(0.5, 1.5) / 4
        for quarter in range(1, 5):
            time.sleep(pause)
            done = len(wanted) * quarter // 4
            yield Tally(done, 0, done << 21, Counter({c: done * 90_000 for c in range(len(CITYSCAPES))}))

    def budget(self) -> dict[str, Any]:
        """A budget as a GPU has it."""
        return BUDGET

    def stop(self) -> None:
        """Nothing to stop."""


class Player(ray_worker.Worker):
    """A process that plays many workers."""

    def __init__(self, seconds: float) -> None:
        self.labeller = Sleeping(seconds)  # type: ignore[assignment]


class Clock(Meter):
    """A meter that starts the clock when every worker has a unit, and counts messages."""

    def start(self, workers: int) -> None:
        """Wait for so many workers."""
        self.awaited, self.messages, self.units = workers, 0, 0
        self.began: tuple[float, float] | None = None
        self.ended = (0.0, 0.0)

    def unit(self, name: str, tally: Tally, *, whole: bool = False) -> None:
        """Count."""
        super().unit(name, tally, whole=whole)
        if self.began:
            self.messages += 1
            self.units += whole

    def workers(self, alive: int) -> None:
        """Look at the clock when all work, and while they do."""
        super().workers(alive)
        if self.began is None and alive == self.awaited:
            self.began = time.monotonic(), time.process_time()
        if self.began and alive == self.awaited:
            self.ended = time.monotonic(), time.process_time()


def listed(folder: Path, count: int) -> Path:
    """A manifest of images that are not there, with names as long as those of Cityscapes."""
    path = folder / "images.parquet"
    with writing_manifest(path, CITYSCAPES, image_root=folder, label_root=folder) as write:
        for first in range(0, count, 10_000):
            names = [f"town_{n:07d}_000019" for n in range(first, min(count, first + 10_000))]
            photos, coarse = folder / "leftImg8bit/train_extra/town", folder / "gtCoarse/train_extra/town"
            write(
                [
                    Sample(
                        name, photos / f"{name}_leftImg8bit.png", 1024, 2048, "train_extra", "town",
                        coarse_label=coarse / f"{name}_gtCoarse_labelIds.png",
                    )
                    for name in names
                ]
            )  # fmt: skip
    return path


def players(count: int, seconds: float) -> Callable[[Any, Crew], Callable[[], Any]]:
    """What `ray_worker.actor_of` returns for each run, with workers that share a few processes."""
    remote: Any = ray.remote(Player)
    remote = remote.options(num_cpus=0, max_concurrency=2 * count // PROCESSES + 8)
    made = [remote.remote(seconds) for _ in range(PROCESSES)]
    turn = cycle(made)

    def new() -> Any:
        player = next(turn)
        return SimpleNamespace(ready=player.ready, run=player.run, stop=player.stop)

    ray.get([player.ready.remote() for player in made])
    return lambda _ray, _crew: new


def in_words(now: Counters) -> None:
    """Do what a terminal needs of every message."""
    now.note()


def measure(workers: int, rate: float, seconds: float) -> None:
    """Print a row: so many workers, which would finish `rate` units a second."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        asked = job(folder, listed(folder, SHARD * (workers + int(rate * seconds))), "run", workers=workers)
        request, run = settle(asked, asked.teacher.digest(), folder)
        with Lock(asked.out, None).held() as lock:
            run, plan = prepare(request, run, lock, None)
            left = survey(run, asked.portion, plan)
            clock = Clock(
                run, CITYSCAPES.names, asked=plan.samples, wanted=left.wanted, before=left.before,
                on_progress=in_words,
            )  # fmt: skip
            clock.start(workers)
            with patch.object(ray_engine, "actor_of", players(workers, workers / rate)):
                ray_engine.run_ray(Crew(run, workers), left.work(), len(left.units), clock, None)
    assert clock.began
    wall, cpu = (end - begin for begin, end in zip(clock.began, clock.ended, strict=True))
    units, messages = max(clock.units, 1), max(clock.messages, 1)
    print(
        f"| {workers} | {units / wall:.0f} | {messages / wall:.0f} | {1e3 * cpu / units:.2f} |"
        f" {1e3 * cpu / messages:.2f} | {100 * cpu / wall:.0f} % |",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rate", type=float, default=GOAL, help="units a second of a thousand workers")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
        asked.workers, asked.rate, asked.seconds = [4], 5000, 0.5
    connect: Any = ray.init
    connect("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    print(f"\n### The driver, with simulated workers that finish {asked.rate:.0f} units a second for a thousand\n")
    print("| workers | units/s | messages/s | CPU ms a unit | CPU ms a message | of a core |")
    print("|---:|---:|---:|---:|---:|---:|")
    for workers in asked.workers:
        measure(workers, asked.rate * workers / 1000, asked.seconds)
    ray.shutdown()


if __name__ == "__main__":
    main()
