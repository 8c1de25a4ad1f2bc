"""The page of `autolabel compare`: verdicts, intervals, curves and cost, in one file that opens from disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autolabel.manifests import pages
from autolabel.manifests.drawing import OKABE_ITO
from autolabel.manifests.wording import Table
from autolabel.student.comparison.intervals import Estimate
from autolabel.student.comparison.verdicts import MEAN, ArmDifference, Comparison
from autolabel.student.steps import StepReport

# An arm is told apart by its colour, and without colours by its mark and dash. The last colour follows the text.
_COLOURS = (*(OKABE_ITO[c] for c in ("blue", "orange", "green", "purple", "sky", "vermilion", "yellow")), "var(--ink)")
_MARKS = ("circle", "square", "diamond", "ring")
_DASHES = ("none", "7 3", "2 3", "9 3 2 3")
_POINTS = 80  # points of a curve; more could not be told apart


@dataclass(frozen=True)
class Arm:
    """How an arm is drawn."""

    name: str
    colour: str
    mark: str
    dash: str


@dataclass(frozen=True)
class Interval:
    """A dot and its whisker on an axis, in per cent of it."""

    dot: float
    left: float
    width: float


@dataclass(frozen=True)
class Lanes:
    """A table with a plot: for every row, the intervals of some arms on one axis."""

    table: Table
    ticks: list[tuple[float, float]]  # a value, and its place on the axis in per cent
    lanes: Mapping[str, list[tuple[Arm, Interval | None]]]


@dataclass(frozen=True)
class Verdicts:
    """The differences of an arm from a baseline."""

    arm: Arm
    baseline: str
    plot: Lanes


@dataclass(frozen=True)
class CurvePlot:
    """Curves of every training by step: (arm, points), in per cent of the axes, y downwards."""

    title: str
    note: str
    steps: int
    lines: list[tuple[Arm, list[tuple[float, float]]]]
    ticks: list[tuple[str, float]]


@dataclass(frozen=True)
class ComparisonPage:
    """The values of the page."""

    comparison: Comparison
    out: Path
    arms: list[Arm]
    scores: Lanes
    verdicts: list[Verdicts]
    curves: list[CurvePlot]
    mean: str = MEAN


def render(comparison: Comparison, out: Path) -> str:
    """The page as HTML; `out` is the folder that it is written to."""
    arms = {
        name: Arm(name, *(kinds[place % len(kinds)] for kinds in (_COLOURS, _MARKS, _DASHES)))
        for place, name in enumerate(comparison.arms)
    }
    page = ComparisonPage(
        comparison,
        out.absolute(),
        list(arms.values()),
        _scores(comparison, arms),
        _verdicts(comparison, arms),
        _curves(comparison.curves, arms),
    )
    return pages.render("student/comparison/page.html.j2", page=page)


def _axis(longest: float) -> tuple[float, int]:
    """A round distance between ticks, and how many of them, three to six, reach `longest`."""
    power = 10.0 ** math.floor(math.log10(longest or 1.0))
    step = next(power * part for part in (0.2, 0.5, 1.0, 2.0) if longest <= power * part * 5)
    return step, math.ceil(longest / step - 1e-9)


def _reach(values: Iterable[Estimate | ArmDifference]) -> list[float]:
    """The distances from 0 that means and whiskers reach."""
    return [abs(v.mean) + (v.half or 0.0) for v in values if v.mean is not None]


def _interval(value: Estimate | ArmDifference, low: float, high: float) -> Interval | None:
    """The place of a number on an axis from `low` to `high`; None if there is no number."""
    if value.mean is None:
        return None
    half = value.half or 0.0

    def place(x: float) -> float:
        return 100 * (min(max(x, low), high) - low) / (high - low)

    left, right = place(value.mean - half), place(value.mean + half)
    return Interval(place(value.mean), left, right - left)


def _scores(comparison: Comparison, arms: Mapping[str, Arm]) -> Lanes:
    """IoU by class and arm, on an axis from 0."""
    rows = {name: [(arm, comparison.estimate(arm, name)) for arm in comparison.arms] for name in comparison.names}
    step, count = _axis(min(1.0, max([0.01, *_reach(e for row in rows.values() for _, e in row)])))
    return Lanes(
        comparison.score_table(),
        [(k * step, 100 * k / count) for k in range(count + 1)],
        {name: [(arms[arm], _interval(e, 0.0, step * count)) for arm, e in row] for name, row in rows.items()},
    )


def _verdicts(comparison: Comparison, arms: Mapping[str, Arm]) -> list[Verdicts]:
    """Differences for each arm and baseline, all on one axis around 0."""
    pairs = [(arm, baseline) for arm in comparison.arms for baseline in comparison.baselines(arm)]
    parts = {pair: [comparison.difference(*pair, name) for name in comparison.names] for pair in pairs}
    step, count = _axis(max([0.005, *_reach(d for part in parts.values() for d in part)]))
    top, ticks = step * count, [(k * step, 50 + 50 * k / count) for k in range(-count, count + 1)]
    return [
        Verdicts(
            arms[arm],
            baseline,
            Lanes(
                comparison.verdict_table(arm, baseline),
                ticks,
                {d.name: [(arms[arm], _interval(d, -top, top))] for d in parts[arm, baseline]},
            ),
        )
        for arm, baseline in pairs
    ]


def _curves(curves: Mapping[str, list[list[StepReport]]], arms: Mapping[str, Arm]) -> list[CurvePlot]:
    """The plots of loss and mean IoU."""
    lines = [(arms[arm], curve) for arm, of_arm in curves.items() for curve in of_arm if curve]
    if not lines:
        return []
    steps = max(curve[-1].step for _, curve in lines)
    every = max(1, math.ceil(steps / _POINTS))
    losses = [(arm, _thinned(curve, every)) for arm, curve in lines]
    scores = [(arm, [(row.step, row.miou) for row in curve if row.miou is not None]) for arm, curve in lines]
    note = "each training" if every == 1 else f"each training, mean of every {every} steps"
    return [
        _plot("Loss", f"{note}; arms differ in the labels that their loss is computed from", losses, 1.0),
        _plot("Mean IoU, %", "each training, on the validation images", scores, 100.0, steps),
    ]


def _thinned(curve: Sequence[StepReport], every: int) -> list[tuple[int, float]]:
    """Last step and mean loss of every so many steps."""
    parts = [curve[k : k + every] for k in range(0, len(curve), every)]
    finite = [(part[-1].step, [row.loss for row in part if math.isfinite(row.loss)]) for part in parts]
    return [(step, sum(losses) / len(losses)) for step, losses in finite if losses]


def _plot(
    title: str, note: str, lines: list[tuple[Arm, list[tuple[int, float]]]], unit: float, steps: int = 0
) -> CurvePlot:
    """A plot whose ticks are multiples of `unit`; its axis ends at `steps`, or where the longest line does."""
    steps = steps or max(x for _, line in lines for x, _ in line)
    step, count = _axis(max([0.01, *(y for _, line in lines for _, y in line)]))
    top = step * count
    return CurvePlot(
        title,
        note,
        steps,
        [(arm, [(100 * x / steps, 100 - 100 * y / top) for x, y in line]) for arm, line in lines],
        [(f"{k * step * unit:g}", 100 * k / count) for k in range(count + 1)],
    )
