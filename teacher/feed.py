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

from autolabel.manifests.label_space import IGNORE
from autolabel.teacher.decide import Prediction, Undrawn, bin_edges, count, count_together, encode

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
        self._priors: dict[tuple[float, ...], Tensor] = {}
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

    def prior(self, prior: Sequence[float]) -> Tensor:
        """Return a prior (C,) on the device; it is copied there once."""
        key = tuple(prior)
        if key not in self._priors:
            self._priors[key] = torch.tensor(key).to(self.device)  # done when this returns, so any stream may read it
        return self._priors[key]

    def upload(
        self,
        images: Sequence[Image] | Image,
        *,
        batch: int = 1,
        coarse: Sequence[Image | None] = (),
        prior: Sequence[float] | None = None,
    ) -> tuple[Tensor, Undrawn | None]:
        """Return images (H, W, 3) uint8, filled up to `batch` with the last one, as (batch, 3, H, W) on the device.

        With them come the pixels that people left unlabelled, if there is a `prior`; images without a coarse label
        (H, W), and padding, have none.
        """
        masked = prior is not None and any(label is not None for label in coarse)
        together = masked and self._on_cuda  # the mask travels as a fourth channel
        size = images[0].shape[:2]
        pixels = self._host((batch, *size, 4 if together else 3))
        array = pixels.numpy()
        for place in range(batch):
            array[place, ..., :3] = images[min(place, len(images) - 1)]
        where = None
        if masked:
            mask = array[..., 3] if together else np.empty((batch, *size), np.uint8)
            for place in range(batch):
                label = coarse[place] if place < len(coarse) else None
                mask[place] = 0 if label is None else label == IGNORE
            where = None if together else torch.from_numpy(mask).to(self.device)
        channels = pixels.to(self.device, non_blocking=self._on_cuda).permute(0, 3, 1, 2)
        if together:
            where = channels[:, 3]
        if where is None or prior is None:
            return channels[:, :3], None
        return channels[:, :3], Undrawn(where.view(torch.bool), self.prior(prior))

    def download(
        self, winners: Tensor, confidences: Tensor, *, classes: int, edges: Sequence[float]
    ) -> list[Prediction]:
        """Return the predictions of top classes (B, H, W) uint8 and their probabilities, after one copy."""
        if self.device.type == "mps":  # it has no float64, which counting needs
            winners, confidences = winners.cpu(), confidences.cpu()
        codes = encode(winners, confidences, classes=classes, edges=edges)
        if self._on_cuda:
            histograms, sums = count_together(winners, confidences, classes=classes, edges=self._bin_edges)
            arrays = self._fetched([sums, histograms, codes])
            # The small tables are copied, for they may be kept longer than the memory that the codes lie in.
            each = zip(arrays[2], arrays[1].copy(), arrays[0].copy(), strict=True)
        else:
            tables = [count(w, p, classes=classes) for w, p in zip(winners, confidences, strict=True)]
            each = zip(codes.numpy(), [h.numpy() for h, _ in tables], [s.numpy() for _, s in tables], strict=True)
        return [Prediction(code, len(edges) + 1, histogram, total) for code, histogram, total in each]

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
        torch.cuda.current_stream(self.device).synchronize()

    def _host(self, shape: tuple[int, ...]) -> Tensor:
        """Return room for bytes in the host's memory, page-locked if the device is a CUDA GPU.

        Torch keeps freed page-locked memory and gives it out again once the copies from it are done.
        """
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._on_cuda)
