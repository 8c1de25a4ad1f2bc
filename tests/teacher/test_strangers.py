"""A file of another program is good, and called damaged: people throw it away, or train it again.

The line that converts it is run, where its program is here.
"""

from __future__ import annotations

import re
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from autolabel.manifests import notes
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.teacher.checkpoints import BadCheckpoint, read_checkpoint, save_checkpoint
from autolabel.teacher.networks.build import build
from autolabel.teacher.strangers import stranger

ARCH = "hrnet18s_plain"


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3, padding=1)).eval()


def zipped(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")


LIGHTNING = {
    "epoch": 1, "global_step": 3, "pytorch-lightning_version": "2.5.0", "callbacks": {}, "loops": {},
    "state_dict": {"model.0.weight": torch.zeros(5, 3, 3, 3)}, "hyper_parameters": {"lr": 0.1},
}  # fmt: skip
MMSEG = {
    "meta": {"mmengine_version": "0.10.4", "dataset_meta": {"classes": ("road",)}, "epoch": 3},
    "state_dict": {"decode_head.conv_seg.weight": torch.zeros(5, 3, 1, 1)},
}
HDF5 = b"\x89HDF\r\n\x1a\n" + bytes(100)
ONNX = b"\x08\x0a\x12\x07pytorch\x1a\x062.13.0" + bytes(100)
CORE_ML = b"\x08\x05\x12\x10\x0a\x0e\x0a\x05image" + bytes(100)


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.pt", lambda p: torch.jit.script(net()).save(str(p)), "a TorchScript file, which is code: python -c"),
        ("a.pt", lambda p: torch.save(net(), p), "a whole pickled network (torch.nn.modules.container.Sequential), wh"),
        ("a.pth", lambda p: torch.save(net(), p, _use_new_zipfile_serialization=False), "a whole pickled network (tor"),
        ("a.ckpt", lambda p: torch.save(LIGHTNING, p), "a checkpoint of Lightning, whose network only your code build"),
        ("a.pth", lambda p: torch.save(MMSEG, p), "a checkpoint of mmsegmentation: python -c"),
        ("a.pt", lambda p: zipped(p, "a/archive_format", "a/models/model.json"), "a program of torch.export under ano"),
        ("a.pt2", lambda p: zipped(p, "a/archive_format", "a/models/model.json"), "a program of torch.export, which c"),
        ("a.pth", lambda p: p.write_bytes(ONNX), "an ONNX file under another name: mv "),
        ("a.onnx", lambda p: p.write_bytes(ONNX), "an ONNX file, which can label but holds no weights to train: expec"),
        ("a.h5", lambda p: p.write_bytes(HDF5), "a Keras or HDF5 file: python -m tf2onnx.convert --keras "),
        ("a.keras", lambda p: zipped(p, "config.json", "model.weights.h5"), 'a Keras file: python -c "import keras;'),
        ("saved_model.pb", lambda p: p.write_bytes(b"\x08\x01\x12\x10"), "a SavedModel of TensorFlow: python -m tf2o"),
        ("a.tflite", lambda p: p.write_bytes(b"\x1c\0\0\0TFL3" + bytes(50)), "a TFLite file: python -m tf2onnx.conver"),
        ("a.engine", lambda p: p.write_bytes(b"ftrt" + bytes(50)), "a TensorRT engine, made for one GPU alone: give t"),
        ("a.mlmodel", lambda p: p.write_bytes(CORE_ML), "a Core ML model: give the network from which it was convert"),
    ],
)
def test_a_file_of_another_program_is_called_by_its_name(
    name: str, write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(BadCheckpoint, match=rf"^{re.escape(f'{path} is {message}')}") as refusal:
        read_checkpoint(path)
    assert "\n" not in str(refusal.value)


def test_folders_of_other_programs_are_called_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "net.mlpackage").mkdir()
    (tmp_path / "net.mlpackage" / "Manifest.json").write_text("{}")
    (tmp_path / "saved_model.pb").write_bytes(b"")
    assert stranger(tmp_path / "net.mlpackage").startswith("a Core ML model: ")
    assert stranger(tmp_path).startswith("a SavedModel of TensorFlow: ")


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["TorchScript", "a whole network"])
def test_the_line_that_converts_a_file_works(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.jit.script(net()).save(str(path)) if kind == "TorchScript" else torch.save(net(), path)
    with pytest.raises(BadCheckpoint) as refusal:
        read_checkpoint(path)
    line = re.search(r"(python -c \".*\"), and give that file$", str(refusal.value))
    assert line
    exec(shlex.split(line[1])[2], {})
    assert (tmp_path / ("net.onnx" if kind == "TorchScript" else "net.pt2")).stat().st_size > 500


def test_weights_of_smp_and_of_transformers_say_where_they_go(tmp_path: Path) -> None:
    state = {f"{part}.weight": torch.zeros(2) for part in ("encoder", "decoder", "segmentation_head")}
    torch.save(state, tmp_path / "smp.pth")
    with pytest.raises(BadCheckpoint, match=r"a state dict of smp, .* --arch smp:DECODER/ENCODER --init .*smp\.pth"):
        read_checkpoint(tmp_path / "smp.pth")
    from safetensors.torch import save_file

    save_file({"segformer.encoder.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match=f"a model of transformers: give its folder, {tmp_path}$"):
        read_checkpoint(tmp_path / "model.safetensors")


# --- wrappers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(1)
    return build(ARCH, 19)


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda n: under("_orig_mod.", n.state_dict()), id="torch.compile"),
        pytest.param(lambda n: {"model": nn.DataParallel(n).state_dict(), "epoch": 3}, id="DataParallel"),
        pytest.param(lambda n: under("module._orig_mod.", n.state_dict()), id="DDP around torch.compile"),
        pytest.param(lambda n: under("_orig_mod.module.", n.state_dict()), id="torch.compile around DDP"),
        pytest.param(lambda n: AveragedModel(n).state_dict(), id="AveragedModel"),
        pytest.param(lambda n: {"ema": AveragedModel(n).state_dict(), "model": zeros(n.state_dict())}, id="SWA beside"),
        pytest.param(
            lambda n: {"state_dict": zeros(n.state_dict()), "state_dict_ema": n.state_dict(), "epoch": 3, "arch": "x"},
            id="timm",
        ),
        pytest.param(lambda n: {"model_ema": under("module.", n.state_dict())}, id="ModelEmaV3"),
        pytest.param(
            lambda n: (
                under("ema_model.", n.state_dict())
                | under("online_model.", zeros(n.state_dict()))
                | {"initted": torch.tensor(True), "step": torch.tensor(9)}
            ),
            id="ema-pytorch",
        ),
        pytest.param(lambda n: LIGHTNING | {"state_dict": under("model.", n.state_dict())}, id="Lightning"),
        pytest.param(lambda n: {"teacher": 1, "model": {"state_dict": n.state_dict()}}, id="a dictionary within"),
    ],
)
def test_a_network_loads_from_under_its_wrapper(wrap: Callable[[Any], Any], network: nn.Module, tmp_path: Path) -> None:
    torch.save(wrap(network), tmp_path / "wrapped.pt")
    checkpoint = read_checkpoint(tmp_path / "wrapped.pt")
    assert checkpoint.arch == ARCH
    state = network.state_dict()
    assert checkpoint.state_dict.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in checkpoint.state_dict.items())


def test_averaged_weights_beside_others_are_said_to_be_taken(network: nn.Module, tmp_path: Path) -> None:
    state = network.state_dict()
    torch.save({"state_dict": zeros(state), "model_ema": state}, tmp_path / "both.pt")
    told: list[str] = []
    with notes.heard(told.append):
        read_checkpoint(tmp_path / "both.pt")
    assert told == [f"{tmp_path / 'both.pt'}: takes its averaged weights ('model_ema'), not those beside them"]


def test_two_networks_in_one_state_dict_are_refused(network: nn.Module, tmp_path: Path) -> None:
    state = network.state_dict()
    torch.save({"state_dict": state | under("module.", state)}, tmp_path / "two.pt")
    with pytest.raises(BadCheckpoint, match="twice, under another prefix: expected the weights of one network"):
        read_checkpoint(tmp_path / "two.pt")


def test_a_checkpoint_of_ours_is_no_stranger(network: nn.Module, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "best.pt", network, arch=ARCH, space=CITYSCAPES)
    assert stranger(tmp_path / "best.pt") == ""
