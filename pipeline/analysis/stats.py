"""Sum up a run from its parquet statistics alone: no image is opened and no teacher runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.schemas import CONFIDENCE_BINS, FATES
from autolabel.manifests.wording import Shown, Table, counted, listed, number, percent, points, probability, size
from autolabel.pipeline.focus_counts import FocusCounts

# The words for what can become of a pixel, everywhere that people read them.
FATE_NAMES = {
    "kept": "kept",
    "below_threshold": "below its threshold",
    "near_boundary": "near a boundary",
    "in_small_piece": "in too small a piece",
    "outside_area": "outside the area",
    "decided_by_human": "decided by a human",
}
_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # the coverage that each would give is shown
_FATES = {f"{fate}_pixels": fate for fate in FATES}  # fates by their columns in the classes table
_SUMMED = ("pixels", "coarse_pixels", "agreeing_pixels", "contradicted_pixels", *_FATES)


@dataclass(frozen=True)
class Summary(Shown):
    """The labels of a run, class by class and in total. Shares of no pixel are NaN.

    `classes` has one row per class of the label space, indexed by name, with the columns

    images            images in which the auto label has the class
    coarse_pixels, coarse_share    pixels of the class in the coarse labels, and their share of all coarse pixels
    auto_pixels, auto_share        the same for the auto labels
    kept              share of the pixels of this top class that the teacher's rules keep
    confidence        mean confidence of the pixels of this top class, before the threshold
    agreement         share of the coarse pixels of the class that the auto label confirms
    contradicted      share of the coarse pixels of the class that the auto label gives to another class

    `fates` has the same rows and one column for each of FATES that occurs: the share of the pixels of this top class
    that met it. `histograms` (C, 20) int64 counts confidences before the threshold, by top class. The other fields are
    about all pixels of all images; focus is None for a run whose highest scale saw all.
    """

    run: Path
    classes: pd.DataFrame
    fates: pd.DataFrame
    images: int
    pixels: int
    coarse_coverage: float
    auto_coverage: float
    kept: float
    confidence: float
    agreement: float
    label_bytes: int
    histograms: NDArray[np.int64]
    focus: FocusCounts | None = None

    @property
    def histogram(self) -> NDArray[np.int64]:
        """Confidences of all classes before the threshold, (20,) int64."""
        total: NDArray[np.int64] = self.histograms.sum(axis=0)
        return total

    @property
    def has_coarse(self) -> bool:
        """True if any image has a coarse label."""
        return self.coarse_coverage > 0

    @property
    def seen(self) -> list[str]:
        """The classes that a label has, or that the teacher chose for some pixel."""
        rows = self.classes
        return [str(name) for name in rows.index[(rows["coarse_pixels"] > 0) | rows["kept"].notna()]]

    @property
    def unseen(self) -> list[str]:
        """The other classes of the label space."""
        return [str(name) for name in self.classes.index if name not in self.seen]

    @property
    def would_keep(self) -> list[tuple[float, float]]:
        """Pairs of a threshold and the share of all pixels above it."""
        return [(threshold, coverage_at(self.histogram, threshold)) for threshold in _THRESHOLDS]

    def class_table(self) -> Table:
        """One row for each class that was seen, and the total; columns about coarse labels only if there are any."""

        columns = ["coarse %", "auto %", "images", "kept %", "confidence", "agrees %", "contradicted %"]
        rows = [
            [
                percent(row["coarse_share"], 2), percent(row["auto_share"], 2), number(int(row["images"])),
                percent(row["kept"]), probability(row["confidence"]), percent(row["agreement"]),
                percent(row["contradicted"]),
            ]
            for _, row in self.classes.loc[self.seen].iterrows()
        ]  # fmt: skip
        sums = (self.classes[name].sum(min_count=1) for name in ("coarse_share", "auto_share"))
        whole = [*(percent(total, 2) for total in sums), number(self.images), percent(self.kept)]
        rows.append([*whole, probability(self.confidence), percent(self.agreement), ""])
        shown = slice(None) if self.has_coarse else slice(1, -2)
        return Table(
            f"{self.run}: {counted(self.images, 'image')}",
            ["class", *columns[shown]],
            [[name, *row[shown]] for name, row in zip([*self.seen, "all"], rows, strict=True)],
            last_is_total=True,
            notes=[f"In no label, and never the teacher's choice: {listed(self.unseen)}."] if self.unseen else [],
        )

    def fate_table(self) -> Table:
        """The fates of the pixels of each top class, in per cent."""
        rows = [[str(name), *map(percent, shares)] for name, shares in self.fates.iterrows() if shares.notna().any()]
        header = ["class", *(FATE_NAMES[fate] for fate in self.fates.columns)]
        return Table("what became of the pixels of each top class, in %", header, rows)

    def lines(self) -> list[str]:
        """The totals."""
        nothing = [
            f"{self.run} keeps no pixel: every label is 'ignore' alone. Another --policy or --threshold keeps more."
        ]
        coarse = f"{percent(self.coarse_coverage)} % in the coarse labels, " if self.has_coarse else ""
        each = self.label_bytes / self.images if self.images else None
        return [
            *(nothing if self.auto_coverage == 0 else []),
            f"pixels with a class: {coarse}{percent(self.auto_coverage)} % in the auto labels",
            *([str(self.focus)] if self.focus else []),
            f"a threshold would keep {', '.join(f'{percent(share)} % at {t:g}' for t, share in self.would_keep)}",
            f"label size: {size(each)} an image",
            f"the least trusted images: {RunFolder(self.run).statistics_path('review')}",
        ]

    def tables(self) -> list[Table]:
        """The table of classes, and that of fates if the teacher chose any class."""
        return [self.class_table(), *([self.fate_table()] if len(self.fates.columns) else [])]


def _share(part: pd.Series, whole: pd.Series | float) -> pd.Series:
    return part.astype(float) / (whole.where(whole > 0) if isinstance(whole, pd.Series) else whole or float("nan"))


def summarise(run: RunFolder | Path) -> Summary:
    """Sum up a finished run in constant memory. Raises BadTable if its statistics or manifest are missing."""
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    space = folder.manifest.label_space
    sums = {name: np.zeros(len(space), np.int64) for name in (*_SUMMED, "images")}
    confidence = np.zeros(len(space))
    histograms = np.zeros((len(space), CONFIDENCE_BINS), np.int64)
    columns = ["class_id", "mean_confidence", "confidence_hist", *_SUMMED]
    for rows in folder.stream_statistics("classes", columns):
        ids = rows["class_id"].to_numpy()
        for name in _SUMMED:
            np.add.at(sums[name], ids, rows[name].to_numpy())
        np.add.at(sums["images"], ids, rows["pixels"].to_numpy() > 0)
        counts = rows["confidence_hist"].combine_chunks().flatten().to_numpy().reshape(-1, CONFIDENCE_BINS)
        np.add.at(histograms, ids, counts)
        np.add.at(confidence, ids, np.nan_to_num(rows["mean_confidence"].to_numpy()) * counts.sum(axis=1))
    images = pixels = coarse = labelled = label_bytes = 0
    columns = ["height", "width", "coarse_pixels", "labelled_pixels", "label_bytes"]
    for rows in folder.stream_statistics("images", columns):
        images += len(rows)
        pixels += int((rows["height"].to_numpy().astype(np.int64) * rows["width"].to_numpy()).sum())
        coarse += int(rows["coarse_pixels"].to_numpy().sum())
        labelled += int(rows["labelled_pixels"].to_numpy().sum())
        label_bytes += int(rows["label_bytes"].to_numpy().sum())
    index = pd.Index(space.names, name="class")
    summed = pd.DataFrame({**sums, "confidence": confidence, "seen": histograms.sum(axis=1)}, index=index)
    classes = pd.DataFrame(
        {
            "images": summed["images"],
            "coarse_pixels": summed["coarse_pixels"],
            "coarse_share": _share(summed["coarse_pixels"], float(summed["coarse_pixels"].sum())),
            "auto_pixels": summed["pixels"],
            "auto_share": _share(summed["pixels"], float(summed["pixels"].sum())),
            "kept": _share(summed["kept_pixels"], summed["seen"]),
            "confidence": _share(summed["confidence"], summed["seen"]),
            "agreement": _share(summed["agreeing_pixels"], summed["coarse_pixels"]),
            "contradicted": _share(summed["contradicted_pixels"], summed["coarse_pixels"]),
        }
    )
    fates = {fate: _share(summed[name], summed["seen"]) for name, fate in _FATES.items() if sums[name].any()}
    agreeing = int(sums["agreeing_pixels"].sum())
    nan = float("nan")
    return Summary(
        run=folder.path,
        classes=classes,
        fates=pd.DataFrame(fates, index=index),
        images=images,
        pixels=pixels,
        coarse_coverage=coarse / pixels if pixels else nan,
        auto_coverage=labelled / pixels if pixels else nan,
        kept=int(sums["kept_pixels"].sum()) / pixels if pixels else nan,
        confidence=float(confidence.sum()) / pixels if pixels else nan,
        agreement=agreeing / coarse if coarse else nan,
        label_bytes=label_bytes,
        histograms=histograms,
        focus=FocusCounts.of(folder),
    )


def coverage_at(histogram: NDArray[np.int64], threshold: float) -> float:
    """Share of the pixels that a threshold (a multiple of 1/20) would keep."""
    kept = int(histogram[round(threshold * CONFIDENCE_BINS) :].sum())
    total = int(histogram.sum())
    return kept / total if total else float("nan")


@dataclass(frozen=True)
class OtherThreshold(Shown):
    """The share of each class that another threshold would keep, if no other rule of a policy took part.

    `classes` has one row per class of the label space: `pixels` of this top class, the share `kept` of them, its
    `share` of all that is kept, and `kept_now`, `share_now` in the run. Shares of no pixel are NaN.
    """

    run: Path
    threshold: float
    classes: pd.DataFrame

    def tables(self) -> list[Table]:
        """One row for each class that the teacher chose: now, at the other threshold, and the change in points."""
        at = f"at {self.threshold:g}"
        rows = [
            [
                str(name), number(int(row["pixels"])), percent(row["kept_now"]), percent(row["kept"]),
                points(row["kept"] - row["kept_now"]), percent(row["share_now"], 2), percent(row["share"], 2),
                points(row["share"] - row["share_now"], 2),
            ]
            for name, row in self.classes.iterrows() if row["pixels"]
        ]  # fmt: skip
        note = (
            f"{at.capitalize()} the teacher's top class alone decides; only now includes the other rules of the policy."
        )
        header = ["class", "pixels", "kept % now", at, "change", "of labels % now", at, "change"]
        return [Table(f"{self.run}: kept now, and at threshold {self.threshold:g}", header, rows, notes=[note])]


def at_threshold(summary: Summary, threshold: float) -> OtherThreshold:
    """Compute what another threshold would keep of the teacher's own classes, without human labels and other rules.

    Raises ValueError unless the histograms know the threshold: it must be a multiple of 0.05.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold {threshold:g}: expected a probability from 0 to 1, such as 0.7")
    edge = threshold * CONFIDENCE_BINS
    if abs(edge - round(edge)) > 1e-9:
        below, above = math.floor(edge) / CONFIDENCE_BINS, math.ceil(edge) / CONFIDENCE_BINS
        raise ValueError(
            f"threshold {threshold:g}: the statistics count confidence in steps of {1 / CONFIDENCE_BINS:g}; the"
            f" nearest that they know are {below:g} and {above:g}"
        )
    pixels, kept = (
        pd.Series(n, index=summary.classes.index)
        for n in (summary.histograms.sum(axis=1), summary.histograms[:, round(edge) :].sum(axis=1))
    )
    columns = {
        "pixels": pixels,
        "kept_now": summary.classes["kept"],
        "kept": _share(kept, pixels),
        "share_now": summary.classes["auto_share"],
        "share": _share(kept, float(kept.sum())),
    }
    return OtherThreshold(summary.run, threshold, pd.DataFrame(columns))
