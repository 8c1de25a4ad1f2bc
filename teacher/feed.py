"""The way of pixels to a device, and of predictions back: one copy each for a batch.

On a CUDA GPU both copies go through page-locked memory and the calling thread's own stream, so that batches of several
threads overlap and the host waits once for each batch, for its own results alone. What never changes is made on the CPU
once, for its numbers, and kept on the device.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autolabel.manifests.evidence import Factors
from autolabel.manifests.places import NOWHERE, Places
from autolabel.teacher.counting import bin_edges, count, count_together
from autolabel.teacher.decide import Evidence, Prediction, Swings, Tops, encode, level_of

# Mean and deviation of ImageNet's RGB values in 0..1, which all published trunks expect.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)

Image = NDArray[np.uint8]


class Normaliser:
    """Turns RGB images (B, 3, H, W) uint8 into float32, minus ImageNet's mean, divided by its deviation.

    Its constants are tensors of the device: a division by a number of Python's would become a product on a GPU, which
    rounds otherwise than the CPU's division.
    """

    def __init__(self, device: torch.device) -> None:
        self.full, self.mean, self.std = (
            torch.tensor(values).view(1, -1, 1, 1).to(device) for values in ((255.0,), _MEAN, _STD)
        )

    def __call__(self, images: Tensor) -> Tensor:
        return (images.float() / self.full - self.mean) / self.std


def normalise(images: Tensor) -> Tensor:
    """Return RGB images (B, 3, H, W) uint8 as float32, minus ImageNet's mean, divided by its deviation."""
    return Normaliser(images.device)(images)


class Feed:
    """Feeds one device. Its methods may be called from several threads."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._bin_edges = bin_edges().to(device)
        self._on_cuda = device.type == "cuda"
        self._factors: dict[bytes, Tensor] = {}
        self._own = threading.local()

    def stream(self) -> contextlib.AbstractContextManager[object]:
        """Return a context in which a GPU computes in the calling thread's own stream.

        The stream waits for what the thread's current one, usually the default stream of all, has been given so far:
        weights and constants. Nothing made inside may be used in another stream.
        """
        if not self._on_cuda:
            return contextlib.nullcontext()
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._own.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._own.stream)

    def factors(self, factors: Factors) -> Tensor:
        """Return the table of factors as (C, K) on the device; it is copied there once."""
        key = factors.table.tobytes()
        if key not in self._factors:
            table = torch.from_numpy(np.ascontiguousarray(factors.table.T))
            self._factors[key] = table.to(self.device)  # done when this returns, so any stream may read it
        return self._factors[key]

    def upload(
        self,
        images: Sequence[Image] | Image,
        *,
        batch: int = 1,
        places: Sequence[Places | None] = (),
        evidence: Factors | None = None,
    ) -> tuple[Tensor, Evidence | None]:
        """Return images (H, W, 3) uint8, filled up to `batch` with the last one, as (batch, 3, H, W) on the device.

        With them come the places (H, W) int16 of their pixels, if there is `evidence` and any image has some; in other
        images, and in padding, polygons say nothing.
        """
        placed = evidence is not None and any(one is not None for one in places)
        shape = (batch, *images[0].shape[:2])
        pixels = int(np.prod(shape))
        ahead = 2 * pixels if placed else 0  # bytes of the places, which travel before the images
        host = self._host((ahead + 3 * pixels,))
        array = host[ahead:].numpy().reshape(*shape, 3)
        for place in range(batch):
            array[place] = images[min(place, len(images) - 1)]
        if placed:
            table = host[:ahead].numpy().view(np.int16).reshape(shape)
            for place in range(batch):
                known = places[place] if place < len(places) else None
                table[place] = NOWHERE if known is None else known
        there = host.to(self.device, non_blocking=self._on_cuda)
        channels = there[ahead:].view(*shape, 3).permute(0, 3, 1, 2)
        if evidence is None or not placed:
            return channels, None
        factors = self.factors(evidence)
        return channels, Evidence(there[:ahead].view(torch.int16).view(shape), factors, evidence.teacher_weight)

    def swings(self, swings: NDArray[np.float32]) -> Swings:
        """Return swings (2, C), within and beyond the rows seen, on the device; they are copied there once."""
        key = swings.tobytes()
        if key not in self._factors:
            self._factors[key] = torch.from_numpy(np.ascontiguousarray(swings)).to(self.device)
        return Swings(*self._factors[key])

    def download(
        self,
        tops: Tops,
        *,
        classes: int,
        edges: Sequence[float],
        own: bool = False,
        probability: bool = False,
        seen: Tensor | None = None,
    ) -> list[Prediction]:
        """Return the predictions of top classes and their probabilities, after one copy.

        own: with the codes of the teacher alone. probability: with the probabilities in 255ths. seen: (B, 2) int32,
        the rows that the highest scale has seen.
        """
        if self.device.type == "mps":  # it has no float64, which counting needs
            tops = tops.map(Tensor.cpu)
        winners, confidences, own_winners, own_confidences, seconds, least = tops
        maps = {} if seen is None else {"seen": seen.cpu() if self.device.type == "mps" else seen}
        maps["codes"] = encode(winners, confidences, classes=classes, edges=edges)
        if own and own_winners is not winners:
            maps["own"] = encode(own_winners, own_confidences, classes=classes, edges=edges)
        if seconds is not None:
            maps["second"] = seconds
        if probability:
            maps["probability"] = (255 * confidences).round_().to(torch.uint8)
        if least is not None:
            maps["least"] = level_of(least, edges=edges)
        if self._on_cuda:
            histograms, sums = count_together(winners, confidences, classes=classes, edges=self._bin_edges)
            # The small tables are copied, for they may be kept longer than the memory that the codes lie in.
            totals, histogram, *arrays = self._fetched([sums, histograms, *maps.values()])
            each = zip(histogram.copy(), totals.copy(), *arrays, strict=True)
        else:
            tables = [count(w, p, classes=classes) for w, p in zip(winners, confidences, strict=True)]
            counted = ([x.numpy() for x in column] for column in zip(*tables, strict=True))
            each = zip(*counted, *(x.numpy() for x in maps.values()), strict=True)
        predictions = []
        for counts, total, *of in each:
            values = dict(zip(maps, of, strict=True))
            if seen is not None:
                values["seen"] = tuple(map(int, values["seen"]))
            predictions.append(Prediction(levels=len(edges) + 1, histogram=counts, confidence=total, **values))
        return predictions

    def _fetched(self, tensors: Sequence[Tensor]) -> list[NDArray[np.generic]]:
        """Return tensors of a GPU as arrays that share one piece of page-locked memory, the widest types first."""
        packed = torch.cat([x.flatten().view(torch.uint8) for x in tensors])
        fetched = self._host(tuple(packed.shape))
        fetched.copy_(packed, non_blocking=True)
        self._wait()
        parts = np.split(fetched.numpy(), np.cumsum([x.nbytes for x in tensors[:-1]]))
        types = (np.dtype(str(x.dtype).removeprefix("torch.")) for x in tensors)
        return [part.view(kind).reshape(x.shape) for part, kind, x in zip(parts, types, tensors, strict=True)]

    def _wait(self) -> None:
        """Sleep until the thread's stream is done: a core that spun meanwhile could decode no image."""
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.device))
        done.synchronize()

    def _host(self, shape: tuple[int, ...]) -> Tensor:
        """Return room for bytes in the host's memory, page-locked if the device is a CUDA GPU.

        Torch keeps freed page-locked memory and gives it out again once the copies from it are done.
        """
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._on_cuda)
