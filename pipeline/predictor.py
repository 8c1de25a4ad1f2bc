"""Sources of predictions, and the one that everybody thinks of: a teacher that looks at images.

The labeller asks a source and does the rest: threads, rules, encoding, commits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.images import BadImage
from autolabel.manifests.label_space import IGNORE, LabelSpace
from autolabel.manifests.places import Places, places
from autolabel.manifests.reading import decode_photograph, read_coarse, read_version
from autolabel.manifests.recipe import Recipe
from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.run.labels import RunLabels, stored_labels
from autolabel.manifests.run.shards import Label
from autolabel.manifests.samples import Sample
from autolabel.manifests.teachers import TeacherName
from autolabel.pipeline.records import Row, identified, known_by
from autolabel.pipeline.units import Unit
from autolabel.teacher.decide import Prediction
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.memory import BATCHES, Budget, planned_batch
from autolabel.teacher.predict import Teacher

Size = tuple[int, int]  # height, width
_SIZES_TOLD = 50  # sizes in `run.json`, the latest


@dataclass(frozen=True)
class Refused:
    """A sample that cannot be labelled: its row so far, and the reason."""

    row: Row
    reason: str


@dataclass(frozen=True)
class Decoded:
    """A sample that is ready to be predicted: its row so far, its photograph and its coarse label.

    image: (H, W, 3) uint8 RGB, empty where the predictor needs none. coarse: (H, W) uint8 train ids, or None. places:
    (H, W) int16 around its polygons (manifests/evidence.py), None without polygons, or without a policy that asks.
    """

    row: Row
    image: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 0, 3), np.uint8))
    coarse: Label | None = None
    places: Places | None = None


class Predictor(Protocol):
    """A source of predictions. Its methods are called from several threads."""

    device: str  # kind of device: "cpu", "cuda" or "mps"
    edges: tuple[float, ...]  # confidences that a prediction tells apart, ascending

    def decode(self, sample: Sample, unit: Unit, row: Row) -> Decoded | Refused:
        """Read the inputs of a sample. Raises OSError where the disk is to blame, not the file."""

    def predict(self, batch: Sequence[Decoded]) -> list[Prediction]:
        """Predict samples of one size, at most `planned_batch` of them. Raises NotEnoughMemory, MemoryTaken."""

    def planned_batch(self, size: Size) -> int:
        """The number of images of this size in a batch; it depends on nothing but the recipe."""

    def in_flight(self, size: Size, *, most: int) -> int:
        """The number of such batches that memory allows to be under way together, 1 to `most`."""

    def budget(self) -> dict[str, Any]:
        """The device and the memory that it has and needs, for `run.json`."""


def load_for(teacher: TeacherName, recipe: Recipe, *, device: str = "auto", labels: bool = False) -> Teacher:
    """Load a teacher as a recipe wants it; compiled only where it makes `labels`. Raises as `load_teacher`."""
    return load_teacher(
        teacher, device=device, precision=recipe.precision, combine=recipe.combine, window=recipe.window,
        class_map=recipe.class_map, space=recipe.label_space, compile=recipe.compile and labels,
    )  # fmt: skip


class TeacherPredictor:
    """A teacher that looks at every image at the recipe's scales."""

    def __init__(self, teacher: Teacher, recipe: Recipe) -> None:
        self.teacher, self.recipe, self.device = teacher, recipe, teacher.device.type
        self.edges = recipe.confidence_edges or recipe.policy.edges(recipe.label_space)
        focus = recipe.focus
        certified = focus is not None and focus.within is not None
        self._swings = np.array([focus.within, focus.beyond], np.float32) if focus and certified else None
        self._evidence = recipe.policy.evidence(recipe.label_space)
        self._in_flight: dict[Size, int] = {}

    def decode(self, sample: Sample, unit: Unit, row: Row) -> Decoded | Refused:
        """Read photograph and coarse label, of the size that the manifest says."""
        try:
            now, data = read_version(sample.image)
            row = replace(known_by(row, now), image_fingerprint=storage.fingerprint_bytes(data))
            image = decode_photograph(sample, data)
            space, weighed = self.recipe.label_space, self._evidence is not None
            coarse = read_coarse(sample, space, drawn_void=weighed)
            around = places(coarse, len(space)) if weighed and coarse is not None else None
        except (BadImage, MemoryError) as error:
            reason = str(error) if isinstance(error, BadImage) else "not enough memory to decode it"
            return Refused(row if row.image_fingerprint else identified(row, sample.image), reason)
        return Decoded(row, image, coarse, around)

    def predict(self, batch: Sequence[Decoded]) -> list[Prediction]:
        """Predict images of one size in one pass. Raises NotEnoughMemory, MemoryTaken."""
        recipe, size = self.recipe, batch[0].image.shape[:2]
        kept = recipe.confidence_edges is not None
        drawn = [kept and is_drawn(decoded.coarse, recipe.label_space) for decoded in batch]
        predictions = self.teacher.predict_in_batches(
            [decoded.image for decoded in batch], self.planned_batch(size), edges=self.edges, scales=recipe.scales,
            flip=recipe.flip, focus=recipe.share, temperature=recipe.policy.temperature, evidence=self._evidence,
            places=[decoded.places for decoded in batch], own=kept, second=any(drawn),
            probability=recipe.keep_probability, swings=self._swings,
            alone=self.device != "cpu" and self.in_flight(size, most=BATCHES) == 1,
        )  # fmt: skip
        return [
            replace(prediction, second=_where_unnamed(prediction.second, decoded.coarse) if polygons else None)
            for prediction, decoded, polygons in zip(predictions, batch, drawn, strict=True)
        ]

    def planned_batch(self, size: Size) -> int:
        """The batch that follows from the size and the recipe."""
        recipe = self.recipe
        return planned_batch(*size, scales=recipe.scales, pixels=recipe.batch_pixels, focus=recipe.share)

    def in_flight(self, size: Size, *, most: int) -> int:
        """The number of batches that fit into memory together, 1 to `most`."""
        if size not in self._in_flight:
            self._in_flight[size] = self._budget().in_flight(*size, batch=self.planned_batch(size), most=most)
        if size in self.teacher.gate.crowded:
            self._in_flight[size] = 1
        return self._in_flight[size]

    def _budget(self) -> Budget:
        return self.teacher.budget(scales=self.recipe.scales, flip=self.recipe.flip, focus=self.recipe.share)

    def budget(self) -> dict[str, Any]:
        """The memory of the device, the bytes that a pixel needs, and by size the images of a batch, and batches."""
        sizes = {f"{height}x{width}": (height, width) for height, width in list(self._in_flight)[-_SIZES_TOLD:]}
        return {
            **asdict(self._budget()),
            "images_at_once": {name: self.planned_batch(size) for name, size in sizes.items()},
            "batches_in_flight": {name: self.in_flight(size, most=BATCHES) for name, size in sizes.items()},
        }


def is_drawn(coarse: Label | None, space: LabelSpace) -> bool:
    """True if a coarse label names a class anywhere."""
    return coarse is not None and bool((coarse < len(space)).any())


def _where_unnamed(second: Label | None, coarse: Label | None) -> Label | None:
    """The second class where nobody has drawn, else 255: polygons say nothing of other pixels, and it takes room."""
    return None if second is None or coarse is None else np.where(coarse == IGNORE, second, np.uint8(IGNORE))


def read_layer(run: RunFolder, row: Row, layer: str) -> Label:
    """The map of a layer that belongs to a row of a commit record. Raises DamagedLabel unless it is as committed."""
    return RunLabels(stored_labels(run.path, [vars(row)], layer=layer), None)[row.sample_id]
