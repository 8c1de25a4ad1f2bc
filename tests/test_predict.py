"""The one decision of the whole system, keep or ignore, would be made on another number than the user asked for.

The reference floors the confidence to 8 bits before it compares: its "p > 0.5" is really p >= 0.502.
"""

from __future__ import annotations

import re
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import autolabel
from numpy.typing import NDArray

from autolabel.manifests.classes import CAMVID, CITYSCAPES, LabelSpace
from autolabel.manifests.files import sha256
from autolabel.manifests.images import read_image
from autolabel.manifests.tables import CONFIDENCE_BINS, load_manifest
from autolabel.teacher.build import build
from autolabel.teacher.predict import Teacher, load_teacher, normalise, pick_device, pick_precision

torch.set_num_threads(1)  # the small network is no slower with one, and never waits for a busy core

Image = NDArray[np.uint8]
NEVER_TRAINED = torch.zeros(0, dtype=torch.int64)
PAIR = LabelSpace("pair", CITYSCAPES.classes[:2])


def teacher_that_says(*logits: float, space: LabelSpace | None = None) -> Teacher:
    """A real network whose last layer looks at nothing: every pixel of every image gets the same logits."""
    network = build("hrnet18s_ocr_mscale", len(logits))
    with torch.no_grad():
        network.ocr.cls_head.weight.zero_()
        network.ocr.cls_head.bias.copy_(torch.tensor(logits))
    return Teacher(network, space, NEVER_TRAINED)


@pytest.fixture(scope="module")
def images(city: Path) -> Image:
    """(3, 48, 96, 3): the middles of three pictures that the teacher has not seen."""
    samples = load_manifest(city / "val.parquet").samples
    return np.stack([read_image(s.image)[24:72, 48:144] for s in samples])


@pytest.fixture(scope="module")
def seer(teacher: Path) -> Teacher:
    return load_teacher(teacher, device="cpu")


# --- the decision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "threshold", "kept"),
    [
        pytest.param(0.0, 0.5, False, id="exactly at the threshold is ignored"),
        pytest.param(0.0, float(np.nextafter(np.float32(0.5), np.float32(0))), True, id="one float above it is kept"),
        pytest.param(1e-6, 0.5, True, id="p = 0.50000025"),
        pytest.param(0.004, 0.5, True, id="p = 0.501, which 8 bits round down to the threshold"),
        pytest.param(0.004, 0.502, False, id="p = 0.501 against 0.502"),
        pytest.param(0.0, 0.0, True, id="no threshold"),
        pytest.param(100.0, 0.999, True, id="certain"),
    ],
)
def test_a_pixel_is_kept_where_its_probability_exceeds_the_threshold(
    margin: float, threshold: float, kept: bool, images: Image
) -> None:
    labels, (statistics, *_) = teacher_that_says(0.0, margin).label(images[:1], threshold, scales=(1,))
    winner = int(margin > 0)
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) == {winner if kept else 255}
    assert statistics.pixels.tolist() == [48 * 96 * kept * (winner == 0), 48 * 96 * kept * (winner == 1)]


def test_only_the_top_class_of_many_is_looked_at(images: Image) -> None:
    """Four classes at 0.1, 0.2, 0.3 and 0.4: kept at 0.35, though 0.6 speaks against it."""
    four = teacher_that_says(*np.log([0.1, 0.2, 0.4, 0.3]))
    assert set(np.unique(four.label(images[:1], 0.35, scales=(1,))[0])) == {2}
    assert set(np.unique(four.label(images[:1], 0.45, scales=(1,))[0])) == {255}


def test_a_confidence_on_the_edge_of_two_bins_belongs_to_the_lower_one(images: Image) -> None:
    """Bin k holds k/20 < p <= (k+1)/20, so that the bins above a threshold hold what p > threshold keeps."""
    _, (half, *_) = teacher_that_says(0.0, 0.0).label(images[:1], scales=(1,))
    _, (above, *_) = teacher_that_says(1e-6, 0.0).label(images[:1], scales=(1,))
    assert half.histogram[0].nonzero()[0].tolist() == [9]
    assert above.histogram[0].nonzero()[0].tolist() == [10]
    assert half.confidence.tolist() == [48 * 96 * 0.5, 0.0]


