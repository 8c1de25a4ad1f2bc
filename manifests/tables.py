"""Manifests and statistics: parquet tables with a fixed schema.

A manifest lists samples. What holds for all of them (schema version, label space, roots, where it came from) is JSON
in the parquet key-value metadata. Paths are relative to a root, and the root is relative to the manifest's own folder
wherever they share one, so that a folder can be moved as a whole.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from autolabel.manifests.files import fingerprint, writing
from autolabel.manifests.label_space import LabelSpace

SCHEMA_VERSION = 1
ROWS_AT_ONCE = 16_384  # of a manifest in memory, and in one of its row groups
_METADATA_KEY = b"autolabel"
_ABOUT = ("schema_version", "label_space", "image_root", "label_root", "provenance")
SOURCES = ("fine", "coarse", "auto", "none")
LABEL_IDS = ("train", "source")  # what a label file holds
# What can become of a pixel of the teacher's; pipeline/rules.py decides.
FATES = ("kept", "below_threshold", "near_boundary", "in_small_piece", "outside_area", "decided_by_human")
CONFIDENCE_BINS = 20  # equal bins over (0, 1]; bin k holds k/20 < p <= (k+1)/20

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("image", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("label_index", pa.int64()),
        pa.field("label_ids", pa.string(), nullable=False),
        pa.field("coarse_label", pa.string()),
        pa.field("weight", pa.float32(), nullable=False),
    ]
)

IMAGES_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("unit", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("labelled_pixels", pa.int64()),
        ("ignored_fraction", pa.float64()),
        ("mean_confidence", pa.float64()),
        ("agreement_with_coarse", pa.float64()),
        ("coarse_pixels", pa.int64()),
        ("label_crc32c", pa.uint32()),
        ("label_bytes", pa.int64()),
        ("decode_ms", pa.float32()),
        ("infer_ms", pa.float32()),
        ("encode_ms", pa.float32()),
        ("worker", pa.string()),
    ]
)
CLASSES_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("class_id", pa.int32()),
        ("class_name", pa.string()),
        ("pixels", pa.int64()),
        ("fraction", pa.float64()),
        ("mean_confidence", pa.float64()),
        ("confidence_hist", pa.list_(pa.int64(), CONFIDENCE_BINS)),
        ("coarse_pixels", pa.int64()),
        ("agreeing_pixels", pa.int64()),
        ("contradicted_pixels", pa.int64()),
        ("undrawn_pixels", pa.int64()),
        *((f"{fate}_pixels", pa.int64()) for fate in FATES),
        ("from_human_pixels", pa.int64()),
    ]
)
CENTROIDS_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("class_id", pa.int32()),
        ("tile_y", pa.int32()),
        ("tile_x", pa.int32()),
        ("y", pa.float32()),
        ("x", pa.float32()),
        ("pixels", pa.int64()),
    ]
)
REVIEW_SCHEMA = pa.schema(
    [
        ("rank", pa.int64()),
        ("sample_id", pa.string()),
        ("trust", pa.float64()),
        ("agreement_with_coarse", pa.float64()),
        ("disagreement", pa.float64()),
        ("mean_confidence", pa.float64()),
        ("ignored_fraction", pa.float64()),
        ("worst_class", pa.string()),
    ]
)
QUARANTINE_SCHEMA = pa.schema([("sample_id", pa.string()), ("image", pa.string()), ("reason", pa.string())])
STATISTICS = {
    "images": IMAGES_SCHEMA,
    "classes": CLASSES_SCHEMA,
    "centroids": CENTROIDS_SCHEMA,
    "review": REVIEW_SCHEMA,  # follows from images and classes: manifests/run/review.py
}


class BadTable(ValueError):
    """A parquet file is missing, damaged, or not of the expected kind."""


@dataclass(frozen=True)
class Sample:
    """One image with what is known about it; paths are absolute. See docs/words-and-files.md for every field."""

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


@contextlib.contextmanager
def writing_table(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """A function that adds rows to a parquet file, which appears when all are written, or not at all."""
    with writing(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        waiting: list[pa.Table] = []  # small pieces become one row group

        def add(rows: pa.Table) -> None:
            waiting.append(rows)
            if sum(map(len, waiting)) >= ROWS_AT_ONCE:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()

        yield add
        if waiting:
            writer.write_table(pa.concat_tables(waiting))


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a parquet file that has the columns of `schema`. Raises BadTable."""
    file = _open_table(path, schema)
    try:
        table = file.read(columns=schema.names)
    except (pa.ArrowException, OSError) as error:
        raise BadTable(f"{path} is not a readable parquet file ({type(error).__name__})") from error
    return _as_expected(path, table, schema).replace_schema_metadata(file.schema_arrow.metadata)


def _pieces(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """`read_table`, at most ROWS_AT_ONCE rows at a time."""
    file = _open_table(path, schema)
    try:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=schema.names):
            yield _as_expected(path, pa.Table.from_batches([batch]), schema)
    except (pa.ArrowException, OSError) as error:
        raise BadTable(f"{path} is not a readable parquet file ({type(error).__name__})") from error


