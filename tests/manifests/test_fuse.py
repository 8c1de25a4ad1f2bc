"""If fuse mixes two numberings or hides a validation image, a student's score means nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import manifest, sample

from autolabel.manifests.fuse import fuse, join
from autolabel.manifests.label_space import CAMVID, CITYSCAPES
from autolabel.manifests.samples import (
    Sample,
    load_manifest,
    save_manifest,
)


def test_fusing_joins_the_labelled_samples_in_order(tmp_path: Path) -> None:
    fine = manifest(sample(tmp_path, "f2"), sample(tmp_path, "f1"), sample(tmp_path, "f3", label=None, source="none"))
    auto = manifest(sample(tmp_path, "a1", source="auto", label_index=4), sample(tmp_path, "a2", source="auto"))
    fused = join([("fine", fine), ("auto", auto)])
    assert fused.samples == (*fine.samples[:2], *auto.samples)
    assert fused.label_space == CAMVID
    assert fused.provenance == {"fused": ["fine", "auto"], "weights": {}, "leak_check": None}


def test_weights_replace_those_of_a_whole_source(tmp_path: Path) -> None:
    fine = manifest(sample(tmp_path, "f", weight=3.0), sample(tmp_path, "c", source="coarse", weight=2.0))
    auto = manifest(sample(tmp_path, "a", source="auto"), sample(tmp_path, "b", source="auto", weight=9.0))
    fused = join([("fine", fine), ("auto", auto)], weights={"auto": 0.5, "coarse": 0.0})
    assert [(s.sample_id, s.weight) for s in fused.samples] == [("f", 3.0), ("c", 0.0), ("a", 0.5), ("b", 0.5)]


def test_unlabelled_and_unreadable_samples_are_left_out(tmp_path: Path) -> None:
    listed = manifest(
        sample(tmp_path, "a"),
        sample(tmp_path, "b", label=None, source="none"),
        replace(sample(tmp_path, "c"), height=0, width=0),
    )
    (tmp_path / "images/c.png").unlink()
    assert [s.sample_id for s in join([("m", listed)]).samples] == ["a"]


def test_two_label_spaces_are_refused(tmp_path: Path) -> None:
    ours, theirs = manifest(sample(tmp_path, "a")), manifest(sample(tmp_path, "b"), space=CITYSCAPES)
    message = "theirs uses label space 'cityscapes' (19 classes) but ours 'camvid' (11): fuse only one label space"
    with pytest.raises(ValueError) as refusal:
        join([("ours", ours), ("theirs", theirs)])
    assert str(refusal.value) == message
    with pytest.raises(ValueError) as refusal:
        join([("ours", ours)], leak_check=("theirs", theirs))
    assert str(refusal.value) == message


def test_the_same_image_under_two_names_in_one_manifest_is_refused(tmp_path: Path) -> None:
    listed = manifest(sample(tmp_path, "a", "dawn"), sample(tmp_path, "b", "noon"), sample(tmp_path, "c", "dawn"))
    with pytest.raises(ValueError) as refusal:
        join([("m.parquet", listed)])
    assert str(refusal.value) == "m.parquet: 'a' and 'c' are the same image (same content): leave one of them out"


def test_the_same_image_under_two_names_in_two_manifests_is_refused(tmp_path: Path) -> None:
    fine = manifest(sample(tmp_path, "f1", "dawn"), sample(tmp_path, "f2", "noon"), sample(tmp_path, "f3", "dusk"))
    auto = manifest(*(sample(tmp_path, f"a{i}", c, source="auto") for i, c in enumerate(("dusk", "night", "noon"))))
    with pytest.raises(ValueError) as refusal:
        join([("fine", fine), ("auto", auto)])
    assert str(refusal.value) == (
        "2 images are in both fine and auto (same content; the first is 'f2'): leave them out of one manifest"
    )


def test_the_same_name_for_other_content_in_another_source_is_fine(tmp_path: Path) -> None:
    monday, tuesday = (
        manifest(sample(tmp_path / "1", "a", "dawn")),
        manifest(sample(tmp_path / "2", "a", "noon", source="auto")),
    )
    assert len(join([("monday", monday), ("tuesday", tuesday)]).samples) == 2


@pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "unlabelled"])
def test_a_validation_image_under_another_name_is_a_leak(tmp_path: Path, labelled: bool) -> None:
    train = manifest(sample(tmp_path, "t1", "dawn"), sample(tmp_path, "t2", "noon"))
    held_out = sample(tmp_path, "v1", "noon") if labelled else sample(tmp_path, "v1", "noon", label=None, source="none")
    with pytest.raises(ValueError) as refusal:
        join([("train", train)], leak_check=("val", manifest(held_out)))
    assert str(refusal.value) == (
        "1 images are in both train and val (same content; the first is 't2'):"
        " a network trained on them cannot be scored on them"
    )


def test_a_validation_set_apart_passes_and_is_recorded(city: Path, tmp_path: Path) -> None:
    fine, coarse, val = (load_manifest(city / f"{name}.parquet") for name in ("fine", "coarse", "val"))
    fused = join([("fine", fine), ("coarse", coarse)], weights={"coarse": 0.5}, leak_check=("val", val))
    assert [s.weight for s in fused.samples] == [1.0] * 6 + [0.5] * 10
    assert fused.provenance["leak_check"] == "val"
    save_manifest(tmp_path / "fused.parquet", fused)
    assert load_manifest(tmp_path / "fused.parquet") == fused


def test_fusing_the_city_with_itself_is_refused(city: Path) -> None:
    fine = load_manifest(city / "fine.parquet")
    with pytest.raises(ValueError, match=r"^6 images are in both fine and again \(same content; the first is '"):
        join([("fine", fine), ("again", fine)])


# --- from and to files ------------------------------------------------------------------------------------------------


def saved(path: Path, *samples: Sample) -> Path:
    save_manifest(path, manifest(*samples))
    return path


def test_fuse_writes_the_joined_manifest_and_its_account(tmp_path: Path) -> None:
    fine = saved(tmp_path / "fine.parquet", sample(tmp_path, "a"), sample(tmp_path, "n", label=None, source="none"))
    auto = saved(tmp_path / "auto.parquet", sample(tmp_path, "b", source="auto"), sample(tmp_path, "c", source="auto"))
    val = saved(tmp_path / "val.parquet", sample(tmp_path, "v"))
    fused = fuse([fine, auto], tmp_path / "fused.parquet", weights={"auto": 0.5}, leak_check=val)
    assert load_manifest(tmp_path / "fused.parquet") == fused.manifest
    assert [(s.sample_id, s.weight) for s in fused.manifest.samples] == [("a", 1.0), ("b", 0.5), ("c", 0.5)]
    assert fused.lines() == [
        f"{fine}: 1 samples, 1 without a label left out",
        f"{auto}: 2 samples",
        f"wrote {tmp_path}/fused.parquet: 3 samples",
    ]


@pytest.mark.parametrize(("source", "weight"), [("car", 1.0), ("auto", -1.0), ("auto", float("nan")), ("auto", 1e999)])
def test_a_weight_that_is_none_is_refused(tmp_path: Path, source: str, weight: float) -> None:
    fine = saved(tmp_path / "fine.parquet", sample(tmp_path, "a"))
    with pytest.raises(ValueError) as refusal:
        fuse([fine], tmp_path / "fused.parquet", weights={source: weight})
    assert str(refusal.value) == (
        f"weight {source}={weight:g}: expected a source (fine, corrected, coarse, auto, none) and a number, 0 or more"
    )
    assert not (tmp_path / "fused.parquet").exists()
