"""A label that was cut off by a crash, belongs to another image or has rotted on disk must never be read as a label."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from stores import (
    ABOUT,
    BUCKET,
    SHARD,
    STREETS,
    commit,
    committed,
    make_run,
    one_shard,
    plan,
    record_of,
    rows_of,
    street,
)

from autolabel.manifests import storage
from autolabel.manifests.images import BadImage, encode_label
from autolabel.manifests.label_space import CAMVID, CITYSCAPES
from autolabel.manifests.run import frames
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.frames import read_zarr
from autolabel.manifests.run.labels import LABELS, zarr_folder
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.run.shards import (
    DamagedLabel,
    Window,
    crc32c,
    create_zarr,
    damaged_metadata,
    encode_zarr,
    shard_path,
    write_zarr_shard,
)
from autolabel.manifests.samples import Sample

Label = NDArray[np.uint8]

# --- crops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["zarr", "png"])
def test_a_crop_is_that_slice_of_the_label(tmp_path: Path, store: str) -> None:
    make_run(tmp_path, STREETS, store)
    labels = committed(tmp_path)
    dice = random.Random(0)
    for sample_id, label in STREETS.items():
        height, width = label.shape
        windows = [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1), (height // 2, 0, 1, width)]
        for _ in range(20):
            top, left = dice.randrange(height), dice.randrange(width)
            windows.append((top, left, dice.randint(1, height - top), dice.randint(1, width - left)))
            windows.append((top, left, height - top, width - left))
        for top, left, h, w in windows:
            assert np.array_equal(labels.crop(sample_id, (top, left, h, w)), label[top : top + h, left : left + w])


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
        committed(tmp_path).crop("a", window)
    top, left, height, width = window
    assert str(refusal.value) == (
        f"crop {height} x {width} at ({top}, {left}) leaves the label of 'a', which is 600 x 700"
    )


@pytest.mark.parametrize("window", [(-1, 0, 5, 5), (0, -1, 5, 5), (510, 0, 5, 5), (0, 510, 5, 5)])
def test_a_crop_that_leaves_the_array_is_never_read(tmp_path: Path, window: tuple[int, int, int, int]) -> None:
    one_shard(tmp_path)
    with pytest.raises(DamagedLabel, match="leaves the array of 512 x 512"):
        read_zarr(tmp_path / zarr_folder(LABELS) / BUCKET, 0, window=window)


def read(array: Path, row: int, window: Window) -> Label:
    return read_zarr(array, row, window=window)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_a_loader_read_what_their_parent_has_read_before(tmp_path: Path, method: str) -> None:
    make_run(tmp_path, STREETS)
    array = tmp_path / zarr_folder(LABELS) / "b1024x1024"
    windows = [(array, row, (top, left, 300, 400)) for row in range(5) for top in (0, 270) for left in (0, 290)]
    expected = [read(*window) for window in windows]
    with multiprocessing.get_context(method).Pool(2) as workers:
        found = workers.starmap_async(read, windows, chunksize=1).get(timeout=60)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_reading_many_shards_keeps_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_INDEX_BYTES", 3 * (16 * SHARD))  # fewer than there are shards
    labels = {f"s{i}": street(i, 100, 100) for i in range(10 * SHARD)}
    make_run(tmp_path, labels)
    stored, before = committed(tmp_path), len([*Path("/proc/self/fd").iterdir()])
    for _ in range(2):
        for sample_id, label in labels.items():
            assert np.array_equal(stored[sample_id], label)
    assert len([*Path("/proc/self/fd").iterdir()]) <= before
    assert len(frames._indices) <= 3


def test_several_threads_read_labels_at_once(tmp_path: Path) -> None:
    make_run(tmp_path, STREETS)
    labels = committed(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        for sample_id, found in zip([*STREETS] * 5, pool.map(labels.__getitem__, [*STREETS] * 5), strict=True):
            assert np.array_equal(found, STREETS[sample_id])


# --- what is committed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["zarr", "png"])
def test_a_run_lists_only_committed_labels(tmp_path: Path, store: str) -> None:
    labels = {f"s{i}": street(i, 100, 100) for i in range(4)}
    make_run(tmp_path, {**labels, "broken": None}, store)
    record_of(tmp_path, BUCKET, 1).unlink()  # its labels are on disk, but nobody vouches for them
    present = committed(tmp_path)
    lost = {"s2", "s3"}
    assert set(present) == labels.keys() - lost
    for sample_id in ("broken", "never heard of", *lost):
        assert sample_id not in present
        for read in (present.__getitem__, lambda i: present.crop(i, (0, 0, 1, 1))):
            with pytest.raises(KeyError, match=sample_id):
                read(sample_id)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as refusal:
        Run.open(tmp_path)
    assert str(refusal.value) == f"{tmp_path} is not a run: it has no run.json; make one with `autolabel generate`"


def test_a_run_without_a_finished_unit_has_no_labels(tmp_path: Path) -> None:
    assert list(committed(tmp_path)) == []


def test_a_cut_record_is_refused_by_name_and_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    make_run(tmp_path, {"a": street(1, 100, 100)})
    record = record_of(tmp_path, BUCKET, 0)
    record.write_bytes(record.read_bytes()[:-20])
    with pytest.raises(ValueError, match=record.name):
        _ = committed(tmp_path)


# --- damage -----------------------------------------------------------------------------------------------------------


def reads(run: Path) -> list[Callable[[], Any]]:
    """The ways to read label "a": whole, and a crop that is in the first chunk."""
    labels = committed(run)
    return [lambda: labels["a"], lambda: labels.crop("a", (10, 10, 50, 50))]


def test_a_missing_shard_is_an_error_and_never_all_ignored(tmp_path: Path) -> None:
    run, shard, _ = one_shard(tmp_path)
    shard.unlink()
    for read in reads(run):
        with pytest.raises(DamagedLabel) as refusal:
            read()
        assert str(refusal.value) == f"{shard} is missing: run `autolabel generate` again to restore it"


def test_a_missing_array_is_an_error(tmp_path: Path) -> None:
    run, _, _ = one_shard(tmp_path)
    shutil.rmtree(run / zarr_folder(LABELS) / BUCKET)
    for read in reads(run):
        with pytest.raises(DamagedLabel, match=BUCKET):
            read()


def test_a_flipped_bit_anywhere_in_a_store_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """Reading finds it, or `damaged_metadata`, or the checksum of the shard's file, and no label reads as another."""
    shards = make_run(tmp_path, STREETS)
    labels, rows = committed(tmp_path), rows_of(plan(STREETS))
    files = {path: path.read_bytes() for path in sorted((tmp_path / zarr_folder(LABELS)).rglob("*")) if path.is_file()}
    dice = random.Random(0)
    places = [(path, place) for path, data in files.items() for place in range(len(data))]
    found = {"by reading": 0, "in the metadata": 0, "by the checksum of the file": 0}
    for path, place in [*dice.sample(places, 150), *((p, len(files[p]) - 1) for p in files)]:
        damaged = bytearray(files[path])
        damaged[place] ^= 1 << dice.randrange(8)
        storage.write(path, damaged)
        refused = 0
        for sample_id, label in STREETS.items():
            try:
                assert np.array_equal(labels[sample_id], label)
            except DamagedLabel:
                refused += 1
        if path.name == "zarr.json":
            assert damaged_metadata(tmp_path / zarr_folder(LABELS), rows, shard_rows=SHARD, attributes=ABOUT) == [path]
            found["in the metadata"] += 1
        elif refused:
            found["by reading"] += 1
        else:
            assert crc32c(np.frombuffer(damaged, np.uint8)) != shards[path].crc32c
            found["by the checksum of the file"] += 1
        storage.write(path, files[path])
    assert min(found["by reading"], found["in the metadata"]) > 30


