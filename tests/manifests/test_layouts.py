"""If a label is paired with its neighbour's image, all that follows is built on it."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny import SIZE, label, photo, refusal, samples

from autolabel.manifests.images import read_image, read_label
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.layouts import BadLayout
from autolabel.manifests.samples import Sample
from autolabel.manifests.scan import scan

# --- Cityscapes -------------------------------------------------------------------------------------------------------

CITIES = {"train": "aachen", "val": "lindau", "test": "berlin", "train_extra": "nuernberg"}
UNZIPPED = {"images": "leftImg8bit", "extra": "leftImg8bit", "fine": "gtFine", "coarse": "gtCoarse"}
DOWNLOADS = {
    "images": "leftImg8bit_trainvaltest/leftImg8bit",
    "extra": "leftImg8bit_trainextra/leftImg8bit",
    "fine": "gtFine_trainvaltest/gtFine",
    "coarse": "gtCoarse/gtCoarse",
}


def cityscapes(root: Path, places: dict[str, str]) -> Path:
    """One frame in each of the four splits, with the labels that the data set has for it."""
    for split, city in CITIES.items():
        frame = f"{split}/{city}/{city}_000000_000019"
        photo(root / places["extra" if split == "train_extra" else "images"] / f"{frame}_leftImg8bit.png")
        if split != "train_extra":
            label(root / places["fine"] / f"{frame}_gtFine_labelIds.png", 0 if split == "test" else 26)
            label(root / places["fine"] / f"{frame}_gtFine_instanceIds.png")
        if split != "test":
            label(root / places["coarse"] / f"{frame}_gtCoarse_labelIds.png", 7)
    return root


@pytest.mark.parametrize("places", [pytest.param(UNZIPPED, id="unzipped"), pytest.param(DOWNLOADS, id="downloads")])
def test_all_four_splits_of_cityscapes_are_found_as_they_are_unzipped(tmp_path: Path, places: dict[str, str]) -> None:
    root = cityscapes(tmp_path, places)
    found, account = scan(root, layout="cityscapes")
    expected = []
    for split, city in sorted(CITIES.items()):
        frame = f"{split}/{city}/{city}_000000_000019"
        images = places["extra" if split == "train_extra" else "images"]
        fine = root / places["fine"] / f"{frame}_gtFine_labelIds.png" if split in ("train", "val") else None
        coarse = root / places["coarse"] / f"{frame}_gtCoarse_labelIds.png" if split != "test" else None
        source = "fine" if fine else "coarse" if coarse else "none"
        expected.append(
            Sample(
                f"{city}_000000_000019", root / images / f"{frame}_leftImg8bit.png", SIZE[1], SIZE[0], split, city,
                source, label=fine or coarse, label_ids="source", coarse_label=coarse,
            )
        )  # fmt: skip
    assert found.samples == tuple(expected)
    assert found.label_space == CITYSCAPES
    assert (account.images, account.coarse, account.sizes) == (4, 3, {(6, 8): 4})
    assert account.sources == {"fine": 2, "coarse": 1, "none": 1}
    assert [s.split for s in found.samples] == sorted(CITIES)
    assert account.unreadable == account.without_image == []


def test_the_dummy_labels_of_the_test_split_are_left_aside(tmp_path: Path) -> None:
    found, account = scan(cityscapes(tmp_path, UNZIPPED), layout="cityscapes", splits=["test"])
    assert [(s.split, s.source, s.label) for s in found.samples] == [("test", "none", None)]
    assert account.without_image == []


@pytest.mark.parametrize("split", CITIES)
def test_one_split_can_be_asked_for(tmp_path: Path, split: str) -> None:
    found, _ = scan(cityscapes(tmp_path, UNZIPPED), layout="cityscapes", splits=[split])
    assert [(s.split, s.group) for s in found.samples] == [(split, CITIES[split])]


def test_the_tiny_city_has_what_was_asked_for(city: Path) -> None:
    found, account = scan(city / "data", layout="cityscapes")
    assert Counter(s.split for s in found.samples) == {"train": 6, "train_extra": 10, "val": 3}
    assert account.sources == {"fine": 9, "coarse": 10}
    assert len(found.labelled) == account.coarse == 19


def test_labels_are_paired_by_name_and_never_by_order(tmp_path: Path) -> None:
    """Every image is as bright as its class id; every third has no label, so counting along would pair neighbours."""
    dice = random.Random(0)
    stems = [f"aachen_{dice.randrange(10**6):06d}_{dice.randrange(10**6):06d}" for _ in range(30)]
    class_ids = dict(zip(stems, [7, 8, 11, 12, 13, 17, 19, 20, 21, 22] * 3, strict=True))
    for stem in stems:
        photo(tmp_path / f"leftImg8bit/train/aachen/{stem}_leftImg8bit.png", class_ids[stem])
    missing = set(sorted(stems)[::3])
    for stem in dice.sample(stems, 30):
        if stem not in missing:
            label(tmp_path / f"gtFine/train/aachen/{stem}_gtFine_labelIds.png", class_ids[stem])
    found, _ = scan(tmp_path, layout="cityscapes")
    assert {s.sample_id for s in found.samples if s.label is None} == missing
    for sample in found.labelled:
        assert sample.label is not None
        shade = int(read_image(sample.image)[0, 0, 0])
        assert read_label(sample.label, CITYSCAPES, ids="source")[0, 0] == CITYSCAPES.train_ids[shade]


def test_a_cityscapes_label_without_its_image_is_reported(tmp_path: Path) -> None:
    root = cityscapes(tmp_path, UNZIPPED)
    strays = [
        label(root / "gtCoarse/train/aachen/aachen_000009_000019_gtCoarse_labelIds.png"),
        label(root / "gtFine/train/aachen/aachen_000009_000019_gtFine_labelIds.png"),
    ]
    found, account = scan(root, layout="cityscapes")
    assert account.without_image == strays
    assert "aachen_000009_000019" not in samples(found)


def test_the_same_frame_in_two_downloads_is_refused(tmp_path: Path) -> None:
    root = cityscapes(tmp_path, UNZIPPED)
    frame = "train/aachen/aachen_000000_000019_leftImg8bit.png"
    copy = photo(root / "leftImg8bit_trainvaltest/leftImg8bit" / frame, 9)
    assert refusal(root, layout="cityscapes") == (
        f"aachen_000000_000019 is there twice: {root / 'leftImg8bit' / frame} and {copy}; keep one copy"
    )


def test_a_link_to_a_download_is_the_same_frame_and_fine(tmp_path: Path) -> None:
    root = cityscapes(tmp_path, DOWNLOADS)
    (root / "leftImg8bit").symlink_to(root / DOWNLOADS["images"])
    assert scan(root, layout="cityscapes")[1].images == 4


def test_hidden_files_of_macos_are_left_aside(tmp_path: Path) -> None:
    root = cityscapes(tmp_path, UNZIPPED)
    for name in ("leftImg8bit/val/lindau/._lindau_000000_000019_leftImg8bit.png",
                 "gtFine/val/lindau/._lindau_000000_000019_gtFine_labelIds.png"):  # fmt: skip
        (root / name).write_bytes(b"Mac OS X")
    found, account = scan(root, layout="cityscapes", splits=["val"])
    assert [s.sample_id for s in found.samples] == ["lindau_000000_000019"]
    assert account.unreadable == account.without_image == []


def test_a_folder_without_cityscapes_says_what_was_expected(tmp_path: Path) -> None:
    assert refusal(tmp_path, layout="cityscapes", splits=["val"]) == (
        f"no Cityscapes images of split val under {tmp_path}: expected files like"
        " leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    )


def test_an_unknown_split_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    assert refusal(tmp_path, layout="cityscapes", splits=["trainextra"]) == (
        "unknown split 'trainextra': Cityscapes has train, val, test, train_extra"
    )
    assert refusal(tmp_path, layout="mapillary", splits=["train"]) == (
        "unknown split 'train': Mapillary has training, validation, testing"
    )


# --- Mapillary Vistas -------------------------------------------------------------------------------------------------


def vistas(version: str, *names: str) -> str:
    """A config.json with these classes, and one that is not evaluated before the last."""
    labels: list[dict[str, Any]] = [
        {"name": n, "color": [9, 9, 9], "instances": False, "evaluate": True} for n in names
    ]
    labels.insert(len(names) - 1, {"name": "void--dynamic", "color": [0, 0, 0], "instances": False, "evaluate": False})
    return json.dumps({"labels": labels, "mapping": "public", "version": version})


def mapillary(root: Path, configs: dict[str, str], labels: dict[str, int]) -> Path:
    """Two splits with images of different sizes; `labels` gives the class id in every labels folder."""
    for name, text in configs.items():
        (root / name).write_text(text)
    for split, stem, size in (("training", "Bx1_", (8, 6)), ("training", "a-2", (5, 9)), ("validation", "c3", (4, 4))):
        photo(root / split / "images" / f"{stem}.jpg", size=size)
        for folder, class_id in labels.items():
            label(root / split / folder / f"{stem}.png", class_id, size, mode="P")
    photo(root / "testing/images/d4.jpg")
    return root


OLD, NEW = vistas("1.2", "road", "sky", "car"), vistas("2.0", "road", "sky", "car", "tree")


@pytest.mark.parametrize(
    ("configs", "folders", "expected", "names"),
    [
        pytest.param({"config.json": OLD}, {"labels": 3}, "labels", ("road", "sky", "car"), id="v1.2"),
        pytest.param(
            {"config_v2.0.json": NEW}, {"v2.0/labels": 4}, "v2.0/labels", ("road", "sky", "car", "tree"), id="v2.0"
        ),
        pytest.param(
            {"config.json": NEW},
            {"v2.0/labels": 4},
            "v2.0/labels",
            ("road", "sky", "car", "tree"),
            id="v2.0 in a config.json",
        ),
        pytest.param(
            {"config_v1.2.json": OLD, "config_v2.0.json": NEW},
            {"v1.2/labels": 3, "v2.0/labels": 4},
            "v2.0/labels",
            ("road", "sky", "car", "tree"),
            id="both: the newer one",
        ),
        pytest.param(
            {"config_v1.2.json": OLD}, {"v1.2/labels": 3}, "v1.2/labels", ("road", "sky", "car"), id="v1.2 of v2.0"
        ),
        pytest.param(
            {"config.json": OLD},
            {"v1.2/labels": 3, "v2.0/labels": 4},
            "v1.2/labels",
            ("road", "sky", "car"),
            id="both folders, config of the older",
        ),
    ],
)
def test_every_form_of_mapillary_is_read_with_its_own_classes(
    tmp_path: Path, configs: dict[str, str], folders: dict[str, int], expected: str, names: tuple[str, ...]
) -> None:
    found, account = scan(mapillary(tmp_path, configs, folders), layout="mapillary")
    assert [(s.sample_id, s.split, s.source, s.label, s.height, s.width) for s in found.samples] == [
        ("d4", "testing", "none", None, 6, 8),
        ("Bx1_", "training", "fine", tmp_path / "training" / expected / "Bx1_.png", 6, 8),
        ("a-2", "training", "fine", tmp_path / "training" / expected / "a-2.png", 9, 5),
        ("c3", "validation", "fine", tmp_path / "validation" / expected / "c3.png", 4, 4),
    ]
    assert (found.label_space.name, found.label_space.names) == ("mapillary", names)
    assert {s.label_ids for s in found.samples} == {"source"}
    assert Counter(s.split for s in found.samples) == {"training": 2, "validation": 1, "testing": 1}
    assert account.sizes == {(6, 8): 2, (9, 5): 1, (4, 4): 1}


def test_mapillary_labels_become_train_ids_without_the_void(tmp_path: Path) -> None:
    found, _ = scan(mapillary(tmp_path, {"config.json": OLD}, {"labels": 3}), layout="mapillary", splits=["validation"])
    (sample,) = found.samples
    assert sample.label is not None
    assert read_label(sample.label, found.label_space, ids="source").tolist() == [[2] * 4] * 4


def test_labels_of_another_version_are_never_read_with_this_config(tmp_path: Path) -> None:
    """Class 1 of v1.2 is not class 1 of v2.0: the ids are known and the classes wrong."""
    root = mapillary(tmp_path, {"config.json": OLD}, {"v2.0/labels": 1})
    try:
        found, _ = scan(root, layout="mapillary")
    except BadLayout:
        return
    assert [s.label for s in found.samples] == [None] * 4


def test_a_mapillary_label_without_its_image_is_reported(tmp_path: Path) -> None:
    root = mapillary(tmp_path, {"config.json": OLD}, {"labels": 0})
    stray = label(root / "training/labels/zz.png")
    assert scan(root, layout="mapillary")[1].without_image == [stray]


def test_mapillary_ids_beyond_its_config_are_refused(tmp_path: Path) -> None:
    root = mapillary(tmp_path, {"config.json": OLD}, {"labels": 4})
    assert refusal(root, layout="mapillary").startswith(
        f"{root}/training/labels/Bx1_.png: ids [4] are not in label space 'mapillary' (source ids) (and 2 more labels):"
    )


def test_mapillary_without_config_says_what_was_expected(tmp_path: Path) -> None:
    photo(tmp_path / "training/images/a.jpg")
    assert refusal(tmp_path, layout="mapillary") == (
        f"no config.json under {tmp_path}: expected the folder of Mapillary Vistas as unzipped"
    )


@pytest.mark.parametrize("text", ["", "[]", "{", '{"labels": [{"name": "road"}]}'])
def test_a_damaged_mapillary_config_is_named(tmp_path: Path, text: str) -> None:
    assert str(tmp_path / "config.json") in refusal(mapillary(tmp_path, {"config.json": text}, {}), layout="mapillary")


def test_mapillary_without_images_says_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(OLD)
    assert refusal(tmp_path, layout="mapillary") == (
        f"no images under {tmp_path}: expected files like {tmp_path}/training/images/NAME.jpg"
    )
