"""Labels to Label Studio and back. If this fails, brush strokes come home as other pixels than a person has painted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from sending import SPACE, random_labels, refusal, returned, same, send, street_scenes
from test_run_lengths import plain_brush

from autolabel.manifests.label_space import CITYSCAPES

Task = dict[str, Any]


def brush(mask: Any, label: str = "road", **others: Any) -> Task:
    """A brush stroke as Label Studio writes it, by plain strings: in colour, with an alpha of 255."""
    mask = np.array(mask, bool)
    rle = plain_brush((mask[..., None] * np.array([77, 5, 3, 255])).ravel().tolist())
    return {
        "id": "x", "type": "brushlabels", "original_width": mask.shape[1], "original_height": mask.shape[0],
        "image_rotation": 0, "from_name": "a", "to_name": "b",
        "value": {"format": "rle", "rle": rle, "brushlabels": [label]}, **others,
    }  # fmt: skip


def task(*regions: Task, image: str = "/data/upload/3/0a1b2c3d-street_1.jpg", **others: Any) -> Task:
    return {"id": 1, "data": {"image": image}, "annotations": [{"result": list(regions)}], **others}


def save(path: Path, *tasks: Task) -> Path:
    path.write_text(json.dumps(list(tasks)), encoding="utf-8")
    return path


def test_labels_come_back_and_ignore_stays_ignore(tmp_path: Path) -> None:
    labels = random_labels() | {"empty": np.full((5, 8), 255, np.uint8)}
    assert send("label-studio", labels, tmp_path) == ["ignored pixels are in no region"]
    assert sorted(path.name for path in (tmp_path / "tasks").iterdir()) == ["000000.json", "000001.json", "000002.json"]
    assert same(returned("label-studio", tmp_path), labels)
    (tmp_path / "all.json").write_text(
        json.dumps([t for path in sorted((tmp_path / "tasks").iterdir()) for t in json.loads(path.read_text())])
    )
    assert same(returned("label-studio", tmp_path / "all.json"), labels)


def test_tasks_say_where_the_image_is_and_how_certain_the_regions_are(tmp_path: Path) -> None:
    label = np.array([[0, 255, 1], [0, 255, 255]], np.uint8)
    certain = np.array([[255, 9, 51], [0, 9, 9]], np.uint8)
    send("label-studio", {"a b/c": label}, tmp_path, confidence={"a b/c": certain})
    (sent,) = json.loads((tmp_path / "tasks" / "000000.json").read_text())
    assert sent["data"] == {
        "image": "/data/local-files/?d=images/a%20b/c.png", "sample_id": "a b/c", "width": 3, "height": 2
    }  # fmt: skip
    (prediction,) = sent["predictions"]
    assert (prediction["score"], prediction["model_version"]) == (0.2176, "autolabel")
    regions = prediction["result"]
    assert [(r["value"]["brushlabels"], r["score"], r["id"]) for r in regions] == [
        (["road"], 0.5, "class0"), (["traffic light"], 0.2, "class1")
    ]  # fmt: skip
    assert regions[0]["value"]["rle"] == plain_brush(np.repeat([255, 0, 0, 255, 0, 0], 4).tolist())
    interface = ElementTree.parse(tmp_path / "interface.xml").getroot()
    names = {r[key] for r in regions for key in ("from_name", "to_name")}
    assert names == {element.get("name") for element in interface}
    assert [element.attrib for element in interface[1]] == [
        {"value": c.name, "background": f"#{bytes(c.colour).hex()}"} for c in SPACE.classes
    ]  # fmt: skip


def test_exactly_the_pixels_that_were_painted_change(tmp_path: Path) -> None:
    labels = random_labels()
    send("label-studio", labels, tmp_path)
    rng = np.random.default_rng(5)
    tasks = [t for path in sorted((tmp_path / "tasks").iterdir()) for t in json.loads(path.read_text())]
    for one, (name, label) in zip(tasks, labels.items(), strict=True):
        labels[name] = label.copy()
        painted = rng.random(label.shape) < 0.01
        painted[0, 0] = True
        labels[name][painted] = 2
        result = one["predictions"][0]["result"]
        one["annotations"] = [{"result": [*result, brush(painted, "Straße")]}]
    assert same(returned("label-studio", save(tmp_path / "back.json", *tasks)), labels)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"image": "/data/upload/3/0a1b2c3d-street_1.jpg"}, "street_1"),
        ({"image": "/data/local-files/?d=images/a%20b/c.v1.png"}, "images/a b/c.v1"),
        ({"image": "s3://bucket/drive/7.jpg"}, "drive/7"),
        ({"image": "https://host/drive/e%CC%81.jpg?token=a.b/c"}, "drive/é"),
        ({"image": "x.jpg", "sample_id": "drive/8.a"}, "drive/8.a"),
        ({"count": 5, "photo": "drive/9.jpg"}, "drive/9"),
    ],
)
def test_an_image_is_called_by_our_key_or_its_address(data: Task, name: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", {**task(brush([[1, 0]])), "data": data})
    assert list(returned("label-studio", path)) == [name]


def test_the_latest_complete_annotation_stands(tmp_path: Path) -> None:
    def annotation(label: str, **others: Any) -> Task:
        return {"result": [brush([[1, 1]], label)], **others}

    ours, theirs = annotation("road"), annotation("traffic light")
    for given, predictions, expected in (
        ([{**theirs, "updated_at": "2026-01-02T03:04:05.1Z"}, {**ours, "updated_at": "2026-01-02T03:04:05Z"}], [], [1]),
        ([{**ours, "created_at": "2026-01-02T03:00+02:00"}, {**theirs, "created_at": "2026-01-02T02:00Z"}], [], [1]),
        (
            [{**theirs, "updated_at": "2026-02-01"}, {**ours, "updated_at": "2026-03-01", "was_cancelled": True}],
            [],
            [1],
        ),
        ([theirs], [ours], [1]),
        ([theirs, ours], [theirs], [0]),  # nobody knows when
        ([], [ours], []),  # nobody has looked at it
        ([{**ours, "was_cancelled": True}], [theirs], []),  # skipped by everybody
        ([{"result": []}], [theirs], []),  # nobody knows its size
    ):
        path = save(tmp_path / "a.json", task(annotations=given, predictions=predictions))
        assert [label[0, 0] for label in returned("label-studio", path).values()] == expected


def test_predictions_are_read_from_tasks_that_were_never_exported(tmp_path: Path) -> None:
    newer = {"result": [brush([[1]], "road")], "created_at": "2026-01-01"}
    older = {"result": [brush([[1]], "Straße")], "created_at": "2025-01-01"}
    path = save(tmp_path / "a.json", {"data": {"image": "a.jpg"}, "predictions": [newer, older]})
    assert returned("label-studio", path)["a"].tolist() == [[0]]


def test_an_annotation_that_is_empty_ignores_all_if_the_size_is_known(tmp_path: Path) -> None:
    send("label-studio", {"a": np.zeros((2, 3), np.uint8)}, tmp_path)
    (sent,) = json.loads((tmp_path / "tasks" / "000000.json").read_text())
    path = save(tmp_path / "a.json", {**sent, "annotations": [{"result": []}]})
    assert returned("label-studio", path)["a"].tolist() == [[255] * 3] * 2


def test_later_regions_lie_over_earlier_ones_and_polygons_are_filled(tmp_path: Path) -> None:
    polygon = {
        "type": "polygonlabels", "original_width": 4, "original_height": 2,
        "value": {"points": [[25, 0], [100, 0], [100, 50], [25, 50]], "polygonlabels": ["Straße"]},
    }  # fmt: skip
    choice = {"type": "choices", "value": {"choices": ["blurred"]}}
    void = brush([[0, 0, 0, 1], [0] * 4], "void")
    path = save(tmp_path / "a.json", task(brush(np.ones((2, 4))), polygon, void, choice))
    assert returned("label-studio", path)["street_1"].tolist() == [[0, 2, 2, 255], [0, 0, 0, 0]]


WHOLE = brush(np.ones((2, 3)))


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({**WHOLE, "original_width": 4}, "is of an image of 4 × 2 pixels: expected 3 × 2 pixels"),
        ({**WHOLE, "original_width": None}, "'original_width' is null: expected a whole number"),
        ({**WHOLE, "image_rotation": 90}, "its image was turned by 90 degrees: expected it upright"),
        ({**WHOLE, "value": {"rle": [1, 2, 300], "brushlabels": ["road"]}}, "its 'rle' is no list of bytes"),
        ({**WHOLE, "value": {"rle": "abc", "brushlabels": ["road"]}}, "its run lengths are of 0 bytes, expected 6"),
        ({**WHOLE, "value": {**WHOLE["value"], "brushlabels": ["road", "a"]}}, "has 2 labels: expected one"),
        ({**WHOLE, "value": 5}, "'value' is 5: expected an object"),
        ({**WHOLE, "type": "rectanglelabels"}, "is of type 'rectanglelabels': expected brush labels or polygon labels"),
        ({**WHOLE, "type": "brush"}, "is of type 'brush': expected brush labels or polygon labels"),
        ({**WHOLE, "type": "polygonlabels", "value": {"polygonlabels": ["road"], "points": [[1, 2, 3]]}},
         "'points'[0] is [1, 2, 3]: expected a list of 2"),
    ],
)  # fmt: skip
def test_regions_that_cannot_be_drawn_are_refused_with_their_place(region: Task, message: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", task(WHOLE, image="b.jpg"), task(WHOLE, region))
    found = refusal("label-studio", path)
    assert message in found and found.startswith(f"{path}, task 2, region 2")


def test_sizes_that_no_image_has_and_masks_of_other_sizes_are_refused(tmp_path: Path) -> None:
    for width, message in (
        (0, ": size [2, 0] is none of an image"),
        (4, ": its run lengths are of 6 pixels, expected 8"),
    ):
        path = save(tmp_path / "a.json", task({**WHOLE, "original_width": width}))
        assert refusal("label-studio", path).startswith(f"{path}, task 1, region 1{message}")


def test_labels_of_another_project_are_counted_over_all_tasks(tmp_path: Path) -> None:
    tasks = [task(*(brush([[1]], name) for name in "cat"), image="1.jpg"), task(brush([[1]], "a"), image="2.jpg")]
    assert refusal("label-studio", save(tmp_path / "a.json", *tasks)) == (
        f"{tmp_path / 'a.json'}: 4 regions of what label space 'few' does not have: 'a' (2 regions), 'c' (1 region) and"
        " 't' (1 region): expected its classes 'road', 'traffic light' and 'Straße'; is it of another project?"
    )


def test_files_that_are_no_export_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    (tmp_path / "empty").mkdir()
    for content, message in (
        ('{"images": []}', "is no list of tasks: expected an export 'JSON' of Label Studio"),
        ('[{"data": {"image": "a.jpg"}}]', "task 1 has no annotations: expected an export 'JSON' of Label Studio, not"),
        ('[{"data": {"image": 5}}]', "task 1 has no image: expected its address in 'data', 'image'"),
        ('[{"data": {"image": "https://host/"}}]', "task 1: the address 'https://host/' names no image"),
        ('[{"image": "a.jpg"}]', "'data' is null: expected an object"),
        ('[{"data"', "is no JSON, or cut off"),
    ):
        path.write_text(content)
        assert message in refusal("label-studio", path)
    assert refusal("label-studio", tmp_path / "empty") == (
        f"{tmp_path / 'empty'} holds no JSON file: expected an export 'JSON' of Label Studio"
    )


def test_an_image_in_two_tasks_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", task(WHOLE), task(WHOLE))
    assert refusal("label-studio", path) == (
        f"{path}, task 2: image 'street_1' stands in two tasks: which of the two is meant?"
    )


def test_street_scenes_come_back(tmp_path: Path) -> None:
    labels = street_scenes(2)
    send("label-studio", labels, tmp_path, space=CITYSCAPES)
    assert same(returned("label-studio", tmp_path, CITYSCAPES), labels)
