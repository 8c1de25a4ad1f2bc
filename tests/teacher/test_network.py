"""A network that differs from the published one by one detail still loads its weights, and every label is wrong.

No trained weights are at hand, so both sides are filled with the same numbers (see `formula.py`). `data/network.npz`
holds what our networks gave with them; rewrite it with `python tests/teacher/test_network.py`, and only after the
comparison with the reference's recorded outputs (`../shared/data/goldens`) has passed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from formula import NOT_BUILT, PUBLISHED, network_by_formula, picture, published_shapes
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, pad
from torch.utils._python_dispatch import TorchDispatchMode

from autolabel.student.losses import cross_entropy
from autolabel.teacher.feed import normalise
from autolabel.teacher.networks.build import ARCHITECTURES, COMBINATIONS, build, recognise
from autolabel.teacher.networks.combine import Average, ScaleOutput
from autolabel.teacher.networks.decoders import OCRNet, SegmentationNet
from autolabel.teacher.networks.efficientnet_lite import DepthwiseConv, EfficientNetLite0, SamePadConv
from autolabel.teacher.networks.fields import Size, at_size, mean_with_mirrored
from autolabel.teacher.networks.hrnet import resize
from autolabel.teacher.networks.ocr import ObjectAttention, region_features

torch.set_num_threads(1)  # the small network is no slower with one, and never waits for a busy core

OURS = Path(__file__).parents[1] / "data" / "network.npz"
REFERENCE = Path(__file__).parents[3] / "shared/data/goldens"
recorded = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference's recorded outputs are not here")

SMALL = "hrnet18s_ocr_mscale"
CLASSES = 5  # of our own recorded outputs
THREE = (0.5, 1.0, 2.0)
FIVE = (0.25, 0.5, 1.0, 1.5, 2.0)


@pytest.fixture(scope="module")
def small() -> SegmentationNet:
    return network_by_formula(SMALL, CLASSES)


# --- the same tensors -------------------------------------------------------------------------------------------------


def lines_of(arch: str) -> list[str]:
    """A network's tensors, one a line: key, shape and type, in their order."""
    with torch.device("meta"):
        network = build(arch, 19)
    return [f"{key} {tuple(tensor.shape)} {tensor.dtype}" for key, tensor in network.state_dict().items()]


DIGESTS = {  # number of parameters, and the start of the sha256 of the lines
    "resnet50_deeplabv3plus_explicit": (44_555_072, "6691a2a6883f498c"),
    "resnet50_deeplabv3plus_explicit_bn": (43_043_904, "ec81e0ea49bdd38c"),
    "resnet50_deeplabv3plus_explicit_pairs": (42_343_232, "9d73ed74eabd7d87"),
    "wrn38_deeplabv3plus_explicit": (141_307_968, "c3d9f46e36511d47"),
    "hrnet48_plain": (67_579_712, "b0c31550f1bda019"),
    "hrnet48_aspp": (72_186_176, "1f19c1998f86851d"),
    "wrn38_deeper": (139_719_232, "34c8c11feb8b5b5b"),
    "xception71_deeper": (57_240_368, "a7e40278931618c5"),
    "resnet50_deeplabv3plus": (40_351_040, "0ac3ddbbe968afae"),
    "wrn38_deeplabv3plus": (137_103_936, "a44426fbc5349ef2"),
    "xception71_deeplabv3plus": (54_632_240, "f28d0daf4d7c8ac0"),
    "resnet50_deeplabv3": (42_259_776, "1525507472a68a50"),
    "resnet50_deeplabv3plus_mscale": (41_642_560, "eda2a43a5db08041"),
    "wrn38_deeplabv3plus_mscale": (138_395_456, "f9b9812fc56daa65"),
    "xception71_deeplabv3plus_mscale": (55_923_760, "9941dc9e8704e61b"),
    "wrn38_deeper_mscale": (140_900_160, "fe546caae5645551"),
    "xception71_deeper_mscale": (58_421_296, "1907cf43fb3cb486"),
    "hrnet48_plain_mscale": (69_829_696, "5b57fa7e6984c422"),
    "hrnet48_aspp_mscale": (73_367_104, "ca2e51b05df06183"),
    "resnet50_deeplabv3plus_mscale2": (42_342_976, "777386b0f0678001"),
    "hrnet48_ocr": (70_372_678, "71fd298337058d03"),
    "hrnet48_ocr_mscale": (72_143_430, "1d7f5148db00b307"),
    # The reference has none of these four.
    "efficientnet_lite0_ocr_mscale": (3_975_814, "51c93f16e8d5c02b"),
    "hrnet18s_ocr_mscale": (2_005_926, "19e32b81f5fa2ac9"),
    "efficientnet_b4_deeplabv3plus_mscale": (22_987_208, "99808b07e7c9450e"),
    "efficientnet_b4_deeper": (24_298_312, "2abc77c4799ef355"),
}


