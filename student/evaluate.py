"""Score a network on a manifest: IoU, pixel accuracy and boundary F by class, in constant memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autolabel.manifests import notes, storage
from autolabel.manifests.class_map import ClassMap
from autolabel.manifests.documents import read_json
from autolabel.manifests.focus import Focus
from autolabel.manifests.policy import COMBINE
from autolabel.manifests.samples import fingerprints
from autolabel.manifests.scores import Shares
from autolabel.manifests.teachers import AnyTeacher, TeacherName
from autolabel.manifests.wording import Progress, Shown, Table, counted, percent
from autolabel.student.data import ManifestDataset
from autolabel.student.job import ScoreMachine
from autolabel.student.parallel import Team
from autolabel.student.score_workers import count_by_workers
from autolabel.student.scoring import ImageCounter, ScoreCounts
from autolabel.student.worst import Worst, draw_sheet, write_sheet
from autolabel.teacher.checkpoints import overlap, silent
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.predict import Teacher

ByClass = dict[str, float | None]


@dataclass(frozen=True)
class Scores(Shown):
    """Scores of a network on a set of images.

    iou: IoU by class name, None for a class that never occurs; miou: their mean; pixel_accuracy: share of right pixels;
    images: number of images. commonest_miou: the mean IoU of naming the commonest class everywhere. overlap: number of
    images that were also trained on, above 0 only if the caller allowed it; such scores flatter. Only `evaluate` fills
    the other four. boundary_f: F by distance in pixels, then by class; mean_boundary_f: its means. worst: the images
    with the lowest mean IoU, each with `sample_id` and `miou`. request: what was scored, and how.
    """

    iou: ByClass
    miou: float
    pixel_accuracy: float
    images: int
    commonest_miou: float = 0.0
    overlap: int = 0
    boundary_f: dict[str, ByClass] = field(default_factory=dict)
    mean_boundary_f: ByClass = field(default_factory=dict)
    worst: list[dict[str, Any]] = field(default_factory=list)
    request: dict[str, Any] = field(default_factory=dict)

    @property
    def learnt(self) -> bool:
        """True if the network does better than naming the commonest class everywhere."""
        return self.miou > self.commonest_miou

    def write(self, path: Path) -> None:
        """Write the scores as JSON, whole or not at all."""
        storage.write_json(path, self.__dict__)

    def lines(self) -> list[str]:
        """The pixel accuracy, and warnings if the scores flatter, or the network has learnt nothing."""
        overlap = f"{self.overlap} of the images were also trained on: these scores flatter the network"
        nothing = (
            f"mean IoU {percent(self.miou)} % is no better than naming the commonest class everywhere"
            f" ({percent(self.commonest_miou)} %): this network has learnt nothing yet"
        )
        return [
            f"pixel accuracy {percent(self.pixel_accuracy)} %",
            *([overlap] if self.overlap else []),
            *([] if self.learnt else [nothing]),
        ]

    def tables(self) -> list[Table]:
        """IoU and boundary F by class, in per cent; and the worst images."""
        columns = [self.iou, *self.boundary_f.values()]
        rows = [[name, *(percent(column[name]) for column in columns)] for name in self.iou]
        rows.append(["mean", percent(self.miou), *map(percent, self.mean_boundary_f.values())])
        header = ["class", "IoU", *(f"F {distance} px" for distance in self.boundary_f)]
        subject = f"{self.request['checkpoint']} on {self.request['manifest']}: " if self.request else ""
        if self.request.get("focus") is not None:
            subject += f"with a focus of {self.request['focus']:g}, "
        scores = Table(f"{subject}{counted(self.images, 'image')}", header, rows, last_is_total=True)
        worst = [[image["sample_id"], percent(image["miou"])] for image in self.worst]
        title = "the worst images, by their own mean IoU"
        return [scores, *([Table(title, ["image", "mean IoU"], worst)] if worst else [])]

    @classmethod
    def read(cls, path: Path) -> Scores:
        """Read the scores that `write` wrote. Raises BadDocument."""
        scores: Scores = read_json(path, cls, advice="score the checkpoint again")
        return scores


def score(
    teacher: Teacher,
    dataset: ManifestDataset,
    *,
    scales: Sequence[float] | None = None,
    flip: bool = False,
    team: Team | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score a network on every labelled sample of a dataset, at `scales`, or else at those of its training.

    With `flip`, logits are averaged with those of the mirrored image. Each process of a `team` predicts its share of
    the samples, and all get the same scores. Raises NotEnoughMemory.
    """
    team = team or Team(teacher.device)
    scales = tuple(scales or teacher.network.training_scales)
    counter = ImageCounter(teacher, dataset, scales, flip)
    counts = _summed(counter, range(team.rank, len(dataset), team.size), progress)
    counts.confusion.matrix = team.sum(torch.from_numpy(counts.confusion.matrix)).cpu().numpy()
    return _scores(dataset, counts)


