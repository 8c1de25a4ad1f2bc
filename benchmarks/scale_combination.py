"""What each way to combine scales costs in training: table 3 of arXiv 2005.10821, from our own networks.

python benchmarks/scale_combination.py [--smallest]

DeepLabV3+ on ResNet-50, one training step's floating point operations (forward and backward, convolutions and matrix
products), counted on shapes alone and divided by those of the network that sees one scale. The paper: explicit trains
at 0.5, 1 and 2 (0.25 + 1 + 4 = 5.25 times the pixels), hierarchical at 0.5 and 1 (1.25 times); averaging trains at one.
With --smallest, for tiny crops, the numbers mean nothing.
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from autolabel.teacher.networks.build import build

CASES = [  # name, architecture, the paper's relative FLOPs
    ("single scale", "resnet50_deeplabv3plus", 1.00),
    ("average", "resnet50_deeplabv3plus", 1.00),
    ("explicit", "resnet50_deeplabv3plus_explicit", 5.25),
    ("hierarchical", "resnet50_deeplabv3plus_mscale", 1.25),
]
FULL, SMALLEST = (512, 1024), (64, 64)  # crop
BATCH = 2  # batch norm of the image-level feature needs two


def counted(arch: str, crop: tuple[int, int]) -> tuple[int, str]:
    """Floating point operations of one training step, and its scales. Nothing is computed: tensors have shapes only."""
    with torch.device("meta"):
        network = build(arch, 19)
        images = torch.empty(BATCH, 3, *crop)
        with FlopCounterMode(display=False) as counter:
            network(images).joint.sum().backward()  # any loss: what it adds has no products worth counting
    scales = ", ".join(f"{scale:g}" for scale in network.scale_attn.training_scales)
    return int(counter.get_total_flops()), scales


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    smallest = parser.parse_args().smallest
    if smallest:
        print("--smallest: these numbers mean nothing")
    crop = SMALLEST if smallest else FULL
    found = {arch: counted(arch, crop) for _, arch, _ in CASES}
    single, _ = found[CASES[0][1]]
    print(f"DeepLabV3+ / ResNet-50, {BATCH} crops of {crop[0]} x {crop[1]}, one training step\n")
    print("| combination | training scales | TFLOPs | relative | paper |")
    print("|---|---|---:|---:|---:|")
    for name, arch, paper in CASES:
        flops, scales = found[arch]
        print(f"| {name} | {scales} | {flops / 1e12:.2f} | {flops / single:.2f} | {paper:.2f} |")


if __name__ == "__main__":
    main()
