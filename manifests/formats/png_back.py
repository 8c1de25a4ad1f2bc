"""Masks as PNGs on their way back: a folder or a zip of train ids, source ids, or colours in RGB or in a palette.

The files say themselves which of these they hold. Grey values may be train ids or source ids, and a palette may be no
more than decoration: every meaning under which all masks are whole is a candidate. Two candidates that would give
different labels are told apart by the labels that went out, which most of an edited mask still shows, or refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial as bound
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.ahead import ahead
from autolabel.manifests.colours import UnknownColours, colour_table, expected_colours
from autolabel.manifests.formats.archive import Files, opened, stem
from autolabel.manifests.formats.exchange import BadReturn, Returned
from autolabel.manifests.images import (
    LABEL_SUFFIXES,
    BadImage,
    decode_label,
    id_counts,
    is_coloured,
    stored_ids,
)
from autolabel.manifests.label_space import IGNORE, Colour, LabelSpace
from autolabel.manifests.machine import cores
from autolabel.manifests.reading import read_file
from autolabel.manifests.run.shards import Label
from autolabel.manifests.schemas import LABEL_IDS
from autolabel.manifests.wording import counted, listed, number

# The label that went out under a name, (H, W) uint8 train ids; None if it is gone. Raises KeyError for another name.
Like = Callable[[str], Label | None]
_LABELS, _BESIDE = "labels", ("images", "confidence")  # folders of an export
_UNKNOWN = -1  # in a table of train ids
_COMPARED = 8  # masks that are compared with what went out
_CLEARLY = 2  # times as many pixels agree as under any other meaning
_KEPT = 4096  # unknown colours that are counted one by one
Table = NDArray[np.int16]  # (256,): the train id of every stored byte, _UNKNOWN for none


@dataclass(frozen=True)
class MaskFile:
    """One mask: its name without suffix, where it lies, and a function that reads its bytes and may raise BadImage."""

    name: str
    where: str
    read: Callable[[], bytes]


def read(
    path: Path, space: LabelSpace, *, like: Like | None = None, label_ids: str | None = None, suffix: str = ""
) -> Iterator[Returned]:
    """Yield the masks of a folder, a zip, or one PNG file; all are looked at before the first one is yielded.

    like: gives what went out, to tell train ids from source ids. label_ids: "train", "source" or "color", if the user
    says which. suffix: the end of the masks' names that is no part of them; others are left aside. Raises BadReturn,
    with the values that no class has, for masks that are no labels of `space`, and for
    those with several meanings.
    """
    if label_ids not in (None, *LABEL_IDS):
        raise ValueError(f"--label-ids {label_ids}: expected {', '.join(LABEL_IDS)}")
    if path.suffix.lower() in LABEL_SUFFIXES and storage.exists(path):
        file = MaskFile(stem(path.name).removesuffix(suffix), str(path), lambda: read_file(path))
        yield from _read([file], path, space, like=like, label_ids=label_ids)
        return
    with opened(path) as files:
        masks = [
            MaskFile(stem(name).removesuffix(suffix), files.shown(name), bound(files.read, name))
            for name in _mask_names(files)
            if stem(name).endswith(suffix)
        ]
        if not masks:
            ends = f" that end in {suffix}.png" if suffix else ""
            raise BadReturn(f"no PNGs{ends} under {path}: expected masks whose names are those of the images")
        yield from _read(masks, path, space, like=like, label_ids=label_ids)


def _read(
    files: Sequence[MaskFile], path: Path, space: LabelSpace, *, like: Like | None, label_ids: str | None
) -> Iterator[Returned]:
    with ThreadPoolExecutor(cores()) as pool:
        meanings = _Meanings(space, path, label_ids)
        for file, look in zip(files, ahead(pool, lambda f: _look(f, space), files, 2 * cores()), strict=True):
            meanings.add(file, look)
        kinds = meanings.decide(files, like)
        strange = _Strange(path, len(files))
        for one in ahead(pool, lambda f: _returned(f, space, kinds), files, 2 * cores()):
            if isinstance(one, Returned):
                yield one
            else:
                strange.add(*one)
        strange.require_none(f"colours that label space {space.name!r} does not have", expected_colours(space))


def _mask_names(files: Files) -> list[str]:
    """The PNGs of a folder or zip; of one that was exported, the labels alone."""
    names = [name for name in files.names if PurePosixPath(name).suffix.lower() in LABEL_SUFFIXES]
    labels = [name for name in names if f"/{_LABELS}/" in f"/{name}"]
    ways = {f"/{name}".partition(f"/{_LABELS}/")[0] for name in labels}
    others = [name for name in names if f"/{_LABELS}/" not in f"/{name}"]
    if len(ways) != 1:
        return names
    beside = tuple(f"{min(ways)}/{folder}/" for folder in _BESIDE)
    return labels if all(f"/{name}".startswith(beside) for name in others) else names


def decode_edited(data: bytes, space: LabelSpace) -> Label:
    """The label (H, W) uint8 of a PNG of train ids that a program may have saved in colours. Raises BadImage."""
    if is_coloured(data):
        return decode_label(data, space, ids="color")
    stored, palette = stored_ids(data)
    tables = _tables(palette, space)
    used = np.flatnonzero(id_counts(stored))
    whole = [kind for kind in ("train", "color") if kind in tables and (tables[kind][used] != _UNKNOWN).all()]
    return tables[whole[0]].astype(np.uint8)[stored] if whole else decode_label(data, space)


# --- one mask ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _MaskLook:
    """The content of a grey or palette mask: pixels by stored byte (256,), and the tables that may be meant."""

    palette: bool
    counts: NDArray[np.int64]
    tables: Mapping[str, Table]
    colours: tuple[Colour, ...] = ()


def _look(file: MaskFile, space: LabelSpace) -> _MaskLook | None:
    """None for a mask in RGB, which can hold nothing but colours. Raises BadReturn."""
    try:
        data = file.read()
        if is_coloured(data):
            colour_table(space)
            return None
        stored, palette = stored_ids(data)
    except BadImage as error:
        raise BadReturn(f"{file.where}: {error}") from error
    return _MaskLook(palette is not None, id_counts(stored), _tables(palette, space), palette or ())


def _tables(palette: tuple[Colour, ...] | None, space: LabelSpace) -> dict[str, Table]:
    """The train id of every stored byte under each meaning that a grey or palette mask can have."""
    train = np.full(256, _UNKNOWN, np.int16)
    train[: len(space)] = range(len(space))
    source = np.full(256, _UNKNOWN, np.int16)
    known = sorted(space.known_source_ids)
    source[known] = np.frombuffer(space.train_ids, np.uint8)[known]
    train[IGNORE] = IGNORE
    tables = {"train": train, "source": source}
    if palette is not None:
        try:
            colours, train_ids = colour_table(space)
        except BadImage:  # two classes look the same
            return tables
        owners = dict(zip(colours.tolist(), train_ids.tolist(), strict=True))
        color = [owners.get(red << 16 | green << 8 | blue, _UNKNOWN) for red, green, blue in palette]
        tables["color"] = np.array([*color, *[_UNKNOWN] * (256 - len(color))], np.int16)
    return tables


def _returned(
    file: MaskFile, space: LabelSpace, kinds: Mapping[bool, str]
) -> Returned | tuple[MaskFile, UnknownColours]:
    """The label of a mask, or the colours that are no class's. Raises BadReturn."""
    try:
        data = file.read()
        if is_coloured(data):
            return Returned(file.name, decode_label(data, space, ids="color"))
        stored, palette = stored_ids(data)
        table = _tables(palette, space)[kinds[palette is not None]]
        return Returned(file.name, table.astype(np.uint8)[stored])
    except UnknownColours as error:
        return file, error
    except BadImage as error:
        raise BadReturn(f"{file.where}: {error}") from error


