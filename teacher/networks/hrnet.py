"""HRNetV2, the high-resolution trunk.

Sun et al., "High-Resolution Representations for Labeling Pixels and Regions" (arXiv 1904.04514) and Wang et al.,
"Deep High-Resolution Representation Learning for Visual Recognition" (arXiv 1908.07919): parallel branches at
strides 4, 8, 16 and 32 exchange features after every module; the four results, resized to stride 4, are concatenated.

Module names follow HRNet's customary ones, so that published state dicts load without renaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Stage:
    """A stage: the number of modules, the residual blocks of each branch of a module, and the width of each branch."""

    modules: int
    blocks: int
    channels: tuple[int, ...]


@dataclass(frozen=True)
class HRNetWidths:
    """The sizes of an HRNet: `stem_blocks` bottlenecks with 4 * `stem_channels` outputs, then stages 2 to 4."""

    stem_blocks: int
    stem_channels: int
    stages: tuple[Stage, Stage, Stage]


# arXiv 1908.07919, section 3: V2-W48 gives 48 + 96 + 192 + 384 = 720 channels.
HRNET_W48 = HRNetWidths(
    stem_blocks=4,
    stem_channels=64,
    stages=(Stage(1, 4, (48, 96)), Stage(4, 4, (48, 96, 192)), Stage(3, 4, (48, 96, 192, 384))),
)
# "W18-Small-v1" of the HRNet authors: 16 + 32 + 64 + 128 = 240 channels.
HRNET_W18_SMALL = HRNetWidths(
    stem_blocks=1,
    stem_channels=32,
    stages=(Stage(1, 2, (16, 32)), Stage(1, 2, (16, 32, 64)), Stage(1, 2, (16, 32, 64, 128))),
)


def conv3x3(inputs: int, outputs: int, *, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution without bias; in the trunks a batch norm follows it."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)


def is_open(size: Sequence[int]) -> bool:
    """True for a size that a program under export leaves open."""
    return any(isinstance(length, torch.SymInt) for length in size)


def same_size(one: Sequence[int], other: Sequence[int]) -> bool:
    """True if two sizes (h, w) are equal; of open ones, if they are equal whatever the input's size."""
    if is_open([*one, *other]):
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return all(statically_known_true(a == b) for a, b in zip(one, other, strict=True))
    return tuple(one) == tuple(other)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize (B, C, H, W) to `size` = (h, w), bilinearly: corners not aligned, no antialiasing."""
    if same_size(x.shape[-2:], size):
        return x
    if x.is_cuda and not torch.is_grad_enabled():
        # A CPU resizes in the precision of x. A GPU's autocast would do so in float32, and go on with that for long:
        # twice the bytes, for labels that are hardly nearer to those of float32 (docs/networks.md).
        with torch.autocast("cuda", enabled=False):
            return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def concatenate(maps: Sequence[Tensor]) -> Tensor:
    """Concatenate the channels of maps (B, C, h, w), all resized to the size of the first."""
    return torch.cat([resize(x, maps[0].shape[-2:]) for x in maps], dim=1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.bn1(self.conv1(x)))
        return F.relu_(self.bn2(self.conv2(out)) + x)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut; the output has four times the channels of the middle."""

    expansion = 4

    def __init__(self, inputs: int, channels: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        outputs = channels * self.expansion
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride=stride, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
            if inputs != outputs or stride != 1
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.bn1(self.conv1(x)))
        out = F.relu_(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu_(out + shortcut)


def _down_path(inputs: int, outputs: int, halvings: int) -> nn.Sequential:
    """Return `halvings` strided convolutions. The last one changes the width and has no ReLU: a sum follows it."""
    steps: list[nn.Module] = []
    for step in range(halvings):
        last = step == halvings - 1
        width = outputs if last else inputs
        layers: list[nn.Module] = [conv3x3(inputs, width, stride=2), nn.BatchNorm2d(width)]
        steps.append(nn.Sequential(*layers, *([] if last else [nn.ReLU(inplace=True)])))
    return nn.Sequential(*steps)


class ExchangeModule(nn.Module):
    """Residual blocks on every branch, then every branch receives the sum of all of them at its own size."""

    def __init__(self, blocks: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(c) for _ in range(blocks))) for c in channels)
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(self._path(channels, source, target) for source in range(len(channels)))
            for target in range(len(channels))
        )

    @staticmethod
    def _path(channels: tuple[int, ...], source: int, target: int) -> nn.Module:
        if source == target:
            return nn.Identity()
        if source < target:
            return _down_path(channels[source], channels[target], target - source)
        return nn.Sequential(
            nn.Conv2d(channels[source], channels[target], 1, bias=False), nn.BatchNorm2d(channels[target])
        )

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        xs = [branch(x) for branch, x in zip(self.branches, xs, strict=True)]
        fused = []
        for target, paths in enumerate(self.fuse_layers):
            size = xs[target].shape[-2:]
            assert isinstance(paths, nn.ModuleList)
            parts = [resize(path(x), size) for path, x in zip(paths, xs, strict=True)]
            fused.append(F.relu_(sum(parts[1:], start=parts[0])))
        return fused


def _transition(before: tuple[int, ...], after: tuple[int, ...]) -> nn.ModuleList:
    """Pass the old branches on, with a new width where needed, and start one new branch at half the last size."""
    paths: list[nn.Module] = []
    for index, width in enumerate(after):
        if index < len(before):
            same = before[index] == width
            paths.append(
                nn.Identity()
                if same
                else nn.Sequential(conv3x3(before[index], width), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
            )
        else:
            step = nn.Sequential(conv3x3(before[-1], width, stride=2), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
            paths.append(nn.Sequential(step))  # the customary key has this extra level
    return nn.ModuleList(paths)


class HRNet(nn.Module):
    """(B, 3, H, W) normalised image -> (B, channels, ceil(H/4), ceil(W/4)) features."""

    def __init__(self, widths: HRNetWidths) -> None:
        super().__init__()
        self.channels = sum(widths.stages[-1].channels)  # channels of the concatenated output
        self.conv1 = conv3x3(3, 64, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = conv3x3(64, 64, stride=2)
        self.bn2 = nn.BatchNorm2d(64)
        stem_out = widths.stem_channels * Bottleneck.expansion
        self.layer1 = nn.Sequential(
            *(Bottleneck(64 if i == 0 else stem_out, widths.stem_channels) for i in range(widths.stem_blocks))
        )
        before: tuple[int, ...] = (stem_out,)
        for number, stage in enumerate(widths.stages, start=2):
            setattr(self, f"transition{number - 1}", _transition(before, stage.channels))
            modules = (ExchangeModule(stage.blocks, stage.channels) for _ in range(stage.modules))
            setattr(self, f"stage{number}", nn.Sequential(*modules))
            before = stage.channels

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.bn1(self.conv1(x)))
        x = F.relu_(self.bn2(self.conv2(x)))
        xs = [self.layer1(x)]
        for number in (2, 3, 4):
            paths = getattr(self, f"transition{number - 1}")
            # A new branch starts from the coarsest old one.
            xs = [path(xs[min(i, len(xs) - 1)]) for i, path in enumerate(paths)]
            xs = getattr(self, f"stage{number}")(xs)
        return concatenate(xs)
