"""`autolabel manifest coarsen`: coarse labels drawn out of the fine labels of a manifest, by one of the hands.

Beside the manifest that is written, a folder of its name holds one PNG a sample, and coarsen.json, which says what was
asked for. The manifest comes last: a call that was killed is simply made again, and draws what is missing.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.ahead import ahead
from autolabel.manifests.documents import BadDocument, read_json
from autolabel.manifests.formats.portable import portable
from autolabel.manifests.hands import HANDS, Labels, coarsen
from autolabel.manifests.images import encode_label, read_label
from autolabel.manifests.label_space import IGNORE, LabelSpace
from autolabel.manifests.locations import location
from autolabel.manifests.machine import cores
from autolabel.manifests.run.place import require_outside_runs
from autolabel.manifests.samples import Sample, common_root, load_manifest, writing_manifest
from autolabel.manifests.schemas import EXACT
from autolabel.manifests.wording import Progress, Shown, Table, counted, listed, number, percent

FORMAT = "autolabel coarsen 1"
RECORD = "coarsen.json"
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Coarsened(Shown):
    """The account of a hand: pixels by true class and drawn class, (C, C + 1) int64; the last column is unnamed."""

    out: Path
    hand: str
    seed: int
    samples: int
    left_aside: int
    classes: tuple[str, ...]
    pixels: Counts
    repeated: bool = False

    @property
    def named(self) -> float:
        """The share of the pixels with a true class that the polygons name."""
        return _share(self.pixels[:, :-1].sum(), self.pixels.sum())

    @property
    def right(self) -> float:
        """The share of the named pixels with a true class whose class is the true one."""
        return _share(np.trace(self.pixels), self.pixels[:, :-1].sum())

    def lines(self) -> list[str]:
        """The account of the polygons: how much they name, and how much of it is right."""
        aside = f"; {counted(self.left_aside, 'sample')} without a fine label left out" if self.left_aside else ""
        return [
            *([f"{self.out} was complete before: nothing to do"] if self.repeated else []),
            f"{counted(self.samples, 'image')} drawn by hand {self.hand!r}, seed {self.seed}{aside}",
            f"named {percent(self.named)} % of the pixels with a class; of these {percent(self.right, 2)} % are right",
            f"wrote {self.out}: fine labels, and coarse ones in {self.out.with_suffix('')}",
        ]

    def tables(self) -> list[Table]:
        """One row for each class."""
        rows = []
        for train_id, name in enumerate(self.classes):
            true, drawn = self.pixels[train_id], self.pixels[:, train_id]
            shares = (_share(true[:-1].sum(), true.sum()), _share(drawn[train_id], drawn.sum()))
            rows.append([name, number(int(true.sum())), *(percent(share) for share in shares)])
        return [Table("polygons", ["class", "true pixels", "named, %", "right inside, %"], rows)]


def _share(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else float("nan")


def coarsen_manifest(
    fine: str | Path, out: Path, *, hand: str, seed: int = 0, progress: Progress | None = None
) -> Coarsened:
    """Draw a coarse label of every sample that has a fine one; write the manifest `out`, and the folder beside it.

    The samples keep their fine labels. What a sample's coarse label looks like depends on hand, seed, the sample's id
    and its fine label alone. Raises ValueError for another hand, a manifest without fine labels, and a place that holds
    something else or was asked for differently; BadTable, BadImage.
    """
    if hand not in HANDS:
        raise ValueError(f"--hand {hand}: expected {listed(HANDS)}")
    folder = _folder_of(out)
    whole = load_manifest(fine)
    samples = tuple(s for s in whole.labelled if s.source in EXACT and s.label_index is None)
    if not samples:
        raise ValueError(f"{fine} has no fine label to draw polygons out of: scan a folder with --labels")
    request = {"fine": storage.sha256(location(fine)), "hand": hand, "seed": seed}
    repeated = _claim(out, folder, request)
    work = _Drawing(folder, whole.label_space, hand, seed)
    storage.remove_leftovers(folder, recursive=True)
    pixels = np.zeros((len(whole.label_space), len(whole.label_space) + 1), np.int64)
    with ThreadPoolExecutor(cores()) as pool:
        for done, counts in enumerate(ahead(pool, work.draw, samples, 2 * cores()), 1):
            pixels += counts
            if progress:
                progress(done, len(samples))
    if not repeated:
        _write(out, work, whole.image_root, samples, request)
    aside = len(whole.samples) - len(samples)
    return Coarsened(out, hand, seed, len(samples), aside, whole.label_space.names, pixels, repeated)


def _folder_of(out: Path) -> Path:
    """The folder of the PNGs. Raises ValueError unless the manifest's name ends in .parquet."""
    if out.suffix != ".parquet":
        raise ValueError(f"-o {out}: expected a name that ends in .parquet; labels go into a folder beside it")
    require_outside_runs(out.absolute().parent)
    return out.with_suffix("").absolute()


