"""JSON in pieces. If this fails, an export of 20,000 images fills the memory, or one of its labels is lost."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from autolabel.manifests import large_json
from autolabel.manifests.documents import BadDocument
from autolabel.manifests.large_json import LargeJson


def anything(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.random()
    if depth > 3 or kind < 0.3:
        return draw.choice([1, 2.5, None, True, 'a"[{\\', "é]}", "\\", "", "images"])
    if kind < 0.6:
        return [anything(draw, depth + 1) for _ in range(draw.randrange(5))]
    return {draw.choice('abc"\\'): anything(draw, depth + 1) for _ in range(draw.randrange(5))}


def read(data: bytes, *keys: str) -> tuple[LargeJson, list[large_json.Element]]:
    document = LargeJson(io.BytesIO(data), "f")
    return document, list(document.elements(*keys))


@pytest.mark.parametrize("piece", [1, 3, 1 << 20])
def test_objects_and_the_rest_are_those_of_the_whole_document(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_json, "_PIECE", piece)
    draw = random.Random(piece)
    for _ in range(60):
        lists = {
            key: [{"x": anything(draw), "images": [{}]} for _ in range(draw.randrange(4))] for key in ("images", "b")
        }
        value = {"info": anything(draw), **lists, "n": {"images": [{"y": 1}]}, "s": "images", "end": [anything(draw)]}
        data = json.dumps(value, indent=draw.choice([None, 1]), ensure_ascii=draw.random() < 0.5).encode()
        document, elements = read(data, "images", "b")
        for key, expected in lists.items():
            assert [element.read("f") for element in elements if element.key == key] == expected
        assert [data[e.start : e.start + len(e.data)] for e in elements] == [e.data for e in elements]
        assert [document.at(e.key, e.start, len(e.data)) for e in elements] == elements
        assert document.rest == {**value, **{key: [0] * len(expected) for key, expected in lists.items()}}
        document, elements = read(json.dumps(lists["images"]).encode(), "")
        assert [element.read("f") for element in elements] == lists["images"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "f is empty"),
        (b'{"a": [{"x": 1}', "f is no JSON, or cut off"),
        (b'{"a": [{"x": 1}, {"y', "f is no JSON, or cut off"),
        (b'{"a": [{"x": 1} 5 {"x": 2}]}', "f is no JSON, or cut off"),
        (b'{"a": [{"x": 1}], "a": [{"x": 2}]}', "f is no JSON that can be used: key 'a' stands twice"),
        (b'{"a": [{"x": 1}, 5]}', "f, 'a' holds 1 object and other values: expected a list of objects"),
        (b'{"a": [{"x": 1}, 0]}', "f, 'a' holds 1 object and other values: expected a list of objects"),
        (b'{"a": {"x": 1}}', "f, 'a' holds 0 objects and other values: expected a list of objects"),
        (b'{"a": [{"x": ]}', "f is no JSON, or cut off"),
        (b'{"a": ["\xff"]}', "f is no UTF-8 text"),
        (b"]" * 9 + b'{"a": [{}]}', "f is no JSON, or cut off"),
        (b'{"a": ' + b"[" * 50, "f is nested more than 32 levels deep"),
        (b'{"a": [' + b'{"b":' * 50, "f is nested more than 32 levels deep"),
    ],
)
def test_a_file_that_is_no_such_json_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BadDocument) as refused:
        read(data, "a")
    assert str(refused.value).startswith(message)


def test_an_object_that_is_no_json_is_refused_when_it_is_read() -> None:
    _, (element,) = read(b'{"a": [{"x": 1,}]}', "a")
    with pytest.raises(BadDocument, match=r"^here is no JSON, or cut off"):
        element.read("here")


def test_an_object_without_an_end_is_refused_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_json, "MOST_BYTES", 5000)
    monkeypatch.setattr(large_json, "_PIECE", 1000)
    with pytest.raises(BadDocument, match=r"^f holds an object of more than 5000 bytes, at byte 7$"):
        read(b'{"a": [{"x": "' + b"y" * 100_000 + b'"}]}', "a")


class Repeated(io.RawIOBase):
    """A file of many equal parts, which no memory holds."""

    def __init__(self, parts: Sequence[tuple[bytes, int]]) -> None:
        self._parts = iter([part for part, count in parts for _ in range(count)])

    def seek(self, place: int, whence: int = 0) -> int:
        return 0

    def read(self, size: int = -1) -> bytes:
        return b"".join(part for _, part in zip(range(max(1, size // 100_000)), self._parts, strict=False))


def test_memory_does_not_grow_with_the_file() -> None:
    task = json.dumps({"x": "7" * 100_000}).encode()
    tracemalloc.start()
    try:
        document = LargeJson(Repeated([(b"[", 1), (task + b",", 500), (task + b"]", 1)]), "f")  # type: ignore[arg-type]
        assert sum(1 for _ in document.elements("")) == 501
        assert tracemalloc.get_traced_memory()[1] < 10_000_000  # of 50 MB
    finally:
        tracemalloc.stop()


def test_a_file_of_the_disk_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[{}]\r\n")
    with open(tmp_path / "a.json", "rb") as file:
        assert [element.read("f") for element in LargeJson(file, "f").elements("")] == [{}]
