"""What a run's labels look like, from its parquet statistics alone: no image is opened, no teacher is run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.policy import Policy, policy_of
from autolabel.manifests.run.folder import read_about
from autolabel.manifests.samples import open_manifest
from autolabel.manifests.schemas import CONFIDENCE_BINS, FATES
from autolabel.manifests.tables import stream_statistics

_FATES = {f"{fate}_pixels": fate for fate in FATES}  # by column of the classes table
_MOST_OUTLINED = 0.99
_SUMMED = ("pixels", "coarse_pixels", "agreeing_pixels", "contradicted_pixels", *_FATES)


@dataclass(frozen=True)
class Summary:
    """`classes` has one row per class of the label space, indexed by name, with the columns

    images            images in which the auto label has the class
    coarse_pixels, coarse_share    pixels of the class in the coarse labels, and their share of all coarse pixels
    auto_pixels, auto_share        the same for the auto labels
    kept              share of the pixels whose top class it is that the teacher's rules keep
    confidence        mean confidence over those pixels, before the threshold
    agreement         share of its coarse pixels that the auto label confirms
    contradicted        share of its coarse pixels that the auto label gives to another class

    `fates` has the same rows: the share of the pixels whose top class it is by what became of them, a column for each
    of FATES that occurs. The rest is about all pixels of all images. Shares without any pixel are NaN.
    """

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
    histograms: NDArray[np.int64]  # (C, 20) confidences before the threshold, by top class

    @property
    def histogram(self) -> NDArray[np.int64]:
        """(20,) confidences before the threshold, all classes."""
        total: NDArray[np.int64] = self.histograms.sum(axis=0)
        return total


def _share(part: pd.Series, whole: pd.Series | float) -> pd.Series:
    return part.astype(float) / (whole.where(whole > 0) if isinstance(whole, pd.Series) else whole or float("nan"))


def summarise(run: Path) -> Summary:
    """Sum up a finished run, piece by piece. Raises BadTable if its statistics or manifest are not there."""
    space: LabelSpace = open_manifest(run / "manifest.parquet").label_space
    sums = {name: np.zeros(len(space), np.int64) for name in (*_SUMMED, "images")}
    confidence = np.zeros(len(space))
    histograms = np.zeros((len(space), CONFIDENCE_BINS), np.int64)
    asked = ["class_id", "mean_confidence", "confidence_hist", *_SUMMED]
    for rows in stream_statistics(run, "classes", asked):
        ids = rows["class_id"].to_numpy()
        for name in _SUMMED:
            np.add.at(sums[name], ids, rows[name].to_numpy())
        np.add.at(sums["images"], ids, rows["pixels"].to_numpy() > 0)
        counts = rows["confidence_hist"].combine_chunks().flatten().to_numpy().reshape(-1, CONFIDENCE_BINS)
        np.add.at(histograms, ids, counts)
        np.add.at(confidence, ids, np.nan_to_num(rows["mean_confidence"].to_numpy()) * counts.sum(axis=1))
    images = pixels = coarse = labelled = label_bytes = 0
    for rows in stream_statistics(
        run, "images", ["height", "width", "coarse_pixels", "labelled_pixels", "label_bytes"]
    ):
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
    )


def outlined(run: Path) -> tuple[pd.DataFrame, Policy]:
    """How much of each class people outline, as far as the teacher can tell; and the run's policy with that in it.

    One row per class of the label space: `named`, pixels of it in the coarse labels, `left_out`, pixels whose top class
    it is in these images where the coarse labels name none, and `share`, the part of both that is named; NaN without
    any pixel, and at most 0.99, because a teacher that never found a class outside proves little. Raises ValueError for
    a run without coarse labels, BadTable.
    """
    space: LabelSpace = open_manifest(run / "manifest.parquet").label_space
    named, left_out = np.zeros((2, len(space)), np.int64)
    for rows in stream_statistics(run, "classes", ["class_id", "coarse_pixels", "undrawn_pixels"]):
        np.add.at(named, rows["class_id"].to_numpy(), rows["coarse_pixels"].to_numpy())
        np.add.at(left_out, rows["class_id"].to_numpy(), rows["undrawn_pixels"].to_numpy())
    if not named.any():
        raise ValueError(f"{run} has no coarse label: nobody outlined anything in its images")
    counts = pd.DataFrame({"named": named, "left_out": left_out}, index=pd.Index(space.names, name="class"))
    found = counts.assign(share=_share(counts["named"], counts.sum(axis=1)).clip(upper=_MOST_OUTLINED))
    before = policy_of(read_about(run)["policy"])
    shares = {str(name): round(share, 4) for name, share in found["share"].dropna().items()}
    return found, replace(before, name=before.name.removesuffix("-outlined") + "-outlined", outlined=shares)


def coverage_at(histogram: NDArray[np.int64], threshold: float) -> float:
    """Share of the pixels that a threshold (a multiple of 1/20) would keep."""
    kept = int(histogram[round(threshold * CONFIDENCE_BINS) :].sum())
    total = int(histogram.sum())
    return kept / total if total else float("nan")


def at_threshold(summary: Summary, threshold: float) -> pd.DataFrame:
    """What another threshold would keep of the teacher's own classes: no human rule, region or the like is part of it.

    One row per class of the label space: `pixels` (whose top class it is), `kept` (share of them), `share` (of all that
    is kept), and `kept_now`, `share_now` as the run has them. NaN without any pixel. Raises ValueError unless the
    histograms know the threshold: a multiple of 0.05.
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
    return pd.DataFrame(columns)
