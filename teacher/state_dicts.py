"""The tensors of a network in a file of whatever program, under customary keys.

Programs keep them under several names, and wrappers put something before each key:

    torch.compile                          _orig_mod.     around a network or a part
    DataParallel, DDP, AveragedModel,      module.        and `n_averaged` beside them
      timm's ModelEmaV2 and V3
    a training module around the network   model.         if all keys have it
    EMA of the package ema-pytorch         ema_model.     beside online_model., initted and step

Where a file has averaged weights beside the last ones, the averaged ones count.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from autolabel.manifests import notes
from autolabel.teacher.container import BadCheckpoint, require_plain

_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")
_PLAIN = ("state_dict", "model_dict", "model_state_dict", "model", "network", "net", "module")
_DEEPEST = 3  # dictionaries within each other
# Before every key, so that nothing is lost without them.
_WRAPPERS = ("module.", "ema_model.", "model_ema.", "model.", "network.", "net.")
_COUNTERS = ("n_averaged", "initted", "step")
# Modules that the published code has under two names: (synonym, name here).
_SYNONYMS = (("trunk.", "backbone."), ("seg_head.", "cls_head."))


def tensors_of(path: Path, content: Mapping[str, Any], *, ours: bool) -> dict[str, Tensor]:
    """Return the tensors of a file's content under customary keys; ours: a checkpoint of ours, whose keys stand.

    Raises BadCheckpoint if there are none, or any that are no plain numbers.
    """
    tensors = content.get("state_dict") if ours else _tensors_in(path, content)
    if not isinstance(tensors, Mapping):
        raise BadCheckpoint(f"{path} holds no 'state_dict': expected one of `autolabel train`, or a published one")
    state: dict[str, Tensor] = {}
    named = {str(name): value for name, value in tensors.items()}
    for key, value in (named if ours else _unwrapped(named)).items():
        if not isinstance(value, Tensor):
            raise BadCheckpoint(f"{path}: {key} in its state_dict is no tensor")
        require_plain(path, key, value)
        own = _customary(key)
        if own in state:
            raise BadCheckpoint(f"{path} holds {own} twice, under another prefix: expected the weights of one network")
        state[own] = value
    return state


def _tensors_in(path: Path, content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The dictionary that holds the tensors: the content itself, or one within it."""
    for depth in range(_DEEPEST):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return content
        places = [key for key in (*_AVERAGED, *_PLAIN) if isinstance(content.get(key), Mapping) and content[key]]
        if not places:
            return content if depth else None
        if places[0] in _AVERAGED and len(places) > 1:
            notes.tell(f"{path}: takes its averaged weights ({places[0]!r}), not those beside them")
        content = content[places[0]]
    return content


def _unwrapped(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors without what wrappers put before all of their keys, and without the wrappers' own counters."""
    state = {".".join(part for part in key.split(".") if part != "_orig_mod"): v for key, v in tensors.items()}
    if len(state) < len(tensors):
        return dict(tensors)  # two keys became one, which is said elsewhere
    while True:
        weights = {key: value for key, value in state.items() if key not in _COUNTERS}
        if any(key.startswith("ema_model.") for key in weights):
            weights = {key: value for key, value in weights.items() if not key.startswith("online_model.")}
        wrapper = next((w for w in _WRAPPERS if weights and all(key.startswith(w) for key in weights)), None)
        if wrapper is None:
            return state
        state = {key.removeprefix(wrapper): value for key, value in weights.items()}


def _customary(key: str) -> str:
    key = ".".join(part for part in key.split(".") if part != "_orig_mod").removeprefix("module.")
    for other, own in _SYNONYMS:
        if key.startswith(other):
            return own + key.removeprefix(other)
    return key
