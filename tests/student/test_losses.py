"""A loss with one wrong factor still falls, and the network quietly learns something else than the paper's did.

The numbers under CASES are the reference implementation's own, recorded on logits and labels that a formula gives, with
all images on one GPU: image-weighted was a sum over them, and is their mean here. `../shared/data/goldens` has the same
numbers, and those of the full network; the tolerances are those of its README.
"""

from __future__ import annotations

import copy
import json
import math
import runpy
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click import Choice
from conftest import autolabel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from autolabel.cli import main
from autolabel.student.job import LOSSES
from autolabel.student.losses import (
    FORMULAS,
    BatchCounts,
    Loss,
    balanced_cross_entropy,
    binary_cross_entropy,
    cross_entropy,
    image_weighted_cross_entropy,
    region_mutual_information,
    segmentation_loss,
)
from autolabel.student.metrics import read_metrics
from autolabel.teacher.feed import normalise
from autolabel.teacher.networks.build import build
from autolabel.teacher.networks.combine import Hierarchical, TrainingOutput
from autolabel.teacher.networks.decoders import SegmentationNet

torch.set_num_threads(1)

REFERENCE = Path(__file__).parents[3] / "shared/data/goldens"
recorded = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference's recorded outputs are not here")

RECORDED_AS = {"cross-entropy": "cross_entropy", "image-weighted": "image_weighted", "rmi": "rmi"}
CLASSES = 19
RIDGE = 5e-4  # of the region term: what is left uncertain where there is nothing to know


# --- logits and labels that anyone can make again ---------------------------------------------------------------------


def logits_by_formula(images: int, height: int, width: int) -> Tensor:
    n, c, y, x = np.ogrid[:images, :CLASSES, :height, :width]
    waves = 3 * np.sin(0.05 * (c + 1) * (y + 1) / 7 + 0.3 * n) + 2 * np.cos(0.03 * (c + 2) * (x + 1) / 5) - 0.5 * n
    return torch.from_numpy(waves.astype(np.float32))


