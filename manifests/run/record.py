"""`run.json` as bytes, sealed by a checksum of itself; and the fence in it, which keeps drivers apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import google_crc32c

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, json_of

WHOLE = "all"  # the part of a driver that does all of a run


@dataclass(frozen=True)
class Fence:
    """The drivers of a run: a number that each of them raises when it begins, and those that have not ended.

    drivers: by part, "all" or "2/4", the number and the words of whoever began last. A driver that ends is taken out,
    so one that a lock's next holder finds here has died.
    """

    number: int = 0
    drivers: Mapping[str, str] = field(default_factory=dict)

    def begun(self, part: str, words: str) -> Fence:
        """The fence when a driver begins. One of the whole run takes the place of all others."""
        number = self.number + 1
        others = {} if part == WHOLE else self.ended(part).drivers
        return Fence(number, {**others, part: f"{number}: {words}"})  # the latest is the last

    def ended(self, part: str) -> Fence:
        """The fence when a driver has ended."""
        return replace(self, drivers={other: words for other, words in self.drivers.items() if other != part})

    def mark(self, part: str) -> str:
        """A text that stays the same until another driver takes the place of this one."""
        own = self.drivers.get(part, "")
        return f"{self.number} {own}" if part == WHOLE else own

    def dead(self, part: str) -> bool:
        """True if a driver whose place one of this part takes has begun, and has not ended."""
        return bool(self.drivers if part == WHOLE else self.drivers.keys() & {part, WHOLE})


def sealed(document: Mapping[str, Any]) -> bytes:
    """The bytes of a document and its checksum."""
    return storage.json_bytes({**document, "crc32c": _checksum(document)})


def opened(data: bytes, file: Path, *, format_: str) -> dict[str, Any]:
    """The document of a file of this format. Raises ValueError for another format, and if one bit is another."""
    try:
        document: dict[str, Any] = json_of(data, dict[str, Any], name=str(file))
    except BadDocument as error:
        raise ValueError(f"{error}; restore it, or choose another --out") from error
    if storage.json_bytes(document) != data:
        raise ValueError(f"{file} differs from what was written: restore it, or choose another --out")
    if document.get("format") != format_:
        raise ValueError(
            f"{file} has format {document.get('format')!r}{_writer(document)}, this program knows {format_!r}:"
            " choose another --out, or read it with the version that wrote it"
        )
    if document.pop("crc32c", None) != _checksum(document):
        raise ValueError(
            f"{file} differs from what was written (its checksum is another): restore it, or choose another --out"
        )
    return document


def _writer(document: Mapping[str, Any]) -> str:
    versions = document.get("versions")
    version = versions.get("autolabel") if isinstance(versions, dict) else None
    return f", written by autolabel {version}" if version else ""


def _checksum(document: Mapping[str, Any]) -> str:
    return f"{google_crc32c.value(json.dumps(document, sort_keys=True).encode()):08x}"
