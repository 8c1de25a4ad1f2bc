"""Ways to combine what one network says about an image at several scales.

    Average             the mean of the logits; nothing is learnt
    Hierarchical        each scale says how far it is to be trusted against the next higher one: training sees one pair
                        of scales, inference may chain any number (Tao et al., arXiv 2005.10821, section 3)
    HierarchicalPairs   the same, but a scale's attention also reads the features of the next higher scale
    Explicit            one head reads the features of a fixed list of scales and weighs them all at once
                        (Chen et al., "Attention to Scale", arXiv 1511.03339)
    ExplicitPairs       a head weighs neighbouring scales two by two; pairs are chained by normalisation

They are interchangeable: each turns the network's predictions of single scales into `Part`s (`weigh`) and the parts
into one `Field` at the size of the image (`mix`). A field is computed where it is read, whole or a few rows at a time,
so that combining needs no more memory than is asked for.

Legend: B batch, K classes, M feature channels; (h, w) a prediction's own resolution, (H, W) the image's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autolabel.teacher.networks.hrnet import resize

Size = tuple[int, int]


@dataclass(frozen=True)
class Prediction:
    """What the network says about one image at one scale: logits and aux (B, K, h, w), features (B, M, h, w)."""

    logits: Tensor
    features: Tensor
    aux: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """One scale's share: its prediction, its input's size, and its attention at the prediction's resolution.

    attention: (B, 1, h, w) weight of this scale; two channels, (lower, higher), in ExplicitPairs; None where the scale
    needs none.
    """

    scale: float
    size: Size
    logits: Tensor
    attention: Tensor | None = None
    aux: Tensor | None = None


@dataclass(frozen=True)
class TrainingOutput:
    """Logits that the losses look at, all (B, K, H, W).

    joint: combined. aux: the OCR head's auxiliary logits, combined likewise (None in networks without). scales: each
    scale's own, ascending (empty in a network that trains at one scale).
    """

    joint: Tensor
    aux: Tensor | None
    scales: tuple[Tensor, ...]


class Field:
    """A map (B, C, H, W) of `size` (H, W) that is not in memory: it is computed where it is read."""

    size: Size

    def rows(self, top: int, bottom: int) -> Tensor:
        """Its rows `top` to `bottom` (not included), (B, C, bottom - top, W) float32."""
        raise NotImplementedError

    def whole(self) -> Tensor:
        """All of it, (B, C, H, W)."""
        raise NotImplementedError


@dataclass(frozen=True)
class InMemory(Field):
    """A map that is a tensor already."""

    tensor: Tensor

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

    Read in rows, its numbers are those of the whole up to float32 rounding.
    """

    source: Field
    size: Size

    def rows(self, top: int, bottom: int) -> Tensor:
        height = self.source.size[0]
        # Where the rows lie among the source's, and how much of each of those they take.
        place = (torch.arange(top, bottom, dtype=torch.float64) + 0.5) * (height / self.size[0]) - 0.5
        place = place.clamp_(0, height - 1).view(-1, 1)
        first, last = int(place[0]), min(int(place[-1]) + 2, height)
        share = (1 - (place - torch.arange(first, last)).abs_()).clamp_(min=0)
        source = self.source.rows(first, last)
        return _widened(share.to(source) @ source, self.size[1])

    def whole(self) -> Tensor:
        return resize(self.source.whole(), self.size)


def _widened(x: Tensor, width: int) -> Tensor:
    """Bilinear resize of the width alone."""
    if x.device.type == "cpu":  # a third faster there; on a GPU this kernel would use one thread per column
        lines = x.reshape(1, -1, x.shape[-1])
        return F.interpolate(lines, size=width, mode="linear").view(*x.shape[:-1], width)
    return resize(x, (x.shape[-2], width))


def resized(source: Field, size: Size) -> Field:
    """`source` at `size`; itself if it has that size already."""
    return source if source.size == size else Resized(source, size)


