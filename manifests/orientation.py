"""Read how a photograph has to be turned, from metadata that may be broken: nothing here ever refuses a picture.

EXIF 2.3, tag 0x0112: 1 is upright, 2 to 8 are the mirrored and turned ones. Metadata that makes no sense says nothing,
and a picture whose metadata says nothing is upright.
"""

from __future__ import annotations

import re
import struct
import zlib

UPRIGHT = 1
SIDEWAYS = frozenset({5, 6, 7, 8})  # orientations that swap height and width
MOST_TEXT = 1 << 20  # bytes of text that are unpacked to look for the orientation
RAW_EXIF, XMP_TEXT = b"Raw profile type exif", b"XML:com.adobe.xmp"  # names of texts in a PNG
_TAG = 0x0112
_FORMS = {1: "B", 3: "H", 4: "I"}  # TIFF field types of whole numbers
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def of_exif(exif: bytes) -> int | None:
    """The orientation in EXIF data, with or without "Exif" in front; None if it says nothing that makes sense."""
    tiff = re.sub(rb"^(?:Exif\0\0){1,2}", b"", exif)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    try:
        if order is None:
            return None
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(order + "HHI", tiff, place)
            if tag == _TAG:
                known = values == 1 and kind in _FORMS
                return _sensible(struct.unpack_from(order + _FORMS[kind], tiff, place + 8)[0]) if known else None
    except struct.error:  # cut off
        return None
    return None


def of_xmp(xmp: bytes) -> int | None:
    """The orientation in XMP, the XML of Adobe's programs; None if it says nothing that makes sense."""
    found = _XMP.search(xmp)
    return _sensible(int(found[1])) if found else None


def of_text(kind: bytes, chunk: bytes) -> int | None:
    """The orientation in a text chunk of a PNG (tEXt, zTXt or iTXt) that holds EXIF in hex, or XMP; else None."""
    name, _, rest = chunk.partition(b"\0")
    if name not in (RAW_EXIF, XMP_TEXT):
        return None
    packed = kind == b"zTXt" or (kind == b"iTXt" and rest[:1] == b"\1")
    text = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1] if kind == b"iTXt" else rest
    if packed:
        try:
            text = zlib.decompressobj().decompress(text, MOST_TEXT)
        except zlib.error:
            return None
    if name == XMP_TEXT:
        return of_xmp(text)
    try:  # ImageMagick: an empty line, the name, the length, then lines of hex
        return of_exif(bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii")))
    except ValueError:
        return None


def _sensible(value: int) -> int | None:
    return value if UPRIGHT <= value <= 8 else None
