"""The metadata of a manifest: what holds for all its samples, as JSON in the parquet key-value metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from autolabel.manifests.documents import BadDocument, PathText, json_of, shaped
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.locations import joined, location, relative
from autolabel.manifests.schemas import SCHEMA_VERSION
from autolabel.manifests.tables import BadTable

METADATA_KEY = b"autolabel"
CORRECTS = "corrects"  # key of a provenance: the folders of the runs whose labels people have corrected, as texts


@dataclass(frozen=True)
class _Stored:
    """The keys of the metadata. docs/words-and-files.md describes them."""

    kind: str
    schema_version: int
    label_space: dict[str, Any]
    image_root: PathText
    label_root: PathText
    provenance: dict[str, Any]


class ManifestMetadata(NamedTuple):
    """Label space, absolute roots, provenance, and the absolute folders of the runs that made labels."""

    label_space: LabelSpace
    image_root: Path
    label_root: Path
    provenance: dict[str, Any]
    runs: tuple[Path, ...]


def metadata_bytes(
    path: Path,
    *,
    space: LabelSpace,
    image_root: Path,
    label_root: Path,
    provenance: Mapping[str, Any],
    runs: Sequence[Path],
) -> bytes:
    """The metadata of a manifest that is to be written at `path`; roots and runs become relative to its folder."""
    base = path.absolute().parent
    named = {"runs": [relative(run, base) for run in runs]} if runs else {}
    if CORRECTS in provenance:
        named[CORRECTS] = [relative(location(run), base) for run in provenance[CORRECTS]]
    header = {
        "kind": "manifest",
        "schema_version": SCHEMA_VERSION,
        "label_space": space.to_dict(),
        "image_root": relative(image_root, base),
        "label_root": relative(label_root, base),
        "provenance": {**provenance, **named},
    }
    return json.dumps(header).encode()


def parse_metadata(path: Path, metadata: Mapping[bytes, bytes]) -> ManifestMetadata:
    """Read the metadata of the manifest at `path`. Raises BadTable, naming the key."""
    where = f"{path}: its metadata"
    raw = metadata.get(METADATA_KEY)
    if raw is None:
        raise BadTable(_without_metadata(path))
    try:
        document = json_of(raw, dict[str, Any], name=where)
        if document.get("kind") != "manifest":
            raise BadTable(f"{path} is a parquet file, but not a manifest: make one with `autolabel manifest scan`")
        version = document.get("schema_version")
        if version != SCHEMA_VERSION:
            raise BadTable(f"{path} has schema version {version!r}: this program knows {SCHEMA_VERSION}")
        stored: _Stored = shaped(_Stored, document, where)
        space = LabelSpace.of(stored.label_space, where=f"{where}, 'label_space'")
        named = shaped(list[PathText], stored.provenance.pop("runs", []), f"{where}, 'provenance', 'runs'")
        corrected = shaped(list[PathText], stored.provenance.get(CORRECTS, []), f"{where}, 'provenance', {CORRECTS!r}")
    except BadDocument as error:
        raise BadTable(str(error)) from error
    base = path.absolute().parent
    try:
        image_root, label_root, *runs = (joined(base, name) for name in (stored.image_root, stored.label_root, *named))
        if corrected:
            stored.provenance[CORRECTS] = [str(joined(base, run)) for run in corrected]
    except ValueError as error:
        raise BadTable(f"{where}: {error}") from error
    return ManifestMetadata(space, image_root, label_root, stored.provenance, tuple(runs))


def _without_metadata(path: Path) -> str:
    """The way to put back what pandas leaves out, for somebody who has filtered a manifest with it."""
    name = str(path)
    return (
        f"{name} has the columns of a manifest, but not its metadata with classes and folders, which pandas leaves out:"
        " put back that of the manifest it was made from, in the same folder. In Python: import pyarrow.parquet as pq;"
        " about = pq.read_schema('THE ORIGINAL').metadata[b'autolabel'];"
        f" pq.write_table(pq.read_table({name!r}).replace_schema_metadata({{b'autolabel': about}}), {name!r})"
    )
