"""A label that was cut off by a crash, belongs to another image or has rotted on disk must never be read as a label."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests import storage
from autolabel.manifests.images import BadImage, encode_label
from autolabel.manifests.label_space import CAMVID, CITYSCAPES, IGNORE
from autolabel.manifests.run import shards as stores
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.labels import LABELS, png_name, read_sample_label, zarr_folder
from autolabel.manifests.run.shards import (
    DamagedLabel,
    WrittenShard,
    bucket_of,
    crc32c,
    create_zarr,
    damaged_metadata,
    encode_zarr,
    read_zarr,
    shard_path,
    write_zarr_shard,
)
from autolabel.manifests.samples import Sample

Label = NDArray[np.uint8]
SHARD = 2  # rows
BUCKET = "b512x512"
ABOUT = {"ignore": IGNORE}


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
STREETS["city/one class"] = np.full((700, 600), 3, np.uint8)
STREETS["city/sure in one corner"] = np.pad(street(4, 30, 40), ((570, 0), (660, 0)), constant_values=IGNORE)

Units = dict[tuple[str, int], list[str]]  # bucket, number of its shard -> ids of the samples


def plan(labels: Mapping[str, Label | None]) -> Units:
    """Labels by size, two to a shard; None is a sample of 500 x 500."""
    rows: dict[str, list[str]] = {}
    for sample_id, label in labels.items():
        rows.setdefault(bucket_of(*((500, 500) if label is None else label.shape)), []).append(sample_id)
    return {(b, i // SHARD): ids[i : i + SHARD] for b, ids in rows.items() for i in range(0, len(ids), SHARD)}


def rows_of(units: Units) -> dict[str, int]:
    return {b: sum(len(ids) for (bucket, _), ids in units.items() if bucket == b) for b, _ in units}


def record_of(run: Path, bucket: str, number: int) -> Path:
    return run / f"units/{bucket}.{number:06d}.parquet"


def commit(
    run: Path, bucket: str, number: int, ids: list[str], labels: Mapping[str, Label | None], store: str = "zarr"
) -> WrittenShard | None:
    """Write the labels of a unit and commit it; samples without one are quarantined."""
    rows: list[dict[str, Any]] = []
    for place, sample_id in enumerate(ids, number * SHARD):
        label = labels[sample_id]
        row = {
            "sample_id": sample_id,
            "status": "labelled",
            "label": f"{zarr_folder(LABELS)}/{bucket}",
            "label_index": place,
        }
        if label is None:
            row["status"], label = "quarantined", np.zeros((500, 500), np.uint8)
        elif store == "png":
            row |= {"label": f"{LABELS}/{png_name(sample_id + '.jpg')}", "label_index": None}
            storage.write(run / str(row["label"]), encode_label(label))
        height, width = label.shape
        rows.append({**row, "height": height, "width": width, "label_crc32c": crc32c(label)})
    shard, committed = None, [labels[sample_id] for sample_id in ids]
    if store == "zarr" and any(label is not None for label in committed):
        frames = [None if label is None else encode_zarr(label) for label in committed]
        shard = write_zarr_shard(run / zarr_folder(LABELS) / bucket, number * SHARD, SHARD, frames)
    record = record_of(run, bucket, number)
    record.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), record)
    return shard


def make_run(run: Path, labels: Mapping[str, Label | None], store: str = "zarr") -> dict[Path, WrittenShard]:
    """A finished run folder, and its shards; None for a sample that was quarantined."""
    units = plan(labels)
    storage.write_json(run / "run.json", {"label_space": json.loads(CAMVID.to_json())})
    if store == "zarr":
        create_zarr(run / zarr_folder(LABELS), rows_of(units), SHARD, ABOUT)
    written = {
        shard_path(run / zarr_folder(LABELS) / bucket, number): commit(run, bucket, number, ids, labels, store)
        for (bucket, number), ids in units.items()
    }
    return {path: shard for path, shard in written.items() if shard is not None}


def one_shard(run: Path) -> tuple[Path, Path, Label]:
    """A run of two labels in one shard: the run, the file, the first label."""
    first = street(1, 500, 512)
    make_run(run, {"a": first, "b": street(2, 512, 300)})
    return run, shard_path(run / zarr_folder(LABELS) / BUCKET, 0), first


# --- what is written is what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["zarr", "png"])
def test_every_label_is_read_back_exactly_whatever_its_size_and_store(tmp_path: Path, store: str) -> None:
    make_run(tmp_path, STREETS, store)
    labels = Run.open(tmp_path).labels
    assert sorted(labels) == sorted(STREETS)
    assert len(labels) == len(STREETS)
    for sample_id, label in STREETS.items():
        assert labels[sample_id].dtype == np.uint8
        assert np.array_equal(labels[sample_id], label)


def test_256_ids_in_noise_are_read_back_exactly(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 700), np.uint8)
    create_zarr(tmp_path, {"b1024x1024": 1}, 1, {})
    write_zarr_shard(tmp_path / "b1024x1024", 0, 1, [encode_zarr(noise)])
    assert np.array_equal(read_zarr(tmp_path / "b1024x1024", 0, 0, 0, 600, 700), noise)


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


def test_the_same_label_gives_the_same_bytes_in_any_order_and_from_any_thread() -> None:
    labels = [*STREETS.values()]
    once = [encode_zarr(label) for label in labels]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(encode_zarr, labels[::-1] * 3)) == once[::-1] * 3


def test_a_chunk_in_which_all_is_ignored_takes_no_bytes() -> None:
    assert encode_zarr(STREETS["city/nothing sure"]) == (b"",) * 4
    assert [len(frame) > 0 for frame in encode_zarr(STREETS["city/sure in one corner"])] == [False, False, False, True]


@pytest.mark.parametrize("shard", [1, 3, 64, 256])
def test_a_store_of_any_unit_size_with_a_short_last_shard_is_read_back(tmp_path: Path, shard: int) -> None:
    labels = [street(i, 90, 100) for i in range(shard + 1)]
    create_zarr(tmp_path, {BUCKET: len(labels)}, shard, {})
    for first in range(0, len(labels), shard):
        write_zarr_shard(tmp_path / BUCKET, first, shard, [encode_zarr(x) for x in labels[first : first + shard]])
    for row, label in enumerate(labels):
        assert np.array_equal(read_zarr(tmp_path / BUCKET, row, 0, 0, 90, 100), label)
    with pytest.raises(DamagedLabel, match=f"row {len(labels)}: IndexError"):
        read_zarr(tmp_path / BUCKET, len(labels), 0, 0, 90, 100)


# --- by any software --------------------------------------------------------------------------------------------------

PLAIN_ZARR = """
import numpy, zarr
group = zarr.open_group(source, mode="r")
assert group.attrs["ignore"] == 255
numpy.savez(target, **{name: array[:] for name, array in group.arrays()})
"""
TENSORSTORE = """
import numpy, pathlib, tensorstore
def read(array):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(array)}}
    return tensorstore.open(spec, read=True).result().read().result()
