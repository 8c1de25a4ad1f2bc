"""If a faster decoder reads one file otherwise than Pillow, labels depend on what is installed, and nobody is told."""

from __future__ import annotations

import importlib
import importlib.util
import io
import random
import struct
import sys
import types
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests import images, notes, png_decoder
from autolabel.manifests.headers import PNG_SIGNATURE, BadImage
from autolabel.manifests.images import decode_image, decode_label, decode_picture, photograph_header
from autolabel.manifests.label_space import CAMVID

sys.path.insert(0, str(ROOT / "benchmarks"))
import mutators

Pixels = NDArray[np.uint8]
INSTALLED = sys.modules.get("kornia_rs", ...) is not None and all(
    map(importlib.util.find_spec, ("kornia_rs", "zlib_ng"))
)
fast = pytest.mark.skipif(not INSTALLED, reason="the extra `fast` is not installed")
REAL: Any = importlib.import_module("kornia_rs").io.decode_image_png_u8 if INSTALLED else None
GREY, RGB, PALETTE = 0, 2, 3


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Every test finds the libraries anew."""
    png_decoder._libraries.cache_clear()
    yield
    png_decoder._libraries.cache_clear()


def filtered_rows(dice: random.Random, height: int, width: int, kind: int) -> bytes:
    """Rows of bytes under random filters: whatever the bytes are, they mean pixels."""
    length = width * (3 if kind == RGB else 1)
    return b"".join(bytes([dice.randrange(5)]) + dice.randbytes(length) for _ in range(height))


def png(stream: bytes, height: int, width: int, kind: int, *, cut: int = 1 << 30, interlaced: int = 0) -> bytes:
    """A PNG of 8 bits with this zlib stream, in chunks of `cut` bytes, all with their checksums."""
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, interlaced)
    chunks = [(b"IHDR", header), *([(b"PLTE", bytes(range(256)) * 3)] if kind == PALETTE else [])]
    chunks += [(b"IDAT", stream[place : place + cut]) for place in range(0, max(1, len(stream)), cut)]
    return PNG_SIGNATURE + b"".join(mutators.png_chunk(*chunk) for chunk in [*chunks, (b"IEND", b"")])


def outcome(data: bytes) -> str | tuple[tuple[int, ...], bytes]:
    """The pixels of a photograph or label, or the words that refuse it."""
    try:
        decoded = decode_image(data) if data[25:26] == b"\2" else decode_label(data, None)
    except BadImage as error:
        return str(error)
    return decoded.shape, decoded.tobytes()


def by_pillow(data: bytes, monkeypatch: pytest.MonkeyPatch) -> str | tuple[tuple[int, ...], bytes]:
    with monkeypatch.context() as patched:
        patched.setattr(images, "decode_png", lambda *_, **__: None)
        return outcome(data)


def broken_stream(dice: random.Random, rows: bytes, row: int) -> bytes:
    """A zlib stream that is right, or wrong in one of the ways that only inflating it shows."""
    right = zlib.compress(rows, dice.choice((0, 1, 6, 9)))
    extra = dice.randbytes(dice.choice((1, 4, row, 3 * row)))
    filters = bytearray(rows)
    filters[dice.randrange(len(rows) // row) * row] = dice.choice((5, 6, 128, 255))
    small = zlib.compressobj(9, zlib.DEFLATED, dice.choice((9, 11)))
    flushed = zlib.compressobj()
    return dice.choice(
        (
            right, right[:-4] + dice.randbytes(4), right[:-4], right[: dice.randrange(len(right))], right + extra,
            mutators.flip(dice, right), mutators.flip(dice, right), mutators.splice(dice, right),
            mutators.number(dice, right), dice.randbytes(2) + right[2:], zlib.compress(rows + extra),
            zlib.compress(rows[: -dice.choice((1, row))]), zlib.compress(bytes(filters)),
            small.compress(rows) + small.flush(),
            flushed.compress(rows[:9]) + flushed.flush(zlib.Z_FULL_FLUSH) + flushed.compress(rows[9:])
            + flushed.flush(),
        )
    )  # fmt: skip


@fast
def test_files_with_broken_streams_are_read_and_refused_as_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """All checksums of chunks are right here, so that only decoders can tell. benchmarks/fuzz.py tries many more."""
    dice, refused, decoded = random.Random(3), 0, 0
    monkeypatch.setattr(png_decoder, "_BAND", 400)
    monkeypatch.setattr(png_decoder, "_PIECE", 100)
    for _ in range(400):
        height, width, kind = dice.randint(1, 20), dice.randint(1, 20), dice.choice((GREY, RGB, RGB, PALETTE))
        rows = filtered_rows(dice, height, width, kind)
        stream = broken_stream(dice, rows, len(rows) // height)
        cut, interlaced = dice.choice((1 << 30, 1 << 30, 7, 50)), int(dice.random() < 0.1)
        data = png(stream, height, width, kind, cut=cut, interlaced=interlaced)
        header = images._header(io.BytesIO(data))
        pixels = png_decoder.decode_png(data, header, images._by_pillow)
        expected = by_pillow(data, monkeypatch)
        assert outcome(data) == expected
        if pixels is None:
            refused += isinstance(expected, str)
        else:
            assert (pixels.shape, pixels.tobytes()) == expected
            decoded += 1
    assert refused > 150 and decoded > 50


@fast
def test_mutated_files_are_read_and_refused_as_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    dice, read = random.Random(33), 0
    for n in range(400):
        kind = dice.choice((GREY, RGB, RGB, PALETTE))
        data = png(zlib.compress(filtered_rows(dice, 9, 11, kind)), 9, 11, kind, cut=dice.choice((64, 1 << 30)))
        data = mutators.png(dice, data) if n % 2 else dice.choice(mutators.BLIND)(dice, data)
        expected = by_pillow(data, monkeypatch)
        assert outcome(data) == expected
        read += not isinstance(expected, str)
    assert 50 < read < 370


def dynamic_block(code_lengths: str) -> bytes:
    """A zlib stream of eight zeros, whose only block has these bits as its header and Huffman codes."""
    bits = code_lengths + "0" * (-len(code_lengths) % 8)
    block = bytes(int(bits[place : place + 8][::-1], 2) for place in range(0, len(bits), 8))
    return b"\x78\x9c" + block + struct.pack(">I", zlib.adler32(bytes(8)))


def literals(length: int) -> str:
    """Bits of a block in which 0 and the end have codes of this length and nothing else has: complete for 1 alone."""
    order = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15]
    lengths = {0: 1, 18: 2, length: 2}  # the code of the lengths itself: complete
    codes = {0: "0", **{symbol: code for symbol, code in zip(sorted({18, length}), ("10", "11"), strict=True)}}
    head = "1" + "01" + f"{0:05b}" + f"{0:05b}" + f"{15:04b}"[::-1]
    table = "".join(f"{lengths.get(symbol, 0):03b}"[::-1] for symbol in order)
    zeros = codes[18] + f"{138 - 11:07b}"[::-1] + codes[18] + f"{117 - 11:07b}"[::-1]  # symbols 1 to 255
    return head + table + codes[length] + zeros + codes[length] + codes[0] + "0" * length * 8 + f"{1:0{length}b}"


@fast
def test_a_stream_with_incomplete_huffman_codes_is_refused_as_zlib_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checksum is right and its rows are all there: ISA-L inflates it, Pillow and browsers do not."""
    whole, incomplete = (png(dynamic_block(literals(length)), 1, 7, GREY) for length in (1, 2))
    assert outcome(whole) == by_pillow(whole, monkeypatch) == ((1, 7), bytes(7))
    assert outcome(incomplete) == by_pillow(incomplete, monkeypatch)
    assert isinstance(outcome(incomplete), str)


