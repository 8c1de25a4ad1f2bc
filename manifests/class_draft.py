"""Draft a class map by names: what a person would write down at once, with comments where one has to look."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autolabel.manifests.class_map import CLASS_MAPS, IGNORED, load_class_map, synonyms
from autolabel.manifests.documents import BadDocument
from autolabel.manifests.label_space import BUILT_IN, IGNORE, LabelSpace, load_label_space

_LONGEST = 110  # of a line that holds a whole list


@dataclass(frozen=True)
class Draft:
    """The classes of a teacher by the class that they go to, `IGNORED` among these; comments on some of them.

    source: where the map comes from, in words.
    """

    classes: Mapping[str, Sequence[str]]
    comments: Mapping[str, str]
    source: str

    def to_toml(self, *, teacher: str, space: LabelSpace) -> str:
        """The text of a file that `load_class_map` reads."""
        count = sum(map(len, self.classes.values()))
        lines = [f"# {count} classes of {_one_line(teacher)} onto the {len(space)} of label space {space.name!r},"]
        lines += [f"# {self.source}", "[classes]"]
        for target, names in self.classes.items():
            lines += self._entry(target, names)
        return "\n".join(lines) + "\n"

    def _entry(self, target: str, names: Sequence[str]) -> list[str]:
        whole = f"{_quoted(target)} = [{', '.join(map(_quoted, names))}]"
        if len(whole) <= _LONGEST and not any(name in self.comments for name in names):
            return [whole]
        rows = [
            f"    {_quoted(name)}," + (f"  # {_one_line(self.comments[name])}" if name in self.comments else "")
            for name in names
        ]
        return [f"{_quoted(target)} = [", *rows, "]"]


def draft(names: Sequence[str], space: LabelSpace) -> Draft:
    """Draft a class map from the class names of a teacher to a label space.

    A built-in map is taken where one fits. Else a name goes to the class that has one of its synonyms, in any case,
    with other hyphens, in singular or plural, or the last part of it (`construction--flat--road`); or to where a
    built-in map sends a name like it. Everything else is ignored, with a comment on names that are alike. Raises
    ValueError if no class is found at all.
    """
    for name in CLASS_MAPS:
        if name.endswith(f"-to-{space.name}") and space.name in BUILT_IN and load_label_space(space.name) == space:
            try:
                train_ids = load_class_map(name).indices(names, space, teacher="teacher")
            except BadDocument:
                continue
            return Draft(_grouped(names, train_ids, space), {}, f"as the built-in map {name} says.")
    known, places = _customary(space), list[int]()
    owners: dict[str, set[int]] = {}
    for train_id, own in enumerate(space.names):
        for word in _words(own):
            owners.setdefault(word, set()).add(train_id)
    comments: dict[str, str] = {}
    for name in names:
        found = {train_id for word in _words(name) for train_id in owners.get(word, ())}
        usual = {where for word in _words(name) for where in known.get(word, ())} if not found else set()
        if len(found) == 1:
            places.append(found.pop())
        elif len(usual) == 1:
            ((train_id, source),) = usual
            places.append(train_id)
            comments[name] = f"as in {source}: is it?"
        else:
            places.append(IGNORE)
            alike = [space.names[i] for i in sorted(found)] or _alike(name, space)
            comments |= {name: f"{' or '.join(map(repr, alike))}?"} if alike else {}
    if all(train_id == IGNORE for train_id in places):
        raise ValueError(
            f"none of the {len(names)} classes has a name like one of label space {space.name!r}: write the map by"
            " hand, docs/class-maps.md has its form"
        )
    return Draft(_grouped(names, places, space), comments, "by their names: read it before you use it.")


def _grouped(names: Sequence[str], train_ids: Sequence[int], space: LabelSpace) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {target: [] for target in (*space.names, IGNORED)}
    for name, train_id in zip(names, train_ids, strict=True):
        groups[IGNORED if train_id == IGNORE else space.names[train_id]].append(name)
    return groups


def _words(name: str) -> set[str]:
    """The forms in which a class may be named elsewhere: its synonyms without hyphens and plural ends."""
    parts = {part for word in synonyms(name) for part in (word, word.rpartition("--")[2])}
    return {form for part in parts for form in _forms(_plain(part))}


def _plain(word: str) -> str:
    return " ".join(word.replace("-", " ").replace("_", " ").split())


def _forms(word: str) -> set[str]:
    """A word as it is, and without each ending that may be a plural's: buses -> buses, buse, bus."""
    ends = (("s", ""), ("es", ""), ("ies", "y"))
    return {word, *(word.removesuffix(end) + single for end, single in ends if word.endswith(end))}


def _customary(space: LabelSpace) -> dict[str, set[tuple[int, str]]]:
    """The train ids to which built-in maps send words, each with the name of the first such map."""
    known: dict[str, set[tuple[int, str]]] = {}
    for name in CLASS_MAPS:
        if not name.endswith(f"-to-{space.name}"):
            continue
        for target, sources in load_class_map(name).classes.items():
            if target not in space.names:
                continue
            train_id = space.names.index(target)
            for word in (word for source in sources for word in _words(source)):
                usual = known.setdefault(word, set())
                if train_id not in {place for place, _ in usual}:
                    usual.add((train_id, name))
    return known


def _alike(name: str, space: LabelSpace) -> list[str]:
    words = {word: own for own in space.names for word in _words(own)}
    close = (difflib.get_close_matches(word, words, 1, cutoff=0.8) for word in sorted(_words(name)))
    return list(dict.fromkeys(words[found[0]] for found in close if found))[:2]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    return " ".join(text.split())