numpy.savez(target, **{path.name: read(path) for path in pathlib.Path(source).glob("b*")})
"""


@pytest.mark.parametrize("program", [PLAIN_ZARR, TENSORSTORE], ids=["zarr-python", "tensorstore"])
def test_programs_without_ours_read_labels_in_the_corner_of_their_row_and_255_around(
    tmp_path: Path, program: str
) -> None:
    labels = {**STREETS, "quarantined": None, "beside it": street(7, 300, 200)}
    make_run(tmp_path, labels)
    alone = "import sys\nsys.modules['autolabel'] = None\n_, source, target = sys.argv\n"  # importing it fails
    command = [sys.executable, "-c", alone + program, tmp_path / zarr_folder(LABELS), tmp_path / "read.npz"]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = np.load(tmp_path / "read.npz")
    units = plan(labels)
    assert {name: len(found[name]) for name in found} == rows_of(units)
    for (bucket, number), ids in units.items():
        for row, sample_id in zip(found[bucket][number * SHARD :], ids, strict=False):
            label, expected = labels[sample_id], np.full_like(row, IGNORE)
            if label is not None:
                expected[: label.shape[0], : label.shape[1]] = label
            assert np.array_equal(row, expected)


def test_another_decoder_reads_the_png_files(tmp_path: Path) -> None:
    make_run(tmp_path, {"a": STREETS["city/511x513"]}, "png")
    program = """
