"""A checkpoint from a stranger runs code, or one that does not fit loads "successfully" and labels at random.

The reference takes every tensor whose size fits and skips the rest in silence; a wrong file then restores nothing.
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import autolabel
from formula import NOT_BUILT, PUBLISHED, customary
from safetensors.torch import save_file
from torch import Tensor

from autolabel.manifests import local_storage, storage
from autolabel.manifests.label_space import CAMVID, CITYSCAPES
from autolabel.manifests.scenes import write_city
from autolabel.teacher.checkpoints import (
    DRAWN_STREETS,
    FORMAT,
    BadCheckpoint,
    fingerprint_tensor,
    load_network,
    mismatches,
    overlap,
    read_checkpoint,
    save_checkpoint,
    save_tensors,
)
from autolabel.teacher.networks.build import build
from autolabel.teacher.networks.combine import Average
from autolabel.teacher.networks.decoders import SegmentationNet

pytestmark = pytest.mark.thorough

ARCH = "hrnet18s_ocr_mscale"
PRINTS = ["00000000000000ff", "ffffffffffffffff", "8000000000000000", "00000000000000ff"]

ANOTHER = " is a checkpoint of another network: expected one of those in docs/networks.md, such as hrnet48_ocr_mscale"

Content = dict[str, Any]


@pytest.fixture(scope="module")
def network() -> SegmentationNet:
    torch.manual_seed(5)
    return build(ARCH, len(CAMVID))


@pytest.fixture
def ours(network: SegmentationNet, tmp_path: Path) -> Path:
    path = tmp_path / "best.pt"
    save_checkpoint(
        path,
        network,
        arch=ARCH,
        space=CAMVID,
        trained_on=fingerprint_tensor(PRINTS),
        metrics={"miou": 0.5, "step": 7.0},
    )
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


def test_last_pt_holds_the_state_of_the_training_beside_the_weights(tmp_path: Path, network: SegmentationNet) -> None:
    path = tmp_path / "last.pt"
    training = {"step": 3, "best": 0.25, "curves": [{"step": 1, "miou": None}], "optimizer": {"state": {}}}
    save_checkpoint(path, network, arch=ARCH, space=CAMVID, training=training)
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
    assert checkpoint.trained_on is None
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


REFERENCE = Path(__file__).parents[3] / "shared/data/goldens/keys"
recorded = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference's recorded lists of tensors are not here")


def stand_in(arch: str, classes: int = 19, scales: int = 3) -> dict[str, Tensor]:
    """A state dict of the right shapes: each tensor is one number, seen as many."""
    with torch.device("meta"):
        state = build(arch, classes, scales=scales).state_dict()
    return {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in state.items()}


def as_published(state: dict[str, Tensor], synonyms: bool = True) -> dict[str, Tensor]:
    """With the wrapper's `module.` before every key, and with the other name of the trunk and of the head."""
    other = {"backbone.": "trunk.", "cls_head.": "seg_head."} if synonyms else {}
    renamed = {}
    for key, tensor in state.items():
        start = next((s for s in other if key.startswith(s)), "")
        renamed["module." + other.get(start, "") + key.removeprefix(start)] = tensor
    return renamed