def test_a_flipped_bit_is_found_also_after_the_index_was_read(tmp_path: Path) -> None:
    run, file, label = one_shard(tmp_path)
    labels, data = committed(run), file.read_bytes()
    assert np.array_equal(labels["a"], label)
    with open(file, "r+b") as damaged:  # in place, as a disk does it
        damaged.seek(100)
        damaged.write(bytes([data[100] ^ 1]))
    for read in (lambda: labels["a"], lambda: labels.crop("a", (10, 10, 50, 50))):
        with pytest.raises(DamagedLabel):
            read()


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
    array = tmp_path / zarr_folder(LABELS) / BUCKET
    shutil.copy(shard_path(array, 1), shard_path(array, 0))
    with pytest.raises(DamagedLabel, match=r"^label of 'a' in .*b512x512 differs from what was committed$"):
        committed(tmp_path)["a"]


@pytest.mark.parametrize("length", [0, 10, 100, -1])
def test_a_damaged_shard_is_repaired_by_writing_it_again(tmp_path: Path, length: int) -> None:
    first, second = street(1, 500, 512), street(2, 512, 300)
    make_run(tmp_path, {"a": first, "b": second})
    file = shard_path(tmp_path / zarr_folder(LABELS) / BUCKET, 0)
    file.write_bytes(file.read_bytes()[:length])
    commit(tmp_path, BUCKET, 0, ["a", "b"], {"a": first, "b": second})
    labels = committed(tmp_path)
    assert np.array_equal(labels["a"], first)
    assert np.array_equal(labels["b"], second)


