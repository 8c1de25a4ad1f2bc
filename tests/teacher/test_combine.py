"""Scales that are mixed by a formula a little off, or in a band a row too high, give labels that look right.

Whatever is cut short on the way (bands instead of whole maps, a detour that is skipped) must give the very numbers that
plain torch gives on whole maps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from autolabel.teacher.networks import fields
from autolabel.teacher.networks.combine import (
    Average,
    Combination,
    Hierarchical,
    HierarchicalPairs,
    Part,
    ScaleOutput,
    rescaled_size,
)
from autolabel.teacher.networks.explicit import Explicit, ExplicitPairs
from autolabel.teacher.networks.fields import (
    Combined,
    Field,
    InMemory,
    Resized,
    Size,
    at_size,
    mean_with_mirrored,
    resized,
)

torch.set_num_threads(1)

CLASSES, FEATURES = 3, 6
THREE, FIVE = (0.5, 1.0, 2.0), (0.25, 0.5, 1.0, 1.5, 2.0)


def to(x: Tensor, size: Size) -> Tensor:
    """What a resize is: plain torch, all of the map at once."""
    return nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(hash(shape) % 2**31))


def assert_close(found: Tensor, expected: Tensor) -> None:
    """A band's place is found in float64, torch finds that of a whole map in float32; a row too far is off by 1."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


# --- maps that are computed where they are read -----------------------------------------------------------------------


def read_in_bands(field: Field, seed: int) -> Tensor:
    """The whole map from bands of random heights, one row among them."""
    dice, top, bands = torch.Generator().manual_seed(seed), 0, []
    while top < field.size[0]:
        height = 1 if not bands else int(torch.randint(1, 8, (), generator=dice))
        bands.append(field.rows(top, min(top + height, field.size[0])))
        top += height
    return torch.cat(bands, dim=2)


def made(kind: str, start: Size, size: Size) -> Field:
    """A field of each kind at `size`, from maps of size `start`."""
    source, other = InMemory(noise(2, 4, *start)), InMemory(noise(2, 4, *start) + 1)
    if kind == "in memory":
        return InMemory(noise(2, 4, *size))
    if kind == "resized":
        return resized(source, size)
    if kind == "resized twice":
        return resized(resized(source, (2 * start[0] + 1, 3 * start[1])), size)
    if kind == "combined":
        return Combined(lambda a, b: a * (1 - b), (resized(source, size), resized(other, size)))
    if kind == "a combination, resized":
        return resized(Combined(lambda a, b: a * b, (source, resized(other, start))), size)
    assert kind == "mirrored"
    return mean_with_mirrored(resized(source, size), resized(other, size))


KINDS = ["in memory", "resized", "resized twice", "combined", "a combination, resized", "mirrored"]


