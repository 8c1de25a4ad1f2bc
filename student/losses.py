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

All but rmi can weigh every pixel by a number from 0 to 1, in bytes: its loss is multiplied by the weight, and wherever
pixels are counted, weights are added up instead.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """Counts of a whole batch: pixels by train id, (256,) int64 with the ignored ones last, and images.

    lost: what the pixels of a train id weigh less than 1 each, in 255ths, (256,) int64; None if nothing is weighed.
    """

    pixels: Tensor
    images: int
    lost: Tensor | None = None

    @classmethod
    def of(cls, label: Tensor, weight: Tensor | None = None) -> BatchCounts:
        """Count a label (B, H, W) of any integer type, with weights (B, H, W) uint8 of which 255 means 1."""
        if weight is None:
            return cls(torch.bincount(label.flatten(), minlength=IGNORE + 1), len(label))
        both = label.flatten().long() * 256 + weight.flatten()
        counts = torch.bincount(both, minlength=(IGNORE + 1) * 256).view(IGNORE + 1, 256)
        return cls(counts.sum(dim=1), len(label), (counts * (255 - torch.arange(256, device=counts.device))).sum(dim=1))

    def summed(self, add: Callable[[Tensor], Tensor], *, images: int) -> BatchCounts:
        """The counts of a batch of so many images, of which these are a part. `add` sums a tensor over all parts."""
        if self.lost is None:
            return BatchCounts(add(self.pixels), images)
        pixels, lost = add(torch.stack([self.pixels, self.lost]))
        return BatchCounts(pixels, images, lost)

    def weights(self, classes: int, dtype: torch.dtype) -> Tensor:
        """The sum of the weights of the pixels of every class, (classes,); their number where nothing is weighed."""
        pixels = self.pixels[:classes].to(dtype)
        return pixels if self.lost is None else pixels - self.lost[:classes].to(dtype) / 255

    @property
    def valid(self) -> Tensor:
        """The sum of the weights of all pixels that are not ignored, a scalar tensor; their number without weights."""
        return self.pixels[:IGNORE].sum() if self.lost is None else self.weights(IGNORE, torch.float32).sum()


class Loss(Protocol):
    """Logits and label -> scalar. `whole` counts the batch of which they are a part; None if they are all of it.

    weight: (B, H, W) uint8, of which 255 means 1; None for 1 everywhere, which gives the same numbers bit for bit.
    """

    def __call__(
        self, logits: Tensor, label: Tensor, *, whole: BatchCounts | None = None, weight: Tensor | None = None
    ) -> Tensor: ...


class _Formula(Protocol):
    def __call__(self, logits: Tensor, label: Tensor, *, whole: BatchCounts, weight: Tensor | None) -> Tensor: ...


def _in_full_precision(loss: _Formula) -> Loss:
    """Return the loss with its logits brought to float32 or better, and with autocast off; weights become 0 to 1."""

    @wraps(loss)
    def computed(
        logits: Tensor, label: Tensor, *, whole: BatchCounts | None = None, weight: Tensor | None = None
    ) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
            counted = BatchCounts.of(label, weight) if whole is None else whole
            return loss(exact, label, whole=counted, weight=None if weight is None else weight.to(exact.dtype) / 255)

    return computed


def _surprise(logits: Tensor, label: Tensor, weight: Tensor | None, by_class: Tensor | None = None) -> Tensor:
    """Sum over the valid pixels of -log p(label), times the weight of the class (C,), times that of the pixel."""
    if weight is None:
        return F.cross_entropy(logits, label, by_class, ignore_index=IGNORE, reduction="sum")
    return (weight * F.cross_entropy(logits, label, by_class, ignore_index=IGNORE, reduction="none")).sum()


# --- cross-entropies --------------------------------------------------------------------------------------------------


@_in_full_precision
def cross_entropy(logits: Tensor, label: Tensor, *, whole: BatchCounts, weight: Tensor | None) -> Tensor:
    """Mean over the valid pixels of the batch; 0 for a batch without any."""
    return _surprise(logits, label, weight) / whole.valid.clamp(min=1)