# --- all masks --------------------------------------------------------------------------------------------------------


@dataclass
class _Strange:
    """Counts pixels whose values mean nothing, in memory that does not grow with the masks."""

    path: Path
    masks: int
    values: Counter[object] = field(default_factory=Counter)
    total: int = 0
    files: int = 0
    first: str = ""

    def add(self, file: MaskFile, error: UnknownColours) -> None:
        self.count(file, error.pixels, error.total)

    def count(self, file: MaskFile, pixels: Mapping[Colour, int] | Mapping[int, int], total: int) -> None:
        self.first = self.first or file.where
        self.files, self.total = self.files + 1, self.total + total
        self.values.update(pixels)
        if len(self.values) > 2 * _KEPT:
            self.values = Counter(dict(self.values.most_common(_KEPT)))

    @property
    def extent(self) -> tuple[int, int]:
        """Masks and pixels that are at fault."""
        return self.files, self.total

    def require_none(self, what: str, expected: str) -> None:
        """Raise BadReturn with the three most frequent values, if there are any."""
        if not self.files:
            return
        frequent = self.values.most_common(3)
        named = listed([f"{value} ({counted(pixels, 'pixel')})" for value, pixels in frequent])
        raise BadReturn(
            f"{self.path}: {self.files} of {counted(self.masks, 'mask')} have {counted(self.total, 'pixel')} with"
            f" {what}, the most frequent {named}; the first is {self.first}: expected {expected}"
        )


