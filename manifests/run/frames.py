"""Labels of a Zarr store read: whole or by crop, from a disk or a bucket, in one range.

What is remembered of a store, the sizes of its arrays and the indices of its shards, is bounded and belongs to one
version of each shard. So a crop costs one request once its shard is known; a shard's first one costs two more, and an
array's first one another.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zstandard
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.documents import read_json, shaped
from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.run.shards import CHUNK, NO_FRAME, DamagedLabel, Label, Window, bucket_size, shard_path
from autolabel.manifests.wording import kind_and_reason


@dataclass(frozen=True)
class ZarrLabel:
    """A label as it is stored, read but not decoded: all of it, or the chunks of a window.

    size: height and width of its row. tops, lefts: the chunks at hand, counted down and across. entries: (offset, size)
    of each, all bits set for one in which all is ignored. data: their frames, which begin at `start` of the shard.
    """

    name: str
    size: tuple[int, int]
    tops: range
    lefts: range
    entries: tuple[tuple[int, int], ...]
    start: int
    data: bytes

    def crop(self, window: Window) -> Label:
        """Decode a window whose chunks are at hand: (height, width) uint8. Raises DamagedLabel."""
        with _damaged(self.name):
            top, left, height, width = window
            ys, xs = _chunks(window, self.size)
            by_chunk = dict(zip(product(self.tops, self.lefts), self.entries, strict=True))
            crop = np.empty((height, width), np.uint8)
            for y, x in product(ys, xs):
                offset, size = by_chunk[y, x]
                up, left_of = y * CHUNK - top, x * CHUNK - left  # the chunk's corner, relative to the crop's
                part = crop[max(0, up) : up + CHUNK, max(0, left_of) : left_of + CHUNK]
                if offset == NO_FRAME:
                    part[:] = IGNORE
                else:
                    chunk = _decoded(self.data[offset - self.start : offset - self.start + size])
                    part[:] = chunk[max(0, -up) : height - up, max(0, -left_of) : width - left_of]
            return crop


def read_zarr(array: Path, row: int, *, window: Window) -> Label:
    """Read a crop (height, width) uint8 of one row. Raises DamagedLabel unless the store vouches for every pixel."""
    return fetch_zarr(array, row, window=window).crop(window)


def fetch_zarr(array: Path, row: int, *, window: Window | None = None) -> ZarrLabel:
    """Read the frames of one row in one range, of all its chunks or those of a window. Raises DamagedLabel.

    The index of a shard is read once and remembered, of many shards; so is its version, and a range of another version
    is refused by the storage. Then all is read again: frames never meet the index of another version. No descriptor,
    lock or thread outlives a read, so workers may be forked at any time.
    """
    with _damaged(f"{array} row {row}"):
        try:
            return _fetch(array, row, window)
        except (storage.ChangedFile, FileNotFoundError, IndexError, DamagedLabel):  # what was remembered may be old
            _forget(array, row)
            return _fetch(array, row, window)


@contextlib.contextmanager
def _damaged(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ArithmeticError, LookupError, TypeError, ValueError, zstandard.ZstdError) as error:
        raise DamagedLabel(f"{name}: {kind_and_reason(error)}") from error


def _fetch(array: Path, row: int, window: Window | None) -> ZarrLabel:
    rows, shard_rows = _rows(array)
    size = tall, wide = bucket_size(array.name)
    if not 0 <= row < rows:
        raise IndexError(f"row {row} leaves the array of {rows}")
    ys, xs = _chunks(window or (0, 0, tall, wide), size)
    path = shard_path(array, row // shard_rows)
    version, index = _shard_index(path, (shard_rows, tall // CHUNK, wide // CHUNK))
    here = index[row % shard_rows, ys.start : ys.stop, xs.start : xs.stop].reshape(-1, 2).tolist()
    entries = tuple((offset, length) for offset, length in here)
    frames = [(offset, offset + length) for offset, length in entries if offset != NO_FRAME]
    if frames:
        start, end = min(frames)[0], max(frames)[1]
        data = storage.read_range(path, start, end - start, unchanged=version)  # a label's frames lie side by side
    else:
        start, data = 0, b""
        if storage.stat(path) != version:
            raise storage.ChangedFile(f"{path} has changed while it was read")
    return ZarrLabel(f"{array} row {row}", size, ys, xs, entries, start, data)


def _chunks(window: Window, size: tuple[int, int]) -> tuple[range, range]:
    """The chunks that a window touches, down and across. Raises IndexError if it leaves the row."""
    top, left, height, width = window
    if not (0 <= top <= top + height <= size[0] and 0 <= left <= left + width <= size[1]):
        raise IndexError(f"{height} x {width} at ({top}, {left}) leaves the array of {size[0]} x {size[1]}")
    down, across = (range(a // CHUNK, -(-(a + n) // CHUNK)) for a, n in ((top, height), (left, width)))
    return down, across


class _Decoder(threading.local):
    """A zstd decompressor of its own for every thread."""

    def __init__(self) -> None:
        self.decompress = zstandard.ZstdDecompressor().decompress


_decoder = _Decoder()


def _decoded(frame: bytes) -> Label:
    if zstandard.frame_content_size(frame) != CHUNK * CHUNK:  # checked before that much memory is taken
        raise ValueError("a chunk of another size")
    # A flipped bit may say that there is no checksum: the checksum is extra data then, and refused.
    return np.frombuffer(_decoder.decompress(frame, allow_extra_data=False), np.uint8).reshape(CHUNK, CHUNK)


_INDEX_BYTES = 32 << 20  # of indices that stay in memory: those of 4,096 shards of 64 labels of 1024 x 2048
_ARRAYS = 64  # arrays whose metadata stay in memory
_indices: dict[Path, tuple[storage.Stat, NDArray[np.uint64]]] = {}
_arrays: dict[Path, tuple[int, int]] = {}


def _rows(array: Path) -> tuple[int, int]:
    """Rows of an array and of each of its shards; read once."""
    if array not in _arrays:
        metadata = array / "zarr.json"
        content = read_json(metadata, dict[str, Any])
        chunks = content["chunk_grid"]["configuration"]["chunk_shape"]
        rows, shard_rows = (shaped(int, sizes[0], f"a size in {metadata}") for sizes in (content["shape"], chunks))
        _make_room(_arrays, _ARRAYS)
        _arrays[array] = rows, shard_rows
    return _arrays[array]


def _shard_index(path: Path, shape: tuple[int, int, int]) -> tuple[storage.Stat, NDArray[np.uint64]]:
    """The version of a shard, and (offset, size) of each of its chunks, (rows, down, across, 2); read once."""
    known = _indices.get(path)
    if known is not None and known[1].shape[:3] == shape:
        return known
    version = storage.stat(path)
    if version is None:
        raise DamagedLabel(f"{path} is missing: run `autolabel generate` again to restore it")
    length = 16 * math.prod(shape) + 4
    data = storage.read_range(path, max(0, version.size - length), length, unchanged=version)
    if len(data) != length or google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise DamagedLabel(f"{path}: its index is damaged")
    index = np.frombuffer(data[:-4], "<u8").reshape(*shape, 2)
    _make_room(_indices, _INDEX_BYTES // index.nbytes)
    _indices[path] = version, index
    return version, index


def _make_room(cache: dict[Path, Any], most: int) -> None:
    """Forget the older half of what is remembered, once it is as much as that."""
    if len(cache) >= most:
        for path in list(cache)[: -(-len(cache) // 2)]:  # without a lock: a fork would keep it locked
            cache.pop(path, None)


def _forget(array: Path, row: int) -> None:
    """Forget what is remembered of an array, and of the shard that holds a row of it."""
    known = _arrays.pop(array, None)
    if known is not None:
        _indices.pop(shard_path(array, row // known[1]), None)
