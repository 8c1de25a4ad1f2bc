"""One byte a pixel is all that leaves the device; a tie broken the other way, or a threshold rounded, is never noticed.

Everything here is checked against the plain formulas in numpy, on numbers chosen to be as awkward as floats can be.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.schemas import CONFIDENCE_BINS
from autolabel.teacher import counting
from autolabel.teacher.counting import confidence_bins, count, count_together
from autolabel.teacher.decide import bands, encode, keep, top_class, top_classes
from autolabel.teacher.networks.fields import Field, InMemory, Size, at_size

torch.set_num_threads(1)

CPU = torch.device("cpu")
EDGES = np.arange(CONFIDENCE_BINS + 1, dtype=np.float32) / np.float32(CONFIDENCE_BINS)


def noise(*shape: int, seed: int = 0, spread: float = 4) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decided(winners: Tensor, confidences: Tensor, threshold: float, classes: int) -> Tensor:
    """The label of one threshold."""
    return torch.from_numpy(keep(encode(winners, confidences, classes=classes, edges=(threshold,)).numpy(), classes))


def of_classes(*logits: float) -> Tensor:
    """One pixel's logits as an image."""
    return torch.tensor(logits).view(1, -1, 1, 1)


def below(x: float) -> float:
    return float(np.nextafter(np.float32(x), np.float32(-np.inf)))


def above(x: float) -> float:
    return float(np.nextafter(np.float32(x), np.float32(np.inf)))


# --- the top class and its probability --------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1e-3, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("classes", [1, 2, 19, 65, 255])
def test_the_top_class_and_its_softmax_probability(classes: int, spread: float) -> None:
    logits = noise(2, classes, 31, 45, seed=classes, spread=spread)
    winner, confidence = top_class(logits)
    assert (winner.dtype, confidence.dtype) == (torch.uint8, torch.float32)
    assert torch.equal(winner.long(), logits.argmax(dim=1))
    expected = torch.softmax(logits.double(), dim=1).amax(dim=1)
    torch.testing.assert_close(confidence.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("logits", "winner", "probability"),
    [
        pytest.param((0.0, 0.0), 0, 1 / 2, id="two equal"),
        pytest.param((-1.0, 2.0, 2.0, 2.0, -1.0), 1, None, id="the lowest of three"),
        pytest.param((0.0,) * 255, 0, 1 / 255, id="255 equal"),
        pytest.param((*(0.0,) * 254, 1e-36), 254, 1 / 255, id="ahead by next to nothing"),
        pytest.param((1.0, above(1.0)), 1, 1 / 2, id="ahead by one float"),
        pytest.param((above(1.0), 1.0), 0, 1 / 2, id="behind by one float"),
        pytest.param((1e30, above(1e30)), 1, 1.0, id="huge, ahead by one float"),
        pytest.param((-1e30, 1e30, 0.0), 1, 1.0, id="as far apart as can be"),
        pytest.param((1e30, 1e30, -1e30), 0, 1 / 2, id="huge and equal"),
        pytest.param((-1e30, -1e30, -1e30), 0, 1 / 3, id="hugely negative and equal"),
        pytest.param((-0.0, 0.0), 0, 1 / 2, id="minus nothing and nothing"),
        pytest.param((-90.0, 0.0), 1, 1.0, id="an exponential that vanishes"),
        pytest.param((7.0,), 0, 1.0, id="one class"),
    ],
)
def test_equal_and_extreme_logits_give_a_top_class_and_a_finite_probability(
    logits: tuple[float, ...], winner: int, probability: float | None
) -> None:
    found, confidence = top_class(of_classes(*logits))
    assert found.item() == winner == np.argmax(np.float32(logits))
    expected = probability or torch.softmax(torch.tensor(logits), dim=0).amax().item()
    assert confidence.item() == pytest.approx(expected, rel=1e-6)


