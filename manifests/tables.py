"""Read and write parquet tables of a given schema, whole or piece by piece.

Every table that is written here carries two kinds of checksums: a CRC-32 in each page, which parquet knows, and a seal
in its footer, the crc32c of the whole file and its length. A file whose seal is broken is refused. One without a seal,
or with the seal of a file of another length, was written by another program: it is read, and called unverified once.

A table is one file, or a folder of that name with a part of the rows in each file, in the order of their names. pandas
and pyarrow read both by the same name, and so do all functions here.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import io
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq

from autolabel.manifests import notes, storage
from autolabel.manifests.schemas import ROWS_AT_ONCE
from autolabel.manifests.wording import reason

# A seal as it lies in the footer, behind its key, and what stands there while its checksum is computed.
_SEAL = re.compile(rb"seal\x18\x25crc32c ([0-9a-f]{8}) of ([0-9]{12}) bytes")
_OPEN = b"seal\x18\x25crc32c 00000000 of 000000000000 bytes"
_SEAL_KEY, _OPEN_VALUE = _OPEN.split(b"\x18\x25")
_PART = re.compile(r"[0-9]{5,}\.parquet")  # the name of a part
_TAIL = 1 << 22  # bytes at the end of a file in which the seal lies
_PIECE = 1 << 22


def _seal(crc: int, size: int) -> bytes:
    return _SEAL_KEY + b"\x18\x25" + b"crc32c %08x of %012d bytes" % (crc, size)


class BadTable(ValueError):
    """A parquet file is missing, damaged, or not of the expected kind."""


class OtherVersion(BadTable):
    """The columns of a file are those of another version of this program."""


# --- writing ----------------------------------------------------------------------------------------------------------


class _Sealing(io.RawIOBase):
    """Writes to a file, front to back, and counts; from `hold` on it keeps everything back until `seal`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._crc, self.size = file, 0, 0
        self._held: list[bytes] | None = None
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        some = bytes(memoryview(data))  # type: ignore[arg-type]
        if self._held is not None:
            self._held.append(some)
        else:
            self._crc = google_crc32c.extend(self._crc, some)
            self._put(some)
        return len(some)

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.size += len(data)

    def hold(self) -> None:
        self._held = []

    def seal(self) -> None:
        rest = b"".join(self._held or [])
        before, opened, after = rest.rpartition(_OPEN)
        assert opened
        crc = google_crc32c.extend(self._crc, rest)
        self._put(before + _seal(crc, self.size + len(rest)) + after)


