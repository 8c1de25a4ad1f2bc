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
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from autolabel.manifests.local_storage import ChangedFile, Stat, TooLarge
from autolabel.manifests.locations import BucketPath

WHOLE = 1 << 23  # bytes up to which a reader takes an object with one request
_BUFFER = 1 << 22  # bytes that a reader of a larger one asks for at once
_SPOOL = 1 << 26  # bytes of a new object that wait in memory, not on a disk
_TRIES = 8  # of a write that others come in between of
_CONDITIONS = {  # by what the environment asks for
    "s3": {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"},
    "gs": {"GOOGLE_BASE_URL", "STORAGE_EMULATOR_HOST"},
    "az": {"AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"},
}
_RETRIES: dict[str, Any] = {
    "max_retries": 8,
    "retry_timeout": timedelta(seconds=90),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2},
}
_TIMES: dict[str, Any] = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "15m"}
_CODE = re.compile(r"<Code>([^<]*)</Code>|<Error><Message>|\"(?:code|reason)\": ?\"?([A-Za-z0-9]+)")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>|\"message\": ?\"([^\"]*)\"")
_STATUS = re.compile(r"status code: (\d{3} [A-Za-z ]*)")
# What to do about an error, by its code.
_ADVICE = {
    "NoSuchBucket": "make the bucket, or correct its name",
    "ExpiredToken": "renew the credentials, then run the same again",
    "TokenRefreshRequired": "renew the credentials, then run the same again",
    "InvalidAccessKeyId": "check the credentials",
    "SignatureDoesNotMatch": "check the credentials",
    "RequestTimeTooSkewed": "set this machine's clock",
    "PermanentRedirect": "the bucket lies in another region: set AWS_REGION to it",
    "IllegalLocationConstraintException": "the bucket lies in another region: set AWS_REGION to it",
    "AuthorizationHeaderMalformed": "the bucket lies in another region: set AWS_REGION to it",
    "AccessDenied": "the credentials may not do this; a bucket whose requester pays wants AWS_REQUEST_PAYER=true",
    "NotImplemented": "this storage lacks what a run needs (docs/storage.md)",
}


