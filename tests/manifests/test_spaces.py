"""The built-in tables are facts of data sets. If one is wrong by a line, every label made with it is wrong."""

from __future__ import annotations

from collections import Counter

import pytest

from autolabel.manifests.class_map import CLASS_MAPS, IGNORED, load_class_map
from autolabel.manifests.documents import read_json
from autolabel.manifests.label_space import BUILT_IN, CITYSCAPES, IGNORE, SPACES, load_label_space

TO_CITYSCAPES = [name for name in CLASS_MAPS if name.endswith("-to-cityscapes")]


def readable(name: str) -> list[str]:
    """The other spellings of the classes of a built-in label space, in their order."""
    labels = read_json(SPACES / f"{name}.json")["labels"]
    return [label.get("readable", label["name"]) for label in labels if label.get("evaluate", True)]


def test_every_table_has_a_name_that_loads_it_and_says_where_it_is_from() -> None:
    files = {path.stem: read_json(path) for path in SPACES.iterdir()}
    assert sorted(files) == sorted([*CLASS_MAPS, *(name for name in BUILT_IN if name not in ("cityscapes", "camvid"))])
    assert [name for name, table in files.items() if not table["source"]] == []
    assert [load_label_space(name).name for name in BUILT_IN] == list(BUILT_IN)


@pytest.mark.parametrize(
    ("name", "classes", "ids", "ignored"),
    [
        ("mapillary-v1.2", 65, range(65), (65,)),
        ("mapillary-v2.0", 116, None, (2, 31, 38, 79, 86, 96, 115, 123)),
        ("bdd100k", 19, range(19), ()),
        ("idd", 26, range(26), ()),
        ("ade20k", 150, range(1, 151), (0,)),
        ("coco-stuff", 171, None, (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)),
    ],
)
def test_a_data_set_has_its_classes_and_the_ids_of_its_own_files(
    name: str, classes: int, ids: range | None, ignored: tuple[int, ...]
) -> None:
    space = load_label_space(name)
    highest = classes + len(ignored)
    expected = ids if ids is not None else [i for i in range(highest) if i not in ignored]
    assert [c.source_ids for c in space.classes] == [(i,) for i in expected]
    assert space.ignored_ids == ignored


@pytest.mark.parametrize(
    ("name", "train_id", "class_name", "colour"),
    [
        ("mapillary-v1.2", 13, "construction--flat--road", (128, 64, 128)),
        ("mapillary-v1.2", 55, "object--vehicle--car", (0, 0, 142)),
        ("mapillary-v1.2", 64, "void--ego-vehicle", (120, 10, 10)),
        ("mapillary-v2.0", 20, "construction--flat--road", (128, 64, 128)),
        ("mapillary-v2.0", 115, "void--static", (111, 111, 0)),
        ("bdd100k", 18, "bicycle", (119, 11, 32)),
        ("idd", 8, "autorickshaw", (255, 204, 54)),
        ("idd", 18, "traffic sign", (220, 220, 0)),
        ("ade20k", 0, "wall", (120, 120, 120)),
        ("ade20k", 6, "road", (140, 140, 140)),
        ("ade20k", 149, "flag", (92, 0, 255)),
        ("coco-stuff", 0, "person", None),
        ("coco-stuff", 170, "wood", None),
    ],
)
def test_a_class_stands_where_the_data_set_has_it(
    name: str, train_id: int, class_name: str, colour: tuple[int, int, int] | None
) -> None:
    found = load_label_space(name).classes[train_id]
    assert found.name == class_name
    assert colour is None or found.colour == colour


def test_bdd100k_has_the_classes_and_colours_of_cityscapes() -> None:
    assert [(c.name, c.colour) for c in load_label_space("bdd100k").classes] == [
        (c.name, c.colour) for c in CITYSCAPES.classes
    ]


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("mapillary-v1.2", {}),
        ("bdd100k", {}),
        ("idd", {}),
        ("coco-stuff", {}),
        ("ade20k", {(140, 140, 140): 2}),  # road and skyscraper, as published
        ("mapillary-v2.0", {
            (255, 255, 255): 9, (250, 170, 30): 6, (192, 192, 192): 3, (220, 220, 0): 3, (110, 110, 110): 2,
            (170, 170, 170): 2, (128, 128, 128): 2, (250, 170, 15): 2,
        }),
    ],
)  # fmt: skip
def test_a_colour_belongs_to_one_class_but_where_the_data_set_has_it_otherwise(
    name: str, shared: dict[tuple[int, int, int], int]
) -> None:
    counts = Counter(c.colour for c in load_label_space(name).classes)
    assert {colour: count for colour, count in counts.items() if count > 1} == shared


@pytest.mark.parametrize("name", CLASS_MAPS)
def test_a_built_in_map_takes_every_class_of_its_data_set_in_either_spelling(name: str) -> None:
    source, target = (load_label_space(part) for part in name.split("-to-"))
    train_ids = load_class_map(name).indices(source.names, target, teacher="teacher")
    assert len(train_ids) == len(source) and set(train_ids) <= {*range(len(target)), IGNORE}
    if source is not CITYSCAPES:
        assert load_class_map(name).indices(readable(source.name), target, teacher="teacher") == train_ids
    assert list(load_class_map(name).classes) == [*target.names, IGNORED]


@pytest.mark.parametrize("name", TO_CITYSCAPES)
def test_what_all_data_sets_have_goes_where_its_name_says(name: str) -> None:
    source = load_label_space(name.removesuffix("-to-cityscapes"))
    train_ids = load_class_map(name).indices(source.names, CITYSCAPES, teacher="teacher")
    by_last = {text.split("--")[-1]: train_id for text, train_id in zip(source.names, train_ids, strict=True)}
    assert {by_last[text] for text in ("road", "car", "truck", "bus", "bicycle", "fence")} == {0, 13, 14, 15, 18, 4}
    assert CITYSCAPES.names[by_last["road"]] == "road" and CITYSCAPES.names[by_last["bicycle"]] == "bicycle"


def test_the_map_of_ade20k_knows_the_spellings_of_detectron2() -> None:
    short = [
        "window ", "road, route", "street lamp", "plane", "tv", "tub", "rail", "clothes", "pool", "falls", "trash can",
        "screen", "pot", "land, ground, soil", "minibike, motorbike",
    ]  # fmt: skip
    long = [
        "windowpane", "road", "streetlight", "airplane", "television receiver", "bathtub", "railing", "apparel",
        "swimming pool", "waterfall", "ashcan", "screen", "pot", "land", "minibike",
    ]  # fmt: skip
    names = list(load_label_space("ade20k").names)
    given = load_class_map("ade20k-to-cityscapes")
    spelt = [short[long.index(name)] if name in long else name for name in names]
    assert given.indices(spelt, CITYSCAPES, teacher="t") == given.indices(names, CITYSCAPES, teacher="t")
    assert sum(a != b for a, b in zip(spelt, names, strict=True)) == 13


def test_an_output_for_pixels_without_a_label_is_ignored() -> None:
    names = [*readable("mapillary-v1.2"), "Unlabeled"]
    assert load_class_map("mapillary-v1.2-to-cityscapes").indices(names, CITYSCAPES, teacher="t")[-1] == IGNORE