def label_by_formula(images: int, height: int, width: int) -> Tensor:
    n, y, x = np.ogrid[:images, :height, :width]
    label = (3 * (y // 24) + 5 * (x // 40) + (y * x) // 4096 + 7 * n) % CLASSES
    ignored = ((x // 16 + 2 * (y // 16)) % 13 == 0) | (y >= height - height // 16)
    return torch.from_numpy(np.where(ignored, 255, label))


def logits_that_know_the_label(label: Tensor) -> Tensor:
    """Half the formula's, and 6 more for the class that the label has two pixels to the left."""
    shifted = label.roll(2, dims=-1).unsqueeze(1) == torch.arange(CLASSES)[:, None, None]
    return 0.5 * logits_by_formula(*label.shape) + 6 * shifted


class Case(NamedTuple):
    shape: tuple[int, int, int]  # images, height, width
    loss: str
    value: float
    gradient: float  # l2 norm
    pixel: float  # gradient at [0, 5, 20, 30]


ONE, TWO, ODD, KNOWN = (1, 64, 128), (2, 64, 128), (1, 61, 93), (1, 96, 160)
CASES = [
    Case(ONE, "cross-entropy", 4.21596718, 0.0118830531, 1.53395520e-05),
    Case(ONE, "image-weighted", 4.23078918, 0.0118932638, 1.52801331e-05),
    Case(ONE, "rmi", 7.06422424, 0.0214520918, 5.67316383e-05),
    Case(TWO, "cross-entropy", 4.24544096, 0.00844719535, 7.66977610e-06),
    Case(TWO, "image-weighted", 8.48909187, 0.0168957765, 1.54759873e-05),
    Case(TWO, "rmi", 6.10421562, 0.0149875796, 2.83680820e-05),
    Case(ODD, "cross-entropy", 3.94436669, 0.0139586811, 2.15912096e-05),
    Case(ODD, "image-weighted", 3.95551419, 0.0139705054, 2.16559001e-05),
    Case(ODD, "rmi", 0.65163994, 0.0258547295, 7.95558153e-05),
    Case(KNOWN, "cross-entropy", 0.51333195, 0.00330915340, 2.40675405e-07),
    Case(KNOWN, "image-weighted", 0.51534986, 0.00332261737, 2.38152850e-07),
    Case(KNOWN, "rmi", 13.7848186, 0.0299348047, -7.98704132e-05),
]
PARTS_OF_RMI = {  # binary cross-entropy, region term
    ONE: (31.6413803, -17.5129318),
    TWO: (29.7423515, -17.5339203),
    ODD: (31.8171120, -30.5138323),
    KNOWN: (19.4534340, 8.11620331),
}
SECTIONS = {ONE: "n1_h64_w128", TWO: "n2_h64_w128", ODD: "n1_h61_w93", KNOWN: "correlated_h96_w160"}


def given(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    label = label_by_formula(*shape)
    return (logits_that_know_the_label(label) if shape == KNOWN else logits_by_formula(*shape)), label


def by_crop(recorded: float, label: Tensor) -> float:
    """What the reference gives on GPUs with one crop each, from what it gave for all of them on one GPU.

    There the binary cross-entropy was divided by the pixels of all crops + 1. All crops have equally many.
    """
    pixels = (label != 255).sum(dim=(1, 2)).unique().item()
    return recorded * (len(label) * pixels + 1) / (len(label) * (pixels + 1))


def value_and_gradient(loss: Loss, logits: Tensor, label: Tensor) -> tuple[float, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, label)
    value.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return value.item(), leaf.grad


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.loss}, {'x'.join(map(str, case.shape))}")
def test_value_and_gradient_of_a_loss_equal_the_references(case: Case) -> None:
    logits, label = given(case.shape)
    value, gradient = value_and_gradient(FORMULAS[case.loss].joint, logits, label)
    expected, divisor = case.value, case.shape[0] if case.loss == "image-weighted" else 1
    if case.loss == "rmi":
        pixels = PARTS_OF_RMI[case.shape][0]
        expected += 0.5 * (by_crop(pixels, label) - pixels)
    assert value == pytest.approx(expected / divisor, rel=1e-4)
    assert gradient.double().norm().item() == pytest.approx(case.gradient / divisor, rel=1e-2)
    assert gradient[0, 5, 20, 30].item() == pytest.approx(case.pixel / divisor, rel=1e-2)
    assert not gradient[label.unsqueeze(1).expand_as(gradient) == 255].any()  # ignored pixels pull at nothing


@pytest.mark.parametrize("shape", PARTS_OF_RMI, ids=lambda shape: "x".join(map(str, shape)))
def test_both_parts_of_rmi_are_the_references(shape: tuple[int, int, int]) -> None:
    logits, label = given(shape)
    pixels = binary_cross_entropy(logits, label).item()
    regions = 2 * region_mutual_information(logits, label).item() - pixels
    recorded_pixels, recorded_regions = PARTS_OF_RMI[shape]
    assert (pixels, regions) == pytest.approx((by_crop(recorded_pixels, label), recorded_regions), rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "value"),
    [("cross-entropy", 3.59973431), ("balanced", 3.59973431), ("image-weighted", 3.59973431), ("rmi", -19.2931366)],
)
def test_a_crop_of_one_class_only_is_fine(loss: str, value: float) -> None:
    label = torch.full((1, 64, 128), 3)
    found, gradient = value_and_gradient(FORMULAS[loss].joint, logits_by_formula(1, 64, 128), label)
    assert found == pytest.approx(value, rel=1e-4)
    assert gradient.isfinite().all() and gradient.any()


@recorded
def test_the_numbers_above_are_the_recorded_ones() -> None:
    """And the crops of one class and of none give what the reference gave, or 0 where that was not a number."""
    golden = json.loads((REFERENCE / "losses_unit.json").read_text())
    for case in CASES:
        found = golden[SECTIONS[case.shape]][RECORDED_AS[case.loss]]
        expected = (found["value"], found["grad_l2_norm"], found["grad_at_0_5_20_30"])
        assert case[2:] == pytest.approx(expected, rel=1e-7)
    for shape, parts in PARTS_OF_RMI.items():
        found = golden[SECTIONS[shape]]["rmi"]
        assert parts == pytest.approx((found["bce"], found["rmi_lower_bound"]), rel=1e-7)
    for section, class_id in (("single_class_3_h64_w128", 3), ("all_ignored_h64_w128", 255)):
        for name, key in RECORDED_AS.items():
            value = FORMULAS[name].joint(logits_by_formula(1, 64, 128), torch.full((1, 64, 128), class_id)).item()
            assert value == (0 if golden[section][key] == "nan" else pytest.approx(golden[section][key], rel=1e-4))


# --- the same meaning -------------------------------------------------------------------------------------------------


def surprises(logits: Tensor, label: Tensor, image: int) -> list[tuple[int, float]]:
    """Class and cross-entropy of every valid pixel of an image, one by one."""
    found = []
    for y, x in np.ndindex(*label.shape[1:]):
        if label[image, y, x] != 255:
            scores = logits[image, :, y, x].double().numpy()
            class_id = int(label[image, y, x])
            found.append((class_id, float(np.log(np.exp(scores).sum()) - scores[class_id])))
    return found


@pytest.fixture
def tiny() -> tuple[Tensor, Tensor]:
    """Two images of 9 x 14 pixels and 4 classes, of which class 2 does not occur; many pixels are ignored."""
    dice = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 4, 9, 14, generator=dice, dtype=torch.float64)
    label = torch.tensor([0, 1, 3, 255])[torch.randint(4, (2, 9, 14), generator=dice)]
    label[0, :5] = 1
    return logits, label


def test_cross_entropy_is_the_mean_over_valid_pixels(tiny: tuple[Tensor, Tensor]) -> None:
    values = [s for image in (0, 1) for _, s in surprises(*tiny, image)]
    assert 0 < len(values) < 2 * 9 * 14
    assert cross_entropy(*tiny).item() == pytest.approx(np.mean(values), rel=1e-12)


def test_balanced_is_a_mean_in_which_classes_count_by_the_roots_of_their_pixels(tiny: tuple[Tensor, Tensor]) -> None:
    logits, label = tiny
    found = surprises(logits, label, 0) + surprises(logits, label, 1)
    pixels = {k: int((label == k).sum()) for k in (0, 1, 3)}
    expected = sum(s / math.sqrt(pixels[k]) for k, s in found) / sum(math.sqrt(n) for n in pixels.values())
    assert balanced_cross_entropy(logits, label).item() == pytest.approx(expected, rel=1e-12)


def test_image_weighted_is_the_mean_over_images_of_means_in_which_rare_classes_weigh_more(
    tiny: tuple[Tensor, Tensor],
) -> None:
    logits, label = tiny
    valid = int((label != 255).sum())
    weight_of = {k: 2 - int((label == k).sum()) / valid for k in (0, 1, 3)}
    means = []
    for image in (0, 1):
        found = surprises(logits, label, image)
        means.append(sum(weight_of[k] * s for k, s in found) / sum(weight_of[k] for k, _ in found))
    assert image_weighted_cross_entropy(logits, label).item() == pytest.approx(np.mean(means), rel=1e-12)


@pytest.mark.parametrize("loss", [binary_cross_entropy, region_mutual_information])
def test_every_crop_counts_alike_however_little_of_it_is_labelled(loss: Loss, tiny: tuple[Tensor, Tensor]) -> None:
    """As on GPUs with one crop each. Divided by the pixels of all, a crop that is nearly void would hardly count."""
    logits, label = tiny
    label[1, 1:] = 255
    alone = [loss(logits[i : i + 1], label[i : i + 1]).item() for i in (0, 1)]
    assert loss(logits, label).item() == pytest.approx(np.mean(alone), rel=1e-12)
    assert alone[0] != pytest.approx(alone[1], rel=0.01)


def pooled(maps: NDArray[np.float64]) -> NDArray[np.float64]:
    """(h, w) -> means of 4 x 4 squares; the first begins two pixels outside, where everything is 0."""
    around = np.pad(maps, 2)
    rows, columns = (side // 4 for side in around.shape)
    return np.array(
        [[around[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean() for j in range(columns)] for i in range(rows)]
    )


def regions(maps: NDArray[np.float64]) -> NDArray[np.float64]:
    """(h, w) -> (9, regions): the 3 x 3 squares, less the mean square."""
    rows, columns = maps.shape
    squares = [maps[i : i + 3, j : j + 3].ravel() for i in range(rows - 2) for j in range(columns - 2)]
    return np.array(squares).T - np.mean(squares, axis=0)[:, None]


def test_rmi_is_what_the_paper_writes(tiny: tuple[Tensor, Tensor]) -> None:
    """Written down once more, class by class, with an inverse and a determinant."""
    logits, label = (t.repeat_interleave(2, dim=-2) for t in tiny)
    valid = (label != 255).numpy()
    uncertainty, surprise = 0.0, 0.0  # means over the two images
    for image, k in np.ndindex(2, 4):
        probability = 1 / (1 + np.exp(-logits[image, k].numpy()))
        truth = (label[image] == k).numpy().astype(np.float64)
        logs = np.log(np.where(truth == 1, probability, 1 - probability)) * valid[image]
        surprise -= logs.sum() / (valid[image].sum() + 1) / 2
        t, p = regions(pooled(truth)), regions(pooled(probability * valid[image] + 1e-6))
        remains = t @ t.T - t @ p.T @ np.linalg.inv(p @ p.T + RIDGE * np.eye(9)) @ p @ t.T
        uncertainty += 0.5 * np.log(np.linalg.det(remains + RIDGE * np.eye(9))) / 9 / 2
    assert binary_cross_entropy(logits, label).item() == pytest.approx(surprise, rel=1e-12)
    assert region_mutual_information(logits, label).item() == pytest.approx((surprise + uncertainty) / 2, rel=1e-9)


def test_the_region_term_rewards_a_prediction_that_follows_the_shapes_of_the_label() -> None:
    """Against one that is as sure, of as many pixels, in another place."""
    label = torch.zeros(1, 48, 48, dtype=torch.long)
    label[:, 10:30, 8:24] = 1
    there = torch.stack([label == 0, label == 1], dim=1).double()

    def region_term(logits: Tensor) -> float:
        return 2 * region_mutual_information(logits, label).item() - binary_cross_entropy(logits, label).item()

    assert region_term(there) < region_term(there.roll(20, dims=-1)) - 1


@pytest.mark.parametrize(
    "loss",
    [
        cross_entropy,
        balanced_cross_entropy,
        image_weighted_cross_entropy,
        binary_cross_entropy,
        region_mutual_information,
    ],
)
def test_gradients_equal_finite_differences_of_the_loss(loss: Loss, tiny: tuple[Tensor, Tensor]) -> None:
    logits, label = tiny
    assert torch.autograd.gradcheck(lambda z: loss(z, label), logits.requires_grad_())


# --- crops at the edge ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "value"), [("cross-entropy", 0), ("balanced", 0), ("image-weighted", 0), ("rmi", None)]
)
def test_a_batch_without_a_single_label_moves_nothing(loss: str, value: float | None) -> None:
    """Region mutual information then says how much the ridge alone leaves uncertain: a constant."""
    expected = 0.5 * CLASSES * 0.5 * math.log(RIDGE) if value is None else value
    label = torch.full((2, 64, 128), 255)
    found, gradient = value_and_gradient(FORMULAS[loss].joint, logits_by_formula(2, 64, 128), label)
    assert found == pytest.approx(expected, rel=1e-5)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(
    ("loss", "share"),
    [(cross_entropy, 1), (balanced_cross_entropy, 1), (image_weighted_cross_entropy, 0.5), (binary_cross_entropy, 0.5)],
)
def test_an_image_without_a_label_adds_nothing_and_counts_as_a_crop_where_crops_are_averaged(
    loss: Loss, share: float
) -> None:
    logits, label = given(TWO)
    label[1] = 255
    assert loss(logits, label).item() == pytest.approx(share * loss(logits[:1], label[:1]).item(), rel=1e-6)


def test_a_crop_too_small_for_a_region_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^a crop of 7x40 pixels holds no region: rmi needs 8x8 or more$"):
        region_mutual_information(torch.zeros(1, 2, 7, 40), torch.zeros(1, 7, 40, dtype=torch.long))
    assert region_mutual_information(torch.zeros(1, 2, 8, 8), torch.zeros(1, 8, 8, dtype=torch.long)).isfinite()


@pytest.mark.parametrize("factor", [30.0, 1e4, 1e30], ids=lambda f: f"{f:g}")
def test_a_network_that_is_quite_sure_gets_a_finite_rmi_whether_right_or_wrong(factor: float) -> None:
    """Its probabilities are 0 and 1 throughout: every covariance is singular but for the ridge."""
    label = label_by_formula(1, 96, 160)
    right = (label.unsqueeze(1) == torch.arange(CLASSES)[:, None, None]) * 2.0 - 1
    for logits in (factor * right, -factor * right):
        value, gradient = value_and_gradient(region_mutual_information, logits, label)
        assert math.isfinite(value)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_network_that_diverged_gives_a_loss_that_says_so(loss: str, broken: float) -> None:
    """And not an error from the depths of linear algebra: the training stops by itself, with advice."""
    logits, label = given(ONE)
    logits[0, int(label[0, 30, 40]), 30, 40] = broken
    assert not FORMULAS[loss].joint(logits, label).isfinite()


# --- mixed precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", [*(pair.joint for pair in FORMULAS.values()), binary_cross_entropy])
def test_a_loss_is_computed_in_full_precision_whatever_its_logits_and_surroundings(
    loss: Loss, dtype: torch.dtype
) -> None:
    logits, label = given(KNOWN)
    logits = logits.to(dtype)
    expected, gradient = value_and_gradient(loss, logits.float(), label)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, gradient_inside = value_and_gradient(loss, logits, label)
    outside, gradient_outside = value_and_gradient(loss, logits, label)
    assert inside == outside == expected
    assert torch.equal(gradient_inside, gradient.to(dtype))
    assert torch.equal(gradient_outside, gradient.to(dtype))


# --- all outputs of a network -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "joint", "others"),
    [
        ("cross-entropy", cross_entropy, cross_entropy),
        ("image-weighted", image_weighted_cross_entropy, image_weighted_cross_entropy),
        ("rmi", region_mutual_information, binary_cross_entropy),
    ],
)
def test_every_output_counts_with_its_weight(name: str, joint: Loss, others: Loss) -> None:
    torch.manual_seed(0)
    a, b, c, d = (torch.randn(2, 4, 24, 32) for _ in range(4))
    label = torch.randint(0, 4, (2, 24, 32))
    label[0, 3:9] = 255
    expected = joint(a, label) + 0.4 * others(b, label) + 0.05 * others(c, label) + 0.05 * others(d, label)
    torch.testing.assert_close(segmentation_loss(name, TrainingOutput(a, b, (c, d)), label=label), expected)
    assert torch.equal(segmentation_loss(name, TrainingOutput(a, None, ()), label=label), joint(a, label))
    alone = segmentation_loss(name, TrainingOutput(a, None, (c, d)), label=label, scale_weight=0)
    assert torch.equal(alone, joint(a, label))


class Trained(NamedTuple):
    """The full network after one forward pass in training mode, with batch norm and dropout as in prediction."""

    parameters: dict[str, nn.Parameter]
    output: TrainingOutput
    label: Tensor


@pytest.fixture(scope="module")
def trained() -> Trained:
    fill = runpy.run_path(str(REFERENCE / "fill_weights.py"))["fill_module"]
    network = fill(build("hrnet48_ocr_mscale", CLASSES)).train()
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.modules.dropout._DropoutNd)):
            module.eval()
    pixels = np.array(Image.open(REFERENCE / "input_512x256.png").convert("RGB"))
    label = torch.from_numpy(np.array(Image.open(REFERENCE / "label_512x256.png"))).long()[None]
    output = network(normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None]))
    return Trained(dict(network.named_parameters()), output, label)


