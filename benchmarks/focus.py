"""What a focus costs and changes: curves over its share, for any teachers, beside truth.

python benchmarks/focus.py MANIFEST... --teacher CHECKPOINT... [--every N] [--precision P] [--flip] [--combine C]
python benchmarks/focus.py --cpu [--size HxW]
python benchmarks/focus.py --smallest

Every N-th image of the manifests is seen whole at scales 0.5, 1 and 2, with each focus, and without scale 2. For each
teacher: the network's CPU time beside that of the whole (the median over images); labels that differ; what the swings
of all other groups (drives) certify, and how many of these labels differ all the same; mean IoU, and the 95 % interval
of what it gains, by the bootstrap over images. With --cpu, the time of networks with random weights. With --smallest,
for drawn scenes and the teacher of the demo, the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.reading import read_photograph
from autolabel.manifests.samples import Sample, load_manifest, save_manifest
from autolabel.manifests.scan import scan
from autolabel.manifests.scenes import write_city
from autolabel.manifests.scores import Confusion, Counts, paired_gain
from autolabel.pipeline.analysis.certifying import Certified
from autolabel.pipeline.analysis.focus import FocusLooks, FocusTrial
from autolabel.teacher.checkpoints import DRAWN_STREETS
from autolabel.teacher.contrast import Contrast, Seen, contrasts
from autolabel.teacher.device import autocast
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.networks.build import build
from autolabel.teacher.predict import Teacher

SCALES, BELOW = (0.5, 1.0, 2.0), (0.5, 1.0)
SHARES = (0.125, 0.25, 0.5)
CPU_NETWORKS = ("efficientnet_lite0_ocr_mscale", "hrnet18s_ocr_mscale")
NONE = "–"


class Look(NamedTuple):
    """One image: its group, what was seen whole and with each focus, its truth, and what is seen without scale 2."""

    group: str
    seen: Seen
    contrasts: Sequence[Contrast]
    truth: NDArray[np.uint8]
    below: Seen


def looks(teacher: Teacher, samples: Sequence[Sample], space: LabelSpace, *, flip: bool) -> Iterator[Look]:
    """Look at every sample in all ways."""
    exact = frozenset(sample.key for sample in samples)
    for one in FocusLooks(teacher, SCALES, flip, SHARES, space, exact).of(samples):
        if isinstance(one, str):
            raise SystemExit(one)
        sample, seen, found, truth = one
        assert truth is not None
        image = read_photograph(sample)
        seconds = network_seconds(teacher, image, BELOW, flip=flip)
        below = Seen(seconds, *teacher.confidence(image, scales=BELOW, flip=flip))
        yield Look(sample.group, seen, found, truth, below)


@torch.inference_mode()
def network_seconds(teacher: Teacher, image: NDArray[np.uint8], scales: Sequence[float], *, flip: bool) -> float:
    """CPU time of the network on one image."""
    pixels = teacher.feed.upload([image])[0]
    with autocast(teacher.device, teacher.precision):
        start = time.thread_time()
        teacher.network.field(pixels, scales, flip=flip)
        return time.thread_time() - start


def matrix(truth: NDArray[np.uint8], top: NDArray[np.uint8], classes: int) -> Counts:
    """The matrix of `Confusion` of one image."""
    confusion = Confusion(classes)
    confusion.add(truth, top)
    return confusion.matrix


def curve(title: str, found: Iterator[Look], space: LabelSpace) -> None:
    """Print the two tables of a teacher."""
    classes = len(space)
    trials = [FocusTrial(classes) for _ in SHARES]
    ratios, differing, pixels, matrices = list[float](), 0, 0, list[Counts]()
    for look in found:
        for trial, contrast in zip(trials, look.contrasts, strict=True):
            trial.add(look.group, look.seen, contrast, look.truth)
        ratios.append(look.below.seconds / look.seen.seconds)
        differing += int((look.below.label != look.seen.label).sum())
        pixels += look.truth.size
        matrices.append(matrix(look.truth, look.below.top, classes))
    whole = np.stack(trials[0].whole)
    groups = ", ".join(f"{name} {tally.images}" for name, tally in sorted(trials[0].groups.items()))
    print(f"\n{title}: {len(ratios)} images ({groups})\n")
    print(
        "| scale 2 sees | rows % | network's CPU | labels differ % | certified % | of these differ | share | mean IoU"
        " | gains | from | to |"
    )
    print(f"|---|{'---:|' * 10}")

    def iou(matrices: NDArray[np.int64]) -> str:
        return f"{100 * confusion_of(matrices).mean_iou():.1f}"

    for share, trial in zip(SHARES, trials, strict=True):
        total, crossed = trial.total, list(trial.crossed().values())
        sure = Certified(sum(one.labels for one in crossed), sum(one.changed for one in crossed))
        print(
            f"| {share:g} | {100 * total.rows / total.images:.0f} | {trial.ratio:.2f}"
            f" | {100 * total.differing / total.pixels:.1f} | {100 * sure.labels / total.pixels:.1f}"
            f" | {sure.changed:,} | {sure.changed / max(sure.labels, 1):.1e}"
            f" | {iou(np.stack(trial.focused))} | {gains(whole, np.stack(trial.focused))} |"
        )
    print(
        f"| nothing | 0 | {float(np.median(ratios)):.2f} | {100 * differing / pixels:.1f} | {NONE} | {NONE} | {NONE}"
        f" | {iou(np.stack(matrices))} | {gains(whole, np.stack(matrices))} |"
    )
    print(f"| all | 100 | 1.00 | 0.0 | {NONE} | {NONE} | {NONE} | {iou(whole)} | {NONE} | {NONE} | {NONE} |")
    print(f"\n| class | all | {' | '.join(f'{share:g}' for share in SHARES)} | nothing |")
    print(f"|---|{'---:|' * (2 + len(SHARES))}")
    columns = [confusion_of(x).iou() for x in (whole, *(np.stack(t.focused) for t in trials), np.stack(matrices))]
    for name, *values in zip(space.names, *columns, strict=True):
        if np.isfinite(values).all():
            print(f"| {name} | {' | '.join(f'{100 * value:.1f}' for value in values)} |")


def confusion_of(matrices: NDArray[np.int64]) -> Confusion:
    """The sum of the matrices (N, C, C + 1) of images."""
    confusion = Confusion(matrices.shape[1])
    confusion.matrix = matrices.sum(axis=0)
    return confusion


def gains(before: NDArray[np.int64], after: NDArray[np.int64]) -> str:
    """Three cells: how many points of mean IoU are gained, and the interval."""
    gain = paired_gain(before, after)
    return " | ".join(f"{100 * value:+.2f}" for value in (gain.middle, gain.low, gain.high))


def cpu(size: tuple[int, int], precisions: Sequence[str], networks: Sequence[str]) -> None:
    """Print the CPU time of networks with random weights, beside the whole."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    print(f"\n{size[1]} x {size[0]}, random weights: CPU time of the network beside the whole\n")
    print(f"| network | precision | whole, s | {' | '.join(f'{share:g}' for share in SHARES)} |")
    print(f"|---|---|{'---:|' * (1 + len(SHARES))}")
    for name in networks:
        for precision in precisions:
            torch.manual_seed(0)
            teacher = Teacher(build(name, 19), precision=precision)
            for _ in range(2):  # the first time, kernels are chosen and weights laid out
                seen, found = contrasts(teacher, image, scales=SCALES, flip=False, shares=SHARES)
            ratios = " | ".join(f"{one.seconds / seen.seconds:.2f}" for one in found)
            print(f"| {name} | {precision} | {seen.seconds:.1f} | {ratios} |", flush=True)


