"""EfficientNet-Lite0: a small trunk whose ImageNet weights come from a package index.

EfficientNet (Tan and Le, arXiv 1905.11946) without the parts that are slow on a phone: no squeeze and excitation, ReLU6
instead of SiLU. Its features at strides 4, 8, 16 and 32 are concatenated at stride 4, as those of HRNetV2 are (arXiv
1904.04514, section 3), so that the same decoders read either.

Module names are those of the published PyTorch weights, which load without renaming.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autolabel.teacher.networks.hrnet import concatenate


class SamePadConv(nn.Conv2d):
    """A k x k convolution, padded as in TensorFlow: ceil(n / stride) outputs, an odd row or column goes last."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int = 1, groups: int = 1) -> None:
        # At stride 1 both sides get the same padding, which the convolution adds by itself.
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return super().forward(x)
        sides = [-(-n // stride) for n in x.shape[-2:]]
        rows, columns = (kernel - stride + s * stride - n for s, n in zip(sides, x.shape[-2:], strict=True))
        padded = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        out = super().forward(padded)
        if not torch.compiler.is_compiling():
            return out
        # It has these sides already. A formula of an open side that names it twice would grow with every layer.
        return out.narrow(-2, 0, sides[0]).narrow(-1, 0, sides[1])


class DepthwiseConv(SamePadConv):
    """A convolution of each channel by itself; on a CPU in the precision of its weights, even under autocast.

    On a CPU its gradients are two to four times as fast in float32 as in bfloat16 (benchmarks/RESULTS.md).
    """

    def __init__(self, channels: int, kernel: int, *, stride: int) -> None:
        super().__init__(channels, channels, kernel=kernel, stride=stride, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class LiteBlock(nn.Module):
    """Widen by 1x1, convolve each channel, narrow by 1x1 without ReLU; a shortcut where the shape allows."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, expand: int, stride: int) -> None:
        super().__init__()
        wide = inputs * expand
        self._expand_conv, self._bn0 = None, None
        if expand != 1:
            self._expand_conv, self._bn0 = nn.Conv2d(inputs, wide, 1, bias=False), _norm(wide)
        self._depthwise_conv, self._bn1 = DepthwiseConv(wide, kernel, stride=stride), _norm(wide)
        self._project_conv, self._bn2 = nn.Conv2d(wide, outputs, 1, bias=False), _norm(outputs)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x
        if self._expand_conv is not None and self._bn0 is not None:
            out = F.relu6(self._bn0(self._expand_conv(out)), inplace=True)
        out = F.relu6(self._bn1(self._depthwise_conv(out)), inplace=True)
        out = self._bn2(self._project_conv(out))
        return out + x if self.shortcut else out


class EfficientNetLite0(nn.Module):
    """(B, 3, H, W) normalised image -> (B, 496, ceil(H/4), ceil(W/4)) features."""

    # (outputs, blocks, kernel, expansion, stride): B0's stages
    _STAGES = (
        (16, 1, 3, 1, 1),
        (24, 2, 3, 6, 2),
        (40, 2, 5, 6, 2),
        (80, 3, 3, 6, 2),
        (112, 3, 5, 6, 1),
        (192, 4, 5, 6, 2),
        (320, 1, 3, 6, 1),
    )
    _LAST_OF_STRIDE = (2, 4, 10, 15)  # last block at strides 4, 8, 16 and 32: their outputs are returned
    channels = 24 + 40 + 112 + 320

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SamePadConv(3, 32, kernel=3, stride=2), _norm(32)
        blocks, inputs = [], 32
        for outputs, repeats, kernel, expand, stride in self._STAGES:
            for repeat in range(repeats):
                blocks.append(LiteBlock(inputs, outputs, kernel=kernel, expand=expand, stride=1 if repeat else stride))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)), inplace=True)
        features = []
        for number, block in enumerate(self._blocks):
            x = block(x)
            if number in self._LAST_OF_STRIDE:
                features.append(x)
        return concatenate(features)
