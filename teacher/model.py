"""The port for models: what one must say and do to label images. docs/teachers.md is this page for users.

A model says which classes it knows and turns images of one size into scores. Everything else is done around it, for all
models alike: scales, mirrored images, windows, class maps, ensembles, batches, memory, the policy, statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor

from autolabel.manifests.label_space import LabelSpace
from autolabel.teacher.networks.fields import Field, Size

Gives = Literal["logits", "probabilities", "ids"]


class Model(Protocol):
    """A network on one device. Its method is called by several threads, in `torch.inference_mode`.

    classes: their names by channel, each once; a `LabelSpace` has colours too. gives: what `predict` returns.
    fixed_size: height and width to which the model resizes every image, so that another scale shows it nothing more;
    None if it sees an image as large as it is given. trained_on: the marks (N,) int64 of the images that it has seen,
    see `checkpoints.fingerprint_tensor`; None where nobody knows.
    """

    classes: Sequence[str] | LabelSpace
    gives: Gives = "logits"
    fixed_size: Size | None = None
    trained_on: Tensor | None = None

    def predict(self, images: Tensor) -> Tensor | Field:
        """Return the scores of RGB images (B, 3, H, W) uint8 on the model's device; the same for an image in any batch.

        "logits": (B, C, h, w) floating point, whose softmax over C is the probability; "probabilities": the same from
        0 to 1, whose sum over C need not be 1, and what it lacks is the probability of no class; both at any
        resolution, resized bilinearly to (H, W). "ids": (B, h, w) of integers; a number that is no class means none.
        A model that can do without a whole map returns a `Field` of size (H, W) instead, read in bands of rows.
        """
