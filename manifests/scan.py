"""Find samples in the folder layouts that data sets come in, and give an account of what was found.

Images and labels are paired by relative path and stem, never by sort order. Every image's header is read; every label
is decoded once, so that a wrong size or an unknown id is found now and not in the middle of a training.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from autolabel.manifests.images import IMAGE_SUFFIXES, LABEL_SUFFIXES, BadImage, read_label, read_size
from autolabel.manifests.label_space import CITYSCAPES, LabelSpace
from autolabel.manifests.machine import cores
from autolabel.manifests.samples import Manifest, Sample

OnFile = Callable[[int, int], None]  # (done, total)


class BadLayout(ValueError):
    """The folder does not hold what the layout promises."""


@dataclass
class Account:
    """What a scan found, for people."""

    images: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    coarse: int = 0
    unreadable: list[str] = field(default_factory=list)  # "path: reason"
    without_image: list[Path] = field(default_factory=list)  # labels whose image is missing


# --- Cityscapes -------------------------------------------------------------------------------------------------------

_CITYSCAPES_SPLITS = ("train", "val", "test", "train_extra")
_IMAGE_END, _FINE_END, _COARSE_END = "_leftImg8bit.png", "_gtFine_labelIds.png", "_gtCoarse_labelIds.png"


def _package_folders(root: Path, package: str) -> list[Path]:
    """Where a Cityscapes package lies: ROOT/leftImg8bit, or one level down as in ROOT/leftImg8bit_trainvaltest/."""
    candidates = [root / package, *sorted(root.glob(f"{package}*/{package}"))]
    return [folder for folder in candidates if folder.is_dir()]


def _cityscapes_files(root: Path, package: str, end: str, splits: Sequence[str]) -> dict[tuple[str, str], Path]:
    """(split, sample id) -> file. Raises BadLayout for an id that appears twice in one split."""
    found: dict[tuple[str, str], Path] = {}
    for folder in _package_folders(root, package):
        for split in splits:
            for path in sorted((folder / split).glob(f"*/[!.]*{end}")):
                key = (split, path.name.removesuffix(end))
                if key in found and not found[key].samefile(path):
                    raise BadLayout(f"{key[1]} is there twice: {found[key]} and {path}; keep one copy")
                found[key] = path
    return found


def scan_cityscapes(root: Path, splits: Sequence[str] = (), on_file: OnFile | None = None) -> tuple[Manifest, Account]:
    """Cityscapes as unzipped: leftImg8bit/, gtFine/, gtCoarse/, side by side or in the folders of the downloads.

    A sample's best label is its fine one; without it, its coarse one. The test split's labels are dummies and left
    aside. Raises BadLayout.
    """
    _require_folder(root)
    unknown = sorted(set(splits) - set(_CITYSCAPES_SPLITS))
    if unknown:
        raise BadLayout(f"unknown split {unknown[0]!r}: Cityscapes has {', '.join(_CITYSCAPES_SPLITS)}")
    splits = splits or _CITYSCAPES_SPLITS
    images = _cityscapes_files(root, "leftImg8bit", _IMAGE_END, splits)
    if not images:
        raise BadLayout(
            f"no Cityscapes images of split {', '.join(splits)} under {root}: expected files like"
            f" leftImg8bit/train/aachen/aachen_000000_000019{_IMAGE_END}"
        )
    fine = _cityscapes_files(root, "gtFine", _FINE_END, [s for s in splits if s != "test"])
    coarse = _cityscapes_files(root, "gtCoarse", _COARSE_END, splits)
    samples = [
        _sample(sample_id, image, fine.get(key), coarse.get(key), split, group=image.parent.name, label_ids="source")
        for key, image in images.items()
        for split, sample_id in [key]
    ]
    strays = [path for labels in (fine, coarse) for key, path in labels.items() if key not in images]
    return _finish(CITYSCAPES, samples, strays, {"layout": "cityscapes", "root": str(root)}, on_file)


# --- Mapillary Vistas -------------------------------------------------------------------------------------------------

_MAPILLARY_SPLITS = ("training", "validation", "testing")


def _mapillary_config(root: Path) -> tuple[Path, str]:
    """The newest config and the sub-folder of its labels: v1.2 has labels/, v2.0 has v2.0/labels/."""
    for name, labels in (("config_v2.0.json", "v2.0/labels"), ("config_v1.2.json", "v1.2/labels")):
        if (root / name).is_file():
            return root / name, labels
    if (root / "config.json").is_file():
        try:
            version = str(json.loads((root / "config.json").read_text(encoding="utf-8")).get("version", ""))
        except (ValueError, AttributeError) as error:
            raise BadLayout(f"{root / 'config.json'} is not the JSON of Mapillary Vistas: {error}") from error
        versioned = f"v{version}/labels"
        has_versions = any((root / split / versioned).is_dir() for split in _MAPILLARY_SPLITS)
        return root / "config.json", versioned if has_versions else "labels"
    raise BadLayout(f"no config.json under {root}: expected the folder of Mapillary Vistas as unzipped")


def scan_mapillary(root: Path, splits: Sequence[str] = (), on_file: OnFile | None = None) -> tuple[Manifest, Account]:
    """Mapillary Vistas (Neuhold et al., ICCV 2017) v1.2 or v2.0; classes and colours are read from its config.

    Raises BadLayout.
    """
    _require_folder(root)
    unknown = sorted(set(splits) - set(_MAPILLARY_SPLITS))
    if unknown:
        raise BadLayout(f"unknown split {unknown[0]!r}: Mapillary has {', '.join(_MAPILLARY_SPLITS)}")
    config, labels_folder = _mapillary_config(root)
    try:
        space = LabelSpace.from_json(config.read_text(encoding="utf-8"), name="mapillary")
    except ValueError as error:
        raise BadLayout(f"{config}: {error}") from error
    samples: list[Sample] = []
    strays: list[Path] = []
    for split in splits or _MAPILLARY_SPLITS:
        images = _by_stem(root / split / "images", IMAGE_SUFFIXES)
        labels = _by_stem(root / split / labels_folder, LABEL_SUFFIXES)
        samples += [
            _sample(stem, image, labels.get(stem), None, split, label_ids="source") for stem, image in images.items()
        ]
        strays += [path for stem, path in labels.items() if stem not in images]
    if not samples:
        raise BadLayout(f"no images under {root}: expected files like {root}/training/images/NAME.jpg")
    return _finish(space, samples, strays, {"layout": "mapillary", "root": str(root)}, on_file)


# --- any folder -------------------------------------------------------------------------------------------------------


def scan_folder(
    images: Path,
    labels: Path | None,
    coarse: Path | None,
    space: LabelSpace,
    label_ids: str = "train",
    on_file: OnFile | None = None,
) -> tuple[Manifest, Account]:
    """Any folder of images, with labels under the same relative path and stem in other folders.

    The sample id is the relative path without its suffix. The group is the sub-folder, or, in a flat folder, the name
    up to its last underscore (frames of one drive). Raises BadLayout.
    """
    for folder in (images, labels, coarse):
        if folder is not None:
            _require_folder(folder)
    found = _by_stem(images, IMAGE_SUFFIXES)
    if not found:
        raise BadLayout(f"no images under {images}: expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    fine_by, coarse_by = (_by_stem(f, LABEL_SUFFIXES) if f else {} for f in (labels, coarse))
    for folder, by_stem in ((labels, fine_by), (coarse, coarse_by)):
        if folder is not None and not by_stem.keys() & found.keys():
            raise BadLayout(
                f"none of the {len(by_stem)} labels under {folder} has the relative path and stem of an image under"
                f" {images}: expected e.g. {folder / (next(iter(found)) + LABEL_SUFFIXES[0])}"
            )
    samples = [
        _sample(stem, path, fine_by.get(stem), coarse_by.get(stem), "", group=_group(stem), label_ids=label_ids)
        for stem, path in found.items()
    ]
    strays = [path for by_stem in (fine_by, coarse_by) for stem, path in by_stem.items() if stem not in found]
    return _finish(space, samples, strays, {"layout": "folder", "root": str(images)}, on_file)


def _group(stem: str) -> str:
    folder, _, name = stem.rpartition("/")
    return folder or name.rpartition("_")[0]


def _by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Relative path without suffix -> file, recursively, links followed. Raises BadLayout if two files share one."""
    found: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        above = {Path(parent).resolve(), *Path(parent).resolve().parents}
        folders[:] = sorted(name for name in folders if Path(parent, name).resolve() not in above)  # no circles
        for name in sorted(names):
            path = Path(parent, name)
            if path.suffix.lower() in suffixes and not name.startswith("."):
                stem = path.relative_to(folder).with_suffix("").as_posix()
                if stem in found:
                    raise BadLayout(f"{found[stem]} and {path} share a stem: which label is whose?")
                found[stem] = path
    return found


