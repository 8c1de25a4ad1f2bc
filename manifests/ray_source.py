"""The labels of a run as a data set of Ray Data: images and labels in blocks, read where they are used.

The driver reads three columns of the run's manifest and cuts its rows into pieces. A worker reads the rows of a piece
from the manifest, then images and labels from where they lie, some of them ahead; no pixel passes through the driver.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from autolabel.manifests import storage
from autolabel.manifests.ahead import ahead
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.reading import fetch_photograph, photograph_of
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.labels import CONFIDENCE, PROBABILITY
from autolabel.manifests.run.sample_labels import FetchedLabel, fetch_label, fetch_layer
from autolabel.manifests.samples import ManifestFile, Sample, samples_of
from autolabel.manifests.schemas import MANIFEST_SCHEMA
from autolabel.manifests.tables import read_group, read_groups

_COLUMNS = ("sample_id", "image", "label", CONFIDENCE, PROBABILITY, "height", "width")
_BYTES = {"image": 3, "label": 1, CONFIDENCE: 1, PROBABILITY: 1}  # of a pixel
_ROW = 64  # bytes of a row beside its pixels, about
_BLOCK = 32 << 20  # bytes of pixels that a worker collects before it hands them over
_AHEAD = 8  # samples that a worker reads ahead, by as many threads
_TASKS = 20_000  # the driver holds no more: beyond, a task has more rows and as large blocks
_SIZES = pa.schema([MANIFEST_SCHEMA.field(name) for name in ("label", "height", "width")])


@dataclass(frozen=True)
class Piece:
    """Rows of a manifest that one task reads: those from `start` to `stop` of the labelled ones of a row group.

    version: that of the manifest's file when the rows were counted. pixels: of all these images.
    """

    manifest: ManifestFile
    version: storage.Stat
    group: int
    start: int
    stop: int
    pixels: int

    def samples(self) -> list[Sample]:
        """Read the rows. Raises BadTable, and ValueError if the manifest has been published anew."""
        if storage.stat(self.manifest.path) != self.version:
            raise ValueError(f"{self.manifest.path} has changed since the data set was made: make it again")
        table = _labelled(self.manifest.path, self.version, self.group)
        rows, of = table.slice(self.start, self.rows), self.manifest
        return samples_of(rows, image_root=of.image_root, label_root=of.label_root, runs=of.runs)

    @property
    def rows(self) -> int:
        """The number of its samples."""
        return self.stop - self.start


@lru_cache(maxsize=2)
def _labelled(manifest: Path, version: storage.Stat, group: int) -> pa.Table:
    """The rows of a group that have a label; read once for tasks that follow each other in a process."""
    table = read_group(manifest, MANIFEST_SCHEMA, group)
    return table.filter(_has_label(table))


def _has_label(table: pa.Table) -> Any:
    return pc.and_(pc.is_valid(table["label"]), pc.greater(table["height"], 0))


def ray_dataset(run: Run, columns: Sequence[str] = ()) -> Any:
    """Make the data set of a run's labelled samples, a `ray.data.Dataset`; `autolabel.ray_dataset` documents it."""
    import ray.data
    from ray.data.block import BlockAccessor, BlockMetadata

    wanted, manifest = _require_columns(run, columns), run.manifest

    class RunSource(ray.data.Datasource):  # here, because Ray takes seconds to import
        """The labelled samples of a run, a piece for each task."""

        def get_name(self) -> str:
            return "Autolabel"

        def estimate_inmemory_data_size(self) -> int:
            return sum(map(_bytes, pieces_of(manifest, 1)))

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[Any]:
            return [
                ray.data.ReadTask(
                    partial(_blocks, piece),
                    BlockMetadata(num_rows=piece.rows, size_bytes=_bytes(piece), input_files=None, exec_stats=None),
                    per_task_row_limit=per_task_row_limit,
                )
                for piece in pieces_of(manifest, parallelism)
            ]

    def _bytes(piece: Piece) -> int:
        return piece.pixels * _pixel_bytes(wanted) + piece.rows * _ROW

    def _blocks(piece: Piece) -> Iterator[Any]:
        for some in read_columns(piece, wanted):
            yield BlockAccessor.batch_to_block(some)

    return ray.data.read_datasource(RunSource())  # type: ignore[no-untyped-call]


