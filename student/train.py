"""Train a network on a manifest: a teacher on fine labels, a student on fused ones. Same code, same network.

Recipe of arXiv 2005.10821, section 4, made small: random scale, flip, crop and colour jitter; one of the losses of
`losses.py`; SGD or AdamW with a polynomial or cosine learning rate.

One process, or several that share each batch (`parallel.py`): same folder, same order of the data, same result up to
rounding and dropout, and one may go on where the other stopped.

A training can be killed anywhere and started again with the same command. `last.pt` holds what the next step needs:
weights, optimizer, scale of float16 losses, averaged weights, the number of steps done, what was asked (with it the
schedule and the seed), and the fingerprints of all images that were trained on. The place in the data and every random
state follow from the seed and the step (dropout: and from the process's number among so many), so none is stored. What
is in the folder:

    train.json     what was asked; a different request is refused, not mixed in
    last.pt        where to go on; as a checkpoint it holds the averaged weights, if there are any
    best.pt        the checkpoint for everybody else: the highest validation mIoU so far
    curves.csv     loss, learning rate and speed by step; mIoU where it was measured
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

from autolabel.manifests.files import alone_in, remove_leftovers, write_bytes, write_json
from autolabel.manifests.samples import Manifest
from autolabel.student.evaluate import Scores, score
from autolabel.student.job import OnLabel, Request, TrainJob
from autolabel.student.losses import Counts, segmentation_loss
from autolabel.student.optimizer import Optimiser, learning_rate_at
from autolabel.student.parallel import Shares, Team
from autolabel.teacher.checkpoints import save_checkpoint
from autolabel.teacher.networks.decoders import SegmentationNet
from autolabel.teacher.predict import PRECISIONS, Teacher, normalise, pick_device, pick_precision

_SAVE_SECONDS = 60.0


class TrainingStopped(RuntimeError):
    """The training cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class StepReport:
    """What one step gave. `miou` is there where a validation followed the step."""

    step: int
    loss: float
    learning_rate: float
    images_per_s: float
    miou: float | None = None


OnStep = Callable[[StepReport], None]


def training_precision(name: str, device: str) -> str:
    """`auto` is bfloat16 where the device computes it fast: on such GPUs, and on CPUs with AMX. Else float32.

    Labelling is stricter: there `auto` is float32 on every CPU (see `pick_precision`).
    """
    if name == "auto" and device == "cpu" and torch.cpu.get_capabilities().get("amx_bf16"):
        return "bfloat16"
    return pick_precision(name, device)


