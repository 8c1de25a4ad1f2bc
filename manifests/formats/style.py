"""The choices that formats may offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

IMAGES = ("copy", "link", "none")


@dataclass(frozen=True)
class Style:
    """The choices that a format may offer; one that does not know a choice refuses another value than the default.

    label_ids: "train", "source" or "color" (a palette). flat: all files in one folder. images: "copy", "link", or
    "none" to send labels alone.
    """

    label_ids: str = "train"
    flat: bool = False
    images: str = "copy"

    def __post_init__(self) -> None:
        from autolabel.manifests.schemas import LABEL_IDS  # loads pyarrow, which help does not wait for

        for name, choices in (("label_ids", LABEL_IDS), ("images", IMAGES)):
            if getattr(self, name) not in choices:
                text = name.replace("_", " ")
                raise ValueError(f"{text} {getattr(self, name)!r}: expected {', '.join(choices)}")

    def require(self, where: str, **offered: Sequence[Any]) -> None:
        """Raise ValueError unless a format offers every choice; one that is not named in `offered` has its default."""
        for field in fields(self):
            value, choices = getattr(self, field.name), offered.get(field.name, (field.default,))
            if value not in choices:
                flag = field.name.replace("_", "-")
                shown = f"--{flag}" if value is True else f"--{flag} {value}"
                raise ValueError(f"{where} does not know {shown}: leave it out")
