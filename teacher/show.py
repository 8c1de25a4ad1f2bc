"""A teacher in words, and a class map drafted from the names of its classes."""

from __future__ import annotations

from dataclasses import dataclass

from autolabel.manifests.class_draft import draft
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.teachers import CHECKPOINT, BadTeacher, TeacherName, TeacherPlace
from autolabel.manifests.wording import Shown, counted
from autolabel.teacher.checkpoints import read_checkpoint
from autolabel.teacher.loading import names_of, seen_by


@dataclass(frozen=True)
class TeacherCard(Shown):
    """A teacher in words. names: of its classes by channel, None where it does not name them.

    classes: their number, None where nobody knows. seen: the number of images that it has seen, None where unknown.
    """

    place: TeacherPlace
    digest: str
    classes: int | None
    names: tuple[str, ...] | None
    seen: int | None

    def lines(self) -> list[str]:
        """Kind, classes, images that it has seen, digest."""
        named = f": {', '.join(self.names)}" if self.names else ", which it does not name"
        count = "unknown" if self.classes is None else counted(self.classes, "class", "classes")
        return [
            f"teacher  {self.place}",
            f"kind     {self.place.kind}",
            f"classes  {count}{named}",
            f"seen     {'it does not say' if self.seen is None else counted(self.seen, 'image')}",
            f"sha256   {self.digest}",
        ]


def show_teacher(spelling: str) -> TeacherCard:
    """Ask a teacher what it is. Raises BadTeacher, BadCheckpoint, FileNotFoundError."""
    name = TeacherName.of(spelling)
    (place,) = name.places
    digest, names = name.digest(), names_of(place)
    classes = read_checkpoint(place.path).classes if place.kind == CHECKPOINT else len(names or ()) or None
    seen = seen_by(name)
    return TeacherCard(place, digest, classes, names, None if seen is None else len(seen))


def draft_map(card: TeacherCard, space: LabelSpace) -> str:
    """Draft the TOML of a class map from a teacher onto a label space. Raises BadTeacher, ValueError."""
    if card.names is None:
        raise BadTeacher(
            f"{card.place} does not name its classes: a map of them has to be written by someone who knows"
        )
    about = "".join(f"# {' '.join(line.split())}\n" for line in card.lines())
    return about + draft(card.names, space).to_toml(teacher=str(card.place), space=space)
