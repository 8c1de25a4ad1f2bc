"""Label stores: hard labels on disk, written a whole unit at a time, read by sample or by crop.

Two kinds. *Zarr* (default): one Zarr v3 group `labels.zarr` with an array per size bucket, e.g. `b1024x2048` of shape
(n, 1024, 2048) uint8, fill value 255; a bucket's sides are multiples of 512, a label lies at the top left of its row.
One shard holds the labels of one unit; chunks are (1, 512, 512), zstd with checksums, so a flipped bit is an error
and never another class. Core codecs only: plain zarr reads it. *PNG*: one 8-bit grey file per sample under `labels/`.

What is committed is told by `units/*.parquet` alone, because a missing Zarr shard reads as 255 everywhere, and a file
that exists may belong to a unit that died.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from autolabel.manifests.classes import IGNORE, LabelSpace
from autolabel.manifests.files import sync_folder, write_bytes
from autolabel.manifests.images import BadImage, encode_label, read_label
from autolabel.manifests.tables import Sample

CHUNK = 512  # pixels, both ways; measured best for crops and size
ZARR = "labels.zarr"
PNG = "labels"
Label = NDArray[np.uint8]
Window = tuple[int, int, int, int]  # top, left, height, width


class DamagedLabel(RuntimeError):
    """A committed label cannot be read back as it was written."""


def bucket_of(height: int, width: int) -> str:
    """Name of the array that holds labels of this size: both sides rounded up to a multiple of 512."""
    return f"b{-(-height // CHUNK) * CHUNK}x{-(-width // CHUNK) * CHUNK}"


def _bucket_size(bucket: str) -> tuple[int, int]:
    height, width = bucket.removeprefix("b").split("x")
    return int(height), int(width)


def crc32c(label: Label) -> int:
    """Checksum of a label's pixels."""
    return int(google_crc32c.value(np.ascontiguousarray(label).tobytes()))


# --- Zarr -------------------------------------------------------------------------------------------------------------


def create_zarr(folder: Path, buckets: Mapping[str, int], shard: int, attributes: Mapping[str, Any]) -> None:
    """Create the group and one array per bucket (name -> rows) where they are not there yet."""
    import zarr
    from zarr.codecs import ZstdCodec

    group = zarr.open_group(folder, mode="a", zarr_format=3)
    group.attrs.update(dict(attributes))
    for bucket, rows in buckets.items():
        if bucket in group:
            group[bucket].resize((rows, *_bucket_size(bucket)))  # type: ignore[union-attr]
            continue
        group.create_array(
            bucket,
            shape=(rows, *_bucket_size(bucket)),
            shards=(shard, *_bucket_size(bucket)),
            chunks=(1, CHUNK, CHUNK),
            dtype="uint8",
            fill_value=IGNORE,
            compressors=[ZstdCodec(level=9, checksum=True)],
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=("sample", "y", "x"),
        )


def shard_path(array: Path, index: int) -> Path:
    """The file of one shard."""
    return array / f"c.{index}.0.0"


@dataclass(frozen=True)
class WrittenShard:
    """One shard as it now lies on disk. label_bytes: encoded size of each of its rows."""

    file: str
    bytes: int
    crc32c: int
    label_bytes: tuple[int, ...]


