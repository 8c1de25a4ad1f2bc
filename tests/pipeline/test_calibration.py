"""Confidence is what a threshold goes by. If this fails, a suggested threshold keeps what it was meant to drop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from autolabel.manifests.label_space import IGNORE
from autolabel.pipeline.analysis.calibration import ESTIMABLE, GRID, TEMPERATURES, Calibration, TemperatureFit


def pixels(*groups: tuple[int, int, float, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """Truth, top class and confidence of so many pixels of each kind: (truth, top, confidence, how many)."""
    truth, top, confidence, counts = zip(*groups, strict=True)
    columns = (np.array(truth, np.uint8), np.array(top, np.uint8), np.array(confidence, np.float32))
    repeated = [np.repeat(column, counts)[None] for column in columns]
    return repeated[0], repeated[1], repeated[2]


def add(
    calibration: Calibration, truth: NDArray[np.uint8], top: NDArray[np.uint8], confidence: NDArray[np.float32]
) -> None:
    calibration.add(truth, top, confidence=confidence)


def counted(*groups: tuple[int, int, float, int], classes: int = 2) -> Calibration:
    calibration = Calibration(classes)
    add(calibration, *pixels(*groups))
    return calibration


def test_accuracy_equal_to_confidence_gives_a_calibration_error_of_0() -> None:
    found = counted((0, 0, 0.75, 75), (1, 0, 0.75, 25), (1, 1, 0.5, 10), (0, 1, 0.5, 10))
    assert found.reliability().ece() == pytest.approx([0, 0], abs=1e-12)
    assert float(found.overall().ece()) == pytest.approx(0, abs=1e-12)


def test_the_calibration_error_equals_a_computation_by_hand() -> None:
    # Class 0: 60 pixels at 0.9 of which 30 are right, 40 at 0.6 of which all are. Class 1: 10 at 0.7, none right.
    found = counted((0, 0, 0.9, 30), (1, 0, 0.9, 30), (0, 0, 0.6, 40), (0, 1, 0.7, 10), classes=3)
    first, second, third = found.reliability().ece().tolist()
    assert first == pytest.approx(0.6 * abs(0.5 - 0.9) + 0.4 * abs(1 - 0.6))
    assert second == pytest.approx(0.7)
    assert math.isnan(third)
    assert float(found.overall().ece()) == pytest.approx((60 * 0.4 + 40 * 0.4 + 10 * 0.7) / 110)
    tables = found.reliability()
    assert tables.pixels[0].nonzero()[0].tolist() == [11, 17]  # 0.55 < 0.6 <= 0.6, and 0.85 < 0.9 <= 0.9
    assert tables.correct[0, [11, 17]].tolist() == [40, 30]
    assert tables.confidence[0, 17] == pytest.approx(54)


def test_pixels_without_truth_count_nowhere() -> None:
    found = counted((IGNORE, 0, 0.9, 500), (0, 0, 0.8, 7))
    assert found.overall().pixels.sum() == 7


def test_a_confidence_equal_to_an_edge_counts_in_the_bin_below_it() -> None:
    found = Calibration(1)
    edges = np.array([k / 20 for k in range(1, 21)], np.float32)
    found.add(np.zeros(20, np.uint8), np.zeros(20, np.uint8), confidence=edges)
    assert found.overall().pixels.tolist() == [1] * 20


def test_the_lowest_threshold_that_reaches_the_target_is_suggested() -> None:
    # All: 800 of 1000 right. Above 0.5: 780 of 880. Above 0.7: 760 of 800, which is 95 %.
    found = counted(
        (0, 0, 0.5, 20), (1, 0, 0.5, 100), (0, 0, 0.7, 20), (1, 0, 0.7, 60), (0, 0, 0.9, 760), (1, 0, 0.9, 40)
    )
    threshold, precision, kept, reached = found.suggest(0.95)
    assert (threshold[0], precision[0], kept[0], reached[0]) == (0.7, 0.95, 0.8, True)
    assert [found.suggest(target).threshold[0] for target in (0.8, 0.801, 0.886, 0.887)] == [0, 0.5, 0.5, 0.7]


def test_a_class_that_never_reaches_it_gets_the_highest_and_one_that_is_hardly_seen_none() -> None:
    found = counted((0, 1, 0.6, 200), (1, 0, 0.999, 150), (2, 2, 0.9, ESTIMABLE - 1), classes=4).suggest(0.9)
    assert found.threshold[:2].tolist() == [0.99, 0.99]
    assert found.precision[0] == 0 and math.isnan(found.precision[1])  # of class 1 nothing is left there
    assert found.kept[:2].tolist() == [1, 0]
    assert np.isnan(found.threshold[2:]).all()
    assert found.reached.tolist() == [False] * 4


def test_fewer_than_100_pixels_give_no_threshold() -> None:
    found = counted((1, 0, 0.6, 500), (0, 0, 0.95, ESTIMABLE - 1)).suggest(0.9)
    assert (found.threshold[0], found.reached[0]) == (0.99, False)
    found = counted((1, 0, 0.6, 500), (0, 0, 0.95, ESTIMABLE)).suggest(0.9)
    assert (found.threshold[0], found.reached[0]) == (0.6, True)


def test_thresholds_come_from_the_grid_alone() -> None:
    """Kept confidences are known by a few edges only; `relabel` can apply no other threshold."""
    found = Calibration(2, (0.0, 0.33, 0.81))
    add(found, *pixels((1, 0, 0.5, 100), (0, 0, 0.82, 300), (0, 0, 0.81, 100)))
    assert found.suggest(0.9).threshold[0] == 0.81
    assert found.suggest(0.5).threshold[0] == 0
    assert found.overall().pixels.nonzero()[0].tolist() == [9, 16]  # the diagram has its twenty bins all the same


def test_image_by_image_equals_all_at_once() -> None:
    dice = np.random.default_rng(3)
    truth, top = dice.integers(0, 5, (2, 4, 30, 40), np.uint8)
    confidence = dice.random((4, 30, 40), np.float32)
    streamed, at_once = Calibration(5), Calibration(5)
    for image in zip(truth, top, confidence, strict=True):
        streamed.add(*image[:2], confidence=image[2])
    at_once.add(truth, top, confidence=confidence)
    for one, other in zip(streamed.reliability(), at_once.reliability(), strict=True):
        assert np.allclose(one, other, rtol=1e-12)
    for k, threshold in enumerate(streamed.suggest(0.2).threshold):  # and equals what anyone would count
        chosen = (top == k) & (confidence > np.float32(threshold))
        assert (truth[chosen] == k).mean() >= 0.2 or threshold == GRID[-1]


# --- temperature ------------------------------------------------------------------------------------------------------


def logits_and_truth(scale: float, seed: int = 5) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Truth drawn from softmax(z), and z * scale: the temperature that undoes it is `scale`."""
    dice = np.random.default_rng(seed)
    z = dice.normal(0, 2, (6, 100, 200)).astype(np.float32)
    gumbel = -np.log(-np.log(dice.random(z.shape)))
    return (z + gumbel).argmax(axis=0).astype(np.uint8), z * np.float32(scale)


