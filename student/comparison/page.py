"""The page of `autolabel compare`: verdicts, intervals, curves and cost, in one file that opens from disk."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from autolabel.student.comparison.verdicts import MEAN, ArmDifference, Comparison, Estimate
from autolabel.student.train import StepReport

# Okabe and Ito, "Color Universal Design" (2008): told apart with every kind of colour vision. Black follows the text.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "var(--ink)")
# And without colour: marks and dashes.
_MARKS = ("circle", "square", "diamond", "ring")
_DASHES = ("none", "7 3", "2 3", "9 3 2 3")
_POINTS = 80  # of a curve: more are not to be told apart

Mark = dict[str, Any]  # where a dot and its whisker lie, in % of an axis


def render(found: Comparison, out: Path) -> str:
    """The page, complete."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "points": _points, "duration": _duration}
    template = (
        importlib.resources.files("autolabel.student.comparison").joinpath("page.html.j2").read_text(encoding="utf-8")
    )
    cost = {arm: found.cost(arm) for arm in found.arms}
    return environment.from_string(template).render(
        found=found,
        out=out.absolute(),
        mean_name=MEAN,
        arms=[
            {
                "name": arm,
                "colour": _COLOURS[place % len(_COLOURS)],
                "mark": _MARKS[place % len(_MARKS)],
                "dash": _DASHES[place % len(_DASHES)],
                "images_per_s": cost[arm][0],
                "seconds": cost[arm][1],
            }
            for place, arm in enumerate(found.arms)
        ],
        scores=_scores(found),
        verdicts=_verdicts(found),
        curves=_curves(found.curves),
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _axis(longest: float) -> tuple[float, int]:
    """A round distance between ticks, and how many of them, three to six, reach `longest`."""
    power = 10.0 ** math.floor(math.log10(longest or 1.0))
    step = next(power * part for part in (0.2, 0.5, 1.0, 2.0) if longest <= power * part * 5)
    return step, math.ceil(longest / step - 1e-9)


def _ends(values: Iterable[Estimate | ArmDifference]) -> list[float]:
    """How far from 0 means and whiskers reach."""
    return [abs(v.mean) + (v.half or 0.0) for v in values if v.mean is not None]


def _mark(value: Estimate | ArmDifference, low: float, high: float) -> Mark | None:
    if value.mean is None:
        return None
    half = value.half or 0.0

    def place(x: float) -> float:
        return 100 * (min(max(x, low), high) - low) / (high - low)

    left, right = place(value.mean - half), place(value.mean + half)
    return {"dot": place(value.mean), "left": left, "width": right - left}


def _scores(found: Comparison) -> dict[str, Any]:
    """Rows of the table of IoUs, by class and arm, on an axis from 0."""
    rows = [(name, [found.estimate(arm, name) for arm in found.arms]) for name in found.names]
    longest = min(1.0, max([0.01, *_ends(e for _, row in rows for e in row)]))
    step, count = _axis(longest)
    top = step * count
    return {
        "rows": [(name, [(e, _mark(e, 0.0, top)) for e in row]) for name, row in rows],
        "ticks": [(k * step, 100 * k / count) for k in range(count + 1)],
    }


def _verdicts(found: Comparison) -> dict[str, Any]:
    """A list of differences for each arm and baseline, all on one axis around 0."""
    parts = [
        (arm, baseline, [found.difference(arm, baseline, name) for name in found.names])
        for arm in found.arms
        for baseline in found.baselines(arm)
    ]
    longest = max([0.005, *_ends(d for *_, row in parts for d in row)])
    step, count = _axis(longest)
    top = step * count
    return {
        "parts": [(arm, baseline, [(d, _mark(d, -top, top)) for d in row]) for arm, baseline, row in parts],
        "ticks": [(k * step, 50 + 50 * k / count) for k in range(-count, count + 1)],
    }


def _curves(curves: dict[str, list[list[StepReport]]]) -> list[dict[str, Any]]:
    """The plots of loss and mIoU by step: lines of every training, in % of the axes."""
    lines = [(arm, curve) for arm, of_arm in curves.items() for curve in of_arm if curve]
    if not lines:
        return []
    steps = max(curve[-1].step for _, curve in lines)
    every = max(1, math.ceil(steps / _POINTS))
    losses = [(arm, _thinned(curve, every)) for arm, curve in lines]
    scores = [(arm, [(row.step, row.miou) for row in curve if row.miou is not None]) for arm, curve in lines]
    about = "each training" if every == 1 else f"each training, mean of every {every} steps"
    return [
        _plot("Loss", f"{about}; what the loss is taken of differs from arm to arm", losses, steps, 1.0),
        _plot("Mean IoU, %", "each training, on the validation images", scores, steps, 100.0),
    ]


def _thinned(curve: Sequence[StepReport], every: int) -> list[tuple[int, float]]:
    """Last step and mean loss of every so many steps."""
    parts = [curve[k : k + every] for k in range(0, len(curve), every)]
    return [(part[-1].step, sum(row.loss for row in part) / len(part)) for part in parts]


def _plot(
    title: str, about: str, lines: list[tuple[str, list[tuple[int, float]]]], steps: int, unit: float
) -> dict[str, Any]:
    longest = max([0.01, *(y for _, line in lines for _, y in line)])
    step, count = _axis(longest)
    top = step * count
    return {
        "title": title,
        "about": about,
        "steps": steps,
        "lines": [(arm, [(100 * x / steps, 100 - 100 * y / top) for x, y in line]) for arm, line in lines],
        "ticks": [(f"{k * step * unit:g}", 100 * k / count) for k in range(count + 1)],
    }
