"""Conditions of --keep-if. If this fails, good labels are left out, or a condition from a stranger is executed."""

from __future__ import annotations

import pyarrow as pa
import pytest

from autolabel.manifests.condition import parse_condition


def holds(condition: str, **row: float | None) -> bool | None:
    """What a condition says of an image: True, False, or None if it cannot say."""
    table = pa.table({name: pa.array([value], pa.float64()) for name, value in row.items()})
    expression = parse_condition(condition)
    assert len(table.filter(expression)) + len(table.filter(~expression)) + len(table.filter(expression.is_null())) == 1
    return None if len(table.filter(expression.is_null())) else len(table.filter(expression)) == 1


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("trust > 0.5", True),
        (" trust>.5 ", True),
        ("trust >= 0.75 and trust <= 0.75 and trust == 0.75", True),
        ("trust != 0.75 or trust < 0", False),
        ("not trust > 0.5", False),
        ("not (trust > 0.5 and rank < 2)", True),
        ("trust > 0.5 and rank < 2 or rank == 3", True),
        ("trust > 0.5 and (rank < 2 or rank == 4)", False),
        ("0.7 < trust < 0.8", True),
        ("0.7 < trust < 0.75", False),
        ("rank > -1", True),
        ("trust < rank", True),
        ("disagreement < 0.5", None),
        ("not disagreement < 0.5", None),
        ("disagreement < 0.5 or trust > 0.5", True),  # whatever it were
        ("disagreement < 0.5 and trust > 0.5", None),
        ("disagreement < 0.5 and trust < 0.5", False),
    ],
)
def test_keep_if_accepts_comparisons_and_logic(condition: str, expected: bool | None) -> None:
    assert holds(condition, trust=0.75, rank=3, disagreement=None) is expected


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        ("agreement > 0.8", "no column 'agreement' of numbers (there are agreement_with_coarse, certified_fraction, "),
        ("worker > 1", "no column 'worker' of numbers"),
        ("trust >", "it cannot be read"),
        ("trust = 1", "it cannot be read"),
        ("", "it cannot be read"),
        ("trust > 0.5\x00", "it cannot be read"),
        ("(" * 400 + "trust > 0" + ")" * 400, "it cannot be read"),
        ("not " * 20_000 + "trust > 0", "it cannot be read"),
        ("trust > 1" + "0" * 400, "it cannot be read"),
        ("trust", "'trust' is no comparison"),
        ("1 < 2", "it names no column"),
        ("trust + 1 > 2", "'trust + 1' is neither a column nor a number"),
        ("trust > True", "'True' is neither a column nor a number"),
        ("trust > '0.5'", "\"'0.5'\" is neither a column nor a number"),
        ("trust in (1, 2)", "'trust in (1, 2)' is no comparison"),
        ("open('x').read() > trust", "\"open('x').read()\" is neither a column nor a number"),
        ("trust.__class__ > 1", "'trust.__class__' is neither a column nor a number"),
        ("(lambda: trust)() > 1", "'(lambda: trust)()' is neither a column nor a number"),
        ("__import__('os').abort() or trust > 0", "\"__import__('os').abort()\" is no comparison"),
    ],
    ids=range(19),
)
def test_a_condition_that_is_no_comparison_is_refused_and_never_executed(condition: str, reason: str) -> None:
    with pytest.raises(ValueError) as refusal:
        parse_condition(condition)
    assert reason in str(refusal.value) and "such as 'agreement_with_coarse > 0.8'" in str(refusal.value)
