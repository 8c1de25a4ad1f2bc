"""Combinations that weigh all scales at once, from the features of all of them.

Explicit            one head reads the features of a fixed list of scales (Chen et al., "Attention to Scale",
                    arXiv 1511.03339)
ExplicitPairs       a head weighs neighbouring scales two by two; pairs are chained by normalisation
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from autolabel.teacher.networks.combine import (
    Combination,
    Part,
    Pick,
    Predict,
    add_layers,
    head_layers,
    of_logits,
    rescaled_size,
    run_layers,
)
from autolabel.teacher.networks.fields import Combined, Field, Size, add, at_size
from autolabel.teacher.networks.hrnet import resize

_EXPLICIT_SCALES: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (0.5, 1.0),
    3: (0.5, 1.0, 2.0),
    4: (0.25, 0.5, 1.0, 2.0),
    5: (0.25, 0.5, 1.0, 1.5, 2.0),
}


class Explicit(Combination):
    """One head reads the features of all scales and weighs them at every pixel.

    The number of scales is fixed when it is built; raises ValueError unless it is 1 to 5. `batch_norm` chooses the
    deeper head with batch norm; the plain head is that of the published network, whose last 1x1 convolution is padded
    by a pixel.
    """

    def __init__(self, inputs: int, scales: int, *, batch_norm: bool) -> None:
        super().__init__()
        self.scales = scales
        if scales not in _EXPLICIT_SCALES:
            raise ValueError(f"{scales} scales: an explicit combination weighs 1 to {len(_EXPLICIT_SCALES)} of them")
        self.training_scales = _EXPLICIT_SCALES[scales]
        first = nn.Conv2d(scales * inputs, 512, 3, padding=1, bias=False)
        plain = [first, nn.ReLU(inplace=True), nn.Conv2d(512, scales, 1, padding=1, bias=False)]
        add_layers(self, head_layers(scales * inputs, 256, outputs=scales) if batch_norm else plain)

    def require(self, scales: Sequence[float]) -> None:
        if len(scales) != self.scales:
            given = ",".join(f"{s:g}" for s in scales)
            raise ValueError(f"scales {given}: this network weighs exactly {self.scales} scales at once")

    def weigh(self, predict: Predict, size: Size, *, scales: Sequence[float]) -> list[Part]:
        parts, features = _predict_all(predict, size, scales)
        ordered = [features[1.0], *(features[scale] for scale in sorted(scales) if scale != 1)]
        weights = run_layers(self, torch.cat(ordered, dim=1))
        # The head's channels are in ascending order of scale; the features that it reads begin with scale 1.
        return [replace(part, attention=weights[:, i : i + 1]) for i, part in enumerate(parts)]

    def mix(self, parts: Sequence[Part], size: Size, *, pick: Pick = of_logits) -> Field:
        """Return the sum of the scales' logits times their weights, which need not sum to 1."""
        weights = [at_size(part.attention, size) for part in parts if part.attention is not None]
        return Combined(_weighted, (*weights, *(at_size(pick(part), part.size, size) for part in parts)))


class ExplicitPairs(Combination):
    """A head weighs each scale and the next higher one from the features of both; pairs chain any number of scales."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        add_layers(self, [*head_layers(2 * inputs, channels, outputs=2), nn.Sigmoid()])

    def weigh(self, predict: Predict, size: Size, *, scales: Sequence[float]) -> list[Part]:
        parts, features = _predict_all(predict, size, scales)
        pairs = [torch.cat([features[a.scale], features[b.scale]], dim=1) for a, b in pairwise(parts)]
        return [*(replace(p, attention=run_layers(self, x)) for p, x in zip(parts, pairs, strict=False)), parts[-1]]

    def mix(self, parts: Sequence[Part], size: Size, *, pick: Pick = of_logits) -> Field:
        logits = [at_size(pick(part), part.size, size) for part in parts]
        pairs = [at_size(part.attention, size) for part in parts if part.attention is not None]
        return Combined(_weighted_by_pairs, (*pairs, *logits)) if pairs else logits[0]


def _predict_all(predict: Predict, size: Size, scales: Sequence[float]) -> tuple[list[Part], dict[float, Tensor]]:
    """Return every scale's part, ascending, and by scale the features, resized to those of scale 1."""
    parts: dict[float, Part] = {}
    features: dict[float, Tensor] = {}
    for scale in sorted(scales, key=lambda s: (s != 1, s)):
        own = rescaled_size(size, scale)
        now = predict(own)
        parts[scale] = Part(scale, own, now.logits, aux=now.aux)
        features[scale] = resize(now.features, features[1.0].shape[-2:]) if scale != 1 else now.features
    return [parts[scale] for scale in sorted(scales)], features


def _weighted(*values: Tensor) -> Tensor:
    """Return the sum of weight * value; the arguments are first all weights, then all values."""
    half = len(values) // 2
    return add(weight * value for weight, value in zip(values[:half], values[half:], strict=True))


def _weighted_by_pairs(*values: Tensor) -> Tensor:
    """Return the weighted sum of n values; the arguments are n - 1 weights of neighbouring pairs, then the values.

    A pair's weights have two channels, (lower, higher). The first pair's weights stand; each later pair is scaled so
    that it divides the weight of its lower scale between its two scales.
    """
    pairs = len(values) // 2
    lower, higher = values[0][:, :1], values[0][:, 1:]
    weights, last = [lower, higher], higher
    for pair in values[1:pairs]:
        lower, higher = pair[:, :1], pair[:, 1:]
        share = last / (lower + higher)
        weights[-1:] = [lower * share, higher * share]
        last = higher
    return _weighted(*weights, *values[pairs:])
