"""Labels as PNGs beside their photographs, under equal names: for mmseg, FiftyOne, torch and most training code."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from autolabel.manifests import storage
from autolabel.manifests.formats.exchange import Outgoing, flat, put_mask
from autolabel.manifests.formats.photographs import send_photograph
from autolabel.manifests.formats.style import IMAGES, Style
from autolabel.manifests.images import encode_label
from autolabel.manifests.label_space import IGNORE, LabelSpace
from autolabel.manifests.schemas import LABEL_IDS

COLUMNS = ("sample_id", "image", "label", "confidence", "split", "group", "source", "mean_confidence")


class PngWriter:
    """Writes images/NAME.*, labels/NAME.png and, where it is known, confidence/NAME.png; index.csv and classes.json.

    Labels hold train ids, source ids, or train ids with a palette of the classes' colours; confidence is 255 times the
    probability. Ignored pixels are 255, with a palette 255 in black.
    """

    def __init__(self, space: LabelSpace, style: Style) -> None:
        style.require("png", label_ids=LABEL_IDS, flat=(False, True), images=IMAGES)
        self._space, self._style = space, style
        ids = np.arange(256, dtype=np.uint8)
        ignored = IGNORE
        if style.label_ids == "source":
            ids[: len(space)] = [c.source_ids[0] for c in space.classes]
            if space.train_ids[IGNORE] != IGNORE:  # a class has this id
                if not space.ignored_ids:
                    raise ValueError(f"source id 255 is a class of label space {space.name!r}, and no id is ignored")
                ids[IGNORE] = ignored = space.ignored_ids[0]
        self._ids, self._ignored = ids, ignored
        self._palette = space.palette if style.label_ids == "color" else None
        self.notes = () if ignored == IGNORE else (f"255 is a class there: ignored pixels are {ignored}",)

    def write(self, item: Outgoing, folder: Path) -> dict[str, Any]:
        """Write the files of one image; return its row of index.csv."""
        name = flat(item.name) if self._style.flat else item.name
        image = ""
        if self._style.images != "none":
            image = f"images/{send_photograph(item.sample, folder / 'images', name, style=self._style)}"
        row = {"sample_id": item.sample.sample_id, "image": image, "label": f"labels/{name}.png", "confidence": ""}
        put_mask(storage.under(folder, row["label"]), encode_label(self._ids[item.label], palette=self._palette))
        if item.confidence is not None:
            row["confidence"] = f"confidence/{name}.png"
            storage.write(storage.under(folder, row["confidence"]), encode_label(item.confidence))
        sample, score = item.sample, "" if item.score is None else f"{item.score:.6f}"
        return {**row, "split": sample.split, "group": sample.group, "source": sample.source, "mean_confidence": score}

    def finish(self, folder: Path, entries: Iterable[dict[str, Any]]) -> None:
        """Write index.csv and classes.json."""
        with storage.writing(folder / "index.csv") as file:
            text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="")
            table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(entries)
            text.detach()
        classes = [
            {"id": int(self._ids[i]), "name": c.name, "color": list(c.colour)}
            for i, c in enumerate(self._space.classes)
        ]
        storage.write_json(folder / "classes.json", {"ignored": self._ignored, "classes": classes})
