"""Photographs on their way out: the file as it is where the target shows it as we do, else an upright PNG."""

from __future__ import annotations

import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from autolabel.manifests import storage
from autolabel.manifests.formats.style import Style
from autolabel.manifests.images import BadImage, photograph_header
from autolabel.manifests.orientation import UPRIGHT
from autolabel.manifests.reading import decode_photograph, read_file
from autolabel.manifests.samples import Sample

SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}


@dataclass(frozen=True)
class Photograph:
    """The bytes of a photograph that shows upright, and the suffix that they need; as_it_is: they are the file's."""

    data: bytes
    suffix: str
    as_it_is: bool


def photograph(sample: Sample, *, readable: Collection[str] = tuple(SUFFIXES)) -> Photograph:
    """Read the photograph of a sample for a target that reads the formats `readable`, keys of SUFFIXES.

    Its file as it is, if that is upright RGB of such a format; else a PNG of the same pixels. All pixels are decoded,
    so that no damaged file is sent. Raises BadImage, naming the file; OSError.
    """
    try:
        data = read_file(sample.image)
        header = photograph_header(io.BytesIO(data))
        pixels = decode_photograph(sample, data)
    except BadImage as error:
        raise BadImage(f"image {sample.image}: {error}") from error
    if header.orientation == UPRIGHT and header.format in readable and header.mode != "RGBA":
        return Photograph(data, SUFFIXES[header.format], as_it_is=True)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return Photograph(buffer.getvalue(), ".png", as_it_is=False)


def send_photograph(
    sample: Sample, folder: Path, name: str, *, style: Style, readable: Collection[str] = tuple(SUFFIXES)
) -> str:
    """Put the photograph of a sample into `folder` as `name` and a suffix; return this path. Raises as `photograph`.

    It is a link where the style says so and the file can stay as it is.
    """
    photo = photograph(sample, readable=readable)
    path = storage.under(folder, name + photo.suffix)
    if style.images == "link" and photo.as_it_is:
        storage.link(sample.image, path)
    else:
        storage.write(path, photo.data)
    return name + photo.suffix
