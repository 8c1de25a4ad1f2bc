"""Cores and memory that this process may use, on Linux, macOS and Windows.

Files and functions that only some systems have are used where they exist; nothing here needs them.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import threading
from pathlib import Path
from types import TracebackType

import psutil

_STATUS = Path("/proc/self/status")  # Linux only; has lines such as "VmHWM:    7884 kB"
_FORGET = Path("/proc/self/clear_refs")  # Linux only; writing "5" resets VmHWM
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # Linux only; drawn anew at every start of the system
_PROCESSES = Path("/proc/self/ns/pid")  # Linux only; a link that names who counts the processes: system or container
_SAMPLE_SECONDS = 0.001


def cores() -> int:
    """The cores that this process may run on, at least 1."""
    with contextlib.suppress(AttributeError, OSError, psutil.Error):  # macOS binds no process to cores
        return len(psutil.Process().cpu_affinity())
    return os.cpu_count() or 1


def free_memory() -> int:
    """Bytes of main memory that new allocations may take without swapping."""
    return int(psutil.virtual_memory().available)


def total_memory() -> int:
    """Bytes of main memory that this machine has."""
    return int(psutil.virtual_memory().total)


def resident_memory() -> int:
    """Bytes of main memory that this process takes now."""
    return int(psutil.Process().memory_info().rss)


def process_space() -> str:
    """A text that two processes share if each sees the other by its number; empty where the system does not say."""
    try:
        return f"{platform.node()} {_BOOT.read_text().strip()} {_PROCESSES.readlink()}"
    except OSError:
        return ""


def is_alive(process: int) -> bool:
    """True if there is a process of this number, also a suspended one, but not one that has ended."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


class PeakMemory:
    """The highest use of main memory within a `with` block. `bytes`, after the block: beyond what was used before it.

    Exact where the system can forget an earlier peak (Linux) and where the block exceeds it; elsewhere the use is read
    every millisecond, and a shorter peak is missed.
    """

    bytes = 0

    def __enter__(self) -> PeakMemory:
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._before = self._highest = resident_memory()
        forgotten = _forget_peak()
        self._mark = _peak()
        if not forgotten:
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        if self._sampler.is_alive():
            self._sampler.join()
        peak = _peak()
        self.bytes = max(0, (peak if peak > self._mark else self._highest) - self._before)

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._highest = max(self._highest, resident_memory())


def _forget_peak() -> bool:
    try:
        _FORGET.write_text("5")
    except OSError:  # no Linux, or not allowed
        return False
    return True


def _peak() -> int:
    """Bytes of the highest use so far that the system remembers; 0 if it remembers none."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if (peak := getattr(psutil.Process().memory_info(), "peak_wset", None)) is not None:
        return int(peak)  # Windows
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
