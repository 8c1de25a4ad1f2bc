"""The port of a format: one image on its way out, one label on its way back, and the names that both go by.

Every format has a class that follows `Format`, and, where labels come back in it, a function `read(path, space)` that
yields `Returned`; known.py lists them. `pipeline/export.py` and `pipeline/corrections.py` drive them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.formats.portable import portable
from autolabel.manifests.formats.style import Style
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.run.shards import Label
from autolabel.manifests.samples import Sample


@dataclass(frozen=True)
class Outgoing:
    """One labelled image on its way out.

    name: what other tools call it: its sample id as `portable` spells it, a relative path without a suffix. label:
    (H, W) uint8 train ids, 255 where it is ignored. confidence: (H, W) uint8, 255 times the probability of the
    teacher's top class; None if nobody knows it. score: mean confidence of the image in 0..1, None if nobody knows it.
    """

    sample: Sample
    name: str
    label: Label
    confidence: NDArray[np.uint8] | None = None
    score: float | None = None


class Format(Protocol):
    """Writes labels in one format. Made with a label space and a style, which raises ValueError for a style it lacks.

    notes: sentences about what the format cannot say, and what was done instead, for example where ignore went.
    """

    notes: Sequence[str]

    def __init__(self, space: LabelSpace, style: Style) -> None: ...

    def write(self, item: Outgoing, folder: Path) -> dict[str, Any]:
        """Write the files of one image below `folder`, and return what `finish` needs of it, as JSON values.

        It may be called for the same image again, after a call that was killed; threads call it for several at once.
        """
        ...

    def finish(self, folder: Path, entries: Iterable[dict[str, Any]]) -> None:
        """Write the files that list all images, from what `write` has returned, in the order of the samples.

        They appear whole or not at all. It may be called again.
        """
        ...


@runtime_checkable
class Packing(Format, Protocol):
    """A format that packs several images into one file."""

    def pack(self, folder: Path, number: int, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Pack the images of the n-th chunk of an export, and return what `finish` needs of each, as JSON values.

        entries: what `write` has returned, in the order of the samples. It may be called again with the same ones.
        """
        ...


@dataclass(frozen=True)
class Returned:
    """One label on its way back: what the tool calls the image, without a suffix, and (H, W) uint8 train ids."""

    name: str
    label: Label


class BadReturn(ValueError):
    """A file of a labelling tool cannot be taken over; the message names file, value and what was expected."""


SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip


def split_of(sample: Sample) -> str:
    """The split of a sample; without one, that by which the first folder of its id is called, else "train"."""
    folder, slash, _ = sample.sample_id.partition("/")
    return sample.split or SPLITS.get(folder if slash else "", "train")


def put_mask(path: Path, data: bytes) -> None:
    """Write the file of a label whole. Raises ValueError where another one lies there: nobody's work is overwritten.

    A call that was killed has left the same bytes, because files appear whole and a label has one form in a format.
    """
    if storage.stat(path) is None:
        storage.write(path, data)
    elif storage.read(path) != data:
        raise ValueError(
            f"{path} is not as this export writes it, so somebody has edited it since the export was stopped: move it"
            " elsewhere, and give it to `autolabel import` later, or choose another -o"
        )


def flat(name: str) -> str:
    """A sample id as the name of a file in one folder: "a/b" becomes "a__b"."""
    return name.replace("/", "__")


class Names:
    """Finds the sample that a tool means by a name: by its id, its flat id, or the last part of its id.

    Raises ValueError from `find` for a name that no sample or more than one has.
    """

    def __init__(self, sample_ids: Iterable[str]) -> None:
        listed = list(dict.fromkeys(sample_ids))
        spelt = [(portable(sample_id), sample_id) for sample_id in listed]
        self._by_name = dict(spelt) | dict(zip(listed, listed, strict=True))
        self._by_flat = _unique((flat(name), sample_id) for name, sample_id in spelt)
        self._by_stem = _unique((PurePosixPath(name).name, sample_id) for name, sample_id in spelt)

    def find(self, name: str) -> str:
        """The sample id that `name` means, a path with or without folders before it, without a suffix."""
        parts = PurePosixPath(name).parts
        ends = ["/".join(parts[start:]) for start in range(len(parts))]
        for end in ends:
            if end in self._by_name:
                return self._by_name[end]
        for known in (self._by_flat, self._by_stem):
            for end in ends:
                if (sample_id := known.get(end)) is not None:
                    return sample_id
        raise ValueError(f"{name!r} means no image" + (" or several" if parts and parts[-1] in self._by_stem else ""))


def _unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str | None]:
    """Values by their keys, None where a key has several."""
    listed = list(pairs)
    counts = Counter(key for key, _ in listed)
    return {key: value if counts[key] == 1 else None for key, value in listed}
