"""Headers of photographs and labels, read by ourselves, and files cut down to what makes their pixels.

Size, mode and orientation come from here and from nowhere else, whether a file is only looked at or decoded, so the two
cannot disagree. Pillow receives the pixels alone: no EXIF, colour profile, XMP or text ever reaches it, and so none of
them can cost a picture.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

from autolabel.manifests.orientation import SIDEWAYS, UPRIGHT, of_exif, of_text, of_xmp

MOST_PIXELS = 178_956_970  # Pillow's own limit, 512 MiB of RGB
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_MODES = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}
_PNG_PIXELS = (b"PLTE", b"IDAT")
# Chunks that may be broken without harm to the pixels. No flipped bit makes one of these names out of a name above.
_PNG_METADATA = {
    b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"tIME", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD",
    b"hIST", b"sPLT", b"cICP", b"mDCV", b"cLLI",
}  # fmt: skip
_MOST = 1 << 16  # bytes of a piece of metadata that are read; and at the end of a PNG, behind its pixels
_JPEG_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # the markers that hold the size
_JPEG_BARE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_SCAN, _END = 0xDA, 0xD9
_JFIF, _ADOBE = (0xE0, b"JFIF\0", 14), (0xEE, b"Adobe", 12)  # what JPEG colours depend on, and its least length
_XMP_MARK = b"http://ns.adobe.com/xap/1.0/\0"
_TIFF_PIXELS = {254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 322, 323, 324, 325, 338, 339}
_TIFF_PACKINGS = {1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits"}
_TIFF_BYTES = {1: 1, 3: 2, 4: 4}  # TIFF field types of whole numbers


Crc = Callable[[bytes | memoryview], int]  # the CRC-32 of some bytes


class BadImage(ValueError):
    """The file itself is at fault: it is damaged, or of a kind that is not read. Trouble of the disk stays OSError."""


@dataclass(frozen=True)
class Header:
    """The format of a picture, its size in pixels as stored, its Pillow mode, bits of a channel, and orientation."""

    format: str
    width: int
    height: int
    mode: str
    bits: int = 8
    orientation: int = UPRIGHT

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the upright picture."""
        return (self.width, self.height) if self.orientation in SIDEWAYS else (self.height, self.width)


def read_header(file: BinaryIO) -> Header:
    """Read the header of a PNG, JPEG, WebP, BMP or TIFF. Raises BadImage for any other file, and for animations."""
    start = _at(file, 0, 16, exact=False)
    if not start:
        raise BadImage("the file is empty")
    for mark, read in _READERS.items():
        if re.match(mark, start, re.DOTALL):
            header = read(file)
            if header.width < 1 or header.height < 1:
                raise BadImage(f"its header is damaged: a size of {header.width} x {header.height}")
            if header.width * header.height > MOST_PIXELS:
                raise BadImage(f"too many pixels: {header.width} x {header.height}, more than {MOST_PIXELS}")
            return header
    raise BadImage("not a PNG, JPEG, WebP, BMP or TIFF file")


def pixels_only(data: bytes, header: Header) -> bytes:
    """The file without anything that is not needed to decode its pixels. Raises BadImage for damage that shows."""
    cut = {"PNG": _png_pixels, "JPEG": _jpeg_pixels, "TIFF": _tiff_pixels}.get(header.format)
    return cut(data) if cut else data


def _at(file: BinaryIO, place: int, count: int, *, exact: bool = True) -> bytes:
    file.seek(place)
    data = file.read(count)
    if exact and len(data) < count:
        raise BadImage("damaged or truncated: the file ends in its header")
    return data


def _refuse_animation(count: int) -> NoReturn:
    raise BadImage(f"an animation of {count} pictures: expected one; save the one that is meant")


# --- PNG (ISO 15948) --------------------------------------------------------------------------------------------------


def _read_png(file: BinaryIO) -> Header:
    head = _at(file, 8, 25)
    if head[:8] != b"\0\0\0\rIHDR" or zlib.crc32(head[4:21]) != int.from_bytes(head[21:]):
        raise BadImage("damaged or truncated: its first chunk is no header, or has another checksum")
    width, height, bits, kind = struct.unpack(">IIBB", head[8:18])
    if kind not in _PNG_MODES:
        raise BadImage(f"its header is damaged: colour type {kind}")
    exif: int | None = None
    text: int | None = None
    place, pictures = 33, 1
    while len(start := _at(file, place, 8, exact=False)) == 8:
        length, name = int.from_bytes(start[:4]), start[4:]
        if name in (b"IDAT", b"IEND"):
            break
        if name == b"acTL" and length >= 4:
            pictures = int.from_bytes(_at(file, place + 8, 4))
        elif name == b"eXIf" and length < _MOST:
            chunk = _at(file, place + 4, length + 8)
            if zlib.crc32(chunk[:-4]) != int.from_bytes(chunk[-4:]):  # who knows which side is up
                raise BadImage("damaged or truncated: chunk b'eXIf' has another checksum")
            exif = of_exif(chunk[4:-4])
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            text = of_text(name, _at(file, place + 8, min(length, _MOST), exact=False)) or text
        place += 12 + length
    if pictures > 1:
        _refuse_animation(pictures)
    return Header("PNG", width, height, _PNG_MODES[kind], bits, exif or text or _late_exif(file) or UPRIGHT)


