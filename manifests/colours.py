"""Colours that stand for classes, packed into 24 bits: whose each is, and counts of those that are nobody's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.headers import BadImage
from autolabel.manifests.label_space import IGNORE, Colour, LabelSpace

_COMMONEST = 16  # unknown colours of a label that an error counts one by one


class UnknownColours(BadImage):
    """A label shows colours that its label space does not know. `pixels`: how many have each of the commonest."""

    def __init__(self, message: str, pixels: Mapping[Colour, int], total: int) -> None:
        super().__init__(message)
        self.pixels, self.total = dict(pixels), total


def train_ids_of(colours: NDArray[np.int32], space: LabelSpace) -> NDArray[np.uint8]:
    """The train ids (H, W) uint8 of packed colours (H, W). Black is ignored unless a class is.

    Raises UnknownColours for others, and BadImage for a label space in which two classes look the same.
    """
    known, train_ids = colour_table(space)
    places = np.searchsorted(known, colours).clip(max=len(known) - 1)
    others = colours[known[places] != colours]
    if others.size:
        values, counts = np.unique(others, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:_COMMONEST]
        commonest = {(v >> 16, v >> 8 & 255, v & 255): int(counts[k]) for k in order for v in [int(values[k])]}
        shown, most = next(iter(commonest.items()))
        raise UnknownColours(
            f"{others.size} pixels have colours that are not in label space {space.name!r}, {most} of them"
            f" {shown}: expected {expected_colours(space)}",
            commonest, int(others.size),
        )  # fmt: skip
    return np.take(train_ids, places)


def expected_colours(space: LabelSpace) -> str:
    """The colours that a label may show, in words."""
    black = (0, 0, 0) in {c.colour for c in space.classes}
    return "the colours of its classes alone" + ("" if black else ", and black for ignored pixels")


def colour_table(space: LabelSpace) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """The colours of a label space, packed into numbers, ascending; and the train id of each.

    Raises BadImage for a label space in which two classes look the same.
    """
    owners: dict[int, int] = {}
    for train_id, c in enumerate(space.classes):
        red, green, blue = c.colour
        packed = red << 16 | green << 8 | blue
        if packed in owners:
            twin = space.names[owners[packed]]
            raise BadImage(f"classes {twin!r} and {c.name!r} of label space {space.name!r} have one colour, {c.colour}")
        owners[packed] = train_id
    owners.setdefault(0, IGNORE)
    return np.array(sorted(owners), np.int32), np.array([owners[c] for c in sorted(owners)], np.uint8)
