"""The port behind manifests/storage.py: everything that a place for files has to offer, and its errors."""

from __future__ import annotations

import builtins
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol


class Stat(NamedTuple):
    """Size in bytes, time of the last change in nanoseconds, and a mark of the storage's own.

    If two of a path are equal, its content is the same; every change gives another one. Here the mark is the inode and
    the time of its last change, which `cp -p`, `rsync -t` and `git checkout` cannot set back as they do the other time.
    """

    size: int
    mtime_ns: int
    version: str


class ChangedFile(OSError):
    """A file is not the version that the caller has seen."""


class NotAFile(OSError):
    """There is something of this name that has no content of its own to read: a pipe, a device, a socket."""


class TooLarge(OSError):
    """A file has more bytes than its reader expects of its kind."""


class Storage(Protocol):
    """The operations that a place for files must offer.

    Reading a missing file raises FileNotFoundError, and reading anything but a file raises NotAFile or
    IsADirectoryError at once: no reader waits for a pipe, or reads a device for ever.
    """

    def stat(self, path: Path) -> Stat | None:
        """The file's size, time and version; None if there is none, or something else: a folder, a pipe."""

    def exists(self, path: Path) -> bool:
        """Return True for a file, False for a folder or nothing. Raises NotAFile."""

    def read(self, path: Path, *, at_most: int | None = None) -> bytes:
        """Return the whole content. Raises TooLarge if it has more than `at_most` bytes."""

    def read_version(self, path: Path, *, at_most: int | None = None) -> tuple[Stat, bytes]:
        """Return what `stat` and `read` return, of one version of the file; a bucket is asked once."""

    def read_range(self, path: Path, start: int, length: int, *, unchanged: Stat | None = None) -> bytes:
        """At most `length` bytes from `start` on. Raises ChangedFile if the file is not the version `unchanged`."""

    def reading(self, path: Path) -> BinaryIO:
        """A seekable file to read from; the caller closes it."""

    def write(self, path: Path, data: bytes, *, durable: bool = True) -> None:
        """Write a file whole or not at all, over whatever is there. Unless durable, a power cut may spoil it."""

    def writing(self, path: Path) -> AbstractContextManager[BinaryIO]:
        """Give a file to write to, front to back. It appears when the block ends, and never after an error.

        Removes what writers of this file have left beside it that were killed.
        """

    def append(self, path: Path, data: bytes) -> None:
        """Add bytes to the end of a file, or of a new one. A kill may leave a part of them, at the end."""

    def create(self, path: Path, data: bytes) -> bool:
        """Write a file that is not there yet, and return True; return False if there is one. One of several wins.

        A bucket also returns True where these very bytes are there already: the answer of a write may get lost.
        """

    def replace(self, path: Path, data: bytes, *, unchanged: Stat) -> bool:
        """Write over a file if it is the version `unchanged`, and return whether it was. One of several wins."""

    def is_folder(self, path: Path) -> bool:
        """Return True if there is a folder of this name; a storage without empty folders looks for a file below it."""

    def is_link(self, path: Path) -> bool:
        """Return True if the name stands for something elsewhere; a storage without links says False."""

    def link(self, target: Path, path: Path) -> None:
        """Make a name that stands for a file elsewhere, over whatever is there. Raises OSError where none can be."""

    def list(self, folder: Path, *, suffix: str = "", recursive: bool = False) -> builtins.list[Path]:
        """List the content of a folder, sorted; nothing if there is no folder. recursive: the files at any depth.

        suffix: the end of the names that are wanted. Temporary files of writers are left out.
        """

    def folders(self, folder: Path) -> builtins.list[Path]:
        """List the folders in a folder, sorted; nothing if there is no folder."""

    def remove(self, path: Path) -> None:
        """Remove a file; a missing one is fine."""

    def remove_folder(self, path: Path) -> None:
        """Remove a folder with everything in it; a missing one is fine."""