@fast
@pytest.mark.parametrize("kind", [GREY, RGB, PALETTE])
def test_bands_and_upper_rows_are_those_of_the_whole_picture(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = png(zlib.compress(filtered_rows(random.Random(3), 50, 37, kind)), 50, 37, kind, cut=300)
    header = images._header(io.BytesIO(data))
    whole = np.asarray(Image.open(io.BytesIO(data)))
    for band in (1, 200, 1 << 20):
        monkeypatch.setattr(png_decoder, "_BAND", band)
        for rows in (None, 1, 7, 49, 50, 60):
            pixels = png_decoder.decode_png(data, header, images._by_pillow, rows=rows)
            assert pixels is not None and pixels.dtype == np.uint8
            assert np.array_equal(pixels, whole[:rows])


@fast
def test_a_picture_of_which_upper_rows_are_needed_is_these_rows() -> None:
    data = png(zlib.compress(filtered_rows(random.Random(4), 50, 37, RGB)), 50, 37, RGB)
    picture, smaller = decode_picture(data, 2, rows=20)
    assert (picture.mode, picture.size, smaller) == ("RGB", (37, 20), 1)
    assert np.array_equal(np.asarray(picture), decode_image(data)[:20])


def test_a_turned_picture_has_all_of_its_rows() -> None:
    data = png(zlib.compress(filtered_rows(random.Random(5), 50, 37, RGB)), 50, 37, RGB)
    six = b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"
    turned = data[:33] + mutators.png_chunk(b"eXIf", six) + data[33:]
    picture, _ = decode_picture(turned, rows=20)
    assert picture.size == (50, 37)
    assert np.array_equal(np.asarray(picture), np.rot90(decode_image(data), -1))
    assert np.array_equal(decode_image(turned), np.asarray(picture))


# --- libraries that are not as they should be -------------------------------------------------------------------------

SMALL = png(zlib.compress(filtered_rows(random.Random(6), 20, 30, RGB)), 20, 30, RGB)
LARGE = png(zlib.compress(bytes((1024 * 3 + 1) * 1024)), 1024, 1024, RGB)
TWICE = "PNG images are decoded by Pillow, in twice the time that they take with: pip install 'autolabel[fast]'"


def fake_kornia(decode: Any) -> types.ModuleType:
    module = types.ModuleType("kornia_rs")
    module.__dict__.update(__version__="9.1", io=types.SimpleNamespace(decode_image_png_u8=decode))
    return module


def told(data: bytes) -> list[str]:
    """What is said while a photograph is read three times, to Pillow's pixels."""
    said: list[str] = []
    with notes.heard(said.append):
        for _ in range(3):
            assert np.array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data))))
    return said