@pytest.mark.parametrize("arch", DIGESTS)
def test_keys_shapes_types_and_their_order_are_those_of_published_checkpoints(arch: str) -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build(arch, 19).parameters())
    assert (parameters, hashlib.sha256("\n".join(lines_of(arch)).encode()).hexdigest()[:16]) == DIGESTS[arch]


@recorded
@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_shapes_types_and_their_order_equal_the_references(name: str) -> None:
    theirs = published_shapes(REFERENCE / f"keys/{name}.json")
    expected = [f"{key} {tuple(shape)} torch.{kind}" for key, (shape, kind) in theirs.items()]
    assert lines_of(PUBLISHED[name]) == expected


@recorded
def test_no_published_network_is_forgotten() -> None:
    assert {path.stem for path in (REFERENCE / "keys").glob("*.json")} == PUBLISHED.keys() | NOT_BUILT
    assert set(PUBLISHED.values()) <= ARCHITECTURES.keys()


@pytest.mark.thorough
def test_every_named_network_can_be_built_and_told_by_its_tensors() -> None:
    """Of the larger HRNet one will do: only its width tells it from the smaller."""
    for arch in [arch for arch in ARCHITECTURES if not arch.startswith("hrnet48") or arch == "hrnet48_aspp_mscale2"]:
        with torch.device("meta"):
            state = build(arch, 7).state_dict()
        found = recognise(state)
        assert found is not None and (found.arch, found.classes) == (arch, 7)
    assert len(ARCHITECTURES) == 120


@pytest.mark.parametrize("scales", [1, 2, 3, 4, 5])
def test_the_number_of_scales_of_an_explicit_network_is_told_by_its_tensors(scales: int) -> None:
    with torch.device("meta"):
        state = build("resnet50_deeplabv3plus_explicit", 7, scales=scales).state_dict()
    assert recognise(state) == ("resnet50_deeplabv3plus_explicit", 7, scales)


@pytest.mark.parametrize("arch", ["unet", "resnet50_deeper", "hrnet48_deeplabv3", "resnet50_deeplabv3_mscale3", ""])
def test_an_unknown_architecture_is_refused_with_the_known_pieces(arch: str) -> None:
    with pytest.raises(ValueError, match=f"^unknown architecture '{arch}': expected TRUNK_DECODER") as refused:
        build(arch, 19)
    for piece in ("hrnet48", "hrnet18s", "resnet50", "wrn38", "xception71", "efficientnet_b4", "efficientnet_lite0",
                  "ocr", "plain", "aspp", "deeplabv3", "deeplabv3plus", "deeper", *COMBINATIONS):  # fmt: skip
        assert piece in str(refused.value)


@pytest.mark.parametrize("scales", [0, 6])
def test_an_explicit_network_of_too_many_scales_is_refused(scales: int) -> None:
    message = f"^{scales} scales: an explicit combination weighs 1 to 5 of them$"
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build("hrnet18s_plain_explicit", 19, scales=scales)


# --- the same function as the reference -------------------------------------------------------------------------------

# What the recorded outputs' README accepts: far above float noise, far below any mistake that was tried.
LOGITS, ATTENTION, PROBABILITY, TIE = 2e-3, 1e-3, 1e-3, 4e-3


def differs(ours: Tensor, golden: NDArray[np.float32], stride: int) -> float:
    return float(np.abs(ours[..., ::stride, ::stride].numpy().reshape(golden.shape) - golden).max())


