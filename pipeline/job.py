"""What a labelling run was asked to do: one dataclass, checked, saved as `run.json`, compared when a run is resumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autolabel.manifests.policy import COMBINE, LEVELS, PAPER, SCALES, Policy, check_scales

STORES = ("zarr", "png")
ENGINES = ("ray", "local")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class LabelJob:
    """Settings of one `autolabel generate`. Raises ValueError naming field, value and what was expected."""

    manifest: Path
    teacher: Path
    out: Path
    scales: tuple[float, ...] = SCALES
    flip: bool = False
    combine: str = COMBINE[0]
    policy: Policy = PAPER
    keep_confidence: int | None = None  # levels
    source: Path | None = None  # a run whose kept confidence stands in for the teacher
    precision: str = "auto"
    device: str = "auto"  # auto: what the run began with, or GPUs where there are any
    store: str = "zarr"
    engine: str = "ray"
    workers: int | None = None  # None: one per GPU, or one per CPU core where there is no GPU
    limit: int | None = None
    only: str | None = None  # glob of sample ids
    part: tuple[int, int] | None = None  # (I, N): every N-th unit, beginning with the I-th
    retry_quarantined: bool = False
    unit_size: int = 64  # labels in a shard = samples in a unit
    max_quarantined: float = 0.001  # share of the samples; Cityscapes itself ships one broken image

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", check_scales(self.scales))
        for name, known in (("combine", COMBINE), ("store", STORES), ("engine", ENGINES), ("device", DEVICES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r}: expected {' or '.join(known)}")
        for name in ("workers", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: expected 1 or more")
        if self.keep_confidence is not None and not LEVELS[0] <= self.keep_confidence <= LEVELS[1]:
            raise ValueError(f"keep-confidence {self.keep_confidence}: expected {LEVELS[0]} to {LEVELS[1]} levels")
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise ValueError(f"shard {self.part[0]}/{self.part[1]}: expected I/N with I from 1 to N")
        if not 1 <= self.unit_size <= 4096:
            raise ValueError(f"shard size {self.unit_size}: expected 1 to 4096")
        if not 0 <= self.max_quarantined <= 1:
            raise ValueError(f"max quarantined {self.max_quarantined:g}: expected a share in [0, 1]")
