"""Polygons weighed beside kept levels, against a plain loop over pixels.

If this fails, `relabel` to a policy that weighs polygons makes labels of which nobody can say how they came about.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from autolabel.manifests.evidence import OUTSIDE, PolygonCounts, PolygonEvidence
from autolabel.manifests.label_space import CAMVID, LabelClass, LabelSpace
from autolabel.manifests.places import places
from autolabel.manifests.policy import DENSE, PAPER, Policy
from autolabel.manifests.run.labels import middles
from autolabel.pipeline.posterior import SECOND_SHARE, FromLevels, KeptPosterior

EDGES = (0.3, 0.5, 0.7, 0.9)
HEIGHT, WIDTH = 24, 40


def counts_of(space: LabelSpace, *, seed: int = 0) -> PolygonCounts:
    """Counts that differ from bin to bin, with a class that was never seen outside, where there are several."""
    dice, classes = np.random.default_rng(seed), len(space)
    outside = dice.integers(0, 500, (classes, len(OUTSIDE) + 1, classes)) ** 2
    outside[..., 3:4] = 0
    return PolygonCounts.of(space, {"40x24": 30}, outside, np.ones((classes, 7, 2), np.int64))


def dense(space: LabelSpace = CAMVID, **weights: object) -> Policy:
    return Policy("dense", coarse="human-wins", polygons=PolygonEvidence(counts_of(space), **weights))  # type: ignore[arg-type]


def drawn(space: LabelSpace, seed: int = 1) -> tuple[NDArray[np.uint8], ...]:
    """Top classes, levels, second classes and a coarse label with two polygons."""
    dice, classes = np.random.default_rng(seed), len(space)
    top = dice.integers(0, classes, (HEIGHT, WIDTH), np.uint8)
    second = ((top + dice.integers(1, max(2, classes), top.shape)) % classes).astype(np.uint8)
    level = dice.integers(0, len(EDGES) + 1, top.shape, np.uint8)
    coarse = np.full(top.shape, 255, np.uint8)
    coarse[3:9, 4:15], coarse[14:20, 22:31] = 0, classes - 1
    second[coarse != 255] = 255
    return top, level, second, coarse


def plain(policy: Policy, space: LabelSpace, *, top: int, level: int, second: int, place: int) -> list[float]:
    """All probabilities of one pixel."""
    assert policy.polygons is not None
    classes, sure = len(space), float(middles(EDGES)[level])
    p = [(1 - sure) / (classes - 1)] * classes
    if second != 255:
        p = [(1 - sure) * (1 - SECOND_SHARE) / max(1, classes - 2)] * classes
        p[second] = (1 - sure) * SECOND_SHARE
    p[top] = sure
    scores = policy.polygons.factors(space)[place]
    raised = [x**policy.polygons.teacher_weight * math.exp(s) for x, s in zip(p, scores, strict=True)]
    return [x / sum(raised) for x in raised]


TWO = LabelSpace("two", (LabelClass("one", (1, 2, 3), (0,)), LabelClass("other", (4, 5, 6), (1,))))


@pytest.mark.parametrize("weights", [{}, {"teacher_weight": 0.85, "biases": {"pole": 3.0, "sky": -2.5}}])
@pytest.mark.parametrize("known", ["second class", "levels alone", "here and there"])
@pytest.mark.parametrize("space", [CAMVID, TWO], ids=lambda space: space.name)
def test_the_posterior_is_that_of_a_plain_loop(space: LabelSpace, known: str, weights: dict[str, object]) -> None:
    if space is TWO:
        weights = {name: value for name, value in weights.items() if name != "biases"}
    policy = dense(space, **weights)
    assert policy.polygons is not None
    top, level, second, coarse = drawn(space)
    if known == "here and there":
        second[:, ::3] = 255
    place = places(coarse, len(space))
    posterior = KeptPosterior(policy.polygons, space, middles(EDGES))
    pixels, winner, p = posterior(top, level, place, None if known == "levels alone" else second)
    assert np.array_equal(pixels, np.flatnonzero(coarse == 255))
    changed = 0
    for at, c, sure in zip(pixels.tolist(), winner.tolist(), p.tolist(), strict=True):
        expected = plain(
            policy, space, top=int(top.flat[at]), level=int(level.flat[at]), place=int(place.flat[at]),
            second=255 if known == "levels alone" else int(second.flat[at]),
        )  # fmt: skip
        assert expected[c] == pytest.approx(max(expected), rel=1e-5)
        assert sure == pytest.approx(max(expected), rel=1e-5)
        changed += c != top.flat[at]
    assert changed > 50


def test_codes_and_statistics_are_the_posteriors_and_elsewhere_those_of_the_levels() -> None:
    policy, (top, level, second, coarse) = dense(), drawn(CAMVID)
    decide = FromLevels(policy, CAMVID, EDGES)
    place = decide.places(coarse)
    assert place is not None and policy.polygons is not None
    prediction = decide(top, level, place=place, second=second)
    _, winner, p = KeptPosterior(policy.polygons, CAMVID, middles(EDGES))(top, level, place, second)
    classes, confidence = top.copy(), middles(EDGES).astype(np.float32)[level]
    classes[coarse == 255], confidence[coarse == 255] = winner, p
    levels = sum((confidence > np.float32(edge)).astype(int) for edge in EDGES)
    assert prediction.levels == 5
    assert np.array_equal(prediction.codes, classes.astype(int) * 5 + levels)
    histogram, sums = np.zeros((11, 20), int), np.zeros(11)
    for c, sure in zip(classes.ravel().tolist(), confidence.ravel().tolist(), strict=True):
        histogram[c, math.ceil(np.float32(sure) * 20 - 1e-4) - 1] += 1
        sums[c] += sure
    assert np.array_equal(prediction.histogram, histogram)
    np.testing.assert_allclose(prediction.confidence, sums, rtol=1e-6)


def test_bands_of_a_large_image_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    top, level, second, coarse = drawn(CAMVID)
    decide = FromLevels(dense(), CAMVID, EDGES)
    place = decide.places(coarse)
    whole = decide(top, level, place=place, second=second)
    monkeypatch.setattr("autolabel.pipeline.posterior._AT_ONCE", 7 * WIDTH)
    banded = decide(top, level, place=place, second=second)
    assert np.array_equal(whole.codes, banded.codes) and np.array_equal(whole.histogram, banded.histogram)
    np.testing.assert_allclose(whole.confidence, banded.confidence, rtol=1e-12)


def test_without_polygons_in_policy_or_image_nothing_changes() -> None:
    top, level, _, coarse = drawn(CAMVID)
    assert FromLevels(PAPER, CAMVID, EDGES).places(coarse) is None
    decide = FromLevels(dense(), CAMVID, EDGES)
    assert decide.places(None) is None and decide.places(np.full_like(coarse, 255)) is None
    prediction = decide(top, level)
    assert np.array_equal(prediction.codes, top.astype(int) * 5 + level)
    assert prediction.histogram.sum() == top.size


def test_a_pixel_of_which_a_silent_teacher_says_nothing_stays_so() -> None:
    top, level, _, coarse = drawn(CAMVID)
    prediction = FromLevels(dense(), CAMVID, (0.0, *EDGES), silent=True)(
        top, np.where(level == 1, np.uint8(0), level), place=places(coarse, 11)
    )
    silent = (level <= 1) & (coarse == 255)
    assert silent.any() and np.array_equal(prediction.codes[silent], top[silent].astype(int) * 6)


def test_counts_of_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"counted for other classes than those of label space 'two'"):
        FromLevels(DENSE.counted(counts_of(CAMVID)), TWO, EDGES)
