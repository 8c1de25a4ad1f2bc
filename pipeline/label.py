"""Label one unit: decode, predict, decide, count, encode, write the shard, commit.

This is what a worker does, with or without Ray. A damaged image costs that image: it is quarantined with its reason.
Trouble of the disk is not the image's fault and stops the unit, which then counts as not done.
"""

from __future__ import annotations

import errno
import os
import platform
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import groupby, islice, repeat, takewhile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from autolabel.manifests.files import fingerprint_bytes, write_bytes
from autolabel.manifests.images import BadImage, decode_image, decode_label, encode_label
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.run.centroids import centroids
from autolabel.manifests.run.labels import CONFIDENCE, LABELS, TOP, in_layer, png_name, read_png, zarr_folder
from autolabel.manifests.run.shards import Frames, Label, crc32c, encode_zarr, read_zarr, write_zarr_shard
from autolabel.manifests.samples import Sample
from autolabel.manifests.schemas import CONFIDENCE_BINS, FATES
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.records import (
    LABELLED,
    QUARANTINED,
    UNITS,
    Attempt,
    Row,
    committed,
    fingerprint_of,
    read_record,
    tally,
    write_record,
)
from autolabel.pipeline.rules import Outcome, Rules
from autolabel.pipeline.units import Tally, Unit
from autolabel.teacher.decide import Prediction
from autolabel.teacher.predict import LARGEST_BATCH, NotEnoughMemory, Plan, Teacher, load_teacher


@dataclass(frozen=True)
class Labelled:
    """One sample: its row of numbers, and its map of every layer as it will be stored; none if it was quarantined."""

    row: Row
    encoded: dict[str, Frames] = field(default_factory=dict)


DEATHS = 4  # of processes at one image, until it is quarantined
_HELPERS = 4  # threads that decode for a GPU, and count and encode behind it
_IN_FLIGHT = 2  # batches
_T = TypeVar("_T")
_R = TypeVar("_R")
Predicted = tuple[Prediction, float] | str  # with its milliseconds; or why there is none


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
        self.edges = job.policy.edges(space, job.keep_confidence)
        self.left_out = job.policy.left_out(space)
        self.worker = f"{platform.node()}:{os.getpid()}"
        self.stopping = threading.Event()
        self._set_up(device, threads)
        self.rules = Rules(job.policy, space, self.edges)

    def _set_up(self, device: str, threads: int) -> None:
        job = self.job
        self.teacher: Teacher = load_teacher(job.teacher, device, job.precision, job.combine)
        self.threads = threads if self.teacher.device.type == "cpu" else max(threads, _HELPERS)
        self.pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        self.feeders = ThreadPoolExecutor(_IN_FLIGHT)
        self._plan: Plan = self.pool.submit(self.teacher.plan, job.scales, job.flip).result()
        self._planned: dict[str, int] = {}  # images at once by size, as "HEIGHTxWIDTH"

    def plan(self) -> dict[str, Any]:
        """What was probed, and how many images of each size are computed at once; for `run.json`."""
        fits = {_name(size): batch for size, batch in self.teacher.fits.items()}
        return {**asdict(self._plan), "images_at_once": self._planned | fits}

    def stop(self) -> None:
        """Let `run` end soon: images under way are finished and committed, the rest of the unit is left."""
        self.stopping.set()

    def run(self, unit: Unit, wanted: Sequence[str]) -> Iterator[Tally]:
        """Label the samples `wanted` (ids) of a unit that are not committed yet, then commit it.

        Yields what has become of them so far, as they finish. Where an earlier process died at this unit, one image is
        computed and committed after the other, suspects last, and one at which `DEATHS` processes died is quarantined
        instead. So an image that was not to blame is soon done, and the one that is stands alone.
        """
        done = self._committed(unit)
        todo = [s for s in unit.samples if s.sample_id in set(wanted) and s.sample_id not in done]
        attempt = Attempt(self.job.out, unit)
        try:
            # Rows of an earlier call that stopped inside this unit: the shard is written again with them.
            outcomes = {sample_id: Labelled(row, self._stored(row)) for sample_id, row in done.items()}
            total = tally(row for sample_id, row in done.items() if sample_id in set(wanted))  # by one that died since
            for sample, outcome in self._outcomes(todo, unit, attempt):
                if outcome.encoded:
                    outcome.row.update(self._place(sample, unit))
                outcomes[sample.sample_id] = outcome
                total += tally([outcome.row])
                if attempt.careful:
                    self._commit(unit, outcomes)
                yield total
            self._commit(unit, outcomes)
        except BaseException:
            attempt.end(committed=False)
            raise
        attempt.end(committed=len(outcomes) == len(done) + len(todo))

    def probe(self, samples: Sequence[Sample], unit: Unit) -> tuple[list[Row], float]:
        """Label samples of a unit and keep nothing: their rows, and the seconds that all took together."""
        started = time.perf_counter()
        rows = [outcome.row for _, outcome in self._fast(samples, unit)]
        return rows, time.perf_counter() - started

    def _outcomes(self, todo: Sequence[Sample], unit: Unit, attempt: Attempt) -> Iterator[tuple[Sample, Labelled]]:
        return self._carefully(todo, unit, attempt) if attempt.careful else self._fast(todo, unit)

    def _fast(self, todo: Sequence[Sample], unit: Unit) -> Iterator[tuple[Sample, Labelled]]:
        label = self._label_on_cpu if self.teacher.device.type == "cpu" else self._label_on_gpu
        return zip(todo, label(todo, unit), strict=False)  # shorter when it is to stop

    def _carefully(self, todo: Sequence[Sample], unit: Unit, attempt: Attempt) -> Iterator[tuple[Sample, Labelled]]:
        suspects_last = sorted(todo, key=lambda sample: attempt.deaths[sample.sample_id])
        for sample in self._until_stop(suspects_last):
            if attempt.deaths[sample.sample_id] >= DEATHS:
                why = f"{DEATHS} worker processes died or hung while they labelled it"
                row = self._start(sample, unit) | _identify(sample.image) | {"status": QUARANTINED, "reason": why}
                yield sample, Labelled(row | {"image_fingerprint": fingerprint_of(sample.image)})
                continue
            attempt.begin(sample.sample_id)
            yield sample, self.pool.submit(self._label_one, sample, unit).result()

    def _label_one(self, sample: Sample, unit: Unit) -> Labelled:
        decoded = self._decode(sample, unit)
        return self._finish(decoded, *self._predict([decoded]))

    def _committed(self, unit: Unit) -> dict[str, Row]:
        """The rows in full that are done of a unit, by sample id."""
        brief = committed(self.job.out, unit, self.job.retry_quarantined)
        if not brief:
            return {}
        table, _ = read_record(self.job.out / UNITS / unit.record)
        return {row["sample_id"]: row for row in table.to_pylist() if row["sample_id"] in brief}

    def _stored(self, row: Row) -> dict[str, Frames]:
        if row["status"] != LABELLED:
            return {}
        layers = [LABELS] + [layer for layer in (TOP, CONFIDENCE) if row[f"{layer}_crc32c"] is not None]
        return {layer: self._encode(read_layer(self.job.out, row, layer)) for layer in layers}

    def _encode(self, label: Label) -> Frames:
        return (encode_label(label),) if self.job.store == "png" else encode_zarr(label)

    def _label_on_cpu(self, todo: Sequence[Sample], unit: Unit) -> Iterator[Labelled]:
        _, *largest = max((s.height * s.width, s.height, s.width) for s in unit.samples)
        depth = self._at_once((largest[0], largest[1]), self.threads)
        yield from ahead(self.pool, lambda sample: self._label_one(sample, unit), self._until_stop(todo), depth)

    def _label_on_gpu(self, todo: Sequence[Sample], unit: Unit) -> Iterator[Labelled]:
        depth = 2 * LARGEST_BATCH
        decoded = ahead(self.pool, lambda sample: self._decode(sample, unit), self._until_stop(todo), depth)

        def batches() -> Iterator[list[Decoded]]:
            for size, same in groupby(decoded, lambda d: d.image.shape[:2]):
                while batch := list(islice(same, self._at_once((size[0], size[1]), LARGEST_BATCH, _IN_FLIGHT))):
                    yield batch

        behind: deque[Future[Labelled]] = deque()
        for batch, outcomes in ahead(self.feeders, lambda b: (b, self._predict(b)), batches(), _IN_FLIGHT):
            behind.extend(map(self.pool.submit, repeat(self._finish), batch, outcomes))
            while len(behind) > 2 * LARGEST_BATCH:
                yield behind.popleft().result()
        yield from (future.result() for future in behind)

    def _until_stop(self, todo: Sequence[Sample]) -> Iterator[Sample]:
        return takewhile(lambda _: not self.stopping.is_set(), todo)

    def _at_once(self, size: tuple[int, int], most: int, batches: int = 1) -> int:
        if not all(size):  # a sample that could not be decoded
            return 1
        return self._planned.setdefault(_name(size), self._plan.at_once(*size, most, batches))

    def _start(self, sample: Sample, unit: Unit) -> Row:
        row: Row = {"sample_id": sample.sample_id, "unit": unit.name, "worker": self.worker}
        return row | {"height": sample.height, "width": sample.width}

    def _decode(self, sample: Sample, unit: Unit) -> Decoded:
        row = self._start(sample, unit)
        try:
            started = time.perf_counter()
            row |= _identify(sample.image)
            data = _read(sample.image)
            row["image_fingerprint"] = fingerprint_bytes(data)
            image = decode_image(data)
            coarse = read_coarse(sample, self.space)
            check_sizes(sample, image, coarse)
        except BadImage as error:
            return Decoded(row, why_not=str(error))
        except MemoryError:
            return Decoded(row, why_not="not enough memory to decode it")
        return Decoded(row | {"decode_ms": 1e3 * (time.perf_counter() - started)}, image, coarse)

    def _predict(self, batch: Sequence[Decoded]) -> list[Predicted]:
        """What the teacher says of images of one size; in its place, the reason why it says nothing."""
        if batch[0].why_not:
            return [decoded.why_not for decoded in batch]
        job, started = self.job, time.perf_counter()
        images = [decoded.image for decoded in batch]
        try:
            asked = len(images), self.edges, job.scales, job.flip, job.policy.temperature
            human = self.left_out, [decoded.coarse for decoded in batch]
            found = list(self.teacher.predict_in_batches(images, *asked, *human))
        except NotEnoughMemory as error:
            return [str(error)] * len(batch)
        each = 1e3 * (time.perf_counter() - started) / len(batch)
        return [(prediction, each) for prediction in found]

    def _finish(self, decoded: Decoded, predicted: Predicted) -> Labelled:
        row = decoded.row
        if isinstance(predicted, str):
            return Labelled(row | {"status": QUARANTINED, "reason": predicted})
        prediction, infer_ms = predicted
        outcome = self.rules.apply(prediction.codes, decoded.coarse)
        row |= {"status": LABELLED, "infer_ms": infer_ms}
        row |= image_numbers(outcome, prediction)
        row["classes"] = class_numbers(outcome, prediction, self.space)
        row["centroids"] = centroids(outcome.label, len(self.space))
        started = time.perf_counter()
        encoded = {LABELS: self._encode(outcome.label)}
        if self.job.keep_confidence:
            top, level = np.divmod(prediction.codes, prediction.levels)
            for layer, kept in ((TOP, top.astype(np.uint8)), (CONFIDENCE, level.astype(np.uint8))):
                encoded[layer] = self._encode(kept)
                row[f"{layer}_crc32c"] = crc32c(kept)
        row |= {"encode_ms": 1e3 * (time.perf_counter() - started), "label_bytes": sum(map(len, encoded[LABELS]))}
        return Labelled(row, encoded)

    def _place(self, sample: Sample, unit: Unit) -> Row:
        """Where a sample's label is to lie."""
        if self.job.store == "png":
            return {"label": f"{LABELS}/{png_name(sample.image.relative_to(self.image_root).as_posix())}"}
        place = f"{zarr_folder(LABELS)}/{unit.bucket}"
        return {"label": place, "label_index": unit.first_row + unit.samples.index(sample)}

    def _commit(self, unit: Unit, outcomes: dict[str, Labelled]) -> None:
        present = [outcomes[s.sample_id] for s in unit.samples if s.sample_id in outcomes]
        run, shards = self.job.out, {}
        if self.job.store == "png":
            for outcome in present:
                for layer, (data,) in outcome.encoded.items():
                    write_bytes(run / in_layer(outcome.row["label"], layer), data)
        else:
            encoded = [outcomes[s.sample_id].encoded if s.sample_id in outcomes else {} for s in unit.samples]
            for layer in dict.fromkeys(layer for maps in encoded for layer in maps):
                array = run / zarr_folder(layer) / unit.bucket
                maps = [one.get(layer) for one in encoded]
                shards[layer] = write_zarr_shard(array, unit.first_row, self.job.unit_size, maps)
        write_record(run, unit, [outcome.row for outcome in present], shards)


