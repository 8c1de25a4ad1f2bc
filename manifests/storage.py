"""The one place through which stored files go: images, run folders, stores, manifests, checkpoints and reports.

Callers import this module and call its functions with a `Path`. `storage_of` picks the implementation: buckets for a
`BucketPath` (manifests/bucket_storage.py), else the local file system (manifests/local_storage.py).
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, cast

import google_crc32c

from autolabel.manifests import local_locks, local_storage
from autolabel.manifests.bucket_errors import BucketError
from autolabel.manifests.bucket_storage import BucketStorage
from autolabel.manifests.local_locks import Busy, Hold, Superseded
from autolabel.manifests.local_storage import LOCK, TEMPORARY, LocalStorage
from autolabel.manifests.locations import BucketPath
from autolabel.manifests.storage_port import ChangedFile, NotAFile, Stat, Storage, TooLarge

__all__ = [
    "LOCK",
    "TEMPORARY",
    "BucketError",
    "Busy",
    "ChangedFile",
    "Hold",
    "NotAFile",
    "Stat",
    "Storage",
    "Superseded",
    "TooLarge",
]

_DIGITS = 16  # of a fingerprint
SMALL = 1 << 24  # bytes that a file of settings or JSON may have
_PIECE = 1 << 22  # bytes that a checksum takes into memory at once
_SPOOL = 1 << 26  # bytes of a file that was fetched that stay in memory
NAMELESS = r"^$|\0"  # stored names that no file can have
# Stored names that could leave their root; Windows takes backslashes and drive letters for parts of a path.
LEAVING = r"^/|(^|/)\.\.(/|$)" + (r"|\\|^[A-Za-z]:" if sys.platform == "win32" else "")


# --- functions that callers use ---------------------------------------------------------------------------------------

_LOCAL, _BUCKETS = LocalStorage(), BucketStorage()


def storage_of(path: Path) -> Storage:
    """The storage that a place lies in. Another kind of storage is picked here, and nowhere else."""
    return _BUCKETS if isinstance(path, BucketPath) else _LOCAL


def stat(path: Path) -> Stat | None:
    """Return size, time and version of a file; None if there is none, or something else: a folder, a pipe."""
    return storage_of(path).stat(path)


def exists(path: Path) -> bool:
    """Return True if there is a file of this name; a folder is none. Raises NotAFile for a pipe, device or socket."""
    return storage_of(path).exists(path)


def is_folder(path: Path) -> bool:
    """Return True if there is a folder of this name."""
    return storage_of(path).is_folder(path)


def is_link(path: Path) -> bool:
    """Return True if the name stands for something elsewhere: a symbolic link."""
    return storage_of(path).is_link(path)


def read(path: Path, *, at_most: int | None = None) -> bytes:
    """Return the whole content of a file. Raises FileNotFoundError, NotAFile, TooLarge beyond `at_most` bytes."""
    return storage_of(path).read(path, at_most=at_most)


def read_version(path: Path, *, at_most: int | None = None) -> tuple[Stat, bytes]:
    """Return what `stat` and `read` return, of one version of the file. Raises as `read`."""
    return storage_of(path).read_version(path, at_most=at_most)


def read_range(path: Path, start: int, length: int, *, unchanged: Stat | None = None) -> bytes:
    """Return at most `length` bytes from `start` on. Raises ChangedFile if the file is not the version `unchanged`."""
    return storage_of(path).read_range(path, start, length, unchanged=unchanged)


def reading(path: Path) -> BinaryIO:
    """Open a seekable file to read from; the caller closes it. Raises FileNotFoundError, NotAFile."""
    return storage_of(path).reading(path)


def write(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file whole or not at all, over whatever is there. Unless durable, a power cut may spoil it."""
    storage_of(path).write(path, data, durable=durable)


def writing(path: Path) -> AbstractContextManager[BinaryIO]:
    """Give a file to write to, front to back. It appears when the block ends, and never after an error.

    Removes what writers of this file have left beside it that were killed.
    """
    return storage_of(path).writing(path)


@contextlib.contextmanager
def lending(path: Path) -> Iterator[BinaryIO]:
    """Give a file as `writing` does, to a library that turns errors of a file into its own, such as torch.

    The library never sees one: the first error is raised as it was when the block ends, and nothing appears.
    """
    with writing(path) as file:
        lent = _Lent(file)
        yield cast(BinaryIO, lent)
        if lent.error:
            raise lent.error


class _Lent:
    """A file that takes everything, and keeps the first error of the one behind it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write to the file behind this one, unless it has failed before."""
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Do nothing: the file is forced to disk when it is whole."""


def copy(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all, over whatever is there."""
    with reading(source) as old, writing(target) as new:
        shutil.copyfileobj(old, new)


def append(path: Path, data: bytes) -> None:
    """Add bytes to the end of a file, or of a new one, and force them to disk. A kill may leave a part of them."""
    storage_of(path).append(path, data)


def commit_interval(path: Path) -> float:
    """Seconds of work after which a place shall be told what is done: writing costs money in a bucket."""
    return 5.0 if isinstance(storage_of(path), LocalStorage) else 60.0


def create(path: Path, data: bytes) -> bool:
    """Write a file that is not there yet, and return True; return False if there is one."""
    return storage_of(path).create(path, data)


