"""What labels cost the training loader: crops a second and core from our Zarr store, from PNGs, without reading any.

python benchmarks/loader.py [--smallest]

Draws 12 street scenes of 1024 x 2048, as PNG and as JPEG. All variants give the same crops of 512 x 1024 with all
augmentation, in one process with one thread, half of them aimed at a class. "none" has the labels in memory: all is
done but the reading. Times are CPU time of this process, the best of 3 turns, in each of which every variant runs once.
Then loading processes take the crops of PNG images with Zarr labels, one process and two, in turn: crops a second by
the clock, which the load of the machine touches, and CPU time a crop, which it hardly does.
Last, a disk whose every answer sleeps as a bucket's would, with more and fewer crops read ahead by threads. There two
loading processes sleep for the time that a crop takes a core, instead of computing it: on a machine with other work too
they show how long they wait for bytes. "of the disk" is the speed without the slow answers, measured in turn.
With --smallest the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader

from autolabel.manifests import storage
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.reading import fetch_photograph
from autolabel.manifests.run.centroids import find_centroids
from autolabel.manifests.run.labels import LABELS, zarr_folder
from autolabel.manifests.run.sample_labels import FetchedLabel
from autolabel.manifests.run.shards import Label, bucket_of, create_zarr, encode_zarr, write_zarr_shard
from autolabel.manifests.samples import Manifest, Sample
from autolabel.manifests.scenes import draw_scene
from autolabel.student.data import Augmentation, Fetched, ManifestDataset, TrainingCrops
from autolabel.student.loading import AHEAD, batches_of
from autolabel.student.sampling import Draw, Draws


@dataclass(frozen=True)
class Extent:
    """How much is measured: scenes and their size, crops and theirs, turns."""

    scenes: int = 12
    height: int = 1024
    width: int = 2048
    crops: int = 48
    crop: tuple[int, int] = (512, 1024)
    turns: int = 3
    delays: tuple[float, ...] = (0.02, 0.05, 0.1)
    depths: tuple[int, ...] = (1, 4, 8, 16)
    far_crops: int = 160


SMALLEST = Extent(2, 64, 128, 2, (32, 64), 1, (0.02,), (1, 4), 16)


def draws_of(dataset: ManifestDataset, crops: int) -> Draws:
    """Return the same draws for every way to store the labels."""
    return Draws(dataset.samples, dataset.label_space, seed=0, length=crops)


class InMemory(TrainingCrops):
    """The same crops of labels that were all read before."""

    def __init__(self, dataset: ManifestDataset, draws: Draws, augmentation: Augmentation, labels: dict[str, Label]):
        super().__init__(dataset, draws, augmentation=augmentation)
        self.labels = labels

    def fetch(self, draw: Draw) -> Fetched:
        """Read the photograph alone."""
        sample = self.dataset.samples[draw.sample]
        label = FetchedLabel(sample, self.labels[sample.sample_id])
        return Fetched(draw, fetch_photograph(sample), label, None)


class Far:
    """A storage whose every answer takes `seconds` longer, as a bucket's does; `asked` and `bytes` count."""

    def __init__(self, near: Any, seconds: float) -> None:
        self.near, self.seconds, self.asked, self.bytes = near, seconds, 0, 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.near, name)

        def far(*args: Any, **options: Any) -> Any:
            self.asked += 1
            time.sleep(self.seconds)
            answer = method(*args, **options)
            self.bytes += len(answer) if isinstance(answer, bytes) else 0
            return answer

        return far


@contextlib.contextmanager
def far_away(seconds: float) -> Iterator[Far]:
    """Let every request of this process, and of those that it forks, take so much longer."""
    near = storage.storage_of(Path())
    far, storage_of = Far(near, seconds), storage.storage_of
    storage.storage_of = lambda _: far  # type: ignore[assignment]
    try:
        yield far
    finally:
        storage.storage_of = storage_of


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    smallest = parser.parse_args().smallest
    if smallest:
        print("--smallest: these numbers mean nothing")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        measure(Path(scratch), SMALLEST if smallest else Extent())


def written(root: Path, extent: Extent) -> tuple[dict[str, dict[str, Manifest]], dict[str, Label]]:
    """Manifests by kind of image and kind of label, and the labels."""
    ids = np.frombuffer(CITYSCAPES.train_ids, np.uint8)
    height, width = extent.height, extent.width
    bucket, labels = bucket_of(height, width), dict[str, Label]()
    array = root / zarr_folder(LABELS) / bucket
    for n in range(extent.scenes):
        scene = draw_scene(n, height=height, width=width)
        labels[str(n)] = ids[scene.fine]
        Image.fromarray(scene.image).save(root / f"{n}.png")
        Image.fromarray(scene.image).save(root / f"{n}.jpg", quality=90)
        Image.fromarray(labels[str(n)]).save(root / f"label{n}.png")
    create_zarr(root / zarr_folder(LABELS), {bucket: extent.scenes}, shard_rows=extent.scenes, attributes={})
    write_zarr_shard(array, 0, shard_rows=extent.scenes, labels=[encode_zarr(label) for label in labels.values()])
    manifests: dict[str, dict[str, Manifest]] = {}
    for kind in ("jpg", "png"):
        plain = [Sample(str(n), root / f"{n}.{kind}", height, width, source="fine") for n in range(extent.scenes)]
        zarr = tuple(replace(s, label=array, label_index=n) for n, s in enumerate(plain))
        png = tuple(replace(s, label=root / f"label{n}.png") for n, s in enumerate(plain))
        manifests[kind] = {
            name: Manifest(CITYSCAPES, samples, root, root) for name, samples in (("Zarr", zarr), ("PNG", png))
        }
    return manifests, labels