def assert_same_classes(logits: Tensor, golden: NDArray[np.uint8], frame: int = 0) -> None:
    """At most 0.05 % of the pixels may differ, and only near ties; `frame` pixels at the border are left out."""
    inner = (..., slice(frame, -frame or None), slice(frame, -frame or None))
    best, second = logits.topk(2, dim=0).values
    changed = logits.argmax(dim=0).numpy() != golden
    assert changed[inner].mean() <= 0.0005
    assert not changed[inner][(best - second).numpy()[inner] >= TIE].any()


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    pixels = np.asarray(Image.open(REFERENCE / "input_512x256.png").convert("RGB"))
    return normalise(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])


def assert_recorded(name: str, network: SegmentationNet, images: Tensor) -> None:
    """Everything in the recorded file `name` is what our network gives."""
    golden = np.load(REFERENCE / f"{name}.npz")
    with torch.inference_mode():
        parts = {part.scale: part for part in network.parts(images, THREE)}
        logits = network.scale_attn.mix([parts[s] for s in THREE], (256, 512)).whole()[0]
        single = network.logits(images, (1.0,))[0] if "single_argmax" in golden else logits
    heads = [part.attention[0] for part in parts.values() if part.attention is not None]
    if "explicit" in PUBLISHED[name.partition("_512x256")[0]] and heads[0].shape[0] == 1:
        heads = [torch.cat([part.attention[0] for _, part in sorted(parts.items()) if part.attention is not None])]
    frame = 8 if name.startswith("attnscale.DeepV3R50_") else 0  # its padded attention ends in a frame of ties
    for key in golden.files:
        array, stride = golden[key], int(key.rpartition("_s")[2]) if "_s" in key[1:] and key[-1].isdigit() else 1
        if key == "argmax":
            assert_same_classes(logits, array, frame)
        elif key == "single_argmax":
            assert_same_classes(single, array)
        elif key.startswith("maxprob"):
            assert differs(torch.softmax(logits, dim=0).amax(dim=0), array.astype(np.float32), stride) < PROBABILITY
        elif key.startswith("attn_head_call"):
            head = heads[int(key.removeprefix("attn_head_call")[0])]
            assert differs(head, array, stride) < LOGITS, key
        elif key.startswith("attn_"):
            part = parts[float(key[len("attn_") : key.index("x_s")])]
            assert part.attention is not None
            assert differs(at_size(part.attention, part.size).whole(), array, stride) < ATTENTION, key
        elif "x_s" in key:
            part = parts[float(key[len("pred_") : key.index("x_s")])]
            assert differs(at_size(part.logits, part.size).whole(), array, stride) < LOGITS, key
        else:
            assert key in ("pred_s4", "pred_s8", "single_pred_s8")
            assert differs(single if key.startswith("single") else logits, array, stride) < LOGITS, key


@pytest.mark.slow
@recorded
@pytest.mark.parametrize("arch", ["ocrnet.HRNet_Mscale", "deepv3.DeepV3R50"])
def test_the_full_network_gives_what_the_reference_gave(arch: str, photograph: Tensor) -> None:
    how = "n0.5_1.0_2.0" if arch == "ocrnet.HRNet_Mscale" else "average_1.0_0.5_2.0"
    assert_recorded(f"{arch}_512x256_{how}", network_by_formula(PUBLISHED[arch], 19), photograph)


@pytest.mark.thorough
@recorded
def test_one_network_with_each_way_to_combine_gives_what_the_reference_gave(photograph: Tensor) -> None:
    """All four have the same trunk and decoder, hence the same predictions of single scales: made once."""
    network = network_by_formula("resnet50_deeplabv3plus", 19)
    known: dict[Size, ScaleOutput] = {}

    def remembered(images: Tensor, *, context: Tensor | None = None) -> ScaleOutput:
        size = (images.shape[-2], images.shape[-1])
        if size not in known:
            known[size] = network.predict(images)
        return known[size]

    for name in ("deepv3.DeepV3PlusR50", "attnscale.DeepV3R50", "attnscale.DeepV3R50B", "attnscale.DeepV3R50BP"):
        other = network_by_formula(PUBLISHED[name], 19)
        same = network.state_dict()
        assert all(torch.equal(same[k], v) for k, v in other.state_dict().items() if not k.startswith("scale_attn."))
        other.predict = remembered if other is not network else network.predict  # type: ignore[method-assign]
        how = "average_1.0_0.5_2.0" if name.startswith("deepv3.") else "n0.5_1.0_2.0"
        assert_recorded(f"{name}_512x256_{how}", other, photograph)
    assert sorted(known) == [(128, 256), (256, 512), (512, 1024)]


