"""Whole runs of `autolabel generate` on the best device of this machine, from files to committed labels.

python benchmarks/whole_runs.py [--images N] [--compile] [--smallest]

Photographs are drawn streets of 2048 x 1024 as PNG, every file another name of one of eight. The teacher is
hrnet48_ocr_mscale with random weights, at 0.5, 1 and 2. A line tells the seconds until the first labels were counted
(loading, probing memory), the images a second from then on, and, where nvidia-smi tells it, the mean load of the GPU in
that time. "focus" looks at a quarter of the rows at scale 2; --compile adds a compiled network, which takes minutes.
With --smallest the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu import untrained
from PIL import Image

import autolabel as al
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.scenes import draw_scene
from autolabel.teacher.checkpoints import save_checkpoint

DRAWN = 8


@contextlib.contextmanager
def watching(loads: list[tuple[float, float]]) -> Iterator[None]:
    """Collect the moments and the load of the GPU in percent, twice a second, where there is nvidia-smi."""
    if not (torch.cuda.is_available() and shutil.which("nvidia-smi")):
        yield
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "500"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:

        def read() -> None:
            for line in process.stdout or ():
                loads.append((time.perf_counter(), float(line)))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield
        finally:
            process.terminate()
            reader.join()


def line(name: str, folder: Path, teacher: Path, **settings: Any) -> None:
    """Label the images once and print a line."""
    counted: list[tuple[float, int]] = []
    loads: list[tuple[float, float]] = []
    started = time.perf_counter()
    with watching(loads):
        al.generate(
            folder / "m.parquet",
            teacher=teacher,
            out=folder / name.replace(", ", "-"),
            progress=lambda count, _total: counted.append((time.perf_counter(), count)),
            **settings,
        )
    ended = time.perf_counter()
    begun, first = next((moment, count) for moment, count in counted if count)
    done = counted[-1][1]
    within = [load for moment, load in loads if begun <= moment <= ended]
    busy = f"{sum(within) / len(within):.0f} %" if within else "–"
    print(f"| {name} | {done} | {begun - started:.1f} | {(done - first) / (ended - begun):.2f} | {busy} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--smallest", action="store_true")
    asked = parser.parse_args()
    size, arch, drawn = (1024, 2048), "hrnet48_ocr_mscale", DRAWN
    precisions: tuple[str, ...] = ("bfloat16", "float16")
    if asked.smallest:
        size, arch, precisions, drawn, asked.images = (96, 192), "hrnet18s_ocr_mscale", ("float32",), 2, 4
        print("--smallest: these numbers mean nothing\n")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, {os.cpu_count()} cores, {arch}, {size[0]} x {size[1]}\n")
    print("| run | images | first s | images/s | GPU load |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "images").mkdir()
        for number in range(asked.images):
            path = folder / "images" / f"{number:05d}.png"
            if number < drawn:
                Image.fromarray(draw_scene(number, height=size[0], width=size[1]).image).save(path)
            else:
                os.link(folder / "images" / f"{number % drawn:05d}.png", path)
        with warnings.catch_warnings(action="ignore"):  # copies, as we know
            al.scan(folder / "images", out=folder / "m.parquet")
        save_checkpoint(folder / "teacher.pt", untrained(arch), arch=arch, space=CITYSCAPES)
        for precision in precisions:
            for name, how in (("all rows", {}), ("focus", {"focus": 0.25})):
                line(f"{precision}, {name}", folder, folder / "teacher.pt", precision=precision, **how)
        if asked.compile:
            line("compiled, all rows", folder, folder / "teacher.pt", precision=precisions[0], compile=True)


if __name__ == "__main__":
    main()
