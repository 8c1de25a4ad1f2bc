"""Coarse labels as people draw them, made out of fine ones by three hands.

`even` leaves the same margin around everything, as simulated labels mostly do: the distance to a polygon then gives the
class away. `rough` leaves a margin of its own around every piece, shifts it, and forgets some. `crossing` outlines with
few corners, across small and thin things too, so that 3 % of what it names is wrong, as in Cityscapes (Cordts et al.,
arXiv 1604.01685: 97 % of the pixels of coarse polygons agree with the fine label). How its mistakes lie is a guess:
half within 3 pixels of a polygon's edge, five of six within 10. Distances are given for images 480 pixels wide, and
grow with the width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.label_space import IGNORE

HANDS = ("even", "rough", "crossing")
LEAST = 350  # pixels: nobody draws smaller pieces
_LEAST_DRAWN = 120  # pixels of what remains of a piece: nobody draws less
_THICK = 6.0  # half of the thickness of things that are rarely forgotten
_FORGETS, _FORGETS_THIN = 0.07, 0.5  # shares of pieces that are not drawn

Labels = NDArray[np.uint8]


def coarsen(fine: Labels, hand: str, *, seed: int | str = 0) -> Labels:
    """Draw a coarse label (H, W) uint8 out of a fine one (H, W) uint8; 255 is ignored, all other values are classes.

    hand: one of HANDS. seed: the same number or text always gives the same label; `even` knows no chance. Raises
    ValueError for another hand.
    """
    if hand not in HANDS:
        raise ValueError(f"hand {hand!r}: expected {', '.join(HANDS)}")
    unit = fine.shape[1] / 480
    dice = np.random.default_rng(np.frombuffer(hashlib.sha256(str(seed).encode()).digest(), np.uint32))
    coarse = np.full(fine.shape, IGNORE, np.uint8)
    pieces = list(_pieces(fine, LEAST * unit * unit, round(14 * unit)))
    if hand == "crossing":  # from the back to the front: what is drawn later lies on top
        pieces.sort(key=lambda piece: -piece.pixels)
    draw = {"even": _even, "rough": _rough, "crossing": _crossing}[hand]
    for piece in pieces:
        drawn = draw(piece.mask, unit, dice)
        if drawn is not None:
            coarse[piece.box][drawn > 0] = piece.label
    return coarse


@dataclass(frozen=True)
class _Piece:
    """A connected piece of a class: its mask (h, w) uint8 of 0 and 1 in a box of the label."""

    label: int
    pixels: int
    box: tuple[slice, slice]
    mask: Labels


def _pieces(fine: Labels, least: float, around: int) -> Iterator[_Piece]:
    """Yield the connected pieces of at least so many pixels, in boxes with so many pixels around them."""
    for label in np.flatnonzero(np.bincount(fine.ravel(), minlength=256)[:IGNORE]).tolist():
        count, numbers, found, _ = cv2.connectedComponentsWithStats((fine == label).view(np.uint8), connectivity=8)
        for number in range(1, count):
            left, top, width, height, pixels = map(int, found[number])
            if pixels >= least:
                rows = slice(max(0, top - around), top + height + around)
                columns = slice(max(0, left - around), left + width + around)
                mask = (numbers[rows, columns] == number).view(np.uint8)
                yield _Piece(label, pixels, (rows, columns), mask)


def _even(mask: Labels, unit: float, dice: np.random.Generator) -> Labels | None:
    """A margin of 3 pixels everywhere, straight lines within 3 pixels, and nothing outside the piece."""
    drawn = np.zeros(mask.shape, np.uint8)
    for line in _outlines(cv2.erode(mask, _disc(3 * unit)), unit, holes=False):
        cv2.fillPoly(drawn, [cv2.approxPolyDP(line, 3 * unit, closed=True)], 1)
    return drawn & mask


def _rough(mask: Labels, unit: float, dice: np.random.Generator) -> Labels | None:
    """A margin of 2 to 8 pixels, the same all around a piece; then it is smoothed, and shifted by up to 3 pixels."""
    depth = _depth(mask)
    if _forgotten(depth, unit, dice):
        return None
    margin, shift = dice.uniform(2, 8) * unit, dice.uniform(-3, 3, 2) * unit
    inside = _smooth(depth > margin, unit)
    if int(inside.sum()) < _LEAST_DRAWN * unit * unit:
        return None
    moves = np.array([[1, 0, round(shift[0])], [0, 1, round(shift[1])]], np.float32)
    size, near = mask.shape[::-1], cv2.INTER_NEAREST
    return cast(Labels, cv2.warpAffine(inside, moves, size, flags=near, borderMode=cv2.BORDER_REPLICATE))


def _crossing(mask: Labels, unit: float, dice: np.random.Generator) -> Labels | None:
    """Few corners, each a little off, around a piece that has grown or shrunk, across holes and thin things in it."""
    depth = _depth(mask)
    if _forgotten(depth, unit, dice):
        return None
    care = min(unit, float(depth.max()) / _THICK)  # thin things are drawn with more care, or they would be missed
    margin, within = dice.uniform(-4.5, 14), dice.uniform(2, 7) * care
    shift, over = dice.normal(0, 2.5, 2) * care, _disc(dice.uniform(0, 4) * unit)
    whole = cast(Labels, cv2.morphologyEx(_without_holes(mask, LEAST * unit * unit), cv2.MORPH_CLOSE, over))
    inside = _smooth(_depth(whole) - _depth(1 - whole) > margin * (care if margin < 0 else unit), care)
    drawn, corners = np.zeros(mask.shape, np.uint8), []
    for line in _outlines(inside, unit, holes=True):
        few = cv2.approxPolyDP(line, within, closed=True)
        corners.append(np.rint(few + shift + dice.normal(0, 2 * care, few.shape)).astype(np.int32))
    return cast(Labels, cv2.fillPoly(drawn, corners, 1)) if corners else None


def _forgotten(depth: NDArray[np.float32], unit: float, dice: np.random.Generator) -> bool:
    """Decide whether a piece is left out: one of many that are thick, half of those that are thin."""
    return bool(dice.random() < (_FORGETS if float(depth.max()) >= _THICK * unit else _FORGETS_THIN))


def _depth(mask: Labels) -> NDArray[np.float32]:
    """The distance of every pixel of a mask to the next pixel outside; the edge of the array is no border."""
    if mask.all():
        return np.full(mask.shape, 1e6, np.float32)
    return cast(NDArray[np.float32], cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_5))


def _without_holes(mask: Labels, least: float) -> Labels:
    """The mask with the holes filled that have fewer pixels than `least`."""
    count, numbers, found, _ = cv2.connectedComponentsWithStats(1 - mask, connectivity=4)
    small = np.arange(count)[found[:, cv2.CC_STAT_AREA] < least]
    return mask | np.isin(numbers, small[small > 0]).view(np.uint8)


def _disc(radius: float) -> Labels:
    size = 2 * round(radius) + 1
    return cast(Labels, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)))


def _smooth(inside: NDArray[np.bool_], unit: float) -> Labels:
    return cast(Labels, cv2.morphologyEx(inside.view(np.uint8), cv2.MORPH_OPEN, _disc(2 * unit)))


def _outlines(mask: cv2.typing.MatLike, unit: float, *, holes: bool) -> list[cv2.typing.MatLike]:
    """The outlines of a mask that enclose enough, those of its holes too if they are wanted."""
    lines, _ = cv2.findContours(mask, cv2.RETR_CCOMP if holes else cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [line for line in lines if cv2.contourArea(line) >= _LEAST_DRAWN * unit * unit]
