"""The lock of a run folder: one driver, or several that each do a part of it."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from autolabel.manifests.files import LOCK, busy, sign, try_lock

_SETUP_SECONDS = 60.0  # time that another part may need to prepare the folder


class Lock:
    """One driver per run folder, or several that each do a part of their own.

    The first one in is `alone` and may prepare the folder; a driver of a part then lets others in with `share`. Locks
    go with the process that holds them, however it ends.
    """

    def __init__(self, out: Path, part: tuple[int, int] | None) -> None:
        self._out, self._piece = out, part
        self.alone = False

    @contextlib.contextmanager
    def held(self) -> Iterator[Lock]:
        """Hold the lock. Raises ValueError naming who holds it."""
        with contextlib.ExitStack() as stack:
            if self._piece is not None:
                own = self._open(stack, f"{LOCK}.{self._piece[0]}-of-{self._piece[1]}")
                if not try_lock(own):
                    raise busy(own, self._out)
                sign(own)
            self._file = self._open(stack, LOCK)
            deadline = time.monotonic() + (_SETUP_SECONDS if self._piece else 0)
            while True:
                if try_lock(self._file):
                    self.alone = True
                    sign(self._file)
                    break
                if self._piece is not None and try_lock(self._file, fcntl.LOCK_SH):
                    break
                if time.monotonic() >= deadline:
                    raise busy(self._file, self._out)
                time.sleep(0.1)
            yield self

    def share(self) -> None:
        """The folder is prepared: other parts may come in."""
        if self._piece is not None:
            fcntl.flock(self._file, fcntl.LOCK_SH)
            self.alone = False

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """One part after the other derives the tables."""
        with contextlib.ExitStack() as stack:
            if self._piece is not None:
                fcntl.flock(self._open(stack, f"{LOCK}.publish"), fcntl.LOCK_EX)
            yield

    def _open(self, stack: contextlib.ExitStack, name: str) -> IO[str]:
        return stack.enter_context(open(self._out / name, "a+", encoding="utf-8"))
