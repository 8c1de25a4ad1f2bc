"""Models of transformers as teachers, against transformers' own pipeline and a plain loop: speed, memory, labels.

python benchmarks/teachers.py [--images N] [--smallest]

SegFormer-B0 and Mask2Former with Swin-T, from their configurations with random weights, label N streets of 1024 x
2048, drawn at half that size, on a CPU with two threads. Every way of labelling is a process of its own. "ours" is the
teacher as `autolabel generate` uses it: two images at once, one thread each. With --smallest the networks and images
are small, and the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait shall not count as busy

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests.images import read_image
from autolabel.manifests.scenes import write_city
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.optional import require_package

require_package("torchvision", "hf")
transformers: Any = require_package("transformers", "hf")
for _module in ("segformer.modeling_segformer", "mask2former.modeling_mask2former", "swin.modeling_swin"):
    importlib.import_module(f"transformers.models.{_module}")  # once, before processes are forked
transformers.pipeline, transformers.SegformerImageProcessor, transformers.Mask2FormerImageProcessor  # noqa: B018

Labels = NDArray[np.int64]
Made = list[tuple[Labels, Any]]  # for every image its labels, and how far its scores are apart or None
Way = Callable[[Sequence[Image.Image]], Made]
NETWORKS = ("SegFormer-B0", "Mask2Former, Swin-T")
THREADS = 2


@dataclass(frozen=True)
class Timing:
    """One way of labelling: seconds of CPU for an image, MiB of memory at most, and labels, or none."""

    seconds: float
    peak: float
    labels: list[Labels]
    gaps: list[NDArray[np.float32]]


def build(folder: Path, name: str, classes: int, *, small: bool) -> None:
    """Save a network with random weights whose labels vary, and its processor."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    quiet()
    names = {number: f"class {number}" for number in range(classes)}
    more = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    if name == NETWORKS[0]:
        few = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 40, 64], "decoder_hidden_size": 32} if small else {}
        network = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**few, **more))
        size = {"height": 64, "width": 64} if small else {"height": 512, "width": 512}
        processor = transformers.SegformerImageProcessor(size=size)
    else:
        few = {"embed_dim": 12, "depths": [1, 1, 1, 1]} if small else {}
        wide = ("hidden_dim", "feature_size", "mask_feature_size", "dim_feedforward", "encoder_feedforward_dim")
        less = dict.fromkeys(wide, 32) | {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 8}
        trunk = transformers.SwinConfig(out_features=["stage1", "stage2", "stage3", "stage4"], **few)
        network = transformers.Mask2FormerForUniversalSegmentation(
            transformers.Mask2FormerConfig(backbone_config=trunk, **(less if small else {}), **more)
        )
        size = {"height": 64, "width": 64} if small else {"height": 384, "width": 384}
        processor = transformers.Mask2FormerImageProcessor(size=size, ignore_index=255)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.6 / weight[0].numel() ** 0.5)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)


# --- ways of labelling: each loads a folder, and returns what labels images ------------------------------------------


def network_alone(folder: Path) -> Way:
    """Run the network alone, on what the processor makes of the images."""
    network, processor = plain(folder)
    ready: dict[int, Any] = {}

    def label(images: Sequence[Image.Image]) -> Made:
        for image in images:
            if id(image) not in ready:
                ready[id(image)] = processor(image, return_tensors="pt")
            network(**ready[id(image)])
        return []

    return label


def plain_loop(folder: Path) -> Way:
    """Call processor, network and post-processing as the documentation of transformers does."""
    network, processor = plain(folder)

    def label(images: Sequence[Image.Image]) -> Made:
        made = []
        for image in images:
            outputs = network(**processor(image, return_tensors="pt"))
            (labels,) = processor.post_process_semantic_segmentation(outputs, [image.size[::-1]])
            made.append((labels.numpy(), None))
        return made

    return label


def scored_loop(folder: Path) -> Way:
    """Do the same, and say how far the two highest scores of each pixel are apart; not timed."""
    network, processor = plain(folder)

    def label(images: Sequence[Image.Image]) -> Made:
        made = []
        for image in images:
            outputs, sizes = network(**processor(image, return_tensors="pt")), [image.size[::-1]]
            (both,) = processor.post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
            first, second = both["segmentation_scores"].topk(2, dim=0).values
            made.append((both["segmentation"].numpy(), (first - second).numpy()))
        return made

    return label


