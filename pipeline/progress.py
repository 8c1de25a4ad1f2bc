"""The progress of a run: counters for people, scripts and dashboards."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, read_json
from autolabel.manifests.locations import BucketPath
from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.wording import counted, percent, size
from autolabel.pipeline.units import Tally

_WINDOW = 60.0  # the rate is taken over so many seconds


@dataclass(frozen=True)
class Counters:
    """Live counters of a call: `before` samples were done when it started, `done` of the `wanted` ones are done since.

    images_per_s: over the last minute. coverage: share of the pixels of all labelled images that have a label;
    classes: how many classes occur in them. workers: those that have a unit.
    """

    asked: int
    before: int
    wanted: int
    done: int
    quarantined: int
    images_per_s: float
    eta_s: float | None
    coverage: float | None
    classes: int
    workers: int

    def note(self) -> str:
        """The rate, the labels and the workers in a few words, for the line below a bar."""
        parts = [f"{self.images_per_s:.1f} images/s"] if self.images_per_s else []
        parts += [f"{percent(self.coverage)} % kept, {self.classes} classes"] if self.coverage is not None else []
        parts += [f"{self.quarantined} quarantined"] if self.quarantined else []
        parts += [counted(self.workers, "worker")] if self.workers else []
        return "  ".join(parts)


def last_update(run: RunFolder) -> str:
    """The time at which a run last wrote its counters, ISO 8601; empty if nothing readable says it: it is no truth."""
    try:
        return str(datetime.fromisoformat(read_json(run.progress_path, dict[str, Any])["updated"]).isoformat())
    except (BadDocument, OSError, KeyError, TypeError, ValueError):
        return ""


class Meter:
    """Adds up what workers report, for the caller and `progress.json`: once a second, in a bucket once a minute.

    It is what the engines call a monitor; see `pipeline/engine.py`.
    """

    def __init__(
        self,
        out: RunFolder,
        names: tuple[str, ...],
        *,
        asked: int,
        wanted: int,
        before: Tally,
        on_progress: Callable[[Counters], None] | None = None,
        on_note: Callable[[str], None] | None = None,
        on_unit: Callable[[str, int], None] | None = None,
        budgets: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self.out, self.names, self.asked, self.wanted, self.before = out, names, asked, wanted, before
        self._on_progress, self._on_note, self._on_unit = on_progress, on_note, on_unit
        self.budgets: list[dict[str, Any]] = []  # the latest memory budget of every kind of device
        self._gpus = {str(budget["device"]) for budget in budgets if _of_gpu(budget)}  # kinds in this and earlier calls
        self._total = Tally()  # of this call
        self._under_way: dict[str, Tally] = {}  # the share of units that are not left yet
        self._history = deque([(time.monotonic(), 0)])  # (time, samples done in this call)
        self._alive = 0
        self._written, self._pause = float("-inf"), 60 if isinstance(out.path, BucketPath) else 1

    def unit(self, name: str, tally: Tally, *, whole: bool = False) -> None:
        """Count the finished samples of a unit so far; `whole` when the unit is left."""
        self._total = self._total + tally - self._under_way.pop(name, Tally())
        if not whole:
            self._under_way[name] = tally
        elif self._on_unit:
            self._on_unit(name, tally.done)
        self.tick()

    def workers(self, alive: int) -> None:
        """Set the number of workers that have a unit."""
        if alive == self._alive:
            return
        if not self._total.done:
            self._history = deque([(time.monotonic(), 0)])  # the clock starts with the first worker
        self._alive = alive
        self.tick()

    def budget(self, budget: dict[str, Any]) -> None:
        """Keep one memory budget for each kind of device: workers on equal devices have equal ones."""
        self.budgets[:] = [*(b for b in self.budgets if b["device"] != budget["device"]), budget]
        if _of_gpu(budget) and budget["device"] not in self._gpus:
            if len(self._gpus) == 1:
                self.note(
                    f"{budget['device']} labels a run that {next(iter(self._gpus))} has labelled too, both in"
                    f" {budget['precision']}: kernels of two kinds of GPU round differently, so rare pixels may differ"
                )
            self._gpus.add(budget["device"])

    def note(self, message: str) -> None:
        """Pass on something that a person should know."""
        if self._on_note:
            self._on_note(message)

    def now(self) -> Counters:
        """The counters."""
        total = self._total
        now, (then, past) = time.monotonic(), self._history[0]
        rate = (total.done - past) / (now - then) if now > then else 0.0
        everything = self.before + total
        return Counters(
            asked=self.asked,
            before=self.before.done,
            wanted=self.wanted,
            done=total.done,
            quarantined=everything.quarantined,
            images_per_s=rate,
            eta_s=(self.wanted - total.done) / rate if rate > 0 else None,
            coverage=everything.kept.total() / everything.pixels if everything.pixels else None,
            classes=sum(pixels > 0 for pixels in everything.kept.values()),
            workers=self._alive,
        )

    def tick(self, *, last: bool = False) -> None:
        """Bring file and caller up to date."""
        now = time.monotonic()
        self._history.append((now, self._total.done))
        while len(self._history) > 2 and now - self._history[1][0] > _WINDOW:
            self._history.popleft()
        if self._on_progress:
            self._on_progress(self.now())
        if now - self._written > self._pause or last:
            self._written = now
            self._write()

    def _write(self) -> None:
        everything = self.before + self._total
        share = {name: everything.kept[c] / (everything.pixels or 1) for c, name in enumerate(self.names)}
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        counters = {**asdict(self.now()), "class_coverage": share, "updated": stamp}
        with contextlib.suppress(OSError):  # no label is lost with a counter; a full disk stops the labels themselves
            storage.write_json(self.out.progress_path, counters)


def _of_gpu(budget: Mapping[str, Any]) -> bool:
    """True if a budget is that of a GPU, not of a CPU or of kept confidence."""
    return budget["device"] != "cpu" and "bytes_per_pixel" in budget


def at_once(budget: Mapping[str, Any]) -> dict[str, str]:
    """The images that a budget lets be computed at once, by size: "4" on a CPU, "2 x 8" for two batches of eight."""
    images, batches = budget["images_at_once"], budget["batches_in_flight"]
    return {name: f"{batches[name]}" + (f" x {n}" if n > 1 else "") for name, n in images.items()}


def memory_needed(budget: Mapping[str, Any]) -> str:
    """The memory that an image needs under a budget: for each pixel, and whatever its size."""
    fixed = f"{size(budget['fixed_bytes'])} an image and " if budget["fixed_bytes"] else ""
    return f"{fixed}{size(budget['bytes_per_pixel'])} a pixel"
