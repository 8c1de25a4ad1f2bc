"""A focus computes the highest scale in a band: the right rows, the right numbers, whatever the batch and the flip."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from autolabel.teacher.around import MappedNetwork, OwnNetwork
from autolabel.teacher.decide import SPARE_SHARE, Swings, least_probability
from autolabel.teacher.networks.build import build
from autolabel.teacher.networks.combine import (
    Average,
    Combination,
    Hierarchical,
    HierarchicalPairs,
    Part,
    ScaleOutput,
)
from autolabel.teacher.networks.decoders import SegmentationNet
from autolabel.teacher.networks.explicit import ExplicitPairs
from autolabel.teacher.networks.focus import Bands, focused
from autolabel.teacher.networks.hrnet import resize

SCALES = (0.5, 1.0, 2.0)
CPU = torch.device("cpu")


class Local(SegmentationNet):
    """Logits at stride 4 of 4 x 4 pixels each, so that a band has the very numbers of the whole; and the mean of all.

    seen: sizes of the images that it was shown, and whether a mean was given.
    """

    def __init__(self, combination: Combination, *, pools: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.classes = self.features = 5
        self.conv = nn.Conv2d(3, 5, 4, stride=4)
        self.conv.weight.data *= 5
        self.pools, self.scale_attn = pools, combination
        self.seen: list[tuple[int, int, bool]] = []

    def predict(self, images: Tensor, *, context: Tensor | None = None) -> ScaleOutput:
        self.seen.append((images.shape[-2], images.shape[-1], context is not None))
        maps = self.conv(images)
        mean = maps.mean(dim=(2, 3), keepdim=True) if context is None else context
        maps = maps + self.pools * mean
        return ScaleOutput(maps, maps, context=mean)


def attentive() -> Hierarchical:
    torch.manual_seed(1)
    return Hierarchical(5, 4).eval()


def streets(images: int, height: int = 160, width: int = 64) -> Tensor:
    """Images with more going on in some rows than in others, and not in the same."""
    torch.manual_seed(0)
    noise = torch.randn(images, 3, height, width)
    row = torch.arange(height).view(1, 1, -1, 1)
    busy = torch.tensor([0.2, 0.8, 0.5][:images]).view(-1, 1, 1, 1) * height
    return 0.2 * noise + 2 * noise.mean(dim=1, keepdim=True) * (-(((row - busy) / 12) ** 2)).exp()


def test_bands_of_one_size_have_one_height_and_cover_the_image() -> None:
    bands = Bands.of(720, share=0.25)
    assert bands == Bands(height=720, rows=304, halo=64, step=32)  # 180 + 2 * 64, and even
    starts = bands.starts(CPU)
    assert starts.tolist() == list(range(0, 417, 32))
    assert int(starts[-1]) + bands.rows == 720
    top, bottom = bands.used(torch.tensor([0, 32, 384, 416]))
    assert (top.tolist(), bottom.tolist()) == ([0, 96, 448, 480], [240, 272, 624, 720])
    assert Bands.of(2048, share=0.25) == Bands(2048, 640, 64, 32)
    assert Bands.of(2048, share=0.25, multiple=14) == Bands(2048, 896, 224, 224)  # networks that cut images into 14s


@pytest.mark.parametrize("height", [720, 700, 333, 2047])
def test_every_row_is_used_by_some_band_and_the_last_one_ends_with_the_image(height: int) -> None:
    bands = Bands.of(height, share=0.2)
    assert bands is not None
    top, bottom = bands.used(bands.starts(CPU))
    used = torch.zeros(height, dtype=torch.bool)
    for first, last in zip(top.tolist(), bottom.tolist(), strict=True):
        used[first:last] = True
    assert used.all()


def test_an_image_that_a_band_and_its_halo_would_cover_has_no_bands() -> None:
    assert Bands.of(192, share=0.4) is None
    assert Bands.of(208, share=0.3) is not None
    assert Bands.of(720, share=1.0) is None


def test_the_band_lies_where_the_score_is_largest() -> None:
    bands = Bands.of(720, share=0.25)
    assert bands is not None
    score = torch.zeros(3, 90)  # one row of the score is 8 rows of the image at scale 2
    score[0, 40] = score[1, 0] = score[2, 89] = 1.0
    starts = bands.best(score)
    top, bottom = bands.used(starts)
    assert ((top <= torch.tensor([320, 0, 712])) & (torch.tensor([328, 8, 720]) <= bottom)).all()
    assert starts[1:].tolist() == [0, 416]


@torch.inference_mode()
@pytest.mark.parametrize("combination", [attentive, Average])
def test_rows_that_were_seen_have_the_whole_scales_numbers_and_others_those_that_stand_in(
    combination: type[Combination],
) -> None:
    network = Local(combination()).eval()
    images = streets(3)
    field = focused(network, images, SCALES, share=0.3, combination=network.scale_attn)
    parts = network.parts(images, SCALES)
    whole = network.scale_attn.mix(parts, (160, 64)).whole()
    stand_in = {part.scale: part for part in parts}[1.0].logits
    parts = [Part(2.0, p.size, resize(stand_in, p.logits.shape[-2:])) if p.scale == 2 else p for p in parts]
    without = network.scale_attn.mix(parts, (160, 64)).whole()
    assert len({tuple(rows) for rows in field.seen.tolist()}) > 1  # each image has its own band
    for image, (top, bottom) in enumerate(field.seen.tolist()):
        assert 0 <= top < bottom <= 160
        inner = slice(top + 2 * (top > 0), bottom - 2 * (bottom < 160))  # enlarged maps mix neighbouring rows
        assert_close(field.whole()[image, :, inner], whole[image, :, inner])
        assert not torch.allclose(field.whole()[image, :, inner], without[image, :, inner])
        for outer in (slice(0, max(top - 2, 0)), slice(bottom + 2, 160)):
            assert_close(field.whole()[image, :, outer], without[image, :, outer])


@torch.inference_mode()
def test_the_network_sees_one_band_at_the_highest_scale_and_the_next_lower_scales_context() -> None:
    network = Local(attentive(), pools=0.5).eval()
    focused(network, streets(2), SCALES, share=0.25, combination=network.scale_attn)
    assert network.seen == [(80, 32, False), (160, 64, False), (192, 128, True)]


@torch.inference_mode()
def test_an_image_looks_the_same_in_any_batch_and_mirrored_in_the_same_rows() -> None:
    network = Local(attentive()).eval()
    images = streets(3)
    together = focused(network, images, SCALES, share=0.3, combination=network.scale_attn)
    for number in range(3):
        alone = focused(network, images[number : number + 1], SCALES, share=0.3, combination=network.scale_attn)
        assert torch.equal(alone.seen[0], together.seen[number])
        assert_close(alone.whole()[0], together.whole()[number])
    own = OwnNetwork(network, network.scale_attn, device=CPU)
    pixels = (128 + 40 * images).clamp(0, 255).to(torch.uint8)
    plain, both = (own.field(pixels, SCALES, flip=flip, focus=0.3) for flip in (False, True))
    assert torch.equal(plain.seen, both.seen)  # type: ignore[attr-defined]
    assert not torch.equal(plain.whole(), both.whole())


@torch.inference_mode()
def test_an_image_too_small_for_a_band_is_seen_whole() -> None:
    network = Local(attentive()).eval()
    images = streets(2, height=60)
    field = focused(network, images, SCALES, share=0.25, combination=network.scale_attn)
    assert torch.equal(field.whole(), network.logits(images, SCALES))
    assert field.seen.tolist() == [[0, 60], [0, 60]]


@torch.inference_mode()
def test_the_share_left_to_the_highest_scale_is_that_of_the_mix() -> None:
    network = Local(attentive()).eval()
    images = streets(2)
    field = focused(network, images, SCALES, share=0.25, combination=network.scale_attn)
    shares = network.scale_attn.shares(network.parts(images, SCALES), (160, 64)).whole()
    assert_close(field.left().whole(), shares[:, 2:])
    mean = focused(network, images, SCALES, share=0.25, combination=Average())
    assert_close(mean.left().whole(), torch.full((2, 1, 160, 64), 1 / 3))


@torch.inference_mode()
def test_classes_that_are_mapped_keep_the_rows_that_were_seen() -> None:
    network = Local(attentive()).eval()
    own = OwnNetwork(network, network.scale_attn, device=CPU)
    mapped = MappedNetwork(own, [0, 0, 1, 1, 255], classes=2, device=CPU)
    pixels = (128 + 40 * streets(2)).clamp(0, 255).to(torch.uint8)
    field = mapped.field(pixels, SCALES, flip=False, focus=0.3)
    plain = own.field(pixels, SCALES, flip=False, focus=0.3)
    assert torch.equal(field.seen, plain.seen)  # type: ignore[attr-defined]
    assert field.probable
    assert_close(field.whole()[:, 0], plain.whole().softmax(dim=1)[:, :2].sum(dim=1))


@torch.inference_mode()
@pytest.mark.thorough
@pytest.mark.parametrize(
    "arch", ["hrnet18s_ocr_mscale", "efficientnet_lite0_aspp_mscale", "resnet50_deeplabv3plus_mscale"]
)
def test_a_real_networks_band_has_nearly_the_whole_scales_logits(arch: str) -> None:
    torch.manual_seed(0)
    network, images = build(arch, 7).eval(), streets(1, 200, 192)
    field = focused(network, images, SCALES, share=0.3, combination=network.scale_attn)
    whole = network.logits(images, SCALES)
    top, bottom = field.seen[0].tolist()
    seen, spread = (field.whole() - whole)[:, :, top + 2 : bottom - 2].abs(), whole.std()
    assert float(seen.mean() / spread) < 0.1


def test_scales_without_one_above_the_image_and_other_combinations_are_refused() -> None:
    for combination, scales in ((Average(), (1.0,)), (Average(), (0.5, 1.0)), (attentive(), (0.5, 1.0))):
        with pytest.raises(ValueError, match=re.escape("expected a scale above 1 besides, such as 0.5,1,2")):
            combination.require_focus(scales)
    for other in (HierarchicalPairs(5, 4), ExplicitPairs(5, 4)):
        with pytest.raises(ValueError, match="it has to see all of it: combine by average, or leave focus out"):
            other.require_focus(SCALES)


def test_the_least_probability_is_that_of_odds_that_fall_by_share_times_swing() -> None:
    winner = torch.tensor([[[0, 1, 1, 0]]], dtype=torch.uint8)
    confidence = torch.tensor([[[0.9, 0.9, 0.6, 1.0]]])
    share = torch.tensor([[[0.5, 0.25, 0.5, 1.0]]])
    swings = Swings(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 4.0]))
    for seen, log_odds in ((True, [0.5, 0.0, 0.0, 1.0]), (False, [1.0, 1.0, 2.0, 2.0])):
        least = least_probability(winner, confidence, share, swings, seen=torch.tensor([[[seen]]]))
        odds = [p / max(1 - p, 2**-23) for p in (0.9, 0.9, 0.6, 1.0)]
        expected = [o / (o + math.exp(fall)) for o, fall in zip(odds, log_odds, strict=True)]
        expected = [p if p > 0.5 else 0 for p in expected]
        assert_close(least.flatten(), torch.tensor(expected))
    assert least.flatten()[2] == 0
    assert SPARE_SHARE > 0
