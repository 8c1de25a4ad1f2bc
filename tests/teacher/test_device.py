"""A device that is not there must be refused in one line, and a GPU of Apple must not meet what it cannot compute.

No machine of ours has such a GPU: fakes of torch's functions stand in for it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from weighed import drawn_factors, drawn_places

from autolabel.manifests import machine, notes
from autolabel.teacher.decide import Prediction, bands
from autolabel.teacher.device import (
    autocast,
    common_precision,
    device_memory,
    gpu_precisions,
    highest_use,
    pick_device,
    pick_precision,
    release_cache,
    require_precision,
    tell_of_slow_precision,
)
from autolabel.teacher.memory import is_memory_error
from autolabel.teacher.networks.build import build
from autolabel.teacher.predict import Teacher

MPS = torch.device("mps")


def machine_with(
    monkeypatch: pytest.MonkeyPatch, gpus: int = 0, mps: bool = False, fault: str = "No CUDA GPUs are available"
) -> None:
    """A build of torch with CUDA, and so many GPUs; `fault` is what it says where it can use none."""

    def available() -> bool:
        if not gpus:
            warnings.warn(f"CUDA initialization: {fault} (Triggered internally)", UserWarning, stacklevel=1)
        return gpus > 0

    def init() -> None:
        if not gpus:
            raise RuntimeError(fault)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(torch.cuda, "init", init)
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
        *(
            (1, name, f"unknown device '{name}': expected auto, cpu, cuda, cuda:N or mps")
            for name in ("meta", "xpu", "cuda:x", "cuda:-1", "CUDA", "")
        ),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_one_line(
    gpus: int, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_with(monkeypatch, gpus)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pick_device(name)


def test_a_build_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError) as refused:
            pick_device(name)
        assert str(refused.value) == (
            f"device '{name}' was asked for, but this torch (2.13.0+cpu) is built without CUDA: install one that is"
            " built with it, from pytorch.org, or use cpu"
        )


TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040).\nPlease update your GPU driver by downloading"
    " and installing a new version."
)


def test_a_driver_that_is_too_old_is_told_in_torchs_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by torch's own warning, which is long and comes once: in the one line, and in a note for auto."""
    machine_with(monkeypatch, fault=TOO_OLD)
    said: list[str] = []
    reason = " ".join(TOO_OLD.split()).rstrip(".")
    with warnings.catch_warnings(), notes.heard(said.append):
        warnings.simplefilter("error")
        assert pick_device("auto") == "cpu"
        with pytest.raises(ValueError) as refused:
            pick_device("cuda")
    assert said == [f"computing on the CPU: torch cannot use the GPU of this machine ({reason})"]
    assert str(refused.value) == (
        f"device 'cuda' was asked for, but torch cannot use the GPU of this machine ({reason}): mend that, or use cpu"
    )


@pytest.mark.parametrize("fault", ["No CUDA GPUs are available", "Found no NVIDIA driver on your system. Please check"])
def test_a_machine_without_gpus_is_no_news(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    machine_with(monkeypatch, fault=fault)
    said: list[str] = []
    with notes.heard(said.append):
        assert pick_device("auto") == "cpu"
    assert said == []


# --- precision --------------------------------------------------------------------------------------------------------


def with_kinds(monkeypatch: pytest.MonkeyPatch, *kinds: tuple[str, int]) -> None:
    """GPUs of these names and major compute capabilities."""
    machine_with(monkeypatch, len(kinds))

    def place(device: Any) -> tuple[str, int]:
        return kinds[torch.device(device).index or 0]

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: place(device)[0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=place(device)[1]))


H100, T4 = ("NVIDIA H100", 9), ("Tesla T4", 7)


def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32_unless_another_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_kinds(monkeypatch, H100, T4)
    assert (pick_precision("auto", "cuda"), pick_precision("auto", "cuda:1")) == ("bfloat16", "float32")
    assert gpu_precisions() == {"NVIDIA H100": "bfloat16", "Tesla T4": "float32"}
    for precision, device in (
        ("bfloat16", "cuda:0"),
        ("float32", "cuda:1"),
        ("float16", "cuda:1"),
        ("bfloat16", "cpu"),
    ):
        require_precision(precision, device)
    with pytest.raises(ValueError, match=r"^Tesla T4 has no bfloat16 of its own, so its labels would be others than "):
        require_precision("bfloat16", "cuda:1")


def test_gpus_that_differ_in_precision_are_named_with_theirs() -> None:
    assert common_precision({"NVIDIA H100": "bfloat16", "NVIDIA A100": "bfloat16"}) == "bfloat16"
    with pytest.raises(ValueError) as refused:
        common_precision({"Tesla T4": "float32", "NVIDIA H100": "bfloat16"})
    assert str(refused.value) == (
        "the GPUs differ in the precision that auto is (NVIDIA H100: bfloat16, Tesla T4: float32), and labels of a run"
        " have one: give --precision float32 or float16, which all of them have"
    )


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
    assert device_memory(MPS).free == 700
    mps_memory["system"] = 200
    assert device_memory(MPS).free == 200
    mps_memory["current"] = 1100
    assert device_memory(MPS).free == 0


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
    evidence, places = drawn_factors(19), [drawn_places((64, 96), 19, share=1.0), None, drawn_places((64, 96), 19)]

    def predictions(teacher: Teacher) -> list[Prediction]:
        found = teacher.predict_in_batches(
            images, 2, edges=(0.06, 0.07), flip=True, temperature=1.3, evidence=evidence, places=places
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


@pytest.mark.parametrize(
    ("abilities", "precision", "told"),
    [
        ({"avx512_f": True}, "bfloat16", True), ({"amx_bf16": True}, "bfloat16", False),
        ({"avx512_bf16": True}, "bfloat16", False), ({"avx512_bf16": True}, "float16", True),
        ({"avx512_fp16": True}, "float16", False), ({}, "float32", False),
        ({"architecture": "aarch64"}, "bfloat16", False),
    ],
)  # fmt: skip
def test_a_note_tells_of_a_precision_that_the_cpu_has_to_emulate(
    abilities: dict[str, Any], precision: str, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"} | abilities)
    said: list[str] = []
    with notes.heard(said.append):
        tell_of_slow_precision(precision, "cpu")
        tell_of_slow_precision(precision, "cuda")
    assert [line.startswith(f"this CPU has no {precision} of its own") for line in said] == [True] * told
