"""How far labels of the policy dense from kept confidence are from those of the teacher's own probabilities.

    python benchmarks/camvid.py CAMVID OUT          # or a teacher from elsewhere: --teacher
    python benchmarks/kept_evidence.py OUT [--every 4] [--policy polygons.toml] [--smallest]

Polygons are counted on the images that the teacher was trained on, unless a policy names other counts. Every 4th of
the 305 others is labelled from all probabilities, as `generate` does, and from what a run keeps: levels alone, with
the second class in unnamed pixels, and with a level of its own for the second class's share. Scored against the fine
labels, which nobody has used: IoU of the kept pixels where the surest so many % of the known pixels are labelled,
boundary F at 2 pixels. Then the bytes that an image takes, and the time of one core; larger images are these,
enlarged as a network enlarges its own output.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from autolabel.manifests.evidence import PolygonCounts
from autolabel.manifests.images import encode_label, read_image, read_label
from autolabel.manifests.label_space import IGNORE, LabelSpace
from autolabel.manifests.places import places
from autolabel.manifests.policy import DENSE, HUMAN_FIRST, Policy, load_policy
from autolabel.manifests.run.labels import middles
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.run.shards import Label, encode_zarr
from autolabel.manifests.samples import Manifest, load_manifest
from autolabel.manifests.scores import BoundaryF
from autolabel.manifests.teachers import TeacherName
from autolabel.pipeline.analysis.polygons import TwoLabels, count_image
from autolabel.pipeline.posterior import FromLevels, KeptPosterior
from autolabel.teacher.loading import load_teacher

Floats = NDArray[np.float32]
Decision = tuple[Label, Floats]

SHARES = (97.5, 95)  # labelled, in % of the known pixels
BINS = 1000
LEVELS = (8, 16, 24)
OWN = 4  # levels of the second class's share
LARGE = (1024, 2048)


def counts_of(fine: Manifest) -> PolygonCounts:
    """The counts of the fine images' own polygons, which lie beside their labels in CAMVID."""
    space, classes = fine.label_space, len(fine.label_space)
    each = []
    for sample in fine.labelled:
        assert sample.label is not None
        label = sample.label.resolve()
        coarse = read_label(label.parents[2] / "coarse" / label.parent.name / label.name, space)
        each.append(count_image(TwoLabels(read_sample_label(sample, space), coarse), classes))
    size = f"{fine.samples[0].width}x{fine.samples[0].height}"
    outside, inside = sum(one.outside for one in each), sum(one.inside for one in each)
    return PolygonCounts.of(space, {size: len(each)}, np.asarray(outside), np.asarray(inside))


class Kept:
    """What a run keeps of an image whose probabilities (C, H, W) are known."""

    def __init__(self, p: Floats, coarse: Label, edges: tuple[float, ...]) -> None:
        order = np.argsort(-p, axis=0, kind="stable")[:2].astype(np.uint8)
        sure, runner_up = np.take_along_axis(p, order.astype(np.intp), axis=0)
        self.top = order[0]
        self.level = np.searchsorted(np.array(edges, np.float32), sure).astype(np.uint8)
        self.second = np.where(coarse == IGNORE, order[1], np.uint8(IGNORE))
        self.share = np.clip(runner_up / np.maximum(1 - sure, 1e-9) * OWN, 0, OWN - 1).astype(np.uint8)

    def layers(self) -> dict[str, Label]:
        """The maps as a run may store them."""
        both = np.where(self.second == IGNORE, np.uint8(IGNORE), (self.second * OWN + self.share) % IGNORE)
        names = "top class", "level, of 8", "second class", f"second class, {OWN} levels of its share"
        return dict(zip(names, (self.top, self.level, self.second, both.astype(np.uint8)), strict=True))


def of_floats(p: Floats, place: NDArray[np.int16], policy: Policy, space: LabelSpace) -> Decision:
    """The likeliest classes of the asked pixels, and their probabilities, from probabilities (C, n)."""
    assert policy.polygons is not None
    scores = policy.polygons.teacher_weight * np.log(np.maximum(p, 1e-30)) + policy.polygons.factors(space)[place].T
    scores = np.exp(scores - scores.max(axis=0))
    return scores.argmax(axis=0).astype(np.uint8), scores.max(axis=0) / scores.sum(axis=0)


