"""The one place that touches stored files: images, run folders, stores, manifests, checkpoints and reports.

Callers import this module and call its functions with a `Path`. `storage_of` picks the implementation; today it is the
local file system. A reader sees the old file or the new one, never a part: bytes go to a temporary name beside the
target, are forced to disk, then renamed over it.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat as modes
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import google_crc32c

TEMPORARY = ".tmp"  # suffix of files that a killed writer may leave behind
LOCK = ".lock"
_HOLDER = ".holder"  # suffix of the file that says who holds a lock
_EDGE = 64 * 1024
_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0)
_PIECE = 1 << 22  # bytes that a checksum takes into memory at once
LEAVING = r"^/|^[A-Za-z]:|[\\\0]|(^|/)\.\.(/|$)"  # stored names that could leave their root on some system


class Stat(NamedTuple):
    """Size in bytes, time of the last change in nanoseconds, and a mark of the storage's own.

    Two of a path are equal if its content is the same; every change gives another one.
    """

    size: int
    mtime_ns: int
    version: str


class ChangedFile(OSError):
    """A file is not the version that the caller has seen."""


class Busy(ValueError):
    """Another process holds a folder."""


class Storage(Protocol):
    """The operations that a place for files must offer. Reading a missing file raises FileNotFoundError."""

    def stat(self, path: Path) -> Stat | None:
        """The file's size, time and version; None if there is none, or something else: a folder, a pipe."""

    def read(self, path: Path) -> bytes:
        """The whole content."""

    def read_range(self, path: Path, start: int, length: int, *, unchanged: Stat | None = None) -> bytes:
        """At most `length` bytes from `start` on. Raises ChangedFile if the file is not the version `unchanged`."""

    def reading(self, path: Path) -> BinaryIO:
        """A seekable file to read from; the caller closes it."""

    def write(self, path: Path, data: bytes, *, durable: bool = True) -> None:
        """Write a file whole or not at all, over whatever is there. Unless durable, a power cut may spoil it."""

    def writing(self, path: Path) -> AbstractContextManager[BinaryIO]:
        """Give a file to write to, front to back. It appears when the block ends, and never after an error."""

    def create(self, path: Path, data: bytes) -> bool:
        """Write a file that is not there yet, and return True; return False if there is one. One of several wins."""

    def replace(self, path: Path, data: bytes, *, unchanged: Stat) -> bool:
        """Write over a file if it is the version `unchanged`, and return whether it was. One of several wins."""

    def is_folder(self, path: Path) -> bool:
        """Whether there is a folder of this name, where folders can be empty, or else a file below it."""

    def list(self, folder: Path, *, suffix: str = "", recursive: bool = False) -> builtins.list[Path]:
        """What lies in a folder, sorted; nothing if there is no folder. Recursive: the files at any depth.

        suffix: the end of the names that are wanted. Temporary files of writers are left out.
        """

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder with everything in it; a missing one is fine."""


class LocalStorage:
    """Files of the local file system, or of a network drive that is mounted like one."""

    def stat(self, path: Path) -> Stat | None:
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:  # links in a circle
                return None
            raise
        return _stat(found) if modes.S_ISREG(found.st_mode) else None

    def read(self, path: Path) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def read_range(self, path: Path, start: int, length: int, *, unchanged: Stat | None = None) -> bytes:
        descriptor = os.open(path, _READ)  # a crop is read in 0.4 ms: `open` would take 2 % of that
        try:
            if unchanged is not None and _stat(os.fstat(descriptor)) != unchanged:
                raise ChangedFile(f"{path} has changed while it was read")
            os.lseek(descriptor, start, os.SEEK_SET)
            return os.read(descriptor, length)
        finally:
            os.close(descriptor)

    def reading(self, path: Path) -> BinaryIO:
        return open(path, "rb")

    def write(self, path: Path, data: bytes, *, durable: bool = True) -> None:
        with _replacing(path, durable) as file:
            file.write(data)

    def writing(self, path: Path) -> AbstractContextManager[BinaryIO]:
        return _replacing(path, durable=True)

    def create(self, path: Path, data: bytes) -> bool:
        if os.path.lexists(path):
            return False
        with _temporary(path) as temporary:
            with open(temporary, "xb") as file:
                file.write(data)
                _force(file)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except (AttributeError, NotImplementedError, OSError):  # no links here: claim the name, then fill it
                try:
                    open(path, "xb").close()
                except FileExistsError:
                    return False
                os.replace(temporary, path)
            _sync_folder(path.parent)
        return True

    def replace(self, path: Path, data: bytes, *, unchanged: Stat) -> bool:
        import filelock  # late, like below: most commands need no lock, and help should be quick

        # The file system compares nothing. Everybody who replaces this file does so under this lock.
        lock = path.with_name(f".{path.name}{LOCK}")
        with filelock.FileLock(lock, thread_local=False, fallback_to_soft=False):
            same = self.stat(path) == unchanged
            if same:
                self.write(path, data)
            with contextlib.suppress(OSError):  # Windows removes it when it is released
                os.unlink(lock)  # whoever waits for it sees that it has lost its name, and makes a new one
        return same

    def is_folder(self, path: Path) -> bool:
        return path.is_dir()

    def list(self, folder: Path, *, suffix: str = "", recursive: bool = False) -> builtins.list[Path]:
        if recursive:
            found = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
        else:
            try:
                found = [folder / name for name in os.listdir(folder)]
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(path for path in found if path.name.endswith(suffix) and not _is_temporary(path.name))

    def remove(self, path: Path) -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except (IsADirectoryError, PermissionError):  # Linux says the first of a folder, macOS and Windows the second
            if not os.path.isdir(path):
                raise
            shutil.rmtree(path)


def _stat(found: os.stat_result) -> Stat:
    return Stat(found.st_size, found.st_mtime_ns, str(found.st_ino))


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(TEMPORARY)


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """Give a name beside `target`, in a folder that exists; nothing lies there afterwards."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")
    try:
        yield temporary
    except OSError as error:
        if error.filename is None:  # a full disk does not say where
            error.filename = str(target)
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def _replacing(target: Path, durable: bool) -> Iterator[BinaryIO]:
    """Give a temporary file to write to; on success it replaces `target`, on any error it is removed."""
    with _temporary(target) as temporary:
        with open(temporary, "xb") as file:
            yield file
            if durable:
                _force(file)
        os.replace(temporary, target)
        if durable:
            _sync_folder(target.parent)


