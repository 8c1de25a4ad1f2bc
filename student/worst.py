"""Keep the images that a network labels worst, and draw them: a person should look at them first."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests.drawing import LONGEST, draw_disagreement, draw_label, encode_smooth, shrink, write_picture
from autolabel.manifests.label_space import LabelSpace

COUNT = 8
_NAME = 60  # characters of a sample id in a file's name


class Worst:
    """Keeps the `count` images with the lowest mean IoU of their own, and their predictions."""

    def __init__(self, count: int = COUNT) -> None:
        self.count = count
        self._heap: list[tuple[float, int, NDArray[np.uint8]]] = []  # (-mean IoU, -index, prediction), best on top

    def add(self, index: int, *, miou: float, prediction: NDArray[np.uint8]) -> None:
        """Add an image by its place in the data set, with its prediction (H, W) uint8, unless its mean IoU is NaN."""
        if math.isnan(miou):
            return
        entry = (-miou, -index, prediction)
        if len(self._heap) < self.count:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def merge(self, other: Worst) -> None:
        """Add the worst of other images."""
        for index, miou, prediction in other:
            self.add(index, miou=miou, prediction=prediction)

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[tuple[int, float, NDArray[np.uint8]]]:
        """Yield (index, mean IoU, prediction), the worst first; of equal ones the earlier comes first."""
        for miou, index, prediction in sorted(self._heap, key=lambda entry: entry[:2], reverse=True):
            yield -index, -miou, prediction


def draw_sheet(
    image: NDArray[np.uint8], truth: NDArray[np.uint8], *, prediction: NDArray[np.uint8], space: LabelSpace
) -> Image.Image:
    """Draw photograph and truth, and below them prediction and errors: (H, W, 3) uint8, labels (H, W) uint8.

    Errors are in the colours of DISAGREEMENT: right, another class, and the dimmed photograph where truth is ignored.
    """
    photograph = shrink(Image.fromarray(image), LONGEST, how=Image.Resampling.LANCZOS)
    errors = Image.alpha_composite(photograph.convert("RGBA"), draw_disagreement(truth, prediction)).convert("RGB")
    sheet = Image.new("RGB", (2 * photograph.width, 2 * photograph.height))
    for place, part in enumerate((photograph, draw_label(truth, space), draw_label(prediction, space), errors)):
        sheet.paste(part, (place % 2 * photograph.width, place // 2 * photograph.height))
    return sheet


def write_sheet(folder: Path, sheet: Image.Image, *, rank: int, sample_id: str, miou: float) -> None:
    """Write a sheet as `folder`/RANK-ID-iouX.webp; in the id, all but letters, digits, . _ and - become _."""
    path = folder / f"{rank:02}-{re.sub(r'[^A-Za-z0-9._-]+', '_', sample_id)[-_NAME:]}-iou{miou:.3f}.webp"
    write_picture(path, encode_smooth(sheet))
