"""The work of a host beside a GPU: `python benchmarks/feed.py [PHOTOGRAPHS LABELS]`.

A device that sleeps 90 ms an image takes the place of a GPU; all else is the real thing: files on disk, the labeller
and its threads, copies into batches, rules, encoding, commits to Zarr. Photographs are 2048 x 1024, four JPEGs of
PHOTOGRAPHS each, enlarged, with a little noise; the device answers with label maps of LABELS, 19 classes. Without
folders both are drawn.

Two tables: the CPU time of an image by stage, in which the functions of a stage count the time of their thread without
that of inner ones; and how busy the device was from its first image to its last, with the cores that this device, and
two faster ones, would need, computed from the CPU time. With --smallest the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests import storage
from autolabel.manifests.evidence import OUTSIDE, PolygonCounts
from autolabel.manifests.hands import coarsen
from autolabel.manifests.images import encode_label, read_label
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.machine import PeakMemory, cores
from autolabel.manifests.policy import DENSE, PAPER, Policy
from autolabel.manifests.samples import Sample, open_manifest, writing_manifest
from autolabel.manifests.scenes import draw_scene
from autolabel.manifests.settings import build_job
from autolabel.pipeline import measure, predictor
from autolabel.pipeline.cutting import write_plan
from autolabel.pipeline.engine import Crew, Work, run_local
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.label import Labeller
from autolabel.pipeline.predictor import TeacherPredictor
from autolabel.pipeline.prepare import new_run, settle
from autolabel.pipeline.progress import Meter
from autolabel.pipeline.rules import Rules
from autolabel.pipeline.units import Plan, Tally
from autolabel.teacher.checkpoints import save_checkpoint
from autolabel.teacher.counting import count
from autolabel.teacher.decide import Prediction, encode
from autolabel.teacher.feed import Feed
from autolabel.teacher.memory import BATCH_PIXELS, Budget, Gate
from autolabel.teacher.networks.build import build
from autolabel.teacher.predict import Teacher

CLASSES = len(CITYSCAPES)
DEVICES = (90, 40, 18)  # ms an image
# Functions by the stage that their time belongs to: where they are looked up, and under which name.
STAGES: dict[str, tuple[tuple[Any, str], ...]] = {
    "read, fingerprint": (
        (predictor, "read_version"),
        (storage, "fingerprint_bytes"),
    ),
    "decode": ((predictor, "decode_photograph"),),
    "coarse label, places": ((predictor, "read_coarse"), (predictor, "places")),
    "copy into the batch": ((Feed, "upload"),),
    "policy": ((Rules, "apply"),),
    "numbers": ((measure, "class_numbers"), (measure, "image_numbers")),
    "checksum": ((measure, "crc32c"),),
    "centroids": ((measure, "centroids"),),
    "encode": ((measure, "encoded"),),
    "shard, record": ((Labeller, "_commit"),),
}
REST = "threads, queues, the rest"


@dataclass(frozen=True)
class Extent:
    """How much is measured: height and width, distinct photographs, images of a unit, units, seconds a sleep."""

    size: tuple[int, int] = (1024, 2048)
    photographs: int = 8
    unit: int = 64
    units: int = 2
    sleep: float = DEVICES[0] / 1000


SMALLEST = Extent((64, 128), 2, 3, 2, 0.002)


@dataclass(frozen=True)
class Case:
    """A policy, the format of its photographs, and whether they have coarse labels."""

    name: str
    policy: Policy
    suffix: str = "png"
    coarse: bool = False


class Clock:
    """CPU seconds of threads by stage, without those of inner stages."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner = threading.local()
        self._lock = threading.Lock()

    def timed(self, stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose time is counted."""

        @functools.wraps(work)
        def run(*args: Any, **kwargs: Any) -> Any:
            outer, self._inner.seconds = getattr(self._inner, "seconds", 0.0), 0.0
            started = time.thread_time()
            try:
                return work(*args, **kwargs)
            finally:
                taken = time.thread_time() - started
                with self._lock:
                    self.seconds[stage] += taken - self._inner.seconds
                self._inner.seconds = outer + taken

        return run


class Sleeping:
    """A teacher whose device sleeps so many seconds an image, one batch at a time, and answers with known maps."""

    device = torch.device("cuda")  # so the labeller feeds it as a GPU
    classes = CLASSES

    def __init__(self, sleep: float, maps: Sequence[NDArray[np.uint8]]) -> None:
        self.sleep, self.feed, self.gate = sleep, Feed(torch.device("cpu")), Gate(torch.device("cpu"))
        self.worked: list[tuple[float, float]] = []
        self.images = 0
        self._device, self._maps, self._answers = threading.Lock(), maps, list[Prediction]()

    def budget(self, **_: Any) -> Budget:
        """Room for everything."""
        return Budget("sleeping", "float32", 1.0, 1 << 36)

    def answer(self, edges: Sequence[float]) -> Iterator[Prediction]:
        """Predictions of the maps, unsure where these ignore, over and over; made before the clock runs."""
        for label in self._maps:
            sure = torch.from_numpy(np.where(label < CLASSES, np.float32(0.95), np.float32(0.3)))[None]
            top = torch.from_numpy(np.where(label < CLASSES, label, 0))[None]
            codes = encode(top, sure, classes=CLASSES, edges=edges)[0].numpy()
            counts, total = (x.numpy() for x in count(top[0], sure[0], classes=CLASSES))
            self._answers.append(Prediction(codes, len(edges) + 1, counts, total))
        return itertools.cycle(self._answers)

    def predict_in_batches(self, images: Sequence[Any], batch: int, **settings: Any) -> Iterator[Prediction]:
        """Copy the images into a batch, sleep, answer."""
        self.feed.upload(images, batch=batch, places=settings["places"], evidence=settings["evidence"])
        with self._device:
            started = time.perf_counter()
            time.sleep(self.sleep * len(images))
            self.worked.append((started, time.perf_counter()))
            self.images += len(images)
            return iter([next(self.answers) for _ in images])

    answers: Iterator[Prediction]

    @property
    def busy(self) -> float:
        """The share of the time from the first image to the last in which the device worked."""
        return sum(end - start for start, end in self.worked) / (self.worked[-1][1] - self.worked[0][0])


@dataclass
class Found:
    """A case measured: CPU ms an image by stage, the device's share of busy time, images/s, bytes."""

    images: int
    stages: dict[str, float] = field(default_factory=dict)
    busy: float = 0.0
    rate: float = 0.0
    peak: int = 0
    worked: Sequence[tuple[float, float]] = ()  # of the device: begin and end of every batch

    @property
    def cpu(self) -> float:
        return sum(self.stages.values())


# --- files ------------------------------------------------------------------------------------------------------------


def photographs(folder: Path | None, extent: Extent) -> Iterator[Image.Image]:
    """Photographs of street scenes, enlarged: about as smooth as those of Cityscapes, whose PNGs have 2.3 MB."""
    height, width = extent.size
    dice = np.random.default_rng(0)
    paths = sorted(folder.rglob("*.jpg")) if folder else []
    for number in range(extent.photographs):
        if not paths:
            yield Image.fromarray(draw_scene(number, height=height, width=width).image)
            continue
        canvas = Image.new("RGB", (width, height))
        for k in range(4):
            with Image.open(paths[(4 * number + k) * 7 % len(paths)]) as opened:
                tile = opened.convert("RGB").resize((width // 2, width * 3 // 8), Image.Resampling.LANCZOS)
            above = (width * 3 // 8 - height // 2) // 2
            tile = tile.crop((0, above, width // 2, above + height // 2))
            canvas.paste(tile, (k % 2 * width // 2, k // 2 * height // 2))
        noisy = np.asarray(canvas) + dice.normal(0, 1, (height, width, 1))
        yield Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def label_maps(folder: Path | None, extent: Extent) -> list[NDArray[np.uint8]]:
    """Label maps of train ids."""
    if folder:
        return [read_label(path, CITYSCAPES) for path in sorted(folder.glob("*.png"))[: extent.photographs]]
    height, width = extent.size
    train_ids = np.frombuffer(CITYSCAPES.train_ids, np.uint8)
    return [train_ids[draw_scene(n, height=height, width=width).fine] for n in range(extent.photographs)]


def write_files(root: Path, given: Path | None, maps: Sequence[NDArray[np.uint8]], extent: Extent) -> None:
    """Photographs as PNG and as JPEG, coarse labels, and as many links to them as there are images."""
    for number, picture in enumerate(photographs(given, extent)):
        for suffix, how in (("png", {}), ("jpg", {"quality": 95, "subsampling": 0})):
            data = io.BytesIO()
            picture.save(data, "PNG" if suffix == "png" else "JPEG", **cast(dict[str, Any], how))
            (root / f"{number:06d}.{suffix}").write_bytes(data.getvalue())
        coarse = coarsen(maps[number % len(maps)], "even")
        (root / f"{number:06d}.coarse").write_bytes(encode_label(coarse))
    for number in range(extent.photographs, extent.unit * extent.units):
        for suffix in ("png", "jpg", "coarse"):
            os.link(root / f"{number % extent.photographs:06d}.{suffix}", root / f"{number:06d}.{suffix}")


def write_manifest(folder: Path, root: Path, case: Case, extent: Extent) -> Path:
    """The manifest of a case."""
    path = folder / "manifest.parquet"
    with writing_manifest(path, CITYSCAPES, image_root=root, label_root=root) as write:
        write([
            Sample(
                f"s{n:06d}", root / f"{n:06d}.{case.suffix}", *extent.size, "train", "town",
                source="coarse" if case.coarse else "none",
                coarse_label=root / f"{n:06d}.coarse" if case.coarse else None, label_ids="train",
            )
            for n in range(extent.unit * extent.units)
        ])  # fmt: skip
    return path


# --- a run ------------------------------------------------------------------------------------------------------------


def measured(
    folder: Path,
    root: Path,
    case: Case,
    maps: Sequence[NDArray[np.uint8]],
    extent: Extent,
    *,
    out: Path | None = None,
    begin: Callable[[], object] = lambda: None,
) -> Found:
    """Label all images of a case. out: the run folder, if it is not in `folder`. begin: is called before the first."""
    teacher = folder / "teacher.pt"
    if not teacher.is_file():
        save_checkpoint(teacher, build("hrnet18s_plain", CLASSES), arch="hrnet18s_plain", space=CITYSCAPES)
    here = folder / case.name
    here.mkdir()
    paths = {"manifest": write_manifest(here, root, case, extent), "teacher": teacher, "out": out or here / "run"}
    job = build_job(
        LabelJob, {**paths, "device": "cpu", "engine": "local", "unit_size": extent.unit, "policy": case.policy}
    )
    request, _ = settle(job, job.teacher.digest(), here)
    manifest = open_manifest(job.manifest)
    plan = Plan(write_plan(here, manifest, extent.unit), extent.unit, manifest.image_root, manifest.label_root)
    run = new_run(request, "", job.out)
    run = replace(run, recipe=replace(run.recipe, batch_pixels=BATCH_PIXELS))  # the batches of a GPU
    if out is None:
        (job.out / "units").mkdir(parents=True)
    device, clock, found = Sleeping(extent.sleep, maps), Clock(), Found(extent.unit * extent.units)
    device.answers = device.answer(run.policy.edges(CITYSCAPES))
    crew = Crew(run, predictor=lambda run, _: TeacherPredictor(cast(Teacher, device), run.recipe))
    meter = Meter(run, CITYSCAPES.names, asked=found.images, wanted=found.images, before=Tally())
    before = [(where, name, getattr(where, name)) for stage in STAGES.values() for where, name in stage]
    try:
        for stage, functions in STAGES.items():
            for where, name in functions:
                setattr(where, name, clock.timed(stage, getattr(where, name)))
        with PeakMemory() as memory:
            begin()
            started, cpu = time.perf_counter(), time.process_time()
            work = (Work(plan.packed(n), tuple(s.sample_id for s in plan[n].samples)) for n in range(len(plan)))
            run_local(crew, work, meter)
            cpu, taken = time.process_time() - cpu, time.perf_counter() - started
    finally:
        for where, name, function in before:
            setattr(where, name, function)
    assert device.images == found.images
    each = {stage: 1e3 * clock.seconds[stage] / found.images for stage in STAGES}
    found.stages = {**each, REST: 1e3 * cpu / found.images - sum(each.values())}
    found.busy, found.rate, found.peak, found.worked = device.busy, found.images / taken, memory.bytes, device.worked
    return found


def any_counts() -> PolygonCounts:
    """Counts of polygons; the time hardly depends on them."""
    dice = np.random.default_rng(0)
    outside = dice.integers(1, 1000, (CLASSES, len(OUTSIDE) + 1, CLASSES))
    return PolygonCounts.of(CITYSCAPES, {"2048x1024": 40}, outside, dice.integers(1, 1000, (CLASSES, 7, 2)))


def show(found: dict[str, Found], extent: Extent) -> None:
    """Print the two tables."""
    height, width = extent.size
    print(f"\n### CPU ms of the host an image, {width} x {height}, {CLASSES} classes\n")
    print(f"| stage | {' | '.join(found)} |\n|---|{'---:|' * len(found)}")
    for stage in (*STAGES, REST):
        print(f"| {stage} | {' | '.join(f'{one.stages[stage]:.1f}' for one in found.values())} |")
    print(f"| **all** | {' | '.join(f'{one.cpu:.1f}' for one in found.values())} |")
    images = next(iter(found.values())).images
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"\n### A device that sleeps {1e3 * extent.sleep:.0f} ms an image, {images} images, {cores()} cores{load}\n")
    faster = " | ".join(f"cores for {ms} ms, computed" for ms in DEVICES)
    print(f"| | device busy | images/s | CPU ms an image | peak MiB | {faster} |\n|---|{'---:|' * (4 + len(DEVICES))}")
    for name, one in found.items():
        needed = " | ".join(f"{one.cpu / ms:.2f}" for ms in DEVICES)
        peak = f"{one.peak / 2**20:.0f}"
        print(f"| {name} | {100 * one.busy:.1f} % | {one.rate:.1f} | {one.cpu:.1f} | {peak} | {needed} |", flush=True)


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, nargs="?")
    parser.add_argument("labels", type=Path, nargs="?")
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    extent = SMALLEST if asked.smallest else Extent()
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
    cases = (
        Case("paper", PAPER),
        Case("paper, JPEG", PAPER, suffix="jpg"),
        Case("paper, coarse", PAPER, coarse=True),
        Case("dense", DENSE.counted(any_counts()), coarse=True),
    )
    maps = label_maps(asked.labels, extent)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "files"
        root.mkdir()
        write_files(root, asked.photographs, maps, extent)
        show({case.name: measured(Path(folder), root, case, maps, extent) for case in cases}, extent)


if __name__ == "__main__":
    main()