# --- the same function as ever ----------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One network, an image's size, and the chains of scales whose result is recorded (the last one flipped too)."""

    arch: str
    size: tuple[int, int]
    chains: tuple[tuple[float, ...], ...] = (THREE,)
    stride: int = 5  # every so many-th pixel is recorded
    flip: bool = False
    training: bool = False


ODD_CHAIN = (0.25, 0.5, 1.0, 1.5)
CASES = [  # in an order in which no trunk is filled twice
    Case(SMALL, (45, 70), ((0.5, 1.0), THREE, ODD_CHAIN), stride=3, flip=True, training=True),
    Case("resnet50_deeplabv3", (45, 70)),
    Case("resnet50_deeplabv3plus", (45, 70), flip=True),
    Case("resnet50_deeplabv3plus_mscale", (45, 70), (THREE, ODD_CHAIN), training=True),
    Case("resnet50_deeplabv3plus_mscale2", (45, 70), training=True),
    Case("resnet50_deeplabv3plus_explicit", (45, 70), training=True),
    Case("resnet50_deeplabv3plus_explicit_bn", (45, 70)),
    Case("resnet50_deeplabv3plus_explicit_pairs", (45, 70), (THREE, ODD_CHAIN), training=True),
    Case("xception71_deeplabv3plus_mscale", (33, 65)),
    Case("xception71_deeper_mscale", (48, 80), ((0.5, 1.0),)),
    Case("hrnet48_ocr", (33, 65)),
    Case("hrnet48_plain_mscale", (33, 65)),
    Case("hrnet48_aspp_mscale", (33, 65)),
    Case("wrn38_deeplabv3plus_mscale", (33, 65)),
    Case("efficientnet_lite0_ocr", (45, 70), training=True),
]


def outputs(case: Case) -> dict[str, NDArray[np.float32]]:
    """What is recorded of a network."""
    network, images = network_by_formula(case.arch, CLASSES), picture(*case.size)
    with torch.inference_mode():
        found = {f"{chain}": network.logits(images, chain) for chain in case.chains}
        if case.flip:
            once, mirrored = (network.field(x, case.chains[-1]) for x in (images, images.flip(-1)))
            found["flip"] = mean_with_mirrored(once, mirrored).whole()
        if case.training:
            output = network(images)
            found |= {"joint": output.joint} | ({} if output.aux is None else {"aux": output.aux})
            found |= {f"scale {n}": logits for n, logits in enumerate(output.scales)}
    return {name: value[0, :, :: case.stride, :: case.stride].numpy() for name, value in found.items()}


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.arch)
def test_a_network_gives_what_it_always_gave(case: Case) -> None:
    """To a thousandth of the spread of its logits: ten times float noise."""
    now, all_before = outputs(case), np.load(OURS)
    before = {key.partition("/")[2]: all_before[key] for key in all_before.files if key.startswith(f"{case.arch}/")}
    assert list(now) == list(before)
    for name, expected in before.items():
        assert expected.std(axis=(1, 2)).min() > 0.05, name  # every class's map shows something
        np.testing.assert_allclose(now[name], expected, rtol=0, atol=1e-3 * expected.std(), err_msg=name)


def test_every_recorded_output_is_looked_at() -> None:
    assert {key.partition("/")[0] for key in np.load(OURS).files} == {case.arch for case in CASES}


# --- the rules that hold for any weights ------------------------------------------------------------------------------

EVERY_DECODER = [
    "hrnet18s_ocr_mscale",
    "hrnet18s_plain_explicit_pairs",
    "hrnet18s_aspp_mscale2",
    "efficientnet_lite0_plain_mscale",
    "resnet50_deeplabv3_mscale",
    "resnet50_deeplabv3plus",
    "efficientnet_b4_deeper_mscale",
]


