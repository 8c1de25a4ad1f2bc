"""The folder layouts of data sets: each says which files are images, and which labels belong to them.

Images and labels are paired by relative path and stem, never by sort order. No image or label is opened here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, read_json
from autolabel.manifests.images import IMAGE_SUFFIXES, LABEL_SUFFIXES
from autolabel.manifests.label_space import CITYSCAPES, LabelSpace
from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.samples import Sample


class BadLayout(ValueError):
    """The folder does not have the layout, or no layout fits it."""


@dataclass(frozen=True)
class Listing:
    """The files of a data set, paired by name. The samples have no size yet: 0 x 0.

    without_image: labels whose image is missing. skipped_runs: run folders inside, whose files are left out.
    """

    layout: str
    root: Path
    label_space: LabelSpace
    samples: tuple[Sample, ...]
    without_image: tuple[Path, ...]
    skipped_runs: tuple[Path, ...] = ()


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
    images = _cityscapes_files(root, "leftImg8bit", _IMAGE_END, splits)
    if not images:
        raise BadLayout(
            f"no Cityscapes images of split {', '.join(splits)} under {root}: expected files like"
            f" leftImg8bit/train/aachen/aachen_000000_000019{_IMAGE_END}"
        )
    fine = _cityscapes_files(root, "gtFine", _FINE_END, [s for s in splits if s != "test"])
    coarse = _cityscapes_files(root, "gtCoarse", _COARSE_END, splits)
    samples = tuple(
        _sample(image, fine.get(key), coarse.get(key), sample_id=key[1], split=key[0], group=image.parent.name)
        for key, image in images.items()
    )
    strays = [path for labels in (fine, coarse) for key, path in labels.items() if key not in images]
    return Listing("cityscapes", root, CITYSCAPES, samples, tuple(sorted(strays)))


def _package_folders(root: Path, package: str) -> list[Path]:
    """The folders of a Cityscapes package: ROOT/leftImg8bit, or one level down as ROOT/leftImg8bit_trainvaltest/."""
    candidates = [root / package, *(folder / package for folder in _folders(root) if folder.name.startswith(package))]
    return [folder for folder in candidates if storage.is_folder(folder)]


def _cityscapes_files(root: Path, package: str, end: str, splits: Sequence[str]) -> dict[tuple[str, str], Path]:
    """(split, sample id) -> file. Raises BadLayout for an id that appears twice in one split."""
    files: dict[tuple[str, str], Path] = {}
    for folder in _package_folders(root, package):
        for split in splits:
            for path in (path for city in _folders(folder / split) for path in storage.list(city, suffix=end)):
                if path.name.startswith("."):
                    continue
                key = (split, path.name.removesuffix(end))
                if key in files and not files[key].samefile(path):
                    raise BadLayout(f"{key[1]} is there twice: {files[key]} and {path}; keep one copy")
                files[key] = path
    return files


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
    strays: list[Path] = []
    for split in splits or MAPILLARY_SPLITS:
        images = _by_stem(root / split / "images", IMAGE_SUFFIXES)
        labels = _by_stem(root / split / labels_folder, LABEL_SUFFIXES)
        samples += [_sample(path, labels.get(stem), None, sample_id=stem, split=split) for stem, path in images.items()]
        strays += [path for stem, path in labels.items() if stem not in images]
    if not samples:
        raise BadLayout(f"no images under {root}: expected files like {root}/training/images/NAME.jpg")
    return Listing("mapillary", root, space, tuple(samples), tuple(sorted(strays)))


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
    label_ids: str = "train",
) -> Listing:
    """List any folder of images, with labels of the same relative path and stem in other folders.

    The sample id is the relative path without its suffix. The group is the sub-folder, or, in a flat folder, the name
    up to its last underscore (frames of one drive). Raises BadLayout.
    """
    skipped: list[Path] = []
    by_stem = _by_stem(images, IMAGE_SUFFIXES, skipped)
    if not by_stem:
        raise BadLayout(f"no images under {images}: expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    fine_by, coarse_by = (_by_stem(folder, LABEL_SUFFIXES) if folder else {} for folder in (labels, coarse))
    for folder, paired in ((labels, fine_by), (coarse, coarse_by)):
        if folder is not None and not paired.keys() & by_stem.keys():
            raise BadLayout(
                f"none of the {len(paired)} labels under {folder} has the relative path and stem of an image under"
                f" {images}: expected e.g. {folder / (next(iter(by_stem)) + LABEL_SUFFIXES[0])}"
            )
    samples = tuple(
        _sample(path, fine_by.get(stem), coarse_by.get(stem), sample_id=stem, group=_group(stem), label_ids=label_ids)
        for stem, path in by_stem.items()
    )
    strays = [path for paired in (fine_by, coarse_by) for stem, path in paired.items() if stem not in by_stem]
    return Listing("folder", images, space, samples, tuple(sorted(strays)), tuple(skipped))


def _group(stem: str) -> str:
    folder, _, name = stem.rpartition("/")
    return folder or name.rpartition("_")[0]


# --- folders and files ------------------------------------------------------------------------------------------------


def files_under(folder: Path, *, skip: Sequence[Path] = (), skipped_runs: list[Path] | None = None) -> Iterator[Path]:
    """The files in a folder and its sub-folders, in order, links followed.

    Hidden files and folders, run folders and the folders of `skip` are left out; run folders are added to
    `skipped_runs`. A missing folder has no files.
    """
    above = {folder.resolve(), *folder.resolve().parents}
    for path in storage.list(folder):
        if path.name.startswith("."):
            continue
        if not storage.is_folder(path):
            yield path
        elif RunFolder(path).exists():
            if skipped_runs is not None:
                skipped_runs.append(path)
        elif path not in skip and path.resolve() not in above:  # a link to a folder above would lead in circles
            yield from files_under(path, skip=skip, skipped_runs=skipped_runs)


def _folders(folder: Path) -> list[Path]:
    return [path for path in storage.list(folder) if storage.is_folder(path)]


def _by_stem(folder: Path, suffixes: Sequence[str], skipped_runs: list[Path] | None = None) -> dict[str, Path]:
    """Relative path without suffix -> file. Raises BadLayout if two files share one."""
    files: dict[str, Path] = {}
    for path in files_under(folder, skipped_runs=skipped_runs):
        if path.suffix.lower() in suffixes:
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in files:
                raise BadLayout(f"{files[stem]} and {path} share a stem: which label is whose?")
            files[stem] = path
    return files


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