def drawn(folder: Path) -> list[Path]:
    """The manifests of a few drawn scenes."""
    write_city(folder, 0, fine=2, coarse=0, val=2, height=96, width=192)
    paths = []
    for split in ("train", "val"):
        paths.append(folder / f"{split}.parquet")
        save_manifest(paths[-1], scan(folder, layout="cityscapes", splits=[split])[0])
    return paths


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifests", nargs="*", type=Path)
    parser.add_argument("--teacher", nargs="+", default=[], type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--flip", action="store_true")
    parser.add_argument("--combine", default="network")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--size", default="1024x2048")
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if asked.smallest:
            print("--smallest: these numbers mean nothing")
            asked.manifests, asked.teacher, asked.precision = drawn(Path(scratch)), [DRAWN_STREETS], "float32"
        samples = [sample for path in asked.manifests for sample in load_manifest(path).samples][:: asked.every]
        for path in asked.teacher:
            space = load_manifest(asked.manifests[0]).label_space
            teacher = load_teacher(path, device="cpu", precision=asked.precision, combine=asked.combine, space=space)
            how = f"{path}, {asked.precision}{', flip' * asked.flip}{', average' * (asked.combine == 'average')}"
            curve(how, looks(teacher, samples, space, flip=asked.flip), space)
    if asked.smallest:
        cpu((128, 128), ("float32",), CPU_NETWORKS[:1])
    elif asked.cpu:
        height, width = map(int, asked.size.split("x"))
        cpu((height, width), ("float32", "bfloat16"), CPU_NETWORKS)


if __name__ == "__main__":
    main()
