"""Who follows a training elsewhere must see its numbers, once each, and must never hold it up or end it."""

from __future__ import annotations

import csv
import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import autolabel, names_in

from autolabel.student import trackers
from autolabel.student.job import TrainJob
from autolabel.student.metrics import Metrics, read_metrics
from autolabel.student.steps import StepReport
from autolabel.student.trackers import Trackers
from autolabel.student.train import train

IOU = {"traffic light": 0.5, "train": None}
STEPS = [StepReport(n, 1 / n, 2.0, 0.001, 9.0, *((n / 10, IOU) if n % 2 == 0 else ())) for n in range(1, 7)]


def follow(
    folder: Path, names: Sequence[str], *, step: int, steps: Sequence[StepReport], recipe: dict[str, Any] | None = None
) -> list[str]:
    """One call of a training that goes on from `step`: metrics and trackers get the steps; return the notes."""
    metrics = Metrics(folder, step=step)
    following = Trackers(names, folder, recipe={"arch": "small"} if recipe is None else recipe)
    following.start(step=step)
    for report in steps:
        metrics.add(report)
        following.add(report)
    metrics.append()()
    notes: list[str] = []
    following.close(notes.append)
    return notes


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars that TensorBoard shows, read by its own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_reads_the_numbers_of_a_training_that_was_stopped_and_went_on(city: Path, tmp_path: Path) -> None:
    """Steps beyond the last save come again, and stand there once. Its numbers are float32."""
    job = TrainJob(
        city / "fine.parquet", city / "val.parquet", tmp_path, steps=3, batch_size=2, validations=3, crop=(64, 64),
        device="cpu", log=("tensorboard", "csv"),
    )  # fmt: skip

    def stop(report: StepReport) -> None:
        if report.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(job, stop)
    train(job)
    steps = read_metrics(tmp_path)
    assert [step.step for step in steps] == [1, 2, 3]
    seen = events(tmp_path)
    for name in ("loss", "gradient_norm", "learning_rate", "images_per_s", "miou"):
        assert seen[name] == [(step.step, np.float32(getattr(step, name))) for step in steps]
    classes = [(f"iou/{name}", s.step, np.float32(iou)) for s in steps for name, iou in (s.iou or {}).items() if iou]
    found = [(tag, *event) for tag, of_tag in seen.items() if tag.startswith("iou/") for event in of_tag if event[1]]
    assert classes and sorted(found) == sorted(classes)
    with open(tmp_path / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["step"]), float(row["loss"])) for row in rows] == [(step.step, step.loss) for step in steps]
    assert "log" not in json.loads((tmp_path / "train.json").read_text())  # who follows decides no result


def test_steps_beyond_the_last_save_replace_what_tensorboard_has_of_them(tmp_path: Path) -> None:
    follow(tmp_path, ("tensorboard",), step=0, steps=STEPS[:4])
    again = [replace(step, loss=9.0) for step in STEPS[2:]]
    follow(tmp_path, ("tensorboard",), step=2, steps=again)
    assert events(tmp_path)["loss"] == [(1, 1.0), (2, 0.5), (3, 9.0), (4, 9.0), (5, 9.0), (6, 9.0)]


