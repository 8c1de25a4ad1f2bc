"""What a few trainings tell: means with intervals, differences paired by seed, and a plain verdict for each class.

Intervals are Student's t at 95 % ("The probable error of a mean", Biometrika 6, 1908) over the seeds. Two arms with the
same seed start from the same weights, so their difference is taken seed by seed (paired), and a verdict is given only
where the interval of the mean difference leaves 0 out. All IoUs are shares in 0..1; a point is 0.01 of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from autolabel.student.evaluate import Scores
from autolabel.student.train import StepReport

MEAN = "mean IoU"  # beside the names of the classes
# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom: NIST/SEMATECH e-Handbook of Statistical Methods,
# section 1.3.6.7.2.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_NORMAL = 1.960
_SCORED = ("iou", "miou", "pixel_accuracy", "images")


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; of the normal distribution above 30 degrees of freedom."""
    return _T[freedom - 1] if freedom <= len(_T) else _NORMAL


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half of the width of its 95 % interval.

    Both are None where a seed has no number (the class is in no validation image); of one seed, `half` is.
    """

    mean: float | None
    half: float | None


def estimate(values: Sequence[float | None]) -> Estimate:
    """Mean and interval of one number for each seed."""
    numbers = np.array([v for v in values if v is not None], np.float64)
    if not len(numbers) or len(numbers) < len(values) or np.isnan(numbers).any():
        return Estimate(None, None)
    mean, n = float(numbers.mean()), len(numbers)
    return Estimate(mean, t_quantile(n - 1) * float(numbers.std(ddof=1)) / math.sqrt(n) if n > 1 else None)


@dataclass(frozen=True)
class Difference:
    """An arm's IoU less its baseline's, of a class or of the mean, paired by seed."""

    arm: str
    baseline: str
    name: str
    mean: float | None
    half: float | None

    @property
    def verdict(self) -> str:
        """better or worse where the interval leaves 0 out, else undecided."""
        if self.mean is None:
            return "undecided"
        if self.half is None:
            return "undecided (one seed)"
        return ("better" if self.mean > 0 else "worse") if abs(self.mean) > self.half else "undecided"

    def __str__(self) -> str:
        """One sentence: "pole loses 2.1 ± 0.8 points against fine + coarse"."""
        if self.mean is None or self.half is None or self.verdict == "undecided":
            return f"{self.name} is {self.verdict} against {self.baseline}"
        verb = "gains" if self.mean > 0 else "loses"
        return f"{self.name} {verb} {100 * abs(self.mean):.1f} ± {100 * self.half:.1f} points against {self.baseline}"


@dataclass(frozen=True)
class Comparison:
    """Students by arm and seed. The first arm has fine labels only, the second is fine + coarse.

    `scores` are those after the last step, `curves` every step of every training, in the order of the seeds. `asked` is
    what was compared, `notes` what the reader has to know beside the numbers.
    """

    seeds: tuple[int, ...]
    scores: dict[str, list[Scores]]
    curves: dict[str, list[list[StepReport]]] = field(default_factory=dict)
    batch_size: int = 1
    notes: tuple[str, ...] = ()
    asked: dict[str, Any] = field(default_factory=dict)

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms, in their order."""
        return tuple(self.scores)

    @property
    def classes(self) -> tuple[str, ...]:
        """All classes of the label space, in its order."""
        return tuple(self.scores[self.arms[0]][0].iou)

    @property
    def absent(self) -> tuple[str, ...]:
        """The classes without a number in any arm: no validation image has them."""
        return tuple(n for n in self.classes if all(self.estimate(arm, n).mean is None for arm in self.arms))

    @property
    def names(self) -> tuple[str, ...]:
        """The other classes, and MEAN: those that lose somewhere first, the greatest loss at the top."""
        lost = dict.fromkeys(d.name for d in self.losses())
        return (*lost, *(n for n in (*self.classes, MEAN) if n not in lost and n not in self.absent))

    def baselines(self, arm: str) -> tuple[str, ...]:
        """The arms that an arm is held against: fine + coarse, then fine."""
        return self.arms[: min(self.arms.index(arm), 2)][::-1]

    def _values(self, arm: str, name: str) -> list[float | None]:
        return [s.miou if name == MEAN else s.iou[name] for s in self.scores[arm]]

    def estimate(self, arm: str, name: str = MEAN) -> Estimate:
        """An arm's IoU of a class, or its mean IoU."""
        return estimate(self._values(arm, name))

    def difference(self, arm: str, baseline: str, name: str = MEAN) -> Difference:
        """An arm against a baseline, seed by seed."""
        pairs = zip(self._values(arm, name), self._values(baseline, name), strict=True)
        found = estimate([None if a is None or b is None else a - b for a, b in pairs])
        return Difference(arm, baseline, name, found.mean, found.half)

    def differences(self) -> Iterator[Difference]:
        """Every arm against each of its baselines, for every class and the mean."""
        for arm in self.arms:
            for baseline in self.baselines(arm):
                yield from (self.difference(arm, baseline, name) for name in (*self.classes, MEAN))

    def losses(self) -> list[Difference]:
        """What is worse than a baseline, the greatest loss first."""
        return sorted((d for d in self.differences() if d.verdict == "worse"), key=lambda d: d.mean or 0.0)

    def cost(self, arm: str) -> tuple[float, float]:
        """Images/s and seconds of all trainings of an arm: each one's images at the mean speed that it ended with."""
        images = [len(curve) * self.batch_size for curve in self.curves[arm]]
        seconds = sum(n / curve[-1].images_per_s for n, curve in zip(images, self.curves[arm], strict=True))
        return sum(images) / seconds, seconds

    def record(self) -> dict[str, Any]:
        """Everything, as JSON: docs/compare.md has the keys."""

        def numbers(found: Estimate | Difference) -> dict[str, float | None]:
            return {"mean": found.mean, "half": found.half}

        costs = {arm: self.cost(arm) for arm in self.arms}
        return {
            **self.asked,
            "seeds": list(self.seeds),
            "arms": {
                arm: [{name: getattr(s, name) for name in _SCORED} for s in found] for arm, found in self.scores.items()
            },
            "summary": {
                arm: {name: numbers(self.estimate(arm, name)) for name in (*self.classes, MEAN)} for arm in self.arms
            },
            "losses": [f"{d.arm}: {d}" for d in self.losses()],
            "differences": [
                {"arm": d.arm, "baseline": d.baseline, "name": d.name, **numbers(d), "verdict": d.verdict}
                for d in self.differences()
            ],
            "cost": {arm: {"images_per_s": speed, "seconds": seconds} for arm, (speed, seconds) in costs.items()},
            "seconds": sum(seconds for _, seconds in costs.values()),
            "curves": {
                arm: [[[row.step, row.loss, row.miou] for row in curve] for curve in curves]
                for arm, curves in self.curves.items()
            },
            "notes": list(self.notes),
        }
