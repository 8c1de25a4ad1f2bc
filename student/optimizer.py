"""From gradients to weights: learning rate, loss scaling, clipping, optimizer, averaged weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

LEARNING_RATES = {"sgd": 0.01, "adamw": 0.003}  # peaks
SCHEDULES = ("poly", "cosine")
POWER = 0.9  # of the polynomial
_LONGEST_GRADIENT = 10.0
_SMALLEST_SCALE = 2.0**-14  # of a float16 loss: below it is not the scale that is wrong


def learning_rate_at(step: int, steps: int, peak: float, schedule: str = "poly", power: float = POWER) -> float:
    """Linear warm-up over the first 5 % of the steps, and decay from the first on. Step counts from 0.

    poly: (1 - step / steps) ** power. cosine: half a wave, from 1 to 0 (arXiv 1608.03983, equation 5, one cycle).
    """
    warm = max(1, steps // 20)
    left = 1 - step / steps
    decay = left**power if schedule == "poly" else (1 - math.cos(math.pi * left)) / 2
    return peak * min(1.0, (step + 1) / warm) * float(decay)


class Optimiser:
    """The optimizer of a network, and all that it needs to remember from one step to the next.

    average_decay: keep `average`, a network of exponentially averaged weights and running statistics; None keeps none.
    The decay grows towards what was asked as (1 + n) / (10 + n), n updates after the start, so that the average soon
    forgets the weights that it started from. precision: float16 has its loss scaled (arXiv 1710.03740, section 3.2).
    """

    def __init__(
        self, network: nn.Module, optimizer: str, peak: float, average_decay: float | None, precision: torch.dtype
    ) -> None:
        self.network, self.decay, self.updates = network, average_decay, 0
        parameters = list(network.parameters())
        self.optimizer: torch.optim.Optimizer
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(parameters, lr=peak, momentum=0.9, weight_decay=5e-4)
        else:
            self.optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.01)
        device = parameters[0].device.type
        self.scaler = torch.amp.GradScaler(device, enabled=precision == torch.float16)
        self.average = None if average_decay is None else copy.deepcopy(network).requires_grad_(False)

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those that are there."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def update(self, rate: float) -> bool:
        """Change the weights by their gradients, clipped to a length of 10; False where these are not finite.

        Then nothing is changed but the scale of float16 losses, so that the next step may fare better.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        length = nn.utils.clip_grad_norm_(self.network.parameters(), max_norm=_LONGEST_GRADIENT)
        finite = math.isfinite(length.item())
        if finite:
            self.scaler.step(self.optimizer)
            self.updates += 1
            self._average()
        self.scaler.update()
        return finite

    @property
    def hopeless(self) -> bool:
        """Whether gradients that are not finite are no matter of the scale of the loss."""
        return not self.scaler.is_enabled() or self.scaler.get_scale() < _SMALLEST_SCALE

    @torch.no_grad()
    def _average(self) -> None:
        if self.average is None or self.decay is None:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for mean, now in zip(self.average.state_dict().values(), self.network.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(now, 1 - decay)
            else:
                mean.copy_(now)

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on, beside the weights of the network."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave; an older version gave the optimizer's alone."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.updates = state.get("updates", 0)
