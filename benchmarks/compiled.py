"""What `generate --compile` costs and saves on a CPU: compiling, the kept code, the steady speed, other labels.

python benchmarks/compiled.py [--nets NET ...] [--precisions P ...] [--sizes HxW ...] [--rounds N] [--smallest]

Random weights; one scale of the network (`predict`) on one thread, both sides in turn in one process, CPU seconds. Each
network is compiled in a process of its own and a folder of its own, and a second process finds its code there.
--smallest: one network that torch only follows, one small image; every number means nothing.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from autolabel.teacher import compiled
from autolabel.teacher.compiled import compile_network
from autolabel.teacher.device import autocast
from autolabel.teacher.fold import cast_convolutions, fold_batch_norm
from autolabel.teacher.networks.build import build
from autolabel.teacher.networks.combine import ScaleOutput
from autolabel.teacher.networks.decoders import SegmentationNet

NETS, PRECISIONS, SIZES = ("hrnet18s_ocr", "efficientnet_lite0_ocr"), ("float32", "bfloat16"), ("360x480", "512x1024")
_WARM = "--warm"


def spent() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def prepared(name: str, precision: str) -> SegmentationNet:
    """A network with random weights, as `load_teacher` prepares it."""
    torch.manual_seed(0)
    network = build(name, 19).eval()
    fold_batch_norm(network)
    cast_convolutions(network, precision, device="cpu")
    return network


def least(works: Sequence[Callable[[], ScaleOutput]], rounds: int) -> list[float]:
    """The least CPU seconds of each work, all in turn."""
    times = [[float("inf")] for _ in works]
    for _ in range(rounds):
        for work, own in zip(works, times, strict=True):
            started = time.process_time()
            work()
            own.append(time.process_time() - started)
    return [min(own) for own in times]


def measure(name: str, precision: str, sizes: Sequence[str], rounds: int) -> None:
    """Compile one network, find its code again in another process, and print a line for each size."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        network = prepared(name, precision)
        eager = network.predict
        started = spent()
        compile_network(network, precision, device="cpu", subject=name)
        built = spent() - started
        rows = []
        with torch.inference_mode(), autocast(torch.device("cpu"), precision):
            for size in sizes:
                height, width = map(int, size.split("x"))
                images = torch.randn(1, 3, height, width).contiguous(memory_format=torch.channels_last)
                started = spent()
                found = network.predict(images).logits
                more = spent() - started
                other = (found.argmax(dim=1) != eager(images).logits.argmax(dim=1)).float().mean()
                before, now = least([partial(eager, images), partial(network.predict, images)], rounds)
                rows.append((size, more, before, now, 100 * float(other)))
        again = built if following() else found_again(name, precision)
    for size, more, before, now, others in rows:
        print(
            f"| {name} | {precision} | {size} | {built:.0f} | {again:.0f} | {more:.1f} | {before:.3f} | {now:.3f} |"
            f" {before / now:.2f} | {others:.4f} % |",
            flush=True,
        )


def found_again(name: str, precision: str) -> float:
    """CPU seconds of another process that takes the code from the folder."""
    command = [sys.executable, __file__, _WARM, name, precision]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def following() -> bool:
    """True where nothing is built: torch only follows the network."""
    return compiled.backend is follow


def follow() -> Callable[..., Any]:
    """A compiler that changes nothing."""
    return lambda graph, inputs: graph.forward


def warm(name: str, precision: str) -> None:
    """Print the CPU seconds that a network takes whose code is there."""
    network = prepared(name, precision)
    started = spent()
    compile_network(network, precision, device="cpu", subject=name)
    print(spent() - started)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=NETS)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smallest", action="store_true")
    parser.add_argument(_WARM, nargs=2)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else helpers compile, whose time nobody sees
    if asked.warm:
        warm(*asked.warm)
        return
    if asked.smallest:
        asked.nets, asked.precisions, asked.sizes, asked.rounds = NETS[1:], PRECISIONS[:1], ("64x96",), 1
        compiled.backend = follow
        print("--smallest: these numbers mean nothing\n")
    print("| network | precision | size | build s | kept s | first s | eager s | compiled s | gain | other labels |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in asked.nets:
        for precision in asked.precisions:
            measure(name, precision, asked.sizes, asked.rounds)


if __name__ == "__main__":
    main()
