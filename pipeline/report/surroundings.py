"""The numbers behind the plots of people's polygons: the classes around them, and the wrong pixels inside.

A page draws them with `polygons.html.j2`; the report of a run does, and so can any page that has counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.evidence import INSIDE, OUTSIDE, PolygonCounts
from autolabel.manifests.wording import Table, counted, listed, number, percent

_LEAST = 0.005  # a class with a smaller share in every bin of a plot belongs to "others"
_FEW = 20  # pixels of a bin; with fewer it is left empty
_TICKS = 5  # bins whose upper ends are marked on the axis
OTHERS, FAR = "others", "any"

Shares = NDArray[np.float64]


@dataclass(frozen=True)
class Layer:
    """The share of one true class over the bins of distance: the outline of its area in a plot of `bins` x 100."""

    name: str
    share: float  # of all pixels of the plot
    outline: str


@dataclass(frozen=True)
class Surrounding:
    """The unnamed pixels whose nearest polygon is of one class: their true classes, stacked from `name` upwards."""

    name: str
    pixels: int
    said: str
    layers: list[Layer]


@dataclass(frozen=True)
class PolygonPlot:
    """The plots of counts of polygons, in pixels of images of one width.

    `classes`: all names. `bins`: the number of bins of distance. `ticks`: pairs of a place on the axis in per cent, and
    its distance. `inside`: the share of wrong pixels in polygons, by class and depth; without rows if none is wrong.
    `unseen`: classes of which no unnamed pixel was counted. `beside_teacher`: a teacher was asked, too.
    """

    width: int
    classes: tuple[str, ...]
    images: str
    bins: int
    ticks: list[tuple[float, str]]
    around: list[Surrounding]
    inside: Table
    unseen: list[str]
    beside_teacher: bool

    @property
    def few(self) -> int:
        """Distances with fewer pixels are left empty."""
        return _FEW

    @property
    def legend(self) -> list[str]:
        """The classes that some plot shows, in the order of the label space; "others" last."""
        shown = {layer.name for one in self.around for layer in one.layers}
        return [name for name in (*self.classes, OTHERS) if name in shown]

    @classmethod
    def of(cls, counts: PolygonCounts, *, width: int) -> PolygonPlot:
        """The plots of these counts, with distances in pixels of images of this width.

        Bins at whose distances no pixel can lie, in images as small as those that were counted, are left out.
        """
        used = np.flatnonzero(counts.counts.any(axis=(0, 2)))
        ends = [pixels(end * width) for end in np.array([*OUTSIDE, np.inf])[used]]
        around = [
            _surrounding(counts.classes, n, counts.counts[n, used], ends)
            for n in range(len(counts.classes))
            if counts.counts[n].any()
        ]
        marked = np.unique(np.linspace(0, max(0, len(used) - 2), _TICKS).round().astype(int)).tolist()
        ticks = [(100 * (k + 1) / len(used), ends[k]) for k in marked if ends[k] != FAR]
        return cls(
            width, counts.classes, counted_on(counts.sizes), len(used), ticks, around, _inside(counts, width),
            list(counts.unseen), bool(counts.beside_teacher),
        )  # fmt: skip


def counted_on(sizes: Mapping[str, int]) -> str:
    """{"480x360": 62} -> "62 images of 480 × 360"."""
    return listed([f"{counted(n, 'image')} of {size.replace('x', ' × ')}" for size, n in sizes.items()])


def pixels(distance: float) -> str:
    """A distance in pixels as people say it: 1.01 -> "1", 4.27 -> "4.3", 12.8 -> "13"; inf -> FAR."""
    if distance == np.inf:
        return FAR
    return f"{distance:.0f}" if distance >= 9.5 else f"{distance:.1f}".removesuffix(".0")


def _surrounding(names: Sequence[str], n: int, table: NDArray[np.int64], ends: Sequence[str]) -> Surrounding:
    """The plot of the polygons of class n: table (bins, C), counts of true classes."""
    rows, sums = table.sum(axis=1), table.sum(axis=0)
    shares: Shares = np.where(rows[:, None] >= _FEW, table / np.maximum(rows, 1)[:, None], 0)
    others = [int(c) for c in np.argsort(-sums, kind="stable") if c != n]
    shown = [n, *(c for c in others if (shares[:, c] >= _LEAST).any())]
    rest = [c for c in others if c not in shown and sums[c]]
    stack = [(names[c], shares[:, c], sums[c]) for c in shown]
    if rest:
        stack.append((OTHERS, shares[:, rest].sum(axis=1), sums[rest].sum()))
    layers, floor, total = [], np.zeros(len(rows)), int(rows.sum())
    for name, share, count in stack:
        if share.any():
            layers.append(Layer(name, float(count) / total, _outline(floor, floor + share)))
        floor = floor + share
    return Surrounding(names[n], total, _reach(names[n], shares[:, n], rows, ends), layers)


def _reach(name: str, own: Shares, rows: NDArray[np.int64], ends: Sequence[str]) -> str:
    """The distance up to which most pixels are of the polygon's own class, in words."""
    enough = rows >= _FEW
    if not enough.any():
        return "too few pixels to say"
    nearest, below = int(enough.argmax()), np.flatnonzero(enough & (own <= 0.5))
    if not len(below):
        return f"mostly {name} everywhere"
    if below[0] == nearest:
        return f"{percent(own[nearest], 0)} % {name} within {ends[nearest]} px"
    return f"mostly {name} up to {ends[below[0] - 1]} px"


def _outline(low: Shares, high: Shares) -> str:
    """The area between two stairs with a step a bin, as the path of an SVG whose y goes down from 100."""

    def stairs(values: Shares) -> list[tuple[int, str]]:
        return [(k, f"{100 - 100 * value:.4g}") for k, value in enumerate(values.tolist())]

    up = "".join(f"V{y}H{k + 1}" for k, y in stairs(high))
    down = "".join(f"V{y}H{k}" for k, y in reversed(stairs(low)))
    return f"M0 {100 - 100 * low[0]:.4g}{up}{down}Z"


def _inside(counts: PolygonCounts, width: int) -> Table:
    """The share of wrong pixels in polygons, by class and by the distance from their own edge."""
    table = np.array(counts.inside, np.int64)
    columns = [f"to {pixels(end * width)} px" for end in INSIDE] + [f"over {pixels(INSIDE[-1] * width)} px"]

    def row(name: str, rights: NDArray[np.int64]) -> list[str]:
        every = np.concatenate([rights, rights.sum(axis=0)[None]])
        shares = [None if not n else float(wrong / n) for wrong, n in zip(every[:, 1], every.sum(axis=1), strict=True)]
        return [name, *map(percent, shares)]

    rows = [row(name, table[n]) for n, name in enumerate(counts.classes) if table[n].any()]
    right = not table[..., 1].any()
    return Table(
        "Wrong pixels inside polygons, in %, by the distance from the polygon's own edge",
        [] if right else ["class", *columns, "all"],
        [] if right else [*rows, row("all", table.sum(axis=0))],
        last_is_total=True,
        notes=[f"Of {number(int(table.sum()))} pixels with truth inside polygons none is wrong."] if right else [],
    )
