"""A run as a torch data set."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from autolabel.manifests.wording import Shown


class ToTorch(Shown):
    """A run's way into the room `student`, which knows torch."""

    def to_torch(
        self,
        *,
        crop: tuple[int, int] | None = None,
        transform: Callable[[dict[str, Any]], Any] | None = None,
        weights: bool = False,
    ) -> Any:
        """Return the labelled samples of a finished run as a map-style torch data set, for a training of one's own.

        An item is {"image": (3, H, W) uint8 RGB, "label": (H, W) int64 with 255 = ignore, "sample_id": str}, and where
        the run has kept confidence "confidence": (H, W) uint8 levels. crop: height and width of a random crop, by
        torch's random numbers; a smaller image is padded, by 255 in its label. transform: called with an item, returns
        what the loader gets. weights: add "weight": (H, W) float32, the probability of every pixel's label.

        It can be pickled. A DataLoader may start its processes in any way where the run lies on a disk, and by "spawn"
        or "forkserver" where it lies in a bucket. A batch is read by threads, side by side. Raises BadTable until the
        run has been published, ValueError if it has no label or has kept no probabilities.
        """
        room = importlib.import_module("autolabel.student.run_dataset")  # by name: manifests imports no other room
        return room.RunDataset(self, crop=crop, transform=transform, weights=weights)
