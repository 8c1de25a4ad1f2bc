"""Checkpoints: networks on disk.

A checkpoint of ours is one `torch.save`d dictionary:

    format        "autolabel-checkpoint/1"
    arch          the name of a network, see networks/build.py
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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, json_of, shaped
from autolabel.manifests.label_space import MAX_CLASSES, LabelSpace
from autolabel.teacher.container import (
    CHECKSUM,
    OPEN,
    BadCheckpoint,
    read_container,
    require_few_values,
    require_held,
    require_plain,
    sealed,
)
from autolabel.teacher.networks.build import ARCHITECTURES, Recognised, architecture, build, recognise, weighed_scales
from autolabel.teacher.networks.decoders import SegmentationNet
from autolabel.teacher.state_dicts import tensors_of
from autolabel.teacher.strangers import pickled_stranger

_KIND = "autolabel-checkpoint/"
FORMAT = f"{_KIND}2"
_BORROWED = ("timm:", "smp:")  # names of networks of other packages
_MAX_SCALES = 16  # that an explicit combination weighs at once
DRAWN_STREETS = Path(__file__).with_name("drawn_streets.safetensors")  # the teacher of `autolabel demo`


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint, checked to be one but not yet put into a network.

    scales: the number of scales that an explicit combination weighs at once. label_space: None in published files.
    trained_on: None where the file does not say which images it has seen, as published ones; never empty.
    """

    arch: str
    classes: int
    scales: int
    label_space: LabelSpace | None
    state_dict: dict[str, Tensor]
    trained_on: Tensor | None
    metrics: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] | None = None


def fingerprint_tensor(fingerprints: list[str]) -> Tensor:
    """Return hex fingerprints as a sorted tensor (N,) int64, each once."""
    numbers = np.array(sorted({int(f, 16) for f in fingerprints}), np.uint64)
    return torch.from_numpy(numbers.view(np.int64))


def overlap(trained_on: Tensor, fingerprints: list[str]) -> list[int]:
    """Return the indices of the fingerprints that a checkpoint was trained on."""
    marks = np.array([int(f, 16) for f in fingerprints], np.uint64).view(np.int64)
    return np.flatnonzero(np.isin(marks, trained_on.numpy())).tolist()


def silent(teacher: object) -> str:
    """The note on a teacher without `trained_on`: no leak can be noticed."""
    return f"{teacher} does not say which images it has seen: nobody can tell whether it knows these"


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
    state = network.state_dict()
    write_content(
        path, content_of(state, arch=arch, space=space, trained_on=trained_on, metrics=metrics, training=training)
    )


