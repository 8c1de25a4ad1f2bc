"""Labels in the folders, names and label ids of Cityscapes, as its scorer and the loaders of the data set read them."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from autolabel.manifests import storage
from autolabel.manifests.formats.exchange import Outgoing, put_mask, split_of
from autolabel.manifests.formats.photographs import send_photograph
from autolabel.manifests.formats.style import IMAGES, Style
from autolabel.manifests.images import encode_label
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.wording import listed

# The official label ids by name (Cordts et al., arXiv 1604.01685; helpers/labels.py of cityscapesScripts).
LABEL_IDS = {name: i for i, name in enumerate((
    "unlabeled", "ego vehicle", "rectification border", "out of roi", "static", "dynamic", "ground", "road", "sidewalk",
    "parking", "rail track", "building", "wall", "fence", "guard rail", "bridge", "tunnel", "pole", "polegroup",
    "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus",
    "caravan", "trailer", "train", "motorcycle", "bicycle",
))}  # fmt: skip
_UNLABELED = LABEL_IDS["unlabeled"]
_OFFICIAL = re.compile(r"[A-Za-z0-9-]+_\d{6}_\d{6}")


class CityscapesWriter:
    """Writes gtFine/SPLIT/CITY/STEM_gtFine_labelIds.png, leftImg8bit/… beside it, and names.csv.

    A sample id of the official form is the stem and says the city; any other becomes CITY_NUMBER_NUMBER, with numbers
    that are a checksum of it. Ignored pixels are 0, "unlabeled", which the scorer does not count. Raises ValueError for
    classes that Cityscapes does not have.
    """

    def __init__(self, space: LabelSpace, style: Style) -> None:
        style.require("cityscapes", images=IMAGES)
        unknown = [name for name in space.names if name not in LABEL_IDS]
        if unknown:
            raise ValueError(
                f"Cityscapes has no class {listed([repr(name) for name in unknown[:3]])}: export labels of label space"
                f" {space.name!r} as png, or label with a class map to cityscapes"
            )
        self._style = style
        self._ids = np.full(256, _UNLABELED, np.uint8)
        self._ids[: len(space)] = [LABEL_IDS[name] for name in space.names]
        self.notes = (
            "ignored pixels are label id 0, unlabeled, which the official scorer leaves out of truth and counts as"
            " missed in a prediction",
            "Cityscapes has no place for confidence: none is written",
        )

    def write(self, item: Outgoing, folder: Path) -> dict[str, Any]:
        """Write the files of one image; return its row of names.csv."""
        stem = stem_of(item.name)
        split = re.sub(r"[^A-Za-z0-9_-]+", "-", split_of(item.sample))
        place = f"{split}/{stem.split('_')[0]}/{stem}"
        label = f"gtFine/{place}_gtFine_labelIds.png"
        image = ""
        if self._style.images != "none":
            end, target = f"{place}_leftImg8bit", folder / "leftImg8bit"
            sent = send_photograph(item.sample, target, end, style=self._style, readable=("PNG",))
            image = f"leftImg8bit/{sent}"
        put_mask(storage.under(folder, label), encode_label(self._ids[item.label]))
        return {"sample_id": item.sample.sample_id, "stem": stem, "label": label, "image": image}

    def finish(self, folder: Path, entries: Iterable[dict[str, Any]]) -> None:
        """Write names.csv."""
        with storage.writing(folder / "names.csv") as file:
            text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="")
            table = csv.DictWriter(text, ("sample_id", "stem", "label", "image"), lineterminator="\n")
            table.writeheader()
            table.writerows(entries)
            text.detach()


def stem_of(name: str) -> str:
    """The official stem of a sample: its id, or one that is made of it, such as 0001TP-006690_123456_654321."""
    if _OFFICIAL.fullmatch(name):
        return name
    city = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "image"
    number = int(hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:12], 16) % 10**12
    return f"{city}_{number // 10**6:06d}_{number % 10**6:06d}"
