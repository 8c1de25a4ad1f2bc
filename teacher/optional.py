"""Packages that only some teachers and networks need: imported when they are used, or one line that names the extra."""

from __future__ import annotations

import contextlib
import importlib
from types import ModuleType

import torch

# What torchvision registers when it is imported, whether its library of operators could be loaded or not.
_OPERATORS = ("nms", "qnms")
_LIBRARIES: list[torch.library.Library] = []  # a library ends with its object


def require_package(name: str, extra: str) -> ModuleType:
    """Import a package of an extra. Raises ModuleNotFoundError, one line for a person, if it is not installed."""
    if name in ("torchvision", "timm", "transformers", "segmentation_models_pytorch"):
        _make_torchvision_importable()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name:
            raise
        raise ModuleNotFoundError(f"needs the package {name}: pip install 'autolabel[{extra}]'", name=name) from error


def _make_torchvision_importable() -> None:
    """Let torchvision be imported beside a torch of another build: one for CUDA beside one for CPUs.

    Package indexes mix the two easily. Its operators then cannot be loaded, which it means to survive, but it stops
    where it describes two of them. Networks for segmentation need none of them.
    """
    if _LIBRARIES:
        return
    with contextlib.suppress(ImportError):
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            if "torchvision::nms does not exist" not in str(error):
                raise
            library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
            for operator in _OPERATORS:
                schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                library.define(schema)  # type: ignore[no-untyped-call]
            _LIBRARIES.append(library)
            importlib.import_module("torchvision")