def test_among_equals_the_lowest_class_wins_wherever_they_are() -> None:
    logits = noise(1, 255, 16, 16).clamp(max=2)  # many at the very top
    assert ((logits == 2).sum(dim=1) > 10).all()
    assert torch.equal(top_class(logits)[0].long(), (logits == 2).int().argmax(dim=1))


@pytest.mark.parametrize("classes", [2, 19, 255])
def test_labels_are_those_of_the_full_softmax(classes: int) -> None:
    """On a megapixel at most: not one pixel off, save where the probability is within a rounding of the threshold."""
    logits = noise(1, classes, 256, 1024 if classes < 100 else 128, seed=9, spread=2)
    winner, confidence, *_ = top_classes(InMemory(logits), 1, classes=classes, device=CPU)
    softmax = torch.softmax(logits, dim=1)
    probability, expected = softmax.amax(dim=1), logits.argmax(dim=1)
    assert torch.equal(winner.long(), expected)
    assert (confidence - probability).abs().max() < 1e-6
    for threshold in (0.1, 0.5, 0.9):
        label = decided(winner, confidence, threshold, classes)
        plain = torch.where(probability > threshold, expected, IGNORE)
        close = (probability - threshold).abs() < 1e-6
        assert torch.equal(label[~close].long(), plain[~close])
        assert close.float().mean() < 1e-4


# --- keep or ignore ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3, 0.5, 0.7, 0.95, 0.999])
def test_a_confidence_must_exceed_the_threshold_as_a_float(threshold: float) -> None:
    t = float(np.float32(threshold))
    confidences = torch.tensor([[below(t), t, above(t)]])
    assert decided(torch.tensor([[4, 5, 6]], dtype=torch.uint8), confidences, t, 7).tolist() == [[255, 255, 6]]


def test_every_class_and_none_but_classes_are_kept() -> None:
    winners = torch.arange(255, dtype=torch.uint8).view(1, 255)
    kept = decided(winners, torch.full((1, 255), 0.75), 0.5, 255)
    assert kept.dtype == torch.uint8 and torch.equal(kept, winners)
    assert (decided(winners, torch.full((1, 255), 0.5), 0.5, 255) == 255).all()


# --- bins -------------------------------------------------------------------------------------------------------------


def bins_by_hand(confidences: NDArray[np.float32]) -> NDArray[np.int64]:
    """k/20 < p <= (k+1)/20, with the edges as floats; what is below all of them belongs to the first."""
    return np.searchsorted(EDGES[1:-1], confidences, side="left").astype(np.int64)


@pytest.mark.parametrize("k", range(CONFIDENCE_BINS + 1))
def test_an_edge_belongs_to_the_lower_bin(k: int) -> None:
    edge = float(EDGES[k])
    some = [x for x in (below(edge), edge, above(edge)) if 0 < x <= 1]
    found = confidence_bins(torch.tensor(some)).tolist()
    own = max(0, k - 1)
    expected = {below(edge): own, edge: own, above(edge): k}
    assert found == [expected[x] for x in some]


def test_every_confidence_is_in_its_bin() -> None:
    """Thousands of floats on both sides of every edge, and a million from all over."""
    around = (EDGES.view(np.int32)[1:, None] + np.arange(-3000, 3001)).astype(np.int32).view(np.float32).ravel()
    dice = np.random.default_rng(0)
    confidences = np.concatenate([around[around <= 1], dice.random(1_000_000, dtype=np.float32)])
    assert np.array_equal(confidence_bins(torch.from_numpy(confidences)).numpy(), bins_by_hand(confidences))


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "size"), [(2, (3, 5)), (19, (300, 301)), (255, (64, 64))])  # 300 x 301: two pieces
def test_counts_are_those_of_plain_loops(classes: int, size: Size) -> None:
    winners, confidences = (x[0] for x in top_class(noise(1, classes, *size, spread=3)))
    histogram, sums = count(winners, confidences, classes=classes)
    winner, p = winners.numpy(), confidences.numpy()
    for c in range(classes):
        mine = p[winner == c]
        assert histogram[c].tolist() == [((a < mine) & (mine <= b)).sum() for a, b in pairwise(EDGES)]
        assert sums[c] == mine.astype(np.float64).sum()
    assert histogram.sum() == size[0] * size[1]
    assert (histogram.dtype, sums.dtype) == (torch.int64, torch.float64)


