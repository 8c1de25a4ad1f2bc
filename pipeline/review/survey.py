"""One pass over the kept confidence of a run: the doubts of every image, and the regions that may be worth a look.

Memory: 16 bytes a class for each image, and at most `POOL` regions, of about as many bytes. Images are read by threads,
a bounded number ahead, in the order of the run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from autolabel.manifests.ahead import ahead
from autolabel.manifests.images import BadImage
from autolabel.manifests.label_space import IGNORE, VOID
from autolabel.manifests.machine import cores
from autolabel.manifests.reading import read_coarse
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.labels import CONFIDENCE, LABELS, SECOND, TOP
from autolabel.manifests.run.ledger import Ledger
from autolabel.manifests.run.shards import Label
from autolabel.manifests.samples import Sample, open_manifest
from autolabel.manifests.tables import BadTable
from autolabel.manifests.wording import Progress
from autolabel.pipeline.decided import Decided
from autolabel.pipeline.predictor import read_layer
from autolabel.pipeline.records import Row, read_rows
from autolabel.pipeline.review.belief import KINDS, Belief, Doubt, Floats
from autolabel.pipeline.review.effort import Pace
from autolabel.pipeline.review.regions import UNSURE, Regions, find_regions

POOL = 100_000  # regions in memory: the best by a first estimate of gain per second
FROM_ONE = 32  # regions that one image can have in it
_STEP = 4  # of every so many rows and columns the neighbours are counted
_RECORD = ["sample_id", "status", "height", "width", "label", "label_index",
           "label_crc32c", "top_crc32c", "confidence_crc32c", "second_crc32c"]  # fmt: skip


@dataclass(frozen=True)
class Items:
    """N things that can be chosen, images or regions of them, in the order of images.

    image (N,): place in `Survey.ids`. doubt (N, 4, C) float32. seconds (N,): of the correction alone. box (N, 4): top,
    left, height, width. region (N,): number in its image, -1 for a whole image. pixels, boundary (N,).
    """

    image: NDArray[np.int64]
    doubt: NDArray[np.float32]
    seconds: Floats
    box: NDArray[np.int64]
    region: NDArray[np.int64]
    pixels: NDArray[np.int64]
    boundary: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.image)

    def take(self, places: NDArray[np.int64]) -> Items:
        """Some of the items."""
        return Items(*(getattr(self, name)[places] for name in Items.__annotations__))

    @classmethod
    def joined(cls, parts: Sequence[Items]) -> Items:
        """The items of all parts, which are one at least."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__annotations__))


@dataclass(frozen=True)
class Survey:
    """All that a choice needs. ids (I,): the images. images: one item for each of them; regions: of them, if asked for.

    labelled (C,): pixels of the labels. around (C, C): neighbouring pixels of two top classes. dropped: regions that
    did not fit into the pool.
    """

    ids: pa.Array
    images: Items
    regions: Items
    labelled: Floats
    around: NDArray[np.int64]
    dropped: int = 0


@dataclass(frozen=True)
class _Seen:
    row: Row
    doubt: Doubt
    labelled: NDArray[np.int64]
    around: NDArray[np.int64]
    regions: Items | None


