"""Files of other programs, recognised from their bytes before torch is loaded, and the line that converts them.

Nothing in a file is executed: a zip's list of names, the first bytes, and the names in a pickle tell what it is.
"""

from __future__ import annotations

import importlib.util
import io
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path

from autolabel.manifests import storage
from autolabel.manifests.teachers import CHECKPOINT, ONNX, TRANSFORMERS, BadTeacher, TeacherName

_HEAD = 64  # bytes
_PICKLE = 1 << 22  # bytes of a pickle that are looked at
_NAMES = 20_000  # names in it
_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # torch's format before 1.6 begins with this pickle
_IMAGE = "(torch.zeros(1, 3, 512, 1024),)"  # an example for exporters
_PACKAGES = {TRANSFORMERS: ("transformers", "hf"), ONNX: ("onnxruntime", "onnx")}  # and their extras
_PLAIN = ("torch", "collections", "numpy", "builtins", "__builtin__", "_codecs")


def stranger(path: Path) -> str:
    """Return what a file or folder of another program is, and what to type; empty for one that may be a checkpoint."""
    if storage.is_folder(path):
        return _folder(path)
    head = storage.read_range(path, 0, _HEAD)
    if head.startswith(b"PK"):
        return _zipped(path)
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return f"a Keras or HDF5 file: python -m tf2onnx.convert --keras {path} --output {_renamed(path, 'onnx')}"
    if head[4:8] == b"TFL3":
        return f"a TFLite file: python -m tf2onnx.convert --tflite {path} --output {_renamed(path, 'onnx')}"
    if head.startswith(b"ftrt") or (head[4:5] == b"{" and path.suffix in (".engine", ".plan", ".trt")):
        return "a TensorRT engine, made for one GPU alone: give the .onnx from which it was built"
    if path.name == "saved_model.pb":
        return _folder(path.parent)
    return _protobuf(path, head)


def pickled_stranger(path: Path) -> str:
    """Return the same for a file of torch that is not a checkpoint of a network here; names in its pickle tell."""
    head = storage.read_range(path, 0, _HEAD)
    if not head.startswith(b"PK"):
        data = io.BytesIO(storage.read_range(path, 0, _PICKLE))
        if head.startswith(_LEGACY):
            for _ in range(3):  # magic number, protocol, system
                list(_names_in(data))
        return _of_names(path, list(_names_in(data)))
    try:
        with storage.reading(path) as file, zipfile.ZipFile(file) as archive:
            pickled = next((name for name in archive.namelist() if name.partition("/")[2] == "data.pkl"), None)
            if pickled is None:
                return ""
            with archive.open(pickled) as member:
                return _of_names(path, list(_names_in(io.BytesIO(member.read(_PICKLE)))))
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError):
        return ""  # damaged, which is said elsewhere


def _renamed(path: Path, suffix: str) -> Path:
    return path.with_suffix(f".{suffix}")


def _misnamed(path: Path, kind: str, suffix: str) -> str:
    if path.suffix == f".{suffix}":
        return f"{kind}, which can label but holds no weights to train: expected a checkpoint"
    return f"{kind} under another name: mv {path} {_renamed(path, suffix)}"


def _folder(path: Path) -> str:
    names = {entry.name for entry in storage.list(path)}
    if "saved_model.pb" in names:
        return f"a SavedModel of TensorFlow: python -m tf2onnx.convert --saved-model {path} --output {path.name}.onnx"
    if "Manifest.json" in names and path.suffix == ".mlpackage":
        return "a Core ML model: give the network from which it was converted, as .onnx or .pt2"
    return ""


def _zipped(path: Path) -> str:
    try:
        with storage.reading(path) as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            inner = {name.partition("/")[2] for name in names}
            if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
                return (
                    'a TorchScript file, which is code: python -c "import torch; torch.onnx.export(torch.jit.load('
                    f"'{path}', 'cpu').eval(), {_IMAGE}, '{_renamed(path, 'onnx')}', dynamo=False,"
                    " input_names=['image'], dynamic_axes={'image': [2, 3]})\", and give that file"
                )
            if {"archive_format", "models/model.json"} <= inner or "serialized_exported_program.json" in names:
                return _misnamed(path, "a program of torch.export", "pt2")
            if "model.weights.h5" in names:
                return (
                    f"a Keras file: python -c \"import keras; keras.saving.load_model('{path}').export("
                    f"'{_renamed(path, 'onnx')}', format='onnx')\", and give that file"
                )
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError):
        pass  # damaged, which is said elsewhere
    return ""


