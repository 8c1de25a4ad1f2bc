"""Whatever a file holds, it is refused in words of our own or read right. The long form is benchmarks/fuzz.py.

If this fails, a damaged or foreign file ends in a traceback, in another content than was written, or not at all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import fuzz
from mutators import BLIND

linux = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads the peak memory of children")


@linux
def test_broken_files_of_every_kind_are_refused_or_read_right_by_readers_and_commands(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "fuzz.py", "--reads", 2500, "--commands", 60, "--keep", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stdout + done.stderr
    cells = {line[:14].strip(): line[14:].split() for line in done.stdout.splitlines()}
    rows = {name: row for name, row in cells.items() if len(row) > 9 and row[0].replace(",", "").isdigit()}
    assert all(int(cells[0].replace(",", "")) > 0 for cells in rows.values())
    assert {"photograph", "label", "manifest", "policy", "label space", "run.json", "record", "checkpoint"} < set(rows)
    assert rows["all"][4:8] == ["0", "0", "0", "0"] and list(tmp_path.iterdir()) == []


def of(read: Callable[[bytes], Any], files: tuple[bytes, ...] = (b"good" * 30,)) -> fuzz.Counted:
    """What the fuzzer says of a reader."""
    counted = fuzz.Counted()
    for _ in fuzz.fuzz_reads(fuzz.Kind("made up", 1, files, read), 40, 0, None, counted):
        pass
    assert counted.tried == 40 == sum(counted.outcomes.values())
    return counted


def refuses(data: bytes) -> str:
    if data != b"good" * 30:
        raise ValueError("made-up file is damaged: write it again")
    return "good"


def crashes(data: bytes) -> str:
    return "good" if data == b"good" * 30 else {}[len(data)]


def is_mute(data: bytes) -> str:
    if data != b"good" * 30:
        raise ValueError("")
    return "good"


def is_deaf(data: bytes) -> str:
    return "good"


@linux
@pytest.mark.parametrize(
    ("read", "outcome"),
    [(refuses, "refused"), (crashes, "error"), (is_mute, "error"), (is_deaf, "same"), (bytes, "wrong")],
)
def test_the_fuzzer_tells_refusals_from_faults(read: Callable[[bytes], Any], outcome: str) -> None:
    outcomes = of(read).outcomes
    assert outcomes[outcome] > 12 and set(outcomes) <= {outcome, "same", "other"}


@linux
def test_the_fuzzer_stops_a_reader_that_has_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(data: bytes) -> None:
        while data != b"good" * 30:
            pass

    monkeypatch.setattr(fuzz, "SLOW", 0.02)
    assert of(waits).outcomes["slow"] > 20


@pytest.mark.parametrize("mutate", BLIND)
def test_a_case_can_be_made_again(mutate: fuzz.Mutator) -> None:
    data = bytes(range(256)) * 4
    assert [mutate(fuzz.random.Random(7), data) for _ in range(2)] == [mutate(fuzz.random.Random(7), data)] * 2
