"""Every file of a folder is a sample or has a line that says why not. If this fails, images are lost without a word."""

from __future__ import annotations

import os
import random
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import autolabel, refused
from PIL import Image
from tiny import label, photo, refusal

from autolabel.manifests.account import Account
from autolabel.manifests.images import read_label
from autolabel.manifests.label_space import CAMVID
from autolabel.manifests.samples import load_manifest
from autolabel.manifests.scan import scan
from autolabel.manifests.walk import (
    BESIDE,
    CIRCLES,
    HIDDEN,
    NAMES,
    RUNS,
    STRAYS,
    TWINS,
    UNUSED,
    BadLayout,
    common_end,
    is_holdable,
)


def aside(account: Account) -> dict[str, tuple[int, str]]:
    """Reason -> (number, first) of what was left aside."""
    return {reason: (int(number), first) for reason, number, first in account.listing.aside.table().rows}


# --- what is left aside -----------------------------------------------------------------------------------------------


HIDDEN_PLACES = (
    ".ipynb_checkpoints/a-checkpoint.png", ".thumbnails/a.png", ".Trash-1000/files/a.png", "@eaDir/a.png",
    "__MACOSX/._a.png", "lost+found/a.png", "sub/.cache/a.png", ".hidden.png", "._a.png",
)  # fmt: skip


@pytest.mark.parametrize("place", HIDDEN_PLACES)
@pytest.mark.parametrize("which", ["images", "labels", "coarse"])
def test_nothing_in_a_hidden_place_is_an_image_or_a_label(tmp_path: Path, which: str, place: str) -> None:
    images, labels, coarse = tmp_path / "images", tmp_path / "labels", tmp_path / "coarse"
    for folder, make in ((images, photo), (labels, label), (coarse, label)):
        make(folder / "a.png")
        make(folder / "sub/b.png")
    hidden = photo(tmp_path / which / place)
    found, account = scan(images, labels=labels, coarse=coarse, label_space=CAMVID)
    assert [(s.sample_id, s.label, s.coarse_label) for s in found.samples] == [
        (name, labels / f"{name}.png", coarse / f"{name}.png") for name in ("a", "sub/b")
    ]
    parts = hidden.relative_to(tmp_path / which).parts
    first = next(i for i, part in enumerate(parts) if part[0] in ".@_l")
    assert aside(account) == {HIDDEN: (1, str((tmp_path / which).joinpath(*parts[: first + 1])))}


@pytest.mark.parametrize("layout", ["cityscapes", "mapillary"])
def test_nothing_in_a_hidden_place_of_a_data_set_is_a_sample(tmp_path: Path, layout: str) -> None:
    if layout == "cityscapes":
        image = photo(tmp_path / "leftImg8bit/val/lindau/lindau_1_2_leftImg8bit.png")
        hidden = [
            photo(tmp_path / "leftImg8bit/val/.thumbnails/lindau_1_2_leftImg8bit.png").parent,
            photo(tmp_path / "leftImg8bit/val/@eaDir/lindau_3_4_leftImg8bit.png").parent,
            photo(tmp_path / "leftImg8bit/val/lindau/._lindau_1_2_leftImg8bit.png"),
        ]
    else:
        image = photo(tmp_path / "training/images/a.jpg")
        (tmp_path / "config.json").write_text('{"labels": [{"name": "road", "color": [9, 9, 9]}], "version": "1.2"}')
        hidden = [
            photo(tmp_path / "training/images/.thumbnails/a.jpg").parent,
            photo(tmp_path / "training/images/@eaDir/a.jpg").parent,
            photo(tmp_path / "training/.DS_Store.png"),
        ]
    found, account = scan(tmp_path, layout=layout)
    assert [s.image for s in found.samples] == [image]
    assert sorted(account.listing.aside.of(HIDDEN)) == sorted(hidden)


