"""The commit records of a run folder: which units are done, and where each one's record lies.

A record is the file `units/NAME.G.parquet`: unit NAME, generation G. It is created and never written over. The highest
generation of a unit is the truth, and older ones are removed after it is there. So one protocol serves a disk and a
bucket: it needs neither a rename nor a lock (docs/storage.md has its failure table).

Nobody else composes or takes apart the name of a record.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from autolabel.manifests import storage
from autolabel.manifests.tables import BadTable

UNITS = "units"  # the folder of the records in a run
_RECORD = re.compile(r"(.+)\.(0|[1-9][0-9]{0,8})\.parquet", re.DOTALL)


@dataclass(frozen=True)
class Commit:
    """The newest record of a unit, as somebody has seen it. run: the folder of the run."""

    run: Path
    unit: str
    generation: int

    @property
    def path(self) -> Path:
        """The file that holds the record."""
        return record_path(self.run, self.unit, self.generation)

    def read(self) -> bytes:
        """The bytes of the record. Raises FileNotFoundError if a newer one has taken its place."""
        return storage.read(self.path)


class Overtaken(Exception):
    """Another writer has committed a unit that this one was at. `commit` is the record that stands."""

    def __init__(self, commit: Commit) -> None:
        super().__init__(f"another process has committed unit {commit.unit}")
        self.commit = commit


class Ledger(Mapping[str, Commit]):
    """The newest record of every unit of a run, by the unit's name, as they were when the folder was listed.

    strays: the files among the records whose names are none of a record. old: records that newer ones have replaced.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.strays: list[Path] = []
        self.old: list[Path] = []
        self._newest: dict[str, int] = {}
        for path in storage.list(run / UNITS, suffix=".parquet"):
            name = _RECORD.fullmatch(path.name)
            if name is None:
                self.strays.append(path)
                continue
            unit, generation = name[1], int(name[2])
            newest = self._newest.setdefault(unit, generation)
            if newest != generation:
                self.old.append(record_path(run, unit, min(newest, generation)))
                self._newest[unit] = max(newest, generation)

    def __getitem__(self, unit: str) -> Commit:
        return Commit(self.run, unit, self._newest[unit])

    def __contains__(self, unit: object) -> bool:
        return unit in self._newest

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._newest))

    def __len__(self) -> int:
        return len(self._newest)


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
        except FileNotFoundError:
            newest = find_commit(commit.run, commit.unit)
            if newest == commit:
                break
    raise BadTable(f"{commit.path} is gone: `autolabel generate` labels its unit again")


def create_record(run: Path, unit: str, data: bytes, *, before: Commit | None) -> Commit:
    """Commit a unit: create its record of the generation behind `before`, which is removed then.

    Raises Overtaken if another writer has committed the unit meanwhile. A lost reply is none: who finds his own bytes
    there has written them.
    """
    commit = Commit(run, unit, 0 if before is None else before.generation + 1)
    created = False
    try:
        created = storage.create(commit.path, data)
    except (ConnectionError, TimeoutError):
        if _content(commit.path) != data:
            raise
        created = True
    if not created and _content(commit.path) != data:
        raise Overtaken(find_commit(run, unit) or commit)
    if before is not None:
        with contextlib.suppress(OSError):  # the newest one counts, however many lie there
            storage.remove(before.path)
    return commit


def _content(path: Path) -> bytes | None:
    try:
        return storage.read(path)
    except FileNotFoundError:
        return None
