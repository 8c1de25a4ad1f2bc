"""A GPU against its own ceiling and against the CPU: the part of `teacher.py --gpu`, in one table for RESULTS.md.

Everything here also runs on a CPU (`teacher.py --gpu --smallest`), where its numbers mean nothing.
"""

from __future__ import annotations

import inspect
import itertools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from autolabel.student.losses import segmentation_loss
from autolabel.student.optimizer import WeightUpdater
from autolabel.teacher.decide import Prediction
from autolabel.teacher.device import PRECISIONS, autocast, highest_use
from autolabel.teacher.feed import normalise
from autolabel.teacher.networks.build import build
from autolabel.teacher.networks.decoders import OCRNet
from autolabel.teacher.predict import Teacher

Pixels = NDArray[np.uint8]
EDGES = (0.5,)
FEEDERS = 2  # threads that feed a GPU, as in labelling
CLASSES, CROPS = 19, 2


@dataclass(frozen=True)
class Extent:
    """How much is measured: the network, sizes of images, batches of each, crop of a training step, side of a product.

    compared: size of the images that the CPU labels too.
    """

    arch: str
    sizes: tuple[tuple[int, int], ...]
    batches: int
    compared: tuple[int, int]
    crop: tuple[int, int]
    side: int


FULL = Extent("hrnet48_ocr_mscale", ((1024, 2048), (512, 1024), (360, 480)), 8, (512, 1024), (512, 1024), 8192)
SMALLEST = Extent("hrnet18s_ocr_mscale", ((64, 128),), 2, (64, 128), (64, 64), 256)


def finished(device: torch.device) -> None:
    """Wait for the device; a CPU never lets anybody wait."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run after one that warms up."""
    work()
    finished(device)
    started = time.perf_counter()
    work()
    finished(device)
    return time.perf_counter() - started


def ceiling(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Floating point operations per second of a large square matrix product."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 10 * 2 * side**3 / timed(lambda: [a @ b for _ in range(10)], device)


@dataclass(frozen=True)
class Traced:
    """Kernels that a piece of work started, copies between host and device, and the share of its time that they took.

    On a CPU the kernels are torch's operations.
    """

    launches: int
    copies: int
    busy: float


def traced(work: Callable[[], object], device: torch.device) -> Traced:
    """Trace one run of a piece of work."""
    on_gpu = device.type == "cuda"
    known = inspect.signature(profile).parameters
    kept: dict[str, Any] = {"acc_events": True} if "acc_events" in known else {}  # torch warns without it
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU], **kept) as recorder:
        work()
        finished(device)
    events = [event for event in recorder.events() or () if event.device_type.name == ("CUDA" if on_gpu else "CPU")]
    moves = [event for event in events if event.name.startswith(("Memcpy HtoD", "Memcpy DtoH"))]
    kernels = [event for event in events if not event.name.startswith(("Memcpy", "Memset"))]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, end = 0.0, -math.inf
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    whole = max(stop for _, stop in spans) - spans[0][0]
    return Traced(len(kernels), len(moves), busy / whole)


