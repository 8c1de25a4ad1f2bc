"""Label stores: hard labels on disk, written a whole unit at a time, read by sample or by crop.

A run that keeps the teacher's confidence has two more layers, stored just like the labels: `top`, the top class of
every pixel, and `confidence`, its level of confidence.

Two kinds. *Zarr* (default): one Zarr v3 group `labels.zarr` with an array per size bucket, e.g. `b1024x2048` of shape
(n, 1024, 2048) uint8, fill value 255; a bucket's sides are multiples of 512, a label lies at the top left of its row.
One shard holds the labels of one unit; chunks are (1, 512, 512), zstd with checksums, so a flipped bit is an error
and never another class. Core codecs only: plain zarr reads it. *PNG*: one 8-bit grey file per sample under `labels/`.

zarr-python makes the metadata. Shards are put together and read here: to write a label, zarr-python takes 1.4 times the
CPU of a PNG by Pillow with the zstd parameters that give 0.57 of its bytes, ours 1.0; to read a crop, seven times ours;
tensorstore 1.3 times ours, and it aborts in a forked worker once the parent has read. See benchmarks/store.py.

What is committed is told by `units/*.parquet` alone, because a missing Zarr shard reads as 255 everywhere, and a file
that exists may belong to a unit that died.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import numpy as np
import pyarrow.parquet as pq
import zstandard
from numpy.typing import NDArray

from autolabel.manifests.files import write_bytes
from autolabel.manifests.images import PNG_END, BadImage, decode_label, read_label
from autolabel.manifests.label_space import IGNORE, LabelSpace
from autolabel.manifests.tables import Sample

CHUNK = 512  # pixels, both ways; measured best for crops and size
LABELS, TOP, CONFIDENCE = LAYERS = ("labels", "top", "confidence")  # maps of bytes that a run may hold of an image
_LEFT_OUT = 2**64 - 1  # offset and size of a chunk that has no frame
Pixels = TypeVar("Pixels", int, NDArray[np.int64])
Label = NDArray[np.uint8]
Frames = tuple[bytes, ...]  # one label, encoded
Window = tuple[int, int, int, int]  # top, left, height, width


class DamagedLabel(RuntimeError):
    """A committed label cannot be read back as it was written."""


def zarr_folder(layer: str) -> str:
    """Where the maps of a layer lie in a run with a Zarr store; PNGs lie in a folder named as the layer."""
    return f"{layer}.zarr"


def whole_chunks(pixels: Pixels) -> Pixels:
    """Lengths in pixels, rounded up to a multiple of 512; one, or an array of them."""
    return -(-pixels // CHUNK) * CHUNK


def bucket_of(height: int, width: int) -> str:
    """Name of the array that holds labels of this size: both sides rounded up to a multiple of 512."""
    return f"b{whole_chunks(height)}x{whole_chunks(width)}"


def _bucket_size(bucket: str) -> tuple[int, int]:
    height, width = bucket.removeprefix("b").split("x")
    return int(height), int(width)


def crc32c(label: Label) -> int:
    """Checksum of a label's pixels."""
    return int(google_crc32c.value(np.ascontiguousarray(label).tobytes()))


# --- Zarr -------------------------------------------------------------------------------------------------------------


def create_zarr(folder: Path, buckets: Mapping[str, int], shard: int, attributes: Mapping[str, Any]) -> None:
    """Make the metadata of the group and of one array per bucket (name -> rows) what is asked; rows may grow later.

    shard: labels in a shard, attributes: JSON that the group carries. Shards that are there stay as they are.
    """
    metadata = _metadata(folder, buckets, shard, attributes)
    for path in _differing(metadata):
        write_bytes(path, metadata[path])


def damaged_metadata(folder: Path, buckets: Mapping[str, int], shard: int, attributes: Mapping[str, Any]) -> list[Path]:
    """The metadata files that are missing or differ from what `create_zarr` would write."""
    return _differing(_metadata(folder, buckets, shard, attributes))


