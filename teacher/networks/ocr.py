"""Object-contextual representations (Yuan et al., arXiv 1909.11065).

Each pixel's feature is enriched by a mixture of region features: a first, auxiliary segmentation gives soft object
regions; a region's feature is the mean of its pixels; each pixel attends to the regions by similarity.

Legend: B batch, K classes (= regions), M `mid` channels, Q `key` channels, N = h * w pixels.
Module names follow the customary ones, so that published state dicts load without renaming.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _bn_relu(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def _project(inputs: int, outputs: int, layers: int) -> nn.Sequential:
    """Return `layers` times a 1x1 convolution, batch norm and ReLU."""
    steps: list[nn.Module] = []
    for i in range(layers):
        steps += [nn.Conv2d(inputs if i == 0 else outputs, outputs, 1, bias=False), _bn_relu(outputs)]
    return nn.Sequential(*steps)


class ObjectAttention(nn.Module):
    """Attention of pixels (B, M, h, w) to regions (B, M, K, 1); returns the context of each pixel (B, M, h, w)."""

    def __init__(self, mid: int, key: int) -> None:
        super().__init__()
        self.f_pixel = _project(mid, key, layers=2)
        self.f_object = _project(mid, key, layers=2)
        self.f_down = _project(mid, key, layers=1)
        self.f_up = _project(key, mid, layers=1)
        self.temperature = key**-0.5

    def forward(self, pixels: Tensor, regions: Tensor) -> Tensor:
        batch, _, height, width = pixels.shape
        query = self.f_pixel(pixels).flatten(2).transpose(1, 2)  # (B, N, Q)
        key = self.f_object(regions).flatten(2)  # (B, Q, K)
        value = self.f_down(regions).flatten(2).transpose(1, 2)  # (B, K, Q)
        similarity = torch.softmax(query @ key * self.temperature, dim=-1)  # (B, N, K)
        context = (similarity @ value).transpose(1, 2)  # (B, Q, N)
        return self.f_up(context.reshape(batch, -1, height, width))  # type: ignore[no-any-return]


class SpatialOCR(nn.Module):
    """Attention and the fusion of its result with the pixel features: (B, M, h, w) -> (B, M, h, w)."""

    def __init__(self, mid: int, key: int, *, dropout: float) -> None:
        super().__init__()
        self.object_context_block = ObjectAttention(mid, key)
        self.conv_bn_dropout = nn.Sequential(
            nn.Conv2d(2 * mid, mid, 1, bias=False), _bn_relu(mid), nn.Dropout2d(dropout)
        )

    def forward(self, pixels: Tensor, regions: Tensor) -> Tensor:
        context = self.object_context_block(pixels, regions)
        return self.conv_bn_dropout(torch.cat([context, pixels], dim=1))  # type: ignore[no-any-return]


def region_features(features: Tensor, region_logits: Tensor) -> Tensor:
    """Return the mean feature of each soft region: features (B, M, h, w), logits (B, K, h, w) -> (B, M, K, 1).

    The logits become weights by a softmax over the pixels of each region.
    """
    weights = torch.softmax(region_logits.flatten(2), dim=2)  # (B, K, N)
    return (weights @ features.flatten(2).transpose(1, 2)).transpose(1, 2).unsqueeze(3)


class OCR(nn.Module):
    """Trunk features (B, inputs, h, w) -> (class logits, auxiliary logits, OCR features, all at (h, w); regions).

    regions: (B, M, K, 1), those of these features unless others are given.
    """

    def __init__(self, inputs: int, classes: int, *, mid: int, key: int, dropout: float = 0.05) -> None:
        super().__init__()
        self.conv3x3_ocr = nn.Sequential(nn.Conv2d(inputs, mid, 3, padding=1), _bn_relu(mid))
        self.ocr_distri_head = SpatialOCR(mid, key, dropout=dropout)
        self.cls_head = nn.Conv2d(mid, classes, 1)
        self.aux_head = nn.Sequential(nn.Conv2d(inputs, inputs, 1), _bn_relu(inputs), nn.Conv2d(inputs, classes, 1))

    def forward(self, features: Tensor, regions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        aux = self.aux_head(features)
        pixels = self.conv3x3_ocr(features)
        if regions is None:
            regions = region_features(pixels, aux)
        enriched = self.ocr_distri_head(pixels, regions)
        return self.cls_head(enriched), aux, enriched, regions
