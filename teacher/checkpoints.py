"""Checkpoints: networks on disk.

A checkpoint of ours is one `torch.save`d dictionary:

    format        "autolabel-checkpoint/1"
    arch          a name in ARCHITECTURES
    label_space   its JSON
    state_dict    tensors under the customary HRNet, OCR and DeepLab keys
    trained_on    (N,) int64, content fingerprints of the images it was trained on
    metrics       {"miou": …, "step": …}, its score on the validation manifest
    training      only in `last.pt`: the state of a training (see student/train.py)

`save_tensors` writes the same, but for `training`, as a safetensors file: one to pass on, of half the size. Its tensors
are the network's, everything else is JSON in its metadata.

Published checkpoints of the reference implementation load too: `{"state_dict": {"module.…": tensor}, …}`, such a state
dict alone, or its tensors in a safetensors file; their tensors tell which network they belong to. `start.py` reads
files that a training starts from. Files are data: nothing in them is executed (`weights_only=True`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from autolabel.manifests import storage
from autolabel.manifests.documents import json_of, shaped
from autolabel.manifests.label_space import LabelSpace
from autolabel.teacher.networks.build import ARCHITECTURES, build, recognise
from autolabel.teacher.networks.decoders import SegmentationNet

_KIND = "autolabel-checkpoint/"
FORMAT = f"{_KIND}2"
DRAWN_STREETS = Path(__file__).with_name("drawn_streets.safetensors")  # the teacher of `autolabel demo`


class BadCheckpoint(ValueError):
    """The file is damaged, no checkpoint, or a checkpoint that does not fit."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint, checked to be one but not yet put into a network.

    scales: the number of scales that an explicit combination weighs at once. label_space: None in published files.
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
    """Return hex fingerprints as a sorted tensor (N,) int64, each once."""
    numbers = np.array(sorted({int(f, 16) for f in fingerprints}), np.uint64)
    return torch.from_numpy(numbers.view(np.int64))


def overlap(trained_on: Tensor, fingerprints: list[str]) -> list[int]:
    """Return the indices of the fingerprints that a checkpoint was trained on."""
    seen = set(trained_on.tolist())
    marks = np.array([int(f, 16) for f in fingerprints], np.uint64).view(np.int64).tolist()
    return [i for i, mark in enumerate(marks) if mark in seen]


def save_checkpoint(
    path: Path,
    network: torch.nn.Module,
    *,
    arch: str,
    space: LabelSpace,
    trained_on: Tensor | None = None,
    metrics: Mapping[str, float] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint, whole or not at all; the module docstring describes its content."""
    content = {
        "format": FORMAT,
        "arch": arch,
        "label_space": space.to_dict(),
        "state_dict": network.state_dict(),
        "trained_on": torch.zeros(0, dtype=torch.int64) if trained_on is None else trained_on,
        "metrics": dict(metrics or {}),
    }
    if training is not None:
        content["training"] = dict(training)
    with storage.lending(path) as file:
        torch.save(content, file)


def save_tensors(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint of ours as a safetensors file, whole or not at all; raises ValueError for a published one.

    Weights are rounded to float16; vectors, such as the statistics of batch norms, stay float32. A network computes in
    float32 whatever its file holds, so the same file gives the same network everywhere.
    """
    if checkpoint.label_space is None:
        raise ValueError(f"a published {checkpoint.arch} does not name its classes: expected one of `autolabel train`")
    marks = checkpoint.trained_on.numpy().view(np.uint64).tolist()
    metadata = {
        "arch": checkpoint.arch,
        "label_space": checkpoint.label_space.to_dict(),
        "trained_on": [f"{mark:016x}" for mark in sorted(marks)],
        "metrics": checkpoint.metrics,
    }
    tensors = {
        key: (value.half() if value.ndim > 1 else value).contiguous()
        for key, value in checkpoint.state_dict.items()
        if not key.endswith("num_batches_tracked")
    }
    storage.write(path, save(tensors, {FORMAT: json.dumps(metadata)}))  # the order of several entries would be random


def _read_tensors(data: bytes) -> dict[str, Any]:
    """Read a safetensors file: its tensors alone, or a checkpoint that `save_tensors` wrote."""
    tensors = load(data)
    header = json_of(data[8 : 8 + int.from_bytes(data[:8], "little")], dict[str, Any], name="its header")
    written = shaped(dict[str, str], header.get("__metadata__", {}), "its metadata")
    text = written.get(FORMAT)
    if text is None:
        other = next((key for key in written if key.startswith(_KIND)), None)
        return tensors if other is None else {"format": other, "state_dict": tensors}
    metadata = json_of(text, dict[str, Any], name="its metadata")
    return {
        **metadata,
        "format": FORMAT,
        "state_dict": tensors,
        "trained_on": fingerprint_tensor(metadata["trained_on"]),
    }


def _numpy_scalars() -> list[Any]:
    """Return the types that full checkpoints of the reference need beside tensors: a numpy float, at two paths."""
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    paths = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((scalar, path) for path in paths), np.dtype, np.dtypes.Float64DType]


