"""From gradients to weights: learning rate, loss scaling, clipping, optimizer, averaged weights."""

from __future__ import annotations

import copy
import math
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

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to the present ones."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def update(self, rate: float) -> float:
        """Change the weights by their gradients, clipped. Returns the length of these before they were clipped.

        If it is infinite or nan, the weights stay, and the scale of float16 losses is lowered, so that the next step
        may succeed.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.network.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        length = norm.item()
        if math.isfinite(length):
            self.scaler.step(self.optimizer)
            self.updates += 1
            self._average()
        self.scaler.update()
        return length

    @property
    def hopeless(self) -> bool:
        """True if a smaller loss scale cannot help: the gradients are infinite for another reason."""
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
