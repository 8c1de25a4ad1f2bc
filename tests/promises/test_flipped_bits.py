"""One bit of a file flips, on a disk or on the way: the file is refused, or says what it said before.

If this fails, figures come from other images, or labels go to other pictures, without a word.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import autolabel

from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import load_manifest
from autolabel.manifests.schemas import STATISTICS
from autolabel.pipeline.records import parse_record
from autolabel.pipeline.units import Plan


@pytest.fixture(scope="module")
def run(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("flipped") / "run"
    made = autolabel("generate", city / "coarse.parquet", "--teacher", teacher, "--out", out, "--engine", "local",
                     "--scales", "1", "--limit", 6, "--unit-size", 2)  # fmt: skip
    assert made.exit_code == 0, made.output
    return out


def plan(path: Path) -> object:
    run = Run.open(path.parent)
    return [tuple(unit.samples) for unit in Plan(path, run.recipe.unit_size, path.parent, path.parent)]


def readers(run: Path) -> dict[str, Callable[[], object]]:
    """Every table of a run, and what reads it."""
    folder, record = Run.open(run), sorted((run / "units").iterdir())[0]
    tables: dict[str, Callable[[], object]] = {
        f"stats/{name}.parquet": (lambda name=name: folder.statistics(name).to_pylist()) for name in STATISTICS
    }
    return {
        **tables,
        "quarantine.parquet": lambda: folder.quarantine().to_pylist(),
        "manifest.parquet": lambda: load_manifest(run / "manifest.parquet"),
        f"units/{record.name}": lambda: [table.to_pylist() for table in parse_record(record, record.read_bytes())[:1]],
        folder.plan: lambda: plan(folder.plan_path),
        "run.json": lambda: Run.open(run),
    }


def test_a_flipped_bit_in_any_table_of_a_run_is_refused_or_changes_nothing(run: Path) -> None:
    rng = random.Random(5)
    for name, read in readers(run).items():
        path, refused = run / name, 0
        data, before = path.read_bytes(), read()
        for _ in range(100):
            damaged = bytearray(data)
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            try:
                assert read() == before, name
            except ValueError as error:
                refused += 1
                assert str(path.name) in str(error) and "\n" not in str(error)
        path.write_bytes(data)
        assert refused > 80, name


def test_a_table_that_pandas_has_written_is_called_unverified_once_on_stderr(run: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    file = tmp_path / "theirs.parquet"
    pq.write_table(pq.read_table(run / "manifest.parquet"), file)
    shown = autolabel("manifest", "show", file)
    assert shown.exit_code == 0
    assert shown.stderr == f"note: {file} is unverified: another program wrote it, without a checksum of its content\n"
    assert autolabel("manifest", "show", run / "manifest.parquet").stderr == ""
