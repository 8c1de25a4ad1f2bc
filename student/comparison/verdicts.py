"""Judge a few trainings: means with intervals, differences paired by seed, and a plain verdict for each class.

Two arms with the same seed start from the same weights, so their difference is taken seed by seed (paired), and a
verdict is given only if the 95 % interval of the mean difference excludes 0, and if both arms have learnt something:
each training must do better than naming the commonest class everywhere. All IoUs are shares in 0..1; a point is 0.01.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from autolabel.manifests.wording import Shown, Table, counted, duration, listed, number, percent, points
from autolabel.student.comparison.intervals import (
    HOLDS,
    Chance,
    Estimate,
    Pairing,
    estimate,
    pairing,
    with_half,
)
from autolabel.student.evaluate import Scores
from autolabel.student.steps import StepReport

MEAN = "mean IoU"  # beside the names of the classes
_SCORED = ("iou", "miou", "pixel_accuracy", "images", "commonest_miou")


@dataclass(frozen=True)
class ArmDifference:
    """An arm's IoU minus its baseline's, of one class or of the mean, paired by seed.

    learnt: every training of both arms does better than naming the commonest class everywhere. p: the chance of a
    difference at least as large between equal arms; None where chance can make none, or there is no interval. pairing:
    what pairing by seed buys.
    """

    arm: str
    baseline: str
    name: str
    mean: float | None
    half: float | None
    learnt: bool = True
    p: float | None = None
    pairing: Pairing | None = None

    @property
    def tested(self) -> bool:
        """True if this is one of the differences of which chance calls some better or worse."""
        return self.learnt and self.p is not None

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
        return with_half(points(self.mean), self.half, impossible=self.impossible)

    def __str__(self) -> str:
        """One sentence: "pole loses 2.1 ± 0.8 points against fine + coarse"."""
        if self.mean is None or self.half is None or self.verdict not in ("better", "worse"):
            return f"{self.name} is {self.verdict} against {self.baseline}"
        verb = "gains" if self.mean > 0 else "loses"
        size = with_half(percent(abs(self.mean)), self.half, impossible=self.impossible)
        return f"{self.name} {verb} {size} points against {self.baseline}"


@dataclass(frozen=True)
class Comparison(Shown):
    """Students by arm and seed. The first arm has fine labels only; others are judged against it and the second.

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
        """The arms that an arm is compared with: the second of all, such as fine + coarse, then fine."""
        return self.arms[: min(self.arms.index(arm), 2)][::-1]

    def _values(self, arm: str, name: str) -> list[float | None]:
        return [s.miou if name == MEAN else s.iou[name] for s in self.scores[arm]]

    def estimate(self, arm: str, name: str = MEAN) -> Estimate:
        """An arm's IoU of a class, or its mean IoU."""
        return estimate(self._values(arm, name))

    def difference(self, arm: str, baseline: str, name: str = MEAN) -> ArmDifference:
        """Compare an arm with a baseline, seed by seed."""
        own, other = self._values(arm, name), self._values(baseline, name)
        both = estimate([None if a is None or b is None else a - b for a, b in zip(own, other, strict=True)])
        return ArmDifference(
            arm, baseline, name, both.mean, both.half,
            learnt=not {arm, baseline} & set(self.unlearnt),
            p=both.p_value(len(self.seeds)),
            pairing=pairing(own, other),
        )  # fmt: skip

    def differences(self) -> Iterator[ArmDifference]:
        """Compare every arm with each of its baselines, for every class and the mean."""
        for arm in self.arms:
            for baseline in self.baselines(arm):
                yield from (self.difference(arm, baseline, name) for name in (*self.classes, MEAN))

    @functools.cached_property
    def chance(self) -> Chance:
        """How many verdicts there are, and how many there would be by chance."""
        tested = [d for d in self.differences() if d.tested]
        return Chance.of(
            [d.p for d in tested if d.p is not None],
            excluding=sum(d.verdict in ("better", "worse") for d in tested),
            losses=sum(d.verdict == "worse" for d in tested),
        )

    def holds(self, difference: ArmDifference) -> bool:
        """True for a verdict that is left when the rate of false discoveries over all of them is held at 5 %."""
        return difference.learnt and difference.p is not None and difference.p <= self.chance.largest

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

    def limits(self) -> list[str]:
        """Sentences on what no interval covers; none without intervals."""
        if not self.chance.intervals:
            return []
        limits, runs = [], self.setting["runs"]
        if runs:
            arms, teachers = dict.fromkeys(r["arm"] for r in runs), {r["teacher_sha256"] or r["run"] for r in runs}
            limits.append(
                f"The automatic labels of {listed(list(arms))} come from {counted(len(teachers), 'teacher')}. Trained"
                " again, a teacher labels otherwise; these intervals, over seeds of the students, do not cover that."
            )
        if len(looks := self.setting["looks"]) > 1:
            limits.append(
                f"Verdicts in this folder were looked at with {listed([str(n) for n in looks])} seeds. Whoever adds"
                " seeds until something is decided is wrong more often than these intervals say."
            )
        return limits

    def lines(self) -> list[str]:
        """The arms that are not judged, the losses, the verdicts that chance would give, then limits and notes."""
        chance = [str(self.chance)] if self.chance.intervals else []
        notes = [f"note: {note}" for note in (*self.limits(), *self.notes)]
        return [*self.refusals(), *self.summary(), *chance, *notes]

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
        rows = [[d.name, d.change, f"{d.verdict} {HOLDS}" if self.holds(d) else d.verdict] for d in differences]
        notes = [str(d.pairing) for d in differences if d.name == MEAN and d.pairing]
        if any(d.impossible for d in differences):
            notes.append(self._about_stars(limits="\u2212100 to 100"))
        if any(self.holds(d) for d in differences):
            notes.append(f"{HOLDS} This verdict also holds at a false discovery rate of 5 %.")
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
                {
                    **{"arm": d.arm, "baseline": d.baseline, "name": d.name, **numbers(d), "verdict": d.verdict},
                    **{"p": d.p, "holds": self.holds(d)},
                    "correlation": d.pairing.correlation if d.pairing else None,
                    "paired_to_unpaired": d.pairing.ratio if d.pairing else None,
                }
                for d in self.differences()
            ],
            "chance": self.chance.record(),
            "limits": self.limits(),
            "cost": {arm: {"images_per_s": speed, "seconds": seconds} for arm, (speed, seconds) in costs.items()},
            "seconds": self.seconds,
            "curves": {
                arm: [
                    [[row.step, row.loss if math.isfinite(row.loss) else None, row.miou] for row in curve]
                    for curve in curves
                ]
                for arm, curves in self.curves.items()
            },
            "notes": list(self.notes),
        }
