"""Walk through folders of images and labels, and account for every file that is left aside.

Names are compared in composed form (Unicode NFC): macOS hands out "e" and an accent where others write one letter.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from autolabel.manifests import storage
from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.wording import Table, number

HIDDEN = "hidden files, and folders of other programs"
RUNS = "run folders"
CIRCLES = "links that lead in circles"
NAMES = "names that no manifest can hold (not UTF-8)"
TWINS = "names that look like another file's (letters composed otherwise)"
STRAYS = "labels without their image"
UNUSED = "files and folders that no sample of these splits needs"
BESIDE = "files and folders beside the data set"
_TOOLS = {"@eadir", "__macosx", "lost+found", "$recycle.bin", "system volume information"}
_CONVERT = {".heic", ".heif", ".avif", ".gif", ".jp2", ".jxl", ".dng", ".cr2", ".nef", ".arw", ".ppm", ".tga", ".exr"}


class BadLayout(ValueError):
    """The folder does not have the layout, or no layout fits it."""


class Aside:
    """The files and folders that a scan leaves aside, by the reason."""

    def __init__(self) -> None:
        self._paths: dict[str, dict[Path, None]] = {}

    def note(self, reason: str, path: Path) -> None:
        """Add a file or folder; the same one counts once for every reason."""
        self._paths.setdefault(reason, {})[path] = None

    def note_suffix(self, path: Path) -> None:
        """Add a file that is no image or label by its suffix; those that can be converted are told so."""
        suffix = path.suffix.lower()
        shown = suffix if suffix and len(suffix) <= 12 else "without a suffix" if not suffix else "other suffixes"
        advice = ": convert them to .png or .jpg" if suffix in _CONVERT else ""
        self.note(f"other files, {shown}{advice}", path)

    def of(self, reason: str) -> list[Path]:
        """The paths that were left aside for a reason, in the order in which they were met."""
        return list(self._paths.get(reason, ()))

    def table(self) -> Table:
        """Reasons, the commonest first, with the number of files or folders and the first of them."""
        entries = sorted(self._paths.items(), key=lambda entry: -len(entry[1]))
        rows = [[reason, number(len(paths)), str(next(iter(paths)))] for reason, paths in entries]
        return Table("left aside", ["reason", "number", "first"], rows)

    def __len__(self) -> int:
        return sum(map(len, self._paths.values()))


def files_under(folder: Path, *, skip: Collection[Path] = (), aside: Aside | None = None) -> Iterator[Path]:
    """The files in a folder and its sub-folders, in order, links followed. A missing folder has none.

    Hidden files and folders, folders of other programs, run folders, links that lead in circles, and names that a
    manifest cannot hold are left out and noted in `aside`; the folders of `skip` are left out without a note.
    """
    real = folder.resolve()
    yield from _walk(folder, real, frozenset(real.parents), skip=skip, aside=Aside() if aside is None else aside)


def _walk(folder: Path, real: Path, above: frozenset[Path], *, skip: Collection[Path], aside: Aside) -> Iterator[Path]:
    """See `files_under`. real: the folder that is meant after all links; above: those on the way to it."""
    above |= {real}
    folders = {path.name for path in storage.folders(folder)}
    for path in storage.list(folder):
        if is_hidden(path.name):
            aside.note(HIDDEN, path)
        elif not is_holdable(path.name):
            aside.note(NAMES, path)
        elif path.name not in folders:
            yield path
        elif RunFolder(path).exists():
            aside.note(RUNS, path)
        elif path in skip:
            continue
        else:
            target = path.resolve() if storage.is_link(path) else real / path.name
            if target in above:
                aside.note(CIRCLES, path)
            else:
                yield from _walk(path, target, above, skip=skip, aside=aside)


def note_unused(folder: Path, walked: Collection[Path], *, aside: Aside, reason: str = UNUSED) -> None:
    """Note everything in a folder that is neither in `walked`, files and folders that are accounted for, nor hidden."""
    for path in storage.list(folder):
        if path in walked:
            continue
        if any(place.is_relative_to(path) for place in walked):
            note_unused(path, walked, aside=aside, reason=reason)
        else:
            aside.note(HIDDEN if is_hidden(path.name) else reason, path)


def is_hidden(name: str) -> bool:
    """True for names that begin with a dot, and for folders that other programs leave, such as @eaDir."""
    return name.startswith(".") or name.lower() in _TOOLS


def is_holdable(name: str) -> bool:
    """True if a manifest can hold this name of a file or folder."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return not re.search(f"{storage.NAMELESS}|{storage.LEAVING}", name)


def composed(text: str) -> str:
    """The text in Unicode NFC, in which names are compared."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def by_name(
    folder: Path, suffixes: Sequence[str], *, aside: Aside, end: str = "", skip: Collection[Path] = ()
) -> dict[str, Path]:
    """Composed relative path without suffix and without `end` -> file, for the files with one of these suffixes.

    All others are noted in `aside`, and so is the second of two names that are equal once composed. Raises BadLayout
    if two files share a name but for the suffix.
    """
    files: dict[str, Path] = {}
    stored: dict[str, str] = {}  # the names as the file system has them
    start = len(folder.as_posix().rstrip("/")) + 1 if folder != Path() else 0
    for path in files_under(folder, skip=skip, aside=aside):
        suffix = path.suffix
        raw = path.as_posix()[start:].removesuffix(suffix)
        name = composed(raw.removesuffix(end))
        if suffix.lower() not in suffixes:
            aside.note_suffix(path)
        elif not raw.endswith(end):
            aside.note(f"labels whose names do not end in {end!r}", path)
        elif stored.setdefault(name, raw) != raw:
            aside.note(TWINS, path)
        elif name in files:
            raise BadLayout(f"{files[name]} and {path} share a stem: which label is whose?")
        else:
            files[name] = path
    return files


def common_end(images: Collection[str], labels: Collection[str]) -> str:
    """The text by which label names are longer than those of images, such as "_mask"; "" if most have no such one."""
    ends: dict[str, int] = {}
    for label in labels:
        for cut in range(len(label) - 1, 0, -1):
            if label[:cut] in images:
                ends[label[cut:]] = ends.get(label[cut:], 0) + 1
                break
    best = max(ends, key=lambda end: ends[end], default="")
    return best if best and 2 * ends[best] >= len(labels) else ""
