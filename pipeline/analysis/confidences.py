"""Sources of the teacher's confidence at pixels that have truth: the levels that a run has kept, or the teacher."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.places import places
from autolabel.manifests.policy import Policy
from autolabel.manifests.reading import read_photograph
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.kept import kept_in as kept_in
from autolabel.manifests.run.labels import RunConfidence, middles
from autolabel.manifests.samples import Sample
from autolabel.pipeline.decided import Decided
from autolabel.teacher.predict import Teacher


class Confidences(Protocol):
    """A source of confidences."""

    def of(
        self, sample_id: str, sample: Sample, outlined: NDArray[np.uint8] | None
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Return top class (H, W) uint8 and its probability (H, W) float32.

        sample_id: the name in the run. sample: the truth, which names the photograph. outlined: the coarse label, in
        which polygons of no class are VOID.
        """


class TeacherConfidences:
    """The teacher looks at the photographs again, under a policy of the run."""

    def __init__(self, teacher: Teacher, run: Run, policy: Policy) -> None:
        self._teacher, self._recipe, self._temperature = teacher, run.recipe, policy.temperature
        self._evidence, self._classes = policy.evidence(run.label_space), len(run.label_space)

    def of(
        self, sample_id: str, sample: Sample, outlined: NDArray[np.uint8] | None
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Predict, as the run did."""
        around = None if outlined is None or self._evidence is None else places(outlined, self._classes)
        return self._teacher.confidence(
            read_photograph(sample), scales=self._recipe.scales, flip=self._recipe.flip,
            focus=self._recipe.share, temperature=self._temperature, evidence=self._evidence, places=around,
        )  # fmt: skip


class KeptConfidences:
    """The levels that a run has kept, polygons weighed in; every pixel counts with the middle of its level."""

    def __init__(self, run: Run, kept: RunConfidence) -> None:
        """run: the one whose policy decided, which may be another than has kept the levels."""
        self._kept, self.edges, self.levels = kept, kept.edges, len(kept.edges) + 1
        self._middles = middles(kept.edges).astype(np.float32)
        self._decided = Decided(run.policy, run.label_space, kept.edges, silent=run.teacher is None)

    def of(
        self, sample_id: str, sample: Sample, outlined: NDArray[np.uint8] | None
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Read what was kept. Raises DamagedLabel."""
        top, level = self._decided.of(self._kept, sample_id, outlined)
        return top, self._middles[level]


def kept_confidences(run: Run, sample_ids: Collection[str]) -> KeptConfidences | None:
    """The confidences that the run, or the run that it was relabelled from, has kept of all these samples, else None.

    Raises BadTable for damaged records.
    """
    source = kept_in(run)
    if source is None:
        return None
    kept = source.confidence
    return KeptConfidences(run, kept) if set(sample_ids) <= set(kept) else None
