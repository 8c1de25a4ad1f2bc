"""A worker, or the command itself, dies in the middle of a training by several workers, and nothing of it is lost.

Real Ray Train and real SIGKILLs, on one machine; the arithmetic of several processes is held in `test_parallel.py`.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import ray
import torch
from conftest import autolabel, names_in
from ray import cloudpickle
from test_parallel import alone, assert_close, job

from autolabel.manifests.cluster import ClusterFailed, ray_session
from autolabel.manifests.samples import Manifest, load_manifest, save_manifest
from autolabel.student import distributed
from autolabel.student.distributed import OnStep, WorkersFailed, run_workers
from autolabel.student.job import TrainJob, TrainMachine
from autolabel.student.parallel import Team
from autolabel.student.request import TrainRequest
from autolabel.student.steps import StepReport
from autolabel.student.train import Training, TrainingStopped, train
from autolabel.teacher.checkpoints import read_checkpoint

pytestmark = pytest.mark.thorough

__all__ = ["alone", "job"]  # fixtures

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have no copy of this file
torch.set_num_threads(1)

FINAL = (ValueError, OSError, TrainingStopped)


@pytest.fixture(scope="module")
def connected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with ray_session(None, tmp_path_factory.mktemp("ray"), workers=2):
        yield


def nothing(_: object) -> None:
    pass


# --- workers die ------------------------------------------------------------------------------------------------------


def train_and_die_once(request: TrainRequest, mark: Path, team: Team, on_step: OnStep) -> None:
    """After step 3, the first time, the second process is killed while the first one waits for it."""

    def watch() -> None:
        while not mark.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

    def step(report: StepReport) -> None:
        on_step(report)
        if report.step == 3 and not mark.exists():
            while not request.last.exists():  # a thread writes it
                time.sleep(0.01)
            mark.touch()
            time.sleep(600)

    if team.rank == 1 and not mark.exists():
        threading.Thread(target=watch, daemon=True).start()
    training = Training(request, team)
    if team.rank == 0:
        on_step(training.place)
    training.run(step, on_step)


def test_a_killed_worker_costs_the_steps_since_the_last_save_and_nothing_else(
    connected: None, job: TrainJob, alone: Path, tmp_path: Path
) -> None:
    """Two workers; the second step was saved, the third is done twice."""
    shared = replace(job, out=tmp_path / "out", machine=TrainMachine(workers=2))
    shared.out.mkdir()
    request = TrainRequest(shared)
    steps: list[int] = []
    notes: list[str] = []
    run_workers(
        partial(train_and_die_once, request, tmp_path / "mark"), 2, device="cpu", folder=shared.out,
        on_step=lambda report: steps.append(report.step), on_note=notes.append, final=FINAL,
    )  # fmt: skip
    assert steps == [1, 2, 3, 3, 4]
    assert [note for note in notes if "waiting" not in note] == [
        "trains on 2 x CPU in float32",
        "a worker failed (its process died); all have started again, from the last save",
        "trains on 2 x CPU in float32",
    ]
    assert_close(shared.out, alone)


def die(team: Team, on_step: OnStep) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_workers_that_keep_dying_end_the_call_with_one_line(
    connected: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "FAILURES", 0)
    message = r"^workers failed 1 times \(the last: its process died\); run the same again to go on from the last save$"
    with pytest.raises(WorkersFailed, match=message):
        run_workers(die, 2, device="cpu", folder=tmp_path, on_step=nothing, on_note=nothing, final=FINAL)
    assert list(tmp_path.iterdir()) == []


# --- what trying again would not help ---------------------------------------------------------------------------------


def test_a_damaged_image_ends_the_call_at_once_and_is_named(connected: None, job: TrainJob, tmp_path: Path) -> None:
    manifest = load_manifest(job.manifest)
    broken = tmp_path / "broken.png"
    broken.write_bytes(manifest.samples[0].image.read_bytes()[:2000])
    samples = tuple(replace(s, image=broken) for s in manifest.samples)
    save_manifest(tmp_path / "broken.parquet", Manifest.of(manifest.label_space, samples))
    with pytest.raises(ValueError, match=f"^image {re.escape(str(broken))}: "):
        train(replace(job, manifest=tmp_path / "broken.parquet", out=tmp_path / "out", machine=TrainMachine(workers=2)))
    assert names_in(tmp_path / "out") == ["train.json"]


def test_workers_without_a_connection_to_ray_are_refused(
    connected: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match=r"^workers 2: expected a connection to Ray"):
        run_workers(die, 2, device="cpu", folder=tmp_path, on_step=nothing, on_note=nothing, final=FINAL)


def test_a_process_that_is_connected_uses_that_ray_and_no_other(connected: None, tmp_path: Path) -> None:
    for address in (None, "auto"):
        with ray_session(address, tmp_path) as session:
            assert session is ray
        assert ray.is_initialized()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other = f"127.0.0.1:{listener.getsockname()[1]}"
        message = rf"^this process is connected to the Ray at .*, not to {other}: use a"
        with pytest.raises(ClusterFailed, match=message), ray_session(other, tmp_path):
            pass


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["--workers", 3],
            "a batch of 4 does not split evenly over workers 3 x accumulate 1: give a batch size that 3",
        ),
        (["--workers", 8, "--batch-size", 8], "workers 8: .* has 6 samples, give at most as many"),
        (
            ["--workers", 2, "--device", "cuda"],
            "workers 2: this machine has 0 GPUs, and each needs one; give the --address",
        ),
        (["--workers", 2, "--address", "127.0.0.1:1"], "nobody listens at 127.0.0.1:1"),
        (["--address", "127.0.0.1:1"], "nobody listens at 127.0.0.1:1"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_the_command_refuses_in_one_line(options: list[object], line: str, job: TrainJob, tmp_path: Path) -> None:
    result = autolabel("train", job.manifest, "--val", job.val, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert re.match(f"^autolabel: {line}[^\n]*\n$", result.stderr.splitlines(keepends=True)[-1])


# --- the command dies -------------------------------------------------------------------------------------------------


def command(job: TrainJob, out: Path) -> list[str]:
    """The command line of that training, with two workers."""
    options = {
        "val": job.val, "out": out, "arch": job.arch, "steps": job.steps, "batch-size": 4,
        "crop": "96x128", "optimizer": "sgd", "learning-rate": 1e-3, "ema": 0.9, "accumulate": 2, "schedule": "cosine",
        "device": "cpu", "precision": "float32", "workers": 2,
    }  # fmt: skip
    return [
        sys.executable,
        "-m",
        "autolabel.cli",
        "train",
        str(job.manifest),
        *(f"--{key}={value}" for key, value in options.items()),
    ]


def workers() -> list[int]:
    """Workers of Ray Train that this session started: they know its token."""
    token = os.environ["RAY_AUTH_TOKEN"].encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cmdline").read_bytes().startswith(b"ray::RayTrainWorker"):
                found += [int(path.name)] if token in (path / "environ").read_bytes() else []
        except OSError:  # it has just ended
            continue
    return found


def run_until_saved(job: TrainJob, out: Path, number: signal.Signals) -> tuple[int, str]:
    """Send the command a signal once a step was saved, and wait for its workers too: exit code, stderr."""
    with subprocess.Popen(command(job, out), stderr=subprocess.PIPE, text=True) as victim:
        while not (out / "last.pt").exists():
            assert victim.poll() is None
            time.sleep(0.02)
        victim.send_signal(number)
        assert victim.stderr is not None
        said = victim.stderr.read()
    waited = time.monotonic()
    while workers():
        assert time.monotonic() - waited < 120
        time.sleep(0.1)
    return victim.returncode, said


def step_of(out: Path) -> int:
    training = read_checkpoint(out / "last.pt").training
    assert training is not None
    return int(training["step"])


@pytest.mark.slow
def test_a_killed_command_takes_its_workers_along_and_one_process_goes_on(
    job: TrainJob, alone: Path, tmp_path: Path
) -> None:
    """To the result of an unbroken training."""
    asked = replace(job, out=tmp_path / "out", validations=4)
    assert run_until_saved(asked, asked.out, signal.SIGKILL)[0] == -signal.SIGKILL
    assert 1 <= step_of(asked.out) < 4
    train(asked)
    found, expected = (read_checkpoint(folder / "last.pt") for folder in (asked.out, alone))
    for key, tensor in expected.state_dict.items():
        torch.testing.assert_close(found.state_dict[key], tensor, rtol=1e-2, atol=1e-3, msg=key)


@pytest.mark.slow
def test_ctrl_c_saves_the_step_under_way(job: TrainJob, tmp_path: Path) -> None:
    code, said = run_until_saved(replace(job, steps=80), tmp_path / "out", signal.SIGINT)
    assert code == 130
    assert "stopping after the step under way" in said
    assert "everything finished so far is kept" in said
    assert 20 < step_of(tmp_path / "out") < 60  # the first save is that of the first validation, step 20