class BucketError(OSError):
    """A bucket refused a request, or could not be reached; one line says which, why and what to do."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class BucketStorage:
    """The objects of all buckets."""

    def stat(self, path: Path) -> Stat | None:
        place = _place(path)
        if not place.key:
            return None
        try:
            with _told("look at", place):
                return _stat(_obstore().head(_store(place), place.key))
        except FileNotFoundError:
            return None

    def exists(self, path: Path) -> bool:
        return self.stat(path) is not None

    def read(self, path: Path, *, at_most: int | None = None) -> bytes:
        return self._whole(_place(path), at_most)[1]

    def read_range(self, path: Path, start: int, length: int, *, unchanged: Stat | None = None) -> bytes:
        place = _place(path)
        options: dict[str, Any] = {"range": (start, start + length)}
        if unchanged is not None:
            length = min(length, unchanged.size - start)
            options = {"range": (start, start + length), "if_match": _marks(unchanged).get("e_tag")}
        if length <= 0:
            return b""
        with _told("read", place):
            try:
                got = _obstore().get(_store(place), _key(place), options=options)
                data = bytes(got.bytes())
            except _exceptions().PreconditionError as error:
                raise ChangedFile(f"{path} has changed while it was read") from error
            except _exceptions().GenericError as error:
                if "InvalidRange" in str(error) or " 416" in str(error):
                    return b""
                raise
            if unchanged is not None and _stat(got.meta) != unchanged:
                raise ChangedFile(f"{path} has changed while it was read")
        return data

    def reading(self, path: Path) -> BinaryIO:
        place = _place(path)
        with _told("read", place):
            got = _obstore().get(_store(place), _key(place))
            now = _stat(got.meta)
            if now.size <= WHOLE:
                return io.BytesIO(bytes(got.bytes()))
            del got
        return cast(BinaryIO, io.BufferedReader(_Ranges(self, path, now), _BUFFER))

    def write(self, path: Path, data: bytes, *, durable: bool = True) -> None:
        place = _place(path)
        with _told("write", place):
            _obstore().put(_store(place), _key(place), data)

    def writing(self, path: Path) -> AbstractContextManager[BinaryIO]:
        return self._writing(_place(path))

    @contextlib.contextmanager
    def _writing(self, place: BucketPath) -> Iterator[BinaryIO]:
        with tempfile.SpooledTemporaryFile(_SPOOL) as file:
            yield cast(BinaryIO, file)
            file.seek(0)
            with _told("write", place):
                _obstore().put(_store(place), _key(place), file)

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
        errors = _exceptions()
        for _ in range(_TRIES):
            try:
                with _told("write", place):
                    _obstore().put(_store(place), _key(place), data, mode=mode, use_multipart=False)
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
        with _told("list", place):
            return any(chunk for chunk in _obstore().list(_store(place), prefix=_prefix(place), chunk_size=1))

    def is_link(self, path: Path) -> bool:
        return False

    def link(self, target: Path, path: Path) -> None:
        raise BucketError(errno.ENOTSUP, "a bucket has no links", str(path))

    def list(self, folder: Path, *, suffix: str = "", recursive: bool = False) -> builtins.list[Path]:
        place = _place(folder)
        with _told("list", place):
            if recursive:
                chunks = _obstore().list(_store(place), prefix=_prefix(place), chunk_size=1000)
                names = [one["path"] for chunk in chunks for one in chunk]
            else:
                found = _obstore().list_with_delimiter(_store(place), prefix=_prefix(place))
                names = [*(one["path"] for one in found["objects"]), *found["common_prefixes"]]
        start = len(place.key) + 1 if place.key else 0
        inner = sorted(name[start:].rstrip("/") for name in names if name.endswith(suffix))
        return [place / name for name in inner if name]

    def remove(self, path: Path) -> None:
        place = _place(path)
        with _told("remove", place):
            if place.key:
                with contextlib.suppress(FileNotFoundError):
                    _obstore().delete(_store(place), place.key)

    def remove_folder(self, path: Path) -> None:
        place = _place(path)
        if not place.key:
            raise BucketError(errno.EPERM, "a whole bucket is never removed", str(path))
        with _told("remove", place):
            for chunk in _obstore().list(_store(place), prefix=_prefix(place), chunk_size=1000):
                _obstore().delete(_store(place), [one["path"] for one in chunk])

    def require_conditions(self, folder: Path) -> None:
        """Raise BucketError unless this storage lets one of two writers win. It costs four small requests."""
        probe = _place(folder) / f".probe-{uuid.uuid4().hex[:12]}"
        first, second = uuid.uuid4().bytes, uuid.uuid4().bytes
        try:
            made, again = self.create(probe, first), self.create(probe, second)
        except BucketError as error:
            if "NotImplemented" not in str(error):
                raise
            made = again = True
        finally:
            with contextlib.suppress(OSError):  # without the right to delete, 16 bytes stay
                self.remove(probe)
        if not made or again:
            raise BucketError(
                errno.ENOTSUP,
                "this storage knows no conditional writes (If-None-Match), without which two drivers could mix their"
                " labels: use a newer version of it, or another bucket for --out",
                str(folder),
            )

    def _whole(self, place: BucketPath, at_most: int | None) -> tuple[Stat, bytes]:
        with _told("read", place):
            got = _obstore().get(_store(place), _key(place))
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


def _stat(meta: Mapping[str, Any]) -> Stat:
    """Size, time and marks of an object. S3 and Azure compare the e-tag, Google's storage the version."""
    marks = f"{meta.get('e_tag') or ''} {meta.get('version') or ''}"
    return Stat(meta["size"], int(meta["last_modified"].timestamp()) * 10**9, marks)


def _marks(version: Stat) -> dict[str, str]:
    e_tag, _, number = version.version.rpartition(" ")
    return {name: mark for name, mark in (("e_tag", e_tag), ("version", number)) if mark}