def _claim(out: Path, folder: Path, request: dict[str, Any]) -> bool:
    """Make a folder this request's; return whether its manifest is there. Raises ValueError if it holds another's."""
    record = folder / RECORD
    if not storage.exists(record):
        held = [out] if storage.exists(out) else [folder] if storage.exists(folder) else storage.list(folder)
        if held:
            raise ValueError(f"{held[0]} is there already, and not by this command: choose another name")
        storage.write_json(record, {"format": FORMAT, **request})
        return False
    try:
        before = read_json(record, dict[str, Any])
    except BadDocument as error:
        raise ValueError(f"{error}; choose another name") from error
    if before.pop("format", None) != FORMAT:
        raise ValueError(f"{record} is none of {FORMAT!r}: choose another name")
    for key, value in request.items():
        if before.get(key) != value:
            what = "another manifest" if key == "fine" else f"{key} {before.get(key)}, not {value}"
            raise ValueError(f"{folder} holds polygons that were asked for differently ({what}): choose another name")
    return storage.exists(out)


@dataclass(frozen=True)
class _Drawing:
    folder: Path
    space: LabelSpace
    hand: str
    seed: int

    def path(self, sample: Sample) -> Path:
        """The coarse label of a sample; a folder that is called like a label gets another name."""
        *folders, name = portable(sample.sample_id).split("/")
        parts = [f"{folder}_" if folder.endswith(".png") else folder for folder in folders]
        return storage.under(self.folder, "/".join([*parts, f"{name}.png"]))

    def draw(self, sample: Sample) -> Counts:
        """Draw the coarse label of a sample unless it is there; count its pixels by true and drawn class."""
        assert sample.label is not None
        size, ids = (sample.height, sample.width), sample.label_ids
        fine, path = read_label(sample.label, self.space, ids=ids, size=size), self.path(sample)
        if storage.exists(path):
            coarse = read_label(path, self.space, ids=ids, size=size)
        else:
            coarse = coarsen(fine, self.hand, seed=f"{self.seed} {sample.sample_id}")
            storage.write(path, _encode(coarse, self.space, ids), durable=False)
        return _count(fine, coarse, len(self.space))


def _encode(label: Labels, space: LabelSpace, ids: str) -> bytes:
    """A PNG that holds what the fine label holds: train ids, source ids, or the colours of the classes.

    Raises ValueError for a label space that has no id or colour for pixels of no class.
    """
    if ids == "train":
        return encode_label(label)
    if ids == "color":
        if (0, 0, 0) in (c.colour for c in space.classes):
            raise ValueError(f"a class of label space {space.name!r} is black: no colour is left for unnamed pixels")
        return encode_label(label, palette=space.palette)
    table = np.full(256, 0 if 0 in space.ignored_ids else IGNORE, np.uint8)
    if space.train_ids[table[IGNORE]] != IGNORE:
        raise ValueError(f"label space {space.name!r} has no source id for unnamed pixels: ignore id 0 in it")
    table[: len(space)] = [c.source_ids[0] for c in space.classes]
    return encode_label(table[label])


def _count(fine: Labels, coarse: Labels, classes: int) -> Counts:
    known = fine < classes
    pairs = fine[known].astype(np.int64) * (classes + 1) + np.minimum(coarse[known], classes)
    return np.bincount(pairs, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def _write(out: Path, work: _Drawing, image_root: Path, samples: tuple[Sample, ...], request: dict[str, Any]) -> None:
    rows = [replace(sample, coarse_label=work.path(sample), weight=1.0) for sample in samples]
    labels = (path for row in rows for path in (row.label, row.coarse_label) if path is not None)
    root = common_root(labels, fallback=image_root)
    with writing_manifest(
        out, work.space, image_root=image_root, label_root=root, provenance={"coarsened": request}
    ) as write:
        write(rows)
