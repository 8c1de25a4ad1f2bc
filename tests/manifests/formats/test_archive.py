"""Zips from strangers. If this fails, a corrected label comes out of a file that nobody meant, or fills the memory."""

from __future__ import annotations

import re
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from autolabel.manifests.formats import archive
from autolabel.manifests.formats.exchange import BadReturn


def zipped(path: Path, *files: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as file:
        warnings.simplefilter("ignore")  # zipfile warns of a name that stands twice
        for name, data in files:
            file.writestr(name, data)
    return path


def refusal(path: Path, act: Callable[[archive.Files], object] = lambda files: files.names) -> str:
    with pytest.raises(BadReturn) as refused, archive.opened(path) as files:
        act(files)
    return str(refused.value)


def link(name: str, kind: int = stat.S_IFLNK) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (kind | 0o777) << 16
    return info


def test_a_folder_and_a_zip_of_it_hold_the_same_files(tmp_path: Path) -> None:
    contents = {"b/2.png": b"two", "a.txt": b"one", "__MACOSX/a.txt": b"x", "b/.DS_Store": b"x", ".hidden/c": b"x"}
    for name, data in contents.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    zipped(tmp_path / "a.zip", *contents.items(), ("empty/", b""))
    for path in (tmp_path / "folder", tmp_path / "a.zip"):
        with archive.opened(path) as files:
            assert files.names == ("a.txt", "b/2.png") and "a.txt" in files and "b" not in files
            assert files.read("b/2.png") == b"two"
            with files.reading("a.txt") as file:
                file.seek(1)
                assert file.read() == b"ne"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "folder"]


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/a", "a/..", "C:/a", "..\\a", "a\\b", "a\0b", ".."])
def test_a_name_that_leads_out_of_the_archive_is_refused_on_every_system(name: str, tmp_path: Path) -> None:
    info = zipfile.ZipInfo("x")
    info.filename = name  # as it is: its constructor makes names harmless
    path = zipped(tmp_path / "a.zip", ("fine", b""), (info, b""))
    assert refusal(path) == f"{path} holds {name!r}, a name that leads out of the archive: it is refused whole"


@pytest.mark.parametrize(
    ("kind", "word"), [(stat.S_IFLNK, "link"), (stat.S_IFIFO, "special file"), (stat.S_IFCHR, "special file")]
)
def test_links_and_devices_are_refused(kind: int, word: str, tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", (link("a", kind), b"/etc/passwd"))
    assert refusal(path) == f"{path} holds 'a', a {word}: expected files alone"


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", ("a.png", b"1"), ("a.png", b"2"))
    assert refusal(path) == f"{path} holds 'a.png' twice: which of the two is meant?"


def test_an_encrypted_file_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", ("a.png", b"1"))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    assert refusal(path) == f"{path} holds 'a.png', which is encrypted: export it without a password"


def test_methods_that_unpack_without_a_limit_are_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", ("a.png", b"1"), method=zipfile.ZIP_LZMA)
    assert refusal(path) == f"{path} holds 'a.png', packed by method 14: expected an ordinary zip (deflate)"


def test_one_file_that_grows_a_thousandfold_is_a_bomb(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", ("a.png", bytes(20_000_000)))
    expected = r"holds 'a\.png', [\d.]+ kB that become 20\.0 MB: no labels do, so it is taken for a zip bomb; unpack it"
    assert re.search(expected, refusal(path))


def test_many_small_files_that_grow_a_thousandfold_are_a_bomb(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", *((str(n), bytes(10_000_000)) for n in range(3)))
    assert re.search(r"a\.zip has [\d.]+ kB that become 30\.0 MB: no labels do", refusal(path))


def test_a_file_that_says_less_than_it_holds_is_damaged_and_not_read_on(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", ("a.png", bytes(1_000_000)))
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\1\2") + 24
    data[place : place + 4] = struct.pack("<I", 10)
    path.write_bytes(data)
    assert refusal(path, lambda files: files.read("a.png")) == (
        f"'a.png' in {path} is damaged (Bad CRC-32 for file 'a.png'): export or copy it again"
    )


def test_a_file_beyond_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", ("a.json", bytes(2000)))
    assert refusal(path, lambda files: files.read("a.json", at_most=1999)) == (
        f"'a.json' in {path} has 2.0 kB: expected at most 2.0 kB"
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.json").write_bytes(bytes(2000))
    assert "2000 bytes: expected at most 1999" in refusal(
        tmp_path / "b", lambda files: files.read("a.json", at_most=1999)
    )


@pytest.mark.parametrize("cut", [0, 1, 50, -1, -10])
def test_a_damaged_zip_is_refused(cut: int, tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", ("a.png", bytes(range(256))))
    path.write_bytes(path.read_bytes()[:cut])
    assert refusal(path).startswith(f"{path} is no zip, or cut off (")


def test_damaged_content_is_refused_with_the_file_in_the_archive(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", ("a.png", bytes(range(256))), method=zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(bytes([7, 8, 9]), bytes([7, 7, 9])))
    assert refusal(path, lambda files: files.read("a.png")).startswith(f"'a.png' in {path} is damaged (Bad CRC-32")


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.zip") == f"{tmp_path / 'a.zip'} does not exist: expected a folder or a zip"


def test_one_folder_around_all_files_is_looked_through_and_two_are_refused(tmp_path: Path) -> None:
    with archive.opened(zipped(tmp_path / "a.zip", ("task/masks/a.png", b""), ("task/labelmap.txt", b""))) as files:
        assert files.under("masks") == "task/" and files.under("task") == "" and files.under("other") is None
    path = zipped(tmp_path / "b.zip", ("masks/a.png", b""), ("x/masks/a.png", b""))
    expected = f"{path} holds 'masks' and 'x/masks': import one of them at a time"
    assert refusal(path, lambda files: files.under("masks")) == expected


def test_stems_keep_their_folders_and_are_composed() -> None:
    assert archive.stem("a/b.c.png") == "a/b.c" and archive.stem("e\u0301.png") == "\u00e9"
