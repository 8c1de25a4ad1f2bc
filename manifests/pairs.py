"""Read a CSV that pairs images with labels: columns image, label and coarse, named in its first line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, read_csv
from autolabel.manifests.locations import joined
from autolabel.manifests.walk import BadLayout, composed, is_holdable

_MOST_BYTES = 1 << 30  # ten million pairs


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
        rows = read_csv(table, ("image", "label"), optional=("coarse",), at_most=_MOST_BYTES)
    except BadDocument as error:
        raise BadLayout(str(error)) from error
    pairs: dict[str, Pair] = {}
    for line, cells in enumerate(rows, 2):
        place = f"{table}, line {line}"
        image, label, coarse = (_find(cell.strip(), root, table, place) for cell in cells)
        if image is None:
            raise BadLayout(f"{place}: names no image")
        if not image.is_relative_to(root.absolute()):
            raise BadLayout(f"{place}: image {image} lies outside of {root}: scan a folder that holds all images")
        name = composed(image.relative_to(root.absolute()).with_suffix("").as_posix())
        if name in pairs:
            raise BadLayout(f"{place}: image {cells[0]} is there twice")
        pairs[name] = Pair(name, image, label, coarse)
    if not pairs:
        raise BadLayout(f"{table} names no images")
    return list(pairs.values())


def _find(name: str, root: Path, table: Path, place: str) -> Path | None:
    """The file of a cell, None for an empty one."""
    if not name:
        return None
    path = PurePosixPath(name)
    if not all(part == ".." or is_holdable(part) for part in path.parts[path.is_absolute() :]):
        raise BadLayout(f"{place}: path {name!r}: expected a name that a manifest can hold, with forward slashes")
    found = next((f / path for f in (root, table.parent) if storage.exists(f / path)), None)
    if found is None:
        raise BadLayout(f"{place}: {name} does not exist under {root} or beside the CSV")
    return joined(found.absolute(), "")
