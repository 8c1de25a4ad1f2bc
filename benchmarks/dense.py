"""What do people's polygons add to a teacher's labels? `dense` beside `human-first`, with polygons of three hands.

    python benchmarks/camvid.py CAMVID OUT          # or a teacher from elsewhere: --teacher
    python benchmarks/dense.py OUT [--smallest]

The teacher was trained on the 62 fine images of OUT. `manifest coarsen` draws polygons for them and for the 305 others;
`polygons` counts on the 62 and fits the weights to them. The 305 are labelled, and held against their fine labels,
which nothing else has used. A label's threshold follows from the share of the known pixels that it is to cover, so that
ways are compared at the same share. Four tables in %, means over the classes:

1. label IoU by hand and way; the worst class, at 97.5 %, against `human-first`; boundary F at 2 pixels
2. IoU of every class at 97.5 %
3. evidence of one hand on polygons of another, and evidence of other drives only: label IoU less that of `human-first`
4. policies at their thresholds, on polygons of the hand `rough`

Tables 1 to 3 are made of the teacher's own probabilities, those of table 4 by `generate` and `relabel`; it is said how
many pixels `generate` labels otherwise than table 1. "dense" is the preset with its default weights, "fitted" the
policy that `polygons --teacher` writes. With --smallest, of an OUT that was made so, the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))

from camvid import run

from autolabel.manifests.evidence import Factors, PolygonCounts
from autolabel.manifests.hands import HANDS
from autolabel.manifests.images import read_image, read_label
from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.places import places
from autolabel.manifests.policy import DENSE, HUMAN_FIRST, Policy, load_policy
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.samples import Sample, load_manifest, save_manifest
from autolabel.manifests.scores import BoundaryF, Confusion
from autolabel.manifests.teachers import TeacherName
from autolabel.teacher.loading import load_teacher

Floats = NDArray[np.float32]
Label = NDArray[np.uint8]

SHARES = (90.0, 95.0, 97.5, 99.0)
AT = 97.5
CUT, UNCUT = 0.5, -1.0  # thresholds at which borders are scored
BINS = 1000
THIN = ("pole", "sign", "pedestrian", "bicyclist")
CHECKED = "rough"
POLICIES = {
    "paper": "threshold = 0.5",
    "threshold 0.9": "threshold = 0.9",
    "union of thin and rare": "\n".join(
        ["[coarse_rules]", *(f'{c} = "union"' for c in ("pole", "sign", "fence", "pedestrian", "bicyclist"))]
    ),
    "agree": 'coarse = "agree"',
    "teacher-wins": 'coarse = "teacher-wins"',
    "human-first at 0.5": 'coarse = "human-wins"',
    "human-first": HUMAN_FIRST.to_toml(),
    "dense": DENSE.to_toml(counts="counts.json"),
}
SMALLEST = ("paper", "human-first", "dense")


def drive(sample: Sample) -> str:
    """The drive that an image of CamVid comes from."""
    return sample.sample_id.rpartition("/")[2].partition("_")[0]


class Score:
    """Counts of one way: pixels by truth, label and confidence, and borders at both thresholds."""

    def __init__(self, classes: int) -> None:
        self.counts = np.zeros((classes, classes, BINS + 1), np.int64)
        self.borders = {threshold: BoundaryF(classes, (2,)) for threshold in (CUT, UNCUT)}
        self.known = 0

    def add(self, truth: Label, label: Label, p: Floats, *, borders: bool) -> None:
        """Count a label and the probability of each of its pixels; that of people's is above 1."""
        classes = len(self.counts)
        known = truth < classes
        bins = (p[known].clip(0, 1) * (BINS - 1)).astype(np.int64) + (p[known] > 1)
        keys = (truth[known].astype(np.int64) * classes + label[known]) * (BINS + 1) + bins
        self.counts += np.bincount(keys, minlength=self.counts.size).reshape(self.counts.shape)
        self.known += int(known.sum())
        for threshold, counts in self.borders.items() if borders else ():
            counts.add(truth, np.where(p > threshold, label, np.uint8(IGNORE)))

    def merge(self, others: Iterable[Score]) -> Score:
        """Add the counts of others, but for borders."""
        for other in others:
            self.counts += other.counts
            self.known += other.known
        return self

    def iou(self, share: float | None) -> NDArray[np.float64]:
        """IoU in % of the surest so many % of the known pixels, or of all, by class; NaN for a class in neither."""
        surer = self.counts.sum(axis=(0, 1))[::-1].cumsum()[::-1]
        first = 0 if share is None else int(np.abs(surer - share / 100 * self.known).argmin())
        matrix = self.counts[..., first:].sum(axis=-1)
        right, union = np.diagonal(matrix), matrix.sum(axis=0) + matrix.sum(axis=1) - np.diagonal(matrix)
        iou: NDArray[np.float64] = np.divide(100 * right, union, out=np.full(len(union), np.nan), where=union > 0)
        return iou

    def f(self, threshold: float) -> float:
        """Boundary F in %."""
        return 100 * float(np.nanmean(self.borders[threshold].f()[0]))


