"""One image in several manifests: whose label stands, and how far people disagree.

People stand before machines: a fine label before a corrected one, and both before any other. Among labels of one source
the one that was given later stands. A whole label stands, so a pixel that a person ignores stays ignored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.ahead import ahead
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.machine import cores
from autolabel.manifests.marks import Marks, Mask, SampleRows, meetings
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.samples import Sample
from autolabel.manifests.schemas import EXACT, ROWS_AT_ONCE, SOURCES
from autolabel.manifests.wording import counted


@dataclass(frozen=True)
class Contest:
    """The images of which a label of one source stands before one of another, or of the same, in another manifest.

    differing, pixels: where both labels are people's, in how many images they differ, and in how many pixels; None
    where one is a machine's.
    """

    stands: str
    gives_way: str
    images: int
    differing: int | None = None
    pixels: int | None = None

    def __str__(self) -> str:
        """One sentence: "2 corrected labels stand before auto labels of the same images"."""
        many = self.images != 1
        earlier = "earlier " if self.stands == self.gives_way else ""
        text = (
            f"{counted(self.images, f'{self.stands} label')} {'stand' if many else 'stands'} before"
            f" {earlier}{self.gives_way} labels of the same images"
        )
        if self.differing is None:
            return text
        if not self.differing:
            return f"{text}, which are equal"
        text += f"; people differ in {counted(self.pixels or 0, 'pixel')} of {counted(self.differing, 'image')}"
        if self.stands == self.gives_way == "corrected":
            text += " (`autolabel import` of both at once keeps both)"
        return text


def settle(parts: Sequence[tuple[SampleRows, Marks]], space: LabelSpace) -> tuple[list[Mask], list[Contest]]:
    """Decide which labels stand: by part, the rows of those that give way; and what was decided, counted.

    `parts` are the labelled samples of each manifest and the marks of their images, none of which is there twice, in
    the order given. Labels of people that meet are read, to count the pixels in which they differ. Raises ValueError
    where a coarse and an automatic label of one image meet and no person's stands before both, and as
    `read_sample_label`.
    """
    sources = [samples.sources for samples, _ in parts]
    losing = [np.zeros(len(samples), np.bool_) for samples, _ in parts]
    counts = np.zeros((len(SOURCES), len(SOURCES)), np.int64)
    peoples: list[NDArray[np.int64]] = []  # part and row of the label that stands, and of the one that gives way
    mixed: list[NDArray[np.int64]] = []  # part and row of a coarse label, and the part of an automatic one
    for part, row, mark in meetings([marks for _, marks in parts]):
        if not len(mark):
            continue
        source = np.empty(len(row), np.int64)
        for place, of_part in enumerate(sources):
            source[part == place] = of_part[row[part == place]]
        begins = np.flatnonzero(np.diff(mark, prepend=-1))
        group = np.repeat(np.arange(len(begins)), np.diff(begins, append=len(mark)))
        rank = source * len(parts) - part
        stands = rank == np.minimum.reduceat(rank, begins)[group]
        best, loses = np.flatnonzero(stands), np.flatnonzero(~stands)  # one of each group, in order; the others
        wins = best[group[loses]]
        for place, mask in enumerate(losing):
            mask[row[loses[part[loses] == place]]] = True
        np.add.at(counts, (source[wins], source[loses]), 1)
        read = source[loses] < len(EXACT)
        pairs = (part[wins], row[wins], part[loses], row[loses])
        peoples.append(np.stack(pairs, axis=1)[read])
        coarse, auto = (
            np.maximum.reduceat(np.where(source == SOURCES.index(name), np.arange(len(row)), -1), begins)
            for name in ("coarse", "auto")
        )
        meet = (coarse >= 0) & (auto >= 0) & (source[best] >= len(EXACT))
        mixed.append(np.stack((part[coarse], row[coarse], part[auto]), axis=1)[meet])
    _require_separate([samples for samples, _ in parts], np.concatenate([np.empty((0, 3), np.int64), *mixed]))
    met = np.concatenate([np.empty((0, 4), np.int64), *peoples])
    return losing, _counted(counts, _pairs([samples for samples, _ in parts], met), space)


def _require_separate(parts: Sequence[SampleRows], mixed: NDArray[np.int64]) -> None:
    """Raise ValueError where coarse and automatic labels of one image meet, and no person's stands before both."""
    if not len(mixed):
        return
    firsts = []
    for place, part in enumerate(parts):
        of_part = mixed[mixed[:, 0] == place]
        of_part = of_part[np.argsort(of_part[:, 1])]
        if len(of_part):
            names = (sample.sample_id for sample in part.samples(of_part[:, 1]))
            name, auto = min(zip(names, of_part[:, 2].tolist(), strict=True))
            firsts.append((name, place, auto))
    name, coarse, auto = min(firsts)
    raise ValueError(
        f"{counted(len(mixed), 'image')} with a coarse label in {parts[coarse].name} and an automatic one in"
        f" {parts[auto].name} (same content; the first is {name!r}): the policy has put the coarse label into the"
        f" automatic one already, so leave {parts[coarse].name} out, or these images with --drop"
    )


def _pairs(parts: Sequence[SampleRows], met: NDArray[np.int64]) -> Iterator[tuple[Sample, Sample]]:
    """The labels of people that meet, the one that stands and the one that gives way; some are in memory at a time."""
    for first in range(0, len(met), ROWS_AT_ONCE):
        some = met[first : first + ROWS_AT_ONCE]
        found: list[dict[int, Sample]] = []
        for place, part in enumerate(parts):
            rows = np.unique(np.concatenate([some[some[:, k] == place, k + 1] for k in (0, 2)]))
            found.append(dict(zip(rows.tolist(), part.samples(rows), strict=True)) if len(rows) else {})
        for winner, row, loser, other in some.tolist():
            yield found[winner][row], found[loser][other]


def _counted(images: NDArray[np.int64], peoples: Iterator[tuple[Sample, Sample]], space: LabelSpace) -> list[Contest]:
    """Count pairs of labels, the one that stands and the one that gives way, by their sources."""
    differing, pixels = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for kind, number in _different_pixels(peoples, space):
        differing[kind] += number > 0
        pixels[kind] += number
    kinds = [(SOURCES[stands], SOURCES[gives_way]) for stands, gives_way in np.argwhere(images)]
    numbers = images[images > 0].tolist()
    return [
        Contest(*kind, number, *((differing[kind], pixels[kind]) if set(kind) <= set(EXACT) else ()))
        for kind, number in zip(kinds, numbers, strict=True)
    ]


def _different_pixels(
    pairs: Iterator[tuple[Sample, Sample]], space: LabelSpace
) -> Iterator[tuple[tuple[str, str], int]]:
    def different(pair: tuple[Sample, Sample]) -> tuple[tuple[str, str], int]:
        stands, gives_way = (read_sample_label(sample, space) for sample in pair)
        number = int(np.count_nonzero(stands != gives_way)) if stands.shape == gives_way.shape else stands.size
        return (pair[0].source, pair[1].source), number

    with ThreadPoolExecutor(cores()) as pool:
        yield from ahead(pool, different, pairs, 2 * cores())
