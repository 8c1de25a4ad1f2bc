"""The rectangle of an image in which a teacher may label."""

from __future__ import annotations

from dataclasses import dataclass

UNITS = ("pixels", "fractions")  # an area is given in pixels, or in fractions of the image's sides
_LONGEST = 1 << 31  # pixels of a side


@dataclass(frozen=True)
class Area:
    """The rectangle in which the teacher counts: from the first row up to, not including, the second; columns likewise.

    The numbers are pixels, or fractions of an image's height and width, which are rounded to the nearest pixel. Raises
    ValueError, naming the value.
    """

    rows: tuple[float, float]
    columns: tuple[float, float]
    unit: str = UNITS[0]

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"area unit {self.unit!r}: expected {' or '.join(UNITS)}")
        for name in ("rows", "columns"):
            first, end = ends = tuple(getattr(self, name))
            whole = self.unit == "fractions" or all(float(x).is_integer() for x in ends)
            if not (whole and 0 <= first < end <= (_LONGEST if self.unit == "pixels" else 1)):
                expected = "two fractions in 0..1" if self.unit == "fractions" else "two whole numbers, 0 or more"
                raise ValueError(f"area {name} {list(ends)}: expected {expected}, the first less than the second")
            object.__setattr__(self, name, ends)

    def box(self, height: int, width: int) -> tuple[slice, slice]:
        """The rows and columns of the area in an image of this size. Raises ValueError if it leaves the image."""
        down, across = (height, width) if self.unit == "fractions" else (1, 1)
        (top, bottom), (left, right) = (
            (round(first * side), round(end * side))
            for (first, end), side in ((self.rows, down), (self.columns, across))
        )
        if bottom > height or right > width:
            raise ValueError(
                f"area of rows {top}..{bottom} and columns {left}..{right} leaves an image of {height} rows and {width}"
                " columns: give it in fractions, or label these images in a run of their own"
            )
        return slice(top, bottom), slice(left, right)
