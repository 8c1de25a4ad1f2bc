"""Trunks of the package timm under our decoders: `timm:NAME` or `timm:NAME/DECODER[_COMBINATION]`.

NAME is one that timm registers, with or without a tag; nothing else is looked up, and nothing is downloaded. Decoders
are `ocr`, `plain` and `aspp`, which read the maps of strides 4 and above, each made narrow first; and `deeplabv3` and
`deeplabv3plus`, for which the last stages are dilated where timm can do that.

Sides that are no multiple of the largest stride are padded (`SegmentationNet.multiple`). A trunk that takes images of
one size only is refused.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autolabel.teacher.networks.hrnet import concatenate
from autolabel.teacher.networks.trunks import Features
from autolabel.teacher.optional import require_package

PREFIX = "timm:"
FLAT_DECODERS, PYRAMID_DECODERS = ("ocr", "plain", "aspp"), ("deeplabv3", "deeplabv3plus")
_DEFAULT = "ocr_mscale"
_FINEST = 4  # stride of the first map that a decoder reads
_MAPS = 4  # that a flat decoder reads
_STRIDE = 8  # of the deepest map under a DeepLab decoder, where a trunk can be dilated
_LARGE = 1000  # channels of all maps together; trunks with fewer get narrow heads
# Arguments with which a trunk takes images of any size; only some know them.
_ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {})
_WINDOWS = (1, 7, 8)  # sides of the windows into which some trunks cut their deepest map


def split(name: str) -> tuple[str, str]:
    """Return the trunk `timm:NAME` and DECODER[_COMBINATION] of a name. Raises ValueError for an unknown NAME."""
    model, slash, head = name.removeprefix(PREFIX).partition("/")
    known = _names()
    if model not in known:
        close = difflib.get_close_matches(model, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists them"
        raise ValueError(f"unknown architecture {name!r}: timm has no model {model!r}; {hint}")
    return PREFIX + model, head if slash else _DEFAULT


@cache
def _names() -> frozenset[str]:
    """The names that timm registers, with and without tags. Raises ValueError, one line, without timm."""
    package = _package()
    return frozenset([*package.list_models(), *package.list_models(include_tags=True)])


def _package() -> Any:
    try:
        return require_package("timm", "timm")
    except ModuleNotFoundError as error:
        raise ValueError(f"an architecture {PREFIX}… {error}") from error


class _Plan(NamedTuple):
    """The arguments of a trunk, the channels and strides of its maps, and the side that its images are multiples of."""

    arguments: dict[str, Any]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    multiple: int
    channels_last: bool


@cache
def _plan(name: str, dilated: bool) -> _Plan:
    """Find out, on tensors without content, how a trunk can be used. Raises ValueError if it cannot."""
    reason: Exception | None = None
    strides: tuple[dict[str, Any], ...] = ({"output_stride": _STRIDE}, {}) if dilated else ({},)
    for arguments in ({**stride, **size} for stride in strides for size in _ANY_SIZE):
        try:
            with torch.device("meta"):
                model = _create(name, arguments).eval()
        except (TypeError, ValueError, AssertionError, NotImplementedError, RuntimeError, AttributeError) as error:
            reason = reason or error
            continue
        info, last = model.feature_info, getattr(model, "output_fmt", "") == "NHWC"
        plan = _Plan(arguments, tuple(info.channels()), tuple(info.reduction()), math.lcm(*info.reduction()), last)
        for window in _WINDOWS:
            side = plan.multiple * window
            if all(_fits(model, plan, size) for size in ((2 * side, 3 * side), (side, 5 * side))):
                return plan._replace(multiple=side)
    about = f" ({str(reason).splitlines()[0]})" if reason and "unexpected keyword" not in str(reason) else ""
    raise ValueError(
        f"{PREFIX}{name} does not give maps of images of any size{about}: expected a trunk such as convnext_tiny,"
        " resnet50 or mobilenetv3_large_100; docs/networks.md says which are known to work"
    )


def _create(name: str, arguments: dict[str, Any]) -> Any:
    return _package().create_model(name, pretrained=False, features_only=True, **arguments)


@torch.no_grad()
def _fits(model: nn.Module, plan: _Plan, size: tuple[int, int]) -> bool:
    """True if a trunk takes images of a size, and each map has the size and the channels that timm says."""
    try:
        maps = model(torch.empty(1, 3, *size, device="meta"))
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError):
        return False
    own = [x.shape[1:] if not plan.channels_last else (x.shape[3], *x.shape[1:3]) for x in maps]
    wanted = [(c, size[0] // s, size[1] // s) for c, s in zip(plan.channels, plan.strides, strict=True)]
    return [tuple(shape) for shape in own] == wanted


class _TimmTrunk(nn.Module):
    """A model of timm without its classifier."""

    def __init__(self, trunk: str, *, dilated: bool) -> None:
        super().__init__()
        name = trunk.removeprefix(PREFIX)
        plan = _plan(name, dilated)
        self.model = _create(name, plan.arguments)
        self.multiple, self._channels_last = plan.multiple, plan.channels_last
        levels = [i for i, stride in enumerate(plan.strides) if stride >= _FINEST] or [len(plan.strides) - 1]
        self._levels = levels[-_MAPS:]
        self._widths = [plan.channels[i] for i in self._levels]

    @property
    def large(self) -> bool:
        """True where the heads are wide as well."""
        return sum(self._widths) >= _LARGE

    def maps(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the maps (B, C, h, w) from the finest on."""
        found = self.model(x)
        for level in self._levels:
            yield found[level].permute(0, 3, 1, 2) if self._channels_last else found[level]


class TimmFlat(_TimmTrunk):
    """One map (B, channels, h, w): those of strides 4 and above, made narrow, at the size of the finest."""

    def __init__(self, trunk: str) -> None:
        super().__init__(trunk, dilated=False)
        width = 128 if self.large else 64
        self.channels = width * len(self._widths)
        self.narrow = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
            for inputs in self._widths
        )

    def forward(self, x: Tensor) -> Tensor:
        return concatenate([layer(x) for layer, x in zip(self.narrow, self.maps(x), strict=True)])


class TimmPyramid(_TimmTrunk):
    """Fine, middle and deep features; the deep ones at stride 8 where the trunk can be dilated."""

    def __init__(self, trunk: str) -> None:
        super().__init__(trunk, dilated=True)
        self.channels = self._widths[0], self._widths[min(1, len(self._widths) - 1)], self._widths[-1]

    def forward(self, x: Tensor) -> Features:
        maps = list(self.maps(x))
        return Features(maps[0], maps[min(1, len(maps) - 1)], maps[-1])
