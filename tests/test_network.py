"""A network that differs from the published one by one detail still loads its weights, and every label is wrong.

No trained weights are at hand, so both sides are filled with the same numbers: each tensor from its key and shape
alone. `data/network.npz` holds what our small network gave with them; rewrite it with `python tests/test_network.py`,
and only after the comparison with the reference's recorded outputs (`../shared/data/goldens`) has passed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from autolabel.teacher.build import build
from autolabel.teacher.multiscale import HierarchicalNet, ScalePrediction, rescale
from autolabel.teacher.ocr import ObjectAttention, region_features
from autolabel.teacher.predict import normalise

torch.set_num_threads(1)  # the small network is no slower with one, and never waits for a busy core

OURS = Path(__file__).parent / "data" / "network.npz"
REFERENCE = Path(__file__).parents[2] / "shared/data/goldens"
recorded = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference's recorded outputs are not here")

# Convolutions are scaled by 0.6, but for these: so every layer's output stays near unit size, and several classes win.
GAINS = {"backbone.layer": 0.8, "backbone.conv": 0.7, "ocr.cls_head.": 3.0, "scale_attn.conv2.": 4.2}
CHAINS = {"training": (0.5, 1.0), "inference": (0.5, 1.0, 2.0), "odd": (0.25, 0.5, 1.0, 1.5)}
CLASSES, STRIDE = 5, 3  # of our own recorded outputs; every third pixel is kept


def tensor_by_formula(key: str, shape: Sequence[int]) -> Tensor:
    """The number of every weight, from the tensor's key and shape alone."""
    kind = key.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return torch.tensor(0)
    dice = np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")))
    if kind == "running_var":
        values = dice.uniform(0.5, 1.5, shape)
    elif kind in ("running_mean", "bias"):
        values = 0.1 * dice.standard_normal(shape)
    elif len(shape) == 1:  # the weight of a batch norm
        values = 1 + 0.1 * dice.standard_normal(shape)
    else:
        values = dice.standard_normal(shape)
        if shape[1] > 3:  # a filter without a mean, but for those that see the image
            values -= values.mean(axis=(1, 2, 3), keepdims=True)
        gain = next((g for start, g in GAINS.items() if key.startswith(start)), 0.6)
        values *= gain * np.sqrt(2 / np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(values, np.float32))


def network_by_formula(arch: str, classes: int) -> HierarchicalNet:
    with torch.device("meta"):  # no time lost on weights that are replaced
        network = build(arch, classes)
    state = {key: tensor_by_formula(key, tensor.shape) for key, tensor in network.state_dict().items()}
    network.load_state_dict(state, assign=True)
    return network.eval()


