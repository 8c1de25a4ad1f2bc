"""If a damaged or foreign table is read as ours, figures and labels are wrong without a word."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import google_crc32c
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import write_table

from autolabel.manifests.notes import heard
from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.schemas import IMAGES_SCHEMA, MANIFEST_SCHEMA
from autolabel.manifests.tables import (
    BadTable,
    read_metadata,
    read_pieces,
    read_sealed,
    read_table,
    table_bytes,
    writing_table,
)


@pytest.mark.parametrize("table", ["images", "classes", "centroids"])
def test_an_unfinished_run_has_no_statistics_and_says_so(tmp_path: Path, table: str) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(BadTable) as refusal:
        RunFolder(tmp_path).statistics(table)
    assert str(refusal.value) == (
        f"{tmp_path}/stats/{table}.parquet does not exist: finish the run first with `autolabel generate`"
    )


def test_statistics_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        {"sample_id": "a", "height": 6, "labelled_pixels": 40, "ignored_fraction": 1 / 6, "label_crc32c": 2**32 - 1}
    ]
    written = pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA)
    write_table(tmp_path / "stats/images.parquet", written)
    assert RunFolder(tmp_path).statistics().equals(written)
    assert RunFolder(tmp_path).statistics("images").equals(written)


def test_an_unknown_statistics_table_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refusal:
        RunFolder(tmp_path).statistics("pictures")
    assert str(refusal.value) == "no statistics table 'pictures': expected one of images, classes, centroids, review"


def test_a_damaged_statistics_table_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "stats/images.parquet", IMAGES_SCHEMA.empty_table())
    data = (tmp_path / "stats/images.parquet").read_bytes()
    (tmp_path / "stats/images.parquet").write_bytes(data[:-10])
    with pytest.raises(BadTable, match=r"images\.parquet is not a readable parquet file"):
        RunFolder(tmp_path).statistics()


# --- checksums --------------------------------------------------------------------------------------------------------


def rows(count: int) -> pa.Table:
    """Samples with every kind of column, some of them long enough for several pages."""
    listed = [
        {"sample_id": f"city/{n:05d}", "image": f"city/{n:05d}.png", "height": 96, "width": 192 + n % 3,
         "split": "train", "group": f"g{n % 7}", "source": "fine", "label": f"l/{n}.png", "label_index": n,
         "label_ids": "train", "coarse_label": None if n % 2 else f"c/{n}.png", "weight": 1 + n / 8}
        for n in range(count)
    ]  # fmt: skip
    return pa.Table.from_pylist(listed, schema=MANIFEST_SCHEMA.with_metadata({b"about": b"x" * 100}))


def written(path: Path, count: int = 300) -> pa.Table:
    table = rows(count)
    with writing_table(path, table.schema) as add:
        for first in range(0, count, 100):
            add(table.slice(first, 100))
    return table


def told(path: Path) -> list[str]:
    """The notes while a table is read twice."""
    notes: list[str] = []
    with heard(notes.append):
        read_table(path, MANIFEST_SCHEMA)
        read_metadata(path, MANIFEST_SCHEMA)
    return notes


@pytest.mark.parametrize("count", [0, 1, 300, 40_000])
def test_a_table_is_sealed_and_read_as_it_was_written(count: int, tmp_path: Path) -> None:
    table = written(tmp_path / "m.parquet", count)
    assert read_table(tmp_path / "m.parquet", MANIFEST_SCHEMA).equals(table, check_metadata=True)
    assert pa.concat_tables([MANIFEST_SCHEMA.empty_table(), *read_pieces(tmp_path / "m.parquet", MANIFEST_SCHEMA)]
                            ).equals(table)  # fmt: skip
    assert told(tmp_path / "m.parquet") == []
    data = (tmp_path / "m.parquet").read_bytes()
    ((crc, size),) = re.findall(rb"crc32c ([0-9a-f]{8}) of ([0-9]{12}) bytes", data)
    assert int(size) == len(data)
    opened = data.replace(b"crc32c %s of %s" % (crc, size), b"crc32c 00000000 of 000000000000")
    assert b"%08x" % google_crc32c.value(opened) == crc


@pytest.mark.parametrize("kind", ["table", "record"])
def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    table = written(path, 40)
    if kind == "record":
        path.write_bytes(table_bytes(table))
    read = (lambda: read_table(path, MANIFEST_SCHEMA)) if kind == "table" else (lambda: read_sealed(path))
    data, rng, refused = path.read_bytes(), random.Random(0), 0
    assert read().equals(table, check_metadata=kind == "table")
    seal = data.rindex(b"seal")
    places = [
        *range(seal - 60, seal + 100),
        *range(len(data) - 40, len(data)),
        *(rng.randrange(len(data)) for _ in range(1000)),
    ]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read()
        except BadTable as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            assert kind == "table" and found.equals(table, check_metadata=True)
    assert refused > len(places) - 100


@pytest.mark.parametrize("change", ["zeros", "swapped", "cut", "longer", "twice"])
def test_other_damage_is_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    written(path)
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes({
        "zeros": data[:middle] + bytes(16) + data[middle + 16 :],
        "swapped": data[:100] + data[200:300] + data[100:200] + data[300:],
        "cut": data[:-1],
        "longer": data[:-4] + b"\0" + data[-4:],
        "twice": data[:middle] + data[middle - 8 : middle] + data[middle:],
    }[change])  # fmt: skip
    with pytest.raises(BadTable, match=r"m\.parquet is (damaged|not a readable)"):
        read_table(path, MANIFEST_SCHEMA)


@pytest.mark.parametrize("how", ["pyarrow", "pyarrow with all metadata", "pandas", "one row more"])
def test_a_table_that_another_program_wrote_is_read_and_called_unverified_once(how: str, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.parquet", tmp_path / "theirs.parquet"
    table = written(ours)
    raw = pq.read_table(ours)  # its metadata has our seal
    if how == "pandas":
        pd.read_parquet(ours).to_parquet(theirs)
    elif how == "pyarrow":
        pq.write_table(table, theirs)
    else:
        pq.write_table(pa.concat_tables([raw, raw.slice(0, 1)]) if how == "one row more" else raw, theirs)
    found = read_table(theirs, MANIFEST_SCHEMA)
    assert found.slice(0, 300).to_pylist() == table.to_pylist()
    assert b"seal" not in (found.schema.metadata or {})
    assert told(theirs) == [f"{theirs} is unverified: another program wrote it, without a checksum of its content"]


def test_a_record_without_a_seal_is_refused(tmp_path: Path) -> None:
    pq.write_table(rows(3), tmp_path / "r.parquet")
    with pytest.raises(BadTable, match=r"r\.parquet is damaged: it has no checksum$"):
        read_sealed(tmp_path / "r.parquet")


def test_names_that_look_like_seals_do_no_harm(tmp_path: Path) -> None:
    """Column statistics repeat names in the footer; so do folders in the metadata."""
    seals = ["crc32c 00000000 of 000000000000 bytes", "crc32c 12345678 of 000000000900 bytes"]
    table = rows(2).set_column(0, MANIFEST_SCHEMA.field("sample_id"), pa.array(seals))
    table = table.replace_schema_metadata({seal.encode(): seal.encode() for seal in seals})
    (tmp_path / "m.parquet").write_bytes(table_bytes(table))
    assert read_table(tmp_path / "m.parquet", MANIFEST_SCHEMA).equals(table, check_metadata=True)
    assert told(tmp_path / "m.parquet") == []


def test_a_seal_is_found_before_a_schema_of_any_length(tmp_path: Path) -> None:
    """Arrow repeats the metadata behind it."""
    table = rows(2).replace_schema_metadata({b"about": random.Random(1).randbytes(1_000_000)})
    (tmp_path / "m.parquet").write_bytes(table_bytes(table))
    assert told(tmp_path / "m.parquet") == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux counts threads in /proc")
def test_no_thread_of_pyarrow_reads_a_table_which_could_abort_the_end_of_the_interpreter(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    written(path, 40_000)
    code = f"""
        import os
        from pathlib import Path
        from autolabel.manifests.schemas import MANIFEST_SCHEMA
        from autolabel.manifests.tables import read_metadata, read_pieces, read_sealed, read_table
        path, threads = Path({str(path)!r}), lambda: len(os.listdir("/proc/self/task"))
        before = threads()
        read_metadata(path, MANIFEST_SCHEMA), read_table(path, MANIFEST_SCHEMA), read_sealed(path)
        rows = sum(map(len, read_pieces(path, MANIFEST_SCHEMA)))
        print(rows, threads() - before)
    """
    printed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert printed.stdout == "40000 0\n"


def test_nothing_appears_where_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing_table(tmp_path / "m.parquet", MANIFEST_SCHEMA) as add:
        add(rows(3))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