def write_zarr_shard(array: Path, first_row: int, labels: Sequence[Label | None]) -> WrittenShard:
    """Write consecutive rows that fill one shard, at once, and force them to disk; None leaves a row at 255."""
    import zarr

    # Empty chunks are written too, so that a shard without a file is always a loss and never "all ignored".
    # (open_array takes a config, but uses it only for an array that it creates.)
    target = zarr.open_array(array, mode="r+").with_config({"write_empty_chunks": True})
    shards = target.shards
    assert shards is not None and first_row % shards[0] == 0 and len(labels) <= shards[0]
    block = np.full((len(labels), *target.shape[1:]), IGNORE, np.uint8)
    for row, label in zip(block, labels, strict=True):
        if label is not None:
            row[: label.shape[0], : label.shape[1]] = label
    path = shard_path(array, first_row // shards[0])
    try:
        target[first_row : first_row + len(labels)] = block
    except ValueError:  # zarr merges with the shard that is there; if that is damaged, there is nothing to merge
        path.unlink(missing_ok=True)
        target[first_row : first_row + len(labels)] = block
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        data = file.read()
    sync_folder(array)
    # The shard ends in its index: (offset, length) uint64 of every chunk, then a crc32c.
    chunks = shards[0] * (shards[1] // CHUNK) * (shards[2] // CHUNK)
    index = np.frombuffer(data[-16 * chunks - 4 : -4], "<u8").reshape(shards[0], -1, 2)
    sizes = tuple(int(n) for n in index[: len(labels), :, 1].sum(axis=1))
    return WrittenShard(path.name, len(data), int(google_crc32c.value(data)), sizes)


@lru_cache(maxsize=64)
def _open_array(array: str, process: int, changed_ns: int) -> Any:
    """Opened once per process (an inherited store has threads that are gone) and version of its metadata."""
    import zarr

    return zarr.open_array(array, mode="r")


def read_zarr(array: Path, row: int, top: int, left: int, height: int, width: int) -> Label:
    """A crop (height, width) uint8 of one row. Raises DamagedLabel where the store cannot vouch for the pixels."""
    try:
        opened = _open_array(str(array), os.getpid(), (array / "zarr.json").stat().st_mtime_ns)
        shard = shard_path(array, row // opened.shards[0])
        if not shard.is_file():
            raise DamagedLabel(f"{shard} is missing: run `autolabel generate` again to restore it")
        return np.asarray(opened[row, top : top + height, left : left + width], dtype=np.uint8)
    except DamagedLabel:
        raise
    except Exception as error:  # zarr raises many kinds for damaged data
        raise DamagedLabel(f"{array} row {row}: {type(error).__name__}: {error}") from error


# --- PNG --------------------------------------------------------------------------------------------------------------


def png_name(image: str) -> str:
    """Relative path of a sample's PNG label, from the relative path of its image."""
    return str(Path(image).with_suffix(".png").as_posix())


def write_png(path: Path, label: Label) -> None:
    """Write one label, whole or not at all."""
    write_bytes(path, encode_label(label))


def read_png(path: Path, space: LabelSpace) -> Label:
    """Read one stored label of train ids. Raises DamagedLabel."""
    try:
        return read_label(path, space, "train")
    except (BadImage, OSError) as error:
        raise DamagedLabel(f"{path}: {error}") from error


# --- a whole run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredLabel:
    """Where one committed label lies: `index` is its row in a Zarr array, None for a PNG file."""

    path: Path
    index: int | None
    height: int
    width: int
    crc32c: int


class RunLabels(Mapping[str, Label]):
    """The committed labels of a run by sample id, whatever the store. Iterates over sample ids in the run's order."""

    def __init__(self, labels: dict[str, StoredLabel], space: LabelSpace) -> None:
        self._labels, self._space = labels, space

    def __getitem__(self, sample_id: str) -> Label:
        """(H, W) uint8 train ids. Raises KeyError if unknown or not committed, DamagedLabel if it has changed."""
        stored = self._labels[sample_id]
        return self._whole(sample_id, stored)

    def _whole(self, sample_id: str, stored: StoredLabel) -> Label:
        if stored.index is None:
            label = read_png(stored.path, self._space)
        else:
            label = read_zarr(stored.path, stored.index, 0, 0, stored.height, stored.width)
        if label.shape != (stored.height, stored.width) or crc32c(label) != stored.crc32c:
            raise DamagedLabel(f"label of {sample_id!r} in {stored.path} differs from what was committed")
        return label

    def crop(self, sample_id: str, top: int, left: int, height: int, width: int) -> Label:
        """(height, width) uint8 from the label of one sample. Raises KeyError, DamagedLabel, or IndexError outside."""
        stored = self._labels[sample_id]
        if top < 0 or left < 0 or top + height > stored.height or left + width > stored.width:
            raise IndexError(
                f"crop {height} x {width} at ({top}, {left}) leaves the label of {sample_id!r},"
                f" which is {stored.height} x {stored.width}"
            )
        if stored.index is None:
            return self._whole(sample_id, stored)[top : top + height, left : left + width]
        return read_zarr(stored.path, stored.index, top, left, height, width)

    def __iter__(self) -> Iterator[str]:
        return iter(self._labels)

    def __len__(self) -> int:
        return len(self._labels)


def open_labels(run: str | Path) -> RunLabels:
    """The committed labels of a run folder, finished or still being made. Raises FileNotFoundError, ValueError."""
    import json

    run = Path(run)
    about = run / "run.json"
    if not about.is_file():
        raise FileNotFoundError(f"{run} is not a run: it has no run.json; make one with `autolabel generate`")
    space = LabelSpace.from_json(json.dumps(json.loads(about.read_text(encoding="utf-8"))["label_space"]))
    columns = ["sample_id", "status", "label", "label_index", "height", "width", "label_crc32c"]
    labels: dict[str, StoredLabel] = {}
    for record in sorted((run / "units").glob("*.parquet")):
        for row in pq.read_table(record, columns=columns).to_pylist():
            if row["status"] == "labelled":
                labels[row["sample_id"]] = StoredLabel(
                    run / row["label"], row["label_index"], row["height"], row["width"], row["label_crc32c"]
                )
    return RunLabels(labels, space)


def read_sample_label(sample: Sample, space: LabelSpace, window: Window | None = None) -> Label:
    """A manifest sample's label as (h, w) uint8 train ids, whole or the crop `window` = (top, left, height, width).

    Raises ValueError if the sample has no label, BadImage or DamagedLabel if it cannot be read.
    """
    if sample.label is None:
        raise ValueError(f"sample {sample.sample_id!r} has no label")
    top, left, height, width = window or (0, 0, sample.height, sample.width)
    if sample.label_index is not None:
        return read_zarr(sample.label, sample.label_index, top, left, height, width)
    label = read_label(sample.label, space, sample.label_ids)
    if label.shape != (sample.height, sample.width):
        raise BadImage(
            f"{sample.label}: the label is {label.shape[1]} x {label.shape[0]} but its manifest says"
            f" {sample.width} x {sample.height}: scan again"
        )
    return label[top : top + height, left : left + width]
