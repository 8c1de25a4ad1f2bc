"""Checkpoints: networks on disk.

A checkpoint of ours is one `torch.save`d dictionary:

    format        "autolabel-checkpoint/1"
    arch          a name in ARCHITECTURES
    label_space   its JSON
    state_dict    tensors under the customary HRNet, OCR and DeepLab keys
    trained_on    (N,) int64, content fingerprints of the images it was trained on
    metrics       {"miou": …, "step": …}, what it reached on its validation manifest
    training      only in `last.pt`: what is needed to go on (see student/train.py)

`save_tensors` writes the same, but for `training`, as a safetensors file: one to pass on, of half the size. Its tensors
are the network's, everything else is JSON in its metadata.

Published checkpoints of the reference implementation load too: `{"state_dict": {"module.…": tensor}, …}`, such a state
dict alone, or its tensors in a safetensors file; which network they hold is told by the tensors. A training may start
from any of these, whatever its classes, and from published ImageNet weights of a trunk (`read_start`). Files are data:
nothing in them is executed (`weights_only=True`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from autolabel.manifests import storage
from autolabel.manifests.label_space import LabelSpace
from autolabel.teacher.networks.build import ARCHITECTURES, architecture, build, recognise
from autolabel.teacher.networks.decoders import SegmentationNet

FORMAT = "autolabel-checkpoint/1"


class BadCheckpoint(ValueError):
    """The file is not a checkpoint that fits."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: checked to be one, not yet put into a network. `label_space` is None in published files.

    scales: how many scales an explicit combination weighs at once.
    """

    arch: str
    classes: int
    scales: int
    label_space: LabelSpace | None
    state_dict: dict[str, Tensor]
    trained_on: Tensor
    metrics: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] | None = None


def fingerprint_tensor(fingerprints: list[str]) -> Tensor:
    """Hex fingerprints -> sorted (N,) int64."""
    numbers = np.array(sorted({int(f, 16) for f in fingerprints}), np.uint64)
    return torch.from_numpy(numbers.view(np.int64))


def overlap(trained_on: Tensor, fingerprints: list[str]) -> list[int]:
    """Indices of the fingerprints that a checkpoint was trained on."""
    known = set(trained_on.tolist())
    marks = np.array([int(f, 16) for f in fingerprints], np.uint64).view(np.int64).tolist()
    return [i for i, mark in enumerate(marks) if mark in known]


def save_checkpoint(
    path: Path,
    arch: str,
    space: LabelSpace,
    network: torch.nn.Module,
    trained_on: Tensor,
    metrics: Mapping[str, float],
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint, whole or not at all."""
    content = {
        "format": FORMAT,
        "arch": arch,
        "label_space": json.loads(space.to_json()),
        "state_dict": network.state_dict(),
        "trained_on": trained_on,
        "metrics": dict(metrics),
    }
    if training is not None:
        content["training"] = dict(training)
    with storage.writing(path) as file:
        torch.save(content, file)