@pytest.mark.parametrize("k", range(10, CONFIDENCE_BINS))
def test_the_bins_above_a_threshold_count_what_it_keeps(k: int, seer: Teacher, images: Image) -> None:
    """So the statistics of a run tell what any other threshold would have kept, without the teacher."""
    labels, statistics = seer.label(images, threshold=k / CONFIDENCE_BINS, scales=(1,))
    for label, counts in zip(labels, statistics, strict=True):
        assert counts.histogram[:, k:].sum(axis=1).tolist() == counts.pixels.tolist()
        assert counts.pixels.tolist() == np.bincount(label.ravel(), minlength=256)[:19].tolist()
        assert counts.histogram.sum() == label.size


def test_labels_and_statistics_follow_from_the_confidences(seer: Teacher, images: Image) -> None:
    labels, statistics = seer.label(images, threshold=0.6, scales=(0.5, 1))
    assert 0.02 < (labels == 255).mean() < 0.98  # unsure of some pixels, sure of others
    for image, label, counts in zip(images, labels, statistics, strict=True):
        winner, confidence = seer.confidence(image, scales=(0.5, 1))
        assert np.array_equal(label, np.where(confidence > np.float32(0.6), winner, 255))
        for class_id in range(19):
            mine = confidence[winner == class_id]
            assert counts.pixels[class_id] == (mine > np.float32(0.6)).sum()
            assert counts.confidence[class_id] == pytest.approx(mine.sum(dtype=np.float64), rel=1e-12)
            edges = np.arange(CONFIDENCE_BINS + 1, dtype=np.float32) / CONFIDENCE_BINS
            bins = [((a < mine) & (mine <= b)).sum() for a, b in pairwise(edges)]
            assert counts.histogram[class_id].tolist() == bins


def test_confidence_is_the_softmax_of_the_combined_logits(seer: Teacher, images: Image) -> None:
    logits = seer.logits(images[0])
    assert (logits.shape, logits.dtype) == ((19, 48, 96), torch.float32)
    with torch.inference_mode():
        expected = seer.network.logits(normalise(torch.from_numpy(images[:1]).permute(0, 3, 1, 2)), (0.5, 1.0, 2.0))
    torch.testing.assert_close(logits, expected[0], rtol=0, atol=1e-4)
    winner, confidence = seer.confidence(images[0])
    assert np.array_equal(winner, logits.argmax(dim=0).numpy())
    assert np.array_equal(confidence, torch.softmax(logits, dim=0).amax(dim=0).numpy())


def test_an_image_is_normalised_as_published_trunks_expect() -> None:
    white = normalise(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten().tolist()
    assert white == pytest.approx([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225], rel=1e-6)


# --- same labels, whoever made them -----------------------------------------------------------------------------------


def test_a_batch_of_three_is_three_batches_of_one(seer: Teacher, images: Image) -> None:
    labels, statistics = seer.label(images)
    for n in range(3):
        label, (alone,) = seer.label(images[n : n + 1])
        assert np.array_equal(labels[n], label[0])
        for name, value in vars(alone).items():
            assert np.array_equal(getattr(statistics[n], name), value)


def test_threads_side_by_side_give_the_labels_of_one_after_the_other(seer: Teacher, images: Image) -> None:
    one_by_one = [seer.label(images[n : n + 1])[0] for n in range(3)]
    together: dict[int, Image] = {}

    def label(numbers: list[int]) -> None:
        torch.set_num_threads(1)
        for n in numbers:
            together[n] = seer.label(images[n : n + 1])[0]

    threads = [threading.Thread(target=label, args=(numbers,)) for numbers in ([0, 1], [2])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [np.array_equal(together[n], one_by_one[n]) for n in range(3)] == [True, True, True]


def test_flip_averages_the_logits_of_the_image_and_of_its_mirror_image(seer: Teacher, images: Image) -> None:
    image, mirrored = images[0], np.ascontiguousarray(images[0][:, ::-1])
    both = (seer.logits(image) + seer.logits(mirrored).flip(-1)) / 2
    torch.testing.assert_close(seer.logits(image, flip=True), both, rtol=0, atol=1e-4)
    assert (seer.logits(image) - both).abs().max() > 0.01


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda image: image[:, ::-1], id="mirrored"),
        pytest.param(lambda image: image[..., ::-1], id="channels turned"),
        pytest.param(lambda image: image[::2, ::2], id="every other pixel"),
        pytest.param(lambda image: np.asfortranarray(image), id="columns first"),
        pytest.param(lambda image: np.frombuffer(image.tobytes(), np.uint8).reshape(image.shape), id="read-only"),
    ],
)
def test_an_array_may_lie_in_memory_as_it_likes(view: object, seer: Teacher, images: Image) -> None:
    assert callable(view)
    seen = view(images[0])
    assert torch.equal(seer.logits(seen, (1,)), seer.logits(np.array(seen, order="C"), (1,)))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scales", "given"),
    [
        pytest.param((0.5, 2), "0.5,2", id="without 1"),
        pytest.param((1, 1, 2), "1,1,2", id="one twice"),
        pytest.param((0, 1), "0,1", id="nothing"),
        pytest.param((-0.5, 1), "-0.5,1", id="negative"),
        pytest.param((1, 4.5), "1,4.5", id="huge"),
        pytest.param((1, float("nan")), "1,nan", id="nan"),
        pytest.param((), "", id="none"),
    ],
)
def test_scales_that_cannot_be_combined_are_refused(scales: tuple[float, ...], given: str, images: Image) -> None:
    message = f"scales {given}: expected distinct numbers in (0, 4] with 1 among them, such as 0.5,1,2"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        teacher_that_says(0.0, 0.0).label(images, scales=scales)


