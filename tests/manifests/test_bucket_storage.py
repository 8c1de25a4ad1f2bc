"""An object that is not what was written, or two writers that both believe to have won."""

from __future__ import annotations

import io
import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import buckets
import pytest

from autolabel.manifests import storage
from autolabel.manifests.locations import BucketPath, common, joined, location, relative


@pytest.fixture
def bucket() -> Iterator[Path]:
    """An empty bucket of a server on this machine."""
    with buckets.place() as place:
        yield location(place.url)


def test_what_was_written_is_read_back_under_any_name(bucket: Path) -> None:
    for name in ("plain.txt", "a b/ü%2F#?&+.txt", "deep/er/*~'\".x", "日本/語.png"):
        place = bucket / name
        assert not storage.exists(place)
        storage.write(place, name.encode())
        assert storage.read(place) == name.encode()
        assert storage.stat(place).size == len(name.encode())  # type: ignore[union-attr]
    assert [path.relative_to(bucket).as_posix() for path in storage.list(bucket)] == [
        "a b",
        "deep",
        "plain.txt",
        "日本",
    ]
    assert [path.name for path in storage.list(bucket, recursive=True, suffix=".txt")] == ["ü%2F#?&+.txt", "plain.txt"]
    assert storage.is_folder(bucket / "deep")
    assert not storage.is_folder(bucket / "plain.txt")
    assert not storage.exists(bucket / "deep")
    storage.remove_folder(bucket / "deep")
    storage.remove(bucket / "plain.txt")
    storage.remove(bucket / "plain.txt")
    assert [path.name for path in storage.list(bucket)] == ["a b", "日本"]


def test_a_large_object_is_read_by_ranges_and_written_in_parts(bucket: Path) -> None:
    data = bytes(range(256)) * 45_000  # 11.5 MB
    with storage.writing(bucket / "large") as file:
        file.write(data[:1000])
        file.write(data[1000:])
    with storage.reading(bucket / "large") as file:
        assert not isinstance(file, io.BytesIO)
        file.seek(-300, io.SEEK_END)
        assert file.read() == data[-300:]
        file.seek(5_000_001)
        assert file.read(10) == data[5_000_001:5_000_011]
        file.seek(0)
        assert file.read() == data
    assert storage.read_range(bucket / "large", 11_519_990, 100) == data[11_519_990:]
    assert storage.read_range(bucket / "large", 11_520_000, 100) == b""
    with pytest.raises(storage.TooLarge, match="11520000 bytes: expected at most 5"):
        storage.read(bucket / "large", at_most=5)


def test_nothing_appears_after_an_error(bucket: Path) -> None:
    with pytest.raises(ZeroDivisionError), storage.writing(bucket / "half") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert storage.list(bucket) == []


def test_a_reader_never_mixes_two_versions(bucket: Path) -> None:
    place = bucket / "file"
    storage.write(place, b"a" * 20_000_000)
    before = storage.stat(place)
    with storage.reading(place) as file:
        assert file.read(10) == b"a" * 10
        storage.write(place, b"b" * 20_000_000)
        with pytest.raises(storage.ChangedFile, match="has changed while it was read"):
            file.read()
    with pytest.raises(storage.ChangedFile):
        storage.read_range(place, 0, 10, unchanged=before)
    assert storage.read_range(place, 0, 3, unchanged=storage.stat(place)) == b"bbb"


def test_one_of_many_creates_and_one_of_many_replaces(bucket: Path) -> None:
    place = bucket / "lock"
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda number: storage.create(place, str(number).encode()), range(24))) == 1
        now = storage.stat(place)
        assert now is not None
        assert sum(pool.map(lambda n: storage.replace(place, f"new {n}".encode(), unchanged=now), range(24))) == 1
    assert storage.read(place).startswith(b"new ")
    assert not storage.replace(place, b"late", unchanged=now)
    storage.remove(place)
    assert not storage.replace(place, b"later", unchanged=now)
    assert storage.list(bucket) == []


def test_lines_of_many_are_all_appended(bucket: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda number: storage.append(bucket / "log", f"{number}\n".encode()), range(9)))
    assert sorted(storage.read(bucket / "log").split()) == sorted(str(number).encode() for number in range(9))