def pipeline(folder: Path) -> Way:
    """Use the pipeline, which gives a mask for each class; these are joined to a label."""
    segment = transformers.pipeline("image-segmentation", model=str(folder), device="cpu")
    numbers = segment.model.config.label2id

    def label(images: Sequence[Image.Image]) -> Made:
        made = []
        for image in images:
            labels = np.full(image.size[::-1], -1, np.int64)
            for part in segment(image, subtask="semantic"):
                labels[np.asarray(part["mask"]) > 0] = numbers[part["label"]]
            made.append((labels, None))
        return made

    return label


def ours(folder: Path, threads: int = THREADS) -> Way:
    """Use the teacher: `threads` images at once, each computed by one thread."""
    teacher = load_teacher(folder, device="cpu")
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def one(image: Image.Image) -> tuple[Labels, None]:
        (prediction,) = teacher.predict_in_batches(np.asarray(image)[None], 1, edges=(0.5,), scales=(1.0,))
        return prediction.codes.astype(np.int64) // prediction.levels, None

    def label(images: Sequence[Image.Image]) -> Made:
        return list(pool.map(one, images))

    return label


WAYS: dict[str, Callable[[Path], Way]] = {
    "network alone": network_alone,
    "pipeline": pipeline,
    "plain loop": plain_loop,
    "ours": ours,
    "ours, one image at a time": partial(ours, threads=1),
}


def plain(folder: Path) -> tuple[Any, Any]:
    """Return network and processor, loaded as the documentation of transformers does."""
    kind = transformers.AutoModelForUniversalSegmentation
    if "Segformer" in (folder / "config.json").read_text():
        kind = transformers.AutoModelForSemanticSegmentation
    return kind.from_pretrained(folder).eval(), transformers.AutoImageProcessor.from_pretrained(folder)


# --- measuring --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def timed(way: Callable[[Path], Way], folder: Path, images: Sequence[Image.Image]) -> Timing:
    """Label the first image to warm up, then all of them."""
    torch.set_num_threads(THREADS)
    quiet()
    label = way(folder)
    if way is not scored_loop:
        label(images[:1])
    before = time.process_time()
    made = label(images)
    seconds = (time.process_time() - before) / len(images)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Timing(seconds, peak, [labels for labels, _ in made], [gaps for _, gaps in made if gaps is not None])


def quiet() -> None:
    """Keep transformers from printing between the rows."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def in_a_process(task: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Do a task in a forked process, which has imported everything and computed nothing, and return its result."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def work() -> None:
        there.send(task(*arguments, **options))  # none of its memory is the next one's

    process = context.Process(target=work)
    process.start()
    there.close()
    result = here.recv()
    process.join()
    return result


def compare(name: str, classes: int, images: Sequence[Image.Image], *, small: bool) -> None:
    """Print the rows of one network."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        in_a_process(build, folder, name, classes, small=small)
        timings = {title: in_a_process(timed, way, folder, images) for title, way in WAYS.items()}
        truth: Timing = in_a_process(timed, scored_loop, folder, images)
    reference = timings["pipeline"].seconds
    for title, timing in timings.items():
        differing, widest = differences(timing.labels, truth) if timing.labels else (0, 0.0)
        cells = [f"{1 / timing.seconds:.3f}", f"{reference / timing.seconds:.2f}", f"{timing.peak:.0f}"]
        print(f"| {name} | {classes} | {title} | {' | '.join(cells)} | {differing} | {widest:.1e} |", flush=True)


def differences(labels: Sequence[Labels], truth: Timing) -> tuple[int, float]:
    """Count pixels with another label than the plain loop's, and say how far the scores of such a pixel are apart."""
    other = [own != right for own, right in zip(labels, truth.labels, strict=True)]
    gaps = [gap[wrong].max() for gap, wrong in zip(truth.gaps, other, strict=True) if wrong.any()]
    return int(sum(wrong.sum() for wrong in other)), float(max(gaps, default=0))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    number, height = (2, 96) if asked.smallest else (asked.images, 1024)
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
    with tempfile.TemporaryDirectory() as name:
        many = {"fine": 0, "coarse": number, "val": 0, "height": height // 2, "width": height}
        in_a_process(write_city, Path(name), **many)
        paths = sorted(path for path in Path(name).rglob("*.png") if "gtCoarse" not in path.parts)
        images = [Image.fromarray(read_image(path)).resize((2 * height, height)) for path in paths[:number]]
    print(f"{number} images of {2 * height} x {height}, {THREADS} threads, torch {torch.__version__}\n", flush=True)
    print(
        "| network | classes | way | images per CPU second | against the pipeline | peak MiB | other labels |"
        " scores apart |\n|---|---:|---|---:|---:|---:|---:|---:|"
    )
    for network in NETWORKS:
        for classes in (19,) if asked.smallest else (19, 150):
            compare(network, classes, images, small=asked.smallest)


if __name__ == "__main__":
    main()