def _require_columns(run: Run, columns: Sequence[str]) -> tuple[str, ...]:
    kept = {CONFIDENCE: run.recipe.confidence_edges is not None, PROBABILITY: run.recipe.keep_probability}
    there = tuple(name for name in _COLUMNS if kept.get(name, True))
    for name in columns:
        if name not in _COLUMNS:
            raise ValueError(f"columns: {name!r} is none of {', '.join(there)}")
        if name not in there:
            raise ValueError(f"columns: {run.path} has kept no {name}: it has {', '.join(there)}")
    return tuple(dict.fromkeys(columns)) or there


def pieces_of(manifest: ManifestFile, number: int) -> list[Piece]:
    """Cut the labelled samples of a manifest into about so many pieces of neighbours, at most 20,000 and a few.

    Raises BadTable.
    """
    version = storage.stat(manifest.path)
    groups = [group.filter(_has_label(group)) for group in read_groups(manifest.path, _SIZES)]
    if version is None or storage.stat(manifest.path) != version:
        raise ValueError(f"{manifest.path} has changed while it was read: try again")
    rows = max(1, -(-sum(map(len, groups)) // max(1, min(number, _TASKS))))
    pieces = []
    for place, group in enumerate(groups):
        pixels = group["height"].to_numpy().astype(np.int64) * group["width"].to_numpy()
        for start in range(0, len(group), rows):
            stop = min(start + rows, len(group))
            pieces.append(Piece(manifest, version, place, start, stop, int(pixels[start:stop].sum())))
    return pieces


def read_columns(piece: Piece, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Read the samples of a piece; yield columns of some of them: arrays (n, H, W) of images of one size, and lists."""
    waiting: list[dict[str, Any]] = []
    pool = ThreadPoolExecutor(_AHEAD)
    try:
        fetch = partial(_fetched, columns=columns, space=piece.manifest.label_space)
        for row in map(_decoded, ahead(pool, fetch, piece.samples(), _AHEAD)):
            size = (row["height"], row["width"])
            other = waiting and (waiting[0]["height"], waiting[0]["width"]) != size
            if waiting and (other or len(waiting) * _pixel_bytes(columns) * size[0] * size[1] >= _BLOCK):
                yield _together(waiting, columns)
                waiting = []
            waiting.append(row)
        if waiting:
            yield _together(waiting, columns)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


Stored = Mapping[str, bytes | FetchedLabel]


def _fetched(sample: Sample, columns: Sequence[str], space: LabelSpace) -> tuple[Sample, Stored]:
    stored: dict[str, bytes | FetchedLabel] = {}
    for name in columns:
        if name == "image":
            stored[name] = fetch_photograph(sample)
        elif name == "label":
            stored[name] = fetch_label(sample, space)
        elif name in _BYTES:
            stored[name] = fetch_layer(sample, name)
    return sample, stored


def _decoded(fetched: tuple[Sample, Stored]) -> dict[str, Any]:
    sample, stored = fetched
    pixels = {
        name: photograph_of(sample, data) if isinstance(data, bytes) else data.crop() for name, data in stored.items()
    }
    return {"sample_id": sample.sample_id, "height": sample.height, "width": sample.width, **pixels}


def _together(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, Any]:
    lists = {name: [row[name] for row in rows] for name in columns}
    return {name: np.stack(values) if name in _BYTES else values for name, values in lists.items()}


def _pixel_bytes(columns: Sequence[str]) -> int:
    return sum(_BYTES.get(name, 0) for name in columns)
