"""Hierarchical multi-scale attention (Tao, Sapra, Catanzaro, arXiv 2005.10821, section 3).

The same network sees the image at several scales and predicts, beside the classes, one attention map per scale: how
far this scale is to be trusted against the next higher one. Training sees the pair (0.5, 1); because the attention is
between neighbours, any chain of scales can be combined at inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from autolabel.teacher.hrnet import HRNet, HRNetWidths, resize
from autolabel.teacher.ocr import OCR


@dataclass(frozen=True)
class ScalePrediction:
    """What one scale says, at the size of that scale's input: logits and aux (B, K, h, w), attention (B, 1, h, w)."""

    logits: Tensor
    aux: Tensor
    attention: Tensor


@dataclass(frozen=True)
class TrainingOutput:
    """Logits that the losses look at, all (B, K, H, W): the combined ones, and each scale's alone."""

    joint: Tensor
    aux: Tensor
    low: Tensor
    high: Tensor


class ScaleAttention(nn.Module):
    """OCR features (B, M, h, w) -> attention in (0, 1), (B, 1, h, w). Section 3.1 of the paper."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        x = F.relu(self.bn1(self.conv1(x)))
        return self.conv2(x).sigmoid()  # type: ignore[no-any-return]


def rescale(images: Tensor, scale: float) -> Tensor:
    """Resize (B, C, H, W) to (floor(H * scale), floor(W * scale)), at least one pixel each way."""
    height, width = (max(1, int(side * scale)) for side in images.shape[-2:])
    return resize(images, (height, width))


class HierarchicalNet(nn.Module):
    """HRNet, OCR head and scale attention. Input: normalised RGB (B, 3, H, W) float."""

    def __init__(self, widths: HRNetWidths, classes: int, ocr_mid: int, ocr_key: int, attention: int) -> None:
        super().__init__()
        self.classes = classes
        self.backbone = HRNet(widths)
        self.ocr = OCR(widths.out_channels, classes, ocr_mid, ocr_key)
        self.scale_attn = ScaleAttention(ocr_mid, attention)

    def predict_scale(self, images: Tensor) -> ScalePrediction:
        """One scale's prediction, resized to the size of `images`."""
        size = images.shape[-2:]
        logits, aux, features = self.ocr(self.backbone(images))
        return ScalePrediction(resize(logits, size), resize(aux, size), resize(self.scale_attn(features), size))

    def forward(self, images: Tensor) -> TrainingOutput:
        """The two-scale forward of training: 0.5 and 1."""
        size = images.shape[-2:]
        low, high = self.predict_scale(rescale(images, 0.5)), self.predict_scale(images)
        trust = resize(low.attention, size)
        return TrainingOutput(
            joint=resize(low.attention * low.logits, size) + (1 - trust) * high.logits,
            aux=resize(low.attention * low.aux, size) + (1 - trust) * high.aux,
            low=resize(low.logits, size),
            high=high.logits,
        )

    def logits(self, images: Tensor, scales: Sequence[float]) -> Tensor:
        """Combined logits (B, K, H, W) over a chain of scales that contains 1 (section 3.2).

        From the highest scale down: at or above 1, the running result is resized down to the next scale and mixed
        there; below 1, the scale's weighted logits are resized up to the running result.
        """
        highest, *others = sorted(scales, reverse=True)
        combined = self.predict_scale(rescale(images, highest)).logits  # nothing above: its attention has no partner
        for scale in others:
            now = self.predict_scale(rescale(images, scale))
            if scale >= 1:
                above = resize(combined, now.logits.shape[-2:])
                combined = now.attention * now.logits + (1 - now.attention) * above
            else:
                size = combined.shape[-2:]
                combined = resize(now.attention * now.logits, size) + (1 - resize(now.attention, size)) * combined
        return combined
