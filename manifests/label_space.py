"""Label spaces: the classes, their numbers and their colours. Everything else is derived from them.

A label space lists its classes in the order of their train ids 0..C-1. Source ids are the numbers found in a data
set's own label files; every source id that belongs to no class becomes 255, "ignore".
"""

from __future__ import annotations

import colorsys
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, json_of, name_of, read_json, shaped
from autolabel.manifests.locations import location

IGNORE = 255
VOID = 254  # in a coarse label: somebody drew a polygon here, of something that is no class
MAX_CLASSES = 255  # train ids are uint8 and 255 is taken
_MOST_BYTES = 1 << 20  # Mapillary's own config has 66 classes and 12 kB

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class LabelClass:
    """One class: its name, its RGB colour, and the ids that mean it in the data set's own files."""

    name: str
    colour: Colour
    source_ids: tuple[int, ...]


@dataclass(frozen=True)
class LabelSpace:
    """The classes in the order of their train ids, and a name for people. Raises ValueError, naming the value.

    ignored_ids: source ids that may occur in label files and belong to no class.
    """

    name: str
    classes: tuple[LabelClass, ...]
    ignored_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= len(self.classes) <= MAX_CLASSES:
            raise ValueError(f"label space {self.name!r} has {len(self.classes)} classes: expected 1 to {MAX_CLASSES}")
        if len(set(self.names)) != len(self.names):
            twice = sorted({n for n in self.names if self.names.count(n) > 1})
            raise ValueError(f"label space {self.name!r} names {twice[0]!r} twice: give every class its own name")
        owners: dict[int, str] = {}
        for c in self.classes:
            if not c.source_ids or not all(0 <= i <= 255 for i in c.source_ids):
                raise ValueError(f"class {c.name!r} has source ids {c.source_ids}: expected some in 0..255")
            for i in c.source_ids:
                if i in owners:
                    raise ValueError(f"source id {i} is both {owners[i]!r} and {c.name!r}: give it to one class, once")
                owners[i] = c.name
            if len(c.colour) != 3 or not all(0 <= v <= 255 for v in c.colour):
                raise ValueError(f"class {c.name!r} has colour {c.colour}: expected three numbers in 0..255")
        for i in self.ignored_ids:
            if i in owners:
                raise ValueError(f"source id {i} is both {owners[i]!r} and ignored: choose one")

    def __len__(self) -> int:
        return len(self.classes)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Class names by train id."""
        return tuple(c.name for c in self.classes)

    @cached_property
    def train_ids(self) -> bytes:
        """The train id of every source id, 255 for none: 256 bytes, for `bytes.translate` or as a table."""
        table = bytearray([IGNORE] * 256)
        for train_id, c in enumerate(self.classes):
            for source_id in c.source_ids:
                table[source_id] = train_id
        return bytes(table)

    @cached_property
    def known_source_ids(self) -> frozenset[int]:
        """Source ids that may appear in a label file; anything else in one is a mistake."""
        return frozenset(i for c in self.classes for i in c.source_ids) | set(self.ignored_ids) | {IGNORE}

    @cached_property
    def palette(self) -> bytes:
        """The RGB colour of every train id, black for all others (ignore): 768 bytes."""
        colours = b"".join(bytes(c.colour) for c in self.classes)
        return colours.ljust(768, b"\0")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values that `of` reads back."""
        labels: list[dict[str, Any]] = [
            {"name": c.name, "color": list(c.colour), "ids": list(c.source_ids)} for c in self.classes
        ]
        if self.ignored_ids:
            labels.append({"name": "ignored", "color": [0, 0, 0], "ids": list(self.ignored_ids), "evaluate": False})
        return {"name": self.name, "labels": labels}

    def to_json(self) -> str:
        """Return one line of JSON that `from_json` reads back."""
        return json.dumps(self.to_dict())

    @classmethod
    def of(cls, document: Any, *, where: str = "label space", name: str = "custom") -> LabelSpace:
        """Make a label space from JSON values in the form of Mapillary Vistas' `config.json`.

        That is {"labels": [{"name", "color", "evaluate"?, "ids"?}, …]}. A label's source id is its place in the list,
        unless "ids" lists others. Labels with "evaluate": false get no train id (they are ignored). `where` is the file
        in messages. Raises BadDocument, naming label and key, for any other key or type.
        """
        space = _keyed(document, _SPACE_KEYS, where)
        if not isinstance(space.get("labels"), list):
            raise BadDocument(f"{where} is no label space: {_FORM}")
        classes: list[LabelClass] = []
        ignored: list[int] = []
        for place, value in enumerate(space["labels"]):
            named = isinstance(value, dict) and isinstance(value.get("name"), str)
            label = f"label {value['name']!r}" if named else f"label number {place}"
            entry = _keyed(value, _LABEL_KEYS, f"{where}, {label}")
            missing = [key for key in ("name", "color") if key not in entry]
            if missing:
                raise BadDocument(f"{where}, {label}, has no {missing[0]!r}: {_FORM}")
            ids = tuple(entry.get("ids", (place,)))
            if entry.get("evaluate", True):
                classes.append(LabelClass(entry["name"], tuple(entry["color"]), ids))
            else:
                ignored += ids
        try:
            return cls(str(space.get("name", name)), tuple(classes), tuple(ignored))
        except ValueError as error:
            raise BadDocument(f"{where}: {error}") from error

    @classmethod
    def named(cls, name: str, classes: Sequence[str]) -> LabelSpace:
        """Make a label space of class names in the order of their ids, which get colours that are easy to tell apart.

        Raises ValueError for a name that occurs twice, and for no class or more than `MAX_CLASSES`.
        """
        return cls(name, tuple(LabelClass(text, _distinct(place), (place,)) for place, text in enumerate(classes)))

    @classmethod
    def from_json(cls, text: str | bytes, name: str = "custom", *, where: str = "label space") -> LabelSpace:
        """Read the JSON of `of`. Raises BadDocument."""
        return cls.of(json_of(text, name=where), where=where, name=name)


