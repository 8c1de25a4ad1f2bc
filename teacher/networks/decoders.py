"""Whole networks: a trunk, a decoder, and a way to combine scales.

A network is built around one of the trunks of `hrnet.py`, `efficientnet_lite.py` and `trunks.py`; the classes below
differ in the decoder. The combination (see `combine.py`) is the attribute `scale_attn`; another one can be passed to
the methods instead.

Module names follow the customary ones, so that published state dicts load without renaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autolabel.teacher.networks.combine import (
    Combination,
    Part,
    ScaleOutput,
    TrainingOutput,
    head_layers,
)
from autolabel.teacher.networks.efficientnet_lite import EfficientNetLite0
from autolabel.teacher.networks.fields import Field, Size, at_size
from autolabel.teacher.networks.hrnet import HRNet, resize
from autolabel.teacher.networks.ocr import OCR
from autolabel.teacher.networks.timm import TimmFlat, TimmPyramid
from autolabel.teacher.networks.trunks import EfficientNetB4, Features, ResNet50, WideResNet38, Xception71

FlatTrunk = HRNet | EfficientNetLite0 | TimmFlat
PyramidTrunk = ResNet50 | WideResNet38 | Xception71 | EfficientNetB4 | TimmPyramid
_COARSEST = 4  # stride at which a map is cut to the size of an image


class SegmentationNet(nn.Module):
    """Normalised RGB (B, 3, H, W) float -> class logits, at one scale (`predict`) or combined (`field`).

    classes: number of classes. features: number of channels that the attention reads. multiple: sides of the images
    that `predict` takes are multiples of it; others are padded here. borrowed: its parts are those of another library.
    """

    classes: int
    features: int
    scale_attn: Combination
    multiple: int = 1
    borrowed: bool = False

    def predict(self, images: Tensor, *, context: Tensor | None = None) -> ScaleOutput:
        """Predict at one scale; the output has the decoder's own resolution (stride 2 to 8).

        context: what the network would pool over the image (see `ScaleOutput`), from elsewhere; for a part of an image.
        """
        raise NotImplementedError

    def predict_at(self, images: Tensor, size: Size, *, context: Tensor | None = None) -> ScaleOutput:
        """Predict images resized to `size`; logits and aux are float32, for scales are always combined in float32."""
        now = self._predict_padded(resize(images, size), context)
        aux = None if now.aux is None else now.aux.float()
        return replace(now, logits=now.logits.float(), aux=aux)

    def parts(self, images: Tensor, scales: Sequence[float], *, combination: Combination | None = None) -> list[Part]:
        """Predict at every scale and weigh the scales. Raises ValueError for scales that cannot be weighed."""
        combination = combination or self.scale_attn
        combination.require(scales)
        return combination.weigh(partial(self.predict_at, images), _size(images), scales=scales)

    def _predict_padded(self, images: Tensor, context: Tensor | None) -> ScaleOutput:
        """Predict images of any size: the last row and column are repeated up to a multiple, and cut off again."""
        height, width = _size(images)
        below, right = -height % self.multiple, -width % self.multiple
        if not below and not right:
            return self.predict(images, context=context)
        now = self.predict(F.pad(images, (0, right, 0, below), mode="replicate"), context=context)

        def cut(x: Tensor) -> Tensor:
            stride = (height + below) // x.shape[-2]
            if stride > _COARSEST:  # else a pixel of the map would lie half inside
                stride = _COARSEST
                x = resize(x, ((height + below) // stride, (width + right) // stride))
            return x[..., : -(-height // stride), : -(-width // stride)]

        aux = None if now.aux is None else cut(now.aux)
        return ScaleOutput(cut(now.logits), cut(now.features), aux, now.context)

    def field(self, images: Tensor, scales: Sequence[float], *, combination: Combination | None = None) -> Field:
        """Return the combined logits as a field (B, K, H, W), to be read in bands or whole."""
        combination = combination or self.scale_attn
        return combination.mix(self.parts(images, scales, combination=combination), _size(images))

    def logits(self, images: Tensor, scales: Sequence[float], *, combination: Combination | None = None) -> Tensor:
        """Return the combined logits (B, K, H, W) in float32."""
        return self.field(images, scales, combination=combination).whole()

    def forward(self, images: Tensor) -> TrainingOutput:
        """Do the forward pass of a training step, at the training scales of the combination."""
        size, scales = _size(images), self.scale_attn.training_scales
        parts = [_enlarged(part) for part in self.parts(images, scales)]
        with_aux = all(part.aux is not None for part in parts)
        own = [at_size(part.logits, part.size, size).whole() for part in sorted(parts, key=lambda p: p.scale)]
        return TrainingOutput(
            joint=self.scale_attn.mix(parts, size).whole(),
            aux=self.scale_attn.mix(parts, size, pick=_aux).whole() if with_aux else None,
            scales=tuple(own) if len(own) > 1 else (),
        )


def _enlarged(part: Part) -> Part:
    """The part with its logits at the size of its input, where two readers begin with that; the numbers are the same.

    A part above scale 1 stays as it is, because its logits may skip the detour over that size (`at_size`).
    """
    return replace(part, logits=at_size(part.logits, part.size).whole()) if part.scale <= 1 else part


def _aux(part: Part) -> Tensor:
    assert part.aux is not None
    return part.aux


def _size(images: Tensor) -> Size:
    return images.shape[-2], images.shape[-1]


class OCRNet(SegmentationNet):
    """A trunk of one map and object-contextual representations; with HRNet-W48 the network of arXiv 2005.10821."""

    def __init__(self, trunk: FlatTrunk, classes: int, *, mid: int, key: int) -> None:
        super().__init__()
        self.classes, self.features = classes, mid
        self.backbone = trunk
        self.ocr = OCR(trunk.channels, classes, mid=mid, key=key)

    def predict(self, images: Tensor, *, context: Tensor | None = None) -> ScaleOutput:
        logits, aux, features, regions = self.ocr(self.backbone(images), context)
        return ScaleOutput(logits, features, aux, regions)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling at stride 8 (Chen et al., arXiv 1802.02611): (B, inputs, h, w) -> 1280 channels.

    The image's mean feature, a 1x1 convolution, and 3x3 convolutions with dilations 12, 24 and 36.
    """

    outputs = 5 * 256

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.features = nn.ModuleList(self._branch(inputs, rate) for rate in (0, 12, 24, 36))
        self.img_conv = self._branch(inputs, 0)

    @staticmethod
    def _branch(inputs: int, rate: int) -> nn.Sequential:
        """Return a 3x3 convolution dilated by `rate` (1x1 for rate 0), batch norm and ReLU."""
        conv = nn.Conv2d(inputs, 256, 3 if rate else 1, dilation=max(1, rate), padding=rate, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(256), nn.ReLU(inplace=True))

    def forward(self, x: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the maps of x, and its mean feature (B, inputs, 1, 1), or the given one."""
        if mean is None:
            mean = x.mean(dim=(2, 3), keepdim=True)
        everywhere = self.img_conv(mean).expand(-1, -1, *_size(x))
        return torch.cat([everywhere, *(branch(x) for branch in self.features)], dim=1), mean


class HRNetPlain(SegmentationNet):
    """HRNet, or another trunk of one map, and a convolutional head."""

    def __init__(self, trunk: FlatTrunk, classes: int) -> None:
        super().__init__()
        self.classes, self.features = classes, trunk.channels
        self.backbone = trunk
        self.cls_head = nn.Sequential(*head_layers(trunk.channels, 256, outputs=classes))

    def predict(self, images: Tensor, *, context: Tensor | None = None) -> ScaleOutput:
        features = self.backbone(images)
        return ScaleOutput(self.cls_head(features), features)


class HRNetASPP(SegmentationNet):
    """HRNet, or another trunk of one map, ASPP and a convolutional head."""

    def __init__(self, trunk: FlatTrunk, classes: int) -> None:
        super().__init__()
        self.classes, self.features = classes, 256
        self.backbone = trunk
        self.aspp = ASPP(trunk.channels)
        self.bot_aspp = nn.Conv2d(ASPP.outputs, 256, 1, bias=False)
        self.final = nn.Sequential(*head_layers(256, 256, outputs=classes))

    def predict(self, images: Tensor, *, context: Tensor | None = None) -> ScaleOutput:
        pyramid, mean = self.aspp(self.backbone(images), context)
        features = self.bot_aspp(pyramid)
        return ScaleOutput(self.final(features), features, context=mean)


class DeepLabV3(SegmentationNet):
    """ASPP on the deepest features, and a convolutional head (Chen et al., arXiv 1706.05587)."""

    def __init__(self, trunk: PyramidTrunk, classes: int) -> None:
        super().__init__()
        self.classes, self.features = classes, ASPP.outputs
        self.backbone = trunk
        self.aspp = ASPP(trunk.channels[-1])
        self.final = nn.Sequential(*head_layers(ASPP.outputs, 256, outputs=classes))

    def predict(self, images: Tensor, *, context: Tensor | None = None) -> ScaleOutput:
        features, mean = self.aspp(self.backbone(images).deep, context)
        return ScaleOutput(self.final(features), features, context=mean)


class DeepLabV3Plus(SegmentationNet):
    """ASPP joined with fine features before the head (Chen et al., arXiv 1802.02611)."""

    def __init__(self, trunk: PyramidTrunk, classes: int) -> None:
        super().__init__()
        self.classes, self.features = classes, 48 + 256
        self.backbone = trunk
        self.aspp = ASPP(trunk.channels[-1])
        self.bot_fine = nn.Conv2d(trunk.channels[0], 48, 1, bias=False)
        self.bot_aspp = nn.Conv2d(ASPP.outputs, 256, 1, bias=False)
        self.final = nn.Sequential(*head_layers(48 + 256, 256, outputs=classes))

    def predict(self, images: Tensor, *, context: Tensor | None = None) -> ScaleOutput:
        trunk: Features = self.backbone(images)
        pyramid, mean = self.aspp(trunk.deep, context)
        fine = self.bot_fine(trunk.fine)
        joined = torch.cat([fine, resize(self.bot_aspp(pyramid), _size(fine))], dim=1)
        return ScaleOutput(self.final(joined), joined, context=mean)


class ConvBnRelu(nn.Module):
    """5x5 convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 5, padding=2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.bn(self.conv(x)))


