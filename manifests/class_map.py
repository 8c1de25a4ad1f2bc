"""Class maps: which classes of a teacher make up each class of a label space.

    [classes]
    road = ["road, route", "path"]
    pole = []
    ignore = ["bed", "painting"]

The probabilities of the classes that go to one class are summed; those under `ignore` count as "none of these". Every
class of the teacher stands in the map once. Nothing here loads torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, read_json, read_toml, shaped
from autolabel.manifests.label_space import IGNORE, SPACES, LabelSpace
from autolabel.manifests.locations import location

IGNORED = "ignore"  # the key of the classes that are none of the label space's
CLASS_MAPS = (
    "mapillary-v1.2-to-cityscapes",
    "mapillary-v2.0-to-cityscapes",
    "bdd100k-to-cityscapes",
    "idd-to-cityscapes",
    "ade20k-to-cityscapes",
    "coco-stuff-to-cityscapes",
    "cityscapes-to-camvid",
)
_TABLE = "classes"
_MOST_BYTES = 1 << 18
_FORM = 'expected a table [classes] with lines like road = ["road, route", "path"]'

Words = frozenset[str]


@dataclass(frozen=True)
class ClassMap:
    """The classes of a teacher by the class that they go to; `IGNORED` is the key of those that go to none.

    where: the file in messages; it does not count in comparisons. Raises BadDocument, naming file and class, if a class
    of the teacher stands there twice, or all are ignored.
    """

    classes: Mapping[str, tuple[str, ...]]
    where: str = field(default="class map", compare=False)

    def __post_init__(self) -> None:
        owners: dict[str, str] = {}
        for target, names in self.classes.items():
            for name in names:
                if name in owners:
                    places = f"{owners[name]!r} and {target!r}" if owners[name] != target else f"{target!r} twice"
                    raise BadDocument(f"{self.where} has teacher class {name!r} under {places}: name it once")
                owners[name] = target
        if not any(names for target, names in self.classes.items() if target != IGNORED):
            raise BadDocument(f"{self.where} gives no teacher class to any class: {_FORM}")

    @classmethod
    def of(cls, document: Any, *, where: str = "class map") -> ClassMap:
        """Make a class map from `to_dict` or a parsed TOML file. Raises BadDocument, naming file and key."""
        if type(document) is not dict or set(document) != {_TABLE}:
            extra = sorted(set(document) - {_TABLE}) if type(document) is dict else []
            raise BadDocument(f"{where} has an unknown key {extra[0]!r}: {_FORM}" if extra else f"{where}: {_FORM}")
        table = shaped(dict[str, tuple[str, ...]], document[_TABLE], f"{where}, {_TABLE!r}")
        return cls(table, where)

    @classmethod
    def read(cls, path: Path) -> ClassMap:
        """Read a TOML file. Raises BadDocument."""
        return cls.of(read_toml(path, at_most=_MOST_BYTES), where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values that `of` reads back."""
        return {_TABLE: {target: list(names) for target, names in self.classes.items()}}

    def indices(self, teacher_classes: Sequence[str], space: LabelSpace, *, teacher: str) -> tuple[int, ...]:
        """The train id in `space` of every class of a teacher, in their order; 255 for those that are ignored.

        A name stands for the class of the same name, or else for the only one that it agrees with in all but case,
        spaces at the ends, and synonyms after commas. `ignore` may also name classes that this teacher does not have.
        teacher: its name for messages. Raises BadDocument, naming file and class, if a class of the teacher is left
        out, meant twice, or goes to no class of `space`, or if a name means none of them.
        """
        for target in self.classes:
            if target != IGNORED and target not in space.names:
                raise BadDocument(
                    f"{self.where}: {target!r} is no class of label space {space.name!r}: {_hint(target, space.names)}"
                )
        wanted = [(name, target) for target, names in self.classes.items() for name in names]
        places = meant([name for name, _ in wanted], teacher_classes)
        train_ids: dict[int, int] = {}
        for (name, target), place in zip(wanted, places, strict=True):
            if place is None and target != IGNORED:
                left = [n for i, n in enumerate(teacher_classes) if i not in places]
                hint = _hint(name, left or teacher_classes)
                raise BadDocument(f"{self.where}, {target!r}: {name!r} is no class of {teacher}: {hint}")
            if place is not None:
                train_ids[place] = IGNORE if target == IGNORED else space.names.index(target)
        missing = [name for place, name in enumerate(teacher_classes) if place not in train_ids]
        if missing:
            count = f"{missing[0]!r} and {len(missing) - 1} more classes" if missing[1:] else f"class {missing[0]!r}"
            advice = f"name every class once, under a class of {space.name!r} or under {IGNORED!r}"
            raise BadDocument(f"{self.where} leaves out {count} of {teacher}: {advice}")
        return tuple(train_ids[place] for place in range(len(teacher_classes)))


def meant(names: Sequence[str], classes: Sequence[str]) -> list[int | None]:
    """The place in `classes` that each name means, or None. No place is meant twice.

    Equal names come first; then those that agree in all but case and spaces at the ends, in their first synonym, and in
    any synonym, if there is only one such class left.
    """
    places: list[int | None] = [None] * len(names)
    free = dict(enumerate(classes))
    for key in _KEYS:
        open_names = {
            at: key(name) for at, (name, place) in enumerate(zip(names, places, strict=True)) if place is None
        }
        open_classes = {place: key(name) for place, name in free.items()}
        for at, place in _only_pairs(open_names, open_classes):
            places[at] = place
            del free[place]
    return places


def _only_pairs(names: Mapping[int, Words], classes: Mapping[int, Words]) -> Iterator[tuple[int, int]]:
    """The pairs that share a word, where neither shares one with anything else."""
    places: dict[str, list[int]] = {}
    for place, words in classes.items():
        for word in words:
            places.setdefault(word, []).append(place)
    found = {at: {place for word in words for place in places.get(word, ())} for at, words in names.items()}
    suitors: dict[int, int] = {}
    for matches in found.values():
        for place in matches:
            suitors[place] = suitors.get(place, 0) + 1
    for at, matches in found.items():
        if len(matches) == 1 and suitors[place := next(iter(matches))] == 1:
            yield at, place


def synonyms(name: str) -> list[str]:
    """The words for a class, as ADE20K separates them by commas, in small letters: ["road", "route"]."""
    return [word for word in (" ".join(part.split()).casefold() for part in name.split(",")) if word]


_KEYS: tuple[Callable[[str], Words], ...] = (
    lambda name: frozenset({name}),
    lambda name: frozenset({", ".join(synonyms(name))}),
    lambda name: frozenset(synonyms(name)[:1]),
    lambda name: frozenset(synonyms(name)),
)


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    some = ", ".join(map(repr, known[:20])) + (" and others" if known[20:] else "")
    return f"did you mean {close[0]!r}?" if close else f"expected one of {some}"


def load_class_map(name_or_file: str) -> ClassMap:
    """Return a built-in class map by its name, or read one from a TOML file. Raises ValueError with what is wrong."""
    if name_or_file in CLASS_MAPS:
        table = read_json(SPACES / f"{name_or_file}.json", dict[str, Any])[_TABLE]
        return ClassMap.of({_TABLE: table}, where=f"class map {name_or_file!r}")
    path = location(name_or_file)
    if not storage.exists(path):
        raise ValueError(
            f"class map {name_or_file!r} is neither built in ({', '.join(CLASS_MAPS)}) nor a TOML file that exists"
        )
    return ClassMap.read(path)
