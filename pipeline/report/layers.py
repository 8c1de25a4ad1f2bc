"""Read the layers of a run's samples: photograph, coarse and auto label, confidence, fates.

A layer that cannot be read is no error: a `Missing` with the reason takes its place, because a report is also for runs
that were moved or whose photographs are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.images import BadImage
from autolabel.manifests.reading import read_coarse, read_photograph
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.labels import middles
from autolabel.manifests.run.shards import DamagedLabel, Label
from autolabel.manifests.samples import open_manifest
from autolabel.manifests.tables import BadTable
from autolabel.pipeline.decided import Decided
from autolabel.pipeline.rules import Rules

Photograph = NDArray[np.uint8]
Confidence = NDArray[np.float32]
T = TypeVar("T")


class Missing(str):
    """The reason why a layer is missing."""


@dataclass(frozen=True)
class Layers:
    """The layers of one sample. A layer that no sample of the run has is None.

    photograph (H, W, 3) uint8; coarse and auto (H, W) uint8 train ids; confidence (H, W) float32 in 0..1, polygons
    weighed in if the policy weighs them; fates (H, W) uint8, places in FATES. Under such a policy, coarse is VOID where
    people drew a polygon of no class.
    """

    photograph: Photograph | Missing
    auto: Label | Missing
    coarse: Label | Missing | None
    confidence: Confidence | Missing | None
    fates: Label | Missing | None = None


class Sources:
    """Reads the layers of some samples of a run.

    `note` says why there are no coarse labels although the run had some; else it is empty.
    """

    def __init__(self, run: Run, sample_ids: Collection[str], *, coarse: bool = True) -> None:
        """`coarse` is False for a run without coarse labels. Raises BadTable if the run is not finished."""
        self.run, self.note = run, ""
        self.samples = run.manifest.find(sample_ids)
        self._labels = run.labels
        self._kept = run.confidence if run.recipe.confidence_edges else None
        self._rules: dict[Sequence[float], Rules] = {}  # by the edges of confidence that they tell apart
        space, silent = run.label_space, run.teacher is None
        self._decided = Decided(run.policy, space, self._kept.edges, silent=silent) if self._kept else None
        self._originals = None  # the samples of the input manifest: it alone lists the coarse labels
        if coarse:
            try:
                self._originals = open_manifest(run.input_manifest).find(sample_ids)
            except BadTable as error:
                self.note = f"No pictures of the coarse labels, which only the input manifest lists: {error}."

    @property
    def has_confidence(self) -> bool:
        """True if the run has kept its confidence."""
        return self._kept is not None

    def read(self, sample_id: str) -> Layers:
        """All layers of a sample; confidence and fates are None unless the run has kept its confidence."""
        layers = Layers(
            _attempt(lambda: read_photograph(self.samples[sample_id])),
            _attempt(lambda: self._labels[sample_id]),
            None if self._originals is None else _attempt(lambda: self._coarse(sample_id)),
            None,
        )
        if self._kept is None or self._decided is None:
            return layers
        kept, edges = self._kept, self._kept.edges
        polygons, decided = self.polygons(sample_id, layers.coarse), self._decided
        if decided.weighs and isinstance(polygons, Missing):
            return replace(layers, confidence=polygons, fates=polygons)
        asked = None if isinstance(polygons, Missing) else polygons
        found = _attempt(lambda: decided.of(kept, sample_id, asked))
        if isinstance(found, Missing):
            return replace(layers, confidence=found, fates=found)
        fates = self.fates(*found, edges=edges, polygons=polygons)
        return replace(layers, confidence=from_levels(found[1], edges), fates=fates)

    def polygons(self, sample_id: str, coarse: Label | Missing | None) -> Label | Missing | None:
        """The coarse label that decided: None if the image had none, Missing if it had one that cannot be read now."""
        if isinstance(coarse, Missing):
            sample = (self._originals or {}).get(sample_id)
            return coarse if sample is None or sample.coarse_label is not None else None
        return Missing(self.note) if coarse is None and self.note else coarse

    def fates(
        self, top: Label, level: Label, *, edges: Sequence[float], polygons: Label | Missing | None
    ) -> Label | Missing:
        """The fate of every pixel, decided again from top class, level of confidence and `polygons`."""
        if isinstance(polygons, Missing):
            return polygons
        if edges not in self._rules:
            self._rules[edges] = Rules(self.run.policy, self.run.label_space, edges, silent=self.run.teacher is None)
        rules = self._rules[edges]
        return rules.fates(top.astype(np.int16) * np.int16(rules.levels) + level, polygons)

    def _coarse(self, sample_id: str) -> Label:
        sample = (self._originals or {}).get(sample_id)
        void = self.run.policy.polygons is not None  # polygons of no class decide only then
        label = read_coarse(sample, self.run.label_space, drawn_void=void) if sample else None
        if label is None:
            raise BadImage("this image has no coarse label" if sample else "the input manifest no longer lists it")
        return label


def _attempt(read: Callable[[], T]) -> T | Missing:
    try:
        return read()
    except (BadImage, DamagedLabel) as error:
        return Missing(error)
    except FileNotFoundError as error:
        return Missing(f"{error.filename} is gone")


def from_levels(level: NDArray[np.uint8], edges: Sequence[float]) -> Confidence:
    """Turn levels (H, W) uint8 between ascending edges into (H, W) float32: each becomes the middle of its level.

    Level k holds the confidences above the k-th edge; 0 and 1 are the outermost edges.
    """
    confidence: Confidence = middles(edges).astype(np.float32)[level]
    return confidence
