"""A manifest on disk of which some samples count, however many there are: eleven bytes each are in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.locations import common
from autolabel.manifests.marks import Mask, Rows, listed_twice
from autolabel.manifests.samples import Sample, labels_inside, open_manifest, repeated, rows_of, unknown
from autolabel.manifests.schemas import LABEL_IDS, MANIFEST_SCHEMA, ROWS_AT_ONCE, SOURCES
from autolabel.manifests.tables import BadTable, parts_of

_PATHS = ("image", "label", "coarse_label")
_ODD = r"(^|/)\.?(/|$)|\x00"  # paths that are written in another way than they are read, or refused


class SiftedManifest:
    """The samples of a manifest on disk, less those that were left out. Raises BadTable as `load_manifest`.

    Every pass reads the file anew, and raises BadTable if it has changed.
    """

    def __init__(self, path: str | Path) -> None:
        self.name, self.file = str(path), open_manifest(path)
        self._state = self._stat()
        self.listed = sum(len(table) for table in self.file.tables(("height",)))
        self._live = np.ones(self.listed, np.bool_)
        self._sources, self._labelled = np.empty(self.listed, np.uint8), np.empty(self.listed, np.bool_)
        sources, ids = set[str](), set[str]()
        first = 0
        for table in self.tables():
            here = slice(first, first := first + len(table))
            sources.update(pc.unique(table["source"]).to_pylist())
            ids.update(pc.unique(table["label_ids"]).to_pylist())
            places = pc.fill_null(pc.index_in(table["source"], pa.array(SOURCES)), len(SOURCES))
            self._sources[here] = places.to_numpy()
            self._labelled[here] = pc.and_(pc.is_valid(table["label"]), pc.greater(table["height"], 0)).to_numpy()
        wrong = repeated(listed_twice(self)) or unknown("source", sources, SOURCES)
        if wrong := wrong or unknown("label_ids", ids, LABEL_IDS):
            raise BadTable(f"{self.file.path}: {wrong}")

    def _stat(self) -> list[storage.Stat | None]:
        return [storage.stat(part) for part in parts_of(self.file.path)]

    def __len__(self) -> int:
        return int(np.count_nonzero(self._live))

    @property
    def sources(self) -> NDArray[np.uint8]:
        """Places in SOURCES."""
        return self._sources[self._live]

    @property
    def labelled(self) -> Mask:
        """True for those that have a label and a readable image."""
        return self._labelled[self._live]

    def tables(self, columns: Sequence[str] = (), *, every: bool = False) -> Iterator[pa.Table]:
        """The samples as tables of MANIFEST_SCHEMA, or of some columns. every: those that were left out too."""
        first = 0
        for table in self.file.tables(columns):
            live = self._live[first : first + len(table)]
            first += len(table)
            if len(live) < len(table):
                break
            yield table if every or live.all() else table.filter(pa.array(live))
        if first != self.listed or self._stat() != self._state:
            raise BadTable(f"{self.file.path} was changed while it was read: do it again")

    def ids(self) -> Iterator[Sequence[str]]:
        """The sample ids, piece by piece."""
        for table in self.tables(("sample_id",)):
            yield table["sample_id"].to_pylist()

    def samples(self, rows: Rows | None = None) -> Iterator[Sample]:
        """All samples, or those of some rows, which ascend."""
        first = 0
        for table in self.tables():
            if rows is not None:
                here = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + len(table))] - first
                first += len(table)
                table = table.take(pa.array(here))
            yield from self.file.samples_of(table)

    def keep(self, mask: Mask) -> None:
        """Leave out all samples but some, of those that are left."""
        self._live[self._live] = mask

    def keep_of_all(self, mask: Mask) -> None:
        """Leave out all samples but some, which are given among those that were left out too."""
        self._live &= mask

    def runs_of_labels(self) -> list[Path]:
        """The runs that made labels, in the order of the first label of each."""
        found: dict[int, None] = {}
        for _, places in self.runs():
            found |= dict.fromkeys(places[np.sort(np.unique(places, return_index=True)[1])].tolist())
        return [self.file.runs[place] for place in found if place >= 0]

    def runs(self) -> Iterator[tuple[pa.Table, NDArray[np.int16]]]:
        """Ids and labels, with the place in `file.runs` of the run that made each label; -1 for none."""
        inside = labels_inside(self.file.label_root, self.file.runs)
        for table in self.tables(("sample_id", "label")):
            places = np.full(len(table), -1, np.int16)
            for start, run in reversed(inside):  # the deepest run last
                made = pc.fill_null(pc.starts_with(table["label"], start), False)
                places[made.to_numpy()] = self.file.runs.index(run)
            yield table, places


def roots_of(parts: Sequence[SiftedManifest]) -> tuple[Path, Path]:
    """The deepest folders that hold all images, and all labels, as `Manifest.of` finds them."""
    images: set[Path] = set()
    labels: set[Path] = set()
    for part in parts:
        roots = {"image": part.file.image_root, "label": part.file.label_root, "coarse_label": part.file.label_root}
        for table in part.tables(_PATHS):
            for column, root in roots.items():
                found = images if column == "image" else labels
                names = pc.unique(table[column].combine_chunks()).drop_null()
                if _plain(names):
                    folders = pc.unique(pc.replace_substring_regex(names, r"/?[^/]*$", "")).to_pylist()
                    found.update(root / folder for folder in folders)
                else:
                    found.update((root / name).parent for name in names.to_pylist())
            for found in (images, labels):
                if len(found) > 1:
                    deepest = common(found)
                    found.clear()
                    found.add(deepest)
    image_root = common(images) if images else Path.cwd()
    return image_root, common(labels) if labels else image_root


def _plain(names: pa.Array | pa.ChunkedArray) -> bool:
    return not pc.any(pc.match_substring_regex(names, _ODD)).as_py()


def rewritten(
    parts: Sequence[SiftedManifest], image_root: Path, label_root: Path, weights: Mapping[str, float]
) -> Iterator[pa.Table]:
    """All samples as tables of ROWS_AT_ONCE rows, with paths below other roots, and with the weights of sources."""
    waiting: list[pa.Table] = []
    for part in parts:
        for table in part.tables():
            waiting.append(_moved(part, table, image_root, label_root, weights))
            if sum(map(len, waiting)) >= ROWS_AT_ONCE:
                rows = pa.concat_tables(waiting)
                yield rows.slice(0, ROWS_AT_ONCE).combine_chunks()
                waiting = [rows.slice(ROWS_AT_ONCE).combine_chunks()]
    if sum(map(len, waiting)):
        yield pa.concat_tables(waiting).combine_chunks()


def _moved(
    part: SiftedManifest, table: pa.Table, image_root: Path, label_root: Path, weights: Mapping[str, float]
) -> pa.Table:
    below = {"image": (part.file.image_root, image_root)}
    below |= dict.fromkeys(_PATHS[1:], (part.file.label_root, label_root))
    chained = all(old.is_relative_to(new) or new.is_relative_to(old) for old, new in below.values())
    if not chained or not all(_plain(table[column]) for column in _PATHS):
        samples = (replace(s, weight=weights.get(s.source, s.weight)) for s in part.file.samples_of(table))
        return rows_of(samples, image_root=image_root, label_root=label_root)
    for column, (old, new) in below.items():
        names = table[column].combine_chunks()
        if old.is_relative_to(new) and old != new:
            names = pc.binary_join_element_wise(f"{old.relative_to(new).as_posix()}/", names, "")
        elif old != new:
            names = pc.utf8_slice_codeunits(names, len(new.relative_to(old).as_posix()) + 1)
        table = table.set_column(MANIFEST_SCHEMA.get_field_index(column), MANIFEST_SCHEMA.field(column), names)
    for source, weight in weights.items():
        of_source = pc.equal(table["source"], source)
        values = pc.if_else(of_source, pa.scalar(weight, pa.float32()), table["weight"])
        table = table.set_column(MANIFEST_SCHEMA.get_field_index("weight"), MANIFEST_SCHEMA.field("weight"), values)
    return table.cast(MANIFEST_SCHEMA)
