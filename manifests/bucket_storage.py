"""Objects of S3, Google's and Azure's storage, and of all that speaks S3; callers use manifests/storage.py.

obstore does the requests: signing, retries, the conditions of writes. An object is written whole by one request, so no
reader sees a part. `create` and `replace` are conditional writes, of which the server lets one win. An answer may get
lost behind a write that took place; then the object is read back, and one with the same bytes counts as written.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from autolabel.manifests.bucket_clients import client_of, tries_for
from autolabel.manifests.bucket_errors import BucketError, exceptions, insist, library, told
from autolabel.manifests.local_storage import LOCK
from autolabel.manifests.locations import BucketPath
from autolabel.manifests.storage_port import ChangedFile, Stat, TooLarge

T = TypeVar("T")
WHOLE = 1 << 23  # bytes up to which a reader takes an object with one request
_BUFFER = 1 << 22  # bytes that a reader of a larger one asks for at once
_SPOOL = 1 << 26  # bytes of a new object that wait in memory, not on a disk
_TRIES = 8  # of a write that others come in between of


class BucketStorage:
    """The objects of all buckets."""

    def stat(self, path: Path) -> Stat | None:
        place = _place(path)
        if not place.key:
            return None
        try:
            return self._look(place)
        except FileNotFoundError:
            return None

    def _look(self, place: BucketPath) -> Stat:
        try:
            with told("look at", place):
                return _stat(library().head(client_of(place), place.key))
        except BucketError:  # the answer to this request has no words: that to the first byte has some
            with told("look at", place):
                return _stat(library().get(client_of(place), place.key, options={"range": (0, 1)}).meta)

    def exists(self, path: Path) -> bool:
        return self.stat(path) is not None

    def read(self, path: Path, *, at_most: int | None = None) -> bytes:
        return self._whole(_place(path), at_most)[1]

    def read_version(self, path: Path, *, at_most: int | None = None) -> tuple[Stat, bytes]:
        return self._whole(_place(path), at_most)

    def read_range(self, path: Path, start: int, length: int, *, unchanged: Stat | None = None) -> bytes:
        place = _place(path)
        options: dict[str, Any] = {"range": (start, start + length)}
        if unchanged is not None:
            length = min(length, unchanged.size - start)
            options = {"range": (start, start + length), "if_match": _marks(unchanged).get("e_tag")}
        if length <= 0:
            return b""
        with told("read", place):
            try:
                got = library().get(client_of(place), _key(place), options=options)
                data = bytes(got.bytes())
            except exceptions().PreconditionError as error:
                raise ChangedFile(f"{path} has changed while it was read") from error
            except exceptions().GenericError as error:
                if "InvalidRange" in str(error) or " 416" in str(error):
                    return b""
                raise
            if unchanged is not None and _stat(got.meta) != unchanged:
                raise ChangedFile(f"{path} has changed while it was read")
        return data

    def reading(self, path: Path) -> BinaryIO:
        place = _place(path)
        with told("read", place):
            got = library().get(client_of(place), _key(place))
            now = _stat(got.meta)
            if now.size <= WHOLE:
                return io.BytesIO(bytes(got.bytes()))
            del got
        return cast(BinaryIO, io.BufferedReader(_Ranges(self, path, now), _BUFFER))

    def write(self, path: Path, data: bytes, *, durable: bool = True) -> None:
        place = _place(path)
        with told("write", place):
            library().put(client_of(place), _key(place), data)

    def writing(self, path: Path) -> AbstractContextManager[BinaryIO]:
        return self._writing(_place(path))

    @contextlib.contextmanager
    def _writing(self, place: BucketPath) -> Iterator[BinaryIO]:
        with tempfile.SpooledTemporaryFile(_SPOOL) as file:
            yield cast(BinaryIO, file)
            file.seek(0)
            with told("write", place):
                library().put(client_of(place), _key(place), file)

    def append(self, path: Path, data: bytes) -> None:
        for _ in range(_TRIES):
            now = self.stat(path)
            if now is None:
                if self.create(path, data):
                    return
            elif self.replace(path, self.read(path) + data, unchanged=now):
                return
        raise BucketError(errno.EAGAIN, "others write to it all the time", str(path))

    def create(self, path: Path, data: bytes) -> bool:
        return self._put_if(_place(path), data, "create")

    def replace(self, path: Path, data: bytes, *, unchanged: Stat) -> bool:
        return self._put_if(_place(path), data, _marks(unchanged))

    def _put_if(self, place: BucketPath, data: bytes, mode: Any) -> bool:
        """Write under a condition; True if these bytes are there now, also where only the answer was lost."""
        errors = exceptions()
        for _ in range(_TRIES):
            try:
                _insist(
                    "write",
                    place,
                    lambda: library().put(client_of(place), _key(place), data, mode=mode, use_multipart=False),
                )
                return True
            except (errors.AlreadyExistsError, errors.PreconditionError):
                break
            except FileNotFoundError:
                if mode == "create":
                    raise
                return False  # the object to be replaced is gone
            except BucketError as error:
                if "ConditionalRequestConflict" not in str(error):  # somebody else writes at this very moment
                    raise
        try:
            return self._whole(place, len(data))[1] == data
        except (FileNotFoundError, TooLarge):
            return False

    def is_folder(self, path: Path) -> bool:
        place = _place(path)
        return _insist(
            "list",
            place,
            lambda: any(chunk for chunk in library().list(client_of(place), prefix=_prefix(place), chunk_size=1)),
        )

    def is_link(self, path: Path) -> bool:
        return False

    def link(self, target: Path, path: Path) -> None:
        raise BucketError(
            errno.ENOTSUP, "a bucket has no links: copy the images (--images copy), or leave them out", str(path)
        )

    def list(self, folder: Path, *, suffix: str = "", recursive: bool = False) -> builtins.list[Path]:
        place = _place(folder)
        names = _insist("list", place, lambda: _names(place, recursive=recursive))
        return _below(place, (name for name in names if name.endswith(suffix)))

    def folders(self, folder: Path) -> builtins.list[Path]:
        place = _place(folder)
        found = _insist("list", place, lambda: library().list_with_delimiter(client_of(place), prefix=_prefix(place)))
        return _below(place, found["common_prefixes"])

    def remove(self, path: Path) -> None:
        place = _place(path)
        if place.key:
            with contextlib.suppress(FileNotFoundError):
                _insist("remove", place, lambda: library().delete(client_of(place), place.key))

    def remove_folder(self, path: Path) -> None:
        place = _place(path)
        if not place.key:
            raise BucketError(errno.EPERM, "a whole bucket is never removed", str(path))
        keys = _insist("list", place, lambda: _names(place, recursive=True))
        for first in range(0, len(keys), 1000):
            _insist("remove", place, partial(library().delete, client_of(place), keys[first : first + 1000]))

    def require_conditions(self, folder: Path) -> None:
        """Raise BucketError unless this storage lets one of two writers win. It costs five small requests."""
        probe = _place(folder) / f"{LOCK}.probe-{uuid.uuid4().hex[:12]}"
        client, errors = client_of(probe, patient=False), exceptions()
        stale = {"e_tag": '"00000000000000000000000000000000"', "version": "1"}
        if probe.scheme != "gs":
            del stale["version"]
        first = uuid.uuid4().bytes
        kept = b""
        try:
            for data, mode in ((first, "create"), (uuid.uuid4().bytes, "create"), (uuid.uuid4().bytes, stale)):
                put = partial(library().put, client, probe.key, data, mode=cast(Any, mode), use_multipart=False)
                with contextlib.suppress(errors.AlreadyExistsError, errors.PreconditionError):
                    insist("write", probe, put, tries=3)
            kept = self.read(probe)
        except BucketError as error:
            if "NotImplemented" not in str(error):
                raise BucketError(error.errno, error.strerror, str(folder)) from None
        finally:
            with contextlib.suppress(OSError):  # without the right to delete, 16 bytes stay
                self.remove(probe)
        if kept != first:
            raise BucketError(
                errno.ENOTSUP,
                "this storage knows no conditional writes (If-None-Match, If-Match), without which two drivers could"
                " mix their labels: use a newer version of it, or another bucket for --out",
                str(folder),
            )

    def _whole(self, place: BucketPath, at_most: int | None) -> tuple[Stat, bytes]:
        with told("read", place):
            got = library().get(client_of(place), _key(place))
            now = _stat(got.meta)
            if at_most is not None and now.size > at_most:
                raise TooLarge(errno.EFBIG, f"{now.size} bytes: expected at most {at_most}", str(place))
            return now, bytes(got.bytes())


class _Ranges(io.RawIOBase):
    """One version of an object, read by ranges."""

    def __init__(self, storage: BucketStorage, path: Path, version: Stat) -> None:
        self._storage, self._path, self._version, self._at = storage, path, version, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._version.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._storage.read_range(self._path, self._at, len(buffer), unchanged=self._version)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _names(place: BucketPath, *, recursive: bool) -> builtins.list[str]:
    """The keys below a place, at any depth; or those right below it, and what is in between as folders."""
    if recursive:
        chunks = library().list(client_of(place), prefix=_prefix(place), chunk_size=1000)
        return [one["path"] for chunk in chunks for one in chunk]
    found = library().list_with_delimiter(client_of(place), prefix=_prefix(place))
    return [*(one["path"] for one in found["objects"]), *found["common_prefixes"]]


def _insist(what: str, place: BucketPath, request: Callable[[], T]) -> T:
    return insist(what, place, request, tries=tries_for(place))


def _place(path: Path) -> BucketPath:
    assert isinstance(path, BucketPath)
    return path


def _key(place: BucketPath) -> str:
    """The key of an object. Raises IsADirectoryError for a bucket."""
    if not place.key:
        raise IsADirectoryError(errno.EISDIR, "this is a bucket, and no object", str(place))
    return place.key


def _prefix(place: BucketPath) -> str | None:
    return f"{place.key}/" if place.key else None


def _below(place: BucketPath, keys: Iterable[str]) -> list[Path]:
    """The places of keys below a folder, sorted; not the empty object of its own name that other tools make."""
    start = len(place.key) + 1 if place.key else 0
    return [place / name for name in sorted({key[start:].rstrip("/") for key in keys}) if name]


def _stat(meta: Mapping[str, Any]) -> Stat:
    """Size, time and marks of an object. S3 and Azure compare the e-tag, Google's storage the version."""
    marks = f"{meta.get('e_tag') or ''} {meta.get('version') or ''}"
    return Stat(meta["size"], int(meta["last_modified"].timestamp()) * 10**9, marks)


def _marks(version: Stat) -> dict[str, str]:
    e_tag, _, number = version.version.rpartition(" ")
    return {name: mark for name, mark in (("e_tag", e_tag), ("version", number)) if mark}
