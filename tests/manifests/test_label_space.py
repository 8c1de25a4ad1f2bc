"""If a class table is wrong by one line, every label made with it is wrong, and every score still looks plausible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autolabel.manifests.label_space import CAMVID, CITYSCAPES, IGNORE, LabelClass, LabelSpace, load_label_space

# id, name, colour as in labels.py of cityscapesScripts, the classes with a train id in the order of it.
OFFICIAL_CITYSCAPES = [
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
]
OFFICIAL_CAMVID = [
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (0, 0, 192)),
    ("tree", (128, 128, 0)),
    ("sign", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
]


def entry(name: str, evaluate: bool = True, **more: Any) -> dict[str, Any]:
    """One label as it stands in Mapillary's config.json."""
    full = {"name": f"group--{name}", "readable": name, "color": [1, 2, 3], "instances": False, "evaluate": evaluate}
    return {**full, **more}


def document(*labels: dict[str, Any]) -> str:
    """A config.json of Mapillary Vistas v1.2."""
    return json.dumps({"labels": list(labels), "mapping": "public", "version": "1.2"})


def test_cityscapes_is_the_official_table() -> None:
    assert [(c.source_ids, c.name, c.colour) for c in CITYSCAPES.classes] == [
        ((i,), name, colour) for i, name, colour in OFFICIAL_CITYSCAPES
    ]


def test_cityscapes_source_ids_become_train_ids_and_everything_else_is_ignored() -> None:
    expected = [IGNORE] * 256
    for train_id, (source_id, _, _) in enumerate(OFFICIAL_CITYSCAPES):
        expected[source_id] = train_id
    assert list(CITYSCAPES.train_ids) == expected
    assert (CITYSCAPES.train_ids[7], CITYSCAPES.train_ids[33], CITYSCAPES.train_ids[0]) == (0, 18, 255)


def test_cityscapes_knows_the_ids_that_it_ignores() -> None:
    assert CITYSCAPES.known_source_ids == {*range(34), IGNORE}


def test_camvid_is_the_table_of_the_segnet_split() -> None:
    assert [(c.source_ids, c.name, c.colour) for c in CAMVID.classes] == [
        ((i,), name, colour) for i, (name, colour) in enumerate(OFFICIAL_CAMVID)
    ]
    assert list(CAMVID.train_ids) == [*range(11)] + [IGNORE] * 245
    assert CAMVID.known_source_ids == {*range(11), IGNORE}


def test_the_palette_has_the_colours_by_train_id_and_black_for_the_rest() -> None:
    colours = [value for _, colour in OFFICIAL_CAMVID for value in colour]
    assert list(CAMVID.palette) == colours + [0] * (768 - len(colours))


def test_mapillary_labels_that_are_not_evaluated_leave_no_hole_in_the_train_ids() -> None:
    space = LabelSpace.from_json(
        document(entry("bird"), entry("ambiguous", evaluate=False), entry("curb"), entry("void", evaluate=False)),
        name="mapillary",
    )
    assert space.name == "mapillary"
    assert space.names == ("group--bird", "group--curb")
    assert list(space.train_ids[:4]) == [0, IGNORE, 1, IGNORE]
    assert space.ignored_ids == (1, 3)
    assert space.known_source_ids == {0, 1, 2, 3, IGNORE}


def test_ids_written_out_replace_the_place_in_the_list() -> None:
    space = LabelSpace.from_json(document(entry("road", ids=[7, 9]), entry("sky", ids=[23])))
    assert (space.train_ids[7], space.train_ids[9], space.train_ids[23]) == (0, 0, 1)
    assert (space.train_ids[0], space.train_ids[1]) == (IGNORE, IGNORE)


@pytest.mark.parametrize(
    "space",
    [
        pytest.param(CITYSCAPES, id="cityscapes"),
        pytest.param(CAMVID, id="camvid"),
        pytest.param(LabelSpace("two ids", (LabelClass("vehicle", (0, 0, 9), (26, 27)),), (3,)), id="several ids"),
        pytest.param(LabelSpace("Straße", (LabelClass("Gehweg für Fußgänger", (1, 2, 3), (0,)),)), id="umlauts"),
        pytest.param(
            LabelSpace.from_json(document(entry("a"), entry("b", evaluate=False), entry("c")), name="vistas"),
            id="mapillary",
        ),
        pytest.param(
            LabelSpace("full", tuple(LabelClass(f"class {i}", (i, i, i), (i,)) for i in range(255))), id="255 classes"
        ),
    ],
)
def test_a_label_space_is_the_same_after_writing_and_reading_json(space: LabelSpace) -> None:
    assert LabelSpace.from_json(space.to_json()) == space
    assert "\n" not in space.to_json()


