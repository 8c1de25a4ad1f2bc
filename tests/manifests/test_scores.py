"""If a score counts a wrong pixel as right, or leaves out what was hard, the worse student is the one that ships."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.scores import BoundaryF, Confusion, boundary, paired_gain

Label = NDArray[np.uint8]


def label(*rows: list[int]) -> Label:
    return np.array(rows, np.uint8)


def random_label(seed: int, classes: int, shape: tuple[int, int] = (37, 53)) -> Label:
    """Ids 0..classes-1, a fifth of the pixels ignored."""
    dice = np.random.default_rng(seed)
    ids = dice.integers(0, classes, shape, np.uint8)
    ids[dice.random(shape) < 0.2] = IGNORE
    return ids


def counted_slowly(truth: Label, prediction: Label, classes: int) -> list[list[int]]:
    matrix = [[0] * (classes + 1) for _ in range(classes)]
    for t, p in zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True):
        if t != IGNORE:
            matrix[t][classes if p == IGNORE else p] += 1
    return matrix


@pytest.mark.parametrize("classes", [1, 2, 11, 19, 255])
def test_the_matrix_equals_a_slow_count(classes: int) -> None:
    truth, prediction = random_label(1, classes), random_label(2, classes)
    confusion = Confusion(classes)
    confusion.add(truth, prediction)
    assert confusion.matrix.tolist() == counted_slowly(truth, prediction, classes)


def test_iou_and_accuracy_by_hand() -> None:
    confusion = Confusion(3)
    confusion.add(label([0, 0, 0, 1], [1, 1, 2, 2]), label([0, 0, 1, 1], [1, 0, 2, 1]))
    assert confusion.matrix.tolist() == [[2, 1, 0, 0], [1, 2, 0, 0], [0, 1, 1, 0]]
    assert confusion.iou().tolist() == [2 / 4, 2 / 5, 1 / 2]
    assert confusion.mean_iou() == pytest.approx((2 / 4 + 2 / 5 + 1 / 2) / 3)
    assert confusion.pixel_accuracy() == 5 / 8


def test_naming_the_commonest_class_everywhere_scores_its_share_over_the_classes_there_are() -> None:
    """Six pixels of class 0, two of class 2, none of class 1: IoU 6/8 and 0, so 0.375 in the mean."""
    confusion, truth = Confusion(3), np.array([[0, 0, 0, 0], [0, 0, 2, 2]], np.uint8)
    confusion.add(truth, np.array([[2, 1, 2, 2], [2, 2, 0, IGNORE]], np.uint8))
    constant = Confusion(3)
    constant.add(truth, np.zeros_like(truth))
    assert confusion.commonest_mean_iou() == constant.commonest_mean_iou() == constant.mean_iou() == 0.375
    assert math.isnan(Confusion(3).commonest_mean_iou())


def test_image_by_image_equals_all_at_once() -> None:
    truths, predictions = ([random_label(seed + i, 19) for i in range(5)] for seed in (10, 20))
    streamed, at_once = Confusion(19), Confusion(19)
    for truth, prediction in zip(truths, predictions, strict=True):
        streamed.add(truth, prediction)
    at_once.add(np.concatenate(truths), np.concatenate(predictions))
    assert streamed.matrix.tolist() == at_once.matrix.tolist()
    assert streamed.iou().tolist() == at_once.iou().tolist()


def test_pixels_that_the_truth_ignores_count_nowhere() -> None:
    confusion = Confusion(2)
    confusion.add(label([0, 255, 255, 255]), label([0, 0, 1, 255]))
    assert confusion.matrix.tolist() == [[1, 0, 0], [0, 0, 0]]
    assert confusion.pixel_accuracy() == 1


def test_an_ignored_prediction_is_a_miss_of_the_true_class_and_of_no_other() -> None:
    confusion = Confusion(2)
    confusion.add(label([0, 0, 0, 1]), label([0, 255, 255, 1]))
    assert confusion.matrix.tolist() == [[1, 0, 2], [0, 1, 0]]
    assert confusion.iou().tolist() == [1 / 3, 1]
    assert confusion.pixel_accuracy() == 2 / 4


def test_a_class_that_is_nowhere_is_nan_and_out_of_the_mean() -> None:
    confusion = Confusion(4)
    confusion.add(label([0, 0, 2, 2]), label([0, 0, 2, 0]))
    first, second, third, fourth = confusion.iou().tolist()
    assert (first, third) == (2 / 3, 1 / 2)
    assert math.isnan(second)
    assert math.isnan(fourth)
    assert confusion.mean_iou() == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_a_class_that_is_only_predicted_scores_zero() -> None:
    confusion = Confusion(2)
    confusion.add(label([0, 0]), label([0, 1]))
    assert confusion.iou().tolist() == [1 / 2, 0]
    assert confusion.mean_iou() == 1 / 4


@pytest.mark.filterwarnings("error")
def test_nothing_counted_has_no_score_and_no_warning() -> None:
    confusion = Confusion(3)
    confusion.add(label([255, 255]), label([0, 1]))
    assert np.isnan(confusion.iou()).all()
    assert math.isnan(confusion.mean_iou())
    assert math.isnan(confusion.pixel_accuracy())


@pytest.mark.parametrize(
    ("truth", "prediction", "pixels"),
    [
        pytest.param([0, 3, 3, 255], [0, 0, 0, 0], 2, id="in the truth"),
        pytest.param([0, 1, 2, 255], [254, 0, 0, 0], 1, id="in the prediction"),
        pytest.param([3, 0, 0, 0], [4, 0, 0, 0], 1, id="in both at one pixel"),
    ],
)
def test_ids_of_another_label_space_are_refused_and_not_counted(
    truth: list[int], prediction: list[int], pixels: int
) -> None:
    confusion = Confusion(3)
    with pytest.raises(ValueError) as refusal:
        confusion.add(label(truth), label(prediction))
    assert str(refusal.value) == f"{pixels} pixels have ids outside 0..2 and 255"
    assert not confusion.matrix.any()


def test_label_maps_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError) as refusal:
        Confusion(3).add(label([0, 1]), label([0], [1]))
    assert str(refusal.value) == "truth is (1, 2) but prediction (2, 1): expected the same size"


# --- precision, recall, IoU of what was kept --------------------------------------------------------------------------


def test_precision_recall_and_the_iou_of_kept_pixels_by_hand() -> None:
    confusion = Confusion(3)
    confusion.add(label([0, 0, 0, 0], [1, 1, 255, 255]), label([0, 0, 1, 255], [1, 255, 1, 2]))
    assert confusion.true_pixels.tolist() == [4, 2, 0]
    assert confusion.predicted_pixels.tolist() == [2, 2, 0]  # not where the truth is ignored
    assert confusion.precision().tolist()[:2] == [2 / 2, 1 / 2]
    assert confusion.recall().tolist()[:2] == [2 / 4, 1 / 2]
    assert confusion.iou_of_kept().tolist()[:2] == [2 / 3, 1 / 2]
    assert confusion.iou().tolist()[:2] == [2 / 4, 1 / 3]
    for shares in (confusion.precision(), confusion.recall(), confusion.iou_of_kept()):
        assert math.isnan(shares[2])


# --- boundary F -------------------------------------------------------------------------------------------------------


def test_a_boundary_is_where_two_classes_touch_side_by_side() -> None:
    drawn = label(
        [0, 0, 0, 1],
        [0, 0, 0, 1],
        [2, 255, 0, 0],
        [2, 255, 0, 0],
    )
    x = 255
    assert boundary(drawn).tolist() == [
        [x, x, 0, 1],
        [0, x, 0, 1],
        [2, x, x, 0],  # below the second 1; ignored pixels part the 2 from the 0, and corners do not count
        [x, x, x, x],
    ]


def columns(width: int, *borders: int) -> Label:
    """Seven rows; the class grows by one at each of these columns."""
    return np.repeat(np.searchsorted(borders, np.arange(width), side="right").astype(np.uint8)[None], 7, axis=0)


def test_a_border_that_is_two_pixels_off_is_met_from_two_pixels_on() -> None:
    counts = BoundaryF(2)
    counts.add(columns(12, 6), columns(12, 8))
    assert counts.pixels.tolist() == [[7, 7], [7, 7]]
    assert counts.f().tolist() == [[0, 0], [1, 1], [1, 1]]


def test_boundary_f_equals_a_computation_by_hand() -> None:
    # The prediction finds the border between 0 and 1, and adds one 7 pixels on, between 1 and 0.
    prediction = columns(20, 6, 13)
    prediction[prediction == 2] = 0
    counts = BoundaryF(2, (1,))
    counts.add(columns(20, 6), prediction)
    assert counts.hits.tolist() == [[[7, 7]], [[7, 7]]]
    assert counts.pixels.tolist() == [[14, 14], [7, 7]]
    assert counts.f()[0] == pytest.approx([2 * 0.5 / 1.5] * 2)


def test_distances_are_euclidean() -> None:
    """A lone pixel at (3, 3) against one at (6, 5): 3.6 pixels away, five by steps."""
    truth, prediction = np.zeros((9, 9), np.uint8), np.zeros((9, 9), np.uint8)
    truth[3, 3], prediction[6, 5] = 1, 1
    counts = BoundaryF(2, (3, 4))
    counts.add(truth, prediction)
    assert counts.f()[:, 1].tolist() == [0, 1]


def test_a_predicted_border_where_the_truth_is_ignored_is_no_error() -> None:
    truth, prediction = columns(20, 6), columns(20, 6, 13)
    truth[:, 10:] = IGNORE
    counts = BoundaryF(3)
    counts.add(truth, prediction)
    assert counts.f()[:, :2].tolist() == [[1, 1]] * 3
    assert np.isnan(counts.f()[:, 2]).all()  # class 2 has no boundary that counts


def test_a_border_on_one_side_only_scores_zero() -> None:
    counts = BoundaryF(2)
    counts.add(columns(12, 6), columns(12))
    assert counts.f().tolist() == [[0, 0]] * 3


def boundary_slowly(ids: Label) -> dict[int, list[tuple[int, int]]]:
    found: dict[int, list[tuple[int, int]]] = {}
    height, width = ids.shape
    for y in range(height):
        for x in range(width):
            around = ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1))
            inside = [int(ids[v, u]) for v, u in around if 0 <= v < height and 0 <= u < width]
            if ids[y, x] != IGNORE and any(other not in (ids[y, x], IGNORE) for other in inside):
                found.setdefault(int(ids[y, x]), []).append((y, x))
    return found


@pytest.mark.parametrize("classes", [2, 19, 100])
def test_boundary_f_equals_a_slow_count(classes: int) -> None:
    counts = BoundaryF(classes, (1, 2, 4))
    hits, pixels = np.zeros((2, 3, classes), int), np.zeros((2, classes), int)
    for seed in (1, 2):
        truth, prediction = (random_label(10 * seed + k, classes, (17, 23)) for k in (0, 1))
        counts.add(truth, prediction)
        true, predicted = boundary_slowly(truth), boundary_slowly(prediction)
        for side, (mine, others) in enumerate(((predicted, true), (true, predicted))):
            for k, places in mine.items():
                for y, x in places:
                    if side == 0 and truth[y, x] == IGNORE:
                        continue
                    nearest = min(((y - v) ** 2 + (x - u) ** 2 for v, u in others.get(k, [])), default=1000)
                    pixels[side, k] += 1
                    hits[side, :, k] += [nearest <= d * d for d in (1, 2, 4)]
    assert counts.pixels.tolist() == pixels.tolist()
    assert counts.hits.tolist() == hits.tolist()


@pytest.mark.filterwarnings("error")
def test_without_any_boundary_there_is_no_score_and_no_warning() -> None:
    counts = BoundaryF(2)
    counts.add(columns(5), columns(5))
    assert np.isnan(counts.f()).all()


def test_the_bootstrap_draws_whole_images_and_the_same_ones_for_both() -> None:
    before, after = (np.zeros((6, 4, 5), np.int64) for _ in range(2))
    for image in range(6):
        for matrices, seed in ((before, image), (after, image + 100 * (image % 2))):  # every second image is the same
            confusion = Confusion(4)
            confusion.add(random_label(50 + image, 4), random_label(seed, 4))
            matrices[image] = confusion.matrix

    def mean_iou(matrices: NDArray[np.int64], chosen: list[int]) -> float:
        confusion = Confusion(4)
        for image in chosen:
            confusion.matrix += matrices[image]
        return confusion.mean_iou()

    draws = np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), size=200)
    images = [[image for image in range(6) for _ in range(draw[image])] for draw in draws]
    gains = [mean_iou(after, chosen) - mean_iou(before, chosen) for chosen in images]
    found = paired_gain(before, after, times=200)
    assert found.middle == pytest.approx(mean_iou(after, list(range(6))) - mean_iou(before, list(range(6))), rel=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(gains, (0.025, 0.975))), rel=1e-9)
    assert found.low < found.middle < found.high
    assert paired_gain(before, before) == (0, 0, 0)


def test_without_truth_there_is_no_gain_and_no_warning() -> None:
    nothing = np.zeros((2, 3, 4), np.int64)
    assert all(math.isnan(value) for value in paired_gain(nothing, nothing, times=3))
