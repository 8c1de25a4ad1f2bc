"""Samples, and the manifests that list them.

A manifest is a parquet table with one row per sample. What holds for all samples is JSON in the parquet key-value
metadata: schema version, label space, roots, and provenance, which names the runs that made automatic labels. Image and
label paths are relative to a root; roots and runs are relative to the manifest's own folder wherever they share one, so
that a folder can be moved as a whole.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from autolabel.manifests import storage
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.locations import common, location
from autolabel.manifests.metadata import CORRECTS, METADATA_KEY, metadata_bytes, parse_metadata
from autolabel.manifests.schemas import LABEL_IDS, MANIFEST_SCHEMA, ROWS_AT_ONCE, SOURCES
from autolabel.manifests.tables import BadTable, TableWriter, parts_of, read_metadata, read_pieces, writing_table
from autolabel.manifests.wording import Shown, Table


@dataclass(frozen=True)
class Sample:
    """One image and its labels; paths are absolute. docs/words-and-files.md describes every field of a manifest.

    run: the folder of the run that made the label, None for a label that people made. It is no column of a manifest:
    the provenance names the runs, and a label belongs to the run whose folder holds it.
    """

    sample_id: str
    image: Path
    height: int
    width: int
    split: str = ""
    group: str = ""
    source: str = "none"
    label: Path | None = None
    label_index: int | None = None
    label_ids: str = "train"
    coarse_label: Path | None = None
    weight: float = 1.0
    run: Path | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Source and id: what tells a sample from the others of its manifest."""
        return (self.source, self.sample_id)

    @property
    def readable(self) -> bool:
        """False when the image's header could not be read at scan time (its size is then recorded as 0 x 0)."""
        return self.height > 0


@dataclass(frozen=True)
class Manifest(Shown):
    """Samples of one label space, and where they came from. Raises ValueError for samples that contradict each other.

    `image_root` and `label_root` are absolute folders that hold all images and all labels.
    """

    label_space: LabelSpace
    samples: tuple[Sample, ...]
    image_root: Path
    label_root: Path
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = repeated({key: n for key, n in Counter(s.key for s in self.samples).items() if n > 1})
        for name, values in (("source", SOURCES), ("label_ids", LABEL_IDS)):
            wrong = wrong or unknown(name, {getattr(s, name) for s in self.samples}, values)
        if wrong:
            raise ValueError(wrong)

    @classmethod
    def of(
        cls, space: LabelSpace, samples: tuple[Sample, ...], *, provenance: Mapping[str, Any] | None = None
    ) -> Manifest:
        """A manifest whose roots are the deepest folders that hold all its images, and all its labels."""
        image_root = common_root((s.image for s in samples), fallback=Path.cwd())
        labels = (path for s in samples for path in (s.label, s.coarse_label) if path is not None)
        return cls(space, samples, image_root, common_root(labels, fallback=image_root), dict(provenance or {}))

    @cached_property
    def labelled(self) -> tuple[Sample, ...]:
        """The samples that have a label and a readable image: a network can be trained or scored on them."""
        return tuple(s for s in self.samples if s.label is not None and s.readable)

    @property
    def runs(self) -> tuple[Path, ...]:
        """The folders of the runs that made labels of this manifest."""
        return tuple(dict.fromkeys(s.run for s in self.samples if s.run is not None))

    @property
    def corrects(self) -> tuple[Path, ...]:
        """The folders of the runs whose labels people have corrected: their teachers still speak in most pixels."""
        return tuple(map(location, self.provenance.get(CORRECTS, ())))

    def lines(self) -> list[str]:
        """Size, classes and roots for a terminal; `tables` has the samples."""
        return [
            f"{len(self.samples)} samples, label space {self.label_space.name!r}",
            f"  classes     {', '.join(self.label_space.names)}",
            f"  image root  {self.image_root}",
            f"  label root  {self.label_root}",
            *(f"  corrects    {run}" for run in self.corrects),
        ]

    def tables(self) -> list[Table]:
        """One table: the samples counted by split and source."""
        rows = []
        for split, source in sorted({(s.split, s.source) for s in self.samples}):
            members = [s for s in self.samples if (s.split, s.source) == (split, source)]
            sizes = [f"{width} x {height}" for width, height in sorted({(s.width, s.height) for s in members})]
            weights = list(dict.fromkeys(f"{weight:g}" for weight in sorted({s.weight for s in members})))
            groups = len({s.group for s in members})
            first = members[0].sample_id
            rows.append([split or "–", source, str(len(members)), str(groups), _span(sizes), _span(weights), first])
        header = ["split", "source", "samples", "groups", "size", "weight", "first id"]
        return [Table("samples", header, rows)]


