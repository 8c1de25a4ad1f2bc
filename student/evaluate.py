"""Score a network on a manifest: per-class IoU and mIoU from one streaming confusion matrix."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.files import write_json
from autolabel.manifests.policy import TRAINING_SCALES
from autolabel.manifests.scores import Confusion
from autolabel.manifests.tables import fingerprints, load_manifest
from autolabel.student.data import ManifestDataset
from autolabel.teacher.build import overlap
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


def predict(teacher: Teacher, image: NDArray[np.uint8], scales: Sequence[float] = TRAINING_SCALES) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 -> the most probable class of every pixel, (H, W) uint8, without a threshold."""
    return teacher.logits(image, scales).argmax(dim=0).byte().cpu().numpy()


def score(
    teacher: Teacher,
    dataset: ManifestDataset,
    scales: Sequence[float] = TRAINING_SCALES,
    on_image: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score a network on every labelled sample of a dataset."""
    confusion = Confusion(len(dataset.label_space))
    for index in range(len(dataset)):
        item = dataset[index]
        confusion.add(item["label"].numpy(), predict(teacher, item["image"].permute(1, 2, 0).numpy(), scales))
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
    scales: Sequence[float] = TRAINING_SCALES,
    device: str = "auto",
    allow_overlap: bool = False,
    on_image: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score a checkpoint on a manifest. Raises ValueError for another label space, or images it was trained on."""
    teacher = load_teacher(checkpoint, device)
    dataset = ManifestDataset(load_manifest(manifest))
    teacher.require_space(dataset.label_space, str(checkpoint), str(manifest))
    shared = overlap(teacher.trained_on, fingerprints(dataset.samples))
    if shared and not allow_overlap:
        raise ValueError(
            f"{checkpoint} was trained on {len(shared)} of the {len(dataset)} images of {manifest} (the first is"
            f" {dataset.samples[shared[0]].sample_id!r}): score it on others, or say --allow-overlap"
        )
    return replace(score(teacher, dataset, scales, on_image), overlap=len(shared))