class Hand:
    """Polygons of one hand, and every way to label with them."""

    def __init__(self, hand: str, truths: Path, drives: Sequence[str]) -> None:
        folder = Path("dense") / hand
        self.space = load_manifest(truths).label_space
        self.coarse = {s.sample_id: s.coarse_label for s in load_manifest(folder / "coarse.parquet").samples}
        counts = PolygonCounts.read(folder / "counts.json")
        self.ways: dict[str, Factors | None] = {"human-first": None, "dense": self._factors(DENSE.counted(counts))}
        self.ways["fitted"] = self._factors(load_policy(str(folder / "polygons.toml")))
        for other in HANDS:
            if other != hand:
                self.ways[f"by {other}"] = self._factors(load_policy(f"dense/{other}/polygons.toml"))
        self.without = {d: self._factors(load_policy(str(folder / f"without-{d}.toml"))) for d in drives}
        self.scores = {way: Score(len(self.space)) for way in self.ways}
        self.apart = {(way, d): Score(len(self.space)) for way in ("human-first", "fitted") for d in drives}

    def _factors(self, policy: Policy) -> Factors:
        factors = policy.evidence(self.space)
        assert factors is not None
        return factors

    def add(self, sample: Sample, p: Floats, truth: Label) -> dict[str, Label]:
        """Score an image in every way from its probabilities (C, H, W); return its labels at the threshold."""
        classes = len(self.space)
        path = self.coarse[sample.sample_id]
        assert path is not None
        coarse = read_label(path, self.space)
        place = places(coarse, classes).ravel()
        at = np.flatnonzero(place)
        logs = np.log(np.maximum(p.reshape(classes, -1)[:, at], 1e-30))
        named = coarse < classes
        alone, sure = p.argmax(axis=0).astype(np.uint8), p.max(axis=0)
        labels = {}
        own = drive(sample)

        def decided(factors: Factors | None) -> tuple[Label, Floats]:
            label, confidence = np.where(named, coarse, alone), np.where(named, np.float32(2), sure)
            if factors is not None:
                scores = factors.teacher_weight * logs + factors.table[place[at]].T
                odds = np.exp(scores - scores.max(axis=0))
                label.ravel()[at], confidence.ravel()[at] = odds.argmax(axis=0), 1 / odds.sum(axis=0)
            return label, confidence

        for way, factors in self.ways.items():
            label, confidence = decided(factors)
            self.scores[way].add(truth, label, confidence, borders=not way.startswith("by "))
            labels[way] = np.where(confidence > CUT, label, np.uint8(IGNORE))
        if own in self.without:
            for way, factors in (("human-first", None), ("fitted", self.without[own])):
                self.apart[way, own].add(truth, *decided(factors), borders=False)
        return labels


def prepare(hand: str, teacher: Path, drives: Sequence[str], precision: str) -> None:
    """Draw the polygons of a hand, count them, fit weights."""
    folder = Path("dense") / hand
    folder.mkdir(parents=True, exist_ok=True)
    for source, name in (("fine", "fine"), ("truth", "coarse")):
        run(f"autolabel manifest coarsen {source}.parquet --hand {hand} -o {folder}/{name}.parquet")
    run(f"autolabel polygons {folder}/fine.parquet -o {folder}/counts.json")
    fit = f"--teacher {teacher} --precision {precision}"
    run(f"autolabel polygons {folder}/fine.parquet -o {folder}/polygons.json {fit}")
    fine = load_manifest(folder / "fine.parquet")
    for one in drives:
        others = tuple(sample for sample in fine.samples if drive(sample) != one)
        save_manifest(folder / f"without-{one}.parquet", replace(fine, samples=others))
        run(f"autolabel polygons {folder}/without-{one}.parquet -o {folder}/without-{one}.json {fit}")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int) -> None:
    """Print a table in Markdown, whose first columns are words."""
    print()
    columns = ["---"] * words + ["---:"] * (len(header) - words)
    for row in (header, columns, *rows):
        print(f"| {' | '.join(row)} |")


def cells(figures: Iterable[float], form: str = ".1f") -> list[str]:
    """Figures as cells; a dash for none."""
    return [format(figure, form) if np.isfinite(figure) else "–" for figure in figures]


def show(hands: dict[str, Hand], drives: Sequence[str]) -> None:
    """Print tables 1 to 3."""
    names = next(iter(hands.values())).space.names
    thin = [names.index(name) for name in THIN]
    first, second = list[list[str]](), list[list[str]]()
    for hand, of in hands.items():
        base = of.scores["human-first"]
        for way in ("human-first", "dense", "fitted"):
            score = of.scores[way]
            gain = score.iou(AT) - base.iou(AT)
            worst = int(np.nanargmin(gain))
            mean = [float(np.nanmean(score.iou(share))) for share in (*SHARES, None)]
            borders = [float(np.nanmean(score.iou(AT)[thin])), score.f(CUT), score.f(UNCUT)]
            least = f"{names[worst]} {gain[worst]:+.1f}" if way != "human-first" else ""
            first.append([hand, way, least, *cells([*mean, *borders])])
            second.append([hand, way, *cells(score.iou(AT))])
    shares = [f"at {share:g} %" for share in SHARES]
    header = ["polygons", "way", f"worst class at {AT:g} %", *shares, "uncut", f"thin at {AT:g} %", "F, t = 0.5"]
    table([*header, "F, uncut"], first, words=3)
    table(["polygons", "way", *names], second, words=2)
    table(
        ["polygons", *(f"evidence of {by}" for by in HANDS), *other_drives(drives)], third_rows(hands, drives), words=1
    )


