"""If a score counts a wrong pixel as right, or leaves out what was hard, the worse student is the one that ships."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from autolabel.manifests.classes import IGNORE
from autolabel.manifests.scores import Confusion

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
