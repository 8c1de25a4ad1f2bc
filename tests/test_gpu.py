"""The first GPU that somebody uses computes other labels than the CPU that all else was tested on, or learns nothing.

`pytest -m gpu` runs these tests there. Most of them also run on a CPU, so that they are no untried code by then.
"""

from __future__ import annotations

import copy
import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import labels_of, photograph, quarantined, scanned
from numpy.typing import NDArray
from PIL import Image
from small_transformers import save
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from weighed import drawn_factors, drawn_places

from autolabel.manifests.cluster import ray_session
from autolabel.manifests.images import read_image
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.policy import SCALES
from autolabel.manifests.recipe import Machine
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import load_manifest
from autolabel.manifests.teachers import TeacherPlace
from autolabel.pipeline.engine import EngineFailed
from autolabel.pipeline.job import LabelJob, Portion
from autolabel.pipeline.run import generate
from autolabel.student.distributed import run_workers
from autolabel.student.evaluate import evaluate
from autolabel.student.job import TrainJob, TrainMachine
from autolabel.student.metrics import read_metrics
from autolabel.student.parallel import Team, synchronised
from autolabel.student.request import TrainRequest
from autolabel.student.steps import StepReport
from autolabel.student.train import _train_in, train
from autolabel.teacher.checkpoints import read_checkpoint
from autolabel.teacher.decide import Prediction
from autolabel.teacher.device import PRECISIONS
from autolabel.teacher.feed import normalise
from autolabel.teacher.foreign.transformers import TransformersModel, load
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.memory import MemoryTaken
from autolabel.teacher.networks.build import build
from autolabel.teacher.networks.decoders import SegmentationNet
from autolabel.teacher.predict import Teacher

pytestmark = pytest.mark.thorough
torch.set_num_threads(1)  # as in labelling: several threads on a CPU may round otherwise

Pixels = NDArray[np.uint8]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
COMBINATIONS = ("hrnet18s_ocr_mscale", "hrnet18s_ocr_mscale2", "hrnet18s_ocr_explicit", "hrnet18s_ocr_explicit_bn",
                "hrnet18s_ocr_explicit_pairs", "hrnet18s_ocr")  # fmt: skip
# Every trunk, and every decoder somewhere.
TRUNKS = ("hrnet48_ocr", "hrnet18s_plain", "efficientnet_lite0_aspp", "resnet50_deeplabv3", "wrn38_deeplabv3plus",
          "xception71_deeper", "efficientnet_b4_deeper")  # fmt: skip
EDGES = (0.5, 0.9)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """A CPU, and a GPU where there is one."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return name


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """A GPU with all of its memory."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.cuda.empty_cache()
    yield torch.device("cuda")
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture(scope="module")
def streets(city: Path) -> Pixels:
    """(10, 96, 192, 3): drawn streets that no teacher has seen."""
    return np.stack([read_image(sample.image) for sample in load_manifest(city / "coarse.parquet").samples])


def lively(arch: str, pixels: Pixels) -> tuple[SegmentationNet, float]:
    """A network whose random weights make many classes win, and the temperature at which it is sure of half of them.

    One pass in training mode gives batch norm the statistics of these images.
    """
    torch.manual_seed(0)
    network = build(arch, 19, scales=3)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
            elif isinstance(module, nn.Conv2d) and module.weight[0].numel() > 1:  # else one class wins everywhere
                module.weight -= module.weight.mean(dim=(1, 2, 3), keepdim=True)
        network.train()(normalise(torch.from_numpy(pixels[:4]).permute(0, 3, 1, 2)))
        network.eval()
        logits = Teacher(network).logits(pixels[0], scales=network.scale_attn.training_scales)
    top = logits.topk(2, dim=0).values
    return network, float((top[0] - top[1]).median())


