"""The memory budget of a prediction: the bytes that an image needs, and the number of images that fit at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST_BATCH = 8  # a larger batch is no faster: one image at scale 2 keeps a GPU busy
SPARE_MEMORY = 0.2  # share of the free memory that is never used


class NotEnoughMemory(RuntimeError):
    """One image alone does not fit; the message names its size and says what to do."""


@dataclass(frozen=True)
class Budget:
    """The memory of a device, and the bytes that one pixel of an image needs, all scales included.

    device: name of the device; precision: a name in `predict.PRECISIONS`; free_bytes: before the first image.
    """

    device: str
    precision: str
    bytes_per_pixel: float
    free_bytes: int

    def at_once(self, height: int, width: int, *, most: int = LARGEST_BATCH, batches: int = 1) -> int:
        """Return the number of images of this size to compute at once, 1 to `most`, with `batches` in flight."""
        room = (1 - SPARE_MEMORY) * self.free_bytes / batches
        return max(1, min(most, int(room / self.needs(height, width))))

    def needs(self, height: int, width: int) -> float:
        """Return the bytes that one image of this size needs."""
        return height * width * self.bytes_per_pixel


def is_memory_error(error: RuntimeError | MemoryError) -> bool:
    """True if torch, or Python, had not enough memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("can't allocate memory", "MPS backend out of memory")
    )