@pytest.mark.thorough
@pytest.mark.parametrize("arch", EVERY_DECODER)
def test_any_size_gives_logits_of_the_size_of_the_input(arch: str) -> None:
    """One row; fewer rows than a stride; odd everywhere; the coarsest of HRNet's branches 2 x 3."""
    network = network_by_formula(arch, CLASSES)
    with torch.inference_mode():
        for height, width, chain in ((1, 70, FIVE), (31, 40, (1.0,)), (33, 65, THREE), (45, 70, FIVE), (7, 1, THREE)):
            images = picture(height, width)
            field = network.field(images, chain)
            whole = field.whole()
            assert (field.size, whole.shape) == ((height, width), (1, CLASSES, height, width))
            assert torch.isfinite(whole).all()
            some = field.rows(height // 2, height // 2 + 1)
            torch.testing.assert_close(some, whole[:, :, height // 2 : height // 2 + 1], rtol=0, atol=1e-4)
            output = network(images)
            logits = [output.joint, *output.scales, *([] if output.aux is None else [output.aux])]
            assert {x.shape for x in logits} == {(1, CLASSES, height, width)}
            assert len(output.scales) == (0 if isinstance(network.scale_attn, Average) else 2)


@pytest.mark.parametrize("scales", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("combination", ["explicit", "explicit_bn"])
def test_an_explicit_network_weighs_as_many_scales_as_it_was_built_for(combination: str, scales: int) -> None:
    network = network_by_formula(f"hrnet18s_plain_{combination}", CLASSES, scales)
    chain = network.scale_attn.training_scales
    assert len(chain) == scales and 1.0 in chain
    for height, width in ((1, 70), (45, 70)):
        with torch.inference_mode():
            assert network.logits(picture(height, width), chain).shape == (1, CLASSES, height, width)
            output = network(picture(height, width))
            assert output.joint.shape == (1, CLASSES, height, width)
            assert len(output.scales) == (0 if scales == 1 else scales)
            with (
                pytest.raises(ValueError, match=f"^scales 0.5,1,3: this network weighs exactly {scales} scales")
                if (scales != 3)
                else pytest.raises(ValueError, match=r"^scales 1: this network weighs exactly 3 scales at once$")
            ):
                network.logits(picture(height, width), (0.5, 1, 3) if scales != 3 else (1.0,))


@pytest.mark.parametrize(
    ("arch", "fine", "middle", "deep"),
    [
        pytest.param("resnet50_deeplabv3plus", (256, 12, 18), (512, 6, 9), (2048, 6, 9), id="resnet50"),
        pytest.param("wrn38_deeper", (128, 23, 35), (256, 12, 18), (4096, 6, 9), id="wide resnet"),
        pytest.param("xception71_deeper", (64, 23, 35), (128, 12, 18), (2048, 6, 9), id="xception"),
        pytest.param("efficientnet_b4_deeper", (24, 23, 35), (32, 12, 18), (448, 6, 9), id="efficientnet"),
    ],
)
def test_trunks_keep_the_strides_that_their_decoders_expect(
    arch: str, fine: tuple[int, ...], middle: tuple[int, ...], deep: tuple[int, ...]
) -> None:
    """Channels, height and width for an image of 45 x 70; no numbers are computed."""
    with torch.device("meta"):
        trunk = build(arch, CLASSES).eval().backbone
        found = trunk(torch.empty(1, 3, 45, 70))
    assert tuple(tuple(x.shape[1:]) for x in found) == (fine, middle, deep)
    assert trunk.channels == (fine[0], middle[0], deep[0])


@pytest.mark.parametrize(
    ("pixels", "kernel", "outputs", "before", "after"),
    [(4, 3, 2, 0, 1), (5, 3, 3, 1, 1), (4, 5, 2, 1, 2), (5, 5, 3, 2, 2), (1, 3, 1, 1, 1), (2, 5, 1, 1, 2)],
)
def test_efficientnet_lite_pads_as_tensorflow_does(
    pixels: int, kernel: int, outputs: int, before: int, after: int
) -> None:
    """Padded alike on both sides, weights trained there would look half a pixel past what they were trained on."""
    conv, images = SamePadConv(3, 2, kernel=kernel, stride=2), picture(pixels, pixels)
    expected = conv2d(pad(images, (before, after) * 2), conv.weight, stride=2)
    assert expected.shape == (1, 2, outputs, outputs)
    assert torch.equal(conv(images), expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_autocast_on_a_cpu_leaves_depthwise_convolutions_in_float32(stride: int) -> None:
    torch.manual_seed(0)
    ours = DepthwiseConv(6, 5, stride=stride)
    plain = SamePadConv(6, 6, kernel=5, stride=stride, groups=6)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 13, 18).bfloat16()
    expected = plain(x.float())
    expected.bfloat16().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(x)
    found.sum().backward()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    assert ours.weight.grad is not None and plain.weight.grad is not None
    assert torch.equal(ours.weight.grad, plain.weight.grad)


def test_efficientnet_lite_gives_one_map_at_stride_4() -> None:
    with torch.device("meta"):
        trunk = EfficientNetLite0().eval()
        assert trunk(torch.empty(1, 3, 45, 70)).shape == (1, trunk.channels, 12, 18) == (1, 496, 12, 18)


def test_training_sees_the_function_that_predicts_at_half_and_full_scale(small: SegmentationNet) -> None:
    images = picture(45, 70)
    with torch.inference_mode():
        output = small(images)
        assert torch.equal(output.joint, small.logits(images, (0.5, 1.0)))
        low, high = output.scales
        assert torch.equal(high, resize(small.predict(images).logits, (45, 70)))
        half = small.predict(resize(images, (22, 35))).logits
        assert torch.equal(low, resize(resize(half, (22, 35)), (45, 70)))


@pytest.mark.parametrize("combination", ["", "_mscale", "_mscale2", "_explicit", "_explicit_pairs"])
def test_logits_that_are_resized_once_give_the_training_the_same_bits(combination: str) -> None:
    network = build(f"hrnet18s_ocr{combination}", 5).eval()
    images = picture(96, 128)
    with torch.no_grad():
        output = network(images)
        parts = sorted(network.parts(images, network.scale_attn.training_scales), key=lambda part: part.scale)
        joint = network.scale_attn.mix(parts, (96, 128)).whole()
        each = [at_size(part.logits, part.size, (96, 128)).whole() for part in parts]
    assert torch.equal(output.joint, joint)
    assert len(output.scales) == (len(each) if len(each) > 1 else 0)
    assert all(torch.equal(one, other) for one, other in zip(output.scales, each, strict=False))


@pytest.mark.parametrize("combination", ["", "mscale", "mscale2", "explicit_pairs"])
def test_a_chain_of_one_scale_is_that_scales_own_prediction(combination: str) -> None:
    network, images = (
        network_by_formula("_".join(filter(None, ["hrnet18s_plain", combination])), CLASSES),
        picture(41, 72),
    )
    with torch.inference_mode():
        assert torch.equal(network.logits(images, (1.0,)), resize(network.predict(images).logits, (41, 72)))


@pytest.mark.parametrize("combination", [c for c in COMBINATIONS])
@pytest.mark.parametrize("chain", [(1.0, 2.0, 0.5), (2.0, 1.0, 0.5)], ids=["mixed", "descending"])
def test_the_order_in_which_scales_are_named_does_not_matter(chain: tuple[float, ...], combination: str) -> None:
    network, images = (
        network_by_formula("_".join(filter(None, ["hrnet18s_plain", combination])), CLASSES),
        picture(40, 72),
    )
    with torch.inference_mode():
        assert torch.equal(network.logits(images, chain), network.logits(images, THREE))


def test_attention_is_one_number_between_0_and_1_for_every_pixel(small: SegmentationNet) -> None:
    with torch.inference_mode():
        low, middle, high = sorted(small.parts(picture(45, 70), THREE), key=lambda part: part.scale)
    assert [part.size for part in (low, middle, high)] == [(22, 35), (45, 70), (90, 140)]
    assert high.attention is None and low.attention is not None and middle.attention is not None
    assert (low.attention.shape, middle.attention.shape) == ((1, 1, 6, 9), (1, 1, 12, 18))
    assert ((middle.attention > 0) & (middle.attention < 1)).all()
    assert middle.attention.max() - middle.attention.min() > 0.1  # and it looks at the picture


def test_a_region_is_the_mean_of_its_pixels_each_as_far_as_it_belongs_to_it() -> None:
    torch.manual_seed(0)
    features, logits = torch.randn(2, 8, 3, 5), 3 * torch.randn(2, 6, 3, 5)
    found = region_features(features, logits)
    assert found.shape == (2, 8, 6, 1)
    for image, region in np.ndindex(2, 6):
        belongs = logits[image, region].exp()
        expected = (features[image] * belongs).sum(dim=(1, 2)) / belongs.sum()
        torch.testing.assert_close(found[image, :, region, 0], expected)


def test_a_pixels_context_is_a_mixture_of_the_regions_it_resembles() -> None:
    torch.manual_seed(0)
    attention = ObjectAttention(mid=8, key=4).eval()
    pixels, regions = 9 * torch.randn(1, 8, 3, 5), 9 * torch.randn(1, 8, 6, 1)
    with torch.inference_mode():
        query = attention.f_pixel(pixels)[0].flatten(1).T  # (15, 4), one row a pixel
        key = attention.f_object(regions)[0].flatten(1).T  # (6, 4), one row a region
        value = attention.f_down(regions)[0].flatten(1).T  # (6, 4)
        mixtures = []
        for pixel in query:
            resemblance = torch.stack([pixel.dot(k) for k in key]) / 2  # the square root of 4 channels
            weights = resemblance.exp() / resemblance.exp().sum()
            mixtures.append((weights[:, None] * value).sum(dim=0))
        expected = attention.f_up(torch.stack(mixtures).T.reshape(1, 4, 3, 5))
        torch.testing.assert_close(attention(pixels, regions), expected)


@pytest.mark.parametrize("arch", ["hrnet18s_ocr_mscale", "resnet50_deeplabv3plus_explicit"])
def test_images_of_a_batch_do_not_see_each_other(arch: str) -> None:
    network = network_by_formula(arch, CLASSES)
    images = torch.cat([picture(40, 72), picture(40, 72).flip(-1), torch.zeros(1, 3, 40, 72)])
    with torch.inference_mode():
        together = network.logits(images, THREE)
        alone = torch.cat([network.logits(image[None], THREE) for image in images])
        assert (together[0] - together[1]).abs().max() > 0.1
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "arch",
    [
        "hrnet18s_ocr",
        "hrnet18s_ocr_mscale",
        "hrnet18s_aspp_explicit",
        "hrnet18s_plain_mscale2",
        "resnet50_deeplabv3_explicit_pairs",
        "resnet50_deeplabv3plus_explicit_bn",
    ],
)
def test_any_network_can_average_its_scales_instead(arch: str) -> None:
    """Its logits at each scale's size, rounded to nearest, resized to the image and averaged."""
    network, images = network_by_formula(arch, CLASSES), picture(45, 71)

    def at(height: int, width: int) -> Tensor:
        logits = network.predict(interpolate(images, (height, width), mode="bilinear")).logits
        logits = interpolate(logits, (height, width), mode="bilinear")
        return interpolate(logits, (45, 71), mode="bilinear")

    with torch.inference_mode():
        expected = (at(11, 18) + at(45, 71) + at(90, 142)) / 3  # a quarter of 45 x 71 is 11.25 x 17.75
        found = network.logits(images, (0.25, 1.0, 2.0), combination=Average())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        if not isinstance(network.scale_attn, Average) and "explicit" not in arch:
            assert (network.logits(images, (0.25, 1.0, 2.0)) - expected).abs().max() > 0.01


# --- nothing is computed in vain --------------------------------------------------------------------------------------


def calls(module: nn.Module) -> list[tuple[int, int]]:
    """Grows by the size of the input whenever the module runs."""
    seen: list[tuple[int, int]] = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].shape[-2], inputs[0].shape[-1])))
    return seen


