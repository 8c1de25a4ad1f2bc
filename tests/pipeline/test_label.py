"""An exception that nobody foresaw, raised by one image, costs that image and not its unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import quarantined, scanned
from PIL import Image
from torch import nn

from autolabel.manifests import storage
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.run.folder import Accounts, Run
from autolabel.manifests.run.shards import DamagedLabel
from autolabel.manifests.samples import Sample
from autolabel.pipeline.job import LabelJob, Portion
from autolabel.pipeline.predictor import Decoded, Refused, TeacherPredictor
from autolabel.pipeline.records import Row
from autolabel.pipeline.rules import Rules
from autolabel.pipeline.run import generate
from autolabel.pipeline.units import Unit
from autolabel.teacher.checkpoints import load_network, read_checkpoint, save_checkpoint
from autolabel.teacher.decide import Prediction
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.predict import Teacher


@pytest.fixture
def job(city: Path, tmp_path: Path, teacher: Path) -> LabelJob:
    """Four images in one unit."""
    (tmp_path / "images").mkdir()
    for k in range(4):
        noise = np.random.default_rng(k).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{k}.png")
    return LabelJob(scanned(city, tmp_path / "images"), teacher, tmp_path / "run", scales=(1.0,))


class Broken(TeacherPredictor):
    """A teacher that raises at the image "2", in one of its steps."""

    def __init__(self, teacher: Teacher, run: Run, step: str, error: Exception) -> None:
        super().__init__(teacher, run.recipe)
        self.step, self.error = step, error

    def decode(self, sample: Sample, unit: Unit, row: Row) -> Decoded | Refused:
        if self.step == "decode" and sample.sample_id == "2":
            raise self.error
        return super().decode(sample, unit, row)

    def predict(self, batch: Sequence[Decoded]) -> list[Prediction]:
        if self.step == "predict" and any(one.row.sample_id == "2" for one in batch):
            raise self.error
        return super().predict(batch)


def label(job: LabelJob, step: str, error: Exception, device: str = "cpu") -> Any:
    def broken(run: Run, device_: str) -> Broken:
        made = Broken(load_teacher(job.teacher, device="cpu", precision="float32"), run, step, error)
        made.device = device
        return made

    return generate(job, predictor=broken)


ERRORS = [
    (KeyError("colour"), "KeyError: there is no 'colour'"),
    (AttributeError("'bytes' object has no attribute 'tag'"), "AttributeError: 'bytes' object has no attribute 'tag'"),
    (ZeroDivisionError(), "an error without words (ZeroDivisionError)"),
]


@pytest.mark.parametrize(("step", "device"), [("decode", "cpu"), ("predict", "cpu"), ("predict", "cuda")])
@pytest.mark.parametrize(("error", "reason"), ERRORS, ids=["KeyError", "AttributeError", "ZeroDivisionError"])
def test_what_one_image_raises_costs_that_image(
    job: LabelJob, step: str, error: Exception, device: str, reason: str
) -> None:
    ended = label(job, step, error, device)
    assert (ended.accounts, ended.failed) == (Accounts(4, 3, 1, 0), {})
    assert quarantined(job.out) == {"2": reason}
    assert label(job, "", error).done == 0  # its file is known, so it is tried again when that changes
    images = job.manifest.parent / "images"
    storage.copy(images / "1.png", images / "2.png")
    assert label(job, "", error).accounts == Accounts(4, 4, 0, 0)


def test_what_is_raised_behind_the_prediction_costs_that_image(job: LabelJob, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = Rules.apply
    calls = iter(range(100))

    def broken(self: Rules, *arguments: Any, **more: Any) -> Any:
        if next(calls) == 1:
            raise IndexError("no such class\nanywhere")
        return apply(self, *arguments, **more)

    monkeypatch.setattr(Rules, "apply", broken)
    ended = generate(job)
    assert (ended.accounts, ended.failed) == (Accounts(4, 3, 1, 0), {})
    assert list(quarantined(job.out).values()) == ["IndexError: no such class anywhere"]


@pytest.mark.parametrize(
    ("error", "device"),
    [
        (OSError(5, "Input/output error"), "cpu"),
        (DamagedLabel("labels.zarr is damaged"), "cpu"),
        (MemoryError(), "cpu"),
        (RuntimeError("CUDA error: device-side assert triggered"), "cuda"),
    ],
    ids=["disk", "run", "memory", "device"],
)
def test_trouble_that_is_no_fault_of_the_image_fails_its_unit(job: LabelJob, error: Exception, device: str) -> None:
    with pytest.raises(type(error)):
        label(job, "predict", error, device)
    assert not list((job.out / "units").glob("*"))
    assert label(job, "", error).accounts == Accounts(4, 4, 0, 0)


@pytest.mark.parametrize("store", ["zarr", "png"])
def test_a_process_that_ends_amid_a_unit_keeps_what_it_has_labelled_where_images_take_long(
    job: LabelJob, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(job, store=store)
    monkeypatch.setattr(storage, "commit_interval", lambda path: 0.0)
    with pytest.raises(MemoryError):
        label(job, "predict", MemoryError())  # at the third of four
    again = label(job, "", MemoryError())
    assert (again.done, again.accounts) == (2, Accounts(4, 4, 0, 0))


@pytest.mark.parametrize(
    ("precision", "advice"),
    [("float16", "give --precision bfloat16 or float32"), ("bfloat16", "")],
)
def test_numbers_too_large_for_float16_cost_their_images_and_the_reason_says_what_to_do(
    job: LabelJob, precision: str, advice: str
) -> None:
    """Logits of a million are infinite in float16, whose largest number is 65504; bfloat16 has them."""
    (place,) = job.teacher.places
    quiet = read_checkpoint(place.path)
    network = load_network(place.path, quiet)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.out_channels == network.classes:
                module.weight.mul_(1e6)
    path = job.manifest.parent / "loud.pt"
    save_checkpoint(path, network, arch=quiet.arch, space=CITYSCAPES)
    ended = generate(replace(job, teacher=path, precision=precision, max_quarantined=1.0, portion=Portion(limit=2)))
    assert (ended.accounts.quarantined, ended.failed) == (2 if advice else 0, {})
    reason = f"the teacher's numbers are too large for float16, and some confidences are none: {advice}"
    assert quarantined(job.out) == ({"0": reason, "1": reason} if advice else {})
