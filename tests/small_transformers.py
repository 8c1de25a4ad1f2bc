"""Small networks of transformers with random weights, one for each architecture, saved as people save theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autolabel.teacher.optional import require_package

require_package("torchvision", "hf")
transformers = require_package("transformers", "hf")

_SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_VIT = {
    "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 64,
    "patch_size": 16,
}  # fmt: skip
_DECODER = {
    "hidden_dim": 32, "encoder_feedforward_dim": 16, "dim_feedforward": 16, "encoder_layers": 1,
    "num_attention_heads": 2, "num_queries": 8,
}  # fmt: skip
_DETR = {
    "use_timm_backbone": False, "backbone_config": None, "encoder_layers": 1, "decoder_layers": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 8,
}  # fmt: skip
_EOMT = {"hidden_size": 32, "num_hidden_layers": 3, "num_blocks": 1, "num_upscale_blocks": 1, "num_queries": 8}
_FIXED, _SHORT = {"height": 64, "width": 64}, {"shortest_edge": 64, "longest_edge": 160}
_WINDOWS = {"size": {"shortest_edge": 64, "longest_edge": None}, "do_split_image": True, "do_pad": True}
NAMES = tuple(f"class {number}" for number in range(5))
_TASK = ("the", "task", "is", "semantic")


def _swin() -> Any:
    return transformers.SwinConfig(**_SWIN, out_features=_STAGES)


# By architecture: the name of its network, the settings of its configuration, its processor with settings.
ARCHITECTURES: dict[str, tuple[str, Callable[[], dict[str, Any]], str, dict[str, Any]]] = {
    "segformer": (
        "SegformerForSemanticSegmentation",
        lambda: {
            "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 16,
        },
        "SegformerImageProcessor",
        {"size": {"height": 64, "width": 96}, "do_reduce_labels": True},
    ),
    "beit": (
        "BeitForSemanticSegmentation",
        lambda: {**_VIT, "out_indices": [1, 2, 3, 4], "auxiliary_channels": 8, "use_relative_position_bias": True},
        "BeitImageProcessor",
        {"size": _FIXED, "do_center_crop": False},
    ),
    "data2vec-vision": (
        "Data2VecVisionForSemanticSegmentation",
        lambda: {**_VIT, "out_indices": [1, 2, 3, 4], "auxiliary_channels": 8},
        "BeitImageProcessor",
        {"size": _FIXED, "do_center_crop": False},
    ),
    "dpt": (
        "DPTForSemanticSegmentation",
        lambda: {
            **_VIT, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8,
            "auxiliary_channels": 8,
        },
        "DPTImageProcessor",
        {"size": _FIXED},
    ),
    "mobilenet_v2": (
        "MobileNetV2ForSemanticSegmentation",
        lambda: {"depth_multiplier": 0.25, "image_size": 64, "output_stride": 8},
        "MobileNetV2ImageProcessor",
        {"size": {"shortest_edge": 64}, "do_center_crop": False},
    ),
    "mobilevit": (
        "MobileViTForSemanticSegmentation",
        lambda: {
            "image_size": 64, "hidden_sizes": [12, 16, 20], "num_attention_heads": 2,
            "neck_hidden_sizes": [4, 4, 8, 8, 12, 12, 16], "aspp_out_channels": 8,
        },
        "MobileViTImageProcessor",
        {"size": {"shortest_edge": 64}, "do_center_crop": False},
    ),
    "mobilevitv2": (
        "MobileViTV2ForSemanticSegmentation",
        lambda: {
            "image_size": 64, "width_multiplier": 0.25, "aspp_out_channels": 8, "n_attn_blocks": [1, 1, 1],
            "base_attn_unit_dims": [16, 24, 32],
        },
        "MobileViTImageProcessor",
        {"size": {"height": 64, "width": 96}, "do_center_crop": False},
    ),
    "sapiens2": (
        "Sapiens2ForSemanticSegmentation",
        lambda: {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "intermediate_size": 32, "image_size": [64, 48], "patch_size": 16,
            "head_config": {"upsample_out_channels": [8, 8], "conv_out_channels": [8]},
        },
        "Sapiens2ImageProcessor",
        {"size": {"height": 64, "width": 48}},
    ),
    "tipsv2_dpt": (
        "Tipsv2DptForSemanticSegmentation",
        lambda: {
            "backbone_config": {
                "model_type": "tipsv2_vision_model", **_VIT, "image_size": 56, "patch_size": 14,
                "out_indices": [1, 2, 3, 4], "apply_layernorm": True, "reshape_hidden_states": False,
            },
            "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8,
        },
        "Tipsv2DptImageProcessor",
        {"size": {"height": 56, "width": 56}},
    ),
    "upernet": (
        "UperNetForSemanticSegmentation",
        lambda: {
            "backbone_config": _swin(), "hidden_size": 16, "auxiliary_channels": 8, "auxiliary_in_channels": 32,
        },
        "SegformerImageProcessor",
        {"size": _FIXED},
    ),
    "maskformer": (
        "MaskFormerForInstanceSegmentation",
        lambda: {
            "backbone_config": _swin(), "fpn_feature_size": 32, "mask_feature_size": 32,
            "decoder_config": transformers.DetrConfig(
                **_DETR, d_model=16, encoder_attention_heads=2, decoder_attention_heads=2
            ),
        },
        "MaskFormerImageProcessor",
        {"size": _SHORT, "ignore_index": 255, "do_reduce_labels": True},
    ),
    "mask2former": (
        "Mask2FormerForUniversalSegmentation",
        lambda: {
            "backbone_config": _swin(), **_DECODER, "feature_size": 32, "mask_feature_size": 32, "decoder_layers": 3,
        },
        "Mask2FormerImageProcessor",
        {"size": {"height": 64, "width": 96}, "ignore_index": 255},
    ),
    "oneformer": (
        "OneFormerForUniversalSegmentation",
        lambda: {
            "backbone_config": _swin(), **_DECODER, "conv_dim": 32, "mask_dim": 32, "decoder_layers": 2,
            "text_encoder_width": 32, "text_encoder_context_length": 12, "text_encoder_num_layers": 1,
            "text_encoder_vocab_size": 60, "text_encoder_proj_layers": 1, "text_encoder_n_ctx": 2,
            "task_seq_len": 12, "max_seq_len": 12, "is_training": False,
        },
        "OneFormerImageProcessor",
        {"size": _SHORT},
    ),
    "eomt": (
        "EomtForUniversalSegmentation",
        lambda: {**_EOMT, "num_attention_heads": 2, "image_size": 64, "patch_size": 16},
        "EomtImageProcessor",
        _WINDOWS,
    ),
    "eomt_dinov3": (
        "EomtDinov3ForUniversalSegmentation",
        lambda: {
            **_EOMT, "num_attention_heads": 2, "image_size": 64, "patch_size": 16, "intermediate_size": 32,
            "num_register_tokens": 2,
        },
        "EomtImageProcessor",
        _WINDOWS,
    ),
    "detr": (
        "DetrForSegmentation",
        lambda: {
            **_DETR, "d_model": 32, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
            "backbone_config": transformers.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic",
                out_features=_STAGES,
            ),
        },
        "DetrImageProcessor",
        {"size": _SHORT},
    ),
}  # fmt: skip


def network_and_processor(architecture: str, names: Sequence[str] = NAMES, **settings: Any) -> tuple[Any, Any]:
    """Return a network whose labels vary, and its processor with other settings than those above."""
    network_name, config, processor_name, own = ARCHITECTURES[architecture]
    kind = getattr(transformers, network_name)
    torch.manual_seed(1)
    numbers = {name: number for number, name in enumerate(names)}
    network = kind(kind.config_class(**config(), id2label=dict(enumerate(names)), label2id=numbers))
    processor = getattr(transformers, processor_name)(**{**own, **settings})
    spread(network.eval(), processor, len(names))
    return network, processor


def save(folder: Path, architecture: str, names: Sequence[str] = NAMES, **settings: Any) -> Path:
    """Save such a network and its processor in a folder, as `save_pretrained` does."""
    transformers.utils.logging.disable_progress_bar()
    network, processor = network_and_processor(architecture, names, **settings)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    if architecture == "oneformer":
        task_tokenizer().save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    return folder


def task_tokenizer() -> Any:
    """Return a tokenizer that knows the words of OneFormer's task and no others."""
    tokens = [letter + end for letter in sorted(set("".join(_TASK))) for end in ("", "</w>")]
    merges = []
    for word in _TASK:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
            tokens.append(parts[0])
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=list(dict.fromkeys(merges)))


