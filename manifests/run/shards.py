"""Shards: labels in a Zarr store, written a whole unit at a time; manifests/run/frames.py reads them.

A store is one Zarr v3 group with an array per size bucket, such as `b1024x2048` of shape (n, 1024, 2048) uint8 with
fill value 255. A bucket's sides are multiples of 512; a label lies at the top left of its row. One shard holds the
labels of one unit. Chunks are (1, 512, 512), zstd with checksums, so that a flipped bit is an error and never another
class. The codecs are Zarr's core codecs: plain zarr reads the store.

zarr-python makes the metadata; the shards are put together here. Writing a label takes zarr-python 1.4 times the CPU of
a PNG by Pillow with the zstd parameters that give 0.57 of its bytes; it takes ours 1.0 times. Reading a crop takes
zarr-python seven times as long as ours, and tensorstore 1.3 times as long; tensorstore also aborts in a forked worker
once the parent has read. benchmarks/store.py has these measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import numpy as np
import zstandard
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.label_space import IGNORE

CHUNK = 512  # pixels, both ways; measured best for crops and size
NO_FRAME = 2**64 - 1  # offset and size of a chunk in which all is ignored
Pixels = TypeVar("Pixels", int, NDArray[np.int64])
Label = NDArray[np.uint8]
Frames = tuple[bytes, ...]  # one label, encoded
Window = tuple[int, int, int, int]  # top, left, height, width


class DamagedLabel(RuntimeError):
    """A committed label cannot be read back as it was written."""


def whole_chunks(pixels: Pixels) -> Pixels:
    """Round a length in pixels, or an array of lengths, up to multiples of 512."""
    return -(-pixels // CHUNK) * CHUNK


def bucket_of(height: int, width: int) -> str:
    """Name of the array that holds labels of this size: both sides rounded up to a multiple of 512."""
    return f"b{whole_chunks(height)}x{whole_chunks(width)}"


def bucket_size(bucket: str) -> tuple[int, int]:
    """Height and width of the rows of an array, from its name."""
    height, width = bucket.removeprefix("b").split("x")
    return int(height), int(width)


def crc32c(label: Label) -> int:
    """Checksum of a label's pixels."""
    return int(google_crc32c.value(np.ascontiguousarray(label).tobytes()))


def create_zarr(folder: Path, buckets: Mapping[str, int], *, shard_rows: int, attributes: Mapping[str, Any]) -> None:
    """Write the metadata of a group and of its arrays. Metadata that is right and all shards stay as they are.

    buckets: the rows of every array, by its name; they may grow later. shard_rows: labels in a shard. attributes: JSON
    that the group carries.
    """
    metadata = _metadata(folder, buckets, shard_rows, attributes)
    for path in _differing(metadata):
        storage.write(path, metadata[path])


def damaged_metadata(
    folder: Path, buckets: Mapping[str, int], *, shard_rows: int, attributes: Mapping[str, Any]
) -> list[Path]:
    """The metadata files that are missing, or that `create_zarr` would write anew; parameters as there."""
    return _differing(_metadata(folder, buckets, shard_rows, attributes))


def _metadata(
    folder: Path, buckets: Mapping[str, int], shard_rows: int, attributes: Mapping[str, Any]
) -> dict[Path, bytes]:
    import zarr
    from zarr.codecs import ZstdCodec
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}  # zarr writes here, so that the files can be written whole or not at all
    group = zarr.create_group(MemoryStore(files), attributes=dict(attributes))
    for bucket, rows in buckets.items():
        group.create_array(
            bucket,
            shape=(rows, *bucket_size(bucket)),
            shards=(shard_rows, *bucket_size(bucket)),
            chunks=(1, CHUNK, CHUNK),
            dtype="uint8",
            fill_value=IGNORE,
            compressors=[ZstdCodec(level=9, checksum=True)],  # zarr would write with this level; readers need none
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=("sample", "y", "x"),
        )
    return {folder / name: data.to_bytes() for name, data in files.items()}


def _differing(metadata: Mapping[Path, bytes]) -> list[Path]:
    return [path for path, data in metadata.items() if storage.stat(path) is None or storage.read(path) != data]


def shard_path(array: Path, index: int) -> Path:
    """The file of one shard."""
    return array / f"c.{index}.0.0"


# Labels are long repeats: one step of search finds them, and a long target lets the parser take them whole. The result
# is as small as that of zstd's level 19, in a tenth of its time.
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
    """Encode the chunks of one label (H, W) uint8, row by row: each is a zstd frame, or b"" if all of it is ignored.

    The same label gives the same bytes. Compression releases the GIL, so several threads may encode at once.
    """
    compress = zstandard.ZstdCompressor(compression_params=_TUNED).compress  # serves one thread only

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
    """One shard on disk: its file's name, size and checksum, and the encoded size of each of its rows."""

    file: str
    bytes: int
    crc32c: int
    label_bytes: tuple[int, ...]


def zarr_shard(
    array: Path, first_row: int, *, shard_rows: int, labels: Sequence[Frames | None]
) -> tuple[WrittenShard, bytes]:
    """Put together the shard of `shard` rows that starts at first_row: what it is on disk, and its bytes.

    labels: the result of `encode_zarr` for its rows, None for a row without a label. Such rows, and those beyond the
    last label, read as 255 everywhere. The file holds the frames of all labels, then the index: (offset, size) uint64
    of every chunk, all bits set for a chunk without a frame, and the crc32c of these. A shard without any frame is a
    file too, so that a missing file is always a loss and never "all ignored". The same labels give the same bytes.
    """
    assert first_row % shard_rows == 0 and len(labels) <= shard_rows
    height, width = bucket_size(array.name)
    sizes = np.zeros((shard_rows, height // CHUNK * (width // CHUNK)), "<u8")
    for row, frames in zip(sizes, labels, strict=False):
        if frames is not None:
            if len(frames) != len(row):
                raise ValueError(f"a label of {len(frames)} chunks is not one of {array.name}, which have {len(row)}")
            row[:] = [len(frame) for frame in frames]
    ends = sizes.cumsum().reshape(sizes.shape)
    index = np.stack([ends - sizes, sizes], axis=-1)
    index[sizes == 0] = NO_FRAME
    body = b"".join(frame for frames in labels if frames for frame in frames)
    data = body + index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    by_row = tuple(int(size) for size in sizes[: len(labels)].sum(axis=1))
    name = shard_path(array, first_row // shard_rows).name
    return WrittenShard(name, len(data), int(google_crc32c.value(data)), by_row), data


def write_zarr_shard(array: Path, first_row: int, *, shard_rows: int, labels: Sequence[Frames | None]) -> WrittenShard:
    """Write a shard, whole, over whatever is there; parameters as of `zarr_shard`."""
    shard, data = zarr_shard(array, first_row, shard_rows=shard_rows, labels=labels)
    storage.write(array / shard.file, data)
    return shard
