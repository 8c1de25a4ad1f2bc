"""Coarse labels drawn out of fine ones. If this fails, figures about polygons are those of other polygons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests.hands import HANDS, coarsen

CAMVID = Path("/work/shared/data/camvid")  # the coarse labels that `even` is like, where they are at hand
Labels = NDArray[np.uint8]


def streets() -> Labels:
    """A label of 240 x 480 pixels: sky over road, a house, two cars, a pole and a speck."""
    fine = np.zeros((240, 480), np.uint8)
    fine[120:] = 3
    fine[30:150, 40:300] = 1
    fine[140:180, 100:160] = fine[150:200, 350:420] = 8
    fine[20:170, 320:324] = 2
    fine[10:20, 10:20] = 4
    fine[230:] = 255
    return fine


def sure(fine: Labels, coarse: Labels) -> float:
    """The share of the named pixels that are right, where the truth is known."""
    named = (coarse != 255) & (fine != 255)
    return float((coarse == fine)[named].mean())


def test_an_even_hand_keeps_away_from_every_border_but_the_images_own() -> None:
    fine, coarse = streets(), coarsen(streets(), "even")
    assert sure(fine, coarse) == 1
    assert (coarse[153:197, 353:417] == 8).all() and (coarse[150:200, 350:353] == 255).all()
    assert (coarse[40:110, 37:43] == 255).all() and (coarse[40:110, 43] == 1).all() and (coarse[40:110, 36] == 0).all()
    assert (coarse[0] == 0).all()
    assert (coarse[fine == 2] == 255).all() and (coarse[fine == 4] == 255).all() and (coarse[fine == 255] == 255).all()


@pytest.mark.parametrize("hand", ["even", "rough"])
def test_distances_grow_with_the_width(hand: str) -> None:
    fine = streets()
    large = coarsen(fine.repeat(4, 0).repeat(4, 1), hand, seed=3)[2::4, 2::4]
    assert np.mean(large == coarsen(fine, hand, seed=3)) > 0.95


@pytest.mark.parametrize("hand", HANDS)
def test_the_same_seed_gives_the_same_polygons_and_another_one_others_unless_the_hand_is_even(hand: str) -> None:
    fine = streets()
    first = coarsen(fine, hand, seed="0 drive/1")
    np.testing.assert_array_equal(coarsen(fine, hand, seed="0 drive/1"), first)
    assert (coarsen(fine, hand, seed="0 drive/2") == first).all() == (hand == "even")


def test_nothing_is_drawn_where_nothing_is_large_and_a_label_of_one_class_is_drawn_whole() -> None:
    specks = (np.indices((60, 90)).sum(0) % 2).astype(np.uint8) * 255
    for hand in HANDS:
        assert (coarsen(np.full((60, 90), 255, np.uint8), hand) == 255).all()
        assert set(np.unique(coarsen(specks, hand))) <= {0, 255}
    assert (coarsen(np.full((60, 480), 7, np.uint8), "even") == 7).all()


def test_another_hand_is_refused() -> None:
    with pytest.raises(ValueError, match="hand 'shaky': expected even, rough, crossing"):
        coarsen(streets(), "shaky")


@pytest.mark.skipif(not CAMVID.is_dir(), reason="the data is not at hand")
@pytest.mark.thorough
def test_on_camvid_an_even_hand_draws_the_given_polygons_and_a_crossing_one_errs_as_in_cityscapes() -> None:
    same, wrong, named, total = 0, 0, 0, 0
    shares = np.zeros((2, 11, 2), np.int64)  # ours or given, class, all or named
    for path in sorted((CAMVID / "fine/train").glob("*.png"))[::6]:
        fine, given = (np.asarray(Image.open(p)) for p in (path, CAMVID / "coarse/train" / path.name))
        even, crossing = coarsen(fine, "even"), coarsen(fine, "crossing", seed=f"0 {path.stem}")
        same, total = same + int((even == given).sum()), total + fine.size
        assert (even[given != 255] == given[given != 255]).all()
        for place, coarse in enumerate((even, given)):
            for column, part in enumerate((fine != 255, (fine != 255) & (coarse != 255))):
                shares[place, :, column] += np.bincount(fine[part], minlength=11)
        known = (crossing != 255) & (fine != 255)
        wrong, named = wrong + int((crossing != fine)[known].sum()), named + int(known.sum())
    ours, theirs = shares[0, :, 1] / shares[0, :, 0], shares[1, :, 1] / shares[1, :, 0]
    assert same / total > 0.998
    assert np.abs(ours - theirs).max() < 0.01
    assert 0.025 < wrong / named < 0.035