@pytest.mark.parametrize("at_once", [1 << 26, 3 * 71 * 20], ids=["whole", "in bands"])
def test_a_gpu_counts_into_many_tables_and_their_sum_is_exact(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its way, gone here on the CPU: bit for bit what one image after the other gives."""
    monkeypatch.setattr(counting, "_GPU_COUNTED_AT_ONCE", at_once)
    winners, confidences = top_class(noise(3, 19, 90, 71, spread=2))
    confidences[0, 0, :19] = torch.from_numpy(EDGES[1:20])
    histograms, sums = count_together(winners, confidences, classes=19)
    alone = [count(w, p, classes=19) for w, p in zip(winners, confidences, strict=True)]
    assert (histograms.dtype, sums.dtype) == (torch.int64, torch.float64)
    assert torch.equal(histograms, torch.stack([h for h, _ in alone]))
    assert torch.equal(sums, torch.stack([s for _, s in alone]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_stay_in_range_and_show_in_the_sum(bad: float) -> None:
    """On a GPU an index out of range would end the process. -inf alone is a class that cannot be, as in a softmax."""
    logits = noise(1, 19, 40, 50)
    logits[0, 3, 5, :7] = bad
    logits[0, :, 6, 6] = bad
    winners, confidences = top_class(logits)
    broken = torch.zeros(1, 40, 50, dtype=torch.bool)
    broken[0, 5, :7], broken[0, 6, 6] = bad != -float("inf"), True
    assert torch.equal(confidences.isnan(), broken)
    assert int(winners.max()) < 19
    assert torch.equal(winners[~broken].long(), logits.argmax(dim=1)[~broken])
    for histogram, sums in (
        count(winners[0], confidences[0], classes=19),
        [x[0] for x in count_together(winners, confidences, classes=19)],
    ):
        assert histogram.sum() == 2000
        assert sums.sum().isnan()
    codes = encode(winners, confidences, classes=19, edges=(0.0, 0.5))
    assert torch.equal(codes[broken], 3 * winners[broken])  # it exceeds no edge


@pytest.mark.parametrize(("classes", "edges", "dtype"), [
    (19, (0.5,), torch.uint8),
    (128, (0.5,), torch.uint8),  # 256 codes fill the byte
    (129, (0.5,), torch.int16),
    (19, (0.0, 0.3, 0.5, 0.7, 0.9), torch.uint8),
    (255, tuple(k / 32 for k in range(1, 32)), torch.int16),
])  # fmt: skip
def test_a_code_holds_the_top_class_and_how_many_edges_are_exceeded(
    classes: int, edges: tuple[float, ...], dtype: torch.dtype
) -> None:
    winners, confidences = (x[0] for x in top_class(noise(1, classes, 50, 60, spread=3)))
    around = [f(e) for e in edges for f in (below, lambda e: e, above) if f(e) > 0]
    confidences.view(-1)[: len(around)] = torch.tensor(around)
    codes = encode(winners, confidences, classes=classes, edges=edges)
    levels = sum((confidences > e).long() for e in map(np.float32, edges))
    assert codes.dtype == dtype
    assert torch.equal(codes.long(), winners.long() * (len(edges) + 1) + levels)


def test_a_temperature_divides_the_logits() -> None:
    logits = noise(1, 19, 40, 50)
    for temperature in (0.25, 1.0, 2.5):
        winner, confidence = top_class(logits, temperature)
        probability, expected = torch.softmax(logits / temperature, dim=1).max(dim=1)
        assert torch.equal(winner.long(), expected)
        torch.testing.assert_close(confidence, probability, rtol=1e-5, atol=0)


@pytest.mark.parametrize("k", range(1, CONFIDENCE_BINS))
def test_the_bins_above_a_threshold_hold_what_it_keeps(k: int) -> None:
    """Also where confidences lie on the threshold itself."""
    edges = torch.from_numpy(np.concatenate([EDGES[1:], EDGES[1:]]).reshape(2, CONFIDENCE_BINS).copy())
    winners = torch.arange(40, dtype=torch.uint8).view(2, 20) % 3
    histogram, _ = count(winners, edges, classes=3)
    label = decided(winners, edges, float(EDGES[k]), 3)
    assert [(label == c).sum() for c in range(3)] == histogram[:, k:].sum(dim=1).tolist()
    assert (label != 255).sum() == 2 * (CONFIDENCE_BINS - k)


def test_sums_of_confidences_are_exact_in_any_order() -> None:
    """So that a report is the same whatever the order of the pixels, the cores or the device."""
    winners, confidences = (x[0] for x in top_class(noise(1, 19, 300, 700, spread=2)))
    assert confidences.min() > 1 / 32
    histogram, sums = count(winners, confidences, classes=19)
    units = (confidences.double() * 2**29).long()  # whole numbers: their sum cannot round
    assert torch.equal(units.double() / 2**29, confidences.double())
    exact = torch.zeros(19, dtype=torch.int64).index_add_(0, winners.flatten().long(), units.flatten())
    assert sums.tolist() == (exact.double() / 2**29).tolist()
    for order in (torch.randperm(210_000), torch.arange(210_000).flip(0), confidences.flatten().argsort()):
        again = count(winners.flatten()[order].view(300, 700), confidences.flatten()[order].view(300, 700), classes=19)
        assert torch.equal(again[0], histogram) and torch.equal(again[1], sums)


# --- bands ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 19, 255])
@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (97, 131), (1024, 2048), (300, 100_000)])
def test_bands_cover_every_row_once(size: Size, classes: int) -> None:
    found = list(bands(size, classes, device=CPU))
    assert [top for top, _ in found] == [0, *(bottom for _, bottom in found[:-1])]
    assert found[-1][1] == size[0]
    assert all(top < bottom for top, bottom in found)
    assert all((bottom - top) * size[1] * classes * 4 <= 4 << 20 or bottom - top == 1 for top, bottom in found)


class Asked(Field):
    """A field that remembers which rows it was asked for; it cannot be had whole."""

    def __init__(self, inner: Field) -> None:
        self.inner, self.size = inner, inner.size
        self.bands = list[tuple[int, int]]()

    def rows(self, top: int, bottom: int) -> Tensor:
        self.bands.append((top, bottom))
        return self.inner.rows(top, bottom)


def test_a_field_is_read_in_bands_and_never_whole() -> None:
    logits = noise(2, 19, 200, 300)
    asked = Asked(InMemory(logits))
    winner, confidence, *_ = top_classes(asked, 2, classes=19, device=CPU)
    assert asked.bands == list(bands((200, 300), 19, device=CPU))
    assert len(asked.bands) > 1
    whole = top_class(logits)
    assert torch.equal(winner, whole[0])
    torch.testing.assert_close(confidence, whole[1], rtol=1e-6, atol=0)


class Largest(TorchDispatchMode):
    """Remembers how many bytes the largest tensor had that any operation made (a view of its input is not made)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_nothing_with_a_value_per_class_and_pixel_is_ever_made() -> None:
    """65 classes at 512 x 1024 would be 136 MB; a band of them is 4 MB, and a label with its confidence 2.6 MB."""
    height, width, classes = 512, 1024, 65
    field = at_size(noise(1, classes, height // 4, width // 4), (2 * height, 2 * width), (height, width))
    with Largest() as seen:
        winners, confidences, *_ = top_classes(field, 1, classes=classes, device=CPU)
        encode(winners, confidences, classes=classes, edges=(0.5, 0.9))
        count(winners[0], confidences[0], classes=classes)
    assert 0 < seen.bytes <= 4.4e6
    with Largest() as control:  # the measure sees what it should
        top_class(field.whole())
    assert control.bytes == 4 * classes * height * width
