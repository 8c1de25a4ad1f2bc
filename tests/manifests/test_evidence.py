"""Polygons count by how much more often a class lies somewhere than anywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autolabel.manifests.evidence import OUTSIDE, logarithms

BINS = len(OUTSIDE) + 1


def test_a_class_that_lies_everywhere_alike_is_neither_likelier_nor_less_likely_anywhere() -> None:
    counts = np.zeros((3, BINS, 3), np.int64)
    counts[..., 0], counts[..., 1] = 9, 1
    assert np.allclose(logarithms(counts), 0)


def test_places_say_how_much_more_often_a_class_lies_there_than_anywhere() -> None:
    counts = np.zeros((3, BINS, 3), np.int64)
    counts[0, 0], counts[1, 0] = (80, 0, 0), (0, 80, 0)
    found = logarithms(counts)  # smoothed with 10 pixels of either class
    assert found[0, 0, :2] == pytest.approx([math.log(0.9 / 0.5), math.log(0.1 / 0.5)])
    assert found[2, 5, :2] == pytest.approx([0, 0])  # nothing was counted there
    assert not found[..., 2].any()  # never counted: nothing for or against it
