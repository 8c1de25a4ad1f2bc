"""Workers, machines and commands are killed at random moments; labels and statistics are those of an undisturbed run.

The long form, 200 kills, is benchmarks/chaos.py. If this fails, a crash can cost or change labels.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.shards import create_zarr
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.run import generate

SCRIPT = ROOT / "benchmarks" / "chaos.py"


def test_five_kills_change_nothing() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--kills", "5", "--pause", "0.5", "--seed", "3", "--images", "40", "--spare"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = {name: int(kills) for name, kills in re.findall(r"^\| (.+?) \| (\d+) \|", done.stdout, re.MULTILINE)}
    assert table == {"an actor": 2, "a node": 1, "the command": 1, "the command, without Ray": 1}
    assert "\ndifferences: 0\n" in done.stdout


def test_commands_killed_before_some_of_their_changes_end_like_undisturbed_ones() -> None:
    """The long form kills before every change of twelve commands: benchmarks/RESULTS.md."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--ordered", "generate", "fuse", "report", "--every", "24"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = re.findall(r"^\| ([a-z-]+) \| (\d+) \| (\d+) \| (\d+) \|", done.stdout, re.MULTILINE)
    assert [name for name, *_ in table] == ["generate", "fuse", "report", "all"]
    assert all(int(kills) == int(resumed) == int(equal) > 0 for _, kills, resumed, equal in table)
    assert "\ndifferences: 0\n" in done.stdout


def can_mount(place: Path) -> bool:
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "none", place], check=False, capture_output=True).returncode == 0
    return mounted and subprocess.run(["umount", place], check=False).returncode == 0


@pytest.mark.slow
def test_full_disks_cost_nothing_but_the_call(tmp_path: Path) -> None:
    if not can_mount(tmp_path / "disk"):
        pytest.skip("only root can mount a disk, on Linux")
    subprocess.run([sys.executable, SCRIPT.with_name("full_disks.py"), "fuse"], check=True, timeout=300)


# --- the comparison itself sees what it is there for ------------------------------------------------------------------


def change_label(run: Path) -> None:
    """A shard, whole and readable, that is not the committed one."""
    first, second = sorted((run / "labels.zarr").rglob("c.*"))[:2]
    shutil.copyfile(first, second)


def change_statistic(run: Path) -> None:
    path = run / "stats" / "classes.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("pixels")
    changed = pa.array([table["pixels"][0].as_py() + 1, *table["pixels"].to_pylist()[1:]])
    pq.write_table(table.set_column(place, table.schema.field("pixels"), changed), path)


def lose_account(run: Path) -> None:
    opened = Run.open(run)
    assert opened.accounts is not None
    replace(opened, accounts=replace(opened.accounts, labelled=opened.accounts.labelled - 1)).save()


def label_twice(run: Path) -> None:
    first = min((run / "units").iterdir())
    shutil.copyfile(first, first.with_name("b512x512.000099.0.parquet"))


def leave_note(run: Path) -> None:
    (run / "attempts").mkdir(exist_ok=True)
    (run / "attempts" / "x.jsonl").touch()


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another label": (change_label, "labels.zarr/b512x512/c.1.0.0 has other bytes"),
    "a lost unit": (lambda run: min((run / "units").iterdir()).unlink(), "records name 6 samples, 6 of them different"),
    "a unit twice": (label_twice, "records name 14 samples, 10 of them different, of 10"),
    "another number": (change_statistic, "the rows of stats/classes.parquet differ"),
    "a quarantined image less": (lambda run: (run / "quarantine.parquet").unlink(), "the rows of quarantine.parquet"),
    "an account that does not balance": (lose_account, "the accounts are Accounts(asked=10, labelled=8"),
    "a temporary file": (lambda run: (run / "units" / ".x.0123456789ab.autolabel-tmp").touch(), "tmp is left over"),
    "a note": (leave_note, "attempts/x.jsonl is left over"),
    "an array": (
        lambda run: create_zarr(run / "labels.zarr", {"b512x512": 99}, shard_rows=4, attributes={}),
        "zarr.json differs from what",
    ),
}


def test_the_comparison_sees_every_kind_of_damage(city: Path, teacher: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("chaos", SCRIPT)
    assert spec is not None and spec.loader is not None
    chaos = importlib.util.module_from_spec(spec)
    sys.modules["chaos"] = chaos  # its dataclasses look it up
    spec.loader.exec_module(chaos)
    manifest = tmp_path / "coarse.parquet"
    root = tmp_path / "city"
    shutil.copytree(city, root)
    manifest = root / "coarse.parquet"
    next((root / "data/leftImg8bit/train_extra").rglob("*.png")).unlink()
    for name in ("quiet", "same"):
        generate(LabelJob(manifest, teacher, tmp_path / name, scales=(1.0,), unit_size=4))
    assert chaos.differences(tmp_path / "same", tmp_path / "quiet") == []
    missed = []
    for what, (change, expected) in CHANGES.items():
        shutil.copytree(tmp_path / "same", tmp_path / what / "same")
        change(tmp_path / what / "same")
        found = chaos.differences(tmp_path / what / "same", tmp_path / "quiet")
        if not any(expected in line for line in found):
            missed.append((what, found))
    assert not missed


@pytest.mark.slow
def test_sixty_kills_change_nothing() -> None:
    subprocess.run([sys.executable, SCRIPT, "--kills", "60", "--seed", "1", "--spare"], check=True, timeout=1200)
