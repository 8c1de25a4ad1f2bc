"""Devices and cores of a training's processes: chosen before they start, and told."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from autolabel.manifests import machine
from autolabel.manifests.cluster import require_gpus
from autolabel.teacher.device import pick_precision, tell_of_slow_precision

_LOADERS = 8  # processes that read crops for one GPU: more have nothing to do

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Placement:
    """The place of each worker: on a GPU, or on CPUs alone.

    cpus: cores that a worker asks Ray for. loaders: processes that read its crops; None leaves it to the worker, where
    nobody knows yet how many cores a GPU will have.
    """

    on_gpu: bool
    cpus: float
    loaders: int | None

    @property
    def need(self) -> str:
        """The resources of one worker, in words."""
        return f"{'1 GPU and ' if self.on_gpu else ''}{self.cpus:g} CPU"


def place(
    workers: int, device: str, *, loaders: int | None, nodes: Sequence[Resources], cluster: bool
) -> Placement:  # fmt: skip
    """Choose the place of so many workers on the machines that Ray has, each with "CPU" and "GPU".

    With `auto` it is a GPU for each as soon as there is one at all: on a cluster, the others are waited for. Raises
    ValueError if they cannot come, because there is only this machine (`cluster` is False). Every machine with GPUs has
    room for as many workers as it has GPUs, whatever `loaders` asks for.
    """
    gpus = sum(node.get("GPU", 0) for node in nodes)
    on_gpu = device.startswith("cuda") or (device == "auto" and gpus > 0)
    if on_gpu and not cluster:
        require_gpus(workers, int(gpus))
    wanted = 1 + ((_LOADERS if on_gpu else 0) if loaders is None else loaders)
    if not on_gpu:
        fitting = (n for n in range(wanted, 1, -1) if sum(node.get("CPU", 0) // n for node in nodes) >= workers)
        return Placement(False, next(fitting, 1), loaders or 0)
    shares = [node.get("CPU", 0) / node["GPU"] for node in nodes if node.get("GPU", 0) >= 1]
    share = min(shares, default=1.0)
    cpus = min(wanted, math.floor(share)) if share >= 1 else math.floor(share * 100) / 100
    if loaders is None and shares:
        loaders = max(0, int(cpus) - 1)
    return Placement(True, cpus, loaders)


def training_precision(name: str, device: str) -> str:
    """Resolve `auto`: bfloat16 on devices that compute it fast (such GPUs, and CPUs with AMX), else float32.

    Labelling is stricter: there `auto` is float32 on every CPU (see `pick_precision`). A note tells of a slow one.
    """
    if name == "auto" and device == "cpu" and torch.cpu.get_capabilities().get("amx_bf16"):
        return "bfloat16"
    precision = pick_precision(name, device)
    tell_of_slow_precision(precision, device)
    return precision


def loaders_here(device: torch.device, workers: int, *, loaders: int | None = None) -> int:
    """Return the number of processes that read crops for each of the workers on this machine."""
    if loaders is not None:
        return loaders
    return max(0, min(_LOADERS, machine.cores() // workers - 1)) if device.type == "cuda" else 0


def described(device: torch.device, precision: str) -> str:
    """Return the kind of a device and the precision in which it trains."""
    other = "Apple's GPU" if device.type == "mps" else "CPU"
    return f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else other} in {precision}"


def told(places: Sequence[str]) -> str:
    """Return the note on the devices of all processes, such as "trains on 4 x NVIDIA L4 in bfloat16"."""
    kinds = [f"{number} x {kind}" if len(places) > 1 else kind for kind, number in Counter(places).items()]
    return f"trains on {', '.join(kinds)}"
