"""A device that is not there must be refused in one line, and a GPU of Apple must not meet what it cannot compute.

No machine of ours has such a GPU: fakes of torch's functions stand in for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autolabel.manifests import machine
from autolabel.teacher.decide import Prediction, bands
from autolabel.teacher.device import autocast, free_memory, highest_use, pick_device, pick_precision, release_cache
from autolabel.teacher.memory import is_memory_error
from autolabel.teacher.networks.build import build
from autolabel.teacher.predict import Teacher

MPS = torch.device("mps")


def machine_with(monkeypatch: pytest.MonkeyPatch, gpus: int = 0, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


# --- which device -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "mps", "name", "expected"),
    [
        (0, False, "auto", "cpu"),
        (2, False, "auto", "cuda"),
        (0, True, "auto", "cpu"),
        (0, True, "mps", "mps"),
        (2, False, "cuda:1", "cuda:1"),
        (1, False, "cuda", "cuda"),
        (1, True, "cpu", "cpu"),
    ],
)
def test_a_device_that_is_there_is_picked(
    gpus: int, mps: bool, name: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_with(monkeypatch, gpus, mps)
    assert pick_device(name) == expected


@pytest.mark.parametrize(
    ("gpus", "name", "message"),
    [
        (0, "cuda", "device 'cuda' was asked for, but torch finds no GPU here: use cpu"),
        (0, "cuda:1", "device 'cuda:1' was asked for, but torch finds no GPU here: use cpu"),
        (1, "cuda:7", "device 'cuda:7' was asked for, but torch finds 1 GPU here: use cuda:0"),
        (4, "cuda:7", "device 'cuda:7' was asked for, but torch finds 4 GPUs here: use cuda:0 to cuda:3"),
        (0, "mps", "device 'mps' was asked for, but torch finds no GPU of Apple here: use cpu"),
        (1, "gpu", "unknown device 'gpu': expected auto, cpu, cuda, cuda:N or mps"),
        (1, "meta", "unknown device 'meta': expected auto, cpu, cuda, cuda:N or mps"),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_one_line(
    gpus: int, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_with(monkeypatch, gpus)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pick_device(name)


def test_apples_gpu_computes_in_float32_unless_another_precision_is_named() -> None:
    assert (pick_precision("auto", "mps"), pick_precision("float16", "mps")) == ("float32", "float16")
    with autocast(MPS, "float32"):
        assert not torch.is_autocast_enabled("mps")


# --- memory of Apple's GPU --------------------------------------------------------------------------------------------


@pytest.fixture
def mps_memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Fakes of torch's functions, and the numbers that they return; emptying the cache leaves what is in use."""
    numbers = {"recommended": 1000, "current": 300, "driver": 500, "system": 900}
    for name, key in (
        ("recommended_max_memory", "recommended"),
        ("current_allocated_memory", "current"),
        ("driver_allocated_memory", "driver"),
    ):
        monkeypatch.setattr(torch.mps, name, lambda key=key: numbers[key])
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: numbers.update(driver=numbers["current"]))
    monkeypatch.setattr(machine, "free_memory", lambda: numbers["system"])
    return numbers


def test_free_memory_of_apples_gpu_is_the_lesser_of_its_limit_and_the_machines(mps_memory: dict[str, int]) -> None:
    assert free_memory(MPS) == 700
    mps_memory["system"] = 200
    assert free_memory(MPS) == 200
    mps_memory["current"] = 1100
    assert free_memory(MPS) == 0


def test_the_highest_use_of_apples_gpu_is_what_its_allocator_has_taken(mps_memory: dict[str, int]) -> None:
    assert highest_use(MPS, lambda: mps_memory.update(driver=750)) == 450
    assert highest_use(MPS, lambda: None) == 1
    mps_memory["driver"] = 800
    release_cache(MPS)
    assert mps_memory["driver"] == 300


def test_an_error_of_apples_memory_is_known_as_one() -> None:
    assert is_memory_error(RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GiB, ...)"))
    assert not is_memory_error(RuntimeError("shapes do not match"))


# --- what Apple's GPU computes ----------------------------------------------------------------------------------------


class PretendedGPU(TorchFunctionMode):
    """Tensors for Apple's GPU are made on the CPU; a float64 one is refused, as that GPU has none."""

    moved = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        values = [*args, *(kwargs or {}).values()]
        if any(isinstance(value, torch.device) and value.type == "mps" for value in values):
            self.moved += 1
            assert torch.float64 not in values
            assert not (isinstance(args[0], Tensor) and args[0].dtype == torch.float64)
        real = [torch.device("cpu") if isinstance(v, torch.device) and v.type == "mps" else v for v in values]
        return func(*real[: len(args)], **dict(zip(kwargs or {}, real[len(args) :], strict=True)))


@pytest.mark.thorough
@pytest.mark.parametrize("arch", ["hrnet18s_ocr_mscale", "efficientnet_lite0_ocr_explicit"])
def test_a_teacher_on_apples_gpu_labels_like_one_on_the_cpu(arch: str, mps_memory: dict[str, int]) -> None:
    torch.manual_seed(0)
    network = build(arch, 19)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    coarse = [np.full((64, 96), 255, np.uint8), None, np.zeros((64, 96), np.uint8)]

    def predictions(teacher: Teacher) -> list[Prediction]:
        found = teacher.predict_in_batches(
            images, 2, edges=(0.06, 0.07), flip=True, temperature=1.3, prior=[0.5] * 18 + [0.1], coarse=coarse
        )
        return list(found)

    expected = predictions(Teacher(network))
    with PretendedGPU() as gpu:
        pretending = Teacher(network, device="mps")
        found = predictions(pretending)
        assert pretending.budget(scales=(0.5, 1.0, 2.0)).device == "mps"
    assert gpu.moved > 10
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.codes, other.codes)
        assert np.array_equal(one.histogram, other.histogram)
        assert np.array_equal(one.confidence, other.confidence)


def test_apples_gpu_gets_the_bands_of_a_gpu() -> None:
    assert list(bands((4096, 4096), 19, device=MPS)) == list(bands((4096, 4096), 19, device=torch.device("cuda")))
    assert len(list(bands((4096, 4096), 19, device=MPS))) < len(
        list(bands((4096, 4096), 19, device=torch.device("cpu")))
    )