# --- shared -----------------------------------------------------------------------------------------------------------


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise BadLayout(f"{folder} is not a folder that exists" if not folder.exists() else f"{folder} is not a folder")


def _sample(
    sample_id: str,
    image: Path,
    fine: Path | None,
    coarse: Path | None,
    split: str,
    group: str = "",
    label_ids: str = "train",
) -> Sample:
    """A sample whose label is the best there is; its size is filled in when the header has been read."""
    source = "fine" if fine else "coarse" if coarse else "none"
    return Sample(
        sample_id, image.absolute(), 0, 0, split, group, source,
        label=_absolute(fine or coarse), label_ids=label_ids, coarse_label=_absolute(coarse),
    )  # fmt: skip


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def _finish(
    space: LabelSpace,
    samples: Sequence[Sample],
    strays: list[Path],
    provenance: dict[str, str],
    on_file: OnFile | None,
) -> tuple[Manifest, Account]:
    """Check every file, fill in sizes, and count. Raises BadLayout for labels that cannot be used."""
    account = Account(without_image=sorted(strays))
    checked: list[Sample] = []
    broken_labels: list[str] = []
    with ThreadPoolExecutor(cores()) as pool:
        for done, (sample, unreadable, broken) in enumerate(pool.map(lambda s: _check(s, space), samples), start=1):
            checked.append(sample)
            account.unreadable += unreadable
            broken_labels += broken
            if on_file:
                on_file(done, len(samples))
    if broken_labels:
        more = f" (and {len(broken_labels) - 1} more labels)" if len(broken_labels) > 1 else ""
        raise BadLayout(f"{broken_labels[0]}{more}: repair or remove it, or name the right label space and ids")
    for sample in checked:
        account.images += 1
        account.sources[sample.source] += 1
        account.splits[sample.split] += 1
        account.coarse += sample.coarse_label is not None
        if sample.readable:
            account.sizes[sample.height, sample.width] += 1
    ordered = tuple(sorted(checked, key=lambda s: (s.split, s.sample_id)))
    return Manifest.of(space, ordered, provenance=provenance), account


def _check(sample: Sample, space: LabelSpace) -> tuple[Sample, list[str], list[str]]:
    """The sample with its size, what is wrong with its image, and what is wrong with its labels."""
    try:
        size = read_size(sample.image)
    except BadImage as error:
        return sample, [f"{sample.image}: {error}"], []  # stays 0 x 0: `generate` will quarantine it with the reason
    broken: list[str] = []
    for path in dict.fromkeys(p for p in (sample.label, sample.coarse_label) if p is not None):
        try:
            label = read_label(path, space, sample.label_ids)
        except BadImage as error:
            broken.append(str(error))
        else:
            if label.shape != size:
                height, width = label.shape
                broken.append(f"{path}: the label is {width} x {height} but its image {size[1]} x {size[0]} pixels")
    return replace(sample, height=size[0], width=size[1]), [], broken
