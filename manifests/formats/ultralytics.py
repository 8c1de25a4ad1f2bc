"""Labels for the semantic task of Ultralytics: images/, masks/, data.yaml (docs.ultralytics.com/datasets/semantic)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from autolabel.manifests import storage
from autolabel.manifests.formats.exchange import SPLITS, Outgoing, flat, put_mask, split_of
from autolabel.manifests.formats.photographs import send_photograph
from autolabel.manifests.formats.style import Style
from autolabel.manifests.images import encode_label
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.wording import listed


class UltralyticsWriter:
    """Writes images/SPLIT/NAME.*, masks/SPLIT/NAME.png and data.yaml.

    Masks hold train ids, and 255 where a pixel is ignored, which its loss and metrics leave out. Splits are train, val
    and test; samples of any other split go to train.
    """

    def __init__(self, space: LabelSpace, style: Style) -> None:
        style.require("ultralytics", flat=(False, True), images=("copy", "link"))
        self._space, self._style = space, style
        self.notes: tuple[str, ...] = ("Ultralytics has no place for confidence: none is written",)

    def write(self, item: Outgoing, folder: Path) -> dict[str, Any]:
        """Write photograph and mask of one image; return its split."""
        given = split_of(item.sample)
        split = SPLITS.get(given, "train")
        name = f"{split}/{flat(item.name) if self._style.flat else item.name}"
        send_photograph(item.sample, folder / "images", name, style=self._style)
        put_mask(storage.under(folder, f"masks/{name}.png"), encode_label(item.label))
        return {"split": split, "given": given}

    def finish(self, folder: Path, entries: Iterable[dict[str, Any]]) -> None:
        """Write data.yaml."""
        splits, others = set(), set()
        for entry in entries:
            splits.add(entry["split"])
            others |= {entry["given"]} - set(SPLITS)
        notes = list(self.notes[:1])
        if others:
            notes.append(f"samples of split {listed(sorted(others))} are in train")
        places = {split: f"images/{split}" for split in ("train", "val", "test") if split in splits}
        for name in ("train", "val"):  # it asks for both
            if name not in places:
                places[name] = next(iter(places.values()))
                notes.append(
                    f"no sample is of split {name}: data.yaml names {places[name]} for it, so no score means much"
                )
        lines = [f"{name}: {place}" for name, place in places.items()]
        names = [f"  {i}: {json.dumps(name, ensure_ascii=False)}" for i, name in enumerate(self._space.names)]
        text = "\n".join(["# 255 in a mask is ignored", *lines, "masks_dir: masks", "names:", *names, ""])
        storage.write(folder / "data.yaml", text.encode(errors="backslashreplace"))
        self.notes = tuple(notes)
