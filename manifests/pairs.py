"""Read a CSV that pairs images with labels: columns image, label and coarse, named in its first line."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path

from autolabel.manifests import storage
from autolabel.manifests.walk import BadLayout, composed, is_holdable

_COLUMNS = ("image", "label", "coarse")


@dataclass(frozen=True)
class Pair:
    """One row: an image and its labels, as absolute paths; None for an empty cell."""

    sample_id: str
    image: Path
    label: Path | None
    coarse: Path | None


def read_pairs(table: Path, root: Path) -> list[Pair]:
    """The rows of a CSV. Paths are relative to `root`, or to the CSV's folder if no such file lies below `root`.

    A sample id is the image's path below `root` without its suffix. Raises BadLayout, naming the line.
    """
    try:
        text = storage.read(table).decode("utf-8-sig")
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = [cell.strip() for cell in next(rows, [])]
        if header[:1] != ["image"] or "label" not in header or set(header) - set(_COLUMNS):
            raise BadLayout(
                f"{table}: its first line is {','.join(header)!r}: expected image,label or image,label,coarse"
            )
        lines = [(rows.line_num, row) for row in rows if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadLayout(f"{table} is no CSV in UTF-8: {error}") from error
    pairs: dict[str, Pair] = {}
    for line, cells in lines:
        place = f"{table}, line {line}"
        if len(cells) != len(header):
            raise BadLayout(f"{place}: {len(cells)} cells: expected {len(header)}, as in the first line")
        named = dict(zip(header, map(str.strip, cells), strict=True))
        if not named["image"]:
            raise BadLayout(f"{place}: names no image")
        image, label, coarse = (_find(named.get(column, ""), root, table, place) for column in _COLUMNS)
        assert image is not None
        if not image.is_relative_to(root.absolute()):
            raise BadLayout(f"{place}: image {image} lies outside of {root}: scan a folder that holds all images")
        name = composed(image.relative_to(root.absolute()).with_suffix("").as_posix())
        if name in pairs:
            raise BadLayout(f"{place}: image {named['image']} is there twice")
        pairs[name] = Pair(name, image, label, coarse)
    if not pairs:
        raise BadLayout(f"{table} names no images")
    return list(pairs.values())


def _find(name: str, root: Path, table: Path, place: str) -> Path | None:
    """The file of a cell, None for an empty one."""
    if not name:
        return None
    path = Path(name)
    if not all(part == ".." or is_holdable(part) for part in path.parts[path.is_absolute() :]):
        raise BadLayout(f"{place}: path {name!r}: expected a name that a manifest can hold, with forward slashes")
    found = next((f / path for f in (root, table.parent) if storage.exists(f / path)), None)
    if found is None:
        raise BadLayout(f"{place}: {name} does not exist under {root} or beside the CSV")
    return Path(os.path.normpath(found.absolute()))
