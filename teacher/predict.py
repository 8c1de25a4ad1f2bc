"""From a photograph to labels: normalise, predict at several scales, decide.

The decision is made on the float, on the device: a pixel keeps its top class where the softmax probability of the
combined logits exceeds the threshold, else it becomes 255. Only uint8 labels and small counts reach the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autolabel.manifests.classes import IGNORE, LabelSpace
from autolabel.manifests.files import sha256
from autolabel.manifests.policy import SCALES, THRESHOLD, check_scales, check_threshold
from autolabel.manifests.tables import CONFIDENCE_BINS
from autolabel.teacher.build import Checkpoint, load_network, read_checkpoint
from autolabel.teacher.multiscale import HierarchicalNet

# Mean and deviation of ImageNet's RGB values in 0..1, which all published trunks expect.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LabelStatistics:
    """Counts of one labelled image, by class. All over the pixels whose top class it is.

    pixels (C,) int64: those that were kept. histogram (C, 20) int64: confidences before the threshold, bin k holding
    k/20 < p <= (k+1)/20. confidence (C,) float64: sum of the confidences before the threshold.
    """

    pixels: NDArray[np.int64]
    histogram: NDArray[np.int64]
    confidence: NDArray[np.float64]


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


class Teacher:
    """A network ready to predict. `label_space` is None when the checkpoint does not say which it was trained on."""

    def __init__(
        self,
        network: HierarchicalNet,
        label_space: LabelSpace | None,
        trained_on: Tensor,
        device: str = "cpu",
        precision: str = "float32",
        digest: str = "",
    ) -> None:
        self.device = torch.device(device)
        self.network = network.eval().to(self.device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.label_space = label_space
        self.trained_on = trained_on
        self.precision = precision
        self.sha256 = digest

    def require_space(self, space: LabelSpace, checkpoint: str, manifest: str) -> None:
        """Raise ValueError unless the network speaks of the classes of `space` (or of as many, if it does not say)."""
        classes = self.network.classes
        if classes != len(space) or self.label_space not in (None, space):
            mine = repr(self.label_space.name) if self.label_space else "an unnamed label space"
            raise ValueError(
                f"{checkpoint} predicts {classes} classes of {mine}, but {manifest} uses label space {space.name!r}"
                f" with {len(space)}: use a checkpoint trained in that label space"
            )

    def _combined(self, images: NDArray[np.uint8], scales: Sequence[float], flip: bool) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, C, H, W) float32 logits on the device."""
        scales = check_scales(scales)
        # A copy where the array is read-only or turned, so that torch can own it.
        batch = torch.from_numpy(np.require(images, requirements=["C", "W"])).permute(0, 3, 1, 2).to(self.device)
        dtype = PRECISIONS[self.precision]
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            pixels = normalise(batch).contiguous(memory_format=torch.channels_last)
            logits = self.network.logits(pixels, scales)
            if flip:
                logits = (logits + self.network.logits(pixels.flip(-1), scales).flip(-1)) / 2
        return logits.float()

    def logits(self, image: NDArray[np.uint8], scales: Sequence[float] = SCALES, flip: bool = False) -> Tensor:
        """(H, W, 3) uint8 RGB -> (C, H, W) float32 logits, combined over scales and flip, before the softmax."""
        return self._combined(image[None], scales, flip)[0]

    def confidence(
        self, image: NDArray[np.uint8], scales: Sequence[float] = SCALES, flip: bool = False
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """(H, W, 3) uint8 RGB -> top class (H, W) uint8, before any threshold, and its probability (H, W) float32."""
        with torch.inference_mode():
            top, winner = torch.softmax(self.logits(image, scales, flip), dim=0).max(dim=0)
            return winner.to(torch.uint8).cpu().numpy(), top.cpu().numpy()

    def label(
        self,
        images: NDArray[np.uint8],
        threshold: float = THRESHOLD,
        scales: Sequence[float] = SCALES,
        flip: bool = False,
    ) -> tuple[NDArray[np.uint8], list[LabelStatistics]]:
        """(B, H, W, 3) uint8 RGB -> labels (B, H, W) uint8, 255 where not confident, and each image's statistics.

        Images go through one by one, so that a label never depends on its neighbours in a batch.
        """
        labels, statistics = zip(*(self._label_one(image, threshold, scales, flip) for image in images), strict=True)
        return np.stack(labels), list(statistics)

    def _label_one(
        self, image: NDArray[np.uint8], threshold: float, scales: Sequence[float], flip: bool
    ) -> tuple[NDArray[np.uint8], LabelStatistics]:
        check_threshold(threshold)
        with torch.inference_mode():
            probabilities = torch.softmax(self.logits(image, scales, flip), dim=0)  # (C, H, W)
            classes = len(probabilities)
            top, winner = probabilities.max(dim=0)
            kept = top > threshold
            label = torch.where(kept, winner, IGNORE).to(torch.uint8)
            edges = torch.arange(1, CONFIDENCE_BINS, device=top.device) / CONFIDENCE_BINS
            cell = winner * CONFIDENCE_BINS + torch.bucketize(top, edges)  # edges[k-1] < p <= edges[k] is bin k
            histogram = torch.bincount(cell.flatten(), minlength=classes * CONFIDENCE_BINS)
            return label.cpu().numpy(), LabelStatistics(
                pixels=torch.bincount(winner[kept], minlength=classes).cpu().numpy(),
                histogram=histogram.view(classes, CONFIDENCE_BINS).cpu().numpy(),
                confidence=torch.bincount(winner.flatten(), top.flatten().double(), classes).cpu().numpy(),
            )


def load_teacher(path: str | Path, device: str = "auto", precision: str = "float32") -> Teacher:
    """A teacher from a checkpoint of ours or a published one. Raises BadCheckpoint, FileNotFoundError, ValueError."""
    path = Path(path)
    checkpoint = read_checkpoint(path)
    return teacher_from(path, checkpoint, device, precision)


def teacher_from(path: Path, checkpoint: Checkpoint, device: str, precision: str) -> Teacher:
    """A teacher from a checkpoint that has been read from `path`."""
    device = pick_device(device)
    return Teacher(
        load_network(path, checkpoint),
        checkpoint.label_space,
        checkpoint.trained_on,
        device,
        pick_precision(precision, device),
        sha256(path),
    )
