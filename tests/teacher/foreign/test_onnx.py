"""Networks of ONNX as teachers: the numbers of the torch module; operators of others and files elsewhere refused."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from small_networks import NAMES, Tiny, graph, loaded, photographs, sidecar, tiny_graph
from torch import Tensor

from autolabel.manifests.onnx_file import parse_onnx
from autolabel.manifests.teachers import BadTeacher, TeacherName
from autolabel.teacher.networks.fields import Field

FLOAT, IMAGES = TensorProto.FLOAT, ("b", 3, "h", "w")


def scores(path: Path, images: Tensor) -> Tensor:
    """Scores of a file's model."""
    with torch.inference_mode():
        result = loaded(path).predict(images)
    return result.whole() if isinstance(result, Field) else result


def expected(images: Tensor) -> Tensor:
    """Logits of the torch module for images whose black is 0 and white is 1."""
    with torch.inference_mode():
        return Tiny()(images / 255)  # type: ignore[no-any-return]


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """`Tiny` for images of any size."""
    return sidecar(tiny_graph(tmp_path / "net.onnx"))


def test_a_network_for_any_size_gives_the_modules_logits_whatever_its_neighbours(network: Path) -> None:
    images = photographs(38, 66, images=3)
    model = loaded(network)
    assert (model.classes, model.gives, model.fixed_size, model.trained_on) == (NAMES, "logits", None, None)
    assert torch.allclose(scores(network, images), expected(images), rtol=0, atol=1e-5)
    assert torch.equal(scores(network, images)[1:2], scores(network, images[1:2]))


def test_several_threads_get_the_same_as_one(network: Path) -> None:
    model, images = loaded(network), photographs(64, 64, images=8)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: model.predict(image[None]), images))
    assert torch.equal(torch.cat(together), scores(network, images))  # type: ignore[arg-type]


def test_a_network_of_one_size_and_batch_sees_images_resized_one_by_one(tmp_path: Path) -> None:
    path = sidecar(tiny_graph(tmp_path / "net.onnx", size=(1, 3, 32, 48)))
    images = photographs(50, 40)
    small = F.interpolate(images.float(), (32, 48), mode="bilinear", antialias=True)
    assert loaded(path).fixed_size == (32, 48)
    assert torch.allclose(scores(path, images), expected(small), rtol=0, atol=1e-5)


def test_the_sidecar_fixes_the_size_of_a_network_that_takes_any(network: Path) -> None:
    assert loaded(sidecar(network, size=(16, 24))).fixed_size == (16, 24)
    assert scores(network, photographs(50, 40)).shape == (2, 4, 8, 12)


def test_pixels_as_they_are_channels_last_become_ids(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=FLOAT),
        helper.make_node("ArgMax", ["x"], ["ids"], axis=3, keepdims=1),
    ]
    path = graph(
        tmp_path / "net.onnx", nodes, [("images", TensorProto.UINT8, ("b", "h", "w", 3))],
        [("ids", TensorProto.INT64, ("b", "h", "w", 1))],
    )  # fmt: skip
    sidecar(path, classes=NAMES[:3], range=None, dtype="uint8", layout="NHWC", gives="ids")
    images = photographs(9, 7)
    assert torch.equal(scores(path, images), torch.from_numpy(images.numpy().argmax(1)))
    assert torch.equal(scores(sidecar(path, classes=NAMES[:3], range=None, dtype="uint8", layout="NHWC", gives="ids",
                                      multiple=4), images)[:, :8, :6],
                       torch.from_numpy(images.numpy().argmax(1))[:, :8, :6])  # fmt: skip


