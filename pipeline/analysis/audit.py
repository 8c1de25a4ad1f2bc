"""What a run's labels are worth, held against truth: fine labels of images that the run has labelled too.

audit.json        every number; docs/audit.md defines them
suggested.toml    a policy with a threshold for each class that reaches the precision asked for

Images are matched by content, not by name. Truth that the teacher was trained on is refused: it would flatter. What
needs no truth, agreement with human coarse labels, comes from the run's statistics and covers every image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.policy import Policy
from autolabel.manifests.reading import read_coarse, read_photograph
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.run.labels import RunLabels, read_sample_label, stored_labels
from autolabel.manifests.samples import Sample, fingerprints, load_manifest, open_manifest
from autolabel.manifests.schemas import CONFIDENCE_BINS
from autolabel.manifests.scores import BoundaryF, Confusion, Counts, Shares, shares
from autolabel.pipeline.analysis.calibration import (
    ESTIMABLE,
    GRID,
    TEMPERATURES,
    Calibration,
    Reliability,
    Suggestion,
    TemperatureFit,
)
from autolabel.pipeline.records import Row, read_rows
from autolabel.teacher.checkpoints import overlap
from autolabel.teacher.predict import Teacher, load_teacher

AUDIT, SUGGESTED = "audit.json", "suggested.toml"
PRECISION = 0.95  # of a class's label, where nothing else is asked for
_SAMPLED = 20_000  # pixels of an image to which a temperature is fitted
_SHARES = ("precision", "coverage", "iou_kept", "iou", "ece")
_RECORD = ["sample_id", "status", "height", "width", "label", "label_index", "label_crc32c", "image_fingerprint"]

Report = dict[str, Any]  # what audit.json holds


@dataclass(frozen=True)
class _Matched:
    """Truth by sample id of the run, the run's labels of these samples, and what there is to say of the rest."""

    truth: dict[str, Sample]
    fingerprints: list[str]
    labels: RunLabels
    notes: list[str]


