"""A checkpoint from a stranger runs code, or one that does not fit loads "successfully" and labels at random.

The reference takes every tensor whose size fits and skips the rest in silence; a wrong file then restores nothing.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from autolabel.manifests.classes import CAMVID, CITYSCAPES
from autolabel.teacher.build import build
from autolabel.teacher.checkpoints import (
    FORMAT,
    BadCheckpoint,
    fingerprint_tensor,
    load_network,
    overlap,
    read_checkpoint,
    save_checkpoint,
)
from autolabel.teacher.networks import SegmentationNet

ARCH = "hrnet18s_ocr_mscale"
PRINTS = ["00000000000000ff", "ffffffffffffffff", "8000000000000000", "00000000000000ff"]

Content = dict[str, Any]


@pytest.fixture(scope="module")
def network() -> SegmentationNet:
    torch.manual_seed(5)
    return build(ARCH, len(CAMVID))


@pytest.fixture
def ours(network: SegmentationNet, tmp_path: Path) -> Path:
    path = tmp_path / "best.pt"
    save_checkpoint(path, ARCH, CAMVID, network, fingerprint_tensor(PRINTS), {"miou": 0.5, "step": 7.0})
    return path


def published(network: SegmentationNet) -> Content:
    """What the reference's training saves: a wrapped network, and a score that is a numpy number."""
    state = {f"module.{key}": tensor for key, tensor in network.state_dict().items()}
    return {"epoch": 174, "arch": "ocrnet.HRNet_Mscale", "num_classes": 11, "state_dict": state,
            "mean_iu": np.float64(0.85), "command": "python train.py"}  # fmt: skip


def our_content(network: SegmentationNet) -> Content:
    """What `autolabel train` saves."""
    return {
        "format": FORMAT,
        "arch": ARCH,
        "label_space": json.loads(CAMVID.to_json()),
        "state_dict": network.state_dict(),
        "trained_on": torch.zeros(0, dtype=torch.int64),
        "metrics": {},
    }


def refusal(path: Path) -> str:
    """What is said about a file that is refused."""
    with pytest.raises(BadCheckpoint) as refused:
        load_network(path, read_checkpoint(path))
    assert str(refused.value).startswith(str(path))
    return str(refused.value).removeprefix(str(path))


# --- what loads -------------------------------------------------------------------------------------------------------


def test_our_own_checkpoint_comes_back_as_it_was_saved(ours: Path, network: SegmentationNet) -> None:
    checkpoint = read_checkpoint(ours)
    assert (checkpoint.arch, checkpoint.classes, checkpoint.label_space) == (ARCH, 11, CAMVID)
    assert checkpoint.metrics == {"miou": 0.5, "step": 7.0}
    assert checkpoint.training is None
    assert torch.equal(checkpoint.trained_on, fingerprint_tensor(PRINTS))
    loaded = load_network(ours, checkpoint).state_dict()
    assert list(loaded) == list(network.state_dict())
    assert all(torch.equal(loaded[key], tensor) for key, tensor in network.state_dict().items())
    assert [p.name for p in ours.parent.iterdir()] == ["best.pt"]  # no temporary file is left behind


def test_what_a_training_needs_to_go_on_is_kept_beside_the_weights(tmp_path: Path, network: SegmentationNet) -> None:
    path = tmp_path / "last.pt"
    training = {"step": 3, "best": 0.25, "curves": [{"step": 1, "miou": None}], "optimizer": {"state": {}}}
    save_checkpoint(path, ARCH, CAMVID, network, fingerprint_tensor([]), {}, training)
    assert read_checkpoint(path).training == training


@pytest.mark.parametrize(
    ("zipped", "module"),
    [
        pytest.param(True, b"numpy._core", id="zip"),
        pytest.param(False, b"numpy._core", id="before torch 1.6"),
        pytest.param(False, b"numpy.core", id="before torch 1.6 and numpy 2"),
    ],
)
def test_a_published_checkpoint_is_recognised_by_its_tensors(
    zipped: bool, module: bytes, tmp_path: Path, network: SegmentationNet
) -> None:
    path = tmp_path / "cityscapes_ocrnet.HRNet_Mscale.pth"
    torch.save(published(network), path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    assert zipped or b"cnumpy._core.multiarray\nscalar\n" in data
    if not zipped:
        path.write_bytes(data.replace(b"cnumpy._core.", b"c" + module + b"."))
    checkpoint = read_checkpoint(path)
    assert (checkpoint.arch, checkpoint.classes, checkpoint.label_space) == (ARCH, 11, None)
    assert checkpoint.trained_on.tolist() == []
    loaded = load_network(path, checkpoint).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in network.state_dict().items())


