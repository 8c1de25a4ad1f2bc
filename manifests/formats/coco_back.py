"""Labels on their way back from a COCO file: stuff, detection or panoptic, as labelling tools export them."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, shaped
from autolabel.manifests.formats import archive
from autolabel.manifests.formats.exchange import BadReturn, Returned
from autolabel.manifests.formats.naming import Unknown, by_colour, shown_size, train_id
from autolabel.manifests.formats.polygons import fill
from autolabel.manifests.formats.run_lengths import counts_of_coco, paint, require_size
from autolabel.manifests.images import BadImage
from autolabel.manifests.label_space import IGNORE, LabelSpace
from autolabel.manifests.large_json import Element, LargeJson
from autolabel.manifests.run.shards import Label

_LARGEST = 1 << 63
_UNKNOWN = -1  # the train id of a category that no annotation may have


def read(path: Path, space: LabelSpace) -> Iterator[Returned]:
    """Yield the labels of a COCO file: a JSON file, or a folder or zip that holds one.

    Annotations are masks in run lengths, compressed or not, and polygons; later ones lie over earlier ones. An image
    without any is left out, because nobody has labelled it. A panoptic file has PNGs in a folder of its own name.
    Raises BadReturn, also for annotations of classes that the label space does not have, with their number.
    """
    with _opened(path) as (files, name), files.reading(name, at_most=archive.MOST_JSON) as file:
        try:
            yield from _File(LargeJson(file, files.shown(name)), files, name, space).labels()
        except BadDocument as error:
            raise BadReturn(str(error)) from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[archive.Files, str]]:
    if path.suffix.lower() == ".json" and storage.exists(path):
        yield archive.of_file(path), path.name
        return
    with archive.opened(path) as files:
        names = [name for name in files.names if name.lower().endswith(".json") and name != "export.json"]
        if len(names) != 1:
            shown = f"{len(names)} JSON files, such as {names[0]}" if names else "no JSON file"
            raise BadReturn(f"{path} holds {shown}: expected one COCO file; name the one that was corrected")
        yield files, names[0]


class _File:
    """A COCO file: where its annotations lie, by image, so that one image is in memory at a time."""

    def __init__(self, document: LargeJson, files: archive.Files, name: str, space: LabelSpace) -> None:
        self._document, self._files, self._name, self._space = document, files, name, space
        self._images: dict[int, tuple[str, tuple[int, int]]] = {}
        self._places = array("q")  # image, start, length of every annotation
        categories = Counter[int]()  # how many annotations have each
        names: dict[str, int] = {}
        for element in document.elements("images", "annotations"):
            if element.key == "images":
                self._add_image(element, names)
            else:
                categories.update(self._add_annotation(element))
        self._train_ids = self._classes(categories)

    def _where(self, element: Element) -> str:
        return f"{self._document.name}, {element.key[:-1]} at byte {element.start}"

    def _add_image(self, element: Element, names: dict[str, int]) -> None:
        where = self._where(element)
        value = element.read(where)
        number, file, *size = _fields(value, where, id=int, file_name=str, height=int, width=int)
        name = archive.stem(file)
        if number in self._images or name in names:
            raise BadReturn(f"{where}: image {file!r} (id {number}) stands twice: which of the two is meant?")
        names[name] = number
        self._images[number] = name, require_size(size, where)

    def _add_annotation(self, element: Element) -> list[int]:
        """Note where it lies; return its categories."""
        where = self._where(element)
        value = element.read(where)
        (image,) = _fields(value, where, image_id=int)
        if not -_LARGEST <= image < _LARGEST:
            raise BadReturn(f"{where}: image id {image} is too large")
        self._places.extend((image, element.start, len(element.data)))
        segments = shaped(list[Any], value.get("segments_info", [value]), f"{where}, 'segments_info'")
        return [_fields(segment, where, category_id=int)[0] for segment in segments]

    def _classes(self, used: Mapping[int, int]) -> dict[int, int]:
        """The train ids of all categories. Raises BadReturn for annotations of others."""
        where = f"{self._document.name}, 'categories'"
        rest = self._document.rest
        listed = rest.get("categories") if isinstance(rest, dict) else None
        if not isinstance(listed, list) or not self._images:
            raise BadReturn(f"{self._document.name} is no COCO file: expected images, annotations and categories")
        train_ids, unknown = {}, Unknown(Path(self._document.name), self._space, "annotation")
        for value in listed:
            number, name = _fields(value, where, id=int, name=str)
            found = train_id(name, self._space)
            if number in train_ids:
                raise BadReturn(f"{where} has id {number} twice")
            train_ids[number] = _UNKNOWN if found is None else found
            if found is None and used.get(number):
                unknown.add(repr(name), used[number])
        for number in used.keys() - train_ids.keys():
            unknown.add(f"category {number}, which is not in the file", used[number])
        unknown.require_none()
        return train_ids

    def labels(self) -> Iterator[Returned]:
        """Yield the label of every image that has an annotation, in the order of the images."""
        places = np.array(self._places, np.int64).reshape(-1, 3)
        strangers = set(places[:, 0].tolist()) - self._images.keys()
        if strangers:
            raise BadReturn(
                f"{self._document.name} has annotations of image id {min(strangers)}, which it does not list"
            )
        rows = {image: array("q") for image in self._images}
        for place, image in enumerate(places[:, 0].tolist()):
            rows[image].append(place)
        pngs = Unknown(Path(self._document.name), self._space, "pixel")
        for image, (name, size) in self._images.items():
            elements = [self._document.at("annotations", *places[row, 1:].tolist()) for row in rows[image]]
            if not elements:
                continue
            values = [(element.read(self._where(element)), self._where(element)) for element in elements]
            if any("segments_info" in value for value, _ in values):
                if len(values) > 1:
                    raise BadReturn(f"{values[1][1]}: image {name!r} has two panoptic annotations: which is meant?")
                label = self._of_png(*values[0], size, pngs)
            else:
                label = self._of_masks(values, size)
            if label is not None:
                yield Returned(name, label)
        pngs.require_none()

    def _of_masks(self, values: Iterable[tuple[dict[str, Any], str]], size: tuple[int, int]) -> Label:
        height, width = size
        pixels = np.full(height * width, IGNORE, np.uint8)
        for value, where in values:
            found = self._train_ids[value["category_id"]]
            mask = value.get("segmentation")
            if isinstance(mask, dict):
                stated, counts = _fields(mask, where, size=list[int], counts=str | list[int])
                if require_size(stated, where) != size:
                    raise BadReturn(f"{where}: its mask has {shown_size(stated)}, its image {shown_size(size)}")
                paint(pixels, counts_of_coco(counts, height * width, where), found)
            else:
                polygons = shaped(list[list[float]], mask or [], f"{where}, 'segmentation'")
                if not polygons:
                    raise BadReturn(f"{where} has no mask, only a box or less: expected run lengths or polygons")
                for polygon in polygons:
                    fill(pixels.reshape(width, height).T, polygon, found, where)
        return np.ascontiguousarray(pixels.reshape(width, height).T)

    def _of_png(self, value: dict[str, Any], where: str, size: tuple[int, int], unknown: Unknown) -> Label | None:
        """None if the PNG shows segments that the annotation does not have; they are counted."""
        (file,) = _fields(value, where, file_name=str)
        folder = PurePosixPath(self._name).with_suffix("")
        name = str(folder / PurePosixPath(file).parent / f"{PurePosixPath(file).stem}.png")
        if name not in self._files:
            raise BadReturn(f"{where}: its PNG {name} is not there: expected the folder {folder.name} beside the JSON")
        owners = {0: IGNORE}
        for segment in value["segments_info"]:
            number, category = _fields(segment, where, id=int, category_id=int)
            if not 0 < number < 1 << 24:
                raise BadReturn(f"{where}: segment {number} has no colour: expected an id in 1..{(1 << 24) - 1}")
            packed = (number & 255) << 16 | number & 0xFF00 | number >> 16
            if owners.setdefault(packed, self._train_ids[category]) != self._train_ids[category]:
                raise BadReturn(f"{where}: segment {number} has two categories: which is meant?")
        try:
            label, others = by_colour(self._files.read(name), owners)
        except BadImage as error:
            raise BadReturn(f"{self._files.shown(name)}: {error}") from error
        if label.shape != size:
            raise BadReturn(f"{self._files.shown(name)} has {shown_size(label.shape)}, its image {shown_size(size)}")
        for colour, count in others.items():
            segment = colour and f"segment {colour[0] + 256 * colour[1] + 65536 * colour[2]}"
            unknown.add(segment, count)
        return None if others else label.astype(np.uint8)


def _fields(value: Any, where: str, **kinds: Any) -> list[Any]:
    """The values of an object under these keys, each of its type. Raises BadDocument."""
    document = shaped(dict[str, Any], value, where)
    for key in kinds:
        if key not in document:
            raise BadDocument(f"{where} has no {key!r}: expected a file in COCO's format")
    return [shaped(kind, document[key], f"{where}, {key!r}") for key, kind in kinds.items()]
