"""If fuse mixes two numberings or hides a validation image, a student's score means nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import autolabel, refused
from numpy.typing import NDArray
from PIL import Image
from tiny import manifest, sample

from autolabel.manifests import marks, samples, sifted
from autolabel.manifests.contests import Contest
from autolabel.manifests.fuse import PartAccount, fuse, join, joined
from autolabel.manifests.label_space import CAMVID, CITYSCAPES
from autolabel.manifests.run.sample_labels import read_sample_label
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


# --- whose label stands -----------------------------------------------------------------------------------------------


def drawn(root: Path, name: str, content: str, source: str, row: Sequence[int]) -> Sample:
    """A sample whose label has the first eight pixels `row`, and class 0 elsewhere."""
    made = sample(root, name, content, source=source)
    ids = np.zeros((6, 8), np.uint8)
    ids[0, : len(row)] = row
    assert made.label is not None
    made.label.parent.mkdir(exist_ok=True)
    Image.fromarray(ids).save(made.label)
    return made


@pytest.mark.parametrize("order", [*itertools.permutations(("fine", "corrected", "auto"))], ids="-".join)
def test_people_stand_before_machines_in_whatever_order_they_are_given(tmp_path: Path, order: Sequence[str]) -> None:
    by_source = {
        "fine": manifest(drawn(tmp_path / "f", "1", "dawn", "fine", [1, 1])),
        "corrected": manifest(
            drawn(tmp_path / "c", "1", "dawn", "corrected", [1, 255, 2]),
            drawn(tmp_path / "c", "2", "noon", "corrected", [255] * 8),
        ),
        "auto": manifest(*(sample(tmp_path / "a", n, n, source="auto") for n in ("night", "noon", "dawn"))),
    }
    result = joined([(source, by_source[source]) for source in order])
    standing = [(s.source, s.sample_id) for s in result.manifest.samples]
    assert sorted(standing) == [("auto", "night"), ("corrected", "2"), ("fine", "1")]
    assert [source for source, _ in standing] == list(order)
    assert dict(zip(order, result.gave_way, strict=True)) == {"fine": 0, "corrected": 1, "auto": 2}
    assert [*map(str, result.contests)] == [
        "1 fine label stands before corrected labels of the same images; people differ in 2 pixels of 1 image",
        "1 fine label stands before auto labels of the same images",
        "1 corrected label stands before auto labels of the same images",
    ]
    assert result.manifest.provenance["contests"] == [
        {"stands": "fine", "gives_way": "corrected", "images": 1, "differing": 1, "pixels": 2},
        {"stands": "fine", "gives_way": "auto", "images": 1, "differing": None, "pixels": None},
        {"stands": "corrected", "gives_way": "auto", "images": 1, "differing": None, "pixels": None},
    ]
    (whole,) = (s for s in result.manifest.samples if s.sample_id == "2")
    assert (read_sample_label(whole, CAMVID)[0] == 255).all()  # ignored by a person, whatever the machine says


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "fine",
            "2 fine labels stand before earlier fine labels of the same images; people differ in 3 pixels of 1 image",
        ),
        (
            "corrected",
            "2 corrected labels stand before earlier corrected labels of the same images; people differ in 3 pixels of"
            " 1 image (`autolabel import` of both at once keeps both)",
        ),
        ("auto", "2 auto labels stand before earlier auto labels of the same images"),
    ],
)
def test_of_two_labels_of_one_source_the_later_one_stands(tmp_path: Path, source: str, said: str) -> None:
    first, later = (
        manifest(*(drawn(tmp_path / name, n, n, source, row) for n, row in zip(("dawn", "noon"), rows, strict=True)))
        for name, rows in (("first", ([1, 2, 3], [4])), ("later", ([1, 255, 4, 5], [4])))
    )
    result = joined([("first", first), ("later", later)])
    assert result.manifest.samples == later.samples and result.gave_way == (2, 0)
    assert [*map(str, result.contests)] == [said]
    assert joined([("later", later), ("first", first)]).manifest.samples == first.samples


def test_three_people_who_label_one_image_are_each_counted_against_the_one_who_stands(tmp_path: Path) -> None:
    rows = ([1], [1, 2], [1, 2, 3])
    parts = [(str(n), manifest(drawn(tmp_path / str(n), "a", "dawn", "corrected", row))) for n, row in enumerate(rows)]
    result = joined(parts)
    assert [s.image.parts[-3] for s in result.manifest.samples] == ["2"]
    assert result.contests == (Contest("corrected", "corrected", 2, 2, 3),)
    assert result.gave_way == (1, 1, 0)


def test_labels_of_people_that_are_equal_are_said_to_be(tmp_path: Path) -> None:
    one, two = (manifest(drawn(tmp_path / name, "a", "dawn", "fine", [3])) for name in "ab")
    (contest,) = joined([("one", one), ("two", two)]).contests
    assert str(contest) == "1 fine label stands before earlier fine labels of the same images, which are equal"


def test_coarse_and_automatic_labels_of_an_image_meet_only_where_a_person_stands_before_both(tmp_path: Path) -> None:
    coarse = manifest(*(sample(tmp_path, f"c{i}", c, source="coarse") for i, c in enumerate(("noon", "dusk", "dawn"))))
    auto = manifest(*(sample(tmp_path, f"a{i}", c, source="auto") for i, c in enumerate(("dusk", "night", "noon"))))
    with pytest.raises(ValueError) as refusal:
        join([("auto", auto), ("coarse", coarse)])
    assert str(refusal.value) == (
        "2 images with a coarse label in coarse and an automatic one in auto (same content; the first is 'c0'): the"
        " policy has put the coarse label into the automatic one already, so leave coarse out, or these images with"
        " --drop"
    )
    people = manifest(sample(tmp_path, "p0", "noon", source="corrected"), sample(tmp_path, "p1", "dusk", source="fine"))
    result = joined([("people", people), ("auto", auto), ("coarse", coarse)])
    assert [s.sample_id for s in result.manifest.samples] == ["p0", "p1", "a1", "c2"]


def test_two_images_of_a_source_that_share_an_id_are_refused_with_both_manifests(tmp_path: Path) -> None:
    monday, tuesday = (
        manifest(sample(tmp_path / day, "a", day, source="auto"), sample(tmp_path / day, f"{day}-b", source="auto"))
        for day in ("monday", "tuesday")
    )
    with pytest.raises(ValueError) as refusal:
        join([("monday", monday), ("tuesday", tuesday)])
    assert str(refusal.value) == (
        "monday and tuesday use 1 id for different images (the first is 'a', auto): scan the folder above both, so that"
        " ids tell them apart, or leave them out"
    )


def test_a_label_of_a_person_that_cannot_be_read_is_named_where_it_meets_another(tmp_path: Path) -> None:
    one, two = (manifest(drawn(tmp_path / name, "a", "dawn", "fine", [3])) for name in "ab")
    (tmp_path / "a/labels/a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a/labels/a\.png"):
        join([("one", one), ("two", two)])


def test_runs_that_were_corrected_stay_named_in_what_is_fused(tmp_path: Path) -> None:
    fixed, more = (
        replace(manifest(sample(tmp_path, name, source="corrected")), provenance={"corrects": [str(tmp_path / run)]})
        for name, run in (("a", "runs/b"), ("b", "runs/a"))
    )
    fused = join([("fixed", fixed), ("more", more), ("fine", manifest(sample(tmp_path, "c")))])
    assert fused.corrects == (tmp_path / "runs/a", tmp_path / "runs/b")


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
        f"{fine}: 1 samples; left out: 1 without a label",
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


@pytest.mark.parametrize("weak", [False, True], ids=["marks", "marks that all meet"])
def test_files_are_joined_to_the_bytes_of_samples_in_memory_also_where_marks_of_other_ids_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weak: bool
) -> None:
    if weak:
        monkeypatch.setattr(marks, "hash", lambda _: 5, raising=False)
    monkeypatch.setattr(sifted, "ROWS_AT_ONCE", 3)  # pieces of the output
    monkeypatch.setattr(samples, "ROWS_AT_ONCE", 3)
    monkeypatch.chdir(tmp_path)
    coarse = tmp_path / "deep/coarse/x.png"
    parts = {
        "fine": [drawn(tmp_path / "deep/f", n, n, "fine", [1]) for n in "abcd"],
        "auto": [sample(tmp_path / "deep/a", n, n, source="auto", coarse_label=coarse) for n in ("e", "c", "g/h", "i")],
        "fixed": [drawn(tmp_path / "fixed", n, n, "corrected", [2]) for n in "dijk"],
    }
    files = [str(saved(tmp_path / f"{name}.parquet", *some)) for name, some in parts.items()]
    fused = fuse(files, tmp_path / "fused.parquet", weights={"auto": 0.3, "coarse": 2})
    held = joined([(name, load_manifest(name)) for name in files], weights={"auto": 0.3, "coarse": 2})
    told = {"parts": [asdict(part) for part in fused.parts]}
    save_manifest(tmp_path / "held.parquet", replace(held.manifest, provenance={**held.manifest.provenance, **told}))
    assert (tmp_path / "fused.parquet").read_bytes() == (tmp_path / "held.parquet").read_bytes()
    assert [s.sample_id for s in fused.manifest.samples] == ["a", "b", "c", "d", "e", "g/h", "i", "j", "k"]


def test_a_manifest_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = saved(tmp_path / "fine.parquet", *(sample(tmp_path, name) for name in "abc"))

    def settle(*_: object) -> tuple[list[NDArray[np.bool_]], list[Contest]]:
        saved(fine, *(sample(tmp_path, name) for name in "ab"))
        return [np.zeros(3, np.bool_)], []

    monkeypatch.setattr("autolabel.manifests.fuse.settle", settle)
    with pytest.raises(ValueError) as refusal:
        fuse([fine], tmp_path / "fused.parquet")
    assert str(refusal.value) == f"{fine} was changed while it was read: do it again"
    assert not (tmp_path / "fused.parquet").exists()


# --- leaving out by id ------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    fine = saved(tmp_path / "fine.parquet", *(sample(tmp_path / "f", n) for n in ("a", "b")))
    names = ("a", "c", "d", "e")
    auto = saved(tmp_path / "auto.parquet", *(sample(tmp_path, n, n.upper(), source="auto") for n in names))
    fixed = saved(tmp_path / "fixed.parquet", sample(tmp_path / "c", "e", "E", source="corrected"))
    return [fine, auto, fixed]


def test_drop_and_only_leave_out_samples_by_id_and_every_sample_is_accounted_for(
    parts: list[Path], tmp_path: Path
) -> None:
    drop, only, out = tmp_path / "drop.csv", tmp_path / "only.txt", tmp_path / "fused.parquet"
    drop.write_text("sample_id,mark\nc,reject\nx,reject\n")
    only.write_text("# looked at\na\nc\ne\n")
    fused = fuse(parts, out, drop=drop, only=only)
    assert [s.key for s in fused.manifest.samples] == [("fine", "a"), ("auto", "a"), ("corrected", "e")]
    assert fused.parts == (
        PartAccount(str(parts[0]), 2, taken=1, unlabelled=0, dropped=0, unlisted=1, selected=0, gave_way=0),
        PartAccount(str(parts[1]), 4, taken=1, unlabelled=0, dropped=1, unlisted=1, selected=0, gave_way=1),
        PartAccount(str(parts[2]), 1, taken=1, unlabelled=0, dropped=0, unlisted=0, selected=0, gave_way=0),
    )
    assert fused.lines() == [
        f"{parts[0]}: 1 samples; left out: 1 not in --only",
        f"{parts[1]}: 1 samples; left out: 1 by --drop, 1 not in --only, 1 that give way",
        f"{parts[2]}: 1 samples",
        "1 corrected label stands before auto labels of the same images",
        f"{drop}: 1 of its 2 ids not in these manifests: 'x'",
        f"wrote {out}: 3 samples",
    ]
    kept = load_manifest(out).provenance
    assert kept["selection"] == {"drop": str(drop), "only": str(only)}
    assert [part["taken"] for part in kept["parts"]] == [1, 1, 1]
    asked = ("manifest", "fuse", *parts, "-o", tmp_path / "again.parquet", "--drop", drop, "--only", only)
    assert autolabel(*asked).stdout.splitlines()[:-1] == fused.lines()[:-1]
    assert load_manifest(tmp_path / "again.parquet").samples == fused.manifest.samples


@pytest.mark.parametrize(
    ("option", "ids", "message"),
    [
        ("--drop", "x\ny\n", "{}: none of its 2 ids is in these manifests ('x', 'y')"),
        ("--only", "a.png\n", "{}: none of its 1 id is in these manifests ('a.png')"),
        ("--only", "", "{} names no sample: expected sample ids, one a line, or a CSV whose first column has them"),
        ("--drop", "a\nb\nc\nd\ne\n", "no labelled sample in these manifests after --drop: nothing to fuse"),
    ],
)
def test_ids_of_something_else_and_those_of_everything_are_refused(
    parts: list[Path], tmp_path: Path, option: str, ids: str, message: str
) -> None:
    (tmp_path / "ids.txt").write_text(ids)
    out = tmp_path / "fused.parquet"
    assert refused("manifest", "fuse", *parts, "-o", out, option, tmp_path / "ids.txt") == message.format(
        tmp_path / "ids.txt"
    )
    assert not out.exists()