def classes(*rows: tuple[str, tuple[int, ...], tuple[int, ...]]) -> tuple[LabelClass, ...]:
    return tuple(LabelClass(name, colour, ids) for name, colour, ids in rows)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param((), "label space 'x' has 0 classes: expected 1 to 255", id="no class"),
        pytest.param(
            tuple(LabelClass(f"class {i}", (0, 0, 0), (i % 256,)) for i in range(256)),
            "label space 'x' has 256 classes: expected 1 to 255",
            id="too many classes",
        ),
        pytest.param(
            classes(("road", (1, 2, 3), (0,)), ("sky", (1, 2, 3), (1,)), ("road", (1, 2, 3), (2,))),
            "label space 'x' names 'road' twice: give every class its own name",
            id="name twice",
        ),
        pytest.param(
            classes(("road", (1, 2, 3), (7,)), ("sky", (1, 2, 3), (7,))),
            "source id 7 is both 'road' and 'sky': give it to one class, once",
            id="id twice",
        ),
        pytest.param(
            classes(("road", (1, 2, 3), ())), "class 'road' has source ids (): expected some in 0..255", id="no id"
        ),
        pytest.param(
            classes(("road", (1, 2, 3), (256,))),
            "class 'road' has source ids (256,): expected some in 0..255",
            id="id too large",
        ),
        pytest.param(
            classes(("road", (1, 2, 3), (-1,))),
            "class 'road' has source ids (-1,): expected some in 0..255",
            id="negative id",
        ),
        pytest.param(
            classes(("road", (1, 2), (0,))),
            "class 'road' has colour (1, 2): expected three numbers in 0..255",
            id="two colours",
        ),
        pytest.param(
            classes(("road", (1, 2, 256), (0,))),
            "class 'road' has colour (1, 2, 256): expected three numbers in 0..255",
            id="colour too large",
        ),
    ],
)
def test_a_contradictory_table_is_refused(given: tuple[LabelClass, ...], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        LabelSpace("x", given)
    assert str(refusal.value) == message


def test_an_id_cannot_be_a_class_and_ignored() -> None:
    with pytest.raises(ValueError, match="source id 7 is both"):
        LabelSpace("x", classes(("road", (1, 2, 3), (7,))), ignored_ids=(7,))


FORM = 'expected JSON like {"labels": [{"name": "road", "color": [128, 64, 128]}, …]}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "label space is empty", id="empty"),
        pytest.param("classes: [road]", "no JSON, or cut off: Expecting value in line 1, column 1", id="YAML"),
        pytest.param('{"labels": [', "no JSON, or cut off: Expecting value in line 1, column 13", id="cut off"),
        pytest.param("null", f"label space is no object: {FORM}", id="null"),
        pytest.param("[]", f"label space is no object: {FORM}", id="list"),
        pytest.param('{"classes": []}', "has an unknown key 'classes': did you mean 'labels'?", id="classes"),
        pytest.param('{"label": []}', "has an unknown key 'label': did you mean 'labels'?", id="label"),
        pytest.param('{"version": 2}', f"label space is no label space: {FORM}", id="no labels"),
        pytest.param('{"labels": 3}', "label space, 'labels' is 3: expected a list", id="labels are a number"),
        pytest.param('{"labels": {"road": 1}}', """'labels' is {"road": 1}: expected a list""", id="a dictionary"),
        pytest.param('{"labels": [5]}', f"label space, label number 0 is no object: {FORM}", id="label is a number"),
        pytest.param('{"labels": [{"color": [1, 2, 3]}]}', f"label number 0, has no 'name': {FORM}", id="no name"),
        pytest.param('{"labels": [{"name": "road"}]}', f"label 'road', has no 'color': {FORM}", id="no colour"),
        pytest.param('{"labels": [], "name": 3}', "label space, 'name' is 3: expected a text", id="name of the space"),
        pytest.param(
            '{"labels": [{"name": 7}]}', "label number 0, 'name' is 7: expected a text", id="name is a number"
        ),
        pytest.param('{"labels": [], "labels": []}', "key 'labels' stands twice", id="key twice"),
        pytest.param("[" * 100_000, "label space is nested more than 32 levels deep", id="nested without end"),
        pytest.param('{"name": ' * 100_000, "label space is nested more than 32 levels deep", id="objects without end"),
    ],
)
def test_json_that_is_no_label_space_is_refused_with_the_expected_form(text: str, message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        LabelSpace.from_json(text)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("ids", '"12"', "a list"),  # once taken for 1 and 2
        ("ids", "7", "a list"),
        ("ids", "{}", "a list"),
        ("ids", "null", "a list"),
        ("ids[0]", "[1.9]", "a whole number"),
        ("ids[1]", "[1, true]", "a whole number"),
        ("ids[0]", '["1"]', "a whole number"),
        ("ids[0]", "[1.0]", "a whole number"),
        ("color", '"123"', "a list"),
        ("color", '"#804080"', "a list"),
        ("color", "7", "a list"),
        ("color[2]", "[1, 2, 3.5]", "a whole number"),
        ("color[0]", "[false, 2, 3]", "a whole number"),
        ("color[1]", "[1, [2], 3]", "a whole number"),
        ("color[2]", "[1, 2, Infinity]", "a finite number"),
        ("evaluate", '"false"', "true or false"),
        ("evaluate", "0", "true or false"),
        ("evaluate", "null", "true or false"),
    ],
)
def test_a_value_of_another_type_is_refused_with_class_key_and_expectation(key: str, value: str, expected: str) -> None:
    stem = key.split("[")[0]
    values = {"name": '"road"', "color": "[1, 2, 3]", stem: value}
    text = ", ".join(f'"{name}": {item}' for name, item in values.items())
    with pytest.raises(ValueError) as refusal:
        LabelSpace.from_json(f'{{"labels": [{{{text}}}]}}')
    place = "'labels'[0], " if expected == "a finite number" else "label 'road', "
    assert f"{place}'{stem}'{key.removeprefix(stem)} is " in str(refusal.value)
    assert str(refusal.value).endswith(f": expected {expected}")


