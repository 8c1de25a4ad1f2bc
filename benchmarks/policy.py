"""What a policy costs on top of a plain threshold, and what kept confidence takes on disk.

python benchmarks/policy.py [RUN] [--smallest]

Images of 1024 x 2048, 19 classes: blobs of logits at stride 4, about as confident as a network, and a coarse label that
is mostly right. CPU time of everything after the network, in one thread: enlarge and softmax in bands, levels, counts,
the policy's rules; with kept confidence its encoding too. Best of 9 turns, in each of which every policy runs once.
Beside it the small network alone (hrnet18s, scales 0.5, 1 and 2, one thread). RUN, if given, was generated with
--keep-confidence: its bytes are added up, and 16 of its images are stored in the published form too, a label and an
8-bit map of probabilities, as PNGs by Pillow. With --smallest the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import io
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests.evidence import OUTSIDE, PolygonCounts
from autolabel.manifests.images import read_image
from autolabel.manifests.label_space import CITYSCAPES, IGNORE
from autolabel.manifests.places import places
from autolabel.manifests.policy import DENSE, PAPER, REFERENCE, Policy
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.run.ledger import Ledger
from autolabel.manifests.run.shards import crc32c, encode_zarr
from autolabel.manifests.samples import load_manifest
from autolabel.pipeline.records import read_record
from autolabel.pipeline.rules import Rules
from autolabel.teacher.counting import count
from autolabel.teacher.decide import Evidence, encode, top_classes
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.networks.build import build
from autolabel.teacher.networks.fields import at_size
from autolabel.teacher.predict import Teacher

CLASSES = 19
FULL, SMALLEST = ((1024, 2048), 9), ((64, 128), 1)  # size of an image, turns
POLICIES: dict[str, tuple[Policy, int | None]] = {
    "plain threshold": (PAPER, None),
    "threshold by class": (Policy(thresholds={"pole": 0.3, "car": 0.7, "sky": 0.9}), None),
    "human-wins": (Policy(coarse="human-wins"), None),
    "reference": (REFERENCE, None),
    "dense": (DENSE, None),
    "dense, 8 levels kept": (DENSE, 8),
    "boundary of 2 pixels": (Policy(boundary=2), None),
    "pieces of 100 pixels": (Policy(smallest_piece=100), None),
    "all of these": (
        Policy("", 0.5, {"pole": 0.3}, 1.3, REFERENCE.area, 2, 100, "teacher-wins", {"truck": "union"}),
        None,
    ),
    "8 levels kept": (PAPER, 8),
}


def evidence_of(policy: Policy, coarse: NDArray[np.uint8]) -> Evidence | None:
    """The evidence of polygons; their places are computed here too."""
    factors = policy.evidence(CITYSCAPES)
    if factors is None:
        return None
    around = torch.from_numpy(places(coarse, CLASSES))[None]
    return Evidence(around, torch.from_numpy(factors.table.T.copy()), factors.teacher_weight)


def counts_of(dice: np.random.Generator) -> PolygonCounts:
    """Any counts do: the time does not depend on them."""
    outside = dice.integers(1, 1000, (CLASSES, len(OUTSIDE) + 1, CLASSES))
    return PolygonCounts.of(CITYSCAPES, {"2048x1024": 40}, outside, dice.integers(1, 1000, (CLASSES, 7, 2)))


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    (height, width), turns = SMALLEST if asked.smallest else FULL
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
    torch.set_num_threads(1)
    dice = torch.Generator().manual_seed(0)
    coarsest = torch.randn(1, CLASSES, height // 64, width // 64, generator=dice) * 4
    blobs = F.interpolate(coarsest, scale_factor=16, mode="bilinear")
    logits = blobs + torch.randn(blobs.shape, generator=dice) * 0.1
    field = at_size(logits, (height, width), (height, width))
    top = top_classes(field, 1, classes=CLASSES, device=torch.device("cpu")).winners[0].numpy()
    counts = counts_of(np.random.default_rng(0))
    human = np.random.default_rng(0).random((8, 16)).repeat(height // 8, 0).repeat(width // 16, 1)
    coarse = np.where(human < 0.3, IGNORE, np.where(human < 0.9, top, (top + 1) % CLASSES)).astype(np.uint8)

    def labelled(name: str, policy: Policy, keep: int | None) -> None:
        edges = policy.edges(CITYSCAPES, keep)
        evidence = evidence_of(policy, coarse)
        winners, confidences, own_winners, own_confidences, second, _ = top_classes(
            field, 1, classes=CLASSES, device=torch.device("cpu"), temperature=policy.temperature, evidence=evidence,
            second=bool(keep),
        )  # fmt: skip
        codes = kept = encode(winners, confidences, classes=CLASSES, edges=edges).numpy()[0]
        if keep and evidence is not None:
            kept = encode(own_winners, own_confidences, classes=CLASSES, edges=edges).numpy()[0]
        count(winners[0], confidences[0], classes=CLASSES)
        rules[name].apply(codes, coarse)
        if keep:
            assert second is not None
            seconds = np.where(coarse == IGNORE, second[0].numpy(), np.uint8(IGNORE))
            for layer in (*np.divmod(kept, len(edges) + 1), seconds):
                crc32c(layer)
                encode_zarr(layer)

    policies = {name: (p.counted(counts) if p.polygons else p, keep) for name, (p, keep) in POLICIES.items()}
    rules = {name: Rules(p, CITYSCAPES, p.edges(CITYSCAPES, k)) for name, (p, k) in policies.items()}
    taken: dict[str, list[float]] = {name: [] for name in policies}
    for _ in range(turns):
        for name, (policy, keep) in random.sample(list(policies.items()), len(policies)):  # no one always comes first
            started = time.process_time()
            labelled(name, policy, keep)
            taken[name].append(time.process_time() - started)
    best = {name: min(times) for name, times in taken.items()}
    network = Teacher(build("hrnet18s_ocr_mscale", CLASSES))
    started = time.process_time()
    list(network.predict_in_batches(np.zeros((1, height, width, 3), np.uint8), 1, edges=(0.5,)))
    whole = time.process_time() - started
    plain = best["plain threshold"]
    print(f"{'policy':<24}{'ms':>7}{'of plain':>10}{'of labelling by hrnet18s':>27}")
    for name, seconds in best.items():
        print(f"{name:<24}{1e3 * seconds:>7.0f}{seconds / plain:>10.2f}{(whole + seconds - plain) / whole:>27.3f}")
    if asked.run:
        show_bytes(asked.run)


def show_bytes(run: Path) -> None:
    """Bytes an image of every layer, and of the published form."""
    images = RunFolder(run).statistics("images")
    pixels = sum(h * w for h, w in zip(images["height"].to_pylist(), images["width"].to_pylist(), strict=True))
    recipe, samples = Run.open(run).recipe, load_manifest(run / "manifest.parquet").samples
    labeller = Run.open(run).teacher
    assert labeller is not None
    teacher = load_teacher(labeller, device="cpu", precision=recipe.precision, combine=recipe.combine)
    png = png_pixels = 0
    for sample in samples[:: max(1, len(samples) // 16)]:
        top, confidence = teacher.confidence(read_image(sample.image), scales=recipe.scales, flip=recipe.flip)
        for layer in (top, (confidence * 255).astype(np.uint8)):
            buffer = io.BytesIO()
            Image.fromarray(layer).save(buffer, "PNG")
            png += len(buffer.getvalue())
        png_pixels += top.size
    layers: dict[str, int] = {}
    for commit in Ledger(run).values():
        for name, shard in read_record(commit)[1].items():
            layers[name] = layers.get(name, 0) + shard["bytes"]
    layers["top + confidence"] = layers["top"] + layers["confidence"]
    layers["two 8-bit PNGs"] = png * pixels // png_pixels
    edges = ", ".join(f"{edge:g}" for edge in recipe.confidence_edges or ())
    print(f"\n{run}: {len(images)} images of {pixels / len(images) / 1e6:.2f} megapixels, levels between {edges}")
    for name, size in layers.items():
        print(f"{name:<18}{size / len(images) / 1e3:>8.1f} kB an image {1e3 * size / pixels:>8.1f} kB a megapixel")


if __name__ == "__main__":
    main()
