"""Networks in files of torch.export and ONNX as models: from uint8 images to numbers, and from outputs to scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from autolabel.manifests.label_space import LabelSpace
from autolabel.teacher.checkpoints import fingerprint_tensor
from autolabel.teacher.foreign.ports import Fit, require_scores
from autolabel.teacher.model import Gives, Model
from autolabel.teacher.networks.fields import Field, InMemory, Size, resized


@dataclass(frozen=True)
class Cropped(Field):
    """The upper left part of a map, of `size`."""

    source: Field
    size: Size

    def rows(self, top: int, bottom: int) -> Tensor:
        return self.source.rows(top, bottom)[..., : self.size[1]]

    def whole(self) -> Tensor:
        return self.source.whole()[..., : self.size[0], : self.size[1]]


class NetworkFile(Model):
    """A network whose file and sidecar say how it takes images.

    run: computes its output (b, …) from numbers on the device, of the layout, type and batch that it takes. On a CPU
    images go one by one, so that none depends on its neighbours.
    """

    def __init__(self, fit: Fit, run: Callable[[Tensor], Tensor], *, device: torch.device) -> None:
        sidecar = fit.described.sidecar
        self.classes: Sequence[str] | LabelSpace = fit.described.classes
        self.gives = cast(Gives, sidecar.gives)
        self.fixed_size = fit.size
        self._fit, self._run, self._sidecar = fit, run, sidecar
        self._batch = fit.batch or (1 if device.type == "cpu" else None)
        black, white = sidecar.range or (0.0, 255.0)
        # Constants are tensors: a GPU would turn the division by a number into a product, which rounds otherwise.
        self._full, self._span, self._black = (
            torch.tensor(value, device=device) for value in (255.0, white - black, black)
        )
        self._mean, self._std = (
            torch.tensor(value, device=device).view(1, 3, 1, 1) for value in (sidecar.mean, sidecar.std)
        )

    @cached_property
    def trained_on(self) -> Tensor | None:  # type: ignore[override]
        """The marks of the images that it has seen, read when they are asked for: each of them may have to be."""
        marks = self._fit.described.marks()
        return None if marks is None else fingerprint_tensor(marks)

    def predict(self, images: Tensor) -> Tensor | Field:
        """Return the scores of images (B, 3, H, W) uint8 as `Model.predict` says. Raises BadTeacher for its output."""
        size = images.shape[-2], images.shape[-1]
        filled = self._fit.size or (_up(size[0], self._fit.multiple), _up(size[1], self._fit.multiple))
        step = self._batch or len(images)
        parts = [self._scores(images[start : start + step], filled, step) for start in range(0, len(images), step)]
        scores = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self._fit.size or filled == size:
            return scores
        if self.gives != "ids":
            return Cropped(resized(InMemory(scores), filled), size)
        rows, columns = (
            ((torch.arange(side, device=scores.device) + 0.5) * own / whole).long()
            for side, own, whole in zip(size, scores.shape[-2:], filled, strict=True)
        )
        return scores[:, rows[:, None], columns]

    def _scores(self, images: Tensor, filled: Size, step: int) -> Tensor:
        """Return scores (b, C, h, w) float32, or ids (b, h, w) int64, of at most `step` images."""
        numbers = self._numbers(images, filled)
        missing = step - len(numbers) if self._fit.batch else 0
        if missing:  # the last image again: the network takes whole batches alone
            numbers = torch.cat([numbers, numbers[-1:].expand(missing, *numbers.shape[1:])])
        output = self._run(numbers)[: len(images)]
        require_scores(self._fit, tuple(output.shape), str(output.dtype).removeprefix("torch."))
        last = self._fit.channels_last
        if self.gives == "ids":
            return (output if output.ndim == 3 else output[..., 0] if last else output[:, 0]).long()
        return (output.permute(0, 3, 1, 2) if last else output).float().contiguous()

    def _numbers(self, images: Tensor, filled: Size) -> Tensor:
        """Return images as the network takes them: resized or filled up, normalised, in its layout and type."""
        sidecar, numbers = self._sidecar, images.float()
        height, width = filled[0] - images.shape[-2], filled[1] - images.shape[-1]
        if self._fit.size and (height or width):
            numbers = F.interpolate(numbers, filled, mode="bilinear", antialias=True)
        if sidecar.reads_pixels:
            numbers = numbers.round_().clamp_(0, 255).to(torch.uint8)
        else:
            if sidecar.range != (0, 255):
                numbers = numbers / self._full
            if sidecar.range not in ((0, 255), (0, 1)):
                numbers = numbers * self._span + self._black
            numbers = (numbers - self._mean) / self._std
        if not self._fit.size and (height or width):
            numbers = F.pad(numbers, (0, width, 0, height))
        if sidecar.channels == "bgr":
            numbers = numbers.flip(1)
        if sidecar.dtype == "float16":
            numbers = numbers.half()
        return (numbers.permute(0, 2, 3, 1) if sidecar.layout == "NHWC" else numbers).contiguous()


def _up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple
