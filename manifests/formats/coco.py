"""COCO's two forms of semantic labels, side by side: stuff (a mask in run lengths for each class) and panoptic (PNGs).

stuff.json is an annotation file of detection, which pycocotools reads: one annotation for each class of each image.
panoptic.json and panoptic/ hold the same segments as PNGs whose colours are the ids of segments (cocodataset.org,
format-data; panopticapi). A segment of a class has the class's colour, and no segment is black, 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from autolabel.manifests import storage
from autolabel.manifests.formats.exchange import Outgoing, flat, put_mask
from autolabel.manifests.formats.naming import distinct_colours
from autolabel.manifests.formats.photographs import SUFFIXES, send_photograph
from autolabel.manifests.formats.run_lengths import Counts, coco_counts, coco_text, columns, spans_by_class
from autolabel.manifests.formats.style import IMAGES, Style
from autolabel.manifests.images import encode_label
from autolabel.manifests.label_space import LabelSpace

STUFF, PANOPTIC, PNGS = "stuff.json", "panoptic.json", "panoptic"


class CocoWriter:
    """Writes images/NAME.*, panoptic/NAME.png, panoptic.json and stuff.json.

    Category ids are train ids plus one. "score" of an annotation of stuff.json is the mean confidence of its pixels, as
    in COCO's results.
    """

    def __init__(self, space: LabelSpace, style: Style) -> None:
        style.require("coco", flat=(False, True), images=IMAGES)
        self._space, self._style, self._colours = space, style, distinct_colours(space)
        self._palette = b"".join(map(bytes, self._colours)).ljust(768, b"\0")
        self.notes = ("ignored pixels are in no annotation, and black, 0, in the panoptic PNGs",)

    def write(self, item: Outgoing, folder: Path) -> dict[str, Any]:
        """Write the photograph and the panoptic PNG of one image; return its segments."""
        height, width = item.label.shape
        name = flat(item.name) if self._style.flat else item.name
        file = name + (item.sample.image.suffix or SUFFIXES["PNG"])
        if self._style.images != "none":
            file = send_photograph(item.sample, folder / "images", name, style=self._style)
        put_mask(storage.under(folder, f"{PNGS}/{name}.png"), encode_label(item.label, palette=self._palette))
        certain = None if item.confidence is None else np.append(0, np.cumsum(columns(item.confidence), dtype=np.int64))
        segments = []
        for found, (starts, ends) in spans_by_class(columns(item.label)).items():
            area = int((ends - starts).sum())
            segment = {"category_id": found + 1, "area": area, "bbox": _box(starts, ends, height),
                       "counts": coco_text(coco_counts((starts, ends), height * width))}  # fmt: skip
            if certain is not None:
                segment["score"] = round(int((certain[ends] - certain[starts]).sum()) / (255 * area), 4)
            segments.append(segment)
        score = {} if item.score is None else {"score": round(item.score, 4)}
        return {"name": name, "file": file, "size": [height, width], "segments": segments, **score}

    def finish(self, folder: Path, entries: Iterable[dict[str, Any]]) -> None:
        """Write both JSON files."""
        colours = [(red, green, blue) for red, green, blue in self._colours]
        categories = [
            {"id": i + 1, "name": name, "supercategory": "stuff", "isthing": 0, "color": list(colours[i])}
            for i, name in enumerate(self._space.names)
        ]
        images = [
            {"id": number, "file_name": e["file"], "height": e["size"][0], "width": e["size"][1],
             **({"score": e["score"]} if "score" in e else {})}
            for number, e in enumerate(entries, 1)
        ]  # fmt: skip
        head = {"info": {"description": "written by autolabel"}, "licenses": [], "images": images}
        ids = [red + 256 * green + 65536 * blue for red, green, blue in colours]
        with storage.writing(folder / STUFF) as file:
            _write(file, {**head, "categories": categories}, _stuff(entries))
        with storage.writing(folder / PANOPTIC) as file:
            _write(file, {**head, "categories": categories}, _panoptic(entries, ids))


def _box(starts: Counts, ends: Counts, height: int) -> list[int]:
    """x, y, width and height of the box around runs down the columns."""
    left, right = int(starts[0]) // height, int(ends[-1] - 1) // height
    whole = (starts // height != (ends - 1) // height).any()  # a run that goes on in the next column
    top = 0 if whole else int((starts % height).min())
    bottom = height - 1 if whole else int(((ends - 1) % height).max())
    return [left, top, right - left + 1, bottom - top + 1]


def _stuff(entries: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    number = 0
    for image, entry in enumerate(entries, 1):
        for segment in entry["segments"]:
            number += 1
            mask = {"size": entry["size"], "counts": segment["counts"]}
            others = {key: value for key, value in segment.items() if key != "counts"}
            yield {"id": number, "image_id": image, **others, "iscrowd": 0, "segmentation": mask}


def _panoptic(entries: Iterable[dict[str, Any]], ids: list[int]) -> Iterator[dict[str, Any]]:
    for image, entry in enumerate(entries, 1):
        segments = [
            {"id": ids[s["category_id"] - 1], **{key: s[key] for key in ("category_id", "area", "bbox")}, "iscrowd": 0}
            for s in entry["segments"]
        ]
        yield {"image_id": image, "file_name": f"{entry['name']}.png", "segments_info": segments}


def _write(file: BinaryIO, head: Mapping[str, Any], annotations: Iterable[dict[str, Any]]) -> None:
    """Write a document whose annotations come one at a time."""

    def text(value: Any) -> bytes:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")

    file.write(text(head)[:-1] + b',\n"annotations":[')
    for place, annotation in enumerate(annotations):
        file.write((b",\n" if place else b"\n") + text(annotation))
    file.write(b"\n]}\n")
