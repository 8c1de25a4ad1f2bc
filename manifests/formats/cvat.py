"""CVAT's "Segmentation mask 1.1": one PNG of classes and one of objects for every image, in the manner of Pascal VOC.

SegmentationClass/ shows every pixel in the colour that labelmap.txt gives its class, SegmentationObject/ every object
in a colour of its own, from the 256 of Pascal VOC; black is nobody's in both (docs.cvat.ai, format-smask). CVAT makes
one mask of every object, so every connected piece is an object here.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from autolabel.manifests import storage
from autolabel.manifests.formats import archive
from autolabel.manifests.formats.exchange import BadReturn, Outgoing, Returned, flat, put_mask
from autolabel.manifests.formats.naming import Unknown, by_colour, distinct_colours, train_id, voc_colour
from autolabel.manifests.formats.photographs import send_photograph
from autolabel.manifests.formats.style import IMAGES, Style
from autolabel.manifests.images import BadImage, encode_label
from autolabel.manifests.label_space import IGNORE, Colour, LabelSpace
from autolabel.manifests.pieces import pieces
from autolabel.manifests.run.shards import Label
from autolabel.manifests.wording import counted

CLASSES, OBJECTS, LABELMAP, LIST = (
    "SegmentationClass", "SegmentationObject", "labelmap.txt", "ImageSets/Segmentation/default.txt"
)  # fmt: skip
ARCHIVE, LABELS = "masks.zip", "labels.json"
_MOST_OBJECTS = 255  # of one image: CVAT knows no more colours
_FIRST_STRANGER = 256  # stands for a label that is no class, behind all train ids
_MOST_BYTES = 1 << 20  # of labelmap.txt
_OBJECT_COLOURS = bytes(chain.from_iterable(map(voc_colour, range(256))))


class CvatWriter:
    """Writes images/NAME.*, both PNGs of every image, masks.zip, which CVAT imports, and labels.json, its labels.

    Raises ValueError for names of classes that labelmap.txt cannot hold.
    """

    def __init__(self, space: LabelSpace, style: Style) -> None:
        style.require("cvat", flat=(False, True), images=IMAGES)
        for name in space.names:
            if ":" in name or name != name.strip() or name.startswith("#") or len(name.splitlines()) != 1:
                raise ValueError(f"class {name!r} cannot go to CVAT: its labelmap.txt knows no ':', '#' or line ends")
            if name == "background":
                raise ValueError("class 'background' is what CVAT calls the pixels of no class: give it another name")
        self._space, self._style, self._colours = space, style, distinct_colours(space)
        self._palette = bytes(chain((0, 0, 0), *self._colours)).ljust(768, b"\0")
        self._notes = ["CVAT has no place for confidence: none is written", "ignored pixels are black there, no mask"]
        if self._colours != tuple(c.colour for c in space.classes):
            self._notes.append("two classes have one colour, or one is black: the masks have colours of their own")
        self.notes: tuple[str, ...] = tuple(self._notes)

    def write(self, item: Outgoing, folder: Path) -> dict[str, Any]:
        """Write the photograph and the two PNGs of one image; return its name."""
        name = flat(item.name) if self._style.flat else item.name
        if self._style.images != "none":
            send_photograph(item.sample, folder / "images", name, style=self._style)
        objects, crowded = _objects(item.label, len(self._space))
        for kind, ids, palette in (
            (CLASSES, item.label + np.uint8(1), self._palette),  # 255 becomes 0
            (OBJECTS, objects, _OBJECT_COLOURS),
        ):
            put_mask(storage.under(folder, f"{kind}/{name}.png"), encode_label(ids, palette=palette))
        return {"name": name, "crowded": crowded}

    def finish(self, folder: Path, entries: Iterable[dict[str, Any]]) -> None:
        """Write labelmap.txt, the list of the images, the zip of all but the photographs, and the labels of a task."""
        labels = [
            {"name": name, "color": f"#{bytes(colour).hex()}", "type": "any", "attributes": []}
            for name, colour in zip(self._space.names, self._colours, strict=True)
        ]
        storage.write_json(folder / LABELS, labels)
        rows = [("background", (0, 0, 0)), *zip(self._space.names, self._colours, strict=True)]
        lines = ["# label:color_rgb:parts:actions", *(f"{name}:{','.join(map(str, c))}::" for name, c in rows)]
        names, crowded = [], 0
        for entry in entries:
            names.append(entry["name"])
            crowded += entry["crowded"]
        for listing, text in ((LABELMAP, lines), (LIST, names)):
            storage.write(folder / listing, "".join(f"{line}\n" for line in text).encode(errors="backslashreplace"))
        with storage.writing(folder / ARCHIVE) as file, zipfile.ZipFile(file, "w") as zipped:
            for member in (LABELMAP, LIST, *(f"{kind}/{name}.png" for name in names for kind in (CLASSES, OBJECTS))):
                zipped.writestr(zipfile.ZipInfo(member), storage.read(folder / member))
        notes = list(self._notes)
        if any("/" in name for name in names):
            notes.append("names have folders: CVAT keeps them if images/ is uploaded as a zip; --flat leaves them out")
        if crowded:
            shown = counted(crowded, "image")
            notes.append(
                f"{shown} with more pieces than CVAT reads ({_MOST_OBJECTS}): the smallest of a class are one mask"
            )
        self.notes = tuple(notes)


def _objects(label: Label, space_size: int) -> tuple[Label, bool]:
    """(H, W) uint8 numbers of objects from 1 on, the largest piece first, 0 for none; whether some share a number."""
    lengths, classes, piece = pieces(label, IGNORE)
    shown = classes != IGNORE
    roots, inverse = np.unique(piece[shown], return_inverse=True)
    order = np.argsort(-np.bincount(inverse, lengths[shown], len(roots)), kind="stable")
    rank = np.empty(len(roots), np.int64)
    rank[order] = np.arange(1, len(roots) + 1)
    numbers = np.zeros(len(piece), np.int64)
    numbers[shown] = rank[inverse]
    crowded = len(roots) > _MOST_OBJECTS
    if crowded:
        alone = max(0, _MOST_OBJECTS - space_size)
        numbers = np.where(numbers > alone, alone + 1 + classes.astype(np.int64), numbers)
    return np.repeat(numbers.astype(np.uint8), lengths).reshape(label.shape), crowded


def read(path: Path, space: LabelSpace) -> Iterator[Returned]:
    """Yield the labels of an export of CVAT, a zip or what was in it. Colours mean what its labelmap.txt says.

    Pixels of labels that the label space does not have, and colours that labelmap.txt does not have, are counted over
    all masks; then BadReturn is raised. Raises BadReturn also for damaged masks and archives.
    """
    with archive.opened(path) as files:
        way = files.under(CLASSES)
        if way is None:
            raise BadReturn(f"{path} has no folder {CLASSES}: expected CVAT's export 'Segmentation mask 1.1'")
        labels = _labelmap(files, way + LABELMAP)
        masks = [name for name in files.names if name.startswith(f"{way}{CLASSES}/") and name.lower().endswith(".png")]
        if not masks:
            raise BadReturn(f"{path} has no PNG in {CLASSES}: expected CVAT's export 'Segmentation mask 1.1'")
        unknown = Unknown(path, space, "pixel")
        strangers = [label for label in labels.values() if train_id(label, space) is None]
        owners = {
            colour: _FIRST_STRANGER + strangers.index(label) if found is None else found
            for colour, label in labels.items()
            for found in [train_id(label, space)]
        }
        for name in masks:
            try:
                label, others = by_colour(files.read(name), owners)
            except BadImage as error:
                raise BadReturn(f"{files.shown(name)}: {error}") from error
            for colour, count in others.items():
                unknown.add(colour and f"colour {colour}", count)
            strange = np.bincount(label[label >= _FIRST_STRANGER] - _FIRST_STRANGER, minlength=len(strangers))
            for stranger, count in zip(strangers, strange.tolist(), strict=True):
                if count:
                    unknown.add(repr(stranger), count)
            if not others and not strange.any():
                yield Returned(archive.stem(name.removeprefix(f"{way}{CLASSES}/")), label.astype(np.uint8))
        unknown.require_none()


def _labelmap(files: archive.Files, name: str) -> Mapping[int, str]:
    """The label of every colour, packed into one number. Raises BadReturn."""
    if name not in files:
        raise BadReturn(f"{files.path} has no {name}: expected it beside {CLASSES}, where it says what colours mean")
    labels: dict[int, str] = {}
    colours: dict[str, Colour] = {}
    text = files.read(name, at_most=_MOST_BYTES).decode("utf-8-sig", "replace")
    for place, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        where = f"{files.shown(name)}, line {place}"
        label, *values = line.rsplit(":", 3)
        channels = [c.strip() for c in values[0].split(",")] if len(values) == 3 else []
        if len(channels) != 3 or not all(c.isdecimal() and len(c) < 4 and int(c) < 256 for c in channels):
            raise BadReturn(f"{where} is {line[:60]!r}: expected a label and its colour, as in 'road:128,64,128::'")
        red, green, blue = map(int, channels)
        packed = red << 16 | green << 8 | blue
        if packed in labels or label in colours:
            other = labels.get(packed, label)
            raise BadReturn(f"{where}: labels {other!r} and {label!r} have one colour, or one name: which is meant?")
        labels[packed], colours[label] = label, (red, green, blue)
    if not labels:
        raise BadReturn(f"{files.shown(name)} names no label: expected lines such as 'road:128,64,128::'")
    return {0: "background", **labels}
