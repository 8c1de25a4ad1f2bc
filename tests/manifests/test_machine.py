"""If cores and memory can be read on Linux alone, no command works on macOS or Windows."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from autolabel.manifests import machine

MIB = 1 << 20


@pytest.fixture
def no_linux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the files and functions that other systems do not have."""
    monkeypatch.setattr(machine, "_STATUS", tmp_path / "no" / "where")
    monkeypatch.setattr(machine, "_FORGET", tmp_path / "no" / "where")
    monkeypatch.delattr(psutil.Process, "cpu_affinity")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)


@pytest.fixture
def no_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the module that Windows does not have."""
    monkeypatch.setitem(sys.modules, "resource", None)


def use(mebibytes: int) -> None:
    """Take memory for a moment, fresh from the system: an array might lie where an earlier one has been freed."""
    with mmap.mmap(-1, mebibytes * MIB) as fresh:
        for _ in range(mebibytes):
            fresh.write(b"1" * MIB)
        time.sleep(0.05)


def test_the_cores_are_those_that_the_process_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: [0, 3, 5])
    assert machine.cores() == 3


def test_without_affinity_the_cores_are_those_of_the_machine(no_linux: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert machine.cores() == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.cores() == 1


def test_memory_is_free_and_in_use() -> None:
    assert 10 * MIB < machine.resident_memory() < psutil.virtual_memory().total
    assert 0 < machine.free_memory() < psutil.virtual_memory().total


def test_the_peak_of_a_block_is_measured_however_high_an_earlier_one_was() -> None:
    use(200)
    with machine.PeakMemory() as peak:
        use(64)
    assert 63 * MIB <= peak.bytes < 80 * MIB
    with machine.PeakMemory() as peak:
        pass
    assert peak.bytes < 8 * MIB


@pytest.mark.parametrize("earlier", [16, 200])
def test_without_linux_the_peak_of_a_block_is_measured_too(no_linux: None, no_resource: None, earlier: int) -> None:
    use(earlier)
    with machine.PeakMemory() as peak:
        use(64)
    assert 63 * MIB <= peak.bytes < 80 * MIB


def test_without_linux_the_system_may_still_remember_a_peak(no_linux: None) -> None:
    with machine.PeakMemory() as peak:
        use(64)
    assert peak.bytes >= 60 * MIB


ELSEWHERE = """
import builtins, io, os, sys
import psutil  # knows each system, and reads /proc on this one
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("sched_getaffinity", "pread", "O_DIRECTORY", "sysconf", "mkfifo", "fork", "geteuid", "link"):
    delattr(os, name)
del psutil.Process.cpu_affinity
real = open
def opened(path, *more, **options):
    if str(path).startswith("/proc") and not sys._getframe(1).f_globals["__name__"].startswith("psutil"):
        raise FileNotFoundError(path)
    return real(path, *more, **options)
builtins.open = io.open = opened
import importlib, json, pkgutil, autolabel
for room in ("manifests", "teacher", "pipeline", "student"):
    module = importlib.import_module("autolabel." + room)
    for found in pkgutil.walk_packages(module.__path__, module.__name__ + "."):
        importlib.import_module(found.name)
from autolabel.cli import main
for arguments in json.loads(sys.argv[1]):
    main(arguments, standalone_mode=False)
"""


def test_every_module_and_command_works_where_only_the_common_modules_and_files_are(
    city: Path, teacher: Path, tmp_path: Path
) -> None:
    asked = ["generate", city / "coarse.parquet", "--teacher", teacher, "--out", tmp_path / "run"]
    asked += ["--scales", 1, "--engine", "local"]
    commands = [[*asked, "--dry-run"], asked, ["verify", tmp_path / "run"], ["report", tmp_path / "run"]]
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ELSEWHERE, words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "images at once" in done.stdout
    assert (tmp_path / "run" / "report" / "index.html").is_file()
