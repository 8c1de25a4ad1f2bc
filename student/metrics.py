"""metrics.jsonl: one JSON object for each step of a training, appended with every save.

A training that goes on from a step cuts the rest off: later steps, and a line that was not written to its end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, json_of, read_lines
from autolabel.student.steps import StepReport

METRICS = "metrics.jsonl"  # in the folder of a training
_MOST_BYTES = 1 << 31  # several million steps

Work = Callable[[], object]


def read_metrics(folder: Path, *, advice: str = "choose another --out") -> list[StepReport]:
    """Read the steps of a training. Raises BadDocument, which ends with the advice."""
    path = folder / METRICS
    records = read_lines(path, dict, advice=advice, at_most=_MOST_BYTES)
    return [StepReport.of(record, f"{path}, line {place}") for place, record in enumerate(records, 1)]


class Metrics:
    """The metrics of the training in a folder that goes on from `step`; steps are appended."""

    def __init__(self, folder: Path, *, step: int) -> None:
        self._path = folder / METRICS
        self._new: list[str] = []
        old = storage.read(self._path) if storage.exists(self._path) else b""
        kept = self._kept(old, step)
        if old and not kept:
            storage.remove(self._path)
        elif kept != old:
            storage.write(self._path, kept)

    def _kept(self, old: bytes, step: int) -> bytes:
        """The lines up to the step, as far as they are whole and their steps rise."""
        end = before = 0
        while step and (line := old[end : old.find(b"\n", end) + 1]):
            try:
                number = StepReport.of(json_of(line, dict, name=METRICS), METRICS).step
            except BadDocument:
                break
            if not before < number <= step:
                break
            end, before = end + len(line), number
        return old[:end]

    def add(self, report: StepReport) -> None:
        """Remember a step."""
        self._new.append(json.dumps(report.record()))

    def append(self) -> Work:
        """Return the work of writing the steps that were remembered since the last call."""
        data = "".join(f"{line}\n" for line in self._new).encode()
        self._new = []
        return lambda: storage.append(self._path, data) if data else None
