"""Read photographs and label maps, strictly: what is not exactly understood is refused with the reason.

A silent conversion (16 bits clipped to 8, a palette taken for colours) would give wrong labels that look right.
"""

from __future__ import annotations

import io
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from autolabel.manifests.label_space import IGNORE, LabelSpace

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LABEL_SUFFIXES = (".png",)
_FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow would open many more, and run Ghostscript for EPS
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_UP = 2  # the PNG filter that subtracts the row above
_HEAD = 32  # bytes that tell a PNG's bit depth
_TRANSPOSED = {5, 6, 7, 8}  # EXIF orientations that swap height and width

Size = tuple[int, int]  # (height, width)


class BadImage(ValueError):
    """The file itself is at fault: it is damaged, or of a kind that is not read. Trouble of the disk stays OSError."""


def _png_bit_depth(data: bytes) -> int | None:
    return data[24] if len(data) > 24 and data.startswith(_PNG_SIGNATURE) else None


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("the file is empty")
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage(f"too many pixels: {error}") from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise BadImage(f"not a readable image ({type(error).__name__})") from error


def _require(opened: Image.Image, data: bytes, modes: tuple[str, ...], wanted: str) -> None:
    # Pillow would take the first picture. (A phone's JPEG of several pictures, MPO, is a still.)
    if opened.format in ("PNG", "WEBP") and getattr(opened, "is_animated", False):
        count = getattr(opened, "n_frames", 0)
        raise BadImage(f"an animation of {count} pictures: expected one; save the one that is meant")
    # Pillow opens 16-bit RGB as 8-bit RGB and stretches 1 to 4 bit grey to 0..255 without a word.
    depth = _png_bit_depth(data)
    wrong_depth = depth is not None and depth != 8 and opened.mode != "P"
    if opened.mode not in modes or wrong_depth:
        bits = f", {depth} bits" if depth else ""
        raise BadImage(f"mode {opened.mode}{bits}: expected {wanted}; convert the file first")


def _decode(opened: Image.Image, upright: bool) -> Image.Image:
    try:
        opened.load()
        return ImageOps.exif_transpose(opened) if upright else opened
    except (OSError, SyntaxError, ValueError, struct.error, EOFError) as error:
        raise BadImage(f"damaged or truncated: {error}") from error


