"""`autolabel teacher describe`: a draft loads where all could be known, and says what to fill in elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from conftest import autolabel, refused
from onnx import TensorProto, helper
from small_networks import Tiny, export, graph, loaded, tiny_graph

from autolabel.manifests.teachers import BadTeacher
from autolabel.teacher.foreign.sidecar import Sidecar, read_sidecar


def described(network: Path, *options: str, add: str = "") -> Sidecar:
    """Save the draft of a network's sidecar with a line more, and read it."""
    result = autolabel("teacher", "describe", network, *options)
    assert result.exit_code == 0, result.output
    network.with_suffix(".toml").write_text(result.stdout + add)
    return read_sidecar(network).sidecar


def test_a_draft_names_placeholders_and_asks_for_the_range_alone(tmp_path: Path) -> None:
    for network in (
        tiny_graph(tmp_path / "net.onnx"),
        export(tmp_path / "net.pt2", Tiny(), torch.rand(1, 3, 32, 48)),
    ):
        with pytest.raises(BadTeacher, match="has no range, the numbers that black and white become"):
            described(network)
        sidecar = described(network, add="range = [0, 1]")
        assert sidecar == Sidecar(("class 0", "class 1", "class 2", "class 3"), range=(0, 1))
        assert loaded(network).classes == sidecar.classes


def test_a_draft_of_pixels_to_ids_asks_for_names_alone_and_loads_with_a_label_space(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ArgMax", ["x"], ["ids"], axis=3, keepdims=0),
    ]
    shape = (1, 64, 96, 3)
    network = graph(
        tmp_path / "net.onnx", nodes, [("images", TensorProto.UINT8, shape)], [("ids", TensorProto.INT64, shape[:3])]
    )
    with pytest.raises(BadTeacher, match="has no classes: expected the name of a label space, or names by channel"):
        described(network)
    sidecar = described(network, "--classes", "cityscapes")
    assert sidecar == Sidecar("cityscapes", dtype="uint8", layout="NHWC", gives="ids")
    assert loaded(network).fixed_size == (64, 96)


def noted(network: Path, key: str, value: str) -> Path:
    """Write a note of the network's maker into it."""
    model = onnx.load(network)
    helper.set_model_props(model, {key: value})
    onnx.save(model, network)
    return network


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("names", "{0: 'a', 1: 'b', 2: 'c', 3: 'd'}"), ("classes", '["a", "b", "c", "d"]'),
        ("id2label", '{"1": "b", "0": "a", "2": "c", "3": "d"}'),
    ],
)  # fmt: skip
def test_names_that_the_file_notes_are_taken_if_they_are_as_many_as_channels(
    tmp_path: Path, key: str, value: str
) -> None:
    network = noted(tiny_graph(tmp_path / "net.onnx"), key, value)
    assert described(network, add="range = [0, 1]").classes == ("a", "b", "c", "d")
    noted(network, key, "['a', 'b']")
    assert described(network, add="range = [0, 1]").classes == ("class 0", "class 1", "class 2", "class 3")


def test_several_outputs_are_listed_to_choose_from(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["images"], ["a"]), helper.make_node("Neg", ["images"], ["b"])]
    shape = ("b", 3, "h", "w")
    network = graph(tmp_path / "net.onnx", nodes, [("images", 1, shape)], [("a", 1, shape), ("b", 1, shape)])
    with pytest.raises(BadTeacher, match="has no classes"):
        described(network)
    add = 'range = [0, 1]\nclasses = ["x", "y", "z"]\n'
    described(network, add=add)
    with pytest.raises(BadTeacher, match=r"gives 2 tensors, a, b: name one in net\.toml"):
        loaded(network)
    described(network, add=add + 'output = "b"')
    assert loaded(network).classes == ("x", "y", "z")


def changed(path: Path, **sizes: Any) -> Path:
    return tiny_graph(path, size=(1, sizes["channels"], 32, 32))


def test_what_no_sidecar_could_mend_is_refused_in_one_line(tmp_path: Path) -> None:
    network = tiny_graph(tmp_path / "net.onnx")
    line = refused("teacher", "describe", network, "--classes", "cityscapes")
    assert line == f"{network} gives 4 classes: cityscapes has 19"
    line = refused("teacher", "describe", changed(tmp_path / "net.onnx", channels=4))
    assert "takes images (1, 4, 32, 32) float32: expected images of 3 channels" in line
    (tmp_path / "net.pt").write_bytes(b"")
    line = refused("teacher", "describe", tmp_path / "net.pt")
    assert line == f"{tmp_path / 'net.pt'}: expected a file of torch.export, .pt2, or of ONNX, .onnx"
    assert "does not exist" in refused("teacher", "describe", tmp_path / "none.onnx")
