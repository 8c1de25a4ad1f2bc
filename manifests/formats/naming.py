"""Classes in the files of labelling tools go by their names; colours are only drawn. What no class means is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.formats.exchange import BadReturn
from autolabel.manifests.images import packed_colours
from autolabel.manifests.label_space import IGNORE, Colour, LabelSpace
from autolabel.manifests.wording import counted, dimensions, listed

_NO_CLASS = {"background", "ignore", "ignored", "unlabeled", "unlabelled", "void"}
_COMMONEST = 16  # unknown colours of one PNG that are counted one by one
_KEPT = 4096  # unknown names and colours that are counted one by one


def train_id(name: str, space: LabelSpace) -> int | None:
    """The train id of a class by its name; 255 for what tools call the pixels of no class; None for another name."""
    if name in space.names:
        return space.names.index(name)
    return IGNORE if name.lower() in _NO_CLASS else None


def voc_colour(number: int) -> Colour:
    """The colour of a number in 0..255 in the palette of Pascal VOC: its bits, dealt to three channels in turn."""
    red, green, blue = (
        sum((number >> 3 * place + channel & 1) << 7 - place for place in range(8)) for channel in range(3)
    )
    return red, green, blue


def distinct_colours(space: LabelSpace) -> tuple[Colour, ...]:
    """A colour for every class, all different and none of them black, which is no class.

    They are the label space's own, unless two of these are equal or one is black: then those of Pascal VOC.
    """
    own = [c.colour for c in space.classes]
    if len(set(own)) == len(own) and (0, 0, 0) not in own:
        return tuple(own)
    return tuple(voc_colour(number) for number in range(1, len(own) + 1))


def by_colour(data: bytes, owners: Mapping[int, int]) -> tuple[NDArray[np.int16], Mapping[Colour | None, int]]:
    """Read an RGB or palette PNG whose colours have meanings; owners: the number of each, from 0 on, by its 24 bits.

    Returns (H, W) int16, -1 for a colour without a meaning, and how many pixels have each of the commonest of these,
    None for the others. Raises BadImage.
    """
    colours = packed_colours(data)
    table = np.full(1 << 24, -1, np.int16)
    table[list(owners)] = list(owners.values())
    numbers = table[colours]
    values, counts = np.unique(colours[numbers < 0], return_counts=True)
    commonest = np.argsort(-counts, kind="stable")[:_COMMONEST]
    others: dict[Colour | None, int] = {
        (int(values[k]) >> 16, int(values[k]) >> 8 & 255, int(values[k]) & 255): int(counts[k]) for k in commonest
    }
    if len(values) > len(commonest):
        others[None] = int(counts.sum()) - sum(others.values())
    return numbers, others


def shown_size(size: Sequence[int]) -> str:
    """(height, width) for messages, in the order that people use."""
    return f"{dimensions(size[-1], size[0])} pixels"


class Unknown:
    """Counts names or colours that mean no class, so that one line can tell of all of them.

    path: the file in messages. what: of what there are so many, such as "pixel".
    """

    def __init__(self, path: Path, space: LabelSpace, what: str) -> None:
        self._path, self._space, self._what = path, space, what
        self._counts = Counter[str]()
        self._total = 0

    def add(self, name: str | None, count: int) -> None:
        """Count a name or colour; None for several that nobody needs to know."""
        self._total += count
        if name is None:
            return
        self._counts[name] += count
        if len(self._counts) > 2 * _KEPT:
            self._counts = Counter(dict(self._counts.most_common(_KEPT)))

    def require_none(self) -> None:
        """Raise BadReturn, with the three most frequent, if there were any."""
        if not self._counts:
            return
        frequent = [f"{name} ({counted(count, self._what)})" for name, count in self._counts.most_common(3)]
        more = ["others"] if self._total > sum(count for _, count in self._counts.most_common(3)) else []
        raise BadReturn(
            f"{self._path}: {counted(self._total, self._what)} of what label space {self._space.name!r} does not have:"
            f" {listed([*frequent, *more])}: expected"
            f" {_some(self._space)}; is it of another project?"
        )


def _some(space: LabelSpace) -> str:
    names = [repr(name) for name in space.names[:3]]
    more = len(space) - len(names)
    return f"its classes {listed([*names, *([f'{more} more'] if more else [])])}"
