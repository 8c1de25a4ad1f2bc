"""If a manifest can point elsewhere, mix two numberings or hide a validation image, a student is trained on the wrong
thing and its score means nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autolabel.manifests.fuse import join
from autolabel.manifests.images import read_image
from autolabel.manifests.label_space import CAMVID, CITYSCAPES, LabelSpace
from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.samples import (
    Manifest,
    Sample,
    fingerprints,
    load_manifest,
    open_manifest,
    save_manifest,
)
from autolabel.manifests.scan import scan
from autolabel.manifests.schemas import IMAGES_SCHEMA, MANIFEST_SCHEMA
from autolabel.manifests.tables import BadTable, writing_table

Change = Callable[[pa.Table], pa.Table]


def sample(root: Path, name: str, content: str | None = None, **fields: Any) -> Sample:
    """A labelled sample whose image file holds `content`; to a manifest, a file is its bytes."""
    image = root / "images" / f"{name}.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes((content or f"photo {name}").encode())
    standard = {"source": "fine", "label": root / "labels" / f"{name}.png"}
    return Sample(name, image, 6, 8, **{**standard, **fields})


def manifest(*samples: Sample, space: LabelSpace = CAMVID) -> Manifest:
    return Manifest.of(space, samples)


def changed(path: Path, change: Change) -> Path:
    """A manifest as a stranger might have written it."""
    pq.write_table(change(pq.read_table(path)), path)
    return path


def column(name: str, value: Any, kind: pa.DataType | None = None) -> Change:
    def change(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        return table.set_column(place, name, pa.array([value] * len(table), kind))

    return change


def metadata(raw: bytes) -> Change:
    return lambda table: table.replace_schema_metadata({b"autolabel": raw})


def about(**fields: Any) -> Change:
    """Other values in the metadata; None takes one away."""

    def change(table: pa.Table) -> pa.Table:
        found = {**json.loads(table.schema.metadata[b"autolabel"]), **fields}
        return metadata(json.dumps({k: v for k, v in found.items() if v is not None}).encode())(table)

    return change


# --- save and load ----------------------------------------------------------------------------------------------------


def test_a_manifest_is_the_same_after_saving_and_loading_with_absolute_paths(tmp_path: Path) -> None:
    everything = Sample(
        "monday/ä 1", tmp_path / "in/monday/ä 1.jpg", 1024, 2048, "train", "monday", "auto",
        tmp_path / "runs/auto/labels.zarr/b1024x2048", 77, "train", tmp_path / "coarse/ä 1.png", 0.5,
    )  # fmt: skip
    unreadable = Sample("b", tmp_path / "in/b.jpg", 0, 0)
    made = Manifest.of(CITYSCAPES, (everything, unreadable), provenance={"layout": "folder", "root": "in"})
    save_manifest(tmp_path / "m.parquet", made)
    loaded = load_manifest(tmp_path / "m.parquet")
    assert loaded == made
    assert loaded.samples == (everything, unreadable)
    assert all(s.image.is_absolute() for s in loaded.samples)
    assert loaded.labelled == (everything,)


def test_the_table_has_the_promised_columns_and_paths_under_their_roots(tmp_path: Path) -> None:
    save_manifest(tmp_path / "lists/m.parquet", manifest(sample(tmp_path, "day/a"), sample(tmp_path, "b")))
    table = pq.read_table(tmp_path / "lists/m.parquet")
    assert table.schema.equals(MANIFEST_SCHEMA)
    assert table.column("image").to_pylist() == ["day/a.png", "b.png"]
    assert table.column("label").to_pylist() == ["day/a.png", "b.png"]
    found = json.loads(table.schema.metadata[b"autolabel"])
    assert (found["image_root"], found["label_root"]) == ("../images", "../labels")
    assert (found["kind"], found["schema_version"]) == ("manifest", 1)


def test_an_opened_manifest_gives_the_rows_and_absolute_roots(tmp_path: Path) -> None:
    save_manifest(tmp_path / "lists/m.parquet", manifest(sample(tmp_path, "a", weight=0.5)))
    opened = open_manifest(tmp_path / "lists/m.parquet")
    (table,) = opened.tables()
    assert table.select(["sample_id", "height", "width", "source", "weight"]).to_pylist() == [
        {"sample_id": "a", "height": 6, "width": 8, "source": "fine", "weight": 0.5}
    ]
    assert (opened.image_root, opened.label_root) == (tmp_path / "images", tmp_path / "labels")


def test_a_manifest_without_samples_is_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    save_manifest(tmp_path / "m.parquet", manifest())
    assert load_manifest(tmp_path / "m.parquet").samples == ()


def test_a_folder_that_is_moved_as_a_whole_still_loads(city: Path, tmp_path: Path) -> None:
    shutil.copytree(city / "data", tmp_path / "before/data")
    made, _ = scan(tmp_path / "before/data", layout="cityscapes", splits=["val"])
    save_manifest(tmp_path / "before/lists/val.parquet", made)
    (tmp_path / "before").rename(tmp_path / "after")
    loaded = load_manifest(tmp_path / "after/lists/val.parquet")
    assert [s.sample_id for s in loaded.samples] == [s.sample_id for s in made.samples]
    for s in loaded.samples:
        assert s.image.is_relative_to(tmp_path / "after/data/leftImg8bit")
        assert s.label is not None
        assert s.label.is_file()
        assert read_image(s.image).shape == (s.height, s.width, 3)


def test_a_manifest_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = manifest(sample(tmp_path, "a"))
    monkeypatch.chdir(tmp_path)
    save_manifest(Path("m.parquet"), made)
    assert load_manifest("m.parquet") == made
    monkeypatch.chdir("/")
    assert load_manifest(tmp_path / "m.parquet") == made


@pytest.mark.parametrize("name", ["image", "label", "coarse_label"])
@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", ".."])
def test_a_path_that_leaves_its_root_is_refused(tmp_path: Path, name: str, path: str) -> None:
    file = tmp_path / "m.parquet"
    save_manifest(file, manifest(sample(tmp_path, "a")))
    with pytest.raises(BadTable) as refusal:
        load_manifest(changed(file, column(name, path)))
    root = tmp_path / ("images" if name == "image" else "labels")
    assert str(refusal.value) == f"{file}: path {path!r} leaves its root {root}"


# --- what is no manifest ----------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadTable) as refusal:
        load_manifest(tmp_path / "m.parquet")
    assert str(refusal.value) == f"{tmp_path}/m.parquet does not exist"


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999])
def test_a_cut_parquet_file_is_refused(tmp_path: Path, share: float) -> None:
    file = tmp_path / "m.parquet"
    save_manifest(file, manifest(sample(tmp_path, "a")))
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(BadTable) as refusal:
        load_manifest(file)
    assert str(refusal.value).startswith(f"{file} is not a readable parquet file (")


def write_table(path: Path, table: pa.Table) -> None:
    with writing_table(path, table.schema) as add:
        add(table)


def test_another_parquet_table_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "stats.parquet"
    write_table(file, IMAGES_SCHEMA.empty_table())
    with pytest.raises(BadTable, match=r"stats\.parquet lacks the columns image, split, group, source, label,"):
        load_manifest(file)


def test_a_table_of_the_same_columns_is_not_yet_a_manifest(tmp_path: Path) -> None:
    file = tmp_path / "m.parquet"
    write_table(file, MANIFEST_SCHEMA.empty_table())
    with pytest.raises(BadTable) as refusal:
        load_manifest(file)
    assert str(refusal.value) == (
        f"{file} is a parquet file, but not a manifest: make one with `autolabel manifest scan`"
    )


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(about(schema_version=2), id="of a later version"),
        pytest.param(about(schema_version=None), id="without a version"),
        pytest.param(about(image_root=None), id="without a root"),
        pytest.param(about(label_space=None), id="without a label space"),
        pytest.param(about(label_space={"labels": []}), id="with no class"),
        pytest.param(metadata(b"{"), id="with cut metadata"),
        pytest.param(metadata(b"[]"), id="with other metadata"),
        pytest.param(column("height", "six"), id="with words for numbers"),
        pytest.param(column("image", None, pa.string()), id="without an image"),
        pytest.param(column("sample_id", None, pa.string()), id="without an id"),
        pytest.param(column("source", "guess"), id="of unknown source"),
        pytest.param(column("label_ids", "colour"), id="of unknown label ids"),
    ],
)
def test_a_damaged_manifest_is_refused_by_name(tmp_path: Path, change: Change) -> None:
    file = tmp_path / "m.parquet"
    save_manifest(file, manifest(sample(tmp_path, "a")))
    with pytest.raises(BadTable) as refusal:
        load_manifest(changed(file, change))
    assert str(refusal.value).startswith(str(file))


def test_a_sample_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    a, b = sample(tmp_path, "a"), sample(tmp_path, "b")
    with pytest.raises(ValueError) as refusal:
        manifest(a, b, replace(a, weight=2.0))
    assert str(refusal.value) == "sample 'a' (fine) is listed 2 times: every sample may appear once"
    with pytest.raises(ValueError, match=r"'a' \(fine\) is listed 3 times, and 1 more are too: every sample"):
        manifest(a, b, a, b, a)
    assert len(manifest(a, replace(a, source="auto")).samples) == 2


# --- fuse -------------------------------------------------------------------------------------------------------------


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


def test_an_image_that_is_gone_is_named(tmp_path: Path) -> None:
    gone = sample(tmp_path, "a")
    gone.image.unlink()
    with pytest.raises(BadTable) as refusal:
        fingerprints([gone])
    assert str(refusal.value) == f"image {gone.image} of sample 'a': No such file or directory"


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["images", "classes", "centroids"])
def test_an_unfinished_run_has_no_statistics_and_says_so(tmp_path: Path, table: str) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(BadTable) as refusal:
        RunFolder(tmp_path).statistics(table)
    assert str(refusal.value) == (
        f"{tmp_path}/stats/{table}.parquet does not exist: finish the run first with `autolabel generate`"
    )


def test_statistics_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        {"sample_id": "a", "height": 6, "labelled_pixels": 40, "ignored_fraction": 1 / 6, "label_crc32c": 2**32 - 1}
    ]
    written = pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA)
    write_table(tmp_path / "stats/images.parquet", written)
    assert RunFolder(tmp_path).statistics().equals(written)
    assert RunFolder(tmp_path).statistics("images").equals(written)


def test_an_unknown_statistics_table_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refusal:
        RunFolder(tmp_path).statistics("pictures")
    assert str(refusal.value) == "no statistics table 'pictures': expected one of images, classes, centroids, review"


def test_a_damaged_statistics_table_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "stats/images.parquet", IMAGES_SCHEMA.empty_table())
    data = (tmp_path / "stats/images.parquet").read_bytes()
    (tmp_path / "stats/images.parquet").write_bytes(data[:-10])
    with pytest.raises(BadTable, match=r"images\.parquet is not a readable parquet file"):
        RunFolder(tmp_path).statistics()
