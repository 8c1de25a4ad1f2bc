"""A label that was cut off by a crash, belongs to another image or has rotted on disk must never be read as a label."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from stores import (
    ABOUT,
    BUCKET,
    SHARD,
    STREETS,
    commit,
    committed,
    make_run,
    plan,
    rows_of,
    street,
)

from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.run.frames import read_zarr
from autolabel.manifests.run.labels import (
    LABELS,
    zarr_folder,
)
from autolabel.manifests.run.shards import (
    DamagedLabel,
    bucket_of,
    crc32c,
    create_zarr,
    damaged_metadata,
    encode_zarr,
    shard_path,
    write_zarr_shard,
)

Label = NDArray[np.uint8]

# --- what is written is what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["zarr", "png"])
def test_every_label_is_read_back_exactly_whatever_its_size_and_store(tmp_path: Path, store: str) -> None:
    make_run(tmp_path, STREETS, store)
    labels = committed(tmp_path)
    assert sorted(labels) == sorted(STREETS)
    assert len(labels) == len(STREETS)
    for sample_id, label in STREETS.items():
        assert labels[sample_id].dtype == np.uint8
        assert np.array_equal(labels[sample_id], label)


def test_256_ids_in_noise_are_read_back_exactly(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 700), np.uint8)
    create_zarr(tmp_path, {"b1024x1024": 1}, shard_rows=1, attributes={})
    write_zarr_shard(tmp_path / "b1024x1024", 0, shard_rows=1, labels=[encode_zarr(noise)])
    assert np.array_equal(read_zarr(tmp_path / "b1024x1024", 0, window=(0, 0, 600, 700)), noise)


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
    create_zarr(tmp_path, {BUCKET: len(labels)}, shard_rows=shard, attributes={})
    for first in range(0, len(labels), shard):
        write_zarr_shard(
            tmp_path / BUCKET, first, shard_rows=shard, labels=[encode_zarr(x) for x in labels[first : first + shard]]
        )
    for row, label in enumerate(labels):
        assert np.array_equal(read_zarr(tmp_path / BUCKET, row, window=(0, 0, 90, 100)), label)
    with pytest.raises(DamagedLabel, match=f"row {len(labels)}: IndexError"):
        read_zarr(tmp_path / BUCKET, len(labels), window=(0, 0, 90, 100))


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
    buckets, how = {BUCKET: 1, "b512x1024": 1}, {"shard_rows": 2, "attributes": ABOUT}
    group, array = tmp_path / "zarr.json", tmp_path / BUCKET / "zarr.json"
    create_zarr(tmp_path, buckets, **how)
    assert damaged_metadata(tmp_path, buckets, **how) == []
    inode = group.stat().st_ino
    right = array.read_bytes()
    array.write_bytes(right.replace(b"255", b"254"))
    assert damaged_metadata(tmp_path, buckets, **how) == [array]
    (tmp_path / "b512x1024/zarr.json").unlink()
    assert damaged_metadata(tmp_path, buckets, **how) == [array, tmp_path / "b512x1024/zarr.json"]
    create_zarr(tmp_path, buckets, **how)
    assert damaged_metadata(tmp_path, buckets, **how) == []
    assert (array.read_bytes(), group.stat().st_ino) == (right, inode)
    assert damaged_metadata(tmp_path, {BUCKET: 2}, shard_rows=2, attributes={"ignore": 0}) == [group, array]


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, SHARD])
def test_a_shard_in_which_all_is_ignored_is_still_a_file(tmp_path: Path, count: int) -> None:
    unsure = {f"s{i}": np.full((300, 400), IGNORE, np.uint8) for i in range(count)}
    make_run(tmp_path, unsure)
    assert shard_path(tmp_path / zarr_folder(LABELS) / BUCKET, 0).stat().st_size == SHARD * 16 + 4
    labels = committed(tmp_path)
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
    create_zarr(tmp_path, {"b1024x1024": len(labels)}, shard_rows=SHARD, attributes={})
    frames = [None if label is None else encode_zarr(label) for label in labels]
    shard = write_zarr_shard(tmp_path / "b1024x1024", 0, shard_rows=SHARD, labels=frames)
    data = (tmp_path / "b1024x1024/c.0.0.0").read_bytes()
    assert (shard.file, shard.bytes, shard.crc32c) == ("c.0.0.0", len(data), crc32c(np.frombuffer(data, np.uint8)))
    assert shard.label_bytes == tuple(sum(map(len, row or ())) for row in frames)
    assert sum(shard.label_bytes) + SHARD * 4 * 16 + 4 == len(data)


@pytest.mark.parametrize(("size", "chunks"), [((600, 300), 2), ((60, 30), 1)])
def test_a_label_of_another_bucket_is_not_written(tmp_path: Path, size: tuple[int, int], chunks: int) -> None:
    with pytest.raises(ValueError, match=f"a label of {chunks} chunks is not one of b1024x1024, which have 4"):
        write_zarr_shard(tmp_path / "b1024x1024", 0, shard_rows=SHARD, labels=[encode_zarr(street(1, *size))])
    assert list(tmp_path.iterdir()) == []


def test_a_unit_that_was_stopped_half_way_is_written_again_with_the_rest(tmp_path: Path) -> None:
    first, second = street(1, 500, 512), street(2, 500, 500)
    make_run(tmp_path, {"a": first, "b": None})
    assert list(committed(tmp_path)) == ["a"]
    commit(tmp_path, BUCKET, 0, ["a", "b"], {"a": first, "b": second})
    labels = committed(tmp_path)
    assert np.array_equal(labels["a"], first)
    assert np.array_equal(labels["b"], second)


def test_an_array_that_grows_keeps_its_labels(tmp_path: Path) -> None:
    first, second = street(1, 500, 512), street(2, 512, 300)
    create_zarr(tmp_path, {BUCKET: 1}, shard_rows=1, attributes={})
    write_zarr_shard(tmp_path / BUCKET, 0, shard_rows=1, labels=[encode_zarr(first)])
    assert np.array_equal(read_zarr(tmp_path / BUCKET, 0, window=(0, 0, 500, 512)), first)
    create_zarr(tmp_path, {BUCKET: 2, "b512x1024": 1}, shard_rows=1, attributes={})
    write_zarr_shard(tmp_path / BUCKET, 1, shard_rows=1, labels=[encode_zarr(second)])
    assert np.array_equal(read_zarr(tmp_path / BUCKET, 0, window=(0, 0, 500, 512)), first)
    assert np.array_equal(read_zarr(tmp_path / BUCKET, 1, window=(0, 0, 512, 300)), second)


def test_a_shard_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    create_zarr(tmp_path, {BUCKET: 1}, shard_rows=1, attributes={})
    for seed in range(20):  # of nearly the same size, as quickly as a disk can
        label = street(seed, 512, 512)
        write_zarr_shard(tmp_path / BUCKET, 0, shard_rows=1, labels=[encode_zarr(label)])
        assert np.array_equal(read_zarr(tmp_path / BUCKET, 0, window=(0, 0, 512, 512)), label)


def test_a_run_made_anew_in_the_same_folder_is_read_anew(tmp_path: Path) -> None:
    make_run(tmp_path / "run", {"a": street(1, 500, 512)})
    assert np.array_equal(committed(tmp_path / "run")["a"], street(1, 500, 512))
    shutil.rmtree(tmp_path / "run")
    others = {name: street(i, 400, 512) for i, name in enumerate("abcde", 20)}
    make_run(tmp_path / "run", others)
    labels = committed(tmp_path / "run")
    for sample_id, label in others.items():
        assert np.array_equal(labels[sample_id], label)
