"""The losses: the distance of a network's logits from a label, as one number. All but `balanced` are the paper's.

    cross-entropy     mean over the pixels of -log p(label)
    balanced          the same, where a class weighs the square root of its pixels in the batch
    image-weighted    mean over the crops of the same, where a class weighs up to twice as much, the rarer it is
    rmi               mean over the crops of binary cross-entropy by class and pixel, and of a term that judges
                      neighbouring pixels together: region mutual information (Zhao, Wang, Yang, Cai, arXiv 1910.12037)

A network in training has several outputs. `segmentation_loss` adds up their losses as in arXiv 2005.10821, section 4:
the combined output, 0.4 of the OCR head's auxiliary output (arXiv 1909.11065) and 0.05 of each scale alone. With rmi
only the combined output gets the region term; the others get binary cross-entropy alone.

Every loss takes logits (B, C, H, W) of any float type and a label (B, H, W) int64 of train ids, 255 = ignore, and
returns a scalar. It computes in float32 or better, also inside an autocast region. Ignored pixels get no gradient; if
all pixels are ignored, the loss is finite and the gradient is zero.

A mean over crops is the value that the published code has with one crop a GPU: it averages over GPUs. There every crop
counts alike, however many of its pixels are labelled.

A batch may be computed in parts. A loss that is given the `BatchCounts` of the whole batch returns this part's share
of the whole batch's loss, exactly, for all four: means divide by the pixels or images of the whole batch, classes weigh
by their pixels in the whole batch, and everything else is a sum over images.
"""

from __future__ import annotations

from functools import wraps
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from autolabel.manifests.label_space import IGNORE
from autolabel.student.job import SCALE_WEIGHT
from autolabel.teacher.networks.combine import TrainingOutput

AUX_WEIGHT = 0.4
_REGION_SHARE = 0.5  # weight of the region term in rmi; binary cross-entropy has the rest
_POOL = 4  # maps are reduced by this factor before regions are cut from them
_REGION = 3  # side of a region, in pixels of the reduced maps
_FLOOR = 1e-6  # constant added to probabilities
_RIDGE = 5e-4  # constant added to variances: keeps matrices regular and the reward of a perfect prediction finite


class BatchCounts(NamedTuple):
    """Counts of a whole batch: pixels by train id, (256,) int64 with the ignored ones last, and images."""

    pixels: Tensor
    images: int

    @classmethod
    def of(cls, label: Tensor) -> BatchCounts:
        """Count a label (B, H, W) of any integer type."""
        return cls(torch.bincount(label.flatten(), minlength=IGNORE + 1), len(label))

    @property
    def valid(self) -> Tensor:
        """The number of pixels that are not ignored, a scalar tensor."""
        return self.pixels[:IGNORE].sum()


class Loss(Protocol):
    """Logits and label -> scalar. `whole` counts the batch of which they are a part; None if they are all of it."""

    def __call__(self, logits: Tensor, label: Tensor, *, whole: BatchCounts | None = None) -> Tensor: ...


class _Formula(Protocol):
    def __call__(self, logits: Tensor, label: Tensor, *, whole: BatchCounts) -> Tensor: ...


def _in_full_precision(loss: _Formula) -> Loss:
    """Return the loss with its logits brought to float32 or better, and with autocast off."""

    @wraps(loss)
    def computed(logits: Tensor, label: Tensor, *, whole: BatchCounts | None = None) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return loss(exact, label, whole=BatchCounts.of(label) if whole is None else whole)

    return computed


# --- cross-entropies --------------------------------------------------------------------------------------------------


@_in_full_precision
def cross_entropy(logits: Tensor, label: Tensor, *, whole: BatchCounts) -> Tensor:
    """Mean over the valid pixels of the batch; 0 for a batch without any."""
    return F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum") / whole.valid.clamp(min=1)


@_in_full_precision
def balanced_cross_entropy(logits: Tensor, label: Tensor, *, whole: BatchCounts) -> Tensor:
    """Weighted mean over the valid pixels of the batch; 0 for a batch without any.

    A pixel weighs 1 / sqrt(pixels of its class in the batch). This lies half way between counting pixels and counting
    classes: a class with a hundredth of another's pixels has a tenth of its weight (Mahajan et al., arXiv 1805.00932,
    sample hashtags likewise).
    """
    pixels = whole.pixels[: logits.shape[1]].to(logits.dtype)
    weight = pixels.clamp(min=1).rsqrt()
    surprise = F.cross_entropy(logits, label, weight, ignore_index=IGNORE, reduction="sum")
    return surprise / pixels.sqrt().sum().clamp(min=1)


@_in_full_precision
def image_weighted_cross_entropy(logits: Tensor, label: Tensor, *, whole: BatchCounts) -> Tensor:
    """Mean over the images of their weighted means; an image that is all ignore counts as 0.

    A class weighs 2 minus its share of the batch's valid pixels. As in the published code, the shares are taken over
    the whole batch. That code sums over the images of a GPU and averages over GPUs; the mean is the same with one image
    a GPU.
    """
    classes = logits.shape[1]
    pixels = whole.pixels[:classes].to(logits.dtype)
    class_weights = logits.new_zeros(IGNORE + 1)  # weight by train id, 0 for ignore
    class_weights[:classes] = 2 - pixels / pixels.sum().clamp(min=1)
    weight = class_weights[label]  # (B, H, W)
    surprise = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")  # (B, H, W)
    # A valid pixel weighs 1 or more, so the clamp changes only images without valid pixels.
    means = (weight * surprise).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1)
    return means.sum() / whole.images


