"""All that a choice of corrections is made from: a run surveyed once, and what its labels are expected to be worth."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, read_json, shaped
from autolabel.manifests.ids import Ids
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.run.folder import Run
from autolabel.manifests.wording import Progress
from autolabel.pipeline.analysis.audit_record import Audit
from autolabel.pipeline.analysis.confidences import kept_in
from autolabel.pipeline.review.belief import Belief, Floats, confusions, shift
from autolabel.pipeline.review.effort import Pace
from autolabel.pipeline.review.statistics import survey_statistics, top_pixels
from autolabel.pipeline.review.survey import Items, Looking, Survey, survey
from autolabel.pipeline.review.worth import Worth


@dataclass(frozen=True)
class Prospects:
    """A survey, what it was made with, and the seconds that it took.

    looking: reads an image again; None where no confidence was kept. top (C,): pixels by top class.
    weights (C,): of the classes, None if all are 1. done (K,): places of images that people have done.
    """

    run: Run
    found: Survey
    looking: Looking | None
    audit: Audit | None
    top: Floats
    weights: Floats | None
    seconds: float
    done: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def worth(self) -> Worth:
        """Return the expected worth of the labels before any correction but those that are done."""
        worth = _worth(self.run, self.found, self.audit, self.top, self.weights)
        worth.correct(self.found.images.doubt[self.done].sum(axis=0, dtype=float))
        return worth

    def items(self, *, regions: bool) -> Items:
        """The images or regions that can be chosen."""
        items = self.found.regions if regions else self.found.images
        return items.take(np.flatnonzero(~np.isin(items.image, self.done)))

    def without(self, names: Ids) -> tuple[Prospects, str]:
        """Return the same after people have done the images of these ids, and a note about ids that are not the run's.

        Raises BadIds if none is.
        """
        place = {name: k for k, name in enumerate(self.found.ids.to_pylist())}
        note = names.unknown(place, where=f"labelled in {self.run.path}")
        return replace(self, done=np.array([place[name] for name in names.names if name in place], np.int64)), note

    def expected(self, items: Items, opening: float, budget: float) -> float:
        """The gain that images or regions chosen at random are expected to bring for a budget of seconds."""
        if not len(items):
            return 0.0
        worth, doubt = self.worth(), items.doubt.sum(axis=0, dtype=float)
        needed = float(items.seconds.sum()) + opening * len(items)  # chance opens an image for every region
        before = worth.mean_iou()
        worth.correct(doubt * min(1.0, budget / needed))
        return worth.mean_iou() - before


def prospects(
    run: Run,
    *,
    pace: Pace | None = None,
    audit: Path | None = None,
    student: Path | None = None,
    progress: Progress | None = None,
) -> Prospects:
    """Survey a run: its kept confidence, read once, or its statistics where none was kept. `pace` asks for regions.

    audit, student: see `review`. Raises BadTable until the run has published its tables, and as `review`.
    """
    known = _audit_of(run, audit)
    weights = None if student is None else _weights(student, run.label_space)
    started = time.monotonic()
    top = top_pixels(run)
    found, kept, looking = survey_statistics(run, known, top), kept_in(run), None
    if kept is not None and kept.recipe.confidence_edges is not None:
        belief = Belief.of(run, kept.recipe.confidence_edges, known, top)
        looking = Looking(run, kept, belief)
        rates = _worth(
            run, found, known, top, weights
        ).rates()  # the first estimate, by which the pool of regions is ranked
        found = survey(looking, pace=pace, rates=rates, progress=progress)
    return Prospects(run, found, looking, known, top, weights, time.monotonic() - started)


def _worth(run: Run, found: Survey, audit: Audit | None, top: Floats, weights: Floats | None) -> Worth:
    doubt = found.images.doubt.sum(axis=0, dtype=float)
    even = np.zeros((len(run.label_space), len(run.label_space)))
    truth = Worth(found.labelled, doubt, even, weights).truth  # without the pixels that are mistaken for another class
    names = run.label_space.names
    confused = confusions(found.around, truth, audit, names, shift(audit, names, top))
    return Worth(found.labelled, doubt, confused, weights)


def _audit_of(run: Run, path: Path | None) -> Audit | None:
    if path is None and not storage.exists(run.audit_path):
        return None
    found = Audit.read(path or run.audit_path)
    if not {row.name for row in found.classes} & set(run.label_space.names):
        raise ValueError(f"{path or run.audit_path} knows no class of {run.path}: name an audit of its teacher")
    return found


def _weights(path: Path, space: LabelSpace) -> Floats:
    """Weights of classes from the scores of a student: 1 - IoU, 1 for a class that it was not scored on."""
    advice = "write one with `autolabel evaluate student/best.pt val.parquet -o scores.json`"
    scores: dict[str, Any] = read_json(path, dict[str, Any], advice=advice)
    if "iou" not in scores:
        raise BadDocument(f"{path} has no 'iou': {advice}")
    iou: dict[str, float | None] = shaped(dict[str, float | None], scores["iou"], f"{path}, 'iou'")
    if not set(iou) & set(space.names):
        raise ValueError(f"{path} has scores of none of the classes {', '.join(space.names)}")
    values = [iou.get(name) for name in space.names]
    return np.array([1.0 if value is None else min(1.0, max(0.0, 1 - value)) for value in values])
