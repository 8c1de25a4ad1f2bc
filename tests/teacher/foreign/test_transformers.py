"""Models of transformers: their scores are those of transformers' own post-processing, and bad folders are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_transformers import ARCHITECTURES, network_and_processor, picture, save, task_tokenizer, transformers
from torch import Tensor

from autolabel.manifests.teachers import TeacherPlace
from autolabel.teacher.foreign.transformers import TransformersModel, load
from autolabel.teacher.networks.fields import Field, InMemory, resized

CPU = torch.device("cpu")
QUICK = ("segformer", "mask2former", "eomt")  # a network with logits, one with queries, one with windows
SIZES = ((65, 129), (130, 75), (40, 50), (13, 201))  # above, below and across all of the processors' sizes


def field(model: TransformersModel, images: Tensor) -> Field:
    scores = model.predict(images)
    if isinstance(scores, Field):
        assert scores.size == images.shape[-2:]
        return scores
    return resized(InMemory(scores), (images.shape[-2], images.shape[-1]))


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


@pytest.mark.parametrize(
    "architecture",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough) for name in ARCHITECTURES],
)
@torch.inference_mode()
def test_scores_and_labels_are_those_of_transformers_own_post_processing(architecture: str, tmp_path: Path) -> None:
    network, processor = network_and_processor(architecture)
    model = load(TeacherPlace.of(save(tmp_path, architecture)), device=CPU)
    assert model.classes == tuple(f"class {number}" for number in range(5))
    seen = set()
    for size in SIZES:
        images = torch.stack([picture(seed, *size) for seed in (3, 4)])
        together = field(model, images)
        for number, image in enumerate(images):
            labels, scores = post_processed(architecture, network, processor, image)
            own = together.whole()[number]
            assert (own - scores).abs().max() <= 1e-5
            first, second = scores.topk(2, dim=0).values
            assert torch.equal(own.argmax(dim=0)[first - second > 1e-5], labels[first - second > 1e-5])
            alone = field(model, image[None])
            assert torch.equal(own, alone.whole()[0])
            bands = [alone.rows(top, min(top + 7, size[0])) for top in range(0, size[0], 7)]
            assert (torch.cat(bands, dim=2)[0] - own).abs().max() <= 1e-5 * max(1, float(scores.abs().max()))
            seen |= set(labels.unique().tolist())
    assert len(seen) > 1
