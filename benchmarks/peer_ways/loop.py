"""Label a folder in a plain loop: python loop.py TEACHER IMAGES OUT [--trimmed].

As the published code of arXiv 2005.10821 dumps labels: the probability as OUT/NAME_prob.png, then the label as
OUT/NAME.png; an image whose label is there is left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image
from segmenters import segmenter


def main(teacher: Path, images: Path, out: Path, *, trimmed: bool) -> None:
    """Label all images."""
    segment = segmenter(teacher, trimmed=trimmed)
    out.mkdir(exist_ok=True)
    with torch.inference_mode() if trimmed else torch.no_grad():
        for path in sorted(images.iterdir()):
            place = out / f"{path.stem}.png"
            if place.exists():
                continue
            label, probability = segment(Image.open(path))
            if probability is not None:
                Image.fromarray(probability).save(out / f"{path.stem}_prob.png")
            Image.fromarray(label).save(place)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), trimmed="--trimmed" in sys.argv)
