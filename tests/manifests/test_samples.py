"""If a manifest can point elsewhere or mix two numberings, a student is trained on the wrong thing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import manifest, sample, write_table

from autolabel.manifests.images import read_image
from autolabel.manifests.label_space import CITYSCAPES
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
from autolabel.manifests.tables import BadTable

Change = Callable[[pa.Table], pa.Table]


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


def test_an_image_that_is_gone_is_named(tmp_path: Path) -> None:
    gone = sample(tmp_path, "a")
    gone.image.unlink()
    with pytest.raises(BadTable) as refusal:
        fingerprints([gone])
    assert str(refusal.value) == f"image {gone.image} of sample 'a': No such file or directory"


# --- the run of a label -----------------------------------------------------------------------------------------------


def auto(root: Path, name: str, run: Path | None) -> Sample:
    return sample(root, name, source="auto", label=(run or root) / "labels.zarr/b512x512", label_index=0, run=run)


def test_the_run_of_every_label_is_written_relative_to_the_manifest_and_found_again(tmp_path: Path) -> None:
    runs = [tmp_path / "runs/a", tmp_path / "runs/a/inner"]
    listed = manifest(
        sample(tmp_path, "fine"), *(auto(tmp_path, run.name, run) for run in runs), auto(tmp_path, "x", None)
    )
    assert listed.runs == tuple(runs)
    save_manifest(tmp_path / "lists/m.parquet", listed)
    header = json.loads(pq.read_schema(tmp_path / "lists/m.parquet").metadata[b"autolabel"])
    assert header["provenance"] == {"runs": ["../runs/a", "../runs/a/inner"]}
    loaded = load_manifest(tmp_path / "lists/m.parquet")
    assert loaded == listed and loaded.provenance == {}


def test_a_manifest_that_is_moved_with_its_run_names_the_run_in_its_new_place(tmp_path: Path) -> None:
    listed = manifest(auto(tmp_path / "old", "a", tmp_path / "old/run"))
    save_manifest(tmp_path / "old/run/manifest.parquet", listed)
    (tmp_path / "old").rename(tmp_path / "new")
    assert load_manifest(tmp_path / "new/run/manifest.parquet").runs == (tmp_path / "new/run",)


def test_the_runs_that_people_have_corrected_are_found_again_where_the_manifest_was_moved_with_them(
    tmp_path: Path,
) -> None:
    run = tmp_path / "old/run"
    fixed = replace(manifest(sample(tmp_path / "old", "a", source="corrected")), provenance={"corrects": [str(run)]})
    assert fixed.corrects == (run,) and fixed.lines()[-1] == f"  corrects    {run}"
    save_manifest(tmp_path / "old/fixed.parquet", fixed)
    header = json.loads(pq.read_schema(tmp_path / "old/fixed.parquet").metadata[b"autolabel"])
    assert header["provenance"] == {"corrects": ["run"]}
    assert load_manifest(tmp_path / "old/fixed.parquet") == fixed
    (tmp_path / "old").rename(tmp_path / "new")
    assert load_manifest(tmp_path / "new/fixed.parquet").corrects == (tmp_path / "new/run",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"provenance": {"corrects": [7]}}, "'provenance', 'corrects'[0] is 7: expected a path"),
        ({"provenance": {"runs": 7}}, "'provenance', 'runs' is 7: expected a list"),
        ({"provenance": {"runs": ["a", 7]}}, "'provenance', 'runs'[1] is 7: expected a path"),
        ({"provenance": {"runs": ["a\0"]}}, "'provenance', 'runs'[0] is \"a\\u0000\": expected a path"),
        ({"provenance": {"runs": {"a": "b"}}}, "'provenance', 'runs' is {\"a\": \"b\"}: expected a list"),
        ({"provenance": 5}, "'provenance' is 5: expected an object"),
        ({"provenance": ["runs"]}, "'provenance' is [\"runs\"]: expected an object"),
        ({"image_root": 5}, "'image_root' is 5: expected a path"),
        ({"image_root": [1]}, "'image_root' is [1]: expected a path"),
        ({"image_root": "\0"}, "'image_root' is \"\\u0000\": expected a path"),
        ({"label_root": False}, "'label_root' is false: expected a path"),
        ({"label_root": ""}, "'label_root' is \"\": expected a path"),
        ({"label_space": 5}, "'label_space' is 5: expected an object"),
        (
            {"label_space": {"labels": [{"name": "a", "color": "123"}]}},
            "label 'a', 'color' is \"123\": expected a list",
        ),
        ({"schema_version": "1"}, " has schema version '1': this program knows 1"),
        ({"schema_version": 10**400}, " is a number of 1329 bits: expected at most 64"),
        ({"nested": json.loads("[" * 40 + "]" * 40)}, "its metadata is nested more than 32 levels deep"),
        ({"unheard": 1}, "its metadata has an unknown key 'unheard': expected kind, schema_version"),
    ],
)
def test_metadata_of_another_type_is_refused_with_file_and_key(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_manifest(tmp_path / "m.parquet", manifest(sample(tmp_path, "a")))
    with pytest.raises(BadTable) as refusal:
        open_manifest(changed(tmp_path / "m.parquet", about(**fields)))
    assert str(refusal.value).startswith(str(tmp_path / "m.parquet")) and message in str(refusal.value)


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
    assert str(refusal.value).startswith(f"{file} is not a readable parquet file: ")


def test_another_parquet_table_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "stats.parquet"
    write_table(file, IMAGES_SCHEMA.empty_table())
    with pytest.raises(BadTable, match=r"stats\.parquet lacks the columns image, split, group, source, label,"):
        load_manifest(file)


def test_a_manifest_that_went_through_pandas_says_how_to_put_its_metadata_back_and_that_helps(tmp_path: Path) -> None:
    original, file = tmp_path / "m.parquet", tmp_path / "filtered [1] 'x'.parquet"
    save_manifest(original, manifest(*(sample(tmp_path, name) for name in "abc")))
    frame = pd.read_parquet(original)
    frame[frame.sample_id != "b"].to_parquet(file)
    with pytest.raises(BadTable, match=r"^.* has the columns of a manifest, but not its metadata") as refusal:
        load_manifest(file)
    _, code = str(refusal.value).split("In Python: ")
    exec(code.replace("'THE ORIGINAL'", repr(str(original))))
    assert [s.sample_id for s in load_manifest(file).samples] == ["a", "c"]
    assert load_manifest(file).samples == tuple(s for s in load_manifest(original).samples if s.sample_id != "b")


def test_another_parquet_file_with_our_metadata_is_no_manifest(tmp_path: Path) -> None:
    save_manifest(tmp_path / "m.parquet", manifest(sample(tmp_path, "a")))
    with pytest.raises(BadTable, match=r"is a parquet file, but not a manifest: make one with `autolabel manifest sca"):
        load_manifest(changed(tmp_path / "m.parquet", about(kind="run")))


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
