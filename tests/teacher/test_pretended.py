"""Nothing of the way over a GPU may meet its first error on a GPU: every network goes through it on pretended tensors.

They have the real sizes and types, but no numbers: devices, types, element counts, copies and launches are exact. What
the numbers would be is tested elsewhere, with the same functions on the CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pretended import Copy, HostWaits, PretendedGPU, Record
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

from autolabel.teacher.decide import Prediction
from autolabel.teacher.fold import cast_convolutions, fold_batch_norm
from autolabel.teacher.networks.build import ARCHITECTURES, COMBINATIONS, build
from autolabel.teacher.predict import Teacher

HEIGHT, WIDTH, CLASSES = 1024, 2048, 19
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
    fold_batch_norm(network)
    cast_convolutions(network, precision, device="cuda")
    return Teacher(network, device="cuda", precision=precision)


def predicted(gpu: PretendedGPU, teacher: Teacher, *, batch: int = 1, **options: Any) -> Record:
    """What happens while a full batch is labelled, all scales included; the predictions have the right form."""
    images = np.zeros((batch, HEIGHT, WIDTH, 3), np.uint8)
    with gpu.recorded() as record:
        predictions = list(teacher.predict_in_batches(images, batch, edges=(0.5, 0.9), scales=SCALES, **options))
    assert len(predictions) == batch
    for prediction in predictions:
        assert_formed(prediction)
    return record


def assert_formed(prediction: Prediction) -> None:
    assert (prediction.codes.shape, prediction.codes.dtype) == ((HEIGHT, WIDTH), np.uint8)
    assert (prediction.histogram.shape, prediction.histogram.dtype) == ((CLASSES, 20), np.int64)
    assert (prediction.confidence.shape, prediction.confidence.dtype) == ((CLASSES,), np.float64)


def assert_one_way_in_and_one_out(record: Record, *, channels: int = 3, batch: int = 1) -> None:
    """One copy each way, from and to page-locked memory, and the host waits once."""
    pixels, tables = batch * HEIGHT * WIDTH, batch * CLASSES * (20 + 1) * 8
    assert record.into == [Copy(channels * pixels, pinned=True, waited=False)]
    assert record.out == [Copy(pixels + tables, pinned=True, waited=False)]
    assert record.waits == 1


def assert_sound(record: Record, precision: str = "bfloat16") -> None:
    """Products in the precision, probabilities in float32, sums in float64, no tensor of 2^31 elements."""
    assert record.inputs["convolution"] == {getattr(torch, precision)}
    assert record.outputs["exp_"] == record.outputs["reciprocal_"] == {torch.float32}
    assert record.outputs["index_add_"] == {torch.int32, torch.float64}
    assert torch.float64 not in record.inputs["convolution"] | record.inputs["upsample_bilinear2d"]
    assert record.largest[0] < 2**31


NETWORKS = sorted({(pieces.trunk, pieces.decoder) for pieces in ARCHITECTURES.values()})


@pytest.mark.thorough
@pytest.mark.parametrize(("trunk", "decoder"), NETWORKS)
def test_every_trunk_and_decoder_labels_on_a_gpu(trunk: str, decoder: str) -> None:
    """With one combination, which asks for logits and features as the others do.

    Autocast would cast the weights of the paper's network anew for every image: 1,908 launches more.
    """
    with PretendedGPU() as gpu:
        record = predicted(gpu, teacher_on_gpu(f"{trunk}_{decoder}_mscale"))
    assert_one_way_in_and_one_out(record)
    assert_sound(record)
    if (trunk, decoder) == ("hrnet48", "ocr"):
        assert record.launches < 3000  # 2,903


@pytest.mark.thorough
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_every_combination_labels_on_a_gpu_with_flip_and_prior(combination: str) -> None:
    """With one trunk: a combination sees nothing of it but logits and features, of one type in all of them."""
    arch = "_".join(filter(None, ("hrnet18s_ocr", combination)))
    prior, coarse = [0.5] * CLASSES, [np.full((HEIGHT, WIDTH), 255, np.uint8)]
    with PretendedGPU() as gpu:
        teacher = teacher_on_gpu(arch)
        for flip, options in ((False, {}), (True, {"prior": prior, "coarse": coarse, "temperature": 1.5})):
            predicted(gpu, teacher, flip=flip, **options)
            record = predicted(gpu, teacher, flip=flip, **options)  # the prior has been copied before
            assert_one_way_in_and_one_out(record, channels=4 if options else 3)
            assert_sound(record)
