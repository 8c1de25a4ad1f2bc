"""Ask a teacher about the pixels that nobody named, and hold what it says of a place against what is true there.

The teacher is asked about all of these pixels; some of them, drawn by chance, are kept to fit weights to. What an image
is fitted with leaves out its own pixels, so that a table of few images does not flatter itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from autolabel.manifests.ahead import ahead
from autolabel.manifests.evidence import OUTSIDE, PolygonCounts, beside
from autolabel.manifests.images import BadImage
from autolabel.manifests.machine import cores
from autolabel.manifests.places import NOWHERE, places
from autolabel.manifests.reading import read_photograph
from autolabel.manifests.samples import Sample
from autolabel.manifests.scores import Counts
from autolabel.manifests.wording import Progress
from autolabel.pipeline.analysis.polygons import PairedSamples
from autolabel.pipeline.analysis.weighing import Floats, Pixels
from autolabel.teacher.feed import Image
from autolabel.teacher.predict import Teacher

_LOOKED_AT = 300_000  # pixels of an image whose probabilities are computed


class Looked(NamedTuple):
    """An image at which a teacher has looked, in its unnamed pixels of known truth.

    Of some of them: logarithms of p (N, C) float32, the place, less 1, and the true class, (N,) each. Of all of them,
    (C, bins, C) each: how many are truly of a class, and the sums of p.
    """

    teacher: Floats
    place: NDArray[np.int16]
    truth: NDArray[np.uint8]
    true: Counts
    said: NDArray[np.float64]


@dataclass(frozen=True)
class Gatherer:
    """Asks the teacher about unnamed pixels. On a CPU, each image takes one thread."""

    teacher: Teacher
    scales: tuple[float, ...]
    flip: bool
    paired: PairedSamples
    pixels: int

    def all(self, samples: Sequence[Sample], progress: Progress | None) -> tuple[list[Looked], list[str]]:
        """The pixels of every image that has any, in order, and why images could not be read."""
        found, bad = list[Looked](), list[str]()
        on_cpu, before = self.teacher.device.type == "cpu", torch.get_num_threads()
        threads, each = (min(cores(), len(samples)), 1) if on_cpu else (1, before)
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(each,)) as pool:
                depth = pool.submit(self._at_once, samples, threads).result()
                for done, one in enumerate(ahead(pool, self._of, enumerate(samples), depth), start=1):
                    if isinstance(one, str):
                        bad.append(one)
                    elif len(one.truth):
                        found.append(one)
                    if progress:
                        progress(done, len(samples))
        finally:
            torch.set_num_threads(before)
        return found, bad

    def _at_once(self, samples: Sequence[Sample], most: int) -> int:
        _, height, width = max((s.height * s.width, s.height, s.width) for s in samples)
        return self.teacher.budget(scales=self.scales, flip=self.flip).in_flight(height, width, most=most)

    def _of(self, item: tuple[int, Sample]) -> Looked | str:
        number, sample = item
        pair = self.paired.read(sample)
        if isinstance(pair, str):
            return pair
        classes = len(self.paired.space)
        step = max(1, math.isqrt(pair.fine.size // _LOOKED_AT))
        some = np.s_[::step, ::step]
        place, truth = places(pair.coarse, classes)[some].ravel(), pair.fine[some].ravel()
        unnamed = np.flatnonzero((place != NOWHERE) & (truth < classes))
        place, truth = place[unnamed] - np.int16(1), truth[unnamed]
        shape = (classes, len(OUTSIDE) + 1, classes)
        logs, said = np.zeros((0, classes), np.float32), np.zeros(shape)
        if len(unnamed):
            try:
                image = read_photograph(sample)
            except (BadImage, OSError) as error:
                return str(error)
            logs = self._logarithms(image, unnamed, step)[:, :classes]
            for c in range(classes):
                said[..., c] = np.bincount(place, np.exp(logs[:, c]), classes * shape[1]).reshape(shape[:2])
        true = np.bincount(place.astype(np.intp) * classes + truth, minlength=said.size).reshape(shape)
        drawn: slice | NDArray[np.intp] = np.s_[:]
        if len(unnamed) > self.pixels:
            drawn = np.sort(np.random.default_rng(number).choice(len(unnamed), self.pixels, replace=False))
        return Looked(logs[drawn], place[drawn], truth[drawn], true, said)

    def _logarithms(self, image: Image, drawn: NDArray[np.intp], step: int) -> Floats:
        """The logarithms of the teacher's probabilities (N, C) at places of the image's every `step`-th pixels.

        There may be one more column, for no class.
        """
        if step == 1:
            logits = self.teacher.logits(image, scales=self.scales, flip=self.flip).flatten(1)
            scores = logits[:, torch.from_numpy(drawn).to(logits.device)].double().cpu()
        else:
            sampled = self.teacher.sampled_logits(image, every=step, scales=self.scales, flip=self.flip)
            scores = torch.from_numpy(sampled.reshape(len(sampled), -1)[:, drawn]).double()
        logarithms: Floats = scores.log_softmax(dim=0).T.float().numpy()
        return logarithms


def _sums(looked: Sequence[Looked]) -> tuple[Counts, NDArray[np.float64]]:
    return np.sum([one.true for one in looked], axis=0), np.sum([one.said for one in looked], axis=0)


def beside_teacher(counts: PolygonCounts, looked: Sequence[Looked], *, teacher: str) -> PolygonCounts:
    """The counts, and how much more often classes lie at places than the teacher says, to three decimals.

    teacher: its sha256.
    """
    rows = (beside(*_sums(looked)).round(3) + 0).tolist()  # + 0: no -0.0
    lifts = tuple(tuple(tuple(row) for row in of_class) for of_class in rows)
    return replace(counts, beside_teacher=lifts, teacher=teacher)


def pixels_beside(looked: Sequence[Looked]) -> list[Pixels]:
    """The pixels of two images or more, each beside what the others say."""
    (true, said), found = _sums(looked), list[Pixels]()
    for one in looked:
        table = beside(true - one.true, np.maximum(said - one.said, 0)).reshape(-1, true.shape[-1])
        found.append(Pixels(one.teacher, table.astype(np.float32)[one.place], one.truth))
    return found
