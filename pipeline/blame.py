"""Who is to blame when an image cannot be labelled: the image, or the disk, the memory, the device, the run."""

from __future__ import annotations

import re

import numpy as np

from autolabel.manifests.run.shards import DamagedLabel
from autolabel.manifests.tables import BadTable
from autolabel.manifests.teachers import BadTeacher
from autolabel.manifests.wording import kind_and_reason
from autolabel.teacher.compiled import CompilationFailed
from autolabel.teacher.decide import Prediction
from autolabel.teacher.memory import MemoryTaken

_REASON = 300  # letters of an unforeseen reason
_GPU = re.compile(r"\b(CUDA|cuDNN|CUBLAS|HIP|MPS)\b")
# Faults of a disk, of memory that others hold, of torch's compiler, or of the run whose confidence is read: the unit
# fails, and no image is to blame. Anything else that one image raises costs that image alone.
_NOT_THE_IMAGE = (OSError, MemoryError, MemoryTaken, DamagedLabel, BadTable, CompilationFailed)
_WIDER = {"float16": "give --precision bfloat16 or float32", "bfloat16": "give --precision float32"}


def require_of_image(error: Exception, *, on_gpu: bool) -> None:
    """Raise the error again unless an image is to blame; a GPU that fails says so in a RuntimeError."""
    gpu = isinstance(error, RuntimeError) and (on_gpu or _GPU.search(str(error)))
    if gpu or isinstance(error, _NOT_THE_IMAGE):
        raise error


def in_words(error: Exception) -> str:
    """The type of an error and its text, on one line of moderate length; the text alone if it is one of ours."""
    return (str(error) if isinstance(error, BadTeacher) else kind_and_reason(error))[:_REASON]


def overflow(prediction: Prediction, precision: str) -> str:
    """The reason to refuse a prediction that holds anything but numbers, which float16 soon does; else ""."""
    if np.isfinite(prediction.confidence).all():
        return ""
    advice = _WIDER.get(precision, "its weights are unfit, train it again")
    return f"the teacher's numbers are too large for {precision}, and some confidences are none: {advice}"
