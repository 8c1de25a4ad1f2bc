"""Labels are made by folded networks: a batch norm folded into the wrong convolution changes every one of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from formula import network_by_formula, picture
from torch import nn

from autolabel.teacher.checkpoints import load_network, read_checkpoint
from autolabel.teacher.fold import cast_convolutions, fold_batch_norm
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.networks.decoders import SegmentationNet
from autolabel.teacher.networks.efficientnet_lite import DepthwiseConv
from autolabel.teacher.predict import Teacher

torch.set_num_threads(1)

CLASSES = 5


def norms(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]


# Wide-ResNet's blocks normalise the sum of a shortcut and a convolution: nothing came before that could do it.
WRN38_BLOCKS = {2: 3, 3: 3, 4: 6, 5: 3, 6: 1, 7: 1}
PRE_ACTIVATION = [f"backbone.mod{m}.block{b}.bn1.0" for m, blocks in WRN38_BLOCKS.items() for b in range(1, blocks + 1)]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("arch", "folded", "left"),
    [
        pytest.param("hrnet18s_ocr_mscale", 82, [], id="hrnet ocr, attention"),
        pytest.param("hrnet18s_plain_mscale2", 75, [], id="hrnet plain, paired attention"),
        pytest.param("hrnet18s_aspp_explicit_bn", 80, [], id="hrnet aspp, explicit attention"),
        pytest.param("hrnet18s_plain_explicit", 73, [], id="hrnet plain, explicit attention without batch norm"),
        pytest.param("resnet50_deeplabv3_explicit_pairs", 62, [], id="resnet deeplab"),
        pytest.param("resnet50_deeplabv3plus", 60, [], id="resnet deeplab+"),
        pytest.param("xception71_deeper_mscale", 139, [], id="xception deeper"),
        pytest.param("efficientnet_b4_deeplabv3plus_mscale", 104, [], id="efficientnet deeplab+"),
        pytest.param("efficientnet_lite0_ocr", 57, [], id="efficientnet lite ocr"),
        pytest.param("wrn38_deeplabv3plus_mscale", 28, PRE_ACTIVATION, id="wide resnet deeplab+"),
    ],
)
def test_a_folded_network_gives_the_same_logits(arch: str, folded: int, left: list[str]) -> None:
    network, images = network_by_formula(arch, CLASSES), picture(33, 65)
    scales = network.scale_attn.training_scales
    with torch.inference_mode():
        before, all_norms = network.logits(images, scales), norms(network)
    assert (fold_batch_norm(network), norms(network)) == (folded, left)
    assert len(all_norms) == folded + len(left)
    with torch.inference_mode():
        after = network.logits(images, scales)
    # float32 rounds in another place in each of up to 139 layers: 3.3e-5 on the plainest instructions of a CPU.
    assert (after - before).abs().max() < 1e-4 * before.std()
    assert not torch.equal(after, before)  # something was done


def test_every_batch_norm_is_folded() -> None:
    """With one convolution's norm forgotten, or folded into its neighbour, the logits would be others."""
    network, images = network_by_formula("hrnet18s_ocr", CLASSES), picture(45, 70)
    with torch.inference_mode():
        before = network.logits(images, (1.0,))
        for name in ("backbone.bn1", "backbone.stage4.0.fuse_layers.0.3.1", "ocr.conv3x3_ocr.1.0"):
            norm = network.get_submodule(name)
            assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
            norm.running_mean += 0.1
            assert (network.logits(images, (1.0,)) - before).abs().max() > 1e-3 * before.std()
            norm.running_mean -= 0.1


def test_folding_is_done_once_and_leaves_nothing_behind() -> None:
    network = network_by_formula("hrnet18s_ocr_mscale", CLASSES)
    fold_batch_norm(network)
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    assert fold_batch_norm(network) == 0
    assert all(torch.equal(state[key], tensor) for key, tensor in network.state_dict().items())
    assert not [m for m in network.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not [p for p in network.backbone.parameters() if p.requires_grad]  # a folded network is not for training
    assert not network.training


def test_a_network_with_its_own_bias_or_another_epsilon_folds_too() -> None:
    class Toy(SegmentationNet):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, eps=0.1)
            nn.init.uniform_(self.bn.weight, -2, 2)
            nn.init.normal_(self.bn.bias)
            assert self.bn.running_mean is not None and self.bn.running_var is not None
            nn.init.normal_(self.bn.running_mean)
            nn.init.uniform_(self.bn.running_var, 0.01, 2)

        def parts(self, images: torch.Tensor, *_: object) -> list[object]:  # type: ignore[override]
            return [self.bn(self.conv(images))]

        scale_attn = nn.Identity()  # type: ignore[assignment]

    toy, images = Toy().eval(), torch.randn(1, 3, 5, 7)
    toy.scale_attn.training_scales = (1.0,)  # type: ignore[assignment]
    (before,) = toy.parts(images)
    assert fold_batch_norm(toy) == 1
    (after,) = toy.parts(images)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_only_a_teacher_is_folded(teacher: Path) -> None:
    """A student that starts from a checkpoint trains its batch norms on."""
    assert len(norms(load_network(teacher, read_checkpoint(teacher)))) == 82
    assert norms(load_teacher(teacher, device="cpu").network.network) == []
    assert len(norms(load_network(teacher, read_checkpoint(teacher)))) == 82  # the file is as it was


@pytest.mark.thorough
@pytest.mark.parametrize("arch", ["hrnet18s_ocr_mscale", "efficientnet_lite0_aspp_mscale2"])
def test_weights_that_are_cast_once_give_the_bits_of_autocast_alone(arch: str) -> None:
    """On a CPU the convolutions of single channels keep float32, in which they compute there."""
    network = network_by_formula(arch, CLASSES)
    fold_batch_norm(network)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    expected = Teacher(network, precision="bfloat16").logits(image)
    cast_convolutions(network, "bfloat16", device="cpu")
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    own = {m.weight.dtype for m in convolutions if isinstance(m, DepthwiseConv)}
    assert own == ({torch.float32} if "lite0" in arch else set())
    assert {m.weight.dtype for m in convolutions if not isinstance(m, DepthwiseConv)} == {torch.bfloat16}
    assert torch.equal(Teacher(network, precision="bfloat16").logits(image), expected)


def test_a_teacher_of_half_precision_is_loaded_with_cast_weights(teacher: Path) -> None:
    half, full = (load_teacher(teacher, device="cpu", precision=p).network.network for p in ("bfloat16", "float32"))
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