def picture(height: int, width: int) -> Tensor:
    """(1, 3, height, width) normalised; waves and edges by formula."""
    y, x = np.mgrid[:height, :width]
    channels = [(7 * x + 3 * y) % 256, (x * y) % 256, np.where((x // 9 + y // 7) % 2, 200, 40)]
    return normalise(torch.from_numpy(np.stack(channels)[None].astype(np.uint8)))


@pytest.fixture(scope="module")
def small() -> HierarchicalNet:
    return network_by_formula("hrnet18s_ocr_mscale", CLASSES)


# --- the same tensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "parameters", "digest"),
    [
        pytest.param(
            "hrnet48_ocr_mscale",
            72_143_430,
            "1d7f5148db00b30762368c1a14714547b6a08c4cebf43571a545cfee9693c9c6",
            id="w48",
        ),
        pytest.param(
            "hrnet18s_ocr_mscale",
            2_005_926,
            "19e32b81f5fa2ac9d2716f2c600862f71900a9383d1ff35808faf27b5bf5ba34",
            id="w18-small",
        ),
    ],
)
def test_keys_shapes_types_and_their_order_are_those_of_published_checkpoints(
    arch: str, parameters: int, digest: str
) -> None:
    with torch.device("meta"):
        network = build(arch, 19)
    lines = [f"{key} {tuple(tensor.shape)} {tensor.dtype}" for key, tensor in network.state_dict().items()]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest
    assert sum(p.numel() for p in network.parameters()) == parameters


@recorded
def test_keys_shapes_types_and_their_order_equal_the_references() -> None:
    entries = json.loads((REFERENCE / "keys/ocrnet.HRNet_Mscale.json").read_text())["entries"]
    with torch.device("meta"):
        state = build("hrnet48_ocr_mscale", 19).state_dict()
    ours = [(k, [list(v.shape), str(v.dtype).removeprefix("torch.")]) for k, v in state.items()]
    assert ours == list(entries.items())


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown architecture 'unet': expected one of hrnet48_ocr_mscale, hrnet18s"):
        build("unet", 19)


# --- the same function ------------------------------------------------------------------------------------------------


@recorded
def test_the_full_network_gives_what_the_reference_gave() -> None:
    """Tolerances are those of the recorded outputs' README: far above float noise, far below any mistake tried."""
    golden = np.load(REFERENCE / "ocrnet.HRNet_Mscale_512x256_n0.5_1.0_2.0.npz")
    pixels = np.asarray(Image.open(REFERENCE / "input_512x256.png").convert("RGB"))
    network = network_by_formula("hrnet48_ocr_mscale", 19)
    scales: dict[int, ScalePrediction] = {}
    inner = network.predict_scale

    def watched(images: Tensor) -> ScalePrediction:
        scales[images.shape[-1]] = inner(images)
        return scales[images.shape[-1]]

    network.predict_scale = watched  # type: ignore[method-assign]
    with torch.inference_mode():
        logits = network.logits(normalise(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]), (0.5, 1.0, 2.0))[0]

    def differs(ours: Tensor, name: str, stride: int) -> float:
        return float(np.abs(ours[..., ::stride, ::stride].numpy() - golden[name]).max())

    assert list(scales) == [1024, 512, 256]
    assert differs(logits, "pred_s4", 4) < 2e-3
    assert differs(torch.softmax(logits, dim=0).amax(dim=0), "maxprob", 1) < 1e-3
    assert differs(scales[1024].logits[0], "pred_2.0x_s16", 16) < 2e-3
    for width, scale in ((512, "1.0"), (256, "0.5")):
        assert differs(scales[width].logits[0], f"pred_{scale}x_s8", 8) < 2e-3
        assert differs(scales[width].attention[0, 0], f"attn_{scale}x_s8", 8) < 1e-3
    best, second = logits.topk(2, dim=0).values
    changed = logits.argmax(dim=0).numpy() != golden["argmax"]
    assert changed.mean() <= 0.0005
    assert not changed[(best - second).numpy() >= 4e-3].any()


def small_outputs(network: HierarchicalNet) -> dict[str, NDArray[np.float32]]:
    """What is recorded of our own network: a size that no stride divides, three chains, and the training outputs."""
    images = picture(45, 70)
    with torch.inference_mode():
        found = {name: network.logits(images, chain) for name, chain in CHAINS.items()}
        found |= {f"forward_{name}": value for name, value in vars(network(images)).items()}
    return {name: value[0, :, ::STRIDE, ::STRIDE].numpy() for name, value in found.items()}


@pytest.mark.parametrize("name", [*CHAINS, "forward_joint", "forward_aux", "forward_low", "forward_high"])
def test_the_small_network_gives_what_it_always_gave(name: str, small: HierarchicalNet) -> None:
    before, now = np.load(OURS)[name], small_outputs(small)[name]
    assert before.std() > 0.2
    np.testing.assert_allclose(now, before, rtol=0, atol=1e-3)


# --- the rules that hold for any weights ------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(33, 65), (70, 90), (32, 48)])
def test_any_size_gives_logits_of_the_size_of_the_input(height: int, width: int, small: HierarchicalNet) -> None:
    images = picture(height, width)
    with torch.inference_mode():
        assert small.logits(images, (0.5, 1.0, 2.0)).shape == (1, CLASSES, height, width)
        assert {v.shape for v in vars(small(images)).values()} == {(1, CLASSES, height, width)}
        assert small.backbone(images).shape == (1, 240, -(-height // 4), -(-width // 4))


def test_training_sees_the_function_that_predicts_at_half_and_full_scale(small: HierarchicalNet) -> None:
    images = picture(45, 70)
    with torch.inference_mode():
        output = small(images)
        assert torch.equal(output.joint, small.logits(images, (0.5, 1.0)))
        assert torch.equal(output.high, small.predict_scale(images).logits)


def test_a_chain_of_one_scale_is_that_scales_own_prediction(small: HierarchicalNet) -> None:
    images = picture(40, 72)
    with torch.inference_mode():
        assert torch.equal(small.logits(images, (1.0,)), small.predict_scale(images).logits)


@pytest.mark.parametrize("chain", [(1.0, 2.0, 0.5), (2.0, 1.0, 0.5)], ids=["mixed", "descending"])
def test_the_order_in_which_scales_are_named_does_not_matter(chain: tuple[float, ...], small: HierarchicalNet) -> None:
    images = picture(40, 72)
    with torch.inference_mode():
        assert torch.equal(small.logits(images, chain), small.logits(images, (0.5, 1.0, 2.0)))


def test_attention_is_one_number_between_0_and_1_for_every_pixel(small: HierarchicalNet) -> None:
    with torch.inference_mode():
        attention = small.predict_scale(picture(45, 70)).attention
    assert attention.shape == (1, 1, 45, 70)
    assert ((attention > 0) & (attention < 1)).all()
    assert attention.max() - attention.min() > 0.2  # and it looks at the picture


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


def test_four_scales_are_combined_as_the_paper_writes_it(small: HierarchicalNet) -> None:
    """From the highest down: mixed at the lower scale's size down to 1, at the full size below it."""
    images = picture(48, 64)

    def to(x: Tensor, height: int, width: int) -> Tensor:
        return interpolate(x, size=(height, width), mode="bilinear", align_corners=False)

    with torch.inference_mode():
        double, larger, full, half = (small.predict_scale(rescale(images, s)) for s in (2.0, 1.5, 1.0, 0.5))
        mixed = larger.attention * larger.logits + (1 - larger.attention) * to(double.logits, 72, 96)
        mixed = full.attention * full.logits + (1 - full.attention) * to(mixed, 48, 64)
        mixed = to(half.attention * half.logits, 48, 64) + (1 - to(half.attention, 48, 64)) * mixed
        torch.testing.assert_close(small.logits(images, (0.5, 1.0, 1.5, 2.0)), mixed, rtol=0, atol=1e-5)


def test_images_of_a_batch_do_not_see_each_other(small: HierarchicalNet) -> None:
    images = torch.cat([picture(40, 72), picture(40, 72).flip(-1)])
    with torch.inference_mode():
        together = small.logits(images, (0.5, 1.0))
        alone = torch.cat([small.logits(image[None], (0.5, 1.0)) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_every_parameter_learns() -> None:
    """A tensor without a gradient would stay at its random start for ever."""
    network = network_by_formula("hrnet18s_ocr_mscale", CLASSES)
    sum(value.square().sum() for value in vars(network(picture(64, 64))).values()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


if __name__ == "__main__":
    np.savez_compressed(OURS, **small_outputs(network_by_formula("hrnet18s_ocr_mscale", CLASSES)))
