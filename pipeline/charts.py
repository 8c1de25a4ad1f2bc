"""The numbers behind the tables and plots of a report, from a run's tables and records; nothing is drawn here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from autolabel.manifests.classes import LabelSpace
from autolabel.manifests.tables import CONFIDENCE_BINS
from autolabel.pipeline.stats import Summary, coverage_at

_TICKS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # shares marked on the axis of the class distribution
_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # whose coverage is printed
_DOUBTFUL = 0.25  # a class that loses this share of its coarse pixels to other classes is pointed out
# What becomes of a pixel, by its column in stats/classes.parquet. Colours of Okabe and Ito, "Color universal design".
FATES = {
    "kept_pixels": ("kept", "#0072b2"),
    "below_threshold_pixels": ("below its threshold", "#e69f00"),
    "in_boundary_pixels": ("near a boundary", "#56b4e9"),
    "too_small_pixels": ("in too small a region", "#f0e442"),
    "outside_region_pixels": ("outside the region of interest", "#8c8c8c"),
    "overridden_by_human_pixels": ("decided by the human label", "#cc79a7"),
}

About = Mapping[str, Any]  # run.json
Rows = list[dict[str, Any]]
Facts = list[tuple[str, str]]  # terms and what is to be said of them


def class_plot(summary: Summary, space: LabelSpace) -> dict[str, Any]:
    """Rows and axis of the class table. Bars are on a square-root scale, in per cent of the widest.

    Shares span four orders of magnitude and may be 0: a linear scale hides the rare, a logarithm has no 0.
    """
    rows = [dict(row) for row in summary.classes.to_dict("records")]
    widest = float(np.nan_to_num(summary.classes[["coarse_share", "auto_share"]].to_numpy()).max())

    def place(share: float) -> float:
        return 100 * math.sqrt(share / widest) if share > 0 else 0.0

    for c, row in zip(space.classes, rows, strict=True):
        row |= {"name": c.name, "colour": c.colour}
        row |= {"before": place(row["coarse_share"]), "after": place(row["auto_share"])}
    seen = [row for row in rows if row["coarse_pixels"] or not math.isnan(row["kept"])]
    return {
        "seen": seen,
        "unseen": [row["name"] for row in rows if row not in seen],
        "lost": [row["name"] for row in seen if row["coarse_pixels"] and not row["auto_pixels"]],
        "doubtful": [row for row in seen if row["auto_pixels"] and row["overridden"] > _DOUBTFUL],
        "ticks": [(tick, place(tick)) for tick in _TICKS if tick <= widest],
    }


def confidence_plots(summary: Summary, threshold: float) -> dict[str, Any]:
    """The share of pixels in every bin of confidence, and the share that any threshold would keep, both over 0..1."""
    pixels, edges = int(summary.histogram.sum()), np.linspace(0, 1, len(summary.histogram) + 1).tolist()
    return {
        "threshold": threshold,
        "bins": (summary.histogram / pixels).tolist() if pixels else [],
        "curve": [(edge, coverage_at(summary.histogram, edge)) for edge in edges],
        "would_keep": [(t, coverage_at(summary.histogram, t)) for t in _THRESHOLDS],
    }


def class_histograms(classes: pa.Table, space: LabelSpace, policy: Mapping[str, Any]) -> Rows:
    """Of every class that is the top class anywhere: the shares of its pixels by confidence, and its threshold.

    classes: `stats/classes.parquet`.
    """
    counts = np.zeros((len(space), CONFIDENCE_BINS), np.int64)
    by_row = classes["confidence_hist"].combine_chunks().flatten().to_numpy().reshape(-1, CONFIDENCE_BINS)
    np.add.at(counts, classes["class_id"].to_numpy(), by_row)
    own = policy.get("thresholds") or {}
    return [
        {
            "name": c.name,
            "colour": c.colour,
            "pixels": int(row.sum()),
            "bins": (row / row.max()).tolist(),
            "threshold": own.get(c.name, policy["threshold"]),
        }
        for c, row in zip(space.classes, counts, strict=True)
        if row.any()
    ]


def fates(classes: pa.Table, space: LabelSpace) -> Rows:
    """What became of the pixels of every top class, as shares that sum to 1; empty for runs that did not count it."""
    columns = [name for name in FATES if name in classes.column_names]
    if len(columns) < len(FATES):
        return []
    summed = classes.select(["class_id", *columns]).to_pandas().groupby("class_id")[columns].sum()
    summed = summed[summed.sum(axis=1) > 0]
    rows = []
    for class_id, counts in zip(summed.index, summed.to_numpy(), strict=True):
        parts = [(*FATES[name], n / counts.sum()) for name, n in zip(columns, counts.tolist(), strict=True) if n]
        c = space.classes[int(class_id)]
        rows.append({"name": c.name, "colour": c.colour, "pixels": int(counts.sum()), "parts": parts})
    return rows


def policy_facts(about: About) -> Facts:
    """Everything that turned an image into a label, in words."""
    policy = about["policy"]
    combine = "mean of the logits" if about.get("combine") == "average" else "as the network has learnt"
    facts = [("Name", policy["name"])] if policy.get("name") else []
    facts += [
        ("Scales", ", ".join(f"{scale:g}×" for scale in about["scales"]) + (" and mirrored" if about["flip"] else "")),
        ("Combined", combine),
        ("Threshold", f"{policy['threshold']:g}: a pixel keeps its most likely class above it"),
    ]
    if "thresholds" in policy:
        own = ", ".join(f"{name} {value:g}" for name, value in policy["thresholds"].items())
        facts.append(("Of classes", own or "the same for all"))
    if policy.get("temperature", 1) != 1:
        facts.append(("Temperature", f"{policy['temperature']:g}: logits are divided by it"))
    if policy.get("region"):
        facts.append(("Region", ", ".join(f"{name} {_plain(value)}" for name, value in policy["region"].items())))
    if policy.get("boundary"):
        facts.append(("Boundary", f"{policy['boundary']} px around it are ignored"))
    if policy.get("min_region"):
        facts.append(("Regions", f"of less than {policy['min_region']} px are ignored"))
    if "coarse" in policy:
        facts.append(("Human labels", _coarse_rules(policy)))
    return facts


def _coarse_rules(policy: Mapping[str, Any]) -> str:
    general, own = policy["coarse"], policy.get("coarse_rules", {})
    if isinstance(general, Mapping):
        general, own = "", general
    by_rule: dict[str, list[str]] = {}
    for name, rule in own.items():
        by_rule.setdefault(str(rule), []).append(name)
    said = [f"{rule} for {', '.join(names)}" for rule, names in by_rule.items()]
    if general and (general != "ignore" or said):
        said.append(f"{general} for {'all others' if said else 'all classes'}")
    return "; ".join(said) or "not used"


def _plain(value: Any) -> str:
    return " to ".join(f"{v:g}" for v in value) if isinstance(value, list | tuple) else str(value)


def throughput(images: pd.DataFrame, about: About) -> Facts:
    """How long an image took, and on what; `images` is `stats/images.parquet`."""
    if images.empty:
        return []
    decode, infer, encode = (float(images[f"{part}_ms"].mean()) for part in ("decode", "infer", "encode"))
    workers = images.groupby("worker").size()
    slowest = max(infer, decode, encode)
    pixels = float((images["height"].astype("int64") * images["width"]).mean())
    facts = [
        ("An image", f"{decode:.1f} ms to decode, {infer:.1f} ms in the teacher, {encode:.1f} ms to encode"),
        ("One worker", f"about {1000 / slowest:.2g} images/s, {pixels / slowest / 1000:.2g} megapixels/s"),
        ("Workers", f"{len(workers)}, with {_range(workers)} images each" if len(workers) > 1 else "1"),
    ]
    for plan in about["plans"]:
        at_once = ", ".join(f"{n} of {_size(size)}" for size, n in plan["images_at_once"].items())
        memory = f"{plan['bytes_per_pixel'] / 1000:.1f} kB a pixel, {plan['free_bytes'] / 2**30:.1f} GiB free"
        facts.append((plan["device"], f"{plan['precision']}; {memory}; {at_once} at once"))
    return facts


def _range(counts: pd.Series) -> str:
    least, most = int(counts.min()), int(counts.max())
    return str(least) if least == most else f"{least} to {most}"


def _size(size: str) -> str:
    """ "360x480" (height first) -> "480 × 360"."""
    return " × ".join(reversed(size.split("x")))


def audit(run: Path) -> dict[str, Any]:
    """What `autolabel audit` found out about the run, and its reliability diagram; both None if it was not audited."""
    path = run / "audit.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return {"audit": found, "reliability": reliability(found["reliability"]) if found else None}


def reliability(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Bars of the reliability diagram (Guo et al., arXiv 1706.04599) and the expected calibration error; None without.

    Bars: (left edge, width, share that is right, share of the pixels), all in 0..1; empty bins have none. The error is
    the mean distance of confidence from accuracy over the pixels.
    """
    if found is None:
        return None
    edges, whole = found["edges"], found["all"]
    counted = [
        (left, right - left, pixels, correct, confidence)
        for left, right, pixels, correct, confidence in zip(
            edges[:-1], edges[1:], whole["pixels"], whole["correct"], whole["confidence"], strict=True
        )
        if pixels
    ]
    total = sum(pixels for _, _, pixels, _, _ in counted)
    off = sum(abs(correct - confidence * pixels) for _, _, pixels, correct, confidence in counted)
    bars = [(left, width, correct / pixels, pixels / total) for left, width, pixels, correct, _ in counted]
    return {"bars": bars, "ece": off / total if total else math.nan}
