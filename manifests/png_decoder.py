"""PNGs decoded in half of Pillow's time, to the same pixels, where the extra `fast` is installed.

zlib-ng inflates the rows; its inflate is the one in Pillow's own wheels, and refuses the same streams. kornia-rs undoes
the filters of the rows. A band of rows goes through both while it lies in a core's cache: it is handed over as a small
uncompressed PNG, whose first row is the last one of the band before.

Only a plain 8-bit PNG that is right to its last byte is decoded here. Anything else is left to Pillow, so that Pillow
alone refuses files.
"""

from __future__ import annotations

import functools
import importlib
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests import notes
from autolabel.manifests.headers import PNG_SIGNATURE, Crc, Header, png_chunks
from autolabel.manifests.wording import reason

Pixels = NDArray[np.uint8]

_CHANNELS = {"RGB": 3, "L": 1, "P": 1}  # of a palette, the indices are decoded
_BAND = 256 << 10  # bytes of filtered rows that go through both libraries at once; more would leave the cache
_PIECE = 1 << 18  # bytes of the file that are inflated at once; chunks are often smaller, and each call costs
_STORED = 0xFFFF  # bytes of an uncompressed block of deflate, at most
_LARGE = 1 << 20  # pixels from which on it is worth saying that the extra is missing
_PILLOW = "PNG images are decoded by Pillow"
_MISSING = f"{_PILLOW}, in twice the time that they take with: pip install 'autolabel[fast]'"


class _Unusual(Exception):
    """The file is not the plain and whole PNG that this decoder knows."""


@dataclass(frozen=True)
class _Libraries:
    zlib_ng: Any  # the module zlib_ng.zlib_ng
    unfilter: Any  # (bytes of a PNG, (height, width), "rgb" or "mono") -> (height, width, channels) uint8


def decode_png(
    data: bytes, header: Header, by_pillow: Callable[[bytes], Pixels], *, rows: int | None = None
) -> Pixels | None:
    """The pixels of a PNG as stored: (H, W, 3) uint8 of RGB, (H, W) of grey values or indices of a palette.

    rows: how many of the upper rows are needed, None for all. What lies below them is not inflated.
    by_pillow: the reference, which decodes a PNG; the libraries have to agree with it on two small ones.
    Return None where Pillow is to decode the file: without the libraries, or because it is unusual or wrong. A note
    says once why the libraries are not used. Raises BadImage for damage that chunks show.
    """
    if header.format != "PNG" or header.bits != 8 or header.mode not in _CHANNELS or any(data[26:29]):
        return None
    libraries = _libraries(by_pillow)
    if isinstance(libraries, str):
        if libraries != _MISSING or header.width * header.height >= _LARGE:
            notes.tell(libraries)
        return None
    try:
        return _decode(data, header, libraries, rows=min(rows or header.height, header.height))
    except _Unusual:
        return None


# --- libraries --------------------------------------------------------------------------------------------------------


@functools.cache
def _libraries(by_pillow: Callable[[bytes], Pixels]) -> _Libraries | str:
    """The libraries, or the note that says why they are not used."""
    modules: list[ModuleType] = []
    for package, module in (("kornia-rs", "kornia_rs"), ("zlib-ng", "zlib_ng.zlib_ng")):
        try:
            modules.append(importlib.import_module(module))
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and str(error.name) in module:
                return _MISSING
            return f"{_PILLOW}, because {package} cannot be loaded: {reason(error)}"
    kornia, zlib_ng = modules
    versions = " and ".join(f"{m.__name__.partition('.')[0]} {getattr(m, '__version__', '?')}" for m in modules)
    try:
        libraries = _Libraries(zlib_ng, kornia.io.decode_image_png_u8)
        for header, data in _probes():
            if not np.array_equal(_decode(data, header, libraries, rows=header.height, band=40), by_pillow(data)):
                return f"{_PILLOW}, because {versions} decode a small one otherwise"
    except Exception as error:
        return f"{_PILLOW}, because {versions} fail at a small one: {reason(error.__cause__ or error)}"
    return libraries


def _probes() -> Iterator[tuple[Header, bytes]]:
    """Two PNGs of ten rows, with all filters, in bands of few rows."""
    for mode, kind, channels in (("RGB", 2, 3), ("L", 0, 1)):
        header = Header("PNG", 7, 10, mode)
        filtered = b"".join(
            bytes([y % 5, *((y * y + x * x * 7 + x * y * 31) % 251 for x in range(7 * channels))]) for y in range(10)
        )
        chunks = (
            (b"IHDR", struct.pack(">IIBBBBB", 7, 10, 8, kind, 0, 0, 0)),
            (b"IDAT", zlib.compress(filtered)),
            (b"IEND", b""),
        )
        yield header, PNG_SIGNATURE + b"".join(_chunk(zlib.crc32, name, data) for name, data in chunks)


