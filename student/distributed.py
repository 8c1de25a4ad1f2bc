"""Several processes train as one: Ray Train starts them, on one machine or many, and again when one of them dies.

Ray is not told where to go on: every process that starts reads `last.pt`, and the first worker writes it, as a single
process does. The workers' reports reach the driver through a small actor, because Ray Train itself passes on nothing
before the end.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from autolabel.manifests import machine, storage
from autolabel.manifests.cluster import cluster_address
from autolabel.manifests.wording import kind_and_reason
from autolabel.student.parallel import Team
from autolabel.student.placement import Placement, loaders_here, place
from autolabel.teacher.device import pick_device

FAILURES = 3  # deaths of workers that a call survives; preempted machines do not count
START_S = 900.0  # seconds to wait for workers: an autoscaler may need this long to bring machines
QUIET_S = 60.0  # seconds of waiting before a note says so
_SCRATCH = ".ray-train"  # folder inside the training's own that Ray Train insists on

OnStep = Callable[[Any], None]
Body = Callable[[Team, OnStep], None]

_DIED = "its process died"
_STOPPING = "stopping after the step under way, which is kept; press Ctrl-C again to stop at once"


class WorkersFailed(RuntimeError):
    """The workers died too often, or none started; the message says why. The last save is kept."""


class _News(NamedTuple):
    """Messages of the workers.

    starts: how often the workers have begun. trouble: the error of the last worker that failed, or "". outcome: the
    error that ends the training, if there is one.
    """

    starts: int
    trouble: str
    reports: list[Any]
    outcome: BaseException | None


class _Mailbox:
    """An actor that keeps the workers' messages until the driver fetches them, and the driver's wish to stop."""

    def __init__(self) -> None:
        self.news, self.stopping = _News(0, "", [], None), False

    def begin(self, rank: int) -> bool:
        """Note that a worker has begun; return False if the training has already ended."""
        self.news = self.news._replace(starts=self.news.starts + (rank == 0))
        return self.news.outcome is None

    def report(self, report: Any) -> bool:
        """Note a step; return True if it is to be the last."""
        self.news.reports.append(report)
        self.news = self.news._replace(trouble="")
        return self.stopping

    def fail(self, why: str) -> None:
        """Note that a worker has failed; it may be started again."""
        self.news = self.news._replace(trouble=why)

    def end(self, outcome: BaseException) -> None:
        """Note an error that ends the training. Only the first counts: the others follow from it."""
        self.news = self.news._replace(outcome=self.news.outcome or outcome)

    def stop(self) -> None:
        """Ask the workers to stop after the present step."""
        self.stopping = True

    def fetch(self) -> _News:
        """Return the messages, with the steps since the last call."""
        news, self.news = self.news, self.news._replace(reports=[])
        return news


def run_workers(
    body: Body,
    workers: int,
    *,
    device: str,
    folder: Path,
    on_step: OnStep,
    on_note: Callable[[str], None],
    final: tuple[type[Exception], ...],
    loaders: int | None = None,
    address: str | None = None,
) -> None:
    """Run `body` in `workers` processes of the connected Ray, until it has ended in all of them.

    Every report that body's first process passes to its `on_step` reaches this `on_step`, or `on_note` if it is a text;
    after a failure a step may come again. `address` names a cluster, whose GPUs are waited for; without one, nobody can
    bring more than this machine has. Errors of `final` types are raised here at once. Any other error counts as a
    failed worker, and all workers start again. Ctrl-C raises KeyboardInterrupt in the first process's `on_step`, then
    here. Raises WorkersFailed, ValueError.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not ray.is_initialized():
        raise ValueError(f"workers {workers}: expected a connection to Ray (`ray_session`)")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    cluster = cluster_address(address) is not None or len(nodes) > 1
    placement = place(workers, device, loaders=loaders, nodes=nodes, cluster=cluster)
    if placement.on_gpu and not cluster:
        pick_device("cuda")  # refuses a torch that cannot use the GPU
    if cluster and not placement.on_gpu and device == "auto":
        on_note("the cluster has no GPU, so CPUs train; --device cuda would wait for GPUs")
    own_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=own_node).remote()
    storage.remove_folder(folder / _SCRATCH)
    work = partial(_work, body, mailbox, final, os.getcwd(), placement)
    fitting = _Fitting(_trainer(work, workers, placement=placement, folder=folder))
    fitting.start()
    try:
        needs = f"{workers} workers need {placement.need} each"
        _follow(ray, fitting, mailbox, needs=needs, on_step=on_step, on_note=on_note)
    finally:
        with contextlib.suppress(OSError):  # a worker that ends may still write there
            storage.remove_folder(folder / _SCRATCH)


