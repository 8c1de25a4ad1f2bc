"""Names of places: files and folders of this machine, or of a bucket.

A place in a bucket is a `BucketPath`, which joins, splits and compares as any path does, so that all code names files
in one way. Only manifests/storage.py can read or write there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import NoReturn
from urllib.parse import unquote, urlsplit

SCHEMES = ("s3", "gs", "az")
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]|\$[a-z]+")
_OTHERS = {"gcs": "gs", "s3a": "s3", "s3n": "s3", "abfs": "az", "abfss": "az", "azure": "az"}  # other tools' spellings


class BucketPath(type(Path())):  # type: ignore[misc]
    """A place in a bucket, such as `s3://bucket/folder/file.png`; functions of the operating system refuse it."""

    @property
    def scheme(self) -> str:
        """The kind of storage: s3, gs or az; "" for a part of a place, as `relative_to` gives it."""
        first = self.parts[0] if self.parts else ""
        return first[:-1] if first.endswith(":") and first[:-1] in SCHEMES else ""

    @property
    def bucket(self) -> str:
        """The name of the bucket, of the container with Azure."""
        return str(self.parts[1])

    @property
    def key(self) -> str:
        """The name within the bucket; "" for the bucket itself."""
        return "/".join(self.parts[2:])

    def __str__(self) -> str:
        parts = self.parts
        return f"{parts[0]}//{'/'.join(parts[1:])}" if self.scheme else "/".join(parts) or "."

    def __fspath__(self) -> NoReturn:
        raise TypeError(f"{self} lies in a bucket: only manifests/storage.py reads and writes there")

    def as_posix(self) -> str:
        return str(self)

    def is_absolute(self) -> bool:
        return bool(self.scheme)

    def absolute(self) -> BucketPath:
        return self

    def resolve(self, strict: bool = False) -> BucketPath:
        return self

    @property
    def parent(self) -> BucketPath:
        """The folder above; that of a bucket is the bucket itself, as that of `/` is `/`."""
        return self if self.scheme and len(self.parts) <= 2 else super().parent

    @property
    def parents(self) -> tuple[BucketPath, ...]:
        """All folders above, the bucket last."""
        found, place = list[BucketPath](), self
        while place.parent != place:
            place = place.parent
            found.append(place)
        return tuple(found)


def is_address(text: str) -> bool:
    """Return True for a name with a scheme, such as `s3://bucket/key`."""
    return _ADDRESS.fullmatch(text) is not None


def location(name: str | PathLike[str]) -> Path:
    """Return the place that a person, or a file, names: `dir/file`, `file:///dir/file`, `s3://bucket/key`.

    Raises ValueError for an address that no bucket or no object can have.
    """
    if isinstance(name, BucketPath):
        return name
    text = str(name)
    found = _ADDRESS.fullmatch(text)
    if found is None:
        scheme, _, rest = text.partition(":/")
        if scheme in SCHEMES and rest:
            raise ValueError(f"{text!r}: expected two slashes, as in {scheme}://{rest}")
        return Path(name)
    scheme, rest = found[1].lower(), found[2]
    if scheme == "file":
        return _local(text)
    if scheme not in SCHEMES:
        meant = f"write {_OTHERS[scheme]}://" if scheme in _OTHERS else f"expected {', '.join(SCHEMES)} or file"
        raise ValueError(f"{_without_secrets(text)}: unknown scheme {scheme!r}: {meant}")
    bucket, _, key = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(f"{_without_secrets(text)}: no bucket can have the name {_without_secrets(bucket)!r}")
    if re.search(r"\?.*(sig|signature|token|credential|accesskey\w*)=", key, re.IGNORECASE | re.DOTALL):
        raise ValueError(
            f"{_without_secrets(text)}: expected no signature: write {scheme}://bucket/key, and set credentials"
        )
    parts = key.removesuffix("/").split("/") if key else []
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{text!r}: a key with an empty part, '.' or '..' names no file here: rename the object")
    if re.search(r"[\x00-\x1f\x7f]", key):
        raise ValueError(f"{text!r}: a key with control characters names no file here: rename the object")
    return BucketPath(f"{scheme}:", bucket, *parts)


def _local(text: str) -> Path:
    """The path of a file URL, whose letters may be escaped."""
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise ValueError(f"{text!r}: expected a file of this machine, such as file:///data/images")
    path = unquote(text[len("file://") :].removeprefix("localhost"))
    return Path(path[1:] if re.match(r"/[A-Za-z]:", path) else path)


def _without_secrets(text: str) -> str:
    """An address without the user, password and signature that somebody may have put into it."""
    return re.sub(r"\?.*", "?…", re.sub(r"[^/@]*@", "…@", text), flags=re.DOTALL)


def joined(base: Path, name: str) -> Path:
    """Return the place that a stored name means: an address, an absolute path, or one below or beside `base`.

    Parts ".." lead upwards, but not out of a bucket. Raises ValueError as `location`.
    """
    if is_address(name):
        return location(name)
    if not isinstance(base, BucketPath):
        return Path(os.path.normpath(base / name))
    if PurePosixPath(name).is_absolute():
        return Path(os.path.normpath(name))
    parts = list(base.parts)
    for part in PurePosixPath(name).parts:
        if part != "..":
            parts.append(part)
        elif len(parts) > 2:
            parts.pop()
        else:
            raise ValueError(f"{name!r} leads out of the bucket of {base}")
    return BucketPath(*parts)


def relative(path: Path, base: Path) -> str:
    """Return the name of `path` from the folder `base`, as `joined` reads it; both absolute.

    It is absolute where they share no more than the file system's root, or do not lie in one bucket.
    """
    if not (isinstance(path, BucketPath) or isinstance(base, BucketPath)):
        shared = os.path.commonpath([path, base])
        return Path(os.path.relpath(path, base)).as_posix() if shared != path.anchor else path.as_posix()
    if path.parts[:2] != base.parts[:2] or type(path) is not type(base):
        return path.as_posix()
    same = len(_shared([path.parts, base.parts]))
    return "/".join([*[".."] * (len(base.parts) - same), *path.parts[same:]]) or "."


def common(paths: Iterable[Path]) -> Path:
    """Return the deepest folder that holds all of `paths`. Raises ValueError where none does."""
    paths = list(paths)
    if not any(isinstance(path, BucketPath) for path in paths):
        return Path(os.path.commonpath(paths))
    shared = _shared(path.parts for path in paths)
    if len(shared) < 2 or not all(isinstance(path, BucketPath) for path in paths):
        raise ValueError(f"{paths[0]} and {paths[-1]} lie in no common bucket")
    return BucketPath(*shared)


def _shared(names: Iterable[tuple[str, ...]]) -> list[str]:
    found = list[str]()
    for parts in zip(*names, strict=False):
        if len(set(parts)) > 1:
            break
        found.append(parts[0])
    return found
