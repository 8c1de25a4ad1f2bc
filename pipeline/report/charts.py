"""The numbers behind the tables and plots of a report, from a run's tables and records; nothing is drawn here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from autolabel.manifests import storage
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.run.folder import Run
from autolabel.pipeline.analysis.stats import Summary, coverage_at

_TICKS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # shares marked on the axis of the class distribution
_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # whose coverage is printed
_DOUBTFUL = 0.25  # a class that loses this share of its coarse pixels to other classes is pointed out
# How every one of manifests.schemas.FATES is told and drawn. Colours of Okabe and Ito, "Color universal design".
SHOWN_FATES = {
    "kept": ("kept", "#0072b2"),
    "below_threshold": ("below its threshold", "#e69f00"),
    "near_boundary": ("near a boundary", "#56b4e9"),
    "in_small_piece": ("in too small a piece", "#f0e442"),
    "outside_area": ("outside the area", "#8c8c8c"),
    "decided_by_human": ("decided by the human label", "#cc79a7"),
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
        "doubtful": [row for row in seen if row["auto_pixels"] and row["contradicted"] > _DOUBTFUL],
        "ticks": [(tick, place(tick)) for tick in _TICKS if tick <= widest],
    }


def confidence_plots(summary: Summary, threshold: float) -> dict[str, Any]:
    """The share of pixels in every bin of confidence, and the share that any threshold would keep, both over 0..1."""
    pixels, edges = int(summary.histogram.sum()), np.linspace(0, 1, len(summary.histogram) + 1).tolist()
    curve = [coverage_at(summary.histogram, edge) for edge in edges]
    return {
        "threshold": threshold,
        "bins": (summary.histogram / pixels).tolist() if pixels else [],
        "curve": list(zip(edges, curve, strict=True)),
        "above": float(np.interp(threshold, edges, curve)),  # before any other rule of the policy
        "would_keep": [(t, coverage_at(summary.histogram, t)) for t in _THRESHOLDS],
    }


def class_histograms(summary: Summary, space: LabelSpace, opened: Run) -> Rows:
    """The classes that are somewhere the top class: their pixels by confidence (highest bin: 1), and the threshold."""
    thresholds = opened.policy.class_thresholds(space)
    return [
        {
            "name": c.name,
            "colour": c.colour,
            "pixels": int(row.sum()),
            "bins": (row / row.max()).tolist(),
            "threshold": threshold,
        }
        for c, row, threshold in zip(space.classes, summary.histograms, thresholds, strict=True)
        if row.any()
    ]


def fates(summary: Summary, space: LabelSpace) -> Rows:
    """What became of the pixels of every top class, as shares that sum to 1; those that did not occur are left out."""
    rows = []
    for c, shares in zip(space.classes, summary.fates.to_dict("records"), strict=True):
        parts = [(*SHOWN_FATES[str(fate)], share) for fate, share in shares.items() if share > 0]
        if parts:
            rows.append({"name": c.name, "colour": c.colour, "kept": shares.get("kept", 0.0), "parts": parts})
    return rows


def _scales(opened: Run) -> str:
    mirrored = " and mirrored" if opened.recipe.flip else ""
    return ", ".join(f"{scale:g}×" for scale in opened.recipe.scales) + mirrored


def policy_facts(opened: Run) -> Facts:
    """Everything that turned an image into a label, in words."""
    policy = opened.policy
    own = ", ".join(f"{name} {threshold:g}" for name, threshold in policy.thresholds.items())
    facts = [
        ("Name", policy.name),
        (
            "Scales",
            ", ".join(f"{scale:g}×" for scale in opened.recipe.scales)
            + (" and mirrored" if opened.recipe.flip else ""),
        ),
        ("Combined", "mean of the logits" if opened.recipe.combine == "average" else "as the network has learnt"),
        ("Threshold", f"{policy.threshold:g}: a pixel keeps its most likely class above it"),
        ("Of classes", own or "the same for all"),
    ]
    if policy.temperature != 1:
        facts.append(("Temperature", f"{policy.temperature:g}: logits are divided by it"))
    if policy.outlined:
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in policy.outlined.items())
        facts.append(("Outlined by people", f"{shares}: so much less likely is a class where they named none"))
    if policy.area:
        (top, bottom), (left, right) = policy.area.rows, policy.area.columns
        facts.append(("Area", f"rows {top:g} to {bottom:g}, columns {left:g} to {right:g}, {policy.area.unit}"))
    if policy.boundary:
        facts.append(("Boundary", f"pixels within {policy.boundary} px of another class are ignored"))
    if policy.smallest_piece:
        facts.append(("Pieces", f"of less than {policy.smallest_piece} px are ignored"))
    by_rule: dict[str, list[str]] = {}
    for name, rule in policy.coarse_rules.items():
        by_rule.setdefault(rule, []).append(name)
    rules = [f"{rule} for {', '.join(names)}" for rule, names in by_rule.items()]
    rules.append(f"{policy.coarse} for {'all others' if rules else 'all classes'}")
    facts.append(("Human labels", "; ".join(rules)))
    return facts


def throughput(images: pd.DataFrame, opened: Run) -> Facts:
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
    for plan in opened.budgets:
        if "images_at_once" not in plan:  # no teacher took part
            facts.append((plan["device"], plan["precision"]))
            continue
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
    """What `autolabel audit` found out about the run, its rows of classes that occur, and its reliability diagrams.

    All three None if it was not audited, the last one also if it has none.
    """
    path = run / "audit.json"
    if not storage.exists(path):
        return dict.fromkeys(("audit", "audited", "reliability"))
    found = json.loads(storage.read(path))
    audited = [row for row in found["classes"] if row["truth_pixels"] or row["label_pixels"]]
    return {"audit": found, "audited": audited, "reliability": reliability(found) if found["reliability"] else None}


def reliability(found: Mapping[str, Any]) -> dict[str, Any]:
    """Bars of the reliability diagrams (Guo et al., arXiv 1706.04599), of all pixels and by class (name, bars, error),
    and the expected calibration error.

    Bars: (left edge, width, share that is right, share of the pixels), all in 0..1; empty bins have none.
    """
    diagram, errors = found["reliability"], {row["name"]: row["ece"] for row in found["classes"]}

    def bars(counts: Mapping[str, Any]) -> list[tuple[float, float, float, float]]:
        edges, total = diagram["edges"], sum(counts["pixels"])
        bins = zip(edges[:-1], edges[1:], counts["pixels"], counts["correct"], strict=True)
        return [(left, right - left, correct / n, n / total) for left, right, n, correct in bins if n]

    classes = [
        (name, bars(counts), errors[name]) for name, counts in diagram["classes"].items() if any(counts["pixels"])
    ]
    return {"bars": bars(diagram["all"]), "ece": diagram["ece"], "classes": classes}