@pytest.mark.thorough
@pytest.mark.parametrize("synonyms", [False, True], ids=["customary names", "other names"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_network_is_recognised_by_its_tensors(name: str, synonyms: bool, tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    torch.save({"arch": name, "state_dict": as_published(stand_in(PUBLISHED[name]), synonyms)}, path)
    checkpoint = read_checkpoint(path)
    assert (checkpoint.arch, checkpoint.classes, checkpoint.label_space) == (PUBLISHED[name], 19, None)
    with torch.device("meta"):
        network = build(checkpoint.arch, checkpoint.classes, scales=checkpoint.scales)
    assert mismatches(network.state_dict(), checkpoint.state_dict) == []


@recorded
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_references_own_keys_are_recognised(name: str, tmp_path: Path) -> None:
    entries = json.loads((REFERENCE / f"{name}.json").read_text())["entries"]
    types = {"float32": torch.float32, "int64": torch.int64}
    state = {f"module.{k}": torch.zeros((), dtype=types[t]).expand(s) for k, (s, t) in entries.items()}
    torch.save({"state_dict": state}, tmp_path / "c.pth")
    checkpoint = read_checkpoint(tmp_path / "c.pth")
    assert checkpoint.arch == PUBLISHED[name]
    with torch.device("meta"):
        expected = build(checkpoint.arch, checkpoint.classes, scales=checkpoint.scales).state_dict()
    assert list(expected) == list(checkpoint.state_dict)
    assert mismatches(expected, checkpoint.state_dict) == []


@recorded
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepv3.DeepV3PlusSRNX50", ANOTHER),
        (
            "mscale.DeepV3W38Fuse2",
            " does not fit wrn38_deeplabv3plus_mscale: scale_attn.conv2.weight is (2, 256, 1, 1) instead of"
            " (1, 256, 1, 1)",
        ),
    ],
)
def test_a_published_network_that_is_not_built_is_refused(name: str, expected: str, tmp_path: Path) -> None:
    assert name in NOT_BUILT
    entries = json.loads((REFERENCE / f"{name}.json").read_text())["entries"]
    torch.save({"state_dict": {k: torch.zeros(()).expand(s) for k, (s, _) in entries.items()}}, tmp_path / "c.pth")
    assert refusal(tmp_path / "c.pth") == expected


def test_both_names_of_a_module_load_the_same_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = build("hrnet18s_plain_mscale", 4)
    torch.save({"state_dict": as_published(network.state_dict())}, tmp_path / "c.pth")
    keys = set(torch.load(tmp_path / "c.pth", weights_only=True)["state_dict"])
    assert {"module.trunk.conv1.weight", "module.seg_head.6.weight"} <= keys
    assert {customary(key.removeprefix("module.")) for key in keys} == set(network.state_dict())
    loaded = load_network(tmp_path / "c.pth", read_checkpoint(tmp_path / "c.pth")).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("file", ["safetensors", "pth"])
def test_a_bare_state_dict_loads(file: str, prefix: str, tmp_path: Path, network: SegmentationNet) -> None:
    path = tmp_path / f"c.{file}"
    state = {prefix + key: tensor for key, tensor in network.state_dict().items()}
    save_file(state, path) if file == "safetensors" else torch.save(state, path)
    checkpoint = read_checkpoint(path)
    assert (checkpoint.arch, checkpoint.classes, checkpoint.label_space) == (ARCH, 11, None)
    loaded = load_network(path, checkpoint).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in network.state_dict().items())


def test_tensors_are_known_by_their_content_and_not_by_their_name(tmp_path: Path, network: SegmentationNet) -> None:
    save_file(network.state_dict(), tmp_path / "tensors.pth")
    assert read_checkpoint(tmp_path / "tensors.pth").arch == ARCH


def test_a_checkpoint_passed_on_as_tensors_keeps_all_but_bits_of_its_weights(ours: Path, tmp_path: Path) -> None:
    """What labels are computed from is the file's own numbers, widened exactly, whatever the machine."""
    before = read_checkpoint(ours)
    save_tensors(tmp_path / "c.safetensors", before)
    after = read_checkpoint(tmp_path / "c.safetensors")
    assert (after.arch, after.classes, after.label_space, after.metrics) == (ARCH, 11, CAMVID, before.metrics)
    assert torch.equal(after.trained_on, before.trained_on) and len(overlap(after.trained_on, PRINTS)) == len(PRINTS)
    loaded = load_network(tmp_path / "c.safetensors", after).state_dict()
    assert loaded.keys() == before.state_dict.keys()
    for key, tensor in before.state_dict.items():
        assert torch.equal(loaded[key], tensor.half().float() if tensor.ndim > 1 else tensor), key
    save_tensors(tmp_path / "again.safetensors", after)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    assert (tmp_path / "c.safetensors").stat().st_size < 0.52 * ours.stat().st_size


def test_a_published_network_is_not_passed_on_as_one_of_ours(tmp_path: Path, network: SegmentationNet) -> None:
    torch.save(published(network), tmp_path / "c.pth")
    with pytest.raises(ValueError, match="does not name its classes"):
        save_tensors(tmp_path / "c.safetensors", read_checkpoint(tmp_path / "c.pth"))


