"""If a label is paired with its neighbour's image, or an image is lost in the scan, all that follows is built on it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from autolabel.manifests.images import read_image, read_label
from autolabel.manifests.label_space import CAMVID, CITYSCAPES
from autolabel.manifests.samples import Manifest, Sample
from autolabel.manifests.scan import BadLayout, scan_cityscapes, scan_folder, scan_mapillary

Size = tuple[int, int]  # width, height
SIZE: Size = (8, 6)


def photo(file: Path, shade: int = 0, size: Size = SIZE) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(file, lossless=True, quality=100)
    return file


def label(file: Path, class_id: int = 0, size: Size = SIZE, mode: str = "L") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size, class_id)
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
    image.save(file)
    return file


def samples(manifest: Manifest) -> dict[str, Sample]:
    return {s.sample_id: s for s in manifest.samples}


def refusal(scan: Any, *arguments: Any) -> str:
    with pytest.raises(BadLayout) as refused:
        scan(*arguments)
    return str(refused.value)


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
    found, account = scan_cityscapes(root)
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
    assert account.splits == dict.fromkeys(CITIES, 1)
    assert account.unreadable == account.without_image == []


def test_the_dummy_labels_of_the_test_split_are_left_aside(tmp_path: Path) -> None:
    found, account = scan_cityscapes(cityscapes(tmp_path, UNZIPPED), ["test"])
    assert [(s.split, s.source, s.label) for s in found.samples] == [("test", "none", None)]
    assert account.without_image == []


@pytest.mark.parametrize("split", CITIES)
def test_one_split_can_be_asked_for(tmp_path: Path, split: str) -> None:
    found, _ = scan_cityscapes(cityscapes(tmp_path, UNZIPPED), [split])
    assert [(s.split, s.group) for s in found.samples] == [(split, CITIES[split])]


def test_the_tiny_city_has_what_was_asked_for(city: Path) -> None:
    found, account = scan_cityscapes(city / "data")
    assert account.splits == {"train": 6, "train_extra": 10, "val": 3}
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
    found, _ = scan_cityscapes(tmp_path)
    assert {s.sample_id for s in found.samples if s.label is None} == missing
    for sample in found.labelled:
        assert sample.label is not None
        shade = int(read_image(sample.image)[0, 0, 0])
        assert read_label(sample.label, CITYSCAPES, "source")[0, 0] == CITYSCAPES.train_ids[shade]


def test_a_cityscapes_label_without_its_image_is_reported(tmp_path: Path) -> None:
    root = cityscapes(tmp_path, UNZIPPED)
    strays = [
        label(root / "gtCoarse/train/aachen/aachen_000009_000019_gtCoarse_labelIds.png"),
        label(root / "gtFine/train/aachen/aachen_000009_000019_gtFine_labelIds.png"),
    ]
    found, account = scan_cityscapes(root)
    assert account.without_image == strays
    assert "aachen_000009_000019" not in samples(found)


def test_the_same_frame_in_two_downloads_is_refused(tmp_path: Path) -> None:
    root = cityscapes(tmp_path, UNZIPPED)
    frame = "train/aachen/aachen_000000_000019_leftImg8bit.png"
    copy = photo(root / "leftImg8bit_trainvaltest/leftImg8bit" / frame, 9)
    assert refusal(scan_cityscapes, root) == (
        f"aachen_000000_000019 is there twice: {root / 'leftImg8bit' / frame} and {copy}; keep one copy"
    )


def test_a_link_to_a_download_is_the_same_frame_and_fine(tmp_path: Path) -> None:
    root = cityscapes(tmp_path, DOWNLOADS)
    (root / "leftImg8bit").symlink_to(root / DOWNLOADS["images"])
    assert scan_cityscapes(root)[1].images == 4


def test_the_hidden_files_of_a_mac_are_no_images(tmp_path: Path) -> None:
    root = cityscapes(tmp_path, UNZIPPED)
    for name in ("leftImg8bit/val/lindau/._lindau_000000_000019_leftImg8bit.png",
                 "gtFine/val/lindau/._lindau_000000_000019_gtFine_labelIds.png"):  # fmt: skip
        (root / name).write_bytes(b"Mac OS X")
    found, account = scan_cityscapes(root, ["val"])
    assert [s.sample_id for s in found.samples] == ["lindau_000000_000019"]
    assert account.unreadable == account.without_image == []


def test_a_folder_without_cityscapes_says_what_was_expected(tmp_path: Path) -> None:
    assert refusal(scan_cityscapes, tmp_path, ["val"]) == (
        f"no Cityscapes images of split val under {tmp_path}: expected files like"
        " leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    )


def test_an_unknown_split_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    assert refusal(scan_cityscapes, tmp_path, ["trainextra"]) == (
        "unknown split 'trainextra': Cityscapes has train, val, test, train_extra"
    )
    assert refusal(scan_mapillary, tmp_path, ["train"]) == (
        "unknown split 'train': Mapillary has training, validation, testing"
    )


# --- any folder -------------------------------------------------------------------------------------------------------


def test_a_folder_is_searched_deeply_and_unlabelled_images_are_fine(tmp_path: Path) -> None:
    images, labels, coarse = tmp_path / "images", tmp_path / "labels", tmp_path / "coarse"
    for name in ("monday/cam1/a.png", "monday/cam1/b.JPG", "monday/c.webp", "drive7_000010.jpeg", "x.y.png"):
        photo(images / name)
    (images / "notes.txt").write_text("rain")
    (images / ".thumbnail.png").write_bytes(b"")
    fine = [label(labels / "monday/cam1/a.png"), label(labels / "x.y.png")]
    rough = [label(coarse / "monday/cam1/a.png"), label(coarse / "monday/c.png")]
    found, account = scan_folder(images, labels, coarse, CAMVID)
    assert [(s.sample_id, s.group, s.source, s.label, s.coarse_label) for s in found.samples] == [
        ("drive7_000010", "drive7", "none", None, None),
        ("monday/c", "monday", "coarse", rough[1], rough[1]),
        ("monday/cam1/a", "monday/cam1", "fine", fine[0], rough[0]),
        ("monday/cam1/b", "monday/cam1", "none", None, None),
        ("x.y", "", "fine", fine[1], None),
    ]
    assert [s.image.name for s in found.samples] == ["drive7_000010.jpeg", "c.webp", "a.png", "b.JPG", "x.y.png"]
    assert {(s.height, s.width, s.split, s.label_ids, s.weight) for s in found.samples} == {(6, 8, "", "train", 1.0)}
    assert (account.images, account.coarse) == (5, 2)
    assert account.sources == {"fine": 2, "coarse": 1, "none": 2}


def test_images_alone_are_enough(tmp_path: Path) -> None:
    photo(tmp_path / "a.png", size=(5, 4))
    photo(tmp_path / "b.png", size=(3, 9))
    found, account = scan_folder(tmp_path, None, None, CAMVID)
    assert [(s.sample_id, s.height, s.width, s.source) for s in found.samples] == [
        ("a", 4, 5, "none"),
        ("b", 9, 3, "none"),
    ]
    assert account.sizes == {(4, 5): 1, (9, 3): 1}


def test_a_relative_folder_gives_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo(tmp_path / "images/a.png")
    label(tmp_path / "labels/a.png")
    monkeypatch.chdir(tmp_path)
    (sample,) = scan_folder(Path("images"), Path("labels"), None, CAMVID)[0].samples
    assert (sample.image, sample.label) == (tmp_path / "images/a.png", tmp_path / "labels/a.png")


def test_folder_labels_are_paired_by_name_when_some_in_the_middle_are_missing(tmp_path: Path) -> None:
    for i in range(11):
        photo(tmp_path / f"images/frame{i}.png", i)
    for i in (10, 2, 8, 0, 9):
        label(tmp_path / f"labels/frame{i}.png", i)
    found, _ = scan_folder(tmp_path / "images", tmp_path / "labels", None, CAMVID)
    assert {s.sample_id for s in found.labelled} == {"frame0", "frame2", "frame8", "frame9", "frame10"}
    for sample in found.labelled:
        assert sample.label is not None
        assert read_image(sample.image)[0, 0, 0] == read_label(sample.label, CAMVID, "train")[0, 0]


def test_a_label_without_its_image_is_reported_and_not_used(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    label(tmp_path / "labels/a.png")
    stray = label(tmp_path / "labels/b.png")
    found, account = scan_folder(tmp_path / "images", tmp_path / "labels", None, CAMVID)
    assert [s.sample_id for s in found.samples] == ["a"]
    assert account.without_image == [stray]


def test_two_images_that_share_a_stem_are_refused(tmp_path: Path) -> None:
    first, second = photo(tmp_path / "day/a.jpg"), photo(tmp_path / "day/a.png")
    assert refusal(scan_folder, tmp_path, None, None, CAMVID) == (
        f"{first} and {second} share a stem: which label is whose?"
    )


def test_the_same_stem_in_two_folders_is_two_samples(tmp_path: Path) -> None:
    for day in ("monday", "tuesday"):
        photo(tmp_path / "images" / day / "a.png")
        label(tmp_path / "labels" / day / "a.png")
    found, _ = scan_folder(tmp_path / "images", tmp_path / "labels", None, CAMVID)
    assert [(s.sample_id, s.label) for s in found.samples] == [
        (f"{day}/a", tmp_path / "labels" / day / "a.png") for day in ("monday", "tuesday")
    ]


@pytest.mark.parametrize("which", ["fine", "coarse"])
def test_a_folder_of_labels_that_matches_nothing_is_refused_with_what_would(tmp_path: Path, which: str) -> None:
    images, labels = tmp_path / "images", tmp_path / "labels"
    photo(images / "a.png")
    label(labels / "a_gt.png")
    arguments = (images, labels, None) if which == "fine" else (images, None, labels)
    assert refusal(scan_folder, *arguments, CAMVID) == (
        f"none of the 1 labels under {labels} has the relative path and stem of an image under {images}:"
        f" expected e.g. {labels}/a.png"
    )


def test_a_label_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    for name in "abc":
        photo(tmp_path / f"images/{name}.png", size=(8, 6))
        label(tmp_path / f"labels/{name}.png", size=(8, 6) if name == "a" else (6, 8))
    assert refusal(scan_folder, tmp_path / "images", tmp_path / "labels", None, CAMVID) == (
        f"{tmp_path}/labels/b.png: the label is 6 x 8 but its image 8 x 6 pixels (and 1 more labels):"
        " repair or remove it, or name the right label space and ids"
    )


def test_a_coarse_label_of_another_size_is_refused_too(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    label(tmp_path / "labels/a.png")
    label(tmp_path / "coarse/a.png", size=(9, 6))
    assert refusal(scan_folder, tmp_path / "images", tmp_path / "labels", tmp_path / "coarse", CAMVID).startswith(
        f"{tmp_path}/coarse/a.png: the label is 9 x 6 but its image 8 x 6 pixels:"
    )


@pytest.mark.parametrize(
    ("class_id", "mode", "reason"),
    [
        pytest.param(11, "L", "ids [11] are not in label space 'camvid' (train ids)", id="unknown id"),
        pytest.param(0, "RGB", "mode RGB, 8 bits: expected 8-bit grey or palette PNG", id="colours"),
        pytest.param(0, "I;16", "mode I;16, 16 bits: expected 8-bit grey or palette PNG", id="16 bits"),
    ],
)
def test_labels_that_cannot_be_used_are_refused_now_and_not_in_training(
    tmp_path: Path, class_id: int, mode: str, reason: str
) -> None:
    photo(tmp_path / "images/a.png")
    broken = label(tmp_path / "labels/a.png", class_id, mode=mode)
    message = refusal(scan_folder, tmp_path / "images", tmp_path / "labels", None, CAMVID)
    assert message.startswith(f"{broken}: {reason}")
    assert message.endswith(": repair or remove it, or name the right label space and ids")


def test_source_ids_are_checked_and_recorded_as_such(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    label(tmp_path / "labels/a.png", 33)
    found, _ = scan_folder(tmp_path / "images", tmp_path / "labels", None, CITYSCAPES, "source")
    assert [s.label_ids for s in found.samples] == ["source"]
    assert "ids [33] are not in label space 'cityscapes' (train ids)" in refusal(
        scan_folder, tmp_path / "images", tmp_path / "labels", None, CITYSCAPES, "train"
    )


def test_an_unreadable_image_is_kept_without_a_size_and_reported(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    (tmp_path / "images/b.png").write_bytes(b"half of a photo")
    label(tmp_path / "labels/b.png")
    found, account = scan_folder(tmp_path / "images", tmp_path / "labels", None, CAMVID)
    assert [(s.sample_id, s.height, s.width, s.readable) for s in found.samples] == [
        ("a", 6, 8, True),
        ("b", 0, 0, False),
    ]
    assert account.unreadable == [f"{tmp_path}/images/b.png: not a readable image (UnidentifiedImageError)"]
    assert (account.images, account.sizes) == (2, {(6, 8): 1})
    assert found.labelled == ()


@pytest.mark.parametrize(
    "scan",
    [
        pytest.param(scan_cityscapes, id="cityscapes"),
        pytest.param(scan_mapillary, id="mapillary"),
        pytest.param(lambda root: scan_folder(root, None, None, CAMVID), id="folder"),
    ],
)
def test_a_folder_that_is_none_is_refused(tmp_path: Path, scan: Any) -> None:
    assert refusal(scan, tmp_path / "gone") == f"{tmp_path}/gone is not a folder that exists"
    file = photo(tmp_path / "photo.png")
    assert refusal(scan, file) == f"{file} is not a folder"


def test_an_empty_folder_says_what_was_expected(tmp_path: Path) -> None:
    assert refusal(scan_folder, tmp_path, None, None, CAMVID) == (
        f"no images under {tmp_path}: expected files ending in .png, .jpg, .jpeg, .webp"
    )


def test_a_missing_folder_of_labels_is_refused(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    assert refusal(scan_folder, tmp_path / "images", tmp_path / "labels", None, CAMVID) == (
        f"{tmp_path}/labels is not a folder that exists"
    )


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    photo(tmp_path / "disk2/a.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/drive").symlink_to(tmp_path / "disk2")
    found, _ = scan_folder(tmp_path / "images", None, None, CAMVID)
    assert [s.sample_id for s in found.samples] == ["drive/a"]


def test_progress_counts_every_sample(tmp_path: Path) -> None:
    for name in "abc":
        photo(tmp_path / f"{name}.png")
    seen: list[tuple[int, int]] = []
    scan_folder(tmp_path, None, None, CAMVID, on_file=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


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
    found, account = scan_mapillary(mapillary(tmp_path, configs, folders))
    assert [(s.sample_id, s.split, s.source, s.label, s.height, s.width) for s in found.samples] == [
        ("d4", "testing", "none", None, 6, 8),
        ("Bx1_", "training", "fine", tmp_path / "training" / expected / "Bx1_.png", 6, 8),
        ("a-2", "training", "fine", tmp_path / "training" / expected / "a-2.png", 9, 5),
        ("c3", "validation", "fine", tmp_path / "validation" / expected / "c3.png", 4, 4),
    ]
    assert (found.label_space.name, found.label_space.names) == ("mapillary", names)
    assert {s.label_ids for s in found.samples} == {"source"}
    assert account.splits == {"training": 2, "validation": 1, "testing": 1}
    assert account.sizes == {(6, 8): 2, (9, 5): 1, (4, 4): 1}


def test_mapillary_labels_become_train_ids_without_the_void(tmp_path: Path) -> None:
    found, _ = scan_mapillary(mapillary(tmp_path, {"config.json": OLD}, {"labels": 3}), ["validation"])
    (sample,) = found.samples
    assert sample.label is not None
    assert read_label(sample.label, found.label_space, "source").tolist() == [[2] * 4] * 4


def test_labels_of_another_version_are_never_read_with_this_config(tmp_path: Path) -> None:
    """Class 1 of v1.2 is not class 1 of v2.0: the ids are known and the classes wrong."""
    root = mapillary(tmp_path, {"config.json": OLD}, {"v2.0/labels": 1})
    try:
        found, _ = scan_mapillary(root)
    except BadLayout:
        return
    assert [s.label for s in found.samples] == [None] * 4


def test_a_mapillary_label_without_its_image_is_reported(tmp_path: Path) -> None:
    root = mapillary(tmp_path, {"config.json": OLD}, {"labels": 0})
    stray = label(root / "training/labels/zz.png")
    assert scan_mapillary(root)[1].without_image == [stray]


def test_mapillary_ids_beyond_its_config_are_refused(tmp_path: Path) -> None:
    root = mapillary(tmp_path, {"config.json": OLD}, {"labels": 4})
    assert refusal(scan_mapillary, root).startswith(
        f"{root}/training/labels/Bx1_.png: ids [4] are not in label space 'mapillary' (source ids) (and 2 more labels):"
    )


def test_mapillary_without_config_says_what_was_expected(tmp_path: Path) -> None:
    photo(tmp_path / "training/images/a.jpg")
    assert refusal(scan_mapillary, tmp_path) == (
        f"no config.json under {tmp_path}: expected the folder of Mapillary Vistas as unzipped"
    )


@pytest.mark.parametrize("text", ["", "[]", "{", '{"labels": [{"name": "road"}]}'])
def test_a_damaged_mapillary_config_is_named(tmp_path: Path, text: str) -> None:
    assert str(tmp_path / "config.json") in refusal(scan_mapillary, mapillary(tmp_path, {"config.json": text}, {}))


def test_mapillary_without_images_says_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(OLD)
    assert refusal(scan_mapillary, tmp_path) == (
        f"no images under {tmp_path}: expected files like {tmp_path}/training/images/NAME.jpg"
    )
