"""The check of an exported file: it gives what its checkpoint gives, on drawn streets and on noise."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autolabel.manifests.scenes import draw_scene
from autolabel.manifests.wording import counted, number
from autolabel.teacher.networks.fields import Size
from autolabel.teacher.predict import Teacher

ONNX, PT2 = ".onnx", ".pt2"
LOGITS, PROBABILITIES, CLASSES = OUTPUTS = ("logits", "probabilities", "classes")
GROUPS = 3  # of images, each the input of one call
_FARTHEST = 1 / 500  # difference of a logit, in standard deviations of the logits; of a probability, as it is

Image = NDArray[np.uint8]
Run = Callable[[NDArray[np.uint8]], NDArray[Any]]  # (B, 3, H, W) -> the output


class BadExport(ValueError):
    """A file that cannot be made, or that gives something else than its checkpoint; the message says why."""


@dataclass(frozen=True)
class Agreement:
    """The agreement of a file with its checkpoint: counts of images and pixels.

    differing: pixels with another class. ties: pixels whose two best classes are so close that rounding may swap them.
    Every differing pixel is a tie. difference: the largest of a logit or a probability; 0 for a file of classes.
    """

    images: int = 0
    pixels: int = 0
    differing: int = 0
    ties: int = 0
    difference: float = 0.0

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.images + other.images,
            self.pixels + other.pixels,
            self.differing + other.differing,
            self.ties + other.ties,
            max(self.difference, other.difference),
        )

    def line(self, gives: str) -> str:
        """One line on a file that gives logits, probabilities or classes."""
        difference = "" if gives == CLASSES else f"largest difference {self.difference:.1e}, "
        same = f"the same class at all {number(self.pixels)} pixels, of which {number(self.ties)} are ties"
        other = f"another class at {number(self.differing)} of {number(self.pixels)} pixels, which are ties"
        checked = f"checked against the checkpoint on {counted(self.images, 'image')}"
        return f"{checked}: {difference}{other if self.differing else same}"


def runner(data: bytes, suffix: str) -> Run:
    """Return the program in a file's bytes, as others will run it: by onnxruntime alone, or by torch alone."""
    if suffix == PT2:
        program = torch.export.load(io.BytesIO(data)).module()

        def by_torch(images: NDArray[np.uint8]) -> NDArray[Any]:
            with torch.inference_mode():
                output: Tensor = program(torch.from_numpy(images))
            return output.numpy()

        return by_torch
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, settings, providers=["CPUExecutionProvider"])

    def by_onnxruntime(images: NDArray[np.uint8]) -> NDArray[Any]:
        output: NDArray[Any] = session.run(None, {"images": images})[0]
        return output

    return by_onnxruntime


def compare(
    run: Run, teacher: Teacher, scales: Sequence[float], *, gives: str, size: Size | None, batch: int | None, least: int
) -> Iterator[Agreement]:
    """Yield the agreement of a file's output with the teacher's, for each of GROUPS groups of images.

    size, batch: those that the file takes; where they are open, sides of `least` pixels and more are tried, even and
    odd, and one image and two. Raises BadExport for more than rounding: a logit that differs by more than a five
    hundredth of the standard deviation of the image's logits, or a probability that differs by more than that number.
    Then a pixel can have another class only where the two best are nearly equal; that is demanded too.
    """
    for group in _images(size, batch, least):
        output = torch.from_numpy(np.array(run(np.stack(group).transpose(0, 3, 1, 2).copy())))
        total = Agreement()
        for image, one in zip(group, output, strict=True):
            total += _compared(teacher.logits(image, scales=scales), one, gives)
        yield total


def _images(size: Size | None, batch: int | None, least: int) -> list[list[Image]]:
    streets, noise = range(batch or 2), np.random.default_rng(0)
    sizes = [size] * GROUPS if size else [(least + a, least + b) for a, b in ((32, 96), (5, 83), (73, 7))]
    first, second, third = sizes
    return [
        [_street(seed, first) for seed in streets],
        [noise.integers(0, 256, (*second, 3), np.uint8) for _ in range(batch or 1)],
        [_street(10 + seed, third) for seed in range(batch or 1)],
    ]


def _street(seed: int, size: Size) -> Image:
    height, width = size
    image: Image = draw_scene(seed, height=max(height, 64), width=max(width, 64)).image[:height, :width]
    return image


def _compared(logits: Tensor, output: Tensor, gives: str) -> Agreement:
    """Compare the teacher's logits (C, H, W) of an image with a file's output. Raises BadExport."""
    expected = {LOGITS: logits, PROBABILITIES: logits.softmax(dim=0), CLASSES: logits.argmax(dim=0)}[gives]
    if output.shape != expected.shape:
        raise BadExport(f"the exported file gives {tuple(output.shape)} for an image, not {tuple(expected.shape)}")
    most = _FARTHEST * float(logits.std())
    best = logits.topk(min(2, len(logits)), dim=0).values
    ties = best[0] - best[-1] <= 2 * most
    winners = output.long() if gives == CLASSES else output.argmax(dim=0)
    differing = winners != logits.argmax(dim=0)
    difference = 0.0 if gives == CLASSES else float((output - expected).abs().max())
    near = difference <= (_FARTHEST if gives == PROBABILITIES else most)  # False for nan
    if not near or bool((differing & ~ties).any()):
        raise BadExport(
            f"the exported file does not give what its checkpoint gives: largest difference {difference:.2g}, another"
            f" class at {int(differing.sum()):,} of {differing.numel():,} pixels; nothing was written, please report it"
        )
    return Agreement(1, differing.numel(), int(differing.sum()), int(ties.sum()), difference)
