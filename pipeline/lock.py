"""One driver per run folder, or several that each do a part of their own.

Every lock is exclusive, held by one process, and gone when the process ends; in a bucket it is taken over when its
holder has given no sign of life for too long. There is one for the door of the folder, and one per part:

- A driver of the whole run takes the door, tries the lock of every part, and keeps the door as long as it runs.
- A driver of part I/N takes the door, then the lock of its part for as long as it runs. It tries the locks of the other
  parts: if it got all of them it is alone, and keeps the door while it prepares the folder; else it leaves the door.

This is right because whoever tries or takes a part's lock holds the door. So nobody comes in between trying and
taking, and no trial can make another driver believe that a part is held. A driver that leaves in between is harmless:
the folder was prepared before it came or before it left.

A driver that was suspended, or taken for dead while it was not, may wake up when another has its place. The fence in
`run.json` holds it back: every driver raises it with its first save, every save is made on condition that the file is
the one just read, and whoever finds another driver's mark there ends with `Superseded`, and has published nothing.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from autolabel.manifests import storage
from autolabel.manifests.bucket_locks import Clock
from autolabel.manifests.local_locks import this_process
from autolabel.manifests.run.chapters import CHAPTERS
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.run.labels import LAYERS
from autolabel.manifests.run.place import require_no_links
from autolabel.manifests.run.record import WHOLE, Fence

_SETUP_SECONDS = 60.0  # patience while another part prepares the folder
_LOOK_SECONDS = 60.0  # between two looks at the fence
_TRIES = 100  # of a save, each of which another part may have forestalled
_PARTS = re.compile(re.escape(storage.LOCK) + r"\.\d+-of-\d+")


class Lock:
    """The right to write to a run folder.

    alone: nobody else is in it, and this driver may prepare it. after_death: the driver whose place this one takes
    began to label and has not come to its end; it was killed.
    """

    def __init__(
        self, out: Path, part: tuple[int, int] | None, *, only_read: bool = False, prepared: bool = False
    ) -> None:
        """only_read: the holder writes nothing, so that a folder which nobody may write to can be held.

        prepared: the folder is as this driver needs it. Then another part is not watched until it has given a sign of
        life, for whether it lives does not matter.
        """
        self._out, self._part, self._only_read, self._prepared = out, part, only_read, prepared
        self._door, self._holds = contextlib.ExitStack(), list[storage.Hold]()
        self._place = f"{part[0]}/{part[1]}" if part else WHOLE
        self._words = f"{this_process()}, {uuid4().hex[:8]}"
        self._begun, self._mark, self._looked = False, "", Clock()
        self.alone = self.after_death = False

    @contextlib.contextmanager
    def held(self) -> Iterator[Lock]:
        """Hold the lock. Raises ValueError naming who holds it, and for a link in the folder."""
        require_no_links(self._out)
        own = f"{storage.LOCK}.{self._part[0]}-of-{self._part[1]}" if self._part else None
        if not (self._only_read or storage.exists(RunFolder(self._out).record)):
            storage.require_conditions(self._out)
        with self._door, contextlib.ExitStack() as stack:
            wait = _SETUP_SECONDS if self._part else 0
            door = self._door.enter_context(storage.hold(self._out, wait=wait, only_read=self._only_read))
            self._holds = [door]
            if own:
                self._holds.append(stack.enter_context(storage.hold(self._out, name=own)))
            self.alone = self._require_no_other(own)
            if not self.alone:
                self._leave_door()
            fence = self._fence(self._read())
            self._mark, self.after_death = fence.mark(self._place), fence.dead(self._place)
            try:
                yield self
            finally:
                if self._begun:  # an error ended the driver, but no death
                    with contextlib.suppress(OSError, ValueError):
                        self.update(lambda run: run, last=True)

    def _require_no_other(self, own: str | None) -> bool:
        """Return True if no other part is at work. Raises Busy for one if `own` is None, as for a driver of all."""
        others = [path.name for path in storage.list(self._out) if _PARTS.fullmatch(path.name) and path.name != own]
        at_once = own is not None and self._prepared

        def attempt(name: str) -> None:
            with storage.hold(self._out, name=name, only_read=self._only_read, at_once=at_once):
                pass

        try:
            with ThreadPoolExecutor(
                max(1, len(others))
            ) as pool:  # in a bucket, all who may be dead are watched at once
                list(pool.map(attempt, others))
        except storage.Busy:
            if own is None:
                raise
            return False
        return True

    def _leave_door(self) -> None:
        self._door.close()
        del self._holds[0]

    def share(self) -> None:
        """Let other parts in: the folder is prepared."""
        if self._part is not None and self.alone:
            self._leave_door()
            self.alone = False

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """Derive the tables, one part after the other."""
        with contextlib.ExitStack() as stack:
            if self._part is not None:
                name = f"{storage.LOCK}.publish"
                self._holds.append(stack.enter_context(storage.hold(self._out, name=name, wait=math.inf)))
                stack.callback(self._holds.pop)
            yield

    # --- the fence ----------------------------------------------------------------------------------------------------

    def require(self, *, surely: bool = False) -> None:
        """Raise Superseded if another driver has taken this one's place. It reads files only now and then, or `surely`.

        Whoever publishes has to know it surely.
        """
        for hold in self._holds:
            hold.require(surely=surely)
        if surely or self._looked.seconds() > _LOOK_SECONDS:
            self._require(self._fence(self._read()))
            self._looked.restart()

    def update(self, change: Run | Callable[[Run], Run], *, last: bool = False) -> Run:
        """Save the run: this one, or a change of the run as it is now, which another part may have saved meanwhile.

        With the first save this driver begins, with the `last` one it ends. Raises Superseded if another driver has
        taken its place.
        """
        record, written = RunFolder(self._out).record, b""
        for _ in range(_TRIES):
            seen, now = storage.stat(record), self._read()
            if now is None or now.data() != written:  # else our own writing is there: its reply was lost
                fence = self._fence(now)
                self._require(fence)
                run = change if isinstance(change, Run) else change(_known(now, record))
                fence = fence if self._begun else fence.begun(self._place, self._words)
                run = replace(run, fence=fence.ended(self._place) if last else fence)
                written = run.data()
                if not self._write(record, written, seen):
                    continue
            else:
                run = now
            self._begun, self._mark = not last, run.fence.mark(self._place)
            self._looked.restart()
            return run
        raise OSError(f"{record} could not be saved: somebody else changed it {_TRIES} times")

    @staticmethod
    def _write(record: Path, data: bytes, seen: storage.Stat | None) -> bool:
        return storage.create(record, data) if seen is None else storage.replace(record, data, unchanged=seen)

    def _read(self) -> Run | None:
        """The run as it is now; None if there is none yet."""
        try:
            return Run.read(self._out)
        except FileNotFoundError:
            return None

    def _fence(self, run: Run | None) -> Fence:
        return Fence() if run is None else run.fence

    def _require(self, fence: Fence) -> None:
        if fence.mark(self._place) != self._mark:
            by = f"driver {[*fence.drivers.values()][-1]}" if fence.drivers else "a driver that has ended since"
            raise storage.Superseded(
                f"{self._out} was taken over by {by}; this one, which seemed dead, ends and has published nothing"
            )


def _known(run: Run | None, record: Path) -> Run:
    if run is None:
        raise FileNotFoundError(f"{record} is gone: somebody has removed it while its driver was at work")
    return run


def remove_leftovers(run: RunFolder) -> None:
    """Delete the temporary files of killed writers, in the folders that a run fills. Only its holder may call it."""
    storage.remove_leftovers(run.path)
    layers = [place for name in LAYERS for place in (run.layer(name), run.path / name)]
    for folder in (run.units, run.path / CHAPTERS, run.attempts, run.path / "stats", *layers):
        storage.remove_leftovers(folder, recursive=True)