class _Meanings:
    """Narrows down what grey values and what palettes mean; both are asked for themselves."""

    def __init__(self, space: LabelSpace, path: Path, label_ids: str | None) -> None:
        self._space, self._path, self._named = space, path, label_ids
        self._masks = Counter[bool]()
        self._strange: dict[tuple[bool, str], _Strange] = {}
        self._differ: set[tuple[bool, str, str]] = set()

    def add(self, file: MaskFile, look: _MaskLook | None) -> None:
        """Count a mask. Raises BadReturn for one in RGB where the user has said that ids are meant."""
        if look is None:
            if self._named in ("train", "source"):
                raise BadReturn(f"{file.where} is a picture in RGB: expected {self._named} ids, as --label-ids says")
            return
        self._masks[look.palette] += 1
        used = np.flatnonzero(look.counts)
        for kind, table in look.tables.items():
            strange = self._strange.setdefault((look.palette, kind), _Strange(self._path, 0))
            unknown = used[table[used] == _UNKNOWN]
            if len(unknown):
                pixels = {int(v): int(look.counts[v]) for v in unknown}
                if kind == "color":
                    shown = {look.colours[v] if v < len(look.colours) else v: n for v, n in pixels.items()}
                    strange.count(file, shown, sum(pixels.values()))  # type: ignore[arg-type]
                else:
                    strange.count(file, pixels, sum(pixels.values()))
            for other, its in look.tables.items():
                if kind < other and (table[used] != its[used]).any():
                    self._differ.add((look.palette, kind, other))

    def decide(self, files: Sequence[MaskFile], like: Like | None) -> dict[bool, str]:
        """The meaning of grey values (False) and of palettes (True), as far as there are any. Raises BadReturn."""
        return {palette: self._decide(files, like, palette=palette) for palette in sorted(self._masks)}

    def _decide(self, files: Sequence[MaskFile], like: Like | None, *, palette: bool) -> str:
        kinds = [kind for of, kind in self._strange if of == palette and self._named in (None, kind)]
        what = "palettes" if palette else "grey values"
        if not kinds:
            raise BadReturn(f"{self._path}: its masks have {what}: expected {self._named}, as --label-ids says")
        whole = [kind for kind in kinds if not self._strange[palette, kind].files]
        if not whole:
            self._refuse(min(kinds, key=lambda kind: self._strange[palette, kind].extent), palette=palette)
        candidates = [whole[0]]
        for kind in whole[1:]:
            if all((palette, *sorted((kind, other))) in self._differ for other in candidates):
                candidates.append(kind)
        if len(candidates) == 1:
            return candidates[0]
        return self._likeliest(candidates, files, like, palette=palette)

    def _refuse(self, kind: str, *, palette: bool) -> None:
        strange, space = self._strange[palette, kind], self._space
        strange.masks = self._masks[palette]
        if kind == "color":
            strange.require_none(f"colours that label space {space.name!r} does not have", expected_colours(space))
        source = f" or its source ids, in 0..{max(space.known_source_ids - {IGNORE})}" if kind == "source" else ""
        strange.require_none(
            f"ids that label space {space.name!r} does not have",
            f"its train ids 0..{len(space) - 1}{source}, and {IGNORE} for ignored pixels",
        )

    def _likeliest(self, kinds: Sequence[str], files: Iterable[MaskFile], like: Like | None, *, palette: bool) -> str:
        """The meaning under which the masks show most of what went out. Raises BadReturn unless one clearly does."""
        agreeing, compared, known = Counter[str](), 0, False
        for file in files:
            if like is None or compared == _COMPARED:
                break
            try:
                out, data = like(file.name), file.read()
            except KeyError:
                continue
            known = True
            if out is None or is_coloured(data):
                continue
            stored, colours = stored_ids(data)
            if (colours is not None) != palette or stored.shape != out.shape:
                continue
            compared += 1
            for kind in kinds:
                label = _tables(colours, self._space)[kind][stored]
                agreeing[kind] += int(((label == out) & (out != IGNORE)).sum())
        if like is not None and not known:
            return kinds[0]  # these masks belong to no image, which is the greater fault
        best, *others = sorted(kinds, key=lambda kind: -agreeing[kind])
        if agreeing[best] > _CLEARLY * max(agreeing[other] for other in others):
            return best
        shown = listed([f"{kind} ids" if kind != "color" else "colours" for kind in sorted(kinds)])
        more = f" ({number(agreeing[best])} pixels agree with what went out)" if compared else ""
        raise BadReturn(f"{self._path}: its masks may show {shown}{more}: say which with --label-ids")
