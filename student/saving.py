"""Saves of a training that no step waits for, and curves that grow line by line.

The state is copied, and a thread writes the copy. What a killed training lacks, the next one does again: within a save
`last.pt` comes last, and a training that goes on from it first cuts the curves back to its step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from autolabel.manifests import storage
from autolabel.student.evaluate import Scores
from autolabel.student.steps import CURVES, StepReport
from autolabel.teacher.checkpoints import write_content

_SECONDS = 60.0  # between saves without a validation, at least
_PAUSE = 50  # times as long as a save takes, nothing more is saved

Work = Callable[[], object]


def copied(value: Any) -> Any:
    """Return nested dictionaries and lists with copies of their tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(inner) for key, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list | tuple) else value


class Saves:
    """The files of a training, written by a thread. Its errors are raised here, in the next call of any method.

    folder: the training's. last: the path of its last.pt, which has `step` steps.
    """

    def __init__(self, folder: Path, last: Path, *, step: int) -> None:
        self._folder, self._last, self._done = folder, last, step
        self._curves = Curves(folder / "curves.csv", CURVES, step=step)
        self._waiting: list[Work] = []  # for the next write
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved, self._took, self._any = time.monotonic(), 0.0, False

    def add(self, report: StepReport) -> None:
        """Remember a row of the curves."""
        self._curves.add(report.cells())

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
        self._start([*self._waiting, self._curves.append(), last, partial(setattr, self, "_done", step)], timed=True)

    def write(self, *, curves: bool = False) -> None:
        """Write what was remembered of a validation, with the curves; curves: even if there is nothing else."""
        if self._waiting or curves:
            self._start([*self._waiting, self._curves.append()], timed=False)

    def finish(self) -> int:
        """Wait until everything is written; return the step of last.pt, 0 if there is none."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()
        return self._done

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


class Curves:
    """A CSV file of numbers whose first column is the step; rows are appended to it.

    A training that goes on from `step` cuts the rest off: later rows, and a line that was not written to its end.
    """

    def __init__(self, path: Path, columns: Sequence[str], *, step: int) -> None:
        self.path, self.columns = path, len(columns)
        self._new = [",".join(columns)]
        old = storage.read(path) if storage.exists(path) else b""
        kept = self._kept(old.decode(errors="replace").split("\n")[:-1], step)
        if kept:
            self._new = []
        data = "".join(f"{line}\n" for line in kept).encode()
        if not kept and old:
            storage.remove(path)
        elif data != old:
            storage.write(path, data)

    def _kept(self, lines: Sequence[str], step: int) -> list[str]:
        if not step or not lines or lines[0] != self._new[0]:
            return []
        kept, before = [lines[0]], 0
        for line in lines[1:]:
            cells = line.split(",")
            number = int(cells[0]) if cells[0].isdecimal() else 0
            if len(cells) != self.columns or not before < number <= step:
                break
            kept.append(line)
            before = number
        return kept

    def add(self, cells: Sequence[str]) -> None:
        """Remember a row."""
        self._new.append(",".join(cells))

    def append(self) -> Work:
        """Return the work of writing the rows that were remembered since the last call."""
        data = "".join(f"{line}\n" for line in self._new).encode()
        self._new = []
        return lambda: storage.append(self.path, data) if data else None
