"""The commit records of a run folder: which units are done, and where each one's record lies.

A record is the file `units/NAME.G.parquet`: unit NAME, generation G. It is created and never written over. The highest
generation of a unit is the truth, and older ones are removed after it is there. So one protocol serves a disk and a
bucket: it needs neither a rename nor a lock (docs/storage.md has its failure table). The records of a thousand whole
units in a row become a chapter (manifests/run/chapters.py); a later generation in `units/` is newer than it.

Nobody else composes or takes apart the name of a record.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from autolabel.manifests import storage
from autolabel.manifests.run.chapters import Chapter, Span, Totals, chapters_of
from autolabel.manifests.tables import BadTable

UNITS = "units"  # the folder of the records in a run
_RECORD = re.compile(r"(.+)\.(0|[1-9][0-9]{0,8})\.parquet", re.DOTALL)


@dataclass(frozen=True)
class Commit:
    """The newest record of a unit, as somebody has seen it.

    run: the folder of the run. chapter: its place in a chapter, None for a record in `units/`.
    """

    run: Path
    unit: str
    generation: int
    chapter: Span | None = None

    @property
    def path(self) -> Path:
        """The file that holds the record."""
        return self.chapter.path if self.chapter else record_path(self.run, self.unit, self.generation)

    def read(self) -> bytes:
        """The bytes of the record. Raises FileNotFoundError, or ChangedFile, if another one has taken its place."""
        return self.chapter.read() if self.chapter else storage.read(self.path)


class Overtaken(Exception):
    """Another writer has committed a unit that this one was at. `commit` is the record that stands."""

    def __init__(self, commit: Commit) -> None:
        super().__init__(f"another process has committed unit {commit.unit}")
        self.commit = commit


class Ledger(Mapping[str, Commit]):
    """The newest record of every unit of a run, by the unit's name, as they were when the folders were listed.

    chapters: by number. damaged: the chapters that cannot be read, and why. strays: the files among the records whose
    names are none of a record. old: records that count no more, because newer ones or chapters are there.
    """

    def __init__(self, run: Path, *, only_whole: bool = True) -> None:
        """Raises BadTable for a damaged chapter, unless `only_whole` is False."""
        self.run = run
        self.strays: list[Path] = []
        self.old: list[Path] = []
        self.chapters: dict[int, Chapter] = {}
        self.damaged: dict[Path, BadTable] = {}
        self._newest: dict[str, int] = {}
        self._place: dict[str, tuple[Chapter, int]] = {}
        self._list_units()  # first: a record goes only after its chapter is there
        for number, path in chapters_of(run):
            try:
                self.chapters[number] = Chapter(path)
            except BadTable as error:
                if only_whole:
                    raise
                self.damaged[path] = error
                continue
            self._add(self.chapters[number])

    def _list_units(self) -> None:
        for path in storage.list(self.run / UNITS, suffix=".parquet"):
            name = _RECORD.fullmatch(path.name)
            if name is None:
                self.strays.append(path)
                continue
            unit, generation = name[1], int(name[2])
            newest = self._newest.setdefault(unit, generation)
            if newest != generation:
                self.old.append(record_path(self.run, unit, min(newest, generation)))
                self._newest[unit] = max(newest, generation)

    def _add(self, chapter: Chapter) -> None:
        for place, unit in enumerate(chapter.units):
            generation = self._newest.get(unit)
            if generation is not None and generation > chapter.generation(place):
                continue
            if generation is not None:
                self.old.append(record_path(self.run, unit, self._newest.pop(unit)))
            self._place[unit] = chapter, place

    def __getitem__(self, unit: str) -> Commit:
        if unit in self._newest:
            return Commit(self.run, unit, self._newest[unit])
        chapter, place = self._place[unit]
        return Commit(self.run, unit, chapter.generation(place), chapter.span(place))

    def __contains__(self, unit: object) -> bool:
        return unit in self._newest or unit in self._place

    def __iter__(self) -> Iterator[str]:
        return iter(sorted([*self._newest, *self._place]))

    def __len__(self) -> int:
        return len(self._newest) + len(self._place)

    def totals(self, unit: str) -> Totals | None:
        """The counts of a unit whose chapter vouches for them; None for all others."""
        if unit not in self._place:
            return None
        chapter, place = self._place[unit]
        return chapter.totals(place)

    def mark(self, number: int) -> str | None:
        """Return a mark of all newest records of a closed chapter's units; None for one that is not closed."""
        if number not in self.chapters:
            return None
        chapter = self.chapters[number]
        later = [(unit, self._newest[unit]) for unit in chapter.units if unit in self._newest]
        return hashlib.sha256(chapter.mark() + repr(later).encode()).hexdigest()


def record_path(run: Path, unit: str, generation: int) -> Path:
    """The file of a record."""
    return run / UNITS / f"{unit}.{generation}.parquet"


def find_commit(run: Path, unit: str) -> Commit | None:
    """The newest record of one unit, None without one. It lists the folder: a `Ledger` serves all units at once."""
    return Ledger(run).get(unit)


def read_newest(commit: Commit) -> tuple[Commit, bytes]:
    """The bytes of a record, or of the newer one that has taken its place since. Raises BadTable if there is none."""
    newest: Commit | None = commit
    while newest is not None:
        commit = newest
        try:
            return commit, commit.read()
        except (FileNotFoundError, storage.ChangedFile):
            newest = find_commit(commit.run, commit.unit)
            if newest == commit:
                break
    raise BadTable(f"{commit.path} is gone: `autolabel generate` labels its unit again")


def later_record(commit: Commit) -> Commit | None:
    """A record of this unit of a later generation, if there is one in `units/`."""
    name = re.compile(re.escape(commit.unit) + r"\.(0|[1-9][0-9]{0,8})\.parquet")
    found = (name.fullmatch(path.name) for path in storage.list(commit.run / UNITS, suffix=".parquet"))
    newest = max((int(one[1]) for one in found if one), default=0)
    return Commit(commit.run, commit.unit, newest) if newest > commit.generation else None


def create_record(run: Path, unit: str, data: bytes, *, before: Commit | None) -> Commit:
    """Commit a unit: create its record of the generation behind `before`, which is removed then.

    Raises Overtaken if another writer has committed the unit meanwhile. A lost reply is none: who finds his own bytes
    there has written them.
    """
    commit = Commit(run, unit, 0 if before is None else before.generation + 1)
    if not is_done(lambda: storage.create(commit.path, data), commit.path, data) and _content(commit.path) != data:
        raise Overtaken(find_commit(run, unit) or commit)
    if before is not None and before.chapter is None:
        with contextlib.suppress(OSError):  # the newest one counts, however many lie there
            storage.remove(before.path)
    return commit


def is_done(write: Callable[[], bool], path: Path, data: bytes) -> bool:
    """Call a conditional write, and return True if the data lies there, also where only the reply was lost."""
    try:
        return write()
    except (ConnectionError, TimeoutError):
        if _content(path) != data:
            raise
        return True


def _content(path: Path) -> bytes | None:
    try:
        return storage.read(path)
    except FileNotFoundError:
        return None
