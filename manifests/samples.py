"""Samples, and the manifests that list them.

A manifest is a parquet table with one row per sample. What holds for all of them (schema version, label space, roots,
where it came from) is JSON in the parquet key-value metadata. Paths are relative to a root, and the root is relative to
the manifest's own folder wherever they share one, so that a folder can be moved as a whole.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from autolabel.manifests.files import fingerprint
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.schemas import LABEL_IDS, MANIFEST_SCHEMA, ROWS_AT_ONCE, SCHEMA_VERSION, SOURCES
from autolabel.manifests.tables import BadTable, open_table, read_pieces, writing_table

_METADATA_KEY = b"autolabel"
_ABOUT = ("schema_version", "label_space", "image_root", "label_root", "provenance")


@dataclass(frozen=True)
class Sample:
    """One image with what is known about it; paths are absolute. See docs/design.md for every field."""

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

    @property
    def readable(self) -> bool:
        """False when the image's header could not be read at scan time (its size is then recorded as 0 x 0)."""
        return self.height > 0


@dataclass(frozen=True)
class Manifest:
    """Samples of one label space, and where they came from."""

    label_space: LabelSpace
    samples: tuple[Sample, ...]
    image_root: Path
    label_root: Path
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = Counter((s.source, s.sample_id) for s in self.samples)
        twice = [key for key, n in counts.items() if n > 1]
        if twice:
            source, sample_id = twice[0]
            raise ValueError(
                f"sample {sample_id!r} ({source}) is listed {counts[twice[0]]} times"
                f"{f', and {len(twice) - 1} more are too' if len(twice) > 1 else ''}: every sample may appear once"
            )
        strange = sorted({s.source for s in self.samples} - set(SOURCES))
        if strange:
            raise ValueError(f"unknown source {strange[0]!r}: expected one of {', '.join(SOURCES)}")
        strange = sorted({s.label_ids for s in self.samples} - set(LABEL_IDS))
        if strange:
            raise ValueError(f"unknown label ids {strange[0]!r}: expected one of {', '.join(LABEL_IDS)}")

    @property
    def labelled(self) -> tuple[Sample, ...]:
        """The samples that have a label and a readable image: what a network can be trained or scored on."""
        return tuple(s for s in self.samples if s.label is not None and s.readable)


def common_root(paths: Iterable[Path], fallback: Path) -> Path:
    """The deepest folder that holds all of `paths`."""
    folders = {str(p.parent) for p in paths}
    return Path(os.path.commonpath(folders)) if folders else fallback


def with_roots(space: LabelSpace, samples: tuple[Sample, ...], provenance: dict[str, Any]) -> Manifest:
    """A manifest whose roots are the deepest folders that hold all its images, and all its labels."""
    image_root = common_root((s.image for s in samples), Path.cwd())
    labels = (path for s in samples for path in (s.label, s.coarse_label) if path is not None)
    return Manifest(space, samples, image_root, common_root(labels, image_root), provenance)


def _relative(path: Path, base: Path) -> str:
    """`path` from `base` where they share more than the file system's root, else absolute."""
    shared = os.path.commonpath([path, base])
    return Path(os.path.relpath(path, base)).as_posix() if shared != path.anchor else path.as_posix()