def save_tensors(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint of ours as a safetensors file, whole or not at all; raises ValueError for a published one.

    Weights are rounded to float16; vectors, such as the statistics of batch norms, stay float32. A network computes in
    float32 whatever its file holds, so the same file gives the same network everywhere.
    """
    if checkpoint.label_space is None:
        raise ValueError(f"a published {checkpoint.arch} does not name its classes: expected one of `autolabel train`")
    marks = checkpoint.trained_on.numpy().view(np.uint64).tolist()
    about = {
        "arch": checkpoint.arch,
        "label_space": json.loads(checkpoint.label_space.to_json()),
        "trained_on": [f"{mark:016x}" for mark in sorted(marks)],
        "metrics": checkpoint.metrics,
    }
    tensors = {
        key: (value.half() if value.ndim > 1 else value).contiguous()
        for key, value in checkpoint.state_dict.items()
        if not key.endswith("num_batches_tracked")
    }
    storage.write(path, save(tensors, {FORMAT: json.dumps(about)}))  # one entry: of several the order is random


def _read_tensors(data: bytes) -> dict[str, Any]:
    """What a safetensors file holds: its tensors alone, or a checkpoint that `save_tensors` wrote."""
    tensors = load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    text = header.get("__metadata__", {}).get(FORMAT)
    if text is None:
        return tensors
    about = json.loads(text)
    return {
        **about,
        "format": FORMAT,
        "state_dict": tensors,
        "trained_on": fingerprint_tensor(about["trained_on"]),
    }


def _numpy_scalars() -> list[Any]:
    """What full checkpoints of the reference hold beside tensors: a numpy float, under its old or new module path."""
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    paths = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((scalar, path) for path in paths), np.dtype, np.dtypes.Float64DType]


def _read_content(path: Path) -> object:
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # safetensors: eight bytes of length, then JSON
        return _read_tensors(path.read_bytes())
    with torch.serialization.safe_globals(_numpy_scalars()):
        return torch.load(path, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    """Why torch refuses a file, without its advice to read it all the same."""
    text = str(error).strip()
    if "weights_only" in text:
        wanted = re.search(r"GLOBAL (\S+)", text)
        if wanted:
            return f"it wants more than tensors and numbers ({wanted[1]}), and nothing in it was run"
        return "it is damaged, or a file of another kind"
    return text.splitlines()[0] if text else type(error).__name__


# The same modules under two names in the published code.
_SYNONYMS = (("trunk.", "backbone."), ("seg_head.", "cls_head."))


def _customary(key: str) -> str:
    key = key.removeprefix("module.")
    for other, ours in _SYNONYMS:
        if key.startswith(other):
            return ours + key.removeprefix(other)
    return key


def _read_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All that a file holds, and its tensors under customary keys. Raises BadCheckpoint, FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if path.stat().st_size == 0:
        raise BadCheckpoint(f"{path} is empty (0 bytes): it was cut off while it was written or copied")
    try:
        content = _read_content(path)
    except Exception as error:  # a damaged file can fail in any way that Python knows
        raise BadCheckpoint(f"{path} is not a loadable checkpoint: {_reason(error)}") from error
    bare = isinstance(content, dict) and content and all(isinstance(v, Tensor) for v in content.values())
    keys = ("state_dict", "model_dict")  # the second in published weights of Xception-71
    tensors = (
        content
        if bare
        else next((content[k] for k in keys if k in content), None)
        if isinstance(content, dict)
        else None
    )
    if not isinstance(content, dict) or not isinstance(tensors, dict):
        raise BadCheckpoint(f"{path} holds no 'state_dict': expected one of `autolabel train`, or a published one")
    state = {_customary(str(k)): v for k, v in tensors.items()}
    strange = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise BadCheckpoint(f"{path}: {strange[0]} in its state_dict is no tensor")
    return content, state


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without executing anything in it. Raises BadCheckpoint, FileNotFoundError."""
    return _checkpoint(path, *_read_state(path))


def _checkpoint(path: Path, content: Mapping[str, Any], state: dict[str, Tensor]) -> Checkpoint:
    known = recognise(state, str(content.get("arch", "")))
    if content.get("format") != FORMAT:
        if known is None:
            raise BadCheckpoint(
                f"{path} is a checkpoint of another network: expected one of those in docs/teacher.md, such as"
                " hrnet48_ocr_mscale"
            )
        return Checkpoint(known.arch, known.classes, known.scales, None, state, torch.zeros(0, dtype=torch.int64))
    try:
        space = LabelSpace.from_json(json.dumps(content["label_space"]))
        arch, trained_on, metrics = (
            str(content["arch"]),
            torch.as_tensor(content["trained_on"]),
            dict(content["metrics"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint(f"{path} is a damaged checkpoint of ours ({type(error).__name__}: {error})") from error
    if arch not in ARCHITECTURES:
        raise BadCheckpoint(f"{path} holds an unknown architecture {arch!r}: it comes from a newer version")
    scales = known.scales if known else 3
    return Checkpoint(arch, len(space), scales, space, state, trained_on, metrics, content.get("training"))


def mismatches(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Every missing, extra or misshapen tensor, in words. `num_batches_tracked` may be missing: nothing reads it."""
    counters = {k for k in expected if k.endswith("num_batches_tracked")}
    missing = [f"{k} is missing" for k in expected.keys() - state.keys() - counters]
    extra = [f"{k} is not in the network" for k in state.keys() - expected.keys()]
    shapes = [
        f"{k} is {tuple(state[k].shape)} instead of {tuple(expected[k].shape)}"
        for k in expected.keys() & state.keys()
        if state[k].shape != expected[k].shape
    ]
    return sorted(missing) + sorted(shapes) + sorted(extra)


def _require_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    broken = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if broken:
        raise BadCheckpoint(f"{path}: tensor {broken[0]} holds NaN or infinity; the training it came from diverged")


def load_network(path: Path, checkpoint: Checkpoint) -> SegmentationNet:
    """The checkpoint's network with its weights. Raises BadCheckpoint for any tensor that does not fit."""
    with torch.device("meta"):  # no weights are drawn only to be replaced
        network = build(checkpoint.arch, checkpoint.classes, checkpoint.scales)
    expected = network.state_dict()
    wrong = mismatches(expected, checkpoint.state_dict)
    if wrong:
        raise BadCheckpoint(f"{path} does not fit {checkpoint.arch}: {_first(wrong)}")
    _require_finite(path, checkpoint.state_dict)
    counters = {k: torch.zeros((), dtype=torch.int64) for k in expected.keys() - checkpoint.state_dict.keys()}
    network.to_empty(device="cpu").load_state_dict(checkpoint.state_dict | counters)
    return network


# --- where a training starts ------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """What a training takes from a file: tensors, which images these have seen, and both in words.

    scales and trained_on as in `Checkpoint`; published files do not say what they were trained on, so it is empty.
    """

    state_dict: dict[str, Tensor]
    scales: int
    trained_on: Tensor
    told: str


def read_start(path: Path, arch: str, space: LabelSpace) -> Start:
    """What a training of `arch` with the classes of `space` can take from a file.

    From a checkpoint of the same network everything; of another decoder or combination, what both networks have alike.
    Layers that stand for classes are left out where the classes are others. From weights of the trunk alone the whole
    trunk. Raises BadCheckpoint where that does not fit in every tensor, FileNotFoundError.
    """
    content, state = _read_state(path)
    if content.get("format") == FORMAT or recognise(state):
        checkpoint = _checkpoint(path, content, state)
        return _start_from_network(path, checkpoint, arch, space)
    return _start_from_trunk(path, state, arch, space)


def _start_from_network(path: Path, checkpoint: Checkpoint, arch: str, space: LabelSpace) -> Start:
    theirs, ours = architecture(checkpoint.arch), architecture(arch)
    if theirs.trunk != ours.trunk:
        raise BadCheckpoint(
            f"{path} is {theirs}: expected a network on {ours.trunk}, as {ours} is, or weights of it alone"
        )
    wrong = mismatches(_shapes(checkpoint.arch, checkpoint.classes, checkpoint.scales), checkpoint.state_dict)
    if wrong:
        raise BadCheckpoint(f"{path} does not fit {checkpoint.arch}: {_first(wrong)}")
    scales = checkpoint.scales if theirs == ours else 3
    expected, other = _shapes(arch, len(space), scales), _shapes(arch, len(space) + 1, scales)
    alike = {"backbone"}
    if theirs.decoder == ours.decoder:
        alike |= {k.split(".")[0] for k in expected if not k.startswith("scale_attn.")}
    if theirs == ours:
        alike.add("scale_attn")
    known = checkpoint.label_space
    same = checkpoint.classes == len(space) and (known is None or known.names == space.names)
    of_classes = set() if same else {k for k, v in expected.items() if v.shape != other[k].shape}
    wanted = {k for k in expected if k.split(".")[0] in alike} - of_classes
    layers = {k.rpartition(".")[0] if k.split(".")[0] in alike else k.split(".")[0] for k in expected.keys() - wanted}
    fresh = f"; {', '.join(sorted(layers))} start fresh" if layers else ""
    if not same:
        classes = f"{checkpoint.classes} classes there, {len(space)} here"
        fresh += f" ({classes if checkpoint.classes != len(space) else 'other classes'})"
    taken = {k: v for k, v in checkpoint.state_dict.items() if k in wanted}
    return _start(path, expected, taken, scales, checkpoint.trained_on, fresh)


# Torchvision's names of what is `layer0` in the published ResNet-50.
_RESNET_STEM = (("conv1.", "layer0.0."), ("bn1.", "layer0.1."))
_EFFICIENTNET_LAST = "backbone.features.8."  # 1x1 before its classifier, and not part of the trunk


def _start_from_trunk(path: Path, state: Mapping[str, Tensor], arch: str, space: LabelSpace) -> Start:
    expected = _shapes(arch, len(space), scales=3)
    trunk = {k: v for k, v in expected.items() if k.startswith("backbone.")}

    def renamed(key: str) -> str:
        key = key.removeprefix("model.").removeprefix("backbone.")
        for other, ours in _RESNET_STEM if "backbone.layer0.0.weight" in trunk else ():
            if key.startswith(other):
                key = ours + key.removeprefix(other)
        return f"backbone.{key}"

    found = {renamed(k): v for k, v in state.items()}
    modules = {k.split(".")[1] for k in trunk}
    mine = {k for k in found if k.split(".")[1] in modules and not k.startswith(_EFFICIENTNET_LAST)}
    taken = {k: v for k, v in found.items() if k in mine}
    wrong = mismatches(trunk, taken)  # a deeper trunk has more in the same modules
    if not any(k in trunk and v.shape == trunk[k].shape for k, v in found.items() if v.ndim):
        raise BadCheckpoint(
            f"{path}: nothing in it fits {arch} (it begins with {', '.join(list(state)[:3])}): expected a checkpoint of"
            " docs/teacher.md with that trunk, or weights of the trunk alone"
        )
    if wrong:
        raise BadCheckpoint(f"{path} does not fit the trunk of {arch}: {_first(wrong)}")
    fresh = ", ".join(sorted({k.split(".")[0] for k in expected.keys() - trunk.keys()}))
    unused = ", ".join(sorted({k.split(".")[1] for k in found.keys() - mine}))
    told = f", the trunk; {fresh} start fresh" + (f"; not used: {unused}" if unused else "")
    return _start(path, expected, taken, 3, torch.zeros(0, dtype=torch.int64), told)


def _start(
    path: Path, expected: Mapping[str, Tensor], taken: dict[str, Tensor], scales: int, trained_on: Tensor, more: str
) -> Start:
    _require_finite(path, taken)
    here, whole = (sum(v.numel() for k, v in s.items() if not _is_buffer(k)) / 1e6 for s in (taken, expected))
    unknown = "" if len(trained_on) else "; it does not say which images it has seen"
    return Start(taken, scales, trained_on, f"{here:.1f} of {whole:.1f} M parameters from {path}{more}{unknown}")


def _is_buffer(key: str) -> bool:
    return key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


def _shapes(arch: str, classes: int, scales: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build(arch, classes, scales).state_dict()


def _first(wrong: list[str]) -> str:
    return wrong[0] + (f" (and {len(wrong) - 1} more differences)" if len(wrong) > 1 else "")
