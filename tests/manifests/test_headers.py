"""If header and pixels of a file are read apart, or metadata decides over pixels, whole photographs are lost."""

from __future__ import annotations

import ast
import io
import random
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from PIL import ExifTags, Image, ImageOps
from test_images import HEIGHT, PHOTO, TURNED, WIDTH, encoded, orientation, png_by_hand, see_through

from autolabel.manifests import images
from autolabel.manifests.headers import BadImage
from autolabel.manifests.images import (
    decode_image,
    decode_label,
    decode_picture,
    encode_label,
    photograph_header,
    read_size,
)
from autolabel.manifests.label_space import CAMVID

SIDEWAYS = TURNED[6](PHOTO)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*early: bytes, late: bytes = b"") -> bytes:
    """The photograph as a PNG with chunks of one's own before, and behind, its pixels."""
    data = encoded(PHOTO)
    return data[:33] + b"".join(early) + data[33:-12] + late + data[-12:]


def jpeg(*payloads: bytes, marker: int = 0xE1, pixels: Any = PHOTO) -> bytes:
    """The photograph as a JPEG with segments of one's own behind its start."""
    data = encoded(pixels, "JPEG", quality=95)
    return (
        data[:2] + b"".join(b"\xff" + bytes([marker]) + struct.pack(">H", len(p) + 2) + p for p in payloads) + data[2:]
    )


def exif(*fields: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """EXIF of these fields (tag, type, count, four bytes of value), without "Exif" in front."""
    body = b"".join(struct.pack(order + "HHI", *field[:3]) + field[3] for field in fields)
    start = b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08"
    return start + struct.pack(order + "H", len(fields)) + body + bytes(4)


def turn(value: int, order: str = "<", kind: int = 3) -> tuple[int, int, int, bytes]:
    return (0x0112, kind, 1, struct.pack(order + {3: "HH", 4: "I"}[kind], *([value, 0] if kind == 3 else [value])))


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
RAW = b"\nexif\n%8d\n" % len(exif(turn(6))) + exif(turn(6)).hex().encode() + b"\n"
HUGE = zlib.compress(b"\n" * (2 << 20))
SIX = exif(turn(6))
RESOLUTION_AS_TEXT = (0x011A, 2, 3, b"abc\0")  # Pillow reads it and cannot write it back


# --- metadata never costs pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        pytest.param(png(chunk(b"eXIf", b"\0\x08\0\2\1\x12\0\3")), PHOTO, id="PNG, senseless eXIf"),
        pytest.param(png(late=chunk(b"eXIf", b"nonsense")), PHOTO, id="PNG, senseless eXIf at the end"),
        pytest.param(png(chunk(b"iCCP", b"x\0\0" + HUGE)), PHOTO, id="PNG, 2 MiB of profile"),
        pytest.param(png(chunk(b"zTXt", b"Raw profile type xmp\0\0" + HUGE)), PHOTO, id="PNG, 2 MiB of text"),
        pytest.param(png(chunk(b"zTXt", b"Raw profile type exif\0\0" + HUGE)), PHOTO, id="PNG, 2 MiB of raw EXIF"),
        pytest.param(png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + HUGE)), PHOTO, id="PNG, 2 MiB of XMP"),
        pytest.param(png(chunk(b"iCCP", b"no profile")), PHOTO, id="PNG, profile without an end of its name"),
        pytest.param(png(chunk(b"pHYs", b"")), PHOTO, id="PNG, empty pHYs"),
        pytest.param(png(chunk(b"tEXt", b"rain")[:-4] + b"oops"), PHOTO, id="PNG, text with another checksum"),
        pytest.param(png(chunk(b"gAMA", b"\0"), chunk(b"cHRM", b"1")), PHOTO, id="PNG, short chunks"),
        pytest.param(png(chunk(b"eXIf", exif(turn(6), RESOLUTION_AS_TEXT))), SIDEWAYS, id="PNG, resolution as text"),
        pytest.param(png(chunk(b"eXIf", exif(turn(9)))), PHOTO, id="PNG, orientation 9"),
        pytest.param(png(chunk(b"eXIf", SIX[:15])), PHOTO, id="PNG, EXIF cut off"),
        pytest.param(png(chunk(b"eXIf", exif((0x0112, 2, 2, b"6\0\0\0")))), PHOTO, id="PNG, orientation as text"),
    ],
)  # fmt: skip
def test_a_png_is_read_whatever_its_metadata_says(tmp_path: Path, data: bytes, pixels: Any) -> None:
    (tmp_path / "a.png").write_bytes(data)
    assert np.array_equal(decode_image(data), pixels)
    assert read_size(tmp_path / "a.png") == pixels.shape[:2]