@pytest.mark.parametrize("device", ["CPU", "GPU"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("start", "size"),
    [
        pytest.param((12, 18), (45, 70), id="enlarged, odd"),
        pytest.param((16, 24), (64, 96), id="four times"),
        pytest.param((16, 24), (128, 192), id="eight times"),
        pytest.param((64, 96), (32, 48), id="halved"),
        pytest.param((90, 140), (45, 70), id="halved, odd"),
        pytest.param((67, 35), (45, 70), id="lower and wider"),
        pytest.param((101, 13), (7, 5), id="much smaller"),
        pytest.param((23, 31), (23, 31), id="as it is"),
        pytest.param((1, 5), (1, 70), id="one row"),
        pytest.param((1, 1), (9, 9), id="one pixel"),
        pytest.param((9, 9), (1, 1), id="to one pixel"),
    ],
)
def test_rows_of_a_field_are_rows_of_its_whole(
    kind: str, start: Size, size: Size, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the way of a GPU, gone here on the CPU."""
    monkeypatch.setattr(fields, "_on_cpu", lambda tensor: device == "CPU")
    field = made(kind, start, size)
    whole = field.whole()
    assert (field.size, whole.shape) == (size, (2, 4, *size))
    for seed in range(3):
        assert_close(read_in_bands(field, seed), whole)
    assert_close(field.rows(0, size[0]), whole)


@pytest.mark.parametrize(("start", "size"), [((12, 18), (45, 70)), ((90, 140), (45, 70)), ((5, 7), (1, 1))])
def test_a_resized_field_is_torchs_bilinear_resize(start: Size, size: Size) -> None:
    x = noise(2, 4, *start)
    assert torch.equal(Resized(InMemory(x), size).whole(), to(x, size))
    assert_close(Resized(InMemory(x), size).rows(0, size[0]), to(x, size))


def test_a_field_of_the_size_it_has_is_left_alone() -> None:
    field = InMemory(noise(1, 2, 5, 7))
    assert resized(field, (5, 7)) is field
    assert isinstance(resized(field, (7, 5)), Resized)


class Watched(Field):
    """Remembers which of its rows were asked for."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.asked = tensor, list[tuple[int, int]]()
        self.size = (tensor.shape[-2], tensor.shape[-1])

    def rows(self, top: int, bottom: int) -> Tensor:
        self.asked.append((top, bottom))
        return self.tensor[:, :, top:bottom]


def test_a_band_reads_only_the_rows_of_the_source_that_it_needs() -> None:
    for height, top, bottom, expected in (
        (16, 0, 4, (0, 2)),  # rows 0 to 3 of 64 lie above the middle of the source's second row
        (16, 30, 34, (7, 9)),
        (16, 60, 64, (14, 16)),
        (128, 10, 12, (20, 24)),
        (64, 10, 12, (10, 13)),  # a row lies on a row: its neighbour's share is none
    ):
        source = Watched(noise(1, 1, height, 8))
        Resized(source, (64, 8)).rows(top, bottom)
        assert source.asked == [expected]


def test_the_mean_with_the_mirrored_image_turns_it_back() -> None:
    once, mirrored = noise(1, 2, 5, 7), noise(1, 2, 5, 7) + 1
    field = mean_with_mirrored(InMemory(once), InMemory(mirrored))
    assert torch.equal(field.whole(), (once + mirrored.flip(-1)) / 2)
    assert torch.equal(mean_with_mirrored(InMemory(once), InMemory(once.flip(-1))).whole(), once)


# --- the detour over the largest maps ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "via"),
    [
        pytest.param((8, 12), (32, 48), id="4 times"),
        pytest.param((7, 11), (56, 88), id="8 times, odd"),
        pytest.param((5, 9), (60, 36), id="12 and 4 times"),
        pytest.param((1, 3), (4, 48), id="one row"),
    ],
)
def test_halving_what_was_enlarged_by_a_multiple_of_4_is_one_resize(start: Size, via: Size) -> None:
    x, size = noise(2, 4, *start), (via[0] // 2, via[1] // 2)
    field = at_size(x, via, size)
    assert isinstance(field, Resized) and isinstance(field.source, InMemory)  # the detour is skipped
    torch.testing.assert_close(field.whole(), to(to(x, via), size), rtol=0, atol=1e-5)
    assert_close(read_in_bands(field, 0), to(to(x, via), size))


@pytest.mark.parametrize(
    ("start", "via", "size"),
    [
        pytest.param((8, 12), (16, 24), (8, 12), id="2 times, then halved"),
        pytest.param((8, 12), (32, 24), (16, 12), id="2 times across"),
        pytest.param((8, 12), (16, 48), (8, 24), id="2 times down"),
        pytest.param((9, 11), (54, 66), (27, 33), id="6 times, then halved"),
        pytest.param((23, 36), (90, 142), (45, 71), id="odd sizes, rounded up"),
        pytest.param((8, 12), (32, 48), (8, 12), id="4 times, then a quarter"),
        pytest.param((8, 12), (32, 48), (24, 36), id="4 times, then three quarters"),
        pytest.param((8, 12), (12, 18), (16, 24), id="enlarged twice"),
    ],
)
def test_a_resize_through_another_size_is_done_in_two_steps(start: Size, via: Size, size: Size) -> None:
    """As the reference takes it: there a direct resize gives visibly other numbers."""
    x = noise(2, 4, *start)
    expected, direct = to(to(x, via), size), to(x, size)
    assert (expected - direct).abs().max() > 0.05
    field = at_size(x, via, size)
    assert torch.equal(field.whole(), expected)
    assert_close(read_in_bands(field, 0), expected)


def test_a_map_goes_through_every_size_it_is_sent_through() -> None:
    x = noise(1, 2, 8, 12)
    assert torch.equal(at_size(x, (8, 12)).whole(), x)
    assert torch.equal(at_size(x, (32, 48), (16, 24), (8, 12)).whole(), to(to(to(x, (32, 48)), (16, 24)), (8, 12)))


# --- the formulas -----------------------------------------------------------------------------------------------------


def predict(size: Size) -> ScaleOutput:
    """A network of stride 4 that sees noise."""
    height, width = -(-size[0] // 4), -(-size[1] // 4)
    return ScaleOutput(
        noise(1, CLASSES, height, width), noise(1, FEATURES, height, width), noise(1, CLASSES, height, width) + 9
    )


def awake(combination: Combination) -> Combination:
    """With every weight and running statistic drawn, so that no part of it is idle."""
    torch.manual_seed(3)
    for module in combination.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(cast(Tensor, tensor), 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(cast(Tensor, tensor), 0, 0.1)
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, 2 * module.weight[0].numel() ** -0.5)
    return combination.eval()


def layers_of(combination: Combination) -> nn.Sequential:
    return nn.Sequential(*combination.children())


def own_logits(size: Size, scales: Sequence[float]) -> dict[float, Tensor]:
    """Every scale's logits at the size of its input."""
    return {s: to(predict(rescaled_size(size, s)).logits, rescaled_size(size, s)) for s in scales}


def chained(logits: dict[float, Tensor], attention: dict[float, Tensor], size: Size) -> Tensor:
    """From the highest down: mixed at the lower scale's size down to 1, at the full size below it."""
    *others, top = sorted(logits)
    mixed = logits[top]
    for s in reversed(others):
        trust = to(attention[s], rescaled_size(size, s))
        if s >= 1:
            mixed = trust * logits[s] + (1 - trust) * to(mixed, rescaled_size(size, s))
        else:
            mixed = to(trust * logits[s], size) + (1 - to(trust, size)) * mixed
    return mixed


SIZES = [pytest.param((48, 64), id="even"), pytest.param((45, 70), id="odd"), pytest.param((1, 9), id="one row")]
CHAINS = [(1.0,), (0.5, 1.0), THREE, FIVE, (1.0, 1.5), (0.25, 0.3, 1.0, 4.0)]
every_size = pytest.mark.parametrize("size", SIZES)
every_chain = pytest.mark.parametrize("scales", CHAINS, ids=str)


def check(combination: Combination, size: Size, scales: Sequence[float], expected: Tensor) -> None:
    """Whole and in rows, whatever order the scales are named in."""
    with torch.inference_mode():
        field = combination.mix(combination.weigh(predict, size, scales=scales), size)
        assert_close(field.whole(), expected)
        assert_close(read_in_bands(field, 1), expected)
        shuffled = combination.weigh(predict, size, scales=scales[::-1])
        assert_close(combination.mix(shuffled, size).whole(), expected)
        assert_close(share_out(combination, size, scales), expected)


def share_out(combination: Combination, size: Size, scales: Sequence[float]) -> Tensor:
    """The combined logits again, from what each scale says and from its share in them."""
    parts = combination.weigh(predict, size, scales=scales)
    shares = combination.shares(parts, size).whole()
    assert shares.shape == (1, len(scales), *size)
    if not isinstance(combination, (Explicit, ExplicitPairs)):
        assert_close(shares.sum(dim=1), torch.ones(1, *size))
    if isinstance(combination, (Hierarchical, HierarchicalPairs)):
        return combination.mix(parts, size).whole()  # scales are mixed at another size: shares tell the trust alone
    own = [at_size(part.logits, part.size, size).whole() for part in parts]
    return cast(Tensor, sum(share.unsqueeze(1) * logits for share, logits in zip(shares.unbind(1), own, strict=True)))


@every_size
@every_chain
@torch.no_grad()
def test_an_average_is_the_mean_of_the_logits(size: Size, scales: tuple[float, ...]) -> None:
    """Its sizes are rounded to nearest, other than in the rest."""
    logits = []
    for s in scales:
        own = max(1, round(size[0] * s)), max(1, round(size[1] * s))
        logits.append(to(to(predict(own).logits, own), size))
    check(Average(), size, scales, torch.stack(logits).mean(dim=0))


@every_size
@every_chain
@torch.no_grad()
def test_a_hierarchy_trusts_each_scale_by_its_own_features(size: Size, scales: tuple[float, ...]) -> None:
    combination = cast(Hierarchical, awake(Hierarchical(FEATURES, 8)))
    attention = {}
    for s in sorted(scales)[:-1]:
        x = predict(rescaled_size(size, s)).features
        x = combination.bn0(combination.conv0(x)).relu()
        x = combination.bn1(combination.conv1(x)).relu()
        attention[s] = torch.sigmoid(combination.conv2(x))
    check(combination, size, scales, chained(own_logits(size, scales), attention, size))


def test_a_hierarchy_in_training_takes_statistics_of_both_scales_and_changes_nothing_else() -> None:
    """Labelling asks for attention at 1 and above too: with statistics of 0.5 alone it would be shifted there."""
    trained, size = cast(Hierarchical, awake(Hierarchical(FEATURES, 8)).train()), (48, 64)
    twin = copy.deepcopy(trained)
    low, high = trained.weigh(predict, size, scales=(0.5, 1.0))
    attention = [twin.attention(predict(rescaled_size(size, s)).features) for s in (0.5, 1.0)]  # low first
    assert low.attention is not None
    assert torch.equal(low.attention, attention[0])
    assert high.attention is None
    for (name, found), expected in zip(trained.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(found, expected), name
    assert [int(norm.num_batches_tracked or 0) for norm in (trained.bn0, trained.bn1)] == [2, 2]
    for sight in (low.attention, attention[0]):
        sight.sum().backward()  # type: ignore[no-untyped-call]
    for found, expected in zip(trained.parameters(), twin.parameters(), strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        assert torch.equal(found.grad, expected.grad)  # the higher scale pulls at nothing


@pytest.mark.parametrize(
    ("combination", "order"),
    [
        (Average(), (1.0,)),
        (Hierarchical(FEATURES, 8), (0.5, 1.0)),
        (HierarchicalPairs(FEATURES, 8), (0.5, 1.0)),
        (Explicit(FEATURES, 3, batch_norm=True), (1.0, 0.5, 2.0)),
        (ExplicitPairs(FEATURES, 8), (1.0, 0.5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Combination) else "",
)
def test_a_network_in_training_sees_scales_in_the_published_order(
    combination: Combination, order: tuple[float, ...]
) -> None:
    """Running statistics forget: the scale that is seen last weighs most."""
    seen = []

    def watched(size: Size) -> ScaleOutput:
        seen.append(size)
        return predict(size)

    combination.train().weigh(watched, (48, 64), scales=combination.training_scales)
    assert seen == [rescaled_size((48, 64), s) for s in order]


@every_size
@every_chain
@torch.no_grad()
def test_a_hierarchy_of_pairs_reads_the_next_higher_scale_too(size: Size, scales: tuple[float, ...]) -> None:
    combination = awake(HierarchicalPairs(FEATURES, 8))
    attention, chain = {}, sorted(scales)
    for lower, higher in pairwise(chain):
        mine, above = (predict(rescaled_size(size, s)).features for s in (lower, higher))
        attention[lower] = layers_of(combination)(torch.cat([mine, to(above, mine.shape[-2:])], dim=1))
    check(combination, size, scales, chained(own_logits(size, scales), attention, size))


def features_at_1(size: Size, scales: Sequence[float]) -> dict[float, Tensor]:
    at = cast(Size, tuple(predict(size).features.shape[-2:]))
    return {s: to(predict(rescaled_size(size, s)).features, at) for s in scales}


@every_size
@every_chain
@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch norm"])
@torch.no_grad()
def test_an_explicit_head_weighs_all_scales_at_once(batch_norm: bool, size: Size, scales: tuple[float, ...]) -> None:
    """It reads the features of scale 1 first, but gives weights in ascending order. They need not sum to 1."""
    combination = awake(Explicit(FEATURES, len(scales), batch_norm=batch_norm))
    features = features_at_1(size, scales)
    ordered = [features[1.0], *(features[s] for s in sorted(scales) if s != 1)]
    weights = layers_of(combination)(torch.cat(ordered, dim=1))
    grown = 0 if batch_norm else 2  # the plain head's last convolution is padded
    assert weights.shape[1:] == (len(scales), features[1.0].shape[-2] + grown, features[1.0].shape[-1] + grown)
    expected = sum(
        to(weights[:, i : i + 1], size) * to(logits, size)
        for i, (_, logits) in enumerate(sorted(own_logits(size, scales).items()))
    )
    check(combination, size, scales, cast(Tensor, expected))


@every_size
@every_chain
@torch.no_grad()
def test_explicit_pairs_share_out_each_lower_scales_weight(size: Size, scales: tuple[float, ...]) -> None:
    combination = awake(ExplicitPairs(FEATURES, 8))
    features, chain = features_at_1(size, scales), sorted(scales)
    weights, last = [torch.ones(1, 1, 1, 1)], None
    for lower, higher in pairwise(chain):
        pair = to(layers_of(combination)(torch.cat([features[lower], features[higher]], dim=1)), size)
        scaled = pair if last is None else pair * (last / pair.sum(dim=1, keepdim=True))
        weights[-1:] = [scaled[:, :1], scaled[:, 1:]]
        last = pair[:, 1:]
    own = own_logits(size, scales)
    expected = sum(weight * to(own[s], size) for weight, s in zip(weights, chain, strict=True))
    check(combination, size, scales, cast(Tensor, expected))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: Average(), id="average"),
        pytest.param(lambda: Hierarchical(FEATURES, 8), id="hierarchy"),
        pytest.param(lambda: HierarchicalPairs(FEATURES, 8), id="hierarchy of pairs"),
        pytest.param(lambda: Explicit(FEATURES, 3, batch_norm=False), id="explicit"),
        pytest.param(lambda: Explicit(FEATURES, 3, batch_norm=True), id="explicit, batch norm"),
        pytest.param(lambda: ExplicitPairs(FEATURES, 8), id="explicit pairs"),
    ],
)
@torch.no_grad()
def test_auxiliary_logits_are_mixed_like_the_others(make: Callable[[], Combination]) -> None:
    combination = awake(make())
    parts = combination.weigh(predict, (45, 70), scales=THREE)

    def pick(part: Part) -> Tensor:
        assert part.aux is not None
        return part.aux

    expected = combination.mix([replace(part, logits=pick(part)) for part in parts], (45, 70)).whole()
    found = combination.mix(parts, (45, 70), pick=pick).whole()
    assert torch.equal(found, expected)
    assert (found - combination.mix(parts, (45, 70)).whole()).abs().max() > 1


@torch.no_grad()
def test_full_trust_takes_one_scale_alone() -> None:
    """An attention of 1 takes the lower scale and nothing else, one of 0 the higher, at every pixel."""
    combination = Hierarchical(FEATURES, 8).eval()
    parts = sorted(combination.weigh(predict, (48, 64), scales=(0.5, 1.0)), key=lambda part: part.scale)
    low, high = own_logits((48, 64), (0.5, 1.0)).values()
    for trust, expected in ((1.0, to(low, (48, 64))), (0.0, high)):
        sure = replace(parts[0], attention=torch.full_like(cast(Tensor, parts[0].attention), trust))
        assert torch.equal(combination.mix([sure, parts[1]], (48, 64)).whole(), expected)
        shares = combination.shares([sure, parts[1]], (48, 64)).whole()
        assert shares[:, 0].unique().tolist() == [trust] and shares[:, 1].unique().tolist() == [1 - trust]


@pytest.mark.parametrize(
    ("scales", "given"), [((1.0,), "1"), ((0.5, 1.0), "0.5,1"), ((0.25, 0.5, 1.0, 2.0), "0.25,0.5,1,2")]
)
def test_another_number_of_scales_than_a_head_was_built_for_is_refused(scales: tuple[float, ...], given: str) -> None:
    with pytest.raises(ValueError, match=f"^scales {given}: this network weighs exactly 3 scales at once$"):
        Explicit(FEATURES, 3, batch_norm=False).require(scales)


def test_every_other_combination_takes_any_scales() -> None:
    for scales in CHAINS:
        Explicit(FEATURES, len(scales), batch_norm=True).require(scales)
        for combination in (Average(), Hierarchical(4, 4), HierarchicalPairs(4, 4), ExplicitPairs(4, 4)):
            combination.require(scales)


@pytest.mark.parametrize("scales", [-1, 0, 6])
def test_a_head_for_no_scale_or_too_many_is_refused(scales: int) -> None:
    with pytest.raises(ValueError, match=f"^{scales} scales: an explicit combination weighs 1 to 5 of them$"):
        Explicit(FEATURES, scales, batch_norm=True)


def test_a_copy_is_never_smaller_than_one_pixel() -> None:
    assert rescaled_size((1, 3), 0.25) == (1, 1)
    assert rescaled_size((45, 70), 0.5) == (22, 35)
    assert rescaled_size((45, 70), 1.5) == (67, 105)
