"""Polygons against a plain test of every pixel's centre. If this fails, drawn regions come back in other places."""

from __future__ import annotations

import numpy as np
import pytest

from autolabel.manifests.formats.exchange import BadReturn
from autolabel.manifests.formats.polygons import fill


def inside(x: float, y: float, corners: np.ndarray) -> bool:  # type: ignore[type-arg]
    """Even-odd rule, by a ray to the right."""
    crossings = 0
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if (y1 <= y) != (y2 <= y):
            crossings += x < x1 + (y - y1) * (x2 - x1) / (y2 - y1)
    return crossings % 2 == 1


def test_the_pixels_whose_centre_is_inside_are_filled() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        corners = rng.uniform(-4, 14, (rng.integers(3, 9), 2))
        label = np.full((9, 11), 7, np.uint8)
        fill(label, corners.ravel().tolist(), 3, "f")
        expected = [[3 if inside(x + 0.5, y + 0.5, corners) else 7 for x in range(11)] for y in range(9)]
        assert label.tolist() == expected


def test_rectangles_between_pixels_fill_whole_pixels() -> None:
    label = np.zeros((4, 5), np.uint8)
    fill(label, [1, 1, 4, 1, 4, 3, 1, 3], 2, "f")
    assert np.argwhere(label).tolist() == [[y, x] for y in (1, 2) for x in (1, 2, 3)]
    fill(label, [1, 1, 1, 1, 1, 1], 9, "f")
    fill(label, [-9, -9, -5, -9, -5, -5], 9, "f")
    assert label.max() == 2


@pytest.mark.parametrize("corners", [[], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 0, 1, 1e9]])
def test_what_is_no_polygon_is_refused(corners: list[float]) -> None:
    with pytest.raises(BadReturn, match=r"^f: the polygon "):
        fill(np.zeros((4, 5), np.uint8), corners, 1, "f")
