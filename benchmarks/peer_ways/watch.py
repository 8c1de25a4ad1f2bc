"""Commands run on one core: what they take with everything that they start, and how they are killed. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_SUBREAPER = 36  # of prctl(2)


def adopt_orphans() -> None:
    """Make this process the parent of all that its commands leave behind, so that it is counted and ended."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)


@dataclass(frozen=True)
class Cost:
    """Seconds of CPU and bytes of memory that a command took, with everything that it started."""

    cpu: float
    peak: float


def _tree() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _pss(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(text.split("\nPss:", 1)[1].split()[0]) * 1024
    return 0


@contextlib.contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command on one core; end all that it leaves behind."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
        try:
            yield process
        finally:
            while left := _tree():
                for one in left:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.send_signal(signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    pid, status = os.waitpid(-1, 0)
                    process.returncode = os.waitstatus_to_exitcode(status) if pid == process.pid else process.returncode
        said.seek(0)
        if process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"{' '.join(command)}\n{said.read().decode(errors='replace')[-3000:]}")


def cost(command: Sequence[str]) -> Cost:
    """Run a command to its end and say what it took."""
    seconds: dict[tuple[int, float], float] = {}
    peak = 0
    with started(command) as process:
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                break
            pss = 0
            for one in _tree():
                with contextlib.suppress(psutil.Error):
                    times = one.cpu_times()
                    seconds[one.pid, one.create_time()] = times.user + times.system
                    pss += _pss(one.pid)
            peak = max(peak, pss)
            time.sleep(0.25)
    # The second lacks what daemons took, the first what processes took after they were looked at last.
    return Cost(max(sum(seconds.values()), used.ru_utime + used.ru_stime), max(peak, used.ru_maxrss * 1024))


def killed(command: Sequence[str], done: Callable[[], int], at: int) -> int:
    """Start a command, kill it with all that it started once `at` images are done, and return how many are."""
    with started(command) as process:
        while (number := done()) < at:
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended before it could be killed")
            time.sleep(0.0002)
        os.killpg(process.pid, signal.SIGKILL)
    return number