def _metadata(folder: Path, buckets: Mapping[str, int], shard: int, attributes: Mapping[str, Any]) -> dict[Path, bytes]:
    import zarr
    from zarr.codecs import ZstdCodec
    from zarr.storage import MemoryStore

    made: dict[str, Any] = {}  # zarr writes here, so that the files can be written whole or not at all
    group = zarr.create_group(MemoryStore(made), attributes=dict(attributes))
    for bucket, rows in buckets.items():
        group.create_array(
            bucket,
            shape=(rows, *_bucket_size(bucket)),
            shards=(shard, *_bucket_size(bucket)),
            chunks=(1, CHUNK, CHUNK),
            dtype="uint8",
            fill_value=IGNORE,
            compressors=[ZstdCodec(level=9, checksum=True)],  # for whoever edits it with zarr; readers need no level
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=("sample", "y", "x"),
        )
    return {folder / name: data.to_bytes() for name, data in made.items()}


def _differing(metadata: Mapping[Path, bytes]) -> list[Path]:
    return [path for path, data in metadata.items() if not path.is_file() or path.read_bytes() != data]


def shard_path(array: Path, index: int) -> Path:
    """The file of one shard."""
    return array / f"c.{index}.0.0"


# Labels are long repeats: one step of search finds them, and a long target lets the parser take them whole. As small as
# zstd's level 19, in a tenth of its time.
_TUNED = zstandard.ZstdCompressionParameters(
    window_log=18,
    chain_log=10,
    hash_log=10,
    search_log=1,
    min_match=4,
    target_length=128,
    strategy=zstandard.STRATEGY_BTOPT,
    write_content_size=True,
    write_checksum=True,
)


def encode_zarr(label: Label) -> Frames:
    """The chunks of one label (H, W) uint8, row by row, each a zstd frame; b"" where all is ignored.

    The same label gives the same bytes. Releases the GIL while it compresses: call it from several threads.
    """
    compress = zstandard.ZstdCompressor(compression_params=_TUNED).compress  # to be used by one thread only

    def encoded(tile: Label) -> bytes:
        if tile.min() == IGNORE:
            return b""
        chunk = np.full((CHUNK, CHUNK), IGNORE, np.uint8)
        chunk[: tile.shape[0], : tile.shape[1]] = tile
        return compress(chunk.data)

    tops, lefts = (range(0, side, CHUNK) for side in label.shape)
    return tuple(encoded(label[y : y + CHUNK, x : x + CHUNK]) for y in tops for x in lefts)


@dataclass(frozen=True)
class WrittenShard:
    """One shard as it now lies on disk. label_bytes: encoded size of each of its rows."""

    file: str
    bytes: int
    crc32c: int
    label_bytes: tuple[int, ...]


