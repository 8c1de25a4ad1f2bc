"""The only reader of JSON, TOML and CSV that comes from a disk, whoever wrote it.

A document is data from a stranger: its size, its depth and its numbers have limits before anything else looks at them,
and `shaped` asks for the type of every value. Every error is a BadDocument that names the file, the key and what was
expected. A byte order mark and line ends of Windows are accepted.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import functools
import io
import json
import math
import re
import tomllib
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from autolabel.manifests import storage
from autolabel.manifests.locations import location

POLICY_BYTES = 1 << 16  # what people write by hand
MOST_BYTES = 1 << 24  # what this program writes: a manifest's metadata, an audit, curves
_DEEPEST = 32
_LARGEST = 1 << 64  # checksums have up to 64 bits; a longer number is none of ours, and Python formats it slowly
# A bracket, or a text: to begin with one set of characters lets the search skip long lists of numbers.
_JSON_PART = re.compile(r'[\[\]{}"](?:(?<=")[^"\\]*+(?:\\.[^"\\]*+)*+"?)?', re.DOTALL)
_TOML_TEXT = re.compile(
    r'"""(?:[^\\]|\\.)*?"""|' r"'''.*?'''|" r'"(?:[^"\\\n]|\\.)*+"|' r"'[^'\n]*'|#[^\n]*", re.DOTALL
)
_TOML_PATH = re.compile(rf"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){{{_DEEPEST}}}")
_Parsed = TypeVar("_Parsed")


class BadDocument(ValueError):
    """A document is missing, damaged, or says something else than was expected."""


def read_json(path: Path, kind: Any = Any, *, advice: str = "", at_most: int = MOST_BYTES) -> Any:
    """Read a JSON file as a value of a type, see `shaped`. Raises BadDocument, which ends with the advice."""
    return _advised(advice, lambda: json_of(_content(path, at_most), kind, name=str(path), at_most=at_most))


def read_parsed(path: Path, parse: Callable[[dict[str, Any]], _Parsed], *, advice: str) -> _Parsed:
    """Read a JSON file of one object as what `parse` makes of it.

    Raises BadDocument, which names the file; it ends with the advice, or with what `parse` says in its ValueError.
    """
    document = read_json(path, dict[str, Any], advice=advice)
    try:
        return parse(document)
    except ValueError as error:
        raise BadDocument(f"{path}: {error}") from error


def read_lines(path: Path, kind: Any = Any, *, advice: str = "", at_most: int = MOST_BYTES) -> list[Any]:
    """Read a file of one JSON value a line as values of a type; a last line that has no end is left out.

    Raises BadDocument, which names the line.
    """

    def values() -> list[Any]:
        lines = _text(_content(path, at_most), str(path), at_most).split("\n")[:-1]
        return [json_of(line, kind, name=f"{path}, line {place}") for place, line in enumerate(lines, 1)]

    return list(_advised(advice, values))


def read_toml(path: Path, *, at_most: int = POLICY_BYTES) -> dict[str, Any]:
    """Read a TOML file. Raises BadDocument."""
    return toml_of(_content(path, at_most), name=str(path))


def read_csv(
    path: Path, columns: Sequence[str], *, optional: Sequence[str] = (), advice: str = "", at_most: int = MOST_BYTES
) -> list[list[str]]:
    """Read a CSV file with a header: of every row, the cells in these columns, then in the optional ones.

    A cell of an optional column that the file does not have is empty. Raises BadDocument.
    """

    def rows() -> list[list[str]]:
        name = str(path)
        header, *body = _cells(path, at_most) or [[]]
        missing = [column for column in columns if column not in header]
        if missing:
            raise BadDocument(f"{name} has no column {missing[0]!r}: expected {', '.join(columns)}")
        for place, row in enumerate(body, 2):
            if len(row) != len(header):
                raise BadDocument(f"{name}, line {place}: {len(row)} cells, expected {len(header)}")
        places = [header.index(column) if column in header else None for column in (*columns, *optional)]
        return [["" if place is None else row[place] for place in places] for row in body]

    table: list[list[str]] = _advised(advice, rows)
    return table


def read_names(path: Path, *, headers: Sequence[str], at_most: int = MOST_BYTES) -> list[str]:
    """The names that a file lists, in order: one a line, without empty lines and those that begin with "#".

    Of a CSV (its file is called so) they are the first cells of the rows; the first row may be a header, whose first
    cell is one of `headers`. Raises BadDocument.
    """
    if path.suffix.lower() == ".csv":
        lines = [row[0] if row else "" for row in _cells(path, at_most)]
        lines = lines[1:] if lines and lines[0].strip() in headers else lines
    else:
        lines = _text(_content(path, at_most), str(path), at_most).split("\n")
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _cells(path: Path, at_most: int) -> list[list[str]]:
    text = _text(_content(path, at_most), str(path), at_most)
    try:
        return list(csv.reader(io.StringIO(text, newline="")))  # a quoted cell may have several lines
    except (csv.Error, ValueError) as error:
        raise BadDocument(f"{path} is no table: {error}") from error


def json_of(data: bytes | str, kind: Any = Any, *, name: str, at_most: int = MOST_BYTES) -> Any:
    """Parse JSON as a value of a type, see `shaped`; `name` is the file in messages. Raises BadDocument."""
    text = _text(data, name, at_most)
    if not text.strip():
        raise BadDocument(f"{name} is empty")
    depth = 0
    for part in _JSON_PART.findall(text):
        depth += (part in "[{") - (part in "]}")
        if depth > _DEEPEST:
            raise BadDocument(f"{name} is nested more than {_DEEPEST} levels deep")
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise BadDocument(f"{name} is no JSON, or cut off: {error.msg} in {where}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a key that stands twice
        raise BadDocument(f"{name} is no JSON that can be used: {_briefly(error)}") from error
    _require_small_numbers(value, name)
    return shaped(kind, value, name)


def toml_of(data: bytes | str, *, name: str, at_most: int = POLICY_BYTES) -> dict[str, Any]:
    """Parse TOML; `name` is the file in messages. Raises BadDocument."""
    text = _text(data, name, at_most)
    bare = _TOML_TEXT.sub("s", text)
    depth = 0
    for mark in re.findall(r"[\[\]{}]", bare):
        depth += 1 if mark in "[{" else -1
        if depth > _DEEPEST:
            break
    if depth > _DEEPEST or _TOML_PATH.search(bare):
        raise BadDocument(f"{name} is nested more than {_DEEPEST} levels deep")
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError, OverflowError) as error:  # TOMLDecodeError, and numbers that Python refuses
        raise BadDocument(f"{name} is no TOML: {_briefly(error)}") from error
    _require_small_numbers(document, name)
    return document


def name_of(path: Path) -> str:
    """The file's name without its suffix, as a text that any document can hold."""
    return path.stem.encode(errors="backslashreplace").decode()


