"""What the engine costs beside the work: `python benchmarks/engine.py [FOLDER_OF_PHOTOGRAPHS]`.

Four tables: workers that only sleep against the ideal; Ray against the plain loop on photographs; the driver's memory
from a thousand to a million planned images; and a second call on a finished run of 20,000. Without a folder, the
photographs are drawn. `--only sleep|loop|memory|resume` makes one of them; `--smallest` makes all of them in seconds,
and their numbers mean nothing.

Starting Ray and its workers costs the same for any amount of work, so it is left out of the first two.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource as limits
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.run.ledger import Commit
from autolabel.manifests.samples import Sample, open_manifest, save_manifest, writing_manifest
from autolabel.manifests.scan import scan
from autolabel.manifests.scenes import write_city
from autolabel.manifests.settings import build_job
from autolabel.pipeline.cutting import write_plan
from autolabel.pipeline.engine import Crew, Work, run_local
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.predictor import Decoded, Refused, Size, TeacherPredictor
from autolabel.pipeline.prepare import new_run, settle
from autolabel.pipeline.progress import Meter
from autolabel.pipeline.ray_engine import run_ray
from autolabel.pipeline.records import Row
from autolabel.pipeline.run import generate
from autolabel.pipeline.units import Plan, Tally, Unit
from autolabel.teacher.checkpoints import save_checkpoint
from autolabel.teacher.decide import Prediction
from autolabel.teacher.networks.build import build

SHARD = 64
CLASSES = len(CITYSCAPES)


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    engine: labels where Ray is not compared with anything.
    workers, units, unit: numbers of sleeping workers, units for each and images of a unit. sleep: seconds an image.
    photographs, size, turns, rounds: images of a unit of the loop, their size, units of a turn and turns.
    planned: images that the driver plans. finished: images of the run that is called again.
    """

    engine: str = "ray"
    workers: tuple[int, ...] = (2, 4, 8, 16)
    units: int = 14
    unit: int = 16
    sleep: float = 0.2
    photographs: int = SHARD
    size: tuple[int, int] = (360, 480)
    turns: int = 5
    rounds: int = 4
    planned: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    finished: int = 20_000


SMALLEST = Extent("local", (1,), 3, 2, 0.01, 2, (64, 128), 1, 3, (130,), 70)


class Sleeper(TeacherPredictor):
    """A predictor that sleeps so many seconds an image instead of asking a teacher."""

    device = "cpu"

    def __init__(self, run: Run, device: str, *, sleep: float = 0.0) -> None:
        self.recipe, self.edges, self.sleep = run.recipe, run.policy.edges(run.label_space), sleep

    def predict(self, batch: Sequence[Decoded]) -> list[Prediction]:
        time.sleep(self.sleep * len(batch))
        return [_nothing(decoded.image.shape[0], decoded.image.shape[1]) for decoded in batch]

    def in_flight(self, size: Size, *, most: int) -> int:
        return most

    def budget(self) -> dict[str, Any]:
        return {"device": "cpu"}


class Refusing(Sleeper):
    """A predictor that opens no image."""

    def decode(self, sample: Sample, unit: Unit, row: Row) -> Decoded | Refused:
        return Refused(row, "not opened")


def unwritten(run: RunFolder, unit: Unit, *_: object) -> Commit:
    """Write no record."""
    return Commit(run.path, unit.name, 0)


def _nothing(height: int, width: int) -> Prediction:
    histogram, confidence = np.zeros((CLASSES, 20), np.int64), np.zeros(CLASSES)
    histogram[0, 19] = confidence[0] = height * width
    return Prediction(np.ones((height, width), np.uint8), 2, histogram, confidence)


def checkpoint(folder: Path) -> Path:
    """An untrained teacher."""
    path = folder / "teacher.pt"
    if not path.is_file():
        arch = "hrnet18s_plain"
        save_checkpoint(path, build(arch, CLASSES), arch=arch, space=CITYSCAPES)
    return path