def test_channels_first_in_and_last_out_and_one_output_of_two(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["images"], ["scores"], perm=[0, 2, 3, 1]),
        helper.make_node("ReduceMean", ["images"], ["aux"], axes=[2, 3], keepdims=0),
    ]
    path = graph(
        tmp_path / "net.onnx", nodes, [("images", FLOAT, IMAGES)],
        [("scores", FLOAT, ("b", "h", "w", 3)), ("aux", FLOAT, None)],
    )  # fmt: skip
    values: dict[str, Any] = {"classes": NAMES[:3], "output_layout": "NHWC", "gives": "probabilities"}
    with pytest.raises(BadTeacher, match=r'gives 2 tensors, scores, aux: name one in net\.toml, such as output = "sc'):
        loaded(sidecar(path, **values))
    images = photographs(9, 7)
    assert torch.equal(scores(sidecar(path, **values, output="scores"), images), images / 255)


def simple(path: Path, operator: str, *, out: Any = IMAGES, images: Any = IMAGES, **model: Any) -> Path:
    """Write a network of one node."""
    attributes = {name: model.pop(name) for name in ("domain", "value") if name in model}
    nodes = [helper.make_node(operator, ["images"], ["out"], **attributes)]
    return graph(path, nodes, [("images", FLOAT, images)], [("out", FLOAT, out)], **model)


MINE = {"opset_imports": [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]}
MICROSOFT = {"opset_imports": [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]}


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"operator": "Go", "domain": "mine", **MINE}, "uses the operator Go of mine: libraries of operators are code"),
        (
            {"operator": "PythonOp", "domain": "com.microsoft", **MICROSOFT},
            "uses the operator PythonOp of com",
        ),
        ({"operator": "RandomUniformLike"}, "draws random numbers (RandomUniformLike): labels must be the same"),
        ({"operator": "Imagined", "out": None}, "Error No Op registered for Imagined with domain_vers"),
        (
            {"operator": "Relu", "out": None, "opset_imports": [helper.make_opsetid("", 999)]},
            "Opset 999 is under",
        ),
        ({"operator": "Relu", "images": ("b", 4, "h", "w")}, "takes images of 4 channels as NCHW (any, 4, any, any)"),
        ({"operator": "Relu", "images": ("b", 3, "h")}, "takes images (any, 3, any): expected images (B, 3, H, W)"),
        (
            {"operator": "Relu", "out": ("b", 2, "h", "w")},
            "gives out (any, 2, any, any) of type float32, 2 classes: ",
        ),
        ({"operator": "Relu", "out": ("b", "c", "h", "w")}, "gives out (1, 3, 8, 8) of type float32, 3 classes: "),
        ({"operator": "Relu", "out": None}, "gives out (1, 3, 8, 8) of type float32, 3 classes: net.toml names 4"),
        ({"operator": "Shape", "out": None}, "cannot"),
    ],
)
def test_a_network_that_cannot_be_used_gives_one_line(tmp_path: Path, values: dict[str, Any], line: str) -> None:
    path = sidecar(simple(tmp_path / "net.onnx", **values))
    with pytest.raises(BadTeacher) as error:
        scores(path, photographs(8, 8))
    assert line in str(error.value) and "\n" not in str(error.value) and "net.onnx" in str(error.value)


def test_an_operator_that_is_a_function_of_the_file_itself_runs(tmp_path: Path) -> None:
    function = helper.make_function(
        "mine", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], [helper.make_opsetid("", 17)]
    )
    path = simple(tmp_path / "net.onnx", "Twice", domain="mine", functions=[function], **MINE)
    images = photographs(8, 8)
    assert torch.equal(scores(sidecar(path, classes=NAMES[:3]), images), images / 255 * 2)


def test_an_operator_of_another_library_is_found_in_a_branch_too(tmp_path: Path) -> None:
    inner = helper.make_graph(
        [helper.make_node("Go", ["images"], ["y"], domain="mine")], "inner", [],
        [helper.make_tensor_value_info("y", FLOAT, None)],
    )  # fmt: skip
    node = helper.make_node("If", ["yes"], ["out"], then_branch=inner, else_branch=inner)
    path = graph(
        tmp_path / "net.onnx", [node], [("images", FLOAT, IMAGES)], [("out", FLOAT, IMAGES)],
        {"yes": np.array(True)}, **MINE,
    )  # fmt: skip
    with pytest.raises(BadTeacher, match="uses the operator Go of mine"):
        loaded(sidecar(path))


