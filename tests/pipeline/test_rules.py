"""Every pixel's fate is decided by the rule that should, and counted. If this fails, labels and their account lie.

The tables are compared with a loop that takes one pixel after the other, written from the words in docs/policy.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from autolabel.manifests.label_space import CAMVID, IGNORE, LabelClass, LabelSpace
from autolabel.manifests.policy import COARSE_RULES, Area, Policy
from autolabel.manifests.schemas import FATES
from autolabel.pipeline.rules import Outcome, Rules, near_boundary, small_pieces

EDGES = (0.3, 0.5, 0.7)
NAMES = ("road", "car", "truck", "pole")
SPACE = LabelSpace("four", tuple(LabelClass(name, (0, 0, 0), (k,)) for k, name in enumerate(NAMES)))
Map = NDArray[np.uint8]


def pieces_by_hand(label: Map) -> Iterator[list[tuple[int, int]]]:
    """The 4-connected pieces of one class, each as its pixels."""
    left = {(int(y), int(x)) for y, x in np.argwhere(label != IGNORE)}
    while left:
        piece, front = [], [left.pop()]
        while front:
            y, x = front.pop()
            piece.append((y, x))
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in left and label[near] == label[y, x]:
                    left.remove(near)
                    front.append(near)
        yield piece


def by_hand(policy: Policy, top: Map, level: Map, coarse: Map) -> tuple[Map, NDArray[np.object_]]:
    """The label and every pixel's fate, one pixel after the other, in the order that the documentation gives."""
    height, width = top.shape
    threshold = policy.class_thresholds(SPACE)
    sure = lambda y, x, c: level[y, x] > EDGES.index(threshold[c])  # noqa: E731
    label, fate = top.copy(), np.full(top.shape, "kept", object)
    rows, columns = policy.area.box(height, width) if policy.area else (slice(0, height), slice(0, width))
    inside = lambda y, x: rows.start <= y < rows.stop and columns.start <= x < columns.stop  # noqa: E731
    for y, x in np.ndindex(top.shape):
        around = top[max(0, y - policy.boundary) : y + policy.boundary + 1,
                     max(0, x - policy.boundary) : x + policy.boundary + 1]  # fmt: skip
        if not inside(y, x):
            label[y, x], fate[y, x] = IGNORE, "outside_area"
        elif not sure(y, x, top[y, x]):
            label[y, x], fate[y, x] = IGNORE, "below_threshold"
        elif (around != top[y, x]).any():
            label[y, x], fate[y, x] = IGNORE, "near_boundary"
    for piece in list(pieces_by_hand(label)):
        if len(piece) < policy.smallest_piece:
            for y, x in piece:
                label[y, x], fate[y, x] = IGNORE, "in_small_piece"
    seen = {int(top[y, x]) for y, x in np.ndindex(top.shape) if inside(y, x)}
    teachers = label.copy()
    for y, x in np.ndindex(top.shape):
        h, c, kept = int(coarse[y, x]), int(top[y, x]), teachers[y, x] != IGNORE
        if h == IGNORE:
            continue
        rule = policy.coarse_rules.get(NAMES[h], policy.coarse)
        own = policy.coarse_rules.get(NAMES[c], policy.coarse)
        to: int | None = None
        if kept and c != h and "agree" in (rule, own):
            to = IGNORE
        if rule == "union" and h in seen and not (kept and c == h):
            if sure(y, x, h):
                to = h
            elif kept:
                to = IGNORE
        if rule == "human-wins" and not (kept and c == h):
            to = h
        if rule == "teacher-wins" and not kept:
            to = h
        if to is not None:
            label[y, x], fate[y, x] = to, "decided_by_human"
    return label, fate


