"""The account of the samples of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accounts:
    """The account of all samples: asked = labelled + quarantined + left."""

    asked: int
    labelled: int
    quarantined: int
    left: int

    def balanced(self) -> bool:
        """True if no sample is lost and none is counted twice."""
        return self.asked == self.labelled + self.quarantined + self.left
