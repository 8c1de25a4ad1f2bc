"""The weights that a training starts from: any checkpoint, whatever its classes, or published weights of a trunk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from autolabel.manifests.label_space import LabelSpace
from autolabel.teacher.checkpoints import (
    FORMAT,
    Checkpoint,
    checkpoint_of,
    read_state,
    recognised,
    require_finite,
    require_match,
)
from autolabel.teacher.container import BadCheckpoint
from autolabel.teacher.networks import smp, timm
from autolabel.teacher.networks.build import architecture, build


class Start(NamedTuple):
    """The tensors that a training takes from a file, the images that these have seen, and a line that says both.

    scales and trained_on as in `Checkpoint`; trained_on is None for published files, which do not name their images.
    """

    state_dict: dict[str, Tensor]
    scales: int
    trained_on: Tensor | None
    description: str


def read_start(path: Path, arch: str, *, space: LabelSpace) -> Start:
    """Read the weights that a training of `arch` with the classes of `space` can start from.

    A checkpoint of the same network gives everything; one with another decoder or combination gives the modules that
    both networks share. Layers that stand for classes start fresh if the classes differ. Weights of a trunk give the
    whole trunk. Raises BadCheckpoint unless all of that fits in every tensor, FileNotFoundError.
    """
    content, state = read_state(path)
    if content.get("format") == FORMAT or recognised(path, state):
        return _start_from_network(path, checkpoint_of(path, content, state=state), arch, space)
    if arch.startswith((smp.PREFIX, timm.PREFIX)):
        return _start_from_library(path, state, arch, space)
    return _start_from_trunk(path, state, arch, space)


def _start_from_network(path: Path, checkpoint: Checkpoint, arch: str, space: LabelSpace) -> Start:
    theirs, ours = architecture(checkpoint.arch), architecture(arch)
    if theirs.trunk != ours.trunk:
        raise BadCheckpoint(
            f"{path} is {theirs}: expected a network on {ours.trunk}, as {ours} is, or weights of it alone"
        )
    own = _shapes(checkpoint.arch, checkpoint.classes, checkpoint.scales)
    require_match(path, own, state=checkpoint.state_dict, network=checkpoint.arch)
    scales = checkpoint.scales if theirs == ours else 3
    expected, other = _shapes(arch, len(space), scales), _shapes(arch, len(space) + 1, scales)
    shared = {"backbone", "encoder"}
    if theirs.decoder == ours.decoder:
        shared |= {k.split(".")[0] for k in expected if not k.startswith("scale_attn.")}
    if theirs == ours:
        shared.add("scale_attn")
    names = checkpoint.label_space and checkpoint.label_space.names
    same = checkpoint.classes == len(space) and names in (None, space.names)
    class_keys = set() if same else {k for k, v in expected.items() if v.shape != other[k].shape}
    keys = {k for k in expected if k.split(".")[0] in shared and k in own} - class_keys
    layers = {k.rpartition(".")[0] if k.split(".")[0] in shared else k.split(".")[0] for k in expected.keys() - keys}
    fresh = f"; {', '.join(sorted(layers))} start fresh" if layers else ""
    if not same:
        classes = f"{checkpoint.classes} classes there, {len(space)} here"
        fresh += f" ({classes if checkpoint.classes != len(space) else 'other classes'})"
    taken = {k: v for k, v in checkpoint.state_dict.items() if k in keys}
    return _start(path, expected, taken, scales, checkpoint.trained_on, fresh)


# Torchvision's names of the modules of `layer0` in the published ResNet-50: (theirs, ours).
_RESNET_STEM = (("conv1.", "layer0.0."), ("bn1.", "layer0.1."))
_EFFICIENTNET_LAST = "backbone.features.8."  # 1x1 convolution before the classifier, not part of the trunk


def _start_from_trunk(path: Path, state: Mapping[str, Tensor], arch: str, space: LabelSpace) -> Start:
    expected = _shapes(arch, len(space), scales=3)
    trunk = {k: v for k, v in expected.items() if k.startswith("backbone.")}

    def renamed(key: str) -> str:
        key = key.removeprefix("model.").removeprefix("backbone.")
        for other, ours in _RESNET_STEM if "backbone.layer0.0.weight" in trunk else ():
            if key.startswith(other):
                key = ours + key.removeprefix(other)
        return f"backbone.{key}"

    tensors = {renamed(k): v for k, v in state.items()}
    modules = {k.split(".")[1] for k in trunk}
    keys = {k for k in tensors if k.split(".")[1] in modules and not k.startswith(_EFFICIENTNET_LAST)}
    taken = {k: v for k, v in tensors.items() if k in keys}
    if not any(k in trunk and v.shape == trunk[k].shape for k, v in tensors.items() if v.ndim):
        raise BadCheckpoint(
            f"{path}: nothing in it fits {arch} (it begins with {', '.join(list(state)[:3])}): expected a checkpoint of"
            " docs/networks.md with that trunk, or weights of the trunk alone"
        )
    require_match(
        path, trunk, state=taken, network=f"the trunk of {arch}"
    )  # a deeper trunk has more in the same modules
    fresh = ", ".join(sorted({k.split(".")[0] for k in expected.keys() - trunk.keys()}))
    unused = ", ".join(sorted({k.split(".")[1] for k in tensors.keys() - keys}))
    rest = f", the trunk; {fresh} start fresh" + (f"; not used: {unused}" if unused else "")
    return _start(path, expected, taken, 3, None, rest)


# What old files of timm and of others hold beside the weights; networks compute it.
_COMPUTED = ("relative_position_index", "attn_mask", "relative_coords_table")


def _start_from_library(path: Path, state: Mapping[str, Tensor], arch: str, space: LabelSpace) -> Start:
    """Start a network of smp or on a trunk of timm from a file of that library: the network, or its encoder alone."""
    expected = _shapes(arch, len(space), scales=3)
    root = "encoder." if arch.startswith(smp.PREFIX) else "backbone.model."
    trunk = {k: v for k, v in expected.items() if k.startswith(root)}
    modules = {_module(k, root) for k in trunk}
    taken: dict[str, Tensor] = {}
    unused = set()
    for key, tensor in state.items():
        places = _places(key, root)
        # A tensor beside those of the same module belongs to a deeper trunk, and is found to be too much.
        place = next((p for p in places if p in expected), None) or next(
            (p for p in places if p.startswith(root) and _module(p, root) in modules), None
        )
        if place is None:
            unused.add(key.split(".")[0])
        elif not key.endswith(_COMPUTED):
            taken[place] = tensor
    if not any(k in trunk and v.shape == trunk[k].shape for k, v in taken.items() if v.ndim):
        raise BadCheckpoint(
            f"{path}: nothing in it fits {arch} (it begins with {', '.join(list(state)[:3])}): expected a checkpoint of"
            f" ours, or one of {'smp' if root == 'encoder.' else 'timm'} with that encoder"
        )
    encoder = {k: v for k, v in taken.items() if k.startswith(root)}
    require_match(path, trunk, state=encoder, network=f"the encoder of {arch}")
    parts = {k.split(".")[0] for k in expected.keys() - trunk.keys()}
    for part in sorted(parts):
        own = {k for k in expected.keys() - trunk.keys() if k.split(".")[0] == part}
        if not all(k in taken and taken[k].shape == expected[k].shape for k in own):
            unused |= {part} if own & taken.keys() else set()
            taken = {k: v for k, v in taken.items() if k not in own}
    left = (k.split(".") for k in expected.keys() - taken.keys() - trunk.keys())
    fresh = ", ".join(sorted({".".join(k[:2]) if k[0] == "backbone" else k[0] for k in left}))
    rest = (f", the encoder; {fresh} start fresh" if fresh else "") + (
        f"; not used: {', '.join(sorted(unused))}" if unused else ""
    )
    return _start(path, expected, taken, 3, None, rest)


def _places(key: str, root: str) -> list[str]:
    """The places that a tensor of smp or timm may have in a network here; timm joins the names of flattened lists."""
    key = key.removeprefix("backbone.")
    joined = key.replace(".", "_", 1)
    inner = f"{root}model."
    if root == "encoder.":
        return [key, root + key, inner + key, inner + joined, f"{inner}model.{key}"]
    return [root + key, root + joined, inner + key]


def _module(key: str, root: str) -> str:
    first, *others = key.removeprefix(root).split(".")
    while first.endswith("model") and others:
        first, others = f"{first}.{others[0]}", others[1:]
    return first


def _start(
    path: Path,
    expected: Mapping[str, Tensor],
    taken: dict[str, Tensor],
    scales: int,
    trained_on: Tensor | None,
    rest: str,
) -> Start:
    require_finite(path, taken)
    part, whole = (sum(v.numel() for k, v in s.items() if not _is_buffer(k)) / 1e6 for s in (taken, expected))
    unknown = "" if trained_on is not None else "; it does not say which images it has seen"
    return Start(taken, scales, trained_on, f"{part:.1f} of {whole:.1f} M parameters from {path}{rest}{unknown}")


def _is_buffer(key: str) -> bool:
    return key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


def _shapes(arch: str, classes: int, scales: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build(arch, classes, scales=scales).state_dict()
