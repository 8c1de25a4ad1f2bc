"""The decision: from combined logits to each pixel's top class and level of confidence, on the device, band by band.

A level is the number of edges that the softmax probability exceeds. The comparison is made on the float32 probability,
before any rounding. A map with a value per class and pixel is never whole in memory, and never copied to the host: the
device hands over one code per pixel, of one byte if class and level fit into it, and a table of counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.places import NOWHERE
from autolabel.teacher.networks.fields import Field, Size
from autolabel.teacher.networks.focus import Focused

# Bytes of a band's logits. On a CPU a band should stay in a core's cache (1, 2 and 8 MiB were slower); on a GPU it
# should keep all of it busy.
_BAND_BYTES = {"cpu": 4 << 20}
_GPU_BAND_BYTES = 256 << 20
_ROUNDING = 1e-6  # of a sum of probabilities
LEAST = 1e-30  # probability that stands for 0, whose logarithm is no number
SPARE_SHARE = 0.02  # added to the highest scale's share: where that is nearly 0, resizing still moves a little

Codes = NDArray[np.uint8] | NDArray[np.int16]


class Evidence(NamedTuple):
    """People's polygons as evidence about the pixels of a batch, on its device (manifests/evidence.py).

    places: (B, H, W) int16; at NOWHERE, 0, polygons say nothing, and the teacher decides alone, to the last bit.
    factors: (C, K) float32, the logarithm of every class's factor at every place. In places above 0 the probability of
    c becomes p(c)^teacher_weight · exp(factors[c, place]), normalised.
    """

    places: Tensor
    factors: Tensor
    teacher_weight: float


class Swings(NamedTuple):
    """How far the highest scale may move what is decided without all of it (manifests/focus.py), on the device.

    within, beyond: (C,) float32 by top class, in rows that the highest scale has seen, and in the others: the logarithm
    of the class's odds falls by at most this, times the share of the highest scale plus `SPARE_SHARE`.
    """

    within: Tensor
    beyond: Tensor


class Tops(NamedTuple):
    """Top classes (B, H, W) uint8 and their probabilities (B, H, W) float32; and the teacher's own, without evidence.

    Without evidence the two pairs are the same tensors. seconds: (B, H, W) uint8, the classes that follow the teacher's
    own; None if nobody asked. least: (B, H, W) float32, the probability that the winner has at least once the highest
    scale has seen all; 0 where another class might win; None if nobody asked.
    """

    winners: Tensor
    confidences: Tensor
    own_winners: Tensor
    own_confidences: Tensor
    seconds: Tensor | None = None
    least: Tensor | None = None

    def first(self, images: int) -> Tops:
        """The maps of the first so many images."""
        return self.map(lambda x: x[:images])

    def map(self, change: Callable[[Tensor], Tensor]) -> Tops:
        """All maps, changed."""
        winners, confidences, own_winners, own_confidences = (change(x) for x in self[:4])
        seconds, least = (None if x is None else change(x) for x in (self.seconds, self.least))
        return Tops(winners, confidences, own_winners, own_confidences, seconds, least)


@dataclass(frozen=True)
class Prediction:
    """The prediction of one image, before any rule.

    codes: (H, W) top class * levels + level, uint8 if that fits, else int16; the level of a pixel is the number of
    edges that its confidence exceeds, 0 to levels - 1. Over the pixels with the same top class: histogram (C, 20)
    int64 counts confidences p, bin k those with k/20 < p <= (k+1)/20; confidence (C,) float64 is their sum. All of this
    is after polygons were weighed. own: the codes of the teacher alone, where polygons were weighed; None elsewhere.
    probability: (H, W) uint8, the confidence in 255ths, where it was asked for.
    second: (H, W) uint8, the second class of the teacher alone, 255 where it is not to be kept; None for nowhere.
    seen: the first row that the highest scale has seen, and the one after the last; None for all. least: (H, W) uint8,
    the level that `Tops.least` reaches; None without swings.
    """

    codes: Codes
    levels: int
    histogram: NDArray[np.int64]
    confidence: NDArray[np.float64]
    own: Codes | None = None
    probability: NDArray[np.uint8] | None = None
    second: NDArray[np.uint8] | None = None
    seen: tuple[int, int] | None = None
    least: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class LabelStatistics:
    """Counts of one labelled image by class: pixels (C,) int64 were kept; the others are those of `Prediction`."""

    pixels: NDArray[np.int64]
    histogram: NDArray[np.int64]
    confidence: NDArray[np.float64]


def bands(size: Size, classes: int, *, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows that cover an image. They depend on its size, not on its batch; so do its labels."""
    height, width = size
    rows = max(1, _BAND_BYTES.get(device.type, _GPU_BAND_BYTES) // (4 * classes * width))
    return ((top, min(top + rows, height)) for top in range(0, height, rows))


def top_class(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the top class (B, h, w) uint8 of logits (B, C, h, w) float32, the lowest of equals, and its probability.

    The probability (B, h, w) float32 is the softmax of logits / temperature (Guo et al., arXiv 1706.04599, section
    4.2): 1 / sum(exp(z - max)). C is at most 255.
    """
    below = logits - logits.amax(dim=1, keepdim=True)
    winner = _winner(below)
    if temperature != 1:
        below.div_(temperature)
    return winner, below.exp_().sum(dim=1).reciprocal_()


def top_probability(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same for the probabilities (B, C, h, w) float32 of a `Field` that is probable.

    What they lack to 1 is the probability of no class. Where that is the largest, the result's probability is 0.
    """
    largest, total = scores.amax(dim=1), scores.sum(dim=1)
    winner = _winner(scores - largest.unsqueeze(1))
    none = 1 - total
    return winner, (largest / total.clamp_(min=1)).masked_fill_(none > largest, 0)


def second_class(values: Tensor, winners: Tensor) -> Tensor:
    """Return the class (B, h, w) uint8 that has the largest of `values` (B, C, h, w) but for that of the `winners`.

    C is 2 or more; of equals, it is the lowest class.
    """
    others = values.scatter(1, winners.long().unsqueeze(1), -math.inf)
    return _winner(others.sub_(others.amax(dim=1, keepdim=True)))


def _winner(below: Tensor) -> Tensor:
    """The lowest class (B, h, w) uint8 where `below`, (B, C, h, w) of values minus their maximum, is 0."""
    # argmax over an outer axis is slow. Here the lower a class is, the higher its rank; a huge multiple of `below`
    # pushes every rank but those at the maximum, where `below` is 0, far down.
    classes = below.shape[1]
    rank = torch.arange(classes, 0, -1, device=below.device, dtype=below.dtype).view(-1, 1, 1)
    winner = (classes - torch.add(rank, below, alpha=3e38).amax(dim=1)).to(torch.uint8)
    return winner.clamp_(max=classes - 1)  # where a value is not finite, this may be anything, and the confidence nan


def tempered(scores: Tensor, temperature: float) -> Tensor:
    """Return probabilities (B, C, h, w), that of no class included, to the power of 1 / temperature.

    Their sum with that of no class is 1.
    """
    total = scores.sum(dim=1, keepdim=True)
    power = 1 / temperature
    known = (scores / total.clamp(min=1)).pow_(power)
    none = (1 - total - _ROUNDING).clamp_(min=0).pow_(power)  # a root would make much of what rounding has left over
    return known / (known.sum(dim=1, keepdim=True) + none)


def top_classes(
    field: Field,
    images: int,
    *,
    classes: int,
    device: torch.device,
    channels: int | None = None,
    temperature: float = 1.0,
    evidence: Evidence | None = None,
    second: bool = False,
    swings: Swings | None = None,
) -> Tops:
    """Return the top classes of a field of B `images`, and their probabilities; with `second`, the second classes, too.

    channels: the numbers that a pixel takes while it is computed, if those are more than its classes. swings: of a
    `Focused` field, for `Tops.least`.
    """
    own_winners = torch.empty(images, *field.size, dtype=torch.uint8, device=device)
    own_confidences = torch.empty(images, *field.size, device=device)
    winners, confidences = own_winners, own_confidences
    seconds = torch.empty_like(own_winners) if second and classes > 1 else None
    if evidence is not None:
        winners, confidences = torch.empty_like(own_winners), torch.empty_like(own_confidences)
    for top, bottom in bands(field.size, channels or classes, device=device):
        values = field.rows(top, bottom)
        if field.probable and temperature != 1:
            values = tempered(values, temperature)
        own = top_probability(values) if field.probable else top_class(values, temperature)
        own_winners[:, top:bottom], own_confidences[:, top:bottom] = own
        if seconds is not None:
            seconds[:, top:bottom] = second_class(values, own[0])
        if evidence is not None:
            band = evidence._replace(places=evidence.places[:, top:bottom])
            power = band.teacher_weight / (1 if field.probable else temperature)
            weigh = _weigh_some if values.device.type == "cpu" else _weigh_all
            winners[:, top:bottom], confidences[:, top:bottom] = weigh(values, band, own, power, field.probable)
    tops = Tops(winners, confidences, own_winners, own_confidences, seconds)
    if swings is None or not isinstance(field, Focused):
        return tops
    power = max(1.0, evidence.teacher_weight if evidence else 1.0) / temperature
    left, least = field.left(), torch.empty_like(confidences)
    for top, bottom in bands(field.size, channels or classes, device=device):
        row = torch.arange(top, bottom, device=device)
        seen = (row >= field.seen[:, :1]) & (row < field.seen[:, 1:])  # (B, rows)
        share = (left.rows(top, bottom)[:, 0] + SPARE_SHARE) * power
        decided = winners[:, top:bottom], confidences[:, top:bottom]
        least[:, top:bottom] = least_probability(*decided, share, swings, seen=seen.unsqueeze(2))
    return tops._replace(least=least)


def least_probability(winner: Tensor, confidence: Tensor, share: Tensor, swings: Swings, *, seen: Tensor) -> Tensor:
    """Return the probability that the winner keeps at least if the logarithm of its odds falls by share x swing.

    winner (B, h, w) uint8, confidence and share (B, h, w) float32, seen (B, h, 1) bool. It is 0 where that may be 0.5
    or less, for another class may win there. Rounding makes no confidence more certain than float32 can say.
    """
    within, beyond = (swing.index_select(0, winner.flatten().int()).view(winner.shape) for swing in swings)
    swing = torch.where(seen, within, beyond)
    others = (1 - confidence).clamp_(min=torch.finfo(torch.float32).eps) * (swing * share).exp_()
    least = confidence / (confidence + others)
    return least.masked_fill_(least <= 0.5, 0)


def _weigh_some(
    values: Tensor, band: Evidence, own: tuple[Tensor, Tensor], power: float, probable: bool
) -> tuple[Tensor, Tensor]:
    """Top classes and probabilities of a band after the evidence. Only pixels of which it says something are computed.

    values (B, C, h, W): logits, or probabilities. own: what the teacher makes of them alone.
    """
    winners, confidences = (x.clone() for x in own)
    for image, places in enumerate(band.places):
        where = places.flatten().nonzero().flatten()
        if len(where):
            some = values[image].flatten(1).index_select(1, where)
            factors = band.factors.index_select(1, places.flatten().index_select(0, where).int())
            winner, confidence = _posterior(some[None, :, None], factors[:, None], power, probable=probable)
            winners[image].view(-1)[where] = winner.flatten()
            confidences[image].view(-1)[where] = confidence.flatten()
    return winners, confidences


def _weigh_all(
    values: Tensor, band: Evidence, own: tuple[Tensor, Tensor], power: float, probable: bool
) -> tuple[Tensor, Tensor]:
    """Do the same in the way of a GPU, which need not wait for the number of such pixels: all are computed."""
    factors = band.factors.index_select(1, band.places.flatten().int())
    factors = factors.view(-1, *band.places.shape).transpose(0, 1)
    posterior, where = _posterior(values, factors, power, probable=probable), band.places > NOWHERE
    winners, confidences = (torch.where(where, new, old) for new, old in zip(posterior, own, strict=True))
    return winners, confidences


def _posterior(values: Tensor, factors: Tensor, power: float, *, probable: bool) -> tuple[Tensor, Tensor]:
    """The top class of p(c)^power · exp(factor of c), normalised, and its probability.

    values: (B, C, h, w). factors: the same, or (C, h, w). Of probabilities, no class has the share that it had before.
    """
    if not probable:
        return top_class(torch.add(factors, values, alpha=power))
    total = values.sum(dim=1)
    winner, confidence = top_class(torch.add(factors, values.clamp(min=LEAST).log_(), alpha=power))
    confidence *= total.clamp(max=1)
    return winner, confidence.masked_fill_(1 - total > confidence, 0)


def encode(winners: Tensor, confidences: Tensor, *, classes: int, edges: Sequence[float]) -> Tensor:
    """Return the codes of `Prediction` from top classes, their probabilities, and ascending edges."""
    levels = len(edges) + 1
    return (winners if classes * levels <= 256 else winners.short()) * levels + level_of(confidences, edges=edges)


def level_of(confidences: Tensor, *, edges: Sequence[float]) -> Tensor:
    """Return the number of edges that each confidence exceeds, uint8."""
    level = torch.zeros_like(confidences, dtype=torch.uint8)
    exceeds = torch.empty_like(level, dtype=torch.bool)
    for edge in edges:
        level += torch.gt(confidences, edge, out=exceeds).view(torch.uint8)
    return level


def keep(codes: Codes, classes: int) -> NDArray[np.uint8]:
    """Return labels of codes with two levels: the top class if its confidence exceeds the edge, else 255; uint8."""
    table = np.full(2 * classes, IGNORE, np.uint8)
    table[1::2] = np.arange(classes)
    return table[codes]
