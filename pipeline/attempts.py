"""Notes about units under way: who is at a unit, and at which image.

`attempts/NAME.jsonl` says so line by line. If that process dies, the next one works carefully, and an image that keeps
killing its process is found. Notes are no truth: nothing is lost with them.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, json_of
from autolabel.manifests.run.folder import RunFolder
from autolabel.pipeline.units import Packed, Unit


def note_path(run: RunFolder, unit: Unit | Packed) -> Path:
    """The file that notes the attempts at a unit."""
    return run.attempts / f"{unit.name}.jsonl"


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
    attempts at this unit have written, by sample id.
    """

    def __init__(self, run: RunFolder, unit: Unit) -> None:
        self.path = note_path(run, unit)
        self._tag = uuid4().hex[:12]
        self.written: dict[str, set[int]] = {}
        last: dict[str, str | None] = {}  # the sample that each attempt without an orderly end was working on
        for note in self._notes():
            if note.ended:
                last.pop(note.attempt, None)
            elif note.writes is not None:
                last.setdefault(note.attempt, None)
                self._add_written(note.writes)
            else:
                last[note.attempt] = note.sample
        self.careful = bool(last)
        self.deaths = Counter(sample for sample in last.values() if sample is not None)
        self._note({})

    def _notes(self) -> Iterable[_Note]:
        """The notes that can be read. They are no truth: half a line, or rubbish, says that some attempt died."""
        if storage.exists(self.path):
            for line in storage.read(self.path).splitlines():
                try:
                    yield json_of(line, _Note, name=str(self.path))
                except BadDocument:
                    yield _Note(attempt="unknown")

    def _note(self, words: dict[str, Any]) -> None:
        _add_line(self.path, {"attempt": self._tag, **words})

    def begin(self, sample_id: str) -> None:
        """Note that this sample is next."""
        self._note({"sample": sample_id})

    def writes(self, labels: dict[str, int]) -> None:
        """Note that label PNGs with these crc32c, by sample id, are about to be written."""
        self._note({"writes": labels})
        self._add_written(labels)

    def _add_written(self, labels: dict[str, int]) -> None:
        for sample_id, checksum in labels.items():
            self.written.setdefault(sample_id, set()).add(checksum)

    def end(self, *, committed: bool) -> None:
        """Note that nobody died: the unit is whole, or was left in order."""
        if committed:
            storage.remove(self.path)
        else:
            self._note({"ended": True})
