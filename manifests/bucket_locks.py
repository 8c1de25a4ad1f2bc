"""Locks of folders in a bucket: an object that its holder renews; callers use manifests/storage.py.

No system ends such a lock with its process, so the object tells of life: about once a minute its holder writes it anew,
on condition that it is still as he wrote it last. An observer takes it over, on condition that it is still as he saw
it, when his own clock has seen no change for as long as the object says. No clock is compared with another machine's.

The object is never removed: no removal is conditional, and one that comes late would remove a successor's lock. A
holder that ends marks it as free. It works on every storage that has `stat`, `read`, `create` and `replace`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from autolabel.manifests import notes, storage
from autolabel.manifests.documents import BadDocument, json_of
from autolabel.manifests.local_locks import READ_ONLY, Busy, Hold, Superseded, this_process
from autolabel.manifests.machine import is_alive, process_space

_AGAIN = 5.0  # seconds until a failed renewal is tried again, at most
_PATIENCE = 5.0  # seconds without a word about somebody who is likely to be quick
_TRIES = 5  # of a conditional write whose condition failed although the lock is ours: a reply was lost


@dataclass(frozen=True)
class Times:
    """Seconds. beat: between two renewals. lease: a lock that has not changed for so long is dead. look: of observers.

    With the default a holder that misses one renewal has a minute and a half to make it good.
    """

    beat: float = 60.0
    lease: float = 150.0
    look: float = 2.0


TIMES = Times()


@dataclass(frozen=True)
class _Lock:
    """The content of a lock's object.

    holder: who it is, in words; None if it is free. number: how many have held it. token: the holder, alone of all.
    space, process: by which another process of the same machine sees whether the holder is alive. beats: how often it
    was renewed. lease_s: after so many seconds without a change it is dead.
    """

    holder: str | None
    number: int
    token: str
    space: str
    process: int
    beats: int
    lease_s: float

    @classmethod
    def own(cls, lease_s: float) -> _Lock:
        return cls(this_process(), 1, uuid4().hex, process_space(), os.getpid(), 0, lease_s)

    @classmethod
    def read(cls, path: Path) -> _Lock | None:
        """The lock as it is; None if there is none. One that nobody can read is held by somebody unknown."""
        try:
            found: _Lock = json_of(storage.read(path, at_most=storage.SMALL), cls, name=str(path))
            return found
        except FileNotFoundError:
            return None
        except BadDocument:
            return cls("an unknown process", 0, "", "", 0, 0, TIMES.lease)

    def data(self) -> bytes:
        return storage.json_bytes(dataclasses.asdict(self))

    def is_free(self) -> bool:
        """True if nobody holds it, or a process of this machine that has ended."""
        return self.holder is None or (
            self.space != "" and self.space == process_space() and not is_alive(self.process)
        )


class Clock:
    """Seconds since a moment, also those in which the process or its machine was suspended."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._monotonic, self._wall = time.monotonic(), time.time()

    def seconds(self) -> float:
        return max(time.monotonic() - self._monotonic, time.time() - self._wall)