@pytest.mark.parametrize(
    ("data", "turned"),
    [
        pytest.param(jpeg(b"Exif\0\0"), 1, id="blank"),
        pytest.param(jpeg(b"Exif\0\0Exif\0\0" + SIX), 6, id="doubled"),
        pytest.param(jpeg(b"Exif\0\0" + SIX, b"Exif\0\0" + exif(turn(3))), 6, id="two of them: the first"),
        pytest.param(jpeg(b"Exif\0\0" + SIX[:15]), 1, id="cut off"),
        pytest.param(jpeg(b"Exif\0\0not a tiff at all"), 1, id="garbage"),
        pytest.param(jpeg(b"Exif\0\0" + exif(turn(9))), 1, id="orientation 9"),
        pytest.param(jpeg(b"Exif\0\0" + exif(turn(0))), 1, id="orientation 0"),
        pytest.param(jpeg(b"Exif\0\0" + exif(turn(6), RESOLUTION_AS_TEXT)), 6, id="what Pillow cannot write back"),
        pytest.param(jpeg(b"Exif\0\0" + b"II*\0\xff\xff\xff\x7f"), 1, id="a start beyond its end"),
        pytest.param(jpeg(b"Photoshop 3.0\0 8BIM", marker=0xED), 1, id="damaged Photoshop block"),
        pytest.param(jpeg(b"ICC_PROFILE\0", marker=0xE2), 1, id="empty colour profile"),
        pytest.param(jpeg(b"MPF\0nonsense", marker=0xE2), 1, id="damaged list of more pictures"),
        pytest.param(jpeg(b"JFIF", marker=0xE0), 1, id="short JFIF"),
        pytest.param(jpeg(b"Adobe", marker=0xEE), 1, id="short Adobe"),
        pytest.param(jpeg(b"\xff" * 60_000, marker=0xFE), 1, id="a long comment"),
    ],
)
def test_a_jpeg_is_read_whatever_its_metadata_says(tmp_path: Path, data: bytes, turned: int) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    expected = TURNED[turned](decode_image(encoded(PHOTO, "JPEG", quality=95)))
    with warnings.catch_warnings(record=True) as warned:
        assert np.array_equal(decode_image(data), expected)
    assert warned == []
    assert read_size(tmp_path / "a.jpg") == expected.shape[:2]


@pytest.mark.parametrize("form", ["WEBP", "TIFF"])
def test_senseless_metadata_of_other_formats_is_left_aside(form: str) -> None:
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    data = encoded(PHOTO, form, exif=b"Exif\0\0nonsense", icc_profile=b"no profile", **options) if form == "WEBP" else (
        encoded(PHOTO, form, icc_profile=b"no profile", tiffinfo={0x011A: 7.0, 0x02BC: b"no XML"})
    )  # fmt: skip
    assert np.array_equal(decode_image(data), PHOTO)


# --- orientation, from every place that programs put it ---------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(png(chunk(b"eXIf", SIX)), id="eXIf"),
        pytest.param(png(chunk(b"eXIf", exif(turn(6, ">"), order=">"))), id="eXIf, big-endian"),
        pytest.param(png(chunk(b"eXIf", exif(turn(6, kind=4)))), id="eXIf, of 32 bits"),
        pytest.param(png(late=chunk(b"eXIf", SIX)), id="eXIf behind the pixels"),
        pytest.param(png(late=chunk(b"tEXt", b"x\0y") + chunk(b"eXIf", b"Exif\0\0" + SIX)), id="eXIf at the very end"),
        pytest.param(png(chunk(b"tEXt", b"Raw profile type exif\0" + RAW)), id="ImageMagick's text"),
        pytest.param(png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW))), id="packed text"),
        pytest.param(png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)), id="XMP"),
        pytest.param(png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP))), id="packed XMP"),
        pytest.param(encoded(PHOTO, "WEBP", lossless=True, exif=orientation(6)), id="WebP"),
        pytest.param(encoded(PHOTO, "WEBP", lossless=True, xmp=XMP), id="WebP, XMP"),
        pytest.param(encoded(PHOTO, "TIFF", tiffinfo={0x0112: 6}), id="TIFF"),
        pytest.param(encoded(PHOTO, "TIFF", tiffinfo={0x0112: 6}, compression="tiff_lzw"), id="TIFF, packed"),
    ],
)
def test_the_orientation_is_applied_and_the_header_agrees_as_pillow_says(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    assert np.array_equal(decode_image(data), SIDEWAYS)
    assert read_size(tmp_path / "a") == (WIDTH, HEIGHT)
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))), SIDEWAYS)