class Looking:
    """Reads one image of a run, whose confidence lies in `kept` (the same run, or the one it was relabelled from)."""

    def __init__(self, run: Run, kept: Run, belief: Belief) -> None:
        self.run, self.kept, self.belief = run, kept, belief
        edges = kept.recipe.confidence_edges
        assert edges is not None
        self._decided = Decided(run.policy, run.label_space, edges, silent=run.teacher is None)
        self._unsure = belief.unsure >= UNSURE
        self._outlined, self.gone = _outlined(run)
        self.unread: set[str] = set()  # samples whose coarse labels cannot be read

    def maps(self, row: Row, kept: Row) -> tuple[Label, Label, NDArray[np.int32]]:
        """Label, top class and keys of an image (H, W).

        Pixels outside the policy's area, those of which a person's coarse label says the same, and polygons of no class
        that a policy leaves so have no doubt. Where the policy weighs polygons, top class and level are those after
        that. `generate` knew all probabilities, so its labels may differ from what levels tell: then the class that it
        gave is the top class, at the lowest level that is kept.
        """
        label, top, level = (
            read_layer(run, of, layer)
            for run, of, layer in ((self.run, row, LABELS), (self.kept, kept, TOP), (self.kept, kept, CONFIDENCE))
        )
        coarse = self._coarse(row.sample_id)
        if self._decided.weighs and coarse is not None:
            top, level = self._decided(top, level, coarse, second=lambda: self._second(kept))
            unnamed = (coarse == IGNORE) & (label != IGNORE)
            top = np.where(unnamed, label, top)
            least = self.belief.sure[top]
            level = np.where(unnamed & (level < least), least, level)
        keys = self.belief.keys(label, top, level)
        if self.run.policy.area is not None:
            beyond = np.ones(label.shape, np.bool_)
            beyond[self.run.policy.area.box(*label.shape)] = False
            keys[beyond] = self.belief.decided
        if coarse is not None:
            keys[((coarse == label) & (label != IGNORE)) | (coarse == VOID)] = self.belief.decided
        return label, top, keys

    def _second(self, kept: Row) -> Label | None:
        return read_layer(self.kept, kept, SECOND) if SECOND in kept.layers() else None

    def _coarse(self, sample_id: str) -> Label | None:
        if sample_id not in self._outlined:
            return None
        try:
            return read_coarse(self._outlined[sample_id], self.run.label_space, drawn_void=self._decided.weighs)
        except (BadImage, OSError):
            self.unread.add(sample_id)
            return None

    def regions(self, keys: NDArray[np.int32]) -> Regions:
        """The regions of an image."""
        return find_regions(self._unsure[keys])

    def rows(self) -> Iterator[tuple[Row, Row]]:
        """The labelled rows of the records, each with the one whose confidence was kept."""
        run, kept = self.run, self.kept
        behind = Ledger(kept.path)
        for name, commit in Ledger(run.path).items():
            rows, others = read_rows(commit, _RECORD), dict[str, Row]()
            if kept.path != run.path and name in behind:
                others = {row.sample_id: row for row in read_rows(behind[name], _RECORD)}
            yield from ((row, others.get(row.sample_id, row)) for row in rows if row.labelled)

    def again(self, sample_ids: Collection[str]) -> Iterator[tuple[str, Regions]]:
        """The regions of some images once more, in the order of the run."""
        wanted = set(sample_ids)
        for row, kept in self.rows():
            if row.sample_id in wanted:
                yield row.sample_id, self.regions(self.maps(row, kept)[2])


def _outlined(run: Run) -> tuple[dict[str, Sample], str]:
    """The samples that have a coarse label; none, and the reason, if the manifest that lists them is gone."""
    try:
        return {s.sample_id: s for s in open_manifest(run.input_manifest).samples() if s.coarse_label is not None}, ""
    except BadTable as error:
        return {}, str(error)


def survey(
    looking: Looking, *, pace: Pace | None = None, rates: Doubt | None = None, progress: Progress | None = None
) -> Survey:
    """Look at every labelled image once. With a `pace`, regions too, ranked by the first estimate `rates` (4, C)."""
    run, belief = looking.run, looking.belief
    classes = belief.classes

    def look(rows: tuple[Row, Row]) -> _Seen:
        label, top, keys = looking.maps(*rows)
        found = None
        if pace is not None and rates is not None:
            found = _best(looking, top, keys, pace, rates)
        counts = np.bincount(label.ravel(), minlength=IGNORE + 1)[:classes]
        return _Seen(rows[0], belief.doubt(keys), counts, neighbours(top, classes), found)

    total = run.accounts.labelled if run.accounts else 0
    ids: list[str] = []
    whole: list[tuple[int, int]] = []
    doubts: list[NDArray[np.float32]] = []
    labelled, around = np.zeros(classes, np.int64), np.zeros((classes, classes), np.int64)
    pool = _Pool(rates)
    with ThreadPoolExecutor(cores()) as threads:
        for place, seen in enumerate(ahead(threads, look, looking.rows(), 2 * cores())):
            ids.append(seen.row.sample_id)
            whole.append((seen.row.height, seen.row.width))
            doubts.append(seen.doubt.astype(np.float32))
            labelled += seen.labelled
            around += seen.around
            if seen.regions is not None:
                pool.add(seen.regions, place)
            if progress:
                progress(place + 1, max(total, place + 1))
    sizes = np.array(whole, np.int64).reshape(-1, 2)
    doubt = np.array(doubts, np.float32).reshape(len(ids), KINDS, classes)
    regions = pool.items(classes)
    return Survey(
        pa.array(ids, pa.string()), images_of(sizes, doubt), regions, labelled.astype(float), around, pool.dropped
    )


