"""Labels as a folder that `datasets.load_dataset` opens: parquet of image, label and confidence, and id2label.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from autolabel.manifests import storage
from autolabel.manifests.formats.exchange import Outgoing, split_of
from autolabel.manifests.formats.photographs import photograph
from autolabel.manifests.formats.style import Style
from autolabel.manifests.images import encode_label
from autolabel.manifests.label_space import LabelSpace

_PARTS = ".parts"  # files of images that are not packed yet
_PICTURES = {"image": "RGB", "label": "L", "confidence": "L"}  # columns and their modes, as Pillow calls them
_TEXTS, _NUMBERS = ("sample_id", "group", "source"), ("mean_confidence",)
_FEATURES = {
    **{name: {"mode": mode, "_type": "Image"} for name, mode in _PICTURES.items()},
    **{name: {"dtype": "string", "_type": "Value"} for name in _TEXTS},
    **{name: {"dtype": "float32", "_type": "Value"} for name in _NUMBERS},
}
_SCHEMA = pa.schema(
    [
        *((name, pa.struct([("bytes", pa.binary()), ("path", pa.string())])) for name in _PICTURES),
        *((name, pa.string()) for name in _TEXTS),
        *((name, pa.float32()) for name in _NUMBERS),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)


class HfWriter:
    """Writes data/SPLIT-NUMBER.parquet, README.md, which names the splits, and id2label.json.

    Label PNGs hold train ids, and 255 where a pixel is ignored; those of confidence 255 times the probability, null
    where nobody knows it.
    """

    notes: Sequence[str] = ()

    def __init__(self, space: LabelSpace, style: Style) -> None:
        style.require("hf")
        self._space = space

    def write(self, item: Outgoing, folder: Path) -> dict[str, Any]:
        """Put photograph, label and confidence of one image aside for `pack`."""
        photo = photograph(item.sample)
        files = {
            "image": (item.name + photo.suffix, photo.data),
            "label": (f"{item.name}.png", encode_label(item.label)),
        }
        if item.confidence is not None:
            files["confidence"] = f"{item.name}.png", encode_label(item.confidence)
        for column, (name, data) in files.items():
            storage.write(storage.under(folder / _PARTS, f"{column}/{name}"), data, durable=False)
        sample = item.sample
        return {
            "split": re.sub(r"\W", "_", split_of(sample)),
            "files": {column: name for column, (name, _) in files.items()},
            "row": {"sample_id": sample.sample_id, "group": sample.group, "source": sample.source,
                    "mean_confidence": item.score},
        }  # fmt: skip

    def pack(self, folder: Path, number: int, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Write the images of a chunk, a file for each split, one image in memory at a time; return their splits."""
        for split in dict.fromkeys(entry["split"] for entry in entries):
            with (
                storage.writing(folder / "data" / f"{split}-{number:05d}.parquet") as file,
                pq.ParquetWriter(
                    file, _SCHEMA, compression="none", use_dictionary=False, write_statistics=False
                ) as table,
            ):
                for entry in entries:
                    if entry["split"] == split:
                        pictures = {
                            column: _picture(folder, column, entry["files"].get(column)) for column in _PICTURES
                        }
                        table.write_table(pa.Table.from_pylist([{**pictures, **entry["row"]}], _SCHEMA))
        for entry in entries:
            for column, name in entry["files"].items():
                storage.remove(storage.under(folder / _PARTS, f"{column}/{name}"))
        return [{"split": entry["split"]} for entry in entries]

    def finish(self, folder: Path, entries: Iterable[dict[str, Any]]) -> None:
        """Write README.md and id2label.json."""
        splits = sorted({entry["split"] for entry in entries})
        files = [line for name in splits for line in (f"  - split: {name}", f"    path: data/{name}-*.parquet")]
        head = [
            "---",
            "task_categories:",
            "- image-segmentation",
            "configs:",
            "- config_name: default",
            "  data_files:",
        ]
        words = (
            "`label` holds train ids, which `id2label.json` names; 255 is ignored. `confidence` is 255 times the"
            " probability of the teacher's class, null where nobody knows it."
        )
        text = "\n".join([*head, *files, "---", "", words, ""])
        storage.write(folder / "README.md", text.encode())
        storage.write_json(folder / "id2label.json", {str(i): name for i, name in enumerate(self._space.names)})
        storage.remove_folder(folder / _PARTS)


def _picture(folder: Path, column: str, name: str | None) -> dict[str, Any] | None:
    if name is None:
        return None
    return {"bytes": storage.read(storage.under(folder / _PARTS, f"{column}/{name}")), "path": name}