def test_a_bucket_with_conditions_is_accepted_and_left_clean(bucket: Path) -> None:
    storage.require_conditions(bucket / "run")
    assert storage.list(bucket) == []


def test_a_missing_bucket_is_named(bucket: Path) -> None:
    nowhere = location("s3://no-such-bucket-here/file")
    with pytest.raises(
        storage.BucketError,
        match=r"^s3://no-such-bucket-here/file: cannot write it: NoSuchBucket .*: make the bucket, or",
    ):
        storage.write(nowhere, b"")


def _look(place: Path, answers: multiprocessing.SimpleQueue[str]) -> None:
    try:
        answers.put(repr(storage.read(place)))
    except OSError as error:
        answers.put(str(error))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_forked_process_is_told_instead_of_hanging(bucket: Path, method: str) -> None:
    storage.write(bucket / "x", b"x")
    context = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    child = context.Process(target=_look, args=(bucket / "x", answers))  # type: ignore[attr-defined]
    child.start()
    assert ("spawn" if method == "fork" else "b'x'") in answers.get()
    child.join()


def test_places_join_split_and_travel_as_paths_do() -> None:
    place = location("s3://bucket/a b/c.png")
    assert str(place) == "s3://bucket/a b/c.png"
    assert isinstance(place, BucketPath)
    assert place == pickle.loads(pickle.dumps(place)) == location(str(place)) == place.absolute() == place.resolve()
    assert [str(parent) for parent in place.parents] == ["s3://bucket/a b", "s3://bucket"]
    assert str(place.with_suffix(".x")) == "s3://bucket/a b/c.x"
    assert place.relative_to(location("s3://bucket")).as_posix() == "a b/c.png"
    assert location("s3://bucket").parent == location("s3://bucket/")
    assert place.is_absolute()
    with pytest.raises(TypeError, match="lies in a bucket"):
        open(place)  # noqa: SIM115
    assert location("file:///tmp/a%20b") == Path("/tmp/a b")
    assert location("C:/x") == Path("C:/x")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("s3:/bucket/x", "'s3:/bucket/x': expected two slashes, as in s3://bucket/x"),
        ("s3://bucket/a//b", "a key with an empty part, '.' or '..' names no file here: rename the object"),
        ("s3://bucket/../b", "a key with an empty part, '.' or '..' names no file here: rename the object"),
        ("s3://bucket/a\nb", "a key with control characters names no file here: rename the object"),
        ("gcs://bucket/x", "gcs://bucket/x: unknown scheme 'gcs': write gs://"),
        ("http://host/x", "http://host/x: unknown scheme 'http': expected s3, gs, az or file"),
        ("s3://user:secret@host/x", "s3://…@host/x: no bucket can have the name '…@host'"),
        ("https://host/x?X-Amz-Signature=secret", "https://host/x?…: unknown scheme 'https'"),
        (
            "s3://bucket/x?X-Amz-Signature=secret",
            "s3://bucket/x?…: expected no signature: write s3://",
        ),
        (
            "az://container/x?sv=1&sig=secret",
            "az://container/x?…: expected no signature: write az://",
        ),
        ("file://host/x", "expected a file of this machine"),
    ],
)
def test_an_address_that_names_nothing_is_refused_in_one_line(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        location(text)
    assert told in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_stored_name_leads_to_the_place_it_was_written_for() -> None:
    base = location("s3://bucket/runs/auto")
    for text in ("s3://bucket/images/x", "s3://bucket", "s3://other/x", "s3://bucket/runs/auto/labels", "/data/images"):
        place = location(text)
        assert joined(base, relative(place, base)) == place
        assert joined(Path("/home"), relative(place, Path("/home"))) == place
    assert relative(location("s3://bucket/images"), base) == "../../images"
    assert common([location("s3://bucket/a/x"), location("s3://bucket/a/y/z")]) == location("s3://bucket/a")
    with pytest.raises(ValueError, match="lie in no common bucket"):
        common([location("s3://bucket/a"), location("s3://other/a")])
    with pytest.raises(ValueError, match="leads out of the bucket"):
        joined(base, "../../../x")
