"""Doubts about human labels. If this fails, mistakes hide behind borders, or a weak class floods the list."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from autolabel.manifests.label_space import IGNORE
from autolabel.pipeline.analysis.doubt import Gathered, beside, evidence, look, scores

CLASSES, LEVELS = 3, 4
Map = NDArray[np.uint8]


def pieces_by_hand(values: dict[tuple[int, int], object]) -> Iterator[list[tuple[int, int]]]:
    """The 4-connected pieces of one value, each as its pixels."""
    left = set(values)
    while left:
        piece, front = [], [left.pop()]
        while front:
            y, x = front.pop()
            piece.append((y, x))
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in left and values[near] == values[y, x]:
                    left.remove(near)
                    front.append(near)
        yield piece


def by_hand(human: Map, top: Map, level: Map, reach: int, smallest: int) -> tuple[NDArray[np.float64], set[object]]:
    """Counts and doubts, one pixel after the other."""

    def beside_suggested(y: int, x: int) -> bool:
        around = human[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
        return bool((around == top[y, x]).any())

    places = [(int(y), int(x)) for y, x in np.ndindex(human.shape) if human[y, x] != IGNORE]
    counted = {p for p in places if human[p] == top[p] or not beside_suggested(*p)}
    region_of = {
        pixel: sum(p in counted for p in region)
        for region in pieces_by_hand({p: human[p] for p in places})
        for pixel in region
    }
    counts = np.zeros((CLASSES, CLASSES, LEVELS))
    for p in counted:
        counts[human[p], top[p], level[p]] += 1 / math.sqrt(region_of[p])
    doubts: set[object] = set()
    for piece in pieces_by_hand({p: (human[p], top[p]) for p in counted if human[p] != top[p]}):
        if len(piece) >= smallest:
            (y, x), rows, columns = piece[0], [p[0] for p in piece], [p[1] for p in piece]
            box = min(rows), min(columns), max(rows) - min(rows) + 1, max(columns) - min(columns) + 1
            levels = tuple(sum(level[p] == k for p in piece) for k in range(LEVELS))
            doubts.add((*box, int(human[y, x]), int(top[y, x]), len(piece), region_of[y, x], levels))
    return counts, doubts


@pytest.mark.parametrize("seed", range(30))
def test_counts_and_doubts_of_a_random_map_equal_those_of_a_plain_loop(seed: int) -> None:
    dice = np.random.default_rng(seed)
    size, reach, smallest = tuple(dice.integers(1, 12, 2)), int(dice.integers(0, 4)), int(dice.integers(1, 4))
    human = dice.choice([0, 1, 2, IGNORE], size, p=[0.6, 0.1, 0.1, 0.2]).astype(np.uint8)
    top, level = (dice.integers(0, n, size).astype(np.uint8) for n in (CLASSES, LEVELS))
    counts, doubts = look(human, top, level=level, shape=(CLASSES, LEVELS), reach=reach, smallest=smallest)
    expected, rows = by_hand(human, top, level, reach, smallest)
    assert np.allclose(counts, expected, rtol=1e-12, atol=0)
    found = [
        (*doubts.box[n].tolist(), int(doubts.human[n]), int(doubts.suggested[n]), int(doubts.pixels[n]),
         int(doubts.region_pixels[n]), tuple(doubts.levels[n].tolist()))
        for n in range(len(doubts))
    ]  # fmt: skip
    assert set(found) == rows
    assert doubts.pixels.tolist() == sorted(doubts.pixels.tolist(), reverse=True)


@pytest.mark.parametrize("reach", [0, 1, 2, 3, 7, 50])
def test_a_pixel_is_beside_a_class_within_rows_and_columns_also_of_a_class_above_the_first_words(reach: int) -> None:
    human, top = np.full((9, 11), IGNORE, np.uint8), np.full((9, 11), 70, np.uint8)
    human[4, 5] = 70
    y, x = np.indices(human.shape)
    assert np.array_equal(beside(human, top, reach), (abs(y - 4) <= reach) & (abs(x - 5) <= reach))
    assert not beside(human, np.full_like(top, 6), reach).any()  # 6 and 70 have the same place in their words


def test_pixels_of_which_the_teacher_says_nothing_count_nowhere() -> None:
    human, top = np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)
    spoken = np.zeros((4, 4), np.bool_)
    spoken[:2] = True
    counts, doubts = look(
        human, top, level=np.zeros_like(human), shape=(CLASSES, LEVELS), reach=0, smallest=1, spoken=spoken
    )
    assert (doubts.pixels.tolist(), doubts.region_pixels.tolist()) == ([8], [8])
    assert counts.sum() == pytest.approx(math.sqrt(8))


def test_the_evidence_is_the_logarithm_of_how_much_oftener_the_teacher_says_it_where_people_do() -> None:
    counts = np.zeros((2, 2, 1))
    counts[0, :, 0], counts[1, :, 0] = (90_000, 10_000), (20_000, 80_000)
    weights = evidence(counts)[..., 0]
    assert weights[0, 1] == pytest.approx(math.log(0.8 / 0.1), abs=1e-3)
    assert weights[1, 0] == pytest.approx(math.log(0.9 / 0.2), abs=1e-3)
    assert np.diagonal(weights).tolist() == [0, 0]
    assert np.isfinite(evidence(np.zeros((3, 3, 2)))).all()


def test_a_class_at_which_the_teacher_is_bad_scores_lower_than_one_that_it_knows() -> None:
    """People say sign, and the teacher always says wall there; of road, it never does."""
    road, wall, sign = range(3)
    counts = np.zeros((3, 3, 1))
    counts[road, road], counts[wall, wall], counts[sign, wall], counts[sign, sign] = 10_000, 10_000, 900, 100
    gathered = Gathered(3, 1)
    top = np.full((10, 10), wall, np.uint8)
    for place, human in enumerate((road, sign)):
        label = np.full((10, 10), human, np.uint8)
        _, doubts = look(label, top, level=np.zeros_like(label), shape=(3, 1), reach=2, smallest=1)
        gathered.add(place, counts / 2, doubts)
    image, doubts = gathered.all()
    of_road, of_sign = scores(doubts, gathered.counts)[np.argsort(image)]
    assert of_road > 0.99 and of_sign < 0.2
    weights = evidence(counts)[:, wall, 0]
    assert of_sign == pytest.approx(1 - 4 ** -weights[sign])
    assert of_road == pytest.approx(1 - 4 ** -weights[road])


def test_a_score_falls_with_the_share_of_the_region_and_with_the_size_and_is_0_without_evidence() -> None:
    counts = np.zeros((2, 2, 1))
    counts[0, :, 0], counts[1, :, 0] = (90, 10), (20, 80)
    weight = evidence(counts)[0, 1, 0]
    for empty in (0, 240):
        human, top = np.zeros((16 + empty, 16), np.uint8), np.zeros((16 + empty, 16), np.uint8)
        top[:16, :4], human[16:] = 1, IGNORE
        _, doubts = look(human, top, level=top * 0, shape=(2, 1), reach=0, smallest=1)
        (score,) = scores(doubts, counts)
        assert score == pytest.approx(1 - 4 ** -(weight * math.sqrt(64 / 256) * (64 / human.size) ** 0.25))
    assert scores(doubts, counts[:, ::-1]).tolist() == [0]


def test_of_more_doubts_than_may_be_kept_the_likeliest_stay_in_their_order() -> None:
    gathered = Gathered(2, 1, most=100)
    counts = np.array([[[90.0], [10.0]], [[20.0], [80.0]]])
    for place in range(512):
        human, top = np.zeros((32, 32), np.uint8), np.zeros((32, 32), np.uint8)
        top[0, : 1 + place % 32] = 1
        gathered.add(place, counts, look(human, top, level=human, shape=(2, 1), reach=0, smallest=1)[1])
    image, doubts = gathered.all()
    assert len(doubts) == 100
    assert image.tolist() == sorted(image.tolist())
    kept = [place % 32 for place in range(512) if place % 32 > 25]
    assert sorted(doubts.pixels.tolist())[-len(kept) :] == sorted(1 + n for n in kept)


def test_images_gathered_one_by_one_are_kept_in_their_order() -> None:
    gathered = Gathered(2, 1)
    for place in range(600):
        human = np.zeros((1, 1 + place), np.uint8)
        doubts = look(human, human + 1, level=human, shape=(2, 1), reach=0, smallest=1)[1]
        gathered.add(place, np.ones((2, 2, 1)), doubts)
    image, doubts = gathered.all()
    assert image.tolist() == list(range(600))
    assert doubts.pixels.tolist() == list(range(1, 601))
    assert gathered.counts.tolist() == [[[600]] * 2] * 2