@pytest.mark.parametrize("damage", ["{", "[]", '{"arch": "hrnet99"}', '{"trained_on": ["xyz"]}'])
def test_tensors_with_damaged_metadata_are_refused(damage: str, network: SegmentationNet, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_file(network.state_dict(), path, {FORMAT: damage})
    assert refusal(path) != ""


@pytest.mark.parametrize(
    ("saved_as", "expected"),
    [
        ("attnscale.DeepV3R50B", ("resnet50_deeplabv3plus_explicit_bn", 2)),
        ("attnscale.DeepV3R50BP", ("resnet50_deeplabv3plus_explicit_pairs", 2)),
        (None, ("resnet50_deeplabv3plus_explicit_pairs", 2)),
    ],
    ids=["B", "BP", "unnamed"],
)
def test_two_published_networks_of_the_same_shapes_are_told_by_their_name(
    saved_as: str | None, expected: tuple[str, int], tmp_path: Path
) -> None:
    """Over two scales the explicit head has as many outputs as the paired one; without a name it is taken for that."""
    content: Content = {"state_dict": as_published(stand_in("resnet50_deeplabv3plus_explicit_bn", scales=2))}
    torch.save(content | ({"arch": saved_as} if saved_as else {}), tmp_path / "c.pth")
    checkpoint = read_checkpoint(tmp_path / "c.pth")
    assert (checkpoint.arch, checkpoint.scales) == expected


@pytest.mark.parametrize("scales", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("combination", ["explicit", "explicit_bn"])
def test_a_checkpoint_of_ours_keeps_its_number_of_scales(combination: str, scales: int, tmp_path: Path) -> None:
    arch = f"hrnet18s_plain_{combination}"
    network = build(arch, len(CAMVID), scales=scales)
    save_checkpoint(tmp_path / "c.pt", network, arch=arch, space=CAMVID)
    checkpoint = read_checkpoint(tmp_path / "c.pt")
    assert (checkpoint.arch, checkpoint.scales) == (arch, scales)
    assert load_network(tmp_path / "c.pt", checkpoint).scale_attn.scales == scales


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


@pytest.mark.parametrize("kept", [9, 100, 0.1, 0.5, 0.9, 0.999999])
def test_tensors_that_were_cut_off_are_refused(kept: float, tmp_path: Path, network: SegmentationNet) -> None:
    path = tmp_path / "c.safetensors"
    save_file(network.state_dict(), path)
    os.truncate(path, int(kept if kept > 1 else path.stat().st_size * kept))
    assert refusal(path).startswith(" is not a loadable checkpoint: ")


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"{}", id="no tensors"),
        pytest.param(b"{" + b" " * 50, id="no JSON"),
        pytest.param(b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}    ', id="offsets that lie"),
        pytest.param(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}    ', id="negative offsets"),
    ],
)
def test_a_header_that_lies_is_refused(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert refusal(tmp_path / "c.safetensors") != ""


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
@pytest.mark.parametrize("name", ["c.pth", "c.safetensors"])
def test_nothing_in_a_checkpoint_is_executed(
    name: str, zipped: bool, place: str, tmp_path: Path, network: SegmentationNet
) -> None:
    target, path = tmp_path / "executed", tmp_path / name
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
    with path.open("rb") as file:
        torch.load(file, weights_only=False)  # the bomb is live: a reader that trusts sets it off
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


def without(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: void(state.pop(key))


def void(_: object) -> None: ...


def with_tensor(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda state: void(state.update({key: value}))


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        pytest.param(without("backbone.conv1.weight"), "backbone.conv1.weight is missing", id="missing"),
        pytest.param(
            with_tensor("scale_attn.conv2.weight", torch.zeros(1, 32, 1, 1)),
            "scale_attn.conv2.weight is (1, 32, 1, 1) instead of (1, 64, 1, 1)",
            id="misshapen",
        ),
        pytest.param(
            with_tensor("scale_attn.conv3.bias", torch.zeros(1)),
            "scale_attn.conv3.bias is not in the network",
            id="extra",
        ),
    ],
)
def test_the_first_tensor_that_does_not_fit_is_named(
    change: Callable[[dict[str, Any]], None], wrong: str, tmp_path: Path, network: SegmentationNet
) -> None:
    """In files of ours and in published ones, which are recognised by a few tensors alone."""
    content = our_content(network)
    change(content["state_dict"])
    torch.save(content, tmp_path / "c.pt")
    torch.save({"state_dict": content["state_dict"]}, tmp_path / "c.pth")
    save_file(content["state_dict"], tmp_path / "c.safetensors")
    for name in ("c.pt", "c.pth", "c.safetensors"):
        assert refusal(tmp_path / name) == f" does not fit {ARCH}: {wrong}"


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("backbone.stage4.0.branches.0.0.conv1.weight", id="the trunk's"),
        pytest.param("ocr.cls_head.weight", id="the decoder's"),
    ],
)
def test_a_published_checkpoint_without_its_telltale_tensor_is_not_recognised(
    key: str, tmp_path: Path, network: SegmentationNet
) -> None:
    content = published(network)
    del content["state_dict"][f"module.{key}"]
    torch.save(content, tmp_path / "c.pth")
    assert refusal(tmp_path / "c.pth") == ANOTHER
    content = our_content(network)
    del content["state_dict"][key]
    torch.save(content, tmp_path / "c.pt")
    assert refusal(tmp_path / "c.pt") == f" does not fit {ARCH}: {key} is missing"