def predicted(teacher: Teacher, pixels: Pixels, temperature: float, **how: Any) -> list[Prediction]:
    """Predictions in the batches that labelling plans; evidence says something of half of the pixels."""
    places = [drawn_places(pixels.shape[1:3], 19)] * len(pixels)
    batch = teacher.planned_batch(pixels.shape[1:3], scales=how.get("scales", SCALES))
    return list(teacher.predict_in_batches(pixels, batch, edges=EDGES, temperature=temperature, places=places, **how))


def differing(found: Sequence[Prediction], expected: Sequence[Prediction]) -> float:
    """The share of pixels with another top class or level."""
    return float(np.mean([np.mean(one.codes != other.codes) for one, other in zip(found, expected, strict=True)]))


def require_equal(found: Sequence[Prediction], expected: Sequence[Prediction]) -> None:
    """Fail unless two lists of predictions have the same bits."""
    for one, other in zip(found, expected, strict=True):
        assert one.seen == other.seen
        assert np.array_equal(one.codes, other.codes)
        assert np.array_equal(one.histogram, other.histogram)
        assert np.array_equal(one.confidence, other.confidence)


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "arch", "flip", "weighed"),
    [
        ("cpu", "hrnet18s_ocr_mscale", True, True),
        *(
            pytest.param("cuda", *case, marks=pytest.mark.gpu)
            for case in itertools.product(COMBINATIONS, (False, True), (False, True))
        ),
    ],
    indirect=["device"],
)
def test_labels_in_float32_are_those_of_the_cpu(
    device: str, arch: str, flip: bool, weighed: bool, streets: Pixels, record_property: Callable[[str, object], None]
) -> None:
    """Fewer than one pixel in a thousand differs; float32 is float32, or many more would.

    bfloat16 only must not be nonsense: random weights are chaotic. On an H200 12 to 41 % of the codes differed; by the
    codes of other images 90 to 99 % do.
    """
    network, temperature = lively(arch, streets)
    how = {"flip": flip, "evidence": drawn_factors(19) if weighed else None, "own": True}
    expected = predicted(Teacher(copy.deepcopy(network)), streets[:3], temperature, **how)
    kept = float(np.mean([np.mean(one.codes % one.levels > 0) for one in expected]))
    assert 0.05 < kept < 0.995
    found = predicted(Teacher(copy.deepcopy(network), device=device), streets[:3], temperature, **how)
    assert differing(found, expected) < 0.001
    half = predicted(Teacher(network, device=device, precision="bfloat16"), streets[:3], temperature, **how)
    record_property("bfloat16", differing(half, expected))
    assert differing(half, expected) < 0.6


@pytest.mark.parametrize("arch", ["hrnet18s_ocr_mscale", "hrnet18s_ocr"])
def test_a_focus_looks_at_the_rows_that_it_looks_at_on_the_cpu(device: str, arch: str, streets: Pixels) -> None:
    network, temperature = lively(arch, streets)
    how = {"flip": True, "focus": 0.25, "swings": np.full((2, 19), 0.5, np.float32)}
    expected = predicted(Teacher(copy.deepcopy(network)), streets[:3], temperature, **how)
    found = predicted(Teacher(network, device=device), streets[:3], temperature, **how)
    assert [one.seen for one in found] == [one.seen for one in expected]
    assert any(one.seen != (0, 96) for one in found)
    assert differing(found, expected) < 0.001
    for one, other in zip(found, expected, strict=True):
        assert one.least is not None
        assert other.least is not None
        assert np.mean(one.least != other.least) < 0.001


