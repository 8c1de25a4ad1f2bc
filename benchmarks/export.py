"""An exported network against its checkpoint: bytes, largest difference, and CPU time for an image, with one thread.

python benchmarks/export.py [CHECKPOINT] [--size HxW] [--rounds N] [--smallest]

CHECKPOINT is the teacher of drawn streets unless another is named. It is exported for one size and for any size, as
.onnx and as .pt2, at the scales of its training. Each file labels the same image; the rounds of all files take turns,
and the table has the median. With --smallest the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from autolabel.manifests.scenes import draw_scene
from autolabel.teacher.agreement import PT2
from autolabel.teacher.checkpoints import DRAWN_STREETS
from autolabel.teacher.export import Exported, export_model
from autolabel.teacher.loading import load_teacher

Work = Callable[[], object]


def loaded(exported: Exported, images: NDArray[np.uint8]) -> Work:
    """Return the work of a file on images (B, 3, H, W) uint8."""
    path = exported.files[0]
    if path.suffix == PT2:
        program, tensor = torch.export.load(path).module(), torch.from_numpy(images)
        return torch.inference_mode()(lambda: program(tensor))
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"images": images})


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=DRAWN_STREETS)
    parser.add_argument("--size", default="512x1024")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    height, width = (64, 96) if asked.smallest else map(int, asked.size.split("x"))
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
    torch.set_num_threads(1)
    teacher = load_teacher(asked.checkpoint, device="cpu")
    image = draw_scene(1, height=height, width=width).image
    images = np.ascontiguousarray(image.transpose(2, 0, 1)[None])
    suffixes, sizes = ((PT2,), ((height, width),)) if asked.smallest else ((".onnx", PT2), ((height, width), None))
    with tempfile.TemporaryDirectory() as folder:
        files: list[Exported] = []
        for suffix in suffixes:
            for size in sizes:
                files.append(export_model(asked.checkpoint, Path(folder) / f"{len(files)}{suffix}", size=size))
        scales = files[0].scales
        works: list[Work] = [lambda: teacher.logits(image, scales=scales)]
        starts = [0.0]
        for exported in files:
            start = time.process_time()
            works.append(loaded(exported, images))
            starts.append(time.process_time() - start)
        seconds: list[list[float]] = [[] for _ in works]
        for _ in range(1 if asked.smallest else asked.rounds + 1):
            for work, own in zip(works, seconds, strict=True):
                start = time.process_time()
                work()
                own.append(time.process_time() - start)
    print(f"{width} x {height}, scales {','.join(f'{s:g}' for s in scales)}, CPU time of one thread\n")
    print("| file | MB | largest difference of a logit | loaded in s | ms per image |\n|---|---:|---:|---:|---:|")
    medians = [1000 * statistics.median(own[1:] or own) for own in seconds]
    print(f"| checkpoint | {asked.checkpoint.stat().st_size / 1e6:.1f} | – | – | {medians[0]:.0f} |")
    for exported, start, ms in zip(files, starts[1:], medians[1:], strict=True):
        name = f"{exported.files[0].suffix}, {'one' if exported.size else 'any'} size"
        difference = exported.agreement.difference
        print(f"| {name} | {exported.bytes / 1e6:.1f} | {difference:.1e} | {start:.1f} | {ms:.0f} |")


if __name__ == "__main__":
    main()
