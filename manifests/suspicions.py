"""Say which labels can hardly be meant as they were read, and which photographs are none.

A suspicion is a sentence: what was found, what it may mean, what to do. Nothing here refuses anything; what cannot be
told from the data alone is not claimed.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.label_space import IGNORE, LabelSpace
from autolabel.manifests.samples import Sample
from autolabel.manifests.wording import counted, percent

LOOKED_AT = 64  # photographs of which the pixels are looked at, spread over the set
_SEVERAL, _NONE = -1, -2  # in place of the one class of a label
_FEW = 3  # labels that show the same, below which nothing is said
_MOST = 0.9  # share of the labels that makes a rule of them
_EMPTY = 0.2  # share of the labels that may be ignored altogether
_FEW_COLOURS, _ENOUGH_PIXELS = 32, 1024  # a photograph of so many pixels has hundreds of colours
_FLAT = 4  # largest difference of the values in a photograph of one colour
_SMALL = 25  # an image of so many times fewer pixels than the median one is a thumbnail
_STEP = 4  # every fourth row and column tells where sky and road lie
_SKY, _ROAD = re.compile(r"\bsky\b"), re.compile(r"\broad\b")
_THIN = (
    (re.compile(r"\b(pole|traffic light|traffic sign|sign)\b"), 0.08),
    (re.compile(r"\b(person|pedestrian|rider|bicyclist|bicycle|motorcycle)\b"), 0.15),
)  # things that cover little of a street scene, and the most that they may


@dataclass(frozen=True)
class LabelFacts:
    """Facts about one label: its one class, if it has one; a mark of its pixels; where sky and road lie.

    sky, road: the mean row, 0 at the top and 1 at the bottom; None where there is little of it.
    """

    only: int
    mark: tuple[int, tuple[int, ...]]
    sky: float | None
    road: float | None


def facts_of(label: NDArray[np.uint8], pixels: NDArray[np.int64], space: LabelSpace) -> LabelFacts:
    """Look at a label (H, W) uint8 of train ids; pixels: how many it has of each, (256,) int64."""
    present = np.flatnonzero(pixels[:IGNORE])
    only = _NONE if not len(present) else int(present[0]) if len(present) == 1 else _SEVERAL
    small = label[::_STEP, ::_STEP]
    sky, road = (_mean_row(small, train_id, pixels) for train_id in _sky_and_road(space.names))
    return LabelFacts(only, (zlib.crc32(label.tobytes()), label.shape), sky, road)


@functools.lru_cache
def _sky_and_road(names: tuple[str, ...]) -> tuple[int | None, int | None]:
    """The train ids of the one class with such a name, else None."""
    sky, road = ([i for i, text in enumerate(names) if name.search(text.lower())] for name in (_SKY, _ROAD))
    return (sky[0] if len(sky) == 1 else None, road[0] if len(road) == 1 else None)


def _mean_row(label: NDArray[np.uint8], train_id: int | None, pixels: NDArray[np.int64]) -> float | None:
    if train_id is None or 50 * pixels[train_id] < pixels.sum():  # little of it says nothing
        return None
    rows = np.count_nonzero(label == train_id, axis=1)
    return float((rows * (np.arange(len(rows)) + 0.5)).sum() / (rows.sum() * len(rows))) if rows.sum() else None


# --- labels -----------------------------------------------------------------------------------------------------------


class ClassCounts:
    """In how many labels each train id occurs, and its pixels in all of them: (256,) int64."""

    def __init__(self) -> None:
        self.images: NDArray[np.int64] = np.zeros(256, np.int64)
        self.pixels: NDArray[np.int64] = np.zeros(256, np.int64)

    def add(self, pixels: NDArray[np.int64]) -> None:
        """Count one more label, of which the pixels by train id are given: (256,) int64."""
        self.images += pixels > 0
        self.pixels += pixels


def of_labels(
    labelled: Sequence[tuple[Sample, LabelFacts]], space: LabelSpace, counts: ClassCounts, *, ids_named: bool
) -> Iterator[str]:
    """Suspicions about labels of one space. ids_named: somebody said which kind of ids they hold."""
    if not labelled:
        return
    facts = [fact for _, fact in labelled]
    yield from _constant(labelled, space)
    if counts.pixels[:IGNORE].any():
        if all(s.label_ids == "train" for s, _ in labelled):
            if not ids_named:
                yield from _source_ids(space, counts)
            yield from _one_off(space, counts, len(facts))
        yield from _thin(space, counts, len(facts))
        yield from _upside_down(facts)
    yield from _identical(labelled)


def _constant(labelled: Sequence[tuple[Sample, LabelFacts]], space: LabelSpace) -> Iterator[str]:
    empty = [s for s, fact in labelled if fact.only == _NONE]
    if len(empty) > _EMPTY * len(labelled):
        yield (
            f"{_of(len(empty), len(labelled), 'label')} ignored altogether (255), such as {empty[0].label}: nothing can"
            " be learnt from them; is the label space the right one?"
        )
    alone = Counter(fact.only for _, fact in labelled if fact.only >= 0)
    for train_id, count in alone.most_common(1):
        if count >= _FEW and count >= _MOST * (len(labelled) - len(empty)):
            first = next(s for s, fact in labelled if fact.only == train_id)
            yield (
                f"{_of(count, len(labelled), 'label')} of nothing but {space.names[train_id]!r}, such as {first.label}:"
                " are these masks of one class, or the wrong files?"
            )


def _source_ids(space: LabelSpace, counts: ClassCounts) -> Iterator[str]:
    """Ids that nobody named, which make as good sense as source ids: the order of the label space decides."""
    owners = [c.source_ids for c in space.classes]
    if owners == [(i,) for i in range(len(space))]:
        return  # both kinds are the same
    present = [int(i) for i in np.flatnonzero(counts.pixels[:IGNORE])]
    if not set(present) <= set(space.known_source_ids):
        return
    shift = {ids[0] - train_id for train_id, ids in enumerate(owners)}
    ignored = sum(int(counts.pixels[i]) for i in present if space.train_ids[i] == IGNORE)
    if len(shift) == 1 or 2 * ignored < counts.pixels[:IGNORE].sum():
        example = int(counts.pixels[:IGNORE].argmax())
        other = space.train_ids[example]
        meant = "ignored" if other == IGNORE else repr(space.names[other])
        yield (
            f"nobody said which ids the labels hold, and both kinds fit: as train ids {example} is"
            f" {space.names[example]!r}, as source ids of label space {space.name!r} it is {meant}; name one with"
            " --label-ids train or --label-ids source"
        )


def _one_off(space: LabelSpace, counts: ClassCounts, labels: int) -> Iterator[str]:
    present = np.flatnonzero(counts.pixels[:IGNORE])
    if labels >= _FEW and present[0] == 1 and len(present) >= 2:
        yield (
            f"class {space.names[0]!r} (train id 0) is in none of {counted(labels, 'label')}, and the next one is:"
            " do the ids begin at 1? They have to begin at 0"
        )


def _thin(space: LabelSpace, counts: ClassCounts, labels: int) -> Iterator[str]:
    """Things that cover little of a street, and much of these labels."""
    present = np.flatnonzero(counts.pixels[:IGNORE])
    total = counts.pixels[:IGNORE].sum()
    for train_id in present:
        share = counts.pixels[train_id] / total
        name = space.names[train_id]
        if labels >= _FEW and any(thin.search(name.lower()) and share > most for thin, most in _THIN):
            yield (
                f"class {name!r} (train id {train_id}) covers {percent(share)} % of all labelled pixels, more than such"
                " things do in a street: are the ids shifted or inverted, or of another label space?"
            )


def _upside_down(facts: Sequence[LabelFacts]) -> Iterator[str]:
    both = [(fact.sky, fact.road) for fact in facts if fact.sky is not None and fact.road is not None]
    below = sum(sky > road for sky, road in both)
    if below >= _FEW and 2 * below > len(both):
        yield (
            f"the sky lies below the road in {below} of the {counted(len(both), 'label')} that have both: are the ids"
            " inverted or shifted, or the labels upside down?"
        )


def _identical(labelled: Sequence[tuple[Sample, LabelFacts]]) -> Iterator[str]:
    groups: dict[tuple[int, tuple[int, ...]], list[Sample]] = {}
    for sample, fact in labelled:
        if fact.only == _SEVERAL:
            groups.setdefault(fact.mark, []).append(sample)
    most = max(groups.values(), key=len, default=[])
    if len(most) >= _FEW:
        yield (
            f"{len(most)} labels are the same to the last pixel, such as {most[0].label} and {most[1].label}: does"
            " every image have its own?"
        )


# --- photographs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PhotographFacts:
    """Facts about one photograph: whether it shows one colour, few colours, or the very pixels of its label."""

    flat: bool
    few_colours: bool
    is_label: bool


def facts_of_photograph(picture: NDArray[np.uint8], label: NDArray[np.uint8] | None) -> PhotographFacts:
    """Look at a photograph (H, W, 3) uint8; label: its ids as stored (H, W), or its colours (H, W, 3), or None."""
    flat = bool((picture.max(axis=(0, 1)) - picture.min(axis=(0, 1)) <= _FLAT).all())
    step = max(1, min(picture.shape[:2]) // 256)
    packed = picture[::step, ::step].astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    few = packed.size >= _ENOUGH_PIXELS and len(np.unique(packed)) <= _FEW_COLOURS
    same = False
    if label is not None and label.shape[:2] == picture.shape[:2]:
        same = np.array_equal(label, picture if label.ndim == 3 else picture[..., 0])
    return PhotographFacts(flat, few and not flat, same and not flat)


def spread(samples: Sequence[Sample]) -> list[Sample]:
    """At most LOOKED_AT samples, evenly spread."""
    count = min(LOOKED_AT, len(samples))
    return [samples[i * len(samples) // count] for i in range(count)]


def of_photographs(
    looked: Sequence[tuple[Sample, PhotographFacts]], sizes: Sequence[tuple[Sample, int]]
) -> Iterator[str]:
    """Suspicions about photographs: those that were looked at, and all with their number of pixels."""
    for question, doubtful in (
        ("of one colour", [s for s, fact in looked if fact.flat]),
        ("the very pixels of their labels", [s for s, fact in looked if fact.is_label]),
        (
            f"of at most {_FEW_COLOURS} colours, as label maps and masks are",
            [s for s, fact in looked if fact.few_colours and not fact.is_label],
        ),
    ):
        if doubtful:
            yield (
                f"{_of(len(doubtful), len(looked), 'photograph')} {question}, such as {doubtful[0].image}: leave out"
                " what is no photograph"
            )
    if len(sizes) >= _FEW:
        median = float(np.median([pixels for _, pixels in sizes]))
        small = [s for s, pixels in sizes if pixels * _SMALL < median]
        if small:
            yield (
                f"{_of(len(small), len(sizes), 'image')} {_SMALL} times smaller than the others, such as"
                f" {small[0].image}: leave out thumbnails"
            )


def of_copies(groups: Sequence[Sequence[Path]]) -> Iterator[str]:
    """A suspicion about photographs that have the same bytes, in groups of two and more."""
    if groups:
        count = sum(map(len, groups))
        yield (
            f"{count} photographs are copies of one another, such as {groups[0][0]} and {groups[0][1]}: copies in"
            " training and validation are a leak"
        )


def of_names(names: Sequence[str]) -> Iterator[str]:
    """A suspicion about sample ids that differ in capitals alone."""
    twins = Counter(name.casefold() for name in names)
    doubled = sorted((name for name in names if twins[name.casefold()] > 1), key=str.casefold)
    if doubled:
        first, second = doubled[:2]
        yield (
            f"{len(doubled)} names differ in capitals alone, such as {first!r} and {second!r}: on macOS and Windows"
            " they are one file"
        )


def _of(count: int, total: int, one: str) -> str:
    """(3, 4, "label") -> "3 of 4 labels are"; (1, 4, "label") -> "1 of 4 labels is"."""
    return f"{count} of {counted(total, one)} {'is' if count == 1 else 'are'}"