def _obstore() -> Any:
    """The library, loaded late: most people label files of their own disk."""
    try:
        import obstore
    except ImportError as error:
        raise ValueError("places in buckets need obstore: pip install 'autolabel[buckets]'") from error
    return obstore


def _exceptions() -> Any:
    _obstore()
    import obstore.exceptions

    return obstore.exceptions


_first_user: int | None = None  # the process whose threads do the requests


def _store(place: BucketPath) -> Any:
    """The client of a bucket. Raises BucketError in a process that was forked from one which had clients."""
    global _first_user
    if _first_user is None:
        _first_user = os.getpid()
    elif _first_user != os.getpid():
        raise BucketError(
            errno.ENOTSUP,
            "a forked process cannot use its parent's connections: start it with multiprocessing_context='spawn'",
            str(place),
        )
    return _client(place.scheme, place.bucket)


@lru_cache(64)
def _client(scheme: str, bucket: str) -> Any:
    import obstore.store

    connect: Any = obstore.store.from_url

    options = dict(_TIMES)
    if any(os.environ.get(name, "").startswith("http://") for name in _CONDITIONS[scheme]):
        options["allow_http"] = True
    try:
        return connect(f"{scheme}://{bucket}", client_options=options, retry_config=_RETRIES, **_credentials(scheme))
    except Exception as error:
        raise BucketError(errno.EINVAL, _reason(error), f"{scheme}://{bucket}") from None


def _credentials(scheme: str) -> dict[str, Any]:
    """boto3's own search for credentials where boto3 is installed, which knows profiles and single sign-on.

    obstore alone finds those of the environment, of web identities, containers and instances.
    """
    asked = ("AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")
    profile = any(os.environ.get(name) for name in asked) or Path("~/.aws/credentials").expanduser().is_file()
    if scheme != "s3" or os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_SKIP_SIGNATURE") or not profile:
        return {}
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return {}
    return {"credential_provider": Boto3CredentialProvider()}


@contextlib.contextmanager
def _told(what: str, place: BucketPath) -> Iterator[None]:
    """Raise errors of requests as an OSError of one line, which names the place and holds no secrets."""
    errors = _exceptions()
    try:
        yield
    except (errors.AlreadyExistsError, errors.PreconditionError):
        raise
    except FileNotFoundError as error:
        if error.errno is not None:
            raise
        if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
            raise BucketError(errno.ENOENT, f"cannot {what} it: {_reason(error)}", str(place)) from None
        raise FileNotFoundError(errno.ENOENT, "no such object", str(place)) from None
    except PermissionError as error:
        if error.errno is not None:
            raise
        raise BucketError(errno.EACCES, f"cannot {what} it: {_reason(error)}", str(place)) from None
    except errors.BaseError as error:
        number = errno.EACCES if isinstance(error, _refusals(errors)) else errno.EIO
        raise BucketError(number, f"cannot {what} it: {_reason(error)}", str(place)) from None


def _refusals(errors: Any) -> tuple[type[Exception], ...]:
    return errors.PermissionDeniedError, errors.UnauthenticatedError


def _reason(error: BaseException) -> str:
    """The server's own code and message, or the library's first line, and what to do."""
    text = str(error)
    code = next((found[1] or found[2] for found in [_CODE.search(text)] if found), None)
    message = next((found[1] or found[2] for found in [_MESSAGE.search(text)] if found), None)
    status = _STATUS.search(text)
    if code:
        told = f"{code} ({message})" if message else code
    elif status:
        told = status[1].strip()
    else:
        told = re.sub(r"\s+", " ", text.partition("\n\nDebug source")[0])[:300]
    advice = _ADVICE.get(code or "", "")
    if not code and re.search(r"169\.254\.169\.254|metadata|credential", text, re.IGNORECASE):
        told = "no credentials were found"
        advice = "set them as for the cloud's own tools (docs/storage.md), or AWS_SKIP_SIGNATURE=true for open data"
    return f"{told}: {advice}" if advice else told
