"""Counts of a prediction on its device: how many pixels of each class have which confidence, and the sums of it."""

from __future__ import annotations

import torch
from torch import Tensor

from autolabel.manifests.schemas import CONFIDENCE_BINS

# Pixels that are counted at once: on a CPU they should stay in a core's cache, a GPU they should keep busy.
_COUNTED_AT_ONCE = 1 << 16
_GPU_COUNTED_AT_ONCE = 1 << 26
_COPIES = 64  # of a table that a GPU counts into


def confidence_bins(confidences: Tensor) -> Tensor:
    """Return the bin k of each confidence, k/20 < p <= (k+1)/20, exactly; int64 (B, ...) on the CPU."""
    scaled = confidences * CONFIDENCE_BINS  # on a CPU, ceil() is much faster than bucketize()
    bins = scaled.ceil().sub_(1).long().clamp_(0, CONFIDENCE_BINS - 1)  # nan could become any number
    close = (scaled - scaled.round()).abs_() < 1e-4  # the rounding of the product could change these bins
    bins[close] = torch.bucketize(confidences[close], bin_edges())
    return bins


def bin_edges() -> Tensor:
    """Return the inner edges of the bins, (19,) float32 on the CPU. Computed on a GPU, some would be one float off."""
    return torch.arange(1, CONFIDENCE_BINS) / CONFIDENCE_BINS


def count(winners: Tensor, confidences: Tensor, *, classes: int) -> tuple[Tensor, Tensor]:
    """Count one image: return pixels (C, 20) int64 by class and bin, and sums of confidences (C,) float64.

    The counts stay on the device of the maps, which must have float64; nothing here waits for it.
    """
    if winners.device.type != "cpu":
        histogram, sums = count_together(winners[None], confidences[None], classes=classes)
        return histogram[0], sums[0]
    histogram = torch.zeros(classes * CONFIDENCE_BINS, dtype=torch.int64)
    # Confidences above 1/32 are multiples of 2^-29, so their float64 sum is exact, and the same in any order.
    sums = torch.zeros(classes, dtype=torch.float64)
    winners, confidences = winners.flatten(), confidences.flatten()
    for start in range(0, len(winners), _COUNTED_AT_ONCE):
        winner, confidence = (x[start : start + _COUNTED_AT_ONCE] for x in (winners, confidences))
        winner = winner.long()
        place = winner * CONFIDENCE_BINS + confidence_bins(confidence)
        histogram.index_add_(0, place, torch.ones_like(place))
        sums.index_add_(0, winner, confidence.double())
    return histogram.view(classes, CONFIDENCE_BINS), sums


def count_together(
    winners: Tensor, confidences: Tensor, *, classes: int, edges: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Count images (B, H, W) as `count` does, in the way of a GPU: (B, C, 20) int64 and (B, C) float64.

    A GPU adds with thousands of threads at once, and those that meet at one number wait for each other. So there are
    64 copies of each table, and neighbouring columns count into different ones. edges: `bin_edges` on the device.
    """
    images, height, width = winners.shape
    device, size = winners.device, classes * CONFIDENCE_BINS
    if edges is None:
        edges = bin_edges().to(device)
    histogram = torch.zeros(images * _COPIES * size, dtype=torch.int32, device=device)
    sums = torch.zeros(images * _COPIES * size, dtype=torch.float64, device=device)
    one = torch.ones(1, dtype=torch.int32, device=device)
    image = torch.arange(images, dtype=torch.int32, device=device).view(-1, 1, 1)
    column = torch.arange(width, dtype=torch.int32, device=device).remainder_(_COPIES)
    table = (image * _COPIES + column) * size  # (B, 1, W)
    step = max(1, _GPU_COUNTED_AT_ONCE // (images * width))
    for top in range(0, height, step):
        winner, confidence = (x[:, top : top + step] for x in (winners, confidences))
        place = torch.bucketize(confidence.contiguous(), edges, out_int32=True)
        place = place.add_(winner.int(), alpha=CONFIDENCE_BINS).add_(table).flatten()
        histogram.index_add_(0, place, one.expand(len(place)))
        sums.index_add_(0, place, confidence.flatten().double())
    counted = histogram.view(images, _COPIES, classes, CONFIDENCE_BINS).sum(dim=1)
    return counted, sums.view(images, _COPIES, classes, CONFIDENCE_BINS).sum(dim=(1, 3))
