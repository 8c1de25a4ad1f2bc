"""Scores of networks whose queries each give a mask and a class, and of images that were padded or cut into windows.

Every pixel's score for a class is the sum over queries of p(class) * p(pixel in mask), as the post-processing of
transformers has it (Cheng et al., arXiv 2107.06278, section 3.4). These sums need not be 1. "No object" is a class of
the queries and none of the pixels. Nothing of image size is held: scores are `Field`s, computed where they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from autolabel.teacher.networks.fields import Combined, Field, InMemory, Mosaic, Size, resized

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels: its first row and column, and the first ones after it."""

    top: int
    left: int
    bottom: int
    right: int


@dataclass(frozen=True)
class Cut(Field):
    """The part of a field that lies in a box."""

    source: Field
    box: Box

    @property
    def size(self) -> Size:  # type: ignore[override]
        return self.box.bottom - self.box.top, self.box.right - self.box.left

    def rows(self, top: int, bottom: int) -> Tensor:
        rows = self.source.rows(top + self.box.top, bottom + self.box.top)
        return rows[..., self.box.left : self.box.right]

    def whole(self) -> Tensor:
        return self.source.whole()[:, :, self.box.top : self.box.bottom, self.box.left : self.box.right]


class Remembered(Field):
    """A field that is costly to compute: rows come in blocks, and the last block is kept for its next reader."""

    def __init__(self, source: Field) -> None:
        self.source, self.size = source, source.size
        self._top, self._block = 0, torch.empty(0, 0, 0, 0)

    def rows(self, top: int, bottom: int) -> Tensor:
        if top < self._top or bottom > self._top + self._block.shape[-2]:
            self._top = top
            self._block = self.source.rows(top, min(max(bottom, top + _ROWS_AT_ONCE), self.size[0]))
        return self._block[:, :, top - self._top : bottom - self._top]

    def whole(self) -> Tensor:
        return self.source.whole()


def query_scores(classes: Tensor, masks: Tensor, *, size: Size | None = None) -> Field:
    """Return the scores (B, C, h, w) of B images from the logits of Q queries.

    classes: (B, Q, C + 1), the last of which is "no object"; masks: (B, Q, h', w'), resized to `size` before their
    sigmoid.
    """
    shares = classes.float().softmax(dim=-1)[..., :-1]
    source = InMemory(masks.float())
    return Combined(partial(_summed, shares), (resized(source, size or source.size),))


def _summed(shares: Tensor, masks: Tensor) -> Tensor:
    return torch.einsum("bqc,bqhw->bchw", shares, masks.sigmoid())


def window_scores(
    classes: Tensor, masks: Tensor, offsets: Sequence[int], *, window: Size, size: Size, down: bool
) -> Field:
    """Return the scores (B, C, *size) of B images of which each was cut into the same windows, image after image.

    offsets: the row at which each window of an image begins, or its column unless `down`. window: the size to which
    masks are resized.
    """
    many = len(offsets)
    fields = tuple(query_scores(classes[n::many], masks[n::many], size=window) for n in range(many))
    return Mosaic(fields, tuple((start, 0) if down else (0, start) for start in offsets), size)


def placed(scores: Field, seen: Size, box: Box, size: Size, *, antialias: bool = False) -> Field:
    """Return scores at the size of the image.

    seen: the size of what the network was shown; box: where in it the image lies, the rest is padding.
    antialias: how scores are reduced if the image is smaller.
    """
    if box != Box(0, 0, *seen):
        scores = Cut(resized(scores, seen), box)
    if antialias and any(after < before for before, after in zip(scores.size, size, strict=True)):
        return InMemory(F.interpolate(scores.whole(), size, mode="bilinear", antialias=True))
    return resized(Remembered(scores), size)
