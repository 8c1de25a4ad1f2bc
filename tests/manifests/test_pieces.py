"""Connected pieces. If this fails, small pieces are dropped that are none, and mistakes are cut in two."""

from __future__ import annotations

import numpy as np
import pytest

from autolabel.manifests.pieces import pieces


@pytest.mark.parametrize("seed", range(20))
def test_the_pieces_of_a_random_map_are_those_that_spread_from_pixel_to_pixel(seed: int) -> None:
    dice = np.random.default_rng(seed)
    values = dice.integers(-1, 2, tuple(dice.integers(1, 15, 2))).astype(np.int32)
    mark = np.arange(values.size).reshape(values.shape)
    while True:  # every pixel takes the smallest mark of its neighbours with the same value, until none changes
        before = mark.copy()
        for one, other in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
            same = values[one] == values[other]
            least = np.minimum(mark[one], mark[other])
            mark[one] = np.where(same, least, mark[one])
            mark[other] = np.where(same, np.minimum(least, mark[other]), mark[other])
        if np.array_equal(mark, before):
            break
    found = pieces(values)
    assert np.array_equal(found.starts[found.painted(found.piece)], mark)
    assert np.array_equal(found.painted(found.values), values)
    assert np.array_equal(found.painted(found.pixels()[found.piece]), np.bincount(mark.ravel())[mark])
