"""The numbers behind the plots of a report; nothing is drawn here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autolabel.manifests.drawing import OKABE_ITO
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.policy import Policy
from autolabel.manifests.wording import Table
from autolabel.pipeline.analysis.audit_record import Audit, DiagramBins
from autolabel.pipeline.analysis.stats import FATE_NAMES, Summary, coverage_at

_TICKS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # shares marked on the axis of the class distribution
_DOUBTFUL = 0.25  # a class that loses this share of its coarse pixels to other classes is pointed out
FATE_COLOURS = {
    "kept": OKABE_ITO["blue"],
    "below_threshold": OKABE_ITO["orange"],
    "near_boundary": OKABE_ITO["sky"],
    "in_small_piece": OKABE_ITO["yellow"],
    "outside_area": "#8c8c8c",
    "decided_by_human": OKABE_ITO["purple"],
}


def colours(space: LabelSpace) -> dict[str, str]:
    """The colour of every class, for CSS."""
    return {c.name: f"rgb{c.colour}" for c in space.classes}


# --- classes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassPlot:
    """The class distribution: a table, and bars (coarse, auto) by class in per cent of the widest.

    Bars are on a square-root scale. Shares span four orders of magnitude and may be 0: a linear scale hides the rare
    ones, a logarithm has no 0. `lost` classes are in the coarse labels but not in the auto labels. `doubtful` ones are
    those of whose coarse pixels the teacher gives a large share, the number, to other classes. `bad` has the cells of
    the table that are to stand out: class and column.
    """

    table: Table
    bars: dict[str, tuple[float, float]]
    ticks: list[tuple[float, float]]  # a share, and its place on the axis in per cent
    lost: list[str]
    doubtful: dict[str, float]
    bad: list[tuple[str, str]]

    @classmethod
    def of(cls, summary: Summary) -> ClassPlot:
        """The plot of the classes that were seen."""
        rows = summary.classes.loc[summary.seen]
        widest = float(np.nan_to_num(summary.classes[["coarse_share", "auto_share"]].to_numpy()).max())

        def place(share: float) -> float:
            return 100 * math.sqrt(share / widest) if share > 0 else 0.0

        lost = rows[(rows["coarse_pixels"] > 0) & (rows["auto_pixels"] == 0)]
        doubtful = rows[(rows["auto_pixels"] > 0) & (rows["contradicted"] > _DOUBTFUL)]["contradicted"]
        return cls(
            table=summary.class_table(),
            bars={str(n): (place(r["coarse_share"]), place(r["auto_share"])) for n, r in rows.iterrows()},
            ticks=[(tick, place(tick)) for tick in _TICKS if tick <= widest],
            lost=[str(name) for name in lost.index],
            doubtful={str(name): float(share) for name, share in doubtful.items()},
            bad=[
                *((str(name), column) for name in lost.index for column in ("auto %", "agrees %")),
                *((str(name), "contradicted %") for name in rows.index[rows["contradicted"] > _DOUBTFUL]),
            ],
        )


# --- confidence -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassHistogram:
    """The pixels of one top class by confidence, as shares of the highest bin, and the threshold of the class."""

    name: str
    pixels: int
    bins: list[float]
    threshold: float


@dataclass(frozen=True)
class Fate:
    """The fates of the pixels of one top class: (name, colour, share) of each that occurs; the shares sum to 1."""

    name: str
    kept: float
    parts: list[tuple[str, str, float]]


@dataclass(frozen=True)
class ConfidencePlot:
    """Confidences over all pixels, before the threshold.

    `bins` are shares of the pixels in equal bins over 0..1; `curve` pairs thresholds with the share that each would
    keep, and `above` is that of the run's `threshold`, before any other rule of the policy.
    """

    threshold: float
    bins: list[float]
    curve: list[tuple[float, float]]
    above: float
    would_keep: list[tuple[float, float]]
    classes: list[ClassHistogram]
    fates: list[Fate]

    @classmethod
    def of(cls, summary: Summary, policy: Policy) -> ConfidencePlot:
        """The plots of a run."""
        pixels, edges = int(summary.histogram.sum()), np.linspace(0, 1, len(summary.histogram) + 1).tolist()
        curve = [coverage_at(summary.histogram, edge) for edge in edges]
        return cls(
            threshold=policy.threshold,
            bins=(summary.histogram / pixels).tolist() if pixels else [],
            curve=list(zip(edges, curve, strict=True)),
            above=float(np.interp(policy.threshold, edges, curve)),
            would_keep=summary.would_keep,
            classes=class_histograms(summary, policy),
            fates=class_fates(summary),
        )


def class_histograms(summary: Summary, policy: Policy) -> list[ClassHistogram]:
    """The histograms of the classes that are the top class of some pixel."""
    names = [str(name) for name in summary.classes.index]
    return [
        ClassHistogram(name, int(row.sum()), (row / row.max()).tolist(), policy.thresholds.get(name, policy.threshold))
        for name, row in zip(names, summary.histograms, strict=True)
        if row.any()
    ]


def class_fates(summary: Summary) -> list[Fate]:
    """The fates of the classes that are the top class of some pixel."""
    fates = []
    for name, shares in summary.fates.iterrows():
        parts = [(FATE_NAMES[str(f)], FATE_COLOURS[str(f)], float(share)) for f, share in shares.items() if share > 0]
        if parts:
            fates.append(Fate(str(name), float(shares.get("kept", 0.0)), parts))
    return fates


# --- audit ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A bin of a reliability diagram: its place, the share of its pixels that is right, its share of all pixels."""

    left: float
    width: float
    right: float
    share: float


@dataclass(frozen=True)
class ReliabilityPlot:
    """Bars of the reliability diagrams (Guo et al., arXiv 1706.04599) and the expected calibration errors.

    `classes` holds (name, bars, error) of every top class. Empty bins have no bar.
    """

    bars: list[Bar]
    ece: float | None
    classes: list[tuple[str, list[Bar], float | None]]

    @classmethod
    def of(cls, audit: Audit) -> ReliabilityPlot | None:
        """The plot of an audit; None without the teacher's confidences."""
        diagram, errors = audit.reliability, {row.name: row.ece for row in audit.classes}
        if diagram is None:
            return None
        classes = [
            (name, _bars(bins, diagram.edges), errors[name])
            for name, bins in diagram.classes.items()
            if any(bins.pixels)
        ]
        return cls(_bars(diagram.all, diagram.edges), diagram.ece, classes)


def _bars(bins: DiagramBins, edges: Sequence[float]) -> list[Bar]:
    total = sum(bins.pixels)
    rows = zip(edges[:-1], edges[1:], bins.pixels, bins.correct, strict=True)
    return [Bar(left, right - left, correct / n, n / total) for left, right, n, correct in rows if n]
