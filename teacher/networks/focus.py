"""Scale on demand: the highest scale is computed only in a band of rows, where it is most likely to change a label.

The lower scales see the whole image. They say how much of each pixel's logits the combination would leave to the
highest scale, and how sure they are without it; the band lies where the sum of share x (1 - p) over its rows is
largest. It has the full width of the image and a height that follows from the image's size alone, so batches, plans of
memory and compiled kernels keep working. The network sees `HALO` more rows above and below, and what it pools over the
whole image (OCR's regions, the mean of ASPP) comes from the next lower scale, whose logits stand in for the highest
elsewhere.

Legend: B batch, K classes; (h, w) a prediction's own resolution, (H, W) the image's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from autolabel.teacher.networks.combine import Combination, Part, ScaleOutput
from autolabel.teacher.networks.decoders import SegmentationNet
from autolabel.teacher.networks.fields import Combined, Field, Size, mean_with_mirrored
from autolabel.teacher.networks.hrnet import resize

HALO = 64  # rows at the highest scale, above and below a band, whose logits are not used
_STEP = 32  # bands begin at a multiple of it, where the pixels of all trunks' deepest maps begin
_EVEN = 16  # the height of a band is a multiple of it


@dataclass(frozen=True)
class Focused(Field):
    """A combined field whose highest scale has seen a band of rows.

    seen: (B, 2) int32 on the device, the first row of an image that the highest scale has seen and the one after the
    last. views: (B,) int64, the rows at the highest scale where the network's view of each image begins. left: makes
    the field (B, 1, H, W) of the share of a pixel's logits that the lower scales leave to the highest.
    """

    source: Field
    seen: Tensor
    views: Tensor
    left: Callable[[], Field]

    @property
    def size(self) -> Size:  # type: ignore[override]
        return self.source.size

    @property
    def probable(self) -> bool:  # type: ignore[override]
        return self.source.probable

    def rows(self, top: int, bottom: int) -> Tensor:
        return self.source.rows(top, bottom)

    def whole(self) -> Tensor:
        return self.source.whole()

    def with_mirrored(self, other: Focused) -> Focused:
        """Return the mean of this field and of that of the mirrored images, which was seen in the same rows."""

        def left() -> Field:
            return mean_with_mirrored(self.left(), other.left())

        return replace(self, source=mean_with_mirrored(self.source, other.source), left=left)


@dataclass(frozen=True)
class Bands:
    """The bands of one size of image, in rows at the highest scale.

    height: of the image there. rows: that the network sees at once, the halo included. halo: see `HALO`. step: a band
    begins at a multiple of it.
    """

    height: int
    rows: int
    halo: int
    step: int

    @classmethod
    def of(cls, height: int, *, share: float, multiple: int = 1) -> Bands | None:
        """Return the bands of an image so high, or None if a band with its halo would be the whole image.

        share: of the rows that a band has, about; multiple: sides of the network's inputs are multiples of it.
        """
        step, even = math.lcm(_STEP, multiple), math.lcm(_EVEN, multiple)
        halo = -(-HALO // step) * step
        rows = int((max(1, round(share * height)) + 2 * halo) / even) * even
        if height % even == 0:
            rows -= (rows - height) % step  # so that the last view ends with the image
        return cls(height, rows, halo, step) if rows > 2 * halo and rows < height else None

    def starts(self, device: torch.device) -> Tensor:
        """The rows where the network's view may begin, (N,) int64; the last view reaches the image's end."""
        return torch.arange(0, self.height - self.rows + self.step, self.step, device=device)

    def used(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """The first row whose logits are used, and the one after the last; at the image's ends there is no halo."""
        ends = starts + self.rows
        top = torch.where(starts == 0, 0, starts + self.halo)
        return top, torch.where(ends >= self.height, self.height, ends - self.halo)

    def best(self, score: Tensor) -> Tensor:
        """The starts (B,) int64 of the views whose used rows have the largest sum of `score` (B, h) over the image."""
        starts = self.starts(score.device)
        top, bottom = (rows.view(-1, 1) for rows in self.used(starts))
        each = self.height / score.shape[1]  # rows there that one row of the score stands for
        first = torch.arange(score.shape[1], device=score.device, dtype=torch.float32) * each
        covered = torch.minimum(bottom, first + each) - torch.maximum(top, first)  # (N, h)
        return starts[(score.unsqueeze(1) * covered.clamp_(min=0)).sum(dim=2).argmax(dim=1)]


