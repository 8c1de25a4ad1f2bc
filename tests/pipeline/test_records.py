"""If another image under an old name passes for the labelled one, its label is of another picture and nobody knows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import buckets
import numpy as np
import pytest
from conftest import autolabel, labels_of
from PIL import Image

from autolabel.manifests import storage
from autolabel.manifests.locations import location
from autolabel.manifests.reading import read_version
from autolabel.manifests.run.folder import Accounts, Run
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.records import Row, changed_images, identified, known_by
from autolabel.pipeline.run import generate
from autolabel.pipeline.verify import verify


def noise(path: Path, seed: int) -> Path:
    """A photograph whose file has the same length whatever the seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path, compress_level=0)
    return path


def keep_time(path: Path, change: Callable[[], object]) -> None:
    before = path.stat()
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def overwrite(path: Path, other: Path) -> None:
    """As `cp -p` does: the same inode with other bytes."""
    keep_time(path, lambda: path.write_bytes(other.read_bytes()))


def exchange(path: Path, other: Path) -> None:
    """As `rsync -t` and `git checkout` do: another inode under the name."""
    keep_time(path, lambda: os.replace(shutil.copyfile(other, path.with_name("temporary")), path))


# --- the identity of one file -----------------------------------------------------------------------------------------


def labelled(path: Path) -> Row:
    """The row of a file as it is now."""
    return replace(identified(Row("a"), path), image_fingerprint=storage.fingerprint(path))


def test_an_image_and_its_identity_are_read_from_a_bucket_by_one_request(tmp_path: Path) -> None:
    with buckets.place() as place:
        image = location(place.url) / "image.png"
        storage.write(image, noise(tmp_path / "image.png", 0).read_bytes())
        expected = labelled(image)
        place.proxy.passed.clear()
        now, data = read_version(image)
        assert [one.operation for one in place.proxy.passed] == ["get"]
        assert replace(known_by(Row("a"), now), image_fingerprint=storage.fingerprint_bytes(data)) == expected
        assert data == (tmp_path / "image.png").read_bytes()


@pytest.mark.parametrize("place", [0, 2_500_000, 4_999_999])
@pytest.mark.parametrize("change", [overwrite, exchange])
def test_one_byte_anywhere_is_noticed_though_length_and_time_stay(
    tmp_path: Path, change: Callable[[Path, Path], None], place: int
) -> None:
    data = bytearray(5_000_000)
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(data)
    row = labelled(path)
    assert changed_images([(path, row)]) == {}
    data[place] = 1
    other.write_bytes(data)
    change(path, other)
    assert changed_images([(path, row)]) == {"a": storage.fingerprint(other)}


def test_the_same_bytes_with_another_stat_are_the_same_image(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(1000))
    row = labelled(path)
    for change in (
        lambda: os.utime(path),
        lambda: path.chmod(0o600),
        lambda: os.replace(shutil.copyfile(path, tmp_path / "b"), path),
    ):
        change()
        assert storage.stat(path) != (row.image_bytes, row.image_mtime_ns, row.image_version)
        assert changed_images([(path, row)]) == {}


def test_a_file_with_the_same_stat_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(1000))
    row = labelled(path)
    monkeypatch.setattr(storage, "reading", lambda path: pytest.fail("it was read"))
    assert changed_images([(path, row)]) == {}


def test_a_file_that_is_gone_has_no_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(1000))
    row = labelled(path)
    path.unlink()
    assert changed_images([(path, row)]) == {"a": None}
    assert changed_images([(path, replace(row, image_fingerprint=None))]) == {}  # it could not be read then either


# --- a run and its images ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> LabelJob:
    """A folder with five images, their manifest and a finished run, two images to a unit."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    for k in range(5):
        noise(folder / "images" / f"{k}.png", k)
    made = autolabel("manifest", "scan", folder / "images", "--label-space", "cityscapes", "-o", folder / "m.parquet")
    assert made.exit_code == 0, made.output
    job = LabelJob(folder / "m.parquet", teacher, folder / "run", scales=(1.0,), unit_size=2)
    generate(job)
    return job


@pytest.fixture
def job(data: LabelJob, tmp_path: Path) -> LabelJob:
    """The same elsewhere, copied: other inodes, other times, another root."""
    shutil.copytree(data.out.parent, tmp_path / "copy", copy_function=shutil.copyfile)
    return replace(data, manifest=tmp_path / "copy" / "m.parquet", out=tmp_path / "copy" / "run")


def image(job: LabelJob, number: int) -> Path:
    return job.manifest.parent / "images" / f"{number}.png"


def test_a_data_set_that_was_copied_or_moved_is_recognised_and_resumed(job: LabelJob, tmp_path: Path) -> None:
    (job.out / "units" / "b512x512.000001.0.parquet").unlink()
    assert generate(job).done == 2
    (tmp_path / "copy").rename(tmp_path / "moved")
    moved = replace(job, manifest=tmp_path / "moved" / "m.parquet", out=tmp_path / "moved" / "run")
    ended = generate(moved)
    assert (ended.done, ended.accounts) == (0, Accounts(5, 5, 0, 0))
    assert ended.run.input_manifest == moved.manifest
    result = verify(moved.out)
    assert (result.faults, result.images, result.gone, result.unread) == ([], 5, [], "")


@pytest.mark.parametrize("change", [overwrite, exchange])
def test_an_image_that_was_replaced_is_refused_by_generate_and_named_by_verify(
    job: LabelJob, tmp_path: Path, change: Callable[[Path, Path], None]
) -> None:
    generate(job)
    change(image(job, 3), noise(tmp_path / "other.png", 99))
    with pytest.raises(ValueError, match=f"image {image(job, 3)} has changed since it was labelled"):
        generate(job)
    result = verify(job.out)
    assert result.faults == [f"image {image(job, 3)} has changed since it was labelled"]
    assert (result.images, result.units, result.gone) == (5, 3, [])


def test_a_repair_lets_generate_label_the_image_that_is_there_now(job: LabelJob, tmp_path: Path) -> None:
    generate(job)
    before = labels_of(job.out)
    overwrite(image(job, 3), noise(tmp_path / "other.png", 99))
    assert verify(job.out, repair=True).undone == 1
    assert generate(job).done == 2
    assert verify(job.out).faults == []
    after = labels_of(job.out)
    assert [name for name in before if before[name] != after[name]] == ["3"]


def test_an_image_that_is_gone_is_no_fault_of_its_label(job: LabelJob) -> None:
    generate(job)
    image(job, 1).unlink()
    image(job, 4).rename(job.manifest.parent / "images" / "moved.png")
    result = autolabel("verify", job.out)
    assert (result.exit_code, result.stdout.splitlines()) == (
        0,
        [
            f"gone, so not compared: 2 images (the first is {image(job, 1)})",
            "labels read: 5, images: 3, units: 3, faults: 0",
        ],
    )
    with pytest.raises(ValueError, match=f"image {image(job, 1)} is gone since it was labelled: put the old one back"):
        generate(job)


def test_without_the_manifest_no_image_can_be_compared(job: LabelJob) -> None:
    generate(job)
    job.manifest.unlink()
    result = autolabel("verify", job.out)
    where = Run.open(job.out).input_manifest
    assert (result.exit_code, result.stdout.splitlines()) == (
        0,
        [
            f"no image was compared: {where}, which says where they are, is gone or has changed",
            "labels read: 5, images: 0, units: 3, faults: 0",
        ],
    )
