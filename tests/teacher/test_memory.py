"""A lack of memory is known as one in all its forms, and the right one is blamed. Nothing here needs a GPU.

If this fails, good images are quarantined because another process was on the GPU, or a run ends for one huge image.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from autolabel.teacher.device import DeviceMemory, exact_kernels, fast_kernels
from autolabel.teacher.memory import (
    BATCH_PIXELS,
    Budget,
    LargestTensor,
    MemoryTaken,
    NotEnoughMemory,
    is_memory_error,
    too_little,
)
from autolabel.teacher.networks.build import build

GIB = 1 << 30
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GiB, ...)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:126] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried ..."),
        MemoryError("Unable to allocate 1.12 GiB for an array"),
    ],
    ids=lambda error: str(error)[:45],
)
def test_every_form_of_running_out_of_memory_is_known(error: RuntimeError) -> None:
    assert is_memory_error(error)


@pytest.mark.parametrize(
    "words",
    [
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered",
    ],
)
def test_another_failure_of_a_gpu_is_no_lack_of_memory(words: str) -> None:
    assert not is_memory_error(RuntimeError(words))


@pytest.mark.parametrize(
    ("free", "own", "needed", "blamed"),
    [
        pytest.param(2, 8, 20, MemoryTaken, id="others hold 70 of 80, and it would fit without them"),
        pytest.param(2, 8, None, MemoryTaken, id="nobody knows what it needs"),
        pytest.param(2, 8, 70, NotEnoughMemory, id="it needs more than there would be without them"),
        pytest.param(30, 50, 40, NotEnoughMemory, id="nobody else is there"),
        pytest.param(26.5, 50, 40, NotEnoughMemory, id="nobody but the driver"),
    ],
)
def test_a_batch_is_blamed_unless_it_would_fit_without_the_others(
    free: float, own: float, needed: float | None, blamed: type[RuntimeError]
) -> None:
    memory = DeviceMemory(80 * GIB, int(free * GIB), int(own * GIB))
    error = too_little(
        "cuda:0", "2 images of 9 x 8 at scale 2", memory, needed=None if needed is None else needed * GIB
    )
    assert type(error) is blamed
    assert "\n" not in str(error)


def test_the_line_names_device_needed_free_total_and_what_others_hold() -> None:
    memory = DeviceMemory(80 * GIB, 2 * GIB, 8 * GIB)
    assert str(too_little("cuda:0", "an image of 2048 x 1024 at scale 2", memory, needed=20 * GIB)) == (
        "not enough memory on cuda:0 now for an image of 2048 x 1024 at scale 2 (about 20.0 GiB needed, 2.0 GiB of"
        " 80.0 GiB free): another process holds 70.0 GiB; end it, or run the same again later"
    )


def test_the_largest_tensor_is_one_that_was_made_on_the_way() -> None:
    network = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.inference_mode(), LargestTensor() as largest:
        assert network(torch.zeros(2, 3, 8, 16)).numel() == 128
    assert largest.elements == 2 * 64 * 8 * 16


def test_a_batch_may_make_a_tensor_of_less_than_two_to_the_31_numbers() -> None:
    budget = Budget("NVIDIA H100", "bfloat16", 1000, 80 * GIB, 80 * GIB, elements_per_pixel=64)
    budget.require_countable(4096, 4096, batch=1, at="4")
    budget.require_countable(4096, 8191, batch=1, at="4")
    for height, width, batch in ((4096, 8192, 1), (4096, 4096, 2)):
        with pytest.raises(NotEnoughMemory, match=r"at scale 4 makes a tensor of 2\.1e\+09 numbers, and ker"):
            budget.require_countable(height, width, batch=batch, at="4")


@pytest.fixture
def switches() -> Iterator[None]:
    """Leaves torch's switches as they were."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("switches")
def test_kernels_for_labels_are_chosen_alike_each_time_and_those_of_a_training_by_their_speed() -> None:
    """Float32 is float32 for both; torch's own two switches agree, or `torch.compile` would fail."""
    torch.backends.cudnn.allow_tf32 = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact_kernels(torch.device("cpu"))
        assert torch.backends.cudnn.allow_tf32
        for choose, by_speed in ((exact_kernels, False), (fast_kernels, True)):
            choose(CUDA)
            assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (by_speed, not by_speed)
            assert not torch.backends.cudnn.allow_tf32
            assert torch.backends.cudnn.conv.fp32_precision != "tf32"
            assert not torch.backends.cuda.matmul.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("arch", "scales"),
    [
        ("hrnet48_ocr_mscale", (0.5, 1.0, 2.0)), ("hrnet48_aspp_mscale", (1.0,)),
        ("wrn38_deeplabv3plus_mscale", (1.0,)), ("xception71_deeper_mscale", (0.5, 1.0, 2.0)),
    ],
)  # fmt: skip
def test_a_full_batch_of_the_largest_networks_makes_no_tensor_that_kernels_cannot_count(
    arch: str, scales: tuple[float, ...]
) -> None:
    """It has `BATCH_PIXELS` at all scales together. Tensors on torch's meta device have sizes and no numbers."""
    with torch.device("meta"):
        network, image = build(arch, 65).eval(), torch.empty(1, 3, 128, 256)
    with torch.inference_mode(), LargestTensor() as largest:
        network.field(image, scales, combination=network.scale_attn)
    pixels = 128 * 256 * sum(scale**2 for scale in scales)
    assert 0 < largest.elements / pixels * BATCH_PIXELS < 2**30
