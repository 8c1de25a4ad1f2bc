"""Names that labels can have as PNG files, asked for when a run is planned, not after the work."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from autolabel.manifests import storage
from autolabel.manifests.run.labels import LAYERS, in_layer, png_place

_LONGEST = 255  # bytes of a name, on nearly every file system
_WINDOWS = sys.platform == "win32"
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d|conin\$|conout\$)\s*(\.|$)", re.IGNORECASE)
_UNUSABLE = re.compile(r'[<>:"|?*\x00-\x1f]|[. ]$')  # in a name on Windows
_NO_FILE = rf"{storage.NAMELESS}|^[./]+$"
_ADVICE = "use --store zarr, or rename the image"


def require_distinct(names: Iterable[list[str]], complaint: Callable[[str], str]) -> None:
    """Raise ValueError(complaint(name)) for a name that comes twice; of the others, eight bytes each are remembered.

    Two names of a million share their 64 bits by chance once in forty million manifests; such a pair would be refused.
    """
    seen = np.empty(0, np.uint64)
    for some in names:
        marks = pd.util.hash_array(np.array(some, dtype=object), categorize=False)
        seen = np.concatenate([seen, np.sort(marks)])
        seen.sort(kind="stable")  # merges the two sorted parts
        twice = seen[1:][seen[1:] == seen[:-1]]
        if len(twice):
            raise ValueError(complaint(some[int(np.flatnonzero(marks == twice[0])[-1])]))


def require_png_names(run: Path, images: Callable[[], Iterable[list[str]]]) -> None:
    """Raise ValueError, naming the first image, unless every image has a label of its own that any disk can hold.

    images: gives the images' paths in their manifest, some at a time; they are read several times.
    """
    require_distinct(
        _labels(images), lambda name: f"two images would both write {name}: use --store zarr, or rename one of them"
    )
    require_distinct(
        ([folded(name) for name in some] for some in _labels(images)),
        lambda name: (
            f"two images would write labels that many disks take for one, {name}, as they differ in the case"
            " or the composition of letters alone: use --store zarr, or rename one of them"
        ),
    )
    longest = max((name for some in _labels(images) for name in some), key=lambda name: len(name.encode()), default="")
    try:
        storage.stat(storage.under(run, in_layer(longest, max(LAYERS, key=len))))
    except OSError as error:  # the system knows its limit
        raise ValueError(f"the label {run / longest} has no name here ({error.strerror}): {_ADVICE}") from error


def _labels(images: Callable[[], Iterable[list[str]]]) -> Iterator[list[str]]:
    for some in images():
        yield [_label(image) for image in some if not re.search(_NO_FILE, image)]  # no file, so no label


def _label(image: str) -> str:
    name = png_place(image)
    fault = unusable(name)
    if fault:
        raise ValueError(f"the label of image {image!r} cannot be called {name!r}: {fault}")
    return name


def unusable(path: str, *, windows: bool = _WINDOWS) -> str:
    """The reason why no file can have this path, with what to do; empty if one can."""
    for name in path.split("/"):
        if len(name.encode()) > _LONGEST:
            return f"a name has at most {_LONGEST} bytes, not {len(name.encode())}; {_ADVICE}"
        if windows and _DEVICES.match(name):
            return f"Windows takes {name!r} for a device; {_ADVICE}"
        if windows and _UNUSABLE.search(name):
            return f"Windows has no name such as {name!r}; {_ADVICE}"
    return ""


def folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
