"""Files that came back from a labelling tool: a folder, or a zip that is read as it is and never unpacked.

A zip comes from a stranger. Its list is checked before anything in it is read: names that leave the archive, links,
names that stand twice, encryption, and sizes that no labels have. A file of it is then read in memory, up to a limit.
"""

from __future__ import annotations

import errno
import io
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from autolabel.manifests import storage
from autolabel.manifests.formats.exchange import BadReturn
from autolabel.manifests.walk import composed, is_hidden
from autolabel.manifests.wording import reason, size

MOST_FILES = 1_000_000
MOST_BYTES = 1 << 28  # of one file: a label of 16,384 x 16,384 pixels that is not compressed
MOST_JSON = 1 << 30  # of JSON in a zip, which is taken into memory; a file is read a piece at a time
_MOST_IN_ALL = 1 << 40
_RATIO = 200  # bytes for one compressed byte; masks and JSON stay below 60, deflate gets to 1,032
_SMALL = 1 << 24  # bytes below which an archive may be as compressible as it likes
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1
_LEAVING = r"^/|^[A-Za-z]:|(^|/)\.\.(/|$)|\\"  # on any system: what is harmless here would be unpacked elsewhere


class Files:
    """The files of a folder or a zip by their names, relative and with forward slashes, in order.

    Hidden files and what macOS adds to a zip are left out. path: the folder or zip, for messages.
    """

    def __init__(self, path: Path, entries: Mapping[str, Path | zipfile.ZipInfo], zipped: zipfile.ZipFile | None):
        self.path = path
        self.names: Sequence[str] = tuple(sorted(entries))
        self._entries = entries
        self._zipped = zipped

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def read(self, name: str, *, at_most: int = MOST_BYTES) -> bytes:
        """Return the content of a file. Raises BadReturn for more than `at_most` bytes, and for a damaged archive."""
        entry = self._entries[name]
        if isinstance(entry, Path):
            try:
                return storage.read(entry, at_most=at_most)
            except (storage.TooLarge, storage.NotAFile, FileNotFoundError) as error:
                raise BadReturn(f"{entry}: {reason(error)}") from error
        if entry.file_size > at_most:
            raise BadReturn(f"{self.shown(name)} has {size(entry.file_size)}: expected at most {size(at_most)}")
        assert self._zipped is not None
        try:
            return self._zipped.read(entry)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # this one is a place before the file
                raise
            raise BadReturn(f"{self.shown(name)} is damaged ({reason(error)}): export or copy it again") from error

    @contextmanager
    def reading(self, name: str, *, at_most: int = MOST_BYTES) -> Iterator[BinaryIO]:
        """Open a file to read and seek in; one of a zip is taken into memory, up to a limit. Raises BadReturn."""
        entry = self._entries[name]
        with (
            storage.reading(entry) if isinstance(entry, Path) else io.BytesIO(self.read(name, at_most=at_most)) as file
        ):
            yield file

    def shown(self, name: str) -> str:
        """A file in messages: its path, or its name in the zip."""
        return str(self.path / name) if self._zipped is None else f"{name!r} in {self.path}"

    def under(self, folder: str) -> str | None:
        """The way to a folder of this name, "" if it lies at the top: zips often hold one folder that holds all.

        None if there is no such folder. Raises BadReturn if there are several.
        """
        ways = {"/".join(parts[: parts.index(folder)]) for parts in map(_folders, self.names) if folder in parts}
        if len(ways) > 1:
            shown = " and ".join(repr(f"{way}/{folder}".strip("/")) for way in sorted(ways)[:2])
            raise BadReturn(f"{self.path} holds {shown}: import one of them at a time")
        return next((f"{way}/" if way else "" for way in ways), None)


@contextmanager
def opened(path: Path) -> Iterator[Files]:
    """Open a folder or a zip. Raises BadReturn for one that is missing, damaged or dangerous; nothing is written."""
    if storage.is_folder(path):
        yield Files(path, dict(_in_folder(path)), None)
        return
    try:
        file = storage.reading(path)
    except FileNotFoundError as error:
        raise BadReturn(f"{path} does not exist: expected a folder or a zip") from error
    except (storage.NotAFile, IsADirectoryError) as error:
        raise BadReturn(f"{path} is no file: expected a folder or a zip") from error
    with file:
        try:
            zipped = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, EOFError) as error:
            raise BadReturn(f"{path} is no zip, or cut off ({reason(error)}): expected a folder or a zip") from error
        with zipped:
            _require_harmless(path, zipped.infolist(), length=file.seek(0, 2))
            entries = {info.filename: info for info in zipped.infolist() if not info.filename.endswith("/")}
            yield Files(path, {name: info for name, info in entries.items() if _is_shown(name)}, zipped)


def of_file(path: Path) -> Files:
    """A file, and what lies in the folder of its name without the suffix."""
    beside = {f"{path.stem}/{name}": file for name, file in _in_folder(path.parent / path.stem)}
    return Files(path.parent, {path.name: path, **beside}, None)


def stem(name: str) -> str:
    """A file's name without its suffix, folders kept, in Unicode NFC as sample ids are."""
    path = PurePosixPath(name)
    return composed(str(path.parent / path.stem))


def _in_folder(folder: Path) -> Iterator[tuple[str, Path]]:
    start = len(folder.as_posix().rstrip("/")) + 1 if folder != Path() else 0
    for path in storage.list(folder, recursive=True):
        name = path.as_posix()[start:]
        if _is_shown(name):
            yield name, path


def _is_shown(name: str) -> bool:
    return not any(is_hidden(part) for part in PurePosixPath(name).parts)


def _folders(name: str) -> tuple[str, ...]:
    return PurePosixPath(name).parts[:-1]


def _require_harmless(path: Path, entries: Sequence[zipfile.ZipInfo], *, length: int) -> None:
    """Raise BadReturn for the first entry of a zip that no labelling tool writes. length: bytes of the zip."""
    if len(entries) > MOST_FILES:
        raise BadReturn(f"{path} lists {len(entries)} files: expected at most {MOST_FILES}")
    names: set[str] = set()
    in_all = 0
    for entry in entries:
        name = entry.orig_filename  # `filename` ends at a NUL
        shown = f"{path} holds {name[:200]!r}"
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if re.search(f"{storage.NAMELESS}|{_LEAVING}", name):
            raise BadReturn(f"{shown}, a name that leads out of the archive: it is refused whole")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise BadReturn(f"{shown}, a {'link' if kind == stat.S_IFLNK else 'special file'}: expected files alone")
        if name in names:
            raise BadReturn(f"{shown} twice: which of the two is meant?")
        if entry.flag_bits & _ENCRYPTED:
            raise BadReturn(f"{shown}, which is encrypted: export it without a password")
        if entry.compress_type not in _METHODS:
            raise BadReturn(f"{shown}, packed by method {entry.compress_type}: expected an ordinary zip (deflate)")
        names.add(name)
        in_all += entry.file_size
        if entry.file_size > _SMALL and entry.file_size > _RATIO * max(1, entry.compress_size):
            raise BadReturn(
                f"{shown}, {size(entry.compress_size)} that become {size(entry.file_size)}: no labels do, so it is"
                " taken for a zip bomb; unpack it yourself if you trust it, and import the folder"
            )
    if in_all > _MOST_IN_ALL or (in_all > _SMALL and in_all > _RATIO * length):  # the same bytes may be listed often
        raise BadReturn(
            f"{path} has {size(length)} that become {size(in_all)}: no labels do, so it is taken for a zip bomb;"
            " unpack it yourself if you trust it, and import the folder"
        )