# --- kinds of photographs ---------------------------------------------------------------------------------------------


def multi_picture() -> bytes:
    """A JPEG of two pictures, as phones write it: a photograph and a map of depths."""
    return encoded(Image.fromarray(PHOTO), "MPO", save_all=True, append_images=[Image.fromarray(PHOTO[::2])])


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        pytest.param(encoded(see_through(0)), PHOTO, id="PNG with opaque alpha"),
        pytest.param(encoded(see_through(0), "WEBP", lossless=True), PHOTO, id="WebP with opaque alpha"),
        pytest.param(encoded(see_through(0), "TIFF"), PHOTO, id="TIFF with opaque alpha"),
        pytest.param(encoded(PHOTO, "BMP"), PHOTO, id="BMP"),
        pytest.param(encoded(see_through(0), "BMP"), PHOTO, id="BMP of 32 bits"),
        pytest.param(encoded(PHOTO, "TIFF"), PHOTO, id="TIFF"),
        pytest.param(encoded(PHOTO, "TIFF", compression="tiff_lzw"), PHOTO, id="TIFF, LZW"),
        pytest.param(encoded(PHOTO, "TIFF", compression="tiff_adobe_deflate"), PHOTO, id="TIFF, deflate"),
        pytest.param(encoded(PHOTO, "TIFF", compression="packbits"), PHOTO, id="TIFF, PackBits"),
    ],
)
def test_lossless_files_of_other_kinds_are_read_to_the_last_bit(tmp_path: Path, data: bytes, pixels: Any) -> None:
    (tmp_path / "a").write_bytes(data)
    assert np.array_equal(decode_image(data), pixels)
    assert read_size(tmp_path / "a") == (HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(encoded(PHOTO, "JPEG", keep_rgb=True), id="JPEG of red, green and blue, as Adobe's mark says"),
        pytest.param(
            encoded(PHOTO, "JPEG", subsampling=0, progressive=True, restart_marker_blocks=2), id="with restarts"
        ),
        pytest.param(encoded(PHOTO, "JPEG", comment=b"rain", dpi=(72, 72), icc_profile=b"x" * 99), id="with metadata"),
        pytest.param(
            encoded(PHOTO, transparency=tuple(int(v) for v in PHOTO[0, 0])), id="PNG with a transparent colour"
        ),
    ],
)
def test_what_decides_about_colours_is_kept(data: bytes) -> None:
    assert np.array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_grey_jpeg_has_three_equal_channels() -> None:
    data = jpeg(pixels=PHOTO[..., 0])
    grey = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode_image(data), np.dstack([grey] * 3))
    smaller, by = decode_picture(data, 2)
    assert (smaller.mode, smaller.size, by) == ("RGB", (WIDTH // 2, HEIGHT // 2), 2)


def test_a_jpeg_of_several_pictures_is_its_first_one() -> None:
    data = multi_picture()
    assert np.array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(
            encoded(PHOTO, "TIFF", compression="jpeg"),
            "a TIFF with compression 7: expected LZW, PackBits, deflate, none", id="TIFF with a JPEG inside",
        ),
        pytest.param(
            encoded(Image.fromarray(PHOTO), "TIFF", save_all=True, append_images=[Image.fromarray(PHOTO)] * 2),
            "a TIFF of 3 pictures: expected one; save the one that is meant", id="TIFF of pages",
        ),
        pytest.param(
            encoded(PHOTO[..., 0], "TIFF"), "mode L, 8 bits: expected 8-bit RGB; it may be a label; save a photograph"
            " as RGB, or as a grey JPEG", id="grey TIFF",
        ),
        pytest.param(
            encoded(Image.fromarray(PHOTO).quantize(8), "BMP"),
            "mode P, 8 bits: expected 8-bit RGB; it may be a label; save a photograph as RGB", id="BMP with a palette",
        ),
        pytest.param(
            encoded(see_through(7), "WEBP", lossless=True, exact=True),
            "7 of its pixels are transparent: expected 8-bit RGB; save it without transparency", id="clear WebP",
        ),
        pytest.param(
            png_by_hand(2, 1, 16, 6, [bytes(16)]),
            "mode RGBA, 16 bits: expected 8-bit RGB; save it with 8 bits a channel",
            id="RGBA of 16 bits",
        ),
        pytest.param(
            encoded(Image.fromarray(PHOTO), "PNG", save_all=True, append_images=[Image.fromarray(PHOTO[::-1])]),
            "an animation of 2 pictures: expected one; save the one that is meant", id="animated PNG",
        ),
        pytest.param(
            encoded(Image.fromarray(PHOTO), "WEBP", save_all=True, append_images=[Image.fromarray(PHOTO[::-1])]),
            "an animation of 2 pictures: expected one; save the one that is meant", id="animated WebP",
        ),
        pytest.param(png(chunk(b"CgBI", b"\0")), "damaged or truncated: unknown chunk b'CgBI'", id="PNG of an app"),
    ],
)  # fmt: skip
def test_other_pictures_are_refused_with_what_to_do(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage) as refusal:
        decode_image(data)
    assert str(refusal.value) == reason


