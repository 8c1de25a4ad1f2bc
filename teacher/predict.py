"""From photographs to labels: normalise, predict at several scales, combine, decide.

On a GPU images are computed in batches of a planned size (`memory.planned_batch`), always full, so that every image of
a size goes through the same kernels. Free memory decides only how many batches are under way; one that does not fit
beside the others is tried again alone. Only uint8 labels and small tables of counts reach the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autolabel.manifests.class_map import ClassMap
from autolabel.manifests.evidence import Factors
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.places import Places
from autolabel.manifests.policy import COMBINE, SCALES, THRESHOLD, check_scales, check_threshold
from autolabel.manifests.teachers import BadTeacher, TeacherName
from autolabel.teacher.around import Network, OwnNetwork
from autolabel.teacher.decide import LEAST, LabelStatistics, Prediction, keep, top_classes
from autolabel.teacher.device import DeviceMemory, autocast, device_memory, exact_kernels
from autolabel.teacher.feed import Feed, Image
from autolabel.teacher.memory import Budget, Gate, attempt, batch_pixels, measure, planned_batch, too_little
from autolabel.teacher.networks.combine import Average, Part
from autolabel.teacher.networks.decoders import SegmentationNet
from autolabel.teacher.networks.fields import Field, Size, at_size
from autolabel.teacher.networks.focus import Focused

_PROBE = (256, 512)  # height and width of the image that the budget is measured with


@dataclass(frozen=True)
class ScaleView:
    """The top class of one scale by itself, (H, W) uint8, and its share in the combined logits, (H, W) float32."""

    scale: float
    label: NDArray[np.uint8]
    share: NDArray[np.float32]


class Teacher:
    """A network that is ready to predict, on one device: one of ours, or whatever else scores images.

    label_space and trained_on are None if nobody says. precision: a name in PRECISIONS. name, digest: where it was
    loaded from, and its sha256; None and "" for a network that was never in a file. combine: "network" combines scales
    as the network has learnt to, "average" takes the mean of their logits. window, class_map: see `load_teacher`.

    Images are (H, W, 3) uint8 RGB; `scales` contain 1; `flip` averages with the mirrored image; `focus` is the share of
    the rows for which the highest scale is computed, None for all (networks/focus.py). Methods raise ValueError for
    scales that the network cannot combine.
    """

    def __init__(
        self,
        network: SegmentationNet | Network,
        label_space: LabelSpace | None = None,
        *,
        trained_on: Tensor | Callable[[], Tensor | None] | None = None,
        device: str = "cpu",
        precision: str = "float32",
        name: TeacherName | None = None,
        digest: str = "",
        combine: str = COMBINE[0],
        window: Size | None = None,
        class_map: ClassMap | None = None,
        compile: bool = False,
    ) -> None:
        self.device = torch.device(device)
        exact_kernels(self.device)
        if isinstance(network, SegmentationNet):
            network = own_network(network, self.device, combine=combine)
        self.network = network
        own = network if isinstance(network, OwnNetwork) else None
        self.combination = own.combination if own else Average()
        self.classes = self.network.classes
        self.feed = Feed(self.device)
        self.label_space, self._trained_on = label_space, trained_on
        self.precision, self.compile = precision, compile
        self.name, self.sha256, self.combine, self.window, self.class_map = name, digest, combine, window, class_map
        self._own = own
        self._budgets: dict[tuple[tuple[float, ...], bool, float | None], Budget] = {}
        self.gate = Gate(self.device)

    @cached_property
    def trained_on(self) -> Tensor | None:
        """The marks of the images that it has seen, (N,) int64. Raises BadTeacher if they cannot be read."""
        return self._trained_on() if callable(self._trained_on) else self._trained_on

    def require_space(self, space: LabelSpace, *, teacher: str, manifest: str) -> None:
        """Raise ValueError unless the network predicts the classes of `space` (or as many, if it does not name them).

        `teacher` and `manifest` are the names of the two in the message.
        """
        if self.classes != len(space) or self.label_space not in (None, space):
            own = repr(self.label_space.name) if self.label_space else "an unnamed label space"
            raise ValueError(
                f"{teacher} predicts {self.classes} classes of {own}, but {manifest} uses label space {space.name!r}"
                f" with {len(space)}: use a teacher of that label space, or map its classes onto it with --classes"
            )

    @torch.inference_mode()
    def logits(
        self, image: Image, *, scales: Sequence[float] = SCALES, flip: bool = False, focus: float | None = None
    ) -> Tensor:
        """Return logits (C, H, W) float32, combined over scales and flip, before the softmax.

        Those of probabilities are their logarithms, with one more channel for no class.
        """
        field = self._field(self.feed.upload([image])[0], scales, flip=flip, focus=focus)
        return _as_logits(field.whole(), field)[0]

    @torch.inference_mode()
    def sampled_logits(
        self,
        image: Image,
        *,
        every: int,
        scales: Sequence[float] = SCALES,
        flip: bool = False,
        focus: float | None = None,
    ) -> NDArray[np.float32]:
        """Return (C, h, w) float32: `logits` at [:, ::every, ::every]; the others are not computed."""
        field = self._field(self.feed.upload([image])[0], scales, flip=flip, focus=focus)
        rows = [field.rows(row, row + 1)[0, :, :, ::every] for row in range(0, field.size[0], every)]
        return _as_logits(torch.cat(rows, dim=1)[None], field)[0].float().cpu().numpy()

    @torch.inference_mode()
    def confidence(
        self,
        image: Image,
        *,
        scales: Sequence[float] = SCALES,
        flip: bool = False,
        focus: float | None = None,
        temperature: float = 1.0,
        evidence: Factors | None = None,
        places: Places | None = None,
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Return the top class (H, W) uint8, before any threshold, and its probability (H, W) float32.

        temperature, evidence, places: see `predict_in_batches`.
        """
        pixels, known = self.feed.upload([image], places=[places], evidence=evidence)
        winners, confidences, *_ = top_classes(
            self._field(pixels, scales, flip=flip, focus=focus), 1, classes=self.classes, device=self.device,
            channels=self.network.channels, temperature=temperature, evidence=known,
        )  # fmt: skip
        return winners[0].cpu().numpy(), confidences[0].cpu().numpy()

    @torch.inference_mode()
    def parts(self, image: Image, *, scales: Sequence[float] = SCALES) -> list[Part]:
        """Return the logits and the attention of every scale, at the resolution of one of our networks."""
        assert self._own is not None
        pixels = self._own.normalised(self.feed.upload([image])[0])
        with autocast(self.device, self.precision):
            return self._own.network.parts(pixels, check_scales(scales), combination=self.combination)

    @torch.inference_mode()
    def views(self, image: Image, *, scales: Sequence[float] = SCALES) -> list[ScaleView]:
        """Return the prediction of every scale by itself and its share in the combined logits, by ascending scale."""
        size = image.shape[0], image.shape[1]
        if self._own is None:
            pixels = self.feed.upload([image])[0]
            equal = np.full((len(scales), *size), 1 / len(scales), np.float32)
            each = ((s, self._field(pixels, (s,), flip=False)) for s in sorted(check_scales(scales)))
            return [self._view(scale, field, share) for (scale, field), share in zip(each, equal, strict=True)]
        parts = sorted(self.parts(image, scales=scales), key=lambda part: part.scale)
        shares = self.combination.shares(parts, size).whole()[0].cpu().numpy()
        fields = (at_size(part.logits, part.size, size) for part in parts)
        return [self._view(part.scale, field, share) for part, field, share in zip(parts, fields, shares, strict=True)]

    def _view(self, scale: float, field: Field, share: NDArray[np.float32]) -> ScaleView:
        winners = top_classes(field, 1, classes=self.classes, device=self.device).winners
        return ScaleView(scale, winners[0].cpu().numpy(), share)

    def require_sound(self, scales: Sequence[float], *, flip: bool) -> None:
        """Let a model of another library predict an image of noise. Raises BadTeacher unless it gives numbers."""
        if self._own is not None:
            return
        noise = np.random.default_rng(0).integers(0, 256, (1, *_PROBE, 3), np.uint8)
        (prediction,) = self.predict_in_batches(noise, 1, edges=(THRESHOLD,), scales=scales, flip=flip)
        if not np.isfinite(prediction.confidence).all():
            raise BadTeacher(f"{self.name} gives nan for an image of noise: expected numbers, mend its weights")

    def budget(self, *, scales: Sequence[float] = SCALES, flip: bool = False, focus: float | None = None) -> Budget:
        """Measure, once, the memory that one small image needs. Raises NotEnoughMemory if even that does not fit."""
        key = tuple(scales), flip, focus
        if key not in self._budgets:
            budget = self._measured(*_PROBE, scales, flip=flip, focus=focus)
            if self._own is None:  # it may resize any image to one size: a second image tells
                pixels = math.prod(_PROBE), 4 * math.prod(_PROBE)
                larger = self._measured(2 * _PROBE[0], 2 * _PROBE[1], scales, flip=flip, focus=focus)
                budget = Budget.of_two(budget, larger, pixels=pixels)
            self._budgets[key] = budget
        return self._budgets[key]

    def _measured(self, height: int, width: int, scales: Sequence[float], *, flip: bool, focus: float | None) -> Budget:
        probe = np.zeros((1, height, width, 3), np.uint8)
        return measure(
            self.device, self.precision, height * width,
            work=lambda: list(
                self.predict_in_batches(probe, 1, edges=(THRESHOLD,), scales=scales, flip=flip, focus=focus)
            ),
            network=torch.inference_mode()(
                lambda: self._field(self.feed.upload(probe)[0], scales, flip=False, focus=focus)
            ),
        )  # fmt: skip

    def label(
        self,
        images: Sequence[Image] | Image,
        *,
        threshold: float = THRESHOLD, scales: Sequence[float] = SCALES, flip: bool = False, focus: float | None = None,
    ) -> tuple[NDArray[np.uint8], list[LabelStatistics]]:  # fmt: skip
        """Label images of one size, (B, H, W, 3) uint8 RGB, by a threshold alone.

        Returns labels (B, H, W) uint8 of train ids, 255 where the probability does not exceed the threshold, and the
        statistics of each. Raises NotEnoughMemory, ValueError.
        """
        if len(images) == 0:
            raise ValueError("no images: expected (B, H, W, 3) uint8 with B of 1 or more")
        check_threshold(threshold)
        batch = self.planned_batch(images[0].shape[:2], scales=scales, focus=focus)
        if self.device.type != "cpu":
            self.budget(scales=scales, flip=flip, focus=focus)
        labels, statistics = [], []
        found = self.predict_in_batches(images, batch, edges=(threshold,), scales=scales, flip=flip, focus=focus)
        for prediction in found:
            label = keep(prediction.codes, self.classes)
            pixels = np.bincount(label.ravel(), minlength=256)[: self.classes]
            labels.append(label)
            statistics.append(LabelStatistics(pixels, prediction.histogram, prediction.confidence))
        return np.stack(labels), statistics

    def planned_batch(
        self, size: Sequence[int], *, scales: Sequence[float] = SCALES, focus: float | None = None
    ) -> int:
        """Return the number of images of a size, (height, width), in a batch on this kind of device."""
        pixels = batch_pixels(self.device.type)
        return planned_batch(*size, scales=check_scales(scales), pixels=pixels, focus=focus)

    def predict_in_batches(
        self,
        images: Sequence[Image] | Image,
        batch: int,
        *,
        edges: Sequence[float],
        scales: Sequence[float] = SCALES,
        flip: bool = False,
        focus: float | None = None,
        temperature: float = 1.0,
        evidence: Factors | None = None,
        places: Sequence[Places | None] = (),
        own: bool = False,
        second: bool = False,
        probability: bool = False,
        swings: NDArray[np.float32] | None = None,
        alone: bool = False,
    ) -> Iterator[Prediction]:
        """Predict images of one size, `batch` at a time; yield the predictions in order.

        edges: confidences that a prediction tells apart, ascending. temperature: divides the logits. evidence: of
        polygons, or None; it counts at the `places` (H, W) int16 of an image, None where it has no polygons. own,
        second: predictions tell what the teacher alone says, and its second class. probability: they tell every pixel's
        probability, in 255ths. swings: (2, C) of a focus, for `Prediction.least`. The last batch is filled up, so that
        every image goes through the same kernels. alone: no other thread's batch is computed meanwhile. Raises
        NotEnoughMemory, MemoryTaken.
        """
        size = images[0].shape[:2]
        budget = self._budgets.get((tuple(scales), flip, focus))

        def lacking(memory: DeviceMemory) -> Exception:
            needed = batch * budget.needs(*size) if budget else None
            many = "an image" if batch == 1 else f"{batch} images"
            what = f"{many} of {size[1]} x {size[0]} at scale {max(scales):g}"
            return too_little(str(self.device), what, memory, needed=needed)

        if self.device.type == "cpu" and budget and budget.needs(*size) > budget.free_bytes:
            # Not even tried: the system may promise more memory than it has, and then end the process.
            raise lacking(device_memory(self.device))
        if budget:
            budget.require_countable(*size, batch=batch, at=f"{max(scales):g}")

        def compute(start: int) -> list[Prediction]:
            return self._predict_batch(
                images[start : start + batch], batch, edges=edges, scales=scales, flip=flip, focus=focus,
                temperature=temperature, evidence=evidence, places=places[start : start + batch], own=own,
                second=second, probability=probability, swings=swings,
            )  # fmt: skip

        for start in range(0, len(images), batch):
            yield from self.gate.compute(partial(compute, start), size, alone=alone, error=lacking)

    def _field(self, pixels: Tensor, scales: Sequence[float], *, flip: bool, focus: float | None = None) -> Field:
        with autocast(self.device, self.precision):
            return self.network.field(pixels, scales, flip=flip, focus=focus)

    @torch.inference_mode()
    def _predict_batch(
        self,
        images: Sequence[Image] | Image,
        batch: int,
        *,
        edges: Sequence[float],
        scales: Sequence[float],
        flip: bool,
        focus: float | None,
        temperature: float,
        evidence: Factors | None,
        places: Sequence[Places | None],
        own: bool,
        second: bool,
        probability: bool,
        swings: NDArray[np.float32] | None,
    ) -> list[Prediction]:
        classes = self.classes
        with self.feed.stream():
            pixels, known = self.feed.upload(images, batch=batch, places=places, evidence=evidence)
            field = self._field(pixels, scales, flip=flip, focus=focus)
            tops = top_classes(
                field, batch, classes=classes, device=self.device, channels=self.network.channels,
                temperature=temperature, evidence=known, second=second,
                swings=None if swings is None else self.feed.swings(swings),
            ).first(len(images))  # fmt: skip  # without the padding images
            seen = field.seen[: len(images)] if isinstance(field, Focused) else None
            return self.feed.download(tops, classes=classes, edges=edges, own=own, probability=probability, seen=seen)


def _as_logits(values: Tensor, field: Field) -> Tensor:
    """The logits of a field's values (B, C, H, W)."""
    if not field.probable:
        return values
    total = values.sum(dim=1, keepdim=True)
    known = values / total.clamp(min=1)
    return torch.cat([known, 1 - total], dim=1).clamp_(min=LEAST).log_()


def own_network(network: SegmentationNet, device: torch.device, *, combine: str) -> OwnNetwork:
    """Move one of our networks to a device, and wrap it. Raises NotEnoughMemory, MemoryTaken."""
    if attempt(partial(network.eval().to, device)) is None:
        raise too_little(str(device), "the teacher", device_memory(device), needed=None, otherwise="")
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return OwnNetwork(network, Average() if combine == "average" else network.scale_attn, device=device)