def read_layer(run: Path, row: Row, layer: str) -> Label:
    """The map of a layer that belongs to a row of a commit record. Raises DamagedLabel."""
    path = run / in_layer(row["label"], layer)
    if row["label_index"] is None:
        return read_png(path)
    return read_zarr(path, row["label_index"], 0, 0, row["height"], row["width"])


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def ahead(pool: ThreadPoolExecutor, work: Callable[[_T], _R], items: Iterable[_T], depth: int) -> Iterator[_R]:
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


# What the file itself is to blame for; any other error of the disk stops the unit, which is then tried again.
_OF_THE_FILE = {
    errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG
}  # fmt: skip
_MAX_FILE = 1 << 30  # bytes; no photograph comes near it


def _read(image: Path) -> bytes:
    try:
        about = image.stat()
        if not stat.S_ISREG(about.st_mode):
            raise BadImage("not a regular file")
        if about.st_size > _MAX_FILE:
            raise BadImage(f"{about.st_size} bytes: expected at most {_MAX_FILE}")
        return image.read_bytes()
    except FileNotFoundError as error:
        raise BadImage("the file is missing") from error
    except OSError as error:
        if error.errno not in _OF_THE_FILE:
            raise
        raise BadImage(f"the file cannot be read ({error.strerror})") from error


