"""Files that name samples: one id a line, as reports, `autolabel review` and people write them."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from autolabel.manifests.documents import BadDocument, read_names
from autolabel.manifests.locations import location
from autolabel.manifests.wording import counted

_MOST_BYTES = 1 << 30  # ten million ids
_HEADERS = ("sample_id", "id", "image", "image_id", "name")  # the first cell of a CSV's header


class BadIds(ValueError):
    """A file of ids cannot be used; the message names the file and what was expected."""


@dataclass(frozen=True)
class Ids:
    """The sample ids that a file names, each once, in the file's order."""

    path: Path
    names: tuple[str, ...]

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._set

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _set(self) -> frozenset[str]:
        return frozenset(self.names)

    def unknown(self, known: Container[str], *, where: str) -> str:
        """A sentence about the ids that are not in `known`, empty if all are; `where` ends it: "in these manifests".

        Raises BadIds if none is known: this is the list of something else.
        """
        missing = [name for name in self.names if name not in known]
        first = ", ".join(map(repr, missing[:3])) + (", …" if len(missing) > 3 else "")
        if len(missing) == len(self.names):
            raise BadIds(f"{self.path}: none of its {counted(len(missing), 'id')} is {where} ({first})")
        return f"{self.path}: {len(missing)} of its {counted(len(self), 'id')} not {where}: {first}" if missing else ""


def read_ids(path: str | Path) -> Ids:
    """Read the ids that a file names: one a line, "#" begins a comment line; of a CSV, the cells of its first column.

    A CSV is called so; the first cell of its header, if it has one, is `sample_id`, `id`, `image`, `image_id` or
    `name`. An id that comes twice counts once. Raises BadIds, also for a file that names none.
    """
    path = location(path)
    try:
        names = read_names(path, headers=_HEADERS, at_most=_MOST_BYTES)
    except BadDocument as error:
        raise BadIds(
            f"{error}: a file of sample ids has one a line, or is a CSV whose first column has them"
        ) from error
    if not names:
        raise BadIds(f"{path} names no sample: expected sample ids, one a line, or a CSV whose first column has them")
    return Ids(path, tuple(dict.fromkeys(names)))