# --- header and pixels agree, whatever the file -----------------------------------------------------------------------


SEEDS = {
    "png": png(chunk(b"eXIf", SIX), chunk(b"tEXt", b"a\0b"), late=chunk(b"eXIf", SIX)),
    "apng": encoded(Image.fromarray(PHOTO), "PNG", save_all=True, append_images=[Image.fromarray(PHOTO[::-1])]),
    "jpeg": jpeg(b"Exif\0\0" + SIX),
    "progressive": encoded(PHOTO, "JPEG", progressive=True, exif=orientation(8)),
    "mpo": multi_picture(),
    "webp": encoded(PHOTO, "WEBP", exif=orientation(6)),
    "lossless": encoded(see_through(0), "WEBP", lossless=True),
    "bmp": encoded(PHOTO, "BMP"),
    "tiff": encoded(PHOTO, "TIFF", tiffinfo={0x0112: 6}),
    "lzw": encoded(PHOTO, "TIFF", compression="tiff_lzw"),
}


def _flip(data: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(min(len(data), dice.choice([64, 400, len(data)])))
    return data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :]


def _number(data: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(min(len(data) - 4, 400))
    return (
        data[:place]
        + dice.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\xff\xff", b"\x7f\xff\xff\xff"])
        + data[place + 4 :]
    )


def _cut(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data))]


def _splice(data: bytes, dice: random.Random) -> bytes:
    other = dice.choice(list(SEEDS.values()))
    return data[: dice.randrange(len(data))] + other[dice.randrange(len(other)) :]


def _checksums(data: bytes, dice: random.Random) -> bytes:
    """Change a PNG's header or metadata and mend the checksum: a lie that no check finds."""
    if not data.startswith(b"\x89PNG"):
        return _flip(data, dice)
    changed = bytearray(data)
    changed[dice.randrange(16, 29)] = dice.randrange(256)
    changed[29:33] = zlib.crc32(changed[12:29]).to_bytes(4)
    return bytes(changed)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("mutate", [_flip, _number, _cut, _splice, _checksums], ids=lambda f: f.__name__)
@pytest.mark.parametrize("seed", SEEDS)
def test_header_and_pixels_agree_or_the_file_is_refused(
    tmp_path: Path, seed: str, mutate: Callable[[bytes, random.Random], bytes]
) -> None:
    """40 broken files of each kind: nothing but BadImage comes out. benchmarks/fuzz.py tries many more."""
    dice, file = random.Random(f"{seed}{mutate.__name__}"), tmp_path / "a"
    for _ in range(40):
        data = mutate(SEEDS[seed], dice)
        file.write_bytes(data)
        try:
            size = read_size(file)
        except BadImage as refused:
            with pytest.raises(BadImage) as again:
                decode_image(data)
            assert str(again.value) == str(refused)
            continue
        try:
            assert decode_image(data).shape == (*size, 3)
        except BadImage as error:
            assert str(error)