@pytest.mark.parametrize("missing", ["kornia_rs", "zlib_ng.zlib_ng"])
def test_without_the_extra_pillow_decodes_and_a_large_png_says_so_once(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kornia_rs", fake_kornia(None))
    monkeypatch.setitem(sys.modules, missing, None)
    assert told(SMALL) == []
    assert told(LARGE) == [TWICE]


def test_a_library_that_cannot_be_loaded_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kornia_rs.py").write_text("raise ImportError('libc.so: version GLIBC_9 not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kornia_rs", raising=False)
    reason = "because kornia-rs cannot be loaded: libc.so: version GLIBC_9 not found"
    assert told(SMALL) == [f"PNG images are decoded by Pillow, {reason}"]


def _one_off(data: bytes, shape: tuple[int, int], mode: str) -> Pixels:
    rows: Pixels = REAL(data, shape, mode)
    rows[-1, -1, 0] ^= 1
    return rows


def _fails(*_: object) -> Pixels:
    raise RuntimeError("no such mode")


@fast
@pytest.mark.parametrize(
    ("decode", "reason"),
    [
        pytest.param(_one_off, "decode a small one otherwise", id="one bit differs"),
        pytest.param(
            lambda *_: np.zeros((4, 7, 3), np.uint16),
            "fail at a small one: it gives other rows than were asked for",
            id="16 bits",
        ),
        pytest.param(lambda data: None, "fail at a small one: ", id="other arguments"),
        pytest.param(_fails, "fail at a small one: no such mode", id="an error"),
        pytest.param(None, "fail at a small one: ", id="no function"),
    ],
)
def test_a_library_of_a_strange_version_is_not_used_and_this_is_said_once(
    decode: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kornia_rs", fake_kornia(decode))
    (said,) = told(SMALL)
    assert said.startswith("PNG images are decoded by Pillow, because kornia_rs 9.1 and zlib_ng ")
    assert reason in said and "\n" not in said


class Panic(BaseException):
    """What Rust's panics are in Python."""


@fast
def test_whatever_the_library_raises_at_a_file_pillow_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = png_decoder._libraries(images._by_pillow)
    assert isinstance(libraries, png_decoder._Libraries)
    header = photograph_header(io.BytesIO(SMALL))

    def raising(error: BaseException) -> png_decoder._Libraries:
        def fails(*_: object) -> None:
            raise error

        return png_decoder._Libraries(libraries.zlib_ng, fails)

    for error in (Panic("index out of bounds"), Exception("Failed to decode the png image")):
        monkeypatch.setattr(png_decoder, "_libraries", lambda _, error=error: raising(error))
        assert png_decoder.decode_png(SMALL, header, images._by_pillow) is None
        assert decode_image(SMALL).shape == (20, 30, 3)
    for passed in (KeyboardInterrupt(), MemoryError()):
        monkeypatch.setattr(png_decoder, "_libraries", lambda _, error=passed: raising(error))
        with pytest.raises(type(passed)):
            decode_image(SMALL)


def test_labels_of_grey_and_palette_pngs_are_checked_whoever_decodes_them() -> None:
    label = png(zlib.compress(b"\0" + bytes([0, 10, 11, 200])), 1, 4, PALETTE)
    with pytest.raises(BadImage, match=r"^ids \[11, 200\] are not in label space 'camvid' \(train ids\)$"):
        decode_label(label, CAMVID)
