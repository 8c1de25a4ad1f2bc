"""Fit how much a teacher and polygons count, and write the policy that says so beside polygons.json.

The weights are fitted to images that the teacher has not seen, where anybody knows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.evidence import BESIDE_WEIGHT, TEACHER_WEIGHT, PolygonCounts, PolygonEvidence
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.policy import DENSE, Policy
from autolabel.manifests.samples import Sample, fingerprints
from autolabel.manifests.wording import MISSING, Progress, Shown, Table, counted, listed, percent, plain, probability
from autolabel.pipeline.analysis.asking import Gatherer, beside_teacher, pixels_beside
from autolabel.pipeline.analysis.calibration import Calibration, Suggestion, suggested_thresholds
from autolabel.pipeline.analysis.polygons import (
    PairedSamples,
    PolygonSummary,
    count_paired,
    paired_samples,
    require_output,
)
from autolabel.pipeline.analysis.weighing import Pixels, Told, Weights, fit, tell
from autolabel.pipeline.job import LabelJob
from autolabel.teacher.checkpoints import overlap, silent
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.predict import Teacher

ENOUGH = 8  # images that the teacher has not seen: with so many, no others are used
MOST = 200  # images that weights are fitted to
_PIXELS, _IN_ALL = 2000, 200_000  # of an image, and of all of them
_FEW = 20
_DEFAULTS = f"{TEACHER_WEIGHT:g} and {BESIDE_WEIGHT:g}"


@dataclass(frozen=True)
class PolygonWeights(Shown):
    """A policy fitted to a teacher and to polygons, and the account of the fit.

    images: those that it was fitted to. told: for "teacher alone", "default weights" and "fitted weights", how well
    unnamed pixels are told; the fitted ones come from the other half of the images. suggestion: thresholds by class.
    """

    summary: PolygonSummary
    policy: Policy
    teacher: str
    images: int
    told: dict[str, Told]
    suggestion: Suggestion | None
    notes: list[str]

    @property
    def counts(self) -> PolygonCounts:
        """The counts."""
        return self.summary.counts

    def written(self, output: Path) -> list[Path]:
        """The files that are written: polygons.json, and the policy beside it."""
        return [output, output.with_suffix(".toml")]

    def lines(self) -> list[str]:
        """Sentences about the counts, then about the fit."""
        return [*self.summary.lines(), *self.notes]

    def tables(self) -> list[Table]:
        """The tables of the counts; how well unnamed pixels are told; the weights."""
        evidence = self.policy.polygons
        assert evidence is not None
        title = (
            f"unnamed pixels of {counted(self.images, 'image')} by {self.teacher}: log loss, and the % that are right"
        )
        weights = f"weights: teacher {evidence.teacher_weight:.3f}, polygons {evidence.polygon_weight:.3f}"
        told = Table(
            title, ["", "log loss", "right %"],
            [[name, probability(one.loss), percent(one.right)] for name, one in self.told.items()],
            notes=[
                f"The fitted {weights}.",
                "Fitted weights are held against the half of the images that they were not fitted to.",
            ],
        )  # fmt: skip
        if self.suggestion is None:
            return [*self.summary.tables(), told]
        header = ["class", "threshold", "precision %", "keeps %"]
        rows = [
            [name, MISSING if math.isnan(threshold) else f"{threshold:g}", percent(precision), percent(kept)]
            for name, threshold, precision, kept, _ in zip(self.counts.classes, *self.suggestion, strict=True)
        ]
        return [*self.summary.tables(), told, Table("thresholds", header, rows)]


def weigh_polygons(
    job: LabelJob,
    target_precision: float | None = None,
    *,
    output: Path,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PolygonWeights:
    """Count the polygons of `job.manifest`, fit weights to its teacher, write polygons.json and polygons.toml.

    Of the job, the manifest, the teacher and how it looks at images count. target_precision: suggest thresholds that
    give every class this precision in the pixels that nobody named. `progress(done, total)` counts labels, then images
    at which the teacher has looked. Raises ValueError as `count_polygons`, for a teacher of another label space or
    without probabilities, and for fewer than two images to fit to; BadTeacher, BadCheckpoint. Nothing is written then.
    """
    if target_precision is not None and not 0 < target_precision < 1:
        raise ValueError(f"--target-precision {target_precision:g}: expected a share between 0 and 1, such as 0.95")
    require_output(output)
    paired = paired_samples(job.manifest)
    teacher, scales = _loaded(job, paired)
    chosen, notes = _unseen(paired.samples, teacher, job)
    before, total = len(paired.samples), len(paired.samples) + len(chosen)
    report: Progress = progress or (lambda done, total: None)
    summary = count_paired(paired, workers=workers, progress=lambda done, _: report(done, total))
    gatherer = Gatherer(teacher, scales, job.flip, paired, _pixels_of(len(chosen)))
    looked, bad = gatherer.all(chosen, lambda done, _: report(before + done, total))
    notes += [f"left out of the fit, the first of {len(bad)}: {bad[0]}"] if bad else []
    if len(looked) < 2:
        raise ValueError(
            f"{job.manifest}: {counted(len(looked), 'image')} with unnamed pixels to fit weights to, expected 2 or more"
        )
    summary = replace(summary, counts=beside_teacher(summary.counts, looked, teacher=teacher.sha256))
    images = pixels_beside(looked)
    if len(images) < _FEW:
        notes.append(f"weights fitted to {len(images)} images only: they stay near the defaults")
    weights = fit(images)
    crossed, classes = _crossed(images), len(paired.space)
    told = _told(images, crossed)
    suggestion = None
    if target_precision is not None:
        suggestion = _suggestion(images, crossed, classes, precision=target_precision)
    notes += _verdicts(told, paired.space, suggestion)
    policy, comments = _policy(paired.space, weights, summary, suggestion, target_precision)
    policy.require(paired.space)
    result = PolygonWeights(summary, policy, str(job.teacher), len(images), told, suggestion, notes)
    text = policy.to_toml(comments, counts=output.name)
    head = "".join(f"# {line}\n" for line in _story(result, job.manifest, teacher, scales, flip=job.flip))
    summary.counts.write(output)
    storage.write(output.with_suffix(".toml"), (head + text).encode())
    return result


# --- which images, and which teacher ----------------------------------------------------------------------------------


def _loaded(job: LabelJob, paired: PairedSamples) -> tuple[Teacher, tuple[float, ...]]:
    """The teacher, and the scales at which it labels unless others are asked for."""
    teacher = load_teacher(
        job.teacher, device=job.device, precision=job.precision, combine=job.combine, window=job.window,
        class_map=job.class_map, space=paired.space,
    )  # fmt: skip
    scales = job.scales or job.teacher.scales
    teacher.require_space(paired.space, teacher=str(job.teacher), manifest=str(job.manifest))
    teacher.network.require(scales, flip=job.flip)
    if not teacher.network.confident:
        raise ValueError(
            f"{job.teacher} gives class ids without probabilities: nothing can be weighed against polygons"
        )
    teacher.require_sound(scales, flip=job.flip)
    return teacher, scales


def _unseen(samples: Sequence[Sample], teacher: Teacher, job: LabelJob) -> tuple[list[Sample], list[str]]:
    """The samples to fit to, spread evenly over all that may be used, and what is to be said of them."""
    notes, usable = list[str](), list(samples)
    if teacher.trained_on is None:
        notes.append(f"{silent(job.teacher)}, and weights fitted to images that it has seen trust it too much")
    else:
        seen = set(overlap(teacher.trained_on, fingerprints(samples)))
        unseen = [sample for place, sample in enumerate(samples) if place not in seen]
        if seen and len(unseen) >= ENOUGH:
            usable = unseen
            notes.append(f"{job.teacher} was trained on {len(seen)} of these images: weights are fitted to the others")
        elif seen:
            notes.append(
                f"{job.teacher} was trained on {len(seen)} of the {len(samples)} images that weights are fitted to:"
                f" they may trust it too much; add {ENOUGH} images or more that it has not seen"
            )
    if len(usable) > MOST:
        notes.append(f"weights are fitted to {MOST} of {counted(len(usable), 'image')}")
        usable = [usable[place * len(usable) // MOST] for place in range(MOST)]
    return usable, notes


def _pixels_of(images: int) -> int:
    return max(1, min(_PIXELS, _IN_ALL // max(1, images)))


# --- what the fit is worth, and the policy ----------------------------------------------------------------------------


def _crossed(images: Sequence[Pixels]) -> list[NDArray[np.float64]]:
    """The posterior (N, C) of every image by weights that were fitted to the half of the images without it."""
    middle = len(images) // 2
    first, second = fit(images[:middle]), fit(images[middle:])
    return [(second if place < middle else first).posterior(pixels) for place, pixels in enumerate(images)]


def _told(images: Sequence[Pixels], crossed: Sequence[NDArray[np.float64]]) -> dict[str, Told]:
    return {
        "teacher alone": tell([Weights(1, 0).posterior(pixels) for pixels in images], images),
        "default weights": tell([Weights().posterior(pixels) for pixels in images], images),
        "fitted weights": tell(crossed, images),
    }


def _verdicts(told: dict[str, Told], space: LabelSpace, suggestion: Suggestion | None) -> list[str]:
    """Say plainly when the fit, or polygons altogether, are of no use, and which precision is out of reach."""
    if suggestion is not None:
        missed = ~np.isnan(suggestion.threshold) & ~suggestion.reached
        if missed.any():
            names = listed([space.names[place] for place in np.flatnonzero(missed)])
            return [
                *_verdicts(told, space, None),
                f"no threshold reaches the precision in {names}: the highest is taken",
            ]
    alone, defaults, fitted = (one.loss for one in told.values())
    if fitted >= alone:
        return ["polygons do not help this teacher on these images: its labels are better without them"]
    if fitted >= defaults:
        return [f"the fitted weights are no better than the defaults, {_DEFAULTS}: fit to more images"]
    return []


def _suggestion(
    images: Sequence[Pixels], crossed: Sequence[NDArray[np.float64]], classes: int, *, precision: float
) -> Suggestion:
    """Thresholds by class that give unnamed pixels this precision."""
    calibration = Calibration(classes)
    for pixels, posterior in zip(images, crossed, strict=True):
        top = posterior.argmax(axis=1).astype(np.uint8)
        calibration.add(pixels.truth, top, confidence=posterior.max(axis=1).astype(np.float32))
    return calibration.suggest(precision)


def _policy(
    space: LabelSpace, weights: Weights, summary: PolygonSummary, suggestion: Suggestion | None, target: float | None
) -> tuple[Policy, dict[str, str]]:
    """The policy, and comments on its thresholds."""
    evidence = PolygonEvidence(summary.counts, round(weights.teacher, 3), round(weights.polygons, 3))
    policy = replace(DENSE, name="dense-fitted", polygons=evidence)
    if suggestion is None:
        return policy, {}
    thresholds, comments = suggested_thresholds(space.names, suggestion)
    return replace(policy, name=f"dense-precision-{target:g}", thresholds=thresholds), comments


def _story(
    result: PolygonWeights, manifest: Path, teacher: Teacher, scales: Sequence[float], *, flip: bool
) -> list[str]:
    """Comments that say where the numbers come from."""
    looks = f"looked at scales {', '.join(f'{scale:g}' for scale in scales)}{' and mirrored' if flip else ''}"
    losses = ", ".join(f"{name} {probability(one.loss)}" for name, one in result.told.items())
    lines = [
        f"Fitted by `autolabel polygons` to {counted(result.images, 'image')} of {manifest}",
        f"and to teacher {result.teacher} (sha256 {teacher.sha256[:12]}), which {looks}.",
        f"Log loss of a pixel that nobody named: {losses}",
        "(each half of the images with weights of the other half).",
        *result.notes,
    ]
    return [plain(line) for line in lines]
