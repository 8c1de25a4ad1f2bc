"""Networks of ONNX, `net.onnx`, computed by onnxruntime, as teachers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolabel.manifests import storage
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.onnx_file import BadOnnxFile, OnnxFile, parse_onnx
from autolabel.manifests.teachers import BadTeacher, TeacherPlace
from autolabel.manifests.wording import reason
from autolabel.teacher.foreign.ports import fit
from autolabel.teacher.foreign.sidecar import read_sidecar

if TYPE_CHECKING:
    import torch

    from autolabel.teacher.model import Model

DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")  # operators that are built into onnxruntime
_CODE = ("ATen", "EPContext", "PythonOp", "PythonOpGrad")  # call Python, torch, or a compiled blob
_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")


def classes(place: TeacherPlace) -> LabelSpace | tuple[str, ...]:
    """The classes that the sidecar names. Raises BadTeacher."""
    return read_sidecar(place.path).classes


def load(place: TeacherPlace, *, device: torch.device) -> Model:
    """Open the network for a device. Raises BadTeacher with one line."""
    described = read_sidecar(place.path)
    data, file = read_checked(place.path)
    settled = fit(place.path, described, file.inputs, file.outputs)
    session = _session(place.path, data, file, device)

    import torch

    from autolabel.teacher.foreign.network_file import NetworkFile

    inner, outer = settled.input.name, [settled.output.name]

    def run(numbers: torch.Tensor) -> torch.Tensor:
        try:
            (result,) = session.run(outer, {inner: numbers.cpu().numpy()})
        except Exception as error:
            if "allocat" in str(error):
                raise RuntimeError(f"out of memory: {error}") from error
            shape = " x ".join(map(str, numbers.shape))
            raise BadTeacher(f"{place.path} cannot take images of {shape}: {_briefly(error)}") from error
        return torch.from_numpy(result).to(device)

    return NetworkFile(settled, run, device=device)


def read_checked(path: Path) -> tuple[bytes, OnnxFile]:
    """Read a file and check that it is data alone: no operators of other libraries, no files outside its folder.

    Raises BadTeacher with one line.
    """
    try:
        data = storage.read(path)
        file = parse_onnx(data)
    except FileNotFoundError as error:
        raise BadTeacher(f"{path} does not exist: expected a file of ONNX") from error
    except BadOnnxFile as error:
        raise BadTeacher(f"{path}: {error}") from error
    for domain, name in sorted(file.operators - file.functions):
        if domain not in DOMAINS or name in _CODE:
            raise BadTeacher(
                f"{path} uses the operator {name} of {domain or 'ONNX'}: libraries of operators are code, and none is "
                "loaded; export the network with operators of ONNX alone"
            )
        if name in _RANDOM:
            raise BadTeacher(f"{path} draws random numbers ({name}): labels must be the same each time")
    for name in sorted(file.external):
        require_beside(path, name)
    return data, file


def require_beside(network: Path, name: str) -> Path:
    """Return the file of a network's folder that holds weights of it. Raises BadTeacher for any other place."""
    try:
        path = storage.inside(network.parent, name)
    except ValueError as error:
        raise BadTeacher(
            f"{network} wants weights from {name!r}: expected a file in its own folder, neither a link nor elsewhere"
        ) from error
    if not storage.exists(path):
        raise BadTeacher(f"{network} wants weights from {name!r}, which is not in its folder: move both together")
    return path


def _session(path: Path, data: bytes, file: OnnxFile, device: torch.device) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BadTeacher(f"{path}: needs the package onnxruntime: pip install 'autolabel[onnx]'") from error

    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise BadTeacher(
                f"{path}: onnxruntime {onnxruntime.__version__} has no CUDA: pip install onnxruntime-gpu instead, or "
                "use --device cpu"
            )
        cuda = {"device_id": device.index or 0, "cudnn_conv_algo_search": "DEFAULT", "use_tf32": 0}
        providers = [("CUDAExecutionProvider", cuda), *providers]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # sums do not depend on the number of cores
    options.use_deterministic_compute = True
    options.enable_cpu_mem_arena = False  # memory goes back, so that the budget of a worker holds
    options.log_severity_level = 4
    try:
        # Weights in other files are looked for beside the network's path; else nothing is read but what was checked.
        return onnxruntime.InferenceSession(str(path) if file.external else data, options, providers=providers)
    except Exception as error:  # onnxruntime raises a class of its own for each kind of failure, or RuntimeError
        raise BadTeacher(f"{path}: onnxruntime {onnxruntime.__version__} cannot load it: {_briefly(error)}") from error


def _briefly(error: Exception) -> str:
    """Return what onnxruntime says, without codes and places in its sources."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()) or reason(error))
    return re.sub(r"^\S+\.(cc|h):\d+ .*?\) (?=[A-Z])", "", text)[:300]
