"""Label a folder with the pipeline of transformers: python pipeline.py MODEL IMAGES OUT.

The pipeline gives a mask for each class; people join them, as is done here, to have one label.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from segmenters import transformers_package


def main(model: Path, images: Path, out: Path) -> None:
    """Label all images."""
    segment = transformers_package().pipeline("image-segmentation", model=str(model), device="cpu")
    numbers = segment.model.config.label2id
    out.mkdir(exist_ok=True)
    for path in sorted(images.iterdir()):
        image = Image.open(path).convert("RGB")
        label = np.full(image.size[::-1], 255, np.uint8)
        for part in segment(image, subtask="semantic"):
            label[np.asarray(part["mask"]) > 0] = numbers[part["label"]]
        Image.fromarray(label).save(out / f"{path.stem}.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
