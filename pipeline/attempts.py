"""Notes about units at which a process has died: who is at a unit, and at which image.

`attempts/NAME.jsonl` says so line by line, so that an image that keeps killing its process is found. A unit at which
nobody has died is not noted, unless its labels are PNGs: then their crc32c are, so that they are known from those of
people. Who hands out a unit knows whether somebody has died at it: Ray tells of a worker's death, and a call that finds
a run which its process never ended works carefully at first. Notes are no truth: nothing is lost with them.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, json_of
from autolabel.manifests.run.folder import RunFolder
from autolabel.pipeline.units import Packed, Unit

_SUFFIX = ".jsonl"


def noted_units(run: RunFolder) -> set[str]:
    """The names of the units that have notes."""
    return {path.name.removesuffix(_SUFFIX) for path in storage.list(run.attempts, suffix=_SUFFIX)}


def note_path(run: RunFolder, unit: Unit | Packed) -> Path:
    """The file that notes the attempts at a unit."""
    return run.attempts / f"{unit.name}{_SUFFIX}"


def excuse(path: Path) -> None:
    """Mark the last attempt as ended: its machine or driver was lost, so no image is to blame."""
    with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
        last = json_of(storage.read(path).splitlines()[-1], _Note, name=str(path)).attempt
        _add_line(path, {"attempt": last, "ended": True})


@dataclass(frozen=True)
class _Note:
    """One line of a file of notes: an attempt, the sample that it begins, what it writes, or its orderly end.

    writes: the crc32c of the label PNGs that are about to be written, by sample id.
    """

    attempt: str
    sample: str | None = None
    ended: bool = False
    writes: dict[str, int] | None = None


def _add_line(path: Path, words: dict[str, Any]) -> None:
    """Add to a file of notes, whoever else adds to it meanwhile."""
    line, added = json.dumps(words).encode() + b"\n", False
    while not added:
        before = storage.stat(path)
        if before is None:
            added = storage.create(path, line)
        else:
            with contextlib.suppress(FileNotFoundError):
                notes = storage.read(path)  # its last line may be half a line
                whole = notes if notes.endswith(b"\n") or not notes else notes + b"\n"
                added = storage.replace(path, whole + line, unchanged=before)


class Attempt:
    """One process that works on one unit, noted so that its death leaves a trace.

    deaths: the number of earlier processes that died while they worked on a sample, by sample id. careful: some earlier
    process died at this unit, so every sample is noted before it is touched. written: the crc32c of the label PNGs that
    are known to be the run's own, by sample id.
    """

    def __init__(self, run: RunFolder, unit: Unit, *, careful: bool = False, noted: bool = True) -> None:
        """careful: somebody may have died at this unit. noted: there may be notes; else nothing is read."""
        self.path = note_path(run, unit)
        self._tag = uuid4().hex[:12]
        self._noted, self._wrote = careful or noted, False
        self.written: dict[str, set[int]] = {}
        last: dict[str, str | None] = {}  # the sample that each attempt without an orderly end was working on
        for note in self._notes() if self._noted else ():
            if note.ended:
                last.pop(note.attempt, None)
            elif note.writes is not None:
                last.setdefault(note.attempt, None)
                self.add_written(note.writes)
            else:
                last[note.attempt] = note.sample
        self.careful = careful or bool(last)
        self.deaths = Counter(sample for sample in last.values() if sample is not None)

    def _notes(self) -> Iterable[_Note]:
        """The notes that can be read. They are no truth: half a line, or rubbish, says that some attempt died."""
        if storage.exists(self.path):
            for line in storage.read(self.path).splitlines():
                try:
                    yield json_of(line, _Note, name=str(self.path))
                except BadDocument:
                    yield _Note(attempt="unknown")

    def _note(self, words: dict[str, Any]) -> None:
        self._wrote = True
        _add_line(self.path, {"attempt": self._tag, **words})

    def begin(self, sample_id: str) -> None:
        """Note that this sample is next."""
        self._note({"sample": sample_id})

    def writes(self, labels: dict[str, int]) -> None:
        """Note that label PNGs with these crc32c, by sample id, are about to be written."""
        self._note({"writes": labels})
        self.add_written(labels)

    def add_written(self, labels: Mapping[str, int]) -> None:
        """Know these crc32c of label PNGs, by sample id, for the run's own."""
        for sample_id, checksum in labels.items():
            self.written.setdefault(sample_id, set()).add(checksum)

    def end(self, *, committed: bool) -> None:
        """Note that nobody died: the unit is whole, or was left in order."""
        if committed and (self._noted or self._wrote):
            storage.remove(self.path)
        elif self._wrote:
            self._note({"ended": True})
