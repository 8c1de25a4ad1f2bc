"""Weights and pictures that anyone can make again: each tensor from its key and shape alone, each pixel from its place.

The formula and the table of gains are those of the reference's recorded outputs (`../shared/data/goldens`), so that a
network filled here can be compared both with the reference and with what ours always gave.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autolabel.teacher.feed import normalise
from autolabel.teacher.networks.build import ARCHITECTURES, build
from autolabel.teacher.networks.decoders import SegmentationNet

# Convolutions are scaled by 0.6, but for these: so every layer's output stays near unit size, and several classes win.
# The first match counts; the second entry, if any, is the number of input channels that it is for.
GAINS: list[tuple[str, int | None, float]] = [
    (r"^backbone\.(layer|mod)\d", None, 0.8),
    (r"^backbone\.(block|conv)\d", None, 0.7),
    (r"^backbone\._blocks\.", None, 0.9),
    (r"^(aspp|bot_aspp|bot_fine)\b", None, 0.9),
    (r"^(convs|conv_up)[1-4]\b", None, 0.9),
    (r"^(final|conv_up5)(\.6)?\.weight$", None, 5.0),
    (r"^final\.", None, 0.9),
    (r"^cls_head\.6\.weight$", None, 3.0),
    (r"^ocr\.cls_head\.weight$", None, 3.0),
    (r"^scale_attn\.conv2\.weight$", None, 4.2),
    (r"^scale_attn\.conv0\.weight$", 720, 0.15),
    (r"^scale_attn\.[26]\.weight$", None, 1.0),
]


@functools.cache
def tensor_by_formula(key: str, shape: tuple[int, ...]) -> Tensor:
    kind = key.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return torch.tensor(0)
    dice = np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")))
    if kind == "running_var":
        values = dice.uniform(0.5, 1.5, shape)
    elif kind in ("running_mean", "bias"):
        values = 0.1 * dice.standard_normal(shape)
    elif len(shape) == 1:  # the weight of a batch norm
        values = 1 + 0.1 * dice.standard_normal(shape)
    else:
        values = dice.standard_normal(shape)
        if shape[1] > 3:  # a filter without a mean, but for those that see the image
            values -= values.mean(axis=(1, 2, 3), keepdims=True)
        fits = (gain for start, inputs, gain in GAINS if re.search(start, key) and inputs in (None, shape[1]))
        values *= next(fits, 0.6) * np.sqrt(2 / np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(values, np.float32))


_trunk_in_memory = ""


def network_by_formula(arch: str, classes: int, scales: int = 3) -> SegmentationNet:
    """Networks around one trunk, asked for one after the other, share the time that its numbers take."""
    global _trunk_in_memory
    trunk = ARCHITECTURES[arch].trunk
    if trunk != _trunk_in_memory:
        tensor_by_formula.cache_clear()
        _trunk_in_memory = trunk
    with torch.device("meta"):  # no time lost on weights that are replaced
        network = build(arch, classes, scales=scales)
    state = {key: tensor_by_formula(key, tuple(t.shape)) for key, t in network.state_dict().items()}
    network.to_empty(device="cpu").load_state_dict(state)
    return network.eval()


def picture(height: int, width: int) -> Tensor:
    """(1, 3, height, width) normalised; waves and edges."""
    y, x = np.mgrid[:height, :width]
    channels = [(7 * x + 3 * y) % 256, (x * y) % 256, np.where((x // 9 + y // 7) % 2, 200, 40)]
    return normalise(torch.from_numpy(np.stack(channels)[None].astype(np.uint8)))


# The reference's name of each network that it can build, and ours.
PUBLISHED = {
    "attnscale.DeepV3R50": "resnet50_deeplabv3plus_explicit",
    "attnscale.DeepV3R50B": "resnet50_deeplabv3plus_explicit_bn",
    "attnscale.DeepV3R50BP": "resnet50_deeplabv3plus_explicit_pairs",
    "attnscale.DeepV3W38": "wrn38_deeplabv3plus_explicit",
    "basic.HRNet": "hrnet48_plain",
    "basic.HRNet_ASP": "hrnet48_aspp",
    "deeper.DeeperW38": "wrn38_deeper",
    "deeper.DeeperX71": "xception71_deeper",
    "deepv3.DeepV3PlusR50": "resnet50_deeplabv3plus",
    "deepv3.DeepV3PlusW38": "wrn38_deeplabv3plus",
    "deepv3.DeepV3PlusX71": "xception71_deeplabv3plus",
    "deepv3.DeepV3R50": "resnet50_deeplabv3",
    "mscale.DeepV3R50": "resnet50_deeplabv3plus_mscale",
    "mscale.DeepV3W38": "wrn38_deeplabv3plus_mscale",
    "mscale.DeepV3X71": "xception71_deeplabv3plus_mscale",
    "mscale.DeeperW38": "wrn38_deeper_mscale",
    "mscale.DeeperX71": "xception71_deeper_mscale",
    "mscale.HRNet": "hrnet48_plain_mscale",
    "mscale.HRNet_ASP": "hrnet48_aspp_mscale",
    "mscale2.DeepV3R50": "resnet50_deeplabv3plus_mscale2",
    "ocrnet.HRNet": "hrnet48_ocr",
    "ocrnet.HRNet_Mscale": "hrnet48_ocr_mscale",
}
# Two more of its key lists are not for us: one does not run there either, the other's attention has a second channel
# that nothing reads.
NOT_BUILT = {"deepv3.DeepV3PlusSRNX50", "mscale.DeepV3W38Fuse2"}
# The same modules under two names in the published code.
SYNONYMS = {"trunk.": "backbone.", "seg_head.": "cls_head."}


def customary(key: str) -> str:
    start = next((s for s in SYNONYMS if key.startswith(s)), "")
    return SYNONYMS.get(start, "") + key.removeprefix(start)


def published_shapes(keys: Path) -> dict[str, tuple[list[int], str]]:
    """One of the reference's recorded lists of tensors: our key -> shape and type, in its order."""
    return {customary(key): (shape, kind) for key, (shape, kind) in json.loads(keys.read_text())["entries"].items()}
