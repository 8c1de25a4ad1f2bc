"""What labels cost the training loader: crops a second and core from our Zarr store, from PNGs, without reading any.

python benchmarks/loader.py

Draws 12 street scenes of 1024 x 2048, as PNG and as JPEG. All variants give the same crops of 512 x 1024 with all
augmentation, in one process with one thread, half of them aimed at a class. "none" has the labels in memory: all is
done but the reading. Times are CPU time of this process, the best of 3 turns, in each of which every variant runs once.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.run.centroids import find_centroids
from autolabel.manifests.run.labels import LABELS, Window, zarr_folder
from autolabel.manifests.run.shards import Label, bucket_of, create_zarr, encode_zarr, write_zarr_shard
from autolabel.manifests.samples import Manifest, Sample
from autolabel.manifests.scenes import draw_scene
from autolabel.student.data import Augmentation, ManifestDataset, TrainingCrops
from autolabel.student.sampling import Draws

HEIGHT, WIDTH, SCENES, CROPS, TURNS = 1024, 2048, 12, 48, 3


def draws_of(dataset: ManifestDataset) -> Draws:
    """Return the same draws for every way to store the labels."""
    return Draws(dataset.samples, dataset.label_space, seed=0, length=CROPS)


class InMemory(TrainingCrops):
    """The same crops of labels that were all read before."""

    def __init__(self, dataset: ManifestDataset, augmentation: Augmentation, labels: dict[str, Label]) -> None:
        super().__init__(dataset, draws_of(dataset), augmentation=augmentation)
        self.labels = labels

    def reader(self, sample: Sample) -> Callable[[Window], Label]:
        """Slices."""
        whole = self.labels[sample.sample_id]
        return lambda window: whole[window[0] : window[0] + window[2], window[1] : window[1] + window[3]]


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        measure(Path(scratch))


def written(root: Path) -> tuple[dict[str, dict[str, Manifest]], dict[str, Label]]:
    """Manifests by kind of image and kind of label, and the labels."""
    ids = np.frombuffer(CITYSCAPES.train_ids, np.uint8)
    bucket, labels = bucket_of(HEIGHT, WIDTH), dict[str, Label]()
    array = root / zarr_folder(LABELS) / bucket
    for n in range(SCENES):
        scene = draw_scene(n, height=HEIGHT, width=WIDTH)
        labels[str(n)] = ids[scene.fine]
        Image.fromarray(scene.image).save(root / f"{n}.png")
        Image.fromarray(scene.image).save(root / f"{n}.jpg", quality=90)
        Image.fromarray(labels[str(n)]).save(root / f"label{n}.png")
    create_zarr(root / zarr_folder(LABELS), {bucket: SCENES}, shard_rows=SCENES, attributes={})
    write_zarr_shard(array, 0, shard_rows=SCENES, labels=[encode_zarr(label) for label in labels.values()])
    manifests: dict[str, dict[str, Manifest]] = {}
    for kind in ("jpg", "png"):
        plain = [Sample(str(n), root / f"{n}.{kind}", HEIGHT, WIDTH, source="fine") for n in range(SCENES)]
        zarr = tuple(replace(s, label=array, label_index=n) for n, s in enumerate(plain))
        png = tuple(replace(s, label=root / f"label{n}.png") for n, s in enumerate(plain))
        manifests[kind] = {
            name: Manifest(CITYSCAPES, samples, root, root) for name, samples in (("Zarr", zarr), ("PNG", png))
        }
    return manifests, labels


def measure(root: Path) -> None:
    """Both tables."""
    manifests, labels = written(root)
    augmentation = Augmentation((512, 1024))
    print(f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores\n")
    print("| images | labels | ms a crop | crops/s/core | reading labels, share of the time |")
    print("|---|---|---:|---:|---:|")
    for kind, stores in manifests.items():
        loaders: dict[str, TrainingCrops] = {
            name: TrainingCrops(dataset, draws_of(dataset), augmentation=augmentation)
            for name, dataset in ((name, ManifestDataset(manifest)) for name, manifest in stores.items())
        }
        loaders["none"] = InMemory(ManifestDataset(stores["Zarr"]), augmentation, labels)
        assert all(
            len({item["label"].numpy().tobytes() for item in crop}) == 1 for crop in zip(*loaders.values(), strict=True)
        )
        taken: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(TURNS):
            for name, crops in loaders.items():
                started = time.process_time()
                for n in range(CROPS):
                    crops[n]
                taken[name].append(time.process_time() - started)
        best = {name: min(times) / CROPS for name, times in taken.items()}
        for name, seconds in best.items():
            share = f"{100 * (1 - best['none'] / seconds):.1f} %" if name != "none" else "–"
            print(f"| {kind} | {name} | {1e3 * seconds:.1f} | {1 / seconds:.1f} | {share} |", flush=True)
    samples = manifests["png"]["PNG"].samples
    started = time.process_time()
    find_centroids(samples, CITYSCAPES)
    print(
        f"\ncentroids of a PNG label: {1e3 * (time.process_time() - started) / SCENES:.1f} ms of CPU, once a training"
    )


if __name__ == "__main__":
    main()
