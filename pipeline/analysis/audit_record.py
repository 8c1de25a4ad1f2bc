"""The result of an audit as `audit.json` holds it and as people read it; docs/audit.md defines the numbers.

Shares are in 0..1, and None where there is no pixel to compute one from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from autolabel.manifests import storage
from autolabel.manifests.documents import read_json
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.schemas import CONFIDENCE_BINS
from autolabel.manifests.scores import BoundaryF, Confusion, Shares, shares
from autolabel.manifests.wording import MISSING, Shown, Table, counted, number, percent
from autolabel.pipeline.analysis.calibration import Calibration, Reliability, Suggestion

Share = float | None
_SHARES = ("precision", "coverage", "iou_kept", "iou", "ece")


def known_or_none(value: Any) -> Share:
    """A number as a float, or None for NaN, which JSON does not know."""
    return None if math.isnan(value) else float(value)


@dataclass(frozen=True)
class MeanAudit:
    """Means of the classes that have a number; `boundary_f` by distance in pixels."""

    precision: Share
    coverage: Share
    iou_kept: Share
    iou: Share
    ece: Share
    boundary_f: Mapping[str, Share]

    @classmethod
    def of(cls, classes: Sequence[ClassAudit]) -> MeanAudit:
        """The mean of every share."""

        def mean(values: list[Share]) -> Share:
            known = [value for value in values if value is not None]
            return sum(known) / len(known) if known else None

        means = {key: mean([getattr(c, key) for c in classes]) for key in _SHARES}
        across = {distance: mean([c.boundary_f[distance] for c in classes]) for distance in classes[0].boundary_f}
        return cls(**means, boundary_f=across)


@dataclass(frozen=True)
class ClassAudit:
    """One class: its pixels in truth and label, the quality of the label, and the suggested threshold.

    `outlined` is the share of its true pixels that the human coarse labels give the class, None without such labels.
    """

    name: str
    truth_pixels: int
    label_pixels: int
    outlined: Share
    precision: Share
    coverage: Share
    iou_kept: Share
    iou: Share
    ece: Share
    suggested_threshold: Share
    suggested_precision: Share
    suggested_kept: Share
    boundary_f: Mapping[str, Share]

    @property
    def occurs(self) -> bool:
        """True if truth or label has the class."""
        return self.truth_pixels > 0 or self.label_pixels > 0


@dataclass(frozen=True)
class PixelAudit:
    """Shares of the pixels with truth that have a class, and of these, that have the right one."""

    labelled: Share
    right: Share

    @classmethod
    def of(cls, confusion: Confusion) -> PixelAudit | None:
        """The shares of all pixels that were counted, None without any."""
        labelled, right = confusion.predicted_pixels.sum(), confusion.matrix.trace()
        total = confusion.true_pixels.sum()
        return cls(float(labelled / total), float(right / labelled) if labelled else None) if total else None


def audit_classes(
    space: LabelSpace,
    confusion: Confusion,
    human: Confusion,
    boundary: BoundaryF,
    calibration: Calibration | None,
    *,
    suggestion: Suggestion | None,
) -> list[ClassAudit]:
    """One `ClassAudit` per class of the label space, from counts of the labels and of the human coarse labels.

    Without the teacher there is no calibration and no suggestion.
    """
    unknown: Shares = np.full(len(space), np.nan)
    columns = {
        "outlined": human.recall() if human.matrix.any() else unknown,
        "precision": confusion.precision(),
        "coverage": confusion.recall(),
        "iou_kept": confusion.iou_of_kept(),
        "iou": confusion.iou(),
        "ece": calibration.reliability().ece() if calibration else unknown,
        "suggested_threshold": suggestion.threshold if suggestion else unknown,
        "suggested_precision": suggestion.precision if suggestion else unknown,
        "suggested_kept": suggestion.kept if suggestion else unknown,
    }
    f = boundary.f()
    return [
        ClassAudit(
            name=name,
            truth_pixels=int(confusion.true_pixels[k]),
            label_pixels=int(confusion.predicted_pixels[k]),
            **{key: known_or_none(column[k]) for key, column in columns.items()},
            boundary_f={str(d): known_or_none(f[place, k]) for place, d in enumerate(boundary.distances)},
        )
        for k, name in enumerate(space.names)
    ]


@dataclass(frozen=True)
class DiagramBins:
    """Pixels, right pixels and mean confidence in every bin of confidence."""

    pixels: Sequence[int]
    correct: Sequence[int]
    confidence: Sequence[Share]


@dataclass(frozen=True)
class ReliabilityDiagram:
    """Bins between ascending `edges`, for all pixels and by top class, and the expected calibration error of all."""

    edges: Sequence[float]
    ece: Share
    all: DiagramBins
    classes: Mapping[str, DiagramBins]

    def __post_init__(self) -> None:
        for bins in (self.all, *self.classes.values()):
            if {len(bins.pixels), len(bins.correct), len(bins.confidence)} != {len(self.edges) - 1}:
                raise ValueError(f"a reliability diagram with {len(self.edges)} edges has other numbers of bins")

    @classmethod
    def of(cls, space: LabelSpace, calibration: Calibration) -> ReliabilityDiagram:
        """The diagram of all pixels that were counted."""

        def bins(counts: Reliability) -> DiagramBins:
            means = shares(counts.confidence, counts.pixels)
            return DiagramBins(counts.pixels.tolist(), counts.correct.tolist(), list(map(known_or_none, means)))

        by_class, overall = calibration.reliability(), calibration.overall()
        classes = {name: bins(Reliability(*(t[k] for t in by_class))) for k, name in enumerate(space.names)}
        edges = [k / CONFIDENCE_BINS for k in range(CONFIDENCE_BINS + 1)]
        return cls(edges, known_or_none(overall.ece()), bins(overall), classes)


@dataclass(frozen=True)
class FittedTemperature:
    """A temperature before and after the fit, and (before, after) of the sampled pixels: log loss in nats, and ECE."""

    before: float
    fitted: float
    nll: tuple[float, float]
    ece: tuple[Share, Share]


@dataclass(frozen=True)
class CoarseAudit:
    """Agreement of the automatic labels with the human coarse pixels of one class, over all images of the run."""

    name: str
    coarse_pixels: int
    agreement: Share
    contradicted: Share


@dataclass(frozen=True)
class Audit(Shown):
    """The worth of a run's labels on `images` images with truth.

    `leaked` counts those that the teacher was trained on, None if nobody can tell. `human` and `auto` sum up the coarse
    and the automatic labels, None where there is none. `reliability` is None without the teacher, `temperature` unless
    a fit was asked for. `notes` are sentences about what is bad or unknown. `confusion` counts pixels by true class and
    label, in the order of `classes`; its last column counts ignored ones. `unknown` counts pixels without truth in the
    bins of `reliability`, by top class. `human_mean` has the means of the coarse labels. An earlier audit has none of
    the three.
    """

    truth: str
    truth_sha256: str
    images: int
    leaked: int | None
    target_precision: float
    human: PixelAudit | None
    auto: PixelAudit | None
    classes: Sequence[ClassAudit]
    mean: MeanAudit
    reliability: ReliabilityDiagram | None
    temperature: FittedTemperature | None
    coarse: Sequence[CoarseAudit]
    notes: Sequence[str]
    confusion: Sequence[Sequence[int]] = ()
    unknown: Mapping[str, Sequence[int]] = field(default_factory=dict)
    human_mean: MeanAudit | None = None

    def __post_init__(self) -> None:
        bins = len(self.reliability.edges) - 1 if self.reliability else 0
        if any(len(counts) != bins for counts in self.unknown.values()):
            raise ValueError("its pixels without truth are in other bins than its reliability diagram")
        rows = [len(row) for row in self.confusion]
        if self.confusion and rows != [len(self.classes) + 1] * len(self.classes):
            raise ValueError(f"its confusion is no table of {len(self.classes)} classes, and ignored pixels")
        diagram = self.reliability.classes if self.reliability else {}
        strange = {name for name, bins in diagram.items() if any(bins.pixels)} - {row.name for row in self.classes}
        if strange:
            raise ValueError(f"its reliability diagram has a class {min(strange)!r} that its table lacks")
        for row in self.classes:
            if row.boundary_f.keys() != self.mean.boundary_f.keys():
                raise ValueError(f"class {row.name!r} has the boundary F of other distances than the mean")

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        storage.write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Audit:
        """Read the JSON that `write` wrote. Raises BadDocument for anything else."""
        result: Audit = read_json(path, cls, advice="run `autolabel audit` again")
        return result

    def lines(self) -> list[str]:
        """The labels in a sentence, the fitted temperature, and the notes."""
        return [*self.summary(), *(_told(fit) for fit in [self.temperature] if fit), *self.notes]

    def summary(self) -> list[str]:
        """One sentence about the labels of people and the automatic ones."""
        if self.auto is None or self.auto.right is None:
            return []
        auto = f"{percent(self.auto.labelled)} % have a label, and {percent(self.auto.right)} % of these are right."
        if self.human is None or self.human.right is None:
            return [f"Of the pixels with truth, {auto}"]
        human = f"{percent(self.human.labelled)} % of the pixels, {percent(self.human.right)} % of them rightly"
        return [f"People had outlined {human}. Now {auto}"]

    def label_table(self) -> Table:
        """Quality of the labels by class."""
        pixels = sum(row.truth_pixels for row in self.classes)
        distances = [f"F {distance} px" for distance in self.mean.boundary_f]

        def cells(row: ClassAudit | MeanAudit) -> list[str]:
            return list(map(percent, (row.precision, row.coverage, row.iou_kept, row.iou, *row.boundary_f.values())))

        rows = [
            [row.name, percent(row.truth_pixels / pixels if pixels else None, 2), percent(row.outlined), *cells(row)]
            for row in self.classes
            if row.occurs
        ]
        header = ["class", "truth", "outlined", "precision", "coverage", "IoU kept", "IoU", *distances]
        title = f"labels of {counted(self.images, 'image')} against {self.truth}, in %"
        return Table(title, header, [*rows, ["mean", MISSING, MISSING, *cells(self.mean)]], last_is_total=True)

    def threshold_table(self) -> Table | None:
        """Calibration and suggested threshold by class; None without the teacher."""
        if self.reliability is None:
            return None
        rows = [
            [
                row.name, percent(row.ece),
                MISSING if row.suggested_threshold is None else f"{row.suggested_threshold:g}",
                percent(row.suggested_precision), percent(row.suggested_kept),
            ]
            for row in self.classes if row.ece is not None
        ]  # fmt: skip
        rows.append(["all pixels", percent(self.reliability.ece), "", "", ""])
        title = f"calibration, and thresholds for a precision of {percent(self.target_precision)} %"
        return Table(title, ["class", "ECE %", "threshold", "precision %", "kept %"], rows, last_is_total=True)

    def coarse_table(self) -> Table | None:
        """Agreement with human coarse labels by class; None without such labels."""
        rows = [
            [row.name, number(row.coarse_pixels), percent(row.agreement), percent(row.contradicted)]
            for row in self.coarse
            if row.coarse_pixels
        ]
        title = "labels of all images against the human coarse labels"
        return Table(title, ["class", "coarse pixels", "agrees %", "contradicted %"], rows) if rows else None

    def tables(self) -> list[Table]:
        """Labels, thresholds and coarse labels, as far as there are any."""
        return [table for table in (self.label_table(), self.threshold_table(), self.coarse_table()) if table]


def _told(fit: FittedTemperature) -> str:
    (loss, loss_after), (ece, ece_after) = fit.nll, fit.ece
    return (
        f"temperature {fit.before:g} → {fit.fitted:g}: negative log likelihood {loss:.4f} → {loss_after:.4f},"
        f" ECE {percent(ece)} % → {percent(ece_after)} %"
    )
