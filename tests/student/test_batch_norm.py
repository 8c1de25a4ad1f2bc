"""Batch norm over several processes is to be that of one process with all their crops, and never wait for a GPU."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from pretended import PretendedGPU
from test_parallel import in_processes
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm

from autolabel.student import batch_norm
from autolabel.student.batch_norm import PLAIN, SynchronisedBatchNorm
from autolabel.student.parallel import Team

pytestmark = pytest.mark.thorough

TORCH = {  # the name in torch of every step
    "stats": "batch_norm_stats", "gather": "batch_norm_gather_stats_with_counts", "normalise": "batch_norm_elemt",
    "reduce": "batch_norm_backward_reduce", "spread": "batch_norm_backward_elemt",
}  # fmt: skip


class Case(NamedTuple):
    """A type, the sides of a map, its layout, and the error that its type allows."""

    dtype: torch.dtype
    size: tuple[int, int]
    layout: torch.memory_format
    error: float


CASES = (
    Case(torch.float64, (5, 7), torch.contiguous_format, 1e-12),
    Case(torch.float32, (5, 7), torch.contiguous_format, 1e-6),
    Case(torch.float32, (6, 4), torch.channels_last, 1e-6),
    Case(torch.float32, (1, 1), torch.channels_last, 1e-6),  # a pooled image
    Case(torch.bfloat16, (5, 7), torch.channels_last, 1e-2),
)


def layer(dtype: torch.dtype) -> nn.BatchNorm2d:
    torch.manual_seed(1)
    made = nn.BatchNorm2d(6)
    for tensor in (made.weight, made.bias, made.running_mean, made.running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    return made.to(torch.promote_types(dtype, torch.float32))


def drawn(case: Case) -> tuple[Tensor, Tensor]:
    """Inputs (4, 6, H, W) whose channels lie at other places and have other widths, and gradients of the outputs."""
    torch.manual_seed(2)
    x = torch.randn(4, 6, *case.size) * torch.arange(1, 7)[:, None, None] + torch.arange(-3, 3)[:, None, None]
    gradient = torch.randn(4, 6, *case.size)
    return tuple(t.to(case.dtype, memory_format=case.layout) for t in (x, gradient))  # type: ignore[return-value]


def results(module: nn.BatchNorm2d, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    output = module(x)
    output.backward(gradient)
    assert x.grad is not None and module.weight.grad is not None and module.bias.grad is not None
    assert module.running_mean is not None and module.running_var is not None
    assert output.dtype == x.grad.dtype == x.dtype
    return {
        "output": output.detach(), "x": x.grad, "weight": module.weight.grad, "bias": module.bias.grad,
        "mean": module.running_mean, "variance": module.running_var,
    }  # fmt: skip


def compare_with_the_joined_batch(team: Team) -> None:
    for case in CASES:
        whole, plain = drawn(case), layer(case.dtype)
        expected = results(copy.deepcopy(plain), *(t.to(torch.promote_types(t.dtype, torch.float32)) for t in whole))
        own = slice(2 * team.rank, 2 * team.rank + 2)
        module = SynchronisedBatchNorm(plain)
        found = results(module, *(t[own] for t in whole))
        assert int(module.num_batches_tracked) == 1  # type: ignore[arg-type]
        for name, value in found.items():
            wanted = expected[name][own] if name in ("output", "x") else expected[name]
            total = team.sum(value) if name in ("weight", "bias") else value
            assert wanted.abs().max() > 0.01 or (name == "x" and case.size == (1, 1))
            error = (total - wanted).abs().max() / max(1.0, float(wanted.abs().max()))
            assert error <= case.error, f"{case} {name}: {error}"


def compare_with_torch(team: Team) -> None:
    """Torch's own synchronised batch norm with the plain steps in place of its kernels, which a CPU lacks."""
    calls: list[tuple[str, list[Any]]] = []

    def noted(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            calls.append((name, [a.clone() if isinstance(a, Tensor) else a for a in arguments]))
            return getattr(PLAIN, name)(*arguments)

        return call

    for case in CASES[:3]:
        x, gradient = (t[2 * team.rank : 2 * team.rank + 2] for t in drawn(case))
        of_torch, ours = layer(case.dtype), SynchronisedBatchNorm(layer(case.dtype))
        calls.clear()
        for name, of in TORCH.items():
            setattr(torch, of, noted(name))
        first = x.detach().clone().requires_grad_()
        output = SyncBatchNorm.apply(
            first, of_torch.weight, of_torch.bias, of_torch.running_mean, of_torch.running_var, 1e-5, 0.1,
            dist.group.WORLD, team.size,
        )  # fmt: skip
        output.backward(gradient)
        theirs = list(calls)
        calls.clear()
        batch_norm.PLAIN = batch_norm.Kernels(*(noted(name) for name in TORCH))
        second = x.detach().clone().requires_grad_()
        again = ours(second)
        again.backward(gradient)
        batch_norm.PLAIN = PLAIN
        assert [name for name, _ in calls] == [name for name, _ in theirs] == list(TORCH)
        for (name, found), (_, expected) in zip(calls, theirs, strict=True):
            assert len(found) == len(expected)
            for a, b in zip(found, expected, strict=True):
                if isinstance(a, Tensor):
                    assert (a.dtype, a.numel(), a.stride() if a.ndim == 4 else ()) == (
                        b.dtype, b.numel(), b.stride() if b.ndim == 4 else ()
                    ), name  # fmt: skip
                    assert torch.equal(a.flatten(), b.flatten()), name
                else:
                    assert a == b, name
        assert torch.equal(output, again)
        assert torch.equal(first.grad, second.grad)  # type: ignore[arg-type]


def compare(team: Team) -> None:
    compare_with_the_joined_batch(team)
    compare_with_torch(team)


def test_two_processes_give_what_one_gives_by_the_steps_of_torchs_own_synchronised_batch_norm(tmp_path: Path) -> None:
    """Its kernels, which only a GPU has, get the arguments that they expect."""
    in_processes(2, tmp_path, compare)


def test_torch_has_the_steps_under_these_names_and_with_as_many_arguments() -> None:
    counts = {"stats": 2, "gather": 8, "normalise": 6, "reduce": 8, "spread": 8}
    for name, of in TORCH.items():
        schema = getattr(torch.ops.aten, of).default._schema
        assert len(schema.arguments) == counts[name]
        assert getattr(batch_norm._CUDA, name) is getattr(torch, of)


class Context(SimpleNamespace):
    """Autograd's own, as far as a function uses it."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_layer_makes_the_host_wait_for_a_gpu_or_copies_anything(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On pretended tensors, with plain steps in place of the kernels, which know no such tensors."""
    monkeypatch.setattr(batch_norm, "_CUDA", PLAIN)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(batch_norm, "_all_gather", lambda gathered, own: None)
    monkeypatch.setattr(dist, "all_reduce", lambda values: None)
    with PretendedGPU() as gpu:
        x = torch.empty(2, 6, 8, 8, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight, bias, mean, variance = (torch.empty(6, device="cuda") for _ in range(4))
        context = Context()
        with gpu.recorded() as record:
            output = batch_norm._BatchNorm.forward(context, x, weight, bias, mean, variance, 0.1, 1e-5)
            of_x, of_weight, of_bias, *_ = batch_norm._BatchNorm.backward(context, torch.empty_like(output))
    assert (record.waits, record.into, record.out) == (0, [], [])
    assert of_x is not None and of_weight is not None and of_bias is not None
    assert all(tensor.device.type == "cuda" for tensor in (output, of_x, of_weight, of_bias))
    assert (output.dtype, of_x.dtype, of_weight.dtype, of_bias.dtype) == (dtype, dtype, *[torch.float32] * 2)
