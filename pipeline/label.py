"""One worker's work: a unit's images are decoded, predicted, ruled on, encoded and committed.

For a GPU, threads decode ahead of it and count behind it; on a CPU the threads predict too, each one image at a time.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle, islice, takewhile
from typing import Any

import numpy as np
import torch

from autolabel.manifests import storage
from autolabel.manifests.ahead import ahead
from autolabel.manifests.locations import BucketPath
from autolabel.manifests.machine import cores
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.ledger import Commit, Overtaken
from autolabel.manifests.run.shards import Frames
from autolabel.manifests.samples import Sample
from autolabel.manifests.wording import Progress
from autolabel.pipeline.attempts import Attempt
from autolabel.pipeline.blame import in_words, overflow, require_of_image
from autolabel.pipeline.committing import UnitWriter
from autolabel.pipeline.measure import Labelled, Predicted, encoded, labelled
from autolabel.pipeline.pace import HostNeeds, HostPace
from autolabel.pipeline.predictor import Decoded, Predictor, Refused, read_layer
from autolabel.pipeline.records import (
    FRESH,
    QUARANTINED,
    Known,
    RecordWriter,
    Row,
    committed,
    fingerprint_of,
    identified,
    read_rows,
    tally,
    write_record,
)
from autolabel.pipeline.rules import Rules
from autolabel.pipeline.units import Tally, Unit
from autolabel.teacher.memory import BATCHES, HELPERS, LARGEST_BATCH, NotEnoughMemory

_NO_IMAGE = np.empty((0, 0, 3), np.uint8)
DEATHS = 4  # processes that may die at one image before it is quarantined


@dataclass(frozen=True)
class Trial:
    """Samples labelled on trial: their rows, the seconds that all took together, and `Labeller.budget`.

    needs: of a GPU.
    """

    rows: list[Row]
    seconds: float
    budget: dict[str, Any]
    needs: HostNeeds | None


class Labeller:
    """A predictor in memory and the run that it labels; lives as long as its worker.

    A GPU is fed batches of one size, two of them in flight so that it computes one while the other is prepared or
    fetched. After a unit the threads that decode and finish are as many as it asked for, at most `threads` and the
    cores of this process, or as many as there are images under way where these come from a bucket. On a CPU each thread
    predicts one image at a time with a single thread of torch: how torch splits one image over several threads changes
    the last bits of its numbers, and a label must not depend on the cores of a machine.
    """

    def __init__(
        self,
        run: Run,
        predictor: Predictor,
        *,
        threads: int = 1,
        retry_quarantined: bool = False,
        write: RecordWriter = write_record,
    ) -> None:
        self.run_folder, self.recipe, self.predictor = run, run.recipe, predictor
        self.worker = f"{platform.node()}:{os.getpid()}"
        self.stopping = threading.Event()
        self.rules = Rules(run.policy, run.label_space, predictor.edges, silent=run.teacher is None)
        self.most = threads if predictor.device == "cpu" else min(threads, cores())
        self.pace = HostPace()
        self._begin_threads(self.most if predictor.device == "cpu" else min(HELPERS, self.most))
        self.feeders = ThreadPoolExecutor(BATCHES)
        self._retry_quarantined, self._write_record = retry_quarantined, write
        self.commit: Commit | None = None  # the newest record of the unit that `run` was at last
        self.pool.submit(predictor.budget).result()  # probes the device as the threads will use it

    def _begin_threads(self, threads: int) -> None:
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def budget(self) -> dict[str, Any]:
        """The predictor's memory, for `run.json`."""
        return self.predictor.budget()

    def stop(self) -> None:
        """Let `run` end soon: images under way are finished and committed, the rest of the unit is left."""
        self.stopping.set()

    def run(self, unit: Unit, wanted: Sequence[str], known: Known = FRESH) -> Iterator[Tally]:
        """Label the samples `wanted` (ids) of a unit that are not committed yet, then commit it.

        A unit that takes long is committed now and then: a process that is killed loses no more than that. Yields the
        sum of the finished samples, as they finish. Where an earlier process died at this unit, one image is computed
        and committed after the other, suspects last, and one at which `DEATHS` processes died is quarantined instead.
        So an image that was not to blame is soon done, and the one that is stands alone. If another worker commits the
        unit meanwhile, the sum is that of its record, and the rest is left.
        """
        self.commit = known.commit
        done = self._committed(unit, known.commit)
        asked = set(wanted)
        todo = [s for s in unit.samples if s.sample_id in asked and s.sample_id not in done]
        attempt = Attempt(self.run_folder, unit, careful=known.careful, noted=known.noted)
        attempt.add_written(self._before(known.commit, todo))
        writer = UnitWriter(self.run_folder, unit, known.commit, self._write_record)
        try:
            # An earlier call may have stopped inside this unit: the shard is written again with its rows.
            labelled = {sample_id: Labelled(row, self._stored(row)) for sample_id, row in done.items()}
            # Some of them may be wanted: another process committed them and died since.
            total = tally(row for sample_id, row in done.items() if sample_id in asked)
            yield total
            unsaved = False
            saved, interval = time.monotonic(), storage.commit_interval(self.run_folder.path)
            for number, (sample, one) in enumerate(self._label(todo, unit, attempt), 1):
                if one.encoded:
                    one = replace(one, row=self._placed(one.row, sample, unit))
                labelled[sample.sample_id], unsaved = one, True
                total += tally([one.row])
                if number < len(todo) and (attempt.careful or time.monotonic() - saved >= interval):
                    self._commit(writer, labelled, attempt, last=False)
                    saved, unsaved = time.monotonic(), False
                yield total
            if unsaved:
                self._commit(writer, labelled, attempt, last=True)
        except Overtaken as overtaken:
            self.commit = overtaken.commit
            attempt.end(committed=False)
            yield tally(row for row in read_rows(overtaken.commit) if row.sample_id in asked)
            return
        except BaseException:
            attempt.end(committed=False)
            raise
        self.commit = writer.commit
        attempt.end(committed=len(labelled) == len(done) + len(todo))

    def probe(self, samples: Sequence[Sample], unit: Unit, *, progress: Progress | None = None) -> Trial:
        """Label samples of a unit and keep nothing.

        On a GPU the first batch of each thread is slow: kernels are loaded and memory is taken. So some samples are
        labelled before, as many as the batches in flight can hold, and not counted.
        """
        if self.predictor.device != "cpu":
            deque(self._fast(list(islice(cycle(samples), BATCHES * LARGEST_BATCH)), unit), maxlen=0)
        started, rows = time.perf_counter(), list[Row]()
        for _, one in self._fast(samples, unit):
            rows.append(one.row)
            if progress:
                progress(len(rows), len(samples))
        seconds = time.perf_counter() - started
        needs = None if self.predictor.device == "cpu" else self.pace.needs(self.most)
        return Trial(rows, seconds, self.budget(), needs)

    def _label(self, todo: Sequence[Sample], unit: Unit, attempt: Attempt) -> Iterator[tuple[Sample, Labelled]]:
        return self._carefully(todo, unit, attempt) if attempt.careful else self._fast(todo, unit)

    def _fast(self, todo: Sequence[Sample], unit: Unit) -> Iterator[tuple[Sample, Labelled]]:
        label = self._label_on_cpu
        if self.predictor.device != "cpu":  # images of one size make a batch
            label, todo = self._label_on_gpu, sorted(todo, key=lambda sample: (sample.height, sample.width))
        return zip(todo, label(todo, unit), strict=False)  # shorter when it is to stop

    def _carefully(self, todo: Sequence[Sample], unit: Unit, attempt: Attempt) -> Iterator[tuple[Sample, Labelled]]:
        suspects_last = sorted(todo, key=lambda sample: attempt.deaths[sample.sample_id])
        for sample in self._until_stop(suspects_last):
            if attempt.deaths[sample.sample_id] >= DEATHS:
                row = self._known(self._row(sample, unit), sample)
                reason = f"{DEATHS} worker processes died or hung while they labelled it"
                yield sample, self._finish(Refused(row, reason))
                continue
            attempt.begin(sample.sample_id)
            yield sample, self.pool.submit(self._label_one, sample, unit).result()

    def _label_one(self, sample: Sample, unit: Unit) -> Labelled:
        (one,) = self._predict([self._decode(sample, unit)])
        return self._finish(one)

    def _committed(self, unit: Unit, commit: Commit | None) -> dict[str, Row]:
        """The rows in full of a unit's finished samples, by sample id."""
        brief = committed(self.run_folder, unit, commit, retry_quarantined=self._retry_quarantined)
        if not brief or commit is None:
            return {}
        return {row.sample_id: row for row in read_rows(commit) if row.sample_id in brief}

    def _before(self, commit: Commit | None, todo: Sequence[Sample]) -> dict[str, int]:
        """The crc32c of label PNGs that the unit's record names, by sample id, though they are to be made again."""
        if self.recipe.store != "png" or not todo or commit is None:
            return {}
        rows = read_rows(commit, ["sample_id", "label_crc32c"])
        return {row.sample_id: row.label_crc32c for row in rows if row.label_crc32c is not None}

    def _stored(self, row: Row) -> dict[str, Frames]:
        """The encoded maps of a finished sample, for a shard that is written again; PNGs stay as they are."""
        if not row.labelled or self.recipe.store == "png":
            return {}
        return {layer: encoded(read_layer(self.run_folder, row, layer), self.recipe.store) for layer in row.layers()}

    def _label_on_cpu(self, todo: Sequence[Sample], unit: Unit) -> Iterator[Labelled]:
        _, *largest = max((s.height * s.width, s.height, s.width) for s in unit.samples)
        depth = self.predictor.in_flight((largest[0], largest[1]), most=self.threads) if largest[0] else 1
        yield from ahead(self.pool, lambda sample: self._label_one(sample, unit), self._until_stop(todo), depth)

    def _label_on_gpu(self, todo: Sequence[Sample], unit: Unit) -> Iterator[Labelled]:
        now, most = self.threads, self.most
        if any(isinstance(sample.image, BucketPath) for sample in todo[:1]):  # threads that wait need no core
            now, most = max(now, HELPERS), max(most, 2 * LARGEST_BATCH)
        # The pace is that of the unit before.
        if (threads := self.pace.threads(now=now, most=most)) != self.threads:
            self.pool.shutdown()
            self._begin_threads(threads)
        depth, self.pace = 2 * LARGEST_BATCH, HostPace()
        decoded = ahead(self.pool, lambda sample: self._decode(sample, unit), self._until_stop(todo), depth)

        behind: deque[Future[Labelled]] = deque()
        for predicted in ahead(self.feeders, self._predict, self._batches(decoded), BATCHES):
            behind.extend(self.pool.submit(self._finish, one) for one in predicted)
            while len(behind) > 2 * LARGEST_BATCH:
                yield behind.popleft().result()
        yield from (future.result() for future in behind)

    def _batches(self, decoded: Iterable[Decoded | Refused]) -> Iterator[list[Decoded | Refused]]:
        """Cut into batches of images of one size; refused samples go along, and take nobody's place."""
        batch, size, room = list[Decoded | Refused](), None, 0
        for one in decoded:
            if isinstance(one, Decoded):
                shape = one.image.shape[0], one.image.shape[1]
                if size not in (None, shape):
                    yield batch
                    batch, size = [], None
                if size is None:
                    size, room = shape, self.predictor.planned_batch(shape)
                room -= 1
            batch.append(one)
            if size and not room:
                yield batch
                batch, size = [], None
        if batch:
            yield batch

    def _until_stop(self, todo: Sequence[Sample]) -> Iterator[Sample]:
        return takewhile(lambda _: not self.stopping.is_set(), todo)

    def _row(self, sample: Sample, unit: Unit) -> Row:
        return Row(sample.sample_id, unit.name, sample.height, sample.width, worker=self.worker)

    def _known(self, row: Row, sample: Sample) -> Row:
        """The row of an image that nobody has read, with what its file is known by."""
        return replace(identified(row, sample.image), image_fingerprint=fingerprint_of(sample.image))

    def _decode(self, sample: Sample, unit: Unit) -> Decoded | Refused:
        started = time.perf_counter()
        row = self._row(sample, unit)
        try:
            with self.pace.on_host():
                decoded = self.predictor.decode(sample, unit, row)
        except Exception as error:
            self._require_of_image(error)
            return Refused(self._known(row, sample), in_words(error))
        if isinstance(decoded, Refused):
            return decoded
        return replace(decoded, row=replace(decoded.row, decode_ms=1e3 * (time.perf_counter() - started)))

    def _predict(self, batch: Sequence[Decoded | Refused]) -> Sequence[Predicted | Refused]:
        """Predict images of one size; samples that are refused already stay so."""
        predicted = iter(self._predict_decoded([one for one in batch if isinstance(one, Decoded)]))
        return [next(predicted) if isinstance(one, Decoded) else one for one in batch]

    def _predict_decoded(self, decoded: Sequence[Decoded]) -> Sequence[Predicted | Refused]:
        if not decoded:
            return []
        started = time.perf_counter()
        try:
            with self.pace.on_device(len(decoded)):
                predictions = self.predictor.predict(decoded)
        except NotEnoughMemory as error:
            return [Refused(one.row, str(error)) for one in decoded]
        except Exception as error:
            self._require_of_image(error)
            if len(decoded) > 1:
                return [predicted for one in decoded for predicted in self._predict_decoded([one])]
            return [Refused(decoded[0].row, in_words(error))]
        each = 1e3 * (time.perf_counter() - started) / len(decoded)
        predicted = list[Predicted | Refused]()
        for one, prediction in zip(decoded, predictions, strict=True):
            reason = overflow(prediction, self.recipe.precision)
            done = replace(one, image=_NO_IMAGE)  # which waits for a thread, and needs its pixels no more
            predicted.append(Refused(one.row, reason) if reason else Predicted(done, prediction, each))
        return predicted

    def _finish(self, one: Predicted | Refused) -> Labelled:
        if isinstance(one, Refused):
            return Labelled(replace(one.row, status=QUARANTINED, reason=one.reason))
        try:
            with self.pace.on_host():
                return labelled(one, self.rules, self.recipe)
        except Exception as error:
            self._require_of_image(error)
            return self._finish(Refused(one.decoded.row, in_words(error)))

    def _require_of_image(self, error: Exception) -> None:
        require_of_image(error, on_gpu=self.predictor.device != "cpu")

    def _placed(self, row: Row, sample: Sample, unit: Unit) -> Row:
        """The row with the place of the sample's label."""
        label, index = unit.place(unit.samples.index(sample), self.recipe.store)
        return replace(row, label=label, label_index=index)

    def _commit(self, writer: UnitWriter, labelled: dict[str, Labelled], attempt: Attempt, *, last: bool) -> None:
        present = {s.sample_id: labelled[s.sample_id] for s in writer.unit.samples if s.sample_id in labelled}
        rows = [one.row for one in present.values()]
        if self.recipe.store == "png":
            new = {sample_id: one for sample_id, one in present.items() if one.encoded}
            pngs = {sample_id: {layer: d for layer, (d,) in one.encoded.items()} for sample_id, one in new.items()}
            writer.put_pngs(rows, pngs, attempt)
            labelled |= {sample_id: Labelled(one.row) for sample_id, one in new.items()}  # they are written once
            return
        maps = [present[s.sample_id].encoded if s.sample_id in present else {} for s in writer.unit.samples]
        writer.put(rows, maps, last=last)