def _read_content(path: Path) -> object:
    if storage.read_range(path, 8, 1) == b"{":  # safetensors: eight bytes of length, then JSON
        return _read_tensors(storage.read(path))
    with storage.reading(path) as file, torch.serialization.safe_globals(_numpy_scalars()):
        return torch.load(file, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    """Return the reason why torch refuses a file, without its advice to read it all the same."""
    text = str(error).strip()
    if "weights_only" in text:
        type_name = re.search(r"GLOBAL (\S+)", text)
        if type_name:
            return f"it wants more than tensors and numbers ({type_name[1]}), and nothing in it was run"
        return "it is damaged, or a file of another kind"
    return text.splitlines()[0] if text else type(error).__name__


# Modules that the published code has under two names: (synonym, name here).
_SYNONYMS = (("trunk.", "backbone."), ("seg_head.", "cls_head."))


def _customary(key: str) -> str:
    key = key.removeprefix("module.")
    for other, ours in _SYNONYMS:
        if key.startswith(other):
            return ours + key.removeprefix(other)
    return key


def read_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the content of a file, and its tensors under customary keys. Raises BadCheckpoint, FileNotFoundError."""
    status = storage.stat(path) if storage.exists(path) else None
    if status is None:
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if status.size == 0:
        raise BadCheckpoint(f"{path} is empty (0 bytes): it was cut off while it was written or copied")
    try:
        content = _read_content(path)
    except Exception as error:  # a damaged file can raise anything
        raise BadCheckpoint(f"{path} is not a loadable checkpoint: {_reason(error)}") from error
    version = content.get("format") if isinstance(content, dict) else None
    if isinstance(version, str) and version.startswith(_KIND) and version != FORMAT:
        raise BadCheckpoint(
            f"{path} has format {version!r}, this program knows {FORMAT!r}: its marks of the images it was trained on"
            " are of another kind; train again, or use the version that wrote it"
        )
    bare = isinstance(content, dict) and content and all(isinstance(v, Tensor) for v in content.values())
    keys = ("state_dict", "model_dict")  # published weights of Xception-71 have the second
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
    content, state = read_state(path)
    return checkpoint_of(path, content, state=state)


def checkpoint_of(path: Path, content: Mapping[str, Any], *, state: dict[str, Tensor]) -> Checkpoint:
    """Return the checkpoint in what `read_state` returned. Raises BadCheckpoint."""
    network = recognise(state, str(content.get("arch", "")))
    if content.get("format") != FORMAT:
        if network is None:
            raise BadCheckpoint(
                f"{path} is a checkpoint of another network: expected one of those in docs/teacher.md, such as"
                " hrnet48_ocr_mscale"
            )
        return Checkpoint(network.arch, network.classes, network.scales, None, state, torch.zeros(0, dtype=torch.int64))
    try:
        space = LabelSpace.of(content["label_space"])
        arch, trained_on, metrics = (
            str(content["arch"]),
            torch.as_tensor(content["trained_on"]),
            dict(content["metrics"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint(f"{path} is a damaged checkpoint of ours ({type(error).__name__}: {error})") from error
    if arch not in ARCHITECTURES:
        raise BadCheckpoint(f"{path} holds an unknown architecture {arch!r}: it comes from a newer version")
    scales = network.scales if network else 3
    return Checkpoint(arch, len(space), scales, space, state, trained_on, metrics, content.get("training"))


def mismatches(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """List missing, misshapen and extra tensors, in words. `num_batches_tracked` may be missing: nothing reads it."""
    counters = {k for k in expected if k.endswith("num_batches_tracked")}
    missing = [f"{k} is missing" for k in expected.keys() - state.keys() - counters]
    extra = [f"{k} is not in the network" for k in state.keys() - expected.keys()]
    shapes = [
        f"{k} is {tuple(state[k].shape)} instead of {tuple(expected[k].shape)}"
        for k in expected.keys() & state.keys()
        if state[k].shape != expected[k].shape
    ]
    return sorted(missing) + sorted(shapes) + sorted(extra)


def require_match(path: Path, expected: Mapping[str, Tensor], *, state: Mapping[str, Tensor], network: str) -> None:
    """Raise BadCheckpoint, naming the first difference, unless the tensors of a file fit a network."""
    wrong = mismatches(expected, state)
    if wrong:
        more = f" (and {len(wrong) - 1} more differences)" if len(wrong) > 1 else ""
        raise BadCheckpoint(f"{path} does not fit {network}: {wrong[0]}{more}")


def require_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise BadCheckpoint, naming path and tensor, if a tensor holds NaN or infinity."""
    broken = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if broken:
        raise BadCheckpoint(f"{path}: tensor {broken[0]} holds NaN or infinity; the training it came from diverged")


def load_network(path: Path, checkpoint: Checkpoint) -> SegmentationNet:
    """Return the checkpoint's network with its weights. Raises BadCheckpoint if any tensor does not fit."""
    with torch.device("meta"):  # draws no random weights
        network = build(checkpoint.arch, checkpoint.classes, scales=checkpoint.scales)
    expected = network.state_dict()
    require_match(path, expected, state=checkpoint.state_dict, network=checkpoint.arch)
    require_finite(path, checkpoint.state_dict)
    counters = {k: torch.zeros((), dtype=torch.int64) for k in expected.keys() - checkpoint.state_dict.keys()}
    network.to_empty(device="cpu").load_state_dict(checkpoint.state_dict | counters)
    return network
