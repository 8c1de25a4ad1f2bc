"""If an image is lost in the scan, or a label that cannot be used is not reported, all that follows is built on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import label, photo, refusal

from autolabel.manifests.images import read_image, read_label
from autolabel.manifests.label_space import CAMVID, CITYSCAPES
from autolabel.manifests.scan import LAYOUTS, scan

# --- any folder -------------------------------------------------------------------------------------------------------


def test_a_folder_is_searched_deeply_and_unlabelled_images_are_fine(tmp_path: Path) -> None:
    images, labels, coarse = tmp_path / "images", tmp_path / "labels", tmp_path / "coarse"
    for name in ("monday/cam1/a.png", "monday/cam1/b.JPG", "monday/c.webp", "drive7_000010.jpeg", "x.y.png"):
        photo(images / name)
    (images / "notes.txt").write_text("rain")
    (images / ".thumbnail.png").write_bytes(b"")
    fine = [label(labels / "monday/cam1/a.png"), label(labels / "x.y.png")]
    rough = [label(coarse / "monday/cam1/a.png"), label(coarse / "monday/c.png")]
    found, account = scan(images, layout="folder", labels=labels, coarse=coarse, label_space=CAMVID)
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


def test_a_folder_of_images_without_labels_is_scanned(tmp_path: Path) -> None:
    photo(tmp_path / "a.png", size=(5, 4))
    photo(tmp_path / "b.png", size=(3, 9))
    found, account = scan(tmp_path, layout="folder", label_space=CAMVID)
    assert [(s.sample_id, s.height, s.width, s.source) for s in found.samples] == [
        ("a", 4, 5, "none"),
        ("b", 9, 3, "none"),
    ]
    assert account.sizes == {(4, 5): 1, (9, 3): 1}


def test_a_relative_folder_gives_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo(tmp_path / "images/a.png")
    label(tmp_path / "labels/a.png")
    monkeypatch.chdir(tmp_path)
    (sample,) = scan(Path("images"), layout="folder", labels=Path("labels"), label_space=CAMVID)[0].samples
    assert (sample.image, sample.label) == (tmp_path / "images/a.png", tmp_path / "labels/a.png")


def test_folder_labels_are_paired_by_name_when_some_in_the_middle_are_missing(tmp_path: Path) -> None:
    for i in range(11):
        photo(tmp_path / f"images/frame{i}.png", i)
    for i in (10, 2, 8, 0, 9):
        label(tmp_path / f"labels/frame{i}.png", i)
    found, _ = scan(tmp_path / "images", layout="folder", labels=tmp_path / "labels", label_space=CAMVID)
    assert {s.sample_id for s in found.labelled} == {"frame0", "frame2", "frame8", "frame9", "frame10"}
    for sample in found.labelled:
        assert sample.label is not None
        assert read_image(sample.image)[0, 0, 0] == read_label(sample.label, CAMVID, ids="train")[0, 0]


def test_a_label_without_its_image_is_reported_and_not_used(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    label(tmp_path / "labels/a.png")
    stray = label(tmp_path / "labels/b.png")
    found, account = scan(tmp_path / "images", layout="folder", labels=tmp_path / "labels", label_space=CAMVID)
    assert [s.sample_id for s in found.samples] == ["a"]
    assert account.without_image == [stray]


def test_two_images_that_share_a_stem_are_refused(tmp_path: Path) -> None:
    first, second = photo(tmp_path / "day/a.jpg"), photo(tmp_path / "day/a.png")
    assert refusal(tmp_path, layout="folder", label_space=CAMVID) == (
        f"{first} and {second} share a stem: which label is whose?"
    )


def test_the_same_stem_in_two_folders_is_two_samples(tmp_path: Path) -> None:
    for day in ("monday", "tuesday"):
        photo(tmp_path / "images" / day / "a.png")
        label(tmp_path / "labels" / day / "a.png")
    found, _ = scan(tmp_path / "images", layout="folder", labels=tmp_path / "labels", label_space=CAMVID)
    assert [(s.sample_id, s.label) for s in found.samples] == [
        (f"{day}/a", tmp_path / "labels" / day / "a.png") for day in ("monday", "tuesday")
    ]


@pytest.mark.parametrize("which", ["fine", "coarse"])
def test_a_folder_of_labels_that_matches_nothing_is_refused_with_what_would(tmp_path: Path, which: str) -> None:
    images, labels = tmp_path / "images", tmp_path / "labels"
    photo(images / "a.png")
    label(labels / "a_gt.png")
    given: dict[str, Any] = {"labels" if which == "fine" else "coarse": labels}
    assert refusal(images, **given, label_space=CAMVID) == (
        f"none of the 1 labels under {labels} has the relative path and stem of an image under {images}:"
        f" expected e.g. {labels}/a.png; their names are longer by '_gt': try --suffix _gt"
    )


def test_a_label_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    for name in "abc":
        photo(tmp_path / f"images/{name}.png", size=(8, 6))
        label(tmp_path / f"labels/{name}.png", size=(8, 6) if name == "a" else (6, 8))
    assert refusal(tmp_path / "images", labels=tmp_path / "labels", label_space=CAMVID) == (
        f"{tmp_path}/labels/b.png: the label is 6 x 8 but its image 8 x 6 pixels; one of them lies on its side:"
        " is the image turned by its EXIF? (and 1 more labels):"
        " repair or remove it, or name the right label space and ids"
    )


def test_a_coarse_label_of_another_size_is_refused_too(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    label(tmp_path / "labels/a.png")
    label(tmp_path / "coarse/a.png", size=(9, 6))
    assert refusal(
        tmp_path / "images", labels=tmp_path / "labels", coarse=tmp_path / "coarse", label_space=CAMVID
    ).startswith(f"{tmp_path}/coarse/a.png: the label is 9 x 6 but its image 8 x 6 pixels:")


@pytest.mark.parametrize(
    ("class_id", "mode", "reason"),
    [
        pytest.param(11, "L", "ids [11] are not in label space 'camvid' (train ids)", id="unknown id"),
        pytest.param(0, "RGB", "mode RGB, 8 bits: expected 8-bit grey or palette PNG", id="colours"),
        pytest.param(0, "I;16", "mode L, 16 bits: expected 8-bit grey or palette PNG", id="16 bits"),
    ],
)
def test_labels_that_cannot_be_used_are_refused_now_and_not_in_training(
    tmp_path: Path, class_id: int, mode: str, reason: str
) -> None:
    photo(tmp_path / "images/a.png")
    broken = label(tmp_path / "labels/a.png", class_id, mode=mode)
    message = refusal(tmp_path / "images", labels=tmp_path / "labels", label_space=CAMVID)
    assert message.startswith(f"{broken}: {reason}")
    assert message.endswith(": repair or remove it, or name the right label space and ids")


def test_source_ids_are_checked_and_recorded_as_such(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    label(tmp_path / "labels/a.png", 33)
    found, _ = scan(
        tmp_path / "images", layout="folder", labels=tmp_path / "labels", label_space=CITYSCAPES, label_ids="source"
    )
    assert [s.label_ids for s in found.samples] == ["source"]
    assert "ids [33] are not in label space 'cityscapes' (train ids)" in refusal(
        tmp_path / "images", labels=tmp_path / "labels", label_space=CITYSCAPES, label_ids="train"
    )


def test_an_unreadable_image_is_kept_without_a_size_and_reported(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    (tmp_path / "images/b.png").write_bytes(b"half of a photo")
    label(tmp_path / "labels/b.png")
    found, account = scan(tmp_path / "images", layout="folder", labels=tmp_path / "labels", label_space=CAMVID)
    assert [(s.sample_id, s.height, s.width, s.readable) for s in found.samples] == [
        ("a", 6, 8, True),
        ("b", 0, 0, False),
    ]
    assert account.unreadable == [f"{tmp_path}/images/b.png: not a PNG, JPEG, WebP, BMP or TIFF file"]
    assert (account.images, account.sizes) == (2, {(6, 8): 1})
    assert found.labelled == ()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_that_is_none_is_refused(tmp_path: Path, layout: str) -> None:
    assert refusal(tmp_path / "gone", layout=layout) == f"{tmp_path}/gone is not a folder that exists"
    file = photo(tmp_path / "photo.png")
    assert refusal(file, layout=layout) == f"{file} is not a folder"


def test_an_empty_folder_says_what_was_expected(tmp_path: Path) -> None:
    assert refusal(tmp_path, layout="folder", label_space=CAMVID) == (
        f"no images under {tmp_path}: expected files ending in .png, .jpg, .jpeg, .jfif, .jpe, .webp, .bmp, .tif, .tiff"
    )


def test_a_missing_folder_of_labels_is_refused(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    assert refusal(tmp_path / "images", labels=tmp_path / "labels", label_space=CAMVID) == (
        f"{tmp_path}/labels is not a folder that exists"
    )


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    photo(tmp_path / "disk2/a.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/drive").symlink_to(tmp_path / "disk2")
    found, _ = scan(tmp_path / "images", layout="folder", label_space=CAMVID)
    assert [s.sample_id for s in found.samples] == ["drive/a"]


def test_progress_counts_every_sample(tmp_path: Path) -> None:
    for name in "abc":
        photo(tmp_path / f"{name}.png")
    seen: list[tuple[int, int]] = []
    scan(tmp_path, layout="folder", label_space=CAMVID, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# --- guessing the layout ----------------------------------------------------------------------------------------------


def cityscapes(root: Path) -> Path:
    return photo(root / "leftImg8bit/val/lindau/lindau_000000_000019_leftImg8bit.png").parents[3]


def mapillary(root: Path) -> Path:
    photo(root / "training/images/a.jpg")
    (root / "config.json").write_text('{"labels": [{"name": "road", "color": [9, 9, 9]}], "version": "1.2"}')
    return root


def layout_of(root: Path, **options: Any) -> tuple[str, Path]:
    _, account = scan(root, **options)
    return account.listing.layout, account.listing.root


def test_cityscapes_and_mapillary_are_recognised_from_their_folders(tmp_path: Path) -> None:
    assert layout_of(cityscapes(tmp_path / "a")) == ("cityscapes", tmp_path / "a")
    assert layout_of(mapillary(tmp_path / "b")) == ("mapillary", tmp_path / "b")


def test_a_data_set_two_folders_down_is_found(tmp_path: Path) -> None:
    root = mapillary(tmp_path / "data" / "vistas")
    assert layout_of(tmp_path) == ("mapillary", root)


def test_images_alone_get_the_classes_of_cityscapes_and_the_account_says_so(tmp_path: Path) -> None:
    photo(tmp_path / "monday/a.png")
    found, account = scan(tmp_path)
    assert [s.sample_id for s in found.samples] == ["monday/a"] and found.label_space == CITYSCAPES
    assert (
        account.lines()[-1]
        == "  No label space was named, so 'cityscapes' is written down; --label-space names another."
    )
    found, account = scan(tmp_path, label_space=CAMVID)
    assert found.label_space == CAMVID and not account.assumed_space


def test_images_beside_labels_are_paired_and_need_a_label_space(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    fine, rough = label(tmp_path / "labels/a.png"), label(tmp_path / "coarse/a.png")
    (sample,) = scan(tmp_path, label_space=CAMVID)[0].samples
    assert (sample.label, sample.coarse_label) == (fine, rough)
    assert refusal(tmp_path) == f"{tmp_path}/labels holds labels: name their classes with --label-space"


def test_named_labels_make_any_folder_a_folder_of_images(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    label(tmp_path / "elsewhere/a.png")
    assert layout_of(tmp_path, coarse=tmp_path / "elsewhere", label_space=CAMVID) == ("folder", tmp_path)


def test_a_folder_that_holds_several_data_sets_is_refused_with_their_names(tmp_path: Path) -> None:
    first, second = cityscapes(tmp_path / "city"), mapillary(tmp_path / "vistas")
    assert refusal(tmp_path) == (
        f"{tmp_path} holds 2 data sets: {first} (cityscapes), {second} (mapillary); scan one of them"
    )
    mapillary(first)
    assert refusal(first) == f"{first} holds 2 data sets: {first} (cityscapes), {first} (mapillary); scan one of them"


def test_other_images_beside_a_data_set_are_refused_and_named(tmp_path: Path) -> None:
    root, loose = cityscapes(tmp_path / "city"), photo(tmp_path / "drive/a.png")
    assert refusal(tmp_path) == (
        f"{tmp_path} holds a data set, {root} (cityscapes), and other images, such as {loose}:"
        " scan a folder that holds one of them"
    )


def test_a_folder_without_an_image_says_which_layouts_were_tried(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("rain")
    (tmp_path / ".hidden").mkdir()
    photo(tmp_path / ".hidden/a.png")
    assert refusal(tmp_path) == (
        f"no images under {tmp_path}; tried Cityscapes (leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png), Mapillary Vistas"
        " (config.json and training/images/NAME.jpg), images/ beside labels/ or coarse/, any folder of .png, .jpg,"
        " .jpeg, .jfif, .jpe, .webp, .bmp, .tif, .tiff"
    )


def test_a_guessed_folder_of_which_no_image_can_be_read_is_refused(tmp_path: Path) -> None:
    for name in ("gtFine/val/lindau/a_labelIds.png", "gtFine/val/lindau/b_labelIds.png"):
        label(tmp_path / name)
    assert refusal(tmp_path) == (
        f"none of the 2 images under {tmp_path} can be read; the first is {tmp_path}/gtFine/val/lindau/a_labelIds.png:"
        " mode L, 8 bits: expected 8-bit RGB; it may be a label; save a photograph as RGB, or as a grey JPEG"
    )


def test_options_that_do_not_fit_the_layout_are_refused(tmp_path: Path) -> None:
    city, images = cityscapes(tmp_path / "city"), photo(tmp_path / "drive/a.png").parent
    assert refusal(images, splits=["val"]) == (
        f"{images} is a folder of images, which has no splits: leave out the split 'val'"
    )
    assert refusal(city, layout="cityscapes", coarse=images) == (
        f"layout cityscapes has label folders of its own: leave out {images}"
    )
    assert refusal(city, label_space=CAMVID) == (
        f"{city} holds a data set in the layout of cityscapes, whose classes are those of label space 'cityscapes',"
        " not 'camvid': leave out the label space, or scan its images alone with --layout folder"
    )
    assert (
        refusal(images, layout="kitti") == "unknown layout 'kitti': expected one of auto, cityscapes, mapillary, folder"
    )


# --- runs that lie inside ---------------------------------------------------------------------------------------------


def run_folder(root: Path) -> Path:
    root.mkdir(parents=True)
    (root / "run.json").write_text("{}")
    photo(root / "report/pictures-0/a.webp")
    label(root / "labels/a.png")
    return root


@pytest.mark.parametrize("layout", ["auto", "folder"])
def test_the_files_of_runs_inside_are_left_out_and_the_account_says_so(tmp_path: Path, layout: str) -> None:
    photo(tmp_path / "drive/a.png")
    before, _ = scan(tmp_path, layout=layout, label_space=CAMVID)
    runs = [run_folder(tmp_path / "drive/again"), run_folder(tmp_path / "runs/auto")]
    after, account = scan(tmp_path, layout=layout, label_space=CAMVID)
    assert after.samples == before.samples
    assert account.skipped_runs == runs
    assert account.lines()[-1] == f"  run folders skipped  2: {runs[0]} and 1 more"


def test_a_data_set_beside_runs_is_the_only_one(tmp_path: Path) -> None:
    root, run = cityscapes(tmp_path / "city"), run_folder(tmp_path / "runs/auto")
    assert layout_of(tmp_path) == ("cityscapes", root)
    assert scan(tmp_path)[1].skipped_runs == [run]


def test_a_run_itself_is_refused_and_its_manifest_named(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    assert refusal(run) == f"{run} is a run: its automatic labels are listed in {run}/manifest.parquet"
