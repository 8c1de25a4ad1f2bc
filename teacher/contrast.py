"""An image with a focus beside the same image seen whole: time, labels, and the swings that a certificate needs.

A pixel's log odds are the logarithm of p / (1 - p) of its class. They fall by at most swing x (share of the highest
scale + `SPARE_SHARE`); the swing that an image needs is the largest quotient of its pixels. A label is certified where
its own quotient, log odds / (share + `SPARE_SHARE`), exceeds the swing of its class.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.policy import THRESHOLD
from autolabel.manifests.scores import Counts
from autolabel.teacher.decide import LEAST, SPARE_SHARE, bands, top_class, top_probability
from autolabel.teacher.device import autocast
from autolabel.teacher.feed import Image
from autolabel.teacher.networks.fields import Field
from autolabel.teacher.networks.focus import Focused
from autolabel.teacher.predict import Teacher

PER_UNIT = 64  # quotients are counted in steps of 1/64, and swings are multiples of it, so that counts are exact
STEPS = 64 * PER_UNIT  # those that are counted apart; larger ones are counted with the last
_EPS = torch.finfo(torch.float32).eps
_T = TypeVar("_T")


@dataclass(frozen=True)
class Seen:
    """An image as a teacher sees it. seconds: of the network. top: (H, W) uint8. confidence: of top, (H, W) float32."""

    seconds: float
    top: NDArray[np.uint8]
    confidence: NDArray[np.float32]

    @property
    def label(self) -> NDArray[np.uint8]:
        """The classes (H, W) uint8 of a probability above 0.5, elsewhere 255."""
        return np.where(self.confidence > THRESHOLD, self.top, np.uint8(IGNORE))


@dataclass(frozen=True)
class Contrast(Seen):
    """An image with a focus, beside the same image seen whole; labels are classes of a probability above 0.5.

    rows: the first row that the highest scale has seen, and the one after the last. differing: labels that are not the
    same. The others are by (within the rows seen, beyond them) and class. needed: the swing that all labels of the
    image need, 0 or more, (2, C) float32. labels, changed: the labels, and those of them that differ, counted by the
    step of their quotient (2, C, STEPS): step k has quotients above k/64, to (k+1)/64.
    """

    rows: tuple[int, int]
    differing: int
    needed: NDArray[np.float32]
    labels: Counts
    changed: Counts


@torch.inference_mode()
def contrasts(
    teacher: Teacher, image: Image, *, scales: Sequence[float], flip: bool, shares: Sequence[float]
) -> tuple[Seen, list[Contrast]]:
    """Look at an image whole, and with the focus of each share of the rows.

    Seconds are those of the calling thread's CPU, or of a GPU: let torch have one thread on a CPU. The network passes
    `require` with these scales and a focus.
    """
    pixels = teacher.feed.upload([image])[0]

    def look(focus: float | None) -> tuple[Field, float]:
        with autocast(teacher.device, teacher.precision):
            return _timed(partial(teacher.network.field, pixels, scales, flip=flip, focus=focus), device=teacher.device)

    whole, seconds = look(None)
    seen = Seen(seconds, *_joined([_decided(whole.rows(*band), whole) for band in _bands(teacher, whole)]))
    found = []
    for share in shares:
        field, took = look(share)
        assert isinstance(field, Focused)
        found.append(_contrast(teacher, whole, field, took))
    return seen, found


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The bands (1, h, W) of two maps, joined and on the host."""
    one, other = (torch.cat(maps, dim=1)[0].cpu().numpy() for maps in zip(*parts, strict=True))
    return one, other


def _timed(work: Callable[[], _T], *, device: torch.device) -> tuple[_T, float]:
    clock = time.thread_time
    if device.type == "cuda":
        clock = time.perf_counter
        torch.cuda.synchronize(device)
    start = clock()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, clock() - start


def _bands(teacher: Teacher, field: Field) -> list[tuple[int, int]]:
    return list(bands(field.size, teacher.network.channels, device=teacher.device))


def _contrast(teacher: Teacher, whole: Field, field: Focused, seconds: float) -> Contrast:
    classes, device = teacher.classes, teacher.device
    left, first, last = field.left(), *field.seen[0].tolist()
    needed = torch.zeros(2 * classes, device=device)
    counts = torch.zeros(2, 2 * classes * STEPS, dtype=torch.int64, device=device)
    parts, differing = list[tuple[Tensor, Tensor]](), 0
    for top, bottom in _bands(teacher, field):
        full = whole.rows(top, bottom)
        parts.append(_decided(field.rows(top, bottom), field))
        winner, p = (x[0] for x in parts[-1])
        best, p_whole = (x[0] for x in _decided(full, whole))
        same = torch.where(p > THRESHOLD, winner, IGNORE) == torch.where(p_whole > THRESHOLD, best, IGNORE)
        differing += int((~same).sum())
        row = torch.arange(top, bottom, device=device).unsqueeze(1)
        key = ((row < first) | (row >= last)).int() * classes + winner  # within come first
        labelled = p > THRESHOLD
        key, share = key[labelled].long(), left.rows(top, bottom)[0, 0][labelled] + SPARE_SHARE
        odds = log_odds(p[labelled])
        falls = (odds - _odds_of(full, whole, winner)[labelled]) / share
        needed.scatter_reduce_(0, key, falls, "amax")
        place = key * STEPS + (odds / share * PER_UNIT).ceil_().sub_(1).clamp_(0, STEPS - 1).long()
        for count, some in zip(counts, (place, place[~same[labelled]]), strict=True):
            count += some.bincount(minlength=len(count))
    shape = 2, classes
    labels, changed = counts.view(2, *shape, STEPS).cpu().numpy()
    numbers = needed.view(shape).cpu().numpy()
    return Contrast(seconds, *_joined(parts), (first, last), differing, numbers, labels, changed)


def _decided(values: Tensor, field: Field) -> tuple[Tensor, Tensor]:
    """The top class and its probability (B, h, W) of a band of a field."""
    return top_probability(values) if field.probable else top_class(values)


def log_odds(p: Tensor) -> Tensor:
    """The logarithm of p / (1 - p) of float32 probabilities; no more than float32 can tell from 1."""
    return p.clamp(min=LEAST).log_() - (1 - p).clamp_(min=_EPS).log_()


def _odds_of(values: Tensor, field: Field, winner: Tensor) -> Tensor:
    """The log odds (h, W) that values (1, C, h, W) of a field give the class `winner` of each pixel."""
    place = winner.long()[None, None]
    if field.probable:
        return log_odds((values.gather(1, place) / values.sum(dim=1, keepdim=True).clamp_(min=1))[0, 0])
    others = values.scatter(1, place, -torch.inf).logsumexp(dim=1)
    return (values.gather(1, place)[:, 0] - others)[0]