def at_size(tensor: Tensor, *sizes: Size) -> Field:
    """A prediction (B, C, h, w) resized to each of `sizes` in turn.

    Halving what was enlarged by a multiple of 4 gives the very numbers of one direct resize (each output is the mean of
    two neighbours on one linear piece), so that detour over the largest maps is skipped.
    """
    *before, via, size = ((tensor.shape[-2], tensor.shape[-1]), *sizes)
    if len(before) == 1 and all(
        large == 2 * final and large % (4 * start) == 0
        for start, large, final in zip(before[0], via, size, strict=True)
    ):
        return Resized(InMemory(tensor), size)
    field: Field = InMemory(tensor)
    for step in sizes:
        field = resized(field, step)
    return field


@dataclass(frozen=True)
class Combined(Field):
    """`formula` of several fields of one size, pixel by pixel (or row by row)."""

    formula: Callable[..., Tensor]
    fields: tuple[Field, ...]

    @property
    def size(self) -> Size:  # type: ignore[override]
        return self.fields[0].size

    def rows(self, top: int, bottom: int) -> Tensor:
        return self.formula(*(field.rows(top, bottom) for field in self.fields))

    def whole(self) -> Tensor:
        return self.formula(*(field.whole() for field in self.fields))


def _mixed(own: Tensor, other: Tensor, trust: Tensor) -> Tensor:
    return torch.lerp(other, own, trust)  # trust * own + (1 - trust) * other


def _added(weighted: Tensor, other: Tensor, trust: Tensor) -> Tensor:
    return torch.addcmul(weighted, 1 - trust, other)


def _mean(*values: Tensor) -> Tensor:
    return _sum(values) / len(values)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    first, *others = terms
    for term in others:
        first = first + term
    return first


def _weighted(*values: Tensor) -> Tensor:
    """Sum of weight * value, given first all weights, then all values."""
    half = len(values) // 2
    return _sum(weight * value for weight, value in zip(values[:half], values[half:], strict=True))


def _weighted_by_pairs(*values: Tensor) -> Tensor:
    """The same, given the weights of n - 1 neighbouring pairs (two channels each), then n values.

    The first pair's weights stand; each later pair is scaled so that it shares out its lower scale's weight.
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


def _mirrored(value: Tensor) -> Tensor:
    return value.flip(-1)


def mean_with_mirrored(field: Field, mirrored: Field) -> Field:
    """The mean of a field and of one that was computed on the mirrored image."""
    return Combined(_mean, (field, Combined(_mirrored, (mirrored,))))


def rescaled_size(size: Size, scale: float) -> Size:
    """The size of an image's copy at `scale`: rounded down, at least one pixel each way."""
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


Predict = Callable[[Size], Prediction]
Pick = Callable[[Part], Tensor]


def of_logits(part: Part) -> Tensor:
    """What `mix` combines by default."""
    return part.logits


class Combination(nn.Module):
    """A way to combine scales. `training_scales`: what a training step looks at."""

    training_scales: tuple[float, ...] = (0.5, 1.0)

    def require(self, scales: Sequence[float]) -> None:
        """Raise ValueError for scales that this combination cannot weigh."""

    def weigh(self, predict: Predict, size: Size, scales: Sequence[float]) -> list[Part]:
        """Run the network at every scale: `predict` gets the size that the image is to be resized to.

        `scales` contains 1 and passes `require`.
        """
        raise NotImplementedError

    def mix(self, parts: Sequence[Part], size: Size, pick: Pick = of_logits) -> Field:
        """One (B, K, H, W) field from the parts' logits, or from what `pick` takes of them instead."""
        raise NotImplementedError

    def shares(self, parts: Sequence[Part], size: Size) -> Field:
        """What the logits of each part are multiplied with in the mix: (B, parts, H, W), in their order.

        At every pixel they sum to 1, but for the explicit combinations. Found by mixing marks in the logits' place: 1
        in a part's own channel, 0 in the others.
        """
        scales = torch.tensor([part.scale for part in parts], dtype=torch.float64)

        def mark(part: Part) -> Tensor:
            own = (scales == part.scale).to(part.logits).view(1, -1, 1, 1)
            return own.expand(part.logits.shape[0], -1, *part.logits.shape[-2:])

        return self.mix(parts, size, mark)


