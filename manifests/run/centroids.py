"""The places of each class in the labels, for class-uniform sampling (arXiv 2005.10821, section 4).

A run counts them once, into `stats/centroids.parquet`. Rows come from there while the table has the sha256 that the run
recorded; for any other label the same rows are counted from its pixels. Nothing is cached by name, so new labels never
meet the centroids of old ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.run.shards import CHUNK
from autolabel.manifests.samples import Sample
from autolabel.manifests.tables import parts_of, table_sha256
from autolabel.manifests.wording import Progress

_COLUMNS = ("sample_id", "class_id", "y", "x")


def centroids(label: NDArray[np.uint8], classes: int) -> list[dict[str, Any]]:
    """Centre of mass (y, x) and pixel count of every class in every tile of 512 x 512 pixels of a label (H, W) uint8.

    Returns rows of `CENTROIDS_SCHEMA` without the sample's id.
    """
    strips = range(0, label.shape[0], CHUNK)
    return [row for top in strips for row in _centroids(label[top : top + CHUNK], top=top, classes=classes)]


def _centroids(strip: NDArray[np.uint8], *, top: int, classes: int) -> Iterator[dict[str, Any]]:
    """The rows of a strip of tiles (512 or fewer, W), whose first row is `top`, in one pass over runs of one class."""
    begins = np.empty(strip.shape, np.bool_)
    np.not_equal(strip[:, 1:], strip[:, :-1], out=begins[:, 1:])
    begins[:, ::CHUNK] = True  # a run ends with its row, and at the edge of a tile
    starts = np.flatnonzero(begins)
    pixels = np.diff(starts, append=strip.size)
    y, x = np.divmod(starts, strip.shape[1])
    tile, x = np.divmod(x, CHUNK)
    place = tile * 256 + strip.ravel()[starts]
    # A run of n pixels from x on adds n x + n (n - 1) / 2. All sums are whole numbers that float64 holds exactly.
    sums = [np.bincount(place, of) for of in (pixels, pixels * y, pixels * x + pixels * (pixels - 1) // 2)]
    for found in np.flatnonzero(sums[0]).tolist():
        (left, c), (n, sum_y, sum_x) = divmod(found, 256), (float(of[found]) for of in sums)
        if c < classes:
            yield {
                "class_id": c,
                "tile_y": top // CHUNK,
                "tile_x": left,
                "y": top + sum_y / n,
                "x": left * CHUNK + sum_x / n,
                "pixels": int(n),
            }


@dataclass(frozen=True)
class Centroids:
    """One row per sample, tile and class in it, N rows of 16 bytes.

    `sample` (N,) int32 are places in the list of samples, ascending; `class_id` (N,) int32; `y` and `x` (N,) float32
    pixels of the image. A centroid lies in its tile, but not always on a pixel of its class.
    """

    sample: NDArray[np.int32]
    class_id: NDArray[np.int32]
    y: NDArray[np.float32]
    x: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.sample)


def find_centroids(samples: Sequence[Sample], space: LabelSpace, *, progress: Progress | None = None) -> Centroids:
    """Return the centroids of all labels. `progress` counts the labels that have to be read.

    Raises ValueError, BadImage or DamagedLabel if a label cannot be read.
    """
    runs: dict[Path, dict[str, int]] = defaultdict(dict)
    for place, sample in enumerate(samples):
        if sample.run is not None:
            runs[sample.run][sample.sample_id] = place
    pieces = [piece for run, places in runs.items() if _unchanged(run) for piece in _from_table(run, places)]
    from_tables = set[int]().union(*(np.unique(piece.sample).tolist() for piece in pieces))
    # The others have no table, were labelled since it was written, or are ignored everywhere.
    to_read = [place for place in range(len(samples)) if place not in from_tables]

    def read(place: int) -> Centroids:
        rows = centroids(read_sample_label(samples[place], space), len(space))
        return _columns([place] * len(rows), *([row[name] for row in rows] for name in _COLUMNS[1:]))

    with ThreadPoolExecutor() as pool:
        for done, piece in enumerate(pool.map(read, to_read), 1):
            pieces.append(piece)
            if progress:
                progress(done, len(to_read))
    # From a table or counted, the rows of a label have the same order: tile by tile, the classes of each ascending.
    everything = [np.concatenate([getattr(piece, name) for piece in pieces]) for name in Centroids.__annotations__]
    order = np.argsort(everything[0], kind="stable")
    return _columns(*(column[order] for column in everything))


def _columns(sample: Iterable[int], class_id: Iterable[int], y: Iterable[float], x: Iterable[float]) -> Centroids:
    return Centroids(
        np.asarray(sample, np.int32),
        np.asarray(class_id, np.int32),
        np.asarray(y, np.float32),
        np.asarray(x, np.float32),
    )


def _unchanged(run: Path) -> bool:
    """True if the run's table is there and is the one that the run recorded when it was finished."""
    folder = RunFolder(run)
    path = folder.statistics_path("centroids")
    digests = Run.open(run).tables_sha256 or {}
    recorded = digests.get(path.relative_to(run).as_posix())
    return recorded is not None and bool(parts_of(path)) and table_sha256(path) == recorded


def _from_table(run: Path, places: dict[str, int]) -> Iterable[Centroids]:
    ids, numbers = pa.array(places), np.fromiter(places.values(), np.int32)
    for table in RunFolder(run).stream_statistics("centroids", _COLUMNS):
        place = pc.index_in(table["sample_id"], ids)
        is_ours = pc.is_valid(place)
        yield _columns(
            numbers[place.filter(is_ours).to_numpy()],
            *(table[name].filter(is_ours).to_numpy() for name in _COLUMNS[1:]),
        )
