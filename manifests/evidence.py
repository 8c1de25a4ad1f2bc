"""Polygons as evidence: what lies how far outside people's polygons, counted on images with fine and coarse labels.

A pixel that nobody named, at a distance d from the nearest polygon, which is of class n, is of class c with a
probability A[n, d, c] that can be counted wherever an image has both labels (Cityscapes has them for all 3,475 of its
fine images). Beside a teacher, A[n, d, c] / A[c] counts: how much more often than in all unnamed pixels the class lies
there. How often it lies anywhere, teachers know. Distances are shares of an image's width, so that counts of one size
serve another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolabel.manifests import storage
from autolabel.manifests.documents import read_parsed
from autolabel.manifests.label_space import LabelSpace

TEACHER_WEIGHT, POLYGON_WEIGHT = 0.9, 0.4  # exponents of p and A / A[c]; measured by benchmarks/dense.py
BESIDE_WEIGHT = 1.2  # the same as the second one where a teacher was asked
FORMAT = "autolabel polygons 1"
# Upper ends of the bins of distance, as shares of the width: 1, 1.4, 2, … 50 pixels of CamVid's 480. The last bin is
# open. The first numbers lie just above distances that pixels of a grid can have.
OUTSIDE = tuple(d / 480 for d in (1.01, 1.5, 2.01, 2.5, 3.01, 3.7, 4.5, 6, 8, 11, 15, 20, 30, 50))
INSIDE = tuple(d / 480 for d in (1.01, 2.01, 3.01, 5, 10, 20))  # the same for depths in a polygon
_BINS, _DEPTHS = len(OUTSIDE) + 1, len(INSIDE) + 1
_SMOOTHING = 20  # pixels that every row is given before it is counted, in the shares of all rows together
_MOST = 1 << 42  # pixels of a number: all of them together still fit into 64 bits
_HIGHEST = 20  # logarithm of a factor
_KINDS = {list: "list", dict: "object", str: "text"}
_SIZE = re.compile(r"[1-9]\d{0,8}x[1-9]\d{0,8}")

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Table = NDArray[np.float32]
else:  # the command line names policies: numpy is imported where it computes
    Table = Any


@dataclass(frozen=True, eq=False)
class Factors:
    """Evidence as numbers: table (1 + C * bins, C) float32, the logarithm of every class's factor at every place.

    In places above NOWHERE a class's p is raised to the power of `teacher_weight` first.
    """

    table: Table
    teacher_weight: float


@dataclass(frozen=True)
class PolygonCounts:
    """How people's polygons relate to the truth, counted in pixels. `autolabel polygons` writes it.

    classes: their names by train id. sizes: images by "WIDTHxHEIGHT". outside[n][d][c]: of the unnamed pixels whose
    nearest polygon is of class n, at a distance in bin d, those that are truly of class c. inside[n][d]: right and
    wrong pixels of polygons of class n, at a depth in bin d. beside_teacher[n][d][c], if a teacher was asked: the
    logarithm of (A[n, d, c] / A[c]) / (T[n, d, c] / T[c]), where T is what the teacher says of these pixels; teacher is
    its sha256. Raises ValueError for counts of another shape, and for counts of nothing.
    """

    classes: tuple[str, ...]
    sizes: Mapping[str, int]
    outside: tuple[tuple[tuple[int, ...], ...], ...]
    inside: tuple[tuple[tuple[int, ...], ...], ...]
    beside_teacher: tuple[tuple[tuple[float, ...], ...], ...] = ()
    teacher: str = ""

    def __post_init__(self) -> None:
        import numpy as np

        count = len(self.classes)
        for name, last, rows in (("outside", (_BINS, count), self.outside), ("inside", (_DEPTHS, 2), self.inside)):
            shape = (count, *last)
            try:
                counts = np.array(rows, np.int64)
            except (ValueError, OverflowError):
                counts = np.zeros(0, np.int64)
            if counts.shape != shape or (counts < 0).any() or (counts > _MOST).any():
                raise ValueError(f"{name!r}: expected {' x '.join(map(str, shape))} numbers of pixels")
        if len(set(self.classes)) != count:
            raise ValueError("'classes' names one twice")
        if self.beside_teacher:
            try:
                lifts = np.array(self.beside_teacher, np.float64)
            except ValueError:
                lifts = np.zeros(0)
            if lifts.shape != (count, _BINS, count) or not (abs(lifts) <= _HIGHEST).all():  # nan is refused, too
                size = f"{count} x {_BINS} x {count}"
                raise ValueError(f"'beside_teacher': expected {size} numbers from -{_HIGHEST} to {_HIGHEST}")
        for size, images in self.sizes.items():
            if not _SIZE.fullmatch(size) or type(images) is not int or not 0 < images <= _MOST:
                raise ValueError(f"'sizes', {size!r} is {images!r}: expected numbers of images by WIDTHxHEIGHT")
        if not self.counts.any():
            raise ValueError("no unnamed pixel with truth was counted: count on images with fine and coarse labels")

    @classmethod
    def of(
        cls, space: LabelSpace, sizes: Mapping[str, int], outside: NDArray[np.int64], inside: NDArray[np.int64]
    ) -> PolygonCounts:
        """Counts from arrays: outside (C, bins, C), inside (C, depths, 2)."""
        return cls(space.names, dict(sizes), _nested(outside.tolist()), _nested(inside.tolist()))

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """`outside` as an array (C, bins, C)."""
        import numpy as np

        return np.array(self.outside, np.int64)

    @property
    def images(self) -> int:
        """The number of images that were counted."""
        return sum(self.sizes.values())

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Width and height of the images that were counted, the most frequent first."""
        sizes = sorted(self.sizes, key=lambda size: (-self.sizes[size], size))
        return [(int(width), int(height)) for width, height in (size.split("x") for size in sizes)]

    @property
    def unseen(self) -> tuple[str, ...]:
        """Classes of which no unnamed pixel was counted: polygons say nothing for or against them."""
        seen = self.counts.sum(axis=(0, 1))
        return tuple(name for name, pixels in zip(self.classes, seen, strict=True) if not pixels)

    @property
    def lifts(self) -> NDArray[np.float64]:
        """Logarithms (C, bins, C): `beside_teacher` if a teacher was asked, else `logarithms` of the counts."""
        import numpy as np

        return np.array(self.beside_teacher) if self.beside_teacher else logarithms(self.counts)

    def require(self, space: LabelSpace) -> None:
        """Raise ValueError unless the classes are those of the label space, in its order."""
        if self.classes == space.names:
            return
        others = [name for name in self.classes if name not in space.names] or [
            name for name in space.names if name not in self.classes
        ]
        what = f"class {others[0]!r} is in one of them only" if others else "their order differs"
        raise ValueError(
            f"the polygons were counted for other classes than those of label space {space.name!r} ({what}): count"
            " them in this label space"
        )

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON values. A row of numbers is one text, so that people can read the file."""

        def rows(table: Sequence[Sequence[Sequence[float]]]) -> dict[str, list[str]]:
            lines = ([" ".join(map(str, row)) for row in of_class] for of_class in table)
            return dict(zip(self.classes, lines, strict=True))

        asked: dict[str, Any] = {}
        if self.beside_teacher:
            asked = {"teacher": self.teacher, "beside_teacher": rows(self.beside_teacher)}
        return {
            "format": FORMAT,
            "classes": list(self.classes),
            "sizes": dict(self.sizes),
            "outside": rows(self.outside),
            "inside": rows(self.inside),
            **asked,
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> PolygonCounts:
        """The counts that `to_dict` wrote. Raises ValueError."""
        if document.get("format") != FORMAT:
            raise ValueError(f"its format is {document.get('format')!r}, expected {FORMAT!r}: count the polygons again")
        kinds = {"classes": list, "sizes": dict, "outside": dict, "inside": dict}
        kinds |= {"teacher": str, "beside_teacher": dict} if "beside_teacher" in document else {}
        for key, kind in kinds.items():
            if type(document.get(key)) is not kind:
                raise ValueError(f"{key!r} is missing or no {_KINDS[kind]}")
        classes = tuple(map(str, document["classes"]))

        def table(key: str, of: type[int] | type[float], what: str) -> tuple[tuple[tuple[Any, ...], ...], ...]:
            found = document[key]
            if set(found) != set(classes):
                raise ValueError(f"{key!r} has other classes than 'classes'")
            try:
                return tuple(tuple(tuple(map(of, row.split())) for row in found[name]) for name in classes)
            except (AttributeError, TypeError, ValueError):
                raise ValueError(f"{key!r} holds something else than rows of {what}") from None

        outside, inside = (table(key, int, "whole numbers") for key in ("outside", "inside"))
        beside = table("beside_teacher", float, "numbers") if "beside_teacher" in document else ()
        return cls(classes, document["sizes"], outside, inside, beside, document.get("teacher", ""))

    def write(self, path: Path) -> None:
        """Write polygons.json, whole or not at all."""
        storage.write_json(path, self.to_dict())

    @classmethod
    def read(cls, path: Path) -> PolygonCounts:
        """Read polygons.json. Raises BadDocument, naming the file."""
        return read_parsed(path, cls.from_dict, advice="`autolabel polygons` makes such a file")


def logarithms(counts: NDArray[Any]) -> NDArray[np.float64]:
    """The logarithm of A[n, d, c] / A[c] (C, bins, C), of counts (C, bins, C) that are not all 0.

    A[c] is the share of class c in all counted pixels. A class that was never counted has 0: nothing for or against it.
    """
    import numpy as np

    shares = counts.sum(axis=(0, 1)) / counts.sum()
    rows = (counts + _SMOOTHING * shares) / (counts.sum(axis=-1, keepdims=True) + _SMOOTHING)
    lifts: NDArray[np.float64] = np.log(np.divide(rows, shares, out=np.ones_like(rows), where=shares > 0))
    return lifts


def beside(true: NDArray[Any], said: NDArray[Any]) -> NDArray[np.float64]:
    """`PolygonCounts.beside_teacher` of pixels' true classes and of what a teacher says of them, both (C, bins, C)."""
    lifts = (logarithms(true) - logarithms(said)).clip(-_HIGHEST, _HIGHEST)
    lifts[..., (true.sum(axis=(0, 1)) == 0) | (said.sum(axis=(0, 1)) == 0)] = 0
    return lifts


