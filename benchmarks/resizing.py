"""Labels in bfloat16 whose network resizes its maps in bfloat16 too, and in float32, as a GPU's autocast would.

python benchmarks/resizing.py [FOLDER] [--images N] [--smallest]

The teacher of drawn streets, on a CPU, labels N photographs of a folder, or else N drawn streets that it has not seen,
at scales 0.5, 1 and 2. The table compares these labels with each other and with those in float32. With --smallest the
numbers mean nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from autolabel.manifests.images import read_image
from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.scenes import write_city
from autolabel.teacher.checkpoints import DRAWN_STREETS
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.predict import Teacher

Labels = list[NDArray[np.uint8]]
interpolate = F.interpolate


def in_float32(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Resize as a GPU's autocast does."""
    return interpolate(x.float(), *arguments, **options)


def differing(found: Labels, expected: Labels) -> tuple[float, float]:
    """Shares of pixels whose label is another one, and that go from one class to another."""
    pairs = list(zip(found, expected, strict=True))
    other = sum(int((a != b).sum()) for a, b in pairs)
    classes = sum(int(((a != b) & (a != IGNORE) & (b != IGNORE)).sum()) for a, b in pairs)
    pixels = sum(label.size for label in expected)
    return other / pixels, classes / pixels


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    number = 1 if asked.smallest else asked.images
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = asked.folder or Path(name)
        if not asked.folder:
            write_city(folder, seed=1, fine=0, coarse=number, val=0, height=160, width=320)
        paths = sorted(p for p in folder.rglob("*") if p.suffix in (".jpg", ".png") and "gtCoarse" not in p.parts)
        images = [read_image(path) for path in paths[:: max(1, len(paths) // number)][:number]]

    def labels(teacher: Teacher) -> Labels:
        return [teacher.label(image[None])[0][0] for image in images]

    exact = labels(load_teacher(DRAWN_STREETS, device="cpu"))
    half = load_teacher(DRAWN_STREETS, device="cpu", precision="bfloat16")
    resized_in_half = labels(half)
    with patch.object(F, "interpolate", in_float32):
        resized_in_float32 = labels(half)
    print(f"{len(images)} images, hrnet18s_ocr_mscale at 0.5, 1, 2\n")
    print("| labels in bfloat16 | against | other labels | another class |\n|---|---|---:|---:|")
    for name, found, than, expected in (
        ("resized in bfloat16", resized_in_half, "float32", exact),
        ("resized in float32", resized_in_float32, "float32", exact),
        ("resized in bfloat16", resized_in_half, "resized in float32", resized_in_float32),
    ):
        other, another = differing(found, expected)
        print(f"| {name} | {than} | {100 * other:.3f} % | {100 * another:.4f} % |")


if __name__ == "__main__":
    main()
