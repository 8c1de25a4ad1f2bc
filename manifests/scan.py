"""Find the samples in a folder, check every file, and give an account.

Every image's header is read. Every label is decoded once, so that a wrong size or an unknown id is reported now and not
in the middle of a training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from autolabel.manifests import storage
from autolabel.manifests.images import IMAGE_SUFFIXES, BadImage, read_label, read_size
from autolabel.manifests.label_space import CITYSCAPES, LabelSpace
from autolabel.manifests.layouts import (
    BadLayout,
    Listing,
    files_under,
    is_cityscapes,
    is_mapillary,
    list_cityscapes,
    list_folder,
    list_mapillary,
)
from autolabel.manifests.machine import cores
from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.samples import Manifest, Sample
from autolabel.manifests.wording import Progress, Shown

LAYOUTS = ("auto", "cityscapes", "mapillary", "folder")
_DEPTH = 2  # levels of folders, below the one that is scanned, in which data sets are looked for
_TRIED = (
    "Cityscapes (leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png), Mapillary Vistas (config.json and"
    f" training/images/NAME.jpg), images/ beside labels/ or coarse/, any folder of {', '.join(IMAGE_SUFFIXES)}"
)


@dataclass(frozen=True)
class Account(Shown):
    """The result of a scan in numbers.

    sources: samples by the source of their best label. coarse: samples with a coarse label. sizes: images by (height,
    width). unreadable: images whose header cannot be read, as "path: reason". without_image: labels whose image is
    missing. skipped_runs: run folders inside, whose files were left out. assumed_space: True if nobody named a label
    space, and none was needed.
    """

    listing: Listing
    sources: Counter[str]
    coarse: int
    sizes: Counter[tuple[int, int]]
    unreadable: list[str]
    assumed_space: bool = False

    @property
    def images(self) -> int:
        """Images in the manifest, the unreadable ones among them."""
        return len(self.listing.samples)

    @property
    def without_image(self) -> list[Path]:
        """Labels whose image is missing; they are in no sample."""
        return list(self.listing.without_image)

    @property
    def skipped_runs(self) -> list[Path]:
        """Run folders inside the folder; their files are in no sample."""
        return list(self.listing.skipped_runs)

    def lines(self) -> list[str]:
        """The account for a terminal."""
        space, sources = self.listing.label_space, self.sources
        sizes = ", ".join(f"{w} x {h} ({n})" for (h, w), n in self.sizes.most_common(4))
        more = f" and {len(self.sizes) - 4} other sizes" if len(self.sizes) > 4 else ""
        lines = [
            f"{self.images} images, {len(space)} classes of label space {space.name!r}",
            f"  layout              {self.listing.layout} in {self.listing.root}",
            f"  with fine labels    {sources['fine']}",
            f"  with coarse labels  {self.coarse} ({sources['coarse']} of them have no fine label)",
            f"  without a label     {sources['none']}",
            f"  sizes               {sizes or 'unknown'}{more}",
            f"  unreadable images   {_examples(self.unreadable)}",
            f"  labels without their image  {_examples(self.without_image)}",
        ]
        if self.skipped_runs:
            lines.append(f"  run folders skipped  {_examples(self.skipped_runs)}")
        if self.assumed_space:
            lines.append(f"  No label space was named, so {space.name!r} is written down; --label-space names another.")
        return lines


def _examples(items: Sequence[object]) -> str:
    if not items:
        return "none"
    return f"{len(items)}: {items[0]}" + (f" and {len(items) - 1} more" if len(items) > 1 else "")


def scan(
    root: str | Path,
    *,
    layout: str = "auto",
    splits: Sequence[str] = (),
    labels: Path | None = None,
    coarse: Path | None = None,
    label_space: LabelSpace | None = None,
    label_ids: str = "train",
    progress: Progress | None = None,
) -> tuple[Manifest, Account]:
    """Find and check the images and labels in a folder.

    layout: "cityscapes", "mapillary", "folder" (any folder of images), or "auto", which tries them. splits: some splits
    of a data set, all by default. labels, coarse: for layout "folder", the folders of label PNGs with the images'
    relative paths and stems. label_space: the classes; data sets bring their own, and a folder of images without labels
    gets those of Cityscapes if none is given. label_ids: "train" or "source", the ids in the label PNGs of a folder.
    progress hears of checked samples. Raises BadLayout.
    """
    root = Path(root)
    if layout not in LAYOUTS:
        raise BadLayout(f"unknown layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    for folder in (root, labels, coarse):
        if folder is not None and not storage.is_folder(folder):
            raise BadLayout(f"{folder} is not a folder" + ("" if folder.exists() else " that exists"))
    guessed, skipped_runs = layout == "auto", list[Path]()
    if guessed and (labels or coarse):
        layout = "folder"
    elif guessed:
        layout, root = _guess(root, skipped_runs)
        if layout == "pairs":
            layout, parent, root = "folder", root, root / "images"
            beside = parent / "labels", parent / "coarse"
            labels, coarse = (path if storage.is_folder(path) else None for path in beside)
    if layout == "folder":
        if splits:
            raise BadLayout(f"{root} is a folder of images, which has no splits: leave out the split {splits[0]!r}")
        if label_space is None and (labels or coarse):
            raise BadLayout(f"{labels or coarse} holds labels: name their classes with --label-space")
        listing = list_folder(root, label_space or CITYSCAPES, labels=labels, coarse=coarse, label_ids=label_ids)
    elif labels or coarse:
        raise BadLayout(f"layout {layout} has label folders of its own: leave out {labels or coarse}")
    else:
        listing = list_cityscapes(root, splits) if layout == "cityscapes" else list_mapillary(root, splits)
    space = listing.label_space
    if label_space is not None and label_space != space:
        raise BadLayout(
            f"{root} holds a data set in the layout of {layout}, whose classes are those of label space {space.name!r},"
            f" not {label_space.name!r}: leave out the label space, or scan its images alone with --layout folder"
        )
    listing = replace(listing, skipped_runs=listing.skipped_runs or tuple(skipped_runs))
    assumed = layout == "folder" and label_space is None
    return _checked(listing, assumed_space=assumed, guessed=guessed, progress=progress)


# --- guessing the layout ----------------------------------------------------------------------------------------------


def _guess(root: Path, skipped_runs: list[Path]) -> tuple[str, Path]:
    """The layout, "pairs" for images/ beside labels/, and the folder of the data set. Raises BadLayout."""
    if RunFolder(root).exists():
        raise BadLayout(f"{root} is a run: its automatic labels are listed in {RunFolder(root).manifest_path}")
    data_sets = list(_data_sets(root, skipped_runs, depth=_DEPTH))
    if len(data_sets) > 1:
        named = ", ".join(f"{folder} ({layout})" for layout, folder in data_sets)
        raise BadLayout(f"{root} holds {len(data_sets)} data sets: {named}; scan one of them")
    inside = [folder for _, folder in data_sets]
    loose = None if inside == [root] else next(_images(root, skip=inside), None)
    if data_sets and loose:
        raise BadLayout(
            f"{root} holds a data set, {inside[0]} ({data_sets[0][0]}), and other images, such as {loose}:"
            " scan a folder that holds one of them"
        )
    if not data_sets and not loose:
        raise BadLayout(f"no images under {root}; tried {_TRIED}")
    return data_sets[0] if data_sets else ("folder", root)


def _data_sets(folder: Path, skipped_runs: list[Path], *, depth: int) -> Iterator[tuple[str, Path]]:
    """The data sets in a folder, itself included, with their layouts. Adds the runs it meets to `skipped_runs`."""
    layouts = [name for name, fits in (("cityscapes", is_cityscapes), ("mapillary", is_mapillary)) if fits(folder)]
    images, *labels = (storage.is_folder(folder / name) for name in ("images", "labels", "coarse"))
    if layouts or (images and any(labels)):
        yield from ((name, folder) for name in layouts or ["pairs"])
    elif depth:
        for child in storage.list(folder):
            if RunFolder(child).exists():
                skipped_runs.append(child)
            elif storage.is_folder(child) and not child.name.startswith("."):
                yield from _data_sets(child, skipped_runs, depth=depth - 1)


def _images(root: Path, *, skip: Sequence[Path]) -> Iterator[Path]:
    return (path for path in files_under(root, skip=skip) if path.suffix.lower() in IMAGE_SUFFIXES)


# --- checking the files -----------------------------------------------------------------------------------------------


def _checked(
    listing: Listing, *, assumed_space: bool, guessed: bool, progress: Progress | None
) -> tuple[Manifest, Account]:
    """Open every file, and fill in the sizes. Raises BadLayout for labels that cannot be used."""
    space = listing.label_space
    samples: list[Sample] = []
    unreadable: list[str] = []
    broken_labels: list[str] = []
    with ThreadPoolExecutor(cores()) as pool:
        for sample, reason, broken in pool.map(lambda s: _check(s, space), listing.samples):
            samples.append(sample)
            unreadable += [reason] if reason else []
            broken_labels += broken
            if progress:
                progress(len(samples), len(listing.samples))
    if broken_labels:
        more = f" (and {len(broken_labels) - 1} more labels)" if len(broken_labels) > 1 else ""
        raise BadLayout(f"{broken_labels[0]}{more}: repair or remove it, or name the right label space and ids")
    if guessed and len(unreadable) == len(samples):
        raise BadLayout(
            f"none of the {len(samples)} images under {listing.root} can be read; the first is {unreadable[0]}"
        )
    samples.sort(key=lambda s: (s.split, s.sample_id))
    provenance = {"layout": listing.layout, "root": str(listing.root)}
    account = Account(
        listing,
        sources=Counter(s.source for s in samples),
        coarse=sum(s.coarse_label is not None for s in samples),
        sizes=Counter((s.height, s.width) for s in samples if s.readable),
        unreadable=unreadable,
        assumed_space=assumed_space,
    )
    return Manifest.of(space, tuple(samples), provenance=provenance), account


def _check(sample: Sample, space: LabelSpace) -> tuple[Sample, str | None, list[str]]:
    """The sample with its size, the reason why its image cannot be read, and the faults of its labels."""
    try:
        height, width = read_size(sample.image)
    except BadImage as error:
        return sample, f"{sample.image}: {error}", []  # it stays 0 x 0, and `generate` quarantines it with the reason
    faults: list[str] = []
    for path in dict.fromkeys(path for path in (sample.label, sample.coarse_label) if path is not None):
        try:
            read_label(path, space, ids=sample.label_ids, size=(height, width))
        except BadImage as error:
            faults.append(str(error))
    return replace(sample, height=height, width=width), None, faults
