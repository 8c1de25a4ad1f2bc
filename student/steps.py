"""The account of a training's steps: loss, gradient, speed, score; batches that were skipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from autolabel.manifests.wording import percent

CURVES = ("step", "loss", "gradient_norm", "learning_rate", "images_per_s", "miou")  # columns of curves.csv


@dataclass(frozen=True)
class StepReport:
    """The result of one step: its number from 1, loss, learning rate and speed; `miou` if a validation followed.

    gradient_norm: length (L2) of the gradient before it is clipped. skipped: number of batches so far that were
    skipped, because their loss or gradient was not finite; first_skipped: step of the first one, 0 for none.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    images_per_s: float
    miou: float | None = None
    skipped: int = 0
    first_skipped: int = 0

    def note(self) -> str:
        """Loss, speed and score in a few words, for the line below a bar."""
        miou = f"  mIoU {percent(self.miou)}" if self.miou is not None else ""
        skipped = f"  {self.skipped} skipped" if self.skipped else ""
        return f"loss {self.loss:.3f}  {self.images_per_s:.1f} images/s{miou}{skipped}"

    def cells(self) -> list[str]:
        """The numbers under `CURVES` as text."""
        numbers = f"{self.loss:.6f}", f"{self.gradient_norm:.6g}", f"{self.learning_rate:.8f}"
        miou = "" if self.miou is None else f"{self.miou:.6f}"
        return [str(self.step), *numbers, f"{self.images_per_s:.3f}", miou]


class Skips(NamedTuple):
    """Batches that were skipped: their number, that of the last ones in a row, and the step of the first, from 1."""

    number: int = 0
    row: int = 0
    first: int = 0

    def none(self) -> Skips:
        """Return the account after a batch that was not skipped."""
        return self._replace(row=0)

    def one(self, step: int) -> Skips:
        """Return the account after the batch of a step was skipped."""
        return Skips(self.number + 1, self.row + 1, self.first or step)
