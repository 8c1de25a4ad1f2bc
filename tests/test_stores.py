"""A label that was cut off by a crash, belongs to another image or has rotted on disk must never be read as a label."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests.classes import CAMVID, CITYSCAPES, IGNORE
from autolabel.manifests.files import write_json
from autolabel.manifests.images import BadImage
from autolabel.manifests.stores import (
    PNG,
    ZARR,
    DamagedLabel,
    bucket_of,
    crc32c,
    create_zarr,
    open_labels,
    png_name,
    read_sample_label,
    read_zarr,
    shard_path,
    write_png,
    write_zarr_shard,
)
from autolabel.manifests.tables import Sample
from autolabel.pipeline.units import LABELLED, QUARANTINED, Row, Unit, bucket_rows, plan_units, write_record

Label = NDArray[np.uint8]
SHARD = 2  # rows
BUCKET = "b512x512"


def street(seed: int, height: int, width: int) -> Label:
    """Blocks of 11 classes, a seventh of them ignored; no two seeds give the same."""
    dice = np.random.default_rng(seed)
    blocks = dice.integers(0, 11, (-(-height // 16), -(-width // 16)), np.uint8)
    blocks[dice.random(blocks.shape) < 1 / 7] = IGNORE
    label = np.kron(blocks, np.ones((16, 16), np.uint8))[:height, :width]
    label[0, 0] = seed % 11
    return np.ascontiguousarray(label)


SIZES = [(1, 1), (511, 513), (512, 512), (600, 700), (64, 2000)]
STREETS = {f"city/{h}x{w}": street(i, h, w) for i, (h, w) in enumerate(SIZES)}
STREETS["city/second of its size"] = street(9, 600, 700)
STREETS["city/nothing sure"] = np.full((600, 700), IGNORE, np.uint8)


def commit(run: Path, unit: Unit, labels: Mapping[str, Label | None], store: str) -> None:
    """Write the labels of a unit and commit it; samples without one are quarantined."""
    rows: list[Row] = []
    for place, sample in enumerate(unit.samples, unit.first_row):
        row: Row = {"sample_id": sample.sample_id, "unit": unit.name, "height": sample.height, "width": sample.width}
        label = labels.get(sample.sample_id)
        if label is None:
            rows.append({**row, "status": QUARANTINED, "reason": "damaged"})
            continue
        where = {"label": f"{ZARR}/{unit.bucket}", "label_index": place}
        if store == "png":
            where = {"label": f"{PNG}/{png_name(sample.sample_id + '.jpg')}", "label_index": None}
            write_png(run / str(where["label"]), label)
        rows.append({**row, **where, "status": LABELLED, "label_crc32c": crc32c(label)})
    shard = None
    blocks = [labels.get(s.sample_id) for s in unit.samples]
    if store == "zarr" and any(block is not None for block in blocks):
        shard = write_zarr_shard(run / ZARR / unit.bucket, unit.first_row, blocks)
    write_record(run, unit, rows, shard)


def make_run(run: Path, labels: Mapping[str, Label | None], store: str = "zarr") -> list[Unit]:
    """A finished run folder; None for a sample of 500 x 500 that was quarantined."""
    samples = []
    for sample_id, label in labels.items():
        height, width = (500, 500) if label is None else label.shape
        samples.append(Sample(sample_id, run / f"{sample_id}.jpg", height, width))
    units = plan_units(samples, SHARD)
    write_json(run / "run.json", {"label_space": json.loads(CAMVID.to_json())})
    if store == "zarr":
        create_zarr(run / ZARR, bucket_rows(units), SHARD, {"ignore": IGNORE})
    for unit in units:
        commit(run, unit, labels, store)
    return units


def one_shard(run: Path) -> tuple[Path, Path, Label]:
    """A run of two labels in one shard: the run, the file, the first label."""
    first = street(1, 500, 512)
    make_run(run, {"a": first, "b": street(2, 512, 300)})
    return run, shard_path(run / ZARR / BUCKET, 0), first


# --- what is written is what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["zarr", "png"])
def test_every_label_is_read_back_exactly_whatever_its_size_and_store(tmp_path: Path, store: str) -> None:
    make_run(tmp_path, STREETS, store)
    labels = open_labels(tmp_path)
    assert sorted(labels) == sorted(STREETS)
    assert len(labels) == len(STREETS)
    for sample_id, label in STREETS.items():
        assert labels[sample_id].dtype == np.uint8
        assert np.array_equal(labels[sample_id], label)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1, 1), "b512x512"),
        ((512, 512), "b512x512"),
        ((511, 513), "b512x1024"),
        ((600, 700), "b1024x1024"),
        ((1024, 2048), "b1024x2048"),
        ((1025, 2049), "b1536x2560"),
        ((0, 0), "b0x0"),
    ],
)
def test_a_bucket_has_sides_rounded_up_to_512(size: tuple[int, int], bucket: str) -> None:
    assert bucket_of(*size) == bucket


def test_plain_zarr_reads_the_labels_in_the_corner_of_their_row_and_255_around(tmp_path: Path) -> None:
    units = make_run(tmp_path, STREETS)
    group = zarr.open_group(tmp_path / ZARR, mode="r")
    assert sorted(group.array_keys()) == ["b1024x1024", "b512x1024", "b512x2048", "b512x512"]
    assert group.attrs["ignore"] == IGNORE
    for unit in units:
        rows = np.asarray(group[unit.bucket][unit.first_row : unit.first_row + len(unit.samples)])  # type: ignore[index]
        for row, sample in zip(rows, unit.samples, strict=True):
            expected = np.full(row.shape, IGNORE, np.uint8)
            expected[: sample.height, : sample.width] = STREETS[sample.sample_id]
            assert np.array_equal(row, expected)


def test_the_store_needs_nothing_but_the_core_codecs_of_zarr_v3(tmp_path: Path) -> None:
    make_run(tmp_path, STREETS)
    found = json.loads((tmp_path / ZARR / "b1024x1024/zarr.json").read_text())
    assert (found["zarr_format"], found["data_type"], found["fill_value"]) == (3, "uint8", IGNORE)
    assert found["shape"] == [3, 1024, 1024]
    assert found["dimension_names"] == ["sample", "y", "x"]
    assert found["chunk_grid"]["configuration"]["chunk_shape"] == [SHARD, 1024, 1024]
    (sharding,) = found["codecs"]
    inside = sharding["configuration"]
    assert (sharding["name"], inside["chunk_shape"]) == ("sharding_indexed", [1, 512, 512])
    assert [codec["name"] for codec in inside["codecs"]] == ["bytes", "zstd"]
    assert inside["codecs"][1]["configuration"]["checksum"] is True
    assert [codec["name"] for codec in inside["index_codecs"]] == ["bytes", "crc32c"]
    files = {path.name for path in (tmp_path / ZARR / "b1024x1024").iterdir()}
    assert files == {"zarr.json", "c.0.0.0", "c.1.0.0"}


@pytest.mark.parametrize("count", [1, SHARD])
def test_a_shard_in_which_all_is_ignored_is_still_a_file(tmp_path: Path, count: int) -> None:
    unsure = {f"s{i}": np.full((300, 400), IGNORE, np.uint8) for i in range(count)}
    make_run(tmp_path, unsure)
    assert shard_path(tmp_path / ZARR / BUCKET, 0).is_file()
    labels = open_labels(tmp_path)
    for sample_id, label in unsure.items():
        assert np.array_equal(labels[sample_id], label)


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param([street(1, 600, 700), street(2, 1024, 1024)], id="full"),
        pytest.param([street(1, 600, 700)], id="half a shard"),
        pytest.param([street(1, 600, 700), np.full((600, 700), IGNORE, np.uint8)], id="all ignored"),
        pytest.param([street(1, 600, 700), None], id="quarantined"),
        pytest.param([street(1, 100, 700), street(2, 600, 100)], id="empty chunks"),
    ],
)
def test_the_sizes_of_the_labels_and_of_the_index_make_up_the_shard(tmp_path: Path, labels: list[Label | None]) -> None:
    create_zarr(tmp_path, {"b1024x1024": len(labels)}, SHARD, {})
    shard = write_zarr_shard(tmp_path / "b1024x1024", 0, labels)
    data = (tmp_path / "b1024x1024/c.0.0.0").read_bytes()
    assert (shard.file, shard.bytes, shard.crc32c) == ("c.0.0.0", len(data), crc32c(np.frombuffer(data, np.uint8)))
    assert len(shard.label_bytes) == len(labels)
    assert sum(shard.label_bytes) + SHARD * 4 * 16 + 4 == len(data)


def test_a_unit_that_was_stopped_half_way_is_written_again_with_the_rest(tmp_path: Path) -> None:
    first, second = street(1, 500, 512), street(2, 500, 500)
    (unit,) = make_run(tmp_path, {"a": first, "b": None})
    assert list(open_labels(tmp_path)) == ["a"]
    commit(tmp_path, unit, {"a": first, "b": second}, "zarr")
    labels = open_labels(tmp_path)
    assert np.array_equal(labels["a"], first)
    assert np.array_equal(labels["b"], second)


def test_an_array_that_grows_keeps_its_labels(tmp_path: Path) -> None:
    first, second = street(1, 500, 512), street(2, 512, 300)
    create_zarr(tmp_path, {BUCKET: 1}, 1, {})
    write_zarr_shard(tmp_path / BUCKET, 0, [first])
    assert np.array_equal(read_zarr(tmp_path / BUCKET, 0, 0, 0, 500, 512), first)
    create_zarr(tmp_path, {BUCKET: 2, "b512x1024": 1}, 1, {})
    write_zarr_shard(tmp_path / BUCKET, 1, [second])
    assert np.array_equal(read_zarr(tmp_path / BUCKET, 0, 0, 0, 500, 512), first)
    assert np.array_equal(read_zarr(tmp_path / BUCKET, 1, 0, 0, 512, 300), second)


def test_a_run_made_anew_in_the_same_folder_is_read_anew(tmp_path: Path) -> None:
    make_run(tmp_path / "run", {"a": street(1, 500, 512)})
    assert np.array_equal(open_labels(tmp_path / "run")["a"], street(1, 500, 512))
    shutil.rmtree(tmp_path / "run")
    others = {name: street(i, 400, 512) for i, name in enumerate("abcde", 20)}
    make_run(tmp_path / "run", others)
    labels = open_labels(tmp_path / "run")
    for sample_id, label in others.items():
        assert np.array_equal(labels[sample_id], label)


# --- crops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["zarr", "png"])
def test_a_crop_is_that_slice_of_the_label(tmp_path: Path, store: str) -> None:
    make_run(tmp_path, STREETS, store)
    labels = open_labels(tmp_path)
    dice = random.Random(0)
    for sample_id, label in STREETS.items():
        height, width = label.shape
        windows = [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1), (height // 2, 0, 1, width)]
        for _ in range(20):
            top, left = dice.randrange(height), dice.randrange(width)
            windows.append((top, left, dice.randint(1, height - top), dice.randint(1, width - left)))
            windows.append((top, left, height - top, width - left))
        for top, left, h, w in windows:
            assert np.array_equal(labels.crop(sample_id, top, left, h, w), label[top : top + h, left : left + w])


@pytest.mark.parametrize("store", ["zarr", "png"])
@pytest.mark.parametrize(
    "window",
    [
        pytest.param((-1, 0, 5, 5), id="above"),
        pytest.param((0, -1, 5, 5), id="left"),
        pytest.param((596, 0, 5, 5), id="below, in the padding"),
        pytest.param((0, 696, 5, 5), id="right, in the padding"),
        pytest.param((2000, 0, 5, 5), id="far away"),
    ],
)
def test_a_crop_that_leaves_the_label_is_refused(tmp_path: Path, store: str, window: tuple[int, int, int, int]) -> None:
    make_run(tmp_path, {"a": street(1, 600, 700)}, store)
    with pytest.raises(IndexError) as refusal:
        open_labels(tmp_path).crop("a", *window)
    top, left, height, width = window
    assert str(refusal.value) == (
        f"crop {height} x {width} at ({top}, {left}) leaves the label of 'a', which is 600 x 700"
    )


# --- what is committed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["zarr", "png"])
def test_only_committed_labels_are_there(tmp_path: Path, store: str) -> None:
    labels = {f"s{i}": street(i, 100, 100) for i in range(4)}
    units = make_run(tmp_path, {**labels, "broken": None}, store)
    (tmp_path / "units" / units[-1].record).unlink()  # its labels are on disk, but nobody vouches for them
    committed = open_labels(tmp_path)
    lost = {s.sample_id for s in units[-1].samples}
    assert set(committed) == labels.keys() - lost
    for sample_id in ("broken", "never heard of", *lost):
        assert sample_id not in committed
        for read in (committed.__getitem__, lambda i: committed.crop(i, 0, 0, 1, 1)):
            with pytest.raises(KeyError, match=sample_id):
                read(sample_id)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as refusal:
        open_labels(tmp_path)
    assert str(refusal.value) == f"{tmp_path} is not a run: it has no run.json; make one with `autolabel generate`"


def test_a_run_without_a_finished_unit_has_no_labels(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"label_space": json.loads(CAMVID.to_json())})
    assert list(open_labels(tmp_path)) == []


def test_a_cut_record_is_refused_by_name_and_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    (unit,) = make_run(tmp_path, {"a": street(1, 100, 100)})
    record = tmp_path / "units" / unit.record
    record.write_bytes(record.read_bytes()[:-20])
    with pytest.raises(ValueError, match=unit.record):
        open_labels(tmp_path)


# --- damage -----------------------------------------------------------------------------------------------------------


def reads(run: Path) -> list[Callable[[], Any]]:
    """The ways to read label "a": whole, and a crop that is in the first chunk."""
    labels = open_labels(run)
    return [lambda: labels["a"], lambda: labels.crop("a", 10, 10, 50, 50)]


def test_a_missing_shard_is_an_error_and_never_all_ignored(tmp_path: Path) -> None:
    run, shard, _ = one_shard(tmp_path)
    shard.unlink()
    for read in reads(run):
        with pytest.raises(DamagedLabel) as refusal:
            read()
        assert str(refusal.value) == f"{shard} is missing: run `autolabel generate` again to restore it"


def test_a_missing_array_is_an_error(tmp_path: Path) -> None:
    run, _, _ = one_shard(tmp_path)
    shutil.rmtree(run / ZARR / BUCKET)
    for read in reads(run):
        with pytest.raises(DamagedLabel, match=BUCKET):
            read()


def test_a_flipped_bit_anywhere_in_a_shard_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    run, file, label = one_shard(tmp_path)
    data = file.read_bytes()
    dice = random.Random(0)
    places = [*dice.sample(range(len(data)), 200), *range(len(data) - 68, len(data))]  # the index is at the end
    noticed = 0
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << dice.randrange(8)
        file.write_bytes(damaged)
        for read, expected in zip(reads(run), (label, label[10:60, 10:60]), strict=True):
            try:
                assert np.array_equal(read(), expected)
            except DamagedLabel:
                noticed += 1
    assert noticed > len(places) // 2  # the rest lay in the other label


def test_a_shard_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    run, file, _ = one_shard(tmp_path)
    data = file.read_bytes()
    for length in [*range(0, len(data), max(1, len(data) // 40)), len(data) - 1]:
        file.write_bytes(data[:length])
        for read in reads(run):
            with pytest.raises(DamagedLabel):
                read()


def test_another_shard_in_its_place_is_noticed(tmp_path: Path) -> None:
    make_run(tmp_path, {name: street(i, 500, 512) for i, name in enumerate("abcd")})
    array = tmp_path / ZARR / BUCKET
    shutil.copy(shard_path(array, 1), shard_path(array, 0))
    with pytest.raises(DamagedLabel, match=r"^label of 'a' in .*b512x512 differs from what was committed$"):
        open_labels(tmp_path)["a"]


@pytest.mark.parametrize("length", [0, 10, 100, -1])
def test_a_damaged_shard_is_repaired_by_writing_it_again(tmp_path: Path, length: int) -> None:
    first, second = street(1, 500, 512), street(2, 512, 300)
    (unit,) = make_run(tmp_path, {"a": first, "b": second})
    file = shard_path(tmp_path / ZARR / BUCKET, 0)
    file.write_bytes(file.read_bytes()[:length])
    commit(tmp_path, unit, {"a": first, "b": second}, "zarr")
    labels = open_labels(tmp_path)
    assert np.array_equal(labels["a"], first)
    assert np.array_equal(labels["b"], second)


def test_a_png_that_is_missing_or_cut_is_an_error(tmp_path: Path) -> None:
    make_run(tmp_path, {"a": street(1, 100, 100)}, "png")
    file = tmp_path / PNG / "a.png"
    data = file.read_bytes()
    for length in (0, 30, len(data) // 2):
        file.write_bytes(data[:length])
        for read in reads(tmp_path):
            with pytest.raises(DamagedLabel, match=r"a\.png: "):
                read()
    file.unlink()
    for read in reads(tmp_path):
        with pytest.raises(DamagedLabel, match=r"a\.png: .*No such file"):
            read()


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(street(2, 100, 100), id="another label"),
        pytest.param(street(1, 100, 100)[:40], id="a smaller one"),
        pytest.param(np.full((100, 100), 11, np.uint8), id="an unknown class"),
    ],
)
def test_a_png_that_was_exchanged_is_noticed_whole_and_in_crops(tmp_path: Path, other: Label) -> None:
    make_run(tmp_path, {"a": street(1, 100, 100)}, "png")
    write_png(tmp_path / PNG / "a.png", other)
    for read in reads(tmp_path):
        with pytest.raises(DamagedLabel):
            read()


def test_a_png_label_is_a_plain_grey_picture_under_the_path_of_its_image(tmp_path: Path) -> None:
    label = street(1, 60, 70)
    make_run(tmp_path, {"monday/cam.1/a": label}, "png")
    with Image.open(tmp_path / PNG / "monday/cam.1/a.png") as opened:
        assert (opened.format, opened.mode) == ("PNG", "L")
        assert np.array_equal(np.asarray(opened), label)


# --- through a manifest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["zarr", "png"])
def test_a_manifest_sample_finds_its_auto_label_whole_and_in_crops(tmp_path: Path, store: str) -> None:
    label = street(1, 600, 700)
    make_run(tmp_path, {"a": label}, store)
    where = {"label": tmp_path / ZARR / "b1024x1024", "label_index": 0}
    if store == "png":
        where = {"label": tmp_path / PNG / "a.png"}
    sample = Sample("a", tmp_path / "a.jpg", 600, 700, source="auto", **where)  # type: ignore[arg-type]
    assert np.array_equal(read_sample_label(sample, CAMVID), label)
    assert np.array_equal(read_sample_label(sample, CAMVID, (590, 5, 10, 600)), label[590:600, 5:605])


def test_a_manifest_sample_with_source_ids_gives_train_ids(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.array([[7, 33, 0]], np.uint8))
    sample = Sample("a", tmp_path / "a.jpg", 1, 3, source="fine", label=tmp_path / "a.png", label_ids="source")
    assert read_sample_label(sample, CITYSCAPES).tolist() == [[0, 18, 255]]
    assert read_sample_label(sample, CITYSCAPES, (0, 1, 1, 2)).tolist() == [[18, 255]]


def test_a_manifest_sample_without_a_readable_label_says_so(tmp_path: Path) -> None:
    sample = Sample("a", tmp_path / "a.jpg", 1, 3)
    with pytest.raises(ValueError, match=r"^sample 'a' has no label$"):
        read_sample_label(sample, CAMVID)
    (tmp_path / "b.png").write_bytes(b"half")
    with pytest.raises(BadImage, match=r"b\.png: not a readable image"):
        read_sample_label(Sample("b", tmp_path / "b.jpg", 1, 3, source="fine", label=tmp_path / "b.png"), CAMVID)
    with pytest.raises(DamagedLabel, match=BUCKET):
        read_sample_label(Sample("c", tmp_path / "c.jpg", 1, 3, label=tmp_path / BUCKET, label_index=0), CAMVID)
