"""Ways to combine one network's predictions of an image at several scales.

    Average             the mean of the logits; nothing is learnt
    Hierarchical        each scale is weighed against the next higher one by attention: training sees one pair of
                        scales, inference may chain any number (Tao et al., arXiv 2005.10821, section 3)
    HierarchicalPairs   the same, but a scale's attention also reads the features of the next higher scale

Those that weigh all scales at once are in `explicit.py`. They are interchangeable: each turns the network's outputs at
single scales into `Part`s (`weigh`) and the parts into one `Field` at the size of the image (`mix`).

Legend: B batch, K classes, M feature channels; (h, w) a prediction's own resolution, (H, W) the image's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autolabel.teacher.networks.fields import Combined, Field, Size, at_size, mean, resized
from autolabel.teacher.networks.hrnet import is_open, resize


@dataclass(frozen=True)
class ScaleOutput:
    """The network's output for images at one scale: logits and aux (B, K, h, w), features (B, M, h, w).

    context: of a network that pools features over the whole image, what it has pooled, (B, channels, n, 1).
    """

    logits: Tensor
    features: Tensor
    aux: Tensor | None = None
    context: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """The output of one scale, the size of its input, and its attention at the output's resolution.

    attention: (B, 1, h, w) weight of this scale; two channels, (lower, higher), in ExplicitPairs; None if this scale
    needs no weight.
    """

    scale: float
    size: Size
    logits: Tensor
    attention: Tensor | None = None
    aux: Tensor | None = None


@dataclass(frozen=True)
class TrainingOutput:
    """The logits that the losses judge, all (B, K, H, W).

    joint: combined over the scales. aux: the OCR head's auxiliary logits, combined likewise, None in networks without
    it. scales: the logits of each scale alone, ascending; empty in a network that trains at one scale.
    """

    joint: Tensor
    aux: Tensor | None
    scales: tuple[Tensor, ...]


def _mixed(own: Tensor, other: Tensor, trust: Tensor) -> Tensor:
    return torch.lerp(other, own, trust)  # trust * own + (1 - trust) * other


def _added(weighted: Tensor, other: Tensor, trust: Tensor) -> Tensor:
    return torch.addcmul(weighted, 1 - trust, other)


def rescaled_size(size: Size, scale: float, *, nearest: bool = False) -> Size:
    """Return the size of an image at `scale`: rounded down, or to the nearest and then even; at least one pixel.

    A program under export leaves lengths open: there they are whole numbers, rounded as Python rounds, for scales whose
    denominator is a small power of 2.
    """
    height, width = size
    if is_open(size):
        return _open_length(height, scale, nearest=nearest), _open_length(width, scale, nearest=nearest)
    rounded = round if nearest else int
    return max(1, rounded(height * scale)), max(1, rounded(width * scale))


def _open_length(length: int, scale: float, *, nearest: bool) -> int:
    part, whole = scale.as_integer_ratio()
    if not nearest or whole == 1:
        return length * part // whole
    # Every second half is rounded up: the result counts those that go down, and those that go up.
    down, up = length * part + 2 * whole - whole // 2 - 1, length * part + whole - whole // 2
    return down // (2 * whole) + up // (2 * whole)


Predict = Callable[[Size], ScaleOutput]
Pick = Callable[[Part], Tensor]


def of_logits(part: Part) -> Tensor:
    """Pick a part's logits: the default of `mix`."""
    return part.logits


class Combination(nn.Module):
    """A way to combine scales. `training_scales` are the scales of a training step."""

    training_scales: tuple[float, ...] = (0.5, 1.0)

    def require(self, scales: Sequence[float]) -> None:
        """Raise ValueError for scales that this combination cannot weigh."""

    def require_focus(self, scales: Sequence[float]) -> None:
        """Raise ValueError unless the scales can be weighed before the network has seen the highest, which is above 1.

        The weights of most combinations are computed from the features of all scales, or of two neighbours.
        """
        raise ValueError(
            "focus: this network weighs its highest scale by what it sees there, so it has to see all of it: combine by"
            " average, or leave focus out"
        )

    def size_at(self, size: Size, scale: float) -> Size:
        """Return the size of an image at a scale."""
        return rescaled_size(size, scale)

    def weigh_below(self, predict: Predict, size: Size, *, scales: Sequence[float]) -> list[Part]:
        """Do as `weigh`, for the scales below a highest one that follows. The scales pass `require_focus` with it."""
        raise NotImplementedError

    def weigh(self, predict: Predict, size: Size, *, scales: Sequence[float]) -> list[Part]:
        """Run the network at every scale. `predict` takes the size to which it resizes the image of `size`.

        `scales` contains 1 and passes `require`.
        """
        raise NotImplementedError

    def mix(self, parts: Sequence[Part], size: Size, *, pick: Pick = of_logits) -> Field:
        """Combine the parts' logits, or the tensors that `pick` returns for them, into one field (B, K, H, W)."""
        raise NotImplementedError

    def shares(self, parts: Sequence[Part], size: Size) -> Field:
        """Return the factor of each part's logits in the mix: (B, parts, H, W), in the order of the parts.

        The factors of a pixel sum to 1, except in explicit combinations. They are computed by mixing marks instead of
        logits: 1 in a part's own channel, 0 in the others.
        """
        places = {part.scale: place for place, part in enumerate(parts)}

        def mark(part: Part) -> Tensor:
            place = torch.arange(len(parts), device=part.logits.device)
            own = (place == places[part.scale]).to(part.logits.dtype).view(1, -1, 1, 1)
            return own.expand(part.logits.shape[0], -1, *part.logits.shape[-2:])

        return self.mix(parts, size, pick=mark)


