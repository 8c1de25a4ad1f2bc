"""Train a network on a manifest: a teacher on fine labels, a student on fused ones. Same code, same network.

Recipe of arXiv 2005.10821, section 4, made small: random scale, flip, crop and colour jitter; one of the losses of
`losses.py`; SGD or AdamW with a polynomial learning rate.

A training can be killed anywhere and started again with the same command: `last.pt` holds everything that the next
step depends on, and a step depends on the seed and its number alone. What is in the folder:

    train.json     what was asked; a different request is refused, not mixed in
    last.pt        where to go on
    best.pt        the checkpoint for everybody else: the highest validation mIoU so far
    curves.csv     loss, learning rate and speed by step; mIoU where it was measured
    scores.json    per-class IoU of best.pt
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from autolabel.manifests.files import remove_leftovers, write_bytes, write_json
from autolabel.manifests.tables import Manifest, fingerprints
from autolabel.student.data import Augmentation, ManifestDataset, TrainingCrops
from autolabel.student.evaluate import Scores, score
from autolabel.student.losses import LOSSES, segmentation_loss
from autolabel.student.sampling import Mix
from autolabel.teacher.build import architecture, build
from autolabel.teacher.checkpoints import (
    Start,
    fingerprint_tensor,
    load_network,
    overlap,
    read_checkpoint,
    read_start,
    save_checkpoint,
)
from autolabel.teacher.networks import SegmentationNet
from autolabel.teacher.predict import PRECISIONS, Teacher, normalise, pick_device, pick_precision

LEARNING_RATES = {"sgd": 0.01, "adamw": 0.003}  # peaks
FINE_TUNING = 3  # so many times lower where a checkpoint is the start
_SAVE_SECONDS = 60.0
_CROP_LIMIT = (512, 1024)


class TrainingStopped(RuntimeError):
    """The training cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class TrainJob:
    """Everything that decides what a training gives. None means: chosen from the data or the optimizer, see `train`."""

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

    @property
    def mix(self) -> Mix:
        """How often samples and classes come."""
        return Mix(auto_share=self.auto_share, auto_classes=self.auto_classes, fine_only_last=self.fine_only_last)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validations"):
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
        _ = self.mix  # refuses shares that mean nothing


@dataclass(frozen=True)
class StepReport:
    """What one step gave. `miou` is there where a validation followed the step."""

    step: int
    loss: float
    learning_rate: float
    images_per_s: float
    miou: float | None = None


OnStep = Callable[[StepReport], None]
OnLabel = Callable[[int, int], None]  # done, all
OnStart = Callable[[str], None]  # what was taken from `init`, and what starts fresh


