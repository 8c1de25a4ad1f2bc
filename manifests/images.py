"""Decode photographs and label maps, strictly: a file that is not exactly understood is refused with the reason.

A silent conversion (16 bits clipped to 8, a palette taken for colours) would give wrong labels that look right.
"""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from autolabel.manifests import storage
from autolabel.manifests.colours import train_ids_of
from autolabel.manifests.headers import PNG_SIGNATURE, BadImage, Header, pixels_only, read_header
from autolabel.manifests.label_space import IGNORE, VOID, Colour, LabelSpace
from autolabel.manifests.orientation import UPRIGHT
from autolabel.manifests.png_decoder import decode_png
from autolabel.manifests.wording import reason

__all__ = ["BadImage"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".bmp", ".tif", ".tiff")
LABEL_SUFFIXES = (".png",)
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_MANY = 1 << 18  # pixels from which on values are counted in pairs, in 40 % of the time
_UP = 2  # the PNG filter that subtracts the row above
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_ADVICE = {
    "L": "it may be a label; save a photograph as RGB, or as a grey JPEG",
    "P": "it may be a label; save a photograph as RGB",
    "CMYK": "its colours depend on a printer; save it as RGB",
}

Size = tuple[int, int]  # height, width


class UnknownIds(BadImage):
    """A label holds ids that its label space does not know."""

    def __init__(self, message: str, ids: Sequence[int]) -> None:
        super().__init__(message)
        self.ids = frozenset(ids)


# Pillow warns of what it can live with. A warning would reach the terminal as a line of Python source.
warnings.filterwarnings("ignore", module=r"PIL\.")


