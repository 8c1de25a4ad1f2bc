"""Saves of a training that no step waits for.

The state is copied, and a thread writes the copy. What a killed training lacks, the next one does again: within a save
`last.pt` comes last, and a training that goes on from it first cuts metrics.jsonl back to its step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from autolabel.student.evaluate import Scores
from autolabel.student.metrics import Metrics, Work
from autolabel.student.steps import StepReport
from autolabel.student.trackers import Trackers
from autolabel.teacher.checkpoints import write_content

_SECONDS = 60.0  # between saves without a validation, at least
_PAUSE = 50  # times as long as a save takes, nothing more is saved


def copied(value: Any) -> Any:
    """Return nested dictionaries and lists with copies of their tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(inner) for key, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list | tuple) else value


class Saves:
    """The files of a training, written by a thread. Its errors are raised here, in the next call of any method.

    folder: the training's. last: the path of its last.pt, which has `step` steps. trackers: get every step at once.
    """

    def __init__(self, folder: Path, last: Path, *, step: int, trackers: Trackers) -> None:
        self._folder, self._last, self._done = folder, last, step
        self._metrics = Metrics(folder, step=step)
        self.trackers = trackers
        self.trackers.start(step=step)
        self._waiting: list[Work] = []  # for the next write
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved, self._took, self._any = time.monotonic(), 0.0, False

    def add(self, report: StepReport) -> None:
        """Remember a step of the metrics, and give it to the trackers."""
        self._metrics.add(report)
        self.trackers.add(report)

    def keep(self, scores: Scores, best: Mapping[str, Any] | None, *, last: bool) -> None:
        """Remember the scores of a validation, and the checkpoint if it is the best; last: after the last step."""
        if best is not None:
            self._waiting.append(partial(write_content, self._folder / "best.pt", best))
            self._waiting.append(partial(scores.write, self._folder / "scores.json"))
        if last:
            self._waiting.append(partial(scores.write, self._folder / "last_scores.json"))

    def due(self, *, validated: bool) -> bool:
        """Return True if it is time to save: also after a validation, but not soon after a save that took long."""
        self._raise()
        pause = time.monotonic() - self._saved
        if validated and not self._any:
            return True
        return pause > _PAUSE * self._took and (validated or pause > _SECONDS)

    def save_last(self, content: Mapping[str, Any], *, step: int) -> None:
        """Write everything that was remembered, then last.pt."""
        last = partial(write_content, self._last, content)
        self._start([*self._waiting, self._metrics.append(), last, partial(setattr, self, "_done", step)], timed=True)

    def write(self, *, metrics: bool = False) -> None:
        """Write what was remembered of a validation, with the metrics; metrics: even if there is nothing else."""
        if self._waiting or metrics:
            self._start([*self._waiting, self._metrics.append()], timed=False)

    def finish(self) -> int:
        """Wait until everything is written; return the step of last.pt, 0 if there is none."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()
        return self._done

    def close(self, on_note: Callable[[str], None]) -> None:
        """Wait until everything is written, then for the trackers; `on_note` hears which of them have failed."""
        try:
            self.finish()
        finally:
            self.trackers.close(on_note)

    def _start(self, works: list[Work], *, timed: bool) -> None:
        self.finish()
        self._waiting, self._any = [], self._any or timed
        self._thread = threading.Thread(target=self._do, args=(works, timed), daemon=True)
        self._thread.start()

    def _do(self, works: list[Work], timed: bool) -> None:
        began = time.monotonic()
        try:
            for work in works:
                work()
        except BaseException as error:
            self._error = error
        if timed:
            self._saved = time.monotonic()
            self._took = self._saved - began

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