def test_without_its_attention_a_network_is_one_that_averages(tmp_path: Path, network: SegmentationNet) -> None:
    """Nothing of its attention is there: it loads as the network for one scale that it is."""
    alone = {k: v for k, v in network.state_dict().items() if not k.startswith("scale_attn.")}
    torch.save({"state_dict": alone}, tmp_path / "c.pth")
    checkpoint = read_checkpoint(tmp_path / "c.pth")
    assert checkpoint.arch == "hrnet18s_ocr"
    assert isinstance(load_network(tmp_path / "c.pth", checkpoint).scale_attn, Average)
    torch.save({"state_dict": alone | {"scale_attn.bn0.bias": torch.zeros(64)}}, tmp_path / "c.pth")
    assert refusal(tmp_path / "c.pth") == " does not fit hrnet18s_ocr: scale_attn.bn0.bias is not in the network"


@pytest.mark.parametrize("key", ["scale_attn.conv2.weight", "ocr.cls_head.weight"])
@pytest.mark.parametrize("value", [3, "text"])
def test_an_entry_that_is_no_tensor_is_named(value: object, key: str, tmp_path: Path, network: SegmentationNet) -> None:
    for content in (our_content(network), {"state_dict": dict(network.state_dict())}):
        content["state_dict"][key] = value
        torch.save(content, tmp_path / "c.pt")
        assert key in refusal(tmp_path / "c.pt")


def test_a_head_that_is_a_single_number_is_refused(tmp_path: Path, network: SegmentationNet) -> None:
    torch.save({"state_dict": network.state_dict() | {"ocr.cls_head.weight": torch.tensor(1.0)}}, tmp_path / "c.pt")
    assert refusal(tmp_path / "c.pt") == ANOTHER


def test_the_number_of_tensors_that_do_not_fit_is_told(tmp_path: Path, network: SegmentationNet) -> None:
    content = our_content(build(ARCH, len(CITYSCAPES)))
    torch.save(content, tmp_path / "c.pt")
    assert refusal(tmp_path / "c.pt") == (
        f" does not fit {ARCH}: ocr.aux_head.2.bias is (19,) instead of (11,) (and 3 more differences)"
    )


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    state = {f"module.{k}": v for k, v in torch.nn.Linear(2, 2).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "c.pth")
    assert refusal(tmp_path / "c.pth") == ANOTHER


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["backbone.bn1.running_var", "ocr.cls_head.weight", "scale_attn.conv2.weight"])
@pytest.mark.parametrize("file", ["ours", "published", "safetensors"])
def test_weights_that_diverged_are_refused(
    file: str, key: str, value: float, tmp_path: Path, network: SegmentationNet
) -> None:
    state, path = {k: v.clone() for k, v in network.state_dict().items()}, tmp_path / "c"
    state[key].flatten()[3] = value
    if file == "safetensors":
        save_file(state, path)
    else:
        torch.save((our_content(network) if file == "ours" else {}) | {"state_dict": state}, path)
    assert refusal(path) == f": tensor {key} holds NaN or infinity; the training it came from diverged"


