"""The review list: a run's images by trust, ascending, to look at first or to leave out of training first.

    trust = (1 - disagreement) * mean_confidence,    disagreement = contradicted coarse pixels / coarse pixels

In an image in which no human drew anything there is no disagreement, and trust is the confidence alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from autolabel.manifests.label_space import MAX_CLASSES
from autolabel.manifests.schemas import REVIEW_SCHEMA, ROWS_AT_ONCE
from autolabel.manifests.tables import writing_table

_SCORES = pa.schema(
    [
        *(REVIEW_SCHEMA.field(name) for name in REVIEW_SCHEMA.names if name not in ("rank", "worst_class")),
        pa.field("worst", pa.uint8()),  # id of the class with most contradicted pixels
    ]
)


@contextlib.contextmanager
def writing_review(path: Path, names: Sequence[str]) -> Iterator[Callable[[pa.Table, pa.Table], None]]:
    """Give a function that takes rows of the images table, and the rows of the classes table about the same images.

    When the block ends, all images are written to `path`, ranked by trust, ascending, ties by sample id. `names` are
    the classes by id.
    """
    # A ranking needs all scores at once: 145 bytes an image at the peak, measured with a million images whose ids have
    # 27 characters; ranking and writing them took 1.5 s.
    scored: list[pa.Table] = []
    waiting: list[pa.Table] = []  # small pieces become one, because each has memory of its own around it

    def add(images: pa.Table, classes: pa.Table) -> None:
        waiting.append(_scores(images, classes))
        if sum(map(len, waiting)) >= ROWS_AT_ONCE:
            scored.append(pa.concat_tables(waiting).combine_chunks())
            waiting.clear()

    yield add
    table = pa.concat_tables([_SCORES.empty_table(), *scored, *waiting])
    order = pc.sort_indices(table, [("trust", "ascending"), ("sample_id", "ascending")])
    with writing_table(path, REVIEW_SCHEMA) as write:
        for first in range(0, len(order), ROWS_AT_ONCE):
            rows = table.take(order.slice(first, ROWS_AT_ONCE))
            rows = rows.append_column("rank", pa.array(np.arange(first + 1, first + 1 + len(rows))))
            rows = rows.append_column("worst_class", pa.array(names, pa.string()).take(rows["worst"].combine_chunks()))
            write(rows.select(REVIEW_SCHEMA.names))


def _scores(images: pa.Table, classes: pa.Table) -> pa.Table:
    place = pc.index_in(classes["sample_id"], images["sample_id"].combine_chunks()).to_numpy()
    by_class = np.zeros((len(images), MAX_CLASSES), np.int64)  # contradicted pixels by image and class
    np.add.at(by_class, (place, classes["class_id"].to_numpy()), classes["contradicted_pixels"].to_numpy())
    contradicted, coarse = by_class.sum(axis=1), images["coarse_pixels"].to_numpy()
    disagreement = np.divide(contradicted, coarse, out=np.zeros(len(images)), where=coarse > 0)
    columns = {
        "trust": (1 - disagreement) * images["mean_confidence"].to_numpy(),
        "disagreement": pa.array(disagreement, mask=coarse == 0),
        "worst": pa.array(by_class.argmax(axis=1), pa.uint8(), mask=contradicted == 0),
    }
    return pa.table([columns[name] if name in columns else images[name] for name in _SCORES.names], schema=_SCORES)
