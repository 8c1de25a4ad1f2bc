"""The doubts of every image from the statistics of a run alone, for runs that have kept no confidence."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from autolabel.manifests.run.folder import Run
from autolabel.manifests.schemas import CONFIDENCE_BINS
from autolabel.pipeline.analysis.audit_record import Audit
from autolabel.pipeline.review.belief import MISSED, OTHER, WRONG, right
from autolabel.pipeline.review.survey import Survey, images_of

_EDGES = tuple(k / CONFIDENCE_BINS for k in range(1, CONFIDENCE_BINS))
_KEPT, _HIST = "kept_pixels", "confidence_hist"
_IGNORED = ("below_threshold_pixels", "near_boundary_pixels", "in_small_piece_pixels")


def survey_statistics(run: Run, audit: Audit | None) -> Survey:
    """The survey of a run's images, from the histograms of confidence that it counts by class. There are no regions.

    A class's kept pixels are taken to be those of highest confidence, and its ignored ones those of lowest. Raises
    BadTable until the run has published its statistics.
    """
    space, images = run.label_space, run.statistics("images", ("sample_id", "height", "width"))
    ids = images["sample_id"].combine_chunks()
    p = right(_EDGES, space.names, audit)
    doubt, labelled = np.zeros((len(ids), 3, len(space)), np.float32), np.zeros(len(space))
    for table in run.stream_statistics("classes", ("sample_id", "class_id", "pixels", _HIST, _KEPT, *_IGNORED)):
        place = pc.index_in(table["sample_id"], ids).combine_chunks().to_numpy(zero_copy_only=False)
        c = table["class_id"].to_numpy()
        counts = np.array(table[_HIST].to_pylist(), np.int64).reshape(len(table), CONFIDENCE_BINS)
        kept = _filled(counts[:, ::-1], table[_KEPT].to_numpy())[:, ::-1]
        ignored = _filled(counts - kept, sum(table[name].to_numpy() for name in _IGNORED))
        doubt[place, WRONG, c] = (kept * (1 - p[c])).sum(axis=1)
        doubt[place, MISSED, c] = (ignored * p[c]).sum(axis=1)
        doubt[place, OTHER, c] = (ignored * (1 - p[c])).sum(axis=1)
        labelled += np.bincount(c, table["pixels"].to_numpy(), minlength=len(space))
    sizes = np.stack([images[side].to_numpy() for side in ("height", "width")], axis=1).astype(np.int64)
    around = np.zeros((len(space), len(space)), np.int64)
    nothing = images_of(sizes[:0], doubt[:0])
    return Survey(ids, images_of(sizes, doubt), nothing, labelled, around)


def _filled(counts: NDArray[np.int64], amount: NDArray[np.int64]) -> NDArray[np.int64]:
    """Take `amount` (N,) of what is in bins (N, B), from the first bin on."""
    before = counts.cumsum(axis=1) - counts
    return np.asarray(np.clip(amount[:, None] - before, 0, counts))
