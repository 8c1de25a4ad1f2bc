"""Named networks: TRUNK_DECODER for one scale, TRUNK_DECODER_COMBINATION for several.

`timm:NAME[/DECODER[_COMBINATION]]` and `smp:DECODER/ENCODER` are networks of other packages, see timm.py and smp.py.

hrnet48_ocr_mscale is the network of arXiv 2005.10821. Published networks under these names:

    hrnet48_ocr_mscale                ocrnet.HRNet_Mscale     {wrn38,xception71}_deeper          deeper.Deeper*
    hrnet48_ocr                       ocrnet.HRNet            {…}_deeper_mscale                  mscale.Deeper*
    hrnet48_{plain,aspp}[_mscale]     basic.*, mscale.HRNet*  resnet50_deeplabv3plus_mscale2     mscale2.DeepV3R50
    resnet50_deeplabv3                deepv3.DeepV3R50        resnet50_deeplabv3plus_explicit    attnscale.DeepV3R50
    {…}_deeplabv3plus                 deepv3.DeepV3Plus*      {…}_deeplabv3plus_explicit_bn      attnscale.DeepV3R50B
    {…}_deeplabv3plus_mscale          mscale.DeepV3*          {…}_deeplabv3plus_explicit_pairs   attnscale.DeepV3R50BP
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from autolabel.teacher.networks import smp, timm
from autolabel.teacher.networks.combine import (
    Average,
    Combination,
    Hierarchical,
    HierarchicalPairs,
)
from autolabel.teacher.networks.decoders import (
    DeeperLab,
    DeepLabV3,
    DeepLabV3Plus,
    FlatTrunk,
    HRNetASPP,
    HRNetPlain,
    OCRNet,
    PyramidTrunk,
    SegmentationNet,
)
from autolabel.teacher.networks.efficientnet_lite import EfficientNetLite0
from autolabel.teacher.networks.explicit import Explicit, ExplicitPairs
from autolabel.teacher.networks.hrnet import HRNET_W18_SMALL, HRNET_W48, HRNet
from autolabel.teacher.networks.trunks import EfficientNetB4, ResNet50, WideResNet38, Xception71


class Architecture(NamedTuple):
    """The three pieces of a network, by name; combination "" is the average."""

    trunk: str
    decoder: str
    combination: str

    def __str__(self) -> str:
        if self.trunk.startswith(smp.PREFIX):
            return f"{smp.PREFIX}{self.decoder}/{self.trunk.removeprefix(smp.PREFIX)}"
        if self.trunk.startswith(timm.PREFIX):
            return f"{self.trunk}/{'_'.join(filter(None, self[1:]))}"
        return "_".join(filter(None, self))

    @property
    def pools(self) -> bool:
        """True if the network pools the whole image into one value."""
        return self.decoder not in ("ocr", "plain") and (
            self.decoder in smp.POOLING or not self.trunk.startswith(smp.PREFIX)
        )


# One feature map at stride 4. The two small ones train on two CPU cores: 2 and 4 million parameters with `ocr_mscale`.
_FLAT: dict[str, Callable[[], FlatTrunk]] = {
    "hrnet48": lambda: HRNet(HRNET_W48),
    "hrnet18s": lambda: HRNet(HRNET_W18_SMALL),
    "efficientnet_lite0": EfficientNetLite0,
}
_FLAT_DECODERS: dict[str, Callable[[FlatTrunk, int], SegmentationNet]] = {"plain": HRNetPlain, "aspp": HRNetASPP}
_PYRAMIDS: dict[str, Callable[[], PyramidTrunk]] = {
    "resnet50": ResNet50,
    "wrn38": WideResNet38,
    "xception71": Xception71,
    "efficientnet_b4": EfficientNetB4,
}
_PYRAMID_DECODERS: dict[str, Callable[[PyramidTrunk, int], SegmentationNet]] = {
    "deeplabv3": DeepLabV3,
    "deeplabv3plus": DeepLabV3Plus,
    "deeper": DeeperLab,  # reads features at stride 2, which ResNet-50 does not return
}
# Channels of OCR (mid, key) and of the attention; smaller trunks get smaller heads.
_OCR = {"hrnet48": (512, 256), "hrnet18s": (128, 64), "efficientnet_lite0": (128, 64)}
_ATTENTION = {"hrnet18s": 64, "efficientnet_lite0": 64}
COMBINATIONS = ("", "mscale", "mscale2", "explicit", "explicit_bn", "explicit_pairs")


ARCHITECTURES: dict[str, Architecture] = {
    str(pieces): pieces
    for pieces in (
        Architecture(trunk, decoder, combination)
        for trunks, decoders in ((_FLAT, ("ocr", *_FLAT_DECODERS)), (_PYRAMIDS, _PYRAMID_DECODERS))
        for trunk in trunks
        for decoder in decoders
        for combination in COMBINATIONS
        if (trunk, decoder) != ("resnet50", "deeper")
    )
}


def architecture(name: str) -> Architecture:
    """Return the pieces of a named network. Raises ValueError, one line, for an unknown name or a missing package."""
    if name.startswith(smp.PREFIX):
        trunk, decoder = smp.split(name)
        return Architecture(trunk, decoder, "")
    if name.startswith(timm.PREFIX):
        return _timm_architecture(name)
    if name not in ARCHITECTURES:
        raise ValueError(
            f"unknown architecture {name!r}: expected TRUNK_DECODER[_COMBINATION] such as hrnet48_ocr_mscale, with"
            f" trunks {', '.join(_FLAT)} (decoders ocr, {', '.join(_FLAT_DECODERS)}) or {', '.join(_PYRAMIDS)}"
            f" (decoders {', '.join(_PYRAMID_DECODERS)}); combinations {', '.join(filter(None, COMBINATIONS))}; or"
            " timm:NAME, or smp:DECODER/ENCODER"
        )
    return ARCHITECTURES[name]


def _timm_architecture(name: str) -> Architecture:
    trunk, head = timm.split(name)
    for decoder in (*timm.FLAT_DECODERS, *timm.PYRAMID_DECODERS):
        for combination in COMBINATIONS:
            if head == "_".join(filter(None, (decoder, combination))):
                return Architecture(trunk, decoder, combination)
    raise ValueError(
        f"unknown architecture {name!r}: expected timm:NAME/DECODER[_COMBINATION], with decoders"
        f" {', '.join((*timm.FLAT_DECODERS, *timm.PYRAMID_DECODERS))}; combinations"
        f" {', '.join(filter(None, COMBINATIONS))}"
    )


def build(arch: str, classes: int, *, scales: int = 3) -> SegmentationNet:
    """Build a network with random weights. `scales` is the number of scales that an explicit combination weighs.

    Raises ValueError for an unknown name.
    """
    pieces = architecture(arch)
    network: SegmentationNet
    if pieces.trunk.startswith(smp.PREFIX):
        return smp.SMPNet(pieces.trunk, pieces.decoder, classes)
    if pieces.trunk.startswith(timm.PREFIX):
        return _on_timm(pieces, classes, scales)
    if pieces.trunk in _PYRAMIDS:
        network = _PYRAMID_DECODERS[pieces.decoder](_PYRAMIDS[pieces.trunk](), classes)
    elif pieces.decoder == "ocr":
        mid, key = _OCR[pieces.trunk]
        network = OCRNet(_FLAT[pieces.trunk](), classes, mid=mid, key=key)
    else:
        network = _FLAT_DECODERS[pieces.decoder](_FLAT[pieces.trunk](), classes)
    attention = _ATTENTION.get(pieces.trunk, 256)
    network.scale_attn = _combination(pieces.combination, network.features, attention, scales)
    return network


def _on_timm(pieces: Architecture, classes: int, scales: int) -> SegmentationNet:
    network: SegmentationNet
    if pieces.decoder in timm.PYRAMID_DECODERS:
        pyramid = timm.TimmPyramid(pieces.trunk)
        large, multiple = pyramid.large, pyramid.multiple
        network = _PYRAMID_DECODERS[pieces.decoder](pyramid, classes)
    else:
        flat = timm.TimmFlat(pieces.trunk)
        large, multiple = flat.large, flat.multiple
        if pieces.decoder == "ocr":
            network = OCRNet(flat, classes, mid=256 if large else 128, key=128 if large else 64)
        else:
            network = _FLAT_DECODERS[pieces.decoder](flat, classes)
    network.multiple, network.borrowed = multiple, True
    network.scale_attn = _combination(pieces.combination, network.features, 128 if large else 64, scales)
    return network


def _combination(name: str, features: int, channels: int, scales: int) -> Combination:
    if name == "mscale":
        return Hierarchical(features, channels)
    if name == "mscale2":
        return HierarchicalPairs(features, channels)
    if name == "explicit_pairs":
        return ExplicitPairs(features, channels)
    if name.startswith("explicit"):
        return Explicit(features, scales, batch_norm=name == "explicit_bn")
    return Average()


class Recognised(NamedTuple):
    """The network of a state dict: a name in ARCHITECTURES, its classes, and the scales that it weighs at once."""

    arch: str
    classes: int
    scales: int


# Tensors that only one trunk has. The first match counts.
_TRUNK_MARKS = {
    "backbone.stage4.0.branches.0.0.conv1.weight": None,  # an HRNet; its width tells which
    "backbone.layer0.0.weight": "resnet50",
    "backbone.mod1.conv1.weight": "wrn38",
    "backbone.block20.skip.weight": "xception71",
    "backbone.features.0.0.weight": "efficientnet_b4",
    "backbone._blocks.15._project_conv.weight": "efficientnet_lite0",
}
# Tensors that only one decoder has; their length is the number of classes.
_DECODER_MARKS = {
    "ocr.cls_head.weight": "ocr",
    "cls_head.6.weight": "plain",
    "conv_up5.weight": "deeper",
    "final.6.weight": None,  # its bottlenecks tell which
}


def recognise(state: Mapping[str, Tensor], published: str = "") -> Recognised | None:
    """Return the network to which a state dict most likely belongs, or None if no tensor is familiar.

    `published` is the name under which the reference saved it, or "". Only tell-tale tensors are looked at; the caller
    has to check that all others fit.
    """
    trunk_mark = next((key for key in _TRUNK_MARKS if key in state), None)
    decoder_mark = next((key for key in _DECODER_MARKS if key in state and state[key].ndim == 4), None)
    if trunk_mark is None or decoder_mark is None:
        return None
    trunk = _TRUNK_MARKS[trunk_mark] or ("hrnet18s" if state[trunk_mark].shape[0] == 16 else "hrnet48")
    decoder = _DECODER_MARKS[decoder_mark]
    if decoder is None:
        bottlenecks = "bot_fine.weight" in state, "bot_aspp.weight" in state
        decoder = {(True, True): "deeplabv3plus", (False, True): "aspp"}.get(bottlenecks, "deeplabv3")
    combination, scales = _recognise_combination(state, published)
    arch = str(Architecture(trunk, decoder, combination))
    return Recognised(arch, state[decoder_mark].shape[0], scales) if arch in ARCHITECTURES else None


def weighed_scales(state: Mapping[str, Tensor]) -> int:
    """Return the number of scales that a state dict's combination weighs at once; 3 where nothing tells."""
    try:
        return _recognise_combination(state, "")[1]
    except IndexError:  # a tell-tale tensor has no dimension
        return 3


def _recognise_combination(state: Mapping[str, Tensor], published: str) -> tuple[str, int]:
    if "scale_attn.conv0.weight" in state:
        return "mscale", 3
    plain, deep = state.get("scale_attn.2.weight"), state.get("scale_attn.6.weight")
    if deep is not None:
        weights = deep.shape[0]
        if weights == 2 and published.startswith("attnscale.") and not published.endswith("P"):
            return "explicit_bn", 2  # has the shapes of the paired head
        return {1: "mscale2", 2: "explicit_pairs"}.get(weights, "explicit_bn"), weights
    return ("explicit", plain.shape[0]) if plain is not None else ("", 3)
