"""A source of predictions without a teacher: the confidence that an earlier run has kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from autolabel.manifests.images import BadImage
from autolabel.manifests.reading import read_coarse
from autolabel.manifests.recipe import Recipe
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.labels import CONFIDENCE, SECOND, TOP
from autolabel.manifests.run.ledger import Ledger
from autolabel.manifests.samples import Sample
from autolabel.manifests.schemas import CONFIDENCE_BINS
from autolabel.manifests.tables import BadTable
from autolabel.pipeline.posterior import FromLevels
from autolabel.pipeline.predictor import Decoded, Refused, Size, is_drawn, read_layer
from autolabel.pipeline.records import Row, read_rows
from autolabel.pipeline.units import Unit
from autolabel.teacher.decide import Prediction

_IDENTITY = ("image_bytes", "image_mtime_ns", "image_version", "image_fingerprint")  # which image file it was


class KeptPredictor:
    """The top classes and levels of confidence that a run has kept, for another policy; no image is opened.

    Under a policy that weighs polygons, codes and statistics are those of the posterior (pipeline/posterior.py).
    """

    device = "cpu"

    def __init__(self, source: Run, recipe: Recipe) -> None:
        policy = recipe.policy
        self.source, self._probability = source, recipe.keep_probability
        assert source.recipe.confidence_edges is not None
        self.edges = source.recipe.confidence_edges
        self._levels = FromLevels(policy, source.label_space, self.edges, silent=source.teacher is None)
        self._ledger = Ledger(source.path)
        self._rows = lru_cache(maxsize=4)(self._read_rows)

    def _read_rows(self, unit: str) -> dict[str, Row]:
        commit = self._ledger.get(unit)
        if commit is None:
            raise BadTable(f"{self.source.path} lacks the record of unit {unit}: verify the run")
        return {row.sample_id: row for row in read_rows(commit)}

    def decode(self, sample: Sample, unit: Unit, row: Row) -> Decoded | Refused:
        """Take over the identity of the image from the earlier run, and read the coarse label."""
        earlier = self._rows(unit.name).get(sample.sample_id)
        if earlier is None:
            raise BadTable(f"{self._ledger[unit.name].path} lacks sample {sample.sample_id!r}: verify the run")
        row = replace(row, **{name: getattr(earlier, name) for name in _IDENTITY})
        if not earlier.labelled:
            return Refused(row, earlier.reason or "")
        try:
            coarse = read_coarse(sample, self.source.label_space, drawn_void=self._levels.weighs)
        except BadImage as error:
            return Refused(row, str(error))
        return Decoded(row, coarse=coarse, places=self._levels.places(coarse))

    def predict(self, batch: Sequence[Decoded]) -> list[Prediction]:
        """Read the predictions that the earlier run has kept. Raises DamagedLabel."""
        return [self._kept(decoded) for decoded in batch]

    def _kept(self, decoded: Decoded) -> Prediction:
        row = self._rows(decoded.row.unit)[decoded.row.sample_id]
        top, level = (read_layer(self.source, row, layer) for layer in (TOP, CONFIDENCE))
        second = decoded.places is not None and SECOND in row.layers()
        prediction = self._levels(
            top, level, place=decoded.places, second=read_layer(self.source, row, SECOND) if second else None,
            probability=self._probability,
        )  # fmt: skip
        if row.focus_top is not None and row.focus_bottom is not None:
            prediction = replace(prediction, seen=(row.focus_top, row.focus_bottom))
        weighed = self.source.policy.polygons is not None and is_drawn(decoded.coarse, self.source.label_space)
        if weighed or decoded.places is not None:
            return prediction
        # What the earlier run counted is exact: the teacher's own confidences, as floats.
        classes = len(self.source.label_space)
        histogram, confidence = np.zeros((classes, CONFIDENCE_BINS), np.int64), np.zeros(classes)
        for entry in row.classes or ():
            c, mean = entry["class_id"], entry["mean_confidence"]
            histogram[c] = entry["confidence_hist"]
            confidence[c] = 0 if mean is None else mean * histogram[c].sum()
        return replace(prediction, histogram=histogram, confidence=confidence)

    def planned_batch(self, size: Size) -> int:
        """Samples are read one by one."""
        return 1

    def in_flight(self, size: Size, *, most: int) -> int:
        """Every thread may read one sample."""
        return most

    def budget(self) -> dict[str, Any]:
        """Name the run that the confidence comes from."""
        return {
            "device": f"confidence kept by {self.source.path.name}", "precision": self.source.recipe.precision,
        }  # fmt: skip