def save_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest as parquet, whole or not at all."""
    roots = manifest.image_root, manifest.label_root
    with writing_manifest(path, manifest.label_space, *roots, manifest.provenance) as write:
        write(manifest.samples)


@contextlib.contextmanager
def writing_manifest(
    path: Path, space: LabelSpace, image_root: Path, label_root: Path, provenance: dict[str, Any]
) -> Iterator[Callable[[Sequence[Sample]], None]]:
    """A function that adds samples to a manifest, which appears at `path` when all are written, or not at all."""
    base = path.absolute().parent

    def under(root: Path, file: Path | None) -> str | None:
        return None if file is None else file.relative_to(root).as_posix()

    about = {
        "kind": "manifest",
        "schema_version": SCHEMA_VERSION,
        "label_space": json.loads(space.to_json()),
        "image_root": _relative(image_root, base),
        "label_root": _relative(label_root, base),
        "provenance": provenance,
    }
    schema = MANIFEST_SCHEMA.with_metadata({_METADATA_KEY: json.dumps(about).encode()})
    with writing_table(path, schema) as add:

        def write(samples: Sequence[Sample]) -> None:
            for first in range(0, len(samples), ROWS_AT_ONCE):
                rows = [
                    {
                        **{name: getattr(s, name) for name in MANIFEST_SCHEMA.names},
                        "image": under(image_root, s.image),
                        "label": under(label_root, s.label),
                        "coarse_label": under(label_root, s.coarse_label),
                    }
                    for s in samples[first : first + ROWS_AT_ONCE]
                ]
                add(pa.Table.from_pylist(rows, schema=schema))

        yield write


@dataclass(frozen=True)
class ManifestFile:
    """A manifest on disk: what holds for all its samples, and the samples piece by piece, however many there are."""

    path: Path
    label_space: LabelSpace
    image_root: Path
    label_root: Path
    provenance: dict[str, Any]

    def tables(self) -> Iterator[pa.Table]:
        """The samples in order, as tables of MANIFEST_SCHEMA. Raises BadTable, also where a path leaves its root."""
        for table in read_pieces(self.path, MANIFEST_SCHEMA):
            self._require_under(self.image_root, table["image"])
            self._require_under(self.label_root, table["label"])
            self._require_under(self.label_root, table["coarse_label"])
            yield table

    def find(self, sample_ids: Collection[str]) -> dict[str, Sample]:
        """These samples, by id; the others are read, but not kept. Raises BadTable."""
        ids = pa.array(list(sample_ids), pa.string())
        parts = (table.filter(pc.is_in(table["sample_id"], ids)) for table in self.tables())
        return {s.sample_id: s for part in parts for s in samples_of(part, self.image_root, self.label_root)}

    def _require_under(self, root: Path, paths: pa.ChunkedArray) -> None:
        leaving = paths.filter(pc.match_substring_regex(paths, r"^/|(^|/)\.\.(/|$)"))
        if len(leaving):
            raise BadTable(f"{self.path}: path {leaving[0].as_py()!r} leaves its root {root}")


def open_manifest(path: str | Path) -> ManifestFile:
    """What holds for all samples of a manifest. Raises BadTable."""
    path = Path(path)
    file = open_table(path, MANIFEST_SCHEMA)
    about = _about(path, file.schema_arrow.metadata)
    try:
        space = LabelSpace.of(about["label_space"])
    except ValueError as error:
        raise BadTable(f"{path}: {error}") from error
    return ManifestFile(path, space, Path(about["image_root"]), Path(about["label_root"]), about["provenance"])


def _about(path: Path, metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """The manifest's own metadata, its roots made absolute."""
    raw = (metadata or {}).get(_METADATA_KEY)
    try:
        about = dict(json.loads(raw)) if raw else {}
    except (ValueError, TypeError) as error:
        raise BadTable(f"{path} has damaged metadata: {error}") from error
    if about.get("kind") != "manifest":
        raise BadTable(f"{path} is a parquet file, but not a manifest: make one with `autolabel manifest scan`")
    missing = [key for key in _ABOUT if key not in about]
    if missing:
        raise BadTable(f"{path} has damaged metadata: no {', '.join(missing)}")
    if about["schema_version"] != SCHEMA_VERSION:
        raise BadTable(f"{path} has schema version {about['schema_version']}: this program knows {SCHEMA_VERSION}")
    for root in ("image_root", "label_root"):
        about[root] = os.path.normpath(path.absolute().parent / about[root])
    return about


def load_manifest(path: str | Path) -> Manifest:
    """A manifest as samples with absolute paths. Raises BadTable."""
    file = open_manifest(path)
    roots = file.image_root, file.label_root
    try:
        samples = tuple(sample for table in file.tables() for sample in samples_of(table, *roots))
        return Manifest(file.label_space, samples, *roots, file.provenance)
    except BadTable:
        raise
    except ValueError as error:
        raise BadTable(f"{path}: {error}") from error


def samples_of(table: pa.Table | pa.RecordBatch, image_root: Path, label_root: Path) -> list[Sample]:
    """The rows of a manifest, or of some of its columns, as samples with absolute paths."""

    def under(root: Path, relative: str | None) -> Path | None:
        return None if relative is None else root / relative

    return [
        Sample(
            **{
                **row,
                "image": image_root / row["image"],
                "label": under(label_root, row.get("label")),
                "coarse_label": under(label_root, row["coarse_label"]),
            }
        )
        for row in table.to_pylist()
    ]


def fingerprints(samples: Sequence[Sample]) -> list[str]:
    """Content fingerprint of every sample's image, in order. Raises BadTable naming the first image that is gone."""

    def one(sample: Sample) -> str:
        try:
            return fingerprint(sample.image)
        except OSError as error:
            raise BadTable(f"image {sample.image} of sample {sample.sample_id!r}: {error.strerror}") from error

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, samples))
