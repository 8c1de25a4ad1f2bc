"""The page of `autolabel compare`: verdicts, intervals, curves and cost, in one file that opens from disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autolabel.manifests import pages
from autolabel.manifests.drawing import OKABE_ITO
from autolabel.manifests.wording import Table, listed
from autolabel.student.comparison.intervals import Estimate
from autolabel.student.comparison.verdicts import MEAN, ArmDifference, Comparison
from autolabel.student.steps import StepReport

# An arm is told apart by its colour, and without colours by its mark and dash. The last colour follows the text.
_COLOURS = (*(OKABE_ITO[c] for c in ("blue", "orange", "green", "purple", "sky", "vermilion", "yellow")), "var(--ink)")
_MARKS = ("circle", "square", "diamond", "ring")
_DASHES = ("none", "7 3", "2 3", "9 3 2 3")
_NARROWEST = 0.02  # an axis of differences is cut no nearer to 0 than two points
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
    """A dot and its whisker on an axis, in per cent of it.

    `off` is "left" or "right" if the mean lies beyond that end of the axis, where an arrow takes the dot's place;
    `cut_left`, `cut_right`: the whisker goes on beyond that end.
    """

    dot: float
    left: float
    width: float
    off: str = ""
    cut_left: bool = False
    cut_right: bool = False


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
    title: str
    arms: list[Arm]
    scores: Lanes
    verdicts: list[Verdicts]
    curves: list[CurvePlot]
    mean: str = MEAN


def render(comparison: Comparison) -> str:
    """The page as HTML. It names no folder of this machine, because it is meant to be sent."""
    return pages.render("student/comparison/page.html.j2", page=page_of(comparison))


def page_of(comparison: Comparison) -> ComparisonPage:
    """Everything that the page shows, as typed values."""
    arms = {
        name: Arm(name, *(kinds[place % len(kinds)] for kinds in (_COLOURS, _MARKS, _DASHES)))
        for place, name in enumerate(comparison.arms)
    }
    return ComparisonPage(
        comparison,
        title(comparison.arms),
        list(arms.values()),
        _scores(comparison, arms),
        _verdicts(comparison, arms),
        _curves(comparison.curves, arms),
    )


def title(arms: Sequence[str]) -> str:
    """ "fine + auto against fine", or "fine + a and fine + b against fine"."""
    return f"{listed(arms[1:])} against {arms[0]}" if len(arms) > 1 else arms[0]


def _axis(longest: float) -> tuple[float, int]:
    """A round distance between ticks, and how many of them, three to six, reach `longest`."""
    power = 10.0 ** math.floor(math.log10(longest or 1.0))
    step = next(power * part for part in (0.2, 0.5, 1.0, 2.0) if longest <= power * part * 5)
    return step, math.ceil(longest / step - 1e-9)


def _reach(values: Iterable[Estimate | ArmDifference]) -> float:
    """The distance from 0 that an axis shows: that of the farthest mean or whisker, unless few go far beyond the rest.

    Four times what half of them reach is enough for all but a wild class, which gets an arrow.
    """
    ends = sorted(abs(v.mean) + (v.half or 0.0) for v in values if v.mean is not None)
    if not ends:
        return 0.0
    return min(1.0, ends[-1], max(4 * ends[len(ends) // 2], _NARROWEST))


def _interval(value: Estimate | ArmDifference, low: float, high: float, *, least: float) -> Interval | None:
    """The place of a number on an axis from `low` to `high`; None if there is no number.

    What no IoU can be, below `least` or above 1, is cut off without an arrow.
    """
    if value.mean is None:
        return None
    half = value.half or 0.0
    left, right = max(value.mean - half, least), min(value.mean + half, 1.0)

    def place(x: float) -> float:
        return 100 * (min(max(x, low), high) - low) / (high - low)

    return Interval(
        place(value.mean),
        place(left),
        place(right) - place(left),
        off="left" if value.mean < low else "right" if value.mean > high else "",
        cut_left=bool(half) and left < low,
        cut_right=bool(half) and right > high,
    )


def _scores(comparison: Comparison, arms: Mapping[str, Arm]) -> Lanes:
    """IoU by class and arm, on an axis from 0."""
    rows = {name: [(arm, comparison.estimate(arm, name)) for arm in comparison.arms] for name in comparison.names}
    # IoUs are plain numbers between 0 and 1: nothing but a whisker may leave the axis.
    means = [e.mean for row in rows.values() for _, e in row if e.mean is not None]
    step, count = _axis(max([0.01, _reach(e for row in rows.values() for _, e in row), *means]))
    return Lanes(
        comparison.score_table(),
        [(k * step, 100 * k / count) for k in range(count + 1)],
        {
            name: [(arms[arm], _interval(e, 0.0, step * count, least=0.0)) for arm, e in row]
            for name, row in rows.items()
        },
    )


def _verdicts(comparison: Comparison, arms: Mapping[str, Arm]) -> list[Verdicts]:
    """Differences for each arm and baseline, all on one axis around 0, which a few wild classes cannot stretch."""
    pairs = [(arm, baseline) for arm in comparison.arms for baseline in comparison.baselines(arm)]
    parts = {pair: [comparison.difference(*pair, name) for name in comparison.names] for pair in pairs}
    step, count = _axis(max(0.005, _reach(d for part in parts.values() for d in part)))
    top, ticks = step * count, [(k * step, 50 + 50 * k / count) for k in range(-count, count + 1)]
    return [
        Verdicts(
            arms[arm],
            baseline,
            Lanes(
                comparison.verdict_table(arm, baseline),
                ticks,
                {d.name: [(arms[arm], _interval(d, -top, top, least=-1.0))] for d in parts[arm, baseline]},
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
