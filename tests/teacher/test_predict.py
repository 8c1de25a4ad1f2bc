"""The one decision of the whole system, keep or ignore, would be made on another number than the user asked for.

The reference floors the confidence to 8 bits before it compares: its "p > 0.5" is really p >= 0.502.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import address_space, autolabel
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.images import read_image
from autolabel.manifests.label_space import CAMVID, CITYSCAPES, LabelSpace
from autolabel.manifests.samples import load_manifest
from autolabel.manifests.schemas import CONFIDENCE_BINS
from autolabel.teacher.decide import Prediction
from autolabel.teacher.device import pick_precision
from autolabel.teacher.feed import normalise
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.memory import Budget, NotEnoughMemory
from autolabel.teacher.networks.build import build
from autolabel.teacher.networks.fields import at_size
from autolabel.teacher.predict import Teacher

torch.set_num_threads(1)  # the small network is no slower with one, and never waits for a busy core

Image = NDArray[np.uint8]
PAIR = LabelSpace("pair", CITYSCAPES.classes[:2])


def teacher_that_says(*logits: float, space: LabelSpace | None = None) -> Teacher:
    """A real network whose last layer looks at nothing: every pixel of every image gets the same logits."""
    network = build("hrnet18s_ocr_mscale", len(logits))
    with torch.no_grad():
        network.ocr.cls_head.weight.zero_()
        network.ocr.cls_head.bias.copy_(torch.tensor(logits))
    return Teacher(network, space)


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
    labels, (statistics, *_) = teacher_that_says(0.0, margin).label(images[:1], threshold=threshold, scales=(1,))
    winner = int(margin > 0)
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) == {winner if kept else 255}
    assert statistics.pixels.tolist() == [48 * 96 * kept * (winner == 0), 48 * 96 * kept * (winner == 1)]


def test_only_the_top_class_of_many_is_looked_at(images: Image) -> None:
    """Four classes at 0.1, 0.2, 0.3 and 0.4: kept at 0.35, though 0.6 speaks against it."""
    four = teacher_that_says(*np.log([0.1, 0.2, 0.4, 0.3]))
    assert set(np.unique(four.label(images[:1], threshold=0.35, scales=(1,))[0])) == {2}
    assert set(np.unique(four.label(images[:1], threshold=0.45, scales=(1,))[0])) == {255}


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
        expected = seer.network.network.logits(
            normalise(torch.from_numpy(images[:1]).permute(0, 3, 1, 2)), scales=(0.5, 1.0, 2.0)
        )
    torch.testing.assert_close(logits, expected[0], rtol=0, atol=1e-4)
    winner, confidence = seer.confidence(images[0])
    assert np.array_equal(winner, logits.argmax(dim=0).numpy())
    expected_confidence = torch.softmax(logits, dim=0).amax(dim=0).numpy()
    np.testing.assert_allclose(confidence, expected_confidence, rtol=0, atol=1e-6)


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


@pytest.fixture(scope="module")
def eight(city: Path) -> Image:
    """(8, 48, 64, 3): pieces of pictures, all of them different."""
    samples = load_manifest(city / "coarse.parquet").samples
    return np.stack([read_image(s.image)[20:68, 16 * n : 16 * n + 64] for n, s in enumerate(samples[:8])])


def assert_same(found: list[Prediction], expected: list[Prediction]) -> None:
    """Bit for bit, codes and counts."""
    assert len(found) == len(expected)
    for one, same in zip(found, expected, strict=True):
        for name, value in vars(same).items():
            assert np.array_equal(getattr(one, name), value)


def assert_same_codes(found: list[Prediction], expected: list[Prediction]) -> None:
    """Every code, and sums of confidences as exactly as float32 can hold one of them."""
    assert len(found) == len(expected)
    for one, same in zip(found, expected, strict=True):
        assert np.array_equal(one.codes, same.codes)
        np.testing.assert_allclose(one.confidence, same.confidence, rtol=1e-7)


def assert_same_but_for_ties(found: list[Prediction], expected: list[Prediction]) -> None:
    """Kernels for other batches round otherwise: a pixel in a thousand may lie on the other side of a tie."""
    for one, same in zip(found, expected, strict=True):
        assert (one.codes != same.codes).mean() <= 1e-3
        np.testing.assert_allclose(one.confidence.sum(), same.confidence.sum(), rtol=1e-6)


@pytest.mark.parametrize("images_at_once", [1, 2, 3, 8])
def test_a_label_does_not_depend_on_the_other_images_of_its_batch(
    images_at_once: int, seer: Teacher, eight: Image
) -> None:
    """Eight in batches of three leave two for the last, which is filled up: that must not show.

    One at a time, as on a CPU, no bit differs. In a batch no pixel's code differs, but kernels for some instructions
    round a confidence by its image's place in the batch: with AVX-512 and batches of three by its last bit.
    """
    same = assert_same if images_at_once == 1 else assert_same_codes
    together = list(seer.predict_in_batches(eight, images_at_once, edges=(0.5,)))
    assert len({one.codes.tobytes() for one in together}) == 8
    same(list(seer.predict_in_batches(eight[::-1], images_at_once, edges=(0.5,)))[::-1], together)
    alone = [
        outcome for n in range(8) for outcome in seer.predict_in_batches(eight[n : n + 1], images_at_once, edges=(0.5,))
    ]
    same(alone, together)


def test_a_batch_of_eight_is_eight_batches_of_one(seer: Teacher, eight: Image) -> None:
    """On a CPU, where images are labelled one at a time, bit for bit; with as many at once, but for ties."""
    labels, statistics = seer.label(eight)
    alone = [outcome for n in range(8) for outcome in seer.predict_in_batches(eight[n : n + 1], 1, edges=(0.5,))]
    for label, counts, one in zip(labels, statistics, alone, strict=True):
        assert np.array_equal(label, np.where(one.codes % 2, one.codes // 2, 255))
        assert np.array_equal(counts.histogram, one.histogram) and np.array_equal(counts.confidence, one.confidence)
    for images_at_once in (2, 3, 8):
        assert_same_but_for_ties(list(seer.predict_in_batches(eight, images_at_once, edges=(0.5,))), alone)


def test_every_batch_has_the_same_size(seer: Teacher, eight: Image) -> None:
    batches: list[int] = []
    hook = seer.network.network.backbone.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    outcomes = list(seer.predict_in_batches(eight[:7], 3, edges=(0.5,), scales=(1,)))
    hook.remove()
    assert (len(outcomes), batches) == (7, [3, 3, 3])


def test_labels_come_as_they_are_made(seer: Teacher, eight: Image) -> None:
    """The first ones are to be had before the last image has been looked at."""
    batches: list[int] = []
    hook = seer.network.network.backbone.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    outcomes = seer.predict_in_batches(eight, 2, edges=(0.5,), scales=(1,))
    next(outcomes)
    next(outcomes)
    assert batches == [2]
    next(outcomes)
    hook.remove()
    assert batches == [2, 2]


def test_without_images_there_is_nothing_to_label(seer: Teacher, eight: Image) -> None:
    expected = re.escape("no images: expected (B, H, W, 3) uint8 with B of 1 or more")
    for nothing in ([], eight[:0]):
        with pytest.raises(ValueError, match=f"^{expected}$"):
            seer.label(nothing)


def test_a_list_of_images_is_as_good_as_an_array(seer: Teacher, eight: Image) -> None:
    assert np.array_equal(seer.label(list(eight), scales=(1,))[0], seer.label(eight, scales=(1,))[0])


def test_average_is_the_mean_of_the_scales_own_logits(teacher: Path, images: Image) -> None:
    seer, averager = load_teacher(teacher, device="cpu"), load_teacher(teacher, device="cpu", combine="average")
    scales = (0.5, 1.0, 2.0)
    parts = averager.parts(images[0], scales=scales)
    assert [part.attention for part in parts] == [None, None, None]
    own = [at_size(part.logits, part.size, (48, 96)).whole()[0] for part in parts]
    torch.testing.assert_close(
        averager.logits(images[0], scales=scales), torch.stack(own).mean(dim=0), rtol=0, atol=1e-5
    )
    assert (averager.logits(images[0], scales=scales) - seer.logits(images[0], scales=scales)).abs().max() > 1e-3


@pytest.mark.parametrize("combine", ["network", "average"])
def test_views_give_every_scales_label_and_share(combine: str, teacher: Path, images: Image) -> None:
    averager = load_teacher(teacher, device="cpu", combine=combine)
    views = averager.views(images[0], scales=(0.5, 1.0, 2.0))
    assert [view.scale for view in views] == [0.5, 1.0, 2.0]
    assert {view.label.shape for view in views} == {view.share.shape for view in views} == {(48, 96)}
    np.testing.assert_allclose(sum(view.share for view in views), np.ones((48, 96)), atol=1e-5)
    if combine == "average":
        assert all(np.allclose(view.share, 1 / 3) for view in views)
    one = next(p for p in averager.parts(images[0], scales=(0.5, 1.0, 2.0)) if p.scale == 0.5)
    logits = at_size(one.logits, one.size, (48, 96)).whole()[0]
    assert (views[0].label != logits.argmax(dim=0).numpy()).mean() < 1e-3  # read in bands: ties may differ


# --- when memory runs out ---------------------------------------------------------------------------------------------


OUT_OF_MEMORY = [
    pytest.param(lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), id="gpu"),
    pytest.param(
        lambda: RuntimeError(
            "[enforce fail at alloc_cpu.cpp:126] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
            " allocate 98304000000 bytes. Error code 12 (Cannot allocate memory)"
        ),
        id="cpu",
    ),
    pytest.param(lambda: MemoryError("Unable to allocate 1.12 GiB for an array"), id="numpy"),
    pytest.param(
        lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), id="cublas"
    ),
]


def with_memory_for(teacher: Path, most: int, error: Callable[[], Exception]) -> tuple[Teacher, list[int]]:
    """A teacher whose trunk fails on larger batches, as a full device fails; and the sizes that it was asked for."""
    asked: list[int] = []

    def check(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        asked.append(len(inputs[0]))
        if asked[-1] > most:
            raise error()

    limited = load_teacher(teacher, device="cpu")
    limited.network.network.backbone.register_forward_pre_hook(check)
    return limited, asked


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_batch_that_does_not_fit_is_tried_once_more_alone_and_whole(
    error: Callable[[], Exception], teacher: Path, seer: Teacher, eight: Image
) -> None:
    """Half a batch would go through other kernels, and have other labels."""
    limited, asked = with_memory_for(teacher, 8, error)
    room = iter([4, 3, 4])

    def shrink(*_: object) -> None:
        if asked[-1] > next(room):
            raise error()

    limited.network.network.backbone.register_forward_pre_hook(shrink)
    found = list(limited.predict_in_batches(eight, 4, edges=(0.5,), scales=(1,)))
    assert asked == [4, 4, 4]
    assert_same(found, list(seer.predict_in_batches(eight, 4, edges=(0.5,), scales=(1,))))


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_an_image_that_does_not_fit_alone_is_named(error: Callable[[], Exception], teacher: Path, eight: Image) -> None:
    limited, asked = with_memory_for(teacher, 0, error)
    words = (
        r"^not enough memory on cpu for (an image|4 images) of 64 x 48 at scale 2 \(\d+\.\d.* free\): leave that"
        r" scale out, or use a larger device$"
    )
    with pytest.raises(NotEnoughMemory, match=words):
        list(limited.predict_in_batches(eight, 4, edges=(0.5,)))
    assert asked == [4, 4]
    with pytest.raises(NotEnoughMemory, match=words):
        limited.label(eight)


def test_any_other_failure_is_not_taken_for_a_lack_of_memory(teacher: Path, eight: Image) -> None:
    limited, asked = with_memory_for(teacher, 2, lambda: RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(RuntimeError, match=r"^CUDA error: device-side assert triggered$"):
        list(limited.predict_in_batches(eight, 8, edges=(0.5,), scales=(1,)))
    assert asked == [8]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
def test_an_allocation_that_the_system_refuses_costs_one_image(seer: Teacher, eight: Image) -> None:
    """No hook: the address space itself ends a little above what is in use."""
    before = seer.label(eight[:1], scales=(1, 4))
    huge = np.zeros((1, 4000, 4000, 3), np.uint8)
    with address_space(1 << 30), pytest.raises(NotEnoughMemory, match="an image of 4000 x 4000 at scale 4 "):
        seer.label(huge, scales=(1, 4))  # its copy at scale 4 alone takes 3 GB
    with address_space(1 << 20), pytest.raises(NotEnoughMemory, match="an image of 4000 x 4000 at scale 1 "):
        seer.label(huge, scales=(1,))  # not even the array can be copied
    assert np.array_equal(seer.label(eight[:1], scales=(1, 4))[0], before[0])


# --- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        pytest.param(100, 100, 8, id="small: as many as there may be"),
        pytest.param(1000, 1000, 8, id="just eight"),
        pytest.param(1000, 1001, 7, id="a column more"),
        pytest.param(2000, 4000, 1, id="just one"),
        pytest.param(9000, 9000, 1, id="too large: one is tried"),
    ],
)
def test_a_budget_leaves_a_fifth_of_the_memory_alone(height: int, width: int, expected: int) -> None:
    budget = Budget("cpu", "float32", bytes_per_pixel=1000, free_bytes=10_000_000_000)
    assert budget.in_flight(height, width, most=8) == expected
    assert budget.in_flight(height, width, most=3) == min(3, expected)
    assert budget.in_flight(height, width, batch=2, most=8) == (8 if height == 100 else max(1, expected // 2))


def test_an_image_above_the_budget_is_not_even_tried(teacher: Path, eight: Image) -> None:
    """Systems promise more memory than there is, and end the process that takes them at their word."""
    planner = load_teacher(teacher, device="cpu")
    budget = planner.budget(scales=(1.0,))
    pixels = int(budget.free_bytes / budget.bytes_per_pixel)

    def tried(*_: object) -> None:
        raise AssertionError("the network was run")

    hook = planner.network.network.backbone.register_forward_pre_hook(tried)
    too_large = np.broadcast_to(np.uint8(0), (1, pixels // 64 + 1, 64, 3))  # one pixel, seen as many
    message = r"^not enough memory on cpu .* at scale 1 \(about \d+\.\d GiB needed, \d+\.\d.* free\): leave"
    with pytest.raises(NotEnoughMemory, match=message):
        planner.label(too_large, scales=(1.0,))
    hook.remove()
    assert len(planner.label(eight, scales=(1.0,))[0]) == 8


def test_a_budget_is_measured_once_with_a_small_image(teacher: Path) -> None:
    planner = load_teacher(teacher, device="cpu")
    budget = planner.budget(scales=(0.5, 1.0, 2.0))
    assert (budget.device, budget.precision) == ("cpu", "float32")
    assert budget.bytes_per_pixel > 0
    assert 0 < budget.free_bytes < 1 << 50
    assert planner.budget(scales=(0.5, 1.0, 2.0)) is budget  # made once
    assert planner.budget(scales=(1.0,)) is not budget


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
    assert torch.equal(seer.logits(seen, scales=(1,)), seer.logits(np.array(seen, order="C"), scales=(1,)))


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
        f"t.pt predicts {mine}, but m.parquet uses label space 'camvid' with 11: use a teacher of that label"
        " space, or map its classes onto it with --classes"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        teacher_that_says(*[0.0] * classes, space=own).require_space(CAMVID, teacher="t.pt", manifest="m.parquet")


@pytest.mark.parametrize("own", [PAIR, None], ids=["named", "unnamed"])
def test_a_teacher_of_the_same_classes_is_accepted(own: LabelSpace | None) -> None:
    teacher_that_says(0.0, 0.0, space=own).require_space(PAIR, teacher="t.pt", manifest="m.parquet")


# --- device, precision, loading ---------------------------------------------------------------------------------------


def test_a_loaded_teacher_knows_its_classes_its_images_and_its_file(teacher: Path, city: Path) -> None:
    loaded = load_teacher(str(teacher), device="cpu")
    assert (loaded.label_space, loaded.sha256, loaded.precision) == (CITYSCAPES, storage.sha256(teacher), "float32")
    assert len(loaded.trained_on) == len(load_manifest(city / "fine.parquet").samples) == 6
    assert not loaded.network.network.training


def test_a_device_that_no_machine_has_is_refused(teacher: Path, city: Path) -> None:
    result = autolabel("evaluate", teacher, city / "val.parquet", "--device", "gpu")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^unknown precision 'int8': expected auto, float32, bfloat16, float16$"):
        pick_precision("int8", "cpu")


def test_half_precision_is_used_where_asked_for_and_decides_on_floats(teacher: Path, images: Image) -> None:
    full, half = (
        load_teacher(teacher, device="cpu", precision=p).logits(images[0], scales=(1,)) for p in ("float32", "bfloat16")
    )
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 0.5
