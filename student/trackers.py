"""Trackers that follow a training: a CSV file, TensorBoard, Weights & Biases, MLflow.

metrics.jsonl is the record of a training; a tracker has a copy, for people who look there. Each has a thread of its
own, so that no step and no save waits for it. One that fails is left alone from then on, and a note says so.

`trackers/NAME.json` in the training's folder has the tracker's own id of the training and the last step that it was
given. A training that goes on gives it the steps of metrics.jsonl that it lacks, so that one which comes later has them
all. Nothing leaves the machine, and nobody is asked for anything, unless the environment says so (WANDB_MODE,
MLFLOW_TRACKING_URI).
"""

from __future__ import annotations

import collections
import csv
import importlib
import importlib.util
import io
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from autolabel.manifests import storage
from autolabel.manifests.documents import read_json
from autolabel.manifests.wording import kind_and_reason
from autolabel.student.metrics import METRICS, read_metrics
from autolabel.student.steps import NUMBERS, StepReport

CURVES = ("step", *NUMBERS)  # columns of curves.csv
_PAUSE_S = 5.0  # a tracker gets the steps of so many seconds at once
_LAST_S = 30.0  # a training that ends waits so long for its trackers
_MOST_METRICS = 1000  # that MLflow takes in one call
_NO_KEY = re.compile(r"[^\w\-. /:]")  # characters that MLflow refuses in a name
_PROJECT = "autolabel"


@dataclass(frozen=True)
class Tracked:
    """A training as a tracker sees it.

    id: the tracker's own name of this training, "" if it has none. since: the last step that it keeps; None if it has
    none at all.
    """

    folder: Path
    recipe: Mapping[str, Any]
    id: str = ""
    since: int | None = None


class Tracker(Protocol):
    """A program that shows how trainings go."""

    id: str

    def log(self, steps: Sequence[StepReport]) -> None:
        """Take steps, in order; return when nothing of them can be lost any more."""

    def close(self) -> None:
        """End the training of this process."""