def _trainer(work: Callable[[], None], workers: int, *, placement: Placement, folder: Path) -> Any:
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{START_S:.0f}")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    on_gpu = placement.on_gpu
    return TorchTrainer(
        work,
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=on_gpu, resources_per_worker={"CPU": placement.cpus, "GPU": on_gpu}
        ),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        run_config=RunConfig(
            name=_SCRATCH, storage_path=str(folder.absolute()), failure_config=FailureConfig(max_failures=FAILURES)
        ),
    )


class _Fitting(threading.Thread):
    """A thread around Ray Train's own call, which blocks; `error` is the exception that it raised."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(daemon=True)
        self.trainer, self.over = trainer, threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.trainer.fit()
        except BaseException as error:
            self.error = error
        finally:
            self.over.set()


def _follow(
    ray: Any,
    fitting: _Fitting,
    mailbox: Any,
    *,
    needs: str,
    on_step: OnStep,
    on_note: Callable[[str], None],
) -> None:
    """Pass on the workers' messages until they are done. `needs`: the resources of the workers, for messages."""
    began, starts, noted, stopping = time.monotonic(), 0, False, False
    while True:
        try:
            over = fitting.over.is_set()  # read before the last fetch, so that no message is missed
            news: _News = ray.get(mailbox.fetch.remote())
            if news.starts > max(1, starts):
                on_note(f"a worker failed ({news.trouble or _DIED}); all have started again, from the last save")
            starts = news.starts
            for report in news.reports:
                (on_note if isinstance(report, str) else on_step)(report)
            if news.outcome is not None:
                raise news.outcome
            if over:
                break
            waited = 0.0 if starts else time.monotonic() - began
            if waited > QUIET_S and not noted:
                noted = True
                on_note(f"waiting: {needs}, the cluster has {_has(ray)}; giving up after {START_S / 60:.0f} min")
            if waited > START_S:
                raise WorkersFailed(f"no worker started in {START_S:.0f} s: {needs}, the cluster has {_has(ray)}")
            fitting.over.wait(0.3)  # join() would take the thread for ended after a Ctrl-C
        except KeyboardInterrupt:
            if stopping or not starts:
                raise
            stopping = True
            on_note(_STOPPING)
            mailbox.stop.remote()
    if fitting.error is not None:
        why = news.trouble or (_DIED if starts else _last_line(fitting.error))
        raise WorkersFailed(
            f"workers failed {FAILURES + 1} times (the last: {why}); run the same again to go on from the last save"
        ) from fitting.error


def _last_line(error: BaseException) -> str:
    """The words of an error that Ray has put a traceback into: its last line."""
    last = str(error).strip().rpartition("\n")[2]
    return last if re.match(r"\w+(Error|Exception): ", last) else kind_and_reason(error)


def _has(ray: Any) -> str:
    resources = ray.cluster_resources()
    return f"{resources.get('GPU', 0):g} GPU and {resources.get('CPU', 0):g} CPU"


def _work(
    body: Body, mailbox: Any, final: tuple[type[Exception], ...], folder: str, placement: Placement
) -> None:  # fmt: skip
    """Do a worker's part: join the team, run `body`, and report to the driver."""
    import ray
    import ray.train.torch

    context = ray.train.get_context()
    rank = context.get_world_rank()
    if not ray.get(mailbox.begin.remote(rank)):
        return
    with contextlib.suppress(OSError):  # relative paths need it; another machine may lack this folder
        os.chdir(folder)
    device = ray.train.torch.get_device()
    beside = context.get_local_world_size()
    if device.type == "cpu":
        torch.set_num_threads(max(1, machine.cores() // beside))
    loaders = loaders_here(device, beside, loaders=placement.loaders)
    answer: Any = None

    def on_step(report: Any) -> None:
        """Report a step without waiting for the answer, and act on the answer to an earlier report."""
        nonlocal answer
        if answer is not None and ray.wait([answer], timeout=0)[0] and ray.get(answer):
            raise KeyboardInterrupt
        answer = mailbox.report.remote(report)

    try:
        body(Team(device, rank, context.get_world_size(), loaders), on_step)
    except BaseException as error:
        end = isinstance(error, (KeyboardInterrupt, *final))
        ray.get(mailbox.end.remote(error) if end else mailbox.fail.remote(kind_and_reason(error)))
        raise
