"""Labelling with this package beside what people would otherwise do, one run: `make bench`.

python benchmarks/peers.py [PHOTOGRAPHS] [--teacher CHECKPOINT] [--images N] [--large N] [--kill N] [--turns N]
                           [--only own|segformer] [--ways NAME …] [--smallest]

PHOTOGRAPHS is a folder of images, else streets are drawn; the large images are the first ones, cropped to 2 : 1 and
resized to 2048 x 1024. CHECKPOINT is a network with learnt attention, else the one of `autolabel demo`. SegFormer-B0
has random weights, the same for all. The ways:

loop      a plain loop of PyTorch, as published: every map at full size, a PNG of labels and one of probabilities
trimmed   the same loop as a careful person writes it: inference mode, channels last, nothing that no label needs
pipeline  image-segmentation of transformers, its masks joined to a PNG
Ray Data  read_images, map_batches, PNGs, with checkpoints of its own
ours      autolabel generate, as one types it; the same with --focus 0.25

The first four are scripts in peer_ways/. All run in turn, each in processes of its own, held on one core, with one
thread and one image at a time. CPU time is user + system of all processes of a way. It is taken for N small images and
for one: the difference is what an image costs, the rest is the start. Memory is the largest sum over the processes
(PSS), looked at four times a second, or the peak of a single process where that is more.

Then each way is killed (SIGKILL, all processes) as soon as it has done half of the images, a way that writes PNGs just
when the file of the last one of them appears, and called again. "again" is how many images the second call labels of
those that were done at the kill. Only Linux tells all of this.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import itertools
import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray
from peer_ways.watch import Cost, adopt_orphans, cost, killed, started
from PIL import Image

from autolabel.manifests.scenes import write_city

HERE = Path(__file__).parent
DEMO = HERE.parent / "teacher" / "drawn_streets.safetensors"
OURS, FOCUSED = "ours", "ours, --focus 0.25"
Labels = dict[str, NDArray[Any]]
Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Extent:
    """Images of each size, images of the kill, turns; small: networks are small, and starts are not told apart."""

    images: dict[Size, int]
    kill: int
    turns: int = 3
    small: bool = False


SMALLEST = Extent({(48, 96): 2}, 2, 1, small=True)


@dataclass(frozen=True)
class Way:
    """A way to label: its script and options, or none for ours with its options; a package that it needs."""

    name: str
    script: str = ""
    options: tuple[str, ...] = ()
    package: str = ""

    @property
    def there(self) -> bool:
        """True if its package is installed."""
        return not self.package or importlib.util.find_spec(self.package) is not None

    def command(self, teacher: Path, images: Path, out: Path) -> list[str]:
        """Return what a person types."""
        call: tuple[str | Path, ...]
        if self.script:
            call = (HERE / "peer_ways" / self.script, teacher, images, out, *self.options)
        else:
            call = ("-m", "autolabel", "generate", images, "--teacher", teacher, "--out", out, *self.options)
        return [sys.executable, *map(str, call)]

    def labels(self, out: Path) -> tuple[Labels, int]:
        """Return the labels that can be read whole, by the stem of their image, and how many cannot."""
        return _pngs(out) if self.script else _committed(out)

    def done(self, out: Path) -> int:
        """Return how many images are done by what lies in the folder."""
        if self.script:
            return sum(name.endswith(".png") and not name.endswith("_prob.png") for name in _names(out))
        with contextlib.suppress(OSError, ValueError):
            return int(json.loads((out / "progress.json").read_bytes())["done"])
        return 0


LOOP, RAY = Way("loop", "loop.py"), Way("Ray Data", "ray_data.py", package="ray")
OWN = (LOOP, Way("loop, trimmed", "loop.py", ("--trimmed",)), RAY, Way(OURS), Way(FOCUSED, options=("--focus", "0.25")))
SEGFORMER = (
    Way("loop", "loop.py", package="transformers"),
    Way("pipeline", "pipeline.py", package="transformers"),
    replace(RAY, package="transformers"),
    Way(OURS, options=("--threshold", "0"), package="transformers"),  # the others give every pixel a class
)


# --- labels on disk ---------------------------------------------------------------------------------------------------


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _pngs(out: Path) -> tuple[Labels, int]:
    found: Labels = {}
    paths = [out / name for name in _names(out) if name.endswith(".png") and not name.endswith("_prob.png")]
    for path in paths:
        with contextlib.suppress(OSError, SyntaxError):  # Pillow's words for a file that ends too early
            found[path.stem] = np.asarray(Image.open(path))
    return found, len(paths) - len(found)


def _committed(out: Path) -> tuple[Labels, int]:
    """Read a run's labels by its commit records with Zarr alone, as docs/words-and-files.md describes them."""
    found: Labels = {}
    rows = [row for path in (out / "units").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    for row in rows:
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            array = zarr.open_array(out / row["label"], mode="r")
            found[row["sample_id"]] = np.asarray(array[row["label_index"], : row["height"], : row["width"]])
    return found, len(rows) - len(found)


def _written(out: Path) -> tuple[int, int]:
    """Return the bytes of the labels, and of everything."""
    sizes = {path.relative_to(out): path.stat().st_size for path in out.rglob("*") if path.is_file()}
    labels = sum(
        size for path, size in sizes.items()
        if path.parts[0] == "labels.zarr" or (path.suffix == ".png" and not path.stem.endswith("_prob"))
    )  # fmt: skip
    return labels, sum(sizes.values())


# --- the tables -------------------------------------------------------------------------------------------------------


@dataclass
class Account:
    """What a way took: of one small image, and by size in every turn; labels and bytes of the last turn, by size."""

    one: list[Cost] = field(default_factory=list)
    many: dict[Size, list[Cost]] = field(default_factory=dict)
    labels: dict[Size, Labels] = field(default_factory=dict)
    written: dict[Size, tuple[int, int]] = field(default_factory=dict)

    def each(self, size: Size, start: Sequence[float]) -> list[float]:
        """Return the seconds of an image, by turn; the start's are taken off."""
        number = len(self.labels[size])
        return [(cost.cpu - own) / number for cost, own in zip(self.many[size], start, strict=True)]

    def start(self, size: Size) -> list[float]:
        """Return the seconds until the first image, by turn: those of one image less an image of the size."""
        number = len(self.labels[size])
        pairs = zip(self.many[size], self.one, strict=True)
        return [one.cpu - (many.cpu - one.cpu) / (number - 1) if one.cpu else 0.0 for many, one in pairs]


def measured(ways: Sequence[Way], teacher: Path, folders: dict[Size, Path], extent: Extent) -> dict[str, Account]:
    """Run all ways in turn, on one image of the smallest size and on all images of each size."""
    accounts = {way.name: Account() for way in ways}
    with tempfile.TemporaryDirectory() as scratch:
        one = Path(scratch) / "one"
        one.mkdir()
        first = folders[min(folders)]
        shutil.copy(first / min(_names(first)), one)
        for turn, way in itertools.product(range(extent.turns), ways):
            mine, out = accounts[way.name], Path(scratch) / f"{way.name} {turn}"
            mine.one.append(Cost(0.0, 0.0) if extent.small else cost(way.command(teacher, one, out)))
            for size, images in folders.items():
                out = Path(scratch) / f"{way.name} {turn} {size}"
                mine.many.setdefault(size, []).append(cost(way.command(teacher, images, out)))
                (mine.labels[size], torn), mine.written[size] = way.labels(out), _written(out)
                assert len(mine.labels[size]) == len(_names(images)) and not torn, way.name
    return accounts


def compare(network: str, ways: Sequence[Way], teacher: Path, folders: dict[Size, Path], extent: Extent) -> None:
    """Print what every way takes for the images of each size, and how many pixels it labels otherwise than ours."""
    accounts = measured([way for way in ways if way.there], teacher, folders, extent)
    print(f"\n### {network}: CPU time, memory, bytes; {extent.turns} turns\n")
    print(
        "| images | way | images per CPU second | of the loop's | CPU s to start | peak MiB | label KiB |"
        " written KiB | other labels |\n|---|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    starts = {name: account.start(min(folders)) for name, account in accounts.items()}
    for size, way in itertools.product(folders, ways):
        cells = ["–"] * 7
        if way.there:
            mine, number = accounts[way.name], len(_names(folders[size]))
            each = mine.each(size, starts[way.name])
            loop = accounts["loop"].each(size, starts["loop"])
            faster = statistics.median(other / own for other, own in zip(loop, each, strict=True))
            label, everything = (written / number / 1024 for written in mine.written[size])
            peak = max(cost.peak for cost in mine.many[size]) / 2**20
            other = 100 * _differing(mine.labels[size], accounts[OURS].labels[size])
            cells = [
                f"{1 / statistics.median(each):.3f}",
                f"{faster:.2f}",
                f"{statistics.median(starts[way.name]):.1f}",
            ]
            cells += [f"{peak:.0f}", f"{label:.1f}", f"{everything:.1f}", f"{other:.4f} %"]
        name = f"{len(_names(folders[size]))} of {size[1]} x {size[0]}"
        print(f"| {name} | {way.name} | {' | '.join(cells)} |", flush=True)


def _differing(labels: Labels, others: Labels) -> float:
    assert labels.keys() == others.keys()
    return float(np.mean([np.mean(label != others[stem]) for stem, label in labels.items()]))


def interrupt(network: str, ways: Sequence[Way], teacher: Path, images: Path) -> None:
    """Print what a kill at half of the images leaves, and what the same command does then."""
    number = len(_names(images))
    print(f"\n### {network}: {number} images, killed at half\n")
    print("| way | done at the kill | whole | torn | again | torn at the end |\n|---|---:|---:|---:|---:|---:|")
    for way in ways:
        if not way.there:
            print(f"| {way.name} | – | – | – | – | – |")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            command = way.command(teacher, images, out)
            done = killed(command, functools.partial(way.done, out), number // 2)
            whole, torn = way.labels(out)
            second = time.time_ns()
            cost(command)
            if way.script:
                labelled = sum((out / f"{stem}.png").stat().st_mtime_ns > second for stem in way.labels(out)[0])
            else:
                labelled = json.loads((out / "progress.json").read_bytes())["wanted"]
            cells = (done, len(whole), torn, labelled - (number - done), way.labels(out)[1])
            print(f"| {way.name} | {' | '.join(map(str, cells))} |", flush=True)


# --- main -------------------------------------------------------------------------------------------------------------


def photographs(source: Path, size: tuple[int, int], number: int, place: Path) -> Path:
    """Write so many images of a folder to `place`, cropped and resized where they have another size."""
    height, width = size
    paths = sorted(path for path in source.rglob("*") if path.suffix in (".jpg", ".jpeg", ".png"))[:number]
    if len(paths) < number:
        raise SystemExit(f"{source}: {number} images of .jpg or .png are needed, it has {len(paths)}")
    place.mkdir()
    for path in paths:
        image = Image.open(path).convert("RGB")
        if image.size == (width, height):
            shutil.copy(path, place)
            continue
        rows = min(image.height, round(image.width * height / width))
        part = (0, (image.height - rows) // 2, image.width, (image.height + rows) // 2)
        image.resize((width, height), Image.Resampling.LANCZOS, box=part).save(place / f"{path.stem}.png")
    return place


def _build_segformer(folder: str, *, small: bool) -> None:
    build: Callable[..., None] = importlib.import_module("teachers").build
    build(Path(folder), "SegFormer-B0", 11, small=small)


def _can_focus() -> bool:
    told = subprocess.run([sys.executable, "-m", "autolabel", "generate", "--help"], capture_output=True, check=True)
    return b"--focus" in told.stdout


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, nargs="?")
    parser.add_argument("--teacher", type=Path, default=DEMO)
    parser.add_argument("--images", type=int, default=12, help="images of 480 x 360")
    parser.add_argument("--large", type=int, default=3, help="images of 2048 x 1024; 0 for none")
    parser.add_argument("--kill", type=int, default=24, help="images of 480 x 360 of a killed run; 0 for none")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", choices=("own", "segformer"), help="one of the two networks")
    parser.add_argument("--ways", nargs="+", help="these ways only; loop and ours must be among them")
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    parser.add_argument("--build", help=argparse.SUPPRESS)  # folder of the SegFormer
    asked = parser.parse_args()
    if asked.build:
        _build_segformer(asked.build, small=asked.smallest)
        return
    sizes = {(360, 480): asked.images, (1024, 2048): asked.large}
    extent = Extent({size: number for size, number in sizes.items() if number}, asked.kill, asked.turns)
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
        extent = SMALLEST
    adopt_orphans()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")
    os.environ.update(RAY_raylet_start_wait_time_s="120")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, smallest = asked.photographs, min(extent.images)
        if source is None:
            most = max(*extent.images.values(), extent.kill)
            write_city(folder / "drawn", seed=0, fine=0, coarse=most, val=0, height=smallest[0], width=smallest[1])
            source = folder / "drawn" / "leftImg8bit"
        folders = {size: photographs(source, size, n, folder / f"{size}") for size, n in extent.images.items()}
        many = photographs(source, smallest, extent.kill, folder / "many") if extent.kill else None
        for table, ways in (("own", OWN), ("segformer", SEGFORMER)):
            if asked.only not in (None, table):
                continue
            here = [way for way in ways if way.name in (asked.ways or way.name)]
            here = [way for way in here if way.name != FOCUSED or _can_focus()]
            teacher, network = asked.teacher.absolute(), "Learnt attention at 0.5, 1, 2"
            if table == "segformer":
                teacher, network = folder / "segformer", "SegFormer-B0"
                build = [sys.executable, __file__, "--build", str(teacher), *(["--smallest"] if extent.small else [])]
                with started(build) as process:
                    process.wait()
            compare(network, here, teacher, folders, extent)
            if many:
                interrupt(network, [way for way in here if way.name not in ("loop, trimmed", FOCUSED)], teacher, many)


if __name__ == "__main__":
    main()
