"""Other programs read runs through Ray Data. If this fails, they get other pixels, or the driver carries them all."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import buckets
import numpy as np
import pytest
from noise import noise_run
from PIL import Image

import autolabel as al
from autolabel.manifests.cluster import ray_session
from autolabel.manifests.ray_source import pieces_of, read_columns
from autolabel.manifests.tables import BadTable

SIZES = [(96, 128)] * 9 + [(64, 200)] * 3 + [(96, 128)] * 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> al.Run:
    return noise_run(
        tmp_path_factory.mktemp("run"), SIZES, damaged=3, unit_size=4, keep_confidence=8, keep_probability=True
    )


def photograph(run: al.Run, sample_id: str) -> np.ndarray:  # type: ignore[type-arg]
    return np.asarray(Image.open(run.path.parent / "photographs" / f"{sample_id}.png"))


LABELLED = [f"p{n:02}" for n in range(len(SIZES)) if n != 3]


@pytest.mark.parametrize("number", [1, 3, 5, 1000])
def test_pieces_hold_every_labelled_sample_once_and_say_how_large_they_are(run: al.Run, number: int) -> None:
    pieces = pieces_of(run.manifest, number)
    ids = [sample.sample_id for piece in pieces for sample in piece.samples()]
    assert sorted(ids) == LABELLED
    assert len(pieces) == {1: 1, 3: 3, 5: 5, 1000: 13}[number]
    assert [piece.rows for piece in pieces] == [len(piece.samples()) for piece in pieces]
    assert sum(piece.pixels for piece in pieces) == sum(run.labels[name].size for name in LABELLED)


def test_a_piece_gives_the_pixels_of_the_run_in_blocks_of_one_size(run: al.Run) -> None:
    columns = ("sample_id", "image", "label", "confidence", "probability", "height", "width")
    (piece,) = pieces_of(run.manifest, 1)
    seen = []
    for block in read_columns(piece, columns):
        for n, name in enumerate(block["sample_id"]):
            assert np.array_equal(block["image"][n], photograph(run, name))
            assert np.array_equal(block["label"][n], run.labels[name])
            assert np.array_equal(block["confidence"][n], run.confidence[name][1])
            assert np.array_equal(block["probability"][n], run.probability[name])
            assert (block["height"][n], block["width"][n]) == run.labels[name].shape
            seen.append(name)
    assert sorted(seen) == LABELLED


def test_a_run_that_is_not_there_or_has_kept_less_is_refused(run: al.Run, tmp_path: Path) -> None:
    plain = noise_run(tmp_path, SIZES, store="png")
    message = r"columns: .*run has kept no probability: it has sample_id, image, label, height, width"
    with pytest.raises(ValueError, match=message):
        al.ray_dataset(plain, columns=["probability"])
    with pytest.raises(ValueError, match="columns: 'images' is none of sample_id, image, label, confidence"):
        al.ray_dataset(run, columns=["images"])
    with pytest.raises(FileNotFoundError, match=r"is not a run: it has no run\.json"):
        al.ray_dataset(tmp_path)
    plain.manifest_path.unlink()
    with pytest.raises(BadTable, match=r"manifest\.parquet does not exist"):
        al.ray_dataset(plain)


def test_a_manifest_that_is_published_anew_while_it_is_read_is_refused(tmp_path: Path) -> None:
    run = noise_run(tmp_path, SIZES)
    (piece,) = pieces_of(run.manifest, 1)
    shutil.copy(run.manifest_path, tmp_path / "copy")
    shutil.move(tmp_path / "copy", run.manifest_path)
    with pytest.raises(ValueError, match="has changed since the data set was made: make it again"):
        piece.samples()


@pytest.fixture(scope="module")
def place() -> Iterator[buckets.Place]:
    with buckets.place() as place:
        yield place


@pytest.fixture(scope="module")
def connected(place: buckets.Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray whose workers find the bucket as this process does."""
    with ray_session(None, tmp_path_factory.mktemp("ray"), workers=2):
        yield


@pytest.mark.thorough
def test_ray_data_reads_exact_pixels_at_its_workers_from_a_disk_and_a_bucket(
    place: buckets.Place, connected: None, run: al.Run
) -> None:
    buckets.upload(run.path.parent, place.url)
    for read in (run.path, f"{place.url}/run"):
        data = al.ray_dataset(read)
        assert data.count() == len(LABELLED)
        rows = {row["sample_id"]: row for row in data.iter_rows()}
        assert sorted(rows) == LABELLED
        for name, row in rows.items():
            assert np.array_equal(row["image"], photograph(run, name))
            assert np.array_equal(row["label"], run.labels[name])
            assert np.array_equal(row["confidence"], run.confidence[name][1])
            assert np.array_equal(row["probability"], run.probability[name])
    labels = al.ray_dataset(run, columns=["label", "sample_id"])
    assert sorted(labels.schema().names) == ["label", "sample_id"]
    pixels = labels.map_batches(lambda batch: {"pixels": [label.size for label in batch["label"]]}).sum("pixels")
    assert pixels == sum(run.labels[name].size for name in LABELLED)


def test_the_driver_hands_out_places_and_no_pixels(run: al.Run) -> None:
    whole = sum(len(pickle.dumps(piece)) for piece in pieces_of(run.manifest, 1))
    assert whole < 20_000 < sum(run.labels[name].size for name in LABELLED)
