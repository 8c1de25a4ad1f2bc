"""The file that a checkpoint lies in, checked before anything is made of it. Nothing in it is executed.

torch's zip     every member is stored as it is, and its CRC-32 is compared; torch itself does not look
safetensors     carries no checksum; ours have the crc32c of the whole file in their metadata
older formats   carry none

A file without a checksum is read, and called unverified. No file can ask for much more memory than it has bytes: a
large tensor lies in the file number by number, and the shapes of all others are those of its network.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from autolabel.manifests import notes, storage
from autolabel.manifests.documents import BadDocument, json_of, shaped
from autolabel.manifests.wording import reason
from autolabel.teacher.strangers import pickled_stranger, stranger

# In the metadata of a safetensors file of ours, which is JSON within JSON; zeros while the checksum is computed.
CHECKSUM = "crc32c"
OPEN = "00000000"
_SEAL = re.compile(rb'\\"crc32c\\": \\"([0-9a-f]{8})\\"')
_DTYPES = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
}  # fmt: skip
_REPEATED = 1 << 26  # numbers: three times as many as the largest tensor of a network here has
_VALUES = 3_000_000  # numbers, texts and lists that a checkpoint may hold beside its tensors


class BadCheckpoint(ValueError):
    """The file is damaged, no checkpoint, or a checkpoint that does not fit."""


def read_container(path: Path) -> tuple[object, dict[str, str]]:
    """Return what a file holds: any object, or the tensors of a safetensors file with its metadata as texts.

    Raises BadCheckpoint with the reason, FileNotFoundError.
    """
    if not storage.exists(path):
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    start = storage.read_range(path, 0, 9)
    if not start:
        raise BadCheckpoint(f"{path} is empty (0 bytes): it was cut off while it was written or copied")
    other = stranger(path)
    if other:
        raise BadCheckpoint(f"{path} is {other}")
    try:
        if start[8:9] == b"{":  # eight bytes of length, then JSON
            return _read_safetensors(path, storage.read(path))
        return _read_torch(path, zipped=start.startswith(b"PK")), {}
    except BadCheckpoint:
        raise
    except Exception as error:  # a damaged file can raise anything
        other = pickled_stranger(path)
        raise BadCheckpoint(
            f"{path} is {other}" if other else f"{path} is not a loadable checkpoint: {_why(error)}"
        ) from error


def sealed(data: bytes) -> bytes:
    """The bytes of a safetensors file whose metadata has an open checksum, with the checksum."""
    (place,) = _SEAL.finditer(data)
    crc = b"%08x" % google_crc32c.value(data)
    return data[: place.start(1)] + crc + data[place.end(1) :]


def _read_safetensors(path: Path, data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    length = int.from_bytes(data[:8], "little")
    seals = list(_SEAL.finditer(data, 8, 8 + length))
    if seals:
        start, end = seals[-1].span(1)
        if b"%08x" % google_crc32c.value(data[:start] + OPEN.encode() + data[end:]) != seals[-1][1]:
            raise BadCheckpoint(f"{path} is damaged: its checksum is another than that of its content")
    else:
        _unverified(path, "a safetensors file")
    tensors = load(data)
    header = json_of(data[8 : 8 + length], dict[str, Any], name="its header")
    return tensors, shaped(dict[str, str], header.get("__metadata__", {}), "its metadata")


def _read_torch(path: Path, *, zipped: bool) -> object:
    with storage.reading(path) as file:
        if zipped:
            with zipfile.ZipFile(file) as archive:
                _require_whole(path, archive, size=file.seek(0, 2))
            file.seek(0)
        else:
            _unverified(path, "a checkpoint in the format before torch 1.6")
    with storage.reading(path) as file, torch.serialization.safe_globals(_numpy_scalars()):
        return torch.load(file, map_location="cpu", weights_only=True)


def _require_whole(path: Path, archive: zipfile.ZipFile, *, size: int) -> None:
    """Raise BadCheckpoint unless a zip's members are stored as they are, lie beside each other, and are undamaged."""
    members = archive.infolist()
    packed = next((member.filename for member in members if member.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise BadCheckpoint(f"{path}: {packed} in it is compressed, which torch never does: save it again")
    names = [member.filename for member in members]
    if len(set(names)) < len(names) or sum(member.file_size for member in members) > size:
        raise BadCheckpoint(f"{path} is damaged: parts of it are listed twice")
    broken = archive.testzip()
    if broken is not None:
        raise BadCheckpoint(f"{path} is damaged: the checksum of {broken} in it is another; copy the file again")


def _unverified(path: Path, kind: str) -> None:
    notes.tell(f"{path} is unverified: {kind} carries no checksum")


def _numpy_scalars() -> list[Any]:
    """Return the types that full checkpoints of the reference need beside tensors: a numpy float, at two paths."""
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    paths = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((scalar, path) for path in paths), np.dtype, np.dtypes.Float64DType]


def _why(error: Exception) -> str:
    """Return the reason why torch refuses a file, without its advice to read it all the same."""
    text = str(error).strip()
    if "weights_only" in text:
        type_name = re.search(r"GLOBAL (\S+)", text)
        if type_name:
            return f"it wants more than tensors and numbers ({type_name[1]}), and nothing in it was run"
        return "it is damaged, or a file of another kind"
    if not text or isinstance(error, (KeyError, EOFError, MemoryError)):
        return "it is damaged, or a file of another kind"
    return reason(error) if isinstance(error, BadDocument) else text.splitlines()[0]


# --- what is in it ----------------------------------------------------------------------------------------------------


def require_plain(path: Path, key: str, tensor: Tensor, *, repeated: int = _REPEATED) -> None:
    """Raise BadCheckpoint unless a tensor holds plain numbers, such as float32, as many as it says.

    repeated: the size up to which it may hold fewer, and repeat them.
    """
    kind = _kind(tensor)
    if kind:
        raise BadCheckpoint(f"{path}: tensor {key} is {kind}: expected plain numbers, such as float32")
    held = tensor.untyped_storage().nbytes() // tensor.element_size()
    if tensor.numel() > max(held, repeated):
        raise BadCheckpoint(f"{path}: tensor {key} has {tensor.numel():,} numbers, but the file holds {held:,}")


def require_held(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise BadCheckpoint unless a file holds the numbers of its tensors: each may repeat few, but not all of them."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.values()}
    wanted = sum(t.numel() * t.element_size() for t in state.values())
    if wanted > sum(held.values()) + _REPEATED:
        raise BadCheckpoint(f"{path}: its tensors are {wanted:,} bytes, but the file holds {sum(held.values()):,}")


def _kind(tensor: Tensor) -> str:
    """Return in what way a tensor is special; empty if it is not."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return f"sparse ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.device.type == "meta":
        return "without content (meta)"
    if tensor.is_quantized:
        return "quantized"
    return "" if tensor.dtype in _DTYPES else str(tensor.dtype).removeprefix("torch.")


def require_few_values(path: Path, content: Mapping[Any, Any]) -> None:
    """Raise BadCheckpoint for more values beside the tensors, each counted as often as it occurs, than any needs.

    A few bytes can say that a list holds itself, or ten times another that holds ten times another.
    """
    waiting: list[object] = [content]
    room = _VALUES
    while waiting:
        value = waiting.pop()
        if isinstance(value, (Mapping, list, tuple, set, frozenset)):
            room -= len(value)
            if room < 0:
                raise BadCheckpoint(f"{path} holds more than {_VALUES:,} values beside its tensors: no checkpoint does")
            waiting += [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
