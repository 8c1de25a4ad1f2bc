"""Nothing of the way over a GPU may meet its first error on a GPU: every network goes through it on pretended tensors.

They have the real sizes and types, but no numbers: devices, types, element counts, copies and launches are exact. What
the numbers would be is tested elsewhere, with the same functions on the CPU.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from pretended import Copy, HostWaits, PretendedGPU, Record
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError
from weighed import drawn_factors, drawn_places

from autolabel.teacher import fold
from autolabel.teacher.around import Ensemble, ForeignNetwork, MappedNetwork
from autolabel.teacher.fold import cast_convolutions, fold_batch_norm
from autolabel.teacher.model import Gives, Model
from autolabel.teacher.networks.build import ARCHITECTURES, COMBINATIONS, build
from autolabel.teacher.predict import Teacher

SIZE, CLASSES, CUDA = (1024, 2048), 19, torch.device("cuda")
EVIDENCE = drawn_factors(CLASSES)
SCALES = (0.5, 1.0, 2.0)


# --- the measure ------------------------------------------------------------------------------------------------------


def test_copies_launches_types_and_sizes_are_recorded() -> None:
    with PretendedGPU() as gpu, gpu.recorded() as record:
        host = torch.empty(4, 5, dtype=torch.uint8, pin_memory=True)
        x = host.to("cuda", non_blocking=True).float()
        y = (x[:, None, 1:3] @ torch.ones(2, 7, device="cuda")).view(28).half()
        result = y.cpu().numpy()
        torch.cuda.current_stream().synchronize()
    assert (result.shape, result.dtype) == ((28,), np.float16)
    assert record.launched == {"_to_copy": 2, "ones": 1, "mm": 1}
    assert record.outputs["mm"] == {torch.float32}
    assert record.largest == (28, "mm")
    assert (record.into, record.out) == ([Copy(20, pinned=True, waited=False)], [Copy(56, pinned=False, waited=True)])
    assert record.waits == 1


def test_whatever_makes_the_host_wait_is_refused() -> None:
    with PretendedGPU():
        x = torch.zeros(3, 4, device="cuda")
        for wait in (
            lambda: x.sum().item(),
            lambda: float(x.sum()),
            lambda: bool((x > 0).all()),
            lambda: x.nonzero(),
            lambda: x[x > 0],
            lambda: torch.bincount(x.view(-1).long()),
        ):
            with pytest.raises(HostWaits, match="makes the host wait for the device"):
                wait()


def test_tensors_of_two_devices_do_not_mix() -> None:
    with PretendedGPU(), pytest.raises(FakeTensorDeviceMismatchError):
        torch.zeros(3, device="cuda") + torch.zeros(3)


# --- every network ----------------------------------------------------------------------------------------------------


def teacher_on_gpu(arch: str, precision: str = "bfloat16") -> Teacher:
    network = build(arch, CLASSES)
    with patch.object(fold, "_fold", _folded):
        fold_batch_norm(network)
    cast_convolutions(network, precision, device="cuda")
    return Teacher(network, device="cuda", precision=precision)


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Only the form of a folded convolution: there are no numbers, and to compute them takes half of the time."""
    conv.bias = nn.Parameter(norm.bias.detach(), requires_grad=False)


def predicted(gpu: PretendedGPU, teacher: Teacher, *, size: tuple[int, int] = SIZE, **options: Any) -> Record:
    """What happens while the planned batch is labelled at three scales; predictions and copies are as they should."""
    batch = teacher.planned_batch(size, scales=SCALES)
    images, edges = np.zeros((batch, *size, 3), np.uint8), options.pop("edges", (0.5, 0.9))
    with gpu.recorded() as record:
        predictions = list(teacher.predict_in_batches(images, batch, edges=edges, scales=SCALES, **options))
    assert len(predictions) == batch
    for prediction in predictions:
        assert (prediction.codes.shape, prediction.codes.dtype) == (size, np.uint8 if len(edges) < 13 else np.int16)
        assert (prediction.histogram.shape, prediction.histogram.dtype) == ((CLASSES, 20), np.int64)
        assert (prediction.confidence.shape, prediction.confidence.dtype) == ((CLASSES,), np.float64)
    pixels, tables = batch * size[0] * size[1], batch * CLASSES * (20 + 1) * 8
    channels = 5 if "evidence" in options else 3  # a place has two bytes
    assert record.into == [Copy(channels * pixels, pinned=True, waited=False)]
    assert record.out == [Copy(sum(p.codes.nbytes for p in predictions) + tables, pinned=True, waited=False)]
    assert record.waits == 1
    assert_sound(record, getattr(torch, teacher.precision))
    return record


