"""The labels that may leave in an export, from a run or any manifest, with confidence and scores where a run has them.

A label of a run is read as its commit record says, so that one which has changed since is noticed; a label that people
made is read as its manifest says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.images import BadImage
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.locations import location
from autolabel.manifests.reading import blames_file, read_coarse
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.labels import ChangedLabel, RunConfidence, RunLabels, middles
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.run.shards import DamagedLabel, Label
from autolabel.manifests.samples import ManifestFile, Sample, open_manifest
from autolabel.manifests.selection import by_trust
from autolabel.manifests.tables import BadTable
from autolabel.manifests.wording import reason
from autolabel.pipeline.decided import Decided
from autolabel.pipeline.records import Row, all_rows, changed_images

Confidence = NDArray[np.uint8]
_IDENTITY = ["sample_id", "image_bytes", "image_mtime_ns", "image_version", "image_fingerprint"]


class BadLabel(ValueError):
    """A label cannot be read as it was written; the message says why."""


class RunMaps:
    """The labels, confidence and statistics of one run, by sample id."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.labels: RunLabels = run.labels
        self._kept: RunConfidence | None = run.confidence if run.recipe.confidence_edges is not None else None
        edges, silent = run.recipe.confidence_edges or (), run.teacher is None
        self._shades = shades(edges)
        self._decided = Decided(run.policy, run.label_space, edges, silent=silent) if self._kept else None

    @cached_property
    def statistics(self) -> pa.Table:
        """The columns of the images and review tables, a row for each image, the least trusted first."""
        return by_trust(self.run.path)

    @cached_property
    def rows(self) -> dict[str, int]:
        """The row of every sample in `statistics`."""
        return {name: row for row, name in enumerate(self.statistics["sample_id"].to_pylist())}

    @cached_property
    def trusts(self) -> list[float | None]:
        """The trust of every row of `statistics`."""
        trusts: list[float | None] = self.statistics["trust"].to_pylist()
        return trusts

    @cached_property
    def _scores(self) -> list[float | None]:
        scores: list[float | None] = self.statistics["mean_confidence"].to_pylist()
        return scores

    @cached_property
    def _images(self) -> dict[str, Row]:
        """The identity of every image file that was labelled, by sample id."""
        return {row.sample_id: row for row in all_rows(self.run.path, _IDENTITY)}

    def prepare(self) -> None:
        """Read the tables that `load` and `require_same_photograph` look into; they are cached."""
        assert self.rows is not None and self._scores is not None and self._images is not None
        assert self._decided is None or not self._decided.weighs or self._polygons is not None

    def require_same_photograph(self, sample: Sample) -> None:
        """Raise BadImage if the photograph is another one than was labelled."""
        row = self._images.get(sample.sample_id)
        if row is not None and row.image_fingerprint and changed_images([(sample.image, row)]).get(sample.sample_id):
            raise BadImage(f"image {sample.image} has changed since it was labelled: its label belongs to another one")

    def load(self, sample_id: str) -> tuple[Label, Confidence | None, float | None]:
        """Label (H, W) uint8, confidence (H, W) uint8 and mean confidence of a sample. Raises BadLabel."""
        try:
            label = self.labels[sample_id]
            confidence = self._confidence(sample_id)
        except KeyError as error:
            raise BadLabel(f"run {self.run.path} holds no label of it any more") from error
        except ChangedLabel as error:  # it says what to do
            raise BadLabel(str(error)) from error
        except DamagedLabel as error:
            raise BadLabel(
                f"{error}: `autolabel verify {self.run.path}` says what is damaged and what a person changed"
            ) from error
        row = self.rows.get(sample_id)
        return label, confidence, None if row is None else self._scores[row]

    @cached_property
    def _polygons(self) -> dict[str, Sample]:
        """The samples of the input manifest by id, which lists their coarse labels; none where it is gone."""
        try:
            return {sample.sample_id: sample for sample in open_manifest(self.run.input_manifest).samples()}
        except BadTable:
            return {}

    def _confidence(self, sample_id: str) -> Confidence | None:
        """The confidence that decided, as shades; None if it was not kept, or if the polygons that decided are gone.

        Raises KeyError, DamagedLabel.
        """
        if self._kept is None or self._decided is None:
            return None
        if not self._decided.weighs:
            return self._shades[self._kept[sample_id][1]]
        try:
            coarse = read_coarse(self._polygons[sample_id], self.run.label_space, drawn_void=True)
        except (BadImage, KeyError, OSError):
            return None
        return self._shades[self._decided.of(self._kept, sample_id, coarse)[1]]


def shades(edges: tuple[float, ...]) -> Confidence:
    """255 times the probability that each level between ascending edges stands for: (256,) uint8.

    That is the middle of a level; 0 and 1 are the outermost edges.
    """
    table = np.full(256, 255, np.uint8)
    table[: len(edges) + 1] = np.rint(255 * middles(edges))
    return table


@dataclass(frozen=True)
class LabelSource:
    """A run or manifest whose labels are to leave. `manifest` lists its samples; `run` is None for a manifest."""

    path: Path
    manifest: ManifestFile
    run: Run | None = None

    @classmethod
    def open(cls, source: Run | str | Path) -> LabelSource:
        """Open a run, by its folder, or a manifest. Raises ValueError, also for a run that has published no label."""
        if not isinstance(source, Run) and not storage.is_folder(location(source)):
            return cls(location(source), open_manifest(source))
        run = Run.open(source)
        if run.accounts is None:
            raise ValueError(f"{run.path} has published no label yet: finish it first with `autolabel generate`")
        return cls(run.path, run.manifest, run)

    @property
    def space(self) -> LabelSpace:
        """The classes of the labels."""
        return self.manifest.label_space

    @cached_property
    def maps(self) -> dict[Path, RunMaps]:
        """The maps of every run that made labels, by its folder."""
        return {path: RunMaps(Run.open(path)) for path in self.manifest.runs}

    def unlabelled(self) -> Iterator[tuple[str, str]]:
        """The samples of a run that are in quarantine, with their reasons; a manifest lists its own."""
        if self.run is not None:
            for row in self.run.quarantine().to_pylist():
                yield row["sample_id"], row["reason"]

    def mark(self, sample: Sample) -> str:
        """A mark of a sample's label, which another label does not have: its checksum, or size and time of its file."""
        if sample.run is not None:
            return str(self.maps[sample.run].labels.crc32c(sample.sample_id))
        status = None if sample.label is None else storage.stat(sample.label)
        return "" if status is None else f"{status.size} {status.mtime_ns}"

    def prepare(self) -> None:
        """Read what threads will look up, before they start."""
        for maps in self.maps.values():
            maps.prepare()

    @property
    def left(self) -> int:
        """The number of a run's samples that are not labelled yet."""
        return self.run.accounts.left if self.run is not None and self.run.accounts is not None else 0

    def load(self, sample: Sample) -> tuple[Label, Confidence | None, float | None]:
        """Label (H, W) uint8, confidence (H, W) uint8 and mean confidence of a sample; the last two where known.

        Raises BadLabel, and OSError for trouble of the disk.
        """
        if sample.run is not None:
            return self.maps[sample.run].load(sample.sample_id)
        try:
            return read_sample_label(sample, self.space), None, None
        except (BadImage, DamagedLabel) as error:
            raise BadLabel(str(error)) from error
        except OSError as error:
            if not blames_file(error):
                raise
            raise BadLabel(f"{sample.label}: {reason(error)}") from error
