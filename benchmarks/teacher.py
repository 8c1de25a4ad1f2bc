"""What labelling costs beside the network, and beside the published way to do it.

python benchmarks/teacher.py [--after] [--whole] [--memory] [--gpu] [--size HxW] [--smallest]

--after    everything after the network, per 1024 x 2048 image of 19 classes: ours, and the plain way (every map at full
           size, softmax to the host, numpy arg-max, a loop over classes, two PNGs)
--whole    whole labelling with hrnet48_ocr_mscale at 0.5, 1 and 2, and a float32 transcription of the published forward
--memory   peak memory of labelling 1, 4 and 16 images
--gpu      labelling and training on a GPU: speed, share of the measured ceiling, kernels, copies, memory,
           labels against those of the CPU (benchmarks/gpu.py)
--smallest every number means nothing: tiny images and a small network; --gpu then computes on a CPU where no GPU is

All that apply run by default. Both sides of a ratio run in turn in one process, each with all cores in its own way:
the plain way splits an image over torch's threads, ours labels as many images at once as there are cores.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import gpu
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.policy import PAPER
from autolabel.manifests.run.centroids import centroids
from autolabel.manifests.run.labels import LABELS, zarr_folder
from autolabel.manifests.run.shards import Frames, bucket_of, create_zarr, encode_zarr, write_zarr_shard
from autolabel.pipeline.measure import class_numbers, image_numbers
from autolabel.pipeline.rules import Rules
from autolabel.teacher.counting import count
from autolabel.teacher.decide import Prediction, encode, top_classes
from autolabel.teacher.feed import normalise
from autolabel.teacher.fold import cast_convolutions, fold_batch_norm
from autolabel.teacher.networks.build import build
from autolabel.teacher.networks.combine import Hierarchical, Part, rescaled_size
from autolabel.teacher.networks.decoders import OCRNet
from autolabel.teacher.predict import Teacher

CLASSES, SCALES, THRESHOLD = 19, (0.5, 1.0, 2.0), 0.5
CORES = len(os.sched_getaffinity(0))
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Extent:
    """How much is measured: size of an image, the network, images whose memory is measured."""

    size: tuple[int, int] = (1024, 2048)
    arch: str = "hrnet48_ocr_mscale"
    images: tuple[int, ...] = (1, 4, 16)


SMALLEST = Extent((64, 128), "hrnet18s_ocr_mscale", (1,))


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The shortest of `repeats` runs."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def up(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners not aligned."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


# --- after the network ------------------------------------------------------------------------------------------------


def predictions(size: tuple[int, int]) -> dict[float, tuple[Tensor, Tensor, Tensor]]:
    """Logits, auxiliary logits and attention of every scale at stride 4: blobs, about as confident as a network."""
    dice = torch.Generator().manual_seed(0)

    def blobs(channels: int, height: int, width: int) -> Tensor:
        coarse = torch.randn(1, channels, max(1, height // 16), max(1, width // 16), generator=dice) * 4
        return F.interpolate(coarse, size=(height, width), mode="bicubic")

    found = {}
    for scale in SCALES:
        height, width = (side // 4 for side in rescaled_size(size, scale))
        logits, aux = blobs(CLASSES, height, width), blobs(CLASSES, height, width)
        found[scale] = logits, aux, blobs(1, height, width).sigmoid()
    return found


def plainly_combined(by_scale: dict[float, tuple[Tensor, Tensor, Tensor]], size: tuple[int, int]) -> Tensor:
    """Every map at the size of its scale's input, then mixed from the highest scale down."""
    combined = torch.empty(0)
    for scale in sorted(by_scale, reverse=True):
        own = rescaled_size(size, scale)
        logits, _, attention = (up(x, own) for x in by_scale[scale])
        if not len(combined):
            combined = logits
        elif scale >= 1:
            combined = attention * logits + (1 - attention) * up(combined, own)
        else:
            combined = up(attention * logits, size) + (1 - up(attention, size)) * combined
    return combined


def plainly_decided(combined: Tensor, folder: Path) -> tuple[Pixels, int]:
    """Softmax to the host, numpy, two PNGs. Returns the label and how many bytes crossed to the host."""
    probabilities = torch.softmax(combined, dim=1)[0].cpu().numpy()
    winner, confidence = probabilities.argmax(axis=0), probabilities.max(axis=0)
    label = np.zeros(winner.shape, np.uint8)
    for class_id in range(CLASSES):
        label[np.where(winner == class_id)] = class_id
    label[confidence <= THRESHOLD] = 255
    Image.fromarray(label).save(folder / "label.png")
    Image.fromarray((confidence * 255).astype(np.uint8)).save(folder / "probability.png")
    return label, probabilities.nbytes


