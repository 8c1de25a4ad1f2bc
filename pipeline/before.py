"""The machine's own label of an image, and how sure the teacher was: what corrections are compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autolabel.manifests.formats.exchange import Returned
from autolabel.manifests.formats.png_back import decode_edited
from autolabel.manifests.images import BadImage, require_size
from autolabel.manifests.reading import read_coarse, read_file
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.kept import kept_in
from autolabel.manifests.run.labels import LABELS, committed_labels
from autolabel.manifests.run.shards import DamagedLabel, Label, crc32c
from autolabel.manifests.samples import Sample, open_manifest
from autolabel.manifests.tables import BadTable
from autolabel.pipeline.posterior import FromLevels
from autolabel.pipeline.rules import Codes, Rules


@dataclass(frozen=True)
class Before:
    """One image as the run left it. All maps are (H, W) uint8.

    label: train ids, None where somebody has written over it and it cannot be decided again. top, level: the teacher's
    top class and its level of confidence, None where the run keeps none; polygons are weighed in if the policy does so,
    from levels. fate: the rule of the policy that decided each pixel, a place in FATES; None where nobody knows: levels
    do not tell all that `generate` decides from probabilities and polygons.
    """

    label: Label | None
    top: Label | None = None
    level: Label | None = None
    fate: Label | None = None


class MachineSays:
    """The labels and confidences of a run, by sample id."""

    def __init__(self, run: Run) -> None:
        """Raises BadTable for damaged records."""
        self.run, self.labels = run, committed_labels(run.path, LABELS)
        source = kept_in(run)
        self._kept = source.confidence if source else None
        self.edges = self._kept.edges if self._kept else None
        silent = run.teacher is None
        self._rules = Rules(run.policy, run.label_space, self.edges, silent=silent) if self.edges else None
        self._levels = FromLevels(run.policy, run.label_space, self.edges, silent=silent) if self.edges else None
        self._weighs = run.policy.polygons is not None
        self._samples: dict[str, Sample] = {}

    def look_up(self, sample_ids: Collection[str]) -> None:
        """Find these images in the input manifest, which names their polygons, all at once."""
        with contextlib.suppress(BadTable):  # without polygons, checksums tell where they mattered
            self._samples |= open_manifest(self.run.input_manifest).find(sample_ids)

    def before(self, sample_id: str) -> Before:
        """The label, confidence and fates of an image. Raises KeyError for one that is unknown, DamagedLabel."""
        label, decided = self.label(sample_id), self._decided(sample_id)
        if decided is None or self._rules is None:
            return Before(label)
        codes, coarse = decided
        top, level = (x.astype(np.uint8) for x in np.divmod(codes, self._rules.levels))
        if self._weighs and crc32c(self._rules.apply(codes, coarse).label) != self.labels[sample_id].crc32c:
            return Before(label, top, level)
        return Before(label, top, level, self._rules.fates(codes, coarse))

    def label(self, sample_id: str) -> Label | None:
        """The label as it was committed: read, or decided again by the run's policy; None if it is gone."""
        stored = self.labels[sample_id]
        try:
            return stored.read(sample_id, self.run.label_space)
        except DamagedLabel:
            if stored.index is not None:
                raise
        decided = self._decided(sample_id)
        if decided is None or self._rules is None:
            return None
        label = self._rules.apply(*decided).label
        return label if crc32c(label) == stored.crc32c else None

    def _decided(self, sample_id: str) -> tuple[Codes, Label | None] | None:
        """The codes from which the policy decides, as far as levels tell them, and the coarse label."""
        if self._levels is None or self._kept is None or sample_id not in self._kept:
            return None
        coarse = self._coarse(sample_id)
        place = self._levels.places(coarse)
        second = None if place is None else self._kept.second(sample_id)
        return self._levels(*self._kept[sample_id], place=place, second=second).codes, coarse

    def _coarse(self, sample_id: str) -> Label | None:
        if sample_id not in self._samples:
            self.look_up([sample_id])
        try:
            return read_coarse(self._samples[sample_id], self.run.label_space, drawn_void=self._weighs)
        except (BadImage, KeyError, OSError):
            return None

    def size(self, sample_id: str) -> tuple[int, int]:
        """Height and width of an image."""
        stored = self.labels[sample_id]
        return stored.height, stored.width

    def pngs_below(self, path: Path) -> list[str]:
        """The samples whose labels are PNGs at or below a path in the run."""
        return [
            sample_id for sample_id, stored in self.labels.items()
            if stored.index is None and (stored.path == path or stored.path.is_relative_to(path))
        ]  # fmt: skip

    def edited(self, sample_id: str) -> Returned | Path | None:
        """The label of a PNG that is another one than was committed; None if it is the same.

        A file that is no label of the right size is returned as its path: it is damaged, or not saved as a label.
        """
        stored, space = self.labels[sample_id], self.run.label_space
        try:
            stored.read(sample_id, space)
            return None
        except DamagedLabel:
            pass
        try:
            label = decode_edited(read_file(stored.path), space)
            require_size(label, (stored.height, stored.width))
        except (BadImage, OSError):
            return stored.path
        return None if crc32c(label) == stored.crc32c else Returned(sample_id, label)  # the same, saved in another form