import numpy, sys, tensorstore
spec = {"driver": "png", "kvstore": {"driver": "file", "path": sys.argv[1]}}
numpy.save(sys.argv[2], tensorstore.open(spec, read=True).result().read().result())
"""
    command = [sys.executable, "-c", program, tmp_path / LABELS / "a.png", tmp_path / "read.npy"]
    subprocess.run(command, check=True)
    assert np.array_equal(np.load(tmp_path / "read.npy")[..., 0], STREETS["city/511x513"])  # (H, W, 1)


def test_the_store_needs_nothing_but_the_core_codecs_of_zarr_v3(tmp_path: Path) -> None:
    make_run(tmp_path, STREETS)
    found = json.loads((tmp_path / zarr_folder(LABELS) / "b1024x1024/zarr.json").read_text())
    assert (found["zarr_format"], found["data_type"], found["fill_value"]) == (3, "uint8", IGNORE)
    assert found["shape"] == [5, 1024, 1024]
    assert found["dimension_names"] == ["sample", "y", "x"]
    assert found["chunk_grid"]["configuration"]["chunk_shape"] == [SHARD, 1024, 1024]
    (sharding,) = found["codecs"]
    inside = sharding["configuration"]
    assert (sharding["name"], inside["chunk_shape"]) == ("sharding_indexed", [1, 512, 512])
    assert (inside["index_location"], [codec["name"] for codec in inside["codecs"]]) == ("end", ["bytes", "zstd"])
    assert inside["codecs"][1]["configuration"] == {"level": 9, "checksum": True}
    assert [codec["name"] for codec in inside["index_codecs"]] == ["bytes", "crc32c"]
    assert inside["index_codecs"][0]["configuration"] == {"endian": "little"}
    files = {path.name for path in (tmp_path / zarr_folder(LABELS) / "b1024x1024").iterdir()}
    assert files == {"zarr.json", "c.0.0.0", "c.1.0.0", "c.2.0.0"}


def test_metadata_that_are_right_are_left_alone_and_others_are_found_and_repaired(tmp_path: Path) -> None:
    asked = (tmp_path, {BUCKET: 1, "b512x1024": 1}, 2, ABOUT)
    group, array = tmp_path / "zarr.json", tmp_path / BUCKET / "zarr.json"
    create_zarr(*asked)
    assert damaged_metadata(*asked) == []
    inode = group.stat().st_ino
    right = array.read_bytes()
    array.write_bytes(right.replace(b"255", b"254"))
    assert damaged_metadata(*asked) == [array]
    (tmp_path / "b512x1024/zarr.json").unlink()
    assert damaged_metadata(*asked) == [array, tmp_path / "b512x1024/zarr.json"]
    create_zarr(*asked)
    assert damaged_metadata(*asked) == []
    assert (array.read_bytes(), group.stat().st_ino) == (right, inode)
    assert damaged_metadata(tmp_path, {BUCKET: 2}, 2, {"ignore": 0}) == [group, array]


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, SHARD])
def test_a_shard_in_which_all_is_ignored_is_still_a_file(tmp_path: Path, count: int) -> None:
    unsure = {f"s{i}": np.full((300, 400), IGNORE, np.uint8) for i in range(count)}
    make_run(tmp_path, unsure)
    assert shard_path(tmp_path / zarr_folder(LABELS) / BUCKET, 0).stat().st_size == SHARD * 16 + 4
    labels = Run.open(tmp_path).labels
    for sample_id, label in unsure.items():
        assert np.array_equal(labels[sample_id], label)


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param([street(1, 600, 700), street(2, 1024, 1024)], id="full"),
        pytest.param([street(1, 600, 700)], id="half a shard"),
        pytest.param([street(1, 600, 700), np.full((600, 700), IGNORE, np.uint8)], id="all ignored"),
        pytest.param([street(1, 600, 700), None], id="quarantined"),
        pytest.param([street(1, 513, 700), STREETS["city/sure in one corner"]], id="empty chunks"),
    ],
)
def test_the_sizes_of_the_labels_and_of_the_index_make_up_the_shard(tmp_path: Path, labels: list[Label | None]) -> None:
    create_zarr(tmp_path, {"b1024x1024": len(labels)}, SHARD, {})
    frames = [None if label is None else encode_zarr(label) for label in labels]
    shard = write_zarr_shard(tmp_path / "b1024x1024", 0, SHARD, frames)
    data = (tmp_path / "b1024x1024/c.0.0.0").read_bytes()
    assert (shard.file, shard.bytes, shard.crc32c) == ("c.0.0.0", len(data), crc32c(np.frombuffer(data, np.uint8)))
    assert shard.label_bytes == tuple(sum(map(len, row or ())) for row in frames)
    assert sum(shard.label_bytes) + SHARD * 4 * 16 + 4 == len(data)


@pytest.mark.parametrize(("size", "chunks"), [((600, 300), 2), ((60, 30), 1)])
def test_a_label_of_another_bucket_is_not_written(tmp_path: Path, size: tuple[int, int], chunks: int) -> None:
    with pytest.raises(ValueError, match=f"a label of {chunks} chunks is not one of b1024x1024, which have 4"):
        write_zarr_shard(tmp_path / "b1024x1024", 0, SHARD, [encode_zarr(street(1, *size))])
    assert list(tmp_path.iterdir()) == []


def test_a_unit_that_was_stopped_half_way_is_written_again_with_the_rest(tmp_path: Path) -> None:
    first, second = street(1, 500, 512), street(2, 500, 500)
    make_run(tmp_path, {"a": first, "b": None})
    assert list(Run.open(tmp_path).labels) == ["a"]
    commit(tmp_path, BUCKET, 0, ["a", "b"], {"a": first, "b": second})
    labels = Run.open(tmp_path).labels
    assert np.array_equal(labels["a"], first)
    assert np.array_equal(labels["b"], second)


def test_an_array_that_grows_keeps_its_labels(tmp_path: Path) -> None:
    first, second = street(1, 500, 512), street(2, 512, 300)
    create_zarr(tmp_path, {BUCKET: 1}, 1, {})
    write_zarr_shard(tmp_path / BUCKET, 0, 1, [encode_zarr(first)])
    assert np.array_equal(read_zarr(tmp_path / BUCKET, 0, 0, 0, 500, 512), first)
    create_zarr(tmp_path, {BUCKET: 2, "b512x1024": 1}, 1, {})
    write_zarr_shard(tmp_path / BUCKET, 1, 1, [encode_zarr(second)])
    assert np.array_equal(read_zarr(tmp_path / BUCKET, 0, 0, 0, 500, 512), first)
    assert np.array_equal(read_zarr(tmp_path / BUCKET, 1, 0, 0, 512, 300), second)


def test_a_shard_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    create_zarr(tmp_path, {BUCKET: 1}, 1, {})
    for seed in range(20):  # of nearly the same size, as quickly as a disk can
        label = street(seed, 512, 512)
        write_zarr_shard(tmp_path / BUCKET, 0, 1, [encode_zarr(label)])
        assert np.array_equal(read_zarr(tmp_path / BUCKET, 0, 0, 0, 512, 512), label)


def test_a_run_made_anew_in_the_same_folder_is_read_anew(tmp_path: Path) -> None:
    make_run(tmp_path / "run", {"a": street(1, 500, 512)})
    assert np.array_equal(Run.open(tmp_path / "run").labels["a"], street(1, 500, 512))
    shutil.rmtree(tmp_path / "run")
    others = {name: street(i, 400, 512) for i, name in enumerate("abcde", 20)}
    make_run(tmp_path / "run", others)
    labels = Run.open(tmp_path / "run").labels
    for sample_id, label in others.items():
        assert np.array_equal(labels[sample_id], label)


# --- crops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["zarr", "png"])
def test_a_crop_is_that_slice_of_the_label(tmp_path: Path, store: str) -> None:
    make_run(tmp_path, STREETS, store)
    labels = Run.open(tmp_path).labels
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
        Run.open(tmp_path).labels.crop("a", *window)
    top, left, height, width = window
    assert str(refusal.value) == (
        f"crop {height} x {width} at ({top}, {left}) leaves the label of 'a', which is 600 x 700"
    )


@pytest.mark.parametrize("window", [(-1, 0, 5, 5), (0, -1, 5, 5), (510, 0, 5, 5), (0, 510, 5, 5)])
def test_a_crop_that_leaves_the_array_is_never_read(tmp_path: Path, window: tuple[int, int, int, int]) -> None:
    one_shard(tmp_path)
    with pytest.raises(DamagedLabel, match="leaves the array of 2 x 512 x 512"):
        read_zarr(tmp_path / zarr_folder(LABELS) / BUCKET, 0, *window)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_a_loader_read_what_their_parent_has_read_before(tmp_path: Path, method: str) -> None:
    make_run(tmp_path, STREETS)
    array = tmp_path / zarr_folder(LABELS) / "b1024x1024"
    windows = [(array, row, top, left, 300, 400) for row in range(5) for top in (0, 270) for left in (0, 290)]
    expected = [read_zarr(*window) for window in windows]
    with multiprocessing.get_context(method).Pool(2) as workers:
        found = workers.starmap_async(read_zarr, windows, chunksize=1).get(timeout=60)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_reading_many_shards_keeps_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_INDICES", 3)  # fewer than there are shards
    labels = {f"s{i}": street(i, 100, 100) for i in range(10 * SHARD)}
    make_run(tmp_path, labels)
    stored, before = Run.open(tmp_path).labels, len([*Path("/proc/self/fd").iterdir()])
    for _ in range(2):
        for sample_id, label in labels.items():
            assert np.array_equal(stored[sample_id], label)
    assert len([*Path("/proc/self/fd").iterdir()]) <= before
    assert len(stores._indices) <= 3


def test_threads_read_at_once(tmp_path: Path) -> None:
    make_run(tmp_path, STREETS)
    labels = Run.open(tmp_path).labels
    with ThreadPoolExecutor(8) as pool:
        for sample_id, found in zip([*STREETS] * 5, pool.map(labels.__getitem__, [*STREETS] * 5), strict=True):
            assert np.array_equal(found, STREETS[sample_id])


# --- what is committed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["zarr", "png"])
def test_only_committed_labels_are_there(tmp_path: Path, store: str) -> None:
    labels = {f"s{i}": street(i, 100, 100) for i in range(4)}
    make_run(tmp_path, {**labels, "broken": None}, store)
    record_of(tmp_path, BUCKET, 1).unlink()  # its labels are on disk, but nobody vouches for them
    committed = Run.open(tmp_path).labels
    lost = {"s2", "s3"}
    assert set(committed) == labels.keys() - lost
    for sample_id in ("broken", "never heard of", *lost):
        assert sample_id not in committed
        for read in (committed.__getitem__, lambda i: committed.crop(i, 0, 0, 1, 1)):
            with pytest.raises(KeyError, match=sample_id):
                read(sample_id)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as refusal:
        _ = Run.open(tmp_path).labels
    assert str(refusal.value) == f"{tmp_path} is not a run: it has no run.json; make one with `autolabel generate`"


def test_a_run_without_a_finished_unit_has_no_labels(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "run.json", {"label_space": json.loads(CAMVID.to_json())})
    assert list(Run.open(tmp_path).labels) == []


def test_a_cut_record_is_refused_by_name_and_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    make_run(tmp_path, {"a": street(1, 100, 100)})
    record = record_of(tmp_path, BUCKET, 0)
    record.write_bytes(record.read_bytes()[:-20])
    with pytest.raises(ValueError, match=record.name):
        _ = Run.open(tmp_path).labels


# --- damage -----------------------------------------------------------------------------------------------------------


def reads(run: Path) -> list[Callable[[], Any]]:
    """The ways to read label "a": whole, and a crop that is in the first chunk."""
    labels = Run.open(run).labels
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
    shutil.rmtree(run / zarr_folder(LABELS) / BUCKET)
    for read in reads(run):
        with pytest.raises(DamagedLabel, match=BUCKET):
            read()


def test_a_flipped_bit_anywhere_in_a_store_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """Reading finds it, or `damaged_metadata`, or the checksum of the shard's file, and no label reads as another."""
    shards = make_run(tmp_path, STREETS)
    labels, rows = Run.open(tmp_path).labels, rows_of(plan(STREETS))
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
            assert damaged_metadata(tmp_path / zarr_folder(LABELS), rows, SHARD, ABOUT) == [path]
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
    labels, data = Run.open(run).labels, file.read_bytes()
    assert np.array_equal(labels["a"], label)
    with open(file, "r+b") as damaged:  # in place, as a disk does it
        damaged.seek(100)
        damaged.write(bytes([data[100] ^ 1]))
    for read in (lambda: labels["a"], lambda: labels.crop("a", 10, 10, 50, 50)):
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
        Run.open(tmp_path).labels["a"]


