"""Judge a few trainings: means with intervals, differences paired by seed, and a plain verdict for each class.

Intervals are Student's t at 95 % ("The probable error of a mean", Biometrika 6, 1908) over the seeds. Two arms with the
same seed start from the same weights, so their difference is taken seed by seed (paired), and a verdict is given only
if the interval of the mean difference excludes 0, and if both arms have learnt something: each training must do better
than naming the commonest class everywhere. All IoUs are shares in 0..1; a point is 0.01.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from autolabel.manifests.wording import Shown, Table, duration, listed, number, percent, points
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
_SCORED = ("iou", "miou", "pixel_accuracy", "images", "commonest_miou")


def t_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, or of the normal distribution above 30 degrees of freedom."""
    return _T[freedom - 1] if freedom <= len(_T) else _NORMAL


def _with_half(text: str, half: float | None, *, impossible: bool) -> str:
    """The number with half of its interval; a star where the interval holds numbers that no IoU can have."""
    return text if half is None else f"{text} ± {100 * half:.1f}{'*' if impossible else ''}"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half of the width of its 95 % interval.

    Both are None if a seed has no number, because the class is in no validation image. With one seed `half` is None.
    """

    mean: float | None
    half: float | None

    @property
    def impossible(self) -> bool:
        """True if the interval leaves 0..1."""
        return self.half is not None and self.mean is not None and not self.half <= self.mean <= 1 - self.half

    def __str__(self) -> str:
        """68.2 ± 1.0, in per cent."""
        return _with_half(percent(self.mean), self.half, impossible=self.impossible)


def estimate(values: Sequence[float | None]) -> Estimate:
    """Estimate the mean and its interval from one number for each seed."""
    numbers = np.array([v for v in values if v is not None], np.float64)
    if not len(numbers) or len(numbers) < len(values) or np.isnan(numbers).any():
        return Estimate(None, None)
    mean, n = float(numbers.mean()), len(numbers)
    return Estimate(mean, t_quantile(n - 1) * float(numbers.std(ddof=1)) / math.sqrt(n) if n > 1 else None)


@dataclass(frozen=True)
class ArmDifference:
    """An arm's IoU minus its baseline's, of one class or of the mean, paired by seed.

    learnt: every training of both arms does better than naming the commonest class everywhere.
    """

    arm: str
    baseline: str
    name: str
    mean: float | None
    half: float | None
    learnt: bool = True

    @property
    def impossible(self) -> bool:
        """True if the interval leaves -1..1."""
        return self.half is not None and self.mean is not None and abs(self.mean) + self.half > 1

    @property
    def verdict(self) -> str:
        """One of better, worse, undecided, undecided (one seed), and not judged."""
        if not self.learnt:
            return "not judged"
        if self.mean is None:
            return "undecided"
        if self.half is None:
            return "undecided (one seed)"
        return ("better" if self.mean > 0 else "worse") if abs(self.mean) > self.half else "undecided"

    @property
    def change(self) -> str:
        """+2.1 ± 0.8, in points."""
        return _with_half(points(self.mean), self.half, impossible=self.impossible)

    def __str__(self) -> str:
        """One sentence: "pole loses 2.1 ± 0.8 points against fine + coarse"."""
        if self.mean is None or self.half is None or self.verdict not in ("better", "worse"):
            return f"{self.name} is {self.verdict} against {self.baseline}"
        verb = "gains" if self.mean > 0 else "loses"
        size = _with_half(percent(abs(self.mean)), self.half, impossible=self.impossible)
        return f"{self.name} {verb} {size} points against {self.baseline}"


@dataclass(frozen=True)
class Comparison(Shown):
    """Students by arm and seed. The first arm has fine labels only, the second is fine + coarse.

    `scores` were taken after the last step; `curves` holds every step of every training, in the order of the seeds.
    `setting` says what was compared and how the students were trained; `notes` are cautions about the comparison.
    """

    seeds: tuple[int, ...]
    scores: dict[str, list[Scores]]
    curves: dict[str, list[list[StepReport]]] = field(default_factory=dict)
    batch_size: int = 1
    notes: tuple[str, ...] = ()
    setting: dict[str, Any] = field(default_factory=dict)

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms."""
        return tuple(self.scores)

    @property
    def classes(self) -> tuple[str, ...]:
        """All classes of the label space."""
        return tuple(self.scores[self.arms[0]][0].iou)

    @property
    def absent(self) -> tuple[str, ...]:
        """The classes that no validation image has, so that no arm has a number for them."""
        return tuple(n for n in self.classes if all(self.estimate(arm, n).mean is None for arm in self.arms))

    @property
    def unlearnt(self) -> tuple[str, ...]:
        """The arms of which some training does no better than naming the commonest class everywhere."""
        return tuple(arm for arm in self.arms if not all(s.learnt for s in self.scores[arm]))

    @property
    def names(self) -> tuple[str, ...]:
        """The other classes and MEAN. Classes that lose in some arm come first, the greatest loss at the top."""
        lost = dict.fromkeys(d.name for d in self.losses())
        return (*lost, *(n for n in (*self.classes, MEAN) if n not in lost and n not in self.absent))

    def baselines(self, arm: str) -> tuple[str, ...]:
        """The arms that an arm is compared with: fine + coarse, then fine."""
        return self.arms[: min(self.arms.index(arm), 2)][::-1]

    def _values(self, arm: str, name: str) -> list[float | None]:
        return [s.miou if name == MEAN else s.iou[name] for s in self.scores[arm]]

    def estimate(self, arm: str, name: str = MEAN) -> Estimate:
        """An arm's IoU of a class, or its mean IoU."""
        return estimate(self._values(arm, name))

    def difference(self, arm: str, baseline: str, name: str = MEAN) -> ArmDifference:
        """Compare an arm with a baseline, seed by seed."""
        pairs = zip(self._values(arm, name), self._values(baseline, name), strict=True)
        both = estimate([None if a is None or b is None else a - b for a, b in pairs])
        learnt = not {arm, baseline} & set(self.unlearnt)
        return ArmDifference(arm, baseline, name, both.mean, both.half, learnt)

    def differences(self) -> Iterator[ArmDifference]:
        """Compare every arm with each of its baselines, for every class and the mean."""
        for arm in self.arms:
            for baseline in self.baselines(arm):
                yield from (self.difference(arm, baseline, name) for name in (*self.classes, MEAN))

    def losses(self) -> list[ArmDifference]:
        """The differences whose verdict is worse, the greatest loss first."""
        return sorted((d for d in self.differences() if d.verdict == "worse"), key=lambda d: d.mean or 0.0)

    def cost(self, arm: str) -> tuple[float, float]:
        """Images/s and seconds of all trainings of an arm, from the images of each and its mean speed at the end."""
        images = [len(curve) * self.batch_size for curve in self.curves[arm]]
        seconds = sum(n / curve[-1].images_per_s for n, curve in zip(images, self.curves[arm], strict=True))
        return sum(images) / seconds, seconds

    @property
    def seconds(self) -> float:
        """Seconds of all trainings together."""
        return sum(self.cost(arm)[1] for arm in self.arms)

    def refusals(self) -> list[str]:
        """One sentence for each arm that is not judged."""
        worst = {arm: min(self.scores[arm], key=lambda s: s.miou) for arm in self.unlearnt}
        return [
            f"{arm}: not judged. A training of it has {percent(score.miou)} % mean IoU, no better than naming the"
            f" commonest class everywhere ({percent(score.commonest_miou)} %): train longer."
            for arm, score in worst.items()
        ]

    def summary(self) -> list[str]:
        """The losses in sentences, or one that says why there is none."""
        if len(self.seeds) == 1:
            return ["One seed has no interval, so nothing is decided: run the same with --seeds 3 or more."]
        if not any(d.learnt for d in self.differences()):
            return []
        return [f"{loss.arm}: {loss}" for loss in self.losses()] or ["No class is shown to lose."]

    def lines(self) -> list[str]:
        """The arms that are not judged, the losses, then the notes."""
        return [*self.refusals(), *self.summary(), *(f"note: {note}" for note in self.notes)]

    def _about_stars(self, *, limits: str) -> str:
        seeds = len(self.seeds)
        return f"* The interval leaves {limits}: {seeds} seeds say little here; more seeds or more steps say more."

    def score_table(self) -> Table:
        """IoU by class and arm."""
        several = f", mean and 95 % interval of {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
        rows = [[name, *(str(self.estimate(arm, name)) for arm in self.arms)] for name in self.names]
        notes = [f"In no validation image: {listed(self.absent)}."] if self.absent else []
        if any(self.estimate(arm, name).impossible for arm in self.arms for name in self.names):
            notes.append(self._about_stars(limits="0 to 100 %"))
        return Table(f"IoU in %, {self.setting['steps']} steps{several}", ["class", *self.arms], rows, notes=notes)

    def verdict_table(self, arm: str, baseline: str) -> Table:
        """Gains and losses of an arm, by class."""
        differences = [self.difference(arm, baseline, name) for name in self.names]
        rows = [[d.name, d.change, d.verdict] for d in differences]
        notes = [self._about_stars(limits="\u2212100 to 100")] if any(d.impossible for d in differences) else []
        title = f"{arm} against {baseline}: points of IoU, paired by seed"
        return Table(title, ["class", "points", "verdict"], rows, notes=notes)

    def cost_table(self) -> Table:
        """Images, speed and time of every arm."""
        costs = [(arm, *self.cost(arm)) for arm in self.arms]
        rows = [[arm, number(self.setting["images"][arm]), f"{speed:.1f}", duration(s)] for arm, speed, s in costs]
        rows.append(["all", "", "", duration(self.seconds)])
        return Table("cost of the trainings", ["arm", "images", "images/s", "time"], rows, last_is_total=True)

    def tables(self) -> list[Table]:
        """IoU by class; with several seeds, the verdicts of every arm; the cost."""
        pairs = [(arm, baseline) for arm in self.arms for baseline in self.baselines(arm)]
        verdicts = [self.verdict_table(*pair) for pair in pairs] if len(self.seeds) > 1 else []
        return [self.score_table(), *verdicts, self.cost_table()]

    def record(self) -> dict[str, Any]:
        """Everything as JSON; docs/compare.md explains the keys."""

        def numbers(value: Estimate | ArmDifference) -> dict[str, float | None]:
            return {"mean": value.mean, "half": value.half}

        costs = {arm: self.cost(arm) for arm in self.arms}
        return {
            **self.setting,
            "seeds": list(self.seeds),
            "arms": {
                arm: [{name: getattr(s, name) for name in _SCORED} for s in scores]
                for arm, scores in self.scores.items()
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
            "seconds": self.seconds,
            "curves": {
                arm: [[[row.step, row.loss, row.miou] for row in curve] for curve in curves]
                for arm, curves in self.curves.items()
            },
            "notes": list(self.notes),
        }
