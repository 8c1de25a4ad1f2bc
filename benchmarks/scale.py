"""What a run costs, from twenty thousand to a hundred million images and from one GPU to a thousand.

python benchmarks/scale.py [--images N …] [--gpus N …] [--unit-size N] [--focus] [--jpeg] [--kept] [--disk]
                           [--set "images of a GPU=22" …] [--smallest]

Nothing is measured here: three tables are computed from the constants of `CONSTANTS`, each of which says where it comes
from. docs/scale.md explains them and shows what this script prints; a test holds them together.
benchmarks/scale_bucket.py measures what commits and reads in a bucket cost.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

IMAGES, GPUS = (20_000, 1_000_000, 20_000_000, 100_000_000), (1, 10, 100, 1000)
CHAPTER = 1000  # units
ENOUGH = 0.25  # of a limit, below which nothing is said of it


@dataclass(frozen=True)
class Constant:
    """A number, its unit, and its kind: measured by us, computed from what was, or taken from somebody's page."""

    value: float
    unit: str
    kind: str
    source: str


CONSTANTS: dict[str, Constant] = {
    "images of a GPU": Constant(10.65, "a second", "measured", "whole runs on an H200, bfloat16"),
    "images of a GPU, focus": Constant(18.02, "a second", "measured", "the same, `--focus 0.25`"),
    "first label": Constant(9.1, "s", "measured", "the same: imports, teacher, probe; without Ray"),
    "host, PNG": Constant(63.2, "ms of CPU an image", "measured", "the host beside a GPU"),
    "host, JPEG": Constant(45.8, "ms of CPU an image", "measured", "the host beside a GPU"),
    "kernels": Constant(127.4, "ms of CPU an image", "computed", "at most: one feeder launches those of 7.85 images/s"),
    "PNG": Constant(2_873_779, "bytes", "measured", "photographs of the host beside a GPU"),
    "JPEG": Constant(755_794, "bytes", "measured", "the same, quality 95"),
    "label": Constant(17_552, "bytes an image", "measured", "the label store"),
    "kept confidence": Constant(80_630, "bytes an image", "measured", "`dense` from kept confidence: three layers"),
    "record, statistics": Constant(1_460, "bytes an image", "measured", "1,024 drawn streets, 11 classes: 890 and 570"),
    "pause, disk": Constant(0.0, "s a unit", "computed", "it is in the images a second of a whole run"),
    "pause, bucket": Constant(0.2, "s a unit", "measured", "labelling in a bucket, 50 ms a request; beyond a disk's"),
    "plan": Constant(0.85, "s a million images", "measured", "20 million samples are cut in 17 s of a core"),
    "tables": Constant(180, "s of CPU a million images", "measured", "publishing 64,000 images, by one process"),
    "cores of the driver's machine": Constant(8, "", "taken", "the tables are made by as many processes"),
    "driver": Constant(1.16, "ms of CPU a unit", "measured", "the driver of many workers"),
    "writes": Constant(2, "a unit", "measured", "labelling in a bucket; one more for each kept layer"),
    "reads": Constant(1, "a unit", "computed", "of its record, for the chapter; a worker reads images alone"),
    "most reads": Constant(5500, "a second", "taken", "S3: at least, for a part of a bucket; more after a while"),
    "most bytes of a server": Constant(1.25e9, "a second", "taken", "a file server with 10 Gbit/s"),
    "price of writes": Constant(0.005, "$ a thousand", "taken", "S3 Standard us-east-1, and Google: 2026-11"),
    "price of reads": Constant(0.0004, "$ a thousand", "taken", "the same"),
}


def known(name: str) -> float:
    """The value of a constant."""
    return CONSTANTS[name].value


@dataclass(frozen=True)
class Setup:
    """A run: images, GPUs, images of a unit, and what else changes its cost."""

    images: int
    gpus: int
    unit: int = 64
    focus: bool = False
    jpeg: bool = False
    kept: bool = False
    disk: bool = False