def images_of(sizes: NDArray[np.int64], doubt: NDArray[np.float32]) -> Items:
    """Whole images as items, from height and width (N, 2)."""
    count = len(sizes)
    box = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
    nothing = np.zeros(count, np.int64)
    return Items(np.arange(count), doubt, np.ones(count), box, nothing - 1, sizes.prod(axis=1), nothing)


def neighbours(top: NDArray[np.uint8], classes: int) -> NDArray[np.int64]:
    """Pairs of neighbouring pixels by their top classes (C, C), in every fourth row and column."""
    keys = [
        line[one].astype(np.int64).ravel() * classes + line[other].ravel()
        for line, one, other in (
            (top[::_STEP], np.s_[:, :-1], np.s_[:, 1:]), (top[:, ::_STEP], np.s_[:-1], np.s_[1:]),
        )
    ]  # fmt: skip
    return np.bincount(np.concatenate(keys), minlength=classes * classes).reshape(classes, classes)


def _best(looking: Looking, top: Label, keys: NDArray[np.int32], pace: Pace, rates: Doubt) -> Items | None:
    """The regions of an image that gain most per second by a first estimate, in reading order."""
    regions, belief = looking.regions(keys), looking.belief
    if not len(regions):
        return None
    inside = regions.places >= 0
    asked, key = regions.places[inside].astype(np.intp) * belief.classes + top[inside], keys[inside]
    size = len(regions) * belief.classes
    kinds = [np.bincount(asked, chances[key], minlength=size) for chances in belief.chances]
    doubt = np.array(kinds, np.float32).reshape(KINDS, len(regions), belief.classes).swapaxes(0, 1)
    seconds = pace.region + pace.boundary_pixel * regions.boundary.astype(float)
    gain = (doubt * rates).sum(axis=(1, 2)) / seconds
    best = np.sort(np.argsort(-gain, kind="stable")[:FROM_ONE])
    zeros = np.zeros(len(regions), np.int64)
    items = Items(
        zeros, doubt, seconds, regions.boxes, np.arange(len(regions)), regions.pixels, regions.boundary
    )  # fmt: skip
    return items.take(best)


class _Pool:
    """The best regions so far."""

    def __init__(self, rates: Doubt | None) -> None:
        self._rates: Doubt | float = 0.0 if rates is None else rates
        self._parts, self._count, self.dropped = list[Items](), 0, 0

    def add(self, items: Items, image: int) -> None:
        """Add regions of an image."""
        items.image[:] = image
        self._parts.append(items)
        self._count += len(items)
        if self._count > 2 * POOL:
            self._shrink()

    def _shrink(self) -> None:
        items = Items.joined(self._parts)
        gain = (items.doubt * self._rates).sum(axis=(1, 2)) / items.seconds
        best = np.sort(np.argsort(-gain, kind="stable")[:POOL])
        self.dropped += len(items) - len(best)
        self._parts, self._count = [items.take(best)], len(best)

    def items(self, classes: int) -> Items:
        """All that are left, in the order of images."""
        if self._count > POOL:
            self._shrink()
        nothing = images_of(np.empty((0, 2), np.int64), np.empty((0, KINDS, classes), np.float32))
        return Items.joined([nothing, *self._parts])
