"""The memory of a prediction: how many images make a batch, and how many batches fit at once."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autolabel.teacher.device import DeviceMemory, device_memory, highest_use, release_cache
from autolabel.teacher.networks.focus import HALO

LARGEST_BATCH = 8  # a larger batch is no faster: one image at scale 2 keeps a GPU busy
BATCHES = 2  # that a GPU has in flight: it computes one while the other is prepared or fetched
HELPERS = 4  # threads that decode for a GPU, and count behind it
# Pixels that are computed at once on a GPU, at all scales together: those of 1024 x 2048 at scales 0.5, 1 and 2.
BATCH_PIXELS = 1024 * 2048 * 21 // 4
SPARE_MEMORY = 0.2  # share of the free memory that is never used
_ELEMENTS = 2**31  # a tensor with so many has places that kernels of a GPU cannot count
# CUDA and its libraries take this much for our process, bytes or a share of the device; others' memory begins above.
_DRIVERS, _DRIVERS_SHARE = 1 << 30, 0.05
_WORDS = (
    "out of memory",  # of torch's allocators, of CUDA itself (an AcceleratorError) and of MPS
    "can't allocate memory", "not enough memory",  # of the CPU's allocator, on Linux and on Windows
    "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED", "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
)  # fmt: skip
_T = TypeVar("_T")


class NotEnoughMemory(RuntimeError):
    """One batch alone does not fit into the device; the message names the size of its images and says what to do."""


class MemoryTaken(RuntimeError):
    """A batch would fit if other processes left the device; the message names the bytes, and no image is to blame."""


def batch_pixels(device: str) -> int:
    """Return the pixels that a run computes at once on a kind of device; 0 for a CPU: its batches are single images."""
    return 0 if device == "cpu" else BATCH_PIXELS


def planned_batch(
    height: int, width: int, *, scales: Sequence[float], pixels: int, focus: float | None = None
) -> int:  # fmt: skip
    """Return the number of images of this size in a batch, 1 to `LARGEST_BATCH`, a power of two.

    They have at most `pixels` at all scales together, unless one alone has more. Kernels for another batch round
    otherwise, so this number depends on nothing that changes from call to call: memory, neighbours, units, restarts.
    focus: share of the rows that the highest scale sees, its halo besides.
    """
    areas = [scale**2 for scale in sorted(scales)]
    if focus is not None and height:
        areas[-1] *= min(1.0, focus + 2 * HALO / (height * max(scales)))
    most = min(LARGEST_BATCH, int(pixels / (height * width * math.fsum(areas))))
    return 1 << max(0, most.bit_length() - 1)


@dataclass(frozen=True)
class Budget:
    """The memory of a device, and the bytes that one pixel of an image needs, all scales included.

    device: name of the device; precision: a name in `device.PRECISIONS`; free_bytes: before the first image;
    total_bytes: of the whole device; elements_per_pixel: of the largest tensor, 0 on a CPU, which can count them;
    fixed_bytes: of any image, however small, as where a model resizes all images to one size.
    """

    device: str
    precision: str
    bytes_per_pixel: float
    free_bytes: int
    total_bytes: int = 0
    elements_per_pixel: float = 0.0
    fixed_bytes: float = 0.0

    @classmethod
    def of_two(cls, small: Budget, large: Budget, *, pixels: tuple[int, int]) -> Budget:
        """Return the budget that follows from those of two images, of so many pixels."""
        used = [budget.bytes_per_pixel * count for budget, count in zip((small, large), pixels, strict=True)]
        slope = max(0.0, (used[1] - used[0]) / (pixels[1] - pixels[0]))
        return replace(large, bytes_per_pixel=slope, fixed_bytes=max(used[0] - slope * pixels[0], 0.0) or max(used))

    def in_flight(self, height: int, width: int, *, batch: int = 1, most: int) -> int:
        """Return how many batches of so many images of this size fit at once, 1 to `most`."""
        room = (1 - SPARE_MEMORY) * self.free_bytes
        return max(1, min(most, int(room / (batch * self.needs(height, width)))))

    def needs(self, height: int, width: int) -> float:
        """Return the bytes that one image of this size needs."""
        return self.fixed_bytes + height * width * self.bytes_per_pixel

    def require_countable(self, height: int, width: int, *, batch: int, at: str) -> None:
        """Raise NotEnoughMemory if a batch, `at` its largest scale, makes a tensor that kernels cannot count."""
        elements = batch * height * width * self.elements_per_pixel
        if elements >= _ELEMENTS:
            raise NotEnoughMemory(
                f"an image of {width} x {height} at scale {at} makes a tensor of {elements:.2g} numbers, and kernels of"
                f" {self.device} count to 2^31: leave that scale out, or cut the image into pieces"
            )


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Meanwhile, `elements` is the largest number of elements of a tensor that this thread has made."""

    elements = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the operation; note the sizes of its results."""
        made = func(*args, **(kwargs or {}))
        sizes = (leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
        self.elements = max(self.elements, *sizes, 0)
        return made


class Gate:
    """Lets batches compute side by side, or one of them alone. Who waits to be alone goes before those who come.

    crowded: sizes of images of which only one batch fits into memory at a time, as was found.
    """

    def __init__(self, device: torch.device) -> None:
        self.crowded: set[tuple[int, ...]] = set()
        self._device, self._changed = device, threading.Condition()
        self._inside, self._waiting = 0, 0  # batches that compute; batches that are, or want to be, alone

    def compute(
        self, work: Callable[[], _T], size: tuple[int, ...], *, alone: bool, error: Callable[[DeviceMemory], Exception]
    ) -> _T:
        """Return the result of `work` on images of a size; if memory lacks, do it once more alone, with an empty cache.

        Raises `error` of the memory that there is then, if it lacks again.
        """
        with self.alone() if alone or size in self.crowded else self.shared():
            found = attempt(work)
        if found is None:
            with self.alone():
                release_cache(self._device)
                found = attempt(work)
                if found is None:
                    raise error(device_memory(self._device))
            self.crowded.add(size)
        return found

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
    """True if torch, a library of the GPU's, or Python had not enough memory."""
    lacking = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return lacking or any(words in str(error) for words in _WORDS)