def tiny_images(folder: Path, count: int) -> Path:
    """A manifest of links to one small picture."""
    (folder / "tiny").mkdir()
    first = folder / "tiny" / "000000.png"
    Image.new("RGB", (64, 64)).save(first)
    for n in range(1, count):
        os.link(first, folder / "tiny" / f"{n:06d}.png")
    return listed(folder, folder / "tiny")


def listed(folder: Path, images: Path) -> Path:
    """The manifest of a folder of images."""
    path = folder / f"{images.name}.parquet"
    save_manifest(path, scan(images, layout="folder", label_space=CITYSCAPES)[0])
    return path


def job(folder: Path, manifest: Path, out: str, **settings: object) -> LabelJob:
    """A job at scale 1 on CPUs."""
    paths = {"manifest": manifest, "teacher": checkpoint(folder), "out": folder / out}
    return build_job(LabelJob, {**paths, "scales": (1.0,), "device": "cpu", "unit_size": SHARD, **settings})


# --- sleeping workers -------------------------------------------------------------------------------------------------


def sleeping(folder: Path, extent: Extent) -> None:
    """Workers that only sleep: each from the end of its first unit to the end of its last, added up."""
    size = extent.unit
    manifest = tiny_images(folder, max(extent.workers) * extent.units * size)
    print(f"\n### Workers that sleep {extent.sleep * 1e3:.0f} ms an image, units of {size} images\n")
    print("| workers | images/s, ideal | images/s | of the ideal |\n|---:|---:|---:|---:|")
    for workers in extent.workers:
        images = workers * extent.units * size
        asked = job(
            folder, manifest, f"s{workers}", workers=workers, engine=extent.engine, limit=images, unit_size=size
        )
        assert generate(asked, predictor=functools.partial(Sleeper, sleep=extent.sleep)).done == images
        by_worker: dict[str, list[float]] = {}
        for path in (asked.out / "units").iterdir():
            who = pq.read_table(path, columns=["worker"])["worker"][0].as_py()
            by_worker.setdefault(who, []).append(path.stat().st_mtime)
        assert len(by_worker) == workers
        rate = sum((len(ends) - 1) * size / (max(ends) - min(ends)) for ends in by_worker.values())
        ideal = workers / extent.sleep
        print(f"| {workers} | {ideal:.0f} | {rate:.1f} | {100 * rate / ideal:.1f} % |", flush=True)


# --- Ray against the plain loop ---------------------------------------------------------------------------------------


class Clock(Meter):
    """A meter that notes when units end."""

    ends: list[float]

    def unit(self, name: str, tally: Tally, *, whole: bool = False) -> None:
        """Count a unit, and look at the clock."""
        super().unit(name, tally, whole=whole)
        if whole:
            self.ends.append(time.perf_counter())


def loop(folder: Path, extent: Extent, photographs: Path | None) -> None:
    """One Ray worker against the same worker in a loop, in turns: seconds per unit from unit end to unit end."""
    if photographs is None:
        height, width = extent.size
        write_city(folder / "city", seed=0, fine=0, coarse=extent.photographs, val=0, height=height, width=width)
        photographs = folder / "city" / "leftImg8bit"
    manifest = open_manifest(listed(folder, photographs))
    size = extent.photographs
    first = Plan(write_plan(folder, manifest, size), size, manifest.image_root, folder).packed(0)
    found: dict[str, list[float]] = {"local": [], "ray": []}
    for turn in range(extent.turns):
        for engine in found:
            asked = job(folder, manifest.path, f"loop-{engine}-{turn}", workers=1, engine=engine)
            request, _ = settle(asked, asked.teacher.digest(), folder)
            (asked.out / "units").mkdir(parents=True)
            run = new_run(request, "", asked.out)
            bucket = first.bucket
            units = [replace(first, name=f"{bucket}.{k:06d}", first_row=k * SHARD) for k in range(extent.rounds)]
            work = [Work(unit, tuple(unit.ids())) for unit in units]
            clock = Clock(run, CITYSCAPES.names, asked=0, wanted=0, before=Tally())
            clock.ends = []
            crew = Crew(run, asked.machine.most)
            if engine == "ray":
                run_ray(crew, iter(work), len(work), clock, None)
            else:
                run_local(crew, iter(work), clock)
            found[engine] += list(np.diff(clock.ends))
    plain, ray = (min(found[engine]) for engine in ("local", "ray"))
    middle = statistics.median(found["ray"]) / statistics.median(found["local"])
    each = len(first.ids())
    print(f"\n### Ray against the plain loop: {each} photographs a unit, one worker, {extent.turns} turns\n")
    print("| | seconds a unit, best | median |\n|---|---:|---:|")
    for engine, seconds in found.items():
        print(f"| {engine} | {min(seconds):.3f} | {statistics.median(seconds):.3f} |")
    print(f"\nRay costs {100 * (ray / plain - 1):+.1f} % (best against best), {100 * (middle - 1):+.1f} % (medians)")


