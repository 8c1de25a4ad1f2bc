"""Sixteen GPUs are asked for and fifteen are there: nobody may find out after a night that CPUs have trained."""

from __future__ import annotations

import re

import pytest
import torch

from autolabel.manifests import machine
from autolabel.student.placement import Placement, described, loaders_here, place, told

GPU_NODE = {"CPU": 32.0, "GPU": 8.0}
HEAD = {"CPU": 4.0}


def test_auto_takes_gpus_where_there_are_enough_and_cpus_where_there_are_none() -> None:
    assert place(8, "auto", loaders=None, nodes=[GPU_NODE], cluster=False) == Placement(True, 4, 3)
    assert place(2, "auto", loaders=None, nodes=[HEAD], cluster=False) == Placement(False, 1, 0)
    assert place(2, "auto", loaders=None, nodes=[HEAD, HEAD], cluster=True) == Placement(False, 1, 0)
    assert place(2, "cpu", loaders=None, nodes=[GPU_NODE], cluster=False) == Placement(False, 1, 0)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_cluster_with_too_few_gpus_is_waited_for(device: str) -> None:
    assert place(16, device, loaders=None, nodes=[HEAD, GPU_NODE], cluster=True) == Placement(True, 4, 3)
    assert place(16, "cuda", loaders=None, nodes=[HEAD], cluster=True) == Placement(True, 1, None)


@pytest.mark.parametrize(
    ("device", "node", "there", "fewer"),
    [
        ("auto", {"CPU": 8, "GPU": 3}, "3 GPUs", "--workers 3, "),
        ("cuda", {"CPU": 8, "GPU": 1}, "1 GPU", "--workers 1, "),
        ("cuda", {"CPU": 8}, "0 GPUs", ""),
    ],
)
def test_more_workers_than_gpus_on_one_machine_are_refused(
    device: str, node: dict[str, float], there: str, fewer: str
) -> None:
    message = (
        f"workers 4: this machine has {there}, and each needs one; give {fewer}the --address of a cluster, or"
        " --device cpu"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        place(4, device, loaders=None, nodes=[node], cluster=False)


@pytest.mark.parametrize(
    ("loaders", "nodes", "placement"),
    [
        (None, [{"CPU": 64, "GPU": 4}], Placement(True, 9, 8)),  # more than eight have nothing to do
        (None, [{"CPU": 64, "GPU": 4}, {"CPU": 12, "GPU": 4}], Placement(True, 3, 2)),  # the poorest machine decides
        (None, [{"CPU": 4, "GPU": 8}], Placement(True, 0.5, 0)),
        (0, [GPU_NODE], Placement(True, 1, 0)),
        (2, [GPU_NODE], Placement(True, 3, 2)),
        (12, [GPU_NODE], Placement(True, 4, 12)),  # as asked for, but Ray can place it
        (1, [{"CPU": 3, "GPU": 2}], Placement(True, 1, 1)),
    ],
)
def test_the_cores_that_are_declared_fit_beside_every_gpu(
    loaders: int | None, nodes: list[dict[str, float]], placement: Placement
) -> None:
    found = place(4, "cuda", loaders=loaders, nodes=nodes, cluster=True)
    assert found == placement
    assert all(node["GPU"] * found.cpus <= node["CPU"] for node in nodes)


@pytest.mark.parametrize(
    ("loaders", "nodes", "cpus"),
    [(3, [{"CPU": 8}], 4), (3, [{"CPU": 4}], 2), (3, [{"CPU": 3}, {"CPU": 3}], 3), (9, [{"CPU": 1}], 1)],
)
def test_loaders_of_cpu_workers_are_declared_as_far_as_two_workers_fit(
    loaders: int, nodes: list[dict[str, float]], cpus: int
) -> None:
    assert place(2, "cpu", loaders=loaders, nodes=nodes, cluster=True) == Placement(False, cpus, loaders)


def test_a_process_by_itself_shares_the_cores_with_the_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    for cores, gpus, loaders in ((32, 8, 3), (32, 1, 8), (2, 1, 1), (4, 8, 0)):
        monkeypatch.setattr(machine, "cores", lambda cores=cores: cores)
        assert loaders_here(gpu, gpus) == loaders
    assert loaders_here(cpu, 1) == 0
    assert loaders_here(cpu, 1, loaders=2) == 2


def test_the_devices_are_told_by_kind_and_precision() -> None:
    assert described(torch.device("cpu"), "float32") == "CPU in float32"
    assert described(torch.device("mps"), "float32") == "Apple's GPU in float32"
    assert told(["CPU in float32"]) == "trains on CPU in float32"
    assert told(["L4 in bfloat16", "L4 in bfloat16", "T4 in float32"]) == (
        "trains on 2 x L4 in bfloat16, 1 x T4 in float32"
    )
