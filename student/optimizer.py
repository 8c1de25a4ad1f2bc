"""From gradients to weights: learning rate, loss scaling, clipping, optimizer, averaged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from autolabel.student.job import POWER, WARM_UP

_SMALLEST_SCALE = 2.0**-14  # a float16 loss that still overflows at this scale is itself infinite or nan


def learning_rate_at(
    step: int, steps: int, *, peak: float, schedule: str = "poly", power: float = POWER, warm_up: float = WARM_UP
) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up over a share of the steps, times decay.

    The decay of poly is (1 - step / steps) ** power, that of cosine half a wave (arXiv 1608.03983, equation 5, one
    cycle). Both decay from the first step on.
    """
    warm = max(1, int(steps * warm_up + 1e-6))  # 0.07 * 100 is just above 7, 0.29 * 100 just below 29
    left = 1 - step / steps
    decay = left**power if schedule == "poly" else (1 - math.cos(math.pi * left)) / 2
    return peak * min(1.0, (step + 1) / warm) * float(decay)


class WeightUpdater:
    """The optimizer of a network, and everything else that has to be remembered from one step to the next.

    average_decay: keep `average`, a network of exponentially averaged weights and running statistics; None keeps none.
    After n updates the decay is at most (1 + n) / (10 + n), so that the average soon forgets the first weights.
    precision: with float16 the loss is scaled (arXiv 1710.03740, section 3.2). clip: length (L2) to which longer
    gradients are shortened; 0 leaves them as they are. weight_decay: see `WEIGHT_DECAYS`.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: str,
        *,
        peak: float,
        average_decay: float | None,
        precision: torch.dtype,
        clip: float,
        weight_decay: float,
    ) -> None:
        self.network, self.decay, self.clip, self.updates = network, average_decay, clip, 0
        parameters = list(network.parameters())
        self.optimizer: torch.optim.Optimizer
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(parameters, lr=peak, momentum=0.9, weight_decay=weight_decay)
        else:
            self.optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=weight_decay)
        device = parameters[0].device.type
        self.scaler = torch.amp.GradScaler(device, enabled=precision == torch.float16)
        self.average = None if average_decay is None else copy.deepcopy(network).requires_grad_(False)
        self._statistics = _by_type(network.buffers())
        self._before = [[torch.empty_like(tensor) for tensor in tensors] for tensors in self._statistics]

    @torch.no_grad()
    def begin(self) -> None:
        """Forget the gradients, and remember the running statistics in case that the batch is skipped."""
        self.optimizer.zero_grad()
        for before, now in zip(self._before, self._statistics, strict=True):
            torch._foreach_copy_(before, now)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to the present ones."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def measure(self) -> Tensor:
        """Return the length (L2) of the gradient, without the scale of a float16 loss, as a scalar on its device."""
        self.scaler.unscale_(self.optimizer)
        return nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])

    def update(self, rate: float, length: Tensor) -> None:
        """Change the weights by their gradients, which have this length before they are clipped."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.clip:
            nn.utils.clip_grads_with_norm_(self.network.parameters(), self.clip, length)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.updates += 1
        self._average()

    @torch.no_grad()
    def skip(self) -> None:
        """Leave everything as it was before the batch, but lower the scale of float16 losses."""
        self.scaler.update()
        for before, now in zip(self._before, self._statistics, strict=True):
            torch._foreach_copy_(now, before)

    @property
    def scale_may_help(self) -> bool:
        """True if gradients may be infinite because of the scale of float16 losses, which the next step will halve."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= _SMALLEST_SCALE

    @torch.no_grad()
    def _average(self) -> None:
        if self.average is None or self.decay is None:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = zip(*(_by_type(n.state_dict().values()) for n in (self.average, self.network)), strict=True)
        for means, now in pairs:
            if means[0].is_floating_point():
                torch._foreach_lerp_(means, now, 1 - decay)
            else:
                torch._foreach_copy_(means, now)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later process needs to go on, apart from the weights of the network."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where losses are not scaled
            self.scaler.load_state_dict(state["scaler"])
        self.updates = state["updates"]


def _by_type(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return the tensors in lists of one type each, because torch changes such a list in one go."""
    lists: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        lists.setdefault(tensor.dtype, []).append(tensor)
    return list(lists.values())