# --- photographs ------------------------------------------------------------------------------------------------------


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Decode a photograph: (H, W, 3) uint8 RGB, EXIF orientation applied. Raises BadImage; see `photograph_header`."""
    header = photograph_header(io.BytesIO(data))
    pixels = decode_png(data, header, _by_pillow) if header.orientation == UPRIGHT else None
    return np.asarray(_as_rgb(_decode(data, header))) if pixels is None else pixels


def decode_picture(data: bytes, shrink: float = 1, *, rows: int | None = None) -> tuple[Image.Image, int]:
    """Decode a photograph as a Pillow image in RGB. Return it and the factor by which it is smaller than the file's.

    The factor is 1, 2, 4 or 8, at most `shrink`. Only an upright JPEG can be decoded smaller, in half of the time or
    less: the decoder leaves out the fine parts of its blocks. Pixel (i, j) then stands for the square of the file's
    pixels that begins at (k i, k j). rows: how many of the upper rows are needed; an upright PNG may be returned
    without the others. Raises BadImage.
    """
    header = photograph_header(io.BytesIO(data))
    pixels = decode_png(data, header, _by_pillow, rows=rows if header.orientation == UPRIGHT else None)
    if pixels is not None:
        return _upright(Image.fromarray(pixels), header), 1
    smaller = max(k for k in (1, 2, 4, 8) if k <= max(1, shrink))
    # If a JPEG has to be turned, the squares that its edge cuts come first and shift all others.
    if header.format != "JPEG" or header.orientation != UPRIGHT or min(header.size) < smaller:
        smaller = 1
    picture = _decode(data, header, smaller=smaller)
    return _as_rgb(picture), smaller


def photograph_header(file: BinaryIO) -> Header:
    """Read the header of a photograph: RGB of 8 bits, with or without alpha, or a grey JPEG, whose channels are equal.

    Raises BadImage for anything else, because its colours are not exactly known, or it may be a label.
    """
    header = _header(file)
    if header.mode in ("RGB", "RGBA") and header.bits == 8:
        return header
    if header.mode == "L" and header.bits == 8 and header.format == "JPEG":
        return header
    advice = "save it with 8 bits a channel" if header.bits > 8 else _ADVICE.get(header.mode, "convert the file first")
    raise BadImage(f"mode {header.mode}, {header.bits} bits: expected 8-bit RGB; {advice}")


def read_image(path: Path) -> NDArray[np.uint8]:
    """`decode_image` of a file. Raises BadImage, or FileNotFoundError and other OSErrors of the disk."""
    return decode_image(storage.read(path))


def read_size(path: Path) -> Size:
    """(height, width) of a photograph with EXIF orientation applied, its pixels not decoded.

    Raises BadImage for a file that `decode_image` would refuse because of its header, and for one that cannot be read.
    """
    return read_size_and_length(path)[0]


def read_size_and_length(path: Path) -> tuple[Size, int]:
    """`read_size`, and the length of the file in bytes. Raises BadImage."""
    try:
        with storage.reading(path) as file:
            return photograph_header(file).size, file.seek(0, io.SEEK_END)
    except FileNotFoundError as error:
        raise BadImage("the file is missing") from error
    except (storage.NotAFile, IsADirectoryError) as error:
        raise BadImage("not a regular file") from error
    except OSError as error:
        raise BadImage(f"the file cannot be read ({reason(error)})") from error


# --- labels -----------------------------------------------------------------------------------------------------------


def decode_label(
    data: bytes, space: LabelSpace | None, *, ids: str = "train", drawn_void: bool = False
) -> NDArray[np.uint8]:
    """Decode a label PNG: (H, W) uint8 train ids.

    ids: the file has one 8-bit channel with "train" ids, or with "source" ids, which the label space's table maps; or
    it shows the "color" of every class. Without a label space the bytes are taken as they are. drawn_void: source ids
    that the label space ignores, but for 0 and 255, become VOID. Raises BadImage, also for ids and colours that the
    label space does not know.
    """
    header = _png_header(data)
    if ids == "color" and space is not None:
        return _from_colours(data, header, space)
    _require_stored(header)
    pixels = decode_png(data, header, _by_pillow)
    stored = np.asarray(_decode(data, header, upright=False)) if pixels is None else pixels
    if space is None:
        return stored
    unknown = _unknown_ids(stored, space, ids=ids)
    if unknown:
        raise UnknownIds(f"ids {unknown} are not in label space {space.name!r} ({ids} ids)", unknown)
    if ids != "source":
        return stored
    train_ids = np.frombuffer(space.train_ids, np.uint8).copy()
    if drawn_void:
        train_ids[1:IGNORE][train_ids[1:IGNORE] == IGNORE] = VOID
    mapped: NDArray[np.uint8] = train_ids[stored]
    return mapped


def stored_ids(data: bytes) -> tuple[NDArray[np.uint8], tuple[Colour, ...] | None]:
    """The bytes of a grey or palette PNG (H, W) uint8 as they are, and the colour of each where it has a palette.

    Raises BadImage for any other file.
    """
    picture = _decode(data, _require_stored(_png_header(data)), upright=False)
    palette = iter((picture.getpalette("RGB") or []) if picture.mode == "P" else [])
    return np.asarray(picture), tuple(zip(palette, palette, palette, strict=False)) if picture.mode == "P" else None


def is_coloured(data: bytes) -> bool:
    """True for an RGB label, False for one of grey values or of a palette. Raises BadImage for what is no PNG."""
    return _png_header(data).mode in ("RGB", "RGBA")


def _png_header(data: bytes) -> Header:
    header = _header(io.BytesIO(data))
    if header.format != "PNG":  # JPEG changes ids, GIF renumbers them
        raise BadImage(f"a {header.format} file: expected a PNG holding one class id a pixel")
    return header


def _require_stored(header: Header) -> Header:
    """The header of a PNG of one 8-bit channel. Raises BadImage for any other."""
    if header.mode not in ("L", "P") or (header.bits != 8 and header.mode == "L"):  # Pillow would stretch 4 bits to 8
        coloured = header.mode in ("RGB", "RGBA") and header.bits == 8
        advice = "colours are read with --label-ids color" if coloured else "convert the file first"
        expected = f"expected 8-bit grey or palette PNG holding one class id a pixel; {advice}"
        raise BadImage(f"mode {header.mode}, {header.bits} bits: {expected}")
    return header


def _from_colours(data: bytes, header: Header, space: LabelSpace) -> NDArray[np.uint8]:
    """Read a PNG that shows every class in its colour: (H, W) uint8 train ids. Black is ignored unless a class is.

    Raises BadImage for other colours, naming the commonest, and for a label space in which two classes look the same.
    """
    if header.bits != 8 and header.mode != "P":
        raise BadImage(f"mode {header.mode}, {header.bits} bits: expected the colours of the classes with 8 bits")
    if header.mode not in ("RGB", "RGBA", "P"):
        raise BadImage(f"mode {header.mode}: expected an RGB or palette PNG that shows every class in its colour")
    return train_ids_of(_packed(data, header), space)


def packed_colours(data: bytes) -> NDArray[np.int32]:
    """The colours of an RGB or palette PNG: (H, W) int32, 65536 red + 256 green + blue. Raises BadImage."""
    header = _header(io.BytesIO(data))
    if header.format != "PNG" or header.mode not in ("RGB", "RGBA", "P") or (header.bits != 8 and header.mode != "P"):
        raise BadImage(f"a {header.format} of mode {header.mode}, {header.bits} bits: expected an RGB or palette PNG")
    return _packed(data, header)


def _packed(data: bytes, header: Header) -> NDArray[np.int32]:
    picture = _decode(data, header, upright=False)
    colours = np.asarray(picture.convert("RGB") if header.mode == "P" else _as_rgb(picture), np.int32)
    return colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]


def _unknown_ids(stored: NDArray[np.uint8], space: LabelSpace, *, ids: str) -> list[int]:
    """The values of a stored label map (H, W) uint8 that mean nothing in the label space, ascending."""
    unknown = sorted({*range(256)} - ({*range(len(space)), IGNORE} if ids == "train" else {*space.known_source_ids}))
    runs = [(i, next(j for j in range(i, 257) if j not in unknown)) for i in unknown if i - 1 not in unknown]
    if not any((stored - np.uint8(start) < end - start).any() for start, end in runs):  # counting takes ten times this
        return []
    return [i for i in unknown if id_counts(stored)[i]]


def id_counts(label: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How many pixels of a label (H, W) uint8 have each value: (256,) int64."""
    values = np.ascontiguousarray(label).ravel()
    if len(values) < _MANY:
        return np.bincount(values, minlength=256)
    even = len(values) // 2 * 2
    pairs = np.bincount(values[:even].view(np.uint16), minlength=1 << 16).reshape(256, 256)
    counts: NDArray[np.int64] = pairs.sum(axis=0) + pairs.sum(axis=1)
    if even < len(values):
        counts[values[-1]] += 1
    return counts


