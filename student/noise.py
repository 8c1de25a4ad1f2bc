"""The errors of automatic labels as an audit has counted them: the probability of a label, given the true class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, read_json
from autolabel.manifests.label_space import LabelSpace

_ADVICE = "`autolabel audit` writes such a file"
_SMOOTHING = 1000  # pixels of every true class that are added, right and wrong in the shares of all pixels
_LEAST = 1e-4  # share of wrong labels, at least: a network must be able to contradict any label


@dataclass(frozen=True)
class LabelNoise:
    """Pixels by true class (row) and label (column), of those that have both; `path` and `sha256` are the audit's."""

    path: Path
    sha256: str
    pixels: NDArray[np.int64]

    @classmethod
    def read(cls, path: Path, space: LabelSpace) -> LabelNoise:
        """Read the confusion matrix of an audit. Raises BadDocument for another label space, and without a matrix."""
        audit = read_json(path, dict[str, Any], advice=_ADVICE)
        rows, classes = audit.get("confusion"), audit.get("classes")
        if not isinstance(rows, list) or not isinstance(classes, list) or not rows:
            raise BadDocument(f"{path} has no confusion matrix: audit the run again with `autolabel audit`")
        names = tuple(row.get("name") if isinstance(row, dict) else None for row in classes)
        if names != space.names:
            other = next((str(name) for name in names if name not in space.names), None)
            what = f"class {other!r} is not in it" if other else f"it has {len(names)} of {len(space)}, or their order"
            raise BadDocument(
                f"{path} audits other classes than those of label space {space.name!r} ({what}): audit labels of it"
            )
        size = len(space)
        try:
            counts = np.array(rows)
        except ValueError:
            counts = np.zeros(0)
        if counts.shape != (size, size + 1) or counts.dtype.kind != "i" or (counts < 0).any():
            raise BadDocument(f"{path}: expected a confusion of {size} x {size + 1} numbers of pixels; {_ADVICE}")
        if not counts[:, :size].any():
            raise BadDocument(f"{path}: no pixel of its images has truth and a label, so no error was counted")
        return cls(path, storage.sha256(path), counts[:, :size].astype(np.int64))

    def transition(self) -> NDArray[np.float32]:
        """The probability (C, C) float32 that a labelled pixel of class k (row) has label y (column).

        Classes with few pixels are smoothed: each is given 1000 more, as many of them right as of all pixels together,
        and the others spread evenly over the other classes. Rows sum to 1.
        """
        size = len(self.pixels)
        wrong = max(_LEAST, 1 - float(self.pixels.trace() / self.pixels.sum())) if size > 1 else 0.0
        usual = np.full((size, size), wrong / max(size - 1, 1))
        np.fill_diagonal(usual, 1 - wrong)
        counts = self.pixels + _SMOOTHING * usual
        shares: NDArray[np.float32] = (counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)
        return shares

    def record(self) -> dict[str, str]:
        """The name of the audit and its sha256, for train.json."""
        return {"audit": str(self.path), "sha256": self.sha256}
