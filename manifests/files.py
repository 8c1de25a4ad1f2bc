"""Write a file whole or not at all, recognise a file by its content, and keep a folder to oneself.

A reader sees the old file or the new one, never a part: bytes go to a temporary name beside the target, are forced to
disk, then renamed over it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import google_crc32c

TEMPORARY = ".tmp"  # suffix of files that a killed writer may leave behind
LOCK = ".lock"
_EDGE = 64 * 1024


def sync_folder(folder: Path) -> None:
    """Force a rename inside `folder` to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Give a temporary path to write to; on success it replaces `target`, on any error it is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say where
            error.filename = str(target)
        raise
    sync_folder(target.parent)


def write_bytes(target: Path, data: bytes) -> None:
    """Write `data` to `target`, whole or not at all."""
    with writing(target) as temporary:
        temporary.write_bytes(data)


def write_json(target: Path, value: Any) -> None:
    """Write readable JSON to `target`, whole or not at all."""
    write_bytes(target, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that killed writers left under `folder`. Only the owner of the folder may call it."""
    for pattern in (f".*{TEMPORARY}", "*.partial"):  # zarr's own temporary files end in .partial
        for path in folder.rglob(pattern):
            path.unlink(missing_ok=True)


def fingerprint_bytes(data: bytes) -> str:
    """16 hex digits that recognise a file's content: its length, its first and its last 64 KiB.

    Compressed images that differ anywhere differ in length or at an end, as good as always; reading two pieces keeps
    the check cheap for tens of thousands of images.
    """
    return _digest(len(data), data[:_EDGE], data[-_EDGE:])


def fingerprint(path: Path) -> str:
    """`fingerprint_bytes` of a file, reading at most 128 KiB of it."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_EDGE)
        file.seek(max(0, size - _EDGE))
        return _digest(size, head, file.read(_EDGE))


def _digest(size: int, head: bytes, tail: bytes) -> str:
    return hashlib.blake2b(size.to_bytes(8, "little") + head + tail, digest_size=8).hexdigest()


def file_crc32c(path: Path) -> str:
    """Checksum of a whole file, 8 hex digits."""
    with open(path, "rb") as file:
        checksum = 0
        while data := file.read(1 << 22):
            checksum = google_crc32c.extend(checksum, data)
    return f"{checksum:08x}"


def sha256(path: Path) -> str:
    """Hex sha256 of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be, against other processes; the lock goes with this one, however it ends.

    Raises ValueError naming who holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        if not try_lock(file):
            raise busy(file, folder)
        sign(file)
        yield


def try_lock(file: IO[str], how: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file, for as long as it is open, unless another process has."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sign(file: IO[str]) -> None:
    """Say in a lock's file who holds it."""
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} since {datetime.now(UTC).isoformat(timespec='seconds')}")
    file.flush()


def busy(file: IO[str], folder: Path) -> ValueError:
    """The error of a lock that another process holds."""
    file.seek(0)
    who = file.read().strip() or "a process that has not signed yet"
    return ValueError(f"another autolabel is at work in {folder} ({who}): wait for it, or stop it")