def _nested(rows: list[list[list[int]]]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    return tuple(tuple(tuple(row) for row in of_class) for of_class in rows)


@dataclass(frozen=True)
class PolygonEvidence:
    """How much polygons count beside a teacher: p^teacher_weight · (A[n, d, c] / A[c])^polygon_weight · exp(bias of c).

    counts: None until somebody names a file of counts. biases: by class name, 0 for the others. Raises ValueError.
    """

    counts: PolygonCounts | None = None
    teacher_weight: float = TEACHER_WEIGHT
    polygon_weight: float = POLYGON_WEIGHT
    biases: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("teacher_weight", "polygon_weight"):
            if not 0 <= getattr(self, name) <= 4:  # nan is refused, too
                raise ValueError(f"polygons.{name} {getattr(self, name):g}: expected a number from 0 to 4")
        for name, bias in self.biases.items():
            if not abs(bias) <= 20:
                raise ValueError(f"polygons.biases.{name} {bias:g}: expected a number from -20 to 20")

    def counted(self) -> PolygonCounts:
        """Return the counts. Raises ValueError if nobody has named any."""
        if self.counts is None:
            raise ValueError(
                "it weighs what lies around people's polygons, and nobody has named counts of it: give --polygons"
                " polygons.json, which `autolabel polygons` counts, or name the file in the policy"
            )
        return self.counts

    def require(self, space: LabelSpace) -> PolygonCounts:
        """Return the counts. Raises ValueError if they are missing or of other classes, or a bias is of none."""
        counts = self.counted()
        counts.require(space)
        for name in self.biases:
            if name not in space.names:
                raise ValueError(f"polygons.biases.{name}: no class of label space {space.name!r}")
        return counts

    def factors(self, space: LabelSpace) -> Table:
        """The logarithm of the factor of every class at every place, (1 + C * bins, C) float32; 0 at NOWHERE.

        At all other places a class's p is to be raised to the power of `teacher_weight` first. Raises ValueError as
        `require`.
        """
        import numpy as np

        table = self.polygon_weight * self.require(space).lifts
        table += [self.biases.get(name, 0.0) for name in space.names]
        flat = table.reshape(-1, len(space)).astype(np.float32)
        return np.concatenate([np.zeros((1, len(space)), np.float32), flat])

    def to_dict(self) -> dict[str, Any]:
        """The evidence as JSON values."""
        counts = None if self.counts is None else self.counts.to_dict()
        return {
            "teacher_weight": self.teacher_weight, "polygon_weight": self.polygon_weight,
            "biases": dict(self.biases), "counts": counts,
        }  # fmt: skip