def plain_json(value: Any) -> Any:
    """The value as it comes back from JSON: tuples as lists, keys as texts."""
    return json.loads(json.dumps(value))


# --- types ------------------------------------------------------------------------------------------------------------


class PathText(str):
    """The kind of a text that names a path, which its reader joins to a root."""


def shaped(kind: Any, value: Any, where: str) -> Any:
    """Return a JSON value as one of a type. `where` is the file and the key, for messages. Raises BadDocument.

    Types: None, bool, int, float (which takes whole numbers too), str, Path, list, tuple, dict and Mapping with text
    keys, their unions, Any, and dataclasses, whose fields are keys: all that have no default are asked for, and others
    are refused. Nothing is converted: "12" and 1.0 are no whole numbers, and neither is true.
    """
    if kind is Any or kind is object:
        return value
    origin, parameters = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _one_of(parameters, value, where)
    if kind is None or kind is types.NoneType:
        return _require(value is None, value, where, "null")
    if kind is float:
        return float(_require(type(value) in (int, float), value, where, "a number"))
    if kind is str:
        return _require(type(value) is str and _whole(value), value, where, "a text")
    if kind in _NAMES:
        return _require(type(value) is kind, value, where, _NAMES[kind])
    if kind in (Path, PathText):
        fine = type(value) is str and value != "" and "\0" not in value
        text = _require(fine, value, where, "a path")
        if kind is PathText:
            return text
        try:
            return location(text)
        except ValueError as error:
            raise BadDocument(f"{where}: {error}") from error
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    base = origin or kind
    if issubclass(base, Mapping):
        _require(type(value) is dict, value, where, "an object")
        of = parameters[1] if parameters else Any
        for key in value:
            _require(type(key) is str and _whole(key), key, f"{where}, key", "a text")
        return {key: shaped(of, item, f"{where}, {key!r}") for key, item in value.items()}
    if issubclass(base, Sequence):
        _require(type(value) is list, value, where, "a list")
        if base is tuple and parameters and parameters[-1] is not Ellipsis:
            _require(len(value) == len(parameters), value, where, f"a list of {len(parameters)}")
            kinds: Sequence[Any] = parameters
        else:
            kinds = [parameters[0] if parameters else Any] * len(value)
        items = [shaped(k, item, f"{where}[{n}]") for n, (k, item) in enumerate(zip(kinds, value, strict=True))]
        return tuple(items) if base is tuple else items
    raise TypeError(f"no document has the type {kind}")


