"""What a run's labels look like, from its parquet statistics alone: no image is opened, no teacher is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from autolabel.manifests.classes import LabelSpace
from autolabel.manifests.tables import CONFIDENCE_BINS, load_manifest, read_statistics


@dataclass(frozen=True)
class Summary:
    """`classes` has one row per class of the label space, indexed by name, with the columns

    images            images in which the auto label has the class
    coarse_pixels, coarse_share    pixels of the class in the coarse labels, and their share of all coarse pixels
    auto_pixels, auto_share        the same for the auto labels
    kept              share of the pixels whose top class it is that pass the threshold
    confidence        mean confidence over those pixels, before the threshold
    agreement         share of its coarse pixels that the auto label confirms
    overridden        share of its coarse pixels that the auto label gives to another class

    and the rest is about all pixels of all images. Shares without any pixel are NaN.
    """

    classes: pd.DataFrame
    images: int
    pixels: int
    coarse_coverage: float
    auto_coverage: float
    confidence: float
    agreement: float
    label_bytes: int
    histogram: np.ndarray[tuple[int, ...], np.dtype[np.int64]]  # (20,) confidences before the threshold, all classes


def _share(part: pd.Series, whole: pd.Series | float) -> pd.Series:
    return part.astype(float) / (whole.where(whole > 0) if isinstance(whole, pd.Series) else whole or float("nan"))


def summarise(run: Path) -> Summary:
    """Sum up a finished run. Raises BadTable if its statistics or manifest are not there."""
    space: LabelSpace = load_manifest(run / "manifest.parquet").label_space
    images = read_statistics(run, "images").to_pandas()
    rows = read_statistics(run, "classes")
    histograms = np.array(rows["confidence_hist"].to_pylist(), np.int64).reshape(-1, CONFIDENCE_BINS)
    table = rows.drop_columns(["confidence_hist"]).to_pandas()
    table["seen"] = histograms.sum(axis=1)
    table["confidence_sum"] = table["mean_confidence"].fillna(0.0) * table["seen"]
    table["present"] = table["pixels"] > 0
    columns = ["pixels", "seen", "confidence_sum", "present", "coarse_pixels", "agreeing_pixels", "overridden_pixels"]
    summed = table.groupby("class_id")[columns].sum().reindex(range(len(space)), fill_value=0)
    classes = pd.DataFrame(
        {
            "images": summed["present"].astype(int),
            "coarse_pixels": summed["coarse_pixels"],
            "coarse_share": _share(summed["coarse_pixels"], float(summed["coarse_pixels"].sum())),
            "auto_pixels": summed["pixels"],
            "auto_share": _share(summed["pixels"], float(summed["pixels"].sum())),
            "kept": _share(summed["pixels"], summed["seen"]),
            "confidence": _share(summed["confidence_sum"], summed["seen"]),
            "agreement": _share(summed["agreeing_pixels"], summed["coarse_pixels"]),
            "overridden": _share(summed["overridden_pixels"], summed["coarse_pixels"]),
        }
    ).set_axis(pd.Index(space.names, name="class"), axis=0)
    pixels = int((images["height"].astype("int64") * images["width"]).sum())
    coarse = int(images["coarse_pixels"].sum())
    agreeing = int(summed["agreeing_pixels"].sum())
    nan = float("nan")
    return Summary(
        classes=classes,
        images=len(images),
        pixels=pixels,
        coarse_coverage=coarse / pixels if pixels else nan,
        auto_coverage=int(images["labelled_pixels"].sum()) / pixels if pixels else nan,
        confidence=float(summed["confidence_sum"].sum()) / pixels if pixels else nan,
        agreement=agreeing / coarse if coarse else nan,
        label_bytes=int(images["label_bytes"].sum()),
        histogram=histograms.sum(axis=0),
    )


def coverage_at(histogram: np.ndarray[tuple[int, ...], np.dtype[np.int64]], threshold: float) -> float:
    """Share of the pixels that a threshold (a multiple of 1/20) would keep."""
    kept = int(histogram[round(threshold * CONFIDENCE_BINS) :].sum())
    total = int(histogram.sum())
    return kept / total if total else float("nan")
