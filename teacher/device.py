"""Devices that torch computes on (CPU, CUDA GPUs, Apple's GPU): their presence, precision and memory."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from autolabel.manifests import machine, notes

_NO_GPU = ("no NVIDIA driver", "No CUDA GPUs", "not compiled with CUDA", "not linked with support for cuda")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> str:
    """Return the device to use: `auto` is the first GPU of CUDA, else the CPU. Raises ValueError for an absent one.

    Apple's GPU, `mps`, has to be named: its results have never been compared with those of the others. A note says why
    `auto` is the CPU where torch cannot use the driver of a GPU.
    """
    if name == "auto":
        if _gpus():
            return "cuda"
        if reason := _unusable():
            notes.tell(f"computing on the CPU: torch cannot use the GPU of this machine ({reason})")
        return "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"unknown device {name!r}: expected auto, cpu, cuda, cuda:N or mps")
    asked = f"device {name!r} was asked for, but"
    if device.type == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        raise ValueError(
            f"{asked} this torch ({torch.__version__}) is built without CUDA: install one that is built with it, from"
            " pytorch.org, or use cpu"
        )
    gpus = _gpus() if device.type == "cuda" else 0
    if device.type == "cuda" and not gpus:
        reason = _unusable()
        found = f"cannot use the GPU of this machine ({reason}): mend that, or" if reason else "finds no GPU here:"
        raise ValueError(f"{asked} torch {found} use cpu")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        there = "1 GPU here: use cuda:0" if gpus == 1 else f"{gpus} GPUs here: use cuda:0 to cuda:{gpus - 1}"
        raise ValueError(f"{asked} torch finds {there}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"{asked} torch finds no GPU of Apple here: use cpu")
    return name


def _gpus() -> int:
    """Return the number of CUDA GPUs that torch can use; it warns of a driver that is too old, for which see below."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _unusable() -> str:
    """Return why torch cannot use a GPU that may be there; "" if there is none, or torch is built without CUDA."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        return "" if any(words in reason for words in _NO_GPU) else reason.rstrip(".")
    return ""


def pick_precision(name: str, device: str) -> str:
    """Return the precision to use: `auto` is bfloat16 on a CUDA GPU that has it, else float32. Raises ValueError."""
    if name != "auto":
        if name not in PRECISIONS:
            raise ValueError(f"unknown precision {name!r}: expected auto, {', '.join(PRECISIONS)}")
        return name
    return "bfloat16" if device.startswith("cuda") and _has_bfloat16(device) else "float32"


def require_precision(precision: str, device: str) -> None:
    """Raise ValueError if a GPU only emulates a precision: it rounds otherwise than the GPUs that have it."""
    if precision == "bfloat16" and device.startswith("cuda") and not _has_bfloat16(device):
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16 of its own, so its labels would be others than those"
            " of GPUs that have it: give --precision float32 or float16, for a new run, or use other GPUs"
        )


# What a CPU of Intel or AMD must be able to do in a precision; others are not known.
_FAST_ON_X86 = {"bfloat16": ("amx_bf16", "avx512_bf16"), "float16": ("avx512_fp16", "amx_fp16")}


def tell_of_slow_precision(precision: str, device: str) -> None:
    """Tell a note where a CPU has to convert every number: it then takes several times as long as in float32."""
    abilities = torch.cpu.get_capabilities() if device == "cpu" else {}
    wanted = _FAST_ON_X86.get(precision, ())
    if wanted and abilities.get("architecture") == "x86_64" and not any(abilities.get(name) for name in wanted):
        notes.tell(
            f"this CPU has no {precision} of its own (none of {', '.join(wanted)}), which takes 4 to 14 times as long"
            " as float32: give --precision float32, for a new run or training, or use another machine"
        )


def gpu_precisions() -> dict[str, str]:
    """Return the precision that `auto` is on each kind of CUDA GPU here, by name. Raises ValueError without GPUs."""
    pick_device("cuda")
    places = [f"cuda:{place}" for place in range(torch.cuda.device_count())]
    return {torch.cuda.get_device_name(place): pick_precision("auto", place) for place in places}


def common_precision(kinds: Mapping[str, str]) -> str:
    """Return the precision of all kinds of GPU. Raises ValueError, naming each kind with its own, if they differ."""
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{kind}: {precision}" for kind, precision in sorted(kinds.items()))
        raise ValueError(
            f"the GPUs differ in the precision that auto is ({told}), and labels of a run have one: give --precision"
            " float32 or float16, which all of them have"
        )
    return next(iter(kinds.values()))


def _has_bfloat16(device: str) -> bool:
    """True if a CUDA GPU computes in bfloat16 itself, as `torch.cuda.is_bf16_supported` tells of the current one."""
    return bool(torch.version.hip) or torch.cuda.get_device_properties(device).major >= 8


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Return a context in which networks compute in a precision of PRECISIONS."""
    dtype = PRECISIONS[precision]
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def exact_kernels(device: torch.device) -> None:
    """Make a CUDA GPU compute the same from the same, for labels: float32 as float32, and no kernel by its speed."""
    _choose_kernels(device, by_speed=False)


def fast_kernels(device: torch.device) -> None:
    """Let a CUDA GPU measure which kernels are fastest, for the steps of a training; float32 stays float32."""
    _choose_kernels(device, by_speed=True)


def _choose_kernels(device: torch.device, *, by_speed: bool) -> None:
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = by_speed
    torch.backends.cudnn.deterministic = not by_speed
    with warnings.catch_warnings():
        # Torch 2.9 to 2.12 announce another switch. That one must not be used: `torch.compile` reads this one, which
        # raises where the two differ (torch 2.13, pytorch issue 166387).
        warnings.simplefilter("ignore", UserWarning)
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device: all of them, those that a new allocation may take, and those that our tensors take."""

    total: int
    free: int
    own: int

    @property
    def others(self) -> int:
        """Bytes that are neither free nor taken by our tensors: other processes', and what a driver needs."""
        return max(0, self.total - self.free - self.own)


def device_memory(device: torch.device) -> DeviceMemory:
    """Return the memory of a device. A CPU's is taken for our own: its system lends more than it has."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_allocated(device)
        return DeviceMemory(int(total), int(free + torch.cuda.memory_reserved(device) - own), own)
    if device.type == "mps":  # shares the main memory, up to a limit
        total, own = torch.mps.recommended_max_memory(), torch.mps.current_allocated_memory()
        return DeviceMemory(total, max(0, min(total - own, machine.free_memory())), own)
    total, free = machine.total_memory(), machine.free_memory()
    return DeviceMemory(total, free, total - free)


def release_cache(device: torch.device) -> None:
    """Give memory that torch only caches back to a GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def highest_use(device: torch.device, work: Callable[[], object]) -> int:
    """Do some work; return the bytes that it needed at most beyond those in use before it, at least 1."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return max(1, torch.cuda.max_memory_allocated(device) - before)
    if device.type == "mps":  # keeps no peak; but what its allocator has taken stays taken until the cache is emptied
        torch.mps.empty_cache()
        before = torch.mps.driver_allocated_memory()
        work()
        return max(1, torch.mps.driver_allocated_memory() - before)
    with machine.PeakMemory() as peak:
        work()
    return max(1, peak.bytes)
