"""What a training is asked for, and whether that can be done; nothing is computed here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from autolabel.manifests.samples import Manifest, fingerprints
from autolabel.student.data import Augmentation, ManifestDataset, TrainingCrops
from autolabel.student.losses import LOSSES
from autolabel.student.optimizer import LEARNING_RATES, POWER, SCHEDULES
from autolabel.student.sampling import Mix
from autolabel.teacher.checkpoints import (
    Checkpoint,
    Start,
    fingerprint_tensor,
    load_network,
    overlap,
    read_checkpoint,
    read_start,
)
from autolabel.teacher.networks.build import architecture, build
from autolabel.teacher.networks.decoders import SegmentationNet

FINE_TUNING = 3  # so many times lower is the learning rate where a checkpoint is the start
_CROP_LIMIT = (512, 1024)
_NAMED = 8  # images of a batch that a message names
_HOW = ("workers", "compile")  # how it is computed, not what: these may change when a training goes on

OnLabel = Callable[[int, int], None]  # done, all


@dataclass(frozen=True)
class TrainJob:
    """Everything that decides what a training gives. None means: chosen from the data or the optimizer, see `train`.

    batch_size: crops of a step. They are split evenly over `workers` processes, and over `accumulate` parts that each
    process computes one after the other. Batch norm sees one such part, of all processes: the number of workers
    changes nothing but rounding and dropout, that of parts does.
    """

    manifest: Path
    val: Path
    out: Path
    arch: str = "hrnet18s_ocr_mscale"
    steps: int = 1000
    seed: int = 0
    batch_size: int = 4
    crop: tuple[int, int] | None = None
    loss: str = "cross-entropy"
    optimizer: str = "adamw"
    learning_rate: float | None = None
    init: Path | None = None
    device: str = "auto"
    precision: str = "auto"
    validations: int = field(default=4)
    auto_share: float | None = None
    auto_classes: tuple[str, ...] | None = None
    fine_only_last: float = 0.0
    workers: int = 1
    accumulate: int = 1
    schedule: str = SCHEDULES[0]
    power: float = POWER
    ema: float | None = None
    compile: bool = False

    @property
    def mix(self) -> Mix:
        """How often samples and classes come."""
        return Mix(auto_share=self.auto_share, auto_classes=self.auto_classes, fine_only_last=self.fine_only_last)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validations", "workers", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 or more")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed is {self.seed}: expected 0 to {(1 << 32) - 1}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss {self.loss!r}: expected {', '.join(LOSSES)}")
        if self.optimizer not in LEARNING_RATES:
            raise ValueError(f"optimizer {self.optimizer!r}: expected {' or '.join(LEARNING_RATES)}")
        if self.learning_rate is not None and not 0 < self.learning_rate < 10:
            raise ValueError(f"learning rate {self.learning_rate:g}: expected a number in (0, 10)")
        if self.crop is not None and min(self.crop) < 32:
            raise ValueError(f"crop {self.crop[0]}x{self.crop[1]}: expected both sides to be 32 pixels or more")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r}: expected {' or '.join(SCHEDULES)}")
        if not 0 < self.power <= 10:
            raise ValueError(f"power {self.power:g}: expected a number above 0, up to 10")
        if self.schedule != "poly" and self.power != POWER:
            raise ValueError(f"power {self.power:g} with schedule {self.schedule}: only poly has one")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema {self.ema:g}: expected a decay between 0 and 1, such as 0.999")
        if self.batch_size % (self.workers * self.accumulate):
            raise ValueError(
                f"a batch of {self.batch_size} does not split evenly over workers {self.workers} x accumulate"
                f" {self.accumulate}: give a batch size that {self.workers * self.accumulate} divides"
            )
        _ = self.mix  # refuses shares that mean nothing


class Request:
    """A job that can be done, and its data. Every process that trains gets it."""

    def __init__(self, job: TrainJob, manifest: Manifest | Path, on_label: OnLabel | None) -> None:
        self.job = job
        self.data, self.val = ManifestDataset(manifest), ManifestDataset(job.val)
        self.space = self.data.label_space
        if self.val.label_space != self.space:
            raise ValueError(f"{job.manifest} and {job.val} use different label spaces: train and validate in one")
        marks = fingerprints(self.data.samples)
        self.trained_on = fingerprint_tensor(marks)
        start = self._start()
        if start is not None:  # what it has seen, the result has seen
            self.trained_on = torch.unique(torch.cat([self.trained_on, start.trained_on]))
        self._require_spread()
        self._require_enough()
        shared = overlap(self.trained_on, fingerprints(self.val.samples))
        if shared:
            first = self.val.samples[shared[0]].sample_id
            raise ValueError(
                f"{len(shared)} validation images are also trained on (the first is {first!r}): the score would mean"
                " nothing; leave them out of one manifest"
            )
        self.asked = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(job).items() if k != "out"}
        # What was left to choose is recorded as chosen: another machine, or another default, is then another request.
        self.asked["crop"] = list(self._crop())
        self.asked["learning_rate"] = self.peak
        self.asked["images"] = len(marks)
        self.started_from = start and start.told
        self.asked["started_from"] = self.started_from
        self.asked["auto_classes"] = job.auto_classes and list(job.auto_classes)
        self.last = job.out / "last.pt"
        step = self.require_same({k: v for k, v in self.asked.items() if k != "precision"}, self.read_last())
        self.crops = self._crops(on_label) if step < job.steps else None  # a training that is over reads no label

    def read_last(self) -> Checkpoint | None:
        """Where to go on, if anything is there."""
        return read_checkpoint(self.last) if self.last.is_file() else None

    def require_same(self, asked: Mapping[str, Any], last: Checkpoint | None) -> int:
        """The steps that are done. Raises ValueError if the folder holds the training of another request."""
        state = (last and last.training) or {}
        about = self.job.out / "train.json"
        before = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else state.get("asked", {})
        usual = {f.name: f.default for f in fields(TrainJob)}  # of what an older version did not ask
        different = [
            f"{k} was {before.get(k, usual.get(k))!r}, now {v!r}"
            for k, v in asked.items()
            if before and k not in _HOW and before.get(k, usual.get(k)) != v
        ]
        if different:
            raise ValueError(f"{self.job.out} holds another training ({'; '.join(different)}): choose another --out")
        if last is not None and not torch.equal(last.trained_on, self.trained_on):
            raise ValueError(
                f"{self.last} was trained on other images than {self.job.manifest} lists: choose another --out"
            )
        return int(state.get("step", 0))

    def network(self, last: Checkpoint | None) -> SegmentationNet:
        """The network as the next step finds it, but for what `last.pt` keeps beside its own weights."""
        if last is not None:
            return load_network(self.last, last)
        start = self._start()
        network = build(self.job.arch, len(self.space), start.scales if start else 3)
        if start is not None:
            network.load_state_dict(network.state_dict() | start.state_dict)
        return network

    def _start(self) -> Start | None:
        return read_start(self.job.init, self.job.arch, self.space) if self.job.init else None

    def _require_spread(self) -> None:
        """Batch norm needs two values per channel, also at a thirty-second of the half-size image.

        Where the decoder pools the whole image into one value (ASPP), only a batch of two gives two.
        """
        height, width = self._crop()
        images = self.job.batch_size // self.job.accumulate
        if images < 2 and architecture(self.job.arch).decoder not in ("ocr", "plain"):
            raise ValueError(f"{self.job.arch} pools the whole image: train it with a batch of 2 or more at once")
        values = images * math.ceil((height // 2) / 32) * math.ceil((width // 2) / 32)
        if values < 2:
            raise ValueError(
                f"crop {height}x{width} with a batch of one leaves batch norm a single value: give a side above 64"
                " pixels, or a larger batch"
            )

    def _require_enough(self) -> None:
        """Shares hold for whole epochs: in one of two crops there is no fifth. Else a small epoch is just repeated."""
        size, epoch = self.job.batch_size, len(self.data)
        if self.job.auto_share is not None and epoch < size:
            raise ValueError(
                f"auto-share {self.job.auto_share:g}: an epoch of {epoch} crops is smaller than a batch of {size}; give"
                " more images, or a smaller batch"
            )
        if self.job.workers > epoch:
            raise ValueError(
                f"workers {self.job.workers}: {self.job.manifest} has {epoch} samples, give at most as many"
            )

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        usual = LEARNING_RATES[self.job.optimizer] / (FINE_TUNING if self.job.init else 1)
        return self.job.learning_rate or usual

    def _crop(self) -> tuple[int, int]:
        if self.job.crop is not None:
            return self.job.crop
        largest = max(s.height for s in self.data.samples), max(s.width for s in self.data.samples)
        return min(largest[0], _CROP_LIMIT[0]), min(largest[1], _CROP_LIMIT[1])

    def _crops(self, on_label: OnLabel | None) -> TrainingCrops:
        job = self.job
        total = job.steps * job.batch_size
        return TrainingCrops(self.data, Augmentation(self._crop()), job.seed, total, job.mix, on_label)

    def shown_at(self, step: int) -> str:
        """The images of a step's batch, in words."""
        assert self.crops is not None
        draws = range(step * self.job.batch_size, (step + 1) * self.job.batch_size)
        ids = list(dict.fromkeys(self.data.samples[self.crops.draws[n].sample].sample_id for n in draws))
        return ", ".join(ids[:_NAMED]) + (f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else "")