def _verify(opened: Image.Image) -> None:
    """Pillow decodes the pixels of a PNG without a look at their checksums; this looks, and spoils `opened`."""
    try:
        opened.verify()
    except (OSError, SyntaxError, ValueError, struct.error, EOFError) as error:
        raise BadImage(f"damaged or truncated: {error}") from error


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Bytes of an 8-bit RGB PNG, JPEG or WebP -> (H, W, 3) uint8, EXIF orientation applied. Raises BadImage."""
    return np.asarray(decode_picture(data)[0])


def decode_picture(data: bytes, shrink: float = 1) -> tuple[Image.Image, int]:
    """The same as a Pillow image, and how many times smaller it is than the file's: 1, 2, 4 or 8, at most `shrink`.

    Only an upright JPEG can be decoded smaller, in a half of the time and less: it leaves the fine parts of its blocks
    out. Pixel (i, j) then stands for the square of the file's pixels that begins at (k i, k j).
    """
    opened = _open(data)
    _require(opened, data, ("RGB",), "8-bit RGB")
    if opened.format == "PNG":
        _verify(_open(data))
    smaller = max(k for k in (1, 2, 4, 8) if k <= max(1, shrink))
    # Turned, the squares that the image's edge cuts would come first and shift all others.
    turned = opened.format == "JPEG" and opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
    if opened.format != "JPEG" or turned or min(opened.size) < smaller:
        smaller = 1
    if smaller > 1:
        opened.draft("RGB", (opened.width // smaller, opened.height // smaller))
    return _decode(opened, upright=True), smaller


def read_image(path: Path) -> NDArray[np.uint8]:
    """`decode_image` of a file. Raises BadImage, or FileNotFoundError and other OSErrors of the disk."""
    return decode_image(path.read_bytes())


def decode_label(data: bytes, space: LabelSpace | None, ids: str) -> NDArray[np.uint8]:
    """Bytes of an 8-bit single-channel PNG -> (H, W) uint8 train ids.

    `ids` says what the file holds: "source" ids, mapped by the label space's table, or "train" ids. Without a
    label space its bytes are taken as they are.
    Raises BadImage, also for ids that the label space does not know.
    """
    opened = _open(data)
    _require(opened, data, ("L", "P"), "8-bit grey or palette PNG holding one class id a pixel")
    if opened.format != "PNG":  # JPEG changes ids, GIF renumbers them
        raise BadImage(f"a {opened.format} file: expected a PNG holding one class id a pixel")
    _verify(_open(data))
    stored = np.asarray(_decode(opened, upright=False))
    if space is None:
        return stored
    unknown = unknown_ids(stored, space, ids)
    if unknown:
        raise BadImage(f"ids {unknown} are not in label space {space.name!r} ({ids} ids)")
    return np.frombuffer(space.train_ids, np.uint8)[stored] if ids == "source" else stored


def unknown_ids(stored: NDArray[np.uint8], space: LabelSpace, ids: str) -> list[int]:
    """The values of a stored label map that mean nothing in the label space, ascending."""
    known = set(range(len(space))) | {IGNORE} if ids == "train" else set(space.known_source_ids)
    present = np.flatnonzero(np.bincount(stored.ravel(), minlength=256))
    return [int(i) for i in present if int(i) not in known]


def read_label(path: Path, space: LabelSpace, ids: str, *, size: Size | None = None) -> NDArray[np.uint8]:
    """`decode_label` of a file. Raises BadImage (with the path), also for another size, or OSErrors of the disk."""
    try:
        label = decode_label(path.read_bytes(), space, ids)
        require_size(label, size or label.shape)
        return label
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from error


def require_size(label: NDArray[np.uint8], size: tuple[int, ...]) -> None:
    """Raise BadImage unless a label (H, W) has the size (height, width) of its image."""
    if label.shape != size:
        raise BadImage(f"the label is {label.shape[1]} x {label.shape[0]} but its image {size[1]} x {size[0]} pixels")


def read_size(path: Path) -> Size:
    """(height, width) of a photograph with EXIF orientation applied, its pixels not decoded.

    Raises BadImage for a file that `decode_image` would refuse for what its header says.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadImage("not a regular file")  # a pipe would keep us waiting
        with open(path, "rb") as file:
            head = file.read(_HEAD)
        if not head:
            raise BadImage("the file is empty")
        with Image.open(path, formats=_FORMATS) as opened:
            _require(opened, head, ("RGB",), "8-bit RGB")
            # Image.getexif, because PNG's own would decode the pixels to look for a chunk after them.
            orientation = Image.Image.getexif(opened).get(ExifTags.Base.Orientation)
            height, width = opened.height, opened.width
            return (width, height) if orientation in _TRANSPOSED else (height, width)
    except Image.DecompressionBombError as error:
        raise BadImage(f"too many pixels: {error}") from error
    except FileNotFoundError as error:
        raise BadImage("the file is missing") from error
    except BadImage:
        raise
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise BadImage(f"not a readable image ({type(error).__name__})") from error


def colourise(label: NDArray[np.uint8], space: LabelSpace) -> NDArray[np.uint8]:
    """(H, W) train ids -> (H, W, 3) uint8 in the label space's colours; ignore is black."""
    return np.frombuffer(space.palette, np.uint8).reshape(256, 3)[label]


def encode_label(label: NDArray[np.uint8]) -> bytes:
    """(H, W) uint8 -> the bytes of an 8-bit grey PNG.

    Every row is stored as its difference from the row above, and runs are all that is looked for: on labels smaller
    than what Pillow writes, in a third of its time.
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