def replace(path: Path, data: bytes, *, unchanged: Stat) -> bool:
    """Write over a file if it is the version `unchanged`, and return True; else return False."""
    return storage_of(path).replace(path, data, unchanged=unchanged)


def near(path: Path) -> BinaryIO:
    """Open a seekable file of this machine; one in a bucket is fetched whole before. The caller closes it."""
    file = reading(path)
    if not isinstance(path, BucketPath):
        return file
    fetched = cast(BinaryIO, tempfile.SpooledTemporaryFile(_SPOOL))  # noqa: SIM115
    with file:
        shutil.copyfileobj(file, fetched, _PIECE)
    fetched.seek(0)
    return fetched


def link(target: Path, path: Path) -> None:
    """Make `path` a symbolic link to a file elsewhere, over whatever is there. Raises OSError where none can be."""
    storage_of(target if isinstance(target, BucketPath) else path).link(target, path)


def list(folder: Path, *, suffix: str = "", recursive: bool = False) -> builtins.list[Path]:
    """List the content of a folder, sorted, or with `recursive` the files at any depth; nothing without a folder."""
    return storage_of(folder).list(folder, suffix=suffix, recursive=recursive)


def folders(folder: Path) -> builtins.list[Path]:
    """List the folders in a folder, sorted; nothing without one."""
    return storage_of(folder).folders(folder)


def remove(path: Path) -> None:
    """Remove a file; a missing one is fine."""
    storage_of(path).remove(path)


def remove_folder(path: Path) -> None:
    """Remove a folder with everything in it; a missing one is fine."""
    storage_of(path).remove_folder(path)


@contextlib.contextmanager
def hold(
    folder: Path, *, name: str = LOCK, wait: float = 0.0, only_read: bool = False, at_once: bool = False
) -> Iterator[Hold]:
    """Hold a folder against other processes, and give what tells whether it is still held.

    name: of the lock's file; locks of other names do not meet. wait: seconds to wait for another holder, at most; a
    holder of a folder in a bucket who gives no sign of life is waited for until he counts as dead, unless the caller
    wants his answer `at_once`. only_read: the holder writes nothing, so a folder that nobody may write to is held all
    the same. On a disk the lock goes with this process, however that ends, and the folder is made if need be. Raises
    Busy naming who holds it.
    """
    if isinstance(storage_of(folder), LocalStorage):
        with local_locks.hold(folder, name=name, wait=wait, only_read=only_read) as held:
            yield held
    else:
        from autolabel.manifests import bucket_locks  # late: it reads and writes through this module

        with bucket_locks.hold(folder, name=name, wait=wait, only_read=only_read, at_once=at_once) as held:
            yield held


def remove_leftovers(folder: Path, *, recursive: bool = False) -> None:
    """Delete the temporary files that killed writers of ours left in a folder, or at any depth below it.

    Only the command that holds and fills the folder may call it. Links are not followed. Buckets hold none: an upload
    that was cut is no object, and the bucket's own rules remove it.
    """
    if isinstance(storage_of(folder), LocalStorage):
        local_storage.remove_leftovers(folder, recursive=recursive)


def require_conditions(folder: Path) -> None:
    """Raise BucketError for a bucket without conditional writes, in which no run can be kept: four small requests."""
    if isinstance(folder, BucketPath):
        _BUCKETS.require_conditions(folder)


def under(root: Path, name: str) -> Path:
    """Join a stored name to its root. Every name that was read from a file goes through here.

    Raises ValueError for a name that could leave the root, or that no file can have: an absolute or empty one, one with
    ".." or a NUL, and on Windows one with a backslash or a drive letter.
    """
    if re.search(f"{NAMELESS}|{LEAVING}", name):
        raise ValueError(f"path {name!r} leaves its root {root}: expected a relative path with forward slashes")
    return root / name


def inside(root: Path, name: str) -> Path:
    """Join a stored name to the folder that owns it. Raises ValueError as `under`, and for a link on the way.

    Whoever writes below a folder that came from somebody else must not be led out of it by a link in it.
    """
    path, parts = under(root, name), Path(name).parts
    for depth in range(1, len(parts) + 1):
        require_no_link(root.joinpath(*parts[:depth]))
    return path


def require_no_link(path: Path) -> None:
    """Raise ValueError for a link in a folder that has none of its own."""
    if is_link(path):
        raise ValueError(f"{path} is a link: a run holds its own files; link the whole run folder instead")


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON as `writing` does."""
    with writing(path) as file:
        file.write(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """The bytes that `write_json` writes."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # bytes of file names that are no UTF-8 become JSON's own escapes


def fingerprint_bytes(data: bytes) -> str:
    """16 hex digits that recognise a file's content: the first ones of its sha256."""
    return hashlib.sha256(data).hexdigest()[:_DIGITS]


def fingerprint(path: Path) -> str:
    """`fingerprint_bytes` of a file, all of which is read."""
    return sha256(path)[:_DIGITS]


def crc32c(path: Path) -> str:
    """Checksum of a whole file, 8 hex digits."""
    checksum = 0
    for piece in _pieces(path):
        checksum = google_crc32c.extend(checksum, piece)
    return f"{checksum:08x}"


def sha256(path: Path) -> str:
    """Hex sha256 of a whole file."""
    digest = hashlib.sha256()
    for piece in _pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    with reading(path) as file:
        while data := file.read(_PIECE):
            yield data
