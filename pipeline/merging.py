"""Labels that come back, joined with what the run has: image by image, path by path, each read once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa

from autolabel.manifests import storage
from autolabel.manifests.ahead import ahead
from autolabel.manifests.corrected import CHANGES_SCHEMA, MACHINE, NOBODY, PERSON, CorrectedFolder
from autolabel.manifests.formats import png_back
from autolabel.manifests.formats.exchange import Names, Returned, flat
from autolabel.manifests.formats.known import known_format
from autolabel.manifests.images import encode_label
from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.machine import cores
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.labels import LABELS, read_png
from autolabel.manifests.run.shards import Label
from autolabel.manifests.tables import writing_table
from autolabel.manifests.walk import common_end
from autolabel.manifests.wording import Progress, counted, listed
from autolabel.pipeline.before import MachineSays
from autolabel.pipeline.import_request import Terms
from autolabel.pipeline.imported import BY_PEOPLE, Found, changes_of

PNG = "png"
_NAMED = 3  # images that a message names


def items_of(reads: str, path: Path, merging: Merging) -> Iterator[Returned]:
    """The labels of a path, whatever its format. Raises BadReturn, ValueError."""
    run, place = merging.run, path.resolve()
    labels = run.path.resolve() / LABELS
    if reads != PNG:
        return known_format(reads).read(path, run.label_space)
    if place == labels.parent or place.is_relative_to(labels):
        return merging.edited(run.path / LABELS / ("" if place == labels.parent else place.relative_to(labels)))
    terms = merging.terms
    return png_back.read(path, run.label_space, like=merging.like, label_ids=terms.label_ids, suffix=terms.suffix)


@dataclass
class Merging:
    """Joins what comes back with what the run has, image by image; the files of the folder are its memory."""

    run: Run
    folder: CorrectedFolder
    terms: Terms
    progress: Progress | None = None
    touched: dict[str, None] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    damaged: list[str] = field(default_factory=list)
    disagreeing: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.machine = MachineSays(self.run)
        self._names = Names(self.machine.labels)
        self._done = 0

    def like(self, name: str) -> Label | None:
        """The label that went out under a name, None if it is gone. Raises KeyError for a name that no image has."""
        try:
            sample_id = self._names.find(name)
        except ValueError as error:
            raise KeyError(name) from error
        label = self.machine.label(sample_id)
        return read_png(self.folder.label(sample_id)) if label is None and sample_id in self.touched else label

    def edited(self, path: Path) -> Iterator[Returned]:
        """The labels of the run that somebody has written over. Raises ValueError where there is none."""
        machine = self.machine
        names = machine.pngs_below(path)
        if not names:
            raise ValueError(f"{path} holds no label of {self.run.path} as a PNG: export them first")
        some = False
        with ThreadPoolExecutor(cores()) as pool:
            for one in ahead(pool, machine.edited, names, 2 * cores()):
                if isinstance(one, Path):
                    self.damaged.append(one.relative_to(self.run.path).as_posix())
                elif one is not None:
                    some = True
                    yield one
        if not some:
            broken = f", and {counted(len(self.damaged), 'PNG')} cannot be read" if self.damaged else ""
            raise ValueError(f"no label in {path} differs from what the run has written{broken}: nothing to import")

    def add(self, path: Path, items: Iterator[Returned]) -> None:
        """Merge all labels of a path. Raises ValueError, after all were read, if some cannot be used."""
        faults = _Faults(path, self.run, self.machine.labels)
        with ThreadPoolExecutor(cores()) as pool:
            here: dict[str, None] = {}
            for sample_id, pixels in ahead(pool, self._merge, self._resolved(items, faults, here), 2 * cores()):
                if pixels:
                    self.disagreeing[sample_id] = self.disagreeing.get(sample_id, 0) + pixels
                self._done += 1
                if self.progress:
                    self.progress(self._done, max(self._done, len(self.machine.labels)))
        faults.require_none()
        if not here:
            raise ValueError(f"{path} holds no label")
        self.touched |= here

    def _resolved(
        self, items: Iterator[Returned], faults: _Faults, here: dict[str, None]
    ) -> Iterator[tuple[str, Label]]:
        for item in items:
            try:
                sample_id = self._names.find(item.name)
            except ValueError:
                faults.strangers.append(item.name)
                continue
            if sample_id in here:
                raise ValueError(
                    f"{faults.path} holds two labels of image {sample_id!r}: keep one of them; labels of two people go"
                    " into paths of their own"
                )
            here[sample_id] = None
            if faults.fits(sample_id, item.label, self.machine.size(sample_id)):
                yield sample_id, item.label

    def _merge(self, item: tuple[str, Label]) -> tuple[str, int]:
        """Write the label and the origins of one image; return the pixels in which people disagree."""
        sample_id, label = item
        base = self.machine.label(sample_id)
        given = label != IGNORE if self.terms.partial else np.ones(label.shape, np.bool_)
        if sample_id in self.touched:
            merged, origin = (read_png(p) for p in (self.folder.label(sample_id), self.folder.origin(sample_id)))
            merged, origin = merged.copy(), origin.copy()
        elif base is None:
            merged, origin = label.copy(), np.full(label.shape, NOBODY, np.uint8)
        else:
            merged, origin = base.copy(), np.full(label.shape, MACHINE, np.uint8)
        changed = given & (label != (merged if base is None else base))
        disagree = changed & (origin != MACHINE) & (label != merged)
        merged[changed] = label[changed]
        origin[changed] = NOBODY if base is None else PERSON
        storage.write(self.folder.label(sample_id), encode_label(merged))
        storage.write(self.folder.origin(sample_id), encode_label(origin))
        return sample_id, int(np.count_nonzero(disagree))

    def count(self) -> Found:
        """Write the table of changes, and remove the images that do not count; `kept` has the others."""
        left_out = 0
        order = [sample_id for sample_id in self.machine.labels if sample_id in self.touched]
        self.machine.look_up(order)
        with ThreadPoolExecutor(cores()) as pool, writing_table(self.folder.changes, CHANGES_SCHEMA) as add:
            for sample_id, rows in zip(order, ahead(pool, self._changes, order, 2 * cores()), strict=True):
                changed = any(fate in BY_PEOPLE for fate in rows["fate"].to_pylist())
                if not changed and rows["from_id"].null_count == 0 and (self.terms.only_changed or self.terms.partial):
                    left_out += 1
                    storage.remove(self.folder.label(sample_id))
                    storage.remove(self.folder.origin(sample_id))
                    continue
                self.kept.add(sample_id)
                add(rows)
        if not self.kept:
            raise ValueError(
                f"nothing was changed in the {counted(left_out, 'image')} that came back: there is nothing to import"
            )
        if self.disagreeing:
            most_first = sorted(self.disagreeing, key=lambda sample_id: (-self.disagreeing[sample_id], sample_id))
            storage.write(self.folder.disagreements, "".join(f"{name}\n" for name in most_first).encode())
        edges = None if self.machine.edges is None else list(self.machine.edges)
        differing = sum(self.disagreeing.values())
        return Found(self.terms.partial, len(self.disagreeing), differing, self.damaged, left_out, edges)

    def _changes(self, sample_id: str) -> pa.Table:
        label, origin = read_png(self.folder.label(sample_id)), read_png(self.folder.origin(sample_id))
        return changes_of(sample_id, self.machine.before(sample_id), label, origin, self.run.label_space)


@dataclass
class _Faults:
    """Labels of one path that cannot be used: all are counted before the first one ends the call."""

    path: Path
    run: Run
    images: Collection[str]
    strangers: list[str] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)

    def fits(self, sample_id: str, label: Label, size: tuple[int, int]) -> bool:
        """True for a label of this size (height, width), and of train ids. Raises ValueError for other ids."""
        unknown = sorted(set(np.unique(label).tolist()) - {*range(len(self.run.label_space)), IGNORE})
        if unknown:
            raise ValueError(f"{self.path}: the label of {sample_id!r} has ids {unknown}, which no class has")
        if label.shape == size:
            return True
        self.sizes.append(f"{sample_id!r} is {label.shape[1]} x {label.shape[0]}, its image {size[1]} x {size[0]}")
        return False

    def _advice(self) -> str:
        images = {PurePosixPath(name).name: None for sample_id in self.images for name in (sample_id, flat(sample_id))}
        end = common_end(images, [PurePosixPath(name).name for name in self.strangers])
        return f"try --suffix {end}" if end else "name the run that they were exported from, or remove them"

    def require_none(self) -> None:
        """Raise ValueError, naming the first, if there are any."""
        if self.strangers:
            some = listed([repr(name) for name in self.strangers[:_NAMED]])
            more = f" and {len(self.strangers) - _NAMED} more" if len(self.strangers) > _NAMED else ""
            raise ValueError(
                f"{self.path}: {counted(len(self.strangers), 'label')} whose names mean none, or several, of the images"
                f" that {self.run.path} has labelled: {some}{more}; {self._advice()}"
            )
        if self.sizes:
            more = f" (and {len(self.sizes) - 1} more)" if self.sizes[1:] else ""
            raise ValueError(
                f"{self.path}: labels of another size than their image: {self.sizes[0]} pixels{more}; export them from"
                " the tool at full size"
            )
