"""Train a network on a manifest: a teacher on fine labels, a student on fused ones. Same code, same network.

The recipe is that of arXiv 2005.10821, section 4, made small: random scale, flip, crop and colour jitter; one of the
losses of `losses.py`; SGD or AdamW with a polynomial or cosine learning rate.

One process trains, or several that share each batch (`parallel.py`): same folder, same order of the data, same result
up to rounding and dropout, and one may go on where the other stopped.

A training can be killed at any time and started again with the same command. `last.pt` holds what the next step needs:
weights, optimizer, scale of float16 losses, averaged weights, the number of steps done, the recipe (with schedule and
seed), and the fingerprints of all images that were trained on. The place in the data and every random state follow
from seed and step (for dropout also from the process's rank), so they are not stored. The folder holds:

    train.json         the recipe; another recipe is refused, not mixed in
    last.pt            the place to go on from, written behind all others (`saving.py`); as a checkpoint it holds the
                       averaged weights, if there are any
    best.pt            the checkpoint for everybody else: the highest validation mIoU so far
    metrics.jsonl      loss, gradient norm, learning rate and speed by step; IoU of the validations
    scores.json        per-class IoU of best.pt
    last_scores.json   per-class IoU after the last step

A batch with a loss or gradient that is not finite is skipped: weights, optimizer, averages and running statistics stay.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from autolabel.manifests import storage
from autolabel.manifests.cluster import ray_session
from autolabel.manifests.samples import Manifest
from autolabel.manifests.wording import Progress, counted
from autolabel.student.batches import Batch
from autolabel.student.evaluate import Scores, score
from autolabel.student.job import TrainJob
from autolabel.student.loading import batches_of
from autolabel.student.losses import BatchCounts
from autolabel.student.optimizer import WeightUpdater, learning_rate_at
from autolabel.student.parallel import DrawSampler, Team
from autolabel.student.placement import described, loaders_here, told, training_precision
from autolabel.student.request import TrainRequest
from autolabel.student.saving import Saves, copied
from autolabel.student.steps import Skips, StepReport
from autolabel.student.trackers import Trackers
from autolabel.teacher.checkpoints import content_of
from autolabel.teacher.device import PRECISIONS, autocast, fast_kernels, pick_device
from autolabel.teacher.feed import Normaliser
from autolabel.teacher.networks.decoders import SegmentationNet
from autolabel.teacher.predict import Teacher

_MOST_SKIPPED = 5  # batches in a row whose loss or gradient is not finite: no accident any more


class TrainingStopped(RuntimeError):
    """The training cannot go on; the message says why and what to do."""


OnStep = Callable[[StepReport], None]


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
    told: list[StepReport] = []

    def tell(report: StepReport) -> None:
        held.require()
        told[:] = [report]
        on_step(report)

    if request.started_from and not storage.exists(request.last):
        on_note(f"starts with {request.started_from}")
    with storage.hold(job.out) as held:
        if not job.machine.uses_ray:
            device = torch.device(pick_device(job.device))
            gpus = torch.cuda.device_count() if device.type == "cuda" else 1
            training = Training(request, Team(device, loaders=loaders_here(device, gpus, loaders=job.machine.loaders)))
            if request.crops is not None:
                on_note(training.place)
            training.run(tell, on_note)
        elif request.crops is not None:
            from autolabel.student.distributed import run_workers

            workers = job.machine.workers
            with ray_session(job.machine.address, job.out, workers=workers, otherwise="--workers 1"):
                run_workers(
                    partial(_train_in, request), workers, device=job.device, loaders=job.machine.loaders,
                    address=job.machine.address, folder=job.out, on_step=tell, on_note=on_note,
                    final=(ValueError, OSError, TrainingStopped, torch.OutOfMemoryError),
                )  # fmt: skip
    if told and told[0].skipped:
        first = told[0].first_skipped
        on_note(
            f"{told[0].skipped} of {job.steps} batches were skipped, because their loss or gradient was not finite; the"
            f" first, at step {first}, showed {request.shown_at(first - 1)}"
        )
    return Scores.read(job.out / "scores.json")


def _train_in(request: TrainRequest, team: Team, on_step: Callable[[StepReport | str], None]) -> None:
    """Train in one of several processes; the first one tells the devices of all."""
    training = Training(request, team)
    if team.rank == 0:
        on_step(training.place)
    training.run(on_step, on_step)


class Training:
    """State of one training in one process: network, optimizer, position, metrics."""

    def __init__(self, request: TrainRequest, team: Team) -> None:
        self.request, self.job, self.team = request, request.job, team
        self.precision = training_precision(self.job.precision, str(team.device))
        self.recipe = request.recipe | {"precision": self.precision}
        places = team.gather(described(team.device, self.precision))
        self.place = told(places)
        if len({place.rpartition(" ")[2] for place in places}) > 1:
            raise ValueError(f"{self.place}: expected one precision, name it with --precision")
        last = request.read_last()
        self.step = request.require_same(self.recipe, last)
        if team.sum(torch.tensor(self.step)).item() != self.step * team.size:
            raise RuntimeError(f"the processes read different versions of {request.last}")
        self.best, self.skips = -1.0, Skips()
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
        self.transition = request.transition(team.device)
        self.normalise = Normaliser(team.device)  # once: its constants are copied to the device, and that waits
        self.compute = torch.compile(self.model) if self.job.machine.compile else self.model
        if team.rank == 0:
            storage.remove_leftovers(self.job.out)
            storage.write_json(self.job.out / "train.json", self.recipe)
            trackers = Trackers(self.job.log, self.job.out, recipe=self.recipe)
            self.saves = Saves(self.job.out, self.request.last, step=self.step, trackers=trackers)

    def _go_on(self, state: dict[str, Any]) -> None:
        self.updater.load_state_dict(state)
        if self.updater.average is not None:  # the checkpoint's own weights are the averaged ones
            self.updater.average.load_state_dict(self.network.state_dict())
            self.network.load_state_dict(state["network"])
        self.best, self.skips = state["best"], Skips(*state["skips"])

    def _batches(self) -> Iterable[Mapping[str, Any]]:
        """This process's share of every batch that is left."""
        if self.request.crops is None:
            return ()
        job, on_gpu = self.job, self.team.device.type == "cuda"
        draws = DrawSampler(
            self.team, first=self.step, steps=job.steps, batch=job.batch_size, accumulate=job.accumulate
        )
        size = job.batch_size // self.team.size
        return batches_of(self.request.crops, draws, size=size, loaders=self.team.loaders, pin=on_gpu)

    def run(self, on_step: OnStep, on_note: Callable[[str], None]) -> None:
        """Do the steps that are left. The first process of a team calls `on_step` after each, and writes the files."""
        if self.team.rank > 0:
            for _ in self._reports():
                pass
            return
        try:
            for report in self._reports():
                on_step(report)
                self.saves.trackers.tell(on_note)
                if self.step == self.job.steps or self.saves.due(validated=report.miou is not None):
                    self._save()
                else:
                    self.saves.write()
        except KeyboardInterrupt:
            if self.between_steps:  # inside a step the state belongs to no step, and the last save stands
                self._save()
            raise
        except TrainingStopped:
            self.saves.write(metrics=True)  # they tell how it came
            raise
        finally:
            self.saves.close(on_note)

    def _reports(self) -> Iterator[StepReport]:
        """Do the steps that are left, and report each."""
        job = self.job
        validate_at = {round(job.steps * (i + 1) / job.validations) for i in range(job.validations)}
        started, first = time.monotonic(), self.step
        fast_kernels(self.team.device)
        for batch in self._batches():
            self.between_steps = False
            loss, length, rate = self._train_step(batch)
            self.step += 1
            speed = (self.step - first) * job.batch_size / (time.monotonic() - started)
            scores = self._validate() if self.step in validate_at else None
            miou, iou = (scores.miou, scores.iou) if scores else (None, None)
            report = StepReport(self.step, loss, length, rate, speed, miou, iou, self.skips.number, self.skips.first)
            if self.team.rank == 0:
                self.saves.add(report)
            self.between_steps = True
            yield report

    def _train_step(self, batch: Mapping[str, Any]) -> tuple[float, float, float]:
        """Do one step; return the loss and the length of the gradient of the whole batch, and the learning rate."""
        job, team, updater = self.job, self.team, self.updater
        # The random numbers of a step (dropout) depend on its number alone, so that a resumed training repeats them.
        torch.manual_seed((job.seed << 32) + team.rank * job.steps + self.step)
        rate = learning_rate_at(
            self.step, job.steps, peak=job.peak, schedule=job.schedule, power=job.power, warm_up=job.warm_up
        )
        self.model.train()
        own = Batch.of(batch, team.device)
        whole = own.counts().summed(team.sum, images=job.batch_size)
        updater.begin()
        total = torch.zeros((), device=team.device)
        for number, part in enumerate(own.parts(job.accumulate), start=1):
            with self._gradient_sync(last=number == job.accumulate):
                loss = self._loss(part, whole)
                updater.backward(loss * team.size)
            total += loss.detach()
        length = updater.measure()
        # Summed over the processes, so that all of them take the same decision; read once, because the device waits.
        value, norm = team.sum(torch.stack([total, length / team.size])).tolist()
        if math.isfinite(value) and math.isfinite(norm):
            updater.update(rate, length)
            self.skips = self.skips.none()
        else:
            updater.skip()
            self._skipped(value)
        return value, norm, rate

    def _skipped(self, loss: float) -> None:
        """Note that the batch of this step was skipped. Raises TrainingStopped if that is no accident any more."""
        if math.isfinite(loss) and self.updater.scale_may_help:
            return
        self.skips = self.skips.one(self.step + 1)
        if self.skips.row < min(_MOST_SKIPPED, self.job.steps):
            return
        what = "the gradient became infinite or nan" if math.isfinite(loss) else f"the loss became {loss}"
        before = f", as in the {counted(self.skips.row - 1, 'step')} before" if self.skips.row > 1 else ""
        self._stop(what, self.step, before=before, together=True)

    def _loss(self, part: Batch, whole: BatchCounts) -> Tensor:
        """Return this part's share of the loss of the whole batch."""
        with autocast(self.team.device, self.precision):
            output = self.compute(self.normalise(part.image).contiguous(memory_format=torch.channels_last))
        weight = self.job.scale_weight
        return part.loss(self.job.loss, output, whole=whole, transition=self.transition, scale_weight=weight)

    def _gradient_sync(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Synchronise gradients across processes only on the last part of a batch; earlier parts add up locally."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _stop(self, what: str, step: int, *, before: str = "", together: bool) -> NoReturn:
        """Raise TrainingStopped for a step, counted from 0; nothing of it is kept. together: in all processes."""
        saved = self.saves.finish() if self.team.rank == 0 else 0
        saved = int(self.team.sum(torch.tensor(saved))) if together else saved
        kept = f"last.pt keeps the weights of step {saved}" if saved else "nothing was saved yet"
        other = " or --precision bfloat16" if self.precision == "float16" else ""
        raise TrainingStopped(
            f"{what} at step {step + 1}, on {self.request.shown_at(step)}{before}: {kept}; start again in another --out"
            f" with a smaller --learning-rate than {self.job.peak:g}{other}"
        )

    @property
    def _result(self) -> SegmentationNet:
        """The network that is scored and given to others: the averaged one, if there is one."""
        average = self.updater.average
        return self.network if average is None else cast(SegmentationNet, average)

    def _require_finite(self, *, together: bool) -> None:
        """Stop if a weight or running statistic is infinite or nan, even under a finite loss: it would not load."""
        for network in {self.network, self._result}:
            for name, tensor in network.state_dict().items():
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    self._stop(f"{name} became infinite or nan", self.step - 1, together=together)

    def _validate(self) -> Scores:
        self._require_finite(together=True)
        request = self.request
        teacher = Teacher(self._result, request.space, trained_on=request.trained_on, device=str(self.team.device))
        scores = score(teacher, request.val, team=self.team)
        fast_kernels(self.team.device)  # the teacher has chosen exact ones
        if math.isnan(scores.miou):
            raise ValueError(f"{self.job.val}: no pixel of its labels has a class, so there is nothing to score on")
        better = scores.miou > self.best
        self.best = max(self.best, scores.miou)
        if self.team.rank == 0:
            self.saves.keep(scores, self._content(scores.miou) if better else None, last=self.step == self.job.steps)
        return scores

    def _content(self, miou: float, training: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A copy of the checkpoint of this step."""
        return content_of(
            copied(self._result.state_dict()),
            arch=self.job.arch,
            space=self.request.space,
            trained_on=self.request.trained_on,
            metrics={"miou": miou, "step": float(self.step)},
            training=copied(training),
        )

    def _save(self) -> None:
        self._require_finite(together=False)
        training = self.updater.state_dict() | {
            "step": self.step,
            "best": self.best,
            "skips": list(self.skips),
            "recipe": self.recipe,
        }
        if self.updater.average is not None:
            training["network"] = self.network.state_dict()
        self.saves.save_last(self._content(self.best, training), step=self.step)
