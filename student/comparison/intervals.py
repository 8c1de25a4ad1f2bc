"""Means over a few seeds: their intervals, the chance of a difference, and how many differences come by chance.

Intervals are Student's t at 95 % ("The probable error of a mean", Biometrika 6, 1908), the control of false discoveries
is that of Benjamini and Hochberg (J. R. Statist. Soc. B 57, 1995).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autolabel.manifests.wording import percent

LEVEL = 0.05  # share of differences between equal arms whose interval excludes 0
HOLDS = "\N{DAGGER}"  # marks a verdict that also holds at a false discovery rate of LEVEL
_WIDEST = 13.0  # above the quantile for one degree of freedom, 12.706


def two_sided(t: float, freedom: int) -> float:
    """Return the chance that Student's t lies at least as far from 0 as `t`.

    Finite sums for whole degrees of freedom: Abramowitz and Stegun, 26.7.3 and 26.7.4. Raises ValueError for less than
    one degree of freedom.
    """
    if freedom < 1:
        raise ValueError(f"{freedom} degrees of freedom: expected 1 or more, which needs two seeds")
    angle = math.atan2(abs(t), math.sqrt(freedom))
    odd, square = freedom % 2, math.cos(angle) ** 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(2 + odd, freedom - 1, 2):
        term *= square * (k - 1) / k
        total += term
    within = (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total
    return max(0.0, 1.0 - within)


@functools.lru_cache
def t_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t. Raises ValueError for less than one degree of freedom."""
    low, high = 0.0, _WIDEST
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if two_sided(middle, freedom) > LEVEL else (low, middle)
    return high


def with_half(text: str, half: float | None, *, impossible: bool) -> str:
    """Return a number with half of its interval; a star where the interval holds numbers that no IoU can have."""
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
        return with_half(percent(self.mean), self.half, impossible=self.impossible)

    def p_value(self, seeds: int) -> float | None:
        """Return the chance of a mean at least as far from 0, if the true one is 0.

        None without an interval, and where every seed has the number 0: nothing can come of that by chance.
        """
        if self.mean is None or self.half is None or not (self.mean or self.half):
            return None
        t = self.mean / self.half * t_quantile(seeds - 1) if self.half else math.inf
        return two_sided(t, seeds - 1)


def estimate(values: Sequence[float | None]) -> Estimate:
    """Estimate the mean and its interval from one number for each seed."""
    numbers = np.array([v for v in values if v is not None], np.float64)
    if not len(numbers) or len(numbers) < len(values) or np.isnan(numbers).any():
        return Estimate(None, None)
    mean, n = float(numbers.mean()), len(numbers)
    return Estimate(mean, t_quantile(n - 1) * float(numbers.std(ddof=1)) / math.sqrt(n) if n > 1 else None)


@dataclass(frozen=True)
class Pairing:
    """How much two arms go together over the seeds, and what pairing them buys.

    correlation: Pearson's, of the numbers with the same seed. ratio: width of the paired interval of their difference,
    divided by that of an unpaired one, Student's for two samples with 2n - 2 degrees of freedom.
    """

    correlation: float
    ratio: float

    def __str__(self) -> str:
        """One sentence."""
        return (
            f"By seed, the mean IoUs of the two arms correlate with {self.correlation:+.2f}: the paired interval is"
            f" {self.ratio:.2f} times as wide as an unpaired one."
        ).replace("-", "\N{MINUS SIGN}")


def pairing(a: Sequence[float | None], b: Sequence[float | None]) -> Pairing | None:
    """Compare the numbers of two arms by seed; None with fewer than three seeds, or if an arm's are all the same."""
    if len(a) < 3 or None in a or None in b or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    x, y = np.array(a, np.float64), np.array(b, np.float64)
    n, unpaired = len(x), math.sqrt(x.var(ddof=1) + y.var(ddof=1))
    ratio = t_quantile(n - 1) * float((x - y).std(ddof=1)) / (t_quantile(2 * n - 2) * unpaired)
    return Pairing(float(np.corrcoef(x, y)[0, 1]), ratio)


@dataclass(frozen=True)
class Chance:
    """How many intervals of differences exclude 0, and how many would if no arm differed.

    intervals: all that are judged; excluding, losses: those without 0, and those below it; largest: the largest p value
    that still counts when the rate of false discoveries is held at LEVEL, or -1; holding: the number of such verdicts.
    """

    intervals: int
    excluding: int
    losses: int
    largest: float
    holding: int

    @classmethod
    def of(cls, p_values: Sequence[float], *, excluding: int, losses: int) -> Chance:
        """Count from the p values of all judged differences."""
        n = len(p_values)
        # Of the ordered values, the last one below its share of the level takes all before it along.
        below = [p for rank, p in enumerate(sorted(p_values), start=1) if p <= LEVEL * rank / n]
        largest = max(below, default=-1.0)
        return cls(n, excluding, losses, largest, sum(p <= largest for p in p_values))

    @property
    def expected(self) -> float:
        """The number of intervals that would exclude 0 if no arm differed; half of them would be losses."""
        return LEVEL * self.intervals

    def record(self) -> dict[str, float]:
        """The counts as JSON."""
        expected = {"expected": self.expected, "expected_losses": self.expected / 2}
        counts = {"intervals": self.intervals, "excluding_0": self.excluding, "losses": self.losses}
        return {**counts, **expected, "holding": self.holding}

    def __str__(self) -> str:
        """Two sentences, and a third if there is any verdict."""
        expected, losses = (f"{x:.1f}".removesuffix(".0") for x in (self.expected, self.expected / 2))
        held = f" {self.holding} of the {self.excluding} also hold at a false discovery rate of 5 % ({HOLDS})."
        return (
            f"{self.excluding} of {self.intervals} intervals exclude 0, {self.losses} of them as losses. By chance"
            f" about {expected} would, {losses} of them as losses, if no arm differed.{held if self.excluding else ''}"
        )
