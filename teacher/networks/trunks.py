"""Trunks of DeepLab-type networks, all with their last stages dilated so that the deepest features stay at stride 8.

ResNet-50 (He et al., arXiv 1512.03385), Wide-ResNet-38 (Wu et al., arXiv 1611.10080), the modified aligned Xception-71
(Chen et al., arXiv 1802.02611, section 3.2) and EfficientNet-B4 (Tan and Le, arXiv 1905.11946). Each turns a
normalised image (B, 3, H, W) into `Features`, and says in `channels` how wide they are.

Module names follow the customary ones, so that published state dicts load without renaming.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from autolabel.teacher.networks.hrnet import Bottleneck, conv3x3


class Features(NamedTuple):
    """The input of a decoder, each (B, channels, h, w): `fine` and `middle` keep detail, `deep` has stride 8.

    Strides of fine and middle: 4 and 8 in ResNet-50, 2 and 4 in the others.
    """

    fine: Tensor
    middle: Tensor
    deep: Tensor


class ResNet50(nn.Module):
    """ResNet-50; stages 3 and 4 trade their stride for dilations 2 and 4, in every block."""

    channels = (256, 512, 2048)

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.layer0 = nn.Sequential(stem, nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1))
        self.layer1 = self._stage(64, 64, blocks=3)
        self.layer2 = self._stage(256, 128, blocks=4, stride=2)
        self.layer3 = self._stage(512, 256, blocks=6, dilation=2)
        self.layer4 = self._stage(1024, 512, blocks=3, dilation=4)

    @staticmethod
    def _stage(inputs: int, channels: int, *, blocks: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
        outputs = channels * Bottleneck.expansion
        later = (Bottleneck(outputs, channels, stride=1, dilation=dilation) for _ in range(blocks - 1))
        return nn.Sequential(Bottleneck(inputs, channels, stride=stride, dilation=dilation), *later)

    def forward(self, x: Tensor) -> Features:
        fine = self.layer1(self.layer0(x))
        middle = self.layer2(fine)
        return Features(fine, middle, self.layer4(self.layer3(middle)))


def _bn_relu(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU come before each convolution; the shortcut carries the raw sum.

    `channels`: two 3x3 convolutions, or 1x1, 3x3, 1x1 where three are given (with dropout before the last).
    """

    def __init__(self, inputs: int, channels: Sequence[int], *, stride: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = _bn_relu(inputs)
        layers: list[tuple[str, nn.Module]]
        if len(channels) == 2:
            layers = [
                ("conv1", conv3x3(inputs, channels[0], stride=stride, dilation=dilation)),
                ("bn2", _bn_relu(channels[0])),
                ("conv2", conv3x3(channels[0], channels[1], dilation=dilation)),
            ]
        else:
            layers = [
                ("conv1", nn.Conv2d(inputs, channels[0], 1, stride=stride, bias=False)),
                ("bn2", _bn_relu(channels[0])),
                ("conv2", conv3x3(channels[0], channels[1], dilation=dilation)),
                ("bn3", _bn_relu(channels[1])),
                ("dropout", nn.Dropout2d(dropout)),
                ("conv3", nn.Conv2d(channels[1], channels[2], 1, bias=False)),
            ]
        self.convs = nn.Sequential(OrderedDict(layers))
        self.proj_conv = (
            nn.Conv2d(inputs, channels[-1], 1, stride=stride, bias=False)
            if stride != 1 or inputs != channels[-1]
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = self.bn1(x)
        shortcut = x if self.proj_conv is None else self.proj_conv(activated)
        return self.convs(activated) + shortcut  # type: ignore[no-any-return]


class WideResNet38(nn.Module):
    """Wide-ResNet-38 without its last batch norm and ReLU; strides 2, 2, 2 by two poolings and one convolution."""

    channels = (128, 256, 4096)
    # (blocks, channels, stride, dilation, dropout) of modules 2 to 7
    _MODULES = (
        (3, (128, 128), 1, 1, 0.0),
        (3, (256, 256), 1, 1, 0.0),
        (6, (512, 512), 2, 1, 0.0),
        (3, (512, 1024), 1, 2, 0.0),
        (1, (512, 1024, 2048), 1, 4, 0.3),
        (1, (1024, 2048, 4096), 1, 4, 0.5),
    )

    def __init__(self) -> None:
        super().__init__()
        self.mod1 = nn.Sequential(OrderedDict(conv1=conv3x3(3, 64)))
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        inputs = 64
        for number, (blocks, channels, stride, dilation, dropout) in enumerate(self._MODULES, start=2):
            module = OrderedDict[str, nn.Module]()
            for block in range(1, blocks + 1):
                first_stride = stride if block == 1 else 1
                module[f"block{block}"] = PreActivationBlock(
                    inputs, channels, stride=first_stride, dilation=dilation, dropout=dropout
                )
                inputs = channels[-1]
            self.add_module(f"mod{number}", nn.Sequential(module))

    def forward(self, x: Tensor) -> Features:
        *_, mod2, mod3, mod4, mod5, mod6, mod7 = self.children()
        fine = mod2(self.pool(self.mod1(x)))
        middle = mod3(self.pool(fine))
        return Features(fine, middle, mod7(mod6(mod5(mod4(middle)))))


class SeparableConv(nn.Module):
    """A 3x3 convolution of each channel, batch norm, then a 1x1 convolution across channels."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            inputs, inputs, 3, stride=stride, padding=dilation, dilation=dilation, groups=inputs, bias=False
        )
        self.bn = nn.BatchNorm2d(inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.bn(self.conv1(x)))  # type: ignore[no-any-return]


class XceptionBlock(nn.Module):
    """Three (or two) separable convolutions around a shortcut, each after a ReLU, each followed by batch norm.

    `steps`: (outputs, stride, dilation) of each. With `relu_first` the input is rectified in place, as in the published
    network, so that the shortcut sees it rectified too.
    """

    def __init__(self, inputs: int, steps: Sequence[tuple[int, int, int]], *, relu_first: bool) -> None:
        super().__init__()
        outputs = steps[-1][0]
        stride = math.prod(s for _, s, _ in steps)
        self.skip, self.skipbn = None, None
        if outputs != inputs or stride != 1:
            self.skip = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.skipbn = nn.BatchNorm2d(outputs)
        layers: list[nn.Module] = []
        width = inputs
        for index, (channels, step_stride, dilation) in enumerate(steps):
            if index or relu_first:
                layers.append(nn.ReLU(inplace=True))
            layers += [SeparableConv(width, channels, stride=step_stride, dilation=dilation), nn.BatchNorm2d(channels)]
            width = channels
        self.rep = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out = self.rep(x)  # runs before the shortcut: it may rectify x in place
        shortcut = x if self.skip is None or self.skipbn is None else self.skipbn(self.skip(x))
        return out + shortcut  # type: ignore[no-any-return]


class Xception71(nn.Module):
    """The 71 layer Xception: entry flow to stride 8, sixteen middle blocks, exit flow, dilations 2 and 4."""

    channels = (64, 128, 2048)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(3, 32, stride=2), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = conv3x3(32, 64), nn.BatchNorm2d(64)
        self.block1 = XceptionBlock(64, [(128, 1, 1), (128, 1, 1), (128, 2, 1)], relu_first=False)
        self.block2 = XceptionBlock(128, [(256, 1, 1), (256, 1, 1)], relu_first=False)
        self.block3 = XceptionBlock(256, [(728, 1, 1), (728, 1, 1), (728, 2, 1)], relu_first=True)
        for number in range(4, 20):
            setattr(self, f"block{number}", XceptionBlock(728, [(728, 1, 2)] * 3, relu_first=True))
        self.block20 = XceptionBlock(728, [(728, 1, 2), (1024, 1, 2), (1024, 1, 1)], relu_first=True)
        self.conv3, self.bn3 = SeparableConv(1024, 1536, dilation=4), nn.BatchNorm2d(1536)
        self.conv4, self.bn4 = SeparableConv(1536, 1536, dilation=4), nn.BatchNorm2d(1536)
        self.conv5, self.bn5 = SeparableConv(1536, 2048, dilation=4), nn.BatchNorm2d(2048)

    def forward(self, x: Tensor) -> Features:
        x = F.relu_(self.bn1(self.conv1(x)))
        fine = F.relu_(self.bn2(self.conv2(x)))
        middle = F.relu_(self.block1(fine))
        x = self.block2(middle)
        for number in range(3, 21):
            x = getattr(self, f"block{number}")(x)
        x = F.relu_(self.bn3(self.conv3(F.relu_(x))))
        x = F.relu_(self.bn4(self.conv4(x)))
        return Features(fine, middle, F.relu_(self.bn5(self.conv5(x))))


class SqueezeExcitation(nn.Module):
    """Scale every channel by a gate in (0, 1) computed from the channel means."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.silu(self.fc1(x.mean(dim=(2, 3), keepdim=True)))).sigmoid()
        return x * gate  # type: ignore[no-any-return]


def _conv_norm(
    inputs: int, outputs: int, *, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1, silu: bool = True
) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
    norm = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
    return nn.Sequential(conv, norm, *([nn.SiLU(inplace=True)] if silu else []))


class InvertedResidual(nn.Module):
    """MBConv: widen by 1x1, convolve each channel, gate, narrow by 1x1; a shortcut where the shape allows."""

    def __init__(
        self, inputs: int, outputs: int, *, kernel: int, expand: int, stride: int, dilation: int, drop: float
    ) -> None:
        super().__init__()
        wide = inputs * expand
        self.block = nn.Sequential(
            *([_conv_norm(inputs, wide, kernel=1)] if expand != 1 else []),
            _conv_norm(wide, wide, kernel=kernel, stride=stride, dilation=dilation, groups=wide),
            SqueezeExcitation(wide, max(1, inputs // 4)),
            _conv_norm(wide, outputs, kernel=1, silu=False),
        )
        self.shortcut = stride == 1 and inputs == outputs
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        if not self.shortcut:
            return out
        if self.training and self.drop:  # stochastic depth: some images skip the branch
            keep = out.new_empty(len(out), 1, 1, 1).bernoulli_(1 - self.drop) / (1 - self.drop)
            out = out * keep
        return out + x


class EfficientNetB4(nn.Module):
    """EfficientNet-B4 up to its last stage (448 channels); the strides of stages 4 and 6 became dilations 2 and 4."""

    channels = (24, 32, 448)
    # (outputs, blocks, kernel, expansion, stride, dilation): B0's stages, 1.4 times wider and 1.8 times deeper
    _STAGES = (
        (24, 2, 3, 1, 1, 1),
        (32, 4, 3, 6, 2, 1),
        (56, 4, 5, 6, 2, 1),
        (112, 6, 3, 6, 1, 2),
        (160, 6, 5, 6, 1, 2),
        (272, 8, 5, 6, 1, 4),
        (448, 2, 3, 6, 1, 4),
    )

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = [_conv_norm(3, 48, kernel=3, stride=2)]
        inputs, done, total = 48, 0, sum(stage[1] for stage in self._STAGES)
        for outputs, blocks, kernel, expand, stride, dilation in self._STAGES:
            layers = []
            for block in range(blocks):
                drop = 0.2 * done / total  # probability of skipping; it grows with depth
                first = stride if block == 0 else 1
                layers.append(
                    InvertedResidual(
                        inputs, outputs, kernel=kernel, expand=expand, stride=first, dilation=dilation, drop=drop
                    )
                )
                inputs, done = outputs, done + 1
            stages.append(nn.Sequential(*layers))
        self.features = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> Features:
        fine = self.features[1](self.features[0](x))
        middle = self.features[2](fine)
        deep = middle
        for stage in list(self.features)[3:]:
            deep = stage(deep)
        return Features(fine, middle, deep)
