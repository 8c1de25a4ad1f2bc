"""Everything between a model and the decision: scales, mirrored images, windows, class maps, ensembles.

A `Network` turns RGB images into a field of logits or probabilities (B, C, H, W). Our own networks combine scales as
they have learnt to; of all other models, and of several models, the mean of the probabilities is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from autolabel.manifests.label_space import IGNORE, LabelSpace
from autolabel.manifests.policy import SCALES
from autolabel.manifests.teachers import BadTeacher
from autolabel.manifests.wording import counted, kind_and_reason
from autolabel.teacher.feed import Normaliser
from autolabel.teacher.memory import is_memory_error
from autolabel.teacher.model import Model
from autolabel.teacher.networks.combine import Average, Combination, rescaled_size
from autolabel.teacher.networks.decoders import SegmentationNet
from autolabel.teacher.networks.fields import (
    Combined,
    Field,
    InMemory,
    Mosaic,
    Size,
    mean,
    mean_with_mirrored,
    mirrored,
    resized,
)
from autolabel.teacher.networks.focus import Bands, Focused, focused

_OVERLAP = 0.25  # share of a window that its neighbour sees too, at least


class Network(Protocol):
    """Logits or probabilities of images at given scales.

    classes: number of classes; channels: of the numbers that a pixel takes while it is computed. confident: False if
    the model gives class ids only. training_scales: the scales at which it is scored unless others are named; scales:
    those at which it labels.
    """

    classes: int
    channels: int
    confident: bool
    scales: tuple[float, ...]
    training_scales: tuple[float, ...]

    def require(self, scales: Sequence[float], *, flip: bool, focus: float | None = None) -> None:
        """Raise ValueError for scales, mirrored images, or a focus, with which the model can do nothing."""

    def focuses(self, size: Size, scales: Sequence[float], *, share: float) -> bool:
        """Return True if images of this size are large enough for a band of the highest scale. The scales allow one."""

    def field(self, images: Tensor, scales: Sequence[float], *, flip: bool, focus: float | None = None) -> Field:
        """Return the field (B, C, H, W) of RGB images (B, 3, H, W) uint8 on the device.

        focus: share of the rows that the highest scale is computed for; the field is `Focused` then.
        """


class OwnNetwork:
    """One of our networks; it combines the logits of its scales by `combination`."""

    confident = True
    scales: tuple[float, ...] = SCALES

    def __init__(self, network: SegmentationNet, combination: Combination, *, device: torch.device) -> None:
        self.network, self.combination = network, combination
        self.classes = self.channels = network.classes
        self.training_scales = network.scale_attn.training_scales
        self.normalise = Normaliser(device)

    def require(self, scales: Sequence[float], *, flip: bool, focus: float | None = None) -> None:
        """Raise ValueError for scales that the combination cannot weigh."""
        self.combination.require(scales)
        if focus is not None:
            self.combination.require_focus(scales)

    def focuses(self, size: Size, scales: Sequence[float], *, share: float) -> bool:
        """Return True if a band and its halo are less than an image of this size."""
        height, _ = self.combination.size_at(size, max(scales))
        return Bands.of(height, share=share, multiple=self.network.multiple) is not None

    def field(self, images: Tensor, scales: Sequence[float], *, flip: bool, focus: float | None = None) -> Field:
        """Return the combined logits, averaged with those of the mirrored image."""
        pixels = self.normalised(images)
        if focus is not None:
            return self._focused(pixels, scales, flip=flip, share=focus)
        # A chain of scales ends at 1 or above it; a scale that is looked at by itself needs no chain.
        combination = self.combination if 1 in scales else Average()
        field = self.network.field(pixels, scales, combination=combination)
        if not flip:
            return field
        return mean_with_mirrored(field, self.network.field(pixels.flip(-1), scales, combination=combination))

    def _focused(self, pixels: Tensor, scales: Sequence[float], *, flip: bool, share: float) -> Focused:
        look = partial(focused, self.network, scales=scales, share=share, combination=self.combination)
        field = look(pixels)
        return field.with_mirrored(look(pixels.flip(-1), views=field.views)) if flip else field

    def normalised(self, images: Tensor) -> Tensor:
        """Return images as the network reads them: (B, 3, H, W) float32, channels last."""
        return self.normalise(images).contiguous(memory_format=torch.channels_last)


class ForeignNetwork:
    """A model of any kind at several scales, mirrored, or in overlapping windows.

    name: its name in messages. window: height and width of the windows; each is predicted like an image of its own.
    """

    scales: tuple[float, ...] = (1.0,)
    training_scales: tuple[float, ...] = (1.0,)

    def __init__(self, model: Model, *, name: str, window: Size | None = None) -> None:
        self.model, self.name, self.window = model, name, window
        self.names = tuple(model.classes.names if isinstance(model.classes, LabelSpace) else model.classes)
        self.classes = self.channels = len(self.names)
        self.confident = model.gives != "ids"

    def require(self, scales: Sequence[float], *, flip: bool, focus: float | None = None) -> None:
        """Raise ValueError if other scales would show a model of one input size nothing more, or it gives ids only."""
        if focus is not None:
            raise ValueError(f"focus {focus:g}: {self.name} is a model of another library, which sees images whole")
        more = tuple(scales) != (1.0,)
        if more and self.model.fixed_size and self.window is None:
            height, width = self.model.fixed_size
            raise ValueError(
                f"scales {','.join(f'{s:g}' for s in scales)}: {self.name} resizes every image to {width} x {height}:"
                " another scale would show it nothing more, leave --scales out or give a --window"
            )
        if not self.confident and (more or flip or self.window):
            raise ValueError(
                f"{self.name} gives class ids without probabilities, which cannot be averaged: leave out --scales,"
                " --flip and --window"
            )

    def focuses(self, size: Size, scales: Sequence[float], *, share: float) -> bool:
        """Return False."""
        return False

    def field(self, images: Tensor, scales: Sequence[float], *, flip: bool, focus: float | None = None) -> Field:
        """Return what the model gives of one view, or the mean probabilities of several."""
        size = images.shape[-2], images.shape[-1]
        views = []
        for scale in scales:
            sized = _rescaled(images, rescaled_size(size, scale))
            views.append(resized(self._in_windows(sized), size))
            if flip:
                other = resized(self._in_windows(sized.flip(-1)), size)
                views.append(Combined(mirrored, (other,), other.probable))
        return mean_of_probabilities(views)

    def _in_windows(self, images: Tensor) -> Field:
        """Return the scores of images, predicted whole or window by window."""
        height, width = images.shape[-2:]
        if self.window is None or (height <= self.window[0] and width <= self.window[1]):
            return self._scores(images)
        across = min(height, self.window[0]), min(width, self.window[1])
        places = tuple((top, left) for top in _starts(height, across[0]) for left in _starts(width, across[1]))
        windows = (images[..., top : top + across[0], left : left + across[1]] for top, left in places)
        return Mosaic(tuple(_probable(self._scores(one)) for one in windows), places, (height, width), probable=True)

    def _scores(self, images: Tensor) -> Field:
        """Return the scores of images from one call of the model. Raises BadTeacher unless they are as it says."""
        size = images.shape[-2], images.shape[-1]
        scores = self._predict(images.contiguous())
        if isinstance(scores, Field):
            if scores.size != size:
                raise BadTeacher(f"{self.name} returned a field of size {scores.size} for images of size {size}")
            given = self.model.gives == "probabilities"
            return scores if scores.probable == given else Combined(_same, (scores,), probable=given)
        if self.confident:
            checked = self._checked(scores, images, dimensions=4)
            return resized(InMemory(checked, self.model.gives == "probabilities"), size)
        return OneHot(self._checked(scores, images, dimensions=3), self.classes, size)

    def _predict(self, images: Tensor) -> Tensor | Field:
        try:
            return self.model.predict(images)
        except BadTeacher:
            raise
        except (RuntimeError, MemoryError) as error:
            if is_memory_error(error) or images.device.type != "cpu":
                raise
            raise self._failed(error) from error
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> BadTeacher:
        trace = error.__traceback__
        while trace and trace.tb_next:
            trace = trace.tb_next
        where = f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})" if trace else ""
        return BadTeacher(f"{self.name} cannot predict an image: {kind_and_reason(error)}{where}")

    def _checked(self, scores: object, images: Tensor, *, dimensions: int) -> Tensor:
        shape = f"({len(images)}, {self.classes}, h, w) floating point"
        if not self.confident:
            shape = f"({len(images)}, h, w) of integers"
        if not isinstance(scores, Tensor):
            raise BadTeacher(f"{self.name} returned a {type(scores).__name__}: expected a tensor {shape}")
        if dimensions == 4 and scores.ndim == 4 and scores.shape[1] != self.classes:
            raise BadTeacher(
                f"{self.name} gives scores of {counted(scores.shape[1], 'class', 'classes')}, but names {self.classes}:"
                " name as many as it has outputs"
            )
        whole = scores.dtype == torch.bool or not (scores.is_floating_point() or scores.is_complex())
        if scores.ndim != dimensions or len(scores) != len(images) or whole == self.confident:
            kind = str(scores.dtype).removeprefix("torch.")
            raise BadTeacher(f"{self.name} returned {kind} of shape {tuple(scores.shape)}: expected {shape}")
        return scores.float() if self.confident else scores


class MappedNetwork:
    """Probabilities of other classes: those of all that mean the same are summed.

    targets: for each class of the source its train id, or `IGNORE` for those whose probability belongs to no class.
    """

    def __init__(self, source: Network, targets: Sequence[int], *, classes: int, device: torch.device) -> None:
        self.source, self.classes, self.confident = source, classes, source.confident
        self.channels = max(classes, source.channels)
        self.scales, self.training_scales = source.scales, source.training_scales
        rows = torch.tensor([classes if target == IGNORE else target for target in targets])
        self._sums = F.one_hot(rows, classes + 1)[:, :classes].T.float().contiguous().to(device)

    def require(self, scales: Sequence[float], *, flip: bool, focus: float | None = None) -> None:
        """Raise ValueError as the source does."""
        self.source.require(scales, flip=flip, focus=focus)

    def focuses(self, size: Size, scales: Sequence[float], *, share: float) -> bool:
        """Return what the source does."""
        return self.source.focuses(size, scales, share=share)

    def field(self, images: Tensor, scales: Sequence[float], *, flip: bool, focus: float | None = None) -> Field:
        """Return the summed probabilities."""
        source = self.source.field(images, scales, flip=flip, focus=focus)
        summed = Combined(self._summed, (_probable(source),), probable=True)
        return replace(source, source=summed) if isinstance(source, Focused) else summed

    def _summed(self, probabilities: Tensor) -> Tensor:
        images, _, height, width = probabilities.shape
        return (self._sums @ probabilities.flatten(2)).view(images, self.classes, height, width)


class Ensemble:
    """Several scorers of the same classes: the mean of their probabilities."""

    def __init__(self, members: Sequence[Network]) -> None:
        self.members, self.classes = members, members[0].classes
        self.channels = max(member.channels for member in members)
        self.confident = all(member.confident for member in members)
        same = {member.scales for member in members}
        self.scales: tuple[float, ...] = same.pop() if len(same) == 1 else (1.0,)
        self.training_scales: tuple[float, ...] = (1.0,)

    def require(self, scales: Sequence[float], *, flip: bool, focus: float | None = None) -> None:
        """Raise ValueError as any member does; and for a focus, which each would have elsewhere."""
        if focus is not None:
            raise ValueError(f"focus {focus:g}: several teachers would each look elsewhere: expected one teacher")
        for member in self.members:
            member.require(scales, flip=flip)

    def focuses(self, size: Size, scales: Sequence[float], *, share: float) -> bool:
        """Return False."""
        return False

    def field(self, images: Tensor, scales: Sequence[float], *, flip: bool, focus: float | None = None) -> Field:
        """Return the mean probabilities."""
        return mean_of_probabilities([member.field(images, scales, flip=flip) for member in self.members])


def mean_of_probabilities(fields: Sequence[Field]) -> Field:
    """Return the mean probabilities of fields; one field alone is returned as it is."""
    return fields[0] if len(fields) == 1 else Combined(mean, tuple(map(_probable, fields)), probable=True)


def _probable(field: Field) -> Field:
    """The probabilities of a field, with a sum of at most 1."""
    return Combined(_proportioned if field.probable else _softmax, (field,), probable=True)


def _same(values: Tensor) -> Tensor:
    return values


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=1)


def _proportioned(scores: Tensor) -> Tensor:
    return scores / scores.sum(dim=1, keepdim=True).clamp_(min=1)


@dataclass(frozen=True)
class OneHot(Field):
    """Class ids (B, h, w) as probabilities of 0 and 1; each pixel takes the nearest id, other numbers are no class."""

    ids: Tensor
    classes: int
    size: Size
    probable: bool = True

    def rows(self, top: int, bottom: int) -> Tensor:
        sides = zip(((top, bottom), (0, self.size[1])), self.ids.shape[-2:], self.size, strict=True)
        row, column = (
            (2 * torch.arange(*span, device=self.ids.device) + 1) * own // (2 * whole) for span, own, whole in sides
        )
        ids = self.ids.index_select(-2, row).index_select(-1, column).long()
        ids = torch.where((ids < 0) | (ids >= self.classes), self.classes, ids)
        shape = len(ids), self.classes + 1, *ids.shape[1:]
        return torch.zeros(shape, device=ids.device).scatter_(1, ids.unsqueeze(1), 1.0)[:, : self.classes]

    def whole(self) -> Tensor:
        return self.rows(0, self.size[0])


def _starts(length: int, window: int) -> list[int]:
    """Return the first pixels of windows that cover a side, evenly spread, so many that neighbours overlap enough."""
    step = max(1, int(window * (1 - _OVERLAP)))
    steps = -(-(length - window) // step)
    return [round(number * (length - window) / steps) for number in range(steps + 1)] if steps else [0]


def _rescaled(images: Tensor, size: Size) -> Tensor:
    """Return images (B, 3, H, W) uint8 at another size, bilinearly, averaged over what a smaller one leaves out."""
    if tuple(images.shape[-2:]) == size:
        return images
    values = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
    return values.round_().clamp_(0, 255).to(torch.uint8)
