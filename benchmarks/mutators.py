"""How benchmarks/fuzz.py breaks its inputs: bytes, chunks of a PNG, segments of a JPEG, JSON, TOML, tables, tensors.

Every mutator takes a source of chance and some bytes, and returns other bytes. `BLIND` ones know nothing of the format,
as a bad disk or a cut transfer: what passes them must be whole. The others write a well-formed file with another
content, as another program or an attacker does.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

Mutator = Callable[[random.Random, bytes], bytes]

# --- bytes ------------------------------------------------------------------------------------------------------------


def flip(dice: random.Random, data: bytes, bits: int = 1) -> bytes:
    """Flip some bits."""
    changed = bytearray(data)
    for _ in range(bits if changed else 0):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def flip_many(dice: random.Random, data: bytes) -> bytes:
    """Flip 2 to 40 bits."""
    return flip(dice, data, dice.randint(2, 40))


def cut(dice: random.Random, data: bytes) -> bytes:
    """End the file early."""
    return data[: dice.randrange(len(data) + 1)]


def blank(dice: random.Random, data: bytes) -> bytes:
    """Overwrite a stretch with zeros or ones."""
    start, length = dice.randrange(len(data) + 1), dice.choice((1, 4, 64, 512, 4096))
    return (data[:start] + dice.choice((b"\0", b"\xff")) * length + data[start + length :])[: len(data)]


def splice(dice: random.Random, data: bytes) -> bytes:
    """Repeat, leave out or move a stretch."""
    a, b = sorted(dice.randrange(len(data) + 1) for _ in range(2))
    place = dice.randrange(len(data) + 1)
    return dice.choice((data[:a] + data[b:], data[:b] + data[a:], data[:place] + data[a:b] + data[place:]))


def number(dice: random.Random, data: bytes) -> bytes:
    """Overwrite four bytes with a number at a limit."""
    if len(data) < 8:
        return data
    place = dice.randrange(len(data) - 4)
    value = dice.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF, 1 << 24))
    return data[:place] + struct.pack(dice.choice("<>") + "I", value) + data[place + 4 :]


def noise(dice: random.Random, data: bytes) -> bytes:
    """Return random bytes, or none at all, behind the first few of the file."""
    return data[: dice.choice((0, 0, 4, 8, 16, 64))] + dice.randbytes(dice.choice((0, 1, 100, 5000)))


BLIND: tuple[Mutator, ...] = (flip, flip, flip, flip_many, cut, blank, splice, number, noise)

# --- pictures ---------------------------------------------------------------------------------------------------------

_HEAD = b"\x89PNG\r\n\x1a\n"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, place = [], 8
    while place + 8 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    return chunks


def exif(dice: random.Random) -> bytes:
    """Return a TIFF header with tags of senseless types, counts and places, an orientation among them."""
    order = dice.choice("<>")
    tags = [(0x0112, 3, 1, dice.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 300)))]
    for _ in range(dice.randrange(6)):
        tag = dice.choice((0x011A, 0x011B, 0x0128, 0x8769, 0x8825, 0x0131, 0xA005, dice.randrange(65536)))
        tags.append((tag, dice.randrange(14), dice.choice((0, 1, 2, 9, 1 << 30)), dice.getrandbits(32)))
    dice.shuffle(tags)
    packed = b"".join(
        struct.pack(order + "HHIHH", *t, 0) if t[0] == 0x0112 and order == "<" else struct.pack(order + "HHII", *t)
        for t in tags
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", dice.choice((8, 8, 8, 0, 1 << 31)))
    return head + struct.pack(order + "H", dice.choice((len(tags), len(tags), 65535))) + packed + dice.randbytes(8)


def _ancillary(dice: random.Random) -> tuple[bytes, bytes]:
    large = zlib.compress(b"\n" * dice.choice((10, 2 << 20)))
    return dice.choice(
        (
            (b"eXIf", exif(dice)),
            (b"iCCP", b"x\0\0" + large),
            (b"zTXt", b"Raw profile type xmp\0\0" + large),
            (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + large),
            (b"tEXt", b"Comment\0" + dice.randbytes(20)),
            (b"gAMA", dice.randbytes(dice.choice((0, 4)))),
            (b"tRNS", dice.randbytes(dice.choice((0, 1, 6)))),
            (b"acTL", struct.pack(">II", dice.randrange(4), 0)),
            (b"PLTE", dice.randbytes(dice.choice((0, 3, 5, 768)))),
            (b"pHYs", dice.randbytes(9)),
        )
    )


def png(dice: random.Random, data: bytes) -> bytes:
    """Change a header, or leave out, repeat, swap or add chunks; all checksums are right."""
    chunks = _chunks(data) or [(b"IEND", b"")]
    place = dice.randrange(len(chunks))
    what = dice.randrange(6)
    if what == 0 and chunks[0][0] == b"IHDR":
        header = list(struct.unpack(">IIBBBBB", chunks[0][1]))
        field = dice.randrange(7)
        sizes = (0, 1, header[0] + 1, 4000, 70000, 2**31 - 1, 2**32 - 1)
        header[field] = dice.choice(sizes) if field < 2 else dice.randrange(17)
        chunks[0] = (b"IHDR", struct.pack(">IIBBBBB", *header))
    elif what == 1:
        del chunks[place]
    elif what == 2:
        chunks.insert(place, chunks[dice.randrange(len(chunks))])
    elif what == 3:
        chunks[place] = (chunks[place][0], flip(dice, chunks[place][1]))
    else:
        chunks.insert(dice.choice((1, len(chunks) - 1, len(chunks))), _ancillary(dice))
    return _HEAD + b"".join(png_chunk(*chunk) for chunk in chunks)


def jpeg(dice: random.Random, data: bytes) -> bytes:
    """Put EXIF, an empty or an endless segment behind the start of a JPEG."""
    body = dice.choice(
        (b"Exif\0\0" + exif(dice), b"Exif\0\0", b"", dice.randbytes(30), b"http://ns.adobe.com/xap/1.0/\0<x")
    )
    length = dice.choice((len(body) + 2, len(body) + 2, len(body) + 2, 0, 1, 65535))
    return data[:2] + dice.choice((b"\xff\xe1", b"\xff\xe2", b"\xff\xed")) + struct.pack(">H", length) + body + data[2:]


def picture(dice: random.Random, data: bytes) -> bytes:
    """Break a picture as its format allows."""
    return (png if data.startswith(_HEAD) else jpeg if data.startswith(b"\xff\xd8") else number)(dice, data)


# --- text -------------------------------------------------------------------------------------------------------------

_DEEP: Any = []
for _ in range(300):
    _DEEP = [_DEEP]
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 255, 256, 2**63, 10**400, 1.5, -0.0, 1e308, float("inf"), float("nan"), "", "x", "12",
    "\0", "a\0b", "../../x", "/etc/passwd", "C:\\x", "\x1b[31m", "[/x]", "\u202e", "\ud800", "x" * 100_000, [], {},
    [[]], [1, 2, 3], {"a": 1}, _DEEP,
)  # fmt: skip


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in pairs for place in ((tree, key), *_places(value))]


def tree(dice: random.Random, value: Any) -> Any:
    """Replace, leave out or add an entry somewhere in a tree of dictionaries and lists. Works on `value` itself."""
    places = _places(value)
    if not places or dice.random() < 0.03:
        return dice.choice(ODD)
    inside, key = dice.choice(places)
    if dice.random() < 0.15:
        del inside[key]
    elif isinstance(inside, dict) and dice.random() < 0.1:
        inside[dice.choice(("", "x", "format", "\0", "__class__"))] = dice.choice(ODD)
    else:
        inside[key] = dice.choice(ODD)
    return value


def json_text(dice: random.Random, data: bytes) -> bytes:
    """Change the content of a JSON file; or make it deep, give it a byte order mark, another encoding."""
    what = dice.randrange(12)
    if what == 0:
        return b"[" * 100_000
    if what == 1:
        return dice.choice((b"\xef\xbb\xbf" + data, data.decode("utf-8", "replace").encode("utf-16"), b"\xff" + data))
    changed = tree(dice, json.loads(data))
    return json.dumps(changed, indent=2, ensure_ascii=dice.random() < 0.5).encode("utf-8", "surrogatepass")


_VALUES = (
    "1", "0", "-1", "1" + "0" * 400, "1e999", "nan", "inf", "-inf", "true", '""', '"x"', '"\\u0000"', "[]", "[0, 1]",
    "[0, 1" + "0" * 400 + "]", "{}", "{a = 1}", "1979-05-27", "0x1F", "[" * 3000, '"' + "x" * 50_000 + '"',
)  # fmt: skip


def toml(dice: random.Random, data: bytes) -> bytes:
    """Change lines of a TOML file."""
    lines = data.decode().split("\n")
    place = dice.randrange(len(lines))
    key, equals, _ = lines[place].partition("=")
    what = dice.randrange(8)
    if what < 4 and equals:
        lines[place] = f"{key}= {dice.choice(_VALUES)}"
    elif what == 4:
        lines.insert(place, lines[dice.randrange(len(lines))])
    elif what == 5:
        lines.insert(place, f"{dice.choice(('x', 'threshold', '[x]', '[[area]]', 'a' + '.a' * 2000))} = 1")
    elif what == 6:
        return b"\xef\xbb\xbf" + "\r\n".join(lines).encode()
    else:
        del lines[place]
    return "\n".join(lines).encode()


# --- tables and tensors -----------------------------------------------------------------------------------------------


def parquet(dice: random.Random, data: bytes) -> bytes:
    """Write a table again with another cell, column or metadata, as pandas or a script would."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data))
    metadata = dict(table.schema.metadata or {})
    what = dice.randrange(5)
    if what == 0 and b"autolabel" in metadata:
        content = tree(dice, json.loads(metadata[b"autolabel"]))
        metadata[b"autolabel"] = json.dumps(content).encode("utf-8", "surrogatepass")
    elif what == 1:
        metadata = dice.choice(({}, {b"autolabel": b"{"}, {b"autolabel": dice.randbytes(20)}))
    elif what == 2:
        table = table.drop_columns([dice.choice(table.column_names)])
    elif table.num_rows:
        name = dice.choice(table.column_names)
        values = table[name].to_pylist()
        values[dice.randrange(len(values))] = dice.choice([v for v in ODD if not isinstance(v, list | dict)])
        try:
            column = pa.array(values, table.schema.field(name).type)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError, ValueError):
            try:  # a column of another type
                column = pa.array([None if v is None else str(v) for v in values])
            except UnicodeEncodeError:
                column = pa.nulls(len(values))
        table = table.set_column(table.schema.get_field_index(name), name, column)
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


