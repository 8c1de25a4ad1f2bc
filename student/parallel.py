"""Several processes train one network on one batch: each computes a part, and the weights stay equal in all.

The gradient is that of one process with the whole batch, up to rounding: the losses of parts add up to the loss of the
whole (`losses.BatchCounts`), DistributedDataParallel adds the gradients, and batch norm takes mean and variance over
all processes. One thing differs: each process draws its own dropout.
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
    """The processes that train together: the device and rank of this one, and their number.

    A team of several processes needs a `torch.distributed` group that all of them have joined.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of the tensors that all processes give, which are of one shape."""
        if self.size == 1:
            return values
        total = values.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def join(self, network: nn.Module) -> nn.Module:
        """Return the module to call in training: it shares the network's weights and running statistics.

        Calling `backward` on a loss times `size` adds up the gradients of all processes.
        """
        if self.size == 1:
            return network
        on_gpu = self.device.type == "cuda"
        twin = synchronised(network, "cuda" if on_gpu else "cpu")
        return DistributedDataParallel(twin, [self.device] if on_gpu else None)


def synchronised(network: nn.Module, device_type: str) -> nn.Module:
    """Return a twin that shares the network's tensors and whose batch norms span all processes.

    The network itself keeps its plain batch norms, for prediction. Torch's own synchronised batch norm is used on
    CUDA; it does not compute on a CPU.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(network.parameters(), network.buffers())}
    twin = copy.deepcopy(network, shared)
    if device_type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(twin)  # type: ignore[no-any-return, no-untyped-call]
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, SynchronisedBatchNorm(child))
    return twin


class DrawSampler(Sampler[int]):
    """The draws of one process of a team, from step `first` to `steps`.

    Step s shows draws s * batch to (s + 1) * batch - 1. They are cut into `accumulate` equal parts, and each of these
    into one share per process, so that batch norm sees the same draws together whatever the size of the team.
    """

    def __init__(self, team: Team, *, first: int, steps: int, batch: int, accumulate: int) -> None:
        self.team, self.first, self.steps = team, first, steps
        self.batch, self.part = batch, batch // accumulate

    def __iter__(self) -> Iterator[int]:
        own = self.part // self.team.size
        for start in range(self.first * self.batch, self.steps * self.batch, self.part):
            yield from range(start + self.team.rank * own, start + (self.team.rank + 1) * own)

    def __len__(self) -> int:
        return (self.steps - self.first) * self.batch // self.team.size


class _Sum(torch.autograd.Function):
    """The sum over all processes. All of them depend on it, so the gradient of each input is a sum over all, too."""

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
    """Batch norm over the batches of all processes, which must have the same size; plain operations, any device.

    It shares weights and running statistics with the plain batch norm that it replaces. The common mean is computed
    before the deviations from it: a variance made of sums of squares would lose its last digits.
    """

    def __init__(self, plain: nn.BatchNorm2d) -> None:
        super().__init__(plain.num_features, plain.eps, plain.momentum, plain.affine, plain.track_running_stats)
        self.weight, self.bias = plain.weight, plain.bias
        self.running_mean, self.running_var = plain.running_mean, plain.running_var
        self.num_batches_tracked = plain.num_batches_tracked
        self.train(plain.training)

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
