"""What the recipes of docs/recipes cost: steps, floating point operations and memory, from our own network.

python benchmarks/recipes.py [--smallest]

Operations of one training crop (forward and backward, convolutions and matrix products) are counted on shapes alone.
Memory is what autograd keeps for the backward pass, rmi included, measured on a CPU with bfloat16 for two small crops:
it grows with the pixels, so a line through them gives the recipe's crop. Weights, gradients and momentum are 12 bytes a
parameter. What the backward pass itself, communication and libraries need comes on top.

Hours come from the two training times that the paper's authors gave (github.com/NVIDIA/semantic-segmentation, issues 81
and 119): 1.5 days of 16 V100 for 175 epochs of Cityscapes, 3 to 5 days of 32 for 200 epochs of Mapillary.
With --smallest, for a small network, the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from autolabel.student.losses import segmentation_loss
from autolabel.teacher.networks.build import build

FULL = "hrnet48_ocr_mscale", ((128, 256), (256, 256)), 4  # network, crops whose memory is measured, recipes
SMALLEST = "hrnet18s_ocr_mscale", ((64, 128), (128, 128)), 1
GIB = 2**30


class Recipe(NamedTuple):
    """One training. images: of an epoch; batch: crops of a step on all GPUs; each: on one of them."""

    name: str
    classes: int
    images: int
    epochs: int
    batch: int
    crop: tuple[int, int]
    each: int


RECIPES = (
    Recipe("Cityscapes, fine", 19, 2975, 175, 8, (1024, 2048), 1),
    Recipe("Cityscapes, SOTA", 19, 2975, 175, 16, (1024, 2048), 1),
    Recipe("Mapillary, code", 65, 18000, 200, 16, (1024, 1024), 2),
    Recipe("Mapillary, paper", 65, 18000, 200, 32, (1024, 1856), 1),
)
V100_SECONDS = 1.5 * 86400 * 16 / (175 * 2975)  # of one GPU for one crop of 1024 x 2048, validations included


def step(arch: str, classes: int, crop: tuple[int, int], *, device: str) -> torch.Tensor:
    """The loss of one crop, under autocast where something is computed."""
    with torch.device(device):
        network = build(arch, classes)
        images = torch.zeros(1, 3, *crop)
    with torch.autocast("cpu", torch.bfloat16, enabled=device == "cpu"):
        output = network(images)
    if device == "meta":
        total: torch.Tensor = output.joint.sum()
        return total
    return segmentation_loss("rmi", output, label=torch.randint(0, classes, (1, *crop)))


def operations(arch: str, classes: int, crop: tuple[int, int]) -> int:
    """Floating point operations of one training crop. Nothing is computed: tensors have shapes only."""
    with FlopCounterMode(display=False) as counter:
        step(arch, classes, crop, device="meta").backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def kept_bytes(arch: str, classes: int, crop: tuple[int, int]) -> int:
    """What autograd keeps of one crop's forward pass, parameters left out."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_leaf or not tensor.requires_grad:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(arch, classes, crop, device="cpu")
    return sum(kept.values())


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    smallest = parser.parse_args().smallest
    if smallest:
        print("--smallest: these numbers mean nothing")
    arch, crops, count = SMALLEST if smallest else FULL
    with torch.device("meta"):
        parameters = {n: sum(p.numel() for p in build(arch, n).parameters()) for n in {r.classes for r in RECIPES}}
    print("| recipe | crop | parameters, M | TFLOPs a crop | kept, GiB a crop | with weights, GiB a GPU |")
    print("|---|---|---:|---:|---:|---:|")
    for recipe in RECIPES[:count]:
        flops = operations(arch, recipe.classes, recipe.crop)
        pixels = [math.prod(crop) for crop in crops]
        small = [kept_bytes(arch, recipe.classes, crop) for crop in crops]
        slope = (small[1] - small[0]) / (pixels[1] - pixels[0])
        kept = small[0] + slope * (math.prod(recipe.crop) - pixels[0])
        whole = kept * recipe.each + 12 * parameters[recipe.classes]
        print(
            f"| {recipe.name} | {recipe.crop[0]}x{recipe.crop[1]} | {parameters[recipe.classes] / 1e6:.1f}"
            f" | {flops / 1e12:.2f} | {kept / GIB:.1f} | {whole / GIB:.1f} |",
            flush=True,
        )
    print("\n| recipe | crops | steps | V100 hours, all | days on 8 |")
    print("|---|---:|---:|---:|---:|")
    for recipe in RECIPES[:count]:
        seen = recipe.images * recipe.epochs
        hours = seen * V100_SECONDS * math.prod(recipe.crop) / (1024 * 2048) / 3600
        steps = recipe.epochs * math.ceil(recipe.images / recipe.batch)
        print(f"| {recipe.name} | {seen:,} | {steps:,} | {hours:,.0f} | {hours / 8 / 24:.1f} |")


if __name__ == "__main__":
    main()