def post_processed(architecture: str, network: Any, processor: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labels (H, W) and scores (C, H, W) of transformers itself."""
    shown = {"images": [image], "return_tensors": "pt", "input_data_format": "channels_first"}
    if architecture == "oneformer":
        both = transformers.OneFormerProcessor(processor, task_tokenizer(), max_seq_length=12, task_seq_length=12)
        inputs = both(task_inputs=["semantic"], **shown)
    else:
        inputs = processor(**shown)
    (made,) = processor.post_process_semantic_segmentation(
        network(**inputs), [tuple(image.shape[-2:])], return_segmentation_scores=True
    )
    return made["segmentation"], made["segmentation_scores"]


def picture(seed: int, height: int, width: int) -> Tensor:
    """Return a smooth image of random colours, (3, height, width) uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (1, 3, height // 8 + 1, width // 8 + 1), generator=generator).float()
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255).byte()[0]


@torch.no_grad()
def spread(network: Any, processor: Any, classes: int) -> None:
    """Give a fresh network weights with which labels vary over an image: fresh ones make all scores nearly alike."""
    dice = np.random.default_rng(1)  # torch's normal numbers depend on the instructions of the CPU

    def normal(shape: torch.Size) -> Tensor:
        return torch.from_numpy(dice.standard_normal(tuple(shape), np.float32))

    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            weight.copy_(normal(weight.shape) * 1.6 / weight[0].numel() ** 0.5)
        elif "bias" in name:
            weight.copy_(normal(weight.shape) * 0.3)
    more = {"task_inputs": torch.arange(12)[None]} if "OneFormer" in type(network).__name__ else {}
    shown = processor(images=[picture(3, 64, 128)], return_tensors="pt", input_data_format="channels_first")
    pixels = {"pixel_values": shown["pixel_values"][:1], **more}
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None
    if norms:
        network.train()
        network(**{name: torch.cat([x, x.flip(-1)]) for name, x in pixels.items()})
        network.eval()
    for layer, wanted in _last_layers(network, classes):
        seen = []
        hook = layer.register_forward_hook(lambda _, given, out, seen=seen: seen.append(out))
        network(**pixels)
        hook.remove()
        if not seen:
            continue
        channel = 1 if isinstance(layer, nn.Conv2d) else -1
        values = seen[-1].movedim(channel, 0).flatten(1)
        mean, deviation = values.mean(dim=1), values.std(dim=1).clamp(min=1e-3) / wanted
        layer.weight.div_(deviation.view(-1, *[1] * (layer.weight.ndim - 1)))
        bias = torch.zeros_like(mean) if layer.bias is None else layer.bias
        layer.bias = nn.Parameter((bias - mean) / deviation)


def _last_layers(network: Any, classes: int) -> list[tuple[Any, float]]:
    """Return the layers whose outputs become scores, and the deviation that these outputs should have.

    They give logits of classes, with "no object" or without, logits of masks, or what is multiplied to these.
    """
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    if "ForSemanticSegmentation" in type(network).__name__:
        *_, last = (module for module in layers.values() if module.weight.shape[0] == classes)
        return [(last, 3)]
    ends = {"mask_projection": 0.15, "out_lay": 3}
    masks = [(module, ends[end]) for name, module in layers.items() for end in ends if name.endswith(end)]
    return masks + [(module, 3) for module in layers.values() if module.weight.shape[0] == classes + 1]
