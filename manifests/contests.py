"""One image in several manifests: whose label stands, and how far people disagree.

People stand before machines: a fine label before a corrected one, and both before any other. Among labels of one source
the one that was given later stands. A whole label stands, so a pixel that a person ignores stays ignored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from autolabel.manifests.ahead import ahead
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.machine import cores
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.samples import Sample
from autolabel.manifests.schemas import EXACT, SOURCES
from autolabel.manifests.wording import counted

Images = Mapping[str, Sample]  # labelled samples by the fingerprint of their image


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


def settle(parts: Sequence[tuple[str, Images]], space: LabelSpace) -> tuple[list[set[str]], list[Contest]]:
    """Decide which labels stand: by part, the fingerprints of those that give way; and what was decided, counted.

    `parts` are the images of each manifest, by its name, in the order given. Labels of people that meet are read, to
    count the pixels in which they differ. Raises ValueError where a coarse and an automatic label of one image meet and
    no person's stands before both, and as `read_sample_label`.
    """
    places: dict[str, list[int]] = {}  # the parts that share an image
    for place, (_, images) in enumerate(parts):
        for earlier, (_, others) in enumerate(parts[:place]):
            for mark in images.keys() & others.keys():
                places.setdefault(mark, []).extend(p for p in (earlier, place) if p not in places.get(mark, ()))
    _require_separate(parts, places)
    losing: list[set[str]] = [set() for _ in parts]
    met: list[tuple[Sample, Sample]] = []
    for mark, those in places.items():
        best = min(those, key=lambda place: (SOURCES.index(parts[place][1][mark].source), -place))
        for place in those:
            if place != best:
                losing[place].add(mark)
                met.append((parts[best][1][mark], parts[place][1][mark]))
    return losing, _counted(met, space)


def _require_separate(parts: Sequence[tuple[str, Images]], places: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError where coarse and automatic labels of one image meet, and no person's stands before both."""
    together = [
        (mark, {parts[place][1][mark].source: place for place in those})
        for mark, those in places.items()
        if {"coarse", "auto"} <= (sources := {parts[place][1][mark].source for place in those})
        and sources.isdisjoint(EXACT)
    ]
    if together:
        mark, of = min(together, key=lambda one: parts[one[1]["coarse"]][1][one[0]].sample_id)
        coarse, auto = (parts[of[source]] for source in ("coarse", "auto"))
        raise ValueError(
            f"{counted(len(together), 'image')} with a coarse label in {coarse[0]} and an automatic one in {auto[0]}"
            f" (same content; the first is {coarse[1][mark].sample_id!r}): the policy has put the coarse label into the"
            f" automatic one already, so leave {coarse[0]} out, or these images with --drop"
        )


def _counted(met: Sequence[tuple[Sample, Sample]], space: LabelSpace) -> list[Contest]:
    """Count pairs of labels, the one that stands and the one that gives way, by their sources."""
    images = Counter((stands.source, gives_way.source) for stands, gives_way in met)
    peoples = [pair for pair in met if {sample.source for sample in pair} <= set(EXACT)]
    differing, pixels = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for (stands, gives_way), number in zip(peoples, _different_pixels(peoples, space), strict=True):
        kind = (stands.source, gives_way.source)
        differing[kind] += number > 0
        pixels[kind] += number
    read = {(stands.source, gives_way.source) for stands, gives_way in peoples}
    return [
        Contest(*kind, images[kind], *((differing[kind], pixels[kind]) if kind in read else ()))
        for kind in sorted(images, key=lambda kind: tuple(map(SOURCES.index, kind)))
    ]


def _different_pixels(pairs: Sequence[tuple[Sample, Sample]], space: LabelSpace) -> Iterator[int]:
    def different(pair: tuple[Sample, Sample]) -> int:
        stands, gives_way = (read_sample_label(sample, space) for sample in pair)
        return int(np.count_nonzero(stands != gives_way)) if stands.shape == gives_way.shape else stands.size

    with ThreadPoolExecutor(cores()) as pool:
        yield from ahead(pool, different, pairs, 2 * cores())