def other_drives(drives: Sequence[str]) -> list[str]:
    """Columns of evidence of other drives: on all images, on each drive."""
    return ["other drives", *(f"other drives, {one}" for one in drives)] if drives else []


def third_rows(hands: dict[str, Hand], drives: Sequence[str]) -> list[list[str]]:
    """The rows of table 3."""
    rows = []
    for hand, of in hands.items():
        classes = len(of.space)
        ways = ["fitted" if by == hand else f"by {by}" for by in HANDS]
        pairs = [(of.scores[way], of.scores["human-first"]) for way in ways]
        apart = [(of.apart["fitted", one], of.apart["human-first", one]) for one in drives]
        if apart:
            ours, plain = (Score(classes).merge(scores) for scores in zip(*apart, strict=True))
            apart = [(ours, plain), *apart]
        gains = (float(np.nanmean(a.iou(AT) - b.iou(AT))) for a, b in (*pairs, *apart))
        rows.append([hand, *cells(gains, "+.1f")])
    return rows


def show_policies(names: Sequence[str], folder: Path, truths: Path) -> None:
    """Print table 4."""
    manifest, rows = load_manifest(truths), []
    classes = len(manifest.label_space)
    for name in (*names, "auto"):
        run_of = folder / name.replace(" ", "-")
        labels = Run.open(run_of).labels
        confusion, borders = Confusion(classes), BoundaryF(classes, (2,))
        for sample in manifest.labelled:
            true = read_sample_label(sample, manifest.label_space)
            confusion.add(true, labels[sample.sample_id])
            borders.add(true, labels[sample.sample_id])
        pole = manifest.label_space.names.index("pole")
        labelled, known = confusion.matrix[:, :-1].sum(), confusion.matrix.sum()
        with np.errstate(all="ignore"):
            kept = confusion.iou_of_kept()
            found = [confusion.precision(), confusion.recall(), kept, confusion.iou(), borders.f()[0]]
        figures = [100 * float(np.nanmean(one)) for one in found]
        figures.insert(4, 100 * float(np.nan_to_num(kept[pole])))
        rows.append(["dense, fitted" if name == "auto" else name, *cells([*figures, 100 * labelled / known])])
    header = ["policy", "precision", "coverage", "IoU of the kept pixels", "IoU", "IoU of kept poles", "F at 2 px"]
    table([*header, "labelled pixels"], rows, words=1)


def main() -> None:
    """Parse the arguments, draw, count, label, score, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", type=Path, default=Path("teacher/best.pt"))
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    policies = POLICIES
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
        policies = {name: POLICIES[name] for name in SMALLEST}
    os.chdir(asked.out)
    fine, truths = load_manifest(Path("fine.parquet")), Path("truth.parquet")
    drives = sorted({drive(sample) for sample in fine.samples})
    if min(sum(drive(sample) != one for sample in fine.samples) for one in drives) < 2:
        drives = []
    for hand in HANDS:
        prepare(hand, asked.teacher, drives, asked.precision)
    folder = Path("dense") / CHECKED
    auto = folder / "auto"
    run(
        f"autolabel generate {folder}/coarse.parquet --teacher {asked.teacher} --precision {asked.precision}"
        f" --policy {folder}/polygons.toml --keep-confidence 24 --out {auto}"
    )
    for name, text in policies.items():
        slug = name.replace(" ", "-")
        file = folder / f"{slug}.toml"
        file.write_text(text, encoding="utf-8")
        run(f"autolabel relabel {auto} --policy {file} --out {folder / slug}")
    torch.set_num_threads(1)
    hands = {hand: Hand(hand, truths, drives) for hand in HANDS}
    teacher = load_teacher(TeacherName.of(asked.teacher), precision=asked.precision)
    manifest, generated, other, pixels = load_manifest(truths), Run.open(auto).labels, 0, 0
    for sample in manifest.labelled:
        p = teacher.logits(read_image(sample.image)).softmax(0).cpu().numpy()
        truth = read_sample_label(sample, manifest.label_space)
        labels = {hand: of.add(sample, p, truth) for hand, of in hands.items()}
        other += int((labels[CHECKED]["fitted"] != generated[sample.sample_id]).sum())
        pixels += truth.size
    show(hands, drives)
    show_policies(tuple(policies), folder, truths)
    print(f"\n`generate` labels {other:,} of {pixels:,} pixels otherwise than table 1 would at 0.5")


if __name__ == "__main__":
    main()
