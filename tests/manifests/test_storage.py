"""If a killed or full machine can leave half a file under its real name, a later run reads it as the whole truth."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import pytest

from autolabel.manifests import local_storage, storage

KIB = 1024

windows = pytest.mark.skipif(sys.platform != "win32", reason="letters of a name on other systems")


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_with_the_folders_above_it(tmp_path: Path) -> None:
    storage.write(tmp_path / "runs" / "auto" / "label.png", b"new")
    assert names(tmp_path) == ["runs", "runs/auto", "runs/auto/label.png"]
    assert (tmp_path / "runs" / "auto" / "label.png").read_bytes() == b"new"


def test_the_target_is_untouched_until_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "run.json"
    target.write_bytes(b"old")
    with storage.writing(target) as file:
        file.write(b"new")
        file.flush()
        assert target.read_bytes() == b"old"
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
    with pytest.raises(type(trouble)) as raised, storage.writing(target) as file:
        file.write(b"half of the n")
        raise trouble
    assert raised.value is trouble
    assert names(tmp_path) == ([] if before is None else ["images.parquet"])
    assert before is None or target.read_bytes() == before


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as failure, storage.writing(tmp_path / "run.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(failure.value) == f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}: '{tmp_path / 'run.json'}'"


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "progress.json"
    with storage.writing(target) as first, storage.writing(target) as second:
        first.write(b"first")
        second.write(b"second")
    assert target.read_bytes() == b"first"
    assert names(tmp_path) == ["progress.json"]


@pytest.mark.parametrize("durable", [True, False])
def test_only_what_must_outlive_a_power_cut_is_forced_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    forced: list[int] = []
    monkeypatch.setattr(os, "fsync", forced.append)
    storage.write(tmp_path / "a", b"x", durable=durable)
    assert (tmp_path / "a").read_bytes() == b"x"
    assert len(forced) == (2 if durable else 0)  # the file, and its folder


def test_a_system_without_folder_descriptors_syncs_the_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: list[int] = []
    monkeypatch.setattr(os, "fsync", forced.append)
    monkeypatch.delattr(os, "O_DIRECTORY")  # as on Windows
    storage.write(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
    assert len(forced) == 1


def test_json_is_readable_and_keeps_every_letter(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "run.json", {"city": "Düsseldorf", "scales": [0.5, 1]})
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"city": "Düsseldorf", "scales": [0.5, 1]}
    assert '  "city": "Düsseldorf",\n' in text


# --- create and replace -----------------------------------------------------------------------------------------------


def test_a_file_is_created_once_and_then_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "claim"
    assert storage.create(target, b"first")
    assert not storage.create(target, b"second")
    assert target.read_bytes() == b"first"
    assert names(tmp_path) == ["folder", "folder/claim"]


def test_a_name_that_is_a_folder_or_a_broken_link_is_not_created(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert not storage.create(tmp_path / "folder", b"x")
    assert not storage.create(tmp_path / "link", b"x")
    assert names(tmp_path) == ["folder", "link"]


@pytest.mark.parametrize("links", ["links", "no links", "no function"])
def test_of_many_that_create_a_file_one_wins_and_its_bytes_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: str
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if links == "no links":
        monkeypatch.setattr(os, "link", no_links)
    elif links == "no function":
        monkeypatch.delattr(os, "link")
    # Nobody sees that the file is there before it is too late to ask.
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    start = threading.Barrier(8)

    def create(number: int) -> bool:
        start.wait()
        return storage.create(tmp_path / "claim", b"%d" % number * 1000)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert sum(won) == 1
    assert (tmp_path / "claim").read_bytes() == b"%d" % won.index(True) * 1000
    assert names(tmp_path) == ["claim"]


def test_a_file_is_replaced_only_while_it_is_the_version_that_was_seen(tmp_path: Path) -> None:
    target = tmp_path / "state"
    storage.write(target, b"one")
    seen = storage.stat(target)
    assert seen is not None and seen.size == 3
    assert storage.replace(target, b"two", unchanged=seen)
    assert not storage.replace(target, b"six", unchanged=seen)
    assert target.read_bytes() == b"two"
    now = storage.stat(target)
    assert now is not None and now != seen
    os.utime(target, ns=(seen.mtime_ns, seen.mtime_ns))  # the same size and time are not the same version
    assert not storage.replace(target, b"six", unchanged=seen)
    target.unlink()
    assert not storage.replace(target, b"six", unchanged=now)
    assert names(tmp_path) == []


REPLACE = """
import sys
from pathlib import Path
from typing import BinaryIO
from autolabel.manifests import local_storage, storage
path = Path(sys.argv[1])
for _ in range(50):
    while True:
        seen = storage.stat(path)
        if storage.replace(path, b"%d" % (int(storage.read(path)) + 1), unchanged=seen):
            break