def published_bce(logits: Tensor, label: Tensor) -> Tensor:
    valid = label != 255
    truth = torch.zeros_like(logits).scatter_(1, label.where(valid, 0).unsqueeze(1), 1.0) * valid.unsqueeze(1)
    each = F.softplus(logits) - truth * logits  # -log of the probability given to yes or no
    return (each * valid.unsqueeze(1)).sum() / (valid.sum() + 1)


def published_rmi(logits: Tensor, label: Tensor) -> Tensor:
    valid = (label != 255).unsqueeze(1)
    truth = torch.zeros_like(logits).scatter_(1, label.where(valid[:, 0], 0).unsqueeze(1), 1.0) * valid
    maps = [F.avg_pool2d(m, 4, stride=4, padding=2).double() for m in (truth, logits.sigmoid() * valid + 1e-6)]
    height, width = (side - 2 for side in maps[0].shape[-2:])
    t, p = (
        torch.stack([m[..., y : y + height, x : x + width] for y in range(3) for x in range(3)], 2).flatten(3)
        for m in maps
    )
    t, p = t - t.mean(3, keepdim=True), p - p.mean(3, keepdim=True)
    ridge = RIDGE * torch.eye(9, dtype=torch.float64)
    rest = t @ t.mT - t @ p.mT @ torch.inverse(p @ p.mT + ridge) @ (t @ p.mT).mT
    log_det = 2 * torch.linalg.cholesky(rest + ridge).diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return 0.5 * published_bce(logits, label) + 0.5 * (0.5 * log_det.mean(0) / 9).sum().float()