class Average(Combination):
    """The mean of all scales' logits. Sizes are rounded to nearest, other than in the rest."""

    training_scales = (1.0,)

    def weigh(self, predict: Predict, size: Size, scales: Sequence[float]) -> list[Part]:
        parts = []
        for scale in sorted(scales, key=lambda s: (s != 1, s)):
            own = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
            prediction = predict(own)
            parts.append(Part(scale, own, prediction.logits, aux=prediction.aux))
        return parts

    def mix(self, parts: Sequence[Part], size: Size, pick: Pick = of_logits) -> Field:
        return Combined(_mean, tuple(at_size(pick(part), part.size, size) for part in parts))


class _Chained(Combination):
    """Scales are combined in a chain from the highest down, each by its attention against the result so far."""

    def mix(self, parts: Sequence[Part], size: Size, pick: Pick = of_logits) -> Field:
        """At or above 1 the result so far is resized to the next scale and mixed there; below 1, the scale's weighted
        logits are resized to the result so far (arXiv 2005.10821, section 3.2)."""
        *others, top = sorted(parts, key=lambda part: part.scale)
        combined = at_size(pick(top), top.size, others[-1].size if top.scale > 1 else top.size)
        for part in reversed(others):
            assert part.attention is not None
            trust, own = at_size(part.attention, part.size), at_size(pick(part), part.size)
            if part.scale >= 1:
                combined = Combined(_mixed, (own, resized(combined, part.size), trust))
            else:
                weighted = trust.whole() * own.whole()  # made at its own size: a product of two resized maps
                fields = at_size(weighted, size), combined, at_size(part.attention, part.size, size)
                combined = Combined(_added, fields)
        return combined


class Hierarchical(_Chained):
    """Attention between each scale and the next higher one, from that scale's features alone."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, 1, 1, bias=False)

    def attention(self, features: Tensor) -> Tensor:
        """Features (B, M, h, w) -> attention in (0, 1), (B, 1, h, w). Section 3.1 of the paper."""
        x = F.relu_(self.bn0(self.conv0(features)))
        x = F.relu_(self.bn1(self.conv1(x)))
        return self.conv2(x).float().sigmoid()  # type: ignore[no-any-return]

    def weigh(self, predict: Predict, size: Size, scales: Sequence[float]) -> list[Part]:
        highest = max(scales)  # nothing is above it: its attention has no partner and is not computed
        parts = []
        for scale in sorted(scales):
            own = rescaled_size(size, scale)
            now = predict(own)
            attention = None if scale == highest else self.attention(now.features)
            parts.append(Part(scale, own, now.logits, attention, now.aux))
        return parts


class HierarchicalPairs(_Chained):
    """Attention between each scale and the next higher one, from the features of both."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        _add_layers(self, [*head_layers(2 * inputs, channels, 1), nn.Sigmoid()])

    def weigh(self, predict: Predict, size: Size, scales: Sequence[float]) -> list[Part]:
        parts: list[Part] = []
        above: Tensor | None = None
        for scale in sorted(scales, reverse=True):
            own = rescaled_size(size, scale)
            now = predict(own)
            attention = None
            if above is not None:
                higher = resize(above, now.features.shape[-2:])
                attention = _run_layers(self, torch.cat([now.features, higher], dim=1))
            parts.append(Part(scale, own, now.logits, attention, now.aux))
            above = now.features
        return parts


_EXPLICIT_SCALES: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (0.5, 1.0),
    3: (0.5, 1.0, 2.0),
    4: (0.25, 0.5, 1.0, 2.0),
    5: (0.25, 0.5, 1.0, 1.5, 2.0),
}


