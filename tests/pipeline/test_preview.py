"""A trial that counts the first, slow batches of a GPU would promise days where hours are needed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import photograph, scanned

from autolabel.manifests.recipe import Machine
from autolabel.manifests.run.folder import Run
from autolabel.pipeline import engine, label, pace, prepare
from autolabel.pipeline import preview as module
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.predictor import Decoded, TeacherPredictor
from autolabel.pipeline.prepare import TeacherSource
from autolabel.pipeline.preview import preview
from autolabel.teacher.decide import Prediction
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.predict import Teacher


class Simulated(TeacherPredictor):
    """A GPU that takes 30 s for each of its first two batches, and an eighth of a second an image for all others."""

    def __init__(self, teacher: Teacher, run: Run) -> None:
        super().__init__(teacher, run.recipe)
        self.device, self.batches, self.now = "cuda", list[int](), 0.0
        self.lock = threading.Lock()

    def predict(self, batch: Sequence[Decoded]) -> list[Prediction]:
        with self.lock:
            self.now += 30 if len(self.batches) < 2 else len(batch) / 8
            self.batches.append(len(batch))
        height, width = batch[0].image.shape[:2]
        tables = np.zeros((19, 20), np.int64), np.zeros(19)
        tables[0][0, 19] = height * width
        return [Prediction(np.ones((height, width), np.uint8), 2, *tables) for _ in batch]


class Quarters(threading.local):
    """A clock of a thread's CPU time, which goes on by a quarter of a second whenever it is looked at."""

    seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 0.25
        return self.seconds


@pytest.mark.parametrize(("images", "probed", "batches"), [(70, 64, [8] * 10), (3, 3, [8, 8, 3])])
def test_a_trial_on_a_gpu_counts_from_the_third_batch_on(
    images: int, probed: int, batches: list[int], city: Path, teacher: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    photograph(city, tmp_path / "drive", [f"{n:02}" for n in range(images)])
    gpus: list[Simulated] = []

    def simulated(seer: Teacher, recipe: object) -> Simulated:
        gpus.append(Simulated(seer, SimpleNamespace(recipe=recipe)))  # type: ignore[arg-type]
        return gpus[0]

    monkeypatch.setattr(label, "time", SimpleNamespace(perf_counter=lambda: gpus[0].now))
    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: gpus[0].now, thread_time=Quarters()))
    begun: list[int] = []
    monkeypatch.setattr(pace.HostPace, "threads", lambda *_, **__: 1)
    begin = label.Labeller._begin_threads

    def noted(labeller: label.Labeller, threads: int) -> None:
        begun.append(threads)
        begin(labeller, threads)

    monkeypatch.setattr(label.Labeller, "_begin_threads", noted)
    for room in (engine, label):
        monkeypatch.setattr(room, "cores", lambda: 2)
    monkeypatch.setattr(prepare, "pick_device", lambda name: name)
    monkeypatch.setattr(TeacherSource, "load", lambda *_: load_teacher(teacher, device="cpu"))
    monkeypatch.setattr(module, "TeacherPredictor", simulated)
    job = LabelJob(
        scanned(city, tmp_path / "drive"), teacher, tmp_path / "run", device="cuda", precision="float32", unit_size=35,
        machine=Machine(engine="local"),
    )  # fmt: skip
    found = preview(job)
    assert found.probe is not None
    assert gpus[0].batches == batches
    assert begun == [2, 1]
    assert (found.probe.images, found.probe.refused, found.probe.images_per_s) == (probed, 0, 8.0)
    assert found.hours(2) == images / 8 / 2 / 3600
    # A quarter of a second for decoding an image, another for finishing it, and one for every batch.
    cpu = (2 * probed + -(-probed // 8)) / 4 / probed
    assert found.lines()[-1].startswith(
        f"cores   {1e3 * cpu:.0f} ms of CPU time beside 125 ms of the GPU an image: 2 cores can keep it busy for at"
        f" most {25 / cpu:.0f} % of the time, 5 would do; give it more cores, "
    )
