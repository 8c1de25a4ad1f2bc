"""A batch of crops on the device that computes it, whole or in parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autolabel.manifests.run.labels import CERTAIN
from autolabel.student.losses import BatchCounts, observed, segmentation_loss
from autolabel.teacher.networks.combine import TrainingOutput


@dataclass(frozen=True)
class Batch:
    """Crops that are computed together.

    image: (B, 3, h, w) uint8. label: (B, h, w) uint8. weight: (B, h, w) uint8, in 255ths, None if nothing is weighed.
    certain: no pixel weighs less than 1. automatic: (B,) bool, true where a run made the label; None if nowhere.
    """

    image: Tensor
    label: Tensor
    weight: Tensor | None = None
    certain: bool = True
    automatic: Tensor | None = None

    @classmethod
    def of(cls, items: Mapping[str, Any], device: torch.device) -> Batch:
        """The batch of items of `TrainingCrops`, as a loader puts them together."""
        # These questions are asked before anything is moved: the answer of a GPU would have to be waited for.
        weight, automatic = items.get("weight"), items["automatic"]
        certain = weight is None or bool((weight == CERTAIN).all())
        image, label = (items[name].to(device, non_blocking=True) for name in ("image", "label"))
        return cls(
            image,
            label,
            None if weight is None else weight.to(device, non_blocking=True),
            certain,
            automatic.to(device, non_blocking=True) if automatic.any() else None,
        )

    def counts(self) -> BatchCounts:
        """The counts of this batch."""
        return BatchCounts.of(self.label, self.weight)

    def parts(self, number: int) -> list[Batch]:
        """Cut the batch into equal parts; their number must divide its size."""
        if number == 1:
            return [self]

        def cut(values: Tensor | None) -> tuple[Tensor | None, ...]:
            return (None,) * number if values is None else values.chunk(number)

        return [
            replace(self, image=image, label=label, weight=weight, automatic=automatic)
            for image, label, weight, automatic in zip(
                self.image.chunk(number), self.label.chunk(number), cut(self.weight), cut(self.automatic), strict=True
            )
        ]

    def loss(
        self, name: str, output: TrainingOutput, *, whole: BatchCounts, transition: Tensor | None, scale_weight: float
    ) -> Tensor:
        """The share of these crops in the loss of the `whole` batch (see `segmentation_loss`).

        transition: corrects for the errors of automatic labels (see `losses.observed`).
        """
        seen = None
        if transition is not None and self.automatic is not None:
            seen = partial(observed, transition=transition, automatic=self.automatic)
        # Weights of 1 take the way of no weights, whose sums are rounded otherwise.
        weight = None if self.certain else self.weight
        return segmentation_loss(
            name, output, label=self.label.long(), whole=whole, weight=weight, scale_weight=scale_weight, seen=seen
        )