@pytest.mark.parametrize(("threshold", "given"), [(1.0, "1"), (-0.1, "-0.1"), (50, "50"), (float("nan"), "nan")])
def test_a_threshold_that_no_pixel_can_exceed_is_refused(threshold: float, given: str, images: Image) -> None:
    message = f"threshold {given}: expected a probability in [0, 1), such as 0.5"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        teacher_that_says(0.0, 0.0).label(images, threshold=threshold)


@pytest.mark.parametrize(
    ("classes", "own", "mine"),
    [
        pytest.param(19, CITYSCAPES, "19 classes of 'cityscapes'", id="another number of classes"),
        pytest.param(11, LabelSpace("mine", CITYSCAPES.classes[:11]), "11 classes of 'mine'", id="other classes"),
        pytest.param(65, None, "65 classes of an unnamed label space", id="unnamed"),
    ],
)
def test_a_teacher_of_other_classes_is_refused(classes: int, own: LabelSpace | None, mine: str) -> None:
    message = (
        f"t.pt predicts {mine}, but m.parquet uses label space 'camvid' with 11: use a checkpoint trained in that"
        " label space"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        teacher_that_says(*[0.0] * classes, space=own).require_space(CAMVID, "t.pt", "m.parquet")


@pytest.mark.parametrize("own", [PAIR, None], ids=["named", "unnamed"])
def test_a_teacher_of_the_same_classes_is_accepted(own: LabelSpace | None) -> None:
    teacher_that_says(0.0, 0.0, space=own).require_space(PAIR, "t.pt", "m.parquet")


# --- device, precision, loading ---------------------------------------------------------------------------------------


def test_a_loaded_teacher_knows_its_classes_its_images_and_its_file(teacher: Path, city: Path) -> None:
    loaded = load_teacher(str(teacher), device="cpu")
    assert (loaded.label_space, loaded.sha256, loaded.precision) == (CITYSCAPES, sha256(teacher), "float32")
    assert len(loaded.trained_on) == len(load_manifest(city / "fine.parquet").samples) == 6
    assert not loaded.network.training


def test_without_a_gpu_auto_is_the_cpu_in_full_precision() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert (pick_device(), pick_device("cpu"), pick_precision("auto", "cpu")) == (expected, "cpu", "float32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(name: str) -> None:
    message = f"device '{name}' was asked for, but torch finds no GPU here: use cpu"
    with pytest.raises(ValueError, match=f"^{message}$"):
        pick_device(name)


def test_a_device_that_no_machine_has_is_refused(teacher: Path, city: Path) -> None:
    with pytest.raises(ValueError, match="'gpu'"):
        pick_device("gpu")
    result = autolabel("evaluate", "--checkpoint", teacher, "--manifest", city / "val.parquet", "--device", "gpu")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^unknown precision 'int8': expected auto, float32, bfloat16, float16$"):
        pick_precision("int8", "cpu")


def test_half_precision_is_used_where_asked_for_and_decides_on_floats(teacher: Path, images: Image) -> None:
    full, half = (load_teacher(teacher, "cpu", p).logits(images[0], (1,)) for p in ("float32", "bfloat16"))
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 0.5