@_in_full_precision
def balanced_cross_entropy(logits: Tensor, label: Tensor, *, whole: BatchCounts, weight: Tensor | None) -> Tensor:
    """Weighted mean over the valid pixels of the batch; 0 for a batch without any.

    A pixel weighs 1 / sqrt(pixels of its class in the batch). This lies half way between counting pixels and counting
    classes: a class with a hundredth of another's pixels has a tenth of its weight (Mahajan et al., arXiv 1805.00932,
    sample hashtags likewise).
    """
    pixels = whole.weights(logits.shape[1], logits.dtype)
    surprise = _surprise(logits, label, weight, pixels.clamp(min=1).rsqrt())
    return surprise / pixels.sqrt().sum().clamp(min=1)


@_in_full_precision
def image_weighted_cross_entropy(logits: Tensor, label: Tensor, *, whole: BatchCounts, weight: Tensor | None) -> Tensor:
    """Mean over the images of their weighted means; an image that is all ignore counts as 0.

    A class weighs 2 minus its share of the batch's valid pixels. As in the published code, the shares are taken over
    the whole batch. That code sums over the images of a GPU and averages over GPUs; the mean is the same with one image
    a GPU.
    """
    classes = logits.shape[1]
    pixels = whole.weights(classes, logits.dtype)
    class_weights = logits.new_zeros(IGNORE + 1)  # weight by train id, 0 for ignore
    class_weights[:classes] = 2 - pixels / pixels.sum().clamp(min=1)
    each = class_weights[label]  # (B, H, W)
    if weight is not None:
        each = each * weight
    surprise = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")  # (B, H, W)
    # A valid pixel counts 1 or more times its weight: the clamp changes only images of (nearly) no valid pixels.
    means = (each * surprise).sum(dim=(1, 2)) / each.sum(dim=(1, 2)).clamp(min=1)
    return means.sum() / whole.images


# --- region mutual information ----------------------------------------------------------------------------------------


@_in_full_precision
def binary_cross_entropy(logits: Tensor, label: Tensor, *, whole: BatchCounts, weight: Tensor | None) -> Tensor:
    """Mean over the images of the sum over classes and valid pixels, divided by the image's valid pixels + 1.

    It weighs no pixels.
    """
    return _binary_cross_entropy(logits, _one_hot(label, logits), _valid(label), whole)


@_in_full_precision
def region_mutual_information(logits: Tensor, label: Tensor, *, whole: BatchCounts, weight: Tensor | None) -> Tensor:
    """Half binary cross-entropy, half region term, each a mean over images. It can be negative. It weighs no pixels.

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


def observed(logits: Tensor, transition: Tensor, automatic: Tensor) -> Tensor:
    """Turn scores of the truth into scores of the label, in the images whose labels are `automatic`, (B,) bool.

    transition: (C, C) float32, the probability that a pixel of class k (row) is labelled y (column); rows sum to 1. The
    log probability of a label y is log sum_k transition[k, y] softmax_k: the forward correction of Patrini et al.
    (arXiv 1609.03683). Other images keep their logits.
    """
    with torch.autocast(logits.device.type, enabled=False):
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labelled = torch.einsum("bkhw,ky->byhw", exact.softmax(dim=1), transition.to(exact.dtype))
        least = torch.finfo(exact.dtype).tiny
        return torch.where(automatic[:, None, None, None], labelled.clamp(min=least).log(), exact)


def segmentation_loss(
    name: str,
    output: TrainingOutput,
    *,
    label: Tensor,
    whole: BatchCounts | None = None,
    weight: Tensor | None = None,
    scale_weight: float = SCALE_WEIGHT,
    seen: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the weighted sum of the named loss (see FORMULAS) over all outputs of a network.

    whole, weight: see `Loss`. scale_weight: weight of each scale's own output; 0 leaves these out. seen: turns the
    logits of every output into those that are compared with the label, such as `observed`.
    """
    whole = BatchCounts.of(label, weight) if whole is None else whole

    def loss(formula: Loss, logits: Tensor) -> Tensor:
        return formula(seen(logits) if seen else logits, label, whole=whole, weight=weight)

    joint, other = FORMULAS[name]
    total = loss(joint, output.joint)
    if output.aux is not None:
        total = total + AUX_WEIGHT * loss(other, output.aux)
    for logits in output.scales if scale_weight else ():
        total = total + scale_weight * loss(other, logits)
    return total