@pytest.mark.parametrize("architecture", ["segformer", "mask2former"])
def test_a_model_of_another_library_labels_as_on_the_cpu_from_the_same_pixel_values(
    device: str, architecture: str, streets: Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_it_is = TransformersModel._processed

    def processed_on_the_cpu(self: TransformersModel, images: torch.Tensor, **settings: Any) -> dict[str, Any]:
        return {name: value.to(images.device) for name, value in as_it_is(self, images.cpu(), **settings).items()}

    monkeypatch.setattr(TransformersModel, "_processed", processed_on_the_cpu)
    place = save(tmp_path / "net", architecture, CITYSCAPES.names)
    expected, found = (
        predicted(load_teacher(place, device=name), streets[:3], 1.0, scales=(1.0,), flip=True)
        for name in ("cpu", device)
    )
    assert float(np.mean([np.mean(one.codes % one.levels > 0) for one in expected])) > 0
    assert differing(found, expected) < 0.001


@pytest.mark.parametrize("architecture", ["segformer", "mask2former"])
def test_a_processor_of_another_library_rounds_by_one_level_of_255_at_most(
    device: str, architecture: str, streets: Pixels, tmp_path: Path
) -> None:
    """Resizing whole numbers on a GPU, torchvision rounds otherwise: on an H200 16 % of the values differ."""
    place = TeacherPlace.of(save(tmp_path / "net", architecture, CITYSCAPES.names))
    images = torch.from_numpy(streets[:3]).permute(0, 3, 1, 2)
    expected, found = (
        load(place, device=torch.device(name))._processed(images.to(name))["pixel_values"].cpu()
        for name in ("cpu", device)
    )
    model = load(place, device=torch.device("cpu"))
    level = 1 / 255 / torch.tensor(model.processor.image_std).view(3, 1, 1)
    assert ((found - expected).abs() <= 1.001 * level).all()


@pytest.mark.gpu
@pytest.mark.parametrize("arch", TRUNKS)
def test_every_trunk_computes_on_a_gpu_as_on_the_cpu(arch: str, gpu: torch.device, streets: Pixels) -> None:
    network, temperature = lively(arch, streets)
    expected = predicted(Teacher(copy.deepcopy(network)), streets[:2], temperature, scales=(1.0,))
    found = predicted(Teacher(network, device="cuda"), streets[:2], temperature, scales=(1.0,))
    assert differing(found, expected) < 0.001


@pytest.mark.parametrize(
    ("device", "precision", "focus"),
    [
        ("cpu", "float32", None),
        ("cpu", "float32", 0.25),
        *(pytest.param("cuda", name, focus, marks=pytest.mark.gpu) for name in PRECISIONS for focus in (None, 0.25)),
    ],
    indirect=["device"],
)
def test_an_image_gets_the_same_bits_whatever_its_neighbours_and_its_place(
    device: str, precision: str, focus: float | None, teacher: Path, streets: Pixels
) -> None:
    seer, look = load_teacher(teacher, device=device, precision=precision), partial(predicted, focus=focus)
    expected = look(seer, streets, 1.0)
    require_equal(look(seer, streets, 1.0), expected)
    order = [3, 9, 0, 7, 1, 8, 2, 6, 5, 4]
    require_equal(look(seer, streets[order], 1.0), [expected[n] for n in order])
    require_equal(look(seer, streets[9:], 1.0), expected[9:])
    again = load_teacher(teacher, device=device, precision=precision)
    require_equal(look(again, streets, 1.0), expected)


def test_threads_side_by_side_give_the_bits_of_one_after_the_other(device: str, teacher: Path, streets: Pixels) -> None:
    """Each has a stream of its own on a GPU: what one computes must never be read by another too early."""
    seer = load_teacher(teacher, device=device)
    expected = predicted(seer, streets, 1.0)
    with ThreadPoolExecutor(3, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for found in pool.map(lambda _: predicted(seer, streets, 1.0), range(3 if device == "cpu" else 30)):
            require_equal(found, expected)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(device: str, teacher: Path, city: Path, tmp_path: Path) -> LabelJob:
    """The city's ten coarse images, for a device."""
    return LabelJob(
        city / "coarse.parquet", teacher, tmp_path / "run", scales=(0.5, 1.0), device=device, unit_size=3,
        machine=Machine(engine="local"),
    )  # fmt: skip


def test_a_run_on_a_device_makes_the_same_labels_in_any_units_and_after_any_stop(job: LabelJob, tmp_path: Path) -> None:
    generate(job)
    run = Run.open(job.out)
    assert run.accounts is not None and run.accounts.labelled == 10
    cut = replace(job, out=tmp_path / "cut", unit_size=64)
    for limit in (1, 4, None):
        generate(replace(cut, portion=Portion(limit=limit)))
    for sample in load_manifest(job.manifest).samples:
        assert np.array_equal(run.labels[sample.sample_id], Run.open(cut.out).labels[sample.sample_id])


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_ray_labels_on_a_gpu_as_this_process_does(job: LabelJob, tmp_path: Path) -> None:
    there = replace(job, out=tmp_path / "there", machine=Machine(engine="ray"))
    generate(job)
    generate(there)
    assert labels_of(job.out) == labels_of(there.out)
    assert [budget["device"] for budget in Run.open(there.out).budgets] == [torch.cuda.get_device_name()]


def test_scores_on_a_device_are_those_of_the_cpu(device: str, teacher: Path, city: Path) -> None:
    expected = evaluate(teacher, city / "val.parquet", device="cpu")
    found = evaluate(teacher, city / "val.parquet", device=device)
    assert found.miou == pytest.approx(expected.miou, abs=1e-3)
    assert found.images == expected.images == 3


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def crowd(gpu: torch.device, teacher: Path, city: Path, tmp_path: Path) -> LabelJob:
    """Two small images, one that takes about 9 GiB, and one of which a tensor has too many elements."""
    photograph(city, tmp_path / "images", ["a", "b"])
    for name, size in (("large", (2000, 4000)), ("panorama", (6000, 12000))):
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
    return LabelJob(
        scanned(city, tmp_path / "images"), teacher, tmp_path / "run", device="cuda", precision="float32",
        max_quarantined=1.0, machine=Machine(engine="local"),
    )  # fmt: skip


@pytest.mark.gpu
def test_images_that_do_not_fit_cost_themselves_alone(crowd: LabelJob, gpu: torch.device, tmp_path: Path) -> None:
    """torch may use 4 GB of the GPU here."""
    torch.cuda.set_per_process_memory_fraction(4e9 / torch.cuda.get_device_properties(gpu).total_memory)
    generate(crowd)
    torch.cuda.set_per_process_memory_fraction(1.0)
    reasons = quarantined(crowd.out)
    assert list(reasons) == ["large", "panorama"]
    assert reasons["large"].startswith("not enough memory on cuda for an image of 4000 x 2000 at scale 2")
    assert reasons["panorama"].startswith("an image of 12000 x 6000 at scale 2 makes a tensor of")
    generate(replace(crowd, portion=Portion(retry_quarantined=True)))
    assert list(quarantined(crowd.out)) == ["panorama"]
    free = replace(crowd, out=tmp_path / "free")
    generate(free)
    for name in ("a", "b", "large"):
        assert np.array_equal(Run.open(crowd.out).labels[name], Run.open(free.out).labels[name])


@pytest.mark.gpu
def test_memory_that_another_process_holds_quarantines_no_image(
    crowd: LabelJob, gpu: torch.device, tmp_path: Path
) -> None:
    torch.cuda.empty_cache()
    held = torch.cuda.mem_get_info(gpu)[0] - (5 << 30)
    script = (
        f"import torch; x = torch.empty({held}, dtype=torch.uint8, device='cuda'); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises((MemoryTaken, EngineFailed), match=r"for an image of 4000 x 2000 .* another process holds"):
            generate(crowd)
        other.stdin.write("\n")
    assert not (crowd.out / "quarantine.parquet").exists()  # nothing was published
    generate(crowd)
    assert list(quarantined(crowd.out)) == ["panorama"]


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "loss", "precision"),
    [
        ("cpu", "rmi", "bfloat16"),
        *(
            pytest.param("cuda", *case, marks=pytest.mark.gpu)
            for case in itertools.product(("balanced", "rmi"), PRECISIONS)
        ),
    ],
    indirect=["device"],
)
def test_a_training_learns_in_every_precision_and_goes_on_after_a_stop(
    device: str, loss: str, precision: str, city: Path, tmp_path: Path
) -> None:
    job = TrainJob(
        city / "fine.parquet", city / "val.parquet", tmp_path / "whole", steps=12, batch_size=4, crop=(64, 96),
        loss=loss, precision=precision, device=device, ema=0.9, validations=2, arch="hrnet18s_ocr_mscale",
    )  # fmt: skip
    train(job)
    losses = [step.loss for step in read_metrics(job.out)]
    assert len(losses) == 12 and all(map(math.isfinite, losses))
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    stopped = replace(job, out=tmp_path / "stopped")

    def stop(report: StepReport) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stopped, stop)
    train(stopped)
    near = {"rel": 1e-6} if device == "cpu" else {"rel": 0.2, "abs": 0.1}  # a GPU's kernels are chosen by their speed
    assert [step.loss for step in read_metrics(stopped.out)] == pytest.approx(losses, **near)
    assert read_checkpoint(stopped.out / "best.pt").metrics["step"] in (6, 12)


