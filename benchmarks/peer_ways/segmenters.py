"""The networks of benchmarks/peers.py as people run them by hand: a photograph goes in, a label comes out.

`Hierarchy` follows the published code of arXiv 2005.10821 (NVIDIA/semantic-segmentation, network/ocrnet.py and
utils/trnval_utils.py), in other words; `Segformer` follows the documentation of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

SCALES, THRESHOLD, IGNORE = (2.0, 1.0, 0.5), 0.5, 255
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
Pixels = NDArray[np.uint8]


def enlarged(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map (B, C, h, w) to (height, width), bilinear, corners not aligned."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class Hierarchy:
    """A network of ours at three scales. Every map of a scale is enlarged to the size of that scale's input.

    `trimmed` leaves out what no label needs (auxiliary logits, attention of the highest scale), and keeps channels
    last, as tuning guides advise.
    """

    def __init__(self, checkpoint: Path, *, trimmed: bool = False) -> None:
        from autolabel.teacher.checkpoints import load_network, read_checkpoint

        network: Any = load_network(checkpoint, read_checkpoint(checkpoint)).eval()
        self.network = network.to(memory_format=torch.channels_last) if trimmed else network
        self.trimmed = trimmed

    def __call__(self, image: Image.Image) -> tuple[Pixels, Pixels]:
        """Return the label (H, W), 255 where no class exceeds the threshold, and the probability (H, W) in 255ths."""
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
        images = ((pixels - MEAN) / STD)[None]
        if self.trimmed:
            images = images.contiguous(memory_format=torch.channels_last)
        probabilities = torch.softmax(self.logits(images), dim=1)[0].cpu()
        confidence, winner = (both.numpy() for both in probabilities.max(0))
        label = winner.astype(np.uint8)
        label[confidence <= THRESHOLD] = IGNORE
        return label, (confidence * 255).astype(np.uint8)

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits (1, C, H, W), joined from the highest scale down."""
        size = images.shape[-2], images.shape[-1]
        joint = joint_aux = torch.empty(0)
        for scale in SCALES:
            own = int(size[0] * scale), int(size[1] * scale)
            logits, aux, features, *_ = self.network.ocr(self.network.backbone(enlarged(images, own)))
            if scale == SCALES[0] and self.trimmed:
                joint = enlarged(logits, own)
                continue
            trust = enlarged(self.network.scale_attn.attention(features), own)
            joint = self.joined(joint, enlarged(logits, own), trust, scale)
            if not self.trimmed:
                joint_aux = self.joined(joint_aux, enlarged(aux, own), trust, scale)
        return joint

    def joined(self, joint: Tensor, logits: Tensor, trust: Tensor, scale: float) -> Tensor:
        """Mix the logits of a scale with what the higher ones gave, by its attention."""
        if scale == SCALES[0]:
            return logits
        size = logits.shape[-2], logits.shape[-1]
        if scale >= 1:
            return trust * logits + (1 - trust) * enlarged(joint, size)
        size = joint.shape[-2], joint.shape[-1]
        return enlarged(trust * logits, size) + (1 - enlarged(trust, size)) * joint


def transformers_package() -> Any:
    """Import transformers, also where torch and torchvision are of different builds."""
    from autolabel.teacher.optional import require_package

    require_package("torchvision", "hf")
    return require_package("transformers", "hf")


class Segformer:
    """A model of transformers for semantic segmentation: processor, network, post-processing."""

    def __init__(self, folder: Path) -> None:
        transformers = transformers_package()
        self.processor = transformers.AutoImageProcessor.from_pretrained(folder)
        self.network = transformers.AutoModelForSemanticSegmentation.from_pretrained(folder).eval()

    def __call__(self, image: Image.Image) -> tuple[Pixels, None]:
        """Return the label (H, W); post-processing gives no probability."""
        outputs = self.network(**self.processor(image.convert("RGB"), return_tensors="pt"))
        (label,) = self.processor.post_process_semantic_segmentation(outputs, [image.size[::-1]])
        return label.numpy().astype(np.uint8), None


def segmenter(teacher: Path, *, trimmed: bool = False) -> Hierarchy | Segformer:
    """Load a folder of transformers, or a checkpoint of ours."""
    return Segformer(teacher) if teacher.is_dir() else Hierarchy(teacher, trimmed=trimmed)
