"""Train students that are alike in everything but their labels, and compare them (arXiv 2005.10821, section 3.3).

The first arm has fine labels only; every other arm adds labels to them: coarse ones, those of a run, any others. All
have the same network, steps, seeds and validation images. In all arms but the first, half of the draws are fine
samples, as in the paper's recipe, or another share. The folder holds

    ARM.parquet         the samples that an arm trains on
    ARM-seedN/          a training (student/train.py)
    compare.json        every number (docs/compare.md)
    index.html          the same numbers to look at; opens from disk
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from autolabel.manifests import storage
from autolabel.manifests.documents import read_json
from autolabel.manifests.fuse import joined
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.samples import Manifest, Sample, fingerprints, load_manifest, save_manifest
from autolabel.manifests.tables import parts_of
from autolabel.manifests.teachers import TeacherName
from autolabel.student.comparison.page import render
from autolabel.student.comparison.verdicts import Comparison
from autolabel.student.evaluate import Scores
from autolabel.student.job import TrainJob
from autolabel.student.metrics import read_metrics
from autolabel.student.steps import StepReport
from autolabel.student.train import train
from autolabel.teacher.checkpoints import overlap
from autolabel.teacher.loading import seen_by

FINE = "fine"  # the first arm
ADDED_SHARE = 0.5  # share of the draws, as in the paper's recipe
_AGAIN = "choose another --out"
_SETTING = (
    "steps", "arch", "batch_size", "crop", "loss", "optimizer", "learning_rate", "schedule", "power", "clip",
    "weight_decay", "ema", "weights", "noise",
    "fine_only_last", "precision", "init", "val",
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OF_ONE_SOURCE = ("coarse", "auto")  # arms of these names add labels of this source only


@dataclass(frozen=True)
class ArmProgress:
    """The state of a comparison: the training under way, and the steps of all trainings.

    step: of this training; 0 while it reads labels. done, total: steps of all trainings. note: loss and speed in words.
    """

    arm: str
    seed: int
    step: int
    done: int
    total: int
    note: str


def all_arms(coarse: Path | None, auto: Path | None, further: Mapping[str, Path]) -> dict[str, Path]:
    """The arms beside fine, by name: `coarse` and `auto` come first where they are given.

    Raises ValueError for a name that stands twice, or no name at all.
    """
    arms = {name: path for name, path in zip(_OF_ONE_SOURCE, (coarse, auto), strict=True) if path is not None}
    for name, path in further.items():
        if name in arms:
            raise ValueError(
                f"arm {name!r} is given twice, as {arms[name]} and {path}: give every arm a name of its own"
            )
        if not _NAME.fullmatch(name) or name == FINE:
            raise ValueError(f"arm {name!r}: expected a name of letters, digits, '.', '_' and '-' other than {FINE}")
        arms[name] = path
    if not arms:
        raise ValueError(
            "nothing to compare with the fine labels: give --arm NAME=RUN, --auto RUN or --coarse MANIFEST"
        )
    return arms


def manifest_of(name: str, path: Path) -> Path:
    """The manifest of an arm: that of its run, or the file itself. Raises ValueError for another folder."""
    if not storage.is_folder(path):
        return path
    run = RunFolder(path)
    if not run.exists():
        advice = f"expected a run, or a manifest (`autolabel manifest scan {path}` makes one)"
        raise ValueError(f"arm {name!r}: {path} is a folder without run.json: {advice}")
    if not parts_of(run.manifest_path):
        raise ValueError(
            f"arm {name!r}: the run {path} is not finished: `autolabel generate` with the same --out first"
        )
    return run.manifest_path


def joined_arm(fine: Manifest, name: str, path: Path, share: float) -> tuple[Manifest, list[str]]:
    """Join the fine samples with an arm's as `share` of the draws: one source, or all that the fine ones lack.

    Among the arm's own samples their weights hold. Also gives notes on images of which both have a label.
    """
    source, other = name if name in _OF_ONE_SOURCE else None, load_manifest(path)
    known = {s.key for s in fine.labelled}
    chosen = tuple(s for s in other.labelled if (s.source == source if source else s.key not in known))
    if not chosen:
        what = f"samples with {source} labels" if source else "labelled samples beside the fine ones"
        raise ValueError(f"{path} has no {what}: this arm would only repeat the first")
    result = joined([("the fine manifest", fine), (str(path), replace(other, samples=chosen))])
    of_arm = {s.key for s in chosen}
    added, first = (sum(s.weight for s in result.manifest.samples if (s.key in of_arm) is own) for own in (True, False))
    if not added:
        raise ValueError(
            f"{path} adds no label to the fine ones: their images are the same, and fine labels stand, or the weights"
            " are 0"
        )
    factor = share / (1 - share) * first / added
    samples = tuple(replace(s, weight=factor * s.weight) if s.key in of_arm else s for s in result.manifest.samples)
    notes = [f"{FINE} + {name}: {contest}." for contest in result.contests]
    return replace(result.manifest, samples=samples), notes


def compare(
    fine: Path,
    arms: Mapping[str, Path],
    *,
    template: TrainJob,
    seeds: Sequence[int],
    added_share: float = ADDED_SHARE,
    on_progress: Callable[[ArmProgress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Comparison:
    """Train and score every arm with every seed, under `template.out`; finished trainings are not repeated.

    `arms` are those of `all_arms`, runs or manifests by name; each is judged against the first of them, and against
    fine. `template` gives validation manifest, network, steps and batch size. `added_share` is the share of the draws
    that show the labels which an arm adds to the fine ones.
    `on_progress` hears of every step, and of labels that are read before the first one; `on_note` is that of `train`.
    Raises ValueError, also if a run's teacher was trained on validation images.
    """
    if not 0 < added_share < 1:
        raise ValueError(f"added-share {added_share:g}: expected a number between 0 and 1, such as {ADDED_SHARE}")
    paths = {f"{FINE} + {name}": manifest_of(name, path) for name, path in arms.items()}
    fine_manifest = load_manifest(fine)
    manifests, met = {FINE: fine_manifest}, list[str]()
    for (arm, path), name in zip(paths.items(), arms, strict=True):
        manifests[arm], same_images = joined_arm(fine_manifest, name, path, added_share)
        met += same_images
    runs = [(arm, run) for arm, m in manifests.items() for run in sorted({*m.runs, *m.corrects})]
    corrected = {run for m in manifests.values() for run in m.corrects}.difference(
        *(m.runs for m in manifests.values())
    )
    labelled, notes = _teachers(runs, template.val, corrected)
    notes += [*met, *_other_images(manifests)]
    for arm, manifest in manifests.items():
        path = template.out / f"{_slug(arm)}.parquet"
        _require_same(path, manifest)
        save_manifest(path, manifest)

    looks = _looks(template.out / "compare.json", len(seeds))
    scores: dict[str, list[Scores]] = {arm: [] for arm in manifests}
    curves: dict[str, list[list[StepReport]]] = {arm: [] for arm in manifests}
    said: set[str] = set()

    def once(note: str) -> None:
        if on_note and note not in said:  # all trainings run on the same devices
            said.add(note)
            on_note(note)

    trainings = list(itertools.product(seeds, manifests))  # all arms of a seed, then the next seed
    for place, (seed, arm) in enumerate(trainings):
        path = template.out / f"{_slug(arm)}.parquet"
        job = replace(template, manifest=path, out=path.with_name(f"{path.stem}-seed{seed}"), seed=seed)
        now = ArmProgress(arm, seed, 0, place * job.steps, len(trainings) * job.steps, "")
        _train(job, now, on_progress, once)
        scores[arm].append(last_scores(job))
        curves[arm].append(read_metrics(job.out))
    first = read_json(template.out / f"{FINE}-seed{seeds[0]}" / "train.json", dict[str, Any], advice=_AGAIN)
    setting = {
        **{name: first[name] for name in _SETTING},
        "added_share": added_share,
        "manifests": {arm: str(path) for arm, path in {FINE: fine, **paths}.items()},
        "images": {arm: len(manifest.labelled) for arm, manifest in manifests.items()},
        "runs": labelled,
        "looks": looks,
    }
    comparison = Comparison(tuple(seeds), scores, curves, template.batch_size, tuple(notes), setting)
    storage.write_json(template.out / "compare.json", comparison.record())
    with storage.writing(template.out / "index.html") as file:
        file.write(render(comparison).encode())
    return comparison


def _looks(path: Path, seeds: int) -> list[int]:
    """Return the numbers of seeds with which verdicts were looked at in this folder, now included, ascending.

    One seed gives no verdict. Raises BadDocument.
    """
    advice = "remove it; compare writes it again"
    before = read_json(path, dict[str, Any], advice=advice).get("looks") if storage.exists(path) else None
    looks = [n for n in before if isinstance(n, int)] if isinstance(before, list) else []
    return sorted({*looks, *([seeds] if seeds > 1 else [])})


def _train(
    job: TrainJob,
    start: ArmProgress,
    on_progress: Callable[[ArmProgress], None] | None,
    on_note: Callable[[str], None] | None,
) -> None:
    def tell(step: int, note: str) -> None:
        if on_progress:
            on_progress(replace(start, step=step, done=start.done + step, note=note))

    train(
        job,
        lambda step: tell(step.step, step.note()),
        progress=lambda done, total: tell(0, f"reading labels {done}/{total}"),
        on_note=on_note,
    )


def _slug(arm: str) -> str:
    return arm.replace(" + ", "-")


# --- the arms ---------------------------------------------------------------------------------------------------------


def _teachers(
    runs: Sequence[tuple[str, Path]], val: Path, corrected: Collection[Path] = ()
) -> tuple[list[dict[str, str | None]], list[str]]:
    """The teachers of the arms' runs, and notes on what is unknown. Raises ValueError if one has seen validation.

    Of the runs that are `corrected` no label may be left, so they may be gone.
    """
    held_out = load_manifest(val).labelled
    marks = fingerprints(held_out)
    labelled: list[dict[str, str | None]] = []
    notes: list[str] = []
    for arm, path in runs:
        if path in corrected and not RunFolder(path).exists():
            notes.append(
                f"{arm}: the run {path}, whose labels were corrected, is gone, so nobody can tell whether its teacher"
                " has seen validation images."
            )
            continue
        run = Run.open(path)
        teacher = run.teacher
        digest = None if teacher is None else run.recipe.teacher_sha256
        names = {"arm": arm, "run": str(path), "policy": run.policy.name}
        labelled.append({**names, "teacher": None if teacher is None else str(teacher), "teacher_sha256": digest})
        trained_on, why = _seen(teacher, digest, path)
        if trained_on is None:
            notes.append(f"{arm}: {why}, so nobody can tell whether it has seen validation images.")
            continue
        shared = overlap(trained_on, marks)
        if shared:
            raise ValueError(
                f"{arm}: the teacher {teacher} of {path} was trained on {len(shared)} of the {len(marks)} validation"
                f" images of {val} (the first is {held_out[shared[0]].sample_id!r}): its labels pass on what it learnt"
                " there; validate on others, or label with a teacher that has not seen them"
            )
    return labelled, notes


def _seen(teacher: TeacherName | None, digest: str | None, run: Path) -> tuple[Tensor | None, str]:
    """The marks (N,) int64 of the images that a run's teacher was trained on; None with the reason if nobody knows."""
    if teacher is None:
        return None, f"no teacher is known of the labels of {run}"
    if not teacher.exists():
        return None, f"the teacher {teacher} is gone"
    if teacher.digest() != digest:
        return None, f"{teacher} is no longer the teacher that labelled {run}"
    if teacher.runs_code:  # a run may come from a stranger
        return None, f"the teacher {teacher} is code, which runs only where you name it"
    seen = seen_by(teacher)
    return seen, "" if seen is not None else f"the teacher {teacher} does not say which images it has seen"