@pytest.mark.parametrize(
    ("combination", "first_layer", "sizes"),
    [
        pytest.param("mscale", "conv0", [(6, 8), (12, 16)], id="not at the highest scale"),
        pytest.param("mscale2", "0", [(6, 8), (12, 16)], id="each scale with the next higher one"),
        pytest.param("explicit", "0", [(12, 16)], id="once for all"),
        pytest.param("explicit_bn", "0", [(12, 16)], id="once for all, batch norm"),
        pytest.param("explicit_pairs", "0", [(12, 16), (12, 16)], id="two pairs"),
    ],
)
def test_attention_is_computed_only_where_it_is_used(
    combination: str, first_layer: str, sizes: list[tuple[int, int]]
) -> None:
    network = network_by_formula(f"hrnet18s_plain_{combination}", CLASSES)
    head, trunk = calls(network.scale_attn.get_submodule(first_layer)), calls(network.backbone)
    with torch.inference_mode():
        network.logits(picture(48, 64), THREE)
        assert sorted(head) == sizes
        assert sorted(trunk) == [(24, 32), (48, 64), (96, 128)]  # the network sees each scale once
        head.clear()
        network.logits(picture(48, 64), THREE, combination=Average())
        assert head == []
        if "explicit" not in combination or combination == "explicit_pairs":
            network.logits(picture(48, 64), (1.0,))
            assert head == []


