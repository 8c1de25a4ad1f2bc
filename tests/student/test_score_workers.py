"""Images are shared by threads, batches and processes, and no digit of a score may tell."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import autolabel
from ray import cloudpickle

from autolabel.manifests import notes
from autolabel.manifests.cluster import ray_session
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.samples import Manifest, load_manifest
from autolabel.student import score_workers
from autolabel.student.data import ManifestDataset
from autolabel.student.distributed import WorkersFailed
from autolabel.student.evaluate import evaluate
from autolabel.student.job import ScoreMachine
from autolabel.student.score_workers import Scorer, ScoreRequest, count_by_workers
from autolabel.student.scoring import ImageCounter, ScoreCounts
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.memory import Budget
from autolabel.teacher.predict import Teacher

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have no copy of this file
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def counter(teacher: Path, city: Path) -> ImageCounter:
    """Nine images, and a checkpoint that has learnt from six of them."""
    samples = [s for name in ("val.parquet", "fine.parquet") for s in load_manifest(city / name).labelled]
    dataset = ManifestDataset(Manifest.of(CITYSCAPES, tuple(samples)))
    return ImageCounter(load_teacher(teacher, device="cpu"), dataset, (0.5, 1.0), complete=True)


@pytest.fixture(scope="module")
def alone(counter: ImageCounter) -> ScoreCounts:
    """The counts of one image after the other."""
    counts = counter.counts()
    for place in range(len(counter.dataset)):
        item = counter.dataset[place]
        prediction, _ = counter.teacher.confidence(item["image"].permute(1, 2, 0).numpy(), scales=(0.5, 1.0))
        counts.add(place, item["label"].numpy(), prediction=prediction)
    return counts


def summed(parts: Iterator[ScoreCounts], counter: ImageCounter) -> ScoreCounts:
    counts = counter.counts()
    for part in parts:
        counts.merge(part)
    return counts


def assert_same(counts: ScoreCounts, expected: ScoreCounts) -> None:
    """Confusion, borders, and the worst images with their predictions, to the last digit."""
    assert np.array_equal(counts.confusion.matrix, expected.confusion.matrix) and expected.confusion.matrix.any()
    assert counts.boundary and expected.boundary and counts.worst and expected.worst
    assert np.array_equal(counts.boundary.pixels, expected.boundary.pixels)
    assert np.array_equal(counts.boundary.hits, expected.boundary.hits)
    assert [one[:2] for one in counts.worst] == [one[:2] for one in expected.worst]
    assert all(np.array_equal(a[2], b[2]) for a, b in zip(counts.worst, expected.worst, strict=True))


# --- threads and batches ----------------------------------------------------------------------------------------------


def test_images_that_are_shared_are_counted_as_one_after_the_other(counter: ImageCounter, alone: ScoreCounts) -> None:
    for size in (1, 2, 3):
        shares = [summed(counter.each(range(rank, 9, size)), counter) for rank in range(size)]
        assert_same(summed(iter(shares[::-1]), counter), alone)


def test_a_worker_looks_with_the_focus_of_the_request(counter: ImageCounter, monkeypatch: pytest.MonkeyPatch) -> None:
    assert counter.teacher.name is not None
    focused = replace(counter, scales=(0.5, 1.0, 2.0), focus=0.25)
    monkeypatch.setattr("ray.get", lambda request: request)
    monkeypatch.setattr(Scorer, "_again", lambda _: False)
    found, again = Scorer().count([ScoreRequest.of(focused, "cpu")], range(3))
    assert_same(found, summed(focused.each(range(3)), focused))
    other = replace(focused, focus=None)
    assert (
        not np.array_equal(found.confusion.matrix, summed(other.each(range(3)), other).confusion.matrix) and not again
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_process_without_an_image_counts_nothing(
    device: str, counter: ImageCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen GPUs that train together may have three images to validate on."""
    monkeypatch.setattr(counter.teacher, "device", torch.device(device))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert list(counter.each([])) == []