@pytest.mark.parametrize("length", [0, 10, 100, -1])
def test_a_damaged_shard_is_repaired_by_writing_it_again(tmp_path: Path, length: int) -> None:
    first, second = street(1, 500, 512), street(2, 512, 300)
    make_run(tmp_path, {"a": first, "b": second})
    file = shard_path(tmp_path / zarr_folder(LABELS) / BUCKET, 0)
    file.write_bytes(file.read_bytes()[:length])
    commit(tmp_path, BUCKET, 0, ["a", "b"], {"a": first, "b": second})
    labels = Run.open(tmp_path).labels
    assert np.array_equal(labels["a"], first)
    assert np.array_equal(labels["b"], second)


def _write_for_ever(array: Path, versions: list[list[Label]]) -> None:
    while True:
        for version in versions:
            write_zarr_shard(array, 0, SHARD, [encode_zarr(label) for label in version])


def test_a_killed_writer_leaves_the_old_shard_or_the_new_one(tmp_path: Path) -> None:
    array, versions = tmp_path / BUCKET, [[street(i, 512, 512), street(i + 1, 400, 512)] for i in (1, 3)]
    create_zarr(tmp_path, {BUCKET: SHARD}, SHARD, {})
    write_zarr_shard(array, 0, SHARD, [encode_zarr(label) for label in versions[0]])
    for n in range(12):
        writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(array, versions))
        writer.start()
        time.sleep(0.02 + 0.013 * n)
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        found = [read_zarr(array, 0, 0, 0, 512, 512), read_zarr(array, 1, 0, 0, 400, 512)]
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
    assert np.array_equal(read_sample_label(sample, CAMVID, (590, 5, 10, 600)), label[590:600, 5:605])


def test_a_manifest_sample_with_source_ids_gives_train_ids(tmp_path: Path) -> None:
    storage.write(tmp_path / "a.png", encode_label(np.array([[7, 33, 0]], np.uint8)))
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
