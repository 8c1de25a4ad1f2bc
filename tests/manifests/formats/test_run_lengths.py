"""Masks in run lengths against plain loops. If this fails, tools show other pixels than the labels have."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sending import random_labels

from autolabel.manifests.formats.exchange import BadReturn
from autolabel.manifests.formats.run_lengths import (
    brush_bytes,
    coco_counts,
    coco_text,
    columns,
    counts_of_brush,
    counts_of_coco,
    paint,
    require_size,
    spans_by_class,
)

Mask = NDArray[np.bool_]
LABELS = [
    *random_labels(1, sizes=((13, 17), (1, 1), (1, 9), (9, 1), (2, 40_000))).values(),
    np.full((3, 3), 255, np.uint8),
]


def plain_counts(pixels: Mask) -> list[int]:
    counts, value = [0], False
    for pixel in pixels.tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def plain_text(counts: list[int]) -> str:
    """The compressed form of COCO, one digit of five bits after the other."""
    text = ""
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        while True:
            digit, value = value & 31, value >> 5
            ends = value == (-1 if digit & 16 else 0)
            text += chr(48 + digit + (0 if ends else 32))
            if ends:
                break
    return text


def plain_brush(values: list[int], *, sizes: tuple[int, ...] = (3, 4, 8, 16), longest_run: int = 0) -> list[int]:
    """The stream of bits of Label Studio, by strings; runs of at least `longest_run` equal words are packed as runs."""
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    place = 0
    while place < len(values):
        end = place + 1
        while end < len(values) and values[end] == values[place] and end - place < 1 << sizes[3]:
            end += 1
        run = end - place > 1
        if not run:  # single words, as long as the next one differs
            while end < len(values) and values[end] != values[end - 1] and end - place < 1 << sizes[0]:
                end += 1
        choice = next(n for n in range(4) if end - place <= 1 << sizes[n])
        bits += f"{int(run)}{choice:02b}{end - place - 1:0{sizes[choice]}b}"
        bits += "".join(f"{value:08b}" for value in (values[place : place + 1] if run else values[place:end]))
        place = end
    bits += "0" * (-len(bits) % 8)
    return [int(bits[n : n + 8], 2) for n in range(0, len(bits), 8)]


def mask_of(counts: NDArray[np.int64], pixels: int) -> Mask:
    painted = np.zeros(pixels, np.uint8)
    paint(painted, counts, 1)
    return painted == 1


@pytest.mark.parametrize("label", LABELS, ids=lambda label: f"{label.shape}{label.ravel()[:3]}")
def test_masks_of_coco_are_those_of_plain_loops_and_come_back(label: NDArray[np.uint8]) -> None:
    found = spans_by_class(columns(label))
    assert list(found) == sorted({int(v) for v in np.unique(label)} - {255})
    for value, spans in found.items():
        mask = (label == value).T.ravel()
        counts = coco_counts(spans, label.size)
        assert counts.tolist() == plain_counts(mask)
        assert coco_text(counts) == plain_text(counts.tolist())
        for form in (coco_text(counts), counts.tolist()):
            assert np.array_equal(mask_of(counts_of_coco(form, label.size, "f"), label.size), mask)


@pytest.mark.parametrize("label", LABELS[:-1], ids=lambda label: f"{label.shape}{label.ravel()[:3]}")
def test_masks_of_label_studio_are_those_of_plain_loops_and_come_back(label: NDArray[np.uint8]) -> None:
    for value, spans in spans_by_class(label.ravel()).items():
        mask = (label == value).ravel()
        data = brush_bytes(spans, label.size)
        if label.size < 1 << 14:  # longer runs may be cut elsewhere
            assert list(data) == plain_brush(np.repeat(mask * 255, 4).tolist())
        assert np.array_equal(mask_of(counts_of_brush(data, label.size, "f"), label.size), mask)


def test_strokes_in_colour_with_soft_edges_are_inside_from_half_their_strength_on() -> None:
    rng = np.random.default_rng(0)
    alpha = rng.choice(np.array([0, 1, 127, 128, 255]), 300)
    painted = np.stack([rng.integers(0, 256, 300), np.full(300, 9), rng.integers(0, 2, 300), alpha], 1).ravel().tolist()
    for sizes in ((3, 4, 8, 16), (1, 2, 3, 4)):
        data = bytes(plain_brush(painted, sizes=sizes))
        assert np.array_equal(mask_of(counts_of_brush(data, 300, "f"), 300), alpha > 127)


def test_masks_of_0_and_1_are_masks_too() -> None:
    mask = [0, 1, 1, 0, 1]
    data = bytes(plain_brush(np.repeat(mask, 4).tolist()))
    assert mask_of(counts_of_brush(data, 5, "f"), 5).tolist() == [False, True, True, False, True]
    assert not mask_of(counts_of_brush(bytes(plain_brush([0] * 20)), 5, "f"), 5).any()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([2, 3], "f: its run lengths give 5 pixels, expected 6: it is of another image, or cut"),
        ([2, -1, 5], "f: its run lengths give other numbers, expected 6: it is of another image, or cut"),
        ([7], "f: its run lengths give other numbers, expected 6: it is of another image, or cut"),
        ([], "f: its run lengths give 0 pixels, expected 6: it is of another image, or cut"),
        ([1 << 62, 1 << 62, 6], "f: its run lengths give other numbers"),
        ([1 << 63, 6], "f: its run lengths give other numbers, expected 6"),
        ("", "f: '' is no mask in run lengths, or cut: expected those of pycocotools"),
        ("Q", "f: 'Q' is no mask in run lengths, or cut: expected those of pycocotools"),
        ("6 ", "f: '6 ' is no mask in run lengths, or cut: expected those of pycocotools"),
        ("é", "f: 'é' is no mask in run lengths, or cut: expected those of pycocotools"),
        ("Q" * 12 + "0", "f: a run length has 13 digits: expected at most 12"),
    ],
)
def test_counts_that_do_not_sum_to_the_image_are_refused(counts: str | list[int], message: str) -> None:
    with pytest.raises(BadReturn) as refused:
        counts_of_coco(counts, 6, "f")
    assert str(refused.value).startswith(message)


def test_brush_strokes_that_do_not_sum_to_the_image_are_refused() -> None:
    data = brush_bytes((np.array([10]), np.array([30])), 600)
    other = "expected 599 pixels: the mask is of another image"
    for cut, pixels, message in (
        (data, 599, f"f: its run lengths are of 600 pixels, {other}"),
        (data[:5], 600, "f: its run lengths are of 5 bytes, expected 600 pixels: the mask is of another image"),
        (data[:-2], 600, "pixels, expected 600: the mask is cut off"),
        (data[:7], 600, "f: its run lengths give 0 pixels, expected 600: the mask is cut off"),
        (data[:4] + b"\x78" + data[5:], 600, "f: its run lengths have words of 16 bits: expected 8"),
        ((2400).to_bytes(4, "big") + bytes(plain_brush([0] * 2392))[4:], 600, "expected 600: the mask is cut off"),
    ):  # fmt: skip
        with pytest.raises(BadReturn) as refused:
            counts_of_brush(cut, pixels, "f")
        assert message in str(refused.value)


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (1 << 40, 1 << 40), (5,), (1, 2, 3)])
def test_sizes_that_no_image_has_are_refused(size: tuple[int, ...]) -> None:
    with pytest.raises(BadReturn, match=r"f: size \[.*\] is none of an image"):
        require_size(size, "f")