def write_zarr_shard(array: Path, first_row: int, shard: int, labels: Sequence[Frames | None]) -> WrittenShard:
    """Write the shard of `shard` rows that starts at first_row, whole, over whatever is there; it is on disk then.

    labels: what `encode_zarr` made of its rows, None for one without a label; it and the rows that are left out are 255
    everywhere. The file is the frames of all labels, then its index: (offset, size) uint64 of every chunk, all bits set
    for one that is left out, and their crc32c. A shard without any frame is a file too, so that a missing one is always
    a loss and never "all ignored".
    """
    assert first_row % shard == 0 and len(labels) <= shard
    height, width = _bucket_size(array.name)
    sizes = np.zeros((shard, height // CHUNK * (width // CHUNK)), "<u8")
    for row, frames in zip(sizes, labels, strict=False):
        if frames is not None:
            if len(frames) != len(row):
                raise ValueError(f"a label of {len(frames)} chunks is not one of {array.name}, which have {len(row)}")
            row[:] = [len(frame) for frame in frames]
    ends = sizes.cumsum().reshape(sizes.shape)
    index = np.stack([ends - sizes, sizes], axis=-1)
    index[sizes == 0] = _LEFT_OUT
    body = b"".join(frame for frames in labels if frames for frame in frames)
    data = body + index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    path = shard_path(array, first_row // shard)
    write_bytes(path, data)
    by_row = tuple(int(size) for size in sizes[: len(labels)].sum(axis=1))
    return WrittenShard(path.name, len(data), int(google_crc32c.value(data)), by_row)


def read_zarr(array: Path, row: int, top: int, left: int, height: int, width: int) -> Label:
    """A crop (height, width) uint8 of one row. Raises DamagedLabel where the store cannot vouch for the pixels.

    No descriptor, lock or thread outlives a read, so workers may be forked at any time.
    """
    try:
        return _read(array, row, top, left, height, width)
    except (OSError, ArithmeticError, LookupError, TypeError, ValueError, zstandard.ZstdError) as error:
        raise DamagedLabel(f"{array} row {row}: {type(error).__name__}: {error}") from error


def _read(array: Path, row: int, top: int, left: int, height: int, width: int) -> Label:
    metadata = array / "zarr.json"
    rows, shard = _rows(metadata, _identity(metadata.stat()))
    tall, wide = _bucket_size(array.name)
    if not (0 <= row < rows and 0 <= top <= top + height <= tall and 0 <= left <= left + width <= wide):
        raise IndexError(f"{height} x {width} at ({top}, {left}) leaves the array of {rows} x {tall} x {wide}")
    path = shard_path(array, row // shard)
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise DamagedLabel(f"{path} is missing: run `autolabel generate` again to restore it") from None
    ys, xs = (range(a // CHUNK, -(-(a + n) // CHUNK)) for a, n in ((top, height), (left, width)))
    try:
        index = _shard_index(path, file, (shard, tall // CHUNK, wide // CHUNK))
        entries = index[row % shard, ys.start : ys.stop, xs.start : xs.stop].reshape(-1, 2).tolist()
        frames = [(offset, offset + size) for offset, size in entries if offset != _LEFT_OUT]
        start, end = min(frames, default=(0, 0))[0], max(frames, default=(0, 0))[1]
        data = os.pread(file, end - start, start)  # the frames of a label lie next to each other
    finally:
        os.close(file)
    crop = np.empty((height, width), np.uint8)
    for (y, x), (offset, size) in zip(product(ys, xs), entries, strict=True):
        up, left_of = y * CHUNK - top, x * CHUNK - left  # the chunk's corner, seen from the crop's
        part = crop[max(0, up) : up + CHUNK, max(0, left_of) : left_of + CHUNK]
        if offset == _LEFT_OUT:
            part[:] = IGNORE
        else:
            chunk = _decoded(data[offset - start : offset - start + size])
            part[:] = chunk[max(0, -up) : height - up, max(0, -left_of) : width - left_of]
    return crop


class _Decoder(threading.local):
    """zstd's memory, one for every thread."""

    def __init__(self) -> None:
        self.decompress = zstandard.ZstdDecompressor().decompress


_decoder = _Decoder()


def _decoded(frame: bytes) -> Label:
    if zstandard.frame_content_size(frame) != CHUNK * CHUNK:  # asked before that much memory is taken
        raise ValueError("a chunk of another size")
    # A flipped bit may say that there is no checksum; the checksum is extra data then.
    return np.frombuffer(_decoder.decompress(frame, allow_extra_data=False), np.uint8).reshape(CHUNK, CHUNK)


def _identity(found: os.stat_result) -> tuple[int, ...]:
    """Differs for every version of a file."""
    return found.st_size, found.st_ino, found.st_mtime_ns


@lru_cache(maxsize=64)
def _rows(metadata: Path, identity: tuple[int, ...]) -> tuple[int, int]:
    """Rows of an array and of each of its shards; read once for every version of its metadata."""
    about = json.loads(metadata.read_bytes())
    return about["shape"][0], about["chunk_grid"]["configuration"]["chunk_shape"][0]


_INDICES = 1024  # indices of shards kept in memory: for 64 labels of 1024 x 2048, 8 KiB each
_indices: dict[Path, tuple[tuple[int, ...], NDArray[np.uint64]]] = {}


def _shard_index(path: Path, file: int, shape: tuple[int, int, int]) -> NDArray[np.uint64]:
    """(offset, size) of every chunk of an open shard, (rows, down, across, 2); read once for every version of it."""
    size, *others = _identity(os.fstat(file))
    identity = (size, *others, *shape)
    known = _indices.get(path)
    if known is None or known[0] != identity:
        length = 16 * math.prod(shape) + 4
        data = os.pread(file, length, max(0, size - length))
        if len(data) != length or google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise DamagedLabel(f"{path}: its index is damaged")
        known = identity, np.frombuffer(data[:-4], "<u8").reshape(*shape, 2)
        if len(_indices) >= _INDICES:
            _indices.clear()
        _indices[path] = known
    return known[1]


# --- PNG --------------------------------------------------------------------------------------------------------------


def png_name(image: str) -> str:
    """Relative path of a sample's PNG label, from the relative path of its image."""
    return str(Path(image).with_suffix(".png").as_posix())


def read_png(path: Path, space: LabelSpace | None = None) -> Label:
    """Read one stored label of train ids; without a label space, bytes of any meaning. Raises DamagedLabel."""
    try:
        data = path.read_bytes()
        if not data.endswith(PNG_END):  # Pillow does not look at it
            raise BadImage("damaged or truncated: its end is missing")
        return decode_label(data, space, "train")
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


def in_layer(label: str, layer: str) -> str:
    """Where a map of a layer lies, from the place of the label: "labels.zarr/b512x512" or "labels/a/b.png"."""
    return layer + label.removeprefix(LABELS)


class RunLabels(Mapping[str, Label]):
    """The committed labels of a run by sample id, whatever the store. Iterates over sample ids in the run's order."""

    def __init__(self, labels: dict[str, StoredLabel], space: LabelSpace | None) -> None:
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
    about = _about(Path(run))
    return RunLabels(_committed(Path(run), LABELS), LabelSpace.of(about["label_space"]))


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


def open_confidence(run: str | Path) -> RunConfidence:
    """What a run has kept of its teacher's confidence. Raises FileNotFoundError, and ValueError if that is nothing."""
    edges = _about(Path(run))["confidence_edges"]
    if edges is None:
        raise ValueError(f"{run} has kept no confidence: generate with --keep-confidence 8 does")
    top, levels = (RunLabels(_committed(Path(run), layer), None) for layer in (TOP, CONFIDENCE))
    return RunConfidence(top, levels, edges)


def _about(run: Path) -> dict[str, Any]:
    path = run / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run} is not a run: it has no run.json; make one with `autolabel generate`")
    return dict(json.loads(path.read_text(encoding="utf-8")))


_PLACED = ["sample_id", "status", "label", "label_index", "height", "width"]


def _committed(run: Path, layer: str) -> dict[str, StoredLabel]:
    columns = [*_PLACED, "label_crc32c" if layer == LABELS else f"{layer}_crc32c"]
    labels: dict[str, StoredLabel] = {}
    for record in sorted((run / "units").glob("*.parquet")):
        labels |= stored_labels(run, pq.read_table(record, columns=columns).to_pylist(), layer)
    return labels


def run_of(label: Path) -> Path | None:
    """The run in whose folder a label lies, if it lies in one."""
    return next((folder for folder in label.parents if (folder / "run.json").is_file()), None)


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
        run = run_of(sample.label)
        if run is None:
            raise
        reason = f"{sample.label}: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise DamagedLabel(
            f"sample {sample.sample_id!r} of run {run}: {reason}; `autolabel verify {run} --repair` finds all that is"
            " damaged, for `autolabel generate` to make it again"
        ) from error


def _sample_label(sample: Sample, path: Path, space: LabelSpace, window: Window) -> Label:
    top, left, height, width = window
    if sample.label_index is not None:
        return read_zarr(path, sample.label_index, top, left, height, width)
    label = read_label(path, space, sample.label_ids)
    if label.shape != (sample.height, sample.width):
        raise BadImage(
            f"{path}: the label is {label.shape[1]} x {label.shape[0]} but its manifest says"
            f" {sample.width} x {sample.height}: scan again"
        )
    return label[top : top + height, left : left + width]
