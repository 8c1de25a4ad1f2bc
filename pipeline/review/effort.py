"""How much time people have, and how long they take: a budget of images, or of time for regions."""

from __future__ import annotations

import math
import re
from dataclasses import astuple, dataclass

_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}
_FORM = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)")
_EXPECTED = "expected a number of images, such as 50, or a time for regions, such as 30min, 2h or 90s"


@dataclass(frozen=True)
class Effort:
    """A budget: so many whole images, or so many seconds for regions. Raises ValueError for nothing and for both."""

    images: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.images, self.seconds) if value is not None]
        if len(given) != 1 or not 0 < given[0] < math.inf:
            raise ValueError(f"a budget of nothing: {_EXPECTED}")

    @classmethod
    def of(cls, text: str) -> Effort:
        """Read "50", "30min", "2h" or "90s". Raises ValueError."""
        found = _FORM.fullmatch(text.strip())
        if found is None:
            raise ValueError(_EXPECTED)
        amount, unit = found.groups()
        if not unit:
            if "." in amount:
                raise ValueError(f"{amount} images: {_EXPECTED}")
            return cls(images=int(amount))
        if unit not in _UNITS:
            raise ValueError(f"unknown unit {unit!r}: {_EXPECTED}")
        return cls(seconds=float(amount) * _UNITS[unit])


@dataclass(frozen=True)
class Pace:
    """Seconds that a person needs: to open an image, to find and name a region, and for each pixel of its boundary.

    Raises ValueError for numbers below 0, and unless a region costs something.
    """

    image: float = 10.0
    region: float = 5.0
    boundary_pixel: float = 0.1

    def __post_init__(self) -> None:
        values = astuple(self)
        if not all(0 <= value < math.inf for value in values) or self.region == 0:
            told = ",".join(f"{value:g}" for value in values)
            raise ValueError(f"seconds {told}: expected three numbers of 0 or more, that of a region above 0: {PACE}")

    @classmethod
    def of(cls, text: str) -> Pace:
        """Read "10,5,0.1": seconds an image, a region, a pixel of boundary. Raises ValueError."""
        try:
            image, region, pixel = map(float, text.split(","))
        except ValueError:
            raise ValueError(f"expected three numbers: {PACE}") from None
        return cls(image, region, pixel)

    def __str__(self) -> str:
        return (
            f"{self.image:g} s to open an image, {self.region:g} s a region, {self.boundary_pixel:g} s a pixel of its"
            " boundary"
        )


PACE = "seconds an image, a region and a pixel of its boundary, such as 10,5,0.1"