def _open_table(path: Path, schema: pa.Schema) -> pq.ParquetFile:
    if not path.is_file():
        raise BadTable(f"{path} does not exist")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise BadTable(f"{path} is not a readable parquet file ({type(error).__name__})") from error
    missing = [name for name in schema.names if name not in file.schema_arrow.names]
    if missing:
        raise BadTable(f"{path} lacks the columns {', '.join(missing)}: it is not the expected table")
    return file


def _as_expected(path: Path, table: pa.Table, schema: pa.Schema) -> pa.Table:
    try:
        return table.select(schema.names).cast(schema)
    except ValueError as error:  # another type, or null where there must be a value
        raise BadTable(f"{path} is not the expected table: {error}") from error


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
        for table in _pieces(self.path, MANIFEST_SCHEMA):
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
    file = _open_table(path, MANIFEST_SCHEMA)
    about = _about(path, file.schema_arrow.metadata)
    try:
        space = LabelSpace.of(about["label_space"])
    except ValueError as error:
        raise BadTable(f"{path}: {error}") from error
    return ManifestFile(path, space, Path(about["image_root"]), Path(about["label_root"]), about["provenance"])


def read_manifest(path: str | Path) -> pa.Table:
    """A manifest as a pyarrow.Table; the roots in its metadata are made absolute. Raises BadTable."""
    path = Path(path)
    table = read_table(path, MANIFEST_SCHEMA)
    about = _about(path, table.schema.metadata)
    return table.replace_schema_metadata({_METADATA_KEY: json.dumps(about).encode()})


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


def _refuse_shared(a: str, b: str, theirs: dict[str, Sample], prints: dict[str, Sample], advice: str) -> None:
    shared = sorted(theirs.keys() & prints.keys(), key=lambda f: theirs[f].sample_id)
    if shared:
        first = theirs[shared[0]]
        raise ValueError(
            f"{len(shared)} images are in both {a} and {b} (same content; the first is {first.sample_id!r}): {advice}"
        )


def fuse(
    named: Sequence[tuple[str, Manifest]], weights: dict[str, float], leak_check: tuple[str, Manifest] | None
) -> Manifest:
    """Join labelled samples of several manifests. `weights` replaces the weight of a whole source ("auto": 0.5).

    Raises ValueError for different label spaces, an image that is there twice (by content, not by name), or one that
    is also in the manifest of `leak_check`.
    """
    (first_name, first), *rest = named
    for name, manifest in [*rest, *([leak_check] if leak_check else [])]:
        if manifest.label_space != first.label_space:
            raise ValueError(
                f"{name} uses label space {manifest.label_space.name!r} ({len(manifest.label_space)} classes) but"
                f" {first_name} {first.label_space.name!r} ({len(first.label_space)}): fuse only one label space"
            )
    seen: list[tuple[str, dict[str, Sample]]] = []
    for name, manifest in named:
        prints: dict[str, Sample] = {}
        for sample, mark in zip(manifest.labelled, fingerprints(manifest.labelled), strict=True):
            if mark in prints:
                raise ValueError(
                    f"{name}: {prints[mark].sample_id!r} and {sample.sample_id!r} are the same image (same content):"
                    " leave one of them out"
                )
            prints[mark] = sample
        for other, theirs in seen:
            _refuse_shared(other, name, theirs, prints, "leave them out of one manifest")
        seen.append((name, prints))
    if leak_check:
        name, manifest = leak_check
        held_out = dict(zip(fingerprints(manifest.samples), manifest.samples, strict=True))
        for other, theirs in seen:
            _refuse_shared(other, name, theirs, held_out, "a network trained on them cannot be scored on them")
    samples = tuple(
        replace(s, weight=weights.get(s.source, s.weight)) for _, manifest in named for s in manifest.labelled
    )
    return with_roots(
        first.label_space,
        samples,
        {"fused": [name for name, _ in named], "weights": weights, "leak_check": leak_check[0] if leak_check else None},
    )


def with_roots(space: LabelSpace, samples: tuple[Sample, ...], provenance: dict[str, Any]) -> Manifest:
    """A manifest whose roots are the deepest folders that hold all its images, and all its labels."""
    image_root = common_root((s.image for s in samples), Path.cwd())
    labels = (path for s in samples for path in (s.label, s.coarse_label) if path is not None)
    return Manifest(space, samples, image_root, common_root(labels, image_root), provenance)


def read_statistics(run: str | Path, table: str = "images") -> pa.Table:
    """One of a run's statistics tables ("images", "classes", "centroids" or "review"). Raises BadTable."""
    return read_table(_statistics(run, table), STATISTICS[table])


def stream_statistics(run: str | Path, table: str, columns: Sequence[str] = ()) -> Iterator[pa.Table]:
    """The same piece by piece, however many rows there are; some columns or all. Raises BadTable."""
    schema = STATISTICS[table]
    yield from _pieces(_statistics(run, table), pa.schema([schema.field(name) for name in columns or schema.names]))


def _statistics(run: str | Path, table: str) -> Path:
    if table not in STATISTICS:
        raise ValueError(f"no statistics table {table!r}: expected one of {', '.join(STATISTICS)}")
    path = Path(run) / "stats" / f"{table}.parquet"
    if not path.is_file():
        raise BadTable(f"{path} does not exist: finish the run first with `autolabel generate`")
    return path