class CurvesFile:
    """curves.csv: the numbers of every step as a table; written anew when a training goes on, then appended to."""

    id = ""

    def __init__(self, tracked: Tracked) -> None:
        self._path = tracked.folder / "curves.csv"
        self._new = True

    def log(self, steps: Sequence[StepReport]) -> None:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerows([[getattr(step, name) for name in CURVES] for step in steps])
        if self._new:
            storage.write(self._path, f"{','.join(CURVES)}\n{text.getvalue()}".encode())
        else:
            storage.append(self._path, text.getvalue().encode())
        self._new = False

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files in the folder tensorboard/ of the training; steps that come again replace the former ones."""

    id = ""

    def __init__(self, tracked: Tracked) -> None:
        package: Any = importlib.import_module("torch.utils.tensorboard")
        again = None if tracked.since is None else tracked.since + 1
        self._writer = package.SummaryWriter(str(tracked.folder / "tensorboard"), purge_step=again)

    def log(self, steps: Sequence[StepReport]) -> None:
        for step in steps:
            for name, value in step.numbers().items():
                self._writer.add_scalar(name, value, step.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb, offline unless WANDB_MODE says otherwise; `wandb sync` sends it later."""

    def __init__(self, tracked: Tracked) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb: Any = importlib.import_module("wandb")
        mode = os.environ.get("WANDB_MODE") or "offline"
        if mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("WANDB_MODE is online and there is no key: `wandb login` first")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            group=tracked.folder.absolute().parent.name,
            name=tracked.folder.absolute().name,
            dir=str(tracked.folder),
            config=dict(tracked.recipe),
            mode=mode,
            id=tracked.id or None,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.id = self._run.id

    def log(self, steps: Sequence[StepReport]) -> None:
        for step in steps:
            self._run.log(step.numbers(), step=step.step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, in mlflow.db of the training's folder unless MLFLOW_TRACKING_URI names another place."""

    def __init__(self, tracked: Tracked) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        mlflow: Any = importlib.import_module("mlflow")
        self._metric = mlflow.entities.Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{tracked.folder.absolute() / 'mlflow.db'}"
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        if tracked.id:
            self.id = tracked.id
            self._client.update_run(self.id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT
        experiment = self._client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self.id = self._client.create_run(place, run_name=tracked.folder.absolute().name).info.run_id
        for key, value in tracked.recipe.items():
            self._client.log_param(self.id, key, value)

    def log(self, steps: Sequence[StepReport]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._metric(_NO_KEY.sub("_", name), value, now, step.step)
            for step in steps
            for name, value in step.numbers().items()
        ]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self.id, metrics=metrics[start : start + _MOST_METRICS])

    def close(self) -> None:
        self._client.set_terminated(self.id)


_OPEN: dict[str, Callable[[Tracked], Tracker]] = {
    "csv": CurvesFile,
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def require_packages(names: Sequence[str]) -> None:
    """Raise ValueError if the package of a tracker is missing."""
    for name in names:
        if name != "csv" and name not in sys.modules and importlib.util.find_spec(name) is None:
            raise ValueError(f"log {name}: needs the package {name}: pip install 'autolabel[{name}]'")


class Trackers:
    """The trackers of the training in a folder, by name."""

    def __init__(self, names: Sequence[str], folder: Path, *, recipe: Mapping[str, Any]) -> None:
        self._names, self._tracked = names, Tracked(folder, recipe)
        self._followers: list[_Follower] = []

    def start(self, *, step: int) -> None:
        """Begin to follow a training that goes on from `step`, to which its metrics.jsonl is cut back already."""
        folder = self._tracked.folder
        before = read_metrics(folder) if self._names and storage.exists(folder / METRICS) else []
        self._followers = [_Follower(name, self._tracked, before=before, step=step) for name in self._names]

    def add(self, report: StepReport) -> None:
        """Give a step to all trackers, without waiting."""
        for follower in self._followers:
            follower.steps.append(report)

    def tell(self, on_note: Callable[[str], None]) -> None:
        """Say a line for each tracker that has failed since the last call."""
        failed = [f for f in self._followers if f.trouble]
        self._followers = [f for f in self._followers if not f.trouble]
        for f in failed:
            on_note(f"{f.name} no longer follows this training ({f.trouble}); {METRICS} has everything")

    def close(self, on_note: Callable[[str], None]) -> None:
        """Give the trackers the last steps, and wait for them, but not for ever."""
        for follower in self._followers:
            follower.closing.set()
        until = time.monotonic() + _LAST_S
        for follower in self._followers:
            follower.join(max(0.0, until - time.monotonic()))
            if follower.is_alive():
                follower.trouble = f"it has not taken the last steps in {_LAST_S:.0f} s"
        self.tell(on_note)


class _Follower(threading.Thread):
    """The thread of one tracker; `trouble` says why it has ended too early."""

    def __init__(self, name: str, tracked: Tracked, *, before: Sequence[StepReport], step: int) -> None:
        super().__init__(name=name, daemon=True)
        self.closing, self.trouble = threading.Event(), ""
        self.steps = collections.deque(before)
        self._tracked, self._step = tracked, step
        self.start()

    def run(self) -> None:
        try:
            self._follow()
        except BaseException as error:
            self.trouble = kind_and_reason(error).partition("\n")[0]

    def _follow(self) -> None:
        record = self._tracked.folder / "trackers" / f"{self.name}.json"
        state = read_json(record, dict[str, Any]) if storage.exists(record) else {}
        known, had = str(state.get("id", "")), int(state.get("step", 0))
        since = min(had, self._step) if had else None
        # One with an id cannot take a step back, and keeps what comes again; a file is written anew.
        first = 0 if self.name == "csv" else had if known else since or 0
        tracker: Tracker | None = None
        over = False
        while not over:
            over = self.closing.wait(_PAUSE_S)
            steps = [self.steps.popleft() for _ in range(len(self.steps))]
            steps = [step for step in steps if step.step > first]
            if steps:
                tracker = tracker or _OPEN[self.name](replace(self._tracked, id=known, since=since))
                tracker.log(steps)
                storage.write_json(record, {"id": tracker.id, "step": steps[-1].step})
        if tracker:
            tracker.close()
