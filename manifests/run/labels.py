"""The committed labels of a run, by sample id; manifests/run/sample_labels.py reads those of a manifest's samples.

A run that keeps the teacher's confidence has more layers, stored just like the labels: `top`, the top class of every
pixel, `confidence`, its level of confidence, and `second`, the second class where people named none, else 255. One that
keeps probabilities has the layer `probability`, of the class that a pixel's label has.

Labels lie in a Zarr group `labels.zarr` (manifests/run/shards.py), or with `--store png` as one 8-bit grey PNG per
sample under `labels/`. The commit records alone say which labels are committed: a missing Zarr shard reads
as 255 everywhere, and a file that exists may belong to a unit that died.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.images import PNG_END, BadImage, decode_label
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.run.frames import read_zarr
from autolabel.manifests.run.ledger import Ledger, read_newest
from autolabel.manifests.run.shards import DamagedLabel, Label, Window, bucket_of, crc32c
from autolabel.manifests.tables import BadTable, as_expected, sealed_table

# Layers: the maps of bytes that a run may hold of an image.
LABELS, TOP, CONFIDENCE, SECOND, PROBABILITY = LAYERS = "labels", "top", "confidence", "second", "probability"
CERTAIN = 255  # a probability, in 255ths: people decided
KEEP_PROBABILITY = "generate or relabel with --keep-probability"  # advice
_PLACE = [  # columns of a record that say where a label is
    pa.field("sample_id", pa.string(), nullable=False),
    pa.field("status", pa.string(), nullable=False),
    pa.field("label", pa.string()),
    pa.field("label_index", pa.int64()),
    pa.field("height", pa.int32(), nullable=False),
    pa.field("width", pa.int32(), nullable=False),
]


def zarr_folder(layer: str) -> str:
    """The folder that holds the maps of a layer in a run with a Zarr store; a folder of PNGs is named as the layer."""
    return f"{layer}.zarr"


def png_name(image: str) -> str:
    """Relative path of a sample's PNG label, from the relative path of its image.

    A folder that is called like a label, "q.png", gets another name, "q.png_": it may lie beside an image "q.jpg".
    """
    *folders, name = PurePosixPath(image).parts or ("",)  # an empty name is no file's, so nothing is written under it
    folders = [f"{folder}_" if folder.lower().endswith(".png") else folder for folder in folders]
    return "/".join([*folders, PurePosixPath(name).with_suffix(".png").name if name else ".png"])


def zarr_place(bucket: str) -> str:
    """The place of labels of a size in a run with a Zarr store, relative to the run: the array of their bucket."""
    return f"{zarr_folder(LABELS)}/{bucket}"


def png_place(image: str) -> str:
    """The place of a sample's PNG label, relative to the run, from the relative path of its image."""
    return f"{LABELS}/{png_name(image)}"


def in_layer(label: str, layer: str) -> str:
    """The place of a layer's map, from the place of the label, "labels.zarr/b512x512" or "labels/a/b.png"."""
    return layer + label.removeprefix(LABELS)


def take_over(run: Path, *folders: Path) -> str:
    """The advice for labels that people have changed in a run's folder of PNGs, or have left in other folders."""
    places = " ".join(map(str, folders or (run / LABELS,)))
    return f"`autolabel import png {places} --run {run} -o fixed.parquet` takes it over as a correction"


class ChangedLabel(DamagedLabel):
    """A label PNG of a run is whole, of its size and of known classes, but not the one that was committed.

    No damage makes such a file, because a PNG has checksums: a person or a tool has changed the label.
    """


def read_png(path: Path, space: LabelSpace | None = None) -> Label:
    """Read one stored label of train ids; without a label space, bytes of any meaning. Raises DamagedLabel."""
    try:
        data = storage.read(path)
        if not data.endswith(PNG_END):  # Pillow does not look at it
            raise BadImage("damaged or truncated: its end is missing")
        return decode_label(data, space)
    except (BadImage, OSError) as error:
        raise DamagedLabel(f"{path}: {error}") from error


@dataclass(frozen=True)
class StoredLabel:
    """The place of one committed map, and what it held: `index` is its row in a Zarr array, None for a PNG file.

    run: the folder of its run. layer: the layer of the map.
    """

    path: Path
    index: int | None
    height: int
    width: int
    crc32c: int
    run: Path
    layer: str = LABELS

    @property
    def _size(self) -> tuple[int, int]:
        return (self.height, self.width)

    def read(self, sample_id: str, space: LabelSpace | None) -> Label:
        """(H, W) uint8, train ids of `space`, or bytes of any meaning without one.

        Raises DamagedLabel, naming the sample, if size or checksum differ from what was committed; of a label PNG that
        a person or a tool has changed, ChangedLabel.
        """
        if self.index is None:
            label = read_png(self.path, space)
        else:
            label = read_zarr(self.path, self.index, window=(0, 0, self.height, self.width))
        if label.shape != self._size or crc32c(label) != self.crc32c:
            if self.index is None and self.layer == LABELS and space is not None and label.shape == self._size:
                raise ChangedLabel(f"label of {sample_id!r} in {self.path} was changed by hand; {take_over(self.run)}")
            raise DamagedLabel(f"label of {sample_id!r} in {self.path} differs from what was committed")
        return label


