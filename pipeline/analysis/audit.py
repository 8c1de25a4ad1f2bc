"""Hold a run's labels against truth: fine labels of images that the run has labelled too.

audit.json        every number; docs/audit.md defines them
suggested.toml    a policy with a threshold for each class that reaches the precision asked for
polygons.json     the counts of polygons that it names, if the run's policy weighs polygons

Images are matched by content, not by name. Truth that the teacher was trained on is refused: it would flatter. The
agreement with human coarse labels needs no truth; it comes from the run's statistics and covers every image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.places import without_void
from autolabel.manifests.policy import Policy
from autolabel.manifests.reading import read_coarse, read_photograph
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.scores import BoundaryF, Confusion, Counts, shares
from autolabel.manifests.teachers import AnyTeacher
from autolabel.manifests.wording import Progress, counted, percent
from autolabel.pipeline.analysis.audit_record import (
    Audit,
    ClassAudit,
    CoarseAudit,
    FittedTemperature,
    MeanAudit,
    PixelAudit,
    ReliabilityDiagram,
    audit_classes,
    known_or_none,
)
from autolabel.pipeline.analysis.calibration import (
    ESTIMABLE,
    GRID,
    TEMPERATURES,
    Calibration,
    Suggestion,
    TemperatureFit,
    suggested_thresholds,
)
from autolabel.pipeline.analysis.confidences import Confidences, TeacherConfidences, kept_confidences
from autolabel.pipeline.analysis.truth import MatchedTruth, match_truth, originals
from autolabel.pipeline.predictor import load_for
from autolabel.teacher.checkpoints import overlap
from autolabel.teacher.loading import seen_by
from autolabel.teacher.predict import Teacher

POLYGONS = "polygons.json"  # the name of the counts that a suggested policy weighs
PRECISION = 0.95  # the target precision, unless the user names another
_SAMPLED = 20_000  # pixels of an image to which a temperature is fitted
_BAD = 0.5  # a class whose precision is below this is pointed out
_LOCK, _PATIENCE = f"{storage.LOCK}.audit", 60.0  # seconds


def audit(
    run: Run | Path,
    truth: Path,
    *,
    target_precision: float = PRECISION,
    fit_temperature: bool = False,
    allow_leak: bool = False,
    teacher: AnyTeacher | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Audit a run; `audit.json` and `suggested.toml` are written into it, with the counts of polygons that it weighs.

    Confidences are those that the run, or the run that it was relabelled from, has kept. Without any, for a fitted
    temperature, or if `teacher` names the checkpoint, the teacher looks at the images again; it is read from `teacher`,
    or from its place at the time of the run. `progress(done, total)` counts images, twice if a temperature is fitted.
    Raises ValueError for truth of another label space, without images of the run, or that the teacher has seen (unless
    `allow_leak`), for a teacher that is gone or another, OSError and DamagedLabel for files that cannot be read.
    """
    if not 0 < target_precision < 1:
        raise ValueError(
            f"--target-precision {target_precision:g}: expected a share between 0 and 1, such as {PRECISION:g}"
        )
    run = Run.open(run)
    space, policy = run.label_space, run.policy
    matched = match_truth(run, truth)
    coarse = _coarse(run)
    kept = None if teacher or fit_temperature else kept_confidences(run, matched.truth)
    network, leaked, notes = _unseen(run, teacher, matched, truth, allow_leak, look=kept is None)
    if network is None and fit_temperature:
        raise ValueError(f"--fit-temperature needs the run's teacher: {notes[0]}")
    notes = matched.notes + notes
    if kept is not None:
        notes.append(
            f"Confidences are known in the {kept.levels} levels that were kept: diagram and calibration error are as"
            " coarse. With --teacher FILE the teacher looks again."
        )
    elif network is None:
        notes.append("No calibration and no suggested thresholds: these need the teacher.")
    if policy.boundary:
        notes.append("The policy ignores pixels near boundaries, so the labels have no borders: F says nothing here.")
    weighed = policy.polygons is not None
    if weighed and fit_temperature:
        raise ValueError(
            f"--fit-temperature: policy {policy.name!r} weighs polygons; fit on a run whose policy does not"
        )
    count = _counter(progress, (1 + fit_temperature) * len(matched.truth))
    fitted = None
    if fit_temperature and network:
        fitted = _fit(network, run, matched, count)
        policy = replace(policy, temperature=fitted.fitted)
        notes += _about_temperature(fitted.fitted)
    confusion, human = Confusion(len(space)), Confusion(len(space))
    boundary, human_boundary = BoundaryF(len(space)), BoundaryF(len(space))
    source: Confidences | None = kept or (TeacherConfidences(network, run, policy) if network else None)
    # Thresholds are chosen from those that `relabel` can tell apart; a fitted temperature asks for new labels anyway.
    edges = None if fit_temperature else kept.edges if kept else run.recipe.confidence_edges
    calibration = Calibration(len(space), edges or GRID) if source else None
    sampled = Calibration(len(space))  # the pixels that the temperature was fitted to
    known, gone = originals(run, matched, needed=weighed and source is not None)
    notes += gone
    for sample_id, sample in matched.truth.items():
        true, label = read_sample_label(sample, space), matched.labels[sample_id]
        confusion.add(true, label)
        boundary.add(true, label)
        outlined = read_coarse(known[sample_id], space, drawn_void=weighed) if sample_id in known else None
        if outlined is not None:
            polygons = without_void(outlined)
            human.add(true, polygons)
            human_boundary.add(true, polygons)
        if source and calibration:
            top, confidence = source.of(sample_id, sample, outlined)
            calibration.add(true, top, confidence=confidence)
            if fitted:
                step = _step(true)
                some = np.s_[::step, ::step]
                sampled.add(true[some], top[some], confidence=confidence[some])
        count()
    if fitted:
        fitted = replace(fitted, ece=(fitted.ece[0], known_or_none(sampled.overall().ece())))
    suggestion = calibration.suggest(target_precision) if calibration else None
    classes = audit_classes(space, confusion, human, boundary, calibration, suggestion=suggestion)
    result = Audit(
        truth=str(truth.absolute()),
        truth_sha256=storage.sha256(truth),
        images=len(matched.truth),
        leaked=leaked,
        target_precision=target_precision,
        human=PixelAudit.of(human),
        human_mean=MeanAudit.of(audit_classes(space, human, human, human_boundary, None, suggestion=None))
        if human.matrix.any()
        else None,
        auto=PixelAudit.of(confusion),
        classes=classes,
        mean=MeanAudit.of(classes),
        reliability=ReliabilityDiagram.of(space, calibration) if calibration else None,
        temperature=fitted,
        coarse=coarse,
        notes=notes + _verdicts(classes, suggestion, target_precision),
        confusion=confusion.matrix.tolist(),
        unknown=dict(zip(space.names, calibration.unknown().tolist(), strict=True)) if calibration else {},
    )
    with storage.hold(run.path, name=_LOCK, wait=_PATIENCE):  # both files are of one audit
        if suggestion:
            named, comments = _suggested(policy, space, target_precision, suggestion)
            if policy.polygons is not None:
                policy.polygons.require(space).write(run.suggested_path.with_name(POLYGONS))
            with storage.writing(run.suggested_path) as file:
                file.write(named.to_toml(comments, counts=POLYGONS).encode())
        result.write(run.audit_path)
    return result


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    """A function to call after every image."""
    done = itertools.count(1)
    return lambda: progress(next(done), total) if progress else None


