"""Labels going out in every format: images a second, CPU time, peak memory and bytes, from a run that kept confidence.

python benchmarks/export_labels.py [FOLDER_OF_LABEL_PNGS] [--images N] [--smallest]

The labels are the folder's, of one size and with train ids of Cityscapes, or four drawn scenes of 1024 x 2048; they
are repeated until there are N. Photographs are drawn scenes with noise, as PNGs. Each format is written by the command,
in a process of its own, once for a quarter of the images and once for all: memory that stays the same does not depend
on the number of images. Times include the start of the process. With --smallest the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image

from autolabel.manifests.formats.known import WRITTEN
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.policy import PAPER
from autolabel.manifests.samples import Manifest, Sample, save_manifest
from autolabel.manifests.scenes import draw_scene
from autolabel.pipeline.adopt import Pngs, adopt, adopting_job

# The peak that wait4 tells of is that of this process, if that is larger; Linux knows the child's own.
CHILD = """
import sys
from pathlib import Path
from autolabel import cli
cli.main(sys.argv[1:], standalone_mode=False)
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])
"""


@dataclass(frozen=True)
class Sent:
    """One export: seconds by the clock, CPU seconds, peak memory in MB, bytes written."""

    clock: float
    cpu: float
    memory: float
    size: int


def make_run(folder: Path, labels: list[Path], images: int, size: tuple[int, int]) -> Path:
    """Make a run of so many images that has kept confidence, from label PNGs or drawn ones. Return its folder."""
    dice, samples = np.random.default_rng(0), []
    sources = []
    for seed in range(max(len(labels), 4) if labels else 4):
        scene = draw_scene(seed % 4, height=size[0], width=size[1])
        noisy = (scene.image + dice.integers(-6, 7, scene.image.shape)).clip(0, 255).astype(np.uint8)
        drawn = np.frombuffer(CITYSCAPES.train_ids, np.uint8)[scene.fine]
        label = np.asarray(Image.open(labels[seed % len(labels)])) if labels else drawn
        coarse = Image.fromarray(dice.integers(120, 256, (size[0] // 64, size[1] // 64), np.uint8))
        sources.append((noisy, label, np.asarray(coarse.resize((size[1], size[0])))))
    for number, (photo, label, sure) in enumerate(islice(cycle(sources), images)):
        name = f"drive/{number:06}"
        for place, pixels in (("images", photo), ("labels", label), ("sure", sure)):
            path = folder / place / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, compress_level=1)
        samples.append(Sample(name, folder / "images" / f"{name}.png", *size, split="train" if number % 4 else "val"))
    save_manifest(folder / "all.parquet", Manifest.of(CITYSCAPES, tuple(samples)))
    job = adopting_job(folder / "all.parquet", folder / "run", PAPER, keep_confidence=8)
    adopt(Pngs(folder / "labels", folder / "sure"), job).require_success()
    return folder / "run"


def send(run: Path, to: str, out: Path, images: int) -> Sent:
    """Export so many images by the command, and measure its process."""
    start = time.monotonic()
    asked = ("export", str(run), "--to", to, "-o", str(out), "--worst", str(images))
    with subprocess.Popen([sys.executable, "-c", CHILD, *asked], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        *_, memory = process.stdout.read().split()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
    clock = time.monotonic() - start
    if status:
        raise SystemExit(f"autolabel {' '.join(asked)} ended with status {status}")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    return Sent(clock, usage.ru_utime + usage.ru_stime, int(memory) / 1e3, size)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
    labels = sorted(asked.labels.glob("*.png")) if asked.labels else []
    images = 4 if asked.smallest else asked.images
    size = (64, 128) if asked.smallest else (1024, 2048)
    if labels:
        width, height = Image.open(labels[0]).size
        size = height, width
    with tempfile.TemporaryDirectory() as scratch:
        run = make_run(Path(scratch), labels, images, size)
        print(f"{images} images of {size[1]} x {size[0]}, {os.cpu_count()} cores\n")
        print(
            "| format | images/s | CPU ms per image | peak MB, a quarter of them | peak MB, all | MB per image |\n"
            "|---|---:|---:|---:|---:|---:|"
        )
        for to in WRITTEN[:1] if asked.smallest else WRITTEN:
            some, every = (send(run, to, Path(scratch) / to, count) for count in (max(1, images // 4), images))
            print(
                f"| {to} | {images / every.clock:.1f} | {1000 * every.cpu / images:.0f} | {some.memory:.0f} |"
                f" {every.memory:.0f} | {every.size / images / 1e6:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