def read_coarse(sample: Sample, space: LabelSpace) -> Label | None:
    """The human coarse label (H, W) uint8 train ids, None if there is none. Raises BadImage."""
    if sample.coarse_label is None:
        return None
    try:
        return decode_label(_read(sample.coarse_label), space, sample.label_ids)
    except BadImage as error:
        raise BadImage(f"its coarse label {sample.coarse_label}: {error}") from error


def check_sizes(sample: Sample, image: NDArray[Any], coarse: Label | None) -> None:
    """Raise BadImage unless an image (H, W, …) and its coarse label have the size that the manifest says."""
    found, listed = image.shape[:2], (sample.height, sample.width)
    if found != listed:
        raise BadImage(
            f"the image is {found[1]} x {found[0]} but its manifest says {listed[1]} x {listed[0]}: scan again"
        )
    if coarse is not None and coarse.shape != found:
        raise BadImage(f"its coarse label is {coarse.shape[1]} x {coarse.shape[0]}, the image {found[1]} x {found[0]}")


def image_numbers(outcome: Outcome, prediction: Prediction) -> Row:
    """An image's row of `stats/images.parquet`, as far as it follows from the label.

    agreement_with_coarse: share of the coarse pixels to which the teacher, before the coarse label was asked, gives the
    same class (null without coarse pixels).
    """
    label = outcome.label
    labelled, coarse_pixels = int(outcome.pixels.sum()), int(outcome.coarse.sum())
    return {
        "labelled_pixels": labelled,
        "ignored_fraction": 1 - labelled / label.size,
        "mean_confidence": float(prediction.confidence.sum()) / label.size,
        "coarse_pixels": coarse_pixels,
        "agreement_with_coarse": int(outcome.agreeing.sum()) / coarse_pixels if coarse_pixels else None,
        "label_crc32c": crc32c(label),
    }


def class_numbers(outcome: Outcome, prediction: Prediction, space: LabelSpace) -> list[Row]:
    """The rows of `stats/classes.parquet` for one image: every class that the teacher or the coarse label names.

    mean_confidence and confidence_hist are over the pixels whose top class it is, before the threshold, and so are the
    fates. coarse_pixels: pixels of this class in the coarse label; agreeing_pixels: those to which the teacher, before
    the coarse label was asked, gives the same class; contradicted_pixels: another one (it gives none to the rest).
    undrawn_pixels: of the pixels whose top class it is, those where the coarse label, if there is one, names none.
    """
    rows = []
    for c, name in enumerate(space.names):
        seen, coarse_pixels = int(prediction.histogram[c].sum()), int(outcome.coarse[c])
        if seen == 0 and coarse_pixels == 0:
            continue
        pixels = int(outcome.pixels[c])
        rows.append(
            {
                "class_id": c,
                "class_name": name,
                "pixels": pixels,
                "fraction": pixels / outcome.label.size,
                "mean_confidence": float(prediction.confidence[c]) / seen if seen else None,
                "confidence_hist": prediction.histogram[c].tolist() if seen else [0] * CONFIDENCE_BINS,
                "coarse_pixels": coarse_pixels,
                "agreeing_pixels": int(outcome.agreeing[c]),
                "contradicted_pixels": int(outcome.contradicted[c]),
                "undrawn_pixels": int(outcome.left_out[c]),
                **{f"{fate}_pixels": int(n) for fate, n in zip(FATES, outcome.fates[c], strict=True)},
                "from_human_pixels": int(outcome.from_human[c]),
            }
        )
    return rows
