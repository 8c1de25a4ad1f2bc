"""People are sent to places where nothing is wrong, to one scene ten times, or for longer than they have.

Numbers are held against plain loops over pixels, and against what was worked out by hand.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from autolabel.pipeline.analysis.audit_record import Audit, DiagramBins, MeanAudit, ReliabilityDiagram
from autolabel.pipeline.review.belief import KINDS, Belief, confusions, left_out, right, shift
from autolabel.pipeline.review.choose import choose
from autolabel.pipeline.review.effort import Effort, Pace
from autolabel.pipeline.review.regions import SMALLEST, find_regions
from autolabel.pipeline.review.survey import Items, neighbours
from autolabel.pipeline.review.worth import Worth

C, EDGES = 3, (0.5, 0.9)
CHANCE = np.array([[0.25, 0.7, 0.95]] * C)  # p of the middle of every level
CONFUSED = np.array([[0, 0.75, 0.25], [0.5, 0, 0.5], [1, 0, 0]])


def belief(needed: int = 1) -> Belief:
    """Classes are kept from level `needed` on; nothing is void."""
    given = np.arange(3) < needed
    nothing = np.zeros_like(CHANCE)
    chances = [
        [np.where(given, 0, 1 - CHANCE), nothing, nothing],
        [nothing, CHANCE, nothing],
        [nothing, 1 - CHANCE, nothing],
        [nothing, nothing, nothing],
    ]
    return Belief(C, 3, np.array(chances).reshape(KINDS, -1), np.ones(C, np.uint8))


def maps(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Label, top class and level of an image of 4 x 5; a few labels are those of a person."""
    dice = np.random.default_rng(seed)
    top, level = (dice.integers(0, 3, (4, 5)).astype(np.uint8) for _ in range(2))
    label = np.where(level >= 1, top, 255).astype(np.uint8)
    label[0, 0], label[1, 1] = (top[0, 0] + 1) % 3, top[1, 1]
    level[1, 1] = 0  # a person named the class of which the teacher was not sure
    return label, top, level


def test_doubts_and_gains_are_those_of_a_plain_loop_over_pixels() -> None:
    images = [maps(seed) for seed in range(5)]
    doubts = [belief().doubt(belief().keys(*image)) for image in images]
    labelled = np.bincount(np.concatenate([label[label < C] for label, _, _ in images]), minlength=C).astype(float)
    # By pixel: hits, truth that is missed, and union, as they are expected.
    hits, missing, union = np.zeros(C), np.zeros(C), np.zeros(C)
    after = [(np.zeros(C), np.zeros(C)) for _ in images]  # hits that are added, union that is taken away
    for (label, top, level), (added, taken) in zip(images, after, strict=True):
        for named, c, k in zip(label.ravel().tolist(), top.ravel().tolist(), level.ravel().tolist(), strict=True):
            p = CHANCE[c, k]
            if named == 255:
                added[c] += p
                added += (1 - p) * CONFUSED[c]
            elif named == c and k > 0:
                hits[c] += p
                union[c] += 1
                taken[c] += 1 - p
                added += (1 - p) * CONFUSED[c]
            else:
                hits[named] += 1
                union[named] += 1
        missing += added
    union += missing
    least = 1.0
    worth = Worth(labelled, np.sum(doubts, axis=0), CONFUSED)
    assert worth.truth == pytest.approx(hits + missing)
    assert worth.mean_iou() == pytest.approx((hits / np.maximum(union, least)).mean())
    for doubt, (added, taken) in zip(doubts, after, strict=True):
        first_order = (added / union + taken * hits / union**2).sum() / C
        assert (doubt * worth.rates()).sum() == pytest.approx(first_order)
        assert worth.by_class(doubt[None].astype(np.float32)).sum() == pytest.approx(first_order)
        one = Worth(labelled, np.sum(doubts, axis=0), CONFUSED)
        one.correct(doubt)
        assert one.mean_iou() == pytest.approx(((hits + added) / (union - taken)).mean())


def test_when_everything_is_corrected_every_label_is_right() -> None:
    doubt = np.arange(4 * C, dtype=float).reshape(4, C)
    worth = Worth(np.array([50.0, 60, 70]), doubt, CONFUSED)
    worth.correct(doubt)
    assert worth.mean_iou() == pytest.approx(1)


def test_a_rare_class_gains_more_by_a_pixel_and_one_that_nobody_can_see_no_more_than_one_in_ten_thousand() -> None:
    doubt = np.zeros((4, C))
    rates = Worth(np.array([99_000.0, 1000, 1]), doubt, CONFUSED).rates()
    assert rates[1].tolist() == pytest.approx([1 / 99_000 / 3, 1 / 1000 / 3, 1 / 10.0001 / 3])


def test_classes_count_by_what_the_student_gets_wrong() -> None:
    worth = Worth(np.array([10.0, 10, 10]), np.zeros((4, C)), CONFUSED, np.array([0.0, 0.1, 0.3]))
    assert worth.rates()[1].tolist() == pytest.approx([0, 0.025, 0.075])


