"""Names that labels can have as PNG files, asked for when a run is planned, not after the work."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.run.labels import LABELS, LAYERS, in_layer, png_place

_LONGEST = 255  # bytes of a name, on nearly every file system
_WINDOWS = sys.platform == "win32"
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d|conin\$|conout\$)\s*(\.|$)", re.IGNORECASE)
_UNUSABLE = re.compile(r'[<>:"|?*\x00-\x1f]|[. ]$')  # in a name on Windows
_NO_FILE = rf"{storage.NAMELESS}|^[./]+$"
# Paths from whose parts `png_place` takes nothing but the end: no part begins with a dot, and there is a suffix.
_PLAIN = r"^(?:[A-Za-z0-9_-][ -.0-~]*/)*[A-Za-z0-9_-][ -.0-~]*\.[A-Za-z0-9]+$"
_ADVICE = "use --store zarr, or rename the image"


def marks(names: pa.ChunkedArray | pa.Array | list[str]) -> NDArray[np.uint64]:
    """64 bits of each name, by which it is recognised."""
    given = np.array(names, dtype=object) if isinstance(names, list) else names.to_numpy(zero_copy_only=False)
    return np.asarray(pd.util.hash_array(given, categorize=False))


def require_distinct(
    names: Callable[[], Iterable[pa.ChunkedArray | pa.Array | list[str]]], complaint: Callable[[str], str]
) -> None:
    """Raise ValueError(complaint(name)) for a name that comes twice.

    names: gives them, some at a time; they are read again where two look alike. Eight bytes of each are in memory.
    """
    seen = np.concatenate([np.empty(0, np.uint64), *map(marks, names())])
    seen.sort()
    twice = np.unique(seen[1:][seen[1:] == seen[:-1]])
    del seen
    if not len(twice):
        return
    alike = set[str]()
    for some in names():
        for place in np.flatnonzero(np.isin(marks(some), twice)).tolist():
            name = some[place] if isinstance(some, list) else some[place].as_py()
            if name in alike:
                raise ValueError(complaint(name))
            alike.add(name)


def require_png_names(run: Path, images: Callable[[], Iterable[pa.ChunkedArray | pa.Array | list[str]]]) -> None:
    """Raise ValueError, naming the first image, unless every image has a label of its own that any disk can hold.

    images: gives the images' paths in their manifest, some at a time; they are read again where two are alike.
    """
    longest = ""

    def alike() -> Iterator[pa.Array]:
        nonlocal longest
        for labels in _labels(images):
            length = pc.binary_length(labels)
            if len(labels) and pc.max(length).as_py() > len(longest.encode()):
                longest = labels[pc.index(length, pc.max(length)).as_py()].as_py()
            yield _folded(labels)

    try:
        require_distinct(
            alike,
            lambda name: (
                f"two images would write labels that many disks take for one, {name}, as they differ in the case"
                " or the composition of letters alone: use --store zarr, or rename one of them"
            ),
        )
    except ValueError:
        require_distinct(
            lambda: _labels(images),
            lambda name: f"two images would both write {name}: use --store zarr, or rename one of them",
        )
        raise
    try:
        storage.stat(storage.under(run, in_layer(longest, max(LAYERS, key=len))))
    except OSError as error:  # the system knows its limit
        raise ValueError(f"the label {run / longest} has no name here ({error.strerror}): {_ADVICE}") from error


def _labels(images: Callable[[], Iterable[pa.ChunkedArray | pa.Array | list[str]]]) -> Iterator[pa.Array]:
    """The labels of images some at a time: of plain names, as nearly all are, in one go."""
    for some in images():
        paths = pa.array(some, pa.string()) if isinstance(some, list) else some
        paths = paths.combine_chunks() if isinstance(paths, pa.ChunkedArray) else paths
        plain = pc.and_(pc.match_substring_regex(paths, _PLAIN), pc.less(pc.binary_length(paths), _LONGEST))
        if _WINDOWS:
            plain = pc.and_(plain, False)
        plain = pc.and_not(plain, pc.match_substring_regex(paths, r"(?i)\.png/"))
        simple = pc.replace_substring_regex(paths.filter(plain), r"\.[^./]*$", ".png")
        yield pc.binary_join_element_wise(LABELS, simple, "/")
        others = paths.filter(pc.invert(plain)).to_pylist()
        yield pa.array([_label(image) for image in others if not re.search(_NO_FILE, image)], pa.string())


def _folded(labels: pa.Array) -> pa.Array:
    """The labels as disks may see them that tell apart neither the case nor the composition of letters."""
    if pc.all(pc.string_is_ascii(labels)).as_py():
        return pc.ascii_lower(labels)
    return pa.array(map(folded, labels.to_pylist()), pa.string())


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