_NAMES: dict[Any, str] = {bool: "true or false", int: "a whole number"}


def _whole(text: str) -> bool:
    """True unless the text holds halves of characters, such as \\ud800, which no file can hold."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _require(fine: bool, value: Any, where: str, expected: str) -> Any:
    if not fine:
        shown = json.dumps(value, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()
        raise BadDocument(f"{where} is {shown if len(shown) <= 60 else shown[:57] + '...'}: expected {expected}")
    return value


def _one_of(kinds: Sequence[Any], value: Any, where: str) -> Any:
    errors = []
    for kind in kinds:
        try:
            return shaped(kind, value, where)
        except BadDocument as error:
            errors.append(error)
    if types.NoneType in kinds and value is not None:
        errors = [error for kind, error in zip(kinds, errors, strict=True) if kind is not types.NoneType]
    raise errors[0]


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    _require(type(value) is dict, value, where, "an object")
    hints = _hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for key in value:
        if key not in fields:
            _require(type(key) is str, key, f"{where}, key", "a text")
            close = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"expected {', '.join(fields)}"
            raise BadDocument(f"{where} has an unknown key {key!r}: {hint}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise BadDocument(f"{where} has no {name!r}")
    values = {key: shaped(hints[key], item, f"{where}, {key!r}") for key, item in value.items()}
    try:
        return kind(**values)
    except BadDocument:
        raise
    except ValueError as error:
        raise BadDocument(f"{where}: {error}") from error


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


# --- bytes ------------------------------------------------------------------------------------------------------------


def _content(path: Path, at_most: int) -> bytes:
    try:
        return storage.read(path, at_most=at_most)
    except FileNotFoundError as error:
        raise BadDocument(f"{path} does not exist") from error
    except storage.TooLarge as error:
        raise BadDocument(f"{path} has {error.strerror}") from error


def _text(data: bytes | str, name: str, at_most: int = MOST_BYTES) -> str:
    if len(data) > at_most:
        raise BadDocument(f"{name} has {len(data)} bytes: expected at most {at_most}")
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadDocument(f"{name} is no UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}") from error
    return text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")


def _briefly(error: Exception) -> str:
    return "a number of thousands of digits" if "integer string conversion" in str(error) else str(error)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return document


def _require_small_numbers(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _require_small_numbers(item, f"{where}, {key!r}")
    elif isinstance(value, list):
        if set(map(type, value)) == {int} and min(value) > -_LARGEST and max(value) < _LARGEST:
            return  # a mask in run lengths has a million of them
        for place, item in enumerate(value):
            _require_small_numbers(item, f"{where}[{place}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise BadDocument(f"{where} is {value}: expected a finite number")
    elif isinstance(value, int) and not -_LARGEST < value < _LARGEST:
        raise BadDocument(f"{where} is a number of {value.bit_length()} bits: expected at most 64")


def _advised(advice: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except BadDocument as error:
        if not advice:
            raise
        raise BadDocument(f"{error}: {advice}" if ": expected" not in str(error) else f"{error}; {advice}") from error