def _summed(counter: ImageCounter, places: range, progress: Progress | None) -> ScoreCounts:
    counts = counter.counts()
    for done, one in enumerate(counter.each(places), start=1):
        counts.merge(one)
        if progress:
            progress(done, len(places))
    return counts


def _scores(dataset: ManifestDataset, counts: ScoreCounts) -> Scores:
    confusion = counts.confusion
    iou = _by_class(dataset, confusion.iou())
    return Scores(
        iou, confusion.mean_iou(), confusion.pixel_accuracy(), len(dataset), confusion.commonest_mean_iou()
    )  # fmt: skip


def _by_class(dataset: ManifestDataset, values: Shares) -> ByClass:
    """Return the numbers (C,) by class name, None for NaN."""
    return {
        name: None if np.isnan(value) else float(value)
        for name, value in zip(dataset.label_space.names, values, strict=True)
    }


def _mean(values: ByClass) -> float | None:
    numbers = [value for value in values.values() if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def evaluate(
    checkpoint: AnyTeacher,
    manifest: Path,
    *,
    scales: Sequence[float] | None = None,
    flip: bool = False,
    focus: float | None = None,
    combine: str = COMBINE[0],
    window: tuple[int, int] | None = None,
    class_map: ClassMap | None = None,
    pictures: Path | None = None,
    allow_overlap: bool = False,
    device: str = "auto",
    machine: ScoreMachine | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score a checkpoint, or any other teacher, on a manifest, and draw the worst images into the folder `pictures`.

    focus: share of the rows that the highest scale sees; the scales are then those that the teacher labels with, unless
    others are named. window, class_map: see `load_teacher`. The scores are the same for any number of workers on one
    kind of device. Raises ValueError for a focus that the teacher cannot have, for another label space, for images it
    was trained on (unless `allow_overlap`), for labels without a class, or if `pictures` is not empty; NotEnoughMemory;
    WorkersFailed and ClusterFailed with Ray.
    """
    machine = machine or ScoreMachine()
    if focus is not None:
        Focus(focus)
    if pictures and storage.list(pictures):
        raise ValueError(f"{pictures} is not empty: its pictures would mix with these; name another folder")
    name, dataset = TeacherName.of(checkpoint), ManifestDataset(manifest)
    teacher = load_teacher(
        name, device="cpu" if machine.uses_ray else device, combine=combine, window=window, class_map=class_map,
        space=dataset.label_space,
    )  # fmt: skip
    teacher.require_space(dataset.label_space, teacher=str(name), manifest=str(manifest))
    if teacher.trained_on is None:
        notes.tell(silent(name))
    shared = [] if teacher.trained_on is None else overlap(teacher.trained_on, fingerprints(dataset.samples))
    if shared and not allow_overlap:
        raise ValueError(
            f"{name} was trained on {len(shared)} of the {len(dataset)} images of {manifest} (the first is"
            f" {dataset.samples[shared[0]].sample_id!r}): score it on others, or say --allow-overlap"
        )
    network = teacher.network
    scales = tuple(scales or (network.training_scales if focus is None else network.scales))
    network.require(scales, flip=flip, focus=focus)
    counter = ImageCounter(teacher, dataset, scales, flip, focus, complete=True)
    if machine.uses_ray:
        counts = count_by_workers(counter, machine, device=device, progress=progress)
    else:
        counts = _summed(counter, range(len(dataset)), progress)
    scores, boundary, worst = _scores(dataset, counts), counts.boundary, counts.worst
    assert boundary is not None and worst is not None
    if math.isnan(scores.miou):
        raise ValueError(f"{manifest}: no pixel of its labels has a class, so there is nothing to score on")
    if pictures:
        _write_pictures(pictures, dataset, worst)
    by_distance = zip(boundary.distances, boundary.f(), strict=True)
    boundary_f = {str(distance): _by_class(dataset, values) for distance, values in by_distance}
    request = {"checkpoint": str(name), "sha256": teacher.sha256, "manifest": str(manifest)}
    return replace(
        scores,
        overlap=len(shared),
        boundary_f=boundary_f,
        mean_boundary_f={distance: _mean(values) for distance, values in boundary_f.items()},
        worst=[{"sample_id": dataset.samples[index].sample_id, "miou": miou} for index, miou, _ in worst],
        request=request | {"scales": list(scales), "flip": flip, "focus": focus, "combine": combine},
    )


def _write_pictures(folder: Path, dataset: ManifestDataset, worst: Worst) -> None:
    for rank, (index, miou, prediction) in enumerate(worst, start=1):
        item = dataset[index]
        image = item["image"].permute(1, 2, 0).numpy()
        sheet = draw_sheet(image, item["label"].numpy(), prediction=prediction, space=dataset.label_space)
        write_sheet(folder, sheet, rank=rank, sample_id=item["sample_id"], miou=miou)