def checkpoint(dice: random.Random, data: bytes) -> bytes:
    """Save a checkpoint with another value of a field, or with a tensor of a strange kind."""
    import torch

    content = torch.load(io.BytesIO(data), weights_only=True)
    state = dict(content["state_dict"])
    name = dice.choice([key for key, value in state.items() if value.ndim == 4])
    weight = state[name]
    strange: list[Callable[[], Any]] = [
        weight.to_sparse, weight.double, weight.half, weight.bool, weight.flatten, lambda: weight.to("meta"),
        lambda: weight.to(torch.float8_e4m3fn), lambda: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        lambda: weight * float("nan"), lambda: torch.complex(weight, weight), lambda: torch.zeros(1).expand(10**10),
        lambda: [weight], lambda: dice.choice(ODD), lambda: torch.zeros(0),
    ]  # fmt: skip
    if dice.random() < 0.5:
        state[name] = dice.choice(strange)()
        content["state_dict"] = state
    else:
        odd = (*ODD, torch.zeros(1, dtype=torch.int64).expand(10**10), torch.zeros(3), torch.zeros(2, 2).long(), state)
        content[dice.choice(list(content))] = dice.choice(odd)
    if dice.random() < 0.1:
        del content[dice.choice(list(content))]
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def safetensors(dice: random.Random, data: bytes) -> bytes:
    """Change the header of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(tree(dice, json.loads(data[8 : 8 + length]))).encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
