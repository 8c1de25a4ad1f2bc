"""Count how a network labels images: read ahead, predicted in planned batches, counted behind.

Counts are whole numbers that add up, and the prediction of an image depends on nothing but the image and the kind of
device. So the order of the images, their neighbours, and the threads and processes that share them change no score.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, groupby, islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from autolabel.manifests.ahead import ahead
from autolabel.manifests.scores import BoundaryF, Confusion
from autolabel.student.data import ManifestDataset
from autolabel.student.worst import Worst
from autolabel.teacher.memory import BATCHES, HELPERS, LARGEST_BATCH
from autolabel.teacher.predict import Teacher


class ScoreCounts:
    """The counts that scores follow from; those of borders and the worst images only if they are to be complete."""

    def __init__(self, classes: int, *, complete: bool) -> None:
        self.confusion = Confusion(classes)
        self.boundary = BoundaryF(classes) if complete else None
        self.worst = Worst() if complete else None

    def add(self, place: int, truth: NDArray[np.uint8], *, prediction: NDArray[np.uint8]) -> None:
        """Count an image by its place in the data set: two label maps (H, W) uint8 of train ids."""
        own = Confusion(len(self.confusion.matrix))
        own.add(truth, prediction)
        self.confusion.merge(own)
        if self.boundary is not None:
            self.boundary.add(truth, prediction)
        if self.worst is not None:
            self.worst.add(place, miou=own.mean_iou(), prediction=prediction)

    def merge(self, other: ScoreCounts) -> None:
        """Add the counts of other images, which are as complete."""
        self.confusion.merge(other.confusion)
        if self.boundary is not None and other.boundary is not None:
            self.boundary.merge(other.boundary)
        if self.worst is not None and other.worst is not None:
            self.worst.merge(other.worst)


class _Item(NamedTuple):
    """An image, (H, W, 3) uint8, its label, (H, W) uint8, and its place in the data set."""

    place: int
    image: NDArray[np.uint8]
    truth: NDArray[np.uint8]


class _Labelled(NamedTuple):
    """The true label of an image, and the predicted one; both (H, W) uint8."""

    place: int
    truth: NDArray[np.uint8]
    prediction: NDArray[np.uint8]


@dataclass(frozen=True)
class ImageCounter:
    """A network, the images to score it on, and how it looks at them.

    On a CPU, as many images are predicted at once as torch has threads here, each by a single one: how torch splits an
    image over several threads changes the last bits of its numbers. Memory may allow fewer.
    """

    teacher: Teacher
    dataset: ManifestDataset
    scales: tuple[float, ...]
    flip: bool = False
    focus: float | None = None
    complete: bool = False

    def counts(self) -> ScoreCounts:
        """Return counts of no image."""
        return ScoreCounts(len(self.dataset.label_space), complete=self.complete)

    def by_size(self, places: Iterable[int]) -> list[int]:
        """Return places of images so that those of one size follow each other: a GPU computes them together."""
        samples = self.dataset.samples
        return sorted(places, key=lambda place: (samples[place].height, samples[place].width))

    def each(self, places: Sequence[int]) -> Iterator[ScoreCounts]:
        """Yield the counts of the images at these places, in any order.

        Raises NotEnoughMemory and MemoryTaken, and ValueError as reading does.
        """
        if not places:  # of the last processes of a team that has more of them than there are images
            return
        threads = torch.get_num_threads()
        try:
            yield from (self._on_cpu if self.teacher.device.type == "cpu" else self._in_batches)(self.by_size(places))
        finally:
            torch.set_num_threads(threads)  # else threads that begin later take the number of the last one

    def _on_cpu(self, places: Sequence[int]) -> Iterator[ScoreCounts]:
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            depth = pool.submit(self._in_flight, places, threads).result() if threads > 1 else 1

            def whole(place: int) -> ScoreCounts:
                return self._count(self._predict([self._read(place)])[0])

            yield from ahead(pool, whole, places, depth)

    def _in_batches(self, places: Sequence[int]) -> Iterator[ScoreCounts]:
        depth = self._in_flight(places, BATCHES)
        with ThreadPoolExecutor(HELPERS) as helpers, ThreadPoolExecutor(BATCHES) as feeders:
            items = ahead(helpers, self._read, places, 2 * LARGEST_BATCH)

            def batches() -> Iterator[list[_Item]]:
                for size, same in groupby(items, lambda item: item.truth.shape):
                    while batch := list(islice(same, self.teacher.planned_batch(size, scales=self.scales))):
                        yield batch

            predicted = ahead(feeders, lambda batch: self._predict(batch, alone=depth == 1), batches(), depth)
            yield from ahead(helpers, self._count, chain.from_iterable(predicted), 2 * LARGEST_BATCH)

    def _in_flight(self, places: Sequence[int], most: int) -> int:
        """Return the number of batches that fit into memory together, 1 to `most`, by the largest image."""
        samples = [self.dataset.samples[place] for place in places]
        _, height, width = max((s.height * s.width, s.height, s.width) for s in samples)
        batch = self.teacher.planned_batch((height, width), scales=self.scales)
        budget = self.teacher.budget(scales=self.scales, flip=self.flip, focus=self.focus)
        return budget.in_flight(height, width, batch=batch, most=most)

    def _read(self, place: int) -> _Item:
        item = self.dataset[place]
        return _Item(place, item["image"].permute(1, 2, 0).numpy(), item["label"].numpy())

    def _predict(self, items: Sequence[_Item], *, alone: bool = False) -> list[_Labelled]:
        """Predict images of one size, at most one batch; without edges, codes are classes."""
        planned = self.teacher.planned_batch(items[0].truth.shape, scales=self.scales)
        predictions = self.teacher.predict_in_batches(
            [item.image for item in items], planned, edges=(), scales=self.scales, flip=self.flip, focus=self.focus,
            alone=alone,
        )  # fmt: skip
        return [
            _Labelled(item.place, item.truth, prediction.codes.astype(np.uint8, copy=False))
            for item, prediction in zip(items, predictions, strict=True)
        ]

    def _count(self, one: _Labelled) -> ScoreCounts:
        counts = self.counts()
        counts.add(one.place, one.truth, prediction=one.prediction)
        return counts