def random_case(seed: int, height: int = 24, width: int = 31) -> tuple[Map, Map, Map]:
    """Blotches of top classes, levels, and coarse labels that partly agree."""
    dice = np.random.default_rng(seed)
    blotches = np.kron(dice.integers(0, 4, (height // 4, width // 4 + 1)), np.ones((4, 4), int))[:height, :width]
    top = np.where(dice.random((height, width)) < 0.1, dice.integers(0, 4, (height, width)), blotches).astype(np.uint8)
    if seed % 3 == 0:
        top[top == 2] = 0  # the teacher sees no truck
    level = dice.integers(0, len(EDGES) + 1, (height, width)).astype(np.uint8)
    coarse = np.where(dice.random((height, width)) < 0.5, blotches, dice.integers(0, 4, (height, width)))
    return top, level, np.where(dice.random((height, width)) < 0.3, IGNORE, coarse).astype(np.uint8)


def applied(policy: Policy, top: Map, level: Map, coarse: Map | None) -> Outcome:
    codes = (top * np.uint8(len(EDGES) + 1) + level).astype(np.uint8)
    return Rules(policy, SPACE, EDGES).apply(codes, coarse)


AROUND = {
    "nothing around": {},
    "area": {"area": Area((3, 20), (5, 28))},
    "boundary": {"boundary": 1},
    "small": {"smallest_piece": 9},
    "all": {"area": Area((0.1, 0.9), (0.0, 0.8), "fractions"), "boundary": 2, "smallest_piece": 5},
}
HUMAN = {
    **{rule: {"coarse": rule} for rule in COARSE_RULES},
    "mixed": {"coarse_rules": {"road": "agree", "car": "human-wins", "truck": "union", "pole": "teacher-wins"}},
    "thresholds and union": {"coarse": "union", "thresholds": {"road": 0.3, "pole": 0.7}},
}


@pytest.mark.parametrize("human", HUMAN.values(), ids=HUMAN)
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_labels_and_fates_are_those_of_one_pixel_after_the_other(
    around: dict[str, object], human: dict[str, object]
) -> None:
    policy = Policy(**around, **human)  # type: ignore[arg-type]
    for seed in range(6):
        top, level, coarse = random_case(seed)
        label, fate = by_hand(policy, top, level, coarse)
        found = applied(policy, top, level, coarse)
        assert np.array_equal(found.label, label)
        for c in range(4):
            assert found.fates[c].tolist() == [((top == c) & (fate == name)).sum() for name in FATES]
            assert found.from_human[c] == ((label == c) & (fate == "decided_by_human")).sum()
            assert found.pixels[c] == (label == c).sum()
        assert found.fates.sum() == top.size


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_agreement_is_that_of_the_teacher_alone(around: dict[str, object]) -> None:
    """Whatever the coarse label is used for: otherwise a policy that believes it would always look right."""
    top, level, coarse = random_case(1)
    alone, _ = by_hand(Policy(**around), top, level, np.full_like(coarse, IGNORE))  # type: ignore[arg-type]
    for rule in COARSE_RULES:
        found = applied(Policy(**around, coarse=rule), top, level, coarse)  # type: ignore[arg-type]
        for h in range(4):
            here = alone[coarse == h]
            assert found.coarse[h] == len(here)
            assert found.agreeing[h] == (here == h).sum()
            assert found.contradicted[h] == ((here != h) & (here != IGNORE)).sum()


def test_without_a_coarse_label_the_teacher_decides_alone() -> None:
    top, level, coarse = random_case(2)
    for rule in COARSE_RULES:
        found = applied(Policy(coarse=rule), top, level, None)
        nothing = applied(Policy(coarse=rule), top, level, np.full_like(coarse, IGNORE))
        plain = applied(Policy(), top, level, coarse)
        assert np.array_equal(found.label, plain.label) and np.array_equal(found.label, nothing.label)
        assert found.coarse.sum() == 0 and found.fates.tolist() == plain.fates.tolist()


def test_union_applies_where_the_teacher_sees_the_class_inside_the_area() -> None:
    """One truck pixel of the teacher, outside the area, is not enough; inside it is."""
    top, level = np.zeros((4, 6), np.uint8), np.full((4, 6), 3, np.uint8)
    coarse = np.full((4, 6), IGNORE, np.uint8)
    coarse[:, 3:] = 2
    policy = Policy(coarse_rules={"truck": "union"}, area=Area((0, 3), (0, 6)))
    top[3, 0] = 2
    assert (applied(policy, top, level, coarse).label != 2).all()
    top[0, 0] = 2
    found = applied(policy, top, level, coarse)
    assert (found.label[:, 3:] == 2).all()  # also below the area, as in the published loader
    assert found.from_human.tolist() == [0, 0, 12, 0]


def test_a_label_space_of_255_classes_is_decided_and_counted() -> None:
    space = LabelSpace("full", tuple(LabelClass(f"c{k}", (0, 0, 0), (k,)) for k in range(255)))
    top = np.arange(255, dtype=np.int16).repeat(2).reshape(17, 30)
    level = np.tile([0, 1], 255).reshape(17, 30)
    coarse = np.full((17, 30), 7, np.uint8)
    found = Rules(Policy(coarse="teacher-wins"), space, (0.5,)).apply((top * 2 + level).astype(np.int16), coarse)
    assert np.array_equal(found.label, np.where(level, top, 7))
    assert found.pixels.tolist() == [1 + (255 if c == 7 else 0) for c in range(255)]


def test_a_boundary_band_is_measured_in_rows_and_columns() -> None:
    top = np.zeros((7, 9), np.uint8)
    top[:, 5:] = 1
    assert near_boundary(top, 1).any(axis=0).nonzero()[0].tolist() == [4, 5]
    assert near_boundary(top, 2).all(axis=0).nonzero()[0].tolist() == [3, 4, 5, 6]
    assert not near_boundary(np.zeros((3, 3), np.uint8), 64).any()


def test_a_piece_of_exactly_smallest_piece_pixels_stays() -> None:
    label = np.full((5, 8), IGNORE, np.uint8)
    label[0, :3] = 1  # three pixels
    label[2, 0] = label[3, 1] = 1  # they touch at a corner only
    label[2:4, 4:6] = 0
    label[2, 6] = 2  # beside it, of another class
    assert np.argwhere(small_pieces(label, 3)).tolist() == [[2, 0], [2, 6], [3, 1]]
    assert not small_pieces(label, 1).any()


def snake(side: int) -> Map:
    """One line that turns at every border."""
    label = np.zeros((side, side), np.uint8)
    label[::2] = 1
    label[1::4, -1] = label[3::4, 0] = 1
    return label


def rings(side: int) -> Map:
    """Rings of one pixel around each other."""
    y, x = np.indices((side, side))
    return (np.minimum.reduce([y, x, side - 1 - y, side - 1 - x]) % 2).astype(np.uint8)


def test_pieces_are_those_that_are_found_by_hand() -> None:
    dice = np.random.default_rng(0)
    maps = [snake(31), snake(31).T, rings(21), np.full((3, 4), IGNORE, np.uint8), np.zeros((1, 1), np.uint8)]
    for _ in range(300):
        label = dice.integers(0, dice.integers(1, 5), dice.integers(1, 14, 2)).astype(np.uint8)
        label[dice.random(label.shape) < 0.1] = IGNORE
        maps.append(label)
    for label in maps:
        for fewest in (2, 5, 30):
            expected = np.zeros(label.shape, np.bool_)
            for piece in pieces_by_hand(label):
                expected[tuple(np.transpose(piece))] = len(piece) < fewest
            assert np.array_equal(small_pieces(label, fewest), expected), label


def test_an_area_that_leaves_the_image_is_refused() -> None:
    top, level, coarse = random_case(1)
    with pytest.raises(ValueError, match="leaves an image of 24 rows and 31 columns"):
        applied(Policy(area=Area((0, 25), (0, 31))), top, level, coarse)


def test_camvids_classes_fit_one_byte_with_eight_levels() -> None:
    rules = Rules(Policy(), CAMVID, Policy().edges(CAMVID, 8))
    assert rules.classes * rules.levels <= 256


def test_a_pixel_of_which_the_teacher_says_nothing_counts_for_no_class_and_may_be_decided_by_a_human() -> None:
    codes = np.array([[1 * 2 + 1, 1 * 2, 1 * 2]], np.uint8)  # one pixel of class 1, and two silent ones
    coarse = np.array([[255, 2, 255]], np.uint8)
    outcome = Rules(Policy(threshold=0.0, coarse="human-wins"), CAMVID, (0.0,), silent=True).apply(codes, coarse)
    assert outcome.label.tolist() == [[1, 2, 255]]
    assert (int(outcome.fates.sum()), int(outcome.fates[1, 0])) == (1, 1)
    assert outcome.from_human.tolist() == [0, 0, 1, *[0] * 8]
