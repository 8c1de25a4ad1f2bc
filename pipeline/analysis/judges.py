"""Runs as judges of human labels: which run has labelled an image, and has its teacher seen it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.run.labels import RunConfidence, middles
from autolabel.manifests.samples import Sample
from autolabel.manifests.wording import counted
from autolabel.pipeline.records import Row, all_rows, fingerprint_of, surely_same
from autolabel.teacher.checkpoints import overlap
from autolabel.teacher.loading import seen_by

UNSEEN, UNKNOWN, SEEN = range(3)  # what is known of a teacher and an image, the best first
_RECORD = ["sample_id", "status", "image_bytes", "image_mtime_ns", "image_version", "image_fingerprint"]


@dataclass(frozen=True)
class Judge:
    """A run that has kept its confidence.

    rows: its labelled samples by id. by_content: their ids by the fingerprint of the image. seen: these ids of images
    that the teacher was trained on, None if nobody knows; `why` says why nobody does. middles (L,): the confidence in
    the middle of each level.
    """

    run: Run
    kept: RunConfidence
    rows: dict[str, Row]
    by_content: dict[str, str]
    seen: frozenset[str] | None
    why: str
    middles: NDArray[np.float64]

    @classmethod
    def of(cls, run: Run) -> Judge:
        """The judge of a run, or of the run that it was relabelled from, if that alone has kept its confidence.

        Raises ValueError if none has, or if nothing is labelled; BadTable, BadCheckpoint.
        """
        run = _keeping(run)
        kept = run.confidence
        rows = {row.sample_id: row for row in all_rows(run.path, _RECORD) if row.labelled}
        if not rows:
            raise ValueError(f"{run.path} holds no labelled image: go on with `autolabel generate`")
        by_content = {str(row.image_fingerprint): row.sample_id for row in rows.values()}
        seen, why = _seen(run, by_content)
        return cls(run, kept, rows, by_content, seen, why, middles(kept.edges))

    @property
    def levels(self) -> int:
        """The number of levels of confidence."""
        return len(self.middles)

    def knows(self, sample_id: str) -> int:
        """UNSEEN, UNKNOWN or SEEN."""
        return UNKNOWN if self.seen is None else SEEN if sample_id in self.seen else UNSEEN

    @property
    def silent(self) -> bool:
        """True if level 0 means that nobody said anything, as in runs that were adopted."""
        return self.run.teacher is None


def _keeping(run: Run) -> Run:
    """The run itself, or the one that it was relabelled from, whose teacher has looked at the same images."""
    if run.recipe.confidence_edges is not None or run.source is None or not RunFolder(run.source).exists():
        return run
    source = Run.open(run.source)
    same = source.input_sha256 == run.input_sha256 and source.recipe.teacher_sha256 == run.recipe.teacher_sha256
    return source if same else run


def _seen(run: Run, by_content: dict[str, str]) -> tuple[frozenset[str] | None, str]:
    teacher, reason = run.find_teacher()
    marks = None if teacher is None else seen_by(teacher)
    if marks is None:
        return None, reason or "it does not say which images it has seen"
    known = list(by_content)
    return frozenset(by_content[known[place]] for place in overlap(marks, known)), ""


def require_one_space(space: LabelSpace, judges: Sequence[Judge], *, of: str) -> None:
    """Raise ValueError, naming both label spaces, unless all runs have that of the human labels."""
    for judge in judges:
        if judge.run.label_space != space:
            theirs = judge.run.label_space
            raise ValueError(
                f"{judge.run.path} has label space {theirs.name!r} ({counted(len(theirs), 'class', 'classes')}) but"
                f" {of} {space.name!r} ({len(space)}): compare labels of one label space"
            )


def judge_of(sample: Sample, judges: Sequence[Judge], *, own: bool = False) -> tuple[int, str, int] | None:
    """The place of the judge of a sample, the sample's id there, and what that teacher knows of it; None without any.

    An image is found by its content; its file is read only if no run has a sample of that id and with the same file.
    own: the sample is of the input manifest of the one judge, so its id is enough. Of several runs, one whose teacher
    has not seen the image is taken, then one of which nobody knows, then the first.
    """
    if own:
        row = judges[0].rows.get(sample.sample_id)
        return None if row is None else (0, row.sample_id, judges[0].knows(row.sample_id))
    mark = None
    for judge in judges:
        row = judge.rows.get(sample.sample_id)
        if row is not None and surely_same(sample.image, row):
            mark = row.image_fingerprint
            break
    mark = mark or fingerprint_of(sample.image)
    found = [
        (judge.knows(judge.by_content[mark]), place, judge.by_content[mark])
        for place, judge in enumerate(judges)
        if mark is not None and mark in judge.by_content
    ]
    if not found:
        return None
    knows, place, sample_id = min(found)
    return place, sample_id, knows
