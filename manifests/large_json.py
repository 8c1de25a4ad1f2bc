"""JSON files that are larger than memory: their long lists are read one object at a time.

What is outside of these objects is kept, with a 0 in place of each, and read as a document at the end. So the whole
file is checked, while memory holds one object, and three bytes for each that has gone by.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from autolabel.manifests.documents import BadDocument, json_of
from autolabel.manifests.wording import counted

MOST_BYTES = 1 << 28  # of one object: the brush strokes of an image of 16 million pixels
_PIECE = 1 << 20  # bytes that are read at once
_DEEPEST = 32
# A bracket, or a text: to begin with one set of characters lets the search skip long lists of numbers.
_PART = re.compile(rb'[\[\]{}"](?:(?<=")[^"\\]*+(?:\\.[^"\\]*+)*+(?P<end>"?))?', re.DOTALL)


class Element(NamedTuple):
    """One object of a list: the key of the list, its place in the file, and its bytes."""

    key: str
    start: int
    data: bytes

    def read(self, where: str, kind: Any = dict[str, Any]) -> Any:
        """Parse it as a value of a type. Raises BadDocument, beginning with `where`."""
        return json_of(self.data, kind, name=where, at_most=MOST_BYTES)


class LargeJson:
    """A JSON file whose document is a list of objects, or an object with such lists.

    name: the file in messages. rest: the document without the objects of the lists, once `elements` has ended.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self.name = file, name
        self.rest: Any = None

    def at(self, key: str, start: int, length: int) -> Element:
        """The object at a place that `elements` has named."""
        self._file.seek(start)
        return Element(key, start, self._file.read(length))

    def elements(self, *keys: str) -> Iterator[Element]:
        """Yield the objects of the lists under these keys of the document; "" is a document that is a list itself.

        Raises BadDocument, at the latest at the end, for a file that is no JSON, and for a list that holds anything
        but objects.
        """
        outline: list[bytes] = []
        counts = Counter[str]()
        self._file.seek(0)
        buffer, base, scanned, kept = b"", 0, 0, 0  # base: place of the buffer; kept: up to here it is in the outline
        depth, target, start, key, inside = 0, 0, -1, "", False
        while data := self._file.read(max(_PIECE, len(buffer))):
            buffer += data
            for part in _PART.finditer(buffer, scanned):
                scanned = part.end()
                mark = buffer[part.start()]
                if mark == 0x22:
                    if not part["end"]:  # a text that goes on
                        scanned = part.start()
                        break
                    if depth == 1 and target == 2:
                        key = buffer[part.start() + 1 : scanned - 1].decode("utf-8", "replace")
                elif mark in b"[{":
                    if depth == 0:
                        target = 1 if mark == 0x5B else 2
                    if depth == target and inside and mark == 0x7B:
                        start = part.start()
                        outline.append(buffer[kept:start] + b"0")
                    elif depth == target - 1 and mark == 0x5B and (key if target == 2 else "") in keys:
                        inside = True
                    depth += 1
                    if depth > _DEEPEST:
                        raise BadDocument(f"{self.name} is nested more than {_DEEPEST} levels deep")
                else:
                    depth -= 1
                    if depth == target and start >= 0:
                        counts[key] += 1
                        yield Element(key, base + start, buffer[start:scanned])
                        start, kept = -1, scanned
                    elif depth < target:
                        inside = False
            else:
                scanned = len(buffer)
            gone = start if start >= 0 else scanned
            if start < 0:
                outline.append(buffer[kept:gone])
            if len(buffer) - gone > MOST_BYTES:
                raise BadDocument(f"{self.name} holds an object of more than {MOST_BYTES} bytes, at byte {base + gone}")
            buffer, base, scanned, kept = buffer[gone:], base + gone, scanned - gone, 0
            start = 0 if start >= 0 else -1
        outline.append(buffer[kept:])
        self.rest = json_of(b"".join(outline), name=self.name)
        lists = {"": self.rest} if target == 1 else self.rest if isinstance(self.rest, dict) else {}
        for key in keys:
            held = lists.get(key, [])
            if not isinstance(held, list) or len(held) != counts[key] or any(held):
                shown = counted(counts[key], "object")
                raise BadDocument(f"{self.name}, {key!r} holds {shown} and other values: expected a list of objects")


def keys_of(value: Any) -> Sequence[str]:
    """The keys of a document, for messages."""
    return list(value) if isinstance(value, dict) else []
