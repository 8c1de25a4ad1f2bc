"""Train a network on a manifest: a teacher on fine labels, a student on fused ones. Same code, same network.

The recipe is that of arXiv 2005.10821, section 4, made small: random scale, flip, crop and colour jitter; one of the
losses of `losses.py`; SGD or AdamW with a polynomial or cosine learning rate.

One process trains, or several that share each batch (`parallel.py`): same folder, same order of the data, same result
up to rounding and dropout, and one may go on where the other stopped.

A training can be killed at any time and started again with the same command. `last.pt` holds what the next step needs:
weights, optimizer, scale of float16 losses, averaged weights, the number of steps done, the recipe (with schedule and
seed), and the fingerprints of all images that were trained on. The place in the data and every random state follow
from seed and step (for dropout also from the process's rank), so they are not stored. The folder holds:

    train.json     the recipe; another recipe is refused, not mixed in
    last.pt        the place to go on from, written behind all others: what a killed training lacks, the next one does
                   again; as a checkpoint it holds the averaged weights, if there are any
    best.pt        the checkpoint for everybody else: the highest validation mIoU so far
    curves.csv     loss, gradient norm, learning rate and speed by step; mIoU of the validations
    scores.json    per-class IoU of best.pt
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from autolabel.manifests import storage
from autolabel.manifests.cluster import ray_session
from autolabel.manifests.samples import Manifest
from autolabel.manifests.wording import Progress, percent
from autolabel.student.evaluate import Scores, score
from autolabel.student.job import TrainJob
from autolabel.student.losses import BatchCounts, segmentation_loss
from autolabel.student.optimizer import WeightUpdater, learning_rate_at
from autolabel.student.parallel import DrawSampler, Team
from autolabel.student.request import TrainRequest
from autolabel.teacher.checkpoints import save_checkpoint
from autolabel.teacher.device import PRECISIONS, autocast, pick_device, pick_precision
from autolabel.teacher.feed import normalise
from autolabel.teacher.networks.decoders import SegmentationNet
from autolabel.teacher.predict import Teacher

_SAVE_SECONDS = 60.0  # between saves without a validation
CURVES = ("step", "loss", "gradient_norm", "learning_rate", "images_per_s", "miou")


class TrainingStopped(RuntimeError):
    """The training cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class StepReport:
    """The result of one step: its number from 1, loss, learning rate and speed; `miou` if a validation followed.

    gradient_norm: length (L2) of the gradient before it is clipped.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    images_per_s: float
    miou: float | None = None

    def note(self) -> str:
        """Loss, speed and score in a few words, for the line below a bar."""
        miou = f"  mIoU {percent(self.miou)}" if self.miou is not None else ""
        return f"loss {self.loss:.3f}  {self.images_per_s:.1f} images/s{miou}"


OnStep = Callable[[StepReport], None]


def training_precision(name: str, device: str) -> str:
    """Resolve `auto`: bfloat16 on devices that compute it fast (such GPUs, and CPUs with AMX), else float32.

    Labelling is stricter: there `auto` is float32 on every CPU (see `pick_precision`).
    """
    if name == "auto" and device == "cpu" and torch.cpu.get_capabilities().get("amx_bf16"):
        return "bfloat16"
    return pick_precision(name, device)


def train(
    job: TrainJob,
    on_step: OnStep | None = None,
    *,
    manifest: Manifest | None = None,
    progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Scores:
    """Train, or go on with a training, and return the validation scores of `best.pt`.

    `manifest` replaces the file `job.manifest`, for callers that have joined several. `progress` is called while
    labels are read, before the first step, to find their classes. `on_note` gets lines for a person to read, such as
    the weights taken from `job.init`. With several workers, or an address, Ray Train runs the training; Ray is
    started or connected only if steps are left. Raises ValueError for a request that cannot be met and if another
    process trains in `job.out`, TrainingStopped if the loss diverges, ClusterFailed if Ray cannot be reached,
    WorkersFailed if its workers die too often.
    """
    request = TrainRequest(job, manifest, progress=progress)
    on_step, on_note = on_step or (lambda report: None), on_note or (lambda note: None)
    if request.started_from and not storage.exists(request.last):
        on_note(f"starts with {request.started_from}")
    with storage.hold(job.out):
        if not job.machine.uses_ray:
            Training(request, Team(torch.device(pick_device(job.device)))).run(on_step)
        elif request.crops is not None:
            from autolabel.student.distributed import run_workers

            workers = job.machine.workers
            with ray_session(job.machine.address, job.out, workers=workers, otherwise="--workers 1"):
                run_workers(
                    partial(_train_in, request), workers, device=job.device, folder=job.out, on_step=on_step,
                    on_note=on_note, final=(ValueError, OSError, TrainingStopped, torch.OutOfMemoryError),
                )  # fmt: skip
    return Scores.read(job.out / "scores.json")


def _train_in(request: TrainRequest, team: Team, on_step: OnStep) -> None:
    """Train in one of several processes."""
    Training(request, team).run(on_step)


class Training:
    """State of one training in one process: network, optimizer, position, curves."""

    def __init__(self, request: TrainRequest, team: Team) -> None:
        self.request, self.job, self.team = request, request.job, team
        self.precision = training_precision(self.job.precision, team.device.type)
        self.recipe = request.recipe | {"precision": self.precision}
        last = request.read_last()
        self.step = request.require_same(self.recipe, last)
        if team.sum(torch.tensor(self.step)).item() != self.step * team.size:
            raise RuntimeError(f"the processes read different versions of {request.last}")
        self.best, self.curves, self.saved = -1.0, list[StepReport](), 0
        self.between_steps = True
        torch.manual_seed(self.job.seed)
        self.network = request.network(last)
        self.network.to(team.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.updater = WeightUpdater(
            self.network,
            self.job.optimizer,
            peak=self.job.peak,
            average_decay=self.job.ema,
            precision=PRECISIONS[self.precision],
            clip=self.job.clip,
            weight_decay=self.job.decay,
        )
        if last is not None and last.training is not None:
            self._go_on(last.training)
        self.model = team.join(self.network)
        self.compute = torch.compile(self.model) if self.job.machine.compile else self.model
        if team.rank == 0:
            storage.remove_leftovers(self.job.out)
            storage.write_json(self.job.out / "train.json", self.recipe)

    def _go_on(self, state: dict[str, Any]) -> None:
        self.updater.load_state_dict(state)
        if self.updater.average is not None:  # the checkpoint's own weights are the averaged ones
            self.updater.average.load_state_dict(self.network.state_dict())
            self.network.load_state_dict(state["network"])
        self.best, self.saved = state["best"], self.step
        self.curves = [StepReport(**row) for row in state["curves"]]

    def _batches(self) -> Iterable[Mapping[str, Any]]:
        """This process's share of every batch that is left."""
        if self.request.crops is None:
            return ()
        job, on_gpu = self.job, self.team.device.type == "cuda"
        return DataLoader(
            self.request.crops,
            batch_size=job.batch_size // self.team.size,
            sampler=DrawSampler(
                self.team, first=self.step, steps=job.steps, batch=job.batch_size, accumulate=job.accumulate
            ),
            num_workers=8 if on_gpu else 0,  # on a CPU the network needs every core itself
            pin_memory=on_gpu,
        )

    def run(self, on_step: OnStep) -> None:
        """Do the steps that are left. The first process of a team calls `on_step` after each, and writes the files."""
        job = self.job
        validate_at = {round(job.steps * (i + 1) / job.validations) for i in range(job.validations)}
        saved = started = time.monotonic()
        first = self.step
        try:
            for batch in self._batches():
                self.between_steps = False
                loss, length, rate = self._train_step(batch)
                self.step += 1
                speed = (self.step - first) * job.batch_size / (time.monotonic() - started)
                miou = self._validate() if self.step in validate_at else None
                report = StepReport(self.step, loss, length, rate, speed, miou)
                self.curves.append(report)
                self.between_steps = True
                if self.team.rank > 0:
                    continue
                on_step(report)
                if miou is not None or time.monotonic() - saved > _SAVE_SECONDS:
                    self._save_last()
                    saved = time.monotonic()
        except KeyboardInterrupt:
            if self.between_steps:  # inside a step the state belongs to no step, and the last save stands
                self._save_last()
            raise

    def _train_step(self, batch: Mapping[str, Any]) -> tuple[float, float, float]:
        """Do one step; return the loss and the length of the gradient of the whole batch, and the learning rate."""
        job, team, updater = self.job, self.team, self.updater
        # The random numbers of a step (dropout) depend on its number alone, so that a resumed training repeats them.
        torch.manual_seed((job.seed << 32) + team.rank * job.steps + self.step)
        rate = learning_rate_at(
            self.step, job.steps, peak=job.peak, schedule=job.schedule, power=job.power, warm_up=job.warm_up
        )
        self.model.train()
        images, labels = (batch[name].to(team.device, non_blocking=True) for name in ("image", "label"))
        whole = BatchCounts(team.sum(BatchCounts.of(labels).pixels), job.batch_size)
        updater.clear()
        total = torch.zeros((), device=team.device)
        parts = list(zip(images.chunk(job.accumulate), labels.chunk(job.accumulate), strict=True))
        for number, (image, label) in enumerate(parts, start=1):
            with self._gradient_sync(last=number == len(parts)):
                loss = self._loss(image, label.long(), whole)
                updater.backward(loss * team.size)
            total += loss.detach()
        value = team.sum(total).item()
        if not math.isfinite(value):
            self._stop(f"the loss became {value}", self.step)
        length = updater.update(rate)
        if not math.isfinite(length) and updater.hopeless:
            self._stop("the gradient became infinite or nan", self.step)
        return value, length, rate

    def _loss(self, images: Tensor, label: Tensor, whole: BatchCounts) -> Tensor:
        """Return this part's share of the loss of the whole batch."""
        with autocast(self.team.device, self.precision):
            output = self.compute(normalise(images).contiguous(memory_format=torch.channels_last))
        return segmentation_loss(self.job.loss, output, label=label, whole=whole, scale_weight=self.job.scale_weight)

    def _gradient_sync(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Synchronise gradients across processes only on the last part of a batch; earlier parts add up locally."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _stop(self, what: str, step: int) -> NoReturn:
        """Raise TrainingStopped for a step, counted from 0; nothing of this step is kept."""
        kept = f"last.pt keeps the weights of step {self.saved}" if self.saved else "nothing was saved yet"
        other = " or --precision bfloat16" if self.precision == "float16" else ""
        raise TrainingStopped(
            f"{what} at step {step + 1}, on {self.request.shown_at(step)}: {kept}; start again in another --out with a"
            f" smaller --learning-rate than {self.job.peak:g}{other}"
        )

    @property
    def _result(self) -> SegmentationNet:
        """The network that is scored and given to others: the averaged one, if there is one."""
        average = self.updater.average
        return self.network if average is None else cast(SegmentationNet, average)

    def _require_finite(self) -> None:
        """Stop if a weight or running statistic is infinite or nan, even under a finite loss: it would not load."""
        for network in {self.network, self._result}:
            for name, tensor in network.state_dict().items():
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    self._stop(f"{name} became infinite or nan", self.step - 1)

    def _validate(self) -> float:
        self._require_finite()
        request = self.request
        teacher = Teacher(self._result, request.space, trained_on=request.trained_on, device=str(self.team.device))
        scores = score(teacher, request.val, team=self.team)
        if math.isnan(scores.miou):
            raise ValueError(f"{self.job.val}: no pixel of its labels has a class, so there is nothing to score on")
        if scores.miou > self.best:
            self.best = scores.miou
            if self.team.rank == 0:
                metrics = {"miou": scores.miou, "step": float(self.step)}
                best = self.job.out / "best.pt"
                save_checkpoint(
                    best,
                    self._result,
                    arch=self.job.arch,
                    space=request.space,
                    trained_on=request.trained_on,
                    metrics=metrics,
                )
                scores.write(self.job.out / "scores.json")
        return scores.miou

    def _save_last(self) -> None:
        self._require_finite()
        training = self.updater.state_dict() | {
            "step": self.step,
            "best": self.best,
            "curves": [asdict(row) for row in self.curves],
            "recipe": self.recipe,
        }
        if self.updater.average is not None:
            training["network"] = self.network.state_dict()
        metrics = {"miou": self.best, "step": float(self.step)}
        request = self.request
        write_curves(self.job.out / "curves.csv", self.curves)
        save_checkpoint(  # last, because no step before it is done again
            request.last, self._result, arch=self.job.arch, space=request.space, trained_on=request.trained_on,
            metrics=metrics, training=training,
        )  # fmt: skip
        self.saved = self.step


def write_curves(path: Path, curves: list[StepReport]) -> None:
    """Write the curves as CSV, whole or not at all."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CURVES)
    for row in curves:
        miou = "" if row.miou is None else f"{row.miou:.6f}"
        numbers = f"{row.loss:.6f}", f"{row.gradient_norm:.6g}", f"{row.learning_rate:.8f}", f"{row.images_per_s:.3f}"
        writer.writerow([row.step, *numbers, miou])
    storage.write(path, buffer.getvalue().encode())
