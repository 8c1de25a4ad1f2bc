"""Labels on their way back from Label Studio: the tasks of its JSON export with what people have painted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, shaped
from autolabel.manifests.formats import archive
from autolabel.manifests.formats.exchange import BadReturn, Returned
from autolabel.manifests.formats.naming import Unknown, shown_size, train_id
from autolabel.manifests.formats.polygons import fill
from autolabel.manifests.formats.run_lengths import counts_of_brush, paint, require_size
from autolabel.manifests.label_space import IGNORE, LabelSpace
from autolabel.manifests.large_json import LargeJson
from autolabel.manifests.run.shards import Label

_UPLOADED = re.compile(r"^(.*/)?upload/(.*/)?[0-9a-f]{8}-(?=[^/]+$)")  # what stands before an uploaded file's own name
# Regions of other tags; results without a shape, such as choices for the whole image, are no labels of pixels.
_SHAPES = re.compile(r"(rectangle|ellipse|keypoint|vector|bitmask|magicwand|cuboid|brush|polygon)?(labels)?")


def read(path: Path, space: LabelSpace) -> Iterator[Returned]:
    """Yield the labels of an export "JSON" of Label Studio: a file, or a folder or zip of such files.

    A task has its latest annotation that is complete. One that people have only skipped, or not looked at, is left out;
    predictions are read from tasks that have never been exported. Brush strokes and polygons are drawn, later ones over
    earlier ones. Regions of labels that the label space does not have are counted over all tasks; then BadReturn is
    raised. Raises BadReturn also for regions of other shapes, and for an image that stands in two tasks.
    """
    single = path.suffix.lower() == ".json" and storage.exists(path)
    seen: set[str] = set()
    unknown = Unknown(path, space, "region")
    with nullcontext(archive.of_file(path)) if single else archive.opened(path) as files:
        names = [path.name] if single else [n for n in files.names if n.endswith(".json") and n != "export.json"]
        if not names:
            raise BadReturn(f"{path} holds no JSON file: expected an export 'JSON' of Label Studio")
        for name in names:
            with files.reading(name, at_most=archive.MOST_JSON) as file:
                try:
                    yield from _labels(LargeJson(file, files.shown(name)), space, seen, unknown)
                except BadDocument as error:
                    raise BadReturn(str(error)) from error
    unknown.require_none()


def _labels(document: LargeJson, space: LabelSpace, seen: set[str], unknown: Unknown) -> Iterator[Returned]:
    for place, element in enumerate(document.elements("")):
        where = f"{document.name}, task {place + 1}"
        task = element.read(where)
        data = shaped(dict[str, Any], task.get("data"), f"{where}, 'data'")
        name = _name(data, where)
        if name in seen:
            raise BadReturn(f"{where}: image {name!r} stands in two tasks: which of the two is meant?")
        seen.add(name)
        result = _result(task, where)
        label = None if result is None else _label(result, data, space, where, unknown)
        if label is not None:
            yield Returned(name, label)
    if not isinstance(document.rest, list):
        raise BadReturn(f"{document.name} is no list of tasks: expected an export 'JSON' of Label Studio")


def _name(data: Mapping[str, Any], where: str) -> str:
    """The name of the image: our own key, else its address."""
    if isinstance(data.get("sample_id"), str):
        return archive.stem(data["sample_id"] + ".x")
    address = data.get("image") or next((v for v in data.values() if isinstance(v, str) and "/" in v), None)
    if not isinstance(address, str):
        raise BadReturn(f"{where} has no image: expected its address in 'data', 'image'")
    parts = urlsplit(address)
    local = parse_qs(parts.query).get("d", [])
    path = (local[0] if local else unquote(parts.path)).strip("/")
    stem = archive.stem(_UPLOADED.sub("", path)) if path else ""
    if not stem:
        raise BadReturn(f"{where}: the address {address[:60]!r} names no image")
    return stem


def _result(task: Mapping[str, Any], where: str) -> list[dict[str, Any]] | None:
    """The regions of the latest complete annotation, or prediction of a task to be imported; None if there is none."""
    kind = next((key for key in ("annotations", "predictions") if key in task), None)
    if kind is None:
        raise BadReturn(f"{where} has no annotations: expected an export 'JSON' of Label Studio, not 'JSON-MIN'")
    several = list[dict[str, Any]]
    complete = [one for one in shaped(several, task[kind], f"{where}, {kind!r}") if not one.get("was_cancelled")]
    latest = max(reversed(complete), key=_time, default=None)  # the last of equals
    return None if latest is None else shaped(several, latest.get("result") or [], f"{where}, 'result'")


def _time(annotation: Mapping[str, Any]) -> datetime:
    for key in ("updated_at", "created_at"):
        try:
            time = datetime.fromisoformat(str(annotation.get(key)))
            return time if time.tzinfo else time.replace(tzinfo=UTC)
        except ValueError:
            continue
    return datetime.min.replace(tzinfo=UTC)


def _label(
    result: list[dict[str, Any]], data: Mapping[str, Any], space: LabelSpace, where: str, unknown: Unknown
) -> Label | None:
    """(H, W) uint8 train ids; None if a region has an unknown label, or if nothing tells the size of the image."""
    size = data.get("height"), data.get("width")
    label = np.full(require_size(size, where), IGNORE, np.uint8) if all(type(n) is int for n in size) else None  # type: ignore[arg-type]
    complete = True
    for place, region in enumerate(result, 1):
        kind, at = str(region.get("type")), f"{where}, region {place}"
        if not _SHAPES.fullmatch(kind):
            continue
        value = shaped(dict[str, Any], region.get("value"), f"{at}, 'value'")
        if kind not in ("brushlabels", "polygonlabels"):
            raise BadReturn(f"{at} is of type {kind!r}: expected brush labels or polygon labels; paint it with a brush")
        if region.get("image_rotation"):
            raise BadReturn(f"{at}: its image was turned by {region['image_rotation']} degrees: expected it upright")
        names = shaped(list[str], value.get(kind), f"{at}, {kind!r}")
        stated = [shaped(int, region.get(key), f"{at}, {key!r}") for key in ("original_height", "original_width")]
        if label is None:
            label = np.full(require_size(stated, at), IGNORE, np.uint8)
        if tuple(stated) != label.shape:
            raise BadReturn(f"{at} is of an image of {shown_size(stated)}: expected {shown_size(label.shape)}")
        if len(names) != 1:
            raise BadReturn(f"{at} has {len(names)} labels: expected one")
        found = train_id(names[0], space)
        if found is None:
            unknown.add(repr(names[0]), 1)
            complete = False
        elif kind == "brushlabels":
            paint(label.reshape(-1), counts_of_brush(_bytes(value.get("rle"), at), label.size, at), found)
        else:
            points = shaped(list[tuple[float, float]], value.get("points"), f"{at}, 'points'")
            height, width = label.shape
            fill(label, [c for x, y in points for c in (x * width / 100, y * height / 100)], found, at)
    return label if complete else None


def _bytes(rle: Any, where: str) -> bytes:
    try:
        return bytes(rle) if isinstance(rle, list) else b""
    except (TypeError, ValueError) as error:
        raise BadReturn(f"{where}: its 'rle' is no list of bytes: expected numbers in 0..255") from error
