"""Labels to COCO and back, both forms. If this fails, tools that read COCO show other pixels than the labels have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sending import SPACE, random_labels, refusal, returned, same, send, street_scenes

from autolabel.manifests.label_space import CITYSCAPES, LabelSpace
from autolabel.manifests.run.shards import Label

Document = dict[str, Any]


def load(path: Path) -> Document:
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    return document


def save(path: Path, document: Document) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def counts_of(mask: np.ndarray) -> list[int]:  # type: ignore[type-arg]
    """Uncompressed run lengths down the columns, by a plain loop."""
    counts, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def test_labels_come_back_from_both_forms(tmp_path: Path) -> None:
    labels = random_labels()
    notes = send("coco", labels | {"empty": np.full((5, 8), 255, np.uint8)}, tmp_path / "out")
    assert notes == ["ignored pixels are in no annotation, and black, 0, in the panoptic PNGs"]
    assert same(returned("coco", tmp_path / "out" / "stuff.json"), labels)  # nobody has labelled the empty one
    panoptic = returned("coco", tmp_path / "out" / "panoptic.json")
    assert (panoptic.pop("empty") == 255).all() and same(panoptic, labels)


def test_annotations_say_where_how_large_and_how_certain_a_segment_is(tmp_path: Path) -> None:
    label = np.full((4, 6), 255, np.uint8)
    label[1:3, 2:5] = 1
    label[0, 0] = 0
    certain = np.full((4, 6), 51, np.uint8)
    certain[1, 2] = 255
    send("coco", {"a/b": label}, tmp_path, confidence={"a/b": certain})
    stuff, panoptic = load(tmp_path / "stuff.json"), load(tmp_path / "panoptic.json")
    assert stuff["images"] == [{"id": 1, "file_name": "a/b.png", "height": 4, "width": 6, "score": 0.2333}]
    assert stuff["categories"][1] == {
        "id": 2, "name": "traffic light", "supercategory": "stuff", "isthing": 0, "color": list(SPACE.classes[1].colour)
    }  # fmt: skip
    assert stuff["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 1, "area": 1, "bbox": [0, 0, 1, 1], "score": 0.2, "iscrowd": 0,
         "segmentation": {"size": [4, 6], "counts": "01g0"}},
        {"id": 2, "image_id": 1, "category_id": 2, "area": 6, "bbox": [2, 1, 3, 2], "score": 0.3333, "iscrowd": 0,
         "segmentation": {"size": [4, 6], "counts": "9220003"}},
    ]  # fmt: skip
    red, green, blue = SPACE.classes[1].colour
    assert panoptic["annotations"][0]["segments_info"][1] == {
        "id": red + 256 * green + 65536 * blue, "category_id": 2, "area": 6, "bbox": [2, 1, 3, 2], "iscrowd": 0
    }  # fmt: skip
    shown = np.array(Image.open(tmp_path / "panoptic" / "a" / "b.png").convert("RGB"))
    assert shown[1, 2].tolist() == [red, green, blue] and shown[3, 3].tolist() == [0, 0, 0]


def test_boxes_are_those_of_plain_loops(tmp_path: Path) -> None:
    labels = random_labels(4)
    send("coco", labels, tmp_path)
    stuff = load(tmp_path / "stuff.json")
    for annotation in stuff["annotations"]:
        label = list(labels.values())[annotation["image_id"] - 1]
        ys, xs = np.nonzero(label == annotation["category_id"] - 1)
        box = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
        assert (annotation["bbox"], annotation["area"]) == (box, len(xs))


def edited(labels: dict[str, Label]) -> dict[str, Label]:
    rng = np.random.default_rng(5)
    for name, label in labels.items():
        labels[name] = label.copy()
        for _ in range(max(1, label.size // 100)):
            place = rng.integers(label.shape[0]), rng.integers(label.shape[1])
            labels[name][place] = rng.choice(np.array([0, 1, 2, 255], np.uint8))
    return labels


def test_exactly_the_pixels_that_were_edited_in_stuff_change(tmp_path: Path) -> None:
    labels = random_labels()
    send("coco", labels, tmp_path)
    stuff = load(tmp_path / "stuff.json")
    labels, names = edited(labels), list(labels)
    annotations = []
    for image, name in enumerate(names, 1):
        for value in sorted({int(v) for v in np.unique(labels[name])} - {255}):
            mask = {"size": list(labels[name].shape), "counts": counts_of(labels[name] == value)}
            annotations.insert(0, {"id": 1, "image_id": image, "category_id": value + 1, "segmentation": mask})
    path = save(tmp_path / "edited.json", {**stuff, "annotations": annotations})
    assert same(returned("coco", path), labels)


def test_exactly_the_pixels_that_were_repainted_in_panoptic_pngs_change(tmp_path: Path) -> None:
    labels = random_labels()
    send("coco", labels, tmp_path)
    labels = edited(labels)
    panoptic = load(tmp_path / "panoptic.json")
    for annotation, (name, label) in zip(panoptic["annotations"], labels.items(), strict=True):
        picture = np.zeros((*label.shape, 3), np.uint8)
        for value in range(3):
            picture[label == value] = (value + 1, 1, 0)
        Image.fromarray(picture).save(tmp_path / "panoptic" / f"{name}.png")
        annotation["segments_info"] = [{"id": 257 + value, "category_id": value + 1} for value in range(3)]
    assert same(returned("coco", save(tmp_path / "panoptic.json", panoptic)), labels)


def document(*annotations: Document, names: tuple[str, ...] = ("road", "traffic light", "background")) -> Document:
    return {
        "images": [{"id": 7, "file_name": "a.jpg", "height": 4, "width": 6}],
        "categories": [{"id": n, "name": name} for n, name in enumerate(names)],
        "annotations": [{"image_id": 7, "category_id": 0, **annotation} for annotation in annotations],
    }


def test_later_annotations_lie_over_earlier_ones_and_background_is_ignored(tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", document(
        {"segmentation": [[0, 0, 6, 0, 6, 4, 0, 4]]},
        {"segmentation": {"size": [4, 6], "counts": [4, 8, 12]}, "category_id": 1},
        {"segmentation": [[0, 0, 2, 0, 2, 2, 0, 2], [4, 2, 6, 2, 6, 4, 4, 4]], "category_id": 2},
    ))  # fmt: skip
    assert returned("coco", path)["a"].tolist() == [
        [255, 255, 1, 0, 0, 0], [255, 255, 1, 0, 0, 0], [0, 1, 1, 0, 255, 255], [0, 1, 1, 0, 255, 255]
    ]  # fmt: skip


def test_an_export_in_a_zip_is_read_and_one_with_two_files_is_refused(tmp_path: Path) -> None:
    labels = random_labels()
    send("coco", labels, tmp_path / "out")
    (tmp_path / "task" / "annotations").mkdir(parents=True)
    shutil.copy(tmp_path / "out" / "stuff.json", tmp_path / "task" / "annotations" / "instances_default.json")
    shutil.make_archive(str(tmp_path / "task"), "zip", tmp_path / "task")
    assert same(returned("coco", tmp_path / "task.zip"), labels)
    assert refusal("coco", tmp_path / "out") == (
        f"{tmp_path / 'out'} holds 2 JSON files, such as panoptic.json: expected one COCO file; name the one that was"
        " corrected"
    )


MASK = {"size": [4, 6], "counts": [0, 24]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": [{"image_id": 7, "category_id": 0, "segmentation": {"size": [4, 6], "counts": [0, 23]}}]},
         "its run lengths give 23 pixels, expected 24: it is of another image, or cut"),
        ({"annotations": [{"image_id": 7, "category_id": 0, "segmentation": {"size": [4, 6], "counts": "T1"}}]},
         "its run lengths give other numbers, expected 24: it is of another image, or cut"),
        ({"annotations": [{"image_id": 7, "category_id": 0, "segmentation": {"size": [6, 4], "counts": [0, 24]}}]},
         "its mask has 4 × 6 pixels, its image 6 × 4 pixels"),
        ({"annotations": [{"image_id": 7, "category_id": 0, "segmentation": {"size": [], "counts": [0, 24]}}]},
         "size [] is none of an image: expected height and width in pixels"),
        ({"annotations": [{"image_id": 7, "category_id": 0, "segmentation": [[1, 2, 3, 4]]}]},
         "the polygon 1.0, 2.0, 3.0, 4.0, … has 4 numbers: expected x and y of 3 corners"),
        ({"annotations": [{"image_id": 7, "category_id": 0, "bbox": [0, 0, 2, 2]}]}, "has no mask, only a box or less"),
        ({"annotations": [{"image_id": 7, "category_id": 0, "segmentation": []}]}, "has no mask, only a box or less"),
        ({"annotations": [{"image_id": 7, "category_id": 0, "segmentation": 5}]},
         "'segmentation' is 5: expected a list"),
        ({"annotations": [{"image_id": 8, "category_id": 0, "segmentation": MASK}]},
         "has annotations of image id 8, which it does not list"),
        ({"annotations": [{"image_id": 1 << 63, "category_id": 0}]}, "image id 9223372036854775808 is too large"),
        ({"annotations": [{"image_id": 7, "segments_info": 5}]}, "'segments_info' is 5: expected a list"),
        ({"annotations": [{"image_id": "7", "category_id": 0}]}, """'image_id' is "7": expected a whole number"""),
        ({"annotations": [{"category_id": 0}]}, "has no 'image_id': expected a file in COCO's format"),
        ({"annotations": [5]}, "'annotations' holds 0 objects and other values: expected a list of objects"),
        ({"images": [{"id": 7, "file_name": "a.jpg", "height": 0, "width": 6}]}, "size [0, 6] is none of an image"),
        ({"images": [{"id": 7, "file_name": "a.jpg", "height": 4, "width": 6}] * 2},
         "image 'a.jpg' (id 7) stands twice: which of the two is meant?"),
        ({"images": [{"id": n, "file_name": f"a.{n}", "height": 4, "width": 6} for n in (7, 8)]},
         "image 'a.8' (id 8) stands twice: which of the two is meant?"),
        ({"categories": [{"id": 0, "name": "road"}] * 2}, "'categories' has id 0 twice"),
        ({"categories": 5}, "is no COCO file: expected images, annotations and categories"),
        ({"images": []}, "is no COCO file: expected images, annotations and categories"),
        ({"annotations": [{"image_id": 7, "category_id": 9, "segmentation": MASK}]},
         "1 annotation of what label space 'few' does not have: category 9, which is not in the file (1 annotation)"),
        ({"annotations": [{"image_id": 7, "segments_info": [], "file_name": ""}]}, "its PNG a/.png is not there"),
        ({"annotations": [{"image_id": 7, "segments_info": [], "file_name": "a.png"}]},
         "its PNG a/a.png is not there: expected the folder a beside the JSON"),
    ],
)  # fmt: skip
def test_files_that_contradict_themselves_are_refused(change: Document, message: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", document({"segmentation": MASK}) | change)
    assert message in refusal("coco", path) and str(path) in refusal("coco", path)


def test_json_of_another_project_is_refused_with_its_most_frequent_classes(tmp_path: Path) -> None:
    names = ("road", "cat", "dog", "cow", "hen")
    used = [0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4]
    path = save(tmp_path / "a.json", document(*({"segmentation": MASK, "category_id": n} for n in used), names=names))
    assert refusal("coco", path) == (
        f"{path}: 10 annotations of what label space 'few' does not have: 'cow' (4 annotations), 'cat' (3 annotations),"
        " 'dog' (2 annotations) and others: expected its classes 'road', 'traffic light' and 'Straße'; is it of another"
        " project?"
    )
    assert refusal("coco", save(path, [5])) == f"{path} is no COCO file: expected images, annotations and categories"  # type: ignore[arg-type]
    path.write_text('{"images": [')
    assert "is no JSON, or cut off" in refusal("coco", path)
    assert refusal("coco", tmp_path / "b.json") == f"{tmp_path / 'b.json'} does not exist: expected a folder or a zip"


def test_segments_of_a_png_that_its_annotation_does_not_have_are_counted(tmp_path: Path) -> None:
    send("coco", {"a": np.zeros((4, 5), np.uint8)}, tmp_path)
    picture = np.zeros((4, 5, 3), np.uint8)
    picture[0], picture[1, 0] = (1, 2, 3), (9, 0, 0)
    Image.fromarray(picture).save(tmp_path / "panoptic" / "a.png")
    path = tmp_path / "panoptic.json"
    assert refusal("coco", path).startswith(
        f"{path}: 6 pixels of what label space 'few' does not have: segment 197121 (5 pixels) and segment 9 (1 pixel):"
    )
    Image.fromarray(picture[:3]).save(tmp_path / "panoptic" / "a.png")
    assert refusal("coco", path) == f"{tmp_path / 'panoptic' / 'a.png'} has 5 × 3 pixels, its image 5 × 4 pixels"


def test_classes_go_by_their_names(tmp_path: Path) -> None:
    send("coco", {"a": np.array([[0, 1, 2]], np.uint8)}, tmp_path)
    turned = LabelSpace.named("turned", ("Straße", "road", "traffic light"))
    assert returned("coco", tmp_path / "stuff.json", turned)["a"].tolist() == [[1, 2, 0]]


def test_street_scenes_come_back(tmp_path: Path) -> None:
    labels = street_scenes(2)
    send("coco", labels, tmp_path, space=CITYSCAPES)
    assert same(returned("coco", tmp_path / "stuff.json", CITYSCAPES), labels)
    assert same(returned("coco", tmp_path / "panoptic.json", CITYSCAPES), labels)
