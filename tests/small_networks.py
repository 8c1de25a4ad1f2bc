"""Tiny networks in files of torch.export and ONNX, with their sidecars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from autolabel.manifests.teachers import TeacherPlace
from autolabel.teacher.foreign import exported
from autolabel.teacher.foreign import onnx as foreign_onnx
from autolabel.teacher.foreign.sidecar import Sidecar, write_sidecar
from autolabel.teacher.model import Model

NAMES = ("road", "sky", "car", "tree")
CPU = torch.device("cpu")


class Tiny(nn.Module):
    """Logits at stride 2, of images (B, 3, H, W) float32."""

    def __init__(self, channels: int = 3, *, classes: int = len(NAMES), scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(channels, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head, self.scale = nn.Conv2d(6, classes, 1), scale
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.norm(self.stem(images)))) * self.scale
        return logits


def photographs(*size: int, images: int = 2) -> Tensor:
    """Images (B, 3, H, W) uint8."""
    return torch.randint(0, 256, (images, 3, *size), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


ANY = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}


def export(path: Path, module: nn.Module, example: Tensor, dynamic: Any = None) -> Path:
    """Write a module as torch.export does, with the sizes of one input that are `dynamic`."""
    torch.export.save(torch.export.export(module, (example,), dynamic_shapes=dynamic and (dynamic,)), path)
    return path


def sidecar(path: Path, **values: Any) -> Path:
    """Write a sidecar of four classes whose black is 0 and white is 1, unless it says otherwise."""
    given = {"classes": NAMES, "range": (0.0, 1.0), **values}
    write_sidecar(path, Sidecar(**given))
    return path


def loaded(path: Path, *, device: torch.device = CPU) -> Model:
    """The model of a file."""
    place = TeacherPlace.of(path)
    return (exported if path.suffix == ".pt2" else foreign_onnx).load(place, device=device)


def graph(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[tuple[str, int, Sequence[int | str]]],
    outputs: Sequence[tuple[str, int, Sequence[int | str] | None]],
    weights: dict[str, np.ndarray[Any, Any]] | None = None,
    **model: Any,
) -> Path:
    """Write a graph of ONNX nodes; a size may be a name."""
    content = helper.make_graph(
        list(nodes), "net", [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )  # fmt: skip
    given = {"opset_imports": [helper.make_opsetid("", 17)], "ir_version": 8, **model}
    onnx.save(helper.make_model(content, **given), path)
    return path


def tiny_graph(path: Path, *, size: Sequence[int | str] = ("b", 3, "h", "w")) -> Path:
    """Write `Tiny` as nodes of ONNX."""
    module = Tiny()
    scale = module.norm.weight / torch.sqrt(module.norm.running_var + module.norm.eps)  # type: ignore[arg-type]
    weights = {
        "w": module.stem.weight * scale.view(-1, 1, 1, 1),
        "b": (module.stem.bias - module.norm.running_mean) * scale + module.norm.bias,  # type: ignore[operator]
        "v": module.head.weight,
        "c": module.head.bias,
    }
    nodes = [
        helper.make_node("Conv", ["images", "w", "b"], ["x"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("Conv", ["y", "v", "c"], ["logits"]),
    ]
    out = (size[0], len(NAMES), "oh", "ow")
    return graph(
        path, nodes, [("images", TensorProto.FLOAT, size)], [("logits", TensorProto.FLOAT, out)],
        {name: tensor.detach().numpy() for name, tensor in weights.items()},  # type: ignore[attr-defined]
    )  # fmt: skip
