"""Open every file of a listing once: sizes of images, labels that cannot be used, and what is suspicious."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.account import Account
from autolabel.manifests.images import (
    BadImage,
    UnknownIds,
    decode_image,
    decode_label,
    id_counts,
    read_label,
    read_size_and_length,
)
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.layouts import Listing
from autolabel.manifests.machine import cores
from autolabel.manifests.reading import read_file
from autolabel.manifests.samples import Manifest, Sample
from autolabel.manifests.suspicions import (
    ClassCounts,
    LabelFacts,
    PhotographFacts,
    facts_of,
    facts_of_photograph,
    of_copies,
    of_labels,
    of_names,
    of_photographs,
    spread,
)
from autolabel.manifests.walk import BadLayout
from autolabel.manifests.wording import Progress, reason

_PIECE = 16  # samples that a thread takes at once
_EDGE = 4096  # bytes at both ends of an image that are compared before it is read whole

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class _Check:
    """One sample with its size; why its image cannot be read; its broken labels; its label; its length in bytes."""

    sample: Sample
    unreadable: str = ""
    broken: tuple[BadImage, ...] = ()
    label: LabelFacts | None = None
    length: int = 0


def checked(
    listing: Listing, *, assumed_space: bool, guessed: bool, ids_named: bool, progress: Progress | None
) -> tuple[Manifest, Account]:
    """Open every file, and fill in the sizes. Raises BadLayout for labels that cannot be used."""
    space = listing.label_space
    checks: list[_Check] = []
    counts = ClassCounts()
    with ThreadPoolExecutor(cores()) as pool:
        for check, pixels in _in_pieces(pool, lambda s: _check(s, space), listing.samples):
            checks.append(check)
            if pixels is not None:
                counts.add(pixels)
            if progress:
                progress(len(checks), len(listing.samples))
        samples = [check.sample for check in checks]
        unreadable = [check.unreadable for check in checks if check.unreadable]
        _require_labels([error for check in checks for error in check.broken], space)
        if guessed and len(unreadable) == len(samples):
            raise BadLayout(
                f"none of the {len(samples)} images under {listing.root} can be read; the first is {unreadable[0]}"
            )
        readable = [s for s in samples if s.readable]
        looked = list(_in_pieces(pool, _look, spread(readable), piece=1)) if readable else []
        copies = _copies(pool, [(check.sample.image, check.length) for check in checks if check.sample.readable])
    labelled = [(check.sample, check.label) for check in checks if check.label is not None]
    suspicions = (
        *of_labels(labelled, space, counts, ids_named=ids_named or listing.layout != "folder"),
        *of_photographs([one for one in looked if one is not None], [(s, s.height * s.width) for s in readable]),
        *of_copies(copies),
        *of_names([s.sample_id for s in samples]),
    )
    account = Account(
        listing,
        sources=Counter(s.source for s in samples),
        coarse=sum(s.coarse_label is not None for s in samples),
        sizes=Counter((s.height, s.width) for s in readable),
        unreadable=unreadable,
        classes=counts,
        looked_at=len(looked),
        suspicions=suspicions,
        assumed_space=assumed_space,
    )
    samples.sort(key=lambda s: (s.split, s.sample_id))
    provenance = {"layout": listing.layout, "root": str(listing.root)}
    return Manifest.of(space, tuple(samples), provenance=provenance), account


def _in_pieces(
    pool: ThreadPoolExecutor, work: Callable[[S], T], items: Sequence[S], *, piece: int = _PIECE
) -> Iterator[T]:
    """Do the work for every item, in order; a thread takes several at once, because a hand-over costs as much."""
    pieces = [items[first : first + piece] for first in range(0, len(items), piece)]
    for done in pool.map(lambda some: [work(item) for item in some], pieces):
        yield from done


def _check(sample: Sample, space: LabelSpace) -> tuple[_Check, NDArray[np.int64] | None]:
    """The sample with what was found, and the pixels of its label by train id."""
    try:
        (height, width), length = read_size_and_length(sample.image)
    except BadImage as error:
        # It stays 0 x 0, and `generate` quarantines it with the reason.
        return _Check(sample, unreadable=f"{sample.image}: {error}"), None
    broken: list[BadImage] = []
    facts: LabelFacts | None = None
    pixels: NDArray[np.int64] | None = None
    for path in dict.fromkeys(path for path in (sample.label, sample.coarse_label) if path is not None):
        try:
            label = read_label(path, space, ids=sample.label_ids, size=(height, width))
            if path == sample.label:
                pixels = id_counts(label)
                facts = facts_of(label, pixels, space)
        except BadImage as error:
            broken.append(error)
        except OSError as error:  # named in a CSV, and gone since
            broken.append(BadImage(f"{path}: {reason(error)}"))
    sample = replace(sample, height=height, width=width)
    return _Check(sample, "", tuple(broken), facts, length), pixels


def _require_labels(broken: Sequence[BadImage], space: LabelSpace) -> None:
    """Raise BadLayout if there are labels that cannot be used, and say what their ids look like."""
    if not broken:
        return
    more = f" (and {len(broken) - 1} more labels)" if len(broken) > 1 else ""
    hint = hint_about(broken, space)
    raise BadLayout(f"{broken[0]}{more}{hint}: repair or remove it, or name the right label space and ids")


def hint_about(broken: Sequence[BadImage], space: LabelSpace) -> str:
    """A guess, with a semicolon before it, why labels have ids that their label space does not know; else ""."""
    unknown = [error.ids for error in broken if isinstance(error, UnknownIds)]
    ids = sorted(frozenset[int]().union(*unknown)) if len(unknown) == len(broken) else []
    if len(ids) > 64:
        return "; so many values are those of a photograph, and not of a label"
    if ids and set(ids) <= space.known_source_ids and all(" (train ids)" in str(error) for error in broken):
        return "; they are source ids of the label space: try --label-ids source"
    if ids == [len(space)]:
        return "; do the ids begin at 1? They have to begin at 0"
    return "; are the ids inverted (255 - id)?" if ids and ids[0] > 255 - len(space) else ""


def _look(sample: Sample) -> tuple[Sample, PhotographFacts] | None:
    """Look at the pixels of a photograph and its label; None if they cannot be decoded."""
    try:
        data = read_file(sample.image)
        return sample, facts_of_photograph(decode_image(data), _stored(sample))
    except (BadImage, OSError):
        return None  # `generate` will quarantine it with the reason


def _stored(sample: Sample) -> NDArray[np.uint8] | None:
    """The label as its file has it, to be compared with the photograph: ids (H, W) or colours (H, W, 3)."""
    if sample.label is None:
        return None
    data = read_file(sample.label)
    return decode_image(data) if sample.label_ids == "color" else decode_label(data, None)


def _copies(pool: ThreadPoolExecutor, images: Sequence[tuple[Path, int]]) -> list[list[Path]]:
    """Images of the same bytes. Only those of one length are opened, and only those of equal ends are read whole."""
    alike = _groups(images)
    for look in (_ends, storage.crc32c):
        paths = [path for group in alike for path in group]
        numbers = {path: number for number, group in enumerate(alike) for path in group}
        marks = _in_pieces(pool, look, paths)
        alike = _groups([(path, (numbers[path], mark)) for path, mark in zip(paths, marks, strict=True)])
    return alike


def _groups(marked: Sequence[tuple[Path, object]]) -> list[list[Path]]:
    """The paths with equal marks, in groups of two and more."""
    groups: dict[object, list[Path]] = {}
    for path, mark in marked:
        groups.setdefault(mark, []).append(path)
    return [group for group in groups.values() if len(group) > 1]


def _ends(path: Path) -> int:
    with storage.reading(path) as file:
        head = file.read(_EDGE)
        file.seek(max(0, file.seek(0, 2) - _EDGE))
        return zlib.crc32(head + file.read(_EDGE))
