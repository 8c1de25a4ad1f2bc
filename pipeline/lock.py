"""One driver per run folder, or several that each do a part of their own.

Every lock is exclusive, held by one process, and gone when the process ends. There is one for the door of the folder,
and one per part:

- A driver of the whole run takes the door, tries the lock of every part, and keeps the door as long as it runs.
- A driver of part I/N takes the door, then the lock of its part for as long as it runs. It tries the locks of the other
  parts: if it got all of them it is alone, and keeps the door while it prepares the folder; else it leaves the door.

This is right because whoever tries or takes a part's lock holds the door. So nobody comes in between trying and
taking, and no trial can make another driver believe that a part is held. A driver that leaves in between is harmless:
the folder was prepared before it came or before it left.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

from autolabel.manifests import storage
from autolabel.manifests.run.chapters import CHAPTERS
from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.run.labels import LAYERS
from autolabel.manifests.run.place import require_no_links

_SETUP_SECONDS = 60.0  # patience while another part prepares the folder
_PARTS = re.compile(re.escape(storage.LOCK) + r"\.\d+-of-\d+")


class Lock:
    """The right to write to a run folder. `alone`: nobody else is in it, and this driver may prepare it."""

    def __init__(self, out: Path, part: tuple[int, int] | None, *, only_read: bool = False) -> None:
        """only_read: the holder writes nothing, so that a folder which nobody may write to can be held."""
        self._out, self._part, self._only_read = out, part, only_read
        self._door = contextlib.ExitStack()
        self.alone = False

    @contextlib.contextmanager
    def held(self) -> Iterator[Lock]:
        """Hold the lock. Raises ValueError naming who holds it, and for a link in the folder."""
        require_no_links(self._out)
        own = f"{storage.LOCK}.{self._part[0]}-of-{self._part[1]}" if self._part else None
        if not (self._only_read or storage.exists(RunFolder(self._out).record)):
            storage.require_conditions(self._out)
        with self._door, contextlib.ExitStack() as stack:
            wait = _SETUP_SECONDS if self._part else 0
            self._door.enter_context(storage.hold(self._out, wait=wait, only_read=self._only_read))
            if own:
                stack.enter_context(storage.hold(self._out, name=own))
            self.alone = self._require_no_other(own)
            if not self.alone:
                self._door.close()
            yield self

    def _require_no_other(self, own: str | None) -> bool:
        """Return True if no other part is at work. Raises Busy for one if `own` is None, as for a driver of all."""
        names = [path.name for path in storage.list(self._out) if _PARTS.fullmatch(path.name)]
        try:
            for name in names:
                if name != own:
                    with storage.hold(self._out, name=name, only_read=self._only_read):
                        pass
        except storage.Busy:
            if own is None:
                raise
            return False
        return True

    def share(self) -> None:
        """Let other parts in: the folder is prepared."""
        if self._part is not None:
            self._door.close()
            self.alone = False

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """Derive the tables, one part after the other."""
        with contextlib.ExitStack() as stack:
            if self._part is not None:
                stack.enter_context(storage.hold(self._out, name=f"{storage.LOCK}.publish", wait=math.inf))
            yield


def remove_leftovers(run: RunFolder) -> None:
    """Delete the temporary files of killed writers, in the folders that a run fills. Only its holder may call it."""
    storage.remove_leftovers(run.path)
    layers = [place for name in LAYERS for place in (run.layer(name), run.path / name)]
    for folder in (run.units, run.path / CHAPTERS, run.attempts, run.path / "stats", *layers):
        storage.remove_leftovers(folder, recursive=True)