def of_own_levels(kept: Kept, at: NDArray[np.intp], middle: NDArray[np.float64], classes: int) -> Floats:
    """Probabilities (C, n) where the second class's share of what is left is known by its level, too."""
    top, second, pixels = kept.top.ravel()[at], kept.second.ravel()[at], np.arange(len(at))
    sure, share = middle[kept.level.ravel()[at]], (kept.share.ravel()[at] + 0.5) / OWN
    p = np.broadcast_to((1 - sure) * (1 - share) / max(1, classes - 2), (classes, len(at))).astype(np.float32)
    p[second, pixels] = (1 - sure) * share
    p[top, pixels] = sure
    return p


class Score:
    """Counts of one way: pixels by truth, label and confidence; borders uncut and at 0.5; labels unlike the floats'."""

    def __init__(self, classes: int) -> None:
        self.counts = np.zeros((classes, classes, BINS), np.int64)
        self.borders = {0.5: BoundaryF(classes, (2,)), -1.0: BoundaryF(classes, (2,))}
        self.known = self.pixels = self.other = 0

    def add(self, truth: Label, label: Label, p: Floats, *, exact: Label) -> None:
        """Count an image; `exact` is its label from floats at 0.5."""
        classes = len(self.counts)
        known = truth < classes
        bins = np.minimum((p[known] * BINS).astype(np.int64), BINS - 1)
        keys = (truth[known].astype(np.int64) * classes + label[known]) * BINS + bins
        self.counts += np.bincount(keys, minlength=self.counts.size).reshape(self.counts.shape)
        self.known += int(known.sum())
        for threshold, borders in self.borders.items():
            borders.add(truth, np.where(p > threshold, label, np.uint8(IGNORE)))
        self.pixels += label.size
        self.other += int((np.where(p > np.float32(0.5), label, np.uint8(IGNORE)) != exact).sum())

    def iou(self, share: float) -> float:
        """Mean IoU, in %, of the surest so many % of the known pixels."""
        surer = self.counts.sum(axis=(0, 1))[::-1].cumsum()[::-1]
        matrix = self.counts[..., int(np.abs(surer - share / 100 * self.known).argmin()) :].sum(axis=-1)
        right, union = np.diagonal(matrix), matrix.sum(axis=0) + matrix.sum(axis=1) - np.diagonal(matrix)
        return 100 * float(np.mean(right[union > 0] / union[union > 0]))

    def row(self) -> list[str]:
        """Its figures in %, as cells."""
        borders = [100 * float(np.nanmean(one.f()[0])) for one in self.borders.values()]
        figures = [*map(self.iou, SHARES), *borders, 100 * self.other / self.pixels]
        return [f"{figure:.2f}" if figure is figures[-1] else f"{figure:.1f}" for figure in figures]


def enlarged(scores: torch.Tensor, coarse: Label) -> tuple[torch.Tensor, Label]:
    """The upper two thirds of an image's scores (C, H, W) and coarse label, of the size LARGE."""
    rows = coarse.shape[0] * 2 // 3
    scores = torch.nn.functional.interpolate(scores[None, :, :rows], size=LARGE, mode="bilinear")[0]
    larger = cv2.resize(coarse[:rows], LARGE[::-1], interpolation=cv2.INTER_NEAREST)
    return scores, larger.astype(np.uint8)


def table(header: list[str], rows: list[list[str]], *, words: int) -> None:
    """Print a table in Markdown, whose first columns are words."""
    print()
    columns = ["---"] * words + ["---:"] * (len(header) - words)
    for row in (header, columns, *rows):
        print(f"| {' | '.join(row)} |")


def best_ms(work: Callable[[], object]) -> float:
    """The least CPU time of five, in ms."""
    taken = []
    for _ in range(5):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return 1e3 * min(taken)


