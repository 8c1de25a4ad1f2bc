"""What polygons as evidence cost: places, the posterior of `generate` and of `relabel`, and counting.

python benchmarks/polygons.py [--smallest]

Drawn streets of 2048 x 1024 in the 19 classes of Cityscapes, outlined by the three hands of `autolabel manifest
coarsen`; blobs of logits at stride 4, about as confident as a network. CPU time of one thread, the least of 5 turns,
mean over 4 streets. What the policy dense adds is measured against `human-first` on the same image: `generate` decides
from all probabilities, `relabel` from eight levels and the second class. The bar is 150 ms in all. Counting includes
reading both PNGs. With --smallest the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests.evidence import PolygonCounts
from autolabel.manifests.hands import HANDS, coarsen
from autolabel.manifests.images import decode_label
from autolabel.manifests.label_space import CITYSCAPES, IGNORE
from autolabel.manifests.places import places
from autolabel.manifests.policy import DENSE, HUMAN_FIRST
from autolabel.manifests.run.shards import Label
from autolabel.manifests.scenes import draw_scene
from autolabel.pipeline.analysis.polygons import TwoLabels, count_image
from autolabel.pipeline.posterior import FromLevels
from autolabel.teacher.decide import Evidence, encode, top_classes
from autolabel.teacher.networks.fields import Field, at_size

CLASSES, DEVICE = len(CITYSCAPES), torch.device("cpu")
STREETS, TURNS, FULL, SMALLEST = 4, 5, (1024, 2048), (64, 128)
COLUMNS = ("unnamed %", "places", "generate adds", "in all", "relabel adds", "in all", "counting")


def ms(work: Callable[[], object], turns: int) -> float:
    """The least CPU time, in ms."""
    taken = []
    for _ in range(turns):
        started = time.process_time()
        work()
        taken.append(1e3 * (time.process_time() - started))
    return min(taken)


def png(label: Label) -> bytes:
    """A label as the bytes of a PNG."""
    file = io.BytesIO()
    Image.fromarray(label).save(file, "PNG")
    return file.getvalue()


def blobs(height: int, width: int, seed: int) -> Field:
    """Logits of blobs at stride 4, enlarged when they are read."""
    dice = torch.Generator().manual_seed(seed)
    coarsest = torch.randn(1, CLASSES, height // 64, width // 64, generator=dice) * 4
    logits = F.interpolate(coarsest, scale_factor=16, mode="bilinear")
    return at_size(logits + torch.randn(logits.shape, generator=dice) * 0.1, (height, width), (height, width))


def measured(fine: Label, coarse: Label, field: Field, turns: int) -> NDArray[np.float64]:
    """The columns of one image."""
    counted = count_image(TwoLabels(fine, coarse), CLASSES)
    counts = PolygonCounts.of(CITYSCAPES, {f"{fine.shape[1]}x{fine.shape[0]}": 1}, counted.outside + 1, counted.inside)
    dense, edges = DENSE.counted(counts), HUMAN_FIRST.edges(CITYSCAPES, 8)
    factors, place = dense.evidence(CITYSCAPES), places(coarse, CLASSES)
    assert factors is not None
    evidence = Evidence(torch.from_numpy(place)[None], torch.from_numpy(factors.table.T.copy()), factors.teacher_weight)

    def generated(weighed: Evidence | None) -> object:
        return top_classes(field, 1, classes=CLASSES, device=DEVICE, evidence=weighed)

    tops = top_classes(field, 1, classes=CLASSES, device=DEVICE, second=True)
    codes = encode(tops.own_winners, tops.own_confidences, classes=CLASSES, edges=edges).numpy()[0]
    top, level = (layer.astype(np.uint8) for layer in np.divmod(codes, len(edges) + 1))
    assert tops.seconds is not None
    second = np.where(coarse == IGNORE, tops.seconds[0].numpy(), np.uint8(IGNORE))
    weighing, alone = FromLevels(dense, CITYSCAPES, edges), FromLevels(HUMAN_FIRST, CITYSCAPES, edges)
    of_files = png(fine), png(coarse)

    def count_files() -> object:
        return count_image(TwoLabels(*(decode_label(file, CITYSCAPES) for file in of_files)), CLASSES)

    around = ms(lambda: places(coarse, CLASSES), turns)
    generates = ms(lambda: generated(evidence), turns) - ms(lambda: generated(None), turns)
    relabels = ms(lambda: weighing(top, level, place=place, second=second), turns)
    relabels -= ms(lambda: alone(top, level), turns)
    counting = ms(count_files, turns)
    return np.array(
        [100 * (place > 0).mean(), around, generates, around + generates, relabels, around + relabels, counting]
    )


def main() -> None:
    """Parse the arguments, draw, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    (height, width), streets, turns = (SMALLEST, 1, 1) if asked.smallest else (FULL, STREETS, TURNS)
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
    torch.set_num_threads(1)
    ids = np.frombuffer(CITYSCAPES.train_ids, np.uint8)
    scenes = [ids[draw_scene(seed, height=height, width=width).fine] for seed in range(streets)]
    print(f"\n| hand | {' | '.join(COLUMNS)} |\n|---|{'---:|' * len(COLUMNS)}")
    for hand in HANDS:
        rows = [
            measured(fine, coarsen(fine, hand, seed=seed), blobs(height, width, seed), turns)
            for seed, fine in enumerate(scenes)
        ]
        print(f"| {hand} | {' | '.join(f'{cell:.0f}' for cell in np.mean(rows, axis=0))} |", flush=True)


if __name__ == "__main__":
    main()
