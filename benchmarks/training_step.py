"""One training step of the small ImageNet network on a CPU: convolutions of single channels in bfloat16 and in float32.

python benchmarks/training_step.py [--repeats N] [--smallest]

Eight crops of 160 x 224, the loss `balanced`, bfloat16, one thread. "bfloat16" leaves every convolution to autocast,
"ours" computes those that convolve each channel by itself in float32 (teacher/networks/efficientnet_lite.py).
Turn by turn, the fastest of each. With --smallest the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import time
from unittest.mock import patch

import torch
from torch import nn

from autolabel.student.losses import segmentation_loss
from autolabel.teacher.networks.build import build
from autolabel.teacher.networks.efficientnet_lite import DepthwiseConv, SamePadConv

FULL, SMALLEST = (8, 160, 224), (2, 64, 64)  # crops of a step, their height and width


def milliseconds(network: nn.Module, images: torch.Tensor, label: torch.Tensor) -> tuple[float, float]:
    """Of the forward pass, and of all of a step but the change of the weights."""
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        output = network(images)
    forward = time.perf_counter() - started
    segmentation_loss("balanced", output, label=label).backward()  # type: ignore[no-untyped-call]
    return 1000 * forward, 1000 * (time.perf_counter() - started)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    (crops, height, width), repeats = (SMALLEST, 1) if asked.smallest else (FULL, asked.repeats)
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
    torch.set_num_threads(1)
    network = build("efficientnet_lite0_ocr", 11).train()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(crops, 3, height, width).contiguous(memory_format=torch.channels_last)
    label = torch.randint(0, 11, (crops, height, width))
    times: dict[str, list[tuple[float, float]]] = {"bfloat16": [], "ours": []}
    for turn in range(repeats + 1):  # the first one warms up
        for name in times:
            convolve = SamePadConv.forward if name == "bfloat16" else DepthwiseConv.forward
            with patch.object(DepthwiseConv, "forward", convolve):
                took = milliseconds(network, images, label)
            if turn:
                times[name].append(took)
    best = {name: [min(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    print("| | ms forward | ms per step | ratio |\n|---|---:|---:|---:|")
    for name, (forward, step) in best.items():
        print(f"| {name} | {forward:.0f} | {step:.0f} | {best['bfloat16'][1] / step:.2f} |")


if __name__ == "__main__":
    main()