def measure(root: Path, extent: Extent) -> None:
    """Both tables."""
    manifests, labels = written(root, extent)
    augmentation = Augmentation(extent.crop)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores\n")
    print("| images | labels | ms a crop | crops/s/core | reading labels, share of the time |")
    print("|---|---|---:|---:|---:|")
    each: dict[str, float] = {}
    for kind, stores in manifests.items():
        loaders: dict[str, TrainingCrops] = {
            name: TrainingCrops(dataset, draws_of(dataset, extent.crops), augmentation=augmentation)
            for name, dataset in ((name, ManifestDataset(manifest)) for name, manifest in stores.items())
        }
        dataset = ManifestDataset(stores["Zarr"])
        loaders["none"] = InMemory(dataset, draws_of(dataset, extent.crops), augmentation, labels)
        assert all(
            len({item["label"].numpy().tobytes() for item in crop}) == 1 for crop in zip(*loaders.values(), strict=True)
        )
        taken: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(extent.turns):
            for name, crops in loaders.items():
                started = time.process_time()
                for n in range(extent.crops):
                    crops[n]
                taken[name].append(time.process_time() - started)
        best = {name: min(times) / extent.crops for name, times in taken.items()}
        each[kind] = best["Zarr"]
        for name, seconds in best.items():
            share = f"{100 * (1 - best['none'] / seconds):.1f} %" if name != "none" else "–"
            print(f"| {kind} | {name} | {1e3 * seconds:.1f} | {1 / seconds:.1f} | {share} |", flush=True)
    dataset = ManifestDataset(manifests["png"]["Zarr"])
    by_processes(TrainingCrops(dataset, draws_of(dataset, extent.crops), augmentation=augmentation), extent)
    from_afar(manifests, augmentation, extent, each)
    samples = manifests["png"]["PNG"].samples
    started = time.process_time()
    find_centroids(samples, CITYSCAPES)
    counted = 1e3 * (time.process_time() - started) / extent.scenes
    print(f"\ncentroids of a PNG label: {counted:.1f} ms of CPU, once a training")


def by_processes(crops: TrainingCrops, extent: Extent) -> None:
    """Table of loading processes: from the first crop on, so that their start does not count."""
    taken: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for _ in range(extent.turns):
        for workers, turns in taken.items():
            loader = iter(DataLoader(crops, batch_size=None, num_workers=workers, prefetch_factor=2))
            next(loader)
            before, started = children(), time.perf_counter()
            rest = sum(1 for _ in loader)
            turns.append((rest / (time.perf_counter() - started), (children() - before) / rest))
    print("\n| loading processes | crops/s | of one | CPU ms a crop | load average |")
    print("|---|---:|---:|---:|---:|")
    one = max(speed for speed, _ in taken[1])
    for workers, turns in taken.items():
        speed, each = max(s for s, _ in turns), min(e for _, e in turns)
        load = os.getloadavg()[0]
        print(f"| {workers} | {speed:.1f} | {speed / one:.2f} | {1e3 * each:.1f} | {load:.1f} |", flush=True)


class Asleep(TrainingCrops):
    """Crops that are read as ever, and take their time without being made."""

    def __init__(self, dataset: ManifestDataset, draws: Draws, augmentation: Augmentation, seconds: float) -> None:
        super().__init__(dataset, draws, augmentation=augmentation)
        self.seconds = seconds

    def crop(self, n: int, fetched: Fetched) -> dict[str, Any]:
        """Sleep."""
        time.sleep(self.seconds)
        return {"bytes": len(fetched.image)}


def from_afar(
    manifests: dict[str, dict[str, Manifest]], augmentation: Augmentation, extent: Extent, each: dict[str, float]
) -> None:
    """Table of latencies, and how many crops each of two loading processes reads ahead; `each`: seconds a crop."""
    print("\n| images | ms a crop | ms a request | ahead | crops/s | of the disk | requests a crop | KiB a crop |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for kind, stores in manifests.items():
        dataset = ManifestDataset(stores["Zarr"])
        crops = Asleep(dataset, draws_of(dataset, extent.far_crops), augmentation, each[kind])
        with far_away(0) as far:
            for _ in range(2):  # what is remembered of the store is known in the second turn
                far.asked = far.bytes = 0
                for n in range(extent.far_crops):
                    crops.fetch(crops.draws[n])
        ways = [(0.0, AHEAD), *((delay, depth) for delay in extent.delays for depth in extent.depths)]
        speeds: dict[tuple[float, int], list[float]] = {way: [] for way in ways}
        for _ in range(extent.turns):
            for delay, depth in ways:
                with far_away(delay):
                    speeds[delay, depth].append(speed(crops, extent.far_crops, depth=depth))
        disk = max(speeds[ways[0]])
        requests, size = far.asked / extent.far_crops, far.bytes / extent.far_crops / 1024
        for (delay, depth), found in speeds.items():
            told = f"{kind} | {1e3 * each[kind]:.1f} | {1e3 * delay:.0f} | {depth} | {max(found):.1f}"
            print(f"| {told} | {max(found) / disk:.2f} | {requests:.2f} | {size:.0f} |", flush=True)


def speed(crops: TrainingCrops, count: int, *, depth: int) -> float:
    """Crops a second of two loading processes, from their first batches on."""
    loader = iter(batches_of(crops, range(count), size=2, loaders=2, depth=depth))
    for _ in range(2):
        next(loader)
    started = time.perf_counter()
    rest = sum(2 for _ in loader)
    return rest / (time.perf_counter() - started)


def children() -> float:
    """Seconds of CPU of all loading processes, living and ended."""
    ended = os.times()
    living = (psutil.Process(child.pid).cpu_times() for child in multiprocessing.active_children())
    return ended.children_user + ended.children_system + sum(times.user + times.system for times in living)


if __name__ == "__main__":
    main()
