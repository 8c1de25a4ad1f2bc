"""How a worker commits a unit: the shard of each layer or the label PNGs first, the record last.

Nothing is locked, and two workers may be at one unit: a machine that was given up as lost goes on computing. A shard is
created, or written over only in the version that this writer knows; the record is created. So one of two writers finds
the other one's record in its place. It is overtaken then: it puts back what it wrote over, and leaves the unit.
docs/storage.md says what happens if either dies between two steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import google_crc32c

from autolabel.manifests import storage
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.labels import in_layer, zarr_place
from autolabel.manifests.run.ledger import Commit, Overtaken, find_commit, is_done, later_record
from autolabel.manifests.run.shards import Frames, WrittenShard, shard_path, zarr_shard
from autolabel.manifests.tables import BadTable
from autolabel.pipeline.attempts import Attempt
from autolabel.pipeline.by_hand import write_maps
from autolabel.pipeline.records import RecordWriter, Row, read_record
from autolabel.pipeline.units import Unit

_TRIES = 20  # looks at a shard that others keep changing


class UnitWriter:
    """Commits one unit, as often as it grows. `commit` is its newest record."""

    def __init__(self, run: Run, unit: Unit, commit: Commit | None, write: RecordWriter) -> None:
        self.run, self.unit, self.commit, self._write_record = run, unit, commit, write
        self._known: dict[Path, storage.Stat | None] = {}  # the versions of the shards that this writer may write over
        self._replaced: list[tuple[Path, bytes, bytes]] = []  # shards of others: what was there, and what is
        if commit is not None and run.recipe.store == "zarr":
            self._known = {path: storage.stat(path) for path in map(self._shard_file, run.zarr_layers())}

    def _shard_file(self, layer: str) -> Path:
        """The shard of a layer; a link in its place is removed, as a repair leaves it to us."""
        array = storage.inside(self.run.path, in_layer(zarr_place(self.unit.bucket), layer))
        path = shard_path(array, self.unit.first_row // self.run.recipe.unit_size)
        if storage.is_link(path):
            storage.remove(path)
        return path

    def put(self, rows: Sequence[Row], maps: Sequence[Mapping[str, Frames]], *, last: bool) -> None:
        """Write a shard for each layer, then the record of the rows.

        maps: the encoded maps of every sample of the unit, in order, by layer. last: the unit is not put again.
        Raises Overtaken if another writer has committed the unit; what it had written is in its place then.
        """
        shards: dict[str, WrittenShard] = {}
        try:
            for layer in dict.fromkeys(layer for one in maps for layer in one):
                path = self._shard_file(layer)
                shard, data = zarr_shard(
                    path.parent, self.unit.first_row, shard_rows=self.run.recipe.unit_size,
                    labels=[one.get(layer) for one in maps],
                )  # fmt: skip
                self._put(path, data)
                self._known[path] = None if last else storage.stat(path)
                shards[layer] = shard
            self.commit = self._write_record(self.run, self.unit, rows, shards, self.commit)
        except Overtaken as overtaken:
            self._restore(overtaken.commit)
            raise

    def put_pngs(self, rows: Sequence[Row], maps: Mapping[str, Mapping[str, bytes]], attempt: Attempt) -> None:
        """Write the label PNGs of some samples, by sample id and layer, then the record of the rows.

        The PNGs are noted before, so that they are known to be the run's own.
        """
        placed = {row.sample_id: row for row in rows}
        if maps:
            attempt.writes({sample_id: placed[sample_id].label_crc32c or 0 for sample_id in maps})
        for sample_id, of_layers in maps.items():
            write_maps(self.run, placed[sample_id].label or "", of_layers, attempt.written.get(sample_id, ()))
        self.commit = self._write_record(self.run, self.unit, rows, {}, self.commit)
        # No shard has told of another writer, whose first record may have been removed since.
        if later := later_record(self.commit):
            raise Overtaken(later)

    def _put(self, path: Path, data: bytes) -> None:
        known = self._known.get(path)

        def write() -> bool:
            return storage.create(path, data) if known is None else storage.replace(path, data, unchanged=known)

        if not is_done(write, path, data):
            self._put_over(path, data)

    def _put_over(self, path: Path, data: bytes) -> None:
        """Write over a shard that is not the one this writer knows: its own, if a reply was lost, or somebody else's.

        A dead writer has left no record, and a live one none yet.
        """
        for _ in range(_TRIES):
            there = storage.stat(path)
            if there is None:
                if is_done(lambda: storage.create(path, data), path, data):
                    return
                continue
            try:
                before = storage.read_range(path, 0, there.size, unchanged=there)
            except (storage.ChangedFile, FileNotFoundError):
                continue
            if before == data:
                return
            newest = find_commit(self.run.path, self.unit.name)
            if newest is not None and (self.commit is None or newest.generation > self.commit.generation):
                raise Overtaken(newest)
            version = there
            if is_done(lambda: storage.replace(path, data, unchanged=version), path, data):  # noqa: B023 - called at once
                self._replaced.append((path, before, data))
                return
        raise OSError(f"{path} keeps changing while it is written: are two calls at work in {self.run.path}?")

    def _restore(self, winner: Commit) -> None:
        """Put back the shards of the winner that this writer wrote over before the winner's record was there."""
        if not self._replaced:
            return
        with contextlib.suppress(BadTable):
            shards = read_record(winner, ["sample_id"])[1]
            of = {self._shard_file(layer): shard for layer, shard in shards.items()}
            for path, before, mine in self._replaced:
                wanted = of.get(path)
                if wanted is None or (len(before), google_crc32c.value(before)) != (wanted["bytes"], wanted["crc32c"]):
                    continue
                there = storage.stat(path)
                if there is not None and storage.read(path) == mine:
                    storage.replace(path, before, unchanged=there)
