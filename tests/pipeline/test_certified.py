"""A certified pixel keeps its label whatever uncertain ones become. If this fails, a run says what it cannot know."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from autolabel.manifests.label_space import CITYSCAPES, IGNORE, LabelSpace
from autolabel.manifests.policy import Policy
from autolabel.pipeline.rules import Rules

# --- which pixels are certified ---------------------------------------------------------------------------------------

THREE = LabelSpace("three", CITYSCAPES.classes[:3])


@pytest.mark.parametrize(
    "rules", [{}, {"boundary": 1}, {"smallest_piece": 6}, {"boundary": 1, "smallest_piece": 4}, {"coarse": "union"}]
)
def test_certified_pixels_keep_their_label_whatever_the_others_become(rules: dict[str, Any]) -> None:
    applied = Rules(Policy(threshold=0.5, **rules), THREE, (0.5, 0.8))
    draw, found = np.random.default_rng(1), 0
    for _ in range(20):
        top = draw.integers(0, 3, (4, 6)).repeat(4, axis=0).repeat(3, axis=1)
        level = np.where(draw.random(top.shape) < 0.05, 0, draw.integers(1, 3, top.shape))
        least = np.where(draw.random(top.shape) < 0.04, 0, level).astype(np.uint8)
        coarse = draw.choice(np.array([0, 1, 2, IGNORE], np.uint8), top.shape) if "coarse" in rules else None
        codes = (top * 3 + level).astype(np.uint8)
        before = applied.apply(codes, coarse, least=least)
        stays = _certain(top, least, rules, before.label, coarse)
        assert before.certified is not None
        assert before.certified.tolist() == [int((stays & (before.label == c)).sum()) for c in range(3)]
        found += int(stays.sum())
        for _ in range(5):
            other = np.where(least > 0, codes, draw.integers(0, 9, codes.shape)).astype(np.uint8)
            assert (applied.apply(other, coarse).label == before.label)[stays].all()
    assert found > 100


def _certain(
    top: NDArray[Any], least: NDArray[Any], rules: dict[str, Any], label: NDArray[Any], coarse: NDArray[Any] | None
) -> NDArray[np.bool_]:
    """The certified pixels, one after the other."""
    height, width = top.shape
    near = rules.get("boundary", 0)
    stays = np.zeros(top.shape, np.bool_)
    for y in range(height):
        for x in range(width):
            around = least[max(0, y - near) : y + near + 1, max(0, x - near) : x + near + 1]
            human = IGNORE if coarse is None else coarse[y, x]
            stays[y, x] = (around > 0).all() and label[y, x] == top[y, x] and human in (IGNORE, top[y, x])
    within = np.ones_like(stays) if not near else np.zeros_like(stays)
    for y, x in np.argwhere(stays) if near else ():
        within[y, x] = len(np.unique(top[max(0, y - near) : y + near + 1, max(0, x - near) : x + near + 1])) == 1
    stays &= within
    for y, x in np.argwhere(stays.copy()):
        piece, left = {(y, x)}, [(y, x)]
        while left:
            v, u = left.pop()
            for place in ((v - 1, u), (v + 1, u), (v, u - 1), (v, u + 1)):
                inside = 0 <= place[0] < height and 0 <= place[1] < width
                if inside and place not in piece and stays[place] and top[place] == top[y, x]:
                    piece.add(place)
                    left.append(place)
        if len(piece) < rules.get("smallest_piece", 0):
            for place in piece:
                stays[place] = False
    return stays
