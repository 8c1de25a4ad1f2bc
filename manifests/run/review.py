"""The review list: a run's images by trust, ascending, to look at first or to leave out of training first.

    trust = (1 - disagreement) * mean_confidence,    disagreement = contradicted coarse pixels / coarse pixels

In an image in which no human drew anything there is no disagreement, and trust is the confidence alone.

A ranking needs all scores: up to a quarter of a million are sorted in memory, more in sorted runs on this machine's
disk, which are merged. So it takes 200 MiB for any number of images.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.schemas import REVIEW_SCHEMA, ROWS_AT_ONCE
from autolabel.manifests.tables import part_path, writing_table

IN_MEMORY = 1 << 18  # images that are sorted at once, and in a part of the list
_BLOCK = 1 << 12  # images of a sorted run that are in memory while runs are merged
_ORDER = [("trust", "ascending"), ("sample_id", "ascending")]
_SCORES = pa.schema(
    [
        *(REVIEW_SCHEMA.field(name) for name in REVIEW_SCHEMA.names if name not in ("rank", "worst_class")),
        pa.field("worst", pa.uint8()),  # id of the class with most contradicted pixels
    ]
)


@contextlib.contextmanager
def writing_review(
    path: Path, names: Sequence[str], *, parts: bool = False
) -> Iterator[Callable[[pa.Table, pa.Table], None]]:
    """Give a function that takes rows of the images table, and the rows of the classes table about the same images.

    When the block ends, all images are written to `path`, ranked by trust, ascending, ties by sample id: to one file,
    or to a folder of `parts`. `names` are the classes by id.
    """
    with tempfile.TemporaryDirectory() as scratch:
        runs = _Runs(Path(scratch))

        def add(images: pa.Table, classes: pa.Table) -> None:
            runs.add(_scores(images, classes))

        yield add
        rows = _ranked(runs.sorted(), names)
        if not parts:
            with writing_table(path, REVIEW_SCHEMA) as write:
                for some in rows:
                    write(some)
            return
        number, some = 0, next(rows, None)
        while some is not None:
            room = IN_MEMORY
            with writing_table(part_path(path, number), REVIEW_SCHEMA) as write:
                while some is not None and room > 0:
                    write(some)
                    room, some = room - len(some), next(rows, None)
            number += 1
        for old in storage.list(path, suffix=".parquet"):  # of a longer list
            if old.name >= part_path(path, number).name:
                storage.remove(old)


def _ranked(tables: Iterator[pa.Table], names: Sequence[str]) -> Iterator[pa.Table]:
    """The sorted scores as rows of the list."""
    rank = 0
    for table in tables:
        for first in range(0, len(table), ROWS_AT_ONCE):
            rows = table.slice(first, ROWS_AT_ONCE)
            ranks = np.arange(rank + 1, rank + 1 + len(rows))
            worst = pa.array(names, pa.string()).take(rows["worst"].combine_chunks())
            rank += len(rows)
            yield (
                rows.append_column("rank", pa.array(ranks))
                .append_column("worst_class", worst)
                .select(REVIEW_SCHEMA.names)
            )


class _Runs:
    """Scores of any number of images, and the way to read them sorted."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._waiting: list[pa.Table] = []
        self._whole: list[pa.Table] = []
        self._files: list[Path] = []

    def add(self, scores: pa.Table) -> None:
        """Add some images."""
        self._waiting.append(scores)
        if sum(map(len, self._waiting)) >= ROWS_AT_ONCE:  # small pieces become one: each has memory of its own around
            self._whole.append(pa.concat_tables(self._waiting).combine_chunks())
            self._waiting.clear()
        if sum(map(len, self._whole)) >= IN_MEMORY:
            path = self._scratch / f"{len(self._files)}.arrow"
            with storage.writing(path) as file, pa.ipc.new_file(file, _SCORES) as out:
                out.write_table(self._take(), max_chunksize=_BLOCK)
            self._files.append(path)

    def _take(self) -> pa.Table:
        table = pa.concat_tables([_SCORES.empty_table(), *self._whole, *self._waiting])
        self._whole.clear()
        self._waiting.clear()
        return table.take(pc.sort_indices(table, _ORDER)).combine_chunks()

    def sorted(self) -> Iterator[pa.Table]:
        """All images by trust, ascending, ties by sample id."""
        rest = self._take()
        if not self._files:
            yield rest
            return
        blocks = [_blocks(path) for path in self._files]
        blocks.append(rest.slice(first, _BLOCK) for first in range(0, len(rest), _BLOCK))
        yield from _merged(blocks)


def _blocks(path: Path) -> Iterator[pa.Table]:
    with storage.reading(path) as file:
        reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(use_threads=False))
        for number in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(number)])


def _merged(runs: list[Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """Merge sorted runs, a block of each in memory.

    All rows up to the least of the blocks' last ones can be sorted and given away: no run has a smaller one left.
    """
    heads = [(run, block) for run in runs if (block := next(run, None)) is not None]
    while heads:
        least = min(_last(block) for _, block in heads)
        ready, left = [], []
        for run, block in heads:
            count = _up_to(block, least)
            ready.append(block.slice(0, count))
            rest = block.slice(count) if count < len(block) else next(run, None)
            if rest is not None:
                left.append((run, rest))
        heads = left
        table = pa.concat_tables(ready).combine_chunks()
        yield table.take(pc.sort_indices(table, _ORDER))


def _last(block: pa.Table) -> tuple[float, str]:
    return float(_trust(block.slice(len(block) - 1))[0]), block["sample_id"][-1].as_py()


def _trust(block: pa.Table) -> NDArray[np.float64]:
    """The trusts, of which NaN comes last."""
    trust = block["trust"].to_numpy()
    return np.where(np.isnan(trust), np.inf, trust)


def _up_to(block: pa.Table, least: tuple[float, str]) -> int:
    """The number of rows of a sorted block that do not come after `least`."""
    trust, (most, name) = _trust(block), least
    first, last = np.searchsorted(trust, most, side="left"), np.searchsorted(trust, most, side="right")
    same = block["sample_id"].slice(int(first), int(last - first))
    return int(first) + int(pc.sum(pc.less_equal(same, name)).as_py() or 0)


def _scores(images: pa.Table, classes: pa.Table) -> pa.Table:
    place = pc.index_in(classes["sample_id"], images["sample_id"].combine_chunks()).to_numpy()
    # Contradicted pixels by image and class.
    ids = classes["class_id"].to_numpy()
    width = int(ids.max(initial=0)) + 1
    counts = np.bincount(place.astype(np.int64) * width + ids, classes["contradicted_pixels"], len(images) * width)
    by_class = counts.reshape(len(images), width)
    contradicted, coarse = by_class.sum(axis=1), images["coarse_pixels"].to_numpy()
    disagreement = np.divide(contradicted, coarse, out=np.zeros(len(images)), where=coarse > 0)
    columns = {
        "trust": (1 - disagreement) * images["mean_confidence"].to_numpy(),
        "disagreement": pa.array(disagreement, mask=coarse == 0),
        "worst": pa.array(by_class.argmax(axis=1), pa.uint8(), mask=contradicted == 0),
    }
    return pa.table([columns[name] if name in columns else images[name] for name in _SCORES.names], schema=_SCORES)