class DeeperLab(SegmentationNet):
    """A decoder in three steps, strides 8, 4 and 2, each joined with the trunk's features of that stride.

    After DeeperLab (Yang et al., arXiv 1902.05093); needs a trunk with features at strides 2 and 4.
    """

    def __init__(self, trunk: PyramidTrunk, classes: int) -> None:
        super().__init__()
        self.classes, self.features = classes, 256
        self.backbone = trunk
        self.aspp = ASPP(trunk.channels[2])
        self.convs2 = nn.Conv2d(trunk.channels[0], 32, 1, bias=False)
        self.convs4 = nn.Conv2d(trunk.channels[1], 64, 1, bias=False)
        self.conv_up1 = nn.Conv2d(ASPP.outputs, 256, 1, bias=False)
        self.conv_up2 = ConvBnRelu(256 + 64, 256)
        self.conv_up3 = ConvBnRelu(256 + 32, 256)
        self.conv_up5 = nn.Conv2d(256, classes, 1, bias=False)

    def predict(self, images: Tensor, *, context: Tensor | None = None) -> ScaleOutput:
        trunk: Features = self.backbone(images)
        pyramid, mean = self.aspp(trunk.deep, context)
        x = self.conv_up1(pyramid)
        x = self.conv_up2(torch.cat([resize(x, _size(trunk.middle)), self.convs4(trunk.middle)], dim=1))
        x = self.conv_up3(torch.cat([resize(x, _size(trunk.fine)), self.convs2(trunk.fine)], dim=1))
        return ScaleOutput(self.conv_up5(x), x, context=mean)
