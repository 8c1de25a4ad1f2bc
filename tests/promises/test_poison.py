"""A folder as people have them: whatever a file holds, it costs at most its own label; and no disk loses one.

If this fails, one strange file stops a run of a million images at night, or gets a label that is not its own.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import HEIGHT, WIDTH, autolabel, contents, labels_of, outcome, photograph, quarantined, scanned
from PIL import ExifTags, Image

from autolabel.manifests import local_storage
from autolabel.manifests.images import decode_image
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.run.folder import Accounts, Run
from autolabel.manifests.samples import load_manifest
from autolabel.manifests.scan import scan
from autolabel.manifests.settings import build_job
from autolabel.pipeline.job import STORES, LabelJob, Portion
from autolabel.pipeline.run import generate
from autolabel.pipeline.verify import verify


def job(place: Path, teacher: Path, run: str = "run", **settings: object) -> LabelJob:
    defaults = {"scales": (1.0,), "engine": "local", "unit_size": 4, "max_quarantined": 1.0}
    paths = {"manifest": place / "drive.parquet", "teacher": teacher, "out": place / run}
    return build_job(LabelJob, {**paths, **defaults, **settings})


@contextlib.contextmanager
def in_time(seconds: int, *pipes: Path) -> Iterator[None]:
    """TimeoutError after so long; who waits for a writer of these pipes is let go."""

    def give_up(number: int, frame: object) -> None:
        for pipe in pipes:
            os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))
        raise TimeoutError(f"hung for {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- the files --------------------------------------------------------------------------------------------------------

GOOD = ["good-1", "good-2", "good-3"]


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, pixels: bytes) -> bytes:
    """An RGB PNG of a kind that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the camera was held upright
    return exif


# Orientation 6, and a resolution that is text: Pillow reads it, and raises TypeError when it writes it back.
UNWRITABLE = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIIHHIII", 2, 0x0112, 3, 1, 6, 0x011A, 2, 3, 0x00636261, 0)


def segment(payload: bytes) -> bytes:
    """A piece of metadata in a JPEG."""
    return b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload


