"""Frames of one drive that show nearly the same: two of them are not worth twice the time of one.

Photographs are compared by thumbnails of 16 x 12 grey pixels, without their mean and of length 1: the product of two is
their correlation. Only photographs of images that could be chosen are opened, and only those of one group are compared.
Where a photograph cannot be read, its neighbours in the order of ids stand in for it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests.images import BadImage
from autolabel.manifests.reading import read_picture
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import Sample, samples_of
from autolabel.manifests.schemas import MANIFEST_SCHEMA

ALIKE, SAME = 0.95, 0.98  # from the first correlation on a frame counts for less, from the second on for nothing
_SIZE = (16, 12)


def thumbnail(sample: Sample) -> NDArray[np.float32] | None:
    """The embedding of a photograph (192,), None if it cannot be read."""
    try:
        picture, _ = read_picture(sample, shrink=8)
        small = np.asarray(picture.convert("L").resize(_SIZE, Image.Resampling.BOX), np.float32).ravel()
    except (BadImage, OSError):
        return None
    small -= small.mean()
    length = float(np.linalg.norm(small))
    return small / np.float32(length) if length > 0 else small


class Frames:
    """Remembers what was chosen, and says how much is left of the gain of another image."""

    def __init__(self, run: Run, ids: pa.Array) -> None:
        """ids: the images by place, as the caller numbers them."""
        file = run.manifest
        table = pa.concat_tables([MANIFEST_SCHEMA.empty_table(), *file.tables()])
        self._table = table.take(pc.index_in(ids, table["sample_id"].combine_chunks()))
        self._roots: dict[str, Path] = {"image_root": file.image_root, "label_root": file.label_root}
        groups = self._table["group"].combine_chunks().dictionary_encode().indices.to_numpy()
        order = np.lexsort((np.argsort(np.argsort(ids.to_numpy(zero_copy_only=False))), groups))
        self._groups = groups
        self._order = np.empty(len(order), np.int64)  # place in the drive
        self._order[order] = np.arange(len(order))
        self._seen: dict[int, NDArray[np.float32] | None] = {}
        self._chosen: dict[int, list[int]] = {}  # by group
        self._likeness: dict[int, tuple[int, float]] = {}  # chosen ones compared with, and the nearest of these
        self.unread = 0

    def _look(self, image: int) -> NDArray[np.float32] | None:
        if image not in self._seen:
            sample = samples_of(self._table.slice(image, 1), **self._roots)[0]  # type: ignore[arg-type]
            self._seen[image] = thumbnail(sample)
            self.unread += self._seen[image] is None
        return self._seen[image]

    def choose(self, image: int) -> None:
        """Remember an image that was chosen."""
        self._chosen.setdefault(int(self._groups[image]), []).append(image)

    def left(self, image: int) -> float:
        """The share, 0..1, that is left of the gain of an image beside all that were chosen."""
        others = self._chosen.get(int(self._groups[image]), [])
        compared, nearest = self._likeness.get(image, (0, -1.0))
        for other in others[compared:]:
            if other != image:
                nearest = max(nearest, self._alike(image, other))
        self._likeness[image] = len(others), nearest
        return 1 - min(1.0, max(0.0, (nearest - ALIKE) / (SAME - ALIKE)))

    def _alike(self, image: int, other: int) -> float:
        mine, theirs = self._look(image), self._look(other)
        if mine is None or theirs is None:
            return 1.0 if abs(int(self._order[image] - self._order[other])) == 1 else -1.0
        return float(mine @ theirs)