# --- which images, and which teacher ----------------------------------------------------------------------------------


def _unseen(
    run: Run, named: AnyTeacher | None, matched: MatchedTruth, truth: Path, allow_leak: bool, *, look: bool
) -> tuple[Teacher | None, int | None, list[str]]:
    """The run's teacher if it is to look, the truth images that it has seen (None if unknown), notes about that."""
    found, reason = run.find_teacher(named)
    if found is None:
        if not allow_leak:
            name = "name it where it is now with --teacher, or " if run.teacher else ""
            raise ValueError(
                f"{reason}, so nobody can tell whether it was trained on {truth}: {name}say --allow-leak, which leaves"
                " out all that needs a teacher"
            )
        return None, None, [f"A leak is possible: {reason}."]
    network = None
    if look:
        network = load_for(found, run.recipe)
    trained_on = network.trained_on if network else seen_by(found)
    if trained_on is None:
        return network, None, ["The teacher does not say which images it has seen: a leak is possible."]
    leaked = len(overlap(trained_on, matched.fingerprints))
    if leaked and not allow_leak:
        raise ValueError(
            f"{found} was trained on {leaked} of the {len(matched.fingerprints)} images of {truth} that this run has"
            " labelled: audit with others, or say --allow-leak"
        )
    if leaked:
        return network, leaked, [f"The teacher was trained on {leaked} of these images: the figures flatter it."]
    return network, 0, []


