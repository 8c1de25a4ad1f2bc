"""Several processes are to give what one gives. If this fails, a training on two GPUs is another training than on one.

Real processes that talk through gloo; no Ray.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import names_in
from torch import Tensor, nn
from torch.multiprocessing import ProcessExitedException, spawn
from torch.nn.parallel import DistributedDataParallel

from autolabel.student.batch_norm import SynchronisedBatchNorm
from autolabel.student.job import LOSSES, TrainJob, TrainMachine
from autolabel.student.losses import FORMULAS, BatchCounts
from autolabel.student.metrics import read_metrics
from autolabel.student.parallel import DrawSampler, Team, synchronised
from autolabel.student.request import TrainRequest
from autolabel.student.steps import StepReport
from autolabel.student.train import Training, train
from autolabel.teacher.checkpoints import read_checkpoint
from autolabel.teacher.networks.build import build

pytestmark = pytest.mark.thorough

torch.set_num_threads(1)

CPU = torch.device("cpu")


def in_processes(size: int, folder: Path, body: Callable[..., None], *arguments: Any) -> None:
    """Call body(team, *arguments) in so many new processes, and wait for them."""
    place = folder.with_name(f"{folder.name}-{uuid.uuid4().hex}")
    spawn(_join, args=(size, place, body, arguments), nprocs=size)


def _join(rank: int, size: int, place: Path, body: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=size)
    body(Team(CPU, rank, size), *arguments)
    dist.destroy_process_group()


# --- one batch, in parts ----------------------------------------------------------------------------------------------


def tiny() -> nn.Module:
    """Two batch norms, one of them on features far from zero."""
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5)
    return nn.Sequential(*layers).double()


def batch() -> tuple[Tensor, Tensor]:
    """Six crops of 16 x 16, of five classes; the first has hardly a label, the last has none."""
    torch.manual_seed(4)
    label = torch.randint(0, 5, (6, 16, 16))
    label[0, 1:], label[5] = 255, 255
    return torch.randn(6, 3, 16, 16).double() + 30, label


def gradients(team: Team, loss: str, accumulate: int) -> tuple[float, nn.Module]:
    """The loss of the whole batch, and the network with its gradients, computed as the training does.

    All but rmi weigh the pixels.
    """
    network = tiny()
    model = team.join(network)
    images, labels = batch()
    weight = None if loss == "rmi" else torch.arange(labels.numel()).view_as(labels).remainder(256).to(torch.uint8)
    own = list(DrawSampler(team, first=0, steps=1, batch=len(labels), accumulate=accumulate))
    counts = BatchCounts.of(labels[own], None if weight is None else weight[own])
    whole = counts.summed(team.sum, images=len(labels))
    total = torch.zeros((), dtype=torch.float64)
    for part in torch.tensor(own).chunk(accumulate):
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = bool(part[-1] == own[-1])
        of_part = None if weight is None else weight[part]
        value = FORMULAS[loss].joint(model(images[part]), labels[part], whole=whole, weight=of_part)
        (value * team.size).backward()  # type: ignore[no-untyped-call]
        total += value.detach()
    return team.sum(total).item(), network


def compare_with_one_process(team: Team) -> None:
    """In float64, so that a wrong factor cannot hide behind rounding."""
    for loss in LOSSES:
        for accumulate in (1, 2):
            expected, alone = gradients(Team(CPU), loss, accumulate)
            found, network = gradients(team, loss, accumulate)
            assert found == pytest.approx(expected, rel=1e-9)
            for (name, p), q in zip(network.named_parameters(), alone.parameters(), strict=True):
                assert p.grad is not None
                assert q.grad is not None
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9, msg=f"{loss} {accumulate} {name}")
            for (name, b), c in zip(network.named_buffers(), alone.buffers(), strict=True):
                torch.testing.assert_close(b, c, msg=f"{loss} {accumulate} {name}")


def test_the_gradient_of_three_processes_is_that_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    """Also where one of them has no labelled pixel, for all losses, and with a batch in two parts."""
    in_processes(3, tmp_path, compare_with_one_process)


def test_synchronised_replaces_batch_norms_and_keeps_all_other_modules() -> None:
    network = build("hrnet18s_ocr_mscale", 5)
    twin = synchronised(network)
    for own, other in (
        (network.named_parameters(), twin.named_parameters()),
        (network.named_buffers(), twin.named_buffers()),
    ):
        assert {name: id(tensor) for name, tensor in own} == {name: id(tensor) for name, tensor in other}
    kinds = {type(module) for module in twin.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {SynchronisedBatchNorm}
    assert not any(isinstance(module, SynchronisedBatchNorm) for module in network.modules())


@pytest.mark.parametrize("loss", LOSSES)
def test_the_losses_of_parts_add_up_to_that_of_the_whole(loss: str) -> None:
    torch.manual_seed(5)
    logits, label = torch.randn(6, 5, 16, 16), batch()[1]
    whole, sizes = BatchCounts.of(label), (1, 2, 3)
    joint = FORMULAS[loss].joint
    parts = sum(joint(a, b, whole=whole).item() for a, b in zip(logits.split(sizes), label.split(sizes), strict=True))
    assert parts == pytest.approx(joint(logits, label).item(), rel=1e-6)
    share, alone = joint(logits[:1], label[:1], whole=whole).item(), joint(logits[:1], label[:1]).item()
    assert (share == pytest.approx(alone / 6, rel=1e-3)) == (loss == "rmi")  # the others look at the whole batch


# --- who takes which draw ---------------------------------------------------------------------------------------------


def shares(size: int, accumulate: int, first: int = 0) -> list[list[int]]:
    return [
        list(DrawSampler(Team(CPU, rank, size), first=first, steps=3, batch=24, accumulate=accumulate))
        for rank in range(size)
    ]


def test_one_process_takes_the_draws_in_their_order() -> None:
    assert shares(1, 1) == [list(range(72))]
    assert shares(1, 3) == [list(range(72))]
    assert shares(1, 1, first=2) == [list(range(48, 72))]


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_crops_that_share_a_batch_norm_are_the_same_for_any_number_of_processes(size: int, accumulate: int) -> None:
    found = shares(size, accumulate)
    own = 24 // size // accumulate
    for part in range(3 * accumulate):
        together = [draw for share in found for draw in share[part * own : (part + 1) * own]]
        assert together == list(range(part * own * size, (part + 1) * own * size))
    assert {
        len(DrawSampler(Team(CPU, rank, size), first=0, steps=3, batch=24, accumulate=accumulate))
        for rank in range(size)
    } == {72 // size}


# --- whole trainings --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(city: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """Four steps of a network without dropout, validated after the second and the last, in two parts each.

    Crops are not too small and steps are short: batch norm over two values would blow rounding up a thousandfold.
    """
    out = tmp_path_factory.mktemp("alone")
    asked = TrainJob(city / "fine.parquet", city / "val.parquet", out, steps=4, batch_size=4, crop=(96, 128))
    asked = replace(asked, arch="hrnet18s_plain_mscale", optimizer="sgd", ema=0.9, accumulate=2, schedule="cosine")
    return replace(asked, learning_rate=1e-3, validations=2, device="cpu", precision="float32")


@pytest.fixture(scope="module")
def alone(job: TrainJob) -> Path:
    train(job)
    return job.out


def train_in(team: Team, job: TrainJob, die_at: int = 0) -> None:
    """Train; the first process ends as by SIGKILL before it has told of step `die_at`."""

    def on_step(report: StepReport) -> None:
        if report.step == die_at:
            while not (job.out / "last.pt").exists():  # a thread writes it
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    Training(TrainRequest(job), team).run(on_step, print)


def assert_close(folder: Path, expected: Path) -> None:
    """The same training but for rounding."""
    assert names_in(folder) == names_in(expected)
    found, wanted = (read_checkpoint(path / "last.pt") for path in (folder, expected))
    assert found.training is not None
    assert wanted.training is not None
    for state, other in (
        (found.state_dict, wanted.state_dict),
        (found.training["network"], wanted.training["network"]),
    ):
        for key, tensor in other.items():
            torch.testing.assert_close(state[key], tensor, rtol=1e-2, atol=1e-3, msg=key)
    rows = [[(r.step, r.loss, r.learning_rate) for r in read_metrics(path)] for path in (folder, expected)]
    assert rows[0] == [(step, pytest.approx(loss, rel=1e-3), rate) for step, loss, rate in rows[1]]


@pytest.fixture(scope="module")
def killed(job: TrainJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that training, by two processes of which one died after the third step; the second was saved."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(ProcessExitedException):
        in_processes(2, folder, train_in, replace(job, out=folder / "out", machine=TrainMachine(workers=2)), 3)
    last = read_checkpoint(folder / "out" / "last.pt")
    assert last.training is not None
    assert last.training["step"] == 2
    return folder / "out"


def test_two_processes_that_are_killed_and_go_on_give_the_same_bits_and_what_one_gives(
    job: TrainJob, alone: Path, killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed, tmp_path / "resumed")
    (tmp_path / "unbroken").mkdir()
    for name in ("resumed", "unbroken"):
        in_processes(2, tmp_path / name, train_in, replace(job, out=tmp_path / name, machine=TrainMachine(workers=2)))
    found, expected = (read_checkpoint(tmp_path / name / "last.pt") for name in ("resumed", "unbroken"))
    assert all(torch.equal(tensor, expected.state_dict[key]) for key, tensor in found.state_dict.items())
    assert_close(tmp_path / "resumed", alone)


def train_with_one_that_breaks(team: Team, job: TrainJob) -> None:
    """Train; in the second step the features of the second process are infinite."""
    training, calls = Training(TrainRequest(job), team), 0

    def break_down(module: nn.Module, inputs: Any, output: Any) -> Any:
        nonlocal calls
        calls += module.training
        return output * float("inf") if module.training and team.rank == 1 and calls == 2 else None

    assert isinstance(training.model, DistributedDataParallel)
    training.model.module.backbone.register_forward_hook(break_down)
    training.run(lambda report: None, print)
    assert (training.skips.number, training.skips.first, training.updater.updates) == (1, 2, 2)
    for tensor in training.network.state_dict().values():
        if tensor.is_floating_point():
            assert torch.equal(team.sum(tensor), 2 * tensor) and tensor.isfinite().all()


@pytest.mark.slow
def test_a_batch_that_breaks_in_one_process_is_skipped_in_both(job: TrainJob, tmp_path: Path) -> None:
    asked = replace(job, arch="hrnet18s_plain", steps=3, batch_size=2, accumulate=1, crop=(64, 64), validations=1)
    (tmp_path / "out").mkdir()
    asked = replace(asked, out=tmp_path / "out", machine=TrainMachine(workers=2))
    in_processes(2, tmp_path / "out", train_with_one_that_breaks, asked)
    losses = [row.loss for row in read_metrics(tmp_path / "out")]
    assert [math.isfinite(loss) for loss in losses] == [True, False, True]


def test_a_training_of_two_processes_goes_on_with_one(job: TrainJob, alone: Path, killed: Path, tmp_path: Path) -> None:
    shutil.copytree(killed, tmp_path / "out")
    train(replace(job, out=tmp_path / "out", machine=TrainMachine(workers=1)))
    assert_close(tmp_path / "out", alone)
