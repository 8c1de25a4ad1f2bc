"""Which automatic labels to look at, or to leave out of training, first: a run's images, the least trusted on top.

    trust = (1 - disagreement) * mean_confidence,    disagreement = contradicted coarse pixels / coarse pixels

Where no human drew anything there is no disagreement, and trust is the confidence alone.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from autolabel.manifests.label_space import MAX_CLASSES
from autolabel.manifests.tables import (
    IMAGES_SCHEMA,
    REVIEW_SCHEMA,
    ROWS_AT_ONCE,
    Manifest,
    read_statistics,
    writing_table,
)

# --- the ranking ------------------------------------------------------------------------------------------------------

_SCORES = pa.schema(
    [
        *(REVIEW_SCHEMA.field(name) for name in REVIEW_SCHEMA.names if name not in ("rank", "worst_class")),
        pa.field("worst", pa.uint8()),  # id of the worst class
    ]
)


@contextlib.contextmanager
def writing_review(path: Path, names: Sequence[str]) -> Iterator[Callable[[pa.Table, pa.Table], None]]:
    """A function that takes rows of the images table and those of the classes table about the same images. At the end
    all images are written to `path`, ranked by trust, ascending, ties by sample id. `names` has the classes by id.
    """
    # A ranking needs all scores at once: 145 bytes an image at the peak, measured with a million images whose ids have
    # 27 characters; to rank and write them took 1.5 s.
    scored: list[pa.Table] = []
    waiting: list[pa.Table] = []  # small pieces, each with memory of its own around it

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
    lost = np.zeros((len(images), MAX_CLASSES), np.int64)  # contradicted pixels by image and class
    np.add.at(lost, (place, classes["class_id"].to_numpy()), classes["contradicted_pixels"].to_numpy())
    contradicted, coarse = lost.sum(axis=1), images["coarse_pixels"].to_numpy()
    disagreement = np.divide(contradicted, coarse, out=np.zeros(len(images)), where=coarse > 0)
    columns = {
        "trust": (1 - disagreement) * images["mean_confidence"].to_numpy(),
        "disagreement": pa.array(disagreement, mask=coarse == 0),
        "worst": pa.array(lost.argmax(axis=1), pa.uint8(), mask=contradicted == 0),
    }
    return pa.table([columns[name] if name in columns else images[name] for name in _SCORES.names], schema=_SCORES)


# --- leaving images out -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dropped:
    """Images left out of one manifest: the least trusted, those that fail the condition, and those that lack a value
    that it asks for."""

    worst: int
    failed: int
    missing: int


def select(
    named: Sequence[tuple[str, Manifest]], drop_worst: float | None, keep_if: str | None
) -> tuple[list[tuple[str, Manifest]], dict[str, Dropped]]:
    """Leave automatic labels out of manifests that lie in a run's folder; all others stay as they are.

    `named` has the manifests by their paths. `drop_worst` is a share of every run's images, rounded down; `keep_if` see
    `parse_condition`. Returns the manifests, and what was dropped from those that have statistics. Raises ValueError
    if none has, BadTable.
    """
    condition = None if keep_if is None else parse_condition(keep_if)
    chosen: list[tuple[str, Manifest]] = []
    dropped: dict[str, Dropped] = {}
    for path, manifest in named:
        run = Path(path).absolute().parent
        if (run / "stats" / "images.parquet").is_file():
            kept, dropped[path] = _select(manifest, run, drop_worst or 0.0, condition)
            chosen.append((path, kept))
        else:
            chosen.append((path, manifest))
    if not dropped:
        raise ValueError(
            f"nothing is known about the images of {', '.join(path for path, _ in named)}: to leave some out, give the"
            " manifest.parquet of a run, where it lies beside its stats/"
        )
    return chosen, dropped


def _select(manifest: Manifest, run: Path, share: float, condition: pc.Expression | None) -> tuple[Manifest, Dropped]:
    known = _known(run)
    ours = pa.array([s.sample_id for s in manifest.labelled if s.source == "auto"], pa.string())
    known = known.filter(pc.is_in(known["sample_id"], ours))
    worst = math.floor(share * len(ours) + 1e-9)  # 0.29 * 100 is 28.999…
    kept = known = known.slice(worst)
    missing = 0
    if condition is not None:
        kept, missing = known.filter(condition), len(known.filter(condition.is_null()))
    ids = set(kept["sample_id"].to_pylist())
    samples = tuple(s for s in manifest.samples if s.source != "auto" or s.label is None or s.sample_id in ids)
    return replace(manifest, samples=samples), Dropped(worst, len(known) - len(kept) - missing, missing)


def _known(run: Path) -> pa.Table:
    """What a condition may ask of an image, the least trusted first."""
    review, images = read_statistics(run, "review"), read_statistics(run, "images")
    images = images.take(pc.index_in(review["sample_id"], images["sample_id"]))
    for name in review.schema.names:
        if name not in images.schema.names:
            images = images.append_column(name, review[name])
    return images


_NUMBERS = sorted(
    {field.name for schema in (IMAGES_SCHEMA, REVIEW_SCHEMA) for field in schema if not pa.types.is_string(field.type)}
)
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def parse_condition(text: str) -> pc.Expression:
    """A condition such as "agreement_with_coarse > 0.8 and not ignored_fraction >= 0.5".

    Numeric columns of a run's images and review tables, numbers, comparisons, and, or, not, parentheses; nothing else,
    and nothing in it is executed. Three-valued: what compares with a missing value is null. Raises ValueError.
    """
    try:
        parsed = ast.parse(text.strip(), mode="eval").body
        if not any(isinstance(node, ast.Name) for node in ast.walk(parsed)):
            raise _Unknown("it names no column")
        return _condition(parsed)
    except _Unknown as error:
        reason = str(error)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        reason = "it cannot be read"
    raise ValueError(
        f"condition {text!r}: {reason}; expected columns, numbers, comparisons, and, or, not, such as"
        " 'agreement_with_coarse > 0.8'"
    )


class _Unknown(Exception):
    """A part of a condition that has no meaning here."""


def _condition(node: ast.expr) -> pc.Expression:
    match node:
        case ast.BoolOp(op, values):
            both = operator.and_ if isinstance(op, ast.And) else operator.or_
            return functools.reduce(both, map(_condition, values))
        case ast.UnaryOp(ast.Not(), operand):
            return ~_condition(operand)
        case ast.Compare(left, ops, comparators) if all(type(op) in _COMPARISONS for op in ops):
            values = [_value(part) for part in (left, *comparators)]
            pairs = zip(ops, values, values[1:], strict=False)
            return functools.reduce(operator.and_, (_COMPARISONS[type(op)](a, b) for op, a, b in pairs))
    raise _Unknown(f"{ast.unparse(node)!r} is no comparison")


def _value(node: ast.expr) -> pc.Expression:
    match node:
        case ast.Constant(int() | float() as number) if not isinstance(number, bool):
            return pc.scalar(float(number))
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as number)) if not isinstance(number, bool):
            return pc.scalar(-float(number))
        case ast.Name(name) if name in _NUMBERS:
            return pc.field(name)
        case ast.Name(name):
            raise _Unknown(f"no column {name!r} of numbers (there are {', '.join(_NUMBERS)})")
    raise _Unknown(f"{ast.unparse(node)!r} is neither a column nor a number")
