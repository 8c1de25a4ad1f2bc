"""A draft saves an hour of typing. If this fails, its own program refuses it, or it sends cars to the sky."""

from __future__ import annotations

from pathlib import Path

import pytest

from autolabel.manifests.class_draft import draft
from autolabel.manifests.class_map import load_class_map
from autolabel.manifests.label_space import CAMVID, CITYSCAPES, LabelSpace, load_label_space


def test_a_draft_finds_plurals_synonyms_last_parts_and_customs_and_asks_where_it_doubts() -> None:
    names = [
        "Roads", "side-walk", "buses", "flat--Road_sign", "a--b--poles", "minibike", "trafic light", "bed",
        "walker, person", "sky", "CAR", "truck, sky",
    ]  # fmt: skip
    assert draft(names, CITYSCAPES).to_toml(teacher="net.onnx", space=CITYSCAPES) == (
        "# 12 classes of net.onnx onto the 19 of label space 'cityscapes',\n"
        "# by their names: read it before you use it.\n"
        "[classes]\n"
        '"road" = ["Roads"]\n"sidewalk" = []\n"building" = []\n"wall" = []\n"fence" = []\n"pole" = ["a--b--poles"]\n'
        '"traffic light" = []\n"traffic sign" = []\n"vegetation" = []\n"terrain" = []\n"sky" = ["sky"]\n'
        '"person" = ["walker, person"]\n"rider" = []\n"car" = ["CAR"]\n"truck" = []\n"bus" = ["buses"]\n"train" = []\n'
        '"motorcycle" = [\n    "minibike",  # as in ade20k-to-cityscapes: is it?\n]\n"bicycle" = []\n'
        '"ignore" = [\n    "side-walk",  # \'sidewalk\'?\n    "flat--Road_sign",\n'
        "    \"trafic light\",  # 'traffic light'?\n    \"bed\",\n    \"truck, sky\",  # 'sky' or 'truck'?\n]\n"
    )


@pytest.mark.parametrize("target", [CITYSCAPES, CAMVID], ids=lambda space: space.name)
@pytest.mark.parametrize("source", ["ade20k", "mapillary-v1.2", "mapillary-v2.0", "bdd100k", "idd", "coco-stuff"])
def test_a_draft_can_be_used_as_it_is(source: str, target: LabelSpace, tmp_path: Path) -> None:
    names = load_label_space(source).names
    text = draft(names, target).to_toml(teacher="line\nbreak", space=target)
    (tmp_path / "map.toml").write_text(text, encoding="utf-8")
    train_ids = load_class_map(str(tmp_path / "map.toml")).indices(names, target, teacher="t")
    if target is CITYSCAPES:
        assert train_ids == load_class_map(f"{source}-to-cityscapes").indices(names, target, teacher="t")
    road = next(place for place, name in enumerate(names) if name.split("--")[-1] == "road")
    assert target.names[train_ids[road]] == "road"


def test_names_that_toml_has_to_escape_come_back(tmp_path: Path) -> None:
    names = ['sky "blue"', "back\\slash", "new\nline, sky", "Straße", "#road"]
    space = LabelSpace.named("x", ["sky", "Strasse", "straße", 'q"q'])
    text = draft(names, space).to_toml(teacher="t", space=space)
    (tmp_path / "map.toml").write_text(text, encoding="utf-8")
    assert sorted(n for group in load_class_map(str(tmp_path / "map.toml")).classes.values() for n in group) == sorted(
        names
    )


def test_without_any_class_of_a_like_name_there_is_no_draft() -> None:
    with pytest.raises(ValueError, match=r"^none of the 2 classes has a name like one of label space 'camvid': write"):
        draft(["0", "1"], CAMVID)