def assert_sound(record: Record, precision: torch.dtype) -> None:
    """Products in the precision, probabilities in float32, sums in float64, no tensor of 2^31 elements."""
    assert record.inputs["convolution"] == {precision}
    assert record.inputs["relu_"] <= {precision}  # what is resized on the way is no wider
    assert record.inputs["exp_"] == record.inputs["reciprocal_"] == {torch.float32}
    assert record.outputs["index_add_"] == {torch.int32, torch.float64}
    assert record.largest[0] < 2**31


# --- models of other libraries ----------------------------------------------------------------------------------------


class Foreign(Model):
    """A network of two layers, at a quarter of the resolution."""

    def __init__(self, gives: Gives = "logits", classes: int = CLASSES) -> None:
        self.gives, self.classes = gives, tuple(f"class {number}" for number in range(classes))
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 7, 4, 3), nn.ReLU(True), nn.Conv2d(8, classes, 1)).to("cuda")

    def predict(self, images: Tensor) -> Tensor:
        scores = self.layers(images.float() / 255)
        return {"logits": scores, "probabilities": scores.sigmoid(), "ids": scores.argmax(dim=1)}[self.gives]


def foreign(gives: Gives = "logits", classes: int = CLASSES, window: tuple[int, int] | None = None) -> ForeignNetwork:
    return ForeignNetwork(Foreign(gives, classes), name="foreign", window=window)


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (lambda: foreign(), {"flip": True}),
        (lambda: foreign(window=(512, 512)), {"scales": (1.0,)}),
        (lambda: foreign("probabilities"), {"evidence": EVIDENCE, "temperature": 1.5}),
        (lambda: foreign("ids"), {"scales": (1.0,)}),
        (lambda: MappedNetwork(foreign(classes=150), [c % 20 for c in range(150)], classes=19, device=CUDA), {}),
        (lambda: Ensemble([foreign(), foreign("probabilities")]), {"evidence": EVIDENCE}),
    ],
    ids=["scales and flip", "windows", "probabilities", "ids", "class map", "ensemble"],
)
def test_a_model_of_another_library_labels_on_a_gpu(network: Any, options: dict[str, Any]) -> None:
    """One copy in, one out, one wait, whatever lies around the model."""
    options = {"scales": SCALES, **options}
    places = [drawn_places(SIZE, CLASSES)] if "evidence" in options else []
    with PretendedGPU() as gpu:
        teacher = Teacher(network(), device="cuda", precision="bfloat16")
        if "evidence" in options:
            teacher.feed.factors(options["evidence"])  # copied once
        with gpu.recorded() as record:
            (one,) = teacher.predict_in_batches(
                [np.zeros((*SIZE, 3), np.uint8)], 1, edges=(0.5,), places=places, **options
            )
    assert (one.codes.shape, one.codes.dtype) == (SIZE, np.uint8)
    assert [copy.pinned for copy in record.into + record.out] == [True, True]
    assert record.waits == 1
    assert record.inputs["convolution"] == {torch.bfloat16}
    assert record.largest[0] < 2**31


NETWORKS = sorted({(pieces.trunk, pieces.decoder) for pieces in ARCHITECTURES.values()})


@pytest.mark.thorough
@pytest.mark.parametrize(("trunk", "decoder"), NETWORKS)
def test_every_trunk_and_decoder_labels_on_a_gpu(trunk: str, decoder: str) -> None:
    """With one combination, which asks for logits and features as the others do.

    The paper's network launched 4,811 kernels: autocast cast the weights anew for every image (1,908), and computed in
    float32 what had been resized (396).
    """
    with PretendedGPU() as gpu:
        record = predicted(gpu, teacher_on_gpu(f"{trunk}_{decoder}_mscale"))
    if (trunk, decoder) == ("hrnet48", "ocr"):
        assert record.launches < 3000  # 2,507