def stored_labels(run: Path, rows: Iterable[Mapping[str, Any]], *, layer: str = LABELS) -> dict[str, StoredLabel]:
    """The maps of a layer that the rows of a record list, by sample id.

    Raises BadTable for a label that lies where no run puts it, ValueError for a link in the run.
    """
    checksum = _checksum(layer)
    arrays: dict[str, Path] = {}  # looked at once
    labels: dict[str, StoredLabel] = {}
    for row in rows:
        if row["status"] != "labelled" or row[checksum] is None:
            continue
        label, index, height, width = (row[name] for name in ("label", "label_index", "height", "width"))
        if index is None:
            usual = label is not None and label.startswith(f"{LABELS}/") and label.endswith(".png")
        else:
            usual = index >= 0 and label == zarr_place(bucket_of(height, width))
        if not usual or re.search(storage.LEAVING, label):
            raise BadTable(
                f"{run}: the record of sample {row['sample_id']!r} has its label at {label!r}, where no run puts it:"
                f" `autolabel verify {run} --repair` puts its unit back to undone"
            )
        place = in_layer(label, layer)
        path = storage.inside(run, place) if index is None or place not in arrays else arrays[place]
        arrays[place] = path
        labels[row["sample_id"]] = StoredLabel(path, index, height, width, row[checksum], run, layer)
    return labels


class RunLabels(Mapping[str, Label]):
    """The committed labels of a run by sample id, whatever the store. Iterates over sample ids in the run's order."""

    def __init__(self, labels: dict[str, StoredLabel], space: LabelSpace | None) -> None:
        self._labels, self._space = labels, space

    def __getitem__(self, sample_id: str) -> Label:
        """(H, W) uint8 train ids. Raises KeyError if unknown or not committed, DamagedLabel if it has changed."""
        return self._labels[sample_id].read(sample_id, self._space)

    def crc32c(self, sample_id: str) -> int | None:
        """The checksum of the pixels as they were committed, None if nothing was."""
        stored = self._labels.get(sample_id)
        return None if stored is None else stored.crc32c

    def crop(self, sample_id: str, window: Window) -> Label:
        """(height, width) uint8 from the label of one sample. Raises KeyError, DamagedLabel, or IndexError outside."""
        stored, (top, left, height, width) = self._labels[sample_id], window
        if top < 0 or left < 0 or top + height > stored.height or left + width > stored.width:
            raise IndexError(
                f"crop {height} x {width} at ({top}, {left}) leaves the label of {sample_id!r},"
                f" which is {stored.height} x {stored.width}"
            )
        if stored.index is None:
            return stored.read(sample_id, self._space)[top : top + height, left : left + width]
        return read_zarr(stored.path, stored.index, window=window)

    def __iter__(self) -> Iterator[str]:
        return iter(self._labels)

    def __len__(self) -> int:
        return len(self._labels)


class RunConfidence(Mapping[str, tuple[Label, Label]]):
    """The teacher's top class (H, W) uint8 and its level of confidence (H, W) uint8, by sample id, as a run kept them.

    A level is the number of `edges` (ascending) that the softmax probability of the top class exceeds.
    """

    def __init__(self, top: RunLabels, levels: RunLabels, second: RunLabels, *, edges: Sequence[float]) -> None:
        self._top, self._levels, self._second, self.edges = top, levels, second, tuple(edges)

    def __getitem__(self, sample_id: str) -> tuple[Label, Label]:
        """Raises KeyError if unknown or not committed, DamagedLabel if it has changed."""
        return self._top[sample_id], self._levels[sample_id]

    def second(self, sample_id: str) -> Label | None:
        """The second class (H, W) uint8, 255 where people named one; None without polygons. Raises DamagedLabel."""
        return self._second.get(sample_id)

    def __iter__(self) -> Iterator[str]:
        return iter(self._top)

    def __len__(self) -> int:
        return len(self._top)


def middles(edges: Sequence[float]) -> NDArray[np.float64]:
    """The confidence in the middle of every level between ascending edges (L,); 0 and 1 are the outermost edges."""
    return np.array([(low + high) / 2 for low, high in pairwise((0.0, *edges, 1.0))])


def committed_labels(run: Path, layer: str) -> dict[str, StoredLabel]:
    """The places of a layer's committed maps, by sample id, from the records of a run folder. Raises BadTable."""
    schema = pa.schema([*_PLACE, pa.field(_checksum(layer), pa.uint32())])
    labels: dict[str, StoredLabel] = {}
    for commit in Ledger(run).values():
        commit, data = read_newest(commit)
        table = sealed_table(commit.path, data, schema.names)
        labels |= stored_labels(run, as_expected(commit.path, table, schema).to_pylist(), layer=layer)
    return labels


def _checksum(layer: str) -> str:
    return "label_crc32c" if layer == LABELS else f"{layer}_crc32c"