def test_several_threads_change_nothing_and_leave_torch_its_own(counter: ImageCounter, alone: ScoreCounts) -> None:
    """Each image is predicted by one thread of torch, whatever the number of cores."""
    torch.set_num_threads(3)
    try:
        assert_same(summed(counter.each(range(9)), counter), alone)
        assert torch.get_num_threads() == 3
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [3]
    finally:
        torch.set_num_threads(1)


def test_no_more_images_are_under_way_than_memory_holds(counter: ImageCounter, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way, most, lock = 0, 0, threading.Lock()
    predict = Teacher.predict_in_batches

    def watched(self: Teacher, images: Sequence[Any], batch: int, **more: Any) -> list[Any]:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        found = list(predict(self, images, batch, **more))
        with lock:
            under_way -= 1
        return found

    room = 96 * 192 * 1000 / 0.8  # one image of 1,000 bytes a pixel, and what is never used
    monkeypatch.setattr(Teacher, "budget", lambda *_, **__: Budget("cpu", "float32", 1000.0, int(room * 1.5)))
    monkeypatch.setattr(Teacher, "predict_in_batches", watched)
    torch.set_num_threads(3)
    try:
        list(counter.each(range(6)))
    finally:
        torch.set_num_threads(1)
    assert most == 1


def test_a_gpu_gets_planned_batches_of_one_size(
    counter: ImageCounter, alone: ScoreCounts, city: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network on the CPU goes the GPU's way, two images at once. Sizes alternate; every share has the same counts."""
    batches: list[tuple[int, int]] = []
    predict = Teacher.predict_in_batches

    def watched(self: Teacher, images: Sequence[Any], batch: int, **more: Any) -> Any:
        batches.append((len(images), batch))
        return predict(self, images, batch, **more)

    monkeypatch.setattr(Teacher, "planned_batch", lambda *_, **__: 2)
    monkeypatch.setattr(Teacher, "predict_in_batches", watched)
    counter.teacher.budget(scales=counter.scales)
    batches.clear()
    whole = summed(counter._in_batches(counter.by_size(range(9))), counter)
    assert sorted(batches) == [(1, 2), (2, 2), (2, 2), (2, 2), (2, 2)]
    for size in (2, 3):
        shares = [summed(counter._in_batches(range(rank, 9, size)), counter) for rank in range(size)]
        assert_same(summed(iter(shares), counter), whole)
    difference = np.abs(whole.confusion.matrix - alone.confusion.matrix).sum() / whole.confusion.matrix.sum()
    assert difference < 1e-3  # other kernels round otherwise


# --- workers ----------------------------------------------------------------------------------------------------------


class Deadly(ManifestDataset):
    """A data set whose first image kills the process that reads it, once if there is a mark."""

    mark: Path | None = None

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 0 and not (self.mark and self.mark.exists()):
            if self.mark:
                self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def deadly(counter: ImageCounter, mark: Path | None) -> ImageCounter:
    data = Deadly(counter.dataset.manifest)
    data.mark = mark
    return ImageCounter(counter.teacher, data, counter.scales, complete=True)


@pytest.fixture(scope="module")
def connected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with ray_session(None, tmp_path_factory.mktemp("ray"), workers=3):
        yield


@pytest.mark.thorough
def test_two_workers_count_what_one_process_counts_also_if_one_dies(
    connected: None, counter: ImageCounter, alone: ScoreCounts, tmp_path: Path
) -> None:
    heard: list[str] = []
    steps: list[tuple[int, int]] = []
    with notes.heard(heard.append):
        found = count_by_workers(
            deadly(counter, tmp_path / "mark"), ScoreMachine(2), device="cpu", progress=lambda *n: steps.append(n)
        )
    assert_same(found, alone)
    assert sorted(steps) == steps and steps[-1] == (9, 9)
    (note,) = heard
    assert note in {f"worker {n} died and was started again; its images are counted again" for n in (1, 2)}


@pytest.mark.slow
def test_three_workers_give_the_scores_of_one_process(connected: None, teacher: Path, city: Path) -> None:
    three = evaluate(teacher, city / "val.parquet", device="cpu", machine=ScoreMachine(3))
    assert three == evaluate(teacher, city / "val.parquet", device="cpu")


@pytest.mark.slow
def test_an_image_at_which_workers_keep_dying_ends_the_call_and_is_named(
    connected: None, counter: ImageCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_workers, "FAILURES", 0)
    first = counter.dataset.samples[0].sample_id
    with pytest.raises(WorkersFailed, match=rf"^a worker died 1 times at images '{first}' to .*: leave out --workers"):
        count_by_workers(deadly(counter, None), ScoreMachine(2), device="cpu")


@pytest.mark.slow
def test_an_error_of_an_image_comes_back_as_it_was_raised(connected: None, counter: ImageCounter, city: Path) -> None:
    samples = list(counter.dataset.samples)
    samples[4] = replace(samples[4], image=city / "gone.png")
    data = ManifestDataset(Manifest.of(CITYSCAPES, tuple(samples)))
    broken = ImageCounter(counter.teacher, data, counter.scales, complete=True)
    with pytest.raises(ValueError, match=rf"^image {city}/gone.png: the file is missing$"):
        count_by_workers(broken, ScoreMachine(2), device="cpu")


def gpus(count: int) -> Any:
    return SimpleNamespace(cluster_resources=lambda: {"GPU": float(count), "CPU": 8.0})


def test_workers_that_cannot_be_had_are_refused(
    counter: ImageCounter, teacher: Path, city: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    refused = autolabel("evaluate", teacher, city / "val.parquet", "--workers", 4)
    assert refused.stderr == "autolabel: workers 4: there are 3 images to score on, give at most as many workers\n"
    with pytest.raises(ValueError, match=r"^workers is 0: expected 1 or more$"):
        ScoreMachine(0)
    with pytest.raises(ValueError, match=r"^device cuda:1 with workers: expected auto, cpu or cuda"):
        count_by_workers(counter, ScoreMachine(2), device="cuda:1")
    kind = score_workers._kind
    with pytest.raises(ValueError, match=r"^workers 3: this machine has 2 GPUs, and each needs one; give"):
        kind(gpus(2), ScoreMachine(3), "auto")
    with pytest.raises(ValueError, match=r"^device 'cuda' was asked for, but Ray finds no GPU on this machine"):
        kind(gpus(0), ScoreMachine(2), "cuda")
    assert [kind(gpus(2), ScoreMachine(2), device) for device in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
    assert kind(gpus(0), ScoreMachine(2), "auto") == "cpu"
    heard: list[str] = []
    with notes.heard(heard.append):  # a cluster may bring more GPUs
        assert kind(gpus(1), ScoreMachine(3, "head:6379"), "cuda") == "cuda"
        assert kind(gpus(0), ScoreMachine(3, "head:6379"), "auto") == "cpu"
    assert heard == ["the cluster has no GPU: its workers score on CPUs; --device cuda would wait for GPUs"]


def test_workers_that_never_start_are_told_and_given_up(counter: ImageCounter, monkeypatch: pytest.MonkeyPatch) -> None:
    crew = score_workers._Crew.__new__(score_workers._Crew)
    crew.ray, crew.needs = gpus(0), {"num_cpus": 1, "num_gpus": 1}
    heard: list[str] = []
    with notes.heard(heard.append):
        assert [crew._wait(seconds) for seconds in (0.0, 59.0, 61.0)] == [False, False, True]
    assert heard == [
        "waiting for a worker: each needs 1 GPU, 1 CPU, the cluster has 0 GPU, 8 CPU, 0.0 GiB of memory; giving up"
        " after 15 min"
    ]
    with pytest.raises(WorkersFailed, match=r"^no worker started in 900 s: each needs 1 GPU, 1 CPU, the cluster has 0"):
        crew._wait(901.0)