def _force(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Force the names inside a folder to disk, where the system can open a folder; Windows cannot, and need not."""
    if getattr(os, "O_DIRECTORY", None) is None:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- functions that callers use ---------------------------------------------------------------------------------------

_LOCAL = LocalStorage()


def storage_of(path: Path) -> Storage:
    """The storage that a location lies in. Another kind of storage is picked here, and nowhere else."""
    return _LOCAL


def stat(path: Path) -> Stat | None:
    """As `Storage.stat`."""
    return storage_of(path).stat(path)


def exists(path: Path) -> bool:
    """Whether a file of this name can be read; a folder is none."""
    return stat(path) is not None


def is_folder(path: Path) -> bool:
    """As `Storage.is_folder`."""
    return storage_of(path).is_folder(path)


def read(path: Path) -> bytes:
    """As `Storage.read`."""
    return storage_of(path).read(path)


def read_range(path: Path, start: int, length: int, *, unchanged: Stat | None = None) -> bytes:
    """As `Storage.read_range`."""
    return storage_of(path).read_range(path, start, length, unchanged=unchanged)


def reading(path: Path) -> BinaryIO:
    """As `Storage.reading`."""
    return storage_of(path).reading(path)


def write(path: Path, data: bytes, *, durable: bool = True) -> None:
    """As `Storage.write`."""
    storage_of(path).write(path, data, durable=durable)


def writing(path: Path) -> AbstractContextManager[BinaryIO]:
    """As `Storage.writing`."""
    return storage_of(path).writing(path)


def copy(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all, over whatever is there."""
    with reading(source) as old, writing(target) as new:
        shutil.copyfileobj(old, new)


def create(path: Path, data: bytes) -> bool:
    """As `Storage.create`."""
    return storage_of(path).create(path, data)


def replace(path: Path, data: bytes, *, unchanged: Stat) -> bool:
    """As `Storage.replace`."""
    return storage_of(path).replace(path, data, unchanged=unchanged)


def list(folder: Path, *, suffix: str = "", recursive: bool = False) -> builtins.list[Path]:
    """As `Storage.list`."""
    return storage_of(folder).list(folder, suffix=suffix, recursive=recursive)


def remove(path: Path) -> None:
    """As `Storage.remove`."""
    storage_of(path).remove(path)


def under(root: Path, name: str) -> Path:
    """Join a stored name to its root. Every name that was read from a file goes through here.

    Raises ValueError for a name that could leave the root on some system: an absolute one, one with "..", a backslash,
    a drive letter or a NUL.
    """
    if not name or re.search(LEAVING, name):
        raise ValueError(f"path {name!r} leaves its root {root}: expected a relative path with forward slashes")
    return root / name


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, whole or not at all."""
    write(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """The bytes that `write_json` writes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def fingerprint_bytes(data: bytes) -> str:
    """16 hex digits that recognise a file's content: its length, its first and its last 64 KiB.

    Compressed images that differ anywhere differ in length or at an end, as good as always; reading two pieces keeps
    the check cheap for tens of thousands of images.
    """
    return _digest(len(data), data[:_EDGE], data[-_EDGE:])


def fingerprint(path: Path) -> str:
    """`fingerprint_bytes` of a file, reading at most 128 KiB of it."""
    with reading(path) as file:
        head = file.read(_EDGE)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _EDGE))
        return _digest(size, head, file.read(_EDGE))


def _digest(size: int, head: bytes, tail: bytes) -> str:
    return hashlib.blake2b(size.to_bytes(8, "little") + head + tail, digest_size=8).hexdigest()


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


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that killed writers left under a folder. Only its owner may call it."""
    for parent, _, names in os.walk(folder):
        for name in filter(_is_temporary, names):
            remove(Path(parent, name))


@contextlib.contextmanager
def hold(folder: Path, *, name: str = LOCK, wait: float = 0.0) -> Iterator[None]:
    """Hold a folder, made if need be, against other processes; the lock goes with this one, however it ends.

    name: of the lock's file; locks of other names do not meet. wait: seconds to wait for another holder, at most.
    Raises Busy naming who holds it.
    """
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    signature = folder / f"{name}{_HOLDER}"  # Windows lets nobody read a file that is locked
    try:
        lock = filelock.FileLock(folder / name, thread_local=False, fallback_to_soft=False).acquire(timeout=wait)
    except filelock.Timeout:
        holder = _holder(signature)
        raise Busy(f"another autolabel is at work in {folder} ({holder}): wait for it, or stop it") from None
    with lock:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        write(signature, f"process {os.getpid()} on {platform.node()} since {since}".encode(), durable=False)
        try:
            yield
        finally:
            remove(signature)


def _holder(signature: Path) -> str:
    with contextlib.suppress(OSError):
        return read(signature).decode()
    return "a process that has not signed yet"
