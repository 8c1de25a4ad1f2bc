"""The pace of images on the host and on the device that it feeds: how many threads that takes, and how many cores."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

ENOUGH = 0.95  # share of the time in which a device works that counts as busy


class HostPace:
    """Seconds that images take, added up by the threads of a labeller.

    images: those that were predicted. host: from the beginning to the end of decoding and finishing, waits for a disk
    included. cpu: CPU time of all threads. device: time in which at least one batch was at the device.
    """

    def __init__(self) -> None:
        self.images, self.host, self.cpu, self.device = 0, 0.0, 0.0, 0.0
        self._lock, self._batches, self._since = threading.Lock(), 0, 0.0

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        """Count the block as work on the host."""
        started, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            with self._lock:
                self.host += time.perf_counter() - started
                self.cpu += time.thread_time() - cpu

    @contextlib.contextmanager
    def on_device(self, images: int) -> Iterator[None]:
        """Count the block as the prediction of so many images. Several threads may be inside."""
        cpu = time.thread_time()
        with self._lock:
            if not self._batches:
                self._since = time.perf_counter()
            self._batches += 1
        try:
            yield
        finally:
            with self._lock:
                self._batches -= 1
                self.images += images
                self.cpu += time.thread_time() - cpu
                if not self._batches:
                    self.device += time.perf_counter() - self._since

    def threads(self, *, now: int, most: int) -> int:
        """The threads, 1 to `most`, that keep pace with the device, and one more for images that take longer.

        Before anything was measured, as many as there are `now`.
        """
        if not self.images or not self.device:
            return now
        return min(most, math.ceil(self.host / self.device) + 1)

    def needs(self, cores: int) -> HostNeeds | None:
        """Return the needs of the device, beside so many cores; None before anything was predicted."""
        if not self.images or not self.device:
            return None
        return HostNeeds(1e3 * self.cpu / self.images, 1e3 * self.device / self.images, cores)


@dataclass(frozen=True)
class HostNeeds:
    """Milliseconds of CPU time and of the device that an image takes, and the cores that work beside the device."""

    cpu_ms: float
    device_ms: float
    cores: int

    @property
    def wanted(self) -> int:
        """The cores that keep the device busy."""
        return max(1, math.ceil(ENOUGH * self.cpu_ms / self.device_ms))

    @property
    def busy(self) -> float:
        """The share of the time in which these cores can keep the device busy, at most 1."""
        return min(1.0, self.cores * self.device_ms / self.cpu_ms) if self.cpu_ms else 1.0
