"""Every request to a bucket takes its time, and an object may be replaced between two of them. If this fails, a crop
costs more requests than one, or is put together from two versions of a shard."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import BUCKET, SHARD, Label, street

from autolabel.manifests import storage
from autolabel.manifests.run import frames
from autolabel.manifests.run.frames import fetch_zarr, read_zarr
from autolabel.manifests.run.shards import DamagedLabel, create_zarr, encode_zarr, write_zarr_shard

WIDE = "b1024x1024"


def write(array: Path, first: int, *labels: Label) -> None:
    write_zarr_shard(array, first, shard_rows=SHARD, labels=[encode_zarr(label) for label in labels])


@pytest.fixture
def array(tmp_path: Path) -> Path:
    create_zarr(tmp_path, {WIDE: 2 * SHARD}, shard_rows=SHARD, attributes={})
    for first in (0, SHARD):
        write(tmp_path / WIDE, first, street(first, 1000, 900), street(first + 1, 1024, 1024))
    return tmp_path / WIDE


class Watched:
    """The storage behind, which notes its requests; `before` is called with the name of each."""

    def __init__(self, before: Callable[[str], None] = lambda name: None) -> None:
        self.near, self.asked, self.before = storage.storage_of(Path("/")), list[tuple[str, Any]](), before

    def __getattr__(self, name: str) -> Any:
        def told(path: Path, *args: Any, **options: Any) -> Any:
            self.before(name)
            self.asked.append((f"{name} {path.name}", args))
            return getattr(self.near, name)(path, *args, **options)

        return told


def watch(monkeypatch: pytest.MonkeyPatch, watched: Watched) -> Watched:
    monkeypatch.setattr(storage, "storage_of", lambda _: watched)
    return watched


def test_a_crop_costs_one_range_once_its_shard_is_known(array: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = watch(monkeypatch, Watched())
    read_zarr(array, 0, window=(0, 0, 10, 10))
    assert [name for name, _ in watched.asked] == [
        "read zarr.json", "stat c.0.0.0", "read_range c.0.0.0", "read_range c.0.0.0"
    ]  # fmt: skip
    watched.asked.clear()
    read_zarr(array, SHARD, window=(0, 0, 10, 10))  # of the next shard
    assert [name for name, _ in watched.asked] == ["stat c.1.0.0", "read_range c.1.0.0", "read_range c.1.0.0"]
    watched.asked.clear()
    for row, window in ((0, (0, 0, 1000, 900)), (1, (500, 500, 100, 100)), (SHARD, (10, 900, 700, 100))):
        read_zarr(array, row, window=window)
    assert [name for name, _ in watched.asked] == ["read_range c.0.0.0"] * 2 + ["read_range c.1.0.0"]


def test_all_frames_of_a_label_are_one_range_and_its_crops_cost_none(
    array: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = watch(monkeypatch, Watched())
    fetched = fetch_zarr(array, SHARD + 1)
    label, before = street(SHARD + 1, 1024, 1024), len(watched.asked)
    assert sum(map(len, encode_zarr(label))) == len(fetched.data)
    for top, left, height, width in ((0, 0, 1024, 1024), (500, 0, 30, 1024), (600, 700, 1, 1)):
        found = fetched.crop((top, left, height, width))
        assert np.array_equal(found, label[top : top + height, left : left + width])
    assert len(watched.asked) == before


def test_a_shard_that_is_replaced_between_its_index_and_its_frames_is_read_anew_and_never_mixed(
    array: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = iter(range(100, 200))
    shown: list[int] = []

    def replace(name: str) -> None:
        if name == "read_range" and len(shown) < replacements:
            shown.append(next(seeds))
            write_zarr_shard(
                array, 0, shard_rows=SHARD, labels=[encode_zarr(street(shown[-1], 1000 - len(shown), 900))]
            )

    near = storage.storage_of(Path("/"))
    for replacements in (1, 2):  # before the index, or before the frames too
        frames._indices.clear()
        shown.clear()
        with monkeypatch.context() as patch:
            watched = watch(patch, Watched(replace))
            watched.near = near
            patch.setattr(storage, "write", near.write)  # unwatched
            if replacements == 1:
                assert np.array_equal(read_zarr(array, 0, window=(0, 0, 999, 900)), street(shown[0], 999, 900))
            else:
                with pytest.raises(DamagedLabel, match="has changed while it was read"):
                    read_zarr(array, 0, window=(0, 0, 999, 900))


def test_a_shard_that_is_gone_is_an_error_also_where_all_of_a_label_is_ignored(tmp_path: Path) -> None:
    create_zarr(tmp_path, {BUCKET: SHARD}, shard_rows=SHARD, attributes={})
    write(tmp_path / BUCKET, 0, np.full((500, 500), 255, np.uint8), street(1, 500, 500))
    assert (read_zarr(tmp_path / BUCKET, 0, window=(0, 0, 500, 500)) == 255).all()
    (tmp_path / BUCKET / "c.0.0.0").unlink()
    for row in range(SHARD):
        with pytest.raises(DamagedLabel, match="is missing: run `autolabel generate` again to restore it"):
            read_zarr(tmp_path / BUCKET, row, window=(0, 0, 500, 500))


def test_a_store_that_was_made_anew_with_other_shards_is_read_as_it_is_now(array: Path) -> None:
    read_zarr(array, 0, window=(0, 0, 10, 10))
    shutil.rmtree(array.parent)
    create_zarr(array.parent, {WIDE: 9}, shard_rows=3, attributes={})
    labels = [street(50 + row, 1024, 1024) for row in range(9)]
    for first in (0, 3, 6):
        write_zarr_shard(array, first, shard_rows=3, labels=[encode_zarr(x) for x in labels[first : first + 3]])
    for row in (8, 3, 0):
        assert np.array_equal(read_zarr(array, row, window=(0, 0, 1024, 1024)), labels[row])