@pytest.mark.parametrize("scale", [0.4, 1.0, 1.7, 3.0])
def test_the_fitted_temperature_is_the_one_that_the_logits_were_scaled_with(scale: float) -> None:
    fit = TemperatureFit(1.0)
    for seed in (5, 6, 7):
        fit.add(*logits_and_truth(scale, seed))
    temperature, loss = fit.best()
    assert temperature == pytest.approx(scale, rel=0.02)
    assert loss <= fit.loss_now() + 1e-9


def test_the_loss_is_the_negative_log_likelihood() -> None:
    truth, logits = logits_and_truth(1.0)
    fit = TemperatureFit(1.3)
    fit.add(truth, logits)
    z = logits.astype(np.float64) / 1.3
    p = np.exp(z) / np.exp(z).sum(axis=0)
    slowly = -np.log(np.take_along_axis(p, truth[None].astype(int), axis=0)).mean()
    assert fit.loss_now() == pytest.approx(slowly, rel=1e-5)


def test_pixels_whose_truth_is_ignored_leave_the_temperature_as_it_is() -> None:
    truth, logits = logits_and_truth(1.7)
    alone, with_others = TemperatureFit(1.0), TemperatureFit(1.0)
    alone.add(truth, logits)
    with_others.add(truth, logits)
    with_others.add(np.full_like(truth, IGNORE), -logits)
    assert with_others.best() == alone.best()


def test_a_temperature_outside_the_grid_gives_the_last_of_the_grid() -> None:
    truth, logits = logits_and_truth(30.0)
    fit = TemperatureFit(1.0)
    fit.add(truth, logits)
    assert fit.best()[0] == TEMPERATURES[-1] == pytest.approx(4)


def test_a_temperature_without_truth_is_refused() -> None:
    fit = TemperatureFit(1.0)
    fit.add(np.full((2, 2), IGNORE, np.uint8), np.zeros((3, 2, 2), np.float32))
    assert math.isnan(fit.loss_now())
    with pytest.raises(ValueError, match="nothing to fit a temperature to"):
        fit.best()