def repeated(counts: Mapping[tuple[str, str], int]) -> str:
    """The objection to sources and ids that several samples of a manifest have, empty if there are none."""
    for (source, sample_id), count in counts.items():
        more = f", and {len(counts) - 1} more are too" if len(counts) > 1 else ""
        return f"sample {sample_id!r} ({source}) is listed {count} times{more}: every sample may appear once"
    return ""


def unknown(column: str, found: set[str], known: Sequence[str]) -> str:
    """The objection to values of a column that are none of those known, empty if all are."""
    others = sorted(found - set(known))
    text = column.replace("_", " ")
    return f"unknown {text} {others[0]!r}: expected one of {', '.join(known)}" if others else ""


def _span(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else f"{values[0]} … {values[-1]}"


def common_root(paths: Iterable[Path], *, fallback: Path) -> Path:
    """The deepest folder that holds all of `paths`; `fallback` if there are none."""
    folders = {p.parent for p in paths}
    return common(folders) if folders else fallback


# --- writing ----------------------------------------------------------------------------------------------------------


def save_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest as parquet, whole or not at all."""
    roots = {"image_root": manifest.image_root, "label_root": manifest.label_root}
    with writing_manifest(
        path, manifest.label_space, **roots, provenance=manifest.provenance, runs=manifest.runs
    ) as write:
        write(manifest.samples)


@contextlib.contextmanager
def writing_manifest(
    path: Path,
    space: LabelSpace,
    *,
    image_root: Path,
    label_root: Path,
    provenance: Mapping[str, Any] | None = None,
    runs: Sequence[Path] = (),
) -> Iterator[Callable[[Sequence[Sample]], None]]:
    """Give a function that adds samples to a manifest. It appears at `path` when all are written, or not at all.

    runs: the folders of the runs whose labels are written. The function raises ValueError for a path outside its root.
    """
    header = metadata_bytes(
        path, space=space, image_root=image_root, label_root=label_root, provenance=provenance or {}, runs=runs
    )
    with writing_rows(path, header) as add:

        def write(samples: Sequence[Sample]) -> None:
            for first in range(0, len(samples), ROWS_AT_ONCE):
                add(rows_of(samples[first : first + ROWS_AT_ONCE], image_root=image_root, label_root=label_root))

        yield write


def rows_of(samples: Iterable[Sample], *, image_root: Path, label_root: Path) -> pa.Table:
    """The rows of a manifest. Raises ValueError for a path outside its root, or that reading would refuse."""
    paths = {"image": image_root, "label": label_root, "coarse_label": label_root}
    rows = [{name: getattr(sample, name) for name in MANIFEST_SCHEMA.names} for sample in samples]
    for row in rows:
        for column, root in ((name, root) for name, root in paths.items() if row[name] is not None):
            row[column] = row[column].relative_to(root).as_posix()
            storage.under(root, row[column])
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)


@contextlib.contextmanager
def writing_rows(path: Path, header: bytes) -> Iterator[TableWriter]:
    """Give what adds tables of MANIFEST_SCHEMA, with paths below their roots, to a manifest; header: `metadata_bytes`.

    A path may be that of a part, which is then a manifest itself.
    """
    with writing_table(path, MANIFEST_SCHEMA.with_metadata({METADATA_KEY: header})) as add:
        yield add


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ManifestFile:
    """A manifest on disk: what holds for all its samples, and the samples piece by piece, however many there are."""

    path: Path
    label_space: LabelSpace
    image_root: Path
    label_root: Path
    provenance: dict[str, Any]
    runs: tuple[Path, ...]

    def tables(self, columns: Sequence[str] = ()) -> Iterator[pa.Table]:
        """The samples in order, as tables of MANIFEST_SCHEMA, or of some of its `columns`.

        Raises BadTable, also where a path leaves its root.
        """
        roots = {"image": self.image_root, "label": self.label_root, "coarse_label": self.label_root}
        schema = pa.schema([MANIFEST_SCHEMA.field(name) for name in columns or MANIFEST_SCHEMA.names])
        for table in read_pieces(self.path, schema):
            for column, root in ((name, root) for name, root in roots.items() if name in schema.names):
                leaving = table[column].filter(pc.match_substring_regex(table[column], storage.LEAVING))
                if len(leaving):
                    raise BadTable(f"{self.path}: path {leaving[0].as_py()!r} leaves its root {root}")
            yield table

    def samples(self) -> Iterator[Sample]:
        """The samples in order. Raises BadTable."""
        for table in self.tables():
            yield from self.samples_of(table)

    def find(self, sample_ids: Collection[str]) -> dict[str, Sample]:
        """The samples with these ids, by id; the others are read, but not kept. Raises BadTable."""
        ids = pa.array(list(sample_ids), pa.string())
        parts = (table.filter(pc.is_in(table["sample_id"], ids)) for table in self.tables())
        return {s.sample_id: s for part in parts for s in self.samples_of(part)}

    def samples_of(self, table: pa.Table) -> list[Sample]:
        """Rows of its tables as samples."""
        return samples_of(table, image_root=self.image_root, label_root=self.label_root, runs=self.runs)


def open_manifest(path: str | Path) -> ManifestFile:
    """Read what holds for all samples of a manifest. Raises BadTable, also for a folder."""
    path = location(path)
    first = next(iter(parts_of(path)), path)  # every part is a manifest itself
    if first == path and storage.is_folder(path):
        of_run = path / "manifest.parquet"
        advice = f"this run's is {of_run}" if storage.exists(of_run) else f"`autolabel manifest scan {path}` makes one"
        raise BadTable(f"{path} is a folder: expected a manifest; {advice}")
    header = parse_metadata(first, read_metadata(first, MANIFEST_SCHEMA))
    return ManifestFile(path, *header)


def load_manifest(path: str | Path) -> Manifest:
    """Read a manifest as samples with absolute paths. Raises BadTable."""
    file = open_manifest(path)
    try:
        return Manifest(file.label_space, tuple(file.samples()), file.image_root, file.label_root, file.provenance)
    except BadTable:
        raise
    except ValueError as error:
        raise BadTable(f"{path}: {error}") from error


def samples_of(
    table: pa.Table | pa.RecordBatch, *, image_root: Path, label_root: Path, runs: Sequence[Path] = ()
) -> list[Sample]:
    """The rows of a manifest, or of some of its columns, as samples with absolute paths.

    Raises ValueError for a path that leaves its root.
    """

    def under(root: Path, name: str | None) -> Path | None:
        return None if name is None else _under(root, name)

    inside = labels_inside(label_root, runs)

    def run_of(label: str | None) -> Path | None:
        return None if label is None else next((run for start, run in inside if label.startswith(start)), None)

    return [
        Sample(
            **{
                **row,
                "image": _under(image_root, row["image"]),
                "label": under(label_root, row.get("label")),
                "coarse_label": under(label_root, row["coarse_label"]),
                "run": run_of(row.get("label")),
            }
        )
        for row in table.to_pylist()
    ]


def _under(root: Path, name: str) -> Path:
    """Join as `storage.under` does; a name that no file can have costs its sample alone, when that is read."""
    return root / name if re.search(storage.NAMELESS, name) else storage.under(root, name)


def labels_inside(label_root: Path, runs: Sequence[Path]) -> list[tuple[str, Path]]:
    """Every run with the beginning of the paths, relative to `label_root`, that lie inside; the deepest run first."""
    inside = []
    for run in sorted(runs, key=lambda run: -len(run.parts)):
        if label_root.is_relative_to(run):
            inside.append(("", run))
        elif run.is_relative_to(label_root):
            inside.append((f"{run.relative_to(label_root).as_posix()}/", run))
    return inside


def in_pieces(samples: Iterable[Sample], size: int = 4096) -> Iterator[list[Sample]]:
    """The samples as lists of `size`, the last one shorter."""
    remaining = iter(samples)
    while piece := list(islice(remaining, size)):
        yield piece


def fingerprints(samples: Sequence[Sample]) -> list[str]:
    """Content fingerprint of every sample's image, in order. Raises BadTable naming the first image that is gone."""

    def one(sample: Sample) -> str:
        try:
            return storage.fingerprint(sample.image)
        except OSError as error:
            raise BadTable(f"image {sample.image} of sample {sample.sample_id!r}: {error.strerror}") from error

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, samples))