def read_label(path: Path, space: LabelSpace, *, ids: str = "train", size: Size | None = None) -> NDArray[np.uint8]:
    """`decode_label` of a file. Raises BadImage with the path, also unless it has `size`; OSErrors of the disk."""
    try:
        label = decode_label(storage.read(path), space, ids=ids)
        require_size(label, size or label.shape)
        return label
    except UnknownIds as error:
        raise UnknownIds(f"{path}: {error}", sorted(error.ids)) from error
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from error


def require_size(label: NDArray[np.uint8], size: tuple[int, ...]) -> None:
    """Raise BadImage unless a label (H, W) has the size (height, width) of its image."""
    if label.shape != size:
        turned = "; one of them lies on its side: is the image turned by its EXIF?" if label.shape == size[::-1] else ""
        sizes = f"{label.shape[1]} x {label.shape[0]} but its image {size[1]} x {size[0]} pixels"
        raise BadImage(f"the label is {sizes}{turned}")


def colourise(label: NDArray[np.uint8], space: LabelSpace) -> NDArray[np.uint8]:
    """(H, W) uint8 train ids -> (H, W, 3) uint8 in the label space's colours; ignore is black."""
    return np.frombuffer(space.palette, np.uint8).reshape(256, 3)[label]


def encode_label(label: NDArray[np.uint8], *, palette: bytes | None = None) -> bytes:
    """(H, W) uint8 -> the bytes of an 8-bit grey PNG, or of one with a palette of 256 RGB colours.

    Every row is stored as its difference from the row above, and compressed by run lengths alone: on labels that is
    smaller than Pillow's file, in a third of its time.
    """
    rows = np.empty((label.shape[0], label.shape[1] + 1), np.uint8)
    rows[:, 0] = _UP
    rows[0, 1:] = label[0]
    np.subtract(label[1:], label[:-1], out=rows[1:, 1:])
    deflate = zlib.compressobj(6, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    header = struct.pack(">IIBBBBB", label.shape[1], label.shape[0], 8, 3 if palette else 0, 0, 0, 0)
    colours = _png_chunk(b"PLTE", palette) if palette else b""
    pixels = deflate.compress(rows.data) + deflate.flush()
    return (
        PNG_SIGNATURE + _png_chunk(b"IHDR", header) + colours + _png_chunk(b"IDAT", pixels) + _png_chunk(b"IEND", b"")
    )


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# --- Pillow -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _foreign() -> Iterator[None]:
    """Run a decoder on a stranger's bytes: whatever it raises is the file's fault, but for a lack of memory."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its words hold the address of an object
        raise BadImage("damaged or truncated: Pillow cannot identify it") from error
    except Exception as error:
        raise BadImage(f"damaged or truncated: {reason(error)}") from error


def _header(file: BinaryIO) -> Header:
    try:
        return read_header(file)
    except (BadImage, MemoryError, OSError):  # an OSError is trouble of the disk
        raise
    except Exception as error:
        raise BadImage(f"its header is damaged: {reason(error)}") from error


def _decode(data: bytes, header: Header, *, smaller: int = 1, upright: bool = True) -> Image.Image:
    """The pixels of a file. None of Pillow's decoders is called anywhere else. Raises BadImage."""
    with _foreign():
        opened = Image.open(io.BytesIO(pixels_only(data, header)), formats=(header.format,))
        if opened.size != (header.width, header.height):
            shown = f"{opened.width} x {opened.height}"
            raise BadImage(f"its header says {header.width} x {header.height}, but its pixels are {shown}")
        if smaller > 1:
            opened.draft(opened.mode, (opened.width // smaller, opened.height // smaller))
        opened.load()
        return _upright(opened, header) if upright else opened


def _upright(picture: Image.Image, header: Header) -> Image.Image:
    turn = _TURNS.get(header.orientation)
    return picture if turn is None else picture.transpose(turn)


def _by_pillow(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(_decode(data, _header(io.BytesIO(data)), upright=False))


def _as_rgb(picture: Image.Image) -> Image.Image:
    """A decoded picture as RGB where no value changes. Raises BadImage for transparent pixels and other modes."""
    if picture.mode == "RGB":
        return picture
    if picture.mode == "RGBA":
        clear = picture.size[0] * picture.size[1] - picture.getchannel("A").histogram()[255]
        if clear:
            raise BadImage(f"{clear} of its pixels are transparent: expected 8-bit RGB; save it without transparency")
    elif picture.mode != "L":
        raise BadImage(f"mode {picture.mode}: expected 8-bit RGB; convert the file first")
    return picture.convert("RGB")
