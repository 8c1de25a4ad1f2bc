"""The top classes and levels that decided a run's labels, from the teacher's own that were kept.

Where a policy weighs polygons, a run keeps what the teacher said before that, so that any other policy can be applied.
Audit, review, report and exports are about what decided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.policy import Policy
from autolabel.manifests.run.labels import RunConfidence
from autolabel.manifests.run.shards import Label
from autolabel.pipeline.posterior import FromLevels


class Decided:
    """Turns kept maps into those that a policy decided by; they are the same under a policy that weighs no polygons.

    edges: the ascending confidences between levels. silent: level 0 means that the teacher gives no class. `weighs` is
    True if the policy weighs polygons: then coarse labels are to be read with `drawn_void`.
    """

    def __init__(self, policy: Policy, space: LabelSpace, edges: Sequence[float], *, silent: bool = False) -> None:
        self.weighs = policy.polygons is not None
        self._levels = FromLevels(policy, space, edges, silent=silent) if self.weighs else None

    def of(self, kept: RunConfidence, sample_id: str, coarse: Label | None) -> tuple[Label, Label]:
        """Read what was kept of an image, and return what decided. Raises KeyError, DamagedLabel."""
        return self(*kept[sample_id], coarse, second=lambda: kept.second(sample_id))

    def __call__(
        self, top: Label, level: Label, coarse: Label | None, *, second: Callable[[], Label | None] = lambda: None
    ) -> tuple[Label, Label]:
        """Top class and level of every pixel, (H, W) uint8 as those that were kept; coarse (H, W) uint8, or None.

        second: reads the second class, which is asked for where there are polygons to weigh.
        """
        place = None if self._levels is None else self._levels.places(coarse)
        if self._levels is None or place is None:
            return top, level
        prediction = self._levels(top, level, place=place, second=second())
        found = np.divmod(prediction.codes, prediction.levels)
        return found[0].astype(np.uint8), found[1].astype(np.uint8)
