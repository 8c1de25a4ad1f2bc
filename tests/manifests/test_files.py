"""If a killed or full machine can leave half a file under its real name, a later run reads it as the whole truth."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from autolabel.manifests.files import (
    fingerprint,
    fingerprint_bytes,
    remove_leftovers,
    sha256,
    write_bytes,
    write_json,
    writing,
)

KIB = 1024


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_file_appears_whole_with_the_folders_above_it(tmp_path: Path) -> None:
    write_bytes(tmp_path / "runs" / "auto" / "label.png", b"new")
    assert names(tmp_path) == ["runs", "runs/auto", "runs/auto/label.png"]
    assert (tmp_path / "runs" / "auto" / "label.png").read_bytes() == b"new"


def test_the_target_is_untouched_until_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "run.json"
    target.write_bytes(b"old")
    with writing(target) as temporary:
        temporary.write_bytes(b"new")
        assert target.read_bytes() == b"old"
        assert temporary.parent == target.parent
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["run.json"]


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), id="disk full"),
        pytest.param(ValueError("a bug"), id="a bug"),
        pytest.param(KeyboardInterrupt(), id="Ctrl-C"),
        pytest.param(SystemExit(1), id="exit"),
    ],
)
@pytest.mark.parametrize("before", [pytest.param(b"old", id="over a file"), pytest.param(None, id="new")])
def test_trouble_half_way_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, before: bytes | None, trouble: BaseException
) -> None:
    target = tmp_path / "images.parquet"
    if before is not None:
        target.write_bytes(before)
    with pytest.raises(type(trouble)) as raised, writing(target) as temporary:
        temporary.write_bytes(b"half of the n")
        raise trouble
    assert raised.value is trouble
    assert names(tmp_path) == ([] if before is None else ["images.parquet"])
    assert before is None or target.read_bytes() == before


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "run.json"
    target.write_bytes(b"old")
    with pytest.raises(FileNotFoundError), writing(target):
        pass
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["run.json"]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "progress.json"
    with writing(target) as first, writing(target) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
        assert first != second
    assert target.read_bytes() == b"first"
    assert names(tmp_path) == ["progress.json"]


def test_json_is_readable_and_keeps_every_letter(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"city": "Düsseldorf", "scales": [0.5, 1]})
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"city": "Düsseldorf", "scales": [0.5, 1]}
    assert '  "city": "Düsseldorf",\n' in text


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = ["labels.zarr/b512x512/c.0.0.0", "labels/a.png", "labels/a.tmp.png", "run.json", "units/.lock"]
    left = [
        ".run.json.0123456789ab.tmp",
        "labels.zarr/b512x512/c.1.0.0.4fd1.partial",
        "labels/deep/er/.a.png.0123456789ab.tmp",
        "units/.b512x512.000000.parquet.0123456789ab.tmp",
    ]
    for name in kept + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    remove_leftovers(tmp_path)
    assert sorted(name for name in names(tmp_path) if (tmp_path / name).is_file()) == kept


def test_what_writing_leaves_when_it_is_killed_is_a_leftover(tmp_path: Path) -> None:
    target = tmp_path / "run.json"
    block = writing(target)
    block.__enter__().write_bytes(b"half")  # and the process ends here
    assert len(names(tmp_path)) == 1
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "size", [0, 1, 1000, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 100 * KIB, 128 * KIB, 128 * KIB + 1, 1000 * KIB]
)
def test_a_file_and_its_bytes_have_the_same_fingerprint(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    file = tmp_path / "image.png"
    file.write_bytes(data)
    assert fingerprint(file) == fingerprint_bytes(data)
    assert len(bytes.fromhex(fingerprint(file))) == 8


@pytest.mark.parametrize("size", [200, 100 * KIB, 1000 * KIB])
def test_one_other_byte_at_either_end_or_one_more_is_another_fingerprint(size: int) -> None:
    data = bytes(size)
    others = [b"\1" + data[1:], data[:-1] + b"\1", data + b"\0", data[:-1], data[:99] + b"\1" + data[100:]]
    assert len({fingerprint_bytes(d) for d in [data, *others]}) == 6


def test_sha256_is_of_the_whole_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 2000
    (tmp_path / "teacher.pt").write_bytes(data)
    assert sha256(tmp_path / "teacher.pt") == hashlib.sha256(data).hexdigest()