def _names_in(data: io.BytesIO) -> Iterator[str]:
    """Yield the names and texts of a pickle in their order: "module.name" of classes and functions, others in quotes.

    The first is the kind of the whole object, {} for a dictionary.
    """
    texts: list[str] = []
    first = True
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number > _NAMES:
                return
            if first and opcode.name in ("EMPTY_DICT", "DICT"):
                yield "{}"
            if opcode.name not in ("PROTO", "FRAME", "MARK", "MEMOIZE", "BINPUT", "PUT", "SHORT_BINUNICODE"):
                first = False
            if opcode.name == "GLOBAL":
                yield str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL" and len(texts) > 1:
                yield f"{texts[-2]}.{texts[-1]}"
            elif isinstance(argument, str):
                texts.append(argument)
                yield f"'{argument}'"
    except (ValueError, IndexError, UnicodeDecodeError, EOFError):
        return


def _of_names(path: Path, names: list[str]) -> str:
    known = set(names)
    if any(name.startswith(("ultralytics.", "models.yolo")) for name in names):
        return f"a network of Ultralytics: yolo export model={path} format=onnx, and give that file"
    if "'pytorch-lightning_version'" in known:
        return (
            'a checkpoint of Lightning, whose network only your code builds: python -c "import torch;'
            " from YOUR_MODULE import YourModel as M;"
            f" torch.onnx.export(M.load_from_checkpoint('{path}', map_location='cpu').eval(), {_IMAGE},"
            f" '{_renamed(path, 'onnx')}')\", and give that file"
        )
    if "'meta'" in known and known & {"'mmengine_version'", "'mmseg_version'", "'mmcv_version'", "'CLASSES'"}:
        return (
            'a checkpoint of mmsegmentation: python -c "import torch; from mmseg.apis import init_model;'
            f" torch.onnx.export(init_model('CONFIG.py', '{path}', 'cpu').eval(), {_IMAGE},"
            f" '{_renamed(path, 'onnx')}')\", and give that file"
        )
    kind = next((name for name in names if name == "{}" or not name.startswith("'")), "{}")
    if kind == "copyreg._reconstructor":
        kind = next((name for name in names[names.index(kind) + 1 :] if not name.startswith("'")), kind)
    if (kind != "{}" and kind.partition(".")[0] not in _PLAIN) or kind.startswith(("torch.nn.modules", "torch.fx")):
        return (
            f'a whole pickled network ({kind}), which is code; if you trust it: python -c "import torch;'
            f" torch.export.save(torch.export.export(torch.load('{path}', 'cpu', weights_only=False).eval(), {_IMAGE}),"
            f" '{_renamed(path, 'pt2')}')\", and give that file"
        )
    return ""


def _protobuf(path: Path, head: bytes) -> str:
    """Recognise ONNX and Core ML, both of which begin with a small version number, by the field that follows it."""
    if len(head) < 4 or head[0] != 0x08 or not 0 < head[1] < 0x40:
        return ""
    if head[2] in (0x12, 0x3A) and path.suffix != ".mlmodel" and (head[2] == 0x3A or _is_text(head[4 : 4 + head[3]])):
        return _misnamed(path, "an ONNX file", "onnx")
    if head[2] == 0x12 and path.suffix == ".mlmodel":
        return "a Core ML model: give the network from which it was converted, as .onnx or .pt2"
    return ""


def _is_text(data: bytes) -> bool:
    return bool(data) and all(32 <= byte < 127 for byte in data)


def require_familiar(teacher: TeacherName) -> None:
    """Raise BadTeacher for a teacher that is not there, belongs to another program, or needs a package that is missing.

    Others may be refused when they are loaded; this takes no time, and no torch.
    """
    for place in teacher.places:
        place.require_files()
        other = stranger(place.path) if place.kind == CHECKPOINT else ""
        if other:
            raise BadTeacher(f"{place.path} is {other}")
        package, extra = _PACKAGES.get(place.kind, ("", ""))
        if package and importlib.util.find_spec(package) is None:
            raise BadTeacher(f"{place}: needs the package {package}: pip install 'autolabel[{extra}]'")
