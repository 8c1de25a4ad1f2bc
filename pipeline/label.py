"""Label one unit: decode, predict, decide, count, write the shard, commit.

This is what a worker does, with or without Ray. A damaged image costs that image: it is quarantined with its reason.
Trouble of the disk is not the image's fault and stops the unit, which then counts as not done.
"""

from __future__ import annotations

import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import groupby, islice, repeat
from pathlib import Path
from typing import Any, TypeVar

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
from autolabel.teacher.decide import LabelStatistics
from autolabel.teacher.predict import LARGEST_BATCH, NotEnoughMemory, Plan, Teacher, load_teacher


@dataclass(frozen=True)
class Labelled:
    """One sample's outcome: its row of numbers, and its label unless it was quarantined."""

    row: Row
    label: Label | None


_HELPERS = 4  # threads that decode for a GPU and count behind it
_IN_FLIGHT = 2  # batches
_T = TypeVar("_T")
_R = TypeVar("_R")
Outcome = tuple[Label, LabelStatistics, float] | str  # label, statistics, milliseconds; or why there is none


@dataclass(frozen=True)
class Decoded:
    """A sample ready to be predicted: what is known of it so far, its photograph and its coarse label.

    why_not: the reason for its quarantine, empty where all is well.
    """

    row: Row
    image: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 0, 3), np.uint8))
    coarse: Label | None = None
    why_not: str = ""