def published_step(network: SegmentationNet, images: Tensor, label: Tensor) -> Tensor:
    """The published two-scale training step, in plain torch: every map goes to the size of its input at once."""

    def look(pixels: Tensor) -> list[Tensor]:
        now, head = network.predict(pixels), network.scale_attn
        assert isinstance(head, Hierarchical) and now.aux is not None
        hidden = F.relu(head.bn0(head.conv0(now.features)))
        trust = head.conv2(F.relu(head.bn1(head.conv1(hidden)))).sigmoid()
        return [F.interpolate(m, pixels.shape[-2:], mode="bilinear") for m in (now.logits, now.aux, trust)]

    low, aux_low, trust = look(F.interpolate(images, scale_factor=0.5, mode="bilinear", recompute_scale_factor=True))
    high, aux_high, _ = look(images)

    def enlarged(maps: Tensor) -> Tensor:
        return F.interpolate(maps, images.shape[-2:], mode="bilinear")

    joint = enlarged(trust * low) + (1 - enlarged(trust)) * high
    aux = enlarged(trust * aux_low) + (1 - enlarged(trust)) * aux_high
    alone = published_bce(enlarged(low), label) + published_bce(high, label)
    return 0.4 * published_bce(aux, label) + published_rmi(joint, label) + 0.05 * alone


