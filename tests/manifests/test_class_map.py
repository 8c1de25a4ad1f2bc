"""If a class map is read wrongly, a teacher's road becomes somebody's pavement, and no number looks odd."""

from __future__ import annotations

from pathlib import Path

import pytest

from autolabel.manifests.class_map import ClassMap, load_class_map, meant, synonyms
from autolabel.manifests.label_space import LabelSpace

SPACE = LabelSpace.named("street", ["road", "pole", "sky"])
TEACHER = ["wall", "road, route", "bed ", "path", "sky"]
TEXT = """
[classes]
road = ["road, route", "path"]
pole = []
sky = ["sky"]
ignore = ["wall", "bed"]
"""


def class_map(text: str, tmp_path: Path) -> ClassMap:
    """The class map of a TOML file."""
    (tmp_path / "map.toml").write_text(text, encoding="utf-8")
    return load_class_map(str(tmp_path / "map.toml"))


def test_every_class_of_a_teacher_gets_the_train_id_of_its_target_or_ignore(tmp_path: Path) -> None:
    assert class_map(TEXT, tmp_path).indices(TEACHER, SPACE, teacher="net.onnx") == (255, 0, 255, 0, 2)


def test_a_class_map_is_the_same_after_writing_and_reading_json(tmp_path: Path) -> None:
    given = class_map(TEXT, tmp_path)
    assert ClassMap.of(given.to_dict()) == given
    assert given.to_dict() == {
        "classes": {"road": ["road, route", "path"], "pole": [], "sky": ["sky"], "ignore": ["wall", "bed"]}
    }


def test_a_class_of_the_space_that_the_map_does_not_name_is_one_that_the_teacher_never_gives(tmp_path: Path) -> None:
    given = class_map('classes = {road = ["a"], ignore = ["b"]}', tmp_path)
    assert given.indices(["b", "a"], SPACE, teacher="t") == (255, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[classes]\nroad = ["a", "b"]\nsky = ["c", "a"]',
            "has teacher class 'a' under 'road' and 'sky': name it once",
        ),
        ('[classes]\nroad = ["a", "a"]', "has teacher class 'a' under 'road' twice: name it once"),
        ('[classes]\nroad = ["a"]\nroad = ["b"]', " is no TOML: "),
        ("[classes]\nroad = []", "gives no teacher class to any class: expected a table [classes] with lines like"),
        ('[classes]\nignore = ["a", "b"]', "gives no teacher class to any class: expected a table [classes]"),
        ("", ': expected a table [classes] with lines like road = ["road, route", "path"]'),
        ('road = ["a"]', "has an unknown key 'road': expected a table [classes]"),
        ('[classes]\nroad = "a"', """, 'classes', 'road' is "a": expected a list"""),
        ("[classes]\nroad = [3]", ", 'classes', 'road'[0] is 3: expected a text"),
        ("[classes", " is no TOML: "),
    ],
)
def test_a_map_that_contradicts_itself_is_refused_with_its_file(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refusal:
        class_map(text, tmp_path)
    assert str(refusal.value).startswith(str(tmp_path / "map.toml"))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[classes]\nraod = ["path"]',
            "'raod' is no class of label space 'street': did you mean 'road'?",
        ),
        (
            '[classes]\nroad = ["road, route", "path"]\nsky = ["sky"]\nignore = ["wall"]',
            "leaves out class 'bed ' of net.onnx: name every class once, under a class of 'street' or under 'ignore'",
        ),
        (
            '[classes]\nroad = ["road, route"]',
            "leaves out 'wall' and 3 more classes of net.onnx: name every class once, under a class of 'street' or"
            " under 'ignore'",
        ),
        ('[classes]\nsky = ["skye"]', ", 'sky': 'skye' is no class of net.onnx: did you mean 'sky'?"),
        (
            '[classes]\nsky = ["Qqq"]',
            ", 'sky': 'Qqq' is no class of net.onnx: expected one of 'wall', 'road, route', 'bed ', 'path', 'sky'",
        ),
        ('[classes]\nroad = ["route"]\nsky = ["Road"]', ", 'road': 'route' is no class of net.onnx: "),
    ],
)
def test_a_map_that_does_not_fit_teacher_and_space_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refusal:
        class_map(text, tmp_path).indices(TEACHER, SPACE, teacher="net.onnx")
    assert message in str(refusal.value)
    assert str(refusal.value).startswith(str(tmp_path / "map.toml")) and "\n" not in str(refusal.value)


def test_ignore_may_name_what_this_teacher_does_not_have(tmp_path: Path) -> None:
    given = class_map('[classes]\nroad = ["a"]\nignore = ["b", "unlabeled"]', tmp_path)
    assert given.indices(["a", "b"], SPACE, teacher="t") == (0, 255)


@pytest.mark.parametrize(
    ("names", "classes", "places"),
    [
        (["a", "A"], ["A", "a"], [1, 0]),
        (["bed"], ["Bed "], [0]),
        (["screen"], ["screen door, screen", "screen, silver screen"], [1]),
        (["road, route"], ["route"], [0]),
        (["seat"], ["seat, bench", "seat, chair"], [None]),
        (["car", "auto"], ["auto, car"], [None, 0]),
    ],
)
def test_a_name_means_the_only_class_that_agrees_with_it(
    names: list[str], classes: list[str], places: list[int | None]
) -> None:
    assert meant(names, classes) == places


def test_synonyms_are_the_words_between_commas() -> None:
    assert synonyms(" Door,  Double  door, ") == ["door", "double door"]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^class map 'nowhere' is neither built in \(.*\) nor a TOML file that exist"):
        load_class_map("nowhere")
