"""Paint many samples of a run into a folder, and ask the run's teacher for what the run has not kept."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from autolabel.manifests import machine
from autolabel.manifests.drawing import LONGEST, draw_label, encode_flat, encode_smooth, write_picture
from autolabel.manifests.places import places
from autolabel.manifests.run.shards import Label
from autolabel.manifests.wording import Progress
from autolabel.pipeline.report.layers import Confidence, Layers, Missing, Photograph, Sources
from autolabel.pipeline.report.pictures import FULL, Drawn, draw_share, mark_rows, write_pictures
from autolabel.teacher.networks.combine import Average, Combination
from autolabel.teacher.networks.explicit import Explicit, ExplicitPairs
from autolabel.teacher.predict import Teacher

_MOST_THREADS = 8  # each holds one image
FULL_SIZED = 200  # images that are drawn at full size; the others at LONGEST
WITH_TEACHER = 24  # images for which the teacher runs again; to run it for all would be to label anew


@dataclass(frozen=True)
class ScalePicture:
    """A picture of the teacher's work at one scale, or of the combined prediction, whose scale is None.

    `shares` of an attention are the mean, least and greatest of its pixels. rows: the first that a highest scale with
    a focus saw when the image was labelled, and the one after the last.
    """

    kind: str  # prediction, attention or combined
    file: str
    size: tuple[int, int]  # width, height
    scale: float | None = None
    shares: tuple[float, float, float] | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Painted:
    """All pictures of one sample."""

    pictures: Drawn
    by_scale: list[ScalePicture]


class Painter:
    """Paints samples into a folder, in several threads. The teacher looks at one image at a time.

    Without kept confidence, `teacher` computes it for the first WITH_TEACHER samples; with `attention` it also shows
    for them what it sees at every scale.
    """

    def __init__(
        self,
        folder: Path,
        sources: Sources,
        *,
        teacher: Teacher | None,
        attention: bool,
        specks: int,
        seen: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """`specks`: pieces of fewer pixels are marked. seen: by sample the rows of a highest scale with a focus."""
        self._seen = seen or {}
        self._folder, self._sources, self._teacher, self._attention = folder, sources, teacher, attention
        self._specks = specks
        self._run = sources.run
        self._one_at_a_time = threading.Lock()

    def paint_all(self, sample_ids: Sequence[str], *, progress: Progress | None = None) -> list[Painted]:
        """Paint the samples, as many at once as there are cores."""
        painted: list[Painted] = []
        with ThreadPoolExecutor(min(_MOST_THREADS, machine.cores())) as pool:
            try:
                for one in pool.map(self.paint, range(len(sample_ids)), sample_ids):
                    painted.append(one)
                    if progress:
                        progress(len(painted), len(sample_ids))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return painted

    def paint(self, place: int, sample_id: str) -> Painted:
        """Paint the sample that is shown at this place, from 0."""
        stem = f"{place:05}-{re.sub('[^A-Za-z0-9]+', '_', sample_id)[-60:]}"
        layers, top = self.see(place, sample_id, self._sources.read(sample_id))
        by_scale: list[ScalePicture] = []
        if self._attention and self._teacher and top is not None and not isinstance(layers.photograph, Missing):
            with self._one_at_a_time:
                by_scale = self._by_scale(self._teacher, stem, layers.photograph, top, rows=self._seen.get(sample_id))
        longest = FULL if place < FULL_SIZED else LONGEST
        drawn = write_pictures(self._folder, layers, stem=stem, run=self._run, longest=longest, specks=self._specks)
        return Painted(drawn, by_scale)

    def see(self, place: int, sample_id: str, layers: Layers) -> tuple[Layers, Label | None]:
        """Add the teacher's confidence, and the fates that follow from it, if it is to look at this sample.

        Returns the layers, and the top classes if it has looked.
        """
        if self._teacher is None or not (layers.confidence is None or self._attention):
            return layers, None
        confidence: Confidence | Missing
        fates: Label | Missing
        top = None
        if isinstance(layers.photograph, Missing):
            confidence = fates = layers.photograph
        elif place >= WITH_TEACHER:
            confidence = fates = Missing(
                f"the teacher runs again for the first {WITH_TEACHER} images only; --keep-confidence would have kept it"
            )
        else:
            polygons = self._sources.polygons(sample_id, layers.coarse)
            with self._one_at_a_time:
                top, confidence = self._predict(self._teacher, layers.photograph, polygons)
            edges = self._run.policy.edges(self._run.label_space)
            level = np.searchsorted(np.array(edges, np.float32), confidence).astype(np.uint8)  # edges that it exceeds
            fates = self._sources.fates(top, level, edges=edges, polygons=polygons)
            if self._run.policy.polygons is not None and isinstance(polygons, Missing):
                confidence = polygons  # it would be the teacher's own, by which the run did not decide
        return (replace(layers, confidence=confidence, fates=fates) if layers.confidence is None else layers), top

    def _predict(
        self, teacher: Teacher, image: Photograph, polygons: Label | Missing | None
    ) -> tuple[Label, Confidence]:
        recipe = self._run.recipe
        evidence = recipe.policy.evidence(recipe.label_space)
        around = None
        if evidence is not None and isinstance(polygons, np.ndarray):
            around = places(polygons, len(recipe.label_space))
        return teacher.confidence(
            image,
            scales=recipe.scales,
            flip=recipe.flip,
            focus=recipe.share,
            temperature=recipe.policy.temperature,
            evidence=evidence,
            places=around,
        )

    def _by_scale(
        self, teacher: Teacher, stem: str, image: Photograph, combined: Label, *, rows: tuple[int, int] | None
    ) -> list[ScalePicture]:
        """The prediction at every scale, ascending, and its attention unless all scales count the same.

        The highest scale's are seen whole here; two lines mark the `rows` that it saw when the image was labelled.
        """
        highest = max(self._run.recipe.scales)

        def written(kind: str, scale: float | None, drawn: Image.Image, encoded: bytes, **more: Any) -> ScalePicture:
            name = f"{stem}-{kind}{'' if scale is None else f'-{scale:g}'}.webp"
            write_picture(self._folder / name, encoded)
            return ScalePicture(kind, f"{self._folder.name}/{name}", drawn.size, scale, **more)

        space = self._run.label_space
        pictures: list[ScalePicture] = []
        for view in teacher.views(image, scales=self._run.recipe.scales):
            marked = rows if view.scale == highest else None
            prediction = mark_rows(draw_label(view.label, space), marked, height=len(image))
            pictures.append(written("prediction", view.scale, prediction, encode_flat(prediction), rows=marked))
            if weights(teacher.combination) != "equal":
                attention = mark_rows(draw_share(view.share), marked, height=len(image))
                shares = float(view.share.mean()), float(view.share.min()), float(view.share.max())
                pictures.append(
                    written("attention", view.scale, attention, encode_smooth(attention), shares=shares, rows=marked)
                )
        whole = draw_label(combined, space)
        return [*pictures, written("combined", None, whole, encode_flat(whole))]


def weights(combination: Combination) -> str:
    """The kind of a combination's weights: equal, chained (the highest scale gets the rest), or free numbers."""
    if isinstance(combination, Average):
        return "equal"
    return "free" if isinstance(combination, Explicit | ExplicitPairs) else "chained"