"""


def test_counters_that_several_processes_replace_lose_no_step(tmp_path: Path) -> None:
    target = tmp_path / "counter"
    storage.write(target, b"0")
    others = [subprocess.Popen([sys.executable, "-c", REPLACE, target]) for _ in range(3)]
    assert [other.wait() for other in others] == [0, 0, 0]
    assert target.read_bytes() == b"150"
    assert names(tmp_path) == ["counter"]


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_range_is_read_and_ends_with_the_file(tmp_path: Path) -> None:
    target = tmp_path / "shard"
    target.write_bytes(b"0123456789")
    assert storage.read_range(target, 2, 3) == b"234"
    assert storage.read_range(target, 8, 100) == b"89"
    assert storage.read_range(target, 20, 1) == b""
    assert storage.read_range(target, 0, 0) == b""


def test_a_range_of_another_version_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "shard"
    storage.write(target, b"0123456789")
    seen = storage.stat(target)
    assert storage.read_range(target, 2, 3, unchanged=seen) == b"234"
    storage.write(target, b"abcdefghij")
    with pytest.raises(storage.ChangedFile, match=r"shard has changed while it was read"):
        storage.read_range(target, 2, 3, unchanged=seen)


def test_a_file_can_be_read_back_and_forth(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    with storage.reading(tmp_path / "a") as file:
        assert (file.seek(5), file.read(2), file.seek(0), file.read(1)) == (5, b"56", 0, b"0")


@pytest.mark.parametrize("read", [storage.read, storage.reading, storage.sha256, storage.fingerprint])
def test_a_file_that_is_missing_cannot_be_read(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")


def test_only_a_file_has_a_size_and_a_version(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")
    about = storage.stat(tmp_path / "file")
    assert about is not None
    assert (about.size, about.mtime_ns) == (3, (tmp_path / "file").stat().st_mtime_ns)
    assert storage.stat(tmp_path / "link") == about
    for name in ("circle", "pipe", ".", "nowhere", "file/below"):
        assert storage.stat(tmp_path / name) is None


# --- listing and removing ---------------------------------------------------------------------------------------------


def test_a_folder_is_listed_in_order_without_what_writers_have_begun(tmp_path: Path) -> None:
    for name in (
        "b.parquet",
        "a.parquet",
        "deep/c.parquet",
        "deep/er/d.png",
        ".hidden",
        ".a.parquet.0123456789ab.autolabel-tmp",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")

    def listed(**options: object) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in storage.list(tmp_path, **options)]  # type: ignore[arg-type]

    assert listed() == [".hidden", "a.parquet", "b.parquet", "deep"]
    assert listed(suffix=".parquet") == ["a.parquet", "b.parquet"]
    assert listed(recursive=True) == [".hidden", "a.parquet", "b.parquet", "deep/c.parquet", "deep/er/d.png"]
    assert listed(recursive=True, suffix=".parquet") == ["a.parquet", "b.parquet", "deep/c.parquet"]
    for recursive in (True, False):
        assert storage.list(tmp_path / "nowhere", recursive=recursive) == []


def test_files_and_folders_are_removed_and_missing_ones_are_fine(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").write_bytes(b"x")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "a").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("file", "link", "nowhere"):
        storage.remove(tmp_path / name)
    for name in ("folder", "no folder"):
        storage.remove_folder(tmp_path / name)
    assert names(tmp_path) == ["kept", "kept/a"]


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = [
        ".b.0123456789AB.autolabel-tmp",
        ".b.0123456789a.autolabel-tmp",
        ".c.0123456789ab.tmp",
        ".d.autolabel-tmp",
        ".e.0123456789ab.autolabel-tmp.png",
        "e.0123456789ab.autolabel-tmp",
        "film.mp4.partial",
        "labels.zarr/b512x512/c.0.0.0",
        "labels/a.png",
        "labels/a.tmp.png",
        "run.json",
        "units/.lock",
    ]
    left = [
        ".run.json.0123456789ab.autolabel-tmp",
        "labels/deep/er/.a.png.0123456789ab.autolabel-tmp",
        "units/.b512x512.000000.0.parquet.0123456789ab.autolabel-tmp",
    ]
    for name in kept + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    storage.remove_leftovers(tmp_path)
    assert sorted(name for name in names(tmp_path) if (tmp_path / name).is_file()) == sorted(kept + left[1:])
    storage.remove_leftovers(tmp_path, recursive=True)
    assert sorted(name for name in names(tmp_path) if (tmp_path / name).is_file()) == kept


def test_leftovers_are_not_looked_for_behind_links(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".a.0123456789ab.autolabel-tmp").write_bytes(b"x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "labels").symlink_to(tmp_path / "other")
    for folder in (tmp_path / "run", tmp_path / "run" / "labels"):
        storage.remove_leftovers(folder, recursive=True)
    assert (tmp_path / "other" / ".a.0123456789ab.autolabel-tmp").exists()


@pytest.mark.parametrize("name", ["a" * 255, "日" * 85, "." + "x" * 250 + ".png"])
def test_a_name_as_long_as_the_system_allows_is_written(tmp_path: Path, name: str) -> None:
    storage.write(tmp_path / name, b"x")
    assert storage.create(tmp_path / f"{name[:-1]}y", b"y")
    assert names(tmp_path) == sorted([name, f"{name[:-1]}y"])


def test_the_file_that_a_killed_writer_leaves_is_a_leftover(tmp_path: Path) -> None:
    block = storage.writing(tmp_path / "run.json")
    block.__enter__().write(b"half")  # and the process ends here
    assert len(names(tmp_path)) == 1
    storage.remove_leftovers(tmp_path)
    assert names(tmp_path) == []


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a/b.png", "..a/b..", "a/...", "a b", "12:30.png", "ä/日.png", "./a", ".a"])
def test_a_relative_name_is_joined_to_its_root(name: str) -> None:
    assert storage.under(Path("/data"), name) == Path(f"/data/{name}")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "//server/share",
        "..",
        "../a",
        "a/../b",
        "a/..",
        "a\0b",
        *(pytest.param(name, marks=windows) for name in ("a\\b", "..\\a", "\\a", "C:a", "c:/a")),
    ],
)
def test_a_name_that_could_leave_its_root_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"leaves its root .*data: expected a relative path with forward slashes"):
        storage.under(Path("/data"), name)


@pytest.mark.skipif(sys.platform == "win32", reason="parts of a path there")
@pytest.mark.parametrize("name", ["a\\b", "..\\a", "\\a", "C:a", "c:/a"])
def test_backslashes_and_drive_letters_are_letters_of_a_name_where_windows_is_not(name: str) -> None:
    path = storage.under(Path("/data"), name)
    assert os.path.normpath(path) == str(path) and path.is_relative_to("/data")


# --- checksums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [0, 1, 1000, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 100 * KIB, 128 * KIB, 128 * KIB + 1, 1000 * KIB]
)
def test_a_file_and_its_bytes_have_the_same_fingerprint(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    file = tmp_path / "image.png"
    file.write_bytes(data)
    assert storage.fingerprint(file) == storage.fingerprint_bytes(data)
    assert storage.fingerprint(file) == hashlib.sha256(data).hexdigest()[:16]


@pytest.mark.parametrize("size", [200, 100 * KIB, 1000 * KIB])
def test_one_other_byte_anywhere_or_one_more_is_another_fingerprint(size: int) -> None:
    data = bytes(size)
    others = [b"\1" + data[1:], data[:-1] + b"\1", data + b"\0", data[:-1], data[:99] + b"\1" + data[100:]]
    others.append(data[: size // 2] + b"\1" + data[size // 2 + 1 :])
    assert len({storage.fingerprint_bytes(d) for d in [data, *others]}) == 7


@pytest.mark.parametrize("size", [0, 5_000_000])
def test_checksums_are_of_the_whole_file(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "teacher.pt").write_bytes(data)
    assert storage.sha256(tmp_path / "teacher.pt") == hashlib.sha256(data).hexdigest()
    assert storage.crc32c(tmp_path / "teacher.pt") == f"{google_crc32c.value(data):08x}"


# --- locks ------------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from typing import BinaryIO
from autolabel.manifests import local_storage, storage
with storage.hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_whoever_holds_a_folder_removes_what_a_killed_holder_left_of_its_name(tmp_path: Path) -> None:
    left = tmp_path / "..lock.report.holder.0123456789ab.autolabel-tmp"
    others = tmp_path / "..lock.holder.0123456789ab.autolabel-tmp"
    for path in (left, others):
        path.write_bytes(b"process 1")
    with storage.hold(tmp_path, name=".lock.report"):
        assert not left.exists() and others.exists()


def test_a_held_folder_is_refused_naming_the_process_until_that_ends(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        for wait in (0.0, 0.2):
            with pytest.raises(storage.Busy) as refusal, storage.hold(folder, wait=wait):
                pass
            assert str(refusal.value).startswith(f"another autolabel is at work in {folder} (process {other.pid} on ")
            assert str(refusal.value).endswith("): wait for it, or stop it")
        with storage.hold(folder, name=".lock.publish"):  # another name is another lock
            pass
        other.kill()
        other.wait()
    with storage.hold(folder):
        assert (folder / ".lock.holder").read_text().startswith(f"process {os.getpid()} on ")
    assert not (folder / ".lock.holder").exists()


def test_a_stat_is_checked_field_by_field(tmp_path: Path) -> None:
    storage.write(tmp_path / "a", b"x")
    seen = storage.stat(tmp_path / "a")
    assert seen is not None
    assert not storage.replace(tmp_path / "a", b"y", unchanged=seen._replace(mtime_ns=seen.mtime_ns + 1))


def test_the_next_writer_of_a_file_removes_what_a_killed_one_left_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "fused.parquet"
    dead = tmp_path / f".fused.parquet.{'0' * 12}{storage.TEMPORARY}"
    others = [
        tmp_path / f".coarse.parquet.{'0' * 12}{storage.TEMPORARY}",  # of another file
        tmp_path / f".fused.parquet.{'0' * 11}{storage.TEMPORARY}",  # such names we do not write
        tmp_path / ".fused.parquet.tmp",
        tmp_path / "fused.parquet.partial",
    ]
    for path in (dead, *others):
        path.write_bytes(b"half")
    with storage.writing(target) as file:
        file.write(b"whole")
    assert target.read_bytes() == b"whole"
    assert sorted(tmp_path.iterdir()) == sorted([target, *others])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps open files by itself")
def test_two_writers_of_one_file_at_once_leave_each_other_alone(tmp_path: Path) -> None:
    target = tmp_path / "fused.parquet"
    with storage.writing(target) as first:
        with storage.writing(target) as second:
            second.write(b"second")
        first.write(b"first")
    assert target.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps open files by itself")
def test_a_file_taken_for_a_dead_writers_at_its_birth_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may look between the creation of a file and its lock."""
    taken: list[Path] = []

    def opened(path: Path, mode: str) -> BinaryIO:
        file: BinaryIO = open(path, mode)  # noqa: SIM115
        if mode == "xb" and not taken:
            taken.append(path)
            path.unlink()
        return file

    monkeypatch.setattr(local_storage, "open", opened, raising=False)
    with storage.writing(tmp_path / "a") as file:
        file.write(b"whole")
    assert taken and (tmp_path / "a").read_bytes() == b"whole"


def test_a_file_that_cannot_be_created_is_told_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No inodes are left, say: the temporary name would help nobody."""

    def refuse(path: Path, mode: str) -> BinaryIO:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(local_storage, "open", refuse, raising=False)
    with pytest.raises(OSError) as failure:
        storage.write(tmp_path / "run.json", b"")
    assert (failure.value.errno, failure.value.filename) == (errno.ENOSPC, str(tmp_path / "run.json"))
