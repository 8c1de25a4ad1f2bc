"""Labels to CVAT and back. If this fails, an hour of a labeller's work becomes other pixels than were painted."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sending import SPACE, random_labels, refusal, returned, same, send, street_scenes

from autolabel.manifests.formats.cvat import CvatWriter
from autolabel.manifests.formats.style import Style
from autolabel.manifests.label_space import CITYSCAPES, LabelClass, LabelSpace
from autolabel.manifests.run.shards import Label

ALL_IGNORED = {"empty": np.full((5, 8), 255, np.uint8)}


def rgb(path: Path) -> np.ndarray:  # type: ignore[type-arg]
    return np.array(Image.open(path).convert("RGB"))


def as_rgb(folder: Path) -> None:
    """Save all masks in RGB, as CVAT does."""
    for path in (folder / "SegmentationClass").rglob("*.png"):
        Image.fromarray(rgb(path)).save(path)


def plain_pieces(label: Label) -> int:
    """The number of 4-connected pieces of one class, by a plain search."""
    seen, pieces = label == 255, 0
    for start in zip(*np.nonzero(~seen), strict=True):
        if seen[start]:
            continue
        pieces += 1
        queue = deque([start])
        seen[start] = True
        while queue:
            y, x = queue.popleft()
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                inside = 0 <= near[0] < label.shape[0] and 0 <= near[1] < label.shape[1]
                if inside and not seen[near] and label[near] == label[start]:
                    seen[near] = True
                    queue.append(near)
    return pieces


def test_labels_come_back_from_the_zip_and_from_the_folder_ignore_included(tmp_path: Path) -> None:
    labels = random_labels() | ALL_IGNORED
    notes = send("cvat", labels, tmp_path / "out")
    assert notes == [
        "CVAT has no place for confidence: none is written",
        "ignored pixels are black there, no mask",
        "names have folders: CVAT keeps them if images/ is uploaded as a zip; --flat leaves them out",
    ]
    assert same(returned("cvat", tmp_path / "out"), labels)
    assert same(returned("cvat", tmp_path / "out" / "masks.zip"), labels)
    as_rgb(tmp_path / "out")
    shutil.make_archive(str(tmp_path / "task"), "zip", tmp_path, "out")  # one folder around all
    assert same(returned("cvat", tmp_path / "task.zip"), labels)
    with zipfile.ZipFile(tmp_path / "out" / "masks.zip") as zipped:
        listed = zipped.read("ImageSets/Segmentation/default.txt").decode().splitlines()
        assert listed == list(labels) and len(zipped.namelist()) == 2 + 2 * len(labels)
        assert zipped.read("labelmap.txt").decode().splitlines()[:3] == [
            "# label:color_rgb:parts:actions", "background:0,0,0::", "road:255,38,38::"
        ]  # fmt: skip
    assert {path.name for path in (tmp_path / "out" / "images").iterdir()} == {"drive 13", "drive 24", "empty.png"}


def test_a_flat_export_has_one_folder_and_the_labels_of_a_task_lie_beside_it(tmp_path: Path) -> None:
    labels = {"a/b": np.zeros((3, 4), np.uint8)}
    send("cvat", labels, tmp_path / "out", style=Style(flat=True))
    assert (tmp_path / "out" / "images" / "a__b.png").exists()
    assert same(returned("cvat", tmp_path / "out"), {"a__b": labels["a/b"]})
    assert json.loads((tmp_path / "out" / "labels.json").read_text())[0] == {
        "name": "road", "color": "#ff2626", "type": "any", "attributes": []
    }  # fmt: skip


def test_exactly_the_pixels_that_were_repainted_change(tmp_path: Path) -> None:
    labels = random_labels()
    send("cvat", labels, tmp_path / "out")
    rng = np.random.default_rng(5)
    colours = [(0, 0, 0), *(c.colour for c in SPACE.classes)]
    for name, label in labels.items():
        path = tmp_path / "out" / "SegmentationClass" / f"{name}.png"
        picture = Image.open(path).convert("RGB")
        labels[name] = label.copy()
        for _ in range(max(1, label.size // 100)):
            y, x, value = rng.integers(label.shape[0]), rng.integers(label.shape[1]), int(rng.integers(len(colours)))
            picture.putpixel((int(x), int(y)), colours[value])
            labels[name][y, x] = value - 1 if value else 255
        picture.save(path)
    assert same(returned("cvat", tmp_path / "out"), labels)


def test_every_connected_piece_is_an_object_of_its_own(tmp_path: Path) -> None:
    labels = random_labels(3, sizes=((12, 12),))
    send("cvat", labels, tmp_path)
    for name, label in labels.items():
        objects = rgb(tmp_path / "SegmentationObject" / f"{name}.png").astype(int) @ [1 << 16, 256, 1]
        assert np.array_equal(objects == 0, label == 255)
        numbers = [n for n in np.unique(objects) if n]
        assert len(numbers) == plain_pieces(label)
        for number in numbers:
            assert plain_pieces(np.where(objects == number, label, 255).astype(np.uint8)) == 1


def test_more_pieces_than_cvat_reads_are_joined_by_class_and_the_note_says_so(tmp_path: Path) -> None:
    noise = {"noise": np.random.default_rng(0).choice(np.array([0, 1, 2, 255], np.uint8), (60, 60))}
    assert send("cvat", noise, tmp_path)[-1] == (
        "1 image with more pieces than CVAT reads (255): the smallest of a class are one mask"
    )
    objects = np.array(Image.open(tmp_path / "SegmentationObject" / "noise.png"))
    assert set(np.unique(objects)) == set(range(256))
    for number in range(1, 256):
        assert len(np.unique(noise["noise"][objects == number])) == 1
    assert same(returned("cvat", tmp_path), noise)


def test_colours_that_two_classes_share_are_replaced_and_names_decide(tmp_path: Path) -> None:
    twins = LabelSpace("twins", tuple(LabelClass(name, (0, 0, 9), (i,)) for i, name in enumerate("abc")))
    labels = random_labels()
    assert "colours of their own" in send("cvat", labels, tmp_path, space=twins)[2]
    assert same(returned("cvat", tmp_path, twins), labels)
    turned = LabelSpace.named("turned", ("c", "a", "b"))
    other = np.array([1, 2, 0, *[255] * 253], np.uint8)
    assert same(returned("cvat", tmp_path, turned), {name: other[label] for name, label in labels.items()})


@pytest.mark.parametrize("name", ["a:b", " a", "#a", "a\nb", "background"])
def test_names_that_cvat_cannot_hold_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="class "):
        CvatWriter(LabelSpace.named("s", (name,)), Style())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    send("cvat", {"a": np.zeros((4, 5), np.uint8), "b": np.ones((4, 5), np.uint8)}, tmp_path / "out")
    return tmp_path / "out"


def test_unknown_colours_and_labels_are_counted_over_all_masks(out: Path) -> None:
    picture = np.zeros((4, 5, 3), np.uint8)
    picture[0] = 1, 2, 3
    picture[1, :4] = 4, 5, 6
    picture[2, :2] = 7, 8, 9
    picture[3, 0] = 9, 9, 9
    picture[3, 1:3] = 200, 0, 200
    Image.fromarray(picture).save(out / "SegmentationClass" / "a.png")
    with open(out / "labelmap.txt", "a") as file:
        file.write("ego vehicle:200,0,200::\nunused:1,1,1::\n")
    assert refusal("cvat", out) == (
        f"{out}: 14 pixels of what label space 'few' does not have: colour (1, 2, 3) (5 pixels), colour (4, 5, 6)"
        " (4 pixels), colour (7, 8, 9) (2 pixels) and others: expected its classes 'road', 'traffic light' and"
        " 'Straße'; is it of another project?"
    )


def test_a_photograph_among_the_masks_is_counted_whole(out: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(noise).save(out / "SegmentationClass" / "a.png")
    assert refusal("cvat", out).startswith(f"{out}: 2,000 pixels of what label space 'few' does not have: colour (")


def test_labels_that_occur_in_no_pixel_do_not_matter(out: Path) -> None:
    with open(out / "labelmap.txt", "a") as file:
        file.write("ego vehicle:200,0,200::\n")
    assert set(returned("cvat", out)) == {"a", "b"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("road:1,2,3::", "line 6: labels 'road' and 'road' have one colour, or one name: which is meant?"),
        ("other:255,38,38::", "line 6: labels 'road' and 'other' have one colour, or one name: which is meant?"),
        ("other:1,2::", "line 6 is 'other:1,2::': expected a label and its colour, as in 'road:128,64,128::'"),
        ("other:1,2,256::", "line 6 is 'other:1,2,256::': expected a label and its colour"),
        ("other:1,2,3\x1f4::", "line 6 is 'other:1,2,3\\x1f4::': expected a label and its colour"),
        ("other", "line 6 is 'other': expected a label and its colour"),
        ("other:::", "line 6 is 'other:::': expected a label and its colour"),
    ],
)
def test_a_labelmap_that_is_not_clear_is_refused(out: Path, line: str, message: str) -> None:
    with open(out / "labelmap.txt", "a") as file:
        file.write(line + "\n")
    assert message in refusal("cvat", out)


def test_an_archive_of_another_kind_is_refused(out: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert refusal("cvat", tmp_path / "other") == (
        f"{tmp_path / 'other'} has no folder SegmentationClass: expected CVAT's export 'Segmentation mask 1.1'"
    )
    (out / "labelmap.txt").unlink()
    assert refusal("cvat", out) == (
        f"{out} has no labelmap.txt: expected it beside SegmentationClass, where it says what colours mean"
    )


def test_damaged_and_grey_masks_are_refused_with_their_place(out: Path) -> None:
    path = out / "SegmentationClass" / "a.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    assert refusal("cvat", out).startswith(f"{path}: ")
    Image.new("L", (5, 4)).save(path)
    assert refusal("cvat", out) == f"{path}: a PNG of mode L, 8 bits: expected an RGB or palette PNG"


def test_street_scenes_come_back(tmp_path: Path) -> None:
    labels = street_scenes(2)
    send("cvat", labels, tmp_path / "out", space=CITYSCAPES)
    assert same(returned("cvat", tmp_path / "out" / "masks.zip", CITYSCAPES), labels)