def operations(arch: str, size: tuple[int, int], *, scales: tuple[float, ...], classes: int) -> int:
    """Floating point operations of one image, counted by shapes."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build(arch, classes).eval().parts(torch.empty(1, 3, *size), scales)
    return int(counter.get_total_flops())


def differing(found: list[Prediction], expected: list[Prediction]) -> float:
    """The share of pixels whose label is another one."""
    pairs = zip(found, expected, strict=True)
    return float(np.mean([np.mean(one.codes != other.codes) for one, other in pairs]))


def untrained(arch: str) -> OCRNet:
    """A network with random weights that keep its activations in range and make many classes win."""
    torch.manual_seed(0)
    network = build(arch, CLASSES)
    assert isinstance(network, OCRNet)
    with torch.no_grad():
        for name, module in network.named_modules():
            if isinstance(module, torch.nn.Conv2d):
                filters = torch.randn_like(module.weight)
                filters -= filters.mean(dim=(1, 2, 3), keepdim=True)
                gain = 12.0 if name == "ocr.cls_head" else 0.7
                module.weight.copy_(filters * gain * (2 / filters[0].numel()) ** 0.5)
    return network.eval()


def report(
    device: torch.device,
    extent: Extent,
    *,
    scales: tuple[float, ...],
    teacher: Callable[[OCRNet, str, str], Teacher],
    images: Callable[[tuple[int, int], int], Pixels],
) -> None:
    """Print one table for labelling and one for training.

    teacher: of a network, a device and a precision. images: of a size, so many.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    compared = images(extent.compared, 2)

    def labels(own: Teacher, pixels: Pixels, flip: bool = False) -> list[Prediction]:
        batch = own.planned_batch(pixels.shape[1:3], scales=scales)
        return list(own.predict_in_batches(pixels, batch, edges=EDGES, scales=scales, flip=flip))

    print(f"\n### {name}: labelling, {extent.arch} at {', '.join(f'{s:g}' for s in scales)}\n")
    expected = labels(teacher(untrained(extent.arch), "cpu", "float32"), compared)
    print(
        "| precision | image | flip | batch | images/s | two feeders | of the ceiling | launches | copies | busy |"
        " peak GiB | other labels | again |\n|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|"
    )
    for precision in PRECISIONS:
        own = teacher(untrained(extent.arch), str(device), precision)
        other = differing(labels(own, compared), expected)
        top = ceiling(device, PRECISIONS[precision], extent.side)
        cases = (
            itertools.product(extent.sizes, (False, True)) if precision == "bfloat16" else [(extent.sizes[0], False)]
        )
        for size, flip in cases:
            batch = own.planned_batch(size, scales=scales)
            pixels = images(size, batch * extent.batches)
            runs: list[list[Prediction]] = []
            peak = highest_use(device, lambda: runs.append(labels(own, pixels, flip)))  # noqa: B023
            alone = timed(lambda: runs.append(labels(own, pixels, flip)), device)  # noqa: B023
            with ThreadPoolExecutor(FEEDERS) as pool:
                parts = pixels[: len(pixels) // 2], pixels[len(pixels) // 2 :]
                both = timed(lambda: list(pool.map(lambda part: labels(own, part, flip), parts)), device)  # noqa: B023
            trace = traced(lambda: labels(own, pixels[:batch], flip), device)  # noqa: B023
            speeds = len(pixels) / alone, len(pixels) / both
            flops = (1 + flip) * operations(extent.arch, size, scales=scales, classes=own.network.classes)
            same = all(same_bits(run, runs[0]) for run in runs)
            print(
                f"| {precision} | {size[0]} x {size[1]} | {'yes' if flip else 'no'} | {batch} | {speeds[0]:.2f} |"
                f" {speeds[1]:.2f} | {flops * max(speeds) / top:.3f} | {trace.launches} | {trace.copies} |"
                f" {trace.busy:.2f} | {peak / 2**30:.2f} | {100 * other:.4f} % | {'the same' if same else 'DIFFERS'} |",
                flush=True,
            )
    print(f"\n### {name}: a training step, {extent.arch}, crops of {extent.crop[0]} x {extent.crop[1]}\n")
    print("| precision | loss | crops | crops/s | launches | busy | peak GiB |\n|---|---|---:|---:|---:|---:|---:|")
    halves = ("bfloat16", "float16") if device.type == "cuda" else ("bfloat16",)  # float16 takes a CPU 40 times as long
    for precision, loss in itertools.product(halves, ("balanced", "rmi")):
        step = training_step(device, extent, precision=precision, loss=loss)
        peak = highest_use(device, step)
        took = timed(step, device)
        trace = traced(step, device)
        print(
            f"| {precision} | {loss} | {CROPS} | {CROPS / took:.2f} | {trace.launches} | {trace.busy:.2f} |"
            f" {peak / 2**30:.2f} |",
            flush=True,
        )


def same_bits(found: list[Prediction], expected: list[Prediction]) -> bool:
    """True if two lists of predictions are equal to the last bit."""
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for one, other in zip(found, expected, strict=True)
        for name in ("codes", "histogram", "confidence")
    )


def training_step(device: torch.device, extent: Extent, *, precision: str, loss: str) -> Callable[[], None]:
    """A step of training as `student/train.py` does it, without reading crops."""
    torch.manual_seed(0)
    network = build(extent.arch, CLASSES).train().to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    updater = WeightUpdater(
        network, "sgd", peak=0.001, average_decay=None, precision=PRECISIONS[precision], clip=10.0, weight_decay=0.0001
    )
    images = torch.randint(0, 256, (CROPS, 3, *extent.crop), dtype=torch.uint8, device=device)
    label = torch.randint(0, CLASSES, (CROPS, *extent.crop), device=device)

    def step() -> None:
        updater.begin()
        with autocast(device, precision):
            output = network(normalise(images).contiguous(memory_format=torch.channels_last))
        updater.backward(segmentation_loss(loss, output, label=label))
        updater.update(0.001, updater.measure())

    return step
