"""Run folders made of drawn labels, two to a shard, without a run.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.images import encode_label
from autolabel.manifests.label_space import CAMVID, IGNORE
from autolabel.manifests.run.labels import (
    LABELS,
    RunLabels,
    committed_labels,
    png_name,
    zarr_folder,
)
from autolabel.manifests.run.shards import (
    WrittenShard,
    bucket_of,
    crc32c,
    create_zarr,
    encode_zarr,
    shard_path,
    write_zarr_shard,
)
from autolabel.manifests.tables import table_bytes

Label = NDArray[np.uint8]
SHARD = 2  # rows
BUCKET = "b512x512"
ABOUT = {"ignore": IGNORE}


def street(seed: int, height: int, width: int) -> Label:
    """Blocks of 11 classes, a seventh of them ignored; no two seeds give the same."""
    dice = np.random.default_rng(seed)
    blocks = dice.integers(0, 11, (-(-height // 16), -(-width // 16)), np.uint8)
    blocks[dice.random(blocks.shape) < 1 / 7] = IGNORE
    label = np.kron(blocks, np.ones((16, 16), np.uint8))[:height, :width]
    label[0, 0] = seed % 11
    return np.ascontiguousarray(label)


SIZES = [(1, 1), (511, 513), (512, 512), (600, 700), (64, 2000)]
STREETS = {f"city/{h}x{w}": street(i, h, w) for i, (h, w) in enumerate(SIZES)}
STREETS["city/second of its size"] = street(9, 600, 700)
STREETS["city/nothing sure"] = np.full((600, 700), IGNORE, np.uint8)
STREETS["city/one class"] = np.full((700, 600), 3, np.uint8)
STREETS["city/sure in one corner"] = np.pad(street(4, 30, 40), ((570, 0), (660, 0)), constant_values=IGNORE)

Units = dict[tuple[str, int], list[str]]  # bucket, number of its shard -> ids of the samples


def plan(labels: Mapping[str, Label | None]) -> Units:
    """Labels by size, two to a shard; None is a sample of 500 x 500."""
    rows: dict[str, list[str]] = {}
    for sample_id, label in labels.items():
        rows.setdefault(bucket_of(*((500, 500) if label is None else label.shape)), []).append(sample_id)
    return {(b, i // SHARD): ids[i : i + SHARD] for b, ids in rows.items() for i in range(0, len(ids), SHARD)}


def rows_of(units: Units) -> dict[str, int]:
    return {b: sum(len(ids) for (bucket, _), ids in units.items() if bucket == b) for b, _ in units}


def record_of(run: Path, bucket: str, number: int) -> Path:
    return run / f"units/{bucket}.{number:06d}.0.parquet"


def commit(
    run: Path, bucket: str, number: int, ids: list[str], labels: Mapping[str, Label | None], store: str = "zarr"
) -> WrittenShard | None:
    """Write the labels of a unit and commit it; samples without one are quarantined."""
    rows: list[dict[str, Any]] = []
    for place, sample_id in enumerate(ids, number * SHARD):
        label = labels[sample_id]
        row = {
            "sample_id": sample_id,
            "status": "labelled",
            "label": f"{zarr_folder(LABELS)}/{bucket}",
            "label_index": place,
        }
        if label is None:
            row["status"], label = "quarantined", np.zeros((500, 500), np.uint8)
        elif store == "png":
            row |= {"label": f"{LABELS}/{png_name(sample_id + '.jpg')}", "label_index": None}
            storage.write(run / str(row["label"]), encode_label(label))
        height, width = label.shape
        rows.append({**row, "height": height, "width": width, "label_crc32c": crc32c(label)})
    shard, committed = None, [labels[sample_id] for sample_id in ids]
    if store == "zarr" and any(label is not None for label in committed):
        frames = [None if label is None else encode_zarr(label) for label in committed]
        shard = write_zarr_shard(run / zarr_folder(LABELS) / bucket, number * SHARD, shard_rows=SHARD, labels=frames)
    record = record_of(run, bucket, number)
    record.parent.mkdir(exist_ok=True)
    record.write_bytes(table_bytes(pa.Table.from_pylist(rows)))
    return shard


def committed(run: Path) -> RunLabels:
    return RunLabels(committed_labels(run, LABELS), CAMVID)


def make_run(run: Path, labels: Mapping[str, Label | None], store: str = "zarr") -> dict[Path, WrittenShard]:
    """A finished run folder, and its shards; None for a sample that was quarantined."""
    units = plan(labels)
    if store == "zarr":
        create_zarr(run / zarr_folder(LABELS), rows_of(units), shard_rows=SHARD, attributes=ABOUT)
    written = {
        shard_path(run / zarr_folder(LABELS) / bucket, number): commit(run, bucket, number, ids, labels, store)
        for (bucket, number), ids in units.items()
    }
    return {path: shard for path, shard in written.items() if shard is not None}


def one_shard(run: Path) -> tuple[Path, Path, Label]:
    """A run of two labels in one shard: the run, the file, the first label."""
    first = street(1, 500, 512)
    make_run(run, {"a": first, "b": street(2, 512, 300)})
    return run, shard_path(run / zarr_folder(LABELS) / BUCKET, 0), first
