"""Locks of folders that end with their process; callers use manifests/storage.py."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from autolabel.manifests.local_storage import LOCK, LocalStorage

try:
    import fcntl
except ImportError:  # Windows, where filelock needs no more than the lock's name
    fcntl = None  # type: ignore[assignment]

_HOLDER = ".holder"  # suffix of the file that says who holds a lock
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_LOCAL = LocalStorage()


class Busy(ValueError):
    """Another process holds a folder."""


class Superseded(ValueError):
    """Another process has taken over what this one held, and this one must write nothing more."""


class Hold:
    """A folder that is held."""

    def require(self, *, surely: bool = False) -> None:
        """Raise Superseded if another process has taken the folder over.

        It costs nothing, unless the caller has to know it `surely`. On a disk nobody takes over from a process that
        lives.
        """


def this_process() -> str:
    """This process in words, for whoever meets its lock."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return f"process {os.getpid()} on {platform.node()} since {since}"


@contextlib.contextmanager
def hold(folder: Path, *, name: str = LOCK, wait: float = 0.0, only_read: bool = False) -> Iterator[Hold]:
    """Hold a folder, made if need be, against other processes; the lock goes with this one, however it ends.

    name: of the lock's file; locks of other names do not meet. wait: seconds to wait for another holder, at most.
    only_read: the holder writes nothing, so a folder that nobody may write to is held all the same. Raises Busy naming
    who holds it.
    """
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    signature = folder / f"{name}{_HOLDER}"  # Windows lets nobody read a file that is locked
    try:
        lock = filelock.FileLock(folder / name, thread_local=False, fallback_to_soft=False).acquire(timeout=wait)
    except filelock.Timeout:
        raise _busy(folder, signature) from None
    except OSError as error:
        if not only_read or error.errno not in READ_ONLY:
            raise
        with _held_unsigned(folder, folder / name, signature):
            yield Hold()
        return
    with lock:
        with _LOCAL.writing(signature) as file:  # removes what a holder left that was killed here
            file.write(this_process().encode())
        try:
            yield Hold()
        finally:
            _LOCAL.remove(signature)


@contextlib.contextmanager
def _held_unsigned(folder: Path, lock: Path, signature: Path) -> Iterator[None]:
    """Hold a folder that this process may not write to; where it has no lock file, nobody has ever held it."""
    with contextlib.ExitStack() as stack:
        if fcntl is not None and _LOCAL.exists(lock):
            try:
                fcntl.flock(stack.enter_context(_LOCAL.reading(lock)), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _busy(folder, signature) from None
            except OSError:  # a drive that locks only what can be written
                pass
        yield


def _busy(folder: Path, signature: Path) -> Busy:
    holder = "a process that has not signed yet"
    with contextlib.suppress(OSError):
        holder = _LOCAL.read(signature).decode()
    return Busy(f"another autolabel is at work in {folder} ({holder}): wait for it, or stop it")
