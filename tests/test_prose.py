"""Docstrings are sentences: subject, verb, one thought. If this fails, a reader has to decode a clause first."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from test_arrows import MAY_IMPORT, ROOT

FILES = sorted([*ROOT.glob("*.py"), *(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))])
CLAUSE = re.compile(
    r"(What|Where|Whether|Of|Those|By which|As of|As `|The same)\b"
)  # a reader would wait for the main verb


def docstrings(source: str) -> list[tuple[int, str]]:
    """Line and text of every docstring in a module."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return [(getattr(node, "lineno", 1), text) for node in nodes if (text := ast.get_docstring(node))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_docstring_begins_with_a_clause(path: Path) -> None:
    clauses = [
        f"{line}: {text.splitlines()[0]}"
        for line, text in docstrings(path.read_text(encoding="utf-8"))
        if CLAUSE.match(text)
    ]
    assert clauses == []