def test_a_published_checkpoint_of_the_full_network_is_recognised(tmp_path: Path) -> None:
    """A stand-in of the right shapes: each tensor is one number, seen as many."""
    with torch.device("meta"):
        state = build("hrnet48_ocr_mscale", 65).state_dict()
    path = tmp_path / "mapillary_ocrnet.HRNet_Mscale.pth"
    torch.save({"state_dict": {f"module.{k}": torch.zeros(()).expand(v.shape) for k, v in state.items()}}, path)
    checkpoint = read_checkpoint(path)
    assert (checkpoint.arch, checkpoint.classes, path.stat().st_size < 2**21) == ("hrnet48_ocr_mscale", 65, True)


@pytest.mark.parametrize("layout", ["ours", "published"])
def test_counters_that_nothing_reads_may_be_missing(layout: str, tmp_path: Path, network: SegmentationNet) -> None:
    content = published(network) if layout == "published" else our_content(network)
    content["state_dict"] = {k: v for k, v in content["state_dict"].items() if not k.endswith("num_batches_tracked")}
    torch.save(content, tmp_path / "c.pt")
    loaded = load_network(tmp_path / "c.pt", read_checkpoint(tmp_path / "c.pt"))
    assert torch.equal(loaded.ocr.cls_head.weight, network.ocr.cls_head.weight)


# --- files that are no checkpoint -------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^checkpoint .*gone\.pt does not exist$"):
        read_checkpoint(tmp_path / "gone.pt")


def test_an_empty_file_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "c.pt").touch()
    assert refusal(tmp_path / "c.pt") == " is empty (0 bytes): it was cut off while it was written or copied"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"<!DOCTYPE html><title>Quota exceeded</title>", id="web page"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 9\n", id="lfs pointer"),
        pytest.param(b"\n", id="newline"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(200), id="picture"),
        pytest.param(b"PK\x03\x04" + bytes(200), id="start of a zip"),
        pytest.param(b"\x80\x02}q\x00.", id="pickle of {}"),
        pytest.param(bytes(4096), id="zeros"),
    ],
)
def test_a_file_of_another_kind_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.pt").write_bytes(data)
    assert refusal(tmp_path / "c.pt").startswith(" is not a loadable checkpoint: ")


