"""The decision: from combined logits to each pixel's top class and level of confidence, on the device, band by band.

A level is the number of thresholds that the softmax probability exceeds. The comparison is made on the float, before
any rounding. No tensor with a value per class and pixel is ever whole in memory, let alone copied to the host: what
leaves the device is one code per pixel, of one byte where class and level fit into it, and a table of counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.schemas import CONFIDENCE_BINS
from autolabel.teacher.networks.combine import Field, Size

# A band's logits: on a CPU they should stay near the core (1, 2 and 8 MiB were slower), on a GPU keep all of it busy.
_BAND_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
_COUNTED_AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 26}  # pixels, likewise


class Undrawn(NamedTuple):
    """Where people outlined nothing, (B, H, W) bool, and the share of each class that they do not outline, (C,) > 0.

    By Bayes' rule the latter is how likely each class makes the former: there its probability is multiplied by it.
    """

    where: Tensor
    shares: Tensor


@dataclass(frozen=True)
class Prediction:
    """What the teacher says of one image, before any rule.

    codes (H, W): top class * levels + level, uint8 if that fits, else int16; a pixel's level is the number of edges
    that its confidence exceeds, 0 to levels - 1. Over the pixels whose top class it is: histogram (C, 20) int64, bin k
    of which holds k/20 < p <= (k+1)/20, and confidence (C,) float64, their sum.
    """

    codes: NDArray[np.uint8] | NDArray[np.int16]
    levels: int
    histogram: NDArray[np.int64]
    confidence: NDArray[np.float64]


@dataclass(frozen=True)
class LabelStatistics:
    """Counts of one labelled image, by class: pixels (C,) int64 that were kept; the others as in `Prediction`."""

    pixels: NDArray[np.int64]
    histogram: NDArray[np.int64]
    confidence: NDArray[np.float64]


def bands(size: Size, classes: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of rows that cover an image. They follow from its size alone: a label never depends on its batch."""
    height, width = size
    rows = max(1, _BAND_BYTES[device.type] // (4 * classes * width))
    return ((top, min(top + rows, height)) for top in range(0, height, rows))


def top_class(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(B, C, h, w) float32 logits -> top class (B, h, w) uint8, the lowest of equals, and its softmax probability.

    The softmax is of logits / temperature (Guo et al., arXiv 1706.04599, section 4.2). C is at most 255.
    The largest logit's exponential is 1 after it has been subtracted: p = 1 / sum(exp(z - max)).
    """
    classes = logits.shape[1]
    below = logits - logits.amax(dim=1, keepdim=True)
    # Arg-max over an outer axis is slow. Times a huge number only the zeros at the maximum survive, and of the classes
    # there the lowest has the highest rank.
    rank = torch.arange(classes, 0, -1, device=logits.device, dtype=logits.dtype).view(-1, 1, 1)
    winner = (classes - torch.add(rank, below, alpha=3e38).amax(dim=1)).to(torch.uint8)
    if temperature != 1:
        below.div_(temperature)
    return winner, below.exp_().sum(dim=1).reciprocal_()


def top_classes(
    field: Field,
    images: int,
    classes: int,
    device: torch.device,
    temperature: float = 1.0,
    left_out: Undrawn | None = None,
) -> tuple[Tensor, Tensor]:
    """Of every image of a field: top class (B, H, W) uint8, and its probability (B, H, W) float32, on the device."""
    winners = torch.empty(images, *field.size, dtype=torch.uint8, device=device)
    confidences = torch.empty(images, *field.size, device=device)
    for top, bottom in bands(field.size, classes, device):
        logits = field.rows(top, bottom)
        if left_out is not None:
            # A factor of the probability is a term of the logit; the temperature is yet to divide both.
            terms = temperature * left_out.shares.log().view(-1, 1, 1)
            logits = torch.where(left_out.where[:, None, top:bottom], logits + terms, logits)
        winners[:, top:bottom], confidences[:, top:bottom] = top_class(logits, temperature)
    return winners, confidences


def confidence_bins(confidences: Tensor) -> Tensor:
    """The bin k of each confidence, k/20 < p <= (k+1)/20, exactly; int64."""
    edges = torch.arange(1, CONFIDENCE_BINS, device=confidences.device) / CONFIDENCE_BINS
    if confidences.device.type != "cpu":
        return torch.bucketize(confidences, edges)
    scaled = confidences * CONFIDENCE_BINS  # there, rounding up is much faster than searching
    bins = scaled.ceil().long() - 1
    close = (scaled - scaled.round()).abs_() < 1e-4  # where the product's rounding could tell otherwise than p itself
    bins[close] = torch.bucketize(confidences[close], edges)
    return bins


def count(winners: Tensor, confidences: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Of one image: pixels (C, 20) int64 by class and bin; sums of confidences (C,) float64.

    Counts stay on the device; nothing here waits for it.
    """
    histogram = torch.zeros(classes * CONFIDENCE_BINS, dtype=torch.int64, device=winners.device)
    # In float64 the sum is exact, hence the same in any order: confidences above 1/32 are multiples of 2^-29.
    sums = torch.zeros(classes, dtype=torch.float64, device=winners.device)
    piece = _COUNTED_AT_ONCE[winners.device.type]
    winners, confidences = winners.flatten(), confidences.flatten()
    for start in range(0, len(winners), piece):
        winner, confidence = winners[start : start + piece].long(), confidences[start : start + piece]
        place = winner * CONFIDENCE_BINS + confidence_bins(confidence)
        histogram.index_add_(0, place, torch.ones_like(place))
        sums.index_add_(0, winner, confidence.double())
    return histogram.view(classes, CONFIDENCE_BINS), sums


def encode(winners: Tensor, confidences: Tensor, classes: int, edges: Sequence[float]) -> Tensor:
    """The codes of `Prediction`, from top classes, their probabilities, and ascending edges."""
    levels = len(edges) + 1
    level, exceeds = torch.zeros_like(winners), torch.empty_like(winners, dtype=torch.bool)
    for edge in edges:
        level += torch.gt(confidences, edge, out=exceeds).view(torch.uint8)
    return (winners if classes * levels <= 256 else winners.short()) * levels + level


def keep(codes: NDArray[np.uint8] | NDArray[np.int16], classes: int) -> NDArray[np.uint8]:
    """From codes of two levels: the top class where its confidence exceeds the one edge, else 255; uint8."""
    table = np.full(2 * classes, IGNORE, np.uint8)
    table[1::2] = np.arange(classes)
    return table[codes]