# --- decoding ---------------------------------------------------------------------------------------------------------


def _decode(data: bytes, header: Header, libraries: _Libraries, *, rows: int, band: int = _BAND) -> Pixels:
    """The first `rows` rows. Raises _Unusual, and BadImage for damage that chunks show."""
    channels = _CHANNELS[header.mode]
    length = 1 + header.width * channels
    stream = _Stream(_compressed(data, header, libraries.zlib_ng.crc32), libraries.zlib_ng)
    pixels = np.empty((rows, header.width, channels), np.uint8)
    above = bytes(length)  # a row of zeros without a filter: what the first row's filter sees
    for top in range(0, rows, max(1, band // length)):
        count = min(max(1, band // length), rows - top)
        png = _uncompressed(libraries.zlib_ng, header.width, channels, [above, *stream.read(count * length)])
        try:
            unfiltered = libraries.unfilter(png, (count + 1, header.width), "rgb" if channels == 3 else "mono")
        except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
            raise
        except BaseException as error:  # a panic of Rust is no Exception
            raise _Unusual from error
        if unfiltered.shape != (count + 1, header.width, channels) or unfiltered.dtype != np.uint8:
            raise _Unusual("it gives other rows than were asked for")
        pixels[top : top + count] = unfiltered[1:]
        above = b"\0" + unfiltered[count].tobytes()
    if rows == header.height:
        stream.require_end()
    return pixels if channels == 3 else pixels[..., 0]


def _compressed(data: bytes, header: Header, crc32: Crc) -> bytes:
    """The compressed bytes of all pixels. Raises _Unusual for chunks in another order than usual."""
    *chunks, _ = png_chunks(data, crc32)
    if header.mode == "P":
        name, start, end = chunks.pop(0)
        if name != b"PLTE" or not 3 <= end - start - 12 <= 768 or (end - start) % 3:
            raise _Unusual
    if any(name != b"IDAT" or end - start == 12 for name, start, end in chunks):
        raise _Unusual
    return b"".join([memoryview(data)[start + 8 : end - 4] for _, start, end in chunks])


class _Stream:
    """A zlib stream, inflated piece by piece."""

    def __init__(self, compressed: bytes, zlib_ng: Any) -> None:
        self._pieces = (memoryview(compressed)[i : i + _PIECE] for i in range(0, len(compressed), _PIECE))
        self._error = zlib_ng.error
        self._inflate = zlib_ng.decompressobj()

    def read(self, count: int) -> list[bytes]:
        """The next `count` bytes, in pieces. Raises _Unusual if there are fewer, or none can be made out."""
        inflated = list[bytes]()
        while count:
            inflated.append(self._next(count))
            count -= len(inflated[-1])
        return inflated

    def require_end(self) -> None:
        """Raise _Unusual unless everything has been read, the checksum is right, and nothing follows."""
        while not self._inflate.eof:
            if self._next(1):
                raise _Unusual
        if self._inflate.unused_data or next(self._pieces, None) is not None:
            raise _Unusual

    def _next(self, most: int) -> bytes:
        compressed = self._inflate.unconsumed_tail or next(self._pieces, None)
        if compressed is None or self._inflate.eof:
            raise _Unusual
        try:
            inflated: bytes = self._inflate.decompress(compressed, most)
        except self._error as error:
            raise _Unusual from error
        return inflated


def _uncompressed(zlib_ng: Any, width: int, channels: int, pieces: list[bytes]) -> bytes:
    """A PNG of these filtered rows, uncompressed."""
    parts: list[bytes | memoryview] = [b"IDAT\x78\x01"]
    for piece in pieces:
        for place in range(0, len(piece), _STORED):
            block = memoryview(piece)[place : place + _STORED]
            parts += [struct.pack("<BHH", 0, len(block), len(block) ^ _STORED), block]
    parts.append(b"\1\0\0\xff\xff\0\0\0\0")  # an empty last block, and no checksum: the library asks for none
    checksum = 0
    for part in parts:
        checksum = zlib_ng.crc32(part, checksum)
    header = struct.pack(
        ">IIBBBBB", width, sum(map(len, pieces)) // (1 + width * channels), 8, 2 if channels == 3 else 0, 0, 0, 0
    )
    return b"".join(
        (
            PNG_SIGNATURE, _chunk(zlib_ng.crc32, b"IHDR", header), struct.pack(">I", sum(map(len, parts)) - 4), *parts,
            struct.pack(">I", checksum), _chunk(zlib_ng.crc32, b"IEND", b""),
        )
    )  # fmt: skip


def _chunk(crc32: Crc, name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc32(name + data))