# --- an audit ---------------------------------------------------------------------------------------------------------


def audit() -> Audit:
    """Class a is right in half of 9,000 pixels of confidence 0.9 to 1; people left out 1,000 more. b was never seen."""
    bins = {"a": DiagramBins([0] * 19 + [9000], [0] * 19 + [4500], [None] * 20)}
    diagram = ReliabilityDiagram([k / 20 for k in range(21)], 0.1, bins["a"], bins)
    mean = MeanAudit(None, None, None, None, None, {})
    made = Audit("t", "0", 1, 0, 0.95, None, None, [], mean, None, None, [], [])
    return replace_reliability(made, diagram)


def replace_reliability(made: Audit, diagram: ReliabilityDiagram) -> Audit:
    """Set it without the check that its classes are in the table of classes."""
    for name, value in (("reliability", diagram), ("unknown", {"a": [0] * 19 + [1000]})):
        object.__setattr__(made, name, value)
    return made


def test_without_an_audit_a_confidence_is_the_middle_of_its_level() -> None:
    found = right(EDGES, ("a", "b"), None, np.ones(2))
    assert found.tolist() == [pytest.approx([0.25, 0.7, 0.95])] * 2
    assert not left_out(EDGES, ("a", "b"), None).any()


def test_an_audit_says_how_often_a_confidence_is_right_and_what_people_leave_out() -> None:
    edges = (0.5, 0.95)
    both = (4500 + 1000 * 0.975) / (9000 + 1000)  # all classes together stand in for one that was not seen
    found = right(edges, ("a", "b"), audit(), np.array([1.0, 0]))
    assert found[:, 2].tolist() == pytest.approx([(4500 + 1000 * both) / 10_000, both])
    assert found[:, :2].tolist() == [pytest.approx([0.25, 0.725])] * 2
    assert left_out(edges, ("a", "b"), audit())[:, 2].tolist() == pytest.approx([1100 / 11_000, 0.1])


def test_a_class_that_is_rarer_than_in_the_audit_is_believed_less() -> None:
    made = audit()
    assert made.reliability is not None
    bins = {**made.reliability.classes, "b": DiagramBins([0] * 19 + [3000], [0] * 20, [None] * 20)}
    made = replace_reliability(made, replace(made.reliability, classes=bins))
    assert shift(made, ("a", "b"), np.array([50.0, 50])).tolist() == pytest.approx([2 / 3, 2])
    assert shift(made, ("a", "b"), np.array([1.0, 99_999])).tolist() == pytest.approx([0.1, 0.99999 / 0.25])
    assert shift(None, ("a", "b"), np.array([1.0, 9])).tolist() == [1, 1]


def test_a_class_is_mistaken_for_what_lies_around_it() -> None:
    around = neighbours(np.array([[0, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1]], np.uint8), 2)
    assert around.tolist() == [[1 + 3, 1], [0, 0]]  # in row 0: 0-0, 0-1; in column 0: three times 0-0
    found = confusions(
        np.array([[5, 3, 1], [0, 0, 0], [0, 0, 0]]), np.array([8.0, 1, 1]), None, ("a", "b", "c"), np.ones(3)
    )
    assert found[0].tolist() == pytest.approx([0, 0.9 * 0.75 + 0.1 * 0.5, 0.9 * 0.25 + 0.1 * 0.5])
    assert found[1].tolist() == pytest.approx([0.9 + 0.1 * 8 / 9, 0, 0.1 / 9])
    assert found.sum(axis=1).tolist() == pytest.approx([1, 1, 1])


# --- regions ----------------------------------------------------------------------------------------------------------


