"""Weigh a teacher against polygons: the two numbers that make their product most likely to say the truth.

The posterior of class c at a pixel is softmax(teacher_weight * log p(c) + polygon_weight * log a(c)), where a(c) says
how much more often c lies there than the teacher says (`evidence.beside`). The mean log loss is convex in both weights.
Weights that few images speak for stay near the defaults, because their squared distances are added, divided by the
number of images. Classes have no biases: they would make classes as frequent as they are, which costs thin ones
(labels of CamVid lose 1 to 2 points of IoU there), whereas a teacher's own balance is what its owner has chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autolabel.manifests.evidence import BESIDE_WEIGHT, TEACHER_WEIGHT

Floats = NDArray[np.float32]
HEAVIEST = 4.0  # as PolygonEvidence allows
_SHRINKAGE = 3.0  # of one image, in nats for a squared distance of 1
_STEPS = 200


class Pixels(NamedTuple):
    """Unnamed pixels of an image: logarithms (N, C) float32 of p and of a, and true classes (N,) uint8."""

    teacher: Floats
    polygons: Floats
    truth: NDArray[np.uint8]


@dataclass(frozen=True)
class Weights:
    """The exponents of p and a."""

    teacher: float = TEACHER_WEIGHT
    polygons: float = BESIDE_WEIGHT

    def posterior(self, pixels: Pixels) -> NDArray[np.float64]:
        """The probability of every class (N, C), rows that sum to 1."""
        below = self.teacher * pixels.teacher.astype(np.float64) + self.polygons * pixels.polygons
        below -= below.max(axis=1, keepdims=True)
        odds: NDArray[np.float64] = np.exp(below)
        odds /= odds.sum(axis=1, keepdims=True)
        return odds


class Told(NamedTuple):
    """Nats of log loss a pixel, and the share of right pixels: a posterior held against the truth."""

    loss: float
    right: float


def tell(posteriors: Sequence[NDArray[np.float64]], images: Sequence[Pixels]) -> Told:
    """Hold posteriors (N, C) of images against their truth, all pixels alike."""
    truth = np.concatenate([pixels.truth for pixels in images])
    together = np.concatenate(posteriors)
    true = together[np.arange(len(truth)), truth]
    return Told(float(-np.log(true.clip(1e-30)).mean()), float((together.argmax(axis=1) == truth).mean()))


def fit(images: Sequence[Pixels]) -> Weights:
    """The weights that say the truth of these images best, shrunk towards the defaults. Raises ValueError without any.

    A weight that would leave 0 to 4 is held at that end, and the other is fitted anew. A class that is never true takes
    no part.
    """
    if not sum(len(pixels.truth) for pixels in images):
        raise ValueError("no unnamed pixel whose truth is known: there is nothing to fit weights to")
    true, truth = np.unique(np.concatenate([pixels.truth for pixels in images]), return_inverse=True)
    features = np.stack([np.concatenate([pixels[place][:, true] for pixels in images]) for place in (0, 1)])
    some = torch.from_numpy(features).double(), torch.from_numpy(truth).long()
    held: dict[int, float] = {}
    while True:
        weights = _least(*some, held, images=len(images))
        leaving = [place for place in (0, 1) if place not in held and not 0 <= weights[place] <= HEAVIEST]
        if not leaving:
            return Weights(*weights)
        held |= {place: min(max(weights[place], 0.0), HEAVIEST) for place in leaving}


def _least(features: Tensor, truth: Tensor, held: dict[int, float], *, images: int) -> list[float]:
    """Both weights, of the least penalised loss of features (2, N, C)."""
    defaults = torch.tensor((TEACHER_WEIGHT, BESIDE_WEIGHT), dtype=torch.float64)
    shifts = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    free = torch.tensor([place not in held for place in (0, 1)], dtype=torch.float64)
    base = torch.tensor([held.get(place, float(defaults[place])) for place in (0, 1)], dtype=torch.float64)
    optimizer = torch.optim.LBFGS(
        [shifts], max_iter=_STEPS, tolerance_grad=1e-7, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        weights = base + free * shifts
        scores = weights[0] * features[0] + weights[1] * features[1]
        value = torch.nn.functional.cross_entropy(scores, truth) + _SHRINKAGE * (shifts**2).sum() / images
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return list((base + free * shifts).detach().tolist())