@dataclass(frozen=True)
class Cost:
    """What a run takes: seconds by part, cores, requests, bytes.

    working: GPUs that have a unit. start, work, end: seconds until the first label, of labelling, of publishing.
    """

    setup: Setup
    working: int
    start: float
    work: float
    end: float
    cores: float
    reads: int
    writes: int
    read_bytes: float
    stored_bytes: float
    units_a_second: float

    @classmethod
    def of(cls, setup: Setup) -> Cost:
        """Compute it."""
        rate = known("images of a GPU, focus" if setup.focus else "images of a GPU")
        units, millions = math.ceil(setup.images / setup.unit), setup.images / 1e6
        unit = min(setup.unit, setup.images) / rate + known("pause, disk" if setup.disk else "pause, bucket")
        start = known("first label") + millions * known("plan")
        work, end = (
            math.ceil(units / setup.gpus) * unit,
            millions * known("tables") / known("cores of the driver's machine"),
        )
        host = known("host, JPEG" if setup.jpeg else "host, PNG") + known("kernels")
        chapters, minutes = units // CHAPTER, (start + work + end) / 60
        layers = 3 if setup.kept else 0
        return cls(
            setup, min(setup.gpus, units), start, work, end,
            cores=1 + setup.gpus * rate * host / 1000,
            reads=setup.images + int(units * known("reads")) + 2 * chapters,
            writes=int(units * (known("writes") + layers)) + math.ceil(minutes) + 3 * chapters,
            read_bytes=setup.images * known("JPEG" if setup.jpeg else "PNG"),
            stored_bytes=setup.images
            * (known("label") + known("record, statistics") + (known("kept confidence") if setup.kept else 0)),
            units_a_second=min(setup.gpus, units) / unit,
        )  # fmt: skip

    @property
    def seconds(self) -> float:
        """From the command to its end."""
        return self.start + self.work + self.end

    @property
    def gpu_hours(self) -> float:
        """Hours of all GPUs until the last label; the tables are made without them."""
        return self.setup.gpus * (self.start + self.work) / 3600

    @property
    def used(self) -> float:
        """The share of the GPUs' time until the last label in which they label, at the speed of one GPU on a disk."""
        rate = known("images of a GPU, focus" if self.setup.focus else "images of a GPU")
        return self.setup.images / rate / 3600 / self.gpu_hours

    @property
    def driver(self) -> float:
        """The share of a core that the driver takes."""
        return self.units_a_second * known("driver") / 1000

    @property
    def dollars(self) -> float:
        """List price of the requests."""
        return self.reads / 1000 * known("price of reads") + self.writes / 1000 * known("price of writes")

    def limits(self) -> dict[str, float]:
        """How much of each limit is taken, 1 for all of it."""
        images_a_second = self.setup.images / self.work
        busiest = self.read_bytes / self.work / known("most bytes of a server")
        return {
            "reads a second": 0 if self.setup.disk else images_a_second / known("most reads"),
            "the file server": busiest if self.setup.disk else 0,
            "the driver": self.driver,
            "too few units": 1 - self.working / self.setup.gpus,
            "start": self.start / (self.start + self.work),
            "tables": self.end / self.seconds,
            "patience (a month)": self.seconds / (30 * 86400),
        }

    def first(self) -> str:
        """The limit of which most is taken."""
        limits = self.limits()
        name = max(limits, key=lambda key: limits[key])
        return f"{name}: {100 * limits[name]:.0f} %" if limits[name] >= ENOUGH else "nothing yet"


def shortly(number: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.{2 - math.floor(math.log10(number))}f}"


def row(cost: Cost) -> str:
    """The cells of a run, from its hours on."""
    return (
        f"{shortly(cost.seconds / 3600)} | {shortly(cost.gpu_hours)} | {100 * cost.used:.0f} % |"
        f" {cost.cores:,.0f} | {shortly(cost.read_bytes / 1e12)} | {shortly(cost.stored_bytes / 1e9)} |"
        f" {shortly(cost.reads / 1e6)} | {shortly(cost.writes / 1e6)} | {shortly(cost.dollars)} |"
        f" {100 * cost.driver:.1f} % | {cost.first()} |"
    )


COLUMNS = (
    "hours | GPU-hours | GPUs used | cores, at most | TB read | GB stored | million reads | million writes |"
    " $ of requests | driver, of a core | what is taken most |\n"
)


def tables(images: Sequence[int], gpus: Sequence[int], asked: Setup) -> Iterator[str]:
    """The tables of constants, of sizes, and of what changes a run of the largest of both but one."""
    yield "| constant | value | unit | kind | source |\n|---|---:|---|---|---|"
    for name, one in CONSTANTS.items():
        value = f"{one.value:,.0f}" if one.value >= 1000 else f"{one.value:g}"
        yield f"| {name} | {value} | {one.unit} | {one.kind} | {one.source} |"
    yield "\n| images | GPUs | " + COLUMNS + "|---:|---:|" + "---:|" * 10 + "---|"
    for many in images:
        for count in gpus:
            yield f"| {many:,} | {count:,} | {row(Cost.of(replace(asked, images=many, gpus=count)))}"
    base = replace(asked, images=images[-2:][0], gpus=gpus[-2:][0])
    ways = {
        "as above": base,
        "`--unit-size 256`": replace(base, unit=256),
        "`--focus 0.25`": replace(base, focus=True),
        "`--focus 0.25 --unit-size 256`": replace(base, focus=True, unit=256),
        "JPEGs": replace(base, jpeg=True),
        "`--keep-confidence`": replace(base, kept=True),
        "a file server": replace(base, disk=True),
    }
    yield f"\n{base.images:,} images, {base.gpus:,} GPUs:\n\n| way | " + COLUMNS + "|---|" + "---:|" * 10 + "---|"
    for name, setup in ways.items():
        yield f"| {name} | {row(Cost.of(setup))}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES)
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    parser.add_argument("--unit-size", type=int, default=64)
    for name in ("focus", "jpeg", "kept", "disk", "smallest"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--set", nargs="+", default=[], metavar="CONSTANT=NUMBER", help="another value of a constant")
    asked = parser.parse_args()
    for text in asked.set:
        name, _, value = text.partition("=")
        if name not in CONSTANTS:
            parser.error(f"--set {text}: there is no constant {name!r}; expected one of {', '.join(CONSTANTS)}")
        CONSTANTS[name] = Constant(float(value), CONSTANTS[name].unit, "given", "--set")
    if asked.smallest:
        print("--smallest: these numbers mean nothing\n")
        asked.images, asked.gpus = (1000,), (2,)
    how = {name: getattr(asked, name) for name in ("focus", "jpeg", "kept", "disk")}
    for text in tables(asked.images, asked.gpus, Setup(1, 1, unit=asked.unit_size, **how)):
        print(text)


if __name__ == "__main__":
    main()