# --- region mutual information ----------------------------------------------------------------------------------------


@_in_full_precision
def binary_cross_entropy(logits: Tensor, label: Tensor, *, whole: BatchCounts) -> Tensor:
    """Mean over the images of the sum over classes and valid pixels, divided by the image's valid pixels + 1."""
    return _binary_cross_entropy(logits, _one_hot(label, logits), _valid(label), whole)


@_in_full_precision
def region_mutual_information(logits: Tensor, label: Tensor, *, whole: BatchCounts) -> Tensor:
    """Half binary cross-entropy, half region term, each a mean over images. It can be negative.

    Raises ValueError for crops below 8 x 8.
    """
    truth, valid = _one_hot(label, logits), _valid(label)
    pixels = _binary_cross_entropy(logits, truth, valid, whole)
    regions = _region_term(logits.sigmoid() * valid + _FLOOR, truth) / whole.images
    return (1 - _REGION_SHARE) * pixels + _REGION_SHARE * regions


def _valid(label: Tensor) -> Tensor:
    return (label != IGNORE).unsqueeze(1)  # (B, 1, H, W)


def _one_hot(label: Tensor, like: Tensor) -> Tensor:
    """Return (B, C, H, W) of the type of `like`: 1 for the label's class, else 0; ignored pixels are 0 throughout."""
    classes = torch.arange(like.shape[1], device=label.device)[:, None, None]
    return (label.unsqueeze(1) == classes).to(like.dtype)


def _binary_cross_entropy(logits: Tensor, truth: Tensor, valid: Tensor, whole: BatchCounts) -> Tensor:
    weight = valid / (valid.sum(dim=(1, 2, 3), keepdim=True) + 1).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, truth, weight=weight, reduction="sum") / whole.images


def _region_term(predicted: Tensor, truth: Tensor) -> Tensor:
    """Measure the uncertainty about the truth of a region once its prediction is known; both (B, C, H, W) in [0, 1].

    A region is a 3 x 3 square of the pooled maps, taken as one point of 9 numbers. If truth and prediction were
    normally distributed, the truth given the prediction would have the covariance

        M = cov(truth) - cov(truth, predicted) cov(predicted)^-1 cov(predicted, truth)

    with a ridge added to the variances of both. Apart from sign and constants, 0.5 log det M bounds the mutual
    information of the two from below (arXiv 1910.12037, section 3). M is a Schur complement in the joint covariance,
    so its Cholesky factor is the lower right block of the joint factor: no inverse is needed, and the factorised
    matrix has no eigenvalue below the ridge. Covariances are sums over the regions, not means. Returns the sum over
    images and classes, divided by the 9 numbers of a region.
    """
    height, width = predicted.shape[-2:]
    least = (_REGION - 1) * _POOL
    if min(height, width) < least:
        raise ValueError(f"a crop of {height}x{width} pixels holds no region: rmi needs {least}x{least} or more")

    def pooled(maps: Tensor) -> Tensor:
        small = F.avg_pool2d(maps, _POOL, stride=_POOL, padding=_POOL // 2)
        return (small.cpu() if small.device.type == "mps" else small).double()  # Apple's GPU has no float64

    both = torch.stack([pooled(predicted), pooled(truth)], dim=2).flatten(0, 1)  # (B * C, 2, h, w)
    points = F.unfold(both, _REGION)  # (B * C, 2 * 9, regions)
    points -= points.mean(dim=-1, keepdim=True)
    covariance = points @ points.mT
    covariance.diagonal(dim1=-2, dim2=-1).add_(_RIDGE)
    # Finite logits give a positive definite matrix; with others the binary cross-entropy is not finite, and tells.
    factor: Tensor = torch.linalg.cholesky_ex(covariance).L
    numbers = _REGION**2
    half_log_det = factor.diagonal(dim1=-2, dim2=-1)[:, numbers:].log().sum(dim=-1)  # (B * C,)
    return (half_log_det.sum() / numbers).to(predicted.dtype).to(predicted.device)


# --- all outputs of a network -----------------------------------------------------------------------------------------


class Losses(NamedTuple):
    """The loss of the combined output, and the loss of the others: the auxiliary output and each scale alone."""

    joint: Loss
    others: Loss


FORMULAS = {  # the keys are those of job.LOSSES
    "cross-entropy": Losses(cross_entropy, cross_entropy),
    "balanced": Losses(balanced_cross_entropy, balanced_cross_entropy),
    "image-weighted": Losses(image_weighted_cross_entropy, image_weighted_cross_entropy),
    "rmi": Losses(region_mutual_information, binary_cross_entropy),
}


def segmentation_loss(
    name: str,
    output: TrainingOutput,
    *,
    label: Tensor,
    whole: BatchCounts | None = None,
    scale_weight: float = SCALE_WEIGHT,
) -> Tensor:
    """Return the weighted sum of the named loss (see FORMULAS) over all outputs of a network. `whole`: see `Loss`.

    scale_weight: weight of each scale's own output; 0 leaves these out.
    """
    joint, other = FORMULAS[name]
    whole = BatchCounts.of(label) if whole is None else whole
    total = joint(output.joint, label, whole=whole)
    if output.aux is not None:
        total = total + AUX_WEIGHT * other(output.aux, label, whole=whole)
    for logits in output.scales if scale_weight else ():
        total = total + scale_weight * other(logits, label, whole=whole)
    return total