@pytest.mark.thorough
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_every_combination_labels_on_a_gpu_with_flip_and_evidence(combination: str) -> None:
    """With one trunk: a combination sees nothing of it but logits and features, of one type in all of them.

    A flip runs everything twice, and evidence adds a term to the logits; neither knows of the other.
    """
    arch = "_".join(filter(None, ("hrnet18s_ocr", combination)))
    places = [drawn_places(SIZE, CLASSES)]
    with PretendedGPU() as gpu:
        teacher = teacher_on_gpu(arch)
        teacher.feed.factors(EVIDENCE)  # copied once
        predicted(gpu, teacher)
        predicted(gpu, teacher, flip=True, evidence=EVIDENCE, places=places, temperature=1.5)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("size", "batch", "options"),
    [
        pytest.param((1500, 4096), 1, {}, id="several bands"),
        pytest.param((1024, 1024), 2, {"flip": True}, id="a batch of two"),
        pytest.param((250, 333), 8, {"edges": tuple(k / 32 for k in range(1, 32))}, id="eight odd ones, two bytes"),
    ],
)
def test_every_size_of_batch_and_band_labels_on_a_gpu_in_float32(
    size: tuple[int, int], batch: int, options: dict[str, Any]
) -> None:
    with PretendedGPU() as gpu:
        teacher = teacher_on_gpu("efficientnet_lite0_ocr_mscale", "float32")
        assert teacher.planned_batch(size) == batch
        bands = predicted(gpu, teacher, size=size, **options).launched["exp_"]
    assert bands == (2 if size == (1500, 4096) else 1)


@pytest.mark.thorough
@pytest.mark.parametrize("arch", ["hrnet18s_ocr_mscale", "efficientnet_lite0_aspp", "resnet50_deeplabv3plus_mscale"])
def test_a_focus_labels_on_a_gpu_without_waiting_for_where_to_look(arch: str) -> None:
    with PretendedGPU() as gpu:
        teacher = teacher_on_gpu(arch)
        images = np.zeros((2, *SIZE, 3), np.uint8)
        swings = np.ones((2, CLASSES), np.float32)
        how = {"edges": (0.5, 0.9), "scales": SCALES, "flip": True, "focus": 0.25, "swings": swings}
        list(teacher.predict_in_batches(images, 2, **how))  # the swings are copied there once
        with gpu.recorded() as record:
            first, _ = teacher.predict_in_batches(images, 2, **how)
    assert first.least is not None
    assert (first.codes.shape, first.least.shape, len(first.seen or ())) == (SIZE, SIZE, 2)
    pixels, tables = 2 * SIZE[0] * SIZE[1], 2 * CLASSES * (20 + 1) * 8
    assert record.into == [Copy(3 * pixels, pinned=True, waited=False)]
    assert record.out == [Copy(2 * pixels + tables + 2 * 2 * 4, pinned=True, waited=False)]
    assert record.waits == 1
    assert_sound(record, torch.bfloat16)


@pytest.mark.thorough
def test_a_last_batch_goes_in_full_and_comes_back_without_its_filling() -> None:
    images = np.zeros((11, 128, 256, 3), np.uint8)
    with PretendedGPU() as gpu:
        teacher = teacher_on_gpu("hrnet18s_ocr_mscale")
        teacher.budget(scales=(1.0,))  # measured once, with an image of its own
        with gpu.recorded() as record:
            labels, statistics = teacher.label(images, scales=(1.0,))
    assert (labels.shape, len(statistics)) == ((11, 128, 256), 11)
    assert [copy.bytes for copy in record.into] == [8 * 128 * 256 * 3] * 2
    assert [copy.bytes for copy in record.out] == [n * (128 * 256 + CLASSES * 21 * 8) for n in (8, 3)]