def our_parts(by_scale: dict[float, tuple[Tensor, Tensor, Tensor]], size: tuple[int, int]) -> list[Part]:
    """The same predictions in the shape that our combination reads."""
    return [
        Part(scale, rescaled_size(size, scale), logits, None if scale == max(SCALES) else attention)
        for scale, (logits, _, attention) in by_scale.items()
    ]


@torch.inference_mode()
def ours_decided(parts: list[Part], size: tuple[int, int]) -> tuple[Prediction, int]:
    """Combined and decided in bands; the prediction, and how many bytes crossed to the host."""
    device = parts[0].logits.device
    field = Hierarchical(8, 8).mix(parts, size)
    winners, confidences, *_ = top_classes(field, 1, classes=CLASSES, device=device)
    codes = encode(winners, confidences, classes=CLASSES, edges=(THRESHOLD,))[0].cpu().numpy()
    histogram, sums = (table.cpu().numpy() for table in count(winners[0], confidences[0], classes=CLASSES))
    return Prediction(codes, 2, histogram, sums), codes.nbytes + histogram.nbytes + sums.nbytes


def after_the_network(size: tuple[int, int], device: torch.device) -> None:
    """Time everything after the network, both ways."""
    by_scale = {s: tuple(x.to(device) for x in xs) for s, xs in predictions(size).items()}
    parts = our_parts(by_scale, size)  # type: ignore[arg-type]
    shard, bucket, rules = 8, bucket_of(*size), Rules(PAPER, CITYSCAPES, (THRESHOLD,))
    with (
        tempfile.TemporaryDirectory() as name,
        ThreadPoolExecutor(CORES, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        folder = Path(name)
        create_zarr(folder / zarr_folder(LABELS), {bucket: shard}, shard_rows=shard, attributes={})

        def plain() -> tuple[Pixels, int]:
            with torch.no_grad():
                return plainly_decided(plainly_combined(by_scale, size), folder)  # type: ignore[arg-type]

        def one(_: int) -> tuple[Pixels, int, Frames]:
            prediction, crossed = ours_decided(parts, size)
            outcome = rules.apply(prediction.codes, None)
            image_numbers(outcome, prediction)
            class_numbers(outcome, prediction, CITYSCAPES)
            centroids(outcome.label, CLASSES)
            return outcome.label, crossed, encode_zarr(outcome.label)

        def ours() -> list[tuple[Pixels, int, Frames]]:
            found = list(pool.map(one, range(shard))) if device.type == "cpu" else [one(i) for i in range(shard)]
            write_zarr_shard(
                folder / zarr_folder(LABELS) / bucket,
                0,
                shard_rows=shard,
                labels=[frames for _, _, frames in found],
            )
            return found

        (label, plain_bytes), (our_label, our_bytes, _) = plain(), ours()[0]
        slow, fast = seconds(plain), seconds(ours) / shard
    mismatch = int((label != our_label).sum())
    print(f"\n### After the network, {size[0]} x {size[1]}, {CLASSES} classes, {device}\n")
    print("| | plain | ours | ratio |\n|---|---:|---:|---:|")
    print(f"| ms per image | {1e3 * slow:.0f} | {1e3 * fast:.0f} | {slow / fast:.1f} |")
    print(f"| MB to the host | {plain_bytes / 1e6:.1f} | {our_bytes / 1e6:.2f} | {plain_bytes / our_bytes:.0f} |")
    print(f"\nlabels differ in {mismatch} of {label.size} pixels")


# --- the whole labelling ----------------------------------------------------------------------------------------------


def transcription(network: OCRNet, images: Tensor) -> Tensor:
    """The published forward, written straight down: every scale's logits and attention, auxiliary too, at full size."""
    by_scale = {}
    for scale in SCALES:
        height, width = rescaled_size((images.shape[-2], images.shape[-1]), scale)
        logits, aux, features, _ = network.ocr(network.backbone(up(images, (height, width))))
        attention = network.scale_attn.attention(features)  # type: ignore[operator]
        by_scale[scale] = logits, aux, attention
    return plainly_combined(by_scale, (images.shape[-2], images.shape[-1]))


def teacher_of(network: OCRNet, device: str, precision: str) -> Teacher:
    """Our way to use a network: batch norm folded, weights cast."""
    fold_batch_norm(network)
    cast_convolutions(network, precision, device=device)
    return Teacher(network, device=device, precision=precision)


def street(size: tuple[int, int], images: int) -> Pixels:
    """(images, H, W, 3) uint8: smooth noise."""
    dice = np.random.default_rng(0)
    small = dice.integers(0, 256, (images, size[0] // 16, size[1] // 16, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize(size[::-1], Image.Resampling.BICUBIC)) for x in small])


def whole_labelling(size: tuple[int, int], arch: str) -> None:
    """Time labelling on the CPU, images per second with all cores, both ways."""
    images = street(size, CORES)
    network = gpu.untrained(arch)

    def plain(image: Pixels) -> Pixels:
        with torch.no_grad(), tempfile.TemporaryDirectory() as name:
            pixels = normalise(torch.from_numpy(image[None]).permute(0, 3, 1, 2)).contiguous()
            return plainly_decided(transcription(network, pixels), Path(name))[0]

    rows, labels = [], np.stack([plain(image) for image in images])
    slow = seconds(lambda: [plain(image) for image in images], 1) / len(images)
    rows.append(("published forward, float32", slow, 0.0))
    with ThreadPoolExecutor(CORES, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for precision in ("float32", "bfloat16"):
            teacher = teacher_of(gpu.untrained(arch), "cpu", precision)
            runs: list[list[Pixels]] = []
            fast = seconds(lambda: runs.append(_labelled(pool, teacher, images)), 2) / len(images)  # noqa: B023
            differing = float((np.stack(runs[-1]) != labels).mean())
            rows.append((f"ours, {precision}", fast, differing))
    print(f"\n### Whole labelling, {arch} at 0.5, 1, 2, {size[0]} x {size[1]}, CPU, {CORES} cores\n")
    kept = 100 * float((labels != 255).mean())
    print(f"{kept:.0f} % of the pixels are kept, {len(np.unique(labels)) - 1} classes\n")
    print("| | s per image | of the published | other labels |\n|---|---:|---:|---:|")
    for name, each, differing in rows:
        print(f"| {name} | {each:.2f} | {each / slow:.2f} | {100 * differing:.4f} % |")


def _labelled(pool: ThreadPoolExecutor, teacher: Teacher, images: Pixels) -> list[Pixels]:
    return list(pool.map(lambda image: teacher.label(image[None], threshold=THRESHOLD, scales=SCALES)[0][0], images))


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(size: tuple[int, int], counts: tuple[int, ...]) -> None:
    """Peak memory of processes that label so many images each."""
    print(f"\n### Peak memory, hrnet18s_ocr_mscale at 0.5, 1, 2, {size[0]} x {size[1]}, one image at a time\n")
    print("| images | peak MiB |\n|---:|---:|")
    for images in counts:
        command = [sys.executable, __file__, "--label-and-exit", str(images), "--size", f"{size[0]}x{size[1]}"]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(f"| {images} | {float(found) / 2**20:.0f} |", flush=True)


def label_and_exit(images: int, size: tuple[int, int]) -> None:
    """Label so many images and print this process's peak memory in bytes."""
    torch.set_num_threads(1)
    network = build("hrnet18s_ocr_mscale", CLASSES).eval()
    teacher = Teacher(network)
    for _ in range(images):
        teacher.label(street(size, 1))
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) * 1024)


# --- main -------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in ("after", "whole", "memory", "gpu"):
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--size")
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    parser.add_argument("--label-and-exit", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.gpu and not (asked.smallest or torch.cuda.is_available()):
        parser.error("--gpu: torch sees no GPU here")
    extent = SMALLEST if asked.smallest else Extent()
    height, width = map(int, asked.size.split("x")) if asked.size else extent.size
    size = (height, width)
    if asked.label_and_exit:
        label_and_exit(asked.label_and_exit, size)
        return
    everything = not (asked.after or asked.whole or asked.memory or asked.gpu)
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
    on = datetime.now(UTC).strftime("%Y-%m-%d")
    print(f"{on}, {platform.machine()}, {CORES} cores, torch {torch.__version__}")
    if asked.after or everything:
        after_the_network(extent.size, torch.device("cpu"))
        if torch.cuda.is_available():
            after_the_network(extent.size, torch.device("cuda"))
    if asked.whole or everything:
        whole_labelling(size, extent.arch)
    if asked.memory or everything:
        memory(size, extent.images)
    if asked.gpu or (everything and (asked.smallest or torch.cuda.is_available())):
        gpu.report(
            torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            gpu.SMALLEST if asked.smallest else gpu.FULL,
            scales=SCALES, teacher=teacher_of, images=street,
        )  # fmt: skip


if __name__ == "__main__":
    main()
