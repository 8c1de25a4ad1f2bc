"""Labels to CVAT, COCO and Label Studio and back: CPU time and bytes of a label, and memory of a large COCO file.

python benchmarks/labelling_tools.py [FOLDER_OF_LABEL_PNGS] [--images N] [--smallest]

The labels are the folder's, with train ids of Cityscapes, or four drawn scenes of 1024 x 2048. Times are CPU time of
this process for a label, photographs left out: the best of three turns. Every pixel that comes back is compared. Then
stuff.json is written for N images, 20,000 unless said otherwise, and read in a process of its own until a hundred
labels have come: the peak of its memory. With --smallest the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from autolabel.manifests.formats.exchange import Outgoing, Packing
from autolabel.manifests.formats.known import known_format
from autolabel.manifests.formats.style import Style
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.run.shards import Label
from autolabel.manifests.samples import Sample
from autolabel.manifests.scenes import draw_scene

FILES = (("cvat", "masks.zip"), ("coco", "stuff.json"), ("coco", "panoptic.json"), ("label-studio", "tasks"))


def item(number: int, label: Label) -> Outgoing:
    """One label without a photograph."""
    name = f"drive/{number:06}"
    return Outgoing(Sample(name, Path(f"{name}.png"), *label.shape), name, label)


def send(to: str, labels: list[Label], folder: Path) -> float:
    """Write labels in a format; CPU seconds for each."""
    start = time.process_time()
    writer = known_format(to).writer(CITYSCAPES, Style(images="none"))
    entries = [writer.write(item(number, label), folder) for number, label in enumerate(labels)]
    writer.finish(folder, writer.pack(folder, 0, entries) if isinstance(writer, Packing) else entries)
    return (time.process_time() - start) / len(labels)


def receive(to: str, labels: list[Label], path: Path) -> float:
    """Read them back and compare every pixel; CPU seconds for each, without the comparison."""
    start, compared = time.process_time(), 0.0
    for number, one in enumerate(known_format(to).read(path, CITYSCAPES)):
        before = time.process_time()
        assert np.array_equal(one.label, labels[number]), f"{to}: {one.name} has come back otherwise"
        compared += time.process_time() - before
    return (time.process_time() - start - compared) / len(labels)


class Repeated:
    """What a writer says of one image, as if there were many."""

    def __init__(self, entry: dict[str, Any], count: int) -> None:
        self._entry, self._count = entry, count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self._count):
            yield {**self._entry, "name": f"drive/{number:06}", "file": f"drive/{number:06}.png"}


def peak(path: Path) -> str:
    """Read a hundred labels of a COCO file in a new process: seconds until the first, and the peak of memory in MB."""
    line = [sys.executable, __file__, "--peak", str(path)]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()


def read_some(path: Path) -> None:
    """Print what `peak` wants."""
    start = time.monotonic()
    labels = known_format("coco").read(path, CITYSCAPES)
    next(labels)
    first = time.monotonic() - start
    for _ in islice(labels, 99):
        pass
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{first:.0f} | {kilobytes / 1e3:.0f}")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak:
        read_some(asked.peak)
        return
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
    files = sorted(asked.labels.glob("*.png")) if asked.labels else []
    height, width = (64, 128) if asked.smallest else (1024, 2048)
    table = np.frombuffer(CITYSCAPES.train_ids, np.uint8)
    drawn = (table[draw_scene(seed, height=height, width=width).fine] for seed in range(4))
    labels = [np.asarray(Image.open(path)) for path in files] or list(drawn)
    print(f"{len(labels)} labels of {labels[0].shape[1]} x {labels[0].shape[0]}\n")
    print("| file | CPU ms a label, out | CPU ms a label, back | kB a label |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch:
        for to, name in FILES:
            folder, turns = Path(scratch) / to, 1 if asked.smallest else 3
            out = min(send(to, labels, folder) for _ in range(turns))
            back = min(receive(to, labels, folder / name) for _ in range(turns))
            paths = [folder / name, *(folder / name).rglob("*"), *(folder / Path(name).stem).rglob("*")]
            size = sum(path.stat().st_size for path in paths if path.is_file()) / len(labels)
            print(f"| {name} of {to} | {1000 * out:.0f} | {1000 * back:.0f} | {size / 1e3:.1f} |", flush=True)
        images = 150 if asked.smallest else asked.images
        writer = known_format("coco").writer(CITYSCAPES, Style(images="none"))
        entry = writer.write(item(0, labels[0]), Path(scratch))
        writer.finish(Path(scratch), Repeated(entry, images))
        path = Path(scratch) / "stuff.json"
        print(
            "\n| images | annotations | stuff.json in MB | s until the first label | peak MB |\n"
            "|---:|---:|---:|---:|---:|\n"
            f"| {images:,} | {images * len(entry['segments']):,} | {path.stat().st_size / 1e6:.0f} | {peak(path)} |"
        )


if __name__ == "__main__":
    main()