def train(
    job: TrainJob,
    on_step: OnStep | None = None,
    manifest: Manifest | None = None,
    on_label: OnLabel | None = None,
    cluster: contextlib.AbstractContextManager[Any] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Scores:
    """Train, or go on with a training, and return the validation scores of `best.pt`.

    `manifest` stands in for the file `job.manifest` where a caller has already joined several. `on_label` hears of the
    labels that are read before the first step, to know where their classes are. `cluster` connects to Ray, and is
    entered only where there is something to train; with it, or with several workers, Ray Train runs the training.
    `on_note` hears what a person should know, such as what was taken from `job.init`. Raises ValueError for a request
    that cannot be met and where another process trains in `job.out`, TrainingStopped when the loss diverges,
    WorkersFailed when Ray's workers die too often.
    """
    request = Request(job, manifest or job.manifest, on_label)
    on_step, on_note = on_step or (lambda report: None), on_note or (lambda note: None)
    if request.started_from and not request.last.is_file():
        on_note(f"starts with {request.started_from}")
    with alone_in(job.out):
        if cluster is None and job.workers == 1:
            Training(request, Team(torch.device(pick_device(job.device)))).run(on_step)
        elif request.crops is not None:
            from autolabel.student.distributed import run_workers

            with cluster or contextlib.nullcontext():
                run_workers(
                    partial(_train_in, request), job.workers, job.device, job.out, on_step, on_note,
                    final=(ValueError, OSError, TrainingStopped, torch.OutOfMemoryError),
                )  # fmt: skip
    return Scores.read(job.out / "scores.json")


def _train_in(request: Request, team: Team, on_step: OnStep) -> None:
    """What each of several processes does."""
    Training(request, team).run(on_step)


class Training:
    """State of one training in one process: network, optimizer, position, curves."""

    def __init__(self, request: Request, team: Team) -> None:
        self.request, self.job, self.team = request, request.job, team
        self.dtype = PRECISIONS[training_precision(self.job.precision, team.device.type)]
        asked = request.asked | {"precision": str(self.dtype).removeprefix("torch.")}
        last = request.read_last()
        self.asked, self.step = asked, request.require_same(asked, last)
        if team.sum(torch.tensor(self.step)).item() != self.step * team.size:
            raise RuntimeError(f"the processes read different versions of {request.last}")
        self.best, self.curves, self.saved = -1.0, list[StepReport](), 0
        self.between_steps = True
        torch.manual_seed(self.job.seed)
        self.network = request.network(last)
        self.network.to(team.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimiser = Optimiser(self.network, self.job.optimizer, request.peak, self.job.ema, self.dtype)
        if last is not None and last.training is not None:
            self._go_on(last.training)
        self.model = team.join(self.network)
        self.compute = torch.compile(self.model) if self.job.compile else self.model
        if team.rank == 0:
            remove_leftovers(self.job.out)
            write_json(self.job.out / "train.json", asked)

    def _go_on(self, state: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(state)
        if self.optimiser.average is not None:  # what the checkpoint's own weights are
            self.optimiser.average.load_state_dict(self.network.state_dict())
            self.network.load_state_dict(state["network"])
        self.best, self.saved = state["best"], self.step
        self.curves = [StepReport(**row) for row in state["curves"]]

    def _batches(self) -> Iterable[Mapping[str, Any]]:
        """This process's part of every batch that is left."""
        if self.request.crops is None:
            return ()
        job, on_gpu = self.job, self.team.device.type == "cuda"
        return DataLoader(
            self.request.crops,
            batch_size=job.batch_size // self.team.size,
            sampler=Shares(self.team, self.step, job.steps, job.batch_size, job.accumulate),
            num_workers=8 if on_gpu else 0,  # on a CPU the network needs every core itself
            pin_memory=on_gpu,
        )

    def run(self, on_step: OnStep) -> None:
        """Do the steps that are left. In the first process of a team `on_step` hears of each, and files are written."""
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
                if self.team.rank > 0:
                    continue
                on_step(report)
                if miou is not None or time.monotonic() - saved > _SAVE_SECONDS:
                    self._save_last()
                    saved = time.monotonic()
        except KeyboardInterrupt:
            if self.between_steps:  # in the middle of one, the state is of no step: the last save stands
                self._save_last()
            raise

    def _train_step(self, batch: Mapping[str, Any]) -> tuple[float, float]:
        """Loss of the whole batch, and learning rate."""
        job, team, optimiser = self.job, self.team, self.optimiser
        # A step's randomness (dropout) depends on its number alone, so that a resumed training repeats it.
        torch.manual_seed((job.seed << 32) + team.rank * job.steps + self.step)
        rate = learning_rate_at(self.step, job.steps, self.request.peak, job.schedule, job.power)
        self.model.train()
        images, labels = (batch[name].to(team.device, non_blocking=True) for name in ("image", "label"))
        whole = Counts(team.sum(Counts.of(labels).pixels), job.batch_size)
        optimiser.clear()
        total = torch.zeros((), device=team.device)
        parts = list(zip(images.chunk(job.accumulate), labels.chunk(job.accumulate), strict=True))
        for number, (image, label) in enumerate(parts, start=1):
            with self._gradients_are_added(at_once=number == len(parts)):
                loss = self._loss(image, label.long(), whole)
                optimiser.backward(loss * team.size)
            total += loss.detach()
        value = team.sum(total).item()
        if not math.isfinite(value):
            self._stop(f"the loss became {value}", self.step)
        if not optimiser.update(rate) and optimiser.hopeless:
            self._stop("the gradient became infinite or nan", self.step)
        return value, rate

    def _loss(self, images: Tensor, label: Tensor, whole: Counts) -> Tensor:
        """This part's share of the loss of the whole batch."""
        with torch.autocast(self.team.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            output = self.compute(normalise(images).contiguous(memory_format=torch.channels_last))
        return segmentation_loss(self.job.loss, output, label, whole)

    def _gradients_are_added(self, at_once: bool) -> contextlib.AbstractContextManager[Any]:
        """Those of all processes, with the last part of a batch; before it each keeps its own."""
        if at_once or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _stop(self, what: str, step: int) -> NoReturn:
        """Raise TrainingStopped for a step, counted from 0, of which nothing is kept."""
        kept = f"last.pt keeps the weights of step {self.saved}" if self.saved else "nothing was saved yet"
        other = " or --precision bfloat16" if self.dtype == torch.float16 else ""
        raise TrainingStopped(
            f"{what} at step {step + 1}, on {self.request.shown_at(step)}: {kept}; start again in another --out with a"
            f" smaller --learning-rate than {self.request.peak:g}{other}"
        )

    @property
    def _result(self) -> SegmentationNet:
        """What is scored and given to others: the averaged network where there is one."""
        average = self.optimiser.average
        return self.network if average is None else cast(SegmentationNet, average)

    def _require_finite(self) -> None:
        """A finite loss may leave running statistics that are not: what is saved can always be loaded again."""
        for network in {self.network, self._result}:
            for name, tensor in network.state_dict().items():
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    self._stop(f"{name} became infinite or nan", self.step - 1)

    def _validate(self) -> float:
        self._require_finite()
        request = self.request
        teacher = Teacher(self._result, request.space, request.trained_on, str(self.team.device))
        scores = score(teacher, request.val, team=self.team)
        if math.isnan(scores.miou):
            raise ValueError(f"{self.job.val}: no pixel of its labels has a class, so there is nothing to score on")
        if scores.miou > self.best:
            self.best = scores.miou
            if self.team.rank == 0:
                metrics = {"miou": scores.miou, "step": float(self.step)}
                best = self.job.out / "best.pt"
                save_checkpoint(best, self.job.arch, request.space, self._result, request.trained_on, metrics)
                scores.write(self.job.out / "scores.json")
        return scores.miou

    def _save_last(self) -> None:
        self._require_finite()
        training = self.optimiser.state_dict() | {
            "step": self.step,
            "best": self.best,
            "curves": [asdict(row) for row in self.curves],
            "asked": self.asked,
        }
        if self.optimiser.average is not None:
            training["network"] = self.network.state_dict()
        metrics = {"miou": self.best, "step": float(self.step)}
        request = self.request
        save_checkpoint(request.last, self.job.arch, request.space, self._result, request.trained_on, metrics, training)
        self.saved = self.step
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