class Labeller:
    """A teacher in memory and the folder it writes to; lives as long as its worker.

    Threads decode ahead of the device and count behind it. A GPU is fed batches of one size, two of them in flight so
    that it computes one while the other is prepared or fetched. On a CPU the threads themselves predict, each one image
    at a time with a single thread of torch: how torch splits one image over several threads changes the last bits of
    its numbers, and a label must not depend on the cores of a machine.
    """

    def __init__(self, job: LabelJob, space: LabelSpace, image_root: Path, device: str, threads: int) -> None:
        self.job, self.space, self.image_root = job, space, image_root
        self.teacher: Teacher = load_teacher(job.teacher, device, job.precision, job.combine)
        self.worker = f"{platform.node()}:{os.getpid()}"
        self.threads = threads if self.teacher.device.type == "cpu" else max(threads, _HELPERS)
        self.pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        self.feeders = ThreadPoolExecutor(_IN_FLIGHT)
        self._plan: Plan = self.pool.submit(self.teacher.plan, job.scales, job.flip).result()
        self._planned: dict[str, int] = {}  # images at once by size, as "HEIGHTxWIDTH"

    def plan(self) -> dict[str, Any]:
        """What was probed, and how many images of each size are computed at once; for `run.json`."""
        fits = {_name(size): batch for size, batch in self.teacher.fits.items()}
        return {**asdict(self._plan), "images_at_once": self._planned | fits}

    def run(self, unit: Unit, wanted: Sequence[str]) -> Iterator[int]:
        """Label the samples `wanted` (ids) of a unit that are not committed yet, then commit it.

        Yields how many of them are labelled or quarantined, as they finish.
        """
        done = committed_rows(self.job.out, unit)
        todo = [s for s in unit.samples if s.sample_id in set(wanted) and s.sample_id not in done]
        # Rows of an earlier run that --limit stopped inside this unit: the shard is written again with them.
        outcomes = {sample_id: Labelled(row, self._stored(row)) for sample_id, row in done.items()}
        label = self._label_on_cpu if self.teacher.device.type == "cpu" else self._label_on_gpu
        for finished, (sample, outcome) in enumerate(zip(todo, label(todo, unit), strict=True), start=1):
            if outcome.label is not None:
                outcome.row.update(self._place(sample, unit))
            outcomes[sample.sample_id] = outcome
            yield finished
        self._commit(unit, outcomes)

    def _stored(self, row: Row) -> Label | None:
        if row["status"] != LABELLED:
            return None
        path = self.job.out / row["label"]
        if row["label_index"] is None:
            return read_png(path, self.space)
        return read_zarr(path, row["label_index"], 0, 0, row["height"], row["width"])

    def _label_on_cpu(self, todo: Sequence[Sample], unit: Unit) -> Iterator[Labelled]:
        def one(sample: Sample) -> Labelled:
            decoded = self._decode(sample, unit)
            return self._finish(decoded, *self._predict([decoded]))

        _, *largest = max((s.height * s.width, s.height, s.width) for s in unit.samples)
        yield from _ahead(self.pool, one, todo, self._at_once((largest[0], largest[1]), self.threads))

    def _label_on_gpu(self, todo: Sequence[Sample], unit: Unit) -> Iterator[Labelled]:
        decoded = _ahead(self.pool, lambda sample: self._decode(sample, unit), todo, 2 * LARGEST_BATCH)

        def batches() -> Iterator[list[Decoded]]:
            for size, same in groupby(decoded, lambda d: d.image.shape[:2]):
                while batch := list(islice(same, self._at_once((size[0], size[1]), LARGEST_BATCH, _IN_FLIGHT))):
                    yield batch

        behind: deque[Future[Labelled]] = deque()
        for batch, outcomes in _ahead(self.feeders, lambda b: (b, self._predict(b)), batches(), _IN_FLIGHT):
            behind.extend(map(self.pool.submit, repeat(self._finish), batch, outcomes))
            while len(behind) > 2 * LARGEST_BATCH:
                yield behind.popleft().result()
        yield from (future.result() for future in behind)

    def _at_once(self, size: tuple[int, int], most: int, batches: int = 1) -> int:
        if not all(size):  # a sample that could not be decoded
            return 1
        return self._planned.setdefault(_name(size), self._plan.at_once(*size, most, batches))

    def _decode(self, sample: Sample, unit: Unit) -> Decoded:
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
        except BadImage as error:
            return Decoded(row, why_not=str(error))
        except MemoryError:
            return Decoded(row, why_not="not enough memory to decode it")
        return Decoded(row | {"decode_ms": 1e3 * (time.perf_counter() - started)}, image, coarse)

    def _predict(self, batch: Sequence[Decoded]) -> list[Outcome]:
        """Labels and statistics of images of one size; in their place, the reason why there are none."""
        if batch[0].why_not:
            return [decoded.why_not for decoded in batch]
        job, started = self.job, time.perf_counter()
        images = [decoded.image for decoded in batch]
        try:
            found = list(self.teacher.label_in_batches(images, len(images), job.threshold, job.scales, job.flip))
        except NotEnoughMemory as error:
            return [str(error)] * len(batch)
        each = 1e3 * (time.perf_counter() - started) / len(batch)
        return [(label, statistics, each) for label, statistics in found]

    def _finish(self, decoded: Decoded, outcome: Outcome) -> Labelled:
        row = decoded.row
        if isinstance(outcome, str):
            return Labelled(row | {"status": QUARANTINED, "reason": outcome}, None)
        label, statistics, infer_ms = outcome
        row |= {"status": LABELLED, "infer_ms": infer_ms}
        row |= image_numbers(label, statistics, decoded.coarse)
        row["classes"] = class_numbers(label, statistics, decoded.coarse, self.space)
        row["centroids"] = centroids(label, len(self.space))
        return Labelled(row, label)

    def _place(self, sample: Sample, unit: Unit) -> Row:
        """Where a sample's label is to lie."""
        if self.job.store == "png":
            return {"label": f"{PNG}/{png_name(sample.image.relative_to(self.image_root).as_posix())}"}
        return {"label": f"{ZARR}/{unit.bucket}", "label_index": unit.first_row + unit.samples.index(sample)}

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


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _ahead(pool: ThreadPoolExecutor, work: Callable[[_T], _R], items: Iterable[_T], depth: int) -> Iterator[_R]:
    """`work(item)` of every item, in order, at most `depth` of them under way or waiting to be taken."""
    waiting: deque[Future[_R]] = deque()
    for item in items:
        if len(waiting) == depth:
            yield waiting.popleft().result()
        waiting.append(pool.submit(work, item))
    while waiting:
        yield waiting.popleft().result()


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
