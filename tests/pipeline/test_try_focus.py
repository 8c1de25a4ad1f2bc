"""A certificate says of labels that the whole image would not change them. If it is wrong, people trust what is not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import autolabel, photograph, refused, scanned

import autolabel as al
from autolabel.manifests.focus import FocusCertificate
from autolabel.manifests.reading import read_photograph
from autolabel.manifests.samples import Manifest, Sample, load_manifest, save_manifest
from autolabel.pipeline.analysis.certifying import ENOUGH, SPARE, Certified, ContrastTally
from autolabel.pipeline.analysis.focus import spread
from autolabel.teacher.contrast import PER_UNIT, STEPS, Contrast
from autolabel.teacher.decide import keep
from autolabel.teacher.loading import load_teacher

SCALES = (0.5, 1.0, 2.0)


def contrast(
    needed: list[list[float]], quotients: dict[tuple[int, int], list[float]], changed: float = 9e9
) -> Contrast:
    """An image of 4 x 5 with labels of these quotients by zone and class; those up to `changed` differ."""
    labels, differing = np.zeros((2, 2, 2, STEPS), np.int64)
    for place, values in quotients.items():
        for value in values:
            step = min(int(np.ceil(value * PER_UNIT)), STEPS) - 1
            labels[(*place, step)] += 1
            differing[(*place, step)] += value <= changed
    top = np.zeros((4, 5), np.uint8)
    return Contrast(
        0.5,
        top,
        np.ones((4, 5), np.float32),
        (1, 3),
        int(differing.sum()),
        np.array(needed, np.float32),
        labels,
        differing,
    )


def test_a_class_that_enough_images_show_swings_by_its_own_largest_and_a_twentieth() -> None:
    tally = ContrastTally(2)
    for number in range(ENOUGH):
        shown = {(0, 0): [1.0], (1, 1): [2.0]} | ({(1, 0): [1.0]} if number else {})
        tally.add(contrast([[number / 10, 0], [0.3, 4.0]], shown))
    up = [np.ceil(value * (1 + SPARE) * PER_UNIT) / PER_UNIT for value in (1.9, 4.0)]
    assert tally.swings().tolist() == [[up[0], up[0]], [up[1], up[1]]]  # beyond, 19 images show class 0
    tally.add(contrast([[0, 0], [0.3, 0]], {(1, 0): [1.0]}))
    assert tally.swings().tolist() == [[up[0], up[0]], [np.ceil(0.3 * 1.05 * 64) / 64, up[1]]]
    assert (tally.images, tally.pixels, tally.rows) == (21, 420, 10.5)


def test_labels_are_certified_above_the_swing_of_their_zone_and_class() -> None:
    one, other = ContrastTally(2), ContrastTally(2)
    one.add(contrast([[0, 0], [0, 0]], {(0, 0): [1.0, 1.0 + 1 / 64, 3.0], (1, 1): [0.5, 90.0]}, changed=1.0 + 1 / 64))
    other.add(contrast([[0, 0], [0, 0]], {(1, 0): [2.0]}))
    swings = np.array([[1.0, 0.0], [2.0, 0.5]])
    assert one.certified(swings) == (3, 1)
    assert other.certified(swings) == (0, 0)
    assert ContrastTally.of([one, other], 2).certified(swings - 1 / 64) == Certified(6, 4)


def test_images_are_spread_over_groups_and_within_them() -> None:
    samples = [
        Sample(f"{group}{n}", Path(f"{group}{n}.png"), 8, 8, group=group)
        for group, many in (("a", 50), ("b", 3), ("c", 40))
        for n in range(many)
    ]
    chosen = spread(samples, 23)
    assert Counter(s.group for s in chosen) == {"a": 10, "b": 3, "c": 10}
    assert [s.sample_id for s in chosen[:3]] == ["a0", "a5", "a10"]
    assert chosen == sorted(chosen, key=samples.index) and spread(samples, 500) == samples


# --- on images --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drives(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of four images with fine labels, of two groups; the teacher has learnt from two of them."""
    samples = [s for name in ("val", "fine") for s in load_manifest(city / f"{name}.parquet").samples[:2]]
    path = tmp_path_factory.mktemp("drives") / "drives.parquet"
    groups = [Sample(**{**vars(s), "group": "ab"[place % 2]}) for place, s in enumerate(samples)]
    save_manifest(path, Manifest.of(load_manifest(city / "fine.parquet").label_space, tuple(groups)))
    return path