def test_every_other_file_is_counted_by_its_suffix(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "jpeg", "jfif", "jpe", "webp", "bmp", "tif", "tiff", "TIF"):
        file = tmp_path / f"{suffix}-image.{suffix}"
        form = {"jfif": "JPEG", "jpe": "JPEG"}.get(suffix)
        Image.new("RGB", (8, 6), (1, 2, 3)).save(file, form)
    for name in ("a.heic", "b.HEIC", "film.mp4", "notes.txt", "README", "x.averyverylongsuffix", "c.gif"):
        (tmp_path / name).write_bytes(b"?")
    found, account = scan(tmp_path, label_space=CAMVID)
    assert len(found.samples) == 10 and account.unreadable == []
    assert aside(account) == {
        "other files, .heic: convert them to .png or .jpg": (2, f"{tmp_path}/a.heic"),
        "other files, without a suffix": (1, f"{tmp_path}/README"),
        "other files, .gif: convert them to .png or .jpg": (1, f"{tmp_path}/c.gif"),
        "other files, .mp4": (1, f"{tmp_path}/film.mp4"),
        "other files, .txt": (1, f"{tmp_path}/notes.txt"),
        "other files, other suffixes": (1, f"{tmp_path}/x.averyverylongsuffix"),
    }


def test_runs_strays_and_circles_each_have_a_line(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    (tmp_path / "images/run").mkdir()
    (tmp_path / "images/run/run.json").write_text("{}")
    (tmp_path / "images/again").symlink_to(tmp_path / "images")
    label(tmp_path / "labels/a.png")
    label(tmp_path / "labels/b.png")
    _, account = scan(tmp_path / "images", labels=tmp_path / "labels", label_space=CAMVID)
    assert aside(account) == {
        RUNS: (1, f"{tmp_path}/images/run"),
        CIRCLES: (1, f"{tmp_path}/images/again"),
        STRAYS: (1, f"{tmp_path}/labels/b.png"),
    }


def test_two_links_that_lead_to_each_other_end_somewhere(tmp_path: Path) -> None:
    photo(tmp_path / "a/x.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "a/to-b").symlink_to(tmp_path / "b")
    (tmp_path / "b/to-a").symlink_to(tmp_path / "a")
    found, account = scan(tmp_path / "a", layout="folder", label_space=CAMVID)
    assert [s.sample_id for s in found.samples] == ["x"]
    assert aside(account) == {CIRCLES: (1, f"{tmp_path}/a/to-b/to-a")}


def test_what_a_data_set_does_not_use_has_a_line(tmp_path: Path) -> None:
    frame = "val/lindau/lindau_1_2"
    photo(tmp_path / f"leftImg8bit/{frame}_leftImg8bit.png")
    label(tmp_path / f"gtFine/{frame}_gtFine_labelIds.png", 7)
    others = [label(tmp_path / f"gtFine/{frame}_gtFine_{kind}.png") for kind in ("color", "instanceIds")]
    (tmp_path / "camera").mkdir()
    (tmp_path / "license.txt").write_text("")
    _, account = scan(tmp_path)
    assert aside(account) == {
        "files of gtFine that do not end in _gtFine_labelIds.png": (2, str(others[0])),
        UNUSED: (2, f"{tmp_path}/camera"),
    }


def test_what_lies_beside_the_data_set_that_was_found_has_a_line(tmp_path: Path) -> None:
    photo(tmp_path / "data/set/images/a.png")
    label(tmp_path / "data/set/labels/a.png")
    (tmp_path / "data/set/films").mkdir()
    (tmp_path / "data/set/.cache").mkdir()
    (tmp_path / "notes.txt").write_text("rain")
    (tmp_path / "runs/auto").mkdir(parents=True)
    (tmp_path / "runs/auto/run.json").write_text("{}")
    _, account = scan(tmp_path, label_space=CAMVID)
    assert aside(account) == {
        BESIDE: (2, f"{tmp_path}/data/set/films"),
        HIDDEN: (1, f"{tmp_path}/data/set/.cache"),
        RUNS: (1, f"{tmp_path}/runs/auto"),
    }


def test_a_folder_without_label_pngs_is_refused(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    photo(tmp_path / "labels/a.jpg")
    options: dict[str, Any] = {"labels": tmp_path / "labels", "label_space": CAMVID}
    assert refusal(tmp_path / "images", **options) == f"no labels under {tmp_path}/labels: expected PNGs"
    label(tmp_path / "labels/a.png")
    assert refusal(tmp_path / "images", **options, suffix="_m") == (
        f"no labels under {tmp_path}/labels: expected PNGs whose names end in _m"
    )


CLUTTER = (
    "x.txt", "y.heic", "z.png", ".h.png", "@eaDir/q.png", "more/w.png", "run/run.json", "a\\b.png", "README",
    "v2.0/labels/n.png", "lost+found/f", "labels/stray.png", "images/again.png",
)  # fmt: skip


def clutter(root: Path, dice: random.Random) -> None:
    """Put files and folders of many kinds anywhere below a folder."""
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    for _ in range(12):
        folder = dice.choice(folders)
        file = folder / dice.choice(CLUTTER)
        if dice.random() < 0.1:
            (folder / f"loop{dice.random()}").symlink_to(root)
        elif not file.exists():
            is_label = {"labels", "gtFine", "gtCoarse"} & {*folder.parts}
            make = label if is_label else photo if file.suffix == ".png" else None
            file.parent.mkdir(parents=True, exist_ok=True)
            make(file) if make and file.suffix == ".png" else file.write_text("{}")


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such names")
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("layout", ["folder", "pairs", "cityscapes", "mapillary", "one split", "deeper"])
def test_every_file_below_the_folder_is_in_a_sample_or_has_a_line(tmp_path: Path, layout: str, seed: int) -> None:
    root, options = tmp_path / "data", dict[str, Any]()
    if layout in ("cityscapes", "one split"):
        for frame in ("val/lindau/lindau_1_2", "train/aachen/aachen_1_2", "test/bonn/bonn_1_2"):
            photo(root / f"leftImg8bit/{frame}_leftImg8bit.png")
            label(root / f"gtFine_trainvaltest/gtFine/{frame}_gtFine_labelIds.png", 7)
            label(root / f"gtCoarse/{frame}_gtCoarse_labelIds.png", 7)
        options = {"layout": "cityscapes", "splits": ["val"] if layout == "one split" else []}
    elif layout == "mapillary":
        for split, name in (("training", "a"), ("validation", "b")):
            photo(root / split / f"images/{name}.jpg")
            label(root / split / f"labels/{name}.png")
        (root / "config.json").write_text('{"labels": [{"name": "road", "color": [9, 9, 9]}], "version": "1.2"}')
        options = {"layout": "mapillary"}
    else:
        place = root / "set" if layout == "deeper" else root
        photo(place / "images/a.png")
        label(place / "labels/a.png")
        options = {"label_space": CAMVID}
        options |= {"layout": "folder", "labels": root / "images/labels"} if layout == "folder" else {}
    if layout == "folder":
        label(root / "images/labels/a.png")
        root = root / "images"
    clutter(root, random.Random(f"{layout}{seed}"))
    try:
        manifest, account = scan(root, **options)
    except (BadLayout, ValueError) as error:
        refusals = "share a stem|other images, such as|none of the|is a run|data sets|listed 2 times"
        assert re.search(refusals, str(error)), error
        return
    used = {path for s in manifest.samples for path in (s.image, s.label, s.coarse_label)} | {root / "config.json"}
    noted = {path for reason in aside(account) for path in account.listing.aside.of(reason)}
    files = {Path(folder, name) for folder, _, names in os.walk(root) for name in names}
    assert {f for f in files if f not in used and not noted & {f, *f.parents}} == set()


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such names")
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        pytest.param(b"stra\xdfe.png", "stra\\xdfe.png", id="not UTF-8"),
        pytest.param(b"\xff\xfe/a.png", "\\xff\\xfe", id="a folder that is not UTF-8"),
    ],
)
def test_a_name_that_no_manifest_can_hold_costs_one_file(tmp_path: Path, name: bytes, shown: str) -> None:
    photo(tmp_path / "images/ok.png")
    bad = os.path.join(os.fsencode(tmp_path), b"images", name)
    os.makedirs(os.path.dirname(bad), exist_ok=True)
    with open(bad, "wb") as file:
        file.write((tmp_path / "images/ok.png").read_bytes())
    done = autolabel("manifest", "scan", tmp_path / "images", "-o", tmp_path / "m.parquet")
    assert done.exit_code == 0, done.output
    assert f" {NAMES}" in done.stdout and f"{tmp_path}/images/{shown}" in done.stdout
    assert [s.sample_id for s in load_manifest(tmp_path / "m.parquet").samples] == ["ok"]


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such names")
def test_strange_names_that_can_be_held_are_kept(tmp_path: Path) -> None:
    names = (
        "a b",
        "a\\b",
        "c:d*e",
        "[2024] x",
        "x#1?%20",
        "-rf",
        "a\nb",
        "图像",
        "<b>&'\"",
        "aa:d*e",
        "..a",
        "con",
        "aux.x",
    )
    for shade, name in enumerate(names):
        photo(tmp_path / f"drive [1]/{name}.png", shade)
    found, account = scan(tmp_path / "drive [1]", label_space=CAMVID)
    assert sorted(s.sample_id for s in found.samples) == sorted(set(names) - {"..a"})
    assert aside(account) == {HIDDEN: (1, f"{tmp_path}/drive [1]/..a.png")}


@pytest.mark.parametrize(
    "name", ["ok.png", "é.png", "aa:b.png", "a\\b" if os.name == "posix" else "ab", "a..b", "%", " "]
)
def test_ordinary_names_can_be_held(name: str) -> None:
    assert is_holdable(name)


@pytest.mark.parametrize("name", ["\udcdf.png", "..", "a/../b", "", "a\0b"])
def test_names_that_leave_their_root_or_are_no_text_cannot_be_held(name: str) -> None:
    assert not is_holdable(name)


NAME = "Müllerstraße_é"


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_images_and_labels_are_paired_however_their_letters_are_composed(
    tmp_path: Path, forms: tuple[str, str]
) -> None:
    image, mask = (unicodedata.normalize(form, NAME) for form in forms)
    photo(tmp_path / f"images/{image}/{image}.png")
    fine = label(tmp_path / f"labels/{mask}/{mask}.png")
    found, account = scan(tmp_path / "images", labels=tmp_path / "labels", label_space=CAMVID)
    assert [(s.sample_id, s.label) for s in found.samples] == [(unicodedata.normalize("NFC", f"{NAME}/{NAME}"), fine)]
    assert aside(account) == {}


def test_of_two_names_that_look_alike_one_is_left_aside(tmp_path: Path) -> None:
    forms = [unicodedata.normalize(form, NAME) for form in ("NFD", "NFC")]
    files = sorted(photo(tmp_path / f"{name}.png", shade) for shade, name in enumerate(forms))
    found, account = scan(tmp_path, label_space=CAMVID)
    assert [s.image for s in found.samples] == [files[0]]
    assert aside(account) == {TWINS: (1, str(files[1]))}


def test_names_that_differ_in_capitals_alone_are_told(tmp_path: Path) -> None:
    for shade, name in enumerate(("a", "b", "B", "c")):
        photo(tmp_path / f"images/{name}.png", shade)
    label(tmp_path / "labels/a.png")
    label(tmp_path / "labels/C.png")
    found, account = scan(tmp_path / "images", labels=tmp_path / "labels", label_space=CAMVID)
    assert [s.sample_id for s in found.samples] == ["B", "a", "b", "c"]
    assert account.suspicions[-1] == (
        "2 names differ in capitals alone, such as 'B' and 'b': on macOS and Windows they are one file"
    )
    assert aside(account) == {
        STRAYS: (1, f"{tmp_path}/labels/C.png"),
        "labels whose names differ from an image's in capitals alone": (1, f"{tmp_path}/labels/C.png"),
    }


# --- labels that are named otherwise ----------------------------------------------------------------------------------


def test_labels_with_a_suffix_are_paired_and_others_counted(tmp_path: Path) -> None:
    for name in ("day/a", "day/b"):
        photo(tmp_path / f"images/{name}.jpg")
    fine = label(tmp_path / "labels/day/a_mask.png")
    rough = label(tmp_path / "coarse/day/b_mask.png")
    other = label(tmp_path / "labels/day/b.png")
    found, account = scan(
        tmp_path / "images", labels=tmp_path / "labels", coarse=tmp_path / "coarse", suffix="_mask", label_space=CAMVID
    )
    assert [(s.sample_id, s.label) for s in found.samples] == [("day/a", fine), ("day/b", rough)]
    assert aside(account) == {"labels whose names do not end in '_mask'": (1, str(other))}


def test_labels_between_the_images_are_no_images(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    fine = label(tmp_path / "a_mask.png")
    found, _ = scan(tmp_path, labels=tmp_path, suffix="_mask", label_space=CAMVID)
    assert [(s.sample_id, s.label) for s in found.samples] == [("a", fine)]


def test_a_folder_of_labels_inside_the_images_holds_no_images(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    fine = label(tmp_path / "masks/a.png")
    found, account = scan(tmp_path, labels=tmp_path / "masks", label_space=CAMVID)
    assert [(s.sample_id, s.label) for s in found.samples] == [("a", fine)]
    assert aside(account) == {}


@pytest.mark.parametrize(
    ("images", "labels", "end"),
    [
        (["a", "b"], ["a_mask", "b_mask"], "_mask"),
        (["d/a"], ["d/a_train_id"], "_train_id"),
        (["a", "ab"], ["a_x", "ab_x"], "_x"),
        (["a"], ["b_mask"], ""),
        (["a", "b", "c"], ["a_1", "b_2", "c_3"], ""),
    ],
)
def test_the_suffix_that_most_labels_have_is_found(images: list[str], labels: list[str], end: str) -> None:
    assert common_end(images, labels) == end


def test_a_suffix_without_labels_is_refused(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    assert refusal(tmp_path, layout="folder", suffix="_mask") == (
        "suffix '_mask' is for labels: name their folder with --labels or --coarse"
    )


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_a_csv_pairs_files_of_any_names(tmp_path: Path) -> None:
    first, second = photo(tmp_path / "data/x/1.png", 1), photo(tmp_path / "data/x/2.png", 2)
    fine, rough = label(tmp_path / "data/y/one.png", 3), label(tmp_path / "lists/two.png", 4)
    spare = photo(tmp_path / "data/x/3.png")
    table = tmp_path / "lists/pairs.csv"
    table.write_text(f"\ufeffimage,label,coarse\nx/1.png,y/one.png,\n{second},,two.png\n", encoding="utf-8")
    found, account = scan(tmp_path / "data", pairs=table, label_space=CAMVID)
    assert [(s.sample_id, s.image, s.source, s.label, s.coarse_label) for s in found.samples] == [
        ("x/1", first, "fine", fine, None),
        ("x/2", second, "coarse", rough, rough),
    ]
    assert aside(account) == {"files that pairs.csv does not name": (1, str(spare))}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("", "has no column 'image': expected image, label", id="empty"),
        pytest.param("a.png,b.png\n", "has no column 'image': expected image, label", id="no header"),
        pytest.param("image,label\n", "names no images", id="header alone"),
        pytest.param("image,label\na.png\n", "line 2: 1 cells, expected 2", id="short row"),
        pytest.param("image,label\n,a.png\n", "line 2: names no image", id="no image"),
        pytest.param("image,label\na.png,\na.png,\n", "line 3: image a.png is there twice", id="twice"),
        pytest.param("image,label\nb.png,\n", "line 2: b.png does not exist under ", id="missing"),
        pytest.param("image,label\n../out.png,\n", "lies outside of ", id="outside"),
        pytest.param('image,label\n"a.png,\n', "line 2: 1 cells, expected 2", id="open quote"),
        pytest.param("image,label\n\xff,\n", "does not exist under", id="other letters"),
        pytest.param("image,label\na\0.png,\n", "", id="a NUL"),
    ],
)  # fmt: skip
def test_a_csv_that_cannot_be_used_is_refused_with_its_line(tmp_path: Path, text: str, reason: str) -> None:
    photo(tmp_path / "data/a.png")
    photo(tmp_path / "out.png")
    (tmp_path / "pairs.csv").write_text(text)
    message = refusal(tmp_path / "data", pairs=tmp_path / "pairs.csv", label_space=CAMVID)
    assert message.startswith(str(tmp_path / "pairs.csv")) and reason in message


def test_pairs_and_folders_of_labels_exclude_each_other(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    assert refusal(tmp_path, pairs=tmp_path / "p.csv", labels=tmp_path, label_space=CAMVID) == (
        f"{tmp_path}/p.csv names the labels: leave out {tmp_path}"
    )


# --- colours ----------------------------------------------------------------------------------------------------------


def test_labels_drawn_in_colours_become_samples_that_every_reader_understands(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    colours = np.zeros((6, 8, 3), np.uint8)
    colours[:3], colours[3:, :4] = CAMVID.classes[0].colour, CAMVID.classes[3].colour
    (tmp_path / "labels").mkdir()
    Image.fromarray(colours).save(tmp_path / "labels/a.png")
    options = ("--labels", tmp_path / "labels", "--label-space", "camvid", "-o", tmp_path / "m.parquet")
    assert "colours are read with --label-ids color" in refused("manifest", "scan", tmp_path / "images", *options)
    done = autolabel("manifest", "scan", tmp_path / "images", *options, "--label-ids", "color")
    assert done.exit_code == 0, done.output
    (sample,) = load_manifest(tmp_path / "m.parquet").labelled
    assert sample.label is not None and sample.label_ids == "color"
    expected = np.full((6, 8), 255, np.uint8)
    expected[:3], expected[3:, :4] = 0, 3
    assert np.array_equal(read_label(sample.label, CAMVID, ids=sample.label_ids), expected)
