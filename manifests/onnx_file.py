"""Files of ONNX as data: what goes in and comes out, which operators they use, which other files hold their weights.

The format is protobuf, of which this reads what is asked for here, from bytes, with no package; field numbers are
those of onnx.proto. onnxruntime sees a file only after it has been looked through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from autolabel.manifests import storage

_DEEPEST = 24  # messages within messages; a loop in a loop has 8
_DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "text", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16",
}  # fmt: skip
_EXTERNAL = 1  # of TensorProto.data_location
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


class BadOnnxFile(ValueError):
    """Bytes that are no file of ONNX."""


@dataclass(frozen=True)
class Port:
    """A tensor that a network takes or gives. dtype: "float32", "uint8" and so on.

    shape: None for a size that may be any, but for a factor `multiple`; None as a whole where nothing is known.
    """

    name: str
    shape: tuple[int | None, ...] | None
    dtype: str
    multiple: int = 1


@dataclass
class OnnxFile:
    """The content of a file. operators: (domain, name) of all nodes; functions: those that the file itself defines.

    external: names of the files that hold weights, as the file spells them. metadata: what its writer has noted.
    """

    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    operators: set[tuple[str, str]] = field(default_factory=set)
    functions: set[tuple[str, str]] = field(default_factory=set)
    external: set[str] = field(default_factory=set)
    metadata: dict[str, str] = field(default_factory=dict)
    producer: str = ""


def read_onnx(path: Path) -> OnnxFile:
    """Read a file, once for each version of it. Raises BadOnnxFile, OSError."""
    return _read(path, storage.stat(path))


@lru_cache(maxsize=4)
def _read(path: Path, version: storage.Stat | None) -> OnnxFile:
    return parse_onnx(storage.read(path))


def parse_onnx(data: bytes) -> OnnxFile:
    """Read a file's bytes. Raises BadOnnxFile."""
    file = OnnxFile()
    graphs = 0
    for number, value in _fields(memoryview(data)):
        match number:
            case 2:
                file.producer = _text(value)
            case 7:
                graphs += 1
                _graph(value, file, 1, top=True)
            case 14:
                entry = dict(_fields(value))
                file.metadata[_text(entry.get(1, b""))] = _text(entry.get(2, b""))
            case 20:
                raise BadOnnxFile("it holds a training, not only a network")
            case 25:
                _function(value, file)
    if graphs != 1:
        raise BadOnnxFile(f"it holds {graphs} networks: expected one")
    return file


def _graph(data: memoryview | int, file: OnnxFile, depth: int, *, top: bool = False) -> None:
    weights, inputs = set(), []
    for number, value in _fields(data, depth):
        match number:
            case 1:
                _node(value, file, depth + 1)
            case 5:
                weights.add(_tensor(value, file))
            case 15:
                _sparse(value, file)
            case 11 if top:
                inputs.append(_port(value))
            case 12 if top:
                file.outputs.append(_port(value))
    file.inputs += [port for port in inputs if port.name not in weights]  # old files list weights as inputs too


def _node(data: memoryview | int, file: OnnxFile, depth: int) -> None:
    domain = name = ""
    for number, value in _fields(data, depth):
        match number:
            case 4:
                name = _text(value)
            case 7:
                domain = _text(value)
            case 5:
                _attribute(value, file, depth + 1)
    file.operators.add((domain, name))


def _attribute(data: memoryview | int, file: OnnxFile, depth: int) -> None:
    for number, value in _fields(data, depth):
        match number:
            case 5 | 10:
                _tensor(value, file)
            case 6 | 11:
                _graph(value, file, depth + 1)
            case 22 | 23:
                _sparse(value, file)


def _function(data: memoryview | int, file: OnnxFile) -> None:
    domain = name = ""
    for number, value in _fields(data):
        match number:
            case 1:
                name = _text(value)
            case 10:
                domain = _text(value)
            case 7:
                _node(value, file, 2)
            case 11:
                _attribute(value, file, 2)
    file.functions.add((domain, name))


def _tensor(data: memoryview | int, file: OnnxFile) -> str:
    """Note where a tensor's numbers lie if not here; return its name."""
    name, location, external = "", "", False
    for number, value in _fields(data):
        match number:
            case 8:
                name = _text(value)
            case 13:
                external = True
                entry = dict(_fields(value))
                if _text(entry.get(1, b"")) == "location":
                    location = _text(entry.get(2, b""))
                    file.external.add(location)
            case 14:
                external = external or value == _EXTERNAL
    if external and not location:
        file.external.add("")
    return name


def _sparse(data: memoryview | int, file: OnnxFile) -> None:
    for number, value in _fields(data):
        if number in (1, 2):
            _tensor(value, file)


def _port(data: memoryview | int) -> Port:
    name, dtype = "", ""
    shape: tuple[int | None, ...] | None = None
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        elif number == 2:
            for kind, tensor in _fields(value):
                for part, content in _fields(tensor) if kind == 1 else ():
                    if part == 1:
                        dtype = _DTYPES.get(content, str(content)) if isinstance(content, int) else ""
                    elif part == 2:
                        shape = tuple(_size(dim) for dimension, dim in _fields(content) if dimension == 1)
    return Port(name, shape, dtype)


def _size(data: memoryview | int) -> int | None:
    sizes = [value for number, value in _fields(data) if number == 1 and isinstance(value, int)]
    return sizes[-1] if sizes and 0 < sizes[-1] < 1 << 31 else None


# --- protobuf ---------------------------------------------------------------------------------------------------------


def _fields(data: memoryview | int | bytes, depth: int = 0) -> Iterator[tuple[int, memoryview | int]]:
    """Give number and value of each field of a message: a whole number, or the bytes of a text or a message."""
    if isinstance(data, int) or depth > _DEEPEST:
        raise BadOnnxFile("it is no file of ONNX, or damaged" if isinstance(data, int) else "it is nested too deeply")
    view, place = memoryview(data), 0
    while place < len(view):
        key, place = _varint(view, place)
        wire = key & 7
        if wire == _VARINT:
            value, place = _varint(view, place)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            length, place = _varint(view, place)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise BadOnnxFile("it is no file of ONNX, or damaged")
        if place + length > len(view):
            raise BadOnnxFile("it is no file of ONNX, or cut off")
        yield key >> 3, view[place : place + length]
        place += length


def _varint(view: memoryview, place: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        if place >= len(view):
            raise BadOnnxFile("it is no file of ONNX, or cut off")
        byte = view[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
    raise BadOnnxFile("it is no file of ONNX, or damaged")


def _text(value: memoryview | int | bytes) -> str:
    if isinstance(value, int):
        raise BadOnnxFile("it is no file of ONNX, or damaged")
    return bytes(value).decode(errors="backslashreplace")