def _late_exif(file: BinaryIO) -> int | None:
    """The orientation in an eXIf chunk behind the pixels, where ExifTool and some phones put it."""
    end = file.seek(0, io.SEEK_END)
    tail = _at(file, max(0, end - _MOST), _MOST, exact=False)
    place = tail.find(b"eXIf", 4)
    while place >= 0:
        length = int.from_bytes(tail[place - 4 : place])
        chunk = tail[place : place + 4 + length]
        if zlib.crc32(chunk) == int.from_bytes(tail[place + 4 + length : place + 8 + length]):
            return of_exif(chunk[4:])
        place = tail.find(b"eXIf", place + 4)
    return None


def png_chunks(data: bytes, crc32: Crc = zlib.crc32) -> list[tuple[bytes, int, int]]:
    """Name, start and end of the chunks that make the pixels of a PNG, its end last. Raises BadImage for damage."""
    chunks, place, whole = list[tuple[bytes, int, int]](), 33, memoryview(data)
    while place + 8 <= len(data):
        length, name = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        end = place + 12 + length
        if end > len(data):
            raise BadImage("damaged or truncated: the file ends in the middle")
        if name not in _PNG_METADATA:
            if crc32(whole[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
                raise BadImage(f"damaged or truncated: chunk {name!r} has another checksum")
            if name in _PNG_PIXELS:
                chunks.append((name, place, end))
            elif name[:1].isupper() and name != b"IEND":  # by the standard nobody may decode a file without it
                raise BadImage(f"damaged or truncated: unknown chunk {name!r}")
        if name == b"IEND":
            if not chunks:
                raise BadImage("damaged or truncated: it has no pixels")
            return [*chunks, (name, end - 12, end)]
        place = end
    raise BadImage("damaged or truncated: its end is missing")


def _png_pixels(data: bytes) -> bytes:
    return b"".join((data[:33], *(data[start:end] for _, start, end in png_chunks(data))))


# --- JPEG (ITU T.81) --------------------------------------------------------------------------------------------------


def _segments(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of every segment with its marker, up to the first scan, whose end is not looked for."""
    place = 2
    while True:
        head = _at(file, place, 4)
        if head[0] != 0xFF or head[1] in (0xFF, 0):  # rubbish between segments, which decoders skip
            place += 1
        elif head[1] in _JPEG_BARE:
            place += 2
        elif head[1] == _END:
            raise BadImage("damaged or truncated: it ends before its pixels")
        else:
            end = place + 2 + max(2, int.from_bytes(head[2:]))
            yield head[1], place, end
            if head[1] == _SCAN:
                return
            place = end


def _read_jpeg(file: BinaryIO) -> Header:
    frame: tuple[int, int, int, int] | None = None
    exif: int | None = None
    xmp: int | None = None
    looked = False
    for marker, start, end in _segments(file):
        if marker in _JPEG_SIZES and frame is None:
            frame = struct.unpack(">BHHB", _at(file, start + 4, 6))
        elif marker == 0xE1:
            data = _at(file, start + 4, end - start - 4, exact=False)
            if data.startswith(b"Exif\0\0") and not looked:
                exif, looked = of_exif(data), True
            elif data.startswith(_XMP_MARK):
                xmp = of_xmp(data)
    if frame is None:
        raise BadImage("damaged or truncated: no segment tells its size")
    bits, height, width, channels = frame
    if channels not in _JPEG_MODES:
        raise BadImage(f"{channels} channels: expected 1 or 3")
    return Header("JPEG", width, height, _JPEG_MODES[channels], bits, exif or xmp or UPRIGHT)


def _jpeg_pixels(data: bytes) -> bytes:
    """Keep tables, size, scans, and the two segments that say which colours the channels are."""
    parts = [data[:2]]
    for marker, start, end in _segments(io.BytesIO(data)):
        if marker == _SCAN:
            parts.append(data[start:])
        elif marker == 0xFE or 0xE0 <= marker <= 0xEF:  # comments and metadata
            for kind, mark, least in (_JFIF, _ADOBE):
                payload = data[start + 4 : end]
                if marker == kind and payload.startswith(mark) and len(payload) >= least:
                    parts.append(data[start:end])
        else:
            parts.append(data[start:end])
    return b"".join(parts)


# --- WebP (RFC 9649) --------------------------------------------------------------------------------------------------


def _read_webp(file: BinaryIO) -> Header:
    place, size, alpha, pictures = 12, (0, 0), False, 0
    exif: int | None = None
    xmp: int | None = None
    while len(start := _at(file, place, 8, exact=False)) == 8:
        name, length = start[:4], int.from_bytes(start[4:], "little")
        if name == b"VP8X":
            body = _at(file, place + 8, 10)
            size = 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
            alpha = bool(body[0] & 0x10)
        elif name == b"VP8 " and size == (0, 0):
            width, height = struct.unpack("<HH", _at(file, place + 14, 4))
            size = width & 0x3FFF, height & 0x3FFF
        elif name == b"VP8L" and size == (0, 0):
            bits = int.from_bytes(_at(file, place + 9, 4), "little")
            size, alpha = (1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)), bool(bits >> 28 & 1)
        elif name == b"ANMF":
            pictures += 1
        elif name == b"EXIF":
            exif = of_exif(_at(file, place + 8, min(length, _MOST), exact=False))
        elif name == b"XMP ":
            xmp = of_xmp(_at(file, place + 8, min(length, _MOST), exact=False))
        place += 8 + length + length % 2
    if pictures > 1:
        _refuse_animation(pictures)
    if size == (0, 0):
        raise BadImage("damaged or truncated: no chunk tells its size")
    return Header("WEBP", *size, "RGBA" if alpha else "RGB", 8, exif or xmp or UPRIGHT)


# --- BMP --------------------------------------------------------------------------------------------------------------


def _read_bmp(file: BinaryIO) -> Header:
    old = int.from_bytes(_at(file, 14, 4), "little") == 12  # OS/2
    width, height, _, bits = struct.unpack("<HHHH" if old else "<iiHH", _at(file, 18, 8 if old else 12))
    modes = {24: "RGB", 32: "RGB", 16: "RGB"}
    return Header("BMP", width, abs(height), modes.get(bits, "P"), {24: 8, 32: 8, 16: 5}.get(bits, bits))


# --- TIFF 6.0 ---------------------------------------------------------------------------------------------------------


def _tiff_fields(file: BinaryIO) -> tuple[str, dict[int, bytes], int]:
    """Byte order, the fields of the first picture as stored (12 bytes each), and the number of pictures."""
    order = "<" if _at(file, 0, 2) == b"II" else ">"
    (place,) = struct.unpack(order + "I", _at(file, 4, 4))
    first: dict[int, bytes] = {}
    pictures, seen = 0, set[int]()
    while place and place not in seen and len(seen) < 1000:
        seen.add(place)
        (count,) = struct.unpack(order + "H", _at(file, place, 2))
        data = _at(file, place + 2, 12 * count + 4)
        fields = {struct.unpack_from(order + "H", data, i)[0]: data[i : i + 12] for i in range(0, 12 * count, 12)}
        first = first or fields
        pictures += not (_tiff_values(file, order, fields, 254) or [0])[0] & 1  # 1: a smaller copy
        (place,) = struct.unpack_from(order + "I", data, 12 * count)
    return order, first, pictures


def _tiff_values(file: BinaryIO, order: str, fields: dict[int, bytes], tag: int) -> list[int]:
    """The first numbers of a field, at most eight; none if it is missing."""
    if tag not in fields:
        return []
    kind, count = struct.unpack_from(order + "HI", fields[tag], 2)
    if kind not in _TIFF_BYTES:
        return []
    size, taken = _TIFF_BYTES[kind], min(count, 8)
    data = fields[tag][8:12]
    if size * count > 4:
        data = _at(file, struct.unpack(order + "I", data)[0], size * taken)
    return list(struct.unpack_from(f"{order}{taken}{' BH I'[size]}", data))


def _read_tiff(file: BinaryIO) -> Header:
    order, fields, pictures = _tiff_fields(file)
    if pictures > 1:
        raise BadImage(f"a TIFF of {pictures} pictures: expected one; save the one that is meant")

    def value(tag: int, otherwise: int = 0) -> int:
        return (_tiff_values(file, order, fields, tag) or [otherwise])[0]

    packing = value(259, 1)
    if packing not in _TIFF_PACKINGS:
        raise BadImage(f"a TIFF with compression {packing}: expected {', '.join(sorted(set(_TIFF_PACKINGS.values())))}")
    channels = value(277, 1)
    modes = {(2, 3): "RGB", (2, 4): "RGBA", (0, 1): "L", (1, 1): "L", (3, 1): "P", (5, 4): "CMYK"}
    mode = modes.get((value(262), channels), f"{channels} channels")
    bits = max(_tiff_values(file, order, fields, 258) or [1])
    turned = value(274)
    return Header("TIFF", value(256), value(257), mode, bits, turned if UPRIGHT < turned <= 8 else UPRIGHT)


def _tiff_pixels(data: bytes) -> bytes:
    """Add a list of the fields that make pixels, and let the file begin with it. Values stay where they are."""
    order, fields, _ = _tiff_fields(io.BytesIO(data))
    kept = [fields[tag] for tag in sorted(_TIFF_PIXELS & fields.keys())]
    data += b"\0" * (len(data) % 2)
    start = struct.pack(order + "I", len(data))
    listing = struct.pack(order + "H", len(kept)) + b"".join(kept) + bytes(4)
    return data[:4] + start + data[8:] + listing


_READERS = {
    rb"\x89PNG\r\n\x1a\n": _read_png,
    rb"\xff\xd8\xff": _read_jpeg,
    rb"RIFF....WEBP": _read_webp,
    rb"BM": _read_bmp,
    rb"II\*\0|MM\0\*": _read_tiff,
}
