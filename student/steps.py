"""The account of a training's steps: loss, gradient, speed, score; batches that were skipped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from autolabel.manifests.documents import shaped
from autolabel.manifests.wording import percent

NUMBERS = ("loss", "gradient_norm", "learning_rate", "images_per_s", "miou")
_MAY_BE_INFINITE = ("loss", "gradient_norm")  # null in JSON, where they are no finite number


@dataclass(frozen=True)
class StepReport:
    """The result of one step: its number from 1, loss, learning rate and speed; scores if a validation followed.

    miou, iou: mean IoU, and IoU by class, None for a class in neither truth nor prediction. All are shares, 0 to 1.
    gradient_norm: length (L2) of the gradient before it is clipped. skipped: number of batches so far that were
    skipped, because their loss or gradient was not finite; first_skipped: step of the first one, 0 for none.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    images_per_s: float
    miou: float | None = None
    iou: Mapping[str, float | None] | None = None
    skipped: int = 0
    first_skipped: int = 0

    @classmethod
    def of(cls, record: Mapping[str, Any], where: str) -> StepReport:
        """The step of a `record`; `where` is its file and line. Raises BadDocument."""
        lost = [name for name in _MAY_BE_INFINITE if record.get(name, 0) is None]
        step: StepReport = shaped(cls, dict(record) | dict.fromkeys(lost, math.nan), where)
        return step

    def record(self) -> dict[str, Any]:
        """All that is known, as JSON: what no validation has measured and what never happened is left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            name: None if name in _MAY_BE_INFINITE and not math.isfinite(value) else value
            for name, value in values.items()
            if value is not None and (value != 0 or name not in ("skipped", "first_skipped"))
        }

    def numbers(self) -> dict[str, float]:
        """All finite numbers of this step by name, IoU of a class as iou/NAME, for those who draw them."""
        named = {name: getattr(self, name) for name in NUMBERS} | {f"iou/{n}": v for n, v in (self.iou or {}).items()}
        return {name: value for name, value in named.items() if value is not None and math.isfinite(value)}

    def note(self) -> str:
        """Loss, speed and score in a few words, for the line below a bar."""
        miou = f"  mIoU {percent(self.miou)}" if self.miou is not None else ""
        skipped = f"  {self.skipped} skipped" if self.skipped else ""
        return f"loss {self.loss:.3f}  {self.images_per_s:.1f} images/s{miou}{skipped}"


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
