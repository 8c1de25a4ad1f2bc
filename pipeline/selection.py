"""The samples that an export sends: which of a run or manifest, in which order, under which names."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from autolabel.manifests.condition import ABOUT, parse_condition
from autolabel.manifests.formats.exchange import flat
from autolabel.manifests.formats.portable import portable
from autolabel.manifests.ids import Ids, read_ids
from autolabel.manifests.samples import Sample, in_pieces
from autolabel.manifests.schemas import IMAGES_SCHEMA, REVIEW_SCHEMA
from autolabel.manifests.wording import counted
from autolabel.pipeline.names import folded, require_distinct
from autolabel.pipeline.outgoing import LabelSource

NO_LABEL, QUARANTINED, UNREADABLE = "no label", "quarantined", "unreadable photograph"
_PIECE = 4096  # samples
_LONGEST = 200  # bytes of a name; formats make it longer by up to 40


@dataclass(frozen=True)
class Selection:
    """The part of the samples that is asked for. Raises ValueError.

    worst: so many, the least trusted first. ids: a file that names samples, in the order of sending unless trust gives
    another. keep_if: a condition on the statistics of runs, and on sample_id, group, split and source. Together they
    leave what all of them leave.
    """

    worst: int | None = None
    ids: Path | None = None
    keep_if: str | None = None

    def __post_init__(self) -> None:
        if self.worst is not None and self.worst < 1:
            raise ValueError(f"worst {self.worst}: expected a number of samples, 1 or more")


@dataclass
class Choice:
    """The samples that an export sends, and those that it does not.

    samples: how many the source has. count: how many are sent. aside: how many were not asked for, by the option that
    leaves them out. left_out: id, kind and reason of samples that were asked for and have nothing to send. waiting: how
    many a run has not labelled yet. digest: of the ids and labels that are sent, in order. note: a sentence about ids
    that nobody knows, or "". rows: rows of the manifest in the order of sending, None for its own order. taken: for
    every piece of the manifest, the samples that are sent. prefixed: whether names begin with their source.
    """

    source: LabelSource
    samples: int = 0
    count: int = 0
    aside: Counter[str] = field(default_factory=Counter)
    left_out: list[tuple[str, str, str]] = field(default_factory=list)
    waiting: int = 0
    digest: str = ""
    note: str = ""
    rows: NDArray[np.int64] | None = None
    taken: list[NDArray[np.bool_]] = field(default_factory=list)
    prefixed: bool = False

    def chosen(self) -> Iterator[Sample]:
        """The samples that are sent, in order; a manifest of any length is read piece by piece."""
        if self.rows is not None:
            places = {int(row): place for place, row in enumerate(self.rows)}
            listed = ((places[row], s) for row, s in enumerate(self.source.manifest.samples()) if row in places)
            yield from (sample for _, sample in sorted(listed, key=lambda pair: pair[0]))
            return
        for piece, taken in zip(in_pieces(self.source.manifest.samples(), _PIECE), self.taken, strict=True):
            yield from (sample for sample, yes in zip(piece, taken, strict=True) if yes)

    def name(self, sample: Sample) -> str:
        """The name of a sample in other tools; its source comes first if two sources use one id."""
        name = portable(sample.sample_id)
        return f"{sample.source}/{name}" if self.prefixed else name


def choose(source: LabelSource, selection: Selection, *, in_one_folder: bool = False) -> Choice:
    """Choose the samples that an export sends.

    in_one_folder: names lose their folders. Raises ValueError for a condition that cannot be read, ids of which none is
    known, trust that nobody knows, if no sample is left, and for names that meet or are too long.
    """
    ids = None if selection.ids is None else read_ids(selection.ids)
    places = None if ids is None else {name: place for place, name in enumerate(ids.names)}
    condition = None if selection.keep_if is None else parse_condition(selection.keep_if, texts=ABOUT)
    if selection.worst is not None and not source.maps:
        raise ValueError(f"nobody knows the trust of the labels in {source.path}: --worst is for labels of runs")
    choice = Choice(source)
    known: set[str] = set()
    order: list[tuple[float, str, int]] = []  # what comes first, sample ids, rows of the manifest
    for number, piece in enumerate(in_pieces(source.manifest.samples(), _PIECE)):
        asked = _asked(choice, piece, ids, known)
        passing = asked if condition is None else asked & _passing(choice, source, piece, condition, asked)
        choice.taken.append(passing)
        choice.samples += len(piece)
        keys = _keys(selection, source, piece, places)
        rows = range(number * _PIECE, number * _PIECE + len(piece))
        order += [
            (key, sample.sample_id, row)
            for key, sample, row, sent in zip(keys, piece, rows, passing, strict=True)
            if sent and key is not None
        ]
        if selection.worst is not None:
            order = heapq.nsmallest(selection.worst, order)
    for sample_id, why in source.unlabelled():
        choice.samples += 1
        known.add(sample_id)
        if ids is None or sample_id in ids:
            choice.left_out.append((sample_id, QUARANTINED, why))
        else:
            choice.aside["--ids"] += 1
    choice.samples += source.left
    if ids is None:
        choice.waiting = source.left
    else:
        choice.aside["--ids"] += source.left
        choice.note = ids.unknown(known, where=f"in {source.path}")
    choice.count = sum(int(taken.sum()) for taken in choice.taken)
    if selection.worst is not None or ids is not None:
        choice.aside["--worst"] += choice.count - len(order)
        choice.rows, choice.count = np.array([row for _, _, row in sorted(order)], np.int64), len(order)
    if not choice.count:
        raise ValueError(f"{source.path}: {_nothing(choice)}")
    _name(choice, in_one_folder=in_one_folder)
    return choice


def _asked(choice: Choice, piece: Sequence[Sample], ids: Ids | None, known: set[str]) -> NDArray[np.bool_]:
    """The samples of a piece that are asked for by their ids and have something to send; the others are counted."""
    asked = np.zeros(len(piece), bool)
    for place, sample in enumerate(piece):
        if ids is not None:
            known.add(sample.sample_id)
            if sample.sample_id not in ids:
                choice.aside["--ids"] += 1
                continue
        if sample.label is None:
            choice.left_out.append((sample.sample_id, NO_LABEL, "the manifest lists none"))
        elif not sample.readable:
            choice.left_out.append((sample.sample_id, UNREADABLE, "it could not be read when it was scanned"))
        else:
            asked[place] = True
    return asked


_NUMBERS = {f.name: f.type for schema in (IMAGES_SCHEMA, REVIEW_SCHEMA) for f in schema if f.name != "sample_id"}


def _passing(
    choice: Choice, source: LabelSource, piece: Sequence[Sample], condition: pc.Expression, asked: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """The samples of a piece that meet a condition; those that do not are counted, as far as they were asked for."""
    passing = np.zeros(len(piece), bool)
    unknown = np.zeros(len(piece), bool)
    for run in {sample.run for sample in piece}:
        places = [place for place, sample in enumerate(piece) if sample.run == run]
        if run is None:
            columns = {name: pa.nulls(len(places), kind) for name, kind in _NUMBERS.items()}
        else:
            maps = source.maps[run]
            rows = pa.array([maps.rows.get(piece[place].sample_id) for place in places], pa.int64())
            columns = {name: maps.statistics[name].take(rows) for name in _NUMBERS}
        texts = {name: pa.array([getattr(piece[place], name) for place in places], pa.string()) for name in ABOUT}
        table = pa.table({**columns, **texts, "place": pa.array(places)})
        passing[table.filter(condition)["place"].to_numpy()] = True
        unknown[table.filter(condition.is_null())["place"].to_numpy()] = True
    choice.aside["--keep-if"] += int((asked & ~passing & ~unknown).sum())
    choice.aside["--keep-if, because the value is missing"] += int((asked & unknown).sum())
    return passing


def _keys(
    selection: Selection, source: LabelSource, piece: Sequence[Sample], places: Mapping[str, int] | None
) -> list[float | None]:
    """The number by which each sample of a piece is sent, ascending; None for one that no order knows."""
    if selection.worst is None:
        return [None if places is None else places.get(sample.sample_id) for sample in piece]
    keys: list[float | None] = []
    for sample in piece:
        row = None if sample.run is None else source.maps[sample.run].rows.get(sample.sample_id)
        keys.append(None if sample.run is None or row is None else source.maps[sample.run].trusts[row])
    return keys


def _nothing(choice: Choice) -> str:
    """The reasons why no sample is sent."""
    reasons = [f"{counted(n, 'sample')} left out by {option}" for option, n in sorted(choice.aside.items()) if n]
    reasons += [f"{kind}: {n}" for kind, n in sorted(Counter(kind for _, kind, _ in choice.left_out).items())]
    reasons += [f"not labelled yet: {choice.waiting}"] if choice.waiting else []
    return f"no label to send ({'; '.join(reasons) or 'it lists no sample'})"


def _name(choice: Choice, *, in_one_folder: bool) -> None:
    """Settle the names of the samples, and the digest. Raises ValueError for names that no disk takes."""
    digest = hashlib.sha256()
    ids: set[str] = set()
    for sample in choice.chosen():
        about = f"{sample.source}\0{sample.sample_id}\0{choice.source.mark(sample)}\n"
        digest.update(about.encode(errors="surrogateescape"))
        choice.prefixed = choice.prefixed or sample.sample_id in ids
        ids.add(sample.sample_id)
    choice.digest = digest.hexdigest()

    def names() -> Iterator[list[str]]:
        for piece in in_pieces(choice.chosen()):
            yield [flat(choice.name(s)) if in_one_folder else choice.name(s) for s in piece]

    for some in names():
        for name in some:
            longest = max(name.split("/"), key=len)
            if len(longest.encode()) > _LONGEST:
                raise ValueError(
                    f"sample {name!r} makes a name of {len(longest.encode())} bytes: expected at most {_LONGEST};"
                    " rename the image" + (", or leave out --flat" if in_one_folder else "")
                )
    require_distinct(
        lambda: ([folded(name) for name in some] for some in names()),
        lambda name: (
            f"two samples would be called {name!r} on many disks, which tell apart neither the case nor the composition"
            " of letters: rename one, or export them apart with --ids" + (" or without --flat" * in_one_folder)
        ),
    )