class Lease(Hold):
    """A lock of this process: a thread renews it until it ends, or is found to be another's."""

    def __init__(self, path: Path, lock: _Lock, times: Times) -> None:
        self._path, self._lock, self._times = path, lock, times
        self._clock, self._turn, self._end = Clock(), threading.Lock(), threading.Event()
        self._loss = ""
        threading.Thread(target=self._beat, daemon=True, name=f"lock {path.name}").start()

    def require(self, *, surely: bool = False) -> None:
        """Raise Superseded if another process has taken the folder over.

        The lock itself is asked if it was not renewed in time, as after a suspension, or to know it `surely`; only
        then does an error of the storage come through.
        """
        if surely or self._clock.seconds() > 1.5 * self._times.beat:
            with contextlib.nullcontext() if surely else contextlib.suppress(OSError):
                self._renew()
        if self._loss:
            raise Superseded(self._loss)

    def release(self) -> None:
        """Mark the lock as free, unless it is another's already. If the storage fails, its lease runs out."""
        self._end.set()
        with contextlib.suppress(OSError, Superseded), self._turn:
            self._write(dataclasses.replace(self._lock, holder=None, token="", space="", process=0))

    def _beat(self) -> None:
        pause = self._times.beat
        while not self._end.wait(pause):
            try:
                self._renew()
                pause = self._times.beat
            except OSError:
                pause = min(_AGAIN, self._times.beat)
            except Superseded:
                break

    def _renew(self) -> None:
        with self._turn:
            if not self._end.is_set() and not self._loss:
                self._write(dataclasses.replace(self._lock, beats=self._lock.beats + 1))

    def _write(self, lock: _Lock) -> None:
        """Replace the lock if it is ours. A lost reply is no loss: what is there is read before every try."""
        for _ in range(_TRIES):
            began = Clock()
            seen, now = storage.stat(self._path), _Lock.read(self._path)
            if seen is None or now is None or now.token != self._lock.token:
                by = f"by {now.holder}" if now and now.holder else "by another process"
                self._loss = (
                    f"{self._path.parent} was taken over {by}, because this process gave no sign of life in time;"
                    " nothing more is written"
                )
                raise Superseded(self._loss)
            if storage.replace(self._path, lock.data(), unchanged=seen):
                self._lock, self._clock = lock, began
                return
        raise OSError(errno.EAGAIN, "the lock could not be renewed", str(self._path))


@contextlib.contextmanager
def hold(
    folder: Path, *, name: str = storage.LOCK, wait: float = 0.0, only_read: bool = False, at_once: bool = False
) -> Iterator[Hold]:
    """Hold a folder in a bucket, see `storage.hold`."""
    lease = _acquire(folder, name, wait=wait, only_read=only_read, at_once=at_once)
    try:
        yield lease
    finally:
        if isinstance(lease, Lease):
            lease.release()


def _acquire(folder: Path, name: str, *, wait: float, only_read: bool, at_once: bool) -> Hold:
    path, times, own = folder / name, TIMES, _Lock.own(TIMES.lease)
    began = since = time.monotonic()  # no wall clock: one that is set forward must not kill anybody
    version: storage.Stat | None = None
    denied = lives = False
    said = list[str]()
    while True:
        seen = storage.stat(path)
        found = _Lock.read(path) if seen else None
        if found is not None and found.token == own.token:  # the reply to our own writing was lost
            return Lease(path, own, times)
        dead = found is not None and version == seen and time.monotonic() - since > found.lease_s
        if found is None or dead or found.is_free():
            if denied:
                return Hold()
            own = own if found is None else dataclasses.replace(own, number=found.number + 1)
            try:
                if seen is None:
                    won = storage.create(path, own.data())
                else:
                    won = found is not None and storage.replace(path, own.data(), unchanged=seen)
            except OSError as error:
                if not only_read or not (isinstance(error, PermissionError) or error.errno in READ_ONLY):
                    raise
                denied = True
                continue
            if won:
                return Lease(path, own, times)
            time.sleep(random.uniform(0.0, 0.1))  # somebody else was quicker, or the reply was lost
            continue
        if version != seen:
            lives = lives or version is not None
            version, since = seen, time.monotonic()
        if at_once or (lives and time.monotonic() - began >= wait):
            raise Busy(f"another autolabel is at work in {folder} ({found.holder}): wait for it, or stop it")
        left = max(0.0, found.lease_s - (time.monotonic() - since))
        for word, when in (("is held", _PATIENCE), ("seems dead", 0.6 * found.lease_s)):
            if word not in said and found.lease_s - left > when:
                said.append(word)
                notes.tell(f"{path} {word} ({found.holder}): without a sign of life it is taken over in {left:.0f} s")
        time.sleep(min(times.look * random.uniform(0.5, 1.0), max(left, 0.05)))
