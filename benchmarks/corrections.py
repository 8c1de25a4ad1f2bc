"""Labels out, one pixel of a hundred edited, and back, in every format: time, memory, pixels that differ.

    python benchmarks/corrections.py [FOLDER_OF_LABEL_PNGS] [--images N] [--smallest]

The folder holds maps of Cityscapes' train ids, all of one size; without it, street scenes of 1024 x 2048 are drawn.
They are adopted as a run that keeps confidence, with so many images, each map several times. Edits are blobs of a
class, one hundredth of each label. CPU time and highest use of memory are those of a command in a process of its own.
With --smallest two formats run, and the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests.corrected import read_origin
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.policy import Policy
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.samples import load_manifest, save_manifest
from autolabel.manifests.scan import scan
from autolabel.manifests.scenes import draw_scene
from autolabel.pipeline.adopt import Pngs, adopt, adopting_job
from autolabel.pipeline.corrections import import_corrections

WAYS = (("png", ""), ("cvat", "masks.zip"), ("coco", "panoptic.json"), ("coco", "stuff.json"), ("label-studio", ""))
SHARE, BLOB = 0.01, 8  # of the pixels; rows and columns of an edit
MEASURED = """
import pathlib, sys
from autolabel import cli
cli.main(sys.argv[1:], standalone_mode=False)
print(next(x for x in pathlib.Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")))
"""
Map = NDArray[np.uint8]


def save(path: Path, pixels: Map) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def edited(label: Map, seed: int) -> Map:
    """The label with blobs of other classes."""
    rng, label = np.random.default_rng(seed), label.copy()
    for _ in range(max(1, round(SHARE * label.size / BLOB**2))):
        top, left = (int(rng.integers(0, size - BLOB + 1)) for size in label.shape)
        label[top : top + BLOB, left : left + BLOB] = rng.integers(0, len(CITYSCAPES))
    return label


def make_run(root: Path, maps: list[Map], images: int) -> Path:
    """A run with these labels, of which every seventh row is unsure, and masks that people have edited."""
    for number in range(images):
        label = maps[number % len(maps)]
        photograph = np.full((*label.shape, 3), 90, np.uint8)
        photograph[0, : len(str(number))] = [(200, 10, int(digit)) for digit in str(number)]  # no two are the same
        sure = np.full(label.shape, 230, np.uint8)
        sure[::7] = 150
        for folder, pixels in (("images", photograph), ("top", label), ("sure", sure)):
            save(root / folder / f"{number:05}.png", pixels)
    save_manifest(root / "images.parquet", scan(root / "images", layout="folder", label_space=CITYSCAPES)[0])
    job = adopting_job(root / "images.parquet", root / "run", Policy(threshold=0.4), keep_confidence=8)
    adopt(Pngs(root / "top", root / "sure"), job)
    for number, (name, label) in enumerate(Run.open(root / "run").labels.items()):
        save(root / "edited" / f"{name}.png", edited(label, number))
    return root / "run"


def measured(*arguments: object) -> tuple[float, float]:
    """Run a command; seconds of CPU and MiB."""
    before = os.times()
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    if done.returncode:
        raise SystemExit(done.stderr)
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, int(done.stdout.split()[-2]) / 1024


def differing(one: Path, other: Path) -> int:
    """The pixels in which labels or origins of two manifests of corrections differ."""
    count = 0
    samples = load_manifest(one).samples, load_manifest(other).samples
    for a, b in zip(*samples, strict=True):
        labels = (read_sample_label(sample, CITYSCAPES) for sample in (a, b))
        origins = [origin for sample in (a, b) if (origin := read_origin(sample)) is not None]
        differ = np.not_equal(*labels) | np.not_equal(*origins)
        count += int(differ.sum())
    return count


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("labels", type=Path, nargs="?")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--smallest", action="store_true")
    options = parser.parse_args()
    if options.smallest:
        print("--smallest: these numbers mean nothing")
        maps, images = [draw_scene(seed, height=48, width=96).fine for seed in range(2)], 3
        table = np.frombuffer(CITYSCAPES.train_ids, np.uint8)
        maps = [table[label] for label in maps]
    elif options.labels:
        maps, images = [np.asarray(Image.open(path)) for path in sorted(options.labels.glob("*.png"))], options.images
    else:
        table = np.frombuffer(CITYSCAPES.train_ids, np.uint8)
        seeds = [random.Random(k).getrandbits(63) for k in range(12)]
        maps, images = [table[draw_scene(seed, height=1024, width=2048).fine] for seed in seeds], options.images
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        run, first = make_run(root, maps, images), root / "first.parquet"
        changed = import_corrections("png", [root / "edited"], run=run, out=first).changed_pixels
        print(f"{images} images of {maps[0].shape[1]} x {maps[0].shape[0]}, {changed:,} pixels edited\n")
        print("| format | export, CPU ms per image | MiB | import, CPU ms per image | MiB | pixels that differ |")
        print("|---|---:|---:|---:|---:|---:|")
        for number, (name, file) in enumerate(WAYS[: 2 if options.smallest else None]):
            out, back = root / f"out-{number}", root / f"back-{number}.parquet"
            sent = measured("export", first, "--to", name, "-o", out)
            taken = measured("import", name, out / file, "--run", run, "-o", back)
            numbers = [f"{value:.0f}" for seconds, mib in (sent, taken) for value in (1e3 * seconds / images, mib)]
            title = f"{name} {file}".strip()
            print(f"| {title} | {' | '.join(numbers)} | {differing(first, back)} |", flush=True)


if __name__ == "__main__":
    main()