class Readers(TorchDispatchMode):
    """Counts the operations that read one of some tensors, or a view of it."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.places = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else [arg])]
        self.count += any(isinstance(a, Tensor) and a.untyped_storage().data_ptr() in self.places for a in given)
        return func(*args, **(kwargs or {}))


def test_inference_never_touches_the_auxiliary_logits_once_the_regions_are_known() -> None:
    """They are as large as the logits: resizing and combining them too would double that work."""
    network = network_by_formula(SMALL, CLASSES)
    assert isinstance(network, OCRNet)
    auxiliary: list[Tensor] = []
    network.ocr.aux_head.register_forward_hook(lambda _, inputs, output: auxiliary.append(output))
    images = picture(48, 64)
    with torch.inference_mode():
        field = network.field(images, THREE)
        parts = network.parts(images, (0.5, 1.0))
    assert len(auxiliary) == 5
    with torch.inference_mode(), Readers(auxiliary) as readers:
        field.rows(0, 10)
        field.whole()
    assert readers.count == 0
    with torch.inference_mode(), Readers([part.logits for part in parts]) as readers:
        network.scale_attn.mix(parts, (48, 64)).whole()
    assert readers.count > 0  # the counter counts
    with torch.inference_mode(), Readers(auxiliary) as readers:
        network.scale_attn.mix(
            parts, (48, 64), pick=lambda part: part.aux if part.aux is not None else part.logits
        ).whole()
    assert readers.count > 0


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize(
    "arch",
    [
        "hrnet18s_ocr",
        "hrnet18s_ocr_mscale",
        "hrnet18s_plain_mscale2",
        "hrnet18s_aspp_explicit",
        "resnet50_deeplabv3_explicit_pairs",
        "resnet50_deeplabv3plus_explicit_bn",
        "xception71_deeper_mscale",
        "efficientnet_b4_deeplabv3plus_mscale",
        "efficientnet_b4_deeper",
        "efficientnet_lite0_ocr_mscale",
    ],
)
def test_every_parameter_learns(arch: str) -> None:
    """A tensor without a gradient would stay at its random start for ever."""
    network = network_by_formula(arch, CLASSES)
    output = network(picture(64, 64))
    logits = [output.joint, *output.scales, *([] if output.aux is None else [output.aux])]
    sum(value.square().sum() for value in logits).backward()  # type: ignore[union-attr]
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.thorough
@pytest.mark.parametrize("arch", ["efficientnet_b4_deeplabv3plus_mscale", "efficientnet_b4_deeper"])
def test_a_fresh_efficientnet_learns_a_picture_in_a_few_steps(arch: str) -> None:
    """The reference cannot build these, so that no recorded output vouches for them."""
    torch.manual_seed(0)
    network = build(arch, CLASSES).train()
    images = torch.cat([picture(64, 64), picture(64, 64).flip(-1)])
    label = (torch.arange(64).view(1, 64, 1) // 16 + torch.arange(64) // 32).expand(2, 64, 64) % CLASSES
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = cross_entropy(network(images).joint, label)
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert all(np.isfinite(losses))
    assert losses[-1] < 0.8 * losses[0]


if __name__ == "__main__":
    np.savez_compressed(OURS, **{f"{case.arch}/{name}": x for case in CASES for name, x in outputs(case).items()})
