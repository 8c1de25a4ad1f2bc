"""A run in a bucket is read by us and by others. If this fails, they get other labels, or pay for every look."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import buckets
import numpy as np
import pytest
import tensorstore
import torch
import zarr
from noise import noise_run
from obstore.store import from_url
from torch.utils.data import DataLoader
from zarr.storage import ObjectStore

import autolabel as al
from autolabel.manifests import storage
from autolabel.manifests.run.shards import DamagedLabel
from autolabel.student.data import Augmentation, ManifestDataset, TrainingCrops
from autolabel.student.loading import batches_of
from autolabel.student.sampling import Draws

SIZES = [(96, 128), (64, 200), (600, 700), (96, 128), (513, 300)]


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> al.Run:
    """A run on a disk."""
    return noise_run(tmp_path_factory.mktemp("run"), SIZES, unit_size=2, keep_probability=True)


@pytest.fixture(scope="module")
def place(near: al.Run) -> Iterator[buckets.Place]:
    """The same, with its photographs, in a bucket."""
    with buckets.place() as place:
        buckets.upload(near.path.parent, place.url)
        yield place


@pytest.fixture
def far(place: buckets.Place) -> al.Run:
    return al.open_run(f"{place.url}/run")


def test_labels_crops_and_manifest_are_those_of_the_disk(near: al.Run, far: al.Run) -> None:
    assert list(far.labels) == list(near.labels)
    for name, label in near.labels.items():
        assert np.array_equal(far.labels[name], label)
        assert np.array_equal(far.labels.crop(name, (10, 20, 30, 40)), label[10:40, 20:60])
        assert np.array_equal(far.probability[name], near.probability[name])
    assert [s.sample_id for s in far.manifest.samples()] == [s.sample_id for s in near.manifest.samples()]


def crops_of(run: al.Run) -> TrainingCrops:
    dataset = ManifestDataset(run.manifest_path)
    draws = Draws(dataset.samples, dataset.label_space, seed=1, length=24)
    return TrainingCrops(dataset, draws, augmentation=Augmentation((64, 96)), weights=True)


def test_a_crop_of_a_training_costs_a_request_for_each_of_its_maps(
    far: al.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    crops = crops_of(far)
    for n in range(24):  # all shards are known then
        crops.fetch(crops.draws[n])
    asked, bucket = list[str](), storage.storage_of(far.path)

    class Counted:
        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(bucket, name)

    monkeypatch.setattr(storage, "storage_of", lambda _: Counted())
    for n in range(24):
        _ = crops[n]
    assert sorted(asked) == ["read_range"] * 48 + ["read_version"] * 24  # the photograph; its label and probability


@pytest.mark.thorough
@pytest.mark.parametrize("loaders", [0, 1])
def test_a_training_sees_the_crops_of_the_disk(near: al.Run, far: al.Run, loaders: int) -> None:
    """Also by loading processes, although this one has connections to the bucket."""
    found = list(batches_of(crops_of(far), range(24), size=5, loaders=loaders))
    expected = list(batches_of(crops_of(near), range(24), size=5))
    for name in ("image", "label", "weight"):
        assert all(torch.equal(a[name], b[name]) for a, b in zip(found, expected, strict=True))


def test_a_forked_loading_process_is_refused_in_words_and_does_not_hang(far: al.Run) -> None:
    data = far.to_torch()
    with pytest.raises(OSError, match="start it with multiprocessing_context='spawn'"):
        list(DataLoader(data, 2, num_workers=1, multiprocessing_context="fork"))


def arrays(near: al.Run) -> list[str]:
    return sorted(path.name for path in (near.path / "labels.zarr").iterdir() if path.is_dir())


def test_zarr_python_opens_the_store_from_the_bucket(near: al.Run, place: buckets.Place) -> None:
    store = ObjectStore(from_url(f"{place.url}/run/labels.zarr", client_options={"allow_http": True}), read_only=True)
    group = zarr.open_group(store, mode="r")
    assert group.attrs["ignore"] == 255
    for sample in near.manifest.samples():
        assert sample.label is not None and sample.label_index is not None
        row = group[sample.label.name][sample.label_index]  # type: ignore[index]
        assert np.array_equal(row[: sample.height, : sample.width], near.labels[sample.sample_id])
        assert (row[sample.height :] == 255).all() and (row[:, sample.width :] == 255).all()


def test_tensorstore_opens_the_store_from_the_bucket(near: al.Run, place: buckets.Place) -> None:
    bucket = place.url.removeprefix("s3://")
    server = {"endpoint": place.proxy.url, "aws_region": "us-east-1", "aws_credentials": {"type": "environment"}}
    opened = {
        name: tensorstore.open(
            {
                "driver": "zarr3",
                "kvstore": {"driver": "s3", "bucket": bucket, "path": f"run/labels.zarr/{name}/", **server},
            },
            read=True,
        ).result()
        for name in arrays(near)
    }
    for sample in near.manifest.samples():
        assert sample.label is not None
        row = opened[sample.label.name][sample.label_index, : sample.height, : sample.width].read().result()
        assert np.array_equal(row, near.labels[sample.sample_id])


def test_a_shard_that_is_replaced_is_read_anew(near: al.Run, far: al.Run) -> None:
    names = [name for name in near.labels if near.labels[name].shape == (96, 128)]
    assert np.array_equal(far.labels[names[0]], near.labels[names[0]])
    shard = far.path / "labels.zarr/b512x512/c.0.0.0"
    data = storage.read(shard)
    storage.write(shard, data[:-9] + bytes(9))
    with pytest.raises(DamagedLabel, match="its index is damaged"):
        _ = far.labels[names[0]]
    storage.write(shard, data)
    assert np.array_equal(far.labels[names[0]], near.labels[names[0]])