@pytest.mark.parametrize("kept", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_a_file_that_was_cut_off_is_refused(
    zipped: bool, kept: float, tmp_path: Path, network: SegmentationNet
) -> None:
    path = tmp_path / "c.pth"
    torch.save(published(network), path, _use_new_zipfile_serialization=zipped)
    os.truncate(path, int(path.stat().st_size * kept))
    assert refusal(path).startswith(" is not a loadable checkpoint: ")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_noise_in_the_pickled_part_is_refused_and_never_a_crash(tmp_path: Path) -> None:
    """Whatever is wrong in a file, the answer is one clear line."""
    torch.save(our_content(build(ARCH, 1)) | {"state_dict": {"a": torch.zeros(2)}}, tmp_path / "whole.pt",
               _use_new_zipfile_serialization=False)  # fmt: skip
    whole = (tmp_path / "whole.pt").read_bytes()
    for seed in range(300):
        dice = random.Random(seed)
        data = bytearray(whole)
        for _ in range(3):
            data[dice.randrange(len(data))] = dice.randrange(256)
        (tmp_path / "c.pt").write_bytes(data)
        refusal(tmp_path / "c.pt")


class Bomb:
    """Touches a file when it is unpickled by a reader that trusts."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("place", ["alone", "beside the weights", "among the weights"])
def test_nothing_in_a_checkpoint_is_executed(
    zipped: bool, place: str, tmp_path: Path, network: SegmentationNet
) -> None:
    target, path = tmp_path / "executed", tmp_path / "c.pt"
    content: Any = published(network)
    if place == "alone":
        content = Bomb(target)
    elif place == "beside the weights":
        content["command"] = Bomb(target)
    else:
        content["state_dict"]["module.backbone.conv1.weight"] = Bomb(target)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert refusal(path).startswith(" is not a loadable checkpoint: ")
    assert not target.exists()
    torch.load(path, weights_only=False)  # the bomb is live: a reader that trusts sets it off
    assert target.exists()


# --- checkpoints that do not fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({"epoch": 3}, id="some dictionary"),
        pytest.param([1, 2], id="a list"),
        pytest.param(torch.zeros(3), id="a tensor"),
        pytest.param({"state_dict": [1]}, id="state_dict is a list"),
    ],
)
def test_a_file_without_weights_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "c.pt")
    expected = " holds no 'state_dict': expected one of `autolabel train`, or a published one"
    assert refusal(tmp_path / "c.pt") == expected


BOTH = "hrnet48_ocr_mscale or hrnet18s_ocr_mscale"


def without(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: void(state.pop(key))


def void(_: object) -> None: ...


def with_tensor(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda state: void(state.update({key: value}))


@pytest.mark.parametrize(
    ("change", "ours", "theirs"),
    [
        pytest.param(
            without("backbone.conv1.weight"),
            f" does not fit {ARCH}: backbone.conv1.weight is missing",
            "; nearest miss: backbone.conv1.weight is missing",
            id="missing",
        ),
        pytest.param(
            with_tensor("scale_attn.conv2.weight", torch.zeros(1, 32, 1, 1)),
            f" does not fit {ARCH}: scale_attn.conv2.weight is (1, 32, 1, 1) instead of (1, 64, 1, 1)",
            "; nearest miss: scale_attn.conv2.weight is (1, 32, 1, 1) instead of (1, 64, 1, 1)",
            id="misshapen",
        ),
        pytest.param(
            with_tensor("scale_attn.conv3.bias", torch.zeros(1)),
            f" does not fit {ARCH}: scale_attn.conv3.bias is not in the network",
            "; nearest miss: scale_attn.conv3.bias is not in the network",
            id="extra",
        ),
    ],
)
def test_the_first_tensor_that_does_not_fit_is_named(
    change: Callable[[dict[str, Any]], None], ours: str, theirs: str, tmp_path: Path, network: SegmentationNet
) -> None:
    content = our_content(network)
    change(content["state_dict"])
    torch.save(content, tmp_path / "c.pt")
    assert refusal(tmp_path / "c.pt") == ours
    torch.save({"state_dict": content["state_dict"]}, tmp_path / "c.pth")
    assert refusal(tmp_path / "c.pth") == f" is a checkpoint of another network: expected {BOTH}{theirs}"


@pytest.mark.parametrize("key", ["scale_attn.conv2.weight", "ocr.cls_head.weight"])
@pytest.mark.parametrize("value", [3, "text"])
def test_what_is_no_tensor_is_named(value: object, key: str, tmp_path: Path, network: SegmentationNet) -> None:
    for content in (our_content(network), {"state_dict": dict(network.state_dict())}):
        content["state_dict"][key] = value
        torch.save(content, tmp_path / "c.pt")
        assert key in refusal(tmp_path / "c.pt")


def test_a_head_that_is_a_single_number_is_refused(tmp_path: Path, network: SegmentationNet) -> None:
    torch.save({"state_dict": network.state_dict() | {"ocr.cls_head.weight": torch.tensor(1.0)}}, tmp_path / "c.pt")
    assert refusal(tmp_path / "c.pt").startswith(f" is a checkpoint of another network: expected {BOTH}")


def test_all_that_does_not_fit_is_counted(tmp_path: Path, network: SegmentationNet) -> None:
    content = our_content(build(ARCH, len(CITYSCAPES)))
    torch.save(content, tmp_path / "c.pt")
    assert refusal(tmp_path / "c.pt") == (
        f" does not fit {ARCH}: ocr.aux_head.2.bias is (19,) instead of (11,) (and 3 more differences)"
    )


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    state = {f"module.{k}": v for k, v in torch.nn.Linear(2, 2).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "c.pth")
    assert refusal(tmp_path / "c.pth") == f" is a checkpoint of another network: expected {BOTH}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_diverged_are_refused(value: float, tmp_path: Path, network: SegmentationNet) -> None:
    content = our_content(network)
    content["state_dict"] = {k: v.clone() for k, v in content["state_dict"].items()}
    content["state_dict"]["backbone.bn1.running_var"][3] = value
    torch.save(content, tmp_path / "c.pt")
    expected = ": tensor backbone.bn1.running_var holds NaN or infinity; the training it came from diverged"
    assert refusal(tmp_path / "c.pt") == expected


@pytest.mark.parametrize("key", ["arch", "label_space", "trained_on", "metrics"])
def test_one_of_ours_that_lacks_an_entry_is_refused(key: str, tmp_path: Path, network: SegmentationNet) -> None:
    content = our_content(network)
    del content[key]
    torch.save(content, tmp_path / "c.pt")
    assert key in refusal(tmp_path / "c.pt")


def test_one_of_ours_with_an_unknown_network_is_refused(tmp_path: Path, network: SegmentationNet) -> None:
    torch.save(our_content(network) | {"arch": "unet"}, tmp_path / "c.pt")
    assert "unknown architecture 'unet'" in refusal(tmp_path / "c.pt")


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_fingerprints_use_all_64_bits_each_once() -> None:
    assert fingerprint_tensor(PRINTS).dtype == torch.int64
    assert fingerprint_tensor(PRINTS).tolist() == [0xFF, -(2**63), -1]
    assert fingerprint_tensor([]).tolist() == []


@pytest.mark.parametrize(
    ("seen", "asked", "expected"),
    [
        pytest.param(PRINTS, ["01", "8000000000000000", "ffffffffffffffff"], [1, 2], id="some"),
        pytest.param(PRINTS, ["7fffffffffffffff", "fe"], [], id="none"),
        pytest.param([], PRINTS, [], id="nothing known"),
        pytest.param(PRINTS, [], [], id="nothing asked"),
    ],
)
def test_overlap_gives_the_places_of_known_images(seen: list[str], asked: list[str], expected: list[int]) -> None:
    assert overlap(fingerprint_tensor(seen), asked) == expected