def content_of(
    state_dict: Mapping[str, Tensor],
    *,
    arch: str,
    space: LabelSpace,
    trained_on: Tensor | None = None,
    metrics: Mapping[str, float] | None = None,
    training: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of a checkpoint with these tensors."""
    content = {
        "format": FORMAT,
        "arch": arch,
        "label_space": space.to_dict(),
        "state_dict": state_dict,
        "trained_on": torch.zeros(0, dtype=torch.int64) if trained_on is None else trained_on,
        "metrics": dict(metrics or {}),
    }
    if training is not None:
        content["training"] = dict(training)
    return content


def write_content(path: Path, content: Mapping[str, Any]) -> None:
    """Write what `content_of` returned, whole or not at all."""
    with storage.lending(path) as file:
        torch.save(content, file)


def save_tensors(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint of ours as a safetensors file, whole or not at all; raises ValueError for a published one.

    Weights are rounded to float16; vectors, such as the statistics of batch norms, stay float32. A network computes in
    float32 whatever its file holds, so the same file gives the same network everywhere.
    """
    if checkpoint.label_space is None:
        raise ValueError(f"a published {checkpoint.arch} does not name its classes: expected one of `autolabel train`")
    seen = torch.zeros(0, dtype=torch.int64) if checkpoint.trained_on is None else checkpoint.trained_on
    marks = seen.numpy().view(np.uint64).tolist()
    metadata = {
        "arch": checkpoint.arch,
        "label_space": checkpoint.label_space.to_dict(),
        "trained_on": [f"{mark:016x}" for mark in sorted(marks)],
        "metrics": checkpoint.metrics,
        CHECKSUM: OPEN,
    }
    tensors = {
        key: (value.half() if value.ndim > 1 else value).contiguous()
        for key, value in checkpoint.state_dict.items()
        if not key.endswith("num_batches_tracked")
    }
    data = save(tensors, {FORMAT: json.dumps(metadata)})  # the order of several entries would be random
    storage.write(path, sealed(data))


def _content(path: Path) -> object:
    """Read a file: of a safetensors file of ours, what `save_checkpoint` would have written."""
    content, metadata = read_container(path)
    ours = next((key for key in metadata if key.startswith(_KIND)), None)
    if ours is None:
        return content
    stored = {"format": ours, "state_dict": content}
    if ours != FORMAT:
        return stored
    try:
        about: _Metadata = json_of(metadata[FORMAT], _Metadata, name="its metadata")
        marks = fingerprint_tensor(about.trained_on)
    except ValueError as error:
        raise BadCheckpoint(f"{path} is a damaged checkpoint of ours: {error}") from error
    return {**stored, **vars(about), "trained_on": marks}


@dataclass(frozen=True)
class _Metadata:
    """The metadata of a safetensors file of ours."""

    arch: str
    label_space: dict[str, Any]
    trained_on: list[str]
    metrics: dict[str, float]
    crc32c: str


def read_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the content of a file, and its tensors under customary keys. Raises BadCheckpoint, FileNotFoundError."""
    content = _content(path)
    version = content.get("format") if isinstance(content, dict) else None
    if isinstance(version, str) and version.startswith(_KIND) and version != FORMAT:
        raise BadCheckpoint(
            f"{path} has format {version!r}, this program knows {FORMAT!r}: its marks of the images it was trained on"
            " are of another kind; train again, or use the version that wrote it"
        )
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path} holds no 'state_dict': expected one of `autolabel train`, or a published one")
    require_few_values(path, content)
    state = tensors_of(path, content, ours=version == FORMAT)
    return content, state


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without executing anything in it. Raises BadCheckpoint, FileNotFoundError."""
    content, state = read_state(path)
    return checkpoint_of(path, content, state=state)


def recognised(path: Path, state: Mapping[str, Tensor], *, published: str = "") -> Recognised | None:
    """The network of a state dict, see `recognise`. Raises BadCheckpoint for more classes or scales than any has."""
    try:
        network = recognise(state, published)
    except IndexError:  # a tell-tale tensor has no dimension
        return None
    if network and not (1 <= network.classes <= MAX_CLASSES and 1 <= network.scales <= _MAX_SCALES):
        raise BadCheckpoint(
            f"{path} predicts {network.classes:,} classes at {network.scales:,} scales: expected at most {MAX_CLASSES}"
            f" and {_MAX_SCALES}"
        )
    return network


def checkpoint_of(path: Path, content: Mapping[str, Any], *, state: dict[str, Tensor]) -> Checkpoint:
    """Return the checkpoint in what `read_state` returned. Raises BadCheckpoint."""
    network = recognised(path, state, published=str(content.get("arch", "")))
    if content.get("format") != FORMAT:
        if network is None:
            raise BadCheckpoint(f"{path} is {_other_network(path, state)}")
        return Checkpoint(network.arch, network.classes, network.scales, None, state, None)
    missing = [key for key in ("arch", "label_space", "trained_on", "metrics") if key not in content]
    if missing:
        raise BadCheckpoint(f"{path} is a damaged checkpoint of ours: it has no {missing[0]!r}")
    arch, training = content["arch"], content.get("training")
    try:
        space = LabelSpace.of(content["label_space"], where=f"{path}, 'label_space'")
        metrics = shaped(dict[str, float], content["metrics"], f"{path}, 'metrics'")
        shaped(dict[str, Any] | None, training, f"{path}, 'training'")
    except BadDocument as error:
        raise BadCheckpoint(str(error)) from error
    if not isinstance(arch, str) or not (arch in ARCHITECTURES or (arch.startswith(_BORROWED) and len(arch) < 200)):
        raise BadCheckpoint(f"{path} holds an unknown architecture {str(arch)[:60]!r}: it comes from a newer version")
    try:
        architecture(arch)
    except ValueError as error:
        raise BadCheckpoint(f"{path}: {error}") from error
    scales = network.scales if network else weighed_scales(state)
    return Checkpoint(arch, len(space), scales, space, state, _seen(path, content["trained_on"]), metrics, training)


def _other_network(path: Path, state: Mapping[str, Tensor]) -> str:
    """Say what a file is whose tensors belong to no network here, and what to type."""
    other = pickled_stranger(path)
    if other:
        return other
    if storage.exists(path.parent / "config.json") and path.suffix == ".safetensors":
        return f"the weights of a model of transformers: give its folder, {path.parent}"
    if {"encoder", "decoder", "segmentation_head"} <= {key.split(".")[0] for key in state}:
        return (
            "a state dict of smp, which does not say of which network: start a training with --arch smp:DECODER/ENCODER"
            f" --init {path}, or give it in a class of your own (docs/teachers.md)"
        )
    return "a checkpoint of another network: expected one of those in docs/networks.md, such as hrnet48_ocr_mscale"


def _seen(path: Path, trained_on: object) -> Tensor | None:
    """The marks of the images that a checkpoint has seen, None if there are none. Raises BadCheckpoint."""
    kind = f"a {type(trained_on).__name__}"
    if isinstance(trained_on, Tensor):
        require_plain(path, "trained_on", trained_on, repeated=0)
        kind = f"{trained_on.dtype} of shape {tuple(trained_on.shape)}".removeprefix("torch.")
        if trained_on.dtype == torch.int64 and trained_on.ndim == 1 and trained_on.is_contiguous():
            return trained_on if len(trained_on) else None
    raise BadCheckpoint(f"{path}: trained_on is {kind}: expected int64 of shape (N,), the marks of its images")


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
    try:
        with torch.device("meta"):  # draws no random weights
            network = build(checkpoint.arch, checkpoint.classes, scales=checkpoint.scales)
    except ValueError as error:
        raise BadCheckpoint(f"{path}: {error}") from error
    expected = network.state_dict()
    require_match(path, expected, state=checkpoint.state_dict, network=checkpoint.arch)
    require_finite(path, checkpoint.state_dict)
    counters = {k: torch.zeros((), dtype=torch.int64) for k in expected.keys() - checkpoint.state_dict.keys()}
    if network.borrowed:
        require_held(path, checkpoint.state_dict)
        with torch.random.fork_rng(devices=[]):  # numbers that are in no file have to be computed
            network = build(checkpoint.arch, checkpoint.classes, scales=checkpoint.scales)
    else:
        network.to_empty(device="cpu")
    network.load_state_dict(checkpoint.state_dict | counters)
    return network
