"""From photographs to labels: normalise, predict at several scales, combine, decide.

How many images the device computes at once is planned from what one small image needed, and backs off where that was
too much. Only uint8 labels and small tables of counts reach the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autolabel.manifests import machine, storage
from autolabel.manifests.label_space import IGNORE, LabelSpace
from autolabel.manifests.policy import COMBINE, SCALES, THRESHOLD, check_scales, check_threshold
from autolabel.teacher.checkpoints import load_network, read_checkpoint
from autolabel.teacher.decide import LabelStatistics, Prediction, Undrawn, count, encode, keep, top_classes
from autolabel.teacher.fold import fold_batch_norm
from autolabel.teacher.networks.combine import Average, Field, Part, at_size, mean_with_mirrored
from autolabel.teacher.networks.decoders import SegmentationNet

# Mean and deviation of ImageNet's RGB values in 0..1, which all published trunks expect.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST_BATCH = 8  # more than that gains nothing: one image at scale 2 fills any GPU
_PROBE = (256, 512)  # the size of the image that the plan is made from
_SPARE = 0.2  # of the free memory is left alone

Image = NDArray[np.uint8]


class NotEnoughMemory(RuntimeError):
    """One image alone does not fit; the message says which and what to do."""


@dataclass(frozen=True)
class Plan:
    """What the device has, and what a pixel of an image costs at the scales in use."""

    device: str
    precision: str
    bytes_per_pixel: float
    free_bytes: int

    def at_once(self, height: int, width: int, most: int = LARGEST_BATCH, batches: int = 1) -> int:
        """How many images of this size to compute at once, 1 to `most`, where so many batches are in flight."""
        room = (1 - _SPARE) * self.free_bytes / batches
        return max(1, min(most, int(room / self.needs(height, width))))

    def needs(self, height: int, width: int) -> float:
        """Bytes that one image of this size takes."""
        return height * width * self.bytes_per_pixel


def normalise(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 RGB -> float32, the mean taken away and divided by the deviation."""
    mean = torch.tensor(_MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(_STD, device=images.device).view(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std


def pick_device(name: str = "auto") -> str:
    """`auto` is the GPU where there is one, else the CPU. Raises ValueError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch finds no GPU here: use cpu")
    return name


def pick_precision(name: str, device: str) -> str:
    """`auto` is bfloat16 on a GPU that has it, else float32."""
    if name != "auto":
        if name not in PRECISIONS:
            raise ValueError(f"unknown precision {name!r}: expected auto, {', '.join(PRECISIONS)}")
        return name
    return "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"


@dataclass(frozen=True)
class View:
    """One scale's own top class (H, W) uint8, and its share in the combined logits (H, W) float32."""

    scale: float
    label: NDArray[np.uint8]
    share: NDArray[np.float32]


class Teacher:
    """A network ready to predict. `label_space` is None when the checkpoint does not say which it was trained on.

    `combine`: "network" combines scales as the network has learnt to, "average" takes the mean of their logits.
    """

    def __init__(
        self,
        network: SegmentationNet,
        label_space: LabelSpace | None,
        trained_on: Tensor,
        device: str = "cpu",
        precision: str = "float32",
        digest: str = "",
        combine: str = COMBINE[0],
    ) -> None:
        self.device = torch.device(device)
        self.network = network.eval().to(self.device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.combination = Average() if combine == "average" else network.scale_attn
        self.label_space = label_space
        self.trained_on = trained_on
        self.precision = precision
        self.sha256 = digest
        self._plans: dict[tuple[tuple[float, ...], bool], Plan] = {}
        self.fits: dict[tuple[int, int], int] = {}  # by size, the batch that was left after memory had run out

    def require_space(self, space: LabelSpace, checkpoint: str, manifest: str) -> None:
        """Raise ValueError unless the network speaks of the classes of `space` (or of as many, if it does not say)."""
        classes = self.network.classes
        if classes != len(space) or self.label_space not in (None, space):
            mine = repr(self.label_space.name) if self.label_space else "an unnamed label space"
            raise ValueError(
                f"{checkpoint} predicts {classes} classes of {mine}, but {manifest} uses label space {space.name!r}"
                f" with {len(space)}: use a checkpoint trained in that label space"
            )

    def _pixels(self, images: Sequence[Image] | Image) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 on the device, normalised."""
        # A copy where the array is read-only or turned, so that torch can own it.
        batch = torch.from_numpy(np.require(np.asarray(images), requirements=["C", "W"]))
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        return normalise(batch.permute(0, 3, 1, 2)).contiguous(memory_format=torch.channels_last)

    def _autocast(self) -> torch.autocast:
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def _field(self, pixels: Tensor, scales: Sequence[float], flip: bool) -> Field:
        scales = check_scales(scales)
        with self._autocast():
            field = self.network.field(pixels, scales, self.combination)
            if flip:
                mirrored = self.network.field(pixels.flip(-1), scales, self.combination)
                field = mean_with_mirrored(field, mirrored)
        return field

    @torch.inference_mode()
    def logits(self, image: Image, scales: Sequence[float] = SCALES, flip: bool = False) -> Tensor:
        """(H, W, 3) uint8 RGB -> (C, H, W) float32 logits, combined over scales and flip, before the softmax."""
        return self._field(self._pixels(image[None]), scales, flip).whole()[0]

    @torch.inference_mode()
    def parts(self, image: Image, scales: Sequence[float] = SCALES) -> list[Part]:
        """(H, W, 3) uint8 RGB -> what every scale says of it, and its attention."""
        with self._autocast():
            return self.network.parts(self._pixels(image[None]), check_scales(scales), self.combination)

    @torch.inference_mode()
    def views(self, image: Image, scales: Sequence[float] = SCALES) -> list[View]:
        """(H, W, 3) uint8 RGB -> what every scale says by itself and how much it counts, by ascending scale."""
        size = image.shape[0], image.shape[1]
        parts = sorted(self.parts(image, scales), key=lambda part: part.scale)
        shares = self.combination.shares(parts, size).whole()[0].cpu().numpy()
        own = (top_classes(at_size(p.logits, p.size, size), 1, self.network.classes, self.device)[0] for p in parts)
        return [View(p.scale, o[0].cpu().numpy(), s) for p, o, s in zip(parts, own, shares, strict=True)]

    @torch.inference_mode()
    def confidence(
        self,
        image: Image,
        scales: Sequence[float] = SCALES,
        flip: bool = False,
        temperature: float = 1.0,
        shares: Sequence[float] | None = None,
        coarse: Image | None = None,
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """(H, W, 3) uint8 RGB -> top class (H, W) uint8, before any threshold, and its probability (H, W) float32.

        shares, coarse: as of `predict_in_batches`, of one image.
        """
        field = self._field(self._pixels(image[None]), scales, flip)
        left_out = self._left_out(shares, [coarse], image.shape[:2])
        winners, confidences = top_classes(field, 1, self.network.classes, self.device, temperature, left_out)
        return winners[0].cpu().numpy(), confidences[0].cpu().numpy()

    @torch.inference_mode()
    def sampled_logits(
        self, image: Image, every: int, scales: Sequence[float] = SCALES, flip: bool = False
    ) -> NDArray[np.float32]:
        """(H, W, 3) uint8 RGB -> (C, h, w) float32: what `logits` holds at [:, ::every, ::every], and no more of it."""
        field = self._field(self._pixels(image[None]), scales, flip)
        rows = [field.rows(row, row + 1)[0, :, :, ::every] for row in range(0, field.size[0], every)]
        return torch.cat(rows, dim=1).float().cpu().numpy()

    def plan(self, scales: Sequence[float] = SCALES, flip: bool = False) -> Plan:
        """Label one small image and see what it costs, once. Raises NotEnoughMemory where not even that fits."""
        key = tuple(scales), flip
        if key in self._plans:
            return self._plans[key]
        probe = np.zeros((1, *_PROBE, 3), np.uint8)
        needed = _highest_use(self.device, lambda: list(self.predict_in_batches(probe, 1, (THRESHOLD,), scales, flip)))
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        self._plans[key] = Plan(name, self.precision, needed / math.prod(_PROBE), free_memory(self.device))
        return self._plans[key]

    def label(
        self,
        images: Sequence[Image] | Image,
        threshold: float = THRESHOLD,
        scales: Sequence[float] = SCALES,
        flip: bool = False,
    ) -> tuple[NDArray[np.uint8], list[LabelStatistics]]:
        """(B, H, W, 3) uint8 RGB -> labels (B, H, W) uint8, 255 where not confident, and each image's statistics.

        Raises NotEnoughMemory, ValueError.
        """
        if len(images) == 0:
            raise ValueError("no images: expected (B, H, W, 3) uint8 with B of 1 or more")
        check_threshold(threshold)
        batch = 1
        if self.device.type == "cuda":
            batch = self.plan(scales, flip).at_once(*images[0].shape[:2])
        labels, statistics = [], []
        for found in self.predict_in_batches(images, batch, (threshold,), scales, flip):
            label = keep(found.codes, self.network.classes)
            pixels = np.bincount(label.ravel(), minlength=256)[: self.network.classes]
            labels.append(label)
            statistics.append(LabelStatistics(pixels, found.histogram, found.confidence))
        return np.stack(labels), statistics

    def predict_in_batches(
        self,
        images: Sequence[Image] | Image,
        batch: int,
        edges: Sequence[float],
        scales: Sequence[float] = SCALES,
        flip: bool = False,
        temperature: float = 1.0,
        shares: Sequence[float] | None = None,
        coarse: Sequence[Image | None] = (),
    ) -> Iterator[Prediction]:
        """Predict images of one size, `batch` at a time, halved where memory does not suffice; yields them in order.

        edges: ascending confidences that are told apart. shares: of each class (C,), what people do not outline of it,
        where that counts; coarse: each image's coarse label (H, W) uint8, if there is one. The last batch is filled up,
        so that every image goes through the very same kernels. Raises NotEnoughMemory.
        """
        size = images[0].shape[:2]
        batch = min(batch, self.fits.get(size, batch))
        plan = self._plans.get((tuple(scales), flip))
        if self.device.type == "cpu" and plan and plan.needs(*size) > plan.free_bytes:
            # Not tried: where memory is promised beyond what there is, the system would end the process instead.
            raise NotEnoughMemory(self._does_not_fit(size, scales, plan.needs(*size)))
        done = 0
        while done < len(images):
            some = images[done : done + batch]
            try:
                left_out = self._left_out(shares, coarse[done : done + batch], size, batch)
                outcome = self._predict_batch(some, batch, edges, scales, flip, temperature, left_out)
            except (RuntimeError, MemoryError) as error:
                if not _is_memory(error):
                    raise
                outcome = None
            if outcome is not None:  # here the failed attempt's tensors are gone
                yield from outcome
                done += len(some)
            elif batch > 1:
                self.fits[size] = batch = batch // 2
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            else:
                raise NotEnoughMemory(self._does_not_fit(size, scales, plan.needs(*size) if plan else None))

    def _does_not_fit(self, size: tuple[int, int], scales: Sequence[float], needed: float | None) -> str:
        wanted = f"about {needed / 2**30:.1f} GiB needed, " if needed else ""
        return (
            f"not enough memory on {self.device} for an image of {size[1]} x {size[0]} at scale {max(scales):g}"
            f" ({wanted}{free_memory(self.device) / 2**30:.1f} GiB free): leave that scale out, or use a larger device"
        )

    def _left_out(
        self, shares: Sequence[float] | None, coarse: Sequence[Image | None], size: tuple[int, ...], batch: int = 1
    ) -> Undrawn | None:
        """Where no class is named; nowhere in an image without a coarse label, and in what fills a batch up."""
        if shares is None or all(label is None for label in coarse):
            return None
        where = np.zeros((batch, *size), np.bool_)
        for place, label in enumerate(coarse):
            if label is not None:
                where[place] = label == IGNORE
        return Undrawn(torch.from_numpy(where).to(self.device), torch.tensor(shares, device=self.device))

    @torch.inference_mode()
    def _predict_batch(
        self,
        images: Sequence[Image] | Image,
        batch: int,
        edges: Sequence[float],
        scales: Sequence[float],
        flip: bool,
        temperature: float,
        left_out: Undrawn | None,
    ) -> list[Prediction]:
        classes = self.network.classes
        filled = np.concatenate([images, np.repeat(images[-1:], batch - len(images), axis=0)])
        field = self._field(self._pixels(filled), scales, flip)
        found = top_classes(field, batch, classes, self.device, temperature, left_out)
        winners, confidences = (x[: len(images)] for x in found)  # without what filled the batch up
        codes = encode(winners, confidences, classes, edges).cpu().numpy()
        counts = [count(w, p, classes) for w, p in zip(winners, confidences, strict=True)]
        return [
            Prediction(code, len(edges) + 1, histogram.cpu().numpy(), sums.cpu().numpy())
            for code, (histogram, sums) in zip(codes, counts, strict=True)
        ]


def _is_memory(error: RuntimeError | MemoryError) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def free_memory(device: torch.device) -> int:
    """Bytes that a new allocation may use: the GPU's, or what the system says is available."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + cached)
    return machine.free_memory()


def _highest_use(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes that some work needs at most beyond what is in use before it; at least 1."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return max(1, torch.cuda.max_memory_allocated(device) - before)
    with machine.PeakMemory() as peak:
        work()
    return max(1, peak.bytes)


def load_teacher(
    path: str | Path, device: str = "auto", precision: str = "float32", combine: str = COMBINE[0]
) -> Teacher:
    """A teacher from a checkpoint of ours or a published one, its batch norms folded.

    Raises BadCheckpoint, FileNotFoundError, ValueError.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    device = pick_device(device)
    network = load_network(path, checkpoint)
    fold_batch_norm(network)
    return Teacher(
        network,
        checkpoint.label_space,
        checkpoint.trained_on,
        device,
        pick_precision(precision, device),
        storage.sha256(path),
        combine,
    )
