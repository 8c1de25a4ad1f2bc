"""A script behind a figure does not run any more, and nobody notices until the figure is to be made again.

Every script of benchmarks/ runs to its end in its smallest form, in a process of its own, and `make types` reads all of
them. The numbers that they print then mean nothing, but they are there.
"""

from __future__ import annotations

import functools
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from autolabel.teacher.checkpoints import DRAWN_STREETS

FOLDER = ROOT / "benchmarks"
# Scripts that have a test of their own under tests/, and a word by which it calls them.
ELSEWHERE = {
    "chaos": ("promises/test_chaos.py", '"--kills"'),
    "full_disks": ("promises/test_chaos.py", '"full_disks.py"'),
    "fuzz": ("promises/test_fuzz.py", '"--reads"'),
    "ordered_kills": ("promises/test_chaos.py", '"--ordered"'),
}


@dataclass(frozen=True)
class Script:
    """Arguments of a script, the script that must have run before in the same folder, and what its output has.

    tables: number of tables in Markdown, whose headers the page must have too. lines: beginnings of other lines.
    dashes: cells of numbers that stay empty.
    """

    arguments: tuple[str, ...] = ()
    after: str | None = None
    tables: int = 0
    lines: tuple[str, ...] = ()
    dashes: int = 0
    page: str = "benchmarks/RESULTS.md"


SCRIPTS = {
    "chaos_buckets": Script(tables=2, lines=("longest command: ", "moto: 0 differences")),
    "camvid": Script(
        ("camvid", "out"), lines=(" class ", " mean IoU ", "fine + truth: ", "wrote compare/compare.json")
    ),
    "compiled": Script(tables=1),
    "corrections": Script(tables=1, lines=("3 images of 96 x 48, ",)),
    "dense": Script(("out",), "camvid", tables=4, lines=("`generate` labels 0 of 36,864 pixels otherwise ",)),
    "decode": Script(tables=3),
    "demo_teacher": Script(("demo",), lines=("demo/drawn_streets.safetensors: ",)),
    "dense_students": Script(("camvid", "students"), tables=3, lines=("fine + truth: ", "wrote compare/compare.json")),
    "driver": Script(tables=1),
    "engine": Script(tables=3, lines=("Ray costs ", "the first call ")),
    "errors": Script(("camvid", "errors"), tables=3, dashes=9),
    "export": Script(tables=1, dashes=2),
    "export_labels": Script(tables=1),
    "feed": Script(tables=2),
    "focus": Script(tables=3, lines=("128 x 128, random weights: ",), dashes=9),
    "kept_evidence": Script(("out",), "camvid", tables=2, lines=("one core, 2048 x 1024, ",)),
    "labelling_tools": Script(tables=2),
    "loader": Script(tables=3, lines=("centroids of a PNG label: ",), dashes=2),
    "millions": Script(tables=3, dashes=6),
    # Ray and transformers take half a minute to start: `make bench` has all ways.
    "peers": Script(("--only", "own", "--ways", "loop", "ours"), tables=2),
    "pictures": Script(
        (str(DRAWN_STREETS), "pictures"),
        lines=("pictures/docs/compare.webp ",) if shutil.which("chromium") else ("no chromium, no pictures",),
    ),
    "polygons": Script(tables=1),
    "preemptions": Script(tables=1),
    "policy": Script(("out/runs/kept-coarse",), "camvid", lines=("policy ", "8 levels kept ", "two 8-bit PNGs ")),
    "recipes": Script(tables=2),
    "resizing": Script(tables=1),
    "review": Script(("camvid", "reviewed"), tables=2, dashes=12),
    "scale": Script(tables=3, page="docs/scale.md"),
    "scale_bucket": Script(tables=1, lines=("2 units of 3 images, ",), dashes=4),
    "scale_combination": Script(tables=1),
    "store": Script(tables=1, lines=("2 workers by fork: ",), dashes=8),
    "teacher": Script(tables=5, lines=("labels differ in 0 of ",)),
    "teachers": Script(tables=1),
    "training_step": Script(tables=1),
    "whole_runs": Script(tables=1, lines=("CPU, ",), dashes=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all scripts run."""
    return tmp_path_factory.mktemp("benchmarks")


@functools.cache
def output(name: str, folder: Path) -> str:
    """Everything that a script in its smallest form prints, without colours. It must end well."""
    script = SCRIPTS[name]
    if script.after:
        output(script.after, folder)
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", "--smallest", *script.arguments],
        cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tables(text: str) -> list[list[list[str]]]:
    """The tables in Markdown: rows of cells, of which the first is the header and the second says the columns."""
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()] for block in blocks]


def numbers(table: list[list[str]]) -> list[str]:
    """The cells of a table in columns of numbers, which are those that are aligned to the right."""
    _, columns, *rows = table
    assert rows and all(len(row) == len(columns) for row in rows)
    return [cell for row in rows for cell, column in zip(row, columns, strict=True) if column == "---:"]


@pytest.mark.thorough
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_runs_to_its_end_and_fills_its_tables(name: str, folder: Path) -> None:
    script, text = SCRIPTS[name], output(name, folder)
    assert text.startswith("--smallest: these numbers mean nothing\n")
    found = tables(text)
    assert len(found) == script.tables
    page = (ROOT / script.page).read_text(encoding="utf-8")
    for header, *_ in found:
        assert f"| {' | '.join(header)} |".replace("|  |", "| |") in page
    cells = [cell for table in found for cell in numbers(table)]
    assert cells.count("–") == script.dashes
    for cell in cells:
        if cell != "–":
            assert math.isfinite(float(cell.replace(",", "").removesuffix(" %"))), cell
    for line in script.lines:
        assert f"\n{line}" in text, text
    assert not re.search(r"\b(nan|inf|None)\b", text), text


@pytest.mark.thorough
def test_even_polygons_say_everything_where_a_teacher_says_one_class_everywhere(folder: Path) -> None:
    _, by_class, _, policies = tables(output("dense", folder))
    (fitted,) = (row[2:] for row in by_class if row[:2] == ["even", "fitted"])
    assert fitted == ["100.0"] * 11
    assert [row[-1] for row in policies if row[0] == "paper"] == ["100.0"]


def test_the_page_on_scale_shows_what_the_script_prints() -> None:
    command = [sys.executable, FOLDER / "scale.py"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    shown = set((ROOT / "docs" / "scale.md").read_text(encoding="utf-8").splitlines())
    assert [line for line in printed if line.startswith("|") and line not in shown] == []


@pytest.mark.thorough
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_the_teacher_is_not_measured_on_a_gpu_that_is_not_there() -> None:
    done = subprocess.run([sys.executable, FOLDER / "teacher.py", "--gpu"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("error: --gpu: torch sees no GPU here\n")


def test_every_script_is_run_by_a_test() -> None:
    names = {path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert names == SCRIPTS.keys() | ELSEWHERE.keys()
    for test, word in ELSEWHERE.values():
        assert word in (ROOT / "tests" / test).read_text(encoding="utf-8")
