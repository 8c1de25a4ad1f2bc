"""Batch norm over the batches of several processes, which have equal shares of a batch.

Forward: each process sums up its own share; all gather these, join them in the same order, and normalise. Backward:
each sums up its gradients, all add these, and each computes the gradient of its share. Weights get the gradient of the
share alone, because DistributedDataParallel adds them up.

On CUDA torch's own kernels do it, in the order of its `SyncBatchNorm` (torch/nn/modules/_functions.py), except for one
thing: that looks for empty shares, and so lets the host wait for the device at every layer. No share is empty here.
Elsewhere the same steps are plain formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Torch 2.13 has another name for it, and warns of the old one.
_all_gather: Callable[[Tensor, Tensor], object] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Kernels(NamedTuple):
    """The steps of a batch norm, with names and arguments of torch.batch_norm_*. Legend: P processes, C channels.

    stats(x, eps): mean and 1 / sqrt(variance + eps) of x (B, C, H, W), both (C,).
    gather(x, means, inverses, running_mean, running_var, momentum, eps, counts): the two of all processes from those of
    each (P, C), with `counts` (P,) values per channel; moves the running statistics.
    normalise(x, weight, bias, mean, inverse, eps): the output.
    reduce(gradient, x, mean, inverse, weight, True, True, True): sums (C,) of the gradient, and of the gradient times
    the deviation from the mean; gradients of weight and bias.
    spread(gradient, x, mean, inverse, weight, sums, products, counts): the gradient of x, from sums over all processes.
    """

    stats: Callable[..., tuple[Tensor, Tensor]]
    gather: Callable[..., tuple[Tensor, Tensor]]
    normalise: Callable[..., Tensor]
    reduce: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    spread: Callable[..., Tensor]


def _exact(x: Tensor) -> Tensor:
    """Return x in float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _map(values: Tensor) -> Tensor:
    return values[:, None, None]


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(_exact(x), dim=(0, 2, 3), correction=0)
    return mean, torch.rsqrt(variance + eps)


def _gather(
    x: Tensor, means: Tensor, inverses: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total = counts.sum()
    share = (counts / total)[:, None]
    mean = (share * means).sum(0)
    variances = inverses.square().reciprocal() - eps
    variance = (share * (variances + (means - mean).square())).sum(0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * (total / (total - 1)), momentum)
    return mean, torch.rsqrt(variance + eps)


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, eps: float) -> Tensor:
    return ((_exact(x) - _map(mean)) * _map(inverse * weight) + _map(bias)).to(x.dtype)


def _reduce(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, *wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradient = _exact(gradient)
    sums = gradient.sum((0, 2, 3))
    products = (gradient * (_exact(x) - _map(mean))).sum((0, 2, 3))
    return sums, products, (products * inverse).to(weight.dtype), sums.to(weight.dtype)


def _spread(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, sums: Tensor, products: Tensor,
    counts: Tensor,
) -> Tensor:  # fmt: skip
    total = counts.sum()
    deviation = (_exact(x) - _map(mean)) * _map(inverse.square() * products / total)
    return ((_exact(gradient) - _map(sums / total) - deviation) * _map(inverse * weight)).to(x.dtype)


PLAIN = Kernels(_stats, _gather, _normalise, _reduce, _spread)
_CUDA = Kernels(
    torch.batch_norm_stats,
    torch.batch_norm_gather_stats_with_counts,
    torch.batch_norm_elemt,
    torch.batch_norm_backward_reduce,
    torch.batch_norm_backward_elemt,
)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float,
        eps: float,
    ) -> Tensor:  # fmt: skip
        kernels = _CUDA if x.is_cuda else PLAIN
        x = x.contiguous(memory_format=_format(x))
        processes, channels = dist.get_world_size(), x.shape[1]
        own = torch.cat(kernels.stats(x, eps))
        gathered = own.new_empty(processes * 2 * channels)
        _all_gather(gathered, own)
        means, inverses = gathered.view(processes, 2, channels).unbind(1)
        counts = torch.full((processes,), x.numel() // channels, dtype=own.dtype, device=own.device)
        mean, inverse = kernels.gather(x, means, inverses, running_mean, running_var, momentum, eps, counts)
        ctx.save_for_backward(x, weight, mean, inverse, counts.to(torch.int32))
        return kernels.normalise(x, weight, bias, mean, inverse, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, counts = ctx.saved_tensors
        kernels = _CUDA if x.is_cuda else PLAIN
        gradient = gradients[0].contiguous(memory_format=_format(x))
        sums, products, of_weight, of_bias = kernels.reduce(gradient, x, mean, inverse, weight, True, True, True)
        both = torch.cat([sums, products])
        dist.all_reduce(both)
        of_x = kernels.spread(gradient, x, mean, inverse, weight, *both.chunk(2), counts)
        return of_x, of_weight, of_bias, None, None, None, None


def _format(x: Tensor) -> torch.memory_format:
    """The layout of a tensor in memory for which there are kernels."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class SynchronisedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, which must have the same size.

    It shares weights and running statistics with the plain batch norm that it replaces, and does afterwards whatever
    that has inside: a batch norm of timm holds its activation.
    """

    def __init__(self, plain: nn.BatchNorm2d) -> None:
        super().__init__(plain.num_features, plain.eps, plain.momentum, plain.affine, plain.track_running_stats)
        self.weight, self.bias = plain.weight, plain.bias
        self.running_mean, self.running_var = plain.running_mean, plain.running_var
        self.num_batches_tracked = plain.num_batches_tracked
        self.after = nn.Sequential(*plain.children())
        self.train(plain.training)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.after(super().forward(x))  # type: ignore[no-any-return]
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        result: Tensor = _BatchNorm.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps
        )
        return self.after(result)  # type: ignore[no-any-return]