class Average(Combination):
    """The mean of all scales' logits. Sizes are rounded to nearest here; the other combinations round down."""

    training_scales = (1.0,)

    def require_focus(self, scales: Sequence[float]) -> None:
        _require_higher(scales)

    def size_at(self, size: Size, scale: float) -> Size:
        return rescaled_size(size, scale, nearest=True)

    def weigh_below(self, predict: Predict, size: Size, *, scales: Sequence[float]) -> list[Part]:
        return self.weigh(predict, size, scales=scales)

    def weigh(self, predict: Predict, size: Size, *, scales: Sequence[float]) -> list[Part]:
        parts = []
        for scale in sorted(scales, key=lambda s: (s != 1, s)):
            own = self.size_at(size, scale)
            now = predict(own)
            parts.append(Part(scale, own, now.logits, aux=now.aux))
            del now  # its features: the next scale needs the memory
        return parts

    def mix(self, parts: Sequence[Part], size: Size, *, pick: Pick = of_logits) -> Field:
        return Combined(mean, tuple(at_size(pick(part), part.size, size) for part in parts))


class _Chained(Combination):
    """A chain from the highest scale down: each scale is mixed with the result so far, weighed by its attention."""

    def mix(self, parts: Sequence[Part], size: Size, *, pick: Pick = of_logits) -> Field:
        """Chain the parts (arXiv 2005.10821, section 3.2).

        At scales of 1 and above, the result so far is resized to the next scale and mixed there; below 1, the scale's
        weighted logits are resized to the result so far.
        """
        *others, top = sorted(parts, key=lambda part: part.scale)
        combined = at_size(pick(top), top.size, others[-1].size if top.scale > 1 else top.size)
        for part in reversed(others):
            assert part.attention is not None
            trust, own = at_size(part.attention, part.size), at_size(pick(part), part.size)
            if part.scale >= 1:
                combined = Combined(_mixed, (own, resized(combined, part.size), trust))
            else:
                weighted = trust.whole() * own.whole()  # the product is made at the part's size, then resized
                fields = at_size(weighted, size), combined, at_size(part.attention, part.size, size)
                combined = Combined(_added, fields)
        return combined


class Hierarchical(_Chained):
    """Attention between each scale and the next higher one, computed from the features of the lower scale alone.

    In training the head also sees the highest scale, last, so that its batch norms have statistics of both scales, as
    in the published training.
    """

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, 1, 1, bias=False)

    def attention(self, features: Tensor) -> Tensor:
        """Return the attention of features (B, M, h, w): (B, 1, h, w) in (0, 1), section 3.1 of the paper."""
        x = F.relu_(self.bn0(self.conv0(features)))
        x = F.relu_(self.bn1(self.conv1(x)))
        return self.conv2(x).float().sigmoid()  # type: ignore[no-any-return]

    def require_focus(self, scales: Sequence[float]) -> None:
        _require_higher(scales)

    def weigh_below(self, predict: Predict, size: Size, *, scales: Sequence[float]) -> list[Part]:
        return self._weighed(predict, size, scales=scales, highest=None)

    def weigh(self, predict: Predict, size: Size, *, scales: Sequence[float]) -> list[Part]:
        # The attention of the highest scale is not used: no scale above would share with it.
        return self._weighed(predict, size, scales=scales, highest=max(scales))

    def _weighed(self, predict: Predict, size: Size, *, scales: Sequence[float], highest: float | None) -> list[Part]:
        parts = []
        for scale in sorted(scales):
            own = rescaled_size(size, scale)
            now = predict(own)
            attention = None if scale == highest else self.attention(now.features)
            if attention is None and self.training:
                with torch.no_grad():  # only to see it: labelling applies the running statistics to both scales
                    self.attention(now.features)
            parts.append(Part(scale, own, now.logits, attention, now.aux))
            del now  # its features: the next scale needs the memory
        return parts


class HierarchicalPairs(_Chained):
    """Attention between each scale and the next higher one, computed from the features of both."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        add_layers(self, [*head_layers(2 * inputs, channels, outputs=1), nn.Sigmoid()])

    def weigh(self, predict: Predict, size: Size, *, scales: Sequence[float]) -> list[Part]:
        parts: list[Part] = []
        below: Tensor | None = None
        for scale in sorted(scales):  # the network sees the lower scale first, as in the published training
            own = rescaled_size(size, scale)
            now = predict(own)
            if below is not None:
                higher = resize(now.features, below.shape[-2:])
                parts[-1] = replace(parts[-1], attention=run_layers(self, torch.cat([below, higher], dim=1)))
            parts.append(Part(scale, own, now.logits, aux=now.aux))
            below = now.features
        return parts


def _require_higher(scales: Sequence[float]) -> None:
    if max(scales) <= 1 or len(scales) < 2:
        given = ",".join(f"{s:g}" for s in scales)
        raise ValueError(f"focus with scales {given}: expected a scale above 1 besides, such as 0.5,1,2")


def head_layers(inputs: int, channels: int, *, outputs: int) -> list[nn.Module]:
    """Return the layers of most heads: twice a 3x3 convolution, batch norm and ReLU, then a 1x1 convolution."""
    layers: list[nn.Module] = []
    for width in (inputs, channels):
        layers += [
            nn.Conv2d(width, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        ]
    return [*layers, nn.Conv2d(channels, outputs, 1, bias=False)]


def add_layers(module: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Register layers under their numbers, which are their names in published state dicts."""
    for index, layer in enumerate(layers):
        module.add_module(str(index), layer)


def run_layers(module: nn.Module, x: Tensor) -> Tensor:
    """Apply the layers of `add_layers` in turn; the result is float32."""
    for layer in module.children():
        x = layer(x.float() if isinstance(layer, nn.Sigmoid) else x)  # a weight near 1 has few digits in 16 bits
    return x.float()