@pytest.mark.parametrize("key", ["id", "colour", "Name", "ignore", "trainId"])
def test_a_key_that_nobody_reads_is_refused_with_the_class(key: str) -> None:
    with pytest.raises(ValueError, match=f"^label space, label 'road' has an unknown key '{key}': "):
        LabelSpace.from_json(json.dumps({"labels": [{"name": "road", "color": [1, 2, 3], key: 1}]}))


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_and_line_ends_of_windows_are_accepted(mark: bytes, end: bytes, tmp_path: Path) -> None:
    text = json.dumps({"labels": [entry("Straße")]}, indent=1, ensure_ascii=False).encode().replace(b"\n", end)
    (tmp_path / "x.json").write_bytes(mark + text)
    assert load_label_space(str(tmp_path / "x.json")).names == ("group--Straße",)


def test_labels_of_which_none_is_evaluated_are_refused() -> None:
    with pytest.raises(ValueError, match="label space 'custom' has 0 classes: expected 1 to 255"):
        LabelSpace.from_json(document(entry("void", evaluate=False)))


def test_built_in_label_spaces_are_found_by_name() -> None:
    assert load_label_space("cityscapes") is CITYSCAPES
    assert load_label_space("camvid") is CAMVID


def test_a_label_space_is_read_from_a_file_and_named_after_it(tmp_path: Path) -> None:
    file = tmp_path / "harbour.json"
    file.write_text(document(entry("crane"), entry("quay")), encoding="utf-8")
    space = load_label_space(str(file))
    assert (space.name, space.names) == ("harbour", ("group--crane", "group--quay"))


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError) as refusal:
        load_label_space("cityscape")
    assert str(refusal.value) == (
        "label space 'cityscape' is neither built in (cityscapes, camvid, mapillary-v1.2, mapillary-v2.0, bdd100k,"
        " idd, ade20k, coco-stuff) nor a JSON file that exists"
    )


@pytest.mark.parametrize("content", [pytest.param(b"{", id="cut JSON"), pytest.param(b"\xff\xfe\x00", id="no text")])
def test_a_file_that_is_no_label_space_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.json"
    file.write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        load_label_space(str(file))
    assert str(refusal.value).startswith(f"{file} is no ")
