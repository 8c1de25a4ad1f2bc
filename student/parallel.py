"""Several processes train one network on one batch: each computes a part, and the weights stay the same in all.

That gives the gradient of one process that shows the whole batch, up to rounding: the losses of parts add up to that
of the whole (`losses.Counts`), gradients are added by DistributedDataParallel, and batch norm takes its mean and
variance over all processes. What differs: each process draws its own dropout.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler


@dataclass(frozen=True)
class Team:
    """The processes that train together: where this one computes, its number, and how many there are.

    Of more than one, all must have joined a `torch.distributed` group before.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    def sum(self, values: Tensor) -> Tensor:
        """The sum of what all processes give, of the same shape in each."""
        if self.size == 1:
            return values
        total = values.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def join(self, network: nn.Module) -> nn.Module:
        """What to call in training instead of `network`: it works on the same weights and running statistics.

        Gradients of all processes are added when `backward` is called on a loss times `size`.
        """
        if self.size == 1:
            return network
        on_gpu = self.device.type == "cuda"
        return DistributedDataParallel(synchronised(network, on_gpu), [self.device] if on_gpu else None)


def synchronised(network: nn.Module, on_gpu: bool) -> nn.Module:
    """A twin that shares the network's tensors, and whose batch norms span all processes.

    The network itself keeps plain ones, for prediction.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(network.parameters(), network.buffers())}
    twin = copy.deepcopy(network, shared)
    if on_gpu:
        return nn.SyncBatchNorm.convert_sync_batchnorm(twin)  # type: ignore[no-any-return, no-untyped-call]
    for module in twin.modules():  # torch's own does not compute on a CPU
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SynchronisedBatchNorm
    return twin


class Shares(Sampler[int]):
    """The draws that one process of a team takes, from step `first` to `steps`.

    Step s shows draws s * batch to (s + 1) * batch - 1. They are cut into `accumulate` equal parts, and each of these
    into one part per process: which draws batch norm sees together does not depend on the team.
    """

    def __init__(self, team: Team, first: int, steps: int, batch: int, accumulate: int) -> None:
        self.team, self.first, self.steps = team, first, steps
        self.batch, self.part = batch, batch // accumulate

    def __iter__(self) -> Iterator[int]:
        own = self.part // self.team.size
        for start in range(self.first * self.batch, self.steps * self.batch, self.part):
            yield from range(start + self.team.rank * own, start + (self.team.rank + 1) * own)

    def __len__(self) -> int:
        return (self.steps - self.first) * self.batch // self.team.size


class _Sum(torch.autograd.Function):
    """The sum over all processes. Each of them depends on it, so each input's gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class SynchronisedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, which must be of one size; on any device, with plain operations.

    Means first, then deviations from the common mean: a variance made of sums of squares would lose its last digits.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        size = dist.get_world_size()
        own_variance, own_mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
        mean = _sum(own_mean) / size
        variance = _sum(own_variance + (own_mean - mean).square()) / size
        with torch.no_grad():
            count = size * values.numel() / values.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        centred = values - mean[:, None, None]
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def _sum(values: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
    return total
