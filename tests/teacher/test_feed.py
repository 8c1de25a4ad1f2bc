"""A mask that lies a pixel off, or a table read as another's, would go to a GPU and come back with nobody looking.

The way of a GPU is gone here on the CPU, with memory that is not page-locked and without streams.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pretended import PretendedGPU
from torch import Tensor
from weighed import drawn_factors, drawn_places

from autolabel.teacher.feed import Feed, normalise
from autolabel.teacher.networks.build import build
from autolabel.teacher.predict import Teacher

torch.set_num_threads(1)

CPU, CLASSES = torch.device("cpu"), 19


class GPUsWay(Feed):
    """Packs, counts and unpacks as for a GPU."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self._on_cuda = True
        self.waits = 0

    def stream(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def _host(self, shape: tuple[int, ...]) -> Tensor:
        return torch.full(shape, 7, dtype=torch.uint8)

    def _wait(self) -> None:
        self.waits += 1


@pytest.mark.thorough
@pytest.mark.parametrize("edges", [(0.06,), tuple(k / 32 for k in range(1, 32))], ids=["a byte", "two bytes"])
def test_the_way_of_a_gpu_gives_the_predictions_of_the_cpus(edges: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    dice = np.random.default_rng(0)
    images = dice.integers(0, 256, (5, 64, 96, 3), dtype=np.uint8)
    places = [drawn_places((64, 96), CLASSES), None, drawn_places((64, 96), CLASSES, share=1.0), None, None]
    evidence = drawn_factors(CLASSES)
    teacher = Teacher(build("hrnet18s_ocr_mscale", CLASSES))
    runs = []
    for feed in (teacher.feed, way := GPUsWay()):
        teacher.feed = feed
        for given in ((), places):
            predicted = teacher.predict_in_batches(images, 2, edges=edges, evidence=evidence, places=given, own=True)
            runs.append(list(predicted))
    assert way.waits == 6
    for one, other in zip(runs[0] + runs[1], runs[2] + runs[3], strict=True):
        assert one.codes.dtype == other.codes.dtype == (np.uint8 if len(edges) == 1 else np.int16)
        assert np.array_equal(one.codes, other.codes)
        assert (one.own is None) == (other.own is None)
        assert one.own is None or other.own is None or np.array_equal(one.own, other.own)
        assert np.array_equal(one.histogram, other.histogram)
        assert np.array_equal(one.confidence, other.confidence)
        assert other.histogram.base is None or other.histogram.base.nbytes < one.codes.nbytes  # not the whole buffer
    assert not np.array_equal(runs[0][0].codes, runs[1][0].codes)  # the evidence counted
    assert runs[1][0].own is not None and np.array_equal(runs[0][0].codes, runs[1][0].own)
    assert np.array_equal(runs[0][1].codes, runs[1][1].codes)


def test_every_value_is_normalised_to_the_same_float_as_by_plain_numbers() -> None:
    """Also on a GPU, where a division by a number would be a product with its rounded inverse."""
    values = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    expected = [[(np.float32(v) / np.float32(255) - np.float32(m)) / np.float32(s) for v in range(256)]
                for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]  # fmt: skip
    assert np.array_equal(normalise(values)[0, :, 0].numpy(), np.array(expected))


def test_pixels_and_places_are_filled_up_to_the_batch() -> None:
    images = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 2, 3, 3)
    places, evidence = [None, np.array([[7, 0, 1], [2, 300, 30]], np.int16)], drawn_factors(2, teacher_weight=0.5)
    for feed in (Feed(CPU), GPUsWay()):
        pixels, known = feed.upload(images, batch=4, places=places, evidence=evidence)
        assert torch.equal(pixels, torch.from_numpy(images[[0, 1, 1, 1]]).permute(0, 3, 1, 2))
        assert known is not None and known.teacher_weight == 0.5
        nowhere = [[0] * 3] * 2
        assert known.places.tolist() == [nowhere, [[7, 0, 1], [2, 300, 30]], nowhere, nowhere]
        assert np.array_equal(known.factors.numpy(), evidence.table.T)
        assert feed.upload(images, batch=2, places=[None, None], evidence=evidence)[1] is None
        assert feed.upload(images, batch=2, places=places)[1] is None


def test_factors_are_copied_to_their_device_once() -> None:
    feed = Feed(CPU)
    assert feed.factors(drawn_factors(3)) is feed.factors(drawn_factors(3))
    assert feed.factors(drawn_factors(3, seed=1)) is not feed.factors(drawn_factors(3))


def test_each_thread_has_one_stream_which_waits_for_all_that_its_thread_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights and constants are made in the current stream; batches of two threads must not wait for each other."""
    waits: list[tuple[int, object]] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.owner = threading.get_ident()

        def wait_stream(self, other: object) -> None:
            assert self.owner == threading.get_ident()
            waits.append((id(self), other))

    current = object()
    with PretendedGPU(), monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "current_stream", lambda device: current)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(stream))
        feed, both = Feed(torch.device("cuda")), threading.Barrier(2)

        def work() -> list[object]:
            both.wait()
            streams = []
            for _ in range(2):
                with feed.stream() as stream:
                    streams.append(stream)
            return streams

        with ThreadPoolExecutor(2) as pool:
            first, second = (future.result() for future in [pool.submit(work) for _ in range(2)])
    assert first[0] is first[1] is not second[0] is second[1]
    assert Counter(waits) == {(id(first[0]), current): 2, (id(second[0]), current): 2}
