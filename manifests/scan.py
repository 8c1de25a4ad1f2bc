"""Find the samples in a folder, check every file, and give an account.

Every image's header is read. Every label is decoded once, so that a wrong size or an unknown id is reported now and not
in the middle of a training; the pixels of at most 64 photographs are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from autolabel.manifests import storage
from autolabel.manifests.account import Account
from autolabel.manifests.checking import checked
from autolabel.manifests.images import IMAGE_SUFFIXES
from autolabel.manifests.label_space import CITYSCAPES, LabelSpace
from autolabel.manifests.layouts import (
    is_cityscapes,
    is_mapillary,
    list_cityscapes,
    list_folder,
    list_mapillary,
    list_pairs,
)
from autolabel.manifests.locations import location
from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.samples import Manifest
from autolabel.manifests.schemas import LABEL_IDS
from autolabel.manifests.walk import BESIDE, RUNS, BadLayout, files_under, is_hidden, note_unused
from autolabel.manifests.wording import Progress

LAYOUTS = ("auto", "cityscapes", "mapillary", "folder")
_DEPTH = 2  # levels of folders, below the one that is scanned, in which data sets are looked for
_TRIED = (
    "Cityscapes (leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png), Mapillary Vistas (config.json and"
    f" training/images/NAME.jpg), images/ beside labels/ or coarse/, any folder of {', '.join(IMAGE_SUFFIXES)}"
)


def scan(
    root: str | Path,
    *,
    layout: str = "auto",
    splits: Sequence[str] = (),
    labels: Path | None = None,
    coarse: Path | None = None,
    suffix: str = "",
    pairs: Path | None = None,
    label_space: LabelSpace | None = None,
    label_ids: str | None = None,
    progress: Progress | None = None,
) -> tuple[Manifest, Account]:
    """Find and check the images and labels in a folder.

    layout: "cityscapes", "mapillary", "folder" (any folder of images), or "auto", which tries them. splits: some splits
    of a data set, all by default. labels, coarse: for layout "folder", the folders of label PNGs with the images'
    relative paths and stems. suffix: text by which the labels' stems are longer, such as "_mask". pairs: a CSV that
    names images and labels instead. label_space: the classes; data sets bring their own, and a folder of images without
    labels gets those of Cityscapes if none is given. label_ids: "train" or "source", the ids in the label PNGs of a
    folder, or "color" if they show the colours of the classes; None is "train", and suspicious where "source" fits too.
    progress hears of checked samples. Raises BadLayout.
    """
    root = location(root)
    if layout not in LAYOUTS:
        raise BadLayout(f"unknown layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    if label_ids not in (None, *LABEL_IDS):
        raise BadLayout(f"unknown label ids {label_ids!r}: expected one of {', '.join(LABEL_IDS)}")
    for folder in (root, labels, coarse):
        if folder is not None and not storage.is_folder(folder):
            raise BadLayout(f"{folder} is not a folder" + ("" if storage.exists(folder) else " that exists"))
    if pairs is not None and (labels or coarse or suffix):
        raise BadLayout(f"{pairs} names the labels: leave out {labels or coarse or suffix!s}")
    guessed, skipped_runs, top, used = layout == "auto", list[Path](), root, [root]
    if guessed and (labels or coarse or pairs):
        layout = "folder"
    elif guessed:
        layout, root = _guess(root, skipped_runs)
        used = [root]
        if layout == "pairs":
            layout, parent, root = "folder", root, root / "images"
            beside = parent / "labels", parent / "coarse"
            labels, coarse = (path if storage.is_folder(path) else None for path in beside)
            used = [root, *(path for path in (labels, coarse) if path)]
    if layout == "folder":
        if splits:
            raise BadLayout(f"{root} is a folder of images, which has no splits: leave out the split {splits[0]!r}")
        if label_space is None and (labels or coarse or pairs):
            raise BadLayout(f"{labels or coarse or pairs} holds labels: name their classes with --label-space")
        if suffix and not (labels or coarse):
            raise BadLayout(f"suffix {suffix!r} is for labels: name their folder with --labels or --coarse")
        space, ids = label_space or CITYSCAPES, label_ids or "train"
        if pairs is not None:
            listing = list_pairs(root, pairs, space, label_ids=ids)
        else:
            listing = list_folder(root, space, labels=labels, coarse=coarse, suffix=suffix, label_ids=ids)
    elif labels or coarse or pairs or suffix:
        raise BadLayout(
            f"layout {layout} has label folders of its own: leave out {labels or coarse or pairs or suffix}"
        )
    else:
        listing = list_cityscapes(root, splits) if layout == "cityscapes" else list_mapillary(root, splits)
    space = listing.label_space
    if label_space is not None and label_space != space:
        raise BadLayout(
            f"{root} holds a data set in the layout of {layout}, whose classes are those of label space {space.name!r},"
            f" not {label_space.name!r}: leave out the label space, or scan its images alone with --layout folder"
        )
    for run in skipped_runs:
        listing.aside.note(RUNS, run)
    if top not in used:
        note_unused(top, {*used, *skipped_runs}, aside=listing.aside, reason=BESIDE)
    assumed = layout == "folder" and label_space is None
    return checked(listing, assumed_space=assumed, guessed=guessed, ids_named=label_ids is not None, progress=progress)


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
            if is_hidden(child.name) or not storage.is_folder(child):
                continue
            if RunFolder(child).exists():
                skipped_runs.append(child)
            else:
                yield from _data_sets(child, skipped_runs, depth=depth - 1)


def _images(root: Path, *, skip: Sequence[Path]) -> Iterator[Path]:
    return (path for path in files_under(root, skip=skip) if path.suffix.lower() in IMAGE_SUFFIXES)