def attempt(compute: Callable[[], _T]) -> _T | None:
    """Return what `compute` returns; None if memory did not suffice, when all that it made is gone again."""
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        if not is_memory_error(error):
            raise
    return None


def too_little(
    device: str, what: str, memory: DeviceMemory, *, needed: float | None, otherwise: str = "leave that scale out, or "
) -> RuntimeError:
    """Return the error for `what` that does not fit alone: NotEnoughMemory, or MemoryTaken if others are to blame.

    They are if they hold memory without which the `needed` bytes, where known, would fit. `otherwise` is advice.
    """
    free, about = _gib(memory.free), f"about {_gib(needed)} needed, " if needed else ""
    drivers = max(_DRIVERS, _DRIVERS_SHARE * memory.total)
    if memory.others > drivers and (needed or 0) <= memory.free + memory.others - drivers:
        return MemoryTaken(
            f"not enough memory on {device} now for {what} ({about}{free} of {_gib(memory.total)} free):"
            f" another process holds {_gib(memory.others)}; end it, or run the same again later"
        )
    return NotEnoughMemory(
        f"not enough memory on {device} for {what} ({about}{free} free): {otherwise}use a larger device"
    )


def measure(
    device: torch.device, precision: str, pixels: int, *, work: Callable[[], object], network: Callable[[], object]
) -> Budget:
    """Do the work of an image of so many pixels; return the budget that follows from it.

    network: the part of it whose tensors grow with the image; the rest goes band by band. It is not done on a CPU.
    """
    needed, largest = highest_use(device, work), LargestTensor()  # type: ignore[no-untyped-call]
    if device.type != "cpu":
        with largest:
            network()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    memory = device_memory(device)
    return Budget(name, precision, needed / pixels, memory.free, memory.total, largest.elements / pixels)


def _gib(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"
