"""Label Studio's brush labels on their way out: tasks with predictions, which its importer takes, and the interface.

A task is {"data": {"image": address}, "predictions": [{"score", "result": [region, …]}]}; a region of the type
"brushlabels" holds the mask of one class in run lengths (labelstud.io, guide/predictions and tags/brushlabels).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from autolabel.manifests import storage
from autolabel.manifests.formats.exchange import Outgoing, flat
from autolabel.manifests.formats.naming import distinct_colours
from autolabel.manifests.formats.photographs import SUFFIXES, send_photograph
from autolabel.manifests.formats.run_lengths import brush_bytes, spans_by_class
from autolabel.manifests.formats.style import IMAGES, Style
from autolabel.manifests.label_space import LabelSpace

INTERFACE, TASKS = "interface.xml", "tasks"
_LOCAL = "/data/local-files/?d="  # how Label Studio addresses files below its root of documents
_BROWSERS = ("PNG", "JPEG", "WEBP", "BMP")  # what a browser shows
_CONTROL, _OBJECT = "label", "image"


class LabelStudioWriter:
    """Writes images/NAME.*, tasks/NUMBER.json of 64 images each, and interface.xml, the labelling interface.

    Images are addressed as local files below the folder of the export.
    """

    def __init__(self, space: LabelSpace, style: Style) -> None:
        style.require("label-studio", flat=(False, True), images=IMAGES)
        self._space, self._style = space, style
        self.notes = ("ignored pixels are in no region",)

    def write(self, item: Outgoing, folder: Path) -> dict[str, Any]:
        """Write the photograph of one image; return its regions."""
        height, width = item.label.shape
        name = flat(item.name) if self._style.flat else item.name
        file = name + (item.sample.image.suffix or SUFFIXES["PNG"])
        if self._style.images != "none":
            file = send_photograph(item.sample, folder / "images", name, style=self._style, readable=_BROWSERS)
        certain = None if item.confidence is None else np.append(0, np.cumsum(item.confidence, dtype=np.int64))
        regions = []
        for found, (starts, ends) in spans_by_class(item.label.reshape(-1)).items():
            masked = base64.b64encode(brush_bytes((starts, ends), item.label.size)).decode()
            region: dict[str, Any] = {"class": found, "rle": masked}
            if certain is not None:
                sums = int((certain[ends] - certain[starts]).sum())
                region["score"] = round(sums / (255 * int((ends - starts).sum())), 4)
            regions.append(region)
        return {"name": name, "file": file, "size": [height, width], "score": item.score, "regions": regions}

    def pack(self, folder: Path, number: int, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Write the tasks of one chunk."""
        lines = [json.dumps(self._task(e), ensure_ascii=False, separators=(",", ":")) for e in entries]
        text = "[\n" + ",\n".join(lines) + "\n]\n"
        storage.write(folder / TASKS / f"{number:06d}.json", text.encode(errors="backslashreplace"))
        return [{"name": e["name"]} for e in entries]

    def _task(self, entry: dict[str, Any]) -> dict[str, Any]:
        height, width = entry["size"]
        common = {"from_name": _CONTROL, "to_name": _OBJECT, "type": "brushlabels", "original_width": width,
                  "original_height": height, "image_rotation": 0}  # fmt: skip
        result = [
            {
                "id": f"class{region['class']}",
                **common,
                "value": {
                    "format": "rle",
                    "rle": list(base64.b64decode(region["rle"])),
                    "brushlabels": [self._space.names[region["class"]]],
                },
                **({"score": region["score"]} if "score" in region else {}),
            }
            for region in entry["regions"]
        ]
        score = {} if entry["score"] is None else {"score": round(entry["score"], 4)}
        return {
            "data": {
                "image": _LOCAL + quote(f"images/{entry['file']}"), "sample_id": entry["name"],
                "width": width, "height": height,
            },
            "predictions": [{"model_version": "autolabel", **score, "result": result}],
        }  # fmt: skip

    def finish(self, folder: Path, entries: Iterable[dict[str, Any]]) -> None:
        """Write the labelling interface, with the classes in their colours."""
        labels = "".join(
            f'    <Label value={quoteattr(name)} background="#{bytes(colour).hex()}"/>\n'
            for name, colour in zip(self._space.names, distinct_colours(self._space), strict=True)
        )
        text = (
            f'<View>\n  <Image name="{_OBJECT}" value="$image" zoom="true" zoomControl="true"/>\n'
            f'  <BrushLabels name="{_CONTROL}" toName="{_OBJECT}">\n{labels}  </BrushLabels>\n</View>\n'
        )
        storage.write(folder / INTERFACE, text.encode(errors="xmlcharrefreplace"))