# --- temperature and thresholds ---------------------------------------------------------------------------------------


def _step(label: NDArray[np.uint8]) -> int:
    """Step between the sampled rows (and columns) that the temperature is fitted to."""
    return max(1, math.isqrt(label.size // _SAMPLED))


def _fit(network: Teacher, run: Run, matched: MatchedTruth, count: Callable[[], None]) -> FittedTemperature:
    """The temperature, and both losses of the sampled pixels; of their ECE only the one before."""
    now, space = run.policy.temperature, run.label_space
    fit, before = TemperatureFit(now), Calibration(len(space))
    for sample in matched.truth.values():
        true = read_sample_label(sample, space)
        step = _step(true)
        true = true[::step, ::step]
        logits = network.sampled_logits(
            read_photograph(sample), every=step, scales=run.recipe.scales, flip=run.recipe.flip, focus=run.recipe.share
        )
        fit.add(true, logits)
        known = logits[: len(space)]  # one more channel may stand for none of them
        below = (logits - known.max(axis=0)) / np.float32(now)
        before.add(true, known.argmax(axis=0).astype(np.uint8), confidence=1 / np.exp(below).sum(axis=0))
        count()
    temperature, loss = fit.best()
    return FittedTemperature(
        now, round(temperature, 4), (fit.loss_now(), loss), (known_or_none(before.overall().ece()), None)
    )


def _about_temperature(temperature: float) -> list[str]:
    notes = ["The temperature was fitted to these images: score students on others."]
    if temperature in (TEMPERATURES[0], TEMPERATURES[-1]):
        notes.append(f"Temperature {temperature:g} is the last that was tried: the teacher itself is at fault.")
    return notes


def _suggested(policy: Policy, space: LabelSpace, precision: float, found: Suggestion) -> tuple[Policy, dict[str, str]]:
    """The policy with a threshold for every class that can have one, and a comment on each."""
    thresholds, comments = suggested_thresholds(space.names, found)
    return replace(policy, name=f"precision-{precision:g}", thresholds=policy.thresholds | thresholds), comments


# --- the record -------------------------------------------------------------------------------------------------------


def _coarse(run: Run) -> list[CoarseAudit]:
    """Agreement with the human coarse labels over all images of the run, from its statistics alone."""
    columns = ["coarse_pixels", "agreeing_pixels", "contradicted_pixels"]
    sums: Counts = np.zeros((len(run.label_space), len(columns)), np.int64)
    for batch in run.stream_statistics("classes", ["class_id", *columns]):
        counts = np.stack([batch[name].to_numpy() for name in columns], axis=1)
        np.add.at(sums, batch["class_id"].to_numpy(), counts)
    pixels, agreeing, contradicted = sums.T
    both = zip(pixels, shares(agreeing, pixels), shares(contradicted, pixels), strict=True)
    return [
        CoarseAudit(name, int(n), known_or_none(yes), known_or_none(no))
        for name, (n, yes, no) in zip(run.label_space.names, both, strict=True)
    ]


def _verdicts(classes: list[ClassAudit], suggestion: Suggestion | None, target: float) -> list[str]:
    """Say plainly what is bad."""
    notes = [
        f"{c.name}: more of its label is wrong than right (precision {percent(c.precision)} %)."
        for c in classes
        if c.precision is not None and c.precision < _BAD
    ]
    missed = [c.name for c in classes if c.truth_pixels and not c.label_pixels]
    if missed:
        notes.append(f"In the truth, but never labelled: {', '.join(missed)}.")
    if suggestion:
        known = ~np.isnan(suggestion.threshold)
        notes += [
            f"{classes[k].name}: no threshold reaches precision {100 * target:g} % with {counted(ESTIMABLE, 'pixel')};"
            f" the highest, {suggestion.threshold[k]:g}, is suggested."
            for k in np.flatnonzero(known & ~suggestion.reached).tolist()
        ]
        few = [c.name for k, c in enumerate(classes) if c.truth_pixels and not known[k]]
        if few:
            notes.append(
                f"The threshold stays as it is: {', '.join(few)} (the teacher's choice at fewer than {ESTIMABLE} pixels"
                " with truth)."
            )
    return notes
