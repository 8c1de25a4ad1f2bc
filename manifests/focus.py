"""A focus: which share of an image the teacher's highest scale sees, and how far the rest of it could change a label.

Logits mix linearly. So the logarithm of a class's odds changes by the highest scale's share times the difference
between its logits and those that stand in for them. The largest quotient that was seen on images computed both ways is
a class's swing, and a label whose odds stay above the threshold after share x swing is certified: the highest scale
would not have changed it, unless the image swings more than all those images did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autolabel.manifests import storage
from autolabel.manifests.documents import plain_json, read_parsed, shaped
from autolabel.manifests.locations import location

FORMAT = "autolabel focus 1"


@dataclass(frozen=True)
class Focus:
    """The share of the rows that the highest scale sees, and the swings of a certificate. Raises ValueError.

    within, beyond: by train id the swing of a class in rows that the highest scale has seen and in the others; None
    without a certificate.
    """

    share: float
    within: tuple[float, ...] | None = None
    beyond: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"focus {self.share:g}: expected a share of the rows in (0, 1], such as 0.25")
        if (self.within is None) != (self.beyond is None):
            raise ValueError("focus: expected swings both within the rows seen and beyond them, or neither")
        for swing in (*(self.within or ()), *(self.beyond or ())):
            if not 0 <= swing < float("inf"):
                raise ValueError(f"focus: swing {swing:g}: expected a number of 0 or more")
        if len(self.within or ()) != len(self.beyond or ()):
            raise ValueError("focus: expected as many swings within the rows seen as beyond them")

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Focus:
        """The focus that `to_dict` wrote. Raises ValueError for anything else."""
        shape = {"share": float, "within": tuple[float, ...] | None, "beyond": tuple[float, ...] | None}
        missing = [name for name in shape if name not in document]
        if missing:
            raise ValueError(f"its focus has no {missing[0]!r}")
        return cls(**{name: shaped(kind, document[name], f"its focus, {name!r},") for name, kind in shape.items()})

    def to_dict(self) -> dict[str, Any]:
        """The focus as JSON values."""
        return dict(plain_json({"share": self.share, "within": self.within, "beyond": self.beyond}))


@dataclass(frozen=True)
class FocusCertificate:
    """A focus with its certificate, and what it was measured on and with.

    teacher_sha256, scales, flip, combine: of the labelling. classes: their names by train id. images, pixels: compared.
    """

    focus: Focus
    teacher_sha256: str
    scales: tuple[float, ...]
    flip: bool
    combine: str
    classes: tuple[str, ...]
    images: int
    pixels: int

    def require(self, *, teacher_sha256: str, scales: tuple[float, ...], flip: bool, combine: str) -> None:
        """Raise ValueError unless a labelling has this teacher, and looks at images in this way."""
        if teacher_sha256 != self.teacher_sha256:
            raise ValueError("the focus was measured with another teacher: run `autolabel focus` with this one")
        ours, theirs = (self.scales, self.flip, self.combine), (scales, flip, combine)
        for name, own, other in zip(("scales", "flip", "combine"), ours, theirs, strict=True):
            if own != other:
                raise ValueError(f"the focus was measured with {name} {own}, now {other}: run `autolabel focus` again")

    def to_dict(self) -> dict[str, Any]:
        """The certificate as JSON values; swings by the name of their class."""
        values = {key: value for key, value in vars(self).items() if key not in ("focus", "classes")}
        within, beyond = (dict(zip(self.classes, x or (), strict=True)) for x in (self.focus.within, self.focus.beyond))
        return dict(
            plain_json({"format": FORMAT, "share": self.focus.share, **values, "within": within, "beyond": beyond})
        )

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> FocusCertificate:
        """The certificate that `to_dict` wrote. Raises ValueError."""
        if document.get("format") != FORMAT:
            raise ValueError(
                f"its format is {document.get('format')!r}, expected {FORMAT!r}: run `autolabel focus` again"
            )
        swings = dict[str, float]
        shape: dict[str, Any] = {
            "share": float, "teacher_sha256": str, "scales": tuple[float, ...], "flip": bool, "combine": str,
            "images": int, "pixels": int, "within": swings, "beyond": swings,
        }  # fmt: skip
        missing = [name for name in shape if name not in document]
        if missing:
            raise ValueError(f"it has no {missing[0]!r}")
        values = {name: shaped(kind, document[name], repr(name)) for name, kind in shape.items()}
        share, within, beyond = (values.pop(name) for name in ("share", "within", "beyond"))
        if list(within) != list(beyond):
            raise ValueError("'within' and 'beyond' have other classes")
        focus = Focus(share, tuple(within.values()), tuple(beyond.values()))
        return cls(focus, classes=tuple(within), **values)

    @classmethod
    def read(cls, path: Path) -> FocusCertificate:
        """Read focus.json. Raises BadDocument, naming the file."""
        return read_parsed(path, cls.from_dict, advice="`autolabel focus` makes such a file")

    def write(self, path: Path) -> None:
        """Write focus.json, whole or not at all."""
        storage.write_json(path, self.to_dict())


_EXPECTED = "expected a share of the rows in (0, 1], such as 0.25, or the file of `autolabel focus`"


def parse_focus(text: str) -> Focus | FocusCertificate | None:
    """Read "0.25", or the file of `autolabel focus`. Raises ValueError."""
    try:
        share = float(text)
    except ValueError:
        if not storage.exists(location(text)):
            raise ValueError(_EXPECTED) from None
        return focus_of(location(text))
    if not 0 < share <= 1:
        raise ValueError(_EXPECTED)
    return focus_of(share)


def focus_of(value: object) -> Focus | FocusCertificate | None:
    """The focus of a share, or of a file; None where the highest scale sees all. Raises ValueError."""
    if isinstance(value, str | Path):
        value = FocusCertificate.read(location(value))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value = Focus(float(value))
    if value is not None and not isinstance(value, Focus | FocusCertificate):
        raise ValueError(f"focus {value!r}: {_EXPECTED}")
    focus = value.focus if isinstance(value, FocusCertificate) else value
    return None if focus is None or focus.share == 1 else value
