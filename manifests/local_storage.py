"""Files of the local file system; callers use manifests/storage.py.

A reader sees the old file or the new one, never a part: bytes go to a temporary name beside the target, are forced to
disk, then renamed over it.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import re
import shutil
import stat as modes
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from autolabel.manifests.storage_port import ChangedFile, NotAFile, Stat, TooLarge

try:
    import fcntl
except ImportError:  # Windows, where nobody can remove a file that is open
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".autolabel-tmp"  # suffix of files that a killed writer may leave behind
LOCK = ".lock"
_OURS = re.compile(r"\..+\.[0-9a-f]{12}" + re.escape(TEMPORARY), re.DOTALL)  # no other program writes such names
# A pipe that takes the place of a file between two looks at it would wait for its writer without O_NONBLOCK.
_READ = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_BINARY", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC"))
_KINDS = {
    modes.S_IFIFO: "a named pipe",
    modes.S_IFCHR: "a device",
    modes.S_IFBLK: "a device",
    modes.S_IFSOCK: "a socket",
}


class LocalStorage:
    """Files of the local file system, or of a network drive that is mounted like one."""

    def stat(self, path: Path) -> Stat | None:
        found = _look(path)
        return _stat(found) if found is not None and modes.S_ISREG(found.st_mode) else None

    def exists(self, path: Path) -> bool:
        found = _look(path)
        if found is None or modes.S_ISDIR(found.st_mode):
            return False
        _require_file(found, path)
        return True

    def read(self, path: Path, *, at_most: int | None = None) -> bytes:
        return self.read_version(path, at_most=at_most)[1]

    def read_version(self, path: Path, *, at_most: int | None = None) -> tuple[Stat, bytes]:
        with self.reading(path) as file:
            now = _stat(os.fstat(file.fileno()))
            if at_most is not None and now.size > at_most:
                raise TooLarge(errno.EFBIG, f"{now.size} bytes: expected at most {at_most}", str(path))
            return now, file.read()

    def read_range(self, path: Path, start: int, length: int, *, unchanged: Stat | None = None) -> bytes:
        descriptor = _open(path)  # a crop is read in 0.4 ms: `open` would take 2 % of that
        try:
            if unchanged is not None and _stat(os.fstat(descriptor)) != unchanged:
                raise ChangedFile(f"{path} has changed while it was read")
            os.lseek(descriptor, start, os.SEEK_SET)
            return os.read(descriptor, length)
        finally:
            os.close(descriptor)

    def reading(self, path: Path) -> BinaryIO:
        return open(_open(path), "rb")

    def write(self, path: Path, data: bytes, *, durable: bool = True) -> None:
        with _replacing(path, durable) as file:
            file.write(data)

    def writing(self, path: Path) -> AbstractContextManager[BinaryIO]:
        _remove_abandoned(path)
        return _replacing(path, durable=True)

    def append(self, path: Path, data: bytes) -> None:
        try:
            with open(path, "ab") as file:
                file.write(data)
                _force(file)
        except OSError as error:
            if error.filename is None:  # a full disk does not say where
                error.filename = str(path)
            raise

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

    def is_link(self, path: Path) -> bool:
        return os.path.islink(path)

    def link(self, target: Path, path: Path) -> None:
        with _temporary(path) as temporary:
            os.symlink(os.path.abspath(target), temporary)
            os.replace(temporary, path)

    def list(self, folder: Path, *, suffix: str = "", recursive: bool = False) -> builtins.list[Path]:
        if recursive:
            found = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
            return sorted(path for path in found if path.name.endswith(suffix) and not _is_temporary(path.name))
        try:
            names = sorted(os.listdir(folder))  # text is sorted in a tenth of the time that paths take
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [folder / name for name in names if name.endswith(suffix) and not _is_temporary(name)]

    def folders(self, folder: Path) -> builtins.list[Path]:
        try:
            with os.scandir(folder) as entries:
                return [folder / name for name in sorted(entry.name for entry in entries if _is_folder(entry))]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        if os.path.islink(path):
            os.unlink(path)
        else:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _look(path: Path) -> os.stat_result | None:
    """The system's words about a path, None if there is nothing of this name."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:  # a NUL, or letters that no name can have
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:  # links in a circle
            return None
        raise


def _open(path: Path) -> int:
    """A descriptor of a regular file, for reading. Raises NotAFile instead of waiting for a pipe, or FileNotFoundError.

    What is no file is not even opened, because opening a device may do something.
    """
    try:
        _require_file(os.stat(path), path)
        descriptor = os.open(path, _READ)
    except ValueError as error:
        raise FileNotFoundError(errno.ENOENT, "no file can have this name", repr(str(path))) from error
    try:
        _require_file(os.fstat(descriptor), path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_file(found: os.stat_result, path: Path) -> None:
    if modes.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not modes.S_ISREG(found.st_mode):
        kind = _KINDS.get(modes.S_IFMT(found.st_mode), "of an unknown kind")
        raise NotAFile(errno.EINVAL, f"not a regular file ({kind})", str(path))


def _stat(found: os.stat_result) -> Stat:
    return Stat(found.st_size, found.st_mtime_ns, f"{found.st_ino}.{found.st_ctime_ns}")


def _is_temporary(name: str) -> bool:
    return _OURS.fullmatch(name) is not None


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """Give a name beside `target`, in a folder that exists; nothing lies there afterwards."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{_stem(target)}{uuid.uuid4().hex[:12]}{TEMPORARY}")
    try:
        yield temporary
    except OSError as error:
        if error.filename is None:  # a full disk does not say where
            error.filename = str(target)
        elif str(error.filename) == str(temporary):
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def _replacing(target: Path, durable: bool) -> Iterator[BinaryIO]:
    """Give a temporary file to write to; on success it replaces `target`, on any error it is removed."""
    with _temporary(target) as temporary, contextlib.ExitStack() as end:
        with _held(temporary) as file:
            if fcntl is not None:  # Windows renames no file that is open
                end.callback(os.close, os.dup(file.fileno()))  # holds it until it has its name
            yield file
            if durable:
                _force(file)
        os.replace(temporary, target)
        if durable:
            _sync_folder(target.parent)


def _stem(target: Path) -> str:
    """The first part of a temporary file's name. Shortened, because a name may have 255 bytes and a letter four."""
    return f".{target.name[:50]}."


def _held(path: Path) -> BinaryIO:
    """Create a file, locked so that nobody takes it for a dead writer's; the lock ends with its last descriptor."""
    file = open(path, "xb")  # noqa: SIM115 - the caller closes it
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a drive without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        if not os.fstat(file.fileno()).st_nlink:  # taken for one in the moment before
            file.close()
            return _held(path)
    return file


def _remove_abandoned(target: Path) -> None:
    """Remove the temporary files of this target whose writers have died."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for name in os.listdir(target.parent):
            if name.startswith(_stem(target)) and _is_temporary(name):
                with contextlib.suppress(OSError):  # its writer lives, or it is gone, or this drive has no locks
                    _remove_unless_held(target.with_name(name))


def _remove_unless_held(path: Path) -> None:
    if fcntl is None:
        os.unlink(path)
        return
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)


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


_LOCAL = LocalStorage()


def remove_leftovers(folder: Path, *, recursive: bool = False) -> None:
    """Delete the temporary files that killed writers of ours left in a folder, or at any depth below it.

    Only the command that holds and fills the folder may call it. Links are not followed.
    """
    if os.path.islink(folder):
        return
    for parent, _, names in os.walk(folder):
        for name in filter(_is_temporary, names):
            _LOCAL.remove(Path(parent, name))
        if not recursive:
            break