def flooded(unsure: NDArray[np.bool_], side: int) -> list[set[tuple[int, int]]]:
    """The pieces of True within cells of a side, by a plain flood."""
    left, found = {(int(y), int(x)) for y, x in np.argwhere(unsure)}, []
    for start in sorted(left):
        if start not in left:
            continue
        piece, edge = set[tuple[int, int]](), [start]
        while edge:
            y, x = edge.pop()
            if (y, x) in left and (y // side, x // side) == (start[0] // side, start[1] // side):
                left.remove((y, x))
                piece.add((y, x))
                edge += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        found.append(piece)
    return [piece for piece in found if len(piece) >= SMALLEST]


@pytest.mark.parametrize("seed", range(4))
def test_regions_are_the_connected_pieces_of_unsure_pixels_within_cells(seed: int) -> None:
    unsure = np.random.default_rng(seed).random((40, 70)) < 0.7
    regions, expected = find_regions(unsure), flooded(unsure, 16)
    assert len(regions) == len(expected) > 5
    assert regions.pixels.sum() == (regions.places >= 0).sum()
    for number, piece in enumerate(expected):
        assert {(int(y), int(x)) for y, x in np.argwhere(regions.places == number)} == piece
        assert regions.pixels[number] == len(piece)
        rim = [
            p for p in piece if not {(p[0] + 1, p[1]), (p[0] - 1, p[1]), (p[0], p[1] + 1), (p[0], p[1] - 1)} <= piece
        ]
        assert regions.boundary[number] == len(rim)
        ys, xs = zip(*piece, strict=True)
        assert regions.boxes[number].tolist() == [min(ys), min(xs), max(ys) - min(ys) + 1, max(xs) - min(xs) + 1]


def test_a_map_without_an_unsure_pixel_has_no_region() -> None:
    assert len(find_regions(np.zeros((20, 30), np.bool_))) == 0


# --- choosing ---------------------------------------------------------------------------------------------------------


def items(image: list[int], gains: list[float], seconds: list[float]) -> Items:
    """Items that add so many hits to class 0, a thousandth of a pixel for each unit of gain."""
    doubt = np.zeros((len(image), 4, C), np.float32)
    doubt[:, 1, 0] = np.array(gains) / 1000
    zeros = np.zeros(len(image), np.int64)
    return Items(np.array(image), doubt, np.array(seconds), np.zeros((len(image), 4), np.int64), zeros, zeros, zeros)


def worth() -> Worth:
    """So many pixels that a choice changes no rate that can be seen."""
    return Worth(np.array([1e6, 1e6, 1e6]), np.zeros((4, C)), CONFUSED)


class Alike:
    """Images of the same number modulo ten show the same."""

    def __init__(self) -> None:
        self.chosen = set[int]()

    def choose(self, image: int) -> None:
        self.chosen.add(image % 10)

    def left(self, image: int) -> float:
        return 0.0 if image % 10 in self.chosen else 1.0


def test_the_most_gain_per_second_comes_first_and_the_budget_is_kept() -> None:
    some = items([0, 1, 2, 3], [10, 90, 40, 30], [1, 10, 2, 6])
    assert choose(some, worth(), 9.0).places.tolist() == [2, 0, 3]  # 20, 10 and 5 a second; 9 a second do not fit
    assert choose(some, worth(), 19.0).places.tolist() == [2, 0, 1, 3]


def test_opening_an_image_costs_once_so_its_regions_come_together() -> None:
    some = items([0, 0, 1, 2], [30, 30, 50, 1], [1, 1, 1, 1])
    chosen = choose(some, worth(), 25.0, opening=10.0)
    assert chosen.places.tolist() == [0, 1, 2]  # 60 in 12 s, then 50 in 11 s; 1 in 11 s no longer fits
    assert chosen.seconds.tolist() == [11, 1, 11]


def test_a_bundle_that_is_too_long_is_cut() -> None:
    some = items([0, 0, 0], [30, 29, 28], [2, 2, 2])
    assert choose(some, worth(), 14.5, opening=10.0).places.tolist() == [0, 1]


def test_nothing_is_chosen_that_gains_nothing_or_fits_in_no_budget() -> None:
    assert len(choose(items([0, 1], [0, 5], [1, 100]), worth(), 50.0)) == 0
    assert len(choose(items([], [], []), worth(), 50.0)) == 0


def test_a_frame_that_shows_the_same_as_one_that_was_chosen_is_left_out() -> None:
    some = items([1, 2, 3, 11, 21], [50, 20, 10, 49, 48], [1] * 5)
    assert choose(some, worth(), 3.0).places.tolist() == [0, 3, 4]
    assert choose(some, worth(), 3.0, likeness=Alike()).places.tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_budgets_are_kept_and_gains_add_up_whatever_the_items(seed: int) -> None:
    dice = np.random.default_rng(seed)
    image = np.sort(dice.integers(0, 20, 80)).tolist()
    some = items(image, dice.integers(0, 50, 80).tolist(), dice.integers(1, 9, 80).tolist())
    before, after = worth(), worth()
    chosen = choose(some, after, 100.0, opening=3.0, likeness=Alike())
    again = choose(some, worth(), 100.0, opening=3.0, likeness=Alike())
    opened = {image[k] for k in chosen.places.tolist()}
    assert chosen.seconds.sum() == some.seconds[chosen.places].sum() + 3 * len(opened) <= 100
    assert len(set(chosen.places.tolist())) == len(chosen) > 5
    assert len({k % 10 for k in opened}) == len(opened)
    assert chosen.gain == pytest.approx(after.mean_iou() - before.mean_iou())
    assert chosen.places.tolist() == again.places.tolist()


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("50", Effort(50)), ("30min", Effort(None, 1800)), ("1.5h", Effort(None, 5400)), ("90 s", Effort(None, 90))],
)
def test_a_budget_is_read(text: str, expected: Effort) -> None:
    assert Effort.of(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0", "a budget of nothing"),
        ("0min", "a budget of nothing"),
        ("5days", "unknown unit 'days'"),
        ("2.5", "2.5 images"),
        ("-3", "expected a number"),
        ("many", "expected a number"),
        ("", "expected a number"),
    ],
)
def test_other_budgets_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Effort.of(text)


@pytest.mark.parametrize("text", ["1,2", "a,b,c", "1,0,1", "-1,1,1", "1,inf,1", "1,nan,1"])
def test_other_paces_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="three numbers"):
        Pace.of(text)
