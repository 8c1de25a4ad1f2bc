"""A week of training is lost to a power cut, or goes on from there into something that nobody asked for."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import names_in
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook

from autolabel.manifests import storage
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.samples import Manifest, fingerprints, load_manifest, save_manifest
from autolabel.student import train as training_module
from autolabel.student.evaluate import Scores
from autolabel.student.job import LEARNING_RATES, LOSSES, TrainJob, TrainMachine
from autolabel.student.optimizer import WeightUpdater, learning_rate_at
from autolabel.student.parallel import Team
from autolabel.student.request import TrainRequest
from autolabel.student.steps import StepReport
from autolabel.student.train import Training, TrainingStopped, train
from autolabel.teacher.checkpoints import fingerprint_tensor, read_checkpoint, save_checkpoint
from autolabel.teacher.networks.build import build
from autolabel.teacher.networks.hrnet import HRNet

pytestmark = pytest.mark.thorough

# One thread: the small network is no slower with it, never waits for a busy core, and two trainings give equal bits.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def short(city: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """Four steps, validated after the second and the last."""
    out = tmp_path_factory.mktemp("uninterrupted")
    job = TrainJob(city / "fine.parquet", city / "val.parquet", out, steps=4, batch_size=2, crop=(64, 64))
    return replace(job, validations=2, device="cpu", precision="float32")


@pytest.fixture(scope="module")
def uninterrupted(short: TrainJob) -> Path:
    """The folder of that training, finished in one go."""
    train(short)
    return short.out


def weights(path: Path) -> bytes:
    """Every bit of every tensor that a later step or a reader depends on."""
    checkpoint = read_checkpoint(path)
    return b"".join(key.encode() + tensor.numpy().tobytes() for key, tensor in checkpoint.state_dict.items())


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without the speed, which is never the same."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]


def interrupt_at(step: int) -> Callable[[StepReport], None]:
    """What to tell of each step, for Ctrl-C right after this one."""

    def interrupt(report: StepReport) -> None:
        if report.step == step:
            raise KeyboardInterrupt

    return interrupt


def assert_same_training(folder: Path, expected: Path) -> None:
    assert names_in(folder) == names_in(expected)
    assert weights(folder / "best.pt") == weights(expected / "best.pt")
    assert weights(folder / "last.pt") == weights(expected / "last.pt")
    assert metrics(folder) == metrics(expected)
    for name in ("scores.json", "last_scores.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    assert read_checkpoint(folder / "best.pt").metrics == read_checkpoint(expected / "best.pt").metrics


# --- what a training gives --------------------------------------------------------------------------------------------


def test_the_loss_falls_and_the_metrics_tell_how(city: Path, tmp_path: Path) -> None:
    """Thirty steps with two pictures each, validated once."""
    train(TrainJob(city / "fine.parquet", city / "val.parquet", tmp_path, steps=30, batch_size=2, validations=1))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {tuple(row) for row in rows[:-1]} == {("step", "loss", "gradient_norm", "learning_rate", "images_per_s")}
    assert all(row["gradient_norm"] > 0 for row in rows)
    assert [row["step"] for row in rows] == list(range(1, 31))
    losses = [row["loss"] for row in rows]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert [row["learning_rate"] for row in rows] == [
        learning_rate_at(n, 30, peak=LEARNING_RATES["adamw"]) for n in range(30)
    ]
    assert all(row["images_per_s"] > 0 for row in rows)
    scores = Scores.read(tmp_path / "scores.json")
    assert (rows[-1]["miou"], rows[-1]["iou"]) == (scores.miou, scores.iou)
    assert rows[-1]["miou"] == read_checkpoint(tmp_path / "best.pt").metrics["miou"]


def test_a_finished_training_leaves_six_files_that_agree(uninterrupted: Path, city: Path) -> None:
    names = ["best.pt", "last.pt", "last_scores.json", "metrics.jsonl", "scores.json", "train.json"]
    assert names_in(uninterrupted) == names
    scores, best = Scores.read(uninterrupted / "scores.json"), read_checkpoint(uninterrupted / "best.pt")
    measured = {row["step"]: row["miou"] for row in metrics(uninterrupted) if "miou" in row}
    assert list(measured) == [2, 4]
    assert scores.miou == max(measured.values()) == measured[int(best.metrics["step"])]
    assert best.metrics["miou"] == scores.miou
    assert Scores.read(uninterrupted / "last_scores.json").miou == measured[4]
    assert scores.images == 3 and scores.boundary_f == {}  # borders take time, and nobody asked for them
    assert (best.arch, best.label_space, best.training) == ("hrnet18s_ocr_mscale", CITYSCAPES, None)
    seen = fingerprints(load_manifest(city / "fine.parquet").samples)
    assert torch.equal(best.trained_on, fingerprint_tensor(seen))


def test_more_validations_than_steps_are_one_after_every_step(short: TrainJob, tmp_path: Path) -> None:
    train(replace(short, out=tmp_path, steps=1, validations=4))
    assert ["miou" in row for row in metrics(tmp_path)] == [True]


def test_the_same_seed_gives_the_same_network_and_another_seed_another(short: TrainJob, tmp_path: Path) -> None:
    def after_one_step(name: str, seed: int) -> bytes:
        train(replace(short, out=tmp_path / name, seed=seed, steps=1, validations=1))
        return weights(tmp_path / name / "last.pt")

    first, again, other = after_one_step("a", 0), after_one_step("b", 0), after_one_step("c", 1)
    assert first == again
    assert first != other


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 1e-8), ("sgd", 1e-4)])
def test_a_training_may_start_from_a_checkpoint_and_has_seen_what_that_one_saw(
    optimizer: str, rate: float, short: TrainJob, uninterrupted: Path, city: Path, tmp_path: Path
) -> None:
    """With a tiny learning rate the start is still there after a step."""
    init = uninterrupted / "best.pt"
    job = replace(short, manifest=city / "coarse.parquet", out=tmp_path, init=init, optimizer=optimizer)
    train(replace(job, steps=1, validations=1, learning_rate=rate))
    before, after = read_checkpoint(init), read_checkpoint(tmp_path / "best.pt")
    drift = after.state_dict["ocr.cls_head.bias"] - before.state_dict["ocr.cls_head.bias"]
    assert 0 < drift.abs().max() < 1e-3
    assert len(after.trained_on) == 6 + 10
    assert set(before.trained_on.tolist()) < set(after.trained_on.tolist())


def test_the_learning_rate_warms_up_and_decays(short: TrainJob) -> None:
    rates = [learning_rate_at(step, 100, peak=2.0) for step in range(100)]
    assert rates[:5] == pytest.approx([2 * (n + 1) / 5 * (1 - n / 100) ** 0.9 for n in range(5)])
    assert rates[50] == pytest.approx(2 * 0.5**0.9)
    assert rates.index(max(rates)) == 4
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[99] == pytest.approx(2 * 0.01**0.9)
    assert learning_rate_at(0, 1, peak=2.0) == 2.0


def test_cosine_and_another_power_change_the_learning_rate_as_their_formulas_say() -> None:
    cosine = [learning_rate_at(step, 100, peak=2.0, schedule="cosine") for step in range(100)]
    assert cosine[0] == pytest.approx(2 / 5)
    assert cosine[25] == pytest.approx(2 * (1 + 0.5**0.5) / 2)
    assert cosine[50] == pytest.approx(1)
    assert cosine[4:] == sorted(cosine[4:], reverse=True)
    assert learning_rate_at(50, 100, peak=2.0, power=2) == pytest.approx(0.5)


def test_the_warm_up_takes_its_share_of_the_steps_or_none() -> None:
    for share, steps in ((0.0, 0), (0.07, 7), (0.29, 29)):
        rates = [learning_rate_at(step, 100, peak=1.0, power=1, warm_up=share) for step in range(100)]
        plain = [1 - step / 100 for step in range(100)]
        assert rates == pytest.approx([min(1, (n + 1) / max(1, steps)) * rate for n, rate in enumerate(plain)])


# --- from gradients to weights ----------------------------------------------------------------------------------------


def small(**options: Any) -> tuple[torch.nn.Module, WeightUpdater]:
    """A network of one weight and running statistics, and its optimiser without momentum of note."""
    network = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1, affine=False))
    torch.nn.init.constant_(next(network.parameters()), 1.0)
    asked = {
        "optimizer": "sgd",
        "peak": 0.1,
        "average_decay": None,
        "precision": torch.float32,
        "clip": 10.0,
        "weight_decay": 5e-4,
    }
    asked |= options
    return network, WeightUpdater(network, **asked)


def pull(optimiser: WeightUpdater, weight: torch.Tensor, by: float) -> float:
    """One update of a weight whose gradient is `by`; the length of the gradient that it saw."""
    optimiser.begin()
    optimiser.backward(weight.sum() * by)
    length = optimiser.measure()
    if length.isfinite():
        optimiser.update(0.1, length)
    else:
        optimiser.skip()
    return length.item()


@pytest.mark.parametrize(("clip", "length"), [(10.0, 10), (0.5, 0.5), (2000.0, 1000), (0.0, 1000)])
@pytest.mark.parametrize("decay", [0.0, 5e-4])
def test_gradients_are_clipped_to_the_length_that_is_asked_for(clip: float, length: float, decay: float) -> None:
    network, optimiser = small(clip=clip, weight_decay=decay)
    weight = next(network.parameters())
    assert pull(optimiser, weight, 1000.0) == 1000.0  # before clipping
    assert weight.item() == pytest.approx(1 - 0.1 * (length + decay), abs=2e-6 * length)


@pytest.mark.parametrize("by", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(by: float) -> None:
    network, optimiser = small(average_decay=0.5)
    weight = next(network.parameters())
    assert not math.isfinite(pull(optimiser, weight, by))
    assert not optimiser.scale_may_help
    assert (weight.item(), optimiser.updates) == (1.0, 0)
    assert optimiser.average is not None
    assert next(optimiser.average.parameters()).item() == 1.0


def test_a_batch_that_is_skipped_leaves_no_trace_in_the_running_statistics() -> None:
    network, optimiser = small()
    optimiser.begin()
    network(torch.tensor([[1.0], [math.inf]]))
    optimiser.skip()
    assert network[1].running_mean.item() == 0.0
    assert network[1].running_var.item() == 1.0
    assert network[1].num_batches_tracked.item() == 0


def test_in_float16_such_a_step_is_skipped_and_the_scale_halved_until_it_cannot_be_the_scale() -> None:
    network, optimiser = small(precision=torch.float16)
    weight = next(network.parameters())
    scale = optimiser.scaler.get_scale()
    assert not math.isfinite(pull(optimiser, weight, math.inf))
    assert (weight.item(), optimiser.scaler.get_scale(), optimiser.scale_may_help) == (1.0, scale / 2, True)
    assert pull(optimiser, weight, 1.0) == 1.0  # of the loss itself, without its scale
    assert weight.item() == pytest.approx(1 - 0.1 * (1 + 5e-4))
    again = small(precision=torch.float16)[1]
    again.load_state_dict(optimiser.state_dict())
    assert again.scaler.get_scale() == scale / 2
    assert not any(math.isfinite(pull(optimiser, weight, math.inf)) for _ in range(30))
    assert not optimiser.scale_may_help


def test_averaged_weights_follow_the_formula_and_soon_forget_the_start() -> None:
    network, optimiser = small(average_decay=0.3)
    weight, mean = next(network.parameters()), 1.0
    for number, decay in enumerate((2 / 11, 3 / 12, 0.3, 0.3), start=1):
        pull(optimiser, weight, 1.0)
        network(torch.tensor([[1.0], [2.0]]))  # moves the running statistics, and counts
        mean = decay * mean + (1 - decay) * weight.item()
        assert optimiser.average is not None
        assert next(optimiser.average.parameters()).item() == pytest.approx(mean)
        assert optimiser.updates == number
    assert optimiser.average.get_buffer("1.num_batches_tracked").item() == 3  # of the last update


# --- killed and started again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2])
def test_interrupted_between_steps_and_resumed_gives_the_same_bits(
    step: int, short: TrainJob, uninterrupted: Path, tmp_path: Path
) -> None:
    job, seen = replace(short, out=tmp_path), list[int]()

    with pytest.raises(KeyboardInterrupt):
        train(job, interrupt_at(step))
    train(job, lambda report: seen.append(report.step))
    assert seen == list(range(step + 1, 5))
    assert_same_training(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    ("training", "call"),
    [
        pytest.param(True, 3, id="in the second step"),
        pytest.param(True, 8, id="in the last step"),
        pytest.param(False, 2, id="in the first validation"),
        pytest.param(False, 8, id="in the last validation"),
    ],
)
def test_interrupted_anywhere_and_resumed_gives_the_same_bits(
    training: bool, call: int, short: TrainJob, uninterrupted: Path, tmp_path: Path
) -> None:
    """Ctrl-C comes while the trunk has just looked at a picture, for the n-th time in this phase."""
    calls = 0

    def interrupt(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        nonlocal calls
        if isinstance(module, HRNet) and module.training == training:
            calls += 1
            if calls == call:
                signal.raise_signal(signal.SIGINT)

    job = replace(short, out=tmp_path)
    hook = register_module_forward_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(job)
    finally:
        hook.remove()
    train(job)
    assert_same_training(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            {"ema": 0.9, "accumulate": 2, "crop": (64, 96), "schedule": "cosine", "optimizer": "sgd"},
            id="averaged, in two parts",
        ),
        pytest.param({"precision": "float16"}, id="float16", marks=pytest.mark.slow),  # a CPU emulates it
        pytest.param({"precision": "bfloat16", "power": 2.0}, id="bfloat16, power 2"),
        pytest.param({"arch": "timm:test_efficientnet"}, id="a trunk of timm"),
    ],
)
def test_every_way_to_train_resumes_to_the_same_bits(change: dict[str, Any], short: TrainJob, tmp_path: Path) -> None:
    job = replace(short, steps=3, validations=1, **change)

    for name in ("unbroken", "resumed"):
        job = replace(job, out=tmp_path / name)
        if name == "resumed":
            with pytest.raises(KeyboardInterrupt):
                train(job, interrupt_at(1))
        train(job)
    assert_same_training(tmp_path / "resumed", tmp_path / "unbroken")
    states = [read_checkpoint(tmp_path / name / "last.pt").training for name in ("resumed", "unbroken")]
    assert all(state is not None for state in states)
    first, second = (state["optimizer"]["state"] for state in states if state)
    assert all(torch.equal(value, second[k][name]) for k in first for name, value in first[k].items())


def test_averaged_weights_are_scored_and_both_are_kept(short: TrainJob, uninterrupted: Path, tmp_path: Path) -> None:
    """The steps themselves are those of a training without an average."""
    train(replace(short, out=tmp_path, ema=0.5))
    last, plain = read_checkpoint(tmp_path / "last.pt"), read_checkpoint(uninterrupted / "last.pt")
    assert last.training is not None
    live = last.training["network"]
    assert all(torch.equal(live[key], tensor) for key, tensor in plain.state_dict.items())
    assert not torch.equal(last.state_dict["backbone.conv1.weight"], live["backbone.conv1.weight"])
    best = read_checkpoint(tmp_path / "best.pt")
    if best.metrics["step"] == 4:
        assert weights(tmp_path / "best.pt") == weights(tmp_path / "last.pt")
    assert [row["loss"] for row in metrics(tmp_path)] == [row["loss"] for row in metrics(uninterrupted)]


def test_a_checkpoint_remembers_the_request_without_train_json(
    short: TrainJob, uninterrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "out")
    (tmp_path / "out" / "train.json").unlink()
    with pytest.raises(ValueError, match=re.escape("another training (power was 0.9, now 2.0)")):
        train(replace(short, out=tmp_path / "out", power=2.0))


def test_device_workers_and_compiling_are_no_part_of_the_request(short: TrainJob, uninterrupted: Path) -> None:
    """A finished training returns at once, whatever is to compute it; it needs no Ray."""
    expected = Scores.read(uninterrupted / "scores.json")
    for machine in (TrainMachine(workers=2), TrainMachine(compile=True)):
        assert train(replace(short, device="auto", machine=machine)) == expected


def test_processes_that_read_crops_change_nothing(short: TrainJob, uninterrupted: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    train(replace(short, out=tmp_path, machine=TrainMachine(loaders=2)), on_note=notes.append)
    assert_same_training(tmp_path, uninterrupted)
    assert notes == ["trains on CPU in float32"]


def test_gpus_that_would_train_in_different_precisions_are_refused(
    short: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Team, "gather", lambda self, text: ["NVIDIA L4 in bfloat16", "Tesla T4 in float32"])
    message = (
        "trains on 1 x NVIDIA L4 in bfloat16, 1 x Tesla T4 in float32: expected one precision, name it with --prec"
    )
    with pytest.raises(ValueError, match=f"^{message}"):
        Training(TrainRequest(replace(short, out=tmp_path)), Team(torch.device("cpu")))
    assert names_in(tmp_path) == []


def test_another_precision_is_refused_also_where_another_device_chose_it(short: TrainJob, uninterrupted: Path) -> None:
    with pytest.raises(ValueError, match=r"holds another training \(precision was 'float32', now 'bfloat16'\)"):
        train(replace(short, precision="bfloat16"))


def test_a_resumed_training_never_replaces_the_best_network_by_a_worse_one(short: TrainJob, tmp_path: Path) -> None:
    """As if the second step had reached 99 %: what the fourth reaches is then no reason to write best.pt."""

    job = replace(short, out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(job, interrupt_at(3))
    last, best = read_checkpoint(tmp_path / "last.pt"), (tmp_path / "best.pt").read_bytes()
    network = build(job.arch, 19)
    network.load_state_dict(last.state_dict)
    assert last.training is not None
    training = last.training | {"best": 0.99}
    save_checkpoint(
        tmp_path / "last.pt",
        network,
        arch=job.arch,
        space=CITYSCAPES,
        trained_on=last.trained_on,
        metrics=last.metrics,
        training=training,
    )
    scores = Scores.read(tmp_path / "scores.json")
    assert train(job) == scores
    assert (tmp_path / "best.pt").read_bytes() == best
    assert read_checkpoint(tmp_path / "last.pt").metrics == {"miou": 0.99, "step": 4.0}


def test_killed_without_warning_and_resumed_gives_the_same_bits(
    short: TrainJob, uninterrupted: Path, tmp_path: Path
) -> None:
    """The victim has saved after its second step, and waits to be killed after the third."""
    code = (
        "import pathlib, sys, time\n"
        "from autolabel.student.job import TrainJob\n"
        "from autolabel.student.train import train\n"
        "fine, val, out = map(pathlib.Path, sys.argv[1:])\n"
        "job = TrainJob(fine, val, out, steps=4, batch_size=2, crop=(64, 64), device='cpu', precision='float32',"
        " validations=2)\n"
        "train(job, lambda report: time.sleep(600) if report.step == 3 else None)\n"
    )
    command = [sys.executable, "-c", code, str(short.manifest), str(short.val), str(tmp_path)]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as victim:
        while not (tmp_path / "last.pt").exists():
            assert victim.poll() is None
            time.sleep(0.01)
        victim.kill()
    assert victim.returncode == -signal.SIGKILL
    left = read_checkpoint(tmp_path / "last.pt")
    assert left.training is not None
    assert left.training["step"] == 2
    train(replace(short, out=tmp_path))
    for leftover in tmp_path.glob(".*.autolabel-tmp"):  # a file that the victim had not finished
        leftover.unlink()
    assert_same_training(tmp_path, uninterrupted)


def test_a_finished_training_returns_at_once(short: TrainJob, uninterrupted: Path) -> None:
    def contents() -> dict[str, tuple[int, bytes]]:
        files = [uninterrupted / name for name in names_in(uninterrupted) if name != "train.json"]
        return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}

    before = contents()
    seen: list[StepReport] = []
    assert train(short, seen.append) == Scores.read(uninterrupted / "scores.json")
    assert seen == []
    assert contents() == before


def test_a_resume_cuts_the_metrics_back_to_the_checkpoint(short: TrainJob, uninterrupted: Path, tmp_path: Path) -> None:
    """A killed training had appended the third step, and a part of the fourth."""
    job = replace(short, out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(job, interrupt_at(2))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        third = {"step": 3, "loss": 1.5, "gradient_norm": 2.0, "learning_rate": 0.001, "images_per_s": 9.9}
        file.write(json.dumps(third) + '\n{"step": 4, "lo')
    train(job)
    assert_same_training(tmp_path, uninterrupted)


def test_half_written_files_of_a_killed_training_are_removed(
    short: TrainJob, uninterrupted: Path, tmp_path: Path
) -> None:
    """Each such file is as large as a checkpoint with its optimizer: hundreds of megabytes for the full network."""
    shutil.copytree(uninterrupted, tmp_path / "out")
    (tmp_path / "out" / ".last.pt.0123456789ab.autolabel-tmp").write_bytes(b"half a checkpoi")
    train(replace(short, out=tmp_path / "out"))
    assert_same_training(tmp_path / "out", uninterrupted)


def test_a_training_deletes_no_file_of_others_in_its_folder(
    short: TrainJob, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "work"
    shutil.copytree(uninterrupted, out)
    others = [
        "downloads/film.mp4.partial",
        "downloads/.draft.tmp",
        ".draft.0123456789ab.tmp",
        "last.pt.partial",
        "other/run/units/.b512x512.000001.0.parquet.0123456789ab.autolabel-tmp",  # a run that may be under way
    ]
    for name in others:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("precious")
    train(replace(short, out=out))
    assert [name for name in others if not (out / name).is_file()] == []


def test_a_training_that_started_from_a_checkpoint_resumes_too(
    short: TrainJob, uninterrupted: Path, city: Path, tmp_path: Path
) -> None:
    job = replace(short, manifest=city / "coarse.parquet", out=tmp_path, init=uninterrupted / "best.pt")
    job = replace(job, steps=2, validations=1)

    def interrupt(report: StepReport) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(job, interrupt)
    scores = train(job)
    assert train(job) == scores
    assert len(read_checkpoint(tmp_path / "best.pt").trained_on) == 6 + 10


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        pytest.param({"steps": 7}, "steps was 4, now 7", id="steps"),
        pytest.param({"seed": 1}, "seed was 0, now 1", id="seed"),
        pytest.param({"batch_size": 3}, "batch_size was 2, now 3", id="batch size"),
        pytest.param({"crop": (64, 96)}, "crop was [64, 64], now [64, 96]", id="crop"),
        pytest.param({"loss": "rmi"}, "loss was 'cross-entropy', now 'rmi'", id="loss"),
        pytest.param(
            {"optimizer": "sgd"},
            "learning_rate was 0.003, now 0.01; optimizer was 'adamw', now 'sgd'; weight_decay was 0.01, now 0.0005",
            id="optimizer",
        ),
        pytest.param({"clip": 0.0, "weight_decay": 1e-4}, "clip was 10.0, now 0.0; weight_decay was 0.01, now 0.0001"),
        pytest.param({"learning_rate": 0.5}, "learning_rate was 0.003, now 0.5", id="learning rate"),
        pytest.param(
            {"arch": "hrnet48_ocr_mscale", "validations": 1},
            "arch was 'hrnet18s_ocr_mscale', now 'hrnet48_ocr_mscale'; validations was 2, now 1",
            id="two things",
        ),
    ],
)
def test_another_request_in_the_same_folder_is_refused_with_the_difference(
    change: dict[str, Any], difference: str, short: TrainJob, uninterrupted: Path
) -> None:
    before = {p: p.read_bytes() for p in uninterrupted.iterdir()}
    message = f"{uninterrupted} holds another training ({difference}): choose another --out"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train(replace(short, **change))
    assert {p: p.read_bytes() for p in uninterrupted.iterdir()} == before


def test_a_second_training_in_the_same_folder_is_refused_naming_the_process(short: TrainJob, tmp_path: Path) -> None:
    asked = replace(short, out=tmp_path / "out")
    with storage.hold(asked.out), pytest.raises(ValueError) as refusal:
        train(asked)
    assert re.fullmatch(
        rf"another autolabel is at work in {re.escape(str(asked.out))} \(process {os.getpid()} on .* since .*\):"
        " wait for it, or stop it",
        str(refusal.value),
    )
    assert not (asked.out / "train.json").exists()


def test_other_images_under_the_same_manifest_are_refused(short: TrainJob, uninterrupted: Path, city: Path) -> None:
    other = load_manifest(city / "coarse.parquet")
    other = Manifest.of(CITYSCAPES, other.samples[:6])
    message = f"{uninterrupted / 'last.pt'} was trained on other images than {short.manifest} lists"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        train(short, manifest=other)
    fewer = Manifest.of(CITYSCAPES, load_manifest(short.manifest).samples[:5])
    with pytest.raises(ValueError, match=re.escape(f"{uninterrupted} holds another training (images was 6, now 5)")):
        train(short, manifest=fewer)


def renamed_copy(manifest: Manifest, folder: Path) -> Manifest:
    """The first sample under another name, in another folder."""
    sample = manifest.samples[0]
    (folder / "renamed.png").write_bytes(sample.image.read_bytes())
    return Manifest.of(manifest.label_space, (replace(sample, sample_id="renamed", image=folder / "renamed.png"),))


def test_a_validation_image_that_is_trained_on_is_refused_whatever_its_name(short: TrainJob, tmp_path: Path) -> None:
    save_manifest(tmp_path / "val.parquet", renamed_copy(load_manifest(short.manifest), tmp_path))
    message = (
        "1 validation images are also trained on (the first is 'renamed'): the score would mean nothing; leave them"
        " out of one manifest"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train(replace(short, val=tmp_path / "val.parquet", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_validation_image_that_the_starting_point_was_trained_on_is_refused(
    short: TrainJob, uninterrupted: Path, city: Path, tmp_path: Path
) -> None:
    save_manifest(tmp_path / "val.parquet", renamed_copy(load_manifest(short.manifest), tmp_path))
    job = replace(short, manifest=city / "coarse.parquet", val=tmp_path / "val.parquet", out=tmp_path / "out")
    with pytest.raises(ValueError, match="'renamed'"):
        train(replace(job, init=uninterrupted / "best.pt", steps=1, validations=1))


def test_training_and_validation_must_speak_of_the_same_classes(short: TrainJob, camvid: Path, tmp_path: Path) -> None:
    message = f"{short.manifest} and {camvid} use different label spaces: train and validate in one"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train(replace(short, val=camvid, out=tmp_path))


def test_validation_labels_without_a_single_pixel_are_refused(short: TrainJob, tmp_path: Path) -> None:
    """Their score would be NaN, which is never better than anything: no best.pt would ever be written."""
    sample = load_manifest(short.val).samples[0]
    Image.fromarray(np.zeros((96, 192), np.uint8)).save(tmp_path / "nothing.png")  # all unlabelled
    save_manifest(tmp_path / "val.parquet", Manifest.of(CITYSCAPES, (replace(sample, label=tmp_path / "nothing.png"),)))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "val.parquet"))):
        train(replace(short, val=tmp_path / "val.parquet", out=tmp_path / "out", steps=1, validations=1))


def overflowing(short: TrainJob, folder: Path) -> TrainJob:
    """A starting point whose weights are finite, but too large for what they are multiplied with."""
    network = build(short.arch, 19)
    with torch.no_grad():
        network.ocr.cls_head.weight.mul_(1e38)
    save_checkpoint(folder / "init.pt", network, arch=short.arch, space=CITYSCAPES)
    return replace(short, out=folder / "out", init=folder / "init.pt", learning_rate=0.5)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_diverging_training_stops_and_says_what_to_do(loss: str, short: TrainJob, tmp_path: Path) -> None:
    message = (
        r"^the loss became (nan|inf) at step 1, on ([a-z0-9_]+), ([a-z0-9_]+): nothing was saved yet; start again in"
        r" another --out with a smaller --learning-rate than 0\.5$"
    )
    with pytest.raises(TrainingStopped, match=message) as stopped:
        train(replace(overflowing(short, tmp_path), loss=loss, steps=1, validations=1))
    found = re.match(message, str(stopped.value))
    assert found is not None
    assert set(found.groups()[1:]) < {s.sample_id for s in load_manifest(short.manifest).samples}
    assert names_in(tmp_path / "out") == ["train.json"]  # nothing broken is kept


@contextmanager
def infinite(first: int, last: int) -> Iterator[None]:
    """The trunk's features are infinite in these steps of a training that begins meanwhile."""
    calls = 0

    def break_down(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        nonlocal calls
        if isinstance(module, HRNet) and module.training:
            calls += 1  # two scales a step
            return output * math.inf if first <= (calls + 1) // 2 <= last else None
        return None

    hook = register_module_forward_hook(break_down)
    try:
        yield
    finally:
        hook.remove()


def test_a_batch_with_a_loss_that_is_not_finite_is_skipped_and_told(short: TrainJob, tmp_path: Path) -> None:
    """Its step is counted, and nothing else is as if it had been."""
    job, notes = replace(short, ema=0.9, validations=1), list[str]()
    with infinite(4, 4):
        train(replace(job, out=tmp_path / "skipped"), on_note=notes.append)
    with pytest.raises(KeyboardInterrupt):
        train(replace(job, out=tmp_path / "three"), interrupt_at(3))
    found, expected = (read_checkpoint(tmp_path / name / "last.pt") for name in ("skipped", "three"))
    assert found.training is not None and expected.training is not None
    assert (found.training["step"], expected.training["step"]) == (4, 3)
    assert found.training["updates"] == expected.training["updates"] == 3
    assert all(torch.equal(found.state_dict[key], tensor) for key, tensor in expected.state_dict.items())
    for key, tensor in expected.training["network"].items():
        assert torch.equal(found.training["network"][key], tensor)
    for place, state in expected.training["optimizer"]["state"].items():
        assert all(torch.equal(found.training["optimizer"]["state"][place][name], state[name]) for name in state)
    assert [row["loss"] is not None for row in metrics(tmp_path / "skipped")] == [True, True, True, False]
    message = (
        r"1 of 4 batches were skipped, because their loss or gradient was not finite; the first, at step 4, showed"
    )
    (note,) = (note for note in notes if "skipped" in note)
    assert note.startswith(message)
    ids = set(note.removeprefix(message).strip().split(", "))
    assert ids < {s.sample_id for s in load_manifest(short.manifest).samples}


def test_several_in_a_row_end_the_training_with_its_last_good_weights_also_across_a_resume(
    short: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the third step on, the features are infinite; the third step was saved as one that was skipped."""
    assert training_module._MOST_SKIPPED == 5
    monkeypatch.setattr(training_module, "_MOST_SKIPPED", 2)
    message = (
        r"^the loss became (nan|inf) at step 4, on .*, as in the 1 step before: last\.pt keeps the weights of step "
    )
    with infinite(3, 4), pytest.raises(TrainingStopped, match=f"{message}2; start again"):
        train(replace(short, out=tmp_path / "straight"))
    with infinite(3, 4), pytest.raises(KeyboardInterrupt):
        train(replace(short, out=tmp_path / "resumed"), interrupt_at(3))
    with infinite(1, 1), pytest.raises(TrainingStopped, match=f"{message}3; start again"):
        train(replace(short, out=tmp_path / "resumed"))
    last = [read_checkpoint(tmp_path / name / "last.pt") for name in ("straight", "resumed")]
    assert [one.metrics["step"] for one in last] == [2, 3]
    assert all(tensor.isfinite().all() for one in last for tensor in one.state_dict.values())
    assert all(torch.equal(last[1].state_dict[key], tensor) for key, tensor in last[0].state_dict.items())


def test_statistics_that_overflow_under_a_finite_loss_are_not_saved(short: TrainJob, tmp_path: Path) -> None:
    """A variance of 1e60 is infinity, what is divided by it is 0, and the loss does not notice."""
    network = build(short.arch, 19)
    with torch.no_grad():
        network.backbone.conv1.weight.mul_(1e30)
    save_checkpoint(tmp_path / "init.pt", network, arch=short.arch, space=CITYSCAPES)
    job = replace(short, out=tmp_path / "out", init=tmp_path / "init.pt", learning_rate=1e-9)
    with pytest.raises(
        TrainingStopped, match=r"running_var became infinite or nan at step 2, on .*: nothing was saved"
    ):
        train(job)
    assert names_in(tmp_path / "out") == ["metrics.jsonl", "train.json"]


@pytest.mark.slow
def test_a_compiled_network_takes_the_same_step(short: TrainJob, tmp_path: Path) -> None:
    for name, compiled in (("plain", False), ("compiled", True)):
        train(
            replace(
                short,
                out=tmp_path / name,
                steps=1,
                validations=1,
                machine=TrainMachine(compile=compiled),
                arch="hrnet18s_plain",
            )
        )
    found, expected = (metrics(tmp_path / name)[0]["loss"] for name in ("compiled", "plain"))
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0: expected 1 or more"),
        ({"batch_size": -1}, "batch_size is -1: expected 1 or more"),
        ({"validations": 0}, "validations is 0: expected 1 or more"),
        ({"loss": "dice"}, "loss 'dice': expected cross-entropy or balanced or image-weighted or rmi"),
        ({"optimizer": "adam"}, "optimizer 'adam': expected adamw or sgd"),
        ({"learning_rate": 0.0}, "learning rate 0: expected a number in (0, 10)"),
        ({"learning_rate": float("nan")}, "learning rate nan: expected a number in (0, 10)"),
        ({"learning_rate": 10.0}, "learning rate 10: expected a number in (0, 10)"),
        ({"crop": (64, 31)}, "crop 64x31: expected both sides to be 32 pixels or more"),
        ({"seed": -1}, "seed is -1: expected 0 to 4294967295"),
        ({"auto_share": 1.1}, "auto-share 1.1: expected a number from 0 to 1"),
        ({"fine_only_last": -0.15}, "fine-only-last -0.15: expected a number from 0 to 1"),
        ({"accumulate": 0}, "accumulate is 0: expected 1 or more"),
        ({"schedule": "step"}, "schedule 'step': expected poly or cosine"),
        ({"power": 0.0}, "power 0: expected a number above 0, up to 10"),
        ({"schedule": "cosine", "power": 2.0}, "power 2 with schedule cosine: only poly has one"),
        ({"warm_up": 1.5}, "warm-up 1.5: expected a number from 0 to 1"),
        ({"scale_weight": -0.05}, "scale-weight -0.05: expected a number from 0 to 1"),
        ({"auto_aimed": True}, "auto-aimed needs an auto-share: give the share of automatic labels"),
        ({"clip": -1.0}, "clip -1: expected a length above 0, or 0 for gradients as they are"),
        ({"clip": math.inf}, "clip inf: expected a length above 0, or 0 for gradients as they are"),
        ({"weight_decay": -1e-4}, "weight decay -0.0001: expected a number from 0 to below 1"),
        ({"weight_decay": 1.0}, "weight decay 1: expected a number from 0 to below 1"),
        ({"ema": 1.0}, "ema 1: expected a decay between 0 and 1, such as 0.999"),
        (
            {"machine": TrainMachine(workers=2), "accumulate": 2},
            "a batch of 2 does not split evenly over workers 2 x accumulate 2: give a batch size that 4 divides",
        ),
    ],
    ids=lambda value: "-".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_training_settings_outside_their_range_are_refused(
    change: dict[str, Any], message: str, short: TrainJob
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(short, **change)


def test_several_workers_on_apples_gpu_are_refused(short: TrainJob) -> None:
    with pytest.raises(ValueError, match=r"^device mps: Apple's GPU trains in one process, leave out --workers and"):
        replace(short, device="mps", machine=TrainMachine(workers=2))


def test_machines_that_cannot_train_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^workers is 0: expected 1 or more$"):
        TrainMachine(workers=0)
    with pytest.raises(ValueError, match=r"^loaders is -1: expected 0 or more$"):
        TrainMachine(loaders=-1)
    with pytest.raises(ValueError, match=r"^compile with workers 2: one process compiles, leave out one of the two$"):
        TrainMachine(workers=2, compile=True)


def test_seeds_use_32_bits(short: TrainJob, tmp_path: Path) -> None:
    train(replace(short, out=tmp_path, seed=2**32 - 1, steps=1, validations=1))
    with pytest.raises(ValueError, match=r"^seed is 4294967296: expected 0 to 4294967295$"):
        replace(short, seed=2**32)


def test_one_picture_of_the_smallest_crop_a_step_is_refused(short: TrainJob, tmp_path: Path) -> None:
    """Batch norm needs more than one value per channel; at a thirty-second of half of 32 pixels there is one."""
    with pytest.raises(ValueError, match="crop 32x32"):
        train(replace(short, out=tmp_path, batch_size=1, crop=(32, 32), steps=1, validations=1))
    train(replace(short, out=tmp_path, batch_size=1, crop=(32, 66), steps=1, validations=1))


def test_parts_of_a_batch_of_one_value_are_refused(short: TrainJob, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="crop 32x32"):
        train(replace(short, out=tmp_path, batch_size=2, accumulate=2, crop=(32, 32)))
    with pytest.raises(ValueError, match="pools the whole image"):
        train(replace(short, out=tmp_path, batch_size=2, accumulate=2, arch="hrnet18s_aspp"))


def test_more_workers_than_samples_are_refused(short: TrainJob, tmp_path: Path) -> None:
    message = f"workers 7: {short.manifest} has 6 samples, give at most as many"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train(replace(short, out=tmp_path / "out", machine=TrainMachine(workers=7), batch_size=7))
    assert not (tmp_path / "out").exists()


def test_a_batch_may_be_larger_than_an_epoch(short: TrainJob, tmp_path: Path) -> None:
    """Its images are shown several times, cropped anew each time."""
    train(replace(short, out=tmp_path, batch_size=13, steps=1, validations=1))
    assert len(metrics(tmp_path)) == 1


def test_a_share_of_an_epoch_shorter_than_a_batch_is_refused(short: TrainJob, city: Path, tmp_path: Path) -> None:
    manifest = load_manifest(city / "fine.parquet")
    auto = tuple(replace(s, source="auto") if n < 2 else s for n, s in enumerate(manifest.samples))
    save_manifest(tmp_path / "mixed.parquet", replace(manifest, samples=auto))
    job = replace(short, manifest=tmp_path / "mixed.parquet", out=tmp_path / "out", steps=1, auto_share=0.5)
    with pytest.raises(
        ValueError, match=r"^auto-share 0\.5: an epoch of 6 crops is smaller than a batch of 7; give more"
    ):
        train(replace(job, batch_size=7))
    with pytest.raises(ValueError, match=r"^auto-classes: 'dragon' is not in label space 'cityscapes': road, "):
        train(replace(job, auto_classes=("dragon",)))
    assert not (tmp_path / "out").exists()  # nothing was begun


def test_labels_are_read_once_before_the_first_step_and_not_when_there_is_none(
    short: TrainJob, uninterrupted: Path, tmp_path: Path
) -> None:
    events: list[object] = []
    job = replace(short, out=tmp_path, steps=1, validations=1, fine_only_last=1.0, auto_classes=None)
    train(job, lambda report: events.append(report.step), progress=lambda done, total: events.append((done, total)))
    assert events == [*((n, 6) for n in range(1, 7)), 1]
    train(job, progress=lambda done, total: events.append("again"))
    assert "again" not in events


def test_train_json_holds_the_request(short: TrainJob, uninterrupted: Path) -> None:
    assert json.loads((uninterrupted / "train.json").read_text()) == {
        "manifest": str(short.manifest),
        "val": str(short.val),
        "arch": "hrnet18s_ocr_mscale",
        "steps": 4,
        "seed": 0,
        "batch_size": 2,
        "crop": [64, 64],
        "loss": "cross-entropy",
        "optimizer": "adamw",
        "learning_rate": 0.003,
        "init": None,
        "precision": "float32",
        "validations": 2,
        "auto_share": None,
        "auto_classes": None,
        "fine_only_last": 0.0,
        "accumulate": 1,
        "schedule": "poly",
        "auto_aimed": False,
        "power": 0.9,
        "warm_up": 0.05,
        "scale_weight": 0.05,
        "published_crops": False,
        "blur": False,
        "clip": 10.0,
        "weight_decay": 0.01,
        "ema": None,
        "weights": False,
        "noise": None,
        "images": 6,
        "started_from": None,
    }