def test_every_certified_label_is_that_of_the_whole_image(teacher: Path, drives: Path, tmp_path: Path) -> None:
    summary = al.focus(drives, tmp_path / "focus.json", teacher=teacher, device="cpu")
    certificate = FocusCertificate.read(tmp_path / "focus.json")
    network = load_teacher(teacher, device="cpu")
    assert certificate == summary.certificate
    assert (certificate.teacher_sha256, certificate.scales, certificate.images) == (network.sha256, SCALES, 4)
    swings = np.array([certificate.focus.within, certificate.focus.beyond], np.float32)
    certified, differing = 0, 0
    for sample in load_manifest(drives).samples:
        image = read_photograph(sample)[None]
        (own,) = network.predict_in_batches(image, 1, edges=(0.5,), scales=SCALES, focus=0.25, swings=swings)
        (true,) = network.predict_in_batches(image, 1, edges=(0.5,), scales=SCALES)
        label, expected = keep(own.codes, 19), keep(true.codes, 19)
        assert own.least is not None
        sure = own.least > 0
        assert np.array_equal(label[sure], expected[sure])
        certified += sure.sum()
        differing += (label != expected).sum()
    total = summary.trial.total
    assert total.certified(swings.astype(float)) == (certified, 0) and certified > 0.2 * total.pixels
    assert (total.differing, total.pixels) == (differing, certificate.pixels) and differing > 0
    assert summary.trial.ious() is not None and summary.trial.gain() is not None
    assert list(summary.trial.crossed()) == ["a", "b"]


def test_the_command_says_what_a_focus_saves_and_costs(teacher: Path, drives: Path, tmp_path: Path) -> None:
    out = tmp_path / "focus.json"
    result = autolabel("focus", drives, "--teacher", teacher, "--limit", 3, "--device", "cpu", "-o", out)
    assert result.exit_code == 0 and FocusCertificate.read(out).images == 3
    for words in (
        "swings of 3 images only, so every class takes the largest of all: give 20 or more",
        "was trained on 1 of these images: it may swing more on others",
        "3 images: the highest scale saw 50.0 % of the rows",
        "% of the labels differ", "% of the pixels are certified", "95 % of the draws of images",
        "each group by the swings of all others", "of these differ", "IoU with focus", f"wrote {out}",
    ):  # fmt: skip
        assert words in result.stdout


def test_without_labels_and_groups_it_says_what_it_cannot_tell(teacher: Path, city: Path, tmp_path: Path) -> None:
    photograph(city, tmp_path / "drive", ["a_1", "a_2"])
    (tmp_path / "drive" / "a_2.png").write_bytes((tmp_path / "drive" / "a_2.png").read_bytes()[:2000])
    manifest = scanned(city, tmp_path / "drive")
    summary = al.focus(manifest, tmp_path / "focus.json", teacher=teacher, device="cpu")
    text = str(summary)
    assert "all images are of one group: nothing says how the certificate holds on another drive" in text
    assert "left out, the first of 1: " in text and "a_2.png" in text
    assert "IoU" not in text and summary.trial.gain() is None and not summary.trial.crossed()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--focus", 0), "focus 0: expected a share of the rows in (0, 1], such as 0.25"),
        (("--focus", 1.5), "focus 1.5: expected a share of the rows in (0, 1], such as 0.25"),
        (("--scales", 1), "focus with scales 1: expected a scale above 1 besides, such as 0.5,1,2"),
        (("--limit", 0), "limit 0: expected 1 or more"),
        (
            ("--focus", 0.9),
            "focus 0.9: at scale 2 a band of the rows and what lies around it are as high as the images",
        ),
        (("-o", "focus.txt"), "-o focus.txt: expected a name that ends in .json, such as focus.json"),
        (("--teacher", "TEACHER"), "focus 0.25: several teachers would each look elsewhere: expected one teacher"),
    ],
)
def test_what_cannot_be_tried_is_refused_and_nothing_is_written(
    options: tuple[object, ...], line: str, teacher: Path, drives: Path, tmp_path: Path
) -> None:
    out = tmp_path / "focus.json"
    out.write_text("before")
    more = (teacher if option == "TEACHER" else option for option in options)
    command = ("focus", drives, "--teacher", teacher, "--limit", 2, "--device", "cpu", "-o", out, *more)
    assert refused(*command).startswith(line)
    assert out.read_text() == "before" and [path.name for path in tmp_path.iterdir()] == ["focus.json"]


def test_a_teacher_of_other_classes_is_refused(teacher: Path, camvid: Path, tmp_path: Path) -> None:
    assert "predicts 19 classes of" in refused("focus", camvid, "--teacher", teacher, "-o", tmp_path / "focus.json")
    assert not list(tmp_path.iterdir())