def test_a_teacher_of_18_classes_is_refused_for_a_manifest_of_19(city: Path, tmp_path: Path) -> None:
    """Published files do not say which classes they mean; that there is one too few can be told."""
    path = tmp_path / "c.pth"
    torch.save({"state_dict": as_published(build(ARCH, 18).state_dict())}, path)
    manifest, out = city / "val.parquet", tmp_path / "run"
    result = autolabel("generate", manifest, "--teacher", path, "--out", out)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        f"autolabel: {path} predicts 18 classes of an unnamed label space, but {manifest} uses"
        " label space 'cityscapes' with 19: use a teacher of that label space, or map its classes onto it with"
        " --classes"
    ]


@pytest.mark.parametrize("key", ["arch", "label_space", "trained_on", "metrics"])
def test_a_checkpoint_of_ours_without_an_entry_is_refused(key: str, tmp_path: Path, network: SegmentationNet) -> None:
    content = our_content(network)
    del content[key]
    torch.save(content, tmp_path / "c.pt")
    assert key in refusal(tmp_path / "c.pt")


def test_a_checkpoint_of_ours_with_an_unknown_network_is_refused(tmp_path: Path, network: SegmentationNet) -> None:
    torch.save(our_content(network) | {"arch": "unet"}, tmp_path / "c.pt")
    assert "unknown architecture 'unet'" in refusal(tmp_path / "c.pt")


# --- older versions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_a_checkpoint_of_another_version_is_refused_by_name(ours: Path, tmp_path: Path, form: str) -> None:
    """Its marks of training images are of another kind: they would equal nothing, and pass for "none seen"."""
    path = tmp_path / f"older.{form}"
    if form == "pt":
        torch.save({**torch.load(ours, weights_only=True), "format": "autolabel-checkpoint/1"}, path)
    else:
        save_file(read_checkpoint(ours).state_dict, path, {"autolabel-checkpoint/1": "{}"})
    assert refusal(path).startswith(
        f" has format 'autolabel-checkpoint/1', this program knows '{FORMAT}': its marks of the images it was trained"
    )


def test_the_shipped_teacher_knows_the_scenes_that_it_was_trained_on(tmp_path: Path) -> None:
    """They follow from the seed of benchmarks/demo_teacher.py, one scene after the other."""
    write_city(tmp_path, 1_000_003, fine=2, coarse=0, val=0)
    scenes = sorted(tmp_path.glob("leftImg8bit/train/*/*.png"))
    marks = read_checkpoint(DRAWN_STREETS).trained_on
    assert (len(scenes), len(marks)) == (2, 1500)
    assert overlap(marks, [storage.fingerprint(path) for path in scenes]) == [0, 1]


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
def test_overlap_gives_the_indices_of_images_that_were_trained_on(
    seen: list[str], asked: list[str], expected: list[int]
) -> None:
    assert overlap(fingerprint_tensor(seen), asked) == expected


def test_a_disk_that_is_full_under_torch_save_is_told_as_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's writer would say that a write failed, in C++; wherever it happens, nothing is left."""
    network, room = torch.nn.Linear(100, 100), [0]

    class Full(io.BufferedRandom):
        def write(self, data: Any) -> int:
            if self.tell() + memoryview(data).nbytes > room[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(local_storage, "open", lambda path, mode: Full(io.FileIO(path, "x+")), raising=False)
    for room[0] in (0, 100, 3000, 20_000, 41_000):
        with pytest.raises(OSError) as failure:
            save_checkpoint(tmp_path / "last.pt", network, arch="x", space=CITYSCAPES)
        assert (failure.value.errno, failure.value.filename) == (errno.ENOSPC, str(tmp_path / "last.pt"))
        assert list(tmp_path.iterdir()) == []
    room[0] = 1_000_000
    save_checkpoint(tmp_path / "last.pt", network, arch="x", space=CITYSCAPES)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["state_dict"].keys() == {"weight", "bias"}