@pytest.fixture
def alone(device: str, tmp_path: Path) -> Iterator[Team]:
    """A group of one process: nccl on a GPU, gloo on a CPU."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield Team(torch.device(device), 0, 1)
    dist.destroy_process_group()


def test_the_batch_norm_of_a_team_is_torchs_own(alone: Team) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    plain.double().to(alone.device)
    own = copy.deepcopy(plain)
    team = DistributedDataParallel(synchronised(own), [alone.device] if alone.device.type == "cuda" else None)
    images = torch.randn(4, 3, 24, 24, dtype=torch.float64, device=alone.device) + 10
    weight = torch.randn(4, 4, 20, 20, dtype=torch.float64, device=alone.device)
    for model in (plain, team):
        (model.train()(images) * weight).sum().backward()
    for (name, one), other in zip(own.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-9, msg=name)
    for (name, buffer), expected in zip(own.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)],
    indirect=True,
)
def test_one_worker_of_ray_trains_as_this_process_does(device: str, city: Path, tmp_path: Path) -> None:
    """With nccl on a GPU, with gloo on a CPU. No command asks for one worker without a cluster."""
    job = TrainJob(
        city / "fine.parquet", city / "val.parquet", tmp_path / "one", steps=4, batch_size=2, crop=(64, 96),
        device=device, precision="bfloat16", validations=1, arch="hrnet18s_plain_mscale", learning_rate=1e-4,
    )  # fmt: skip
    train(job)
    shared = replace(job, out=tmp_path / "team")
    shared.out.mkdir()
    notes: list[str] = []
    with ray_session(None, tmp_path, workers=1):
        run_workers(
            partial(_train_in, TrainRequest(shared)), 1, device=device, folder=shared.out, on_step=lambda report: None,
            on_note=notes.append, final=(ValueError,),
        )  # fmt: skip
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    assert notes == [f"trains on {name} in bfloat16"]
    found, expected = ([step.loss for step in read_metrics(path)] for path in (shared.out, job.out))
    assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.gpu
def test_two_gpus_give_what_one_gives(gpu: torch.device, city: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    job = TrainJob(
        city / "fine.parquet", city / "val.parquet", tmp_path / "one", steps=4, batch_size=4, crop=(96, 128),
        device="cuda", validations=2, arch="hrnet18s_plain_mscale", optimizer="sgd",
    )  # fmt: skip
    train(job)
    train(replace(job, out=tmp_path / "two", machine=TrainMachine(workers=2)))
    found, expected = ([step.loss for step in read_metrics(tmp_path / name)] for name in ("two", "one"))
    assert found == pytest.approx(expected, rel=1e-2)