class Trial:
    """All ways of labelling, on images one after the other."""

    def __init__(self, policy: Policy, space: LabelSpace) -> None:
        assert policy.polygons is not None
        self.policy, self.space, self.classes = policy, space, len(space)
        self.edges = {levels: HUMAN_FIRST.edges(space, levels) for levels in LEVELS}
        self.posteriors = {n: KeptPosterior(policy.polygons, space, middles(e)) for n, e in self.edges.items()}
        self.decide = FromLevels(policy, space, self.edges[LEVELS[0]])
        self.scores: dict[tuple[str, str], Score] = {}
        self.stored: dict[str, list[list[int]]] = {}
        self.times: list[list[float]] = []

    def score(self, p: Floats, coarse: Label, truth: Label) -> None:
        """Label an image in all ways from its probabilities (C, H, W)."""
        place = places(coarse, self.classes)
        at = np.flatnonzero(place)
        asked, around = p.reshape(self.classes, -1)[:, at], place.ravel()[at]
        decisions = {("all probabilities", "–"): of_floats(asked, around, self.policy, self.space)}
        for levels, posterior in self.posteriors.items():
            kept = Kept(p, coarse, self.edges[levels])
            for name, second in (("levels", None), ("levels, second class", kept.second)):
                _, winner, sure = posterior(kept.top, kept.level, place, second)
                decisions[name, str(levels)] = winner, sure
            if levels == LEVELS[0]:
                own = of_own_levels(kept, at, middles(self.edges[levels]), self.classes)
                name = f"levels, second class, {OWN} levels of its share"
                decisions[name, str(levels)] = of_floats(own, around, self.policy, self.space)
        named = np.where(coarse < self.classes, coarse, p.argmax(axis=0)).astype(np.uint8)
        exact: Label | None = None
        for way, (winner, sure) in decisions.items():
            label, confidence = named.copy(), np.ones(coarse.shape, np.float32)
            label.ravel()[at], confidence.ravel()[at] = winner, sure
            if exact is None:
                exact = np.where(confidence > np.float32(0.5), label, np.uint8(IGNORE))
            self.scores.setdefault(way, Score(self.classes)).add(truth, label, confidence, exact=exact)

    def store(self, kept: Kept, *, large: bool) -> None:
        """Encode the maps of an image."""
        for name, layer in kept.layers().items():
            cells = self.stored.setdefault(name, [[], [], [], []])
            cells[2 * large].append(sum(map(len, encode_zarr(layer))))
            cells[2 * large + 1].append(len(encode_label(layer)))

    def time(self, kept: Kept, coarse: Label) -> None:
        """Measure what an image costs."""
        place, second = places(coarse, self.classes), kept.second
        self.times.append(
            [
                100 * float((place > 0).mean()),
                best_ms(lambda: places(coarse, self.classes)),
                best_ms(lambda: self.decide(kept.top, kept.level, place=place)),
                best_ms(lambda: self.decide(kept.top, kept.level, place=place, second=second)),
            ]
        )

    def show(self) -> None:
        """Print both tables and the times."""
        shares = [f"IoU at {share:g} %" for share in SHARES]
        header = ["kept", "levels", *shares, "F, t = 0.5", "F, uncut", "other labels %"]
        table(header, [[*name, *score.row()] for name, score in self.scores.items()], words=2)
        header = ["layer", "Zarr, KiB an image", "PNG, KiB", "Zarr, 2048 x 1024", "PNG, 2048 x 1024"]
        rows = [[name, *(f"{np.mean(cell) / 1024:.2f}" for cell in cells)] for name, cells in self.stored.items()]
        table(header, rows, words=1)
        unnamed, around, levels, second = np.mean(self.times, axis=0)
        print(
            f"\none core, 2048 x 1024, {unnamed:.0f} % unnamed: places {around:.0f} ms, from levels {levels:.0f} ms,"
            f" with the second class {second:.0f} ms"
        )


def main() -> None:
    """Parse the arguments, label, score, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", type=Path, default=Path("teacher/best.pt"))
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--policy", help="instead of dense with its default weights")
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
    os.chdir(asked.out)
    torch.set_num_threads(1)
    manifest, truths = load_manifest(Path("coarse.parquet")), load_manifest(Path("truth.parquet"))
    space = manifest.label_space
    truth = {sample.sample_id: sample for sample in truths.labelled}
    teacher = load_teacher(TeacherName.of(asked.teacher), device="cpu", precision=asked.precision)
    policy = (
        load_policy(asked.policy) if asked.policy else DENSE.counted(counts_of(load_manifest(Path("fine.parquet"))))
    )
    trial = Trial(policy, space)
    for number, sample in enumerate(manifest.samples[:: asked.every]):
        assert sample.coarse_label is not None
        coarse = read_label(sample.coarse_label, space)
        scores = teacher.logits(read_image(sample.image), scales=(1.0,))
        p = scores.softmax(0).numpy()
        trial.score(p, coarse, read_sample_label(truth[sample.sample_id], space))
        trial.store(Kept(p, coarse, trial.decide.edges), large=False)
        if number % 4 == 0:
            scores, larger = enlarged(scores, coarse)
            kept = Kept(scores.softmax(0).numpy(), larger, trial.decide.edges)
            trial.store(kept, large=True)
            if number < 16:
                trial.time(kept, larger)
    trial.show()


if __name__ == "__main__":
    main()