# --- the driver's memory ----------------------------------------------------------------------------------------------


def memory(folder: Path, extent: Extent) -> None:
    """Peak memory of the driver and its seconds, each size in a process of its own, units empty."""
    print(f"\n### The driver, with empty units of {SHARD} images and 2 workers\n")
    print("| images | units | plan s | run s | peak MiB |\n|---:|---:|---:|---:|---:|")
    for count in extent.planned:
        made = subprocess.run(
            [sys.executable, __file__, "--drive", str(count), extent.engine, str(folder)],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        found = json.loads(made.stdout.strip().splitlines()[-1])
        print(f"| {count} | {found['units']} | {found['plan']:.1f} | {found['run']:.0f} | {found['peak']:.0f} |")


def drive(folder: Path, count: int, engine: str) -> None:
    """Plan `count` images and hand them out; print what it took."""
    manifest = folder / f"{count}.parquet"
    with writing_manifest(manifest, CITYSCAPES, image_root=folder, label_root=folder) as write:
        for first in range(0, count, 10_000):
            numbers = range(first, min(count, first + 10_000))
            write(
                [Sample(f"s{n:07d}", folder / "town" / f"s{n:07d}.png", 1024, 2048, "train", "town") for n in numbers]
            )
    opened = open_manifest(manifest)
    started = time.perf_counter()
    units = len(Plan(write_plan(folder, opened, SHARD), SHARD, folder, folder))
    planned = time.perf_counter() - started
    started = time.perf_counter()
    result = generate(
        job(folder, manifest, f"drive-{count}", workers=2, engine=engine), predictor=Refusing, write=unwritten
    )
    assert result.done == count
    peak = limits.getrusage(limits.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"units": units, "plan": planned, "run": time.perf_counter() - started, "peak": peak}))


# --- nothing to do ----------------------------------------------------------------------------------------------------


def resume(folder: Path, extent: Extent) -> None:
    """A second call on a finished run."""
    count = extent.finished
    asked = job(folder, tiny_images(folder, count), "resume", engine="local")
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        done = generate(asked, predictor=Sleeper).done
        seconds.append(time.perf_counter() - started)
    assert done == 0
    print(f"\n### A finished run of {count} images\n")
    print(f"the first call {seconds[0]:.0f} s (tiny images, no teacher), the same again {seconds[1]:.1f} s")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, nargs="?")
    parser.add_argument("--only", choices=("sleep", "loop", "memory", "resume"))
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    parser.add_argument("--drive", nargs=3, help=argparse.SUPPRESS)  # images, engine, scratch folder
    asked = parser.parse_args()
    if asked.drive:
        count, engine, scratch = asked.drive
        drive(Path(scratch), int(count), engine)
        return
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
    extent = SMALLEST if asked.smallest else Extent()
    tables: dict[str, Callable[[Path, Extent], None]] = {
        "sleep": sleeping,
        "loop": functools.partial(loop, photographs=asked.photographs),
        "memory": memory,
        "resume": resume,
    }
    for name, table in tables.items():
        if asked.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                table(Path(folder), extent)


if __name__ == "__main__":
    main()
