"""If a file of ids is misread, a label that somebody has rejected is trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from autolabel.manifests.ids import BadIds, read_ids


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ids.txt", "# marked in the report\nb/2\n\na/1 \n  # twice:\nb/2\nc, d\n"),
        ("ids.txt", b"\xef\xbb\xbfb/2\r\na/1\r\nc, d"),
        ("ids.csv", 'sample_id,mark,note\nb/2,fix,"two\nlines"\na/1,reject,\n"c, d",,\n'),
        ("IDS.CSV", '# of Monday\nb/2,fix\na/1\n,,\n"c, d"\n'),
    ],
    ids=["lines", "windows", "csv with header", "csv without header"],
)
def test_ids_come_one_a_line_or_from_the_first_column_of_a_csv_each_once(tmp_path: Path, name: str, text: str) -> None:
    ids = read_ids(written(tmp_path / name, text))
    assert ids.names == ("b/2", "a/1", "c, d")
    assert "a/1" in ids and "a" not in ids and len(ids) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "none.txt",
            "# nothing\n\n",
            "{} names no sample: expected sample ids, one a line, or a CSV whose first column",
        ),
        ("none.csv", "sample_id,mark\n", "{} names no sample: expected sample ids, one a line, or a CSV whose first"),
        ("photo.png", b"\x89PNG\r\n", "{} is no UTF-8 text: byte 0x89 at 0: a file of sample ids has one a line, or"),
        ("gone.txt", None, "{} does not exist: a file of sample ids has one a line, or is a CSV whose first column"),
    ],
)
def test_a_file_without_ids_is_refused(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        written(path, content)
    with pytest.raises(BadIds) as refusal:
        read_ids(path)
    assert str(refusal.value).startswith(message.format(path))


def test_ids_that_nobody_has_are_named_and_a_list_of_something_else_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "ids.txt", "a\nx1\nx2\nx3\nx4\n")
    ids = read_ids(path)
    assert ids.unknown({"a", "x1", "x2", "x3", "x4"}, where="in it") == ""
    assert ids.unknown({"a"}, where="in it") == f"{path}: 4 of its 5 ids not in it: 'x1', 'x2', 'x3', …"
    assert ids.unknown({"a", "x1", "x2", "x3"}, where="in it") == f"{path}: 1 of its 5 ids not in it: 'x4'"
    with pytest.raises(BadIds) as refusal:
        ids.unknown({"b"}, where="in a run")
    assert str(refusal.value) == f"{path}: none of its 5 ids is in a run ('a', 'x1', 'x2', …)"