# --- weights in other files ------------------------------------------------------------------------------------------


def external(network: Path, location: str = "net.data") -> Path:
    """Move the weights of a network into a file beside it, and call that file otherwise."""
    model = onnx.load(network)
    onnx.save(model, network, save_as_external_data=True, location="net.data", size_threshold=0)
    if location != "net.data":
        content = onnx.load(network, load_external_data=False)
        for tensor in content.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        network.write_bytes(content.SerializeToString())
    return network


def test_weights_beside_the_network_are_used_and_count_for_its_digest(network: Path) -> None:
    images, before = photographs(16, 16), TeacherName.of(network).digest()
    logits = scores(network, images)
    assert torch.equal(scores(external(network), images), logits)
    weights = network.with_name("net.data")
    assert weights in TeacherName.of(network).places[0].files()
    digests = {before, TeacherName.of(network).digest()}
    weights.write_bytes(bytes(len(weights.read_bytes())))
    assert len(digests | {TeacherName.of(network).digest()}) == 3
    weights.unlink()
    with pytest.raises(BadTeacher, match=r"wants weights from 'net\.data', which is not in its folder: move"):
        loaded(network)


@pytest.mark.parametrize(
    "location", ["../net.data", "/etc/passwd", "a/../../net.data", "*/_ORT_MEM_ADDR_/*", "", "link"]
)
def test_weights_elsewhere_are_refused_before_onnxruntime_opens_them(network: Path, location: str) -> None:
    external(network, location)
    network.with_name("link").symlink_to("net.data")
    with pytest.raises(BadTeacher, match=r"wants weights from '.*'(: expected a file in its own|, which is not)"):
        loaded(network)
    assert TeacherName.of(network).places[0].files() == sorted([network, network.with_suffix(".toml")])


# --- files that are none ----------------------------------------------------------------------------------------------


def test_a_file_that_is_no_network_or_was_cut_off_gives_one_line(network: Path) -> None:
    data = network.read_bytes()
    samples = [b"", b"ORTM", b"\x89PNG\r\n", b"\xff" * 40, *(data[:n] for n in range(1, len(data), len(data) // 9))]
    for sample in samples:
        network.write_bytes(sample)
        with pytest.raises(BadTeacher) as error:
            loaded(network)
        assert "\n" not in str(error.value)
    network.unlink()
    with pytest.raises(BadTeacher, match=r"net\.onnx does not exist: expected a file of ONNX"):
        loaded(network)


def test_flipped_bytes_are_refused_in_one_line_or_do_not_matter(network: Path) -> None:
    data = network.read_bytes()
    for place in range(0, len(data), 13):
        network.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        try:
            scores(network, photographs(8, 8))
        except BadTeacher as error:
            assert "\n" not in str(error)


def test_without_onnxruntime_the_extra_is_named(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BadTeacher, match=r"net\.onnx: needs the package onnxruntime: pip install 'autolabel\[onnx\]'"):
        loaded(network)


def test_a_gpu_without_onnxruntimes_cuda_is_refused(network: Path) -> None:
    with pytest.raises(BadTeacher, match=r"has no CUDA: pip install onnxruntime-gpu instead, or use --device cpu"):
        loaded(network, device=torch.device("cuda"))


def test_our_reader_sees_what_the_onnx_package_sees(network: Path) -> None:
    model = onnx.load(network)
    file = parse_onnx(network.read_bytes())
    assert [port.name for port in file.inputs] == [value.name for value in model.graph.input]
    assert (file.inputs[0].shape, file.inputs[0].dtype) == ((None, 3, None, None), "float32")
    assert file.operators == {(node.domain, node.op_type) for node in model.graph.node}