@contextlib.contextmanager
def _writer(sink: _Sealing, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Give a writer of a sealed parquet file."""
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        yield writer
        writer.add_key_value_metadata({_SEAL_KEY: _OPEN_VALUE})
        sink.hold()
    sink.seal()


class TableWriter:
    """Adds rows to a parquet file. sha256, bytes: of the file, when it is whole."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self._waiting: list[pa.Table] = []  # small pieces become one row group
        self.sha256, self.bytes = "", 0

    def __call__(self, rows: pa.Table) -> None:
        """Add rows."""
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= ROWS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write what waits for more."""
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting))
            self._waiting.clear()


@contextlib.contextmanager
def writing_table(path: Path, schema: pa.Schema) -> Iterator[TableWriter]:
    """Give what adds rows to a parquet file. The file appears when all are written, or not at all."""
    with storage.writing(path) as file:
        sink = _Sealing(file)
        with _writer(sink, schema) as writer:
            table = TableWriter(writer)
            yield table
            table.flush()
        table.sha256, table.bytes = sink.sha256.hexdigest(), sink.size


def table_bytes(table: pa.Table) -> bytes:
    """The bytes of a sealed parquet file with these rows and this metadata."""
    buffer = io.BytesIO()
    with _writer(_Sealing(buffer), table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


# --- one file, or a folder of parts -----------------------------------------------------------------------------------


def parts_of(path: Path) -> list[Path]:
    """The files of a table in the order of its rows: itself, the parts in the folder of its name, or none."""
    if storage.exists(path):
        return [path]
    return [file for file in storage.list(path, suffix=".parquet") if _PART.fullmatch(file.name)]


def part_path(path: Path, number: int) -> Path:
    """The file of a part of a table, counted from 0."""
    return path / f"{number:05d}.parquet"


def table_sha256(path: Path) -> str:
    """The sha256 of a table's file; of one in parts, `digest_of_parts`. Raises BadTable."""
    files = parts_of(path)
    if not files:
        raise _missing(path)
    if files == [path]:
        return storage.sha256(path)
    return digest_of_parts({file.name: storage.sha256(file) for file in files})


def digest_of_parts(digests: Mapping[str, str]) -> str:
    """The sha256 of a table in parts, from that of every part by its name."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def _missing(path: Path) -> BadTable:
    return BadTable(f"{path} {'is no file' if storage.is_folder(path) else 'does not exist'}")


# --- reading ----------------------------------------------------------------------------------------------------------
#
# Nothing is read by pyarrow's own threads, neither ahead (pre_buffer) nor in parallel (use_threads). Such a thread may
# still hold Python's bytes when the interpreter ends, and then ends the process by SIGABRT: one in five of the commands
# that read a record last did, on two busy cores.


def read_table(path: Path, schema: pa.Schema, *, sealed: bool = False) -> pa.Table:
    """Read a parquet file that has the columns of `schema`, with its metadata. Raises BadTable.

    sealed: refuse a file that another program wrote.
    """
    found = []
    for part in parts_of(path) or [path]:
        with _opened(part, schema, must_be_sealed=sealed) as file:
            table = file.read(columns=schema.names, use_threads=False)
            found.append(as_expected(part, table, schema).replace_schema_metadata(_metadata(file)))
    return found[0] if len(found) == 1 else pa.concat_tables(found)


def read_pieces(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """Read a parquet file as `read_table` does, at most ROWS_AT_ONCE rows at a time. Raises BadTable."""
    for part in parts_of(path) or [path]:
        with _opened(part, schema) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=schema.names, use_threads=False):
                yield as_expected(part, pa.Table.from_batches([batch]), schema)


def read_groups(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """Read a parquet file as `read_table` does, one row group after the other. Raises BadTable."""
    for part in parts_of(path) or [path]:
        with _opened(part, schema) as file:
            for number in range(file.num_row_groups):
                yield _group(part, file, number, schema)


def read_group(path: Path, schema: pa.Schema, number: int) -> pa.Table:
    """Read one row group of a file that `read_groups` has read whole: only its pages. Raises BadTable."""
    parts = parts_of(path) or [path]
    if len(parts) > 1:
        ends = _group_ends(tuple(parts), storage.stat(parts[-1]))
        place = bisect.bisect_right(ends, number)
        path, number = parts[place], number - (ends[place - 1] if place else 0)
    else:
        (path,) = parts
    with _opened(path, schema, whole=False) as file:
        return _group(path, file, number, schema)


@functools.lru_cache(4)
def _group_ends(parts: tuple[Path, ...], last: storage.Stat | None) -> list[int]:
    """The number of row groups up to the end of each part; `last` tells a table from one that was written over it."""
    counts = []
    for part in parts:
        with _opened(part, pa.schema([]), whole=False) as file:
            counts.append(file.num_row_groups)
    return list(itertools.accumulate(counts))


def _group(path: Path, file: pq.ParquetFile, number: int, schema: pa.Schema) -> pa.Table:
    return as_expected(path, file.read_row_group(number, columns=schema.names, use_threads=False), schema)


def read_metadata(path: Path, schema: pa.Schema) -> dict[bytes, bytes]:
    """Read the key-value metadata of a parquet file, or of the first part. Raises BadTable as `read_table`."""
    with _opened((parts_of(path) or [path])[0], schema) as file:
        return _metadata(file)


def read_sealed(path: Path, columns: list[str] | None = None, *, schema: pa.Schema | None = None) -> pa.Table:
    """Read a table that this program alone writes, such as a record. Raises BadTable unless its seal is whole.

    columns: the paths of those that are wanted. schema: that of the file, if another one is to be refused.
    """
    with _translated(path):
        return sealed_table(path, storage.read(path), columns, schema=schema)


def sealed_table(
    path: Path, data: bytes, columns: list[str] | None = None, *, schema: pa.Schema | None = None
) -> pa.Table:
    """Take a table from the bytes that were read of a path; otherwise as `read_sealed`."""
    with _translated(path):
        if not _seal_holds(path, io.BytesIO(data), len(data)):
            raise BadTable(f"{path} is damaged: it has no checksum")
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True, pre_buffer=False)
        if schema is not None and not file.schema_arrow.equals(schema):
            raise OtherVersion(f"{path} was written by another version of this program: start a new run folder")
        return file.read(columns, use_threads=False)


def _seal_holds(path: Path, file: BinaryIO, size: int) -> bool:
    """True if the seal is whole, False if there is none for a file of this length. Raises BadTable if it is broken."""
    start = max(0, size - _TAIL)
    file.seek(start)
    seals = list(_SEAL.finditer(file.read(_TAIL)))
    if not seals or int(seals[-1][2]) != size:
        return False
    place, crc = start + seals[-1].start(), 0
    file.seek(0)
    for first, last in ((0, place), (place + len(_OPEN), size)):
        if first:
            crc = google_crc32c.extend(crc, _OPEN)
            file.seek(first)
        while first < last and (piece := file.read(min(_PIECE, last - first))):
            crc = google_crc32c.extend(crc, piece)
            first += len(piece)
    if b"%08x" % crc != seals[-1][1]:
        raise BadTable(f"{path} is damaged: its checksum is another")
    return True


def _metadata(file: pq.ParquetFile) -> dict[bytes, bytes]:
    metadata: Mapping[bytes, bytes] = file.schema_arrow.metadata or {}
    return {key: value for key, value in metadata.items() if key != _SEAL_KEY}


@contextlib.contextmanager
def _opened(
    path: Path, schema: pa.Schema, *, must_be_sealed: bool = False, whole: bool = True
) -> Iterator[pq.ParquetFile]:
    """Open a table. whole: compare the seal with all of the file; each page has a checksum of its own."""
    if not storage.exists(path):
        raise _missing(path)
    with _translated(path), storage.reading(path) as source:
        size = source.seek(0, io.SEEK_END)
        sealed = not whole or _seal_holds(path, source, size)
        source.seek(0)
        file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False)
        missing = [name for name in schema.names if name not in file.schema_arrow.names]
        if missing:
            raise BadTable(f"{path} lacks the columns {', '.join(missing)}: it is not the expected table")
        if must_be_sealed and not sealed:
            raise BadTable(f"{path} is damaged: it has no checksum")
        if not sealed:
            notes.tell(f"{path} is unverified: another program wrote it, without a checksum of its content")
        yield file


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn every error of pyarrow into a BadTable that names the file and the reason."""
    try:
        yield
    except BadTable:
        raise
    except (pa.ArrowException, OSError) as error:
        raise BadTable(f"{path} is not a readable parquet file: {reason(error)}") from error


def as_expected(path: Path, table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of `schema` of a table that was read of a path. Raises BadTable."""
    try:
        return table.select(schema.names).cast(schema)
    except ValueError as error:  # another type, or null where there must be a value
        raise BadTable(f"{path} is not the expected table: {error}") from error
