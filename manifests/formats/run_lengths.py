"""Masks as run lengths, as COCO and Label Studio store them, by array operations.

COCO runs down the columns: counts of pixels outside, inside, outside, …, as a list or as a text in which every count
is the difference from the one before the last, in groups of five bits (pycocotools' maskApi). Label Studio runs along
the rows of an RGBA image, in a stream of bits: the number of bytes (32 bits), the size of a word less one (5), four
sizes of counts less one (4 each), then packets: a bit that is 1 for a run and 0 for single words, two bits that choose
the size of the count, the count less one, and one word or as many as the count (thi.ng's rle-pack).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.formats.exchange import BadReturn
from autolabel.manifests.headers import MOST_PIXELS
from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.run.shards import Label

Counts = NDArray[np.int64]
Spans = tuple[Counts, Counts]  # first pixel and the one behind the last, of every run of one class
_SIZES = (3, 4, 8, 16)  # bits of a count, as Label Studio writes them
_HEADER = 32 + 5 + 4 * 4  # bits
_BLOCK = 1 << 15  # bytes that are looked at once


def spans_by_class(pixels: Label) -> Mapping[int, Spans]:
    """The runs of every class but ignore, in the order of the train ids. pixels: a label in one dimension."""
    ends = np.append(np.flatnonzero(pixels[1:] != pixels[:-1]) + 1, len(pixels))
    starts = np.append(0, ends[:-1])
    values = pixels[starts]
    return {int(v): (starts[values == v], ends[values == v]) for v in np.unique(values) if v != IGNORE}


def columns(label: Label) -> Label:
    """The pixels of a label (H, W) down its columns, in one dimension."""
    return np.ascontiguousarray(label.T).reshape(-1)


def require_size(size: Sequence[int], where: str) -> tuple[int, int]:
    """(height, width) of a mask that a stranger states. Raises BadReturn for sizes that no image has."""
    if len(size) != 2 or min(size) < 1 or size[0] * size[1] > MOST_PIXELS:
        raise BadReturn(f"{where}: size {list(size)} is none of an image: expected height and width in pixels")
    return size[0], size[1]


def paint(pixels: Label, counts: Counts, value: int) -> None:
    """Set the pixels inside; counts: pixels outside and inside in turn, which sum to the number of pixels."""
    inside = counts[1::2]
    if not inside.any():
        return
    first = int(counts[0])
    last = int(counts[: 2 * len(inside)].sum())
    middle = counts[1 : 2 * len(inside)]
    mask = np.repeat(np.arange(len(middle)) % 2 == 0, middle)
    pixels[first:last][mask] = value


# --- COCO -------------------------------------------------------------------------------------------------------------


def coco_counts(spans: Spans, pixels: int) -> Counts:
    """Counts of pixels outside and inside in turn, from the runs of a class among so many pixels."""
    edges = np.column_stack(spans).ravel()
    counts = np.diff(edges, prepend=0, append=pixels)
    return counts if counts[-1] else counts[:-1]


def coco_text(counts: Counts) -> str:
    """The compressed form of counts."""
    values = counts.copy()
    values[3:] -= counts[1:-2]
    groups = np.ones(len(values), np.int64)
    for n in range(1, 13):
        groups[(values < -(1 << 5 * n - 1)) | (values >= 1 << 5 * n - 1)] = n + 1
    owners = np.repeat(np.arange(len(values)), groups)
    place = np.arange(len(owners)) - np.repeat(np.cumsum(groups) - groups, groups)
    codes = values[owners] >> 5 * place & 31
    codes[place < groups[owners] - 1] |= 32
    return (codes + 48).astype(np.uint8).tobytes().decode("ascii")


def counts_of_coco(counts: str | Sequence[int], pixels: int, where: str) -> Counts:
    """Counts from either form. Raises BadReturn unless they sum to the number of pixels."""
    try:
        values = _from_text(counts, where) if isinstance(counts, str) else np.array(counts, np.int64)
    except OverflowError:
        values = np.array([-1])
    if (values < 0).any() or (values > pixels).any() or values.sum() != pixels:
        shown = f"{values.sum()} pixels" if (values >= 0).all() and (values <= pixels).all() else "other numbers"
        raise BadReturn(f"{where}: its run lengths give {shown}, expected {pixels}: it is of another image, or cut")
    return values


def _from_text(text: str, where: str) -> Counts:
    codes = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise BadReturn(f"{where}: {text[:20]!r} is no mask in run lengths, or cut: expected those of pycocotools")
    starts = np.append(0, np.flatnonzero(codes & 32 == 0)[:-1] + 1)
    groups = np.diff(np.append(starts, len(codes)))
    if groups.max() > 12:
        raise BadReturn(f"{where}: a run length has {groups.max()} digits: expected at most 12")
    place = np.arange(len(codes)) - np.repeat(starts, groups)
    values = np.add.reduceat((codes & 31) << 5 * place, starts)
    values -= np.where(codes[starts + groups - 1] & 16, 1 << 5 * groups, 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


# --- Label Studio -----------------------------------------------------------------------------------------------------


def brush_bytes(spans: Spans, pixels: int) -> bytes:
    """A mask as Label Studio's run lengths, 255 in all four channels inside. spans: runs along the rows."""
    counts = 4 * coco_counts(spans, pixels)
    values = np.arange(len(counts)) % 2 * 255
    values, counts = values[counts > 0], counts[counts > 0]
    longest = 1 << _SIZES[-1]
    packets = -(-counts // longest)  # long runs are cut
    values = np.repeat(values, packets)
    lengths = np.full(len(values), longest)
    lengths[np.cumsum(packets) - 1] = counts - longest * (packets - 1)
    choice = np.searchsorted([1 << size for size in _SIZES], lengths)
    size = np.array(_SIZES)[choice]
    codes = (((4 | choice) << size | lengths - 1) << 8) | values
    bits = 3 + size + 8
    header = 4 * pixels
    for number, width in ((8 - 1, 5), *((size - 1, 4) for size in _SIZES)):
        header = header << width | number
    stream = np.zeros(_HEADER + int(bits.sum()), np.uint8)
    stream[:_HEADER] = [header >> place & 1 for place in reversed(range(_HEADER))]
    ends = _HEADER + np.cumsum(bits)
    for place in range(int(bits.max(initial=0))):
        longer = bits > place
        stream[ends[longer] - 1 - place] = codes[longer] >> place & 1
    return np.packbits(stream).tobytes()


def counts_of_brush(data: bytes, pixels: int, where: str) -> Counts:
    """Counts of pixels outside and inside in turn, along the rows.

    A pixel is inside if its alpha is more than half of the greatest one of the mask: Label Studio's own brush leaves
    soft edges, and some programs write masks of 0 and 1. Raises BadReturn unless the runs sum to the number of pixels.
    """
    number = int.from_bytes(data[:4], "big")
    if len(data) * 8 < _HEADER or number != 4 * pixels:
        of = f"{number // 4} pixels" if len(data) * 8 >= _HEADER else f"{len(data)} bytes"
        raise BadReturn(f"{where}: its run lengths are of {of}, expected {pixels} pixels: the mask is of another image")
    header = int.from_bytes(data[4:7], "big") >> 3
    sizes = np.array([(header >> 12 & 15) + 1, (header >> 8 & 15) + 1, (header >> 4 & 15) + 1, (header & 15) + 1])
    if header >> 16 != 7:
        raise BadReturn(f"{where}: its run lengths have words of {(header >> 16) + 1} bits: expected 8")
    flags, lengths, places = _packets(data, sizes, number)
    done = int(lengths.sum())
    if done != number or int(places[-1] + np.where(flags[-1], 8, 8 * lengths[-1])) > 8 * len(data):
        raise BadReturn(f"{where}: its run lengths give {done // 4} pixels, expected {pixels}: the mask is cut off")
    pieces = np.where(flags, 1, lengths)  # a run is one piece, single words are one piece each
    ends = np.cumsum(np.repeat(np.where(flags, lengths, 1), pieces))
    steps = np.arange(len(ends)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    alpha = _words(data, np.repeat(places, pieces) + 8 * steps)
    alphas = np.diff(ends // 4, prepend=0)  # every fourth word is an alpha
    alpha, alphas = alpha[alphas > 0], alphas[alphas > 0]
    inside = alpha > int(alpha.max(initial=0)) // 2
    edges = np.flatnonzero(np.diff(inside, prepend=False)) if len(inside) else inside
    return np.diff(np.append(0, np.cumsum(alphas))[edges], prepend=0, append=pixels)


def _packets(data: bytes, sizes: Counts, number: int) -> tuple[NDArray[np.bool_], Counts, Counts]:
    """For each packet: True if it is a run, its count of words, and the bit where its first word begins.

    Where a packet ends is known when it has been read. So every bit is taken for the start of a packet, a block of bits
    at once, and the chain of those that follow each other is picked.
    """
    padded = np.frombuffer(data + bytes(8), np.uint8).astype(np.uint32)
    four = padded[:-4] << 24 | padded[1:-3] << 16 | padded[2:-2] << 8 | padded[3:-1]  # from each byte on
    start, done, last = _HEADER, 0, 8 * len(data)
    parts: list[tuple[NDArray[np.bool_], Counts, Counts]] = [(np.zeros(0, bool), *2 * (np.zeros(0, np.int64),))]
    while done < number and start < last:
        first = start >> 3
        bits = (four[first : first + _BLOCK, None] << np.arange(8, dtype=np.uint32)).ravel()  # 25 are right in each
        run = bits >> 31 == 1
        size = sizes[bits >> 29 & 3]
        length = (bits << 3 >> (32 - size).astype(np.uint32)).astype(np.int64) + 1
        where = np.arange(8 * first, 8 * first + len(bits))
        word = where + 3 + size
        following = (word + 8 * np.where(run, 1, length) - 8 * first).tolist()
        chain, place = [], start - 8 * first
        while place < len(following):
            chain.append(place)
            place = following[place]
        picked = np.array(chain)
        sums = done + np.cumsum(length[picked])
        picked = picked[: int(np.searchsorted(sums, number)) + 1]
        parts.append((run[picked], length[picked], word[picked]))
        done += int(length[picked].sum())
        start = 8 * first + place
    flags, lengths, places = (np.concatenate(column) for column in zip(*parts, strict=True))
    return flags, lengths, places


def _words(data: bytes, places: Counts) -> NDArray[np.uint8]:
    """The 8 bits from each place on."""
    padded = np.frombuffer(data + bytes(2), np.uint8).astype(np.uint16)
    pairs = padded[places >> 3] << 8 | padded[(places >> 3) + 1]
    words: NDArray[np.uint8] = (pairs >> 8 - (places & 7) & 255).astype(np.uint8)
    return words
