"""If a photograph or a coarse label of another size is read, classes land on the wrong pixels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny import label, photo

from autolabel.manifests.images import BadImage
from autolabel.manifests.label_space import CAMVID
from autolabel.manifests.reading import decode_photograph, read_coarse, read_file, read_photograph, read_picture
from autolabel.manifests.samples import Sample


def sample(root: Path, height: int = 6, width: int = 8) -> Sample:
    return Sample("a", root / "a.jpg", height, width, coarse_label=root / "a.png")


def reason(read: object, *arguments: object) -> str:
    with pytest.raises(BadImage) as refusal:
        read(*arguments)  # type: ignore[operator]
    return str(refusal.value)


def test_a_photograph_and_its_coarse_label_are_read(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg", 90)
    label(tmp_path / "a.png", 3)
    image, coarse = read_photograph(sample(tmp_path)), read_coarse(sample(tmp_path), CAMVID)
    assert image.shape == (6, 8, 3) and image[0, 0].tolist() == [90, 90, 90]
    assert coarse is not None and coarse.tolist() == [[3] * 8] * 6
    assert read_coarse(Sample("a", tmp_path / "a.jpg", 6, 8), CAMVID) is None


def test_a_photograph_that_is_decoded_smaller_has_the_rounded_size(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg", size=(9, 7))
    picture, smaller = read_picture(sample(tmp_path, 7, 9), shrink=2)
    assert (picture.size, smaller) == ((5, 4), 2)


def test_a_photograph_of_another_size_is_refused(tmp_path: Path) -> None:
    data = photo(tmp_path / "a.jpg").read_bytes()
    expected = "the image is 8 x 6 but its manifest says 8 x 7: scan again"
    assert reason(decode_photograph, sample(tmp_path, 7, 8), data) == expected
    assert reason(read_photograph, sample(tmp_path, 7, 8)) == f"image {tmp_path}/a.jpg: {expected}"


def test_a_coarse_label_of_another_size_is_refused_and_named(tmp_path: Path) -> None:
    label(tmp_path / "a.png")
    assert reason(read_coarse, sample(tmp_path, 7, 8), CAMVID) == (
        f"its coarse label {tmp_path}/a.png: the label is 8 x 6 but its image 8 x 7 pixels"
    )


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    reasons = {name: reason(read_file, tmp_path / name) for name in ("gone", "nowhere", "pipe", ".", "loop")}
    assert reasons == {
        "gone": "the file is missing",
        "nowhere": "the file is missing",
        "pipe": "not a regular file (a named pipe)",
        ".": "not a regular file",
        "loop": "the file cannot be read (Too many levels of symbolic links)",
    }
