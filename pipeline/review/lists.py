"""The files of a review: a folder that holds one request, lists of what was chosen, and maps of the regions."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, read_json
from autolabel.manifests.images import encode_label
from autolabel.manifests.run.place import require_outside_runs
from autolabel.manifests.tables import writing_table
from autolabel.pipeline.review.choose import Chosen
from autolabel.pipeline.review.effort import Effort, Pace
from autolabel.pipeline.review.prospects import Prospects
from autolabel.pipeline.review.survey import Items

IDS, RECORD = "ids.txt", "review.json"
WORTH_SCHEMA = pa.schema(
    [
        ("rank", pa.int64()),
        ("sample_id", pa.string()),
        ("region", pa.int32()),  # its number in regions/ID.png; null for a whole image
        ("class", pa.string()),  # the class that is expected to gain most
        ("top", pa.int32()),
        ("left", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("pixels", pa.int64()),
        ("boundary_pixels", pa.int64()),
        ("seconds", pa.float64()),  # null for a whole image
        ("expected_gain", pa.float64()),  # of the mean IoU, 0..1, after all rows above
    ]
)


@dataclass(frozen=True)
class Wish:
    """A review that was asked for, as `review.json` keeps it."""

    run: str
    budget: Effort
    pace: Pace
    audit: str | None = None
    student: str | None = None
    done: str | None = None
    to: str | None = None

    def require_free(self, out: Path) -> None:
        """Raise ValueError if a folder lies in a run, or holds anything but this same review, finished or not."""
        record = out / RECORD
        require_outside_runs(out)
        if storage.exists(record):
            try:
                same = read_json(record) == asdict(self)
            except BadDocument:
                same = False
            if not same:
                raise ValueError(f"{out} holds a review that was asked for differently: choose another folder")
        elif storage.exists(out) or any(not path.name.startswith(storage.LOCK) for path in storage.list(out)):
            raise ValueError(f"{out} is not empty and holds no review: choose another folder")

    def claim(self, out: Path) -> None:
        """Make the folder that of this review, without the maps of an earlier call."""
        storage.write_json(out / RECORD, asdict(self))
        for old in storage.list(out / "regions", suffix=".png", recursive=True):
            storage.remove(old)


def table(prospects: Prospects, items: Items, chosen: Chosen, numbers: NDArray[np.int64]) -> pa.Table:
    """The rows of `WORTH_SCHEMA`. items: those that were chosen, in order; numbers (K,): of regions in their images."""
    whole = items.region < 0
    gains = prospects.worth().by_class(items.doubt)
    columns = {
        "rank": np.arange(1, len(items) + 1),
        "sample_id": prospects.found.ids.take(pa.array(items.image)),
        "region": pa.array(numbers, mask=whole),
        "class": pa.array([prospects.run.label_space.names[c] for c in gains.argmax(axis=1)], pa.string()),
        **dict(zip(("top", "left", "height", "width"), items.box.T, strict=True)),
        "pixels": items.pixels,
        "boundary_pixels": pa.array(items.boundary, mask=whole),
        "seconds": pa.array(chosen.seconds, mask=whole),
        "expected_gain": chosen.gains,
    }
    return pa.table({name: pa.array(columns[name]) for name in WORTH_SCHEMA.names}).cast(WORTH_SCHEMA)


def number(items: Items) -> NDArray[np.int64]:
    """The numbers of regions in their images (K,), from 1 in the order of choice."""
    counts: dict[int, int] = {}
    for image in items.image.tolist():
        counts[image] = counts.get(image, 0) + 1
    so_far = dict.fromkeys(counts, 0)
    numbers = []
    for image in items.image.tolist():
        so_far[image] += 1
        numbers.append(so_far[image])
    return np.array(numbers, np.int64)


def region_maps(prospects: Prospects, items: Items, numbers: NDArray[np.int64]) -> dict[str, NDArray[np.uint8]]:
    """Maps of the numbers of chosen regions (H, W) uint8, 0 elsewhere, by sample id; their images are read again."""
    assert prospects.looking is not None
    images = np.unique(items.image)
    ids = prospects.found.ids.take(pa.array(images)).to_pylist()
    place = dict(zip(ids, images.tolist(), strict=True))
    maps = {}
    for sample_id, regions in prospects.looking.again(ids):
        mine = items.image == place[sample_id]
        of = np.zeros(len(regions) + 1, np.uint8)  # the last one: no region
        of[items.region[mine]] = numbers[mine]
        maps[sample_id] = of[regions.places]
    return maps


def write(out: Path, rows: pa.Table, maps: dict[str, NDArray[np.uint8]]) -> None:
    """Write maps and lists; the table is written last."""
    for sample_id, regions in maps.items():
        storage.write(storage.under(out, f"regions/{sample_id}.png"), encode_label(regions))
    ids: Sequence[str] = list(dict.fromkeys(rows["sample_id"].to_pylist()))
    storage.write(out / IDS, "".join(f"{name}\n" for name in ids).encode())
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(WORTH_SCHEMA.names)
    lines.writerows(row.values() for row in rows.to_pylist())
    storage.write(out / "review.csv", text.getvalue().encode())
    with writing_table(out / "review.parquet", WORTH_SCHEMA) as add:
        add(rows)
