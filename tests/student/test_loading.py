"""A training must see the same crops whoever reads them and however far ahead. If this fails, a bucket changes it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from autolabel.manifests import storage
from autolabel.manifests.samples import Manifest, load_manifest
from autolabel.student.data import Augmentation, Fetched, ManifestDataset, TrainingCrops
from autolabel.student.loading import batches_of
from autolabel.student.sampling import Draw, Draws


@pytest.fixture(scope="module")
def fine(city: Path) -> Manifest:
    return load_manifest(city / "fine.parquet")


def crops_of(fine: Manifest, kind: type[TrainingCrops] = TrainingCrops) -> TrainingCrops:
    dataset = ManifestDataset(fine)
    draws = Draws(dataset.samples, dataset.label_space, seed=3, length=40)  # several epochs
    return kind(dataset, draws, augmentation=Augmentation((32, 48)))


@pytest.mark.parametrize(("loaders", "depth"), [(0, 1), (0, 16), (2, 3)])
def test_batches_hold_the_crops_of_their_draws_in_order(fine: Manifest, loaders: int, depth: int) -> None:
    crops = crops_of(fine)
    draws = [*range(7, 20), 3, 3]
    batches = list(batches_of(crops, draws, size=4, loaders=loaders, depth=depth))
    assert [len(batch["sample_id"]) for batch in batches] == [4, 4, 4, 3]
    assert torch.equal(torch.cat([b["image"] for b in batches]), torch.stack([crops[n]["image"] for n in draws]))
    assert torch.equal(torch.cat([b["label"] for b in batches]), torch.stack([crops[n]["label"] for n in draws]))


class Counting(TrainingCrops):
    """Notes how many crops are under way, and in which threads their bytes are read."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.fetched, self.made, self.most, self.threads = 0, 0, 0, set[int]()

    def fetch(self, draw: Draw) -> Fetched:
        self.fetched += 1
        self.most = max(self.most, self.fetched - self.made)
        self.threads.add(threading.get_ident())
        time.sleep(0.002)
        return super().fetch(draw)

    def crop(self, n: int, fetched: Fetched) -> dict[str, object]:
        item = super().crop(n, fetched)
        self.made += 1
        return item


def test_at_most_so_many_crops_are_read_ahead_by_as_many_threads(fine: Manifest) -> None:
    crops = crops_of(fine, Counting)
    assert isinstance(crops, Counting)
    for n, _ in enumerate(batches_of(crops, range(24), size=3, depth=5)):
        assert crops.made == 3 * (n + 1)
    assert (crops.fetched, crops.most) == (24, 5)  # with the one that is being made
    assert 2 <= len(crops.threads) <= 5 and threading.get_ident() not in crops.threads


def test_a_loader_that_is_left_early_ends_its_threads(fine: Manifest) -> None:
    batches = iter(batches_of(crops_of(fine), range(40), size=2, depth=4))
    next(batches)
    assert readers()
    del batches
    for _ in range(500):
        if not readers():
            break
        time.sleep(0.01)
    assert not readers()


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read ahead")]


@pytest.mark.parametrize("loaders", [0, 1])
def test_an_image_that_is_gone_is_named_when_its_crop_is_due(fine: Manifest, loaders: int, tmp_path: Path) -> None:
    crops = crops_of(fine)
    gone = crops.draws[5].sample
    samples = list(crops.dataset.samples)
    samples[gone] = samples[gone].__class__(**{**vars(samples[gone]), "image": tmp_path / "gone.png"})
    crops.dataset.samples = tuple(samples)
    first = next(n for n in range(40) if crops.draws[n].sample == gone)
    taken = 0
    with pytest.raises(ValueError, match=r"gone\.png: the file is missing"):
        for batch in batches_of(crops, range(40), size=1, loaders=loaders, depth=8):
            taken += len(batch["sample_id"])
    assert taken == first


def test_a_crop_costs_two_requests(fine: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    crops, near, asked = crops_of(fine), storage.storage_of(Path("/")), list[str]()

    class Counted:
        def __getattr__(self, name: str) -> object:
            asked.append(name)
            return getattr(near, name)

    monkeypatch.setattr(storage, "storage_of", lambda _: Counted())
    for n in range(6):
        _ = crops[n]
    assert asked == ["read_version", "read"] * 6  # the photograph, and a label PNG
