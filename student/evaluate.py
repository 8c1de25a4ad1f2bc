"""Score a network on a manifest: per-class IoU and mIoU from one streaming confusion matrix."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from autolabel.manifests.files import write_json
from autolabel.manifests.policy import COMBINE
from autolabel.manifests.scores import Confusion
from autolabel.manifests.tables import fingerprints, load_manifest
from autolabel.student.data import ManifestDataset
from autolabel.teacher.checkpoints import overlap
from autolabel.teacher.predict import Teacher, load_teacher


@dataclass(frozen=True)
class Scores:
    """IoU by class name (None where the class never occurs), their mean, the pixel accuracy, and of how many images.

    `overlap` of the images were also trained on: above 0 only where the caller insisted, and then the scores flatter.
    """

    iou: dict[str, float | None]
    miou: float
    pixel_accuracy: float
    images: int
    overlap: int = 0

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(path, self.__dict__)

    @classmethod
    def read(cls, path: Path) -> Scores:
        """Read what `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def score(
    teacher: Teacher,
    dataset: ManifestDataset,
    scales: Sequence[float] | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score a network on every labelled sample of a dataset, at `scales` or those that it trains with."""
    scales = scales or teacher.network.scale_attn.training_scales
    confusion = Confusion(len(dataset.label_space))
    for index in range(len(dataset)):
        item = dataset[index]
        winners, _ = teacher.confidence(item["image"].permute(1, 2, 0).numpy(), scales)
        confusion.add(item["label"].numpy(), winners)
        if on_image:
            on_image(index + 1, len(dataset))
    iou = {
        name: None if np.isnan(value) else float(value)
        for name, value in zip(dataset.label_space.names, confusion.iou(), strict=True)
    }
    return Scores(iou, confusion.mean_iou(), confusion.pixel_accuracy(), len(dataset))


def evaluate(
    checkpoint: Path,
    manifest: Path,
    scales: Sequence[float] | None = None,
    device: str = "auto",
    allow_overlap: bool = False,
    combine: str = COMBINE[0],
    on_image: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score a checkpoint on a manifest. Raises ValueError for another label space, or images it was trained on."""
    teacher = load_teacher(checkpoint, device, combine=combine)
    dataset = ManifestDataset(load_manifest(manifest))
    teacher.require_space(dataset.label_space, str(checkpoint), str(manifest))
    shared = overlap(teacher.trained_on, fingerprints(dataset.samples))
    if shared and not allow_overlap:
        raise ValueError(
            f"{checkpoint} was trained on {len(shared)} of the {len(dataset)} images of {manifest} (the first is"
            f" {dataset.samples[shared[0]].sample_id!r}): score it on others, or say --allow-overlap"
        )
    return replace(score(teacher, dataset, scales, on_image), overlap=len(shared))
