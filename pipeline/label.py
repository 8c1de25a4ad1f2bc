"""Label one unit: decode, predict, decide, count, write the shard, commit.

This is what a worker does, with or without Ray. A damaged image costs that image: it is quarantined with its reason.
Trouble of the disk is not the image's fault and stops the unit, which then counts as not done.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from autolabel.manifests.classes import IGNORE, LabelSpace
from autolabel.manifests.files import fingerprint_bytes
from autolabel.manifests.images import BadImage, decode_image, read_label
from autolabel.manifests.stores import (
    CHUNK,
    PNG,
    ZARR,
    Label,
    WrittenShard,
    crc32c,
    png_name,
    read_png,
    read_zarr,
    write_png,
    write_zarr_shard,
)
from autolabel.manifests.tables import CONFIDENCE_BINS, Sample
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.units import LABELLED, QUARANTINED, Row, Unit, committed_rows, write_record
from autolabel.teacher.predict import LabelStatistics, Teacher, load_teacher


@dataclass(frozen=True)
class Labelled:
    """One sample's outcome: its row of numbers, and its label unless it was quarantined."""

    row: Row
    label: Label | None


class Labeller:
    """A teacher in memory and the folder it writes to; lives as long as its worker.

    On a CPU every image is computed by one thread and `threads` images at once: how torch splits one image over several
    threads changes the last bits of its numbers, and a label must not depend on how many cores the machine has.
    """

    def __init__(self, job: LabelJob, space: LabelSpace, image_root: Path, device: str, threads: int) -> None:
        self.job, self.space, self.image_root = job, space, image_root
        self.teacher: Teacher = load_teacher(job.teacher, device, job.precision)
        self.worker = f"{platform.node()}:{os.getpid()}"
        workers = threads if self.teacher.device.type == "cpu" else 1
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def run(self, unit: Unit, wanted: Sequence[str]) -> Iterator[int]:
        """Label the samples `wanted` (ids) of a unit that are not committed yet, then commit it.

        Yields how many of them are labelled or quarantined, as they finish.
        """
        done = committed_rows(self.job.out, unit)
        todo = [s for s in unit.samples if s.sample_id in set(wanted) and s.sample_id not in done]
        # Rows of an earlier run that --limit stopped inside this unit: the shard is written again with them.
        outcomes = {sample_id: Labelled(row, self._stored(row)) for sample_id, row in done.items()}
        places = {s.sample_id: unit.first_row + i for i, s in enumerate(unit.samples)}
        for finished, outcome in enumerate(self.pool.map(lambda s: self._label(s, unit, places), todo), start=1):
            outcomes[outcome.row["sample_id"]] = outcome
            yield finished
        self._commit(unit, outcomes)

    def _stored(self, row: Row) -> Label | None:
        if row["status"] != LABELLED:
            return None
        path = self.job.out / row["label"]
        if row["label_index"] is None:
            return read_png(path, self.space)
        return read_zarr(path, row["label_index"], 0, 0, row["height"], row["width"])

    def _label(self, sample: Sample, unit: Unit, places: dict[str, int]) -> Labelled:
        row: Row = {"sample_id": sample.sample_id, "unit": unit.name, "worker": self.worker}
        row |= {"height": sample.height, "width": sample.width}
        try:
            started = time.perf_counter()
            row |= _identify(sample.image)
            data = _read(sample.image)
            row["image_fingerprint"] = fingerprint_bytes(data)
            image = decode_image(data)
            coarse = _read_coarse(sample, self.space)
            _check_sizes(sample, image, coarse)
            decoded = time.perf_counter()
            labels, (statistics,) = self.teacher.label(image[None], self.job.threshold, self.job.scales, self.job.flip)
            inferred = time.perf_counter()
        except BadImage as error:
            return Labelled(row | {"status": QUARANTINED, "reason": str(error)}, None)
        label = labels[0]
        row |= {"status": LABELLED, "decode_ms": 1e3 * (decoded - started), "infer_ms": 1e3 * (inferred - decoded)}
        row |= image_numbers(label, statistics, coarse)
        row["classes"] = class_numbers(label, statistics, coarse, self.space)
        row["centroids"] = centroids(label, len(self.space))
        if self.job.store == "png":
            name = png_name(sample.image.relative_to(self.image_root).as_posix())
            row["label"] = f"{PNG}/{name}"
        else:
            row |= {"label": f"{ZARR}/{unit.bucket}", "label_index": places[sample.sample_id]}
        return Labelled(row, label)

    def _commit(self, unit: Unit, outcomes: dict[str, Labelled]) -> None:
        started = time.perf_counter()
        present = [outcomes[s.sample_id] for s in unit.samples if s.sample_id in outcomes]
        labelled = [outcome for outcome in present if outcome.label is not None]
        shard: WrittenShard | None = None
        if self.job.store == "png":
            for outcome in labelled:
                assert outcome.label is not None
                path = self.job.out / outcome.row["label"]
                write_png(path, outcome.label)
                outcome.row["label_bytes"] = path.stat().st_size
        elif labelled:
            labels = [outcomes[s.sample_id].label if s.sample_id in outcomes else None for s in unit.samples]
            shard = write_zarr_shard(self.job.out / ZARR / unit.bucket, unit.first_row, labels)
            for outcome in labelled:
                outcome.row["label_bytes"] = shard.label_bytes[outcome.row["label_index"] - unit.first_row]
        encode_ms = 1e3 * (time.perf_counter() - started) / max(1, len(labelled))
        for outcome in labelled:
            outcome.row["encode_ms"] = encode_ms  # the unit's, in equal parts: a shard is encoded as a whole
        write_record(self.job.out, unit, [outcome.row for outcome in present], shard)


