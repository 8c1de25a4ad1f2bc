"""Networks of timm and smp: a checkpoint's name must build nothing else, and what they compute stands by itself.

They are built with random weights; nothing is downloaded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autolabel.manifests.label_space import CAMVID, CITYSCAPES
from autolabel.student.parallel import synchronised
from autolabel.teacher.checkpoints import BadCheckpoint, load_network, read_checkpoint, save_checkpoint
from autolabel.teacher.fold import fold_batch_norm
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.networks.build import architecture, build
from autolabel.teacher.networks.decoders import SegmentationNet
from autolabel.teacher.optional import require_package
from autolabel.teacher.predict import Teacher
from autolabel.teacher.start import read_start

torch.set_num_threads(1)

timm, smp = require_package("timm", "timm"), require_package("segmentation_models_pytorch", "timm")
CLASSES = len(CAMVID)
# A convnet with batch norms, and a transformer; decoders of one map and of a pyramid; smp with an encoder of timm.
SMALL = (
    "timm:test_efficientnet",
    "timm:test_vit/deeplabv3plus_mscale",
    "smp:FPN/tu-test_efficientnet",
)
# The families that docs/networks.md calls known to work.
FAMILIES = (
    "timm:convnext_atto", "timm:convnext_atto/deeplabv3plus_mscale",
    "timm:convnextv2_atto", "timm:resnet18", "timm:resnet18/deeplabv3plus_mscale",
    "timm:efficientnet_lite0/aspp_mscale", "timm:mobilenetv3_small_050", "timm:mobilenetv4_conv_small/plain",
    "timm:regnety_002/deeplabv3", "timm:efficientvit_b0", "timm:fastvit_t8", "timm:repvit_m0_9", "timm:pvt_v2_b0",
    "timm:edgenext_xx_small", "timm:swin_tiny_patch4_window7_224", "timm:swinv2_tiny_window8_256",
    "timm:vit_tiny_patch16_224", "timm:vit_small_patch14_dinov2", "timm:vit_small_patch16_dinov3",
    "timm:maxvit_tiny_rw_224", "timm:hrnet_w18_small", "timm:densenet121", "timm:mambaout_femto",
    "smp:Unet/resnet18", "smp:UnetPlusPlus/resnet18", "smp:MAnet/resnet18", "smp:Linknet/resnet18",
    "smp:PSPNet/resnet18", "smp:DeepLabV3/mobilenet_v2", "smp:DeepLabV3Plus/efficientnet-b0", "smp:PAN/resnet18",
    "smp:UPerNet/tu-convnext_atto", "smp:Segformer/mit_b0", "smp:DPT/tu-vit_tiny_patch16_224",
    "smp:Unet/tu-swin_tiny_patch4_window7_224", "smp:Unet/mobileone_s0",
)  # fmt: skip


def made(arch: str, seed: int = 0) -> SegmentationNet:
    """A network whose batch norms have seen something, so that they are no identities."""
    torch.manual_seed(seed)
    network = build(arch, CLASSES)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def pictures(number: int, height: int, width: int) -> Tensor:
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(3))


def works(arch: str, tmp_path: Path) -> None:
    """Saved, read, folded: the same numbers, for images of any size, whatever else is in the batch."""
    network, path = made(arch), tmp_path / "best.pt"
    images = pictures(2, 43, 70)
    with torch.inference_mode():
        logits = network.logits(images, (0.5, 1.0))
        assert logits.shape == (2, CLASSES, 43, 70)
        scale = float(logits.abs().max())
        alone = network.logits(images[1:], (0.5, 1.0))
        assert float((alone[0] - logits[1]).abs().max()) <= 2e-4 * scale
    save_checkpoint(path, network, arch=arch, space=CAMVID)
    again = load_network(path, read_checkpoint(path)).eval()
    with torch.inference_mode():
        assert torch.equal(again.logits(images, (0.5, 1.0)), logits)
        fold_batch_norm(again)
        assert float((again.logits(images, (0.5, 1.0)) - logits).abs().max()) <= 2e-3 * scale
    photograph = np.random.default_rng(1).integers(0, 256, (43, 70, 3), np.uint8)
    teacher = load_teacher(path, device="cpu", precision="bfloat16")
    assert teacher.label(photograph[None], scales=(0.5, 1.0))[0].shape == (1, 43, 70)
    network.train()
    output = network(images)
    assert output.joint.shape == (2, CLASSES, 43, 70)
    output.joint.square().mean().backward(retain_graph=True)
    if output.aux is not None:
        output.aux.square().mean().backward()
    # Processes that train together wait for the gradient of every parameter.
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters() if p.requires_grad)


@pytest.mark.thorough
@pytest.mark.parametrize("arch", SMALL)
def test_a_network_is_saved_read_folded_and_labels_images_of_any_size(arch: str, tmp_path: Path) -> None:
    works(arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", FAMILIES)
def test_each_family_that_the_page_names_works(arch: str, tmp_path: Path) -> None:
    works(arch, tmp_path)


def test_parameters_on_which_no_logit_depends_are_not_trained() -> None:
    """PSPNet reads the first stages of its encoder alone."""
    fixed = {
        name.rsplit(".", 3)[0] for name, p in build("smp:PSPNet/resnet18", 2).named_parameters() if not p.requires_grad
    }
    assert {name.split(".")[1] for name in fixed} == {"layer3", "layer4"}


@pytest.mark.thorough
def test_the_logits_of_smp_are_those_of_smps_own_network() -> None:
    network = made("smp:Segformer/resnet18")
    theirs = smp.Segformer("resnet18", encoder_weights=None, classes=CLASSES).eval()
    theirs.load_state_dict(network.state_dict())
    with torch.inference_mode():
        image = pictures(1, 64, 96)
        assert torch.equal(network.logits(image, (1.0,)), theirs(image))


def test_batch_norms_that_hold_an_activation_are_folded_and_keep_it() -> None:
    network = made("timm:test_efficientnet/plain")
    image = pictures(1, 64, 64)
    with torch.inference_mode():
        before = network.logits(image, (1.0,))
        assert fold_batch_norm(network) == 18
        assert not [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        assert torch.allclose(network.logits(image, (1.0,)), before, atol=1e-3 * float(before.abs().max()))


def test_a_network_that_reads_a_convolution_twice_stays_unfolded() -> None:
    network = made("timm:test_efficientnet/plain")
    conv = network.get_submodule("backbone.model.conv_stem")
    conv.register_forward_hook(lambda module, inputs, output: output * (1 + module.weight.abs().mean()))
    norms = len([m for m in network.modules() if isinstance(m, nn.BatchNorm2d)])
    before = {k: v.clone() for k, v in network.state_dict().items()}
    assert fold_batch_norm(network) == 0
    assert len([m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]) == norms
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_batch_norms_of_timm_span_all_processes_and_keep_their_activation() -> None:
    network = made("timm:test_efficientnet/plain")
    twin = synchronised(network).eval()
    assert {type(m).__name__ for m in twin.modules() if isinstance(m, nn.BatchNorm2d)} == {"SynchronisedBatchNorm"}
    with torch.inference_mode():
        image = pictures(1, 64, 64)
        assert torch.equal(twin.logits(image, (1.0,)), network.logits(image, (1.0,)))


def test_a_batch_norm_of_another_kind_is_refused_for_several_processes() -> None:
    network = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"^0 is a BatchNorm1d that cannot span several processes: train with --work"):
        synchronised(network)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("timm:test_vit", "timm:test_vit/ocr_mscale"),
        ("timm:test_vit.r160_in1k/plain", "timm:test_vit.r160_in1k/plain"),
        ("timm:test_resnet/deeplabv3plus_explicit_bn", "timm:test_resnet/deeplabv3plus_explicit_bn"),
        ("smp:Segformer/mit_b0", "smp:Segformer/mit_b0"),
    ],
)
def test_a_name_is_taken_apart_without_guessing(name: str, whole: str) -> None:
    assert str(architecture(name)) == whole


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:conxnext_tiny", "timm has no model 'conxnext_tiny'; did you mean convnext_tiny"),
        ("timm:hf-hub:timm/resnet18", "timm has no model 'hf-hub:timm'; timm.list_models() lists them"),
        ("timm:local-dir:/tmp/x", "timm has no model 'local-dir:'; timm.list_models() lists them"),
        ("timm:test_vit/deeper", "expected timm:NAME/DECODER[_COMBINATION], with decoders ocr, plain, aspp, deeplabv3"),
        ("timm:test_vit/ocr_", "expected timm:NAME/DECODER[_COMBINATION]"),
        ("smp:segformer/mit_b0", "smp has no 'segformer'; did you mean Segformer? expected smp:DECODER/ENCODER"),
        ("smp:Unet/mit_b9", "smp has no encoder 'mit_b9'; did you mean mit_b"),
        ("smp:Unet/tu-hf-hub:a/b", "smp has no encoder 'tu-hf-hub:a/b'; "),
        ("smp:Unet", "it names no encoder; expected smp:DECODER/ENCODER such as smp:Segformer/mit_b2"),
        ("smp:from_pretrained/resnet18", "smp has no 'from_pretrained'; expected smp:DECODER/ENCODER, with decoders"),
    ],
)
def test_an_unknown_name_is_refused_with_those_that_may_be_meant(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        build(name, CLASSES)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:hiera_tiny_224", "timm:hiera_tiny_224 does not give maps of images of any size"),
        ("smp:Unet/tu-hiera_tiny_224", "smp:Unet/tu-hiera_tiny_224 does not take images of any size"),
        ("smp:Linknet/mit_b0", "smp cannot make smp:Linknet/mit_b0: Encoder `mit_b0` is not supported for Linknet"),
    ],
)
def test_a_network_that_cannot_work_here_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        build(name, CLASSES)


@pytest.mark.parametrize("name", ["timm:test_vit", "smp:Unet/resnet18"])
def test_a_missing_package_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "best.pt", made(name), arch=name, space=CAMVID)
    package = "timm" if name.startswith("timm") else "segmentation_models_pytorch"

    def missing(name: str, extra: str) -> Any:
        raise ModuleNotFoundError(f"needs the package {name}: pip install 'autolabel[{extra}]'", name=name)

    from autolabel.teacher.networks import smp as of_smp
    from autolabel.teacher.networks import timm as of_timm

    for module in (of_timm, of_smp):
        monkeypatch.setattr(module, "require_package", missing)
    of_timm._names.cache_clear()
    of_smp._decoders.cache_clear()
    line = f"needs the package {package}: pip install 'autolabel[timm]'"
    with pytest.raises(BadCheckpoint, match=re.escape(line)):
        read_checkpoint(tmp_path / "best.pt")


def test_a_small_file_cannot_ask_for_a_large_network(tmp_path: Path) -> None:
    """Each tensor is one number, seen as many."""
    arch = "timm:resnet50/plain"
    with torch.device("meta"):
        state = build(arch, CLASSES).state_dict()
    network = nn.Module()
    content = {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in state.items()}
    network.state_dict = lambda: content  # type: ignore[method-assign, assignment]
    save_checkpoint(tmp_path / "best.pt", network, arch=arch, space=CAMVID)
    with pytest.raises(BadCheckpoint, match=r"its tensors are 10\d,\d+,\d+ bytes, but the file holds \d,\d+$"):
        load_network(tmp_path / "best.pt", read_checkpoint(tmp_path / "best.pt"))


@pytest.mark.parametrize("arch", ["timm:os", "smp:../x", "timm:" + "a" * 300, "timm:test_vit/explicit_explicit"])
def test_a_file_that_names_another_thing_builds_nothing(arch: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "best.pt", nn.Linear(1, 1), arch=arch, space=CAMVID)
    with pytest.raises(BadCheckpoint, match="unknown architecture"):
        read_checkpoint(tmp_path / "best.pt")


# --- where a training starts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form"), [("test_convnext", "safetensors"), ("test_efficientnet", "wrapped"), ("test_vit", "pth")]
)
def test_weights_of_timm_fill_the_trunk(name: str, form: str, tmp_path: Path) -> None:
    model = timm.create_model(name)
    path, state = tmp_path / f"weights.{form}", model.state_dict()
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}} if form == "wrapped" else state, path)
    start = read_start(path, f"timm:{name}", space=CAMVID)
    network = build(f"timm:{name}", CLASSES)
    assert start.state_dict.keys() == {k for k in network.state_dict() if k.startswith("backbone.model.")}
    network.load_state_dict(network.state_dict() | start.state_dict)
    ours = timm.create_model(name, features_only=True, **({"dynamic_img_size": True} if "vit" in name else {}))
    ours.load_state_dict({k.removeprefix("backbone.model."): v for k, v in start.state_dict.items()})
    theirs = model.eval().forward_intermediates(image := pictures(1, 160, 160), intermediates_only=True)[-1]
    with torch.inference_mode():
        assert torch.allclose(ours.eval()(image)[-1], theirs, atol=1e-5)
    assert start.description.startswith("0.") and "the encoder; backbone.narrow, ocr, scale_attn start fresh" in (
        start.description
    )


@pytest.mark.thorough
def test_a_deeper_trunk_of_timm_is_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "resnet34.pth")
    message = r"does not fit the encoder of timm:resnet18: backbone\.model\.layer1\.2\.bn1\.bias is not in the network"
    with pytest.raises(BadCheckpoint, match=message):
        read_start(tmp_path / "resnet34.pth", "timm:resnet18", space=CAMVID)


def test_weights_of_another_trunk_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    with pytest.raises(BadCheckpoint, match="nothing in it fits timm:test_resnet"):
        read_start(tmp_path / "vit.pth", "timm:test_resnet", space=CAMVID)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("made_by", "fresh"),
    [
        pytest.param(lambda: smp.FPN("resnet18", encoder_weights=None, classes=CLASSES), "", id="the network"),
        pytest.param(
            lambda: smp.FPN("resnet18", encoder_weights=None, classes=3), "segmentation_head", id="other classes"
        ),
        pytest.param(
            lambda: smp.Unet("resnet18", encoder_weights=None, classes=CLASSES), "decoder, segmentation_head",
            id="another decoder",
        ),
        pytest.param(lambda: timm.create_model("resnet18"), "decoder, segmentation_head", id="a classifier of timm"),
    ],
)  # fmt: skip
def test_weights_of_smp_fill_the_network_or_its_encoder(made_by: Any, fresh: str, tmp_path: Path) -> None:
    state, arch = made_by().state_dict(), "smp:FPN/resnet18"
    torch.save(state, tmp_path / "smp.pth")
    start = read_start(tmp_path / "smp.pth", arch, space=CAMVID)
    left = set(fresh.split(", ")) if fresh else set()
    assert start.state_dict.keys() == {k for k in build(arch, CLASSES).state_dict() if k.split(".")[0] not in left}
    assert (f"; {fresh} start fresh" if fresh else "smp.pth; it does not say") in start.description


def test_a_checkpoint_of_ours_gives_its_trunk_to_another_decoder(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "best.pt", made("timm:test_resnet/plain"), arch="timm:test_resnet/plain", space=CAMVID)
    start = read_start(tmp_path / "best.pt", "timm:test_resnet", space=CITYSCAPES)
    assert {k.split(".")[1] for k in start.state_dict} == {"model", "narrow"}
    assert "; ocr, scale_attn start fresh (11 classes there, 19 here)" in start.description


def test_a_network_without_a_file_can_be_a_teacher() -> None:
    teacher = Teacher(made("timm:test_vit/plain"), CAMVID)
    assert teacher.logits(np.zeros((33, 47, 3), np.uint8), scales=(1.0,)).shape == (CLASSES, 33, 47)