def test_warnings_of_pillow_do_not_reach_the_terminal(tmp_path: Path) -> None:
    """It warns of pictures above 89 million pixels, and of a TIFF that ends early, with a line of its source."""
    (tmp_path / "large.png").write_bytes(png_by_hand(12_000, 8_000, 8, 2, []))
    (tmp_path / "short.tif").write_bytes(encoded(PHOTO, "TIFF")[:-200])
    code = (
        "import sys; from pathlib import Path; from autolabel.manifests.images import BadImage, read_image\n"
        "for name in sys.argv[1:]:\n    try: read_image(Path(name))\n    except BadImage as error: print(error)"
    )
    files = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 2
    assert done.stderr == ""


# --- whatever Pillow raises -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("a bug of the decoder"), "damaged or truncated: a bug of the decoder"),
        (AttributeError("'NoneType' object has\nno attribute 'x'"),
         "damaged or truncated: 'NoneType' object has no attribute 'x'"),
        (KeyError("IHDR"), "damaged or truncated: there is no 'IHDR'"),
        (RuntimeError(), "damaged or truncated: an error without words (RuntimeError)"),
        (RecursionError("too deep"), "damaged or truncated: too deep"),
    ],
)  # fmt: skip
def test_any_exception_of_a_decoder_is_the_fault_of_the_file(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(images, "decode_png", lambda *_, **__: None)
    monkeypatch.setattr(Image, "open", fails)
    for decode in (lambda: decode_image(encoded(PHOTO)), lambda: decode_label(encode_label(PHOTO[..., 0]), None)):
        with pytest.raises(BadImage) as refusal:
            decode()
        assert str(refusal.value) == reason


def test_a_lack_of_memory_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "decode_png", lambda *_, **__: None)
    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(MemoryError):
        decode_image(encoded(PHOTO))


def test_pillow_opens_files_in_one_place() -> None:
    """Elsewhere its exceptions and warnings would have to be thought of again."""
    callers = [
        path.relative_to(ROOT).as_posix()
        for room in ("manifests", "teacher", "pipeline", "student")
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("Image.open", "ImageOps.exif_transpose")
    ]
    assert callers == ["manifests/images.py"]


def test_a_nul_in_a_name_costs_the_image_and_not_the_scan(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match=r"^the file is missing$"):
        read_size(tmp_path / "a\0b.png")


def test_a_header_says_how_the_picture_is_stored_and_how_it_is_seen() -> None:
    header = photograph_header(io.BytesIO(SEEDS["jpeg"]))
    assert (header.format, header.width, header.height, header.mode, header.bits) == ("JPEG", WIDTH, HEIGHT, "RGB", 8)
    assert (header.orientation, header.size) == (6, (WIDTH, HEIGHT))
    assert ExifTags.Base.Orientation == 0x0112


# --- labels as colours ------------------------------------------------------------------------------------------------


COLOURED = np.array([[0, 1, 255], [3, 10, 9]], np.uint8)  # train ids of CamVid
SHADES = np.array([(*c.colour,) for c in CAMVID.classes] + [(0, 0, 0)], np.uint8)


def drawn(label: Any) -> Any:
    return SHADES[np.where(label == 255, 11, label)]


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "palette"])
def test_labels_drawn_in_the_colours_of_the_classes_are_read(kind: str) -> None:
    picture = Image.fromarray(drawn(COLOURED))
    data = encoded(picture.quantize(16) if kind == "palette" else picture.convert(kind))
    assert decode_label(data, CAMVID, ids="color").tolist() == COLOURED.tolist()


def test_a_colour_that_no_class_has_is_refused_with_the_commonest_one() -> None:
    pixels = drawn(COLOURED)
    pixels[0, 0], pixels[1] = (129, 128, 128), (1, 2, 3)
    with pytest.raises(BadImage) as refusal:
        decode_label(encoded(pixels), CAMVID, ids="color")
    assert str(refusal.value) == (
        "4 pixels have colours that are not in label space 'camvid', 3 of them (1, 2, 3): expected the colours of its"
        " classes alone, and black for ignored pixels"
    )


def test_a_grey_label_is_no_picture_of_colours() -> None:
    with pytest.raises(
        BadImage, match=r"^mode L: expected an RGB or palette PNG that shows every class in its colour$"
    ):
        decode_label(encode_label(COLOURED), CAMVID, ids="color")
