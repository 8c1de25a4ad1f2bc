"""The folder layouts of data sets: each says which files are images, and which labels belong to them.

Images and labels are paired by relative path and stem, never by sort order. No image or label is opened here. Every
file that is in no sample is noted with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, read_json
from autolabel.manifests.images import IMAGE_SUFFIXES, LABEL_SUFFIXES
from autolabel.manifests.label_space import CITYSCAPES, LabelSpace
from autolabel.manifests.pairs import read_pairs
from autolabel.manifests.samples import Sample
from autolabel.manifests.walk import (
    HIDDEN,
    NAMES,
    STRAYS,
    UNUSED,
    Aside,
    BadLayout,
    by_name,
    common_end,
    composed,
    files_under,
    is_hidden,
    is_holdable,
    note_unused,
)


@dataclass(frozen=True)
class Listing:
    """The files of a data set, paired by name. The samples have no size yet: 0 x 0. aside: what is in no sample."""

    layout: str
    root: Path
    label_space: LabelSpace
    samples: tuple[Sample, ...]
    aside: Aside


# --- Cityscapes -------------------------------------------------------------------------------------------------------

CITYSCAPES_SPLITS = ("train", "val", "test", "train_extra")
_IMAGE_END, _FINE_END, _COARSE_END = "_leftImg8bit.png", "_gtFine_labelIds.png", "_gtCoarse_labelIds.png"


def is_cityscapes(root: Path) -> bool:
    """True if the folder holds Cityscapes as unzipped."""
    return bool(_package_folders(root, "leftImg8bit"))


def list_cityscapes(root: Path, splits: Sequence[str] = ()) -> Listing:
    """List Cityscapes as unzipped: leftImg8bit/, gtFine/, gtCoarse/, side by side or in the folders of the downloads.

    A sample's label is its fine one; without it, its coarse one. The labels of the test split are dummies, and not
    used. Raises BadLayout.
    """
    unknown = sorted(set(splits) - set(CITYSCAPES_SPLITS))
    if unknown:
        raise BadLayout(f"unknown split {unknown[0]!r}: Cityscapes has {', '.join(CITYSCAPES_SPLITS)}")
    splits = splits or CITYSCAPES_SPLITS
    aside = Aside()
    images = _cityscapes_files(root, "leftImg8bit", _IMAGE_END, splits=splits, aside=aside)
    if not images:
        raise BadLayout(
            f"no Cityscapes images of split {', '.join(splits)} under {root}: expected files like"
            f" leftImg8bit/train/aachen/aachen_000000_000019{_IMAGE_END}"
        )
    fine = _cityscapes_files(root, "gtFine", _FINE_END, splits=[s for s in splits if s != "test"], aside=aside)
    coarse = _cityscapes_files(root, "gtCoarse", _COARSE_END, splits=splits, aside=aside)
    samples = tuple(
        _sample(image, fine.get(key), coarse.get(key), sample_id=key[1], split=key[0], group=image.parent.name)
        for key, image in images.items()
    )
    for path in sorted(path for labels in (fine, coarse) for key, path in labels.items() if key not in images):
        aside.note(STRAYS, path)
    packages = {name: _package_folders(root, name) for name in ("leftImg8bit", "gtFine", "gtCoarse")}
    walked = {folder / split for folders in packages.values() for folder in folders for split in splits}
    note_unused(root, walked - {folder / "test" for folder in packages["gtFine"]}, aside=aside)
    return Listing("cityscapes", root, CITYSCAPES, samples, aside)


def _package_folders(root: Path, package: str) -> list[Path]:
    """The folders of a Cityscapes package: ROOT/leftImg8bit, or one level down as ROOT/leftImg8bit_trainvaltest/."""
    candidates = [root / package, *(folder / package for folder in _folders(root) if folder.name.startswith(package))]
    return [folder for folder in candidates if storage.is_folder(folder)]


def _cityscapes_files(
    root: Path, package: str, end: str, *, splits: Sequence[str], aside: Aside
) -> dict[tuple[str, str], Path]:
    """(split, sample id) -> file. Raises BadLayout for an id that appears twice in one split."""
    files: dict[tuple[str, str], Path] = {}
    for folder in _package_folders(root, package):
        for split in splits:
            for path in (path for city in _open_folders(folder / split, aside) for path in storage.list(city)):
                if is_hidden(path.name):
                    aside.note(HIDDEN, path)
                elif not is_holdable(path.name):
                    aside.note(NAMES, path)
                elif not path.name.endswith(end):
                    aside.note(f"files of {package} that do not end in {end}", path)
                else:
                    key = (split, composed(path.name.removesuffix(end)))
                    if key in files and not files[key].samefile(path):
                        raise BadLayout(f"{key[1]} is there twice: {files[key]} and {path}; keep one copy")
                    files[key] = path
    return files


def _folders(folder: Path) -> list[Path]:
    return storage.folders(folder)


def _open_folders(folder: Path, aside: Aside) -> Iterator[Path]:
    """The sub-folders of a folder but for hidden ones, which are noted, and so are the files beside them."""
    for path in storage.list(folder):
        if is_hidden(path.name):
            aside.note(HIDDEN, path)
        elif not is_holdable(path.name):
            aside.note(NAMES, path)
        elif storage.is_folder(path):
            yield path
        else:
            aside.note(UNUSED, path)


# --- Mapillary Vistas -------------------------------------------------------------------------------------------------

MAPILLARY_SPLITS = ("training", "validation", "testing")
_CONFIGS = {"config_v2.0.json": "v2.0/labels", "config_v1.2.json": "v1.2/labels", "config.json": ""}  # newest first


def is_mapillary(root: Path) -> bool:
    """True if the folder holds Mapillary Vistas as unzipped."""
    has_images = any(storage.is_folder(root / split / "images") for split in MAPILLARY_SPLITS)
    return has_images and any(storage.exists(root / name) for name in _CONFIGS)


def list_mapillary(root: Path, splits: Sequence[str] = ()) -> Listing:
    """List Mapillary Vistas (Neuhold et al., ICCV 2017) v1.2 or v2.0, with the classes and colours of its config.

    Raises BadLayout.
    """
    unknown = sorted(set(splits) - set(MAPILLARY_SPLITS))
    if unknown:
        raise BadLayout(f"unknown split {unknown[0]!r}: Mapillary has {', '.join(MAPILLARY_SPLITS)}")
    config, labels_folder = _mapillary_config(root)
    try:
        space = LabelSpace.of(read_json(config), where=str(config), name="mapillary")
    except BadDocument as error:
        raise BadLayout(str(error)) from error
    samples: list[Sample] = []
    aside = Aside()
    for split in splits or MAPILLARY_SPLITS:
        images = by_name(root / split / "images", IMAGE_SUFFIXES, aside=aside)
        labels = by_name(root / split / labels_folder, LABEL_SUFFIXES, aside=aside)
        samples += [_sample(path, labels.get(stem), None, sample_id=stem, split=split) for stem, path in images.items()]
        _note_strays(labels, images, aside)
    if not samples:
        raise BadLayout(f"no images under {root}: expected files like {root}/training/images/NAME.jpg")
    walked = {root / split / folder for split in splits or MAPILLARY_SPLITS for folder in ("images", labels_folder)}
    note_unused(root, walked | {config}, aside=aside)
    return Listing("mapillary", root, space, tuple(samples), aside)


def _mapillary_config(root: Path) -> tuple[Path, str]:
    """The newest config and the sub-folder of its labels: v1.2 has labels/, v2.0 has v2.0/labels/."""
    config = next((root / name for name in _CONFIGS if storage.exists(root / name)), None)
    if config is None:
        raise BadLayout(f"no config.json under {root}: expected the folder of Mapillary Vistas as unzipped")
    if _CONFIGS[config.name]:
        return config, _CONFIGS[config.name]
    try:
        version = str(read_json(config, dict[str, Any]).get("version", ""))
    except BadDocument as error:
        raise BadLayout(f"this is not the config of Mapillary Vistas: {error}") from error
    versioned = f"v{version}/labels"
    has_versions = any(storage.is_folder(root / split / versioned) for split in MAPILLARY_SPLITS)
    return config, versioned if has_versions else "labels"


# --- any folder -------------------------------------------------------------------------------------------------------


def list_folder(
    images: Path,
    space: LabelSpace,
    *,
    labels: Path | None = None,
    coarse: Path | None = None,
    suffix: str = "",
    label_ids: str = "train",
) -> Listing:
    """List any folder of images, with labels of the same relative path and stem in other folders.

    suffix: the labels' stems are longer by this text, such as "_mask". The sample id is the relative path without its
    suffix. The group is the sub-folder, or, in a flat folder, the name up to its last underscore (frames of one drive).
    Raises BadLayout.
    """
    aside = Aside()
    fine_by, coarse_by = (
        by_name(folder, LABEL_SUFFIXES, aside=aside, end=suffix) if folder else {} for folder in (labels, coarse)
    )
    skip = [folder for folder in (labels, coarse) if folder is not None and folder != images]
    by_stem = by_name(images, IMAGE_SUFFIXES, aside=aside, skip=skip)
    if images in (labels, coarse):  # labels between the images: NAME.png beside NAME_mask.png
        used = {path for paired in (fine_by, coarse_by) for path in paired.values()}
        by_stem = {stem: path for stem, path in by_stem.items() if path not in used}
    if not by_stem:
        raise BadLayout(f"no images under {images}: expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    for folder, paired in ((labels, fine_by), (coarse, coarse_by)):
        if folder is not None and not paired:
            raise BadLayout(
                f"no labels under {folder}: expected PNGs{f' whose names end in {suffix}' if suffix else ''}"
            )
        if folder is not None and not paired.keys() & by_stem.keys():
            end = "" if suffix else common_end(by_stem.keys(), paired.keys())
            raise BadLayout(
                f"none of the {len(paired)} labels under {folder} has the relative path and stem of an image under"
                f" {images}: expected e.g. {folder / (next(iter(by_stem)) + suffix + LABEL_SUFFIXES[0])}"
                + (f"; their names are longer by {end!r}: try --suffix {end}" if end else "")
            )
    samples = tuple(
        _sample(path, fine_by.get(stem), coarse_by.get(stem), sample_id=stem, group=_group(stem), label_ids=label_ids)
        for stem, path in by_stem.items()
    )
    for paired in (fine_by, coarse_by):
        _note_strays(paired, by_stem, aside)
    return Listing("folder", images, space, samples, aside)


def list_pairs(images: Path, table: Path, space: LabelSpace, *, label_ids: str = "train") -> Listing:
    """List the images of a folder that a CSV names, with the labels that it names. Raises BadLayout."""
    aside = Aside()
    samples = tuple(
        _sample(
            row.image, row.label, row.coarse, sample_id=row.sample_id, group=_group(row.sample_id), label_ids=label_ids
        )
        for row in read_pairs(table, images)
    )
    named = {path for s in samples for path in (s.image, s.label, s.coarse_label, table.absolute())}
    for path in files_under(images, aside=aside):
        if path.absolute() not in named:
            aside.note(f"files that {table.name} does not name", path)
    return Listing("folder", images, space, samples, aside)


def _note_strays(labels: Mapping[str, Path], images: Mapping[str, Path], aside: Aside) -> None:
    """Note the labels whose image is missing; where an image has the same name but for capitals, say so."""
    strays = sorted(path for stem, path in labels.items() if stem not in images)
    similar = {stem.casefold() for stem in images} if strays else set()
    of_path = {path: stem for stem, path in labels.items()}
    for path in strays:
        aside.note(STRAYS, path)
        if of_path[path].casefold() in similar:
            aside.note("labels whose names differ from an image's in capitals alone", path)


def _group(stem: str) -> str:
    folder, _, name = stem.rpartition("/")
    return folder or name.rpartition("_")[0]


# --- samples ----------------------------------------------------------------------------------------------------------


def _sample(
    image: Path,
    fine: Path | None,
    coarse: Path | None,
    *,
    sample_id: str,
    split: str = "",
    group: str = "",
    label_ids: str = "source",
) -> Sample:
    """A sample whose label is the fine one, else the coarse one."""
    label, source = (fine, "fine") if fine else (coarse, "coarse") if coarse else (None, "none")
    return Sample(
        sample_id, image.absolute(), 0, 0, split, group, source,
        label=_absolute(label), label_ids=label_ids, coarse_label=_absolute(coarse),
    )  # fmt: skip


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()
