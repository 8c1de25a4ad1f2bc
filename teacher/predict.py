"""From photographs to labels: normalise, predict at several scales, combine, decide.

On a GPU images are computed in batches of a planned size (`memory.planned_batch`), always full, so that every image of
a size goes through the same kernels. Free memory decides only how many batches are under way; one that does not fit
beside the others is tried again alone. Only uint8 labels and small tables of counts reach the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autolabel.manifests import storage
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.policy import COMBINE, SCALES, THRESHOLD, check_scales, check_threshold
from autolabel.teacher.checkpoints import load_network, read_checkpoint
from autolabel.teacher.decide import LabelStatistics, Prediction, keep, top_classes
from autolabel.teacher.device import (
    DeviceMemory,
    autocast,
    device_memory,
    exact_kernels,
    pick_device,
    pick_precision,
    require_precision,
)
from autolabel.teacher.feed import Feed, Image
from autolabel.teacher.fold import cast_convolutions, fold_batch_norm
from autolabel.teacher.memory import Budget, Gate, attempt, batch_pixels, measure, planned_batch, too_little
from autolabel.teacher.networks.combine import Average, Part
from autolabel.teacher.networks.decoders import SegmentationNet
from autolabel.teacher.networks.fields import Field, at_size, mean_with_mirrored

_PROBE = (256, 512)  # height and width of the image that the budget is measured with


@dataclass(frozen=True)
class ScaleView:
    """The top class of one scale by itself, (H, W) uint8, and its share in the combined logits, (H, W) float32."""

    scale: float
    label: NDArray[np.uint8]
    share: NDArray[np.float32]


class Teacher:
    """A network that is ready to predict, on one device.

    label_space and trained_on are those of its checkpoint: None if that does not say. precision: a name in
    PRECISIONS. path, digest: the checkpoint and its sha256; None and "" for a network that was never in a file.
    combine: "network" combines scales as the network has learnt to, "average" takes the mean of their logits.

    Images are (H, W, 3) uint8 RGB; `scales` contain 1; `flip` averages the logits with those of the mirrored image.
    Methods raise ValueError for scales that the network cannot combine.
    """

    def __init__(
        self,
        network: SegmentationNet,
        label_space: LabelSpace | None = None,
        *,
        trained_on: Tensor | None = None,
        device: str = "cpu",
        precision: str = "float32",
        path: Path | None = None,
        digest: str = "",
        combine: str = COMBINE[0],
    ) -> None:
        self.device = torch.device(device)
        exact_kernels(self.device)
        self.network = network.eval()
        if attempt(partial(network.to, self.device)) is None:
            raise too_little(device, "the teacher", device_memory(self.device), needed=None, otherwise="")
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.combination = Average() if combine == "average" else network.scale_attn
        self.feed = Feed(self.device)
        self.label_space = label_space
        self.trained_on = trained_on
        self.precision = precision
        self.path, self.sha256, self.combine = path, digest, combine
        self._budgets: dict[tuple[tuple[float, ...], bool], Budget] = {}
        self.gate = Gate(self.device)

    def require_space(self, space: LabelSpace, *, checkpoint: str, manifest: str) -> None:
        """Raise ValueError unless the network predicts the classes of `space` (or as many, if it does not name them).

        `checkpoint` and `manifest` are the names of the two in the message.
        """
        classes = self.network.classes
        if classes != len(space) or self.label_space not in (None, space):
            own = repr(self.label_space.name) if self.label_space else "an unnamed label space"
            raise ValueError(
                f"{checkpoint} predicts {classes} classes of {own}, but {manifest} uses label space {space.name!r}"
                f" with {len(space)}: use a checkpoint trained in that label space"
            )

    @torch.inference_mode()
    def logits(self, image: Image, *, scales: Sequence[float] = SCALES, flip: bool = False) -> Tensor:
        """Return logits (C, H, W) float32, combined over scales and flip, before the softmax."""
        return self._field(self.feed.upload([image])[0], scales, flip=flip).whole()[0]

    @torch.inference_mode()
    def sampled_logits(
        self, image: Image, *, every: int, scales: Sequence[float] = SCALES, flip: bool = False
    ) -> NDArray[np.float32]:
        """Return (C, h, w) float32: `logits` at [:, ::every, ::every]; the others are not computed."""
        field = self._field(self.feed.upload([image])[0], scales, flip=flip)
        rows = [field.rows(row, row + 1)[0, :, :, ::every] for row in range(0, field.size[0], every)]
        return torch.cat(rows, dim=1).float().cpu().numpy()

    @torch.inference_mode()
    def confidence(
        self,
        image: Image,
        *,
        scales: Sequence[float] = SCALES,
        flip: bool = False,
        temperature: float = 1.0,
        prior: Sequence[float] | None = None,
        coarse: Image | None = None,
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Return the top class (H, W) uint8, before any threshold, and its probability (H, W) float32.

        temperature, prior, coarse: see `predict_in_batches`.
        """
        pixels, undrawn = self.feed.upload([image], coarse=[coarse], prior=prior)
        winners, confidences = top_classes(
            self._field(pixels, scales, flip=flip), 1, classes=self.network.classes, device=self.device,
            temperature=temperature, undrawn=undrawn,
        )  # fmt: skip
        return winners[0].cpu().numpy(), confidences[0].cpu().numpy()

    @torch.inference_mode()
    def parts(self, image: Image, *, scales: Sequence[float] = SCALES) -> list[Part]:
        """Return the logits and the attention of every scale, at the network's own resolution."""
        with autocast(self.device, self.precision):
            return self.network.parts(self.feed.upload([image])[0], check_scales(scales), combination=self.combination)

    @torch.inference_mode()
    def views(self, image: Image, *, scales: Sequence[float] = SCALES) -> list[ScaleView]:
        """Return the prediction of every scale by itself and its share in the combined logits, by ascending scale."""
        size = image.shape[0], image.shape[1]
        parts = sorted(self.parts(image, scales=scales), key=lambda part: part.scale)
        shares = self.combination.shares(parts, size).whole()[0].cpu().numpy()
        views = []
        for part, share in zip(parts, shares, strict=True):
            field = at_size(part.logits, part.size, size)
            winners, _ = top_classes(field, 1, classes=self.network.classes, device=self.device)
            views.append(ScaleView(part.scale, winners[0].cpu().numpy(), share))
        return views

    def budget(self, *, scales: Sequence[float] = SCALES, flip: bool = False) -> Budget:
        """Measure, once, the memory that one small image needs. Raises NotEnoughMemory if even that does not fit."""
        key = tuple(scales), flip
        if key not in self._budgets:
            probe = np.zeros((1, *_PROBE, 3), np.uint8)
            self._budgets[key] = measure(
                self.device, self.precision, math.prod(_PROBE),
                work=lambda: list(self.predict_in_batches(probe, 1, edges=(THRESHOLD,), scales=scales, flip=flip)),
                network=torch.inference_mode()(lambda: self._field(self.feed.upload(probe)[0], scales, flip=False)),
            )  # fmt: skip
        return self._budgets[key]

    def label(
        self,
        images: Sequence[Image] | Image,
        *,
        threshold: float = THRESHOLD,
        scales: Sequence[float] = SCALES,
        flip: bool = False,
    ) -> tuple[NDArray[np.uint8], list[LabelStatistics]]:
        """Label images of one size, (B, H, W, 3) uint8 RGB, by a threshold alone.

        Returns labels (B, H, W) uint8 of train ids, 255 where the probability does not exceed the threshold, and the
        statistics of each. Raises NotEnoughMemory, ValueError.
        """
        if len(images) == 0:
            raise ValueError("no images: expected (B, H, W, 3) uint8 with B of 1 or more")
        check_threshold(threshold)
        batch = self.planned_batch(images[0].shape[:2], scales=scales)
        if self.device.type != "cpu":
            self.budget(scales=scales, flip=flip)
        labels, statistics = [], []
        for prediction in self.predict_in_batches(images, batch, edges=(threshold,), scales=scales, flip=flip):
            label = keep(prediction.codes, self.network.classes)
            pixels = np.bincount(label.ravel(), minlength=256)[: self.network.classes]
            labels.append(label)
            statistics.append(LabelStatistics(pixels, prediction.histogram, prediction.confidence))
        return np.stack(labels), statistics

    def planned_batch(self, size: tuple[int, ...], *, scales: Sequence[float] = SCALES) -> int:
        """Return the number of images of a size, (height, width), in a batch on this kind of device."""
        return planned_batch(*size, scales=check_scales(scales), pixels=batch_pixels(self.device.type))

    def predict_in_batches(
        self,
        images: Sequence[Image] | Image,
        batch: int,
        *,
        edges: Sequence[float],
        scales: Sequence[float] = SCALES,
        flip: bool = False,
        temperature: float = 1.0,
        prior: Sequence[float] | None = None,
        coarse: Sequence[Image | None] = (),
        alone: bool = False,
    ) -> Iterator[Prediction]:
        """Predict images of one size, `batch` at a time; yield the predictions in order.

        edges: confidences that a prediction tells apart, ascending. temperature: divides the logits. prior: for each
        class (C,) the share above 0 that people do not outline, or None; it counts where the coarse label of an image,
        (H, W) uint8 of train ids in `coarse`, names no class. The last batch is filled up, so that every image goes
        through the same kernels. alone: no other thread's batch is computed meanwhile. Raises NotEnoughMemory,
        MemoryTaken.
        """
        size = images[0].shape[:2]
        budget = self._budgets.get((tuple(scales), flip))

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
                images[start : start + batch], batch, edges=edges, scales=scales, flip=flip, temperature=temperature,
                prior=prior, coarse=coarse[start : start + batch],
            )  # fmt: skip

        for start in range(0, len(images), batch):
            yield from self.gate.compute(partial(compute, start), size, alone=alone, error=lacking)

    def _field(self, pixels: Tensor, scales: Sequence[float], *, flip: bool) -> Field:
        scales = check_scales(scales)
        with autocast(self.device, self.precision):
            field = self.network.field(pixels, scales, combination=self.combination)
            if flip:
                mirrored = self.network.field(pixels.flip(-1), scales, combination=self.combination)
                field = mean_with_mirrored(field, mirrored)
        return field

    @torch.inference_mode()
    def _predict_batch(
        self,
        images: Sequence[Image] | Image,
        batch: int,
        *,
        edges: Sequence[float],
        scales: Sequence[float],
        flip: bool,
        temperature: float,
        prior: Sequence[float] | None,
        coarse: Sequence[Image | None],
    ) -> list[Prediction]:
        classes = self.network.classes
        with self.feed.stream():
            pixels, undrawn = self.feed.upload(images, batch=batch, coarse=coarse, prior=prior)
            field = self._field(pixels, scales, flip=flip)
            maps = top_classes(
                field, batch, classes=classes, device=self.device, temperature=temperature, undrawn=undrawn
            )
            winners, confidences = (x[: len(images)] for x in maps)  # without the padding images
            return self.feed.download(winners, confidences, classes=classes, edges=edges)


def load_teacher(
    path: str | Path, *, device: str = "auto", precision: str = "float32", combine: str = COMBINE[0]
) -> Teacher:
    """Load a teacher from a checkpoint of ours or a published one, its batch norms folded, its weights cast.

    device, precision: see `pick_device` and `pick_precision`; combine: see `Teacher`. Raises BadCheckpoint,
    FileNotFoundError, ValueError.
    """
    path = Path(path)
    device = pick_device(device)
    precision = pick_precision(precision, device)
    require_precision(precision, device)
    checkpoint = read_checkpoint(path)
    network = load_network(path, checkpoint)
    fold_batch_norm(network)
    cast_convolutions(network, precision, device=device)
    return Teacher(
        network,
        checkpoint.label_space,
        trained_on=checkpoint.trained_on,
        device=device,
        precision=precision,
        path=path,
        digest=storage.sha256(path),
        combine=combine,
    )
