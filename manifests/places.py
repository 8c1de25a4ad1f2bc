"""Places around people's polygons: which one is nearest to a pixel that nobody named, and how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.evidence import INSIDE, OUTSIDE
from autolabel.manifests.label_space import IGNORE, VOID

NOWHERE = 0  # the place of a pixel of which polygons say nothing
Places = NDArray[np.int16]
_Distance = NDArray[np.float32]


def places(coarse: NDArray[np.uint8], classes: int) -> Places:
    """The place of every pixel (H, W) int16 around the polygons of a coarse label (H, W) uint8.

    1 + n * bins + bin where nobody named a class and the nearest polygon is of class n, at a distance in that bin of
    `OUTSIDE`; NOWHERE in polygons, drawn void included, and everywhere if the label has no polygon of a class.
    """
    named = coarse < classes
    if not named.any():
        return np.zeros(coarse.shape, np.int16)
    distance, owner, class_of = _nearest(coarse, named)
    unnamed = np.flatnonzero(~(named | (coarse == VOID)))
    place = np.full(coarse.size, NOWHERE, np.int16)
    bins = _bins(distance.ravel()[unnamed], OUTSIDE, coarse.shape[1])
    place[unnamed] = class_of[owner.ravel()[unnamed]] * np.int16(len(OUTSIDE) + 1) + (bins + np.int16(1))
    return place.reshape(coarse.shape)


def without_void(coarse: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A coarse label (H, W) uint8 in which drawn void is 255, as everything else that is no class."""
    return np.where(coarse == VOID, np.uint8(IGNORE), coarse)


def depths(coarse: NDArray[np.uint8]) -> NDArray[np.int16]:
    """The bin of `INSIDE` (H, W) int16 of every pixel's depth: its distance to the nearest other value."""
    same = np.ones(coarse.shape, np.uint8)
    for here, there in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differs = coarse[here] != coarse[there]
        same[here][differs], same[there][differs] = 0, 0
    distance = cv2.distanceTransform(same, cv2.DIST_L2, cv2.DIST_MASK_5) if not same.all() else same * np.float32(1e6)
    return _bins(cast(_Distance, distance) + 1, INSIDE, coarse.shape[1])


def _nearest(
    coarse: NDArray[np.uint8], named: NDArray[np.bool_]
) -> tuple[_Distance, NDArray[np.int32], NDArray[np.int16]]:
    """Distance to the nearest named pixel in pixels, that pixel's number, and the class of every number.

    OpenCV sums integers, so all CPUs agree.
    """
    distance, owner = cv2.distanceTransformWithLabels(
        (~named).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    class_of = np.zeros(int(owner.max()) + 1, np.int16)
    class_of[owner[named]] = coarse[named]
    return cast(_Distance, distance), cast(NDArray[np.int32], owner), class_of


def _bins(distance: _Distance, ends: Sequence[float], width: int) -> NDArray[np.int16]:
    """The number of ends that a distance reaches."""
    bins = np.zeros(distance.shape, np.int16)
    for end in ends:
        bins += distance >= np.float32(end * width)
    return bins
