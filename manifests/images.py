"""Decode photographs and label maps, strictly: a file that is not exactly understood is refused with the reason.

A silent conversion (16 bits clipped to 8, a palette taken for colours) would give wrong labels that look right.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from autolabel.manifests import storage
from autolabel.manifests.label_space import IGNORE, LabelSpace

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LABEL_SUFFIXES = (".png",)
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow would open many more, and run Ghostscript for EPS
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_UP = 2  # the PNG filter that subtracts the row above
_HEAD = 32  # the first bytes of a PNG, which hold its bit depth
_TRANSPOSED = {5, 6, 7, 8}  # EXIF orientations that swap height and width
_DAMAGE = (OSError, SyntaxError, ValueError, struct.error, EOFError)  # Pillow raises these for damaged files

Size = tuple[int, int]  # height, width


class BadImage(ValueError):
    """The file itself is at fault: it is damaged, or of a kind that is not read. Trouble of the disk stays OSError."""


# --- photographs ------------------------------------------------------------------------------------------------------


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Decode an 8-bit RGB PNG, JPEG or WebP: (H, W, 3) uint8, EXIF orientation applied. Raises BadImage."""
    return np.asarray(decode_picture(data)[0])


def decode_picture(data: bytes, shrink: float = 1) -> tuple[Image.Image, int]:
    """Decode a photograph as a Pillow image. Return it and the factor by which it is smaller than the file's image.

    The factor is 1, 2, 4 or 8, at most `shrink`. Only an upright JPEG can be decoded smaller, in half of the time or
    less: the decoder leaves out the fine parts of its blocks. Pixel (i, j) then stands for the square of the file's
    pixels that begins at (k i, k j). Raises BadImage.
    """
    opened = _open(data)
    _require(opened, data, modes=("RGB",), expected="8-bit RGB")
    if opened.format == "PNG":
        _verify(_open(data))
    smaller = max(k for k in (1, 2, 4, 8) if k <= max(1, shrink))
    # If a JPEG has to be turned, the squares that its edge cuts come first and shift all others.
    turned = opened.format == "JPEG" and opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
    if opened.format != "JPEG" or turned or min(opened.size) < smaller:
        smaller = 1
    if smaller > 1:
        opened.draft("RGB", (opened.width // smaller, opened.height // smaller))
    return _load(opened, upright=True), smaller


def read_image(path: Path) -> NDArray[np.uint8]:
    """`decode_image` of a file. Raises BadImage, or FileNotFoundError and other OSErrors of the disk."""
    return decode_image(storage.read(path))


def read_size(path: Path) -> Size:
    """(height, width) of a photograph with EXIF orientation applied, its pixels not decoded.

    Raises BadImage for a file that `decode_image` would refuse because of its header.
    """
    try:
        require_regular(path)
        with storage.reading(path) as file:
            head = file.read(_HEAD)
            if not head:
                raise BadImage("the file is empty")
            file.seek(0)
            with Image.open(file, formats=_FORMATS) as opened:
                _require(opened, head, modes=("RGB",), expected="8-bit RGB")
                # A PNG's own getexif would decode the pixels to look for a chunk after them; Image.getexif does not.
                orientation = Image.Image.getexif(opened).get(ExifTags.Base.Orientation)
                height, width = opened.height, opened.width
                return (width, height) if orientation in _TRANSPOSED else (height, width)
    except Image.DecompressionBombError as error:
        raise BadImage(f"too many pixels: {error}") from error
    except FileNotFoundError as error:
        raise BadImage("the file is missing") from error
    except BadImage:
        raise
    except _DAMAGE as error:
        raise BadImage(f"not a readable image ({type(error).__name__})") from error


def require_regular(path: Path) -> storage.Stat | None:
    """Size and time of a file, None if it is missing. Raises BadImage for a folder, and for a pipe, which blocks."""
    status = storage.stat(path)
    if status is None and path.exists():
        raise BadImage("not a regular file")
    return status


# --- labels -----------------------------------------------------------------------------------------------------------


def decode_label(data: bytes, space: LabelSpace | None, *, ids: str = "train") -> NDArray[np.uint8]:
    """Decode an 8-bit single-channel PNG: (H, W) uint8 train ids.

    ids: the file holds "train" ids, or "source" ids, which the label space's table maps. Without a label space the
    bytes are taken as they are. Raises BadImage, also for ids that the label space does not know.
    """
    opened = _open(data)
    _require(opened, data, modes=("L", "P"), expected="8-bit grey or palette PNG holding one class id a pixel")
    if opened.format != "PNG":  # JPEG changes ids, GIF renumbers them
        raise BadImage(f"a {opened.format} file: expected a PNG holding one class id a pixel")
    _verify(_open(data))
    stored = np.asarray(_load(opened, upright=False))
    if space is None:
        return stored
    unknown = _unknown_ids(stored, space, ids=ids)
    if unknown:
        raise BadImage(f"ids {unknown} are not in label space {space.name!r} ({ids} ids)")
    return np.frombuffer(space.train_ids, np.uint8)[stored] if ids == "source" else stored


def _unknown_ids(stored: NDArray[np.uint8], space: LabelSpace, *, ids: str) -> list[int]:
    """The values of a stored label map (H, W) uint8 that mean nothing in the label space, ascending."""
    meaningful = set(range(len(space))) | {IGNORE} if ids == "train" else set(space.known_source_ids)
    present = np.flatnonzero(np.bincount(stored.ravel(), minlength=256))
    return [int(i) for i in present if int(i) not in meaningful]


def read_label(path: Path, space: LabelSpace, *, ids: str = "train", size: Size | None = None) -> NDArray[np.uint8]:
    """`decode_label` of a file. Raises BadImage with the path, also unless it has `size`; OSErrors of the disk."""
    try:
        label = decode_label(storage.read(path), space, ids=ids)
        require_size(label, size or label.shape)
        return label
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from error


def require_size(label: NDArray[np.uint8], size: tuple[int, ...]) -> None:
    """Raise BadImage unless a label (H, W) has the size (height, width) of its image."""
    if label.shape != size:
        raise BadImage(f"the label is {label.shape[1]} x {label.shape[0]} but its image {size[1]} x {size[0]} pixels")


def colourise(label: NDArray[np.uint8], space: LabelSpace) -> NDArray[np.uint8]:
    """(H, W) uint8 train ids -> (H, W, 3) uint8 in the label space's colours; ignore is black."""
    return np.frombuffer(space.palette, np.uint8).reshape(256, 3)[label]


def encode_label(label: NDArray[np.uint8]) -> bytes:
    """(H, W) uint8 -> the bytes of an 8-bit grey PNG.

    Every row is stored as its difference from the row above, and compressed by run lengths alone: on labels that is
    smaller than Pillow's file, in a third of its time.
    """
    rows = np.empty((label.shape[0], label.shape[1] + 1), np.uint8)
    rows[:, 0] = _UP
    rows[0, 1:] = label[0]
    np.subtract(label[1:], label[:-1], out=rows[1:, 1:])
    deflate = zlib.compressobj(6, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    header = struct.pack(">IIBBBBB", label.shape[1], label.shape[0], 8, 0, 0, 0, 0)
    pixels = deflate.compress(rows.data) + deflate.flush()
    return _PNG_SIGNATURE + _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", pixels) + _png_chunk(b"IEND", b"")


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# --- Pillow -----------------------------------------------------------------------------------------------------------


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("the file is empty")
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage(f"too many pixels: {error}") from error
    except _DAMAGE as error:
        raise BadImage(f"not a readable image ({type(error).__name__})") from error


def _require(opened: Image.Image, data: bytes, *, modes: tuple[str, ...], expected: str) -> None:
    # Pillow would take the first picture of an animation. A phone's JPEG of several pictures, MPO, is a still.
    if opened.format in ("PNG", "WEBP") and getattr(opened, "is_animated", False):
        count = getattr(opened, "n_frames", 0)
        raise BadImage(f"an animation of {count} pictures: expected one; save the one that is meant")
    # Pillow opens 16-bit RGB as 8-bit RGB, and stretches 1 to 4 bit grey to 0..255, without a word.
    depth = data[24] if len(data) > 24 and data.startswith(_PNG_SIGNATURE) else None
    wrong_depth = depth is not None and depth != 8 and opened.mode != "P"
    if opened.mode not in modes or wrong_depth:
        bits = f", {depth} bits" if depth else ""
        raise BadImage(f"mode {opened.mode}{bits}: expected {expected}; convert the file first")


def _load(opened: Image.Image, *, upright: bool) -> Image.Image:
    try:
        opened.load()
        return ImageOps.exif_transpose(opened) if upright else opened
    except _DAMAGE as error:
        raise BadImage(f"damaged or truncated: {error}") from error


def _verify(opened: Image.Image) -> None:
    """Check the checksums of a PNG, at which Pillow does not look when it decodes. Spoils `opened`."""
    try:
        opened.verify()
    except _DAMAGE as error:
        raise BadImage(f"damaged or truncated: {error}") from error