def test_a_training_step_with_one_crop_a_gpu_is_the_published_one() -> None:
    """Loss, gradients and running statistics of two GPUs with a crop each, written down once more.

    Batch norm does not span the two here; in both it is made to take each crop by itself.
    """
    torch.manual_seed(0)
    network = build("hrnet18s_ocr_mscale", CLASSES).train()
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    twin = copy.deepcopy(network)
    images, label = torch.randn(2, 3, 128, 160), label_by_formula(2, 128, 160)
    label[1, 20:] = 255  # of the second crop hardly anything is labelled
    whole, total = BatchCounts.of(label), 0.0
    for n in (0, 1):
        output = network(images[n : n + 1])
        loss = segmentation_loss("rmi", output, label=label[n : n + 1], whole=whole)
        expected = published_step(twin, images[n : n + 1], label[n : n + 1]) / 2  # gradients are averaged over GPUs
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        loss.backward()  # type: ignore[no-untyped-call]
        expected.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    assert abs(total) > 1
    for (name, p), q in zip(network.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert (p.grad - q.grad).norm() <= 1e-3 * q.grad.norm() + 1e-6, name  # a bias before a batch norm gets 0
    for (name, found), wanted in zip(network.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.thorough
@recorded
@pytest.mark.parametrize("name", RECORDED_AS)
def test_the_full_network_is_pulled_as_the_reference_pulled_it(name: str, trained: Trained) -> None:
    golden = json.loads((REFERENCE / "losses_HRNet_Mscale_512x256.json").read_text())[RECORDED_AS[name]]
    parameters, output, label = trained
    assert output.aux is not None
    low, high = output.scales
    joint, others = FORMULAS[name]
    outputs = {"aux": output.aux, "low_0.5x": low, "high_1.0x": high}
    terms = {"joint": joint(output.joint, label)} | {key: others(logits, label) for key, logits in outputs.items()}
    for key, value in terms.items():
        assert value.item() == pytest.approx(golden["terms"][key]["value"], rel=1e-4), key
    total = segmentation_loss(name, output, label=label)
    assert total.item() == pytest.approx(golden["total"], rel=1e-4)
    gradients = torch.autograd.grad(total, list(parameters.values()), retain_graph=True)
    norms = {key: g.double().norm().item() for key, g in zip(parameters, gradients, strict=True)}
    for key, norm in golden["grad_l2_norm"].items():
        assert norms[key] == pytest.approx(norm, rel=1e-2), key
    assert math.hypot(*norms.values()) == pytest.approx(golden["grad_l2_norm_all"], rel=1e-2)


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_command_offers_the_losses_that_there_are() -> None:
    options = {option.name: option for option in main.commands["train"].params}
    assert list(cast(Choice[str], options["loss"].type).choices) == list(LOSSES)


@pytest.mark.thorough
@pytest.mark.parametrize("name", LOSSES)
def test_a_few_steps_lower_each_loss(name: str, city: Path, tmp_path: Path) -> None:
    asked = ("train", city / "fine.parquet", "--val", city / "val.parquet", "--out", tmp_path)
    result = autolabel(*asked, "--loss", name, "--steps", 12, "--batch-size", 2, "--crop", "64x128", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "train.json").read_text())["loss"] == name
    losses = [step.loss for step in read_metrics(tmp_path)]
    first, last = np.mean(losses[:4]), np.mean(losses[-4:])
    assert last < first - 0.2 * abs(first)  # rmi begins below 0: classes that do not occur are easily known