def _distinct(place: int) -> Colour:
    """Return the colour of the n-th class: hues a golden angle apart, in turns of three brightnesses."""
    rgb = colorsys.hsv_to_rgb(place * 0.618034 % 1, (0.85, 0.6, 0.4)[place // 3 % 3], (1.0, 0.75, 0.5)[place % 3])
    return round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2])


_FORM = 'expected JSON like {"labels": [{"name": "road", "color": [128, 64, 128]}, …]}'
# The keys of the two levels and their types. Those of type Any say nothing here: `source` is for people, the others
# stand in files of Mapillary.
_SPACE_KEYS: dict[str, Any] = {
    "labels": list,
    "name": str,
    "source": Any,
    "version": Any,
    "mapping": Any,
    "folder_structure": Any,
}
_LABEL_KEYS: dict[str, Any] = {
    "name": str,
    "color": list[int],
    "ids": list[int],
    "evaluate": bool,
    "readable": Any,
    "instances": Any,
}


def _keyed(value: Any, keys: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return an object whose keys are known and have these types. Raises BadDocument."""
    if type(value) is not dict:
        raise BadDocument(f"{where} is no object: {_FORM}")
    for key in shaped(dict[str, Any], value, where):
        if key not in keys:
            close = difflib.get_close_matches(key, keys, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"expected {', '.join(keys)}"
            raise BadDocument(f"{where} has an unknown key {key!r}: {hint}")
    return {key: shaped(keys[key], item, f"{where}, {key!r}") for key, item in value.items()}


def _space(name: str, *rows: tuple[str, int, Colour], ignored_ids: tuple[int, ...] = ()) -> LabelSpace:
    return LabelSpace(name, tuple(LabelClass(n, colour, (i,)) for n, i, colour in rows), ignored_ids)


# The 19 evaluated classes of Cityscapes with their label ids and colours (Cordts et al., arXiv 1604.01685, and the
# data set's official table).
CITYSCAPES = _space(
    "cityscapes",
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
    ignored_ids=(0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30),
)

# CamVid with the 11 classes of the SegNet split (Badrinarayanan et al., arXiv 1511.00561).
CAMVID = _space(
    "camvid",
    ("sky", 0, (128, 128, 128)),
    ("building", 1, (128, 0, 0)),
    ("pole", 2, (192, 192, 128)),
    ("road", 3, (128, 64, 128)),
    ("pavement", 4, (0, 0, 192)),
    ("tree", 5, (128, 128, 0)),
    ("sign", 6, (192, 128, 128)),
    ("fence", 7, (64, 64, 128)),
    ("car", 8, (64, 0, 128)),
    ("pedestrian", 9, (64, 64, 0)),
    ("bicyclist", 10, (0, 128, 192)),
)

_IN_CODE = {space.name: space for space in (CITYSCAPES, CAMVID)}
SPACES = Path(__file__).parent / "spaces"  # the tables of the others, and class maps between them
_IN_FILES = ("mapillary-v1.2", "mapillary-v2.0", "bdd100k", "idd", "ade20k", "coco-stuff")
BUILT_IN = (*_IN_CODE, *_IN_FILES)


def load_label_space(name_or_file: str) -> LabelSpace:
    """Return a built-in label space by its name, or read one from a JSON file. Raises ValueError with what is wrong."""
    if name_or_file in _IN_CODE:
        return _IN_CODE[name_or_file]
    if name_or_file in _IN_FILES:
        return _in_file(name_or_file)
    path = location(name_or_file)
    if not storage.exists(path):
        raise ValueError(
            f"label space {name_or_file!r} is neither built in ({', '.join(BUILT_IN)}) nor a JSON file that exists"
        )
    return LabelSpace.of(read_json(path, at_most=_MOST_BYTES), where=str(path), name=name_of(path))


@cache
def _in_file(name: str) -> LabelSpace:
    return LabelSpace.of(read_json(SPACES / f"{name}.json"), where=f"label space {name!r}")
