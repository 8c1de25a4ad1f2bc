"""A machine of the cluster is lost in the middle of a training: the others end with the weights that it would have had.

Two nodes of Ray on one machine, real Ray Train, gloo.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import ray
import torch
from conftest import names_in
from ray import cloudpickle
from ray.cluster_utils import Cluster
from ray.util import placement_group_table
from test_parallel import job

from autolabel.manifests.cluster import ray_session
from autolabel.student import distributed
from autolabel.student.distributed import OnStep, WorkersFailed, run_workers
from autolabel.student.job import TrainJob, TrainMachine
from autolabel.student.parallel import Team
from autolabel.student.request import TrainRequest
from autolabel.student.steps import StepReport
from autolabel.student.train import Training
from autolabel.teacher.checkpoints import read_checkpoint

pytestmark = pytest.mark.slow

__all__ = ["job"]  # a fixture

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have no copy of this file

SMALL = {"object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes of one CPU."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **SMALL})
    for _ in range(2):
        made.add_node(num_cpus=1, **SMALL)
    yield made
    made.shutdown()


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def pending_groups() -> list[list[dict[str, float]]]:
    """What Ray was asked for and has not: the resources of all workers, group by group."""
    groups = placement_group_table().values()
    return [[*group["bundles"].values()] for group in groups if group["state"] == "PENDING"]


def train_and_wait_once(request: TrainRequest, mark: Path | None, team: Team, on_step: OnStep) -> None:
    """With a mark that is not there yet, wait after step 3 for the end."""

    def step(report: StepReport) -> None:
        waits = mark is not None and report.step == 3 and not mark.exists()
        while waits and not request.last.exists():  # a thread writes it
            time.sleep(0.01)
        if waits and mark is not None:
            mark.touch()
        on_step(report)
        if waits:
            time.sleep(600)

    Training(request, team).run(step, on_step)


def test_the_weights_are_those_of_a_training_that_lost_no_machine(
    cluster: Cluster, job: TrainJob, tmp_path: Path
) -> None:
    steps: dict[str, list[int]] = {"whole": [], "lost": []}
    notes: list[str] = []
    with ray_session(cluster.address, tmp_path):
        for name, numbers in steps.items():
            asked = replace(job, out=tmp_path / name, machine=TrainMachine(workers=2, address=cluster.address))
            asked.out.mkdir()
            mark = tmp_path / "mark" if name == "lost" else None

            def on_step(report: StepReport, numbers: list[int] = numbers, mark: Path | None = mark) -> None:
                numbers.append(report.step)
                if mark is not None and numbers.count(3) == 1 and report.step == 3:
                    cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
                    cluster.add_node(num_cpus=1, **SMALL)

            run_workers(
                partial(train_and_wait_once, TrainRequest(asked), mark), 2, device="auto", folder=asked.out,
                on_step=on_step, on_note=notes.append, final=(ValueError, OSError), address=cluster.address,
            )  # fmt: skip
    cpus = "the cluster has no GPU, so CPUs train; --device cuda would wait for GPUs"
    again = "a worker failed (its process died); all have started again, from the last save"
    assert [note for note in notes if "waiting" not in note] == [cpus, cpus, again]
    assert steps == {"whole": [1, 2, 3, 4], "lost": [1, 2, 3, 3, 4]}
    found, expected = (read_checkpoint(tmp_path / name / "last.pt") for name in ("lost", "whole"))
    assert all(torch.equal(found.state_dict[key], tensor) for key, tensor in expected.state_dict.items())
    assert names_in(tmp_path / "lost") == names_in(tmp_path / "whole")


def test_gpus_that_do_not_come_are_waited_for_and_never_replaced_by_cpus(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.add_node(num_cpus=1, num_gpus=1, **SMALL)
    monkeypatch.setattr(distributed, "QUIET_S", 0.0)
    notes: list[str] = []

    def on_note(note: str) -> None:
        """Let the patience end when Ray has been asked for the workers, however long that takes here."""
        notes.append(note)
        wait_for(lambda: pending_groups() == [[{"CPU": 1.0, "GPU": 1.0}] * 2])
        monkeypatch.setattr(distributed, "START_S", 0.0)

    needs = r"2 workers need 1 GPU and 1 CPU each, the cluster has 1 GPU and 3 CPU"
    with (
        ray_session(cluster.address, tmp_path),
        pytest.raises(WorkersFailed, match=rf"^no worker started in 0 s: {needs}$"),
    ):
        # A lost machine is still counted for a while.
        wait_for(lambda: (ray.cluster_resources().get("GPU"), ray.cluster_resources().get("CPU")) == (1, 3))
        run_workers(
            train_and_wait_once, 2, device="auto", folder=tmp_path, on_step=print, on_note=on_note, final=(),
            address=cluster.address,
        )  # fmt: skip
    assert notes == [f"waiting: {needs}; giving up after 15 min"]
