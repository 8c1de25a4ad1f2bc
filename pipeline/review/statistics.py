"""The doubts of every image from the statistics of a run alone, for runs that have kept no confidence."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from autolabel.manifests.run.folder import Run
from autolabel.manifests.schemas import CONFIDENCE_BINS
from autolabel.pipeline.analysis.audit_record import Audit
from autolabel.pipeline.review.belief import KINDS, MISSED, OTHER, VOID, WRONG, Floats, left_out, right
from autolabel.pipeline.review.survey import Survey, images_of

_EDGES = tuple(k / CONFIDENCE_BINS for k in range(1, CONFIDENCE_BINS))
_KEPT, _HIST = "kept_pixels", "confidence_hist"
_IGNORED = ("below_threshold_pixels", "near_boundary_pixels", "in_small_piece_pixels")


def survey_statistics(run: Run, audit: Audit | None, top: Floats) -> Survey:
    """The survey of a run's images, from the histograms of confidence that it counts by class. There are no regions.

    A class's kept pixels are taken to be those of highest confidence, and its ignored ones those of lowest. Raises
    BadTable until the run has published its statistics.
    """
    space, images = run.label_space, run.statistics("images", ("sample_id", "height", "width"))
    ids = images["sample_id"].combine_chunks()
    p, void = right(_EDGES, space.names, audit, top), left_out(_EDGES, space.names, audit)
    doubt, labelled = np.zeros((len(ids), KINDS, len(space)), np.float32), np.zeros(len(space))
    for table in run.stream_statistics(
        "classes", ("sample_id", "class_id", "pixels", "agreeing_pixels", _HIST, _KEPT, *_IGNORED)
    ):
        place = pc.index_in(table["sample_id"], ids).combine_chunks().to_numpy(zero_copy_only=False)
        c = table["class_id"].to_numpy()
        counts = _histograms(table)
        kept = _filled(counts[:, ::-1], table[_KEPT].to_numpy())[:, ::-1]
        ignored = _filled(counts - kept, sum(table[name].to_numpy() for name in _IGNORED))
        unconfirmed = 1 - np.minimum(1, table["agreeing_pixels"].to_numpy() / np.maximum(1, kept.sum(axis=1)))
        known = 1 - void[c]
        doubt[place, WRONG, c] = (kept * (1 - p[c]) * known).sum(axis=1) * unconfirmed  # by a person's coarse label
        doubt[place, MISSED, c] = (ignored * p[c] * known).sum(axis=1)
        doubt[place, OTHER, c] = (ignored * (1 - p[c]) * known).sum(axis=1)
        doubt[place, VOID, c] = (kept * void[c]).sum(axis=1) * unconfirmed
        labelled += np.bincount(c, table["pixels"].to_numpy(), minlength=len(space))
    sizes = np.stack([images[side].to_numpy() for side in ("height", "width")], axis=1).astype(np.int64)
    around = np.zeros((len(space), len(space)), np.int64)
    nothing = images_of(sizes[:0], doubt[:0])
    return Survey(ids, images_of(sizes, doubt), nothing, labelled, around)


def top_pixels(run: Run) -> Floats:
    """Pixels of a run by the teacher's top class (C,)."""
    counts = np.zeros(len(run.label_space))
    for table in run.stream_statistics("classes", ("class_id", _HIST)):
        np.add.at(counts, table["class_id"].to_numpy(), _histograms(table).sum(axis=1))
    return counts


def _histograms(table: pa.Table) -> NDArray[np.int64]:
    """The histograms of confidence of some rows (N, 20)."""
    values = np.concatenate([chunk.flatten().to_numpy() for chunk in table[_HIST].chunks] or [np.empty(0, np.int64)])
    return values.reshape(len(table), CONFIDENCE_BINS)


def _filled(counts: NDArray[np.int64], amount: NDArray[np.int64]) -> NDArray[np.int64]:
    """Take `amount` (N,) of what is in bins (N, B), from the first bin on."""
    before = counts.cumsum(axis=1) - counts
    return np.asarray(np.clip(amount[:, None] - before, 0, counts))