def _other_images(manifests: Mapping[str, Manifest]) -> list[str]:
    """Notes on the arms whose images are not those of the first arm beside fine."""
    fine, *arms = (set(fingerprints(manifest.labelled)) for manifest in manifests.values())
    _, first, *others = manifests
    notes = []
    for arm, images in zip(others, arms[1:], strict=True):
        found, expected = images - fine, arms[0] - fine
        if found != expected:
            notes.append(
                f"{arm} holds other images than {first} ({len(found - expected)} more, {len(expected - found)} fewer,"
                f" {len(found & expected)} the same): a difference may come from the images, not from their labels."
            )
    return notes


def _require_same(path: Path, manifest: Manifest) -> None:
    """Raise ValueError if the folder holds trainings on other samples, labels or shares."""

    def listed(samples: Sequence[Sample]) -> list[tuple[object, ...]]:
        return [(s.source, s.sample_id, s.image, s.label, s.label_index, np.float32(s.weight)) for s in samples]

    begun = any(
        folder.name.startswith(f"{path.stem}-seed") and storage.exists(folder / "train.json")
        for folder in storage.list(path.parent)
    )
    if begun and storage.exists(path) and listed(load_manifest(path).samples) != listed(manifest.samples):
        raise ValueError(
            f"{path.parent} holds trainings on other samples, labels or shares than those now asked for (see"
            f" {path.name}): choose another --out"
        )


# --- the trainings ----------------------------------------------------------------------------------------------------


def last_scores(job: TrainJob) -> Scores:
    """Scores after the last step of a training. Raises BadDocument.

    To pick the best step on the images that decide would favour the arm whose scores jump most.
    """
    return Scores.read(job.out / "last_scores.json")
