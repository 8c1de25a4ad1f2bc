"""Read the photograph and the coarse label of a sample, and compare their sizes with its manifest.

BadImage says that the file itself is to blame, and why. An OSError is trouble of the disk: trying again may help.
"""

from __future__ import annotations

import contextlib
import errno
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests import storage
from autolabel.manifests.images import (
    BadImage,
    decode_image,
    decode_label,
    decode_picture,
    photograph_header,
    require_size,
)
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.samples import Sample

_BLAMES_FILE = {
    errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG
}  # fmt: skip
_MAX_BYTES = 1 << 30  # no photograph comes near this


def read_file(path: Path) -> bytes:
    """The bytes of an image file. Raises BadImage if it is missing, unreadable, too large or no regular file."""
    return read_version(path)[1]


def read_version(path: Path) -> tuple[storage.Stat, bytes]:
    """The stat and the bytes of one version of an image file. Raises BadImage as `read_file`."""
    try:
        return storage.read_version(path, at_most=_MAX_BYTES)
    except FileNotFoundError as error:
        raise BadImage("the file is missing") from error
    except (storage.NotAFile, storage.TooLarge) as error:
        raise BadImage(str(error.strerror)) from error
    except IsADirectoryError as error:
        raise BadImage("not a regular file") from error
    except OSError as error:
        if not blames_file(error):
            raise
        raise BadImage(f"the file cannot be read ({error.strerror})") from error


def blames_file(error: OSError) -> bool:
    """True if trying again will not help: the file is gone, or the system will never give it."""
    return error.errno in _BLAMES_FILE


def decode_photograph(sample: Sample, data: bytes) -> NDArray[np.uint8]:
    """The bytes of a sample's photograph as (H, W, 3) uint8 RGB. Raises BadImage, also for another size."""
    pixels = decode_image(data)
    _require_size(sample, pixels.shape[:2])
    return pixels


def read_photograph(sample: Sample) -> NDArray[np.uint8]:
    """The photograph of a sample as (H, W, 3) uint8 RGB. Raises BadImage, naming the file; OSError."""
    return photograph_of(sample, fetch_photograph(sample))


def photograph_of(sample: Sample, data: bytes) -> NDArray[np.uint8]:
    """The bytes of a sample's photograph as (H, W, 3) uint8 RGB. Raises BadImage, naming the file."""
    with _naming(sample):
        return decode_photograph(sample, data)


def fetch_photograph(sample: Sample) -> bytes:
    """The bytes of a sample's photograph. Raises BadImage, naming the file; OSError."""
    with _naming(sample):
        return read_file(sample.image)


def read_picture(sample: Sample, *, shrink: float = 1, rows: int | None = None) -> tuple[Image.Image, int]:
    """The photograph of a sample as `picture_of` gives it. Raises BadImage, naming the file; OSError."""
    return picture_of(sample, fetch_photograph(sample), shrink=shrink, rows=rows)


def picture_of(sample: Sample, data: bytes, *, shrink: float = 1, rows: int | None = None) -> tuple[Image.Image, int]:
    """A sample's photograph as a Pillow image, and by which factor, at most `shrink`, it is smaller than the file's.

    rows: how many of the upper rows are needed; the others may be missing. See `decode_picture`. Raises BadImage,
    naming the file.
    """
    with _naming(sample):
        picture, smaller = decode_picture(data, shrink, rows=rows)
        _require_size(sample, photograph_header(io.BytesIO(data)).size)
        return picture, smaller


@contextlib.contextmanager
def _naming(sample: Sample) -> Iterator[None]:
    try:
        yield
    except BadImage as error:
        raise BadImage(f"image {sample.image}: {error}") from error


def _require_size(sample: Sample, size: tuple[int, ...]) -> None:
    if size != (sample.height, sample.width):
        raise BadImage(
            f"the image is {size[1]} x {size[0]} but its manifest says {sample.width} x {sample.height}: scan again"
        )


def read_coarse(sample: Sample, space: LabelSpace, *, drawn_void: bool = False) -> NDArray[np.uint8] | None:
    """The coarse label of a sample as (H, W) uint8 train ids, None if it has none. Raises BadImage, naming the file.

    drawn_void: where the file holds source ids, polygons of no class are VOID, not 255 (`decode_label`).
    """
    if sample.coarse_label is None:
        return None
    try:
        data = read_file(sample.coarse_label)
        label = decode_label(data, space, ids=sample.label_ids, drawn_void=drawn_void)
        require_size(label, (sample.height, sample.width))
        return label
    except BadImage as error:
        raise BadImage(f"its coarse label {sample.coarse_label}: {error}") from error