def write_poison(drive: Path, outside: Path) -> None:
    """Every file that is bad or strange already when the folder is scanned."""
    outside.mkdir()
    street = Image.open(drive / "good-1.png").convert("RGB")
    whole, photo = encoded(street, "PNG"), encoded(street, "JPEG", quality=90)
    for name, data in {
        "cut png.png": whole[: len(whole) // 2],
        "cut jpeg.jpg": photo[: len(photo) // 2],
        "empty.png": b"",
        "text.png": b"milk, bread, eggs\n" * 9,
        "sixteen bits.png": png(4, 2, 16, (b"\0" + bytes(24)) * 2),
        "cmyk.jpg": encoded(street.convert("CMYK"), "JPEG"),
        "rgba.png": encoded(street.convert("RGBA"), "PNG"),
        "palette.png": encoded(street.quantize(256), "PNG"),
        "bomb.png": png(30_000, 30_000, 8, b"\0"),
        "bit.png": flipped(whole, whole.index(b"IDAT") + 1000),
        "garbage.jpg": photo[: len(photo) // 2] + b"\xde\xad\xbe\xef" * 8 + photo[len(photo) // 2 + 32 :],
        "pixel.png": encoded(street.resize((1, 1)), "PNG"),
        "turned.jpg": encoded(street, "JPEG", quality=90, exif=turned()),
        "unwritable exif.jpg": photo[:2] + segment(UNWRITABLE) + photo[2:],
        "senseless exif.png": whole[:33] + chunk(b"eXIf", b"\0\x08\0\2\1\x12\0\3") + whole[33:],
        "profile.png": whole[:33] + chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2 << 20))) + whole[33:],
        "no pixels.png": whole[:33] + whole[-12:],
        "stripe.png": encoded(street.resize((1, 64)), "PNG"),
    }.items():
        (drive / name).write_bytes(data)
    upright = decode_image((drive / "turned.jpg").read_bytes())
    Image.fromarray(upright).save(drive / "upright.png")
    (outside / "street").write_bytes(whole)
    (outside / "passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
    for name, target in (
        ("link to an image.png", outside / "street"),
        ("link to text.png", outside / "passwd"),
        ("link to nothing.png", outside / "gone"),
        ("loop.png", drive / "pool.png"),
        ("pool.png", drive / "loop.png"),
    ):
        (drive / name).symlink_to(target)


def spoil(drive: Path) -> None:
    """What becomes of files after the scan."""
    for name in ("directory", "pipe", "gone", "emptied"):
        (drive / f"{name}.png").unlink()
    (drive / "directory.png").mkdir()
    os.mkfifo(drive / "pipe.png")
    (drive / "emptied.png").touch()


NO_IMAGE = "not a PNG, JPEG, WebP, BMP or TIFF file"
WANTED = ": expected 8-bit RGB; "
LOOP = "the file cannot be read (Too many levels of symbolic links)"
LABELLED = {
    "pixel", "stripe", "turned", "upright", "link to an image", "rgba", "unwritable exif", "senseless exif", "profile",
}  # fmt: skip
REASONS = {
    "cut png": "damaged or truncated: the file ends in the middle",
    "cut jpeg": "damaged or truncated: image file is truncated",
    "empty": "the file is empty",
    "text": NO_IMAGE,
    "sixteen bits": "mode RGB, 16 bits" + WANTED + "save it with 8 bits a channel",
    "cmyk": "mode CMYK, 8 bits" + WANTED + "its colours depend on a printer; save it as RGB",
    "palette": "mode P, 8 bits" + WANTED + "it may be a label; save a photograph as RGB",
    "no pixels": "damaged or truncated: it has no pixels",
    "bomb": "too many pixels: 30000 x 30000, more than 178956970",
    "bit": "damaged or truncated: chunk b'IDAT' has another checksum",
    "link to text": NO_IMAGE,
    "link to nothing": "the file is missing",
    "loop": LOOP,
    "pool": LOOP,
    "directory": "not a regular file",
    "pipe": "not a regular file (a named pipe)",
    "gone": "the file is missing",
    "emptied": "the file is empty",
}
UNREADABLE = {  # already for the scan; recorded as 0 x 0
    "empty", "text", "sixteen bits", "cmyk", "palette", "bomb",
    "link to text", "link to nothing", "loop", "pool",
}  # fmt: skip


def test_every_file_is_labelled_rightly_or_quarantined_by_name(city: Path, teacher: Path, tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    photograph(city, drive, [*GOOD, "directory", "pipe", "gone", "emptied"])
    write_poison(drive, tmp_path / "outside")
    manifest = load_manifest(scanned(city, drive))
    assert {s.sample_id for s in manifest.samples if not s.readable} == UNREADABLE
    assert {s.sample_id for s in manifest.samples} == LABELLED | REASONS.keys() | {*GOOD, "garbage"}
    spoil(drive)
    asked = job(tmp_path, teacher)
    with in_time(60, drive / "pipe.png"):
        result = generate(asked)
    reasons, labels = quarantined(asked.out), Run.open(asked.out).labels
    assert set(labels) - {"garbage"} == LABELLED | set(GOOD)
    garbage = reasons.pop("garbage", "damaged or truncated")  # some decoders make a picture of it
    assert garbage.startswith("damaged or truncated")
    assert {name: re.sub(r" \(\d+ bytes not processed\)$", "", why) for name, why in reasons.items()} == REASONS
    asked_for, done = len(manifest.samples), len(labels)
    accounts = Accounts(asked_for, done, asked_for - done, 0)
    assert outcome(result) == (accounts, asked_for, {}, False)
    assert verify(asked.out).faults == []
    # The strange ones have labels of the right picture, and the good ones those that they have without company.
    assert labels["pixel"].shape == (1, 1)
    assert labels["turned"].shape == (WIDTH, HEIGHT)
    assert np.array_equal(labels["turned"], labels["upright"])
    assert np.array_equal(labels["unwritable exif"], labels["upright"])
    assert np.array_equal(labels["senseless exif"], labels["good-1"])
    assert np.array_equal(labels["profile"], labels["good-1"])
    assert np.array_equal(labels["link to an image"], labels["good-1"])
    assert np.array_equal(labels["rgba"], labels["good-1"])  # its alpha channel is opaque
    photograph(city, tmp_path / "alone" / "drive", GOOD)
    scanned(city, tmp_path / "alone" / "drive")
    alone = job(tmp_path / "alone", teacher)
    generate(alone)
    assert labels_of(alone.out) == {name: labels[name].tobytes() for name in GOOD}
    # Called again, nothing is done, and nothing hangs.
    with in_time(60, drive / "pipe.png"):
        assert generate(asked).done == 0


@pytest.mark.parametrize("form", ["WEBP", "PNG"])
def test_an_animation_is_no_photograph(city: Path, teacher: Path, tmp_path: Path, form: str) -> None:
    """A label of its first frame would be one of a picture that nobody chose."""
    drive = tmp_path / "drive"
    photograph(city, drive, GOOD)
    frames = [Image.open(drive / f"{name}.png").convert("RGB") for name in GOOD]
    name = f"moving.{form.lower()}"
    (drive / name).write_bytes(encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=100))
    scanned(city, drive)
    asked = job(tmp_path, teacher)
    assert generate(asked).accounts == Accounts(4, 3, 1, 0)
    assert quarantined(asked.out) == {"moving": "an animation of 3 pictures: expected one; save the one that is meant"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_costs_itself(city: Path, teacher: Path, tmp_path: Path) -> None:
    photograph(city, tmp_path / "drive", GOOD)
    scanned(city, tmp_path / "drive")
    (tmp_path / "drive" / "good-1.png").chmod(0)
    asked = job(tmp_path, teacher)
    assert generate(asked).accounts == Accounts(3, 2, 1, 0)
    assert quarantined(asked.out) == {"good-1": "the file cannot be read (Permission denied)"}
    (tmp_path / "drive" / "good-1.png").chmod(0o600)
    assert generate(asked).accounts == Accounts(3, 3, 0, 0)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [_pipe, Path.mkdir, _loop], ids=["pipe", "directory", "loop"])
def test_a_quarantined_image_that_becomes_something_else_stays_quarantined(
    city: Path, teacher: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    """To find out whether it has been repaired, the next call looks at it again; it must not wait for a pipe."""
    photograph(city, tmp_path / "drive", GOOD)
    scanned(city, tmp_path / "drive")
    image = tmp_path / "drive" / "good-2.png"
    image.write_bytes(image.read_bytes()[:1000])
    asked = job(tmp_path, teacher)
    assert generate(asked).accounts == Accounts(3, 2, 1, 0)
    image.unlink()
    make(image)
    with in_time(10, *([image] if make is _pipe else [])):
        assert generate(asked).accounts == Accounts(3, 2, 1, 0)
    assert list(quarantined(asked.out)) == ["good-2"]


@pytest.mark.parametrize("make", [_pipe, Path.mkdir, _loop, None], ids=["pipe", "directory", "loop", "nothing"])
def test_a_labelled_image_that_is_no_file_any_more_is_named(
    city: Path, teacher: Path, tmp_path: Path, make: Callable[[Path], None] | None
) -> None:
    photograph(city, tmp_path / "drive", GOOD)
    scanned(city, tmp_path / "drive")
    image = tmp_path / "drive" / "good-2.png"
    asked = job(tmp_path, teacher)
    generate(asked)
    image.unlink()
    if make is not None:
        make(image)
    with (
        in_time(10, *([image] if make is _pipe else [])),
        pytest.raises(ValueError, match=f"image {image} (has changed|is gone) since it was labelled"),
    ):
        generate(asked)


def test_a_scan_does_not_wait_for_a_pipe(city: Path, tmp_path: Path) -> None:
    photograph(city, tmp_path / "drive", GOOD)
    pipe = tmp_path / "drive" / "pipe.png"
    os.mkfifo(pipe)
    with in_time(10, pipe):
        manifest, account = scan(tmp_path / "drive", layout="folder", label_space=CITYSCAPES)
    assert [s.sample_id for s in manifest.samples if s.readable] == GOOD
    assert account.unreadable == [f"{pipe}: not a regular file"]


def test_a_scan_does_not_walk_in_circles(city: Path, tmp_path: Path) -> None:
    photograph(city, tmp_path / "drive", GOOD)
    (tmp_path / "drive" / "again").symlink_to(tmp_path / "drive")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "good-4.png").symlink_to(tmp_path / "drive" / "good-1.png")
    (tmp_path / "drive" / "link").symlink_to(tmp_path / "elsewhere")  # a link that is no circle is followed
    manifest, _ = scan(tmp_path / "drive", layout="folder", label_space=CITYSCAPES)
    assert [s.sample_id for s in manifest.samples] == [*GOOD, "link/good-4"]


# --- the disk ---------------------------------------------------------------------------------------------------------

NAMES = ["a", "b", "c", "d", "e"]  # units of three and two


@pytest.fixture(scope="module")
def originals(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images; for each store a finished run, and one in which the first unit is done."""
    made = tmp_path_factory.mktemp("originals")
    photograph(city, made / "drive", NAMES)
    scanned(city, made / "drive")
    for store in STORES:
        generate(job(made, teacher, f"{store}-whole", store=store, unit_size=3))
        generate(job(made, teacher, f"{store}-begun", store=store, unit_size=3, limit=3))
    return made


class Disk:
    """`os` and `open` as local_storage.py sees them. The first `call` for a file called like `name` fails, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str, name: str, number: int) -> None:
        self.call, self.name, self.number, self.failed = call, name, number, ""
        monkeypatch.setattr(local_storage, "os", self)
        monkeypatch.setattr(local_storage, "open", self.opened, raising=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _at(self, call: str, path: str) -> None:
        if not self.failed and call == self.call and re.search(self.name, path):
            self.failed = path
            raise OSError(self.number, os.strerror(self.number), path)

    def fsync(self, descriptor: int) -> None:
        self._at("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        os.fsync(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        self._at("replace", str(target))
        os.replace(source, target)

    def opened(self, path: Path, mode: str, **options: Any) -> Any:
        if mode == "xb":
            self._at("open", str(path))
        return open(path, mode, **options)


def stored(run: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(run).items() if name.startswith("labels")}


def require_finished(asked: LabelJob, whole: Path) -> None:
    assert generate(asked).accounts == Accounts(5, 5, 0, 0)
    assert stored(asked.out) == stored(whole)
    assert labels_of(asked.out) == labels_of(whole)
    assert verify(asked.out).faults == []
    assert not list(asked.out.rglob("*.autolabel-tmp"))


PLACES = {  # regular expressions of paths
    "a shard": r"/\.?c\.1\.0\.0",
    "the folder of a shard": r"/labels\.zarr/b512x512$",  # after the shard was renamed
    "a label": r"/labels/\.?e\.png",  # the second one of the second unit
    "a record": r"/units/\.?b512x512\.000001\.0\.parquet",
    "the folder of a record": r"/units$",
    "run.json": r"/\.?run\.json",
    "a table": r"/stats/\.?classes\.parquet",
    "the quarantine list": r"/\.?quarantine\.parquet",
    "the manifest": r"/\.?manifest\.parquet",
}


@pytest.mark.parametrize(
    ("store", "call", "place", "number"),
    [
        ("zarr", "fsync", "a shard", errno.ENOSPC),
        ("zarr", "open", "a shard", errno.EACCES),
        ("zarr", "fsync", "the folder of a shard", errno.EIO),
        ("zarr", "fsync", "a record", errno.EDQUOT),
        ("zarr", "open", "a record", errno.EIO),
        ("zarr", "fsync", "the folder of a record", errno.EDQUOT),
        ("zarr", "replace", "run.json", errno.EACCES),
        ("zarr", "replace", "a table", errno.EDQUOT),
        ("zarr", "open", "the quarantine list", errno.ENOSPC),
        ("zarr", "fsync", "the manifest", errno.EIO),
        ("png", "fsync", "a label", errno.EIO),
        ("png", "replace", "a label", errno.ENOSPC),
        ("png", "open", "a label", errno.EDQUOT),
        ("png", "fsync", "a record", errno.ENOSPC),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else value,
)
def test_an_error_of_the_disk_ends_the_call_and_costs_no_label(
    originals: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    store: str, call: str, place: str, number: int,
) -> None:  # fmt: skip
    shutil.copytree(originals / f"{store}-begun", tmp_path / "run")
    asked = replace(job(originals, teacher, store=store, unit_size=3), out=tmp_path / "run")
    whole, before = labels_of(originals / f"{store}-whole"), labels_of(asked.out)
    assert list(before) == NAMES[:3]
    with monkeypatch.context() as patch:
        disk = Disk(patch, call, PLACES[place], number)
        result = autolabel(
            "generate", asked.manifest, "--teacher", teacher, "--out", asked.out, "--scales", "1",
            "--engine", "local", "--unit-size", 3, "--store", store,
        )  # fmt: skip
    assert disk.failed
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("labelling: ")]
    target = re.sub(r"/\.([^/]+)\.[0-9a-f]{12}\.autolabel-tmp$", r"/\1", disk.failed)
    assert line.startswith(f"autolabel: {os.strerror(number)}: {target}")
    assert not list(asked.out.rglob("*.autolabel-tmp"))
    committed = {p.stem for p in (asked.out / "units").iterdir()} == {"b512x512.000000.0", "b512x512.000001.0"}
    assert labels_of(asked.out) == (whole if committed else before)
    require_finished(asked, originals / f"{store}-whole")


def test_live_counters_that_cannot_be_written_cost_nothing(
    originals: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(job(originals, teacher, unit_size=3), out=tmp_path / "run")
    with monkeypatch.context() as patch:
        disk = Disk(patch, "fsync", r"/\.progress\.json", errno.ENOSPC)
        assert generate(asked).accounts == Accounts(5, 5, 0, 0)
    assert disk.failed
    require_finished(asked, originals / "zarr-whole")


@pytest.mark.parametrize("store", STORES)
def test_an_error_of_the_disk_is_raised_as_it_is(
    originals: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    """In a new folder; the very first file of the first unit."""
    asked = replace(job(originals, teacher, store=store, unit_size=3), out=tmp_path / "run")
    with monkeypatch.context() as patch:
        Disk(patch, "fsync", r"/c\.0|\.c\.0|/labels/\.a\.png", errno.ENOSPC)
        with pytest.raises(OSError) as failure:
            generate(asked)
    assert failure.value.errno == errno.ENOSPC
    assert labels_of(asked.out) == {}
    require_finished(asked, originals / f"{store}-whole")


@pytest.mark.parametrize(
    ("store", "unit_size", "room"),
    [("zarr", 512, 8000), ("png", 3, 9000)],
    ids=["a shard that is written again", "a record"],
)
def test_a_write_that_really_comes_short_leaves_nothing_half_written(
    originals: Path, teacher: Path, tmp_path: Path, store: str, unit_size: int, room: int
) -> None:
    """No file may become larger than `room` bytes. An index of 512 rows has more, and so has a record."""
    asked = replace(job(originals, teacher, store=store, unit_size=unit_size), out=tmp_path / "run")
    generate(replace(asked, portion=Portion(limit=3)))
    before = labels_of(asked.out)
    code = (
        "import resource, signal, sys; from autolabel.cli import run;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); room = int(sys.argv.pop(1));"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)); run()"
    )
    command = [
        sys.executable, "-c", code, room, "generate", asked.manifest, "--teacher", teacher, "--out",
        asked.out, "--scales", "1", "--engine", "local", "--unit-size", unit_size, "--store", store,
    ]  # fmt: skip
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"(labelling: 5/5.*\n)?autolabel: .*File too large.*\n", done.stderr)
    assert not list(asked.out.rglob("*.autolabel-tmp"))
    assert labels_of(asked.out) == before
    assert generate(asked).accounts == Accounts(5, 5, 0, 0)
    assert labels_of(asked.out) == labels_of(originals / f"{store}-whole")
    assert verify(asked.out).faults == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to_is_one_clear_line(originals: Path, teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(originals / "zarr-begun", tmp_path / "run")
    for folder in (tmp_path / "run", *(p for p in (tmp_path / "run").rglob("*") if p.is_dir())):
        folder.chmod(0o500)
    asked = replace(job(originals, teacher, unit_size=3), out=tmp_path / "run")
    result = autolabel(
        "generate", asked.manifest, "--teacher", teacher, "--out", asked.out, "--scales", "1",
        "--engine", "local", "--unit-size", 3,
    )  # fmt: skip
    assert result.exit_code == 2
    assert re.fullmatch(r"autolabel: Permission denied: .*\n", result.stderr)
    for folder in (tmp_path / "run", *(p for p in (tmp_path / "run").rglob("*") if p.is_dir())):
        folder.chmod(0o700)
    require_finished(asked, originals / "zarr-whole")