def focused(
    network: SegmentationNet,
    images: Tensor,
    scales: Sequence[float],
    *,
    share: float,
    combination: Combination,
    views: Tensor | None = None,
) -> Focused:
    """Return the combined logits of normalised images (B, 3, H, W), the highest scale in a band of about `share` rows.

    Images too small for a band and its halo are seen whole. views: (B,) int64, the rows at the highest scale where the
    network's view of each image begins; None lets the lower scales choose. Raises ValueError for scales that the
    combination cannot weigh, or not without the highest.
    """
    combination.require_focus(scales)
    size = images.shape[-2], images.shape[-1]
    *lower, highest = sorted(scales)
    contexts: dict[Size, Tensor | None] = {}

    def predict(own: Size) -> ScaleOutput:
        now = network.predict_at(images, own)
        contexts[own] = now.context
        return now

    across = combination.size_at(size, highest)
    bands = Bands.of(across[0], share=share, multiple=network.multiple)
    if bands is None:
        parts, views = combination.weigh(predict, size, scales=scales), images.new_zeros(len(images), dtype=torch.int64)
        seen = torch.stack([views, views + size[0]], dim=1).int()
        return Focused(combination.mix(parts, size), seen, views, partial(_highest_share, combination, parts, size))
    parts = combination.weigh_below(predict, size, scales=lower)
    below = max(parts, key=lambda part: part.scale)
    if views is None:
        views = bands.best(_expected_change(combination, parts, highest).sum(dim=2))
    logits = _seen_in_bands(network, resize(images, across), bands, views, below=below, context=contexts[below.size])
    parts.append(Part(highest, across, logits))
    top, bottom = (rows / highest for rows in bands.used(views))
    seen = torch.stack([top.ceil(), bottom.floor().clamp(max=size[0])], dim=1).int()
    return Focused(combination.mix(parts, size), seen, views, partial(_highest_share, combination, parts, size))


def _expected_change(combination: Combination, parts: Sequence[Part], highest: float) -> Tensor:
    """The highest scale's share x (1 - p) without it, (B, h, w) at the resolution of the image's own scale.

    The next lower scale's logits stand in for the highest's.
    """
    small = [replace(part, size=_resolution(part)) for part in parts]
    own = next(part for part in small if part.scale == 1)
    below = max(small, key=lambda part: part.scale)
    small.append(replace(below, scale=highest, attention=None))
    logits = combination.mix(small, own.size).whole()
    p = (logits - logits.amax(dim=1, keepdim=True)).exp_().sum(dim=1).reciprocal_()
    return (1 - p) * _highest_share(combination, small, own.size).whole()[:, 0]


def _seen_in_bands(
    network: SegmentationNet, images: Tensor, bands: Bands, views: Tensor, *, below: Part, context: Tensor | None
) -> Tensor:
    """The highest scale's logits (B, K, h, w): those of bands of the images (B, 3, H, W), elsewhere those of `below`.

    views: (B,) int64, the first row of each view. context: of the whole image, see `ScaleOutput`.
    """
    rows = views.unsqueeze(1) + torch.arange(bands.rows, device=images.device)
    view = _rows_of(images, rows.clamp_(max=bands.height - 1))  # below the image its last row is repeated
    view = view.contiguous(memory_format=torch.channels_last)
    seen = network.predict_at(view, (bands.rows, images.shape[-1]), context=context).logits
    stride = bands.rows // seen.shape[-2]
    height = -(-bands.height // stride)
    row = torch.arange(height, device=images.device)
    top, bottom = (edge.unsqueeze(1) for edge in bands.used(views))
    inside = (row * stride >= top) & (row * stride < bottom)  # (B, h)
    within = (row - (views // stride).unsqueeze(1)).clamp_(0, seen.shape[-2] - 1)
    elsewhere = resize(below.logits, (height, seen.shape[-1]))
    return torch.where(inside[:, None, :, None], _rows_of(seen, within), elsewhere)


def _rows_of(maps: Tensor, rows: Tensor) -> Tensor:
    """The rows (B, n) int64 of each image of maps (B, C, h, w): (B, C, n, w)."""
    shape = *maps.shape[:2], rows.shape[1], maps.shape[3]
    return maps.gather(2, rows[:, None, :, None].expand(shape))


def _highest_share(combination: Combination, parts: Sequence[Part], size: Size) -> Field:
    """The share of the part of the highest scale in the mix: (B, 1, H, W)."""
    place = max(range(len(parts)), key=lambda index: parts[index].scale)
    return Combined(partial(_channel, place), (combination.shares(parts, size),))


def _channel(place: int, values: Tensor) -> Tensor:
    return values[:, place : place + 1]


def _resolution(part: Part) -> Size:
    return part.logits.shape[-2], part.logits.shape[-1]
