"""Maps that are computed where they are read, whole or a few rows at a time.

A `Field` describes an image-sized map of logits without holding it in memory: a resized tensor, or a formula of other
fields. Combining scales, or an image with its mirror, needs no more memory than the rows that are read.

Legend: B batch, C channels; (h, w) a prediction's own resolution, (H, W) the image's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from autolabel.teacher.networks.hrnet import is_open, resize, same_size

Size = tuple[int, int]  # height, width


class Field:
    """A map (B, C, H, W) of `size` (H, W) that is computed where it is read.

    probable: it holds probabilities, from 0 to 1, in place of logits. What those of a pixel lack to 1 belongs to no
    class; where they sum to more, they count in proportion.
    """

    size: Size
    probable: bool = False

    def rows(self, top: int, bottom: int) -> Tensor:
        """Return the rows from `top` up to, but without, `bottom`: (B, C, bottom - top, W) float32."""
        raise NotImplementedError

    def whole(self) -> Tensor:
        """Return the whole map, (B, C, H, W) float32."""
        raise NotImplementedError


@dataclass(frozen=True)
class InMemory(Field):
    """A map that is a tensor already."""

    tensor: Tensor
    probable: bool = False

    @property
    def size(self) -> Size:  # type: ignore[override]
        return self.tensor.shape[-2], self.tensor.shape[-1]

    def rows(self, top: int, bottom: int) -> Tensor:
        return self.tensor[:, :, top:bottom]

    def whole(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class Resized(Field):
    """`source` resized bilinearly to `size`: corners not aligned, no antialiasing.

    Rows that are read by themselves equal those of the whole up to float32 rounding.
    """

    source: Field
    size: Size

    @property
    def probable(self) -> bool:  # type: ignore[override]
        return self.source.probable

    def rows(self, top: int, bottom: int) -> Tensor:
        height = self.source.size[0]
        ratio = height / self.size[0]
        # Rows of the source between which the rows lie; plain floats are the float64 of the tensors below.
        lowest, highest = (min(max((row + 0.5) * ratio - 0.5, 0), height - 1) for row in (top, bottom - 1))
        first, last = int(lowest), min(int(highest) + 2, height)
        source = self.source.rows(first, last)
        if not _on_cpu(source) and (top, bottom, first, last) == (0, self.size[0], 0, height):
            return resize(source.contiguous(), self.size)  # a GPU has one kernel for the whole
        precise = torch.device("cpu") if source.is_mps else source.device  # Apple's GPU has no float64
        place = (torch.arange(top, bottom, dtype=torch.float64, device=precise) + 0.5) * ratio - 0.5
        place = place.clamp_(0, height - 1).sub_(first)
        return _widened((_product if _on_cpu(source) else _neighbours_mixed)(source, place), self.size[1])

    def whole(self) -> Tensor:
        return resize(self.source.whole(), self.size)


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _product(source: Tensor, place: Tensor) -> Tensor:
    """Return the rows at float64 places (n,) between the rows of `source` (B, C, h, w): (B, C, n, w)."""
    share = (1 - (place.view(-1, 1) - torch.arange(source.shape[-2])).abs_()).clamp_(min=0)
    return share.to(source.dtype) @ source


def _neighbours_mixed(source: Tensor, place: Tensor) -> Tensor:
    """Do the same for a GPU, which takes the two neighbours of each row: the product would multiply mostly by 0."""
    lower = place.long()
    share = (place - lower).to(source.dtype).to(source.device)  # converted before it is moved
    lower = lower.to(source.device)
    higher = (lower + 1).clamp_(max=source.shape[-2] - 1)
    return torch.lerp(source.index_select(-2, lower), source.index_select(-2, higher), share.view(-1, 1))


def _widened(x: Tensor, width: int) -> Tensor:
    """Resize the width alone, bilinearly."""
    if _on_cpu(x):  # a third faster there; on a GPU this kernel would use one thread per column
        lines = x.reshape(1, -1, x.shape[-1])
        return F.interpolate(lines, size=width, mode="linear").view(*x.shape[:-1], width)
    return resize(x, (x.shape[-2], width))


def resized(source: Field, size: Size) -> Field:
    """Return `source` resized to `size`, or `source` itself if it has that size."""
    return source if same_size(source.size, size) else Resized(source, size)


def at_size(tensor: Tensor, *sizes: Size) -> Field:
    """Return a prediction (B, C, h, w) resized to each of `sizes` in turn.

    Halving a map that was enlarged by a multiple of 4 gives exactly the numbers of one direct resize (each output is
    the mean of two neighbours on one linear piece). In that case the detour over the largest map is skipped.
    """
    *before, via, size = ((tensor.shape[-2], tensor.shape[-1]), *sizes)
    if (
        len(before) == 1
        and not is_open(size)
        and all(
            large == 2 * final and large % (4 * start) == 0
            for start, large, final in zip(before[0], via, size, strict=True)
        )
    ):
        return Resized(InMemory(tensor), size)
    field: Field = InMemory(tensor)
    for step in sizes:
        field = resized(field, step)
    return field


@dataclass(frozen=True)
class Combined(Field):
    """`formula` of several fields of one size, pixel by pixel or row by row."""

    formula: Callable[..., Tensor]
    fields: tuple[Field, ...]
    probable: bool = False

    @property
    def size(self) -> Size:  # type: ignore[override]
        return self.fields[0].size

    def rows(self, top: int, bottom: int) -> Tensor:
        return self.formula(*(field.rows(top, bottom) for field in self.fields))

    def whole(self) -> Tensor:
        return self.formula(*(field.whole() for field in self.fields))


@dataclass(frozen=True)
class Mosaic(Field):
    """Windows side by side, with the row and the column at which each begins; where they overlap, the mean.

    What of a window lies beyond `size` is left out, and what no window covers is 0.
    """

    windows: tuple[Field, ...]
    places: tuple[tuple[int, int], ...]
    size: Size
    probable: bool = False

    def rows(self, top: int, bottom: int) -> Tensor:
        shared: Tensor | None = None
        for window, (row, column) in zip(self.windows, self.places, strict=True):
            first, last = max(top, row), min(bottom, row + window.size[0])
            right = min(self.size[1], column + window.size[1])
            if first >= last:
                continue
            values = window.rows(first - row, last - row)[..., : right - column]
            if shared is None:  # the sums, and in one more channel their number
                shared = values.new_zeros(len(values), values.shape[1] + 1, bottom - top, self.size[1])
            part = shared[..., first - top : last - top, column:right]
            part[:, :-1] += values
            part[:, -1] += 1
        assert shared is not None, "a row that no window covers"
        return shared[:, :-1] / shared[:, -1:].clamp(min=1)

    def whole(self) -> Tensor:
        return self.rows(0, self.size[0])


def add(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape, added in their order."""
    first, *others = terms
    for term in others:
        first = first + term
    return first


def mean(*values: Tensor) -> Tensor:
    """Return the mean of tensors of one shape."""
    return add(values) / len(values)


def mean_with_mirrored(field: Field, other: Field) -> Field:
    """Return the mean of a field and of the field that was computed on the mirrored image."""
    return Combined(mean, (field, Combined(mirrored, (other,))))


def mirrored(value: Tensor) -> Tensor:
    """Return a map (B, C, H, W) with left and right exchanged."""
    return value.flip(-1)
