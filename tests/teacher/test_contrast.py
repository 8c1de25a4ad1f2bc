"""A swing that is measured too small certifies labels that the highest scale would change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_focus import Local, attentive
from torch import Tensor

from autolabel.manifests.label_space import IGNORE
from autolabel.teacher.around import MappedNetwork
from autolabel.teacher.contrast import PER_UNIT, contrasts
from autolabel.teacher.decide import SPARE_SHARE
from autolabel.teacher.networks.combine import Average, ScaleOutput
from autolabel.teacher.networks.decoders import SegmentationNet
from autolabel.teacher.networks.focus import Focused
from autolabel.teacher.predict import Teacher

SCALES = (0.5, 1.0, 2.0)
C = 5


def street() -> np.ndarray:
    dice = np.random.default_rng(2)
    return np.kron(dice.integers(0, 256, (20, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)  # 160 x 64, in blocks


def odds(logits: list[float], winner: int) -> float:
    return logits[winner] - math.log(sum(math.exp(x) for c, x in enumerate(logits) if c != winner))


@pytest.mark.parametrize("flip", [False, True])
def test_swings_labels_and_changes_are_those_of_a_plain_loop(flip: bool) -> None:
    teacher = Teacher(Local(attentive()))
    image = street()
    seen, (found,) = contrasts(teacher, image, scales=SCALES, flip=flip, shares=(0.3,))
    z, y = (teacher.logits(image, scales=SCALES, flip=flip, focus=f).permute(1, 2, 0).tolist() for f in (None, 0.3))
    with torch.inference_mode():
        field = teacher.network.field(teacher.feed.upload([image])[0], SCALES, flip=flip, focus=0.3)
    assert isinstance(field, Focused)
    left, (first, last) = field.left().whole()[0, 0].tolist(), field.seen[0].tolist()
    needed, differing = np.zeros((2, C)), 0
    labels, changed = ({limit: 0 for limit in (0, 1, 4)} for _ in range(2))
    for row in range(160):
        for column in range(64):
            whole, own = z[row][column], y[row][column]
            winner = own.index(max(own))
            a, b = odds(own, winner), odds(whole, winner)
            kept = winner if a > 0 else IGNORE
            true = whole.index(max(whole)) if odds(whole, whole.index(max(whole))) > 0 else IGNORE
            differing += kept != true
            if a > 0:
                share = left[row][column] + SPARE_SHARE
                zone = int(not first <= row < last)
                needed[zone, winner] = max(needed[zone, winner], (a - b) / share)
                for limit in labels:
                    labels[limit] += a / share > limit
                    changed[limit] += a / share > limit and kept != true
    assert found.rows == (first, last) and found.differing == differing > 0
    assert found.needed == pytest.approx(needed, rel=1e-3, abs=5e-3)  # 1 - p near 1 has few digits
    for limit in labels:
        assert found.labels[..., limit * PER_UNIT :].sum() == labels[limit] > 0
        assert found.changed[..., limit * PER_UNIT :].sum() == changed[limit]
    assert changed[0] > 0
    assert np.array_equal(found.top, np.array(y).argmax(axis=2))
    assert np.array_equal(seen.top, np.array(z).argmax(axis=2))
    assert (found.label != seen.label).sum() == differing
    assert found.seconds > 0 < seen.seconds


class Swinging(SegmentationNet):
    """Logits 5 and 0 of two classes, everywhere; at scale 2 the first is lower by `fall`."""

    def __init__(self, fall: float) -> None:
        super().__init__()
        self.classes = self.features = 2
        self.fall, self.scale_attn = fall, Average()

    def predict(self, images: Tensor, *, context: Tensor | None = None) -> ScaleOutput:
        size = images.shape[-2] // 4, images.shape[-1] // 4
        maps = images.new_zeros(len(images), 2, *size)
        maps[:, 0] = 5 - self.fall * (images.shape[-1] > 64)
        return ScaleOutput(maps, maps)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("fall", [3.0, 12.0])
def test_a_scale_that_swings_by_a_known_amount_needs_just_that(fall: float, mapped: bool) -> None:
    """The mean of two scales leaves half to the higher one."""
    teacher = Teacher(Swinging(fall))
    if mapped:
        teacher.network = MappedNetwork(teacher.network, [1, 0], classes=2, device=torch.device("cpu"))
    winner = int(mapped)
    _, (found,) = contrasts(teacher, street(), scales=(1.0, 2.0), flip=False, shares=(0.3,))
    first, last = found.rows
    assert (found.top[:first] == winner).all() and (found.top[last:] == winner).all()
    beyond = (160 - last + first) * 64
    assert found.needed[1, winner] == pytest.approx(fall / 2 / (0.5 + SPARE_SHARE), rel=1e-3)
    assert found.needed[1, 1 - winner] == 0 and found.labels[1].sum() == beyond
    assert found.needed[0].max() <= found.needed[1].max()  # its outer rows are mixed with those beyond
    assert found.differing == found.changed.sum()
    assert found.changed[1].sum() == (beyond if fall > 10 else 0)  # 5 - 12 / 2 is below 0