def training_precision(name: str, device: str) -> str:
    """`auto` is bfloat16 where the device computes it fast: on such GPUs, and on CPUs with AMX. Else float32.

    Labelling is stricter: there `auto` is float32 on every CPU (see `pick_precision`).
    """
    if name == "auto" and device == "cpu" and torch.cpu.get_capabilities().get("amx_bf16"):
        return "bfloat16"
    return pick_precision(name, device)


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 % of the steps, then polynomial decay with power 0.9. Step counts from 0."""
    warm = max(1, steps // 20)
    return peak * min(1.0, (step + 1) / warm) * float((1 - step / steps) ** 0.9)


def train(
    job: TrainJob,
    on_step: OnStep | None = None,
    manifest: Manifest | None = None,
    on_label: OnLabel | None = None,
    on_start: OnStart | None = None,
) -> Scores:
    """Train, or go on with a training, and return the validation scores of `best.pt`.

    `manifest` stands in for the file `job.manifest` where a caller has already joined several. `on_label` hears of the
    labels that are read before the first step, to know where their classes are; `on_start` of what was taken from
    `job.init`, unless the training goes on from its own last step. Raises ValueError for a request that cannot be met,
    TrainingStopped when the loss diverges.
    """
    training = _Training(job, ManifestDataset(manifest or job.manifest), on_label, on_start)
    return training.run(on_step or (lambda report: None))


class _Training:
    """State of one training: network, optimizer, position, curves."""

    def __init__(
        self, job: TrainJob, data: ManifestDataset, on_label: OnLabel | None, on_start: OnStart | None
    ) -> None:
        self.job, self.on_label, self.on_start = job, on_label, on_start
        self.data, self.val = data, ManifestDataset(job.val)
        self.space = self.data.label_space
        if self.val.label_space != self.space:
            raise ValueError(f"{job.manifest} and {job.val} use different label spaces: train and validate in one")
        marks = fingerprints(self.data.samples)
        self.trained_on = fingerprint_tensor(marks)
        self.start: Start | None = read_start(job.init, job.arch, self.space) if job.init else None
        if self.start is not None:  # what it has seen, the result has seen
            self.trained_on = torch.unique(torch.cat([self.trained_on, self.start.trained_on]))
        self._require_spread()
        self._require_whole_batches()
        shared = overlap(self.trained_on, fingerprints(self.val.samples))
        if shared:
            first = self.val.samples[shared[0]].sample_id
            raise ValueError(
                f"{len(shared)} validation images are also trained on (the first is {first!r}): the score would mean"
                " nothing; leave them out of one manifest"
            )
        self.device = torch.device(pick_device(job.device))
        self.dtype = PRECISIONS[training_precision(job.precision, self.device.type)]
        self.step, self.best, self.curves = 0, -1.0, list[StepReport]()
        self.between_steps = True
        self._resume_or_start(marks)

    def _resume_or_start(self, marks: list[str]) -> None:
        job = self.job
        asked = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(job).items() if k != "out"}
        # What was left to choose is recorded as chosen: another machine, or another default, is then another request.
        asked["crop"] = list(self._crop())
        asked["learning_rate"] = self._peak()
        asked["precision"] = str(self.dtype).removeprefix("torch.")
        asked["images"] = len(marks)
        asked["started_from"] = self.start and self.start.told
        asked["auto_classes"] = job.auto_classes and list(job.auto_classes)
        about = job.out / "train.json"
        if about.is_file():
            before = json.loads(about.read_text(encoding="utf-8"))
            different = [f"{k} was {before.get(k)!r}, now {v!r}" for k, v in asked.items() if before.get(k) != v]
            if different:
                raise ValueError(f"{job.out} holds another training ({'; '.join(different)}): choose another --out")
        torch.manual_seed(job.seed)
        remove_leftovers(job.out)
        last = job.out / "last.pt"
        checkpoint = read_checkpoint(last) if last.is_file() else None
        self.network: SegmentationNet
        if checkpoint is not None:
            self.network = load_network(last, checkpoint)
        else:
            self.network = build(job.arch, len(self.space), self.start.scales if self.start else 3)
            if self.start is not None:
                self.network.load_state_dict(self.network.state_dict() | self.start.state_dict)
                if self.on_start:
                    self.on_start(self.start.told)
        self.network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = self._optimizer()
        if checkpoint is not None and checkpoint.training is not None:
            state = checkpoint.training
            if not torch.equal(checkpoint.trained_on, self.trained_on):
                raise ValueError(f"{last} was trained on other images than {job.manifest} lists: choose another --out")
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.best = state["step"], state["best"]
            self.curves = [StepReport(**row) for row in state["curves"]]
        self.crops = self._crops() if self.step < job.steps else None  # a training that is over reads no label
        write_json(about, asked)

    def _require_spread(self) -> None:
        """Batch norm needs two values per channel, also at a thirty-second of the half-size image.

        Where the decoder pools the whole image into one value (ASPP), only a batch of two gives two.
        """
        height, width = self._crop()
        if self.job.batch_size < 2 and architecture(self.job.arch).decoder not in ("ocr", "plain"):
            raise ValueError(f"{self.job.arch} pools the whole image: train it with a batch of 2 or more")
        values = self.job.batch_size * math.ceil((height // 2) / 32) * math.ceil((width // 2) / 32)
        if values < 2:
            raise ValueError(
                f"crop {height}x{width} with a batch of one leaves batch norm a single value: give a side above 64"
                " pixels, or a larger batch"
            )

    def _require_whole_batches(self) -> None:
        """Shares hold for whole epochs: in one of two crops there is no fifth."""
        size, epoch = self.job.batch_size, len(self.data)
        if self.job.auto_share is not None and epoch < size:
            raise ValueError(
                f"auto-share {self.job.auto_share:g}: an epoch of {epoch} crops is smaller than a batch of {size}; give"
                " more images, or a smaller batch"
            )

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters = self.network.parameters()
        if self.job.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self._peak(), momentum=0.9, weight_decay=5e-4)
        return torch.optim.AdamW(parameters, lr=self._peak(), weight_decay=0.01)

    def _peak(self) -> float:
        usual = LEARNING_RATES[self.job.optimizer] / (FINE_TUNING if self.job.init else 1)
        return self.job.learning_rate or usual

    def _crop(self) -> tuple[int, int]:
        if self.job.crop is not None:
            return self.job.crop
        largest = max(s.height for s in self.data.samples), max(s.width for s in self.data.samples)
        return min(largest[0], _CROP_LIMIT[0]), min(largest[1], _CROP_LIMIT[1])

    def _crops(self) -> TrainingCrops:
        job = self.job
        total = job.steps * job.batch_size
        return TrainingCrops(self.data, Augmentation(self._crop()), job.seed, total, job.mix, self.on_label)

    def _batches(self) -> Iterator[Mapping[str, Any]]:
        if self.crops is None:
            return iter(())
        on_gpu = self.device.type == "cuda"
        return iter(
            DataLoader(
                self.crops,
                batch_size=self.job.batch_size,
                sampler=range(self.step * self.job.batch_size, len(self.crops)),  # goes on where the last run stopped
                num_workers=8 if on_gpu else 0,  # on a CPU the network needs every core itself
                pin_memory=on_gpu,
            )
        )

    def run(self, on_step: OnStep) -> Scores:
        job = self.job
        validate_at = {round(job.steps * (i + 1) / job.validations) for i in range(job.validations)}
        saved = started = time.monotonic()
        first = self.step
        try:
            for batch in self._batches():
                self.between_steps = False
                loss, rate = self._train_step(batch)
                self.step += 1
                speed = (self.step - first) * job.batch_size / (time.monotonic() - started)
                miou = self._validate() if self.step in validate_at else None
                report = StepReport(self.step, loss, rate, speed, miou)
                self.curves.append(report)
                self.between_steps = True
                on_step(report)
                if miou is not None or time.monotonic() - saved > _SAVE_SECONDS:
                    self._save_last()
                    saved = time.monotonic()
        except KeyboardInterrupt:
            if self.between_steps:  # in the middle of one, the state is of no step: the last save stands
                self._save_last()
            raise
        return Scores.read(job.out / "scores.json")

    def _train_step(self, batch: Mapping[str, Any]) -> tuple[float, float]:
        # A step's randomness (dropout) depends on its number alone, so that a resumed training repeats it.
        torch.manual_seed((self.job.seed << 32) + self.step)
        rate = learning_rate_at(self.step, self.job.steps, self._peak())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.network.train()
        images = batch["image"].to(self.device, non_blocking=True)
        label = batch["label"].to(self.device, non_blocking=True).long()
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            output = self.network(normalise(images).contiguous(memory_format=torch.channels_last))
        loss = segmentation_loss(self.job.loss, output, label)
        value = loss.item()
        if not torch.isfinite(loss):
            raise TrainingStopped(
                f"the loss became {value} at step {self.step + 1}: start again in another --out with a smaller"
                f" --learning-rate than {self._peak():g}"
            )
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), max_norm=10.0)
        self.optimizer.step()
        return value, rate

    def _validate(self) -> float:
        teacher = Teacher(self.network, self.space, self.trained_on, self.device.type)
        scores = score(teacher, self.val)
        if math.isnan(scores.miou):
            raise ValueError(f"{self.job.val}: no pixel of its labels has a class, so there is nothing to score on")
        if scores.miou > self.best:
            metrics = {"miou": scores.miou, "step": float(self.step)}
            best = self.job.out / "best.pt"
            save_checkpoint(best, self.job.arch, self.space, self.network, self.trained_on, metrics)
            scores.write(self.job.out / "scores.json")
            self.best = scores.miou
        return scores.miou

    def _save_last(self) -> None:
        training = {
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best": self.best,
            "curves": [asdict(row) for row in self.curves],
        }
        metrics = {"miou": self.best, "step": float(self.step)}
        last = self.job.out / "last.pt"
        save_checkpoint(last, self.job.arch, self.space, self.network, self.trained_on, metrics, training)
        write_curves(self.job.out / "curves.csv", self.curves)


def write_curves(path: Path, curves: list[StepReport]) -> None:
    """Write the curves as CSV, whole or not at all."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["step", "loss", "learning_rate", "images_per_s", "miou"])
    for row in curves:
        miou = "" if row.miou is None else f"{row.miou:.6f}"
        writer.writerow([row.step, f"{row.loss:.6f}", f"{row.learning_rate:.8f}", f"{row.images_per_s:.3f}", miou])
    write_bytes(path, buffer.getvalue().encode())