def _identify(image: Path) -> Row:
    try:
        found = image.stat()
    except OSError:
        return {"image_bytes": None, "image_mtime_ns": None}
    return {"image_bytes": found.st_size, "image_mtime_ns": found.st_mtime_ns}


def _read(image: Path) -> bytes:
    try:
        return image.read_bytes()
    except FileNotFoundError as error:
        raise BadImage("the file is missing") from error


def _read_coarse(sample: Sample, space: LabelSpace) -> Label | None:
    if sample.coarse_label is None:
        return None
    try:
        return read_label(sample.coarse_label, space, sample.label_ids)
    except FileNotFoundError as error:
        raise BadImage(f"its coarse label {sample.coarse_label} is missing") from error


def _check_sizes(sample: Sample, image: NDArray[np.uint8], coarse: Label | None) -> None:
    found, listed = image.shape[:2], (sample.height, sample.width)
    if found != listed:
        raise BadImage(
            f"the image is {found[1]} x {found[0]} but its manifest says {listed[1]} x {listed[0]}: scan again"
        )
    if coarse is not None and coarse.shape != found:
        raise BadImage(f"its coarse label is {coarse.shape[1]} x {coarse.shape[0]}, the image {found[1]} x {found[0]}")


def image_numbers(label: Label, statistics: LabelStatistics, coarse: Label | None) -> Row:
    """An image's row of `stats/images.parquet`, as far as it follows from the label.

    agreement_with_coarse: share of the coarse pixels whose auto label is the same class (null without coarse pixels).
    """
    labelled = int(statistics.pixels.sum())
    coarse_pixels = 0 if coarse is None else int((coarse != IGNORE).sum())
    agreeing = 0 if coarse is None else int(((coarse == label) & (coarse != IGNORE)).sum())
    return {
        "labelled_pixels": labelled,
        "ignored_fraction": 1 - labelled / label.size,
        "mean_confidence": float(statistics.confidence.sum()) / label.size,
        "coarse_pixels": coarse_pixels,
        "agreement_with_coarse": agreeing / coarse_pixels if coarse_pixels else None,
        "label_crc32c": crc32c(label),
    }


def class_numbers(label: Label, statistics: LabelStatistics, coarse: Label | None, space: LabelSpace) -> list[Row]:
    """The rows of `stats/classes.parquet` for one image: every class that the teacher or the coarse label names.

    mean_confidence and confidence_hist are over the pixels whose top class it is, before the threshold.
    coarse_pixels: pixels of this class in the coarse label; agreeing_pixels: those with the same auto label;
    overridden_pixels: those with another auto label (the rest became ignore).
    """
    classes = len(space)
    joint = np.zeros((classes, 256), np.int64)
    if coarse is not None:
        keys = coarse.astype(np.uint16) << 8 | label
        joint = np.bincount(keys.ravel(), minlength=1 << 16).reshape(256, 256)[:classes]
    rows = []
    for c, name in enumerate(space.names):
        seen, coarse_pixels = int(statistics.histogram[c].sum()), int(joint[c].sum())
        if seen == 0 and coarse_pixels == 0:
            continue
        rows.append(
            {
                "class_id": c,
                "class_name": name,
                "pixels": int(statistics.pixels[c]),
                "fraction": int(statistics.pixels[c]) / label.size,
                "mean_confidence": float(statistics.confidence[c]) / seen if seen else None,
                "confidence_hist": statistics.histogram[c].tolist() if seen else [0] * CONFIDENCE_BINS,
                "coarse_pixels": coarse_pixels,
                "agreeing_pixels": int(joint[c, c]),
                "overridden_pixels": coarse_pixels - int(joint[c, c]) - int(joint[c, IGNORE]),
            }
        )
    return rows


def centroids(label: Label, classes: int) -> list[Row]:
    """Where each class lies: its centre of mass (y, x) and pixel count in every tile of 512 x 512 pixels.

    Class-uniform sampling draws crops around them (arXiv 2005.10821, section 4).
    """
    rows: list[Row] = []
    for top in range(0, label.shape[0], CHUNK):
        for left in range(0, label.shape[1], CHUNK):
            tile = label[top : top + CHUNK, left : left + CHUNK]
            by_row = np.stack([np.bincount(line, minlength=256)[:classes] for line in tile])  # (h, C)
            pixels = by_row.sum(axis=0)
            sum_y = by_row.T @ np.arange(len(tile))
            across = np.broadcast_to(np.arange(tile.shape[1], dtype=np.float64), tile.shape)
            sum_x = np.bincount(tile.ravel(), across.ravel(), minlength=256)[:classes]
            rows += [
                {
                    "class_id": int(c),
                    "tile_y": top // CHUNK,
                    "tile_x": left // CHUNK,
                    "y": top + float(sum_y[c] / pixels[c]),
                    "x": left + float(sum_x[c] / pixels[c]),
                    "pixels": int(pixels[c]),
                }
                for c in np.flatnonzero(pixels)
            ]
    return rows
