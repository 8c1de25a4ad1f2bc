"""Read and write parquet tables of a given schema, whole or piece by piece."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from autolabel.manifests import storage
from autolabel.manifests.schemas import ROWS_AT_ONCE


class BadTable(ValueError):
    """A parquet file is missing, damaged, or not of the expected kind."""


@contextlib.contextmanager
def writing_table(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Give a function that adds rows to a parquet file. It appears when all are written, or not at all."""
    with storage.writing(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        waiting: list[pa.Table] = []  # small pieces become one row group

        def add(rows: pa.Table) -> None:
            waiting.append(rows)
            if sum(map(len, waiting)) >= ROWS_AT_ONCE:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()

        yield add
        if waiting:
            writer.write_table(pa.concat_tables(waiting))


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a parquet file that has the columns of `schema`, with its metadata. Raises BadTable."""
    with _opened(path, schema) as file:
        table = file.read(columns=schema.names)
        return _as_expected(path, table, schema).replace_schema_metadata(file.schema_arrow.metadata)


def read_pieces(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """Read a parquet file as `read_table` does, at most ROWS_AT_ONCE rows at a time. Raises BadTable."""
    with _opened(path, schema) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=schema.names):
            yield _as_expected(path, pa.Table.from_batches([batch]), schema)


def read_metadata(path: Path, schema: pa.Schema) -> dict[bytes, bytes]:
    """Read the key-value metadata of a parquet file that has the columns of `schema`. Raises BadTable."""
    with _opened(path, schema) as file:
        return dict(file.schema_arrow.metadata or {})


@contextlib.contextmanager
def _opened(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetFile]:
    if not storage.exists(path):
        raise BadTable(f"{path} {'is no file' if path.exists() else 'does not exist'}")
    try:
        with storage.reading(path) as source:
            file = pq.ParquetFile(source)
            missing = [name for name in schema.names if name not in file.schema_arrow.names]
            if missing:
                raise BadTable(f"{path} lacks the columns {', '.join(missing)}: it is not the expected table")
            yield file
    except (pa.ArrowException, OSError) as error:
        raise BadTable(f"{path} is not a readable parquet file ({type(error).__name__})") from error


def _as_expected(path: Path, table: pa.Table, schema: pa.Schema) -> pa.Table:
    try:
        return table.select(schema.names).cast(schema)
    except ValueError as error:  # another type, or null where there must be a value
        raise BadTable(f"{path} is not the expected table: {error}") from error