def _write_for_ever(array: Path, versions: list[list[Label]]) -> None:
    while True:
        for version in versions:
            write_zarr_shard(array, 0, shard_rows=SHARD, labels=[encode_zarr(label) for label in version])


def test_a_killed_writer_leaves_the_old_shard_or_the_new_one(tmp_path: Path) -> None:
    array, versions = tmp_path / BUCKET, [[street(i, 512, 512), street(i + 1, 400, 512)] for i in (1, 3)]
    create_zarr(tmp_path, {BUCKET: SHARD}, shard_rows=SHARD, attributes={})
    write_zarr_shard(array, 0, shard_rows=SHARD, labels=[encode_zarr(label) for label in versions[0]])
    for n in range(12):
        writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(array, versions))
        writer.start()
        time.sleep(0.02 + 0.013 * n)
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        found = [read_zarr(array, 0, window=(0, 0, 512, 512)), read_zarr(array, 1, window=(0, 0, 400, 512))]
        assert any(all(map(np.array_equal, found, version)) for version in versions)
    others = {path.name for path in array.iterdir()} - {"zarr.json", "c.0.0.0"}
    assert all(name.startswith(".") and name.endswith(storage.TEMPORARY) for name in others)


def test_a_png_that_is_missing_or_cut_is_an_error(tmp_path: Path) -> None:
    make_run(tmp_path, {"a": street(1, 100, 100)}, "png")
    file = tmp_path / LABELS / "a.png"
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
    storage.write(tmp_path / LABELS / "a.png", encode_label(other))
    for read in reads(tmp_path):
        with pytest.raises(DamagedLabel):
            read()


def test_a_png_label_is_a_plain_grey_picture_under_the_path_of_its_image(tmp_path: Path) -> None:
    label = street(1, 60, 70)
    make_run(tmp_path, {"monday/cam.1/a": label}, "png")
    with Image.open(tmp_path / LABELS / "monday/cam.1/a.png") as opened:
        assert (opened.format, opened.mode) == ("PNG", "L")
        assert np.array_equal(np.asarray(opened), label)


# --- through a manifest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["zarr", "png"])
def test_a_manifest_sample_finds_its_auto_label_whole_and_in_crops(tmp_path: Path, store: str) -> None:
    label = street(1, 600, 700)
    make_run(tmp_path, {"a": label}, store)
    where = {"label": tmp_path / zarr_folder(LABELS) / "b1024x1024", "label_index": 0}
    if store == "png":
        where = {"label": tmp_path / LABELS / "a.png"}
    sample = Sample("a", tmp_path / "a.jpg", 600, 700, source="auto", **where)  # type: ignore[arg-type]
    assert np.array_equal(read_sample_label(sample, CAMVID), label)
    assert np.array_equal(read_sample_label(sample, CAMVID, window=(590, 5, 10, 600)), label[590:600, 5:605])


def test_a_manifest_sample_with_source_ids_gives_train_ids(tmp_path: Path) -> None:
    storage.write(tmp_path / "a.png", encode_label(np.array([[7, 33, 0]], np.uint8)))
    sample = Sample("a", tmp_path / "a.jpg", 1, 3, source="fine", label=tmp_path / "a.png", label_ids="source")
    assert read_sample_label(sample, CITYSCAPES).tolist() == [[0, 18, 255]]
    assert read_sample_label(sample, CITYSCAPES, window=(0, 1, 1, 2)).tolist() == [[18, 255]]


def test_a_manifest_sample_without_a_readable_label_says_so(tmp_path: Path) -> None:
    sample = Sample("a", tmp_path / "a.jpg", 1, 3)
    with pytest.raises(ValueError, match=r"^sample 'a' has no label$"):
        read_sample_label(sample, CAMVID)
    (tmp_path / "b.png").write_bytes(b"half")
    with pytest.raises(BadImage, match=r"b\.png: not a PNG"):
        read_sample_label(Sample("b", tmp_path / "b.jpg", 1, 3, source="fine", label=tmp_path / "b.png"), CAMVID)
    with pytest.raises(DamagedLabel, match=BUCKET):
        read_sample_label(Sample("c", tmp_path / "c.jpg", 1, 3, label=tmp_path / BUCKET, label_index=0), CAMVID)
