"""Conditions on the statistics of a run's images, such as "agreement_with_coarse > 0.8"."""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from autolabel.manifests.schemas import IMAGES_SCHEMA, REVIEW_SCHEMA

_NUMBERS = sorted(
    {field.name for schema in (IMAGES_SCHEMA, REVIEW_SCHEMA) for field in schema if not pa.types.is_string(field.type)}
)
ABOUT = ("sample_id", "group", "split", "source")  # columns of texts that a manifest has, and not a run's tables
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def parse_condition(text: str, *, texts: Sequence[str] = ()) -> pc.Expression:
    """Parse a condition such as "agreement_with_coarse > 0.8 and not ignored_fraction >= 0.5".

    A condition may hold numeric columns of a run's images and review tables, numbers, comparisons, and, or, not, and
    parentheses; and the columns `texts`, compared with quoted texts. Nothing in it is executed. A comparison with a
    missing value is null. Raises ValueError.
    """
    try:
        parsed = ast.parse(text.strip(), mode="eval").body
        if not any(isinstance(node, ast.Name) for node in ast.walk(parsed)):
            raise _Unknown("it names no column")
        return _condition(parsed, texts)
    except _Unknown as error:
        reason = str(error)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        reason = "it cannot be read"
    raise ValueError(
        f"condition {text!r}: {reason}; expected columns, numbers, comparisons, and, or, not, such as"
        " 'agreement_with_coarse > 0.8'"
    )


def columns_of(text: str) -> set[str]:
    """The columns that a condition names, which `parse_condition` has read."""
    return {node.id for node in ast.walk(ast.parse(text.strip(), mode="eval")) if isinstance(node, ast.Name)}


class _Unknown(Exception):
    """A part of a condition that has no meaning here."""


def _condition(node: ast.expr, texts: Sequence[str]) -> pc.Expression:
    match node:
        case ast.BoolOp(op, values):
            both = operator.and_ if isinstance(op, ast.And) else operator.or_
            return functools.reduce(both, (_condition(value, texts) for value in values))
        case ast.UnaryOp(ast.Not(), operand):
            return ~_condition(operand, texts)
        case ast.Compare(left, ops, comparators) if all(type(op) in _COMPARISONS for op in ops):
            parts = (left, *comparators)
            values = [_value(part, texts) for part in parts]
            if len({_is_text(part, texts) for part in parts}) > 1:
                raise _Unknown(f"{ast.unparse(node)!r} compares a text with a number")
            pairs = zip(ops, values, values[1:], strict=False)
            return functools.reduce(operator.and_, (_COMPARISONS[type(op)](a, b) for op, a, b in pairs))
    raise _Unknown(f"{ast.unparse(node)!r} is no comparison")


def _is_text(node: ast.expr, texts: Sequence[str]) -> bool:
    constant = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return constant or (isinstance(node, ast.Name) and node.id in texts)


def _value(node: ast.expr, texts: Sequence[str]) -> pc.Expression:
    match node:
        case ast.Constant(str() as words) if texts:
            return pc.scalar(words)
        case ast.Name(name) if name in texts:
            return pc.field(name)
        case ast.Constant(int() | float() as number) if not isinstance(number, bool):
            return pc.scalar(float(number))
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as number)) if not isinstance(number, bool):
            return pc.scalar(-float(number))
        case ast.Name(name) if name in _NUMBERS:
            return pc.field(name)
        case ast.Name(name):
            raise _Unknown(f"no column {name!r} of numbers (there are {', '.join([*_NUMBERS, *texts])})")
    raise _Unknown(f"{ast.unparse(node)!r} is neither a column nor a number")
