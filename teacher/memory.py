"""The memory of a prediction: how many images make a batch, and how many batches fit at once."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

LARGEST_BATCH = 8  # a larger batch is no faster: one image at scale 2 keeps a GPU busy
# Pixels that are computed at once on a GPU, at all scales together: those of 1024 x 2048 at scales 0.5, 1 and 2.
BATCH_PIXELS = 1024 * 2048 * 21 // 4
SPARE_MEMORY = 0.2  # share of the free memory that is never used


class NotEnoughMemory(RuntimeError):
    """One batch alone does not fit; the message names the size of its images and says what to do."""


def batch_pixels(device: str) -> int:
    """Return the pixels that a run computes at once on a kind of device; 0 for a CPU: its batches are single images."""
    return 0 if device == "cpu" else BATCH_PIXELS


def planned_batch(height: int, width: int, *, scales: Sequence[float], pixels: int) -> int:
    """Return the number of images of this size in a batch, 1 to `LARGEST_BATCH`, a power of two.

    They have at most `pixels` at all scales together, unless one alone has more. Kernels for another batch round
    otherwise, so this number depends on nothing that changes from call to call: memory, neighbours, units, restarts.
    """
    most = min(LARGEST_BATCH, int(pixels / (height * width * math.fsum(scale**2 for scale in scales))))
    return 1 << max(0, most.bit_length() - 1)


@dataclass(frozen=True)
class Budget:
    """The memory of a device, and the bytes that one pixel of an image needs, all scales included.

    device: name of the device; precision: a name in `predict.PRECISIONS`; free_bytes: before the first image.
    """

    device: str
    precision: str
    bytes_per_pixel: float
    free_bytes: int

    def in_flight(self, height: int, width: int, *, batch: int = 1, most: int) -> int:
        """Return how many batches of so many images of this size fit at once, 1 to `most`."""
        room = (1 - SPARE_MEMORY) * self.free_bytes
        return max(1, min(most, int(room / (batch * self.needs(height, width)))))

    def needs(self, height: int, width: int) -> float:
        """Return the bytes that one image of this size needs."""
        return height * width * self.bytes_per_pixel


class Gate:
    """Lets batches compute side by side, or one of them alone. Who waits to be alone goes before those who come."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside, self._waiting = 0, 0  # batches that compute; batches that are, or want to be, alone

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Compute beside others."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)
            self._inside += 1
        try:
            yield
        finally:
            self._leave()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Compute once nobody else does."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._inside)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._waiting -= 1
            self._leave()

    def _leave(self) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()


def is_memory_error(error: RuntimeError | MemoryError) -> bool:
    """True if torch, or Python, had not enough memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("can't allocate memory", "MPS backend out of memory")
    )
