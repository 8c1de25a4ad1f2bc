"""The committed labels of a run, by sample id, and the label of any sample of a manifest.

A run that keeps the teacher's confidence has two more layers, stored just like the labels: `top`, the top class of
every pixel, and `confidence`, its level of confidence.

Labels lie in a Zarr group `labels.zarr` (manifests/run/shards.py), or with `--store png` as one 8-bit grey PNG per
sample under `labels/`. The records `units/*.parquet` alone say which labels are committed: a missing Zarr shard reads
as 255 everywhere, and a file that exists may belong to a unit that died.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from autolabel.manifests.images import PNG_END, BadImage, decode_label, read_label
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.run.shards import DamagedLabel, Label, crc32c, read_zarr
from autolabel.manifests.samples import Sample

LABELS, TOP, CONFIDENCE = LAYERS = ("labels", "top", "confidence")  # maps of bytes that a run may hold of an image
Window = tuple[int, int, int, int]  # top, left, height, width


def zarr_folder(layer: str) -> str:
    """Where the maps of a layer lie in a run with a Zarr store; PNGs lie in a folder named as the layer."""
    return f"{layer}.zarr"


def png_name(image: str) -> str:
    """Relative path of a sample's PNG label, from the relative path of its image."""
    return str(Path(image).with_suffix(".png").as_posix())


def in_layer(label: str, layer: str) -> str:
    """Where a map of a layer lies, from the place of the label: "labels.zarr/b512x512" or "labels/a/b.png"."""
    return layer + label.removeprefix(LABELS)


def read_png(path: Path, space: LabelSpace | None = None) -> Label:
    """Read one stored label of train ids; without a label space, bytes of any meaning. Raises DamagedLabel."""
    try:
        data = path.read_bytes()
        if not data.endswith(PNG_END):  # Pillow does not look at it
            raise BadImage("damaged or truncated: its end is missing")
        return decode_label(data, space, "train")
    except (BadImage, OSError) as error:
        raise DamagedLabel(f"{path}: {error}") from error


@dataclass(frozen=True)
class StoredLabel:
    """The place of one committed map, and what it held: `index` is its row in a Zarr array, None for a PNG file."""

    path: Path
    index: int | None
    height: int
    width: int
    crc32c: int

    def read(self, sample_id: str, space: LabelSpace | None) -> Label:
        """(H, W) uint8, train ids of `space`, or bytes of any meaning without one.

        Raises DamagedLabel, naming the sample, if size or checksum differ from what was committed.
        """
        if self.index is None:
            label = read_png(self.path, space)
        else:
            label = read_zarr(self.path, self.index, 0, 0, self.height, self.width)
        if label.shape != (self.height, self.width) or crc32c(label) != self.crc32c:
            raise DamagedLabel(f"label of {sample_id!r} in {self.path} differs from what was committed")
        return label


def stored_labels(run: Path, rows: Iterable[Mapping[str, Any]], layer: str = LABELS) -> dict[str, StoredLabel]:
    """The labelled ones of a record's rows, by sample id; of another layer, those that it holds."""
    checksum = "label_crc32c" if layer == LABELS else f"{layer}_crc32c"
    return {
        row["sample_id"]: StoredLabel(
            run / in_layer(row["label"], layer), row["label_index"], row["height"], row["width"], row[checksum]
        )
        for row in rows
        if row["status"] == "labelled" and row[checksum] is not None
    }


class RunLabels(Mapping[str, Label]):
    """The committed labels of a run by sample id, whatever the store. Iterates over sample ids in the run's order."""

    def __init__(self, labels: dict[str, StoredLabel], space: LabelSpace | None) -> None:
        self._labels, self._space = labels, space

    def __getitem__(self, sample_id: str) -> Label:
        """(H, W) uint8 train ids. Raises KeyError if unknown or not committed, DamagedLabel if it has changed."""
        return self._labels[sample_id].read(sample_id, self._space)

    def crop(self, sample_id: str, top: int, left: int, height: int, width: int) -> Label:
        """(height, width) uint8 from the label of one sample. Raises KeyError, DamagedLabel, or IndexError outside."""
        stored = self._labels[sample_id]
        if top < 0 or left < 0 or top + height > stored.height or left + width > stored.width:
            raise IndexError(
                f"crop {height} x {width} at ({top}, {left}) leaves the label of {sample_id!r},"
                f" which is {stored.height} x {stored.width}"
            )
        if stored.index is None:
            return stored.read(sample_id, self._space)[top : top + height, left : left + width]
        return read_zarr(stored.path, stored.index, top, left, height, width)

    def __iter__(self) -> Iterator[str]:
        return iter(self._labels)

    def __len__(self) -> int:
        return len(self._labels)


class RunConfidence(Mapping[str, tuple[Label, Label]]):
    """What a run has kept of its teacher, by sample id: top class (H, W) uint8, level of confidence (H, W) uint8.

    A level is the number of `edges` (ascending) that the softmax probability of the top class exceeds.
    """

    def __init__(self, top: RunLabels, levels: RunLabels, edges: Sequence[float]) -> None:
        self._top, self._levels, self.edges = top, levels, tuple(edges)

    def __getitem__(self, sample_id: str) -> tuple[Label, Label]:
        """Raises KeyError if unknown or not committed, DamagedLabel if it has changed."""
        return self._top[sample_id], self._levels[sample_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._top)

    def __len__(self) -> int:
        return len(self._top)


_PLACED = ["sample_id", "status", "label", "label_index", "height", "width"]


def committed_labels(run: Path, layer: str) -> dict[str, StoredLabel]:
    """The places of a layer's committed maps, by sample id, from the commit records of a run folder."""
    columns = [*_PLACED, "label_crc32c" if layer == LABELS else f"{layer}_crc32c"]
    labels: dict[str, StoredLabel] = {}
    for record in sorted((run / "units").glob("*.parquet")):
        labels |= stored_labels(run, pq.read_table(record, columns=columns).to_pylist(), layer)
    return labels


def read_sample_label(sample: Sample, space: LabelSpace, window: Window | None = None) -> Label:
    """A manifest sample's label as (h, w) uint8 train ids, whole or the crop `window` = (top, left, height, width).

    Raises ValueError if the sample has no label, BadImage, DamagedLabel or OSError if it cannot be read; of a run
    always DamagedLabel, which names sample and run and says what to do.
    """
    if sample.label is None:
        raise ValueError(f"sample {sample.sample_id!r} has no label")
    try:
        return _sample_label(sample, sample.label, space, window or (0, 0, sample.height, sample.width))
    except (BadImage, DamagedLabel, OSError) as error:
        if sample.run is None:
            raise
        reason = f"{sample.label}: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise DamagedLabel(
            f"sample {sample.sample_id!r} of run {sample.run}: {reason}; `autolabel verify {sample.run} --repair` finds"
            " all that is damaged, for `autolabel generate` to make it again"
        ) from error


def _sample_label(sample: Sample, path: Path, space: LabelSpace, window: Window) -> Label:
    top, left, height, width = window
    if sample.label_index is not None:
        return read_zarr(path, sample.label_index, top, left, height, width)
    label = read_label(path, space, sample.label_ids, size=(sample.height, sample.width))
    return label[top : top + height, left : left + width]