def audit(
    run: Path,
    truth: Path,
    precision: float = PRECISION,
    fit_temperature: bool = False,
    allow_leak: bool = False,
    teacher: Path | None = None,
    update: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write `AUDIT` and `SUGGESTED` into a run, and return what the former holds. `update(done, total)` counts images.

    The run's teacher is run again on the images that have truth; it is at `teacher`, or where the run had it.
    Raises ValueError for truth of another label space, without images of the run, or that the teacher has seen (unless
    `allow_leak`), for a teacher that is gone or another, OSError and DamagedLabel for files that cannot be read.
    """
    if not 0 < precision < 1:
        raise ValueError(f"--target-precision {precision:g}: expected a share between 0 and 1, such as {PRECISION:g}")
    opened = Run.open(run)
    space = opened.label_space
    matched = _match(run, truth, space)
    coarse = _coarse(run, space)
    network, leaked, notes = _unseen(opened, teacher, matched, truth, allow_leak)
    if network is None and fit_temperature:
        raise ValueError(f"--fit-temperature needs the run's teacher: {notes[0]}")
    notes = matched.notes + notes
    policy = opened.policy
    left_out = policy.left_out(space)
    if left_out is not None and fit_temperature:
        raise ValueError(f"--fit-temperature: policy {policy.name!r} says what is outlined; fit before that is counted")
    asked = open_manifest(opened.input_manifest).find(matched.truth) if left_out is not None and network else {}
    images, passes = len(matched.truth), 1 + fit_temperature
    fitted = None
    if fit_temperature and network:
        fitted = _fit(network, opened, policy.temperature, matched, space, lambda done: update(done, passes * images))
        policy = replace(policy, temperature=fitted["fitted"])
        notes += _about_temperature(fitted["fitted"])
    grid = _grid(opened, fit_temperature)
    confusion, boundary = Confusion(len(space)), BoundaryF(len(space))
    calibration = Calibration(len(space), grid) if network else None
    sampled = Calibration(len(space))  # the pixels that the temperature was fitted to
    for done, (sample_id, sample) in enumerate(matched.truth.items(), start=1 + (passes - 1) * images):
        true, label = read_sample_label(sample, space), matched.labels[sample_id]
        confusion.add(true, label)
        boundary.add(true, label)
        if network and calibration:
            coarse_label = read_coarse(asked[sample_id], space) if sample_id in asked else None
            top, confidence = network.confidence(
                read_photograph(sample),
                opened.recipe.scales,
                opened.recipe.flip,
                policy.temperature,
                left_out,
                coarse_label,
            )
            calibration.add(true, top, confidence)
            if fitted:
                every = _every(true)
                some = np.s_[::every, ::every]
                sampled.add(true[some], top[some], confidence[some])
        update(done, passes * images)
    if fitted:
        fitted["ece"].append(_number(sampled.overall().ece()))
    suggestion = calibration.suggest(precision) if calibration else None
    classes = _classes(space, confusion, boundary, calibration, suggestion)
    if suggestion:
        named, comments = _suggested(policy, space, precision, suggestion)
        storage.write(run / SUGGESTED, named.to_toml(comments).encode())
    report: Report = {
        "truth": str(truth.absolute()),
        "truth_sha256": storage.sha256(truth),
        "images": images,
        "leaked": leaked,
        "target_precision": precision,
        "classes": classes,
        "mean": _mean(classes, boundary.distances),
        "reliability": _diagram(space, calibration) if calibration else None,
        "temperature": fitted,
        "coarse": coarse,
        "notes": notes + _verdicts(classes, suggestion, precision),
    }
    storage.write_json(run / AUDIT, report)
    return report


# --- which images, and which teacher ----------------------------------------------------------------------------------


def _match(run: Path, truth: Path, space: LabelSpace) -> _Matched:
    manifest = load_manifest(truth)
    if manifest.label_space != space:
        raise ValueError(
            f"{truth} uses label space {manifest.label_space.name!r} ({len(manifest.label_space)} classes) but {run}"
            f" {space.name!r} ({len(space)}): audit with truth of the run's own label space"
        )
    fine = [sample for sample in manifest.labelled if sample.source == "fine"]
    if not fine:
        raise ValueError(f"{truth} lists no image with a fine label: expected a manifest such as fine.parquet")
    known: dict[str, Sample] = {}
    for sample, mark in zip(fine, fingerprints(fine), strict=True):
        if mark in known:
            raise ValueError(
                f"{truth}: {known[mark].sample_id!r} and {sample.sample_id!r} are the same image (same content):"
                " leave one of them out"
            )
        known[mark] = sample
    labelled, rows = 0, list[Row]()
    for path in sorted(RunFolder(run).units.glob("*.parquet")):
        for row in read_rows(path, _RECORD):
            labelled += row.labelled
            rows += [row] if row.labelled and row.image_fingerprint in known else []
    if not labelled:
        raise ValueError(f"{run} holds no labelled image: nothing to audit; go on with `autolabel generate`")
    if not rows:
        raise ValueError(
            f"none of the {len(known)} fine images of {truth} is among the {labelled} labelled images of {run}"
            " (compared by content): label some of them too, in this run or in one of their own"
        )
    found = {str(row.image_fingerprint) for row in rows}
    notes = []
    if len(found) < len(known):
        notes.append(f"{len(known) - len(found)} of {len(known)} images of {truth} are not labelled in this run.")
    truths = {row.sample_id: known[str(row.image_fingerprint)] for row in rows}
    return _Matched(truths, sorted(found), RunLabels(stored_labels(run, map(vars, rows)), space), notes)


def _unseen(
    opened: Run, named: Path | None, matched: _Matched, truth: Path, allow_leak: bool
) -> tuple[Teacher | None, int | None, list[str]]:
    """The run's teacher, on how many truth images it was trained (None: nobody can tell), and what to say of that."""
    path, why = opened.find_teacher(named)
    if path is None:
        if not allow_leak:
            raise ValueError(
                f"{why}, so nobody can tell whether it was trained on {truth}: name it where it is now with --teacher,"
                " or say --allow-leak, which leaves out all that needs a teacher"
            )
        return None, None, [f"No calibration and no suggested thresholds, and a leak is possible: {why}."]
    network = load_teacher(path, "auto", opened.recipe.precision, opened.recipe.combine)
    leaked = len(overlap(network.trained_on, matched.fingerprints))
    if leaked and not allow_leak:
        raise ValueError(
            f"{path} was trained on {leaked} of the {len(matched.fingerprints)} images of {truth} that this run has"
            " labelled: audit with others, or say --allow-leak"
        )
    if leaked:
        return network, leaked, [f"The teacher was trained on {leaked} of these images: the figures flatter it."]
    if not len(network.trained_on):
        return network, None, ["The checkpoint does not say which images it was trained on: a leak is possible."]
    return network, 0, []


# --- temperature and thresholds ---------------------------------------------------------------------------------------


def _every(label: NDArray[np.uint8]) -> int:
    """So far apart are the rows, and the columns, that a temperature is fitted to."""
    return max(1, math.isqrt(label.size // _SAMPLED))


def _fit(
    network: Teacher, opened: Run, now: float, matched: _Matched, space: LabelSpace, update: Callable[[int], None]
) -> Report:
    """The temperature, and what it does for the sampled pixels, before and after; the ECE after is for the caller."""
    fit, before = TemperatureFit(now), Calibration(len(space))
    for done, sample in enumerate(matched.truth.values(), start=1):
        true = read_sample_label(sample, space)
        every = _every(true)
        true = true[::every, ::every]
        logits = network.sampled_logits(read_photograph(sample), every, opened.recipe.scales, opened.recipe.flip)
        fit.add(true, logits)
        below = (logits - logits.max(axis=0)) / np.float32(now)
        before.add(true, logits.argmax(axis=0).astype(np.uint8), 1 / np.exp(below).sum(axis=0))
        update(done)
    temperature, loss = fit.best()
    return {
        "before": now,
        "fitted": round(temperature, 4),
        "nll": [fit.loss_now(), loss],
        "ece": [_number(before.overall().ece())],
    }


def _about_temperature(temperature: float) -> list[str]:
    notes = ["The temperature was fitted to these images: score students on others."]
    if temperature in (TEMPERATURES[0], TEMPERATURES[-1]):
        notes.append(f"Temperature {temperature:g} is the last that was tried: the teacher itself is at fault.")
    return notes


def _grid(opened: Run, fitted: bool) -> Sequence[float]:
    """The thresholds to choose from. Where confidences are kept, those that `relabel` can tell apart.

    Kept ones are of the run's own temperature: with another one, the images are to be labelled again anyway.
    """
    return GRID if fitted or opened.recipe.confidence_edges is None else opened.recipe.confidence_edges


def _suggested(policy: Policy, space: LabelSpace, precision: float, found: Suggestion) -> tuple[Policy, dict[str, str]]:
    """The policy with a threshold for every class that can have one, and what to say of each."""
    thresholds, comments = dict(policy.thresholds), {}
    for name, threshold, above, kept, reached in zip(space.names, *found, strict=True):
        if not math.isnan(threshold):
            thresholds[name] = float(threshold)
            share = "no pixels" if math.isnan(above) else f"precision {100 * above:.1f} %, keeps {100 * kept:.1f} %"
            comments[name] = share + ("" if reached else "; no threshold reaches the target")
    return replace(policy, name=f"precision-{precision:g}", thresholds=thresholds), comments


# --- what is told -----------------------------------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    """For JSON, which knows no NaN."""
    return None if math.isnan(value) else float(value)


def _classes(
    space: LabelSpace,
    confusion: Confusion,
    boundary: BoundaryF,
    calibration: Calibration | None,
    suggestion: Suggestion | None,
) -> list[Report]:
    unknown: Shares = np.full(len(space), np.nan)
    columns = {
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
        {
            "name": name,
            "truth_pixels": int(confusion.true_pixels[k]),
            "label_pixels": int(confusion.predicted_pixels[k]),
            **{key: _number(column[k]) for key, column in columns.items()},
            "boundary_f": {str(d): _number(f[place, k]) for place, d in enumerate(boundary.distances)},
        }
        for k, name in enumerate(space.names)
    ]


def _mean(classes: list[Report], distances: Sequence[int]) -> Report:
    """Of every share, the mean of the classes that have it."""

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    across = {str(d): mean([c["boundary_f"][str(d)] for c in classes]) for d in distances}
    return {key: mean([c[key] for c in classes]) for key in _SHARES} | {"boundary_f": across}


def _diagram(space: LabelSpace, calibration: Calibration) -> Report:
    def told(counts: Reliability) -> Report:
        means = shares(counts.confidence, counts.pixels)
        return {
            "pixels": counts.pixels.tolist(),
            "correct": counts.correct.tolist(),
            "confidence": [_number(mean) for mean in means],
        }

    by_class = calibration.reliability()
    return {
        "edges": [k / CONFIDENCE_BINS for k in range(CONFIDENCE_BINS + 1)],
        "ece": _number(calibration.overall().ece()),
        "all": told(calibration.overall()),
        "classes": {name: told(Reliability(*(t[k] for t in by_class))) for k, name in enumerate(space.names)},
    }


def _coarse(run: Path, space: LabelSpace) -> list[Report]:
    """What became of the human coarse labels, over all images of the run, from its statistics alone."""
    columns = ["coarse_pixels", "agreeing_pixels", "contradicted_pixels"]
    sums: Counts = np.zeros((len(space), len(columns)), np.int64)
    for batch in RunFolder(run).stream_statistics("classes", ["class_id", *columns]):
        counts = np.stack([batch[name].to_numpy() for name in columns], axis=1)
        np.add.at(sums, batch["class_id"].to_numpy(), counts)
    pixels, agreeing, contradicted = sums.T
    return [
        {"name": name, "coarse_pixels": int(n), "agreement": _number(yes), "contradicted": _number(no)}
        for name, n, yes, no in zip(
            space.names, pixels, shares(agreeing, pixels), shares(contradicted, pixels), strict=True
        )
    ]


def _verdicts(classes: list[Report], suggestion: Suggestion | None, precision: float) -> list[str]:
    """What is bad, said plainly."""
    found = []
    for c in classes:
        if c["precision"] is not None and c["precision"] < 0.5:
            share = f"{100 * c['precision']:.1f} %"
            found.append(f"{c['name']}: more of its label is wrong than right (precision {share}).")
    missed = [c["name"] for c in classes if c["truth_pixels"] and not c["label_pixels"]]
    if missed:
        found.append(f"In the truth, but never labelled: {', '.join(missed)}.")
    if suggestion:
        known = ~np.isnan(suggestion.threshold)
        for k in np.flatnonzero(known & ~suggestion.reached).tolist():
            found.append(
                f"{classes[k]['name']}: no threshold reaches precision {100 * precision:g} % with {ESTIMABLE} pixels;"
                f" the highest, {suggestion.threshold[k]:g}, is suggested."
            )
        few = [c["name"] for k, c in enumerate(classes) if c["truth_pixels"] and not known[k]]
        if few:
            found.append(
                f"The threshold stays as it is: {', '.join(few)} (the teacher's choice at fewer than {ESTIMABLE} pixels"
                " with truth)."
            )
    return found
