"""How a run was made, in words: terms and sentences for its report."""

from __future__ import annotations

import pandas as pd

from autolabel.manifests.evidence import PolygonEvidence
from autolabel.manifests.pages import without_folders
from autolabel.manifests.policy import Policy
from autolabel.manifests.run.folder import Run
from autolabel.manifests.wording import MINUS, counted, dimensions, size
from autolabel.pipeline.progress import at_once, memory_needed
from autolabel.pipeline.report.surroundings import counted_on

Facts = list[tuple[str, str]]  # a term, and the text about it


def scales(run: Run) -> str:
    """0.5×, 1× and mirrored."""
    names = ", ".join(f"{scale:g}×" for scale in run.recipe.scales)
    return f"{names} and mirrored" if run.recipe.flip else names


def has_more_rules(policy: Policy) -> bool:
    """True if more than one threshold decides whether a pixel keeps its class."""
    return policy != Policy(policy.name, policy.threshold)


def policy_facts(run: Run) -> Facts:
    """Everything that turned an image into a label."""
    policy = run.policy
    own = ", ".join(f"{name} {threshold:g}" for name, threshold in policy.thresholds.items())
    facts = [
        ("Name", policy.name),
        *(_looks(run) if run.teacher else []),
        ("Threshold", f"{policy.threshold:g}: a pixel keeps its most likely class if the confidence is above it"),
        ("By class", own or "the same threshold for all"),
    ]
    if policy.temperature != 1:
        facts.append(("Temperature", f"{policy.temperature:g}: logits are divided by it"))
    if policy.polygons:
        facts += _polygons(policy.polygons)
    if policy.area:
        (top, bottom), (left, right) = policy.area.rows, policy.area.columns
        facts.append(("Area", f"rows {top:g} to {bottom:g}, columns {left:g} to {right:g}, {policy.area.unit}"))
    if policy.boundary:
        facts.append(("Boundary", f"pixels within {policy.boundary} px of another class are ignored"))
    if policy.smallest_piece:
        facts.append(("Pieces", f"pieces smaller than {policy.smallest_piece} px are ignored"))
    by_rule: dict[str, list[str]] = {}
    for name, rule in policy.coarse_rules.items():
        by_rule.setdefault(rule, []).append(name)
    rules = [f"{rule} for {', '.join(names)}" for rule, names in by_rule.items()]
    rules.append(f"{policy.coarse} for {'all others' if rules else 'all classes'}")
    return [*facts, ("Human labels", "; ".join(rules))]


def _polygons(evidence: PolygonEvidence) -> Facts:
    counts, on = evidence.counts, ""
    if counts is not None:
        beside = ", beside what a teacher says there" if counts.beside_teacher else ""
        on = f", counted on {counted_on(counts.sizes)}{beside}"
    weights = f"the teacher weighs {evidence.teacher_weight:g}, what lies around polygons {evidence.polygon_weight:g}"
    facts = [("Polygons", f"where people named nothing, {weights}{on}")]
    biases = [(name, bias) for name, bias in evidence.biases.items() if bias]
    if biases:
        told = ", ".join(f"{name} {bias:+.2g}".replace("-", MINUS) for name, bias in biases)
        facts.append(("Biases", f"{told}: there these classes are likelier (+) or less likely ({MINUS})"))
    return facts


def _looks(run: Run) -> Facts:
    recipe, teacher = run.recipe, run.teacher
    combined = "mean of the logits" if recipe.combine == "average" else "as the network has learnt"
    if teacher and not (teacher.all_ours and len(teacher.places) == 1):
        combined = "mean of the probabilities"
    window = [("Windows", dimensions(recipe.window[1], recipe.window[0]))] if recipe.window else []
    mapped = [("Classes", "the teacher's, mapped as run.json says")] if recipe.class_map else []
    return [("Scales", scales(run)), ("Combined", combined), *window, *mapped]


def throughput(images: pd.DataFrame, run: Run) -> Facts:
    """The time of an image and the devices; `images` is `stats/images.parquet`."""
    if images.empty:
        return []
    decode, infer, encode = (float(images[f"{part}_ms"].mean()) for part in ("decode", "infer", "encode"))
    workers = images.groupby("worker").size()
    slowest = max(infer, decode, encode)
    pixels = float((images["height"].astype("int64") * images["width"]).mean())
    where = "in the teacher" if run.teacher else "for what was adopted"
    facts = [
        ("An image", f"{decode:.1f} ms to decode, {infer:.1f} ms {where}, {encode:.1f} ms to encode"),
        ("One worker", f"about {1000 / slowest:.2g} images/s, {pixels / slowest / 1000:.2g} megapixels/s"),
        ("Workers", f"{len(workers)}, with {_range(workers)} images each" if len(workers) > 1 else "1"),
        ("Engine", run.engine),
    ]
    for budget in run.budgets:
        if "images_at_once" not in budget:  # no teacher took part
            facts.append((budget["device"], budget["precision"]))
            continue
        together = ", ".join(f"{images} of {_dimensions(name)}" for name, images in at_once(budget).items())
        memory = f"{memory_needed(budget)}, {size(budget['free_bytes'])} free"
        facts.append((budget["device"], f"{budget['precision']}; {memory}; {together} at once"))
    return facts


def provenance(run: Run) -> Facts:
    """The origin of everything in the run; of paths the names alone, because the page is meant to be sent."""
    recipe = run.recipe
    return [
        ("Teacher", without_folders(run.teacher or "unknown: the labels were adopted")),
        *([("its sha256", recipe.teacher_sha256)] if recipe.teacher_sha256 else []),
        ("Manifest", without_folders(run.input_manifest)),
        ("its sha256", run.input_sha256),
        ("Labels", f"{recipe.store} store, units of {counted(recipe.unit_size, 'image')}"),
        ("Computed", f"{recipe.precision} on {recipe.device} ({run.machine})"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())),
    ]


def _range(counts: pd.Series) -> str:
    least, most = int(counts.min()), int(counts.max())
    return str(least) if least == most else f"{least} to {most}"


def _dimensions(name: str) -> str:
    """ "360x480" (height first) -> "480 × 360"."""
    height, width = name.split("x")
    return dimensions(int(width), int(height))