class Explicit(Combination):
    """One head reads the features of all scales and gives each its weight, at every pixel.

    The scales' number is fixed when it is built. `batch_norm` chooses the deeper head with batch norm; the plain one
    is the published network's, whose last 1x1 convolution is padded by a pixel.
    """

    def __init__(self, inputs: int, scales: int, batch_norm: bool) -> None:
        super().__init__()
        self.scales = scales
        if scales not in _EXPLICIT_SCALES:
            raise ValueError(f"{scales} scales: an explicit combination weighs 1 to {len(_EXPLICIT_SCALES)} of them")
        self.training_scales = _EXPLICIT_SCALES[scales]
        first = nn.Conv2d(scales * inputs, 512, 3, padding=1, bias=False)
        plain = [first, nn.ReLU(inplace=True), nn.Conv2d(512, scales, 1, padding=1, bias=False)]
        _add_layers(self, head_layers(scales * inputs, 256, scales) if batch_norm else plain)

    def require(self, scales: Sequence[float]) -> None:
        if len(scales) != self.scales:
            given = ",".join(f"{s:g}" for s in scales)
            raise ValueError(f"scales {given}: this network weighs exactly {self.scales} scales at once")

    def weigh(self, predict: Predict, size: Size, scales: Sequence[float]) -> list[Part]:
        parts, features = _predict_all(predict, size, scales)
        ordered = [features[1.0], *(features[scale] for scale in sorted(scales) if scale != 1)]
        weights = _run_layers(self, torch.cat(ordered, dim=1))
        # The head's channels are in ascending order of scale; the features it reads are not.
        return [replace(part, attention=weights[:, i : i + 1]) for i, part in enumerate(parts)]

    def mix(self, parts: Sequence[Part], size: Size, pick: Pick = of_logits) -> Field:
        """The sum of the scales' logits times their weights, which need not sum to 1."""
        weights = [at_size(part.attention, size) for part in parts if part.attention is not None]
        return Combined(_weighted, (*weights, *(at_size(pick(part), part.size, size) for part in parts)))


class ExplicitPairs(Combination):
    """A head weighs each scale and the next higher one from the features of both; any number of scales is chained."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        _add_layers(self, [*head_layers(2 * inputs, channels, 2), nn.Sigmoid()])

    def weigh(self, predict: Predict, size: Size, scales: Sequence[float]) -> list[Part]:
        parts, features = _predict_all(predict, size, scales)
        pairs = [torch.cat([features[a.scale], features[b.scale]], dim=1) for a, b in pairwise(parts)]
        return [*(replace(p, attention=_run_layers(self, x)) for p, x in zip(parts, pairs, strict=False)), parts[-1]]

    def mix(self, parts: Sequence[Part], size: Size, pick: Pick = of_logits) -> Field:
        logits = [at_size(pick(part), part.size, size) for part in parts]
        pairs = [at_size(part.attention, size) for part in parts if part.attention is not None]
        return Combined(_weighted_by_pairs, (*pairs, *logits)) if pairs else logits[0]


def _predict_all(predict: Predict, size: Size, scales: Sequence[float]) -> tuple[list[Part], dict[float, Tensor]]:
    """Every scale's part, ascending, and its features resized to those of scale 1."""
    parts: dict[float, Part] = {}
    features: dict[float, Tensor] = {}
    for scale in sorted(scales, key=lambda s: (s != 1, s)):
        own = rescaled_size(size, scale)
        now = predict(own)
        parts[scale] = Part(scale, own, now.logits, aux=now.aux)
        features[scale] = resize(now.features, features[1.0].shape[-2:]) if scale != 1 else now.features
    return [parts[scale] for scale in sorted(scales)], features


def head_layers(inputs: int, channels: int, outputs: int) -> list[nn.Module]:
    """3x3 convolution, batch norm, ReLU, twice, then 1x1: what most heads are made of."""
    layers: list[nn.Module] = []
    for width in (inputs, channels):
        layers += [
            nn.Conv2d(width, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        ]
    return [*layers, nn.Conv2d(channels, outputs, 1, bias=False)]


def _add_layers(module: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Register layers under their numbers, as the published state dicts have them."""
    for index, layer in enumerate(layers):
        module.add_module(str(index), layer)


def _run_layers(module: nn.Module, x: Tensor) -> Tensor:
    for layer in module.children():
        x = layer(x)
    return x.float()
