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

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler

from autolabel.student.batch_norm import SynchronisedBatchNorm


@dataclass(frozen=True)
class Team:
    """The processes that train together: the device and rank of this one, and their number.

    loaders: processes that read crops for this one; 0 lets it read them itself.
    A team of several processes needs a `torch.distributed` group that all of them have joined.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    loaders: int = 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of the tensors that all processes give, which are of one shape."""
        if self.size == 1:
            return values
        total = values.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def gather(self, text: str) -> list[str]:
        """Return the texts that all processes give, by rank."""
        texts = [text]
        if self.size > 1:
            texts = [""] * self.size
            dist.all_gather_object(texts, text)
        return texts

    def join(self, network: nn.Module) -> nn.Module:
        """Return the module to call in training: it shares the network's weights and running statistics.

        Calling `backward` on a loss times `size` adds up the gradients of all processes.
        """
        if self.size == 1:
            return network
        return DistributedDataParallel(
            synchronised(network),
            [self.device] if self.device.type == "cuda" else None,
            broadcast_buffers=False,  # batch norm gives all processes the same bits
            gradient_as_bucket_view=True,
        )


def synchronised(network: nn.Module) -> nn.Module:
    """Return a twin that shares the network's tensors and whose batch norms span all processes.

    The network itself keeps its plain batch norms, for prediction. Raises ValueError for a batch norm that cannot span
    several processes.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not (
            isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats
        ):
            raise ValueError(
                f"{name} is a {type(module).__name__} that cannot span several processes: train with --workers 1"
            )
    shared = {id(tensor): tensor for tensor in itertools.chain(network.parameters(), network.buffers())}
    twin = copy.deepcopy(network, shared)
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