def test_a_tracker_that_comes_later_gets_what_was_before(tmp_path: Path) -> None:
    assert follow(tmp_path, (), step=0, steps=STEPS[:4]) == []
    assert names_in(tmp_path) == ["metrics.jsonl"]
    follow(tmp_path, ("tensorboard", "csv"), step=4, steps=STEPS[4:])
    assert events(tmp_path)["loss"] == [(n, np.float32(1 / n)) for n in range(1, 7)]
    lines = (tmp_path / "curves.csv").read_text().splitlines()
    assert lines[0] == "step,loss,gradient_norm,learning_rate,images_per_s,miou"
    assert lines[1:3] == ["1,1.0,2.0,0.001,9.0,", "2,0.5,2.0,0.001,9.0,0.2"] and len(lines) == 7


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls of a package that stands in for wandb."""
    calls: list[tuple[Any, ...]] = []

    def init(**settings: Any) -> object:
        calls.append(("init", settings))
        return SimpleNamespace(
            id=settings["id"] or "an-id",
            log=lambda numbers, step: calls.append(("log", step, numbers)),
            finish=lambda: calls.append(("finish",)),
        )

    package = ModuleType("wandb")
    package.__dict__.update(
        init=init, Settings=lambda **more: more, login=lambda **more: calls.append(("login", more)) or False
    )
    monkeypatch.setitem(sys.modules, "wandb", package)
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_wandb_gets_every_step_once_under_one_id_and_stays_offline(
    wandb: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    folder = tmp_path / "compare" / "fine-seed0"
    folder.mkdir(parents=True)
    assert follow(folder, ("wandb",), step=0, steps=STEPS[:4]) == []
    settings = wandb[0][1]
    assert (settings["mode"], settings["id"], settings["project"]) == ("offline", None, "autolabel")
    assert (settings["name"], settings["group"], settings["dir"]) == ("fine-seed0", "compare", str(folder))
    assert settings["config"] == {"arch": "small"}
    assert wandb[2] == (
        "log", 2,
        {"loss": 0.5, "gradient_norm": 2.0, "learning_rate": 0.001, "images_per_s": 9.0, "miou": 0.2,
         "iou/traffic light": 0.5},
    )  # fmt: skip
    assert wandb[-1] == ("finish",)
    del wandb[:]
    follow(folder, ("wandb",), step=2, steps=STEPS[2:])  # killed after step 4, saved at step 2
    assert wandb[0][1]["id"] == "an-id" and [call[1] for call in wandb[1:-1]] == [5, 6]
    del wandb[:]
    follow(folder, ("wandb",), step=6, steps=[])  # a finished training that is asked for again
    assert wandb == []


def test_wandb_asks_nobody_for_a_key(
    wandb: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    (note,) = follow(tmp_path, ("wandb",), step=0, steps=STEPS)
    assert note == (
        "wandb no longer follows this training (RuntimeError: WANDB_MODE is online and there is no key: `wandb login`"
        " first); metrics.jsonl has everything"
    )
    assert wandb == [("login", {"prompt": False})]


def test_mlflow_gets_every_step_once_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class Client:
        def __init__(self, tracking_uri: str) -> None:
            calls.append(("at", tracking_uri))

        def get_experiment_by_name(self, name: str) -> None:
            calls.append(("experiment", name))

        def create_experiment(self, name: str) -> str:
            return f"id of {name}"

        def create_run(self, place: str, *, run_name: str) -> object:
            calls.append(("run", place, run_name))
            return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

        def __getattr__(self, name: str) -> Any:
            return lambda *values, **more: calls.append((name, *values, *more.values()))

    package = ModuleType("mlflow")
    package.__dict__.update(
        MlflowClient=Client,
        entities=SimpleNamespace(Metric=lambda key, value, timestamp, step: (key, value, step)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", package)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    odd = [replace(STEPS[0], iou={"curb (cut), sloped": 0.25}), *STEPS[1:]]
    folder = tmp_path / "student"
    folder.mkdir()
    assert follow(folder, ("mlflow",), step=0, steps=odd[:4]) == []
    assert calls[:4] == [
        ("at", f"sqlite:///{folder}/mlflow.db"), ("experiment", "autolabel"), ("run", "id of autolabel", "student"),
        ("log_param", "r1", "arch", "small"),
    ]  # fmt: skip
    name, run, metrics = calls[4]
    assert (name, run) == ("log_batch", "r1") and calls[5:] == [("set_terminated", "r1")]
    assert [m for m in metrics if m[0] == "loss"] == [("loss", 1 / n, n) for n in range(1, 5)]
    assert ("iou/curb _cut__ sloped", 0.25, 1) in metrics
    del calls[:]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    follow(folder, ("mlflow",), step=2, steps=STEPS[2:])
    assert calls[:2] == [("at", "http://127.0.0.1:1"), ("update_run", "r1", "RUNNING")]
    assert [m for m in calls[2][2] if m[0] == "loss"] == [("loss", 1 / 5, 5), ("loss", 1 / 6, 6)]


class Broken:
    """A tracker that fails at once, or never answers."""

    id = ""
    answer = threading.Event()

    def __init__(self, tracked: trackers.Tracked) -> None:
        if tracked.recipe["kind"] == "silent":
            self.answer.wait(60)
        raise ConnectionError("no such host\nand more")

    def log(self, steps: Sequence[StepReport]) -> None:
        raise AssertionError

    def close(self) -> None:
        raise AssertionError


def test_a_tracker_that_fails_or_never_answers_costs_a_note_and_disturbs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers._OPEN, "wandb", Broken)
    monkeypatch.setattr(trackers, "_LAST_S", 0.5)
    for kind, why in {"failing": "ConnectionError: no such host", "silent": "it has not taken the last steps"}.items():
        folder = tmp_path / kind
        folder.mkdir()
        notes = follow(folder, ("wandb", "csv"), step=0, steps=STEPS, recipe={"kind": kind})
        assert [note.partition(")")[0] for note in notes] == [
            f"wandb no longer follows this training ({why}" + (" in 0 s" if kind == "silent" else " and more")
        ]
        assert len((folder / "curves.csv").read_text().splitlines()) == 7
        assert len(read_metrics(folder)) == 6
    Broken.answer.set()


def test_trackers_that_are_unknown_or_not_installed_are_refused(city: Path, tmp_path: Path) -> None:
    asked = ("train", city / "fine.parquet", "--val", city / "val.parquet", "--out", tmp_path / "out", "--log")
    for names, expected in {
        "csv,comet": "log ('csv', 'comet'): expected names of csv, tensorboard, wandb, mlflow, every name once",
        "csv,csv": "every name once",
        "mlflow": "log mlflow: needs the package mlflow: pip install 'autolabel[mlflow]'",
    }.items():
        refused = autolabel(*asked, names)
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1) and expected in refused.stderr
    assert not (tmp_path / "out").exists()
