"""Networks of the package segmentation-models-pytorch: `smp:DECODER/ENCODER`, such as `smp:Segformer/mit_b2`.

DECODER is a class of smp, ENCODER one that smp registers, or `tu-NAME` for a model of timm; nothing else is looked up,
and nothing is downloaded. Tensors have smp's own names, so that its state dicts load here, and ours load there. Scales
are averaged. Sides that are no multiple of the encoder's stride are padded (`SegmentationNet.multiple`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autolabel.teacher.networks.combine import Average, ScaleOutput
from autolabel.teacher.networks.decoders import SegmentationNet
from autolabel.teacher.optional import require_package

PREFIX = "smp:"
_MULTIPLE = {"PAN": 128}  # its decoder halves the map of stride 16 three times
# These pool the whole image into one value.
POOLING = ("DeepLabV3", "DeepLabV3Plus", "PAN", "PSPNet", "UPerNet")
_ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {})


def split(name: str) -> tuple[str, str]:
    """Return the trunk `smp:ENCODER` and the decoder of a name. Raises ValueError for an unknown one of them."""
    decoder, slash, encoder = name.removeprefix(PREFIX).partition("/")
    decoders = _decoders()
    if decoder not in decoders:
        raise ValueError(
            f"unknown architecture {name!r}: smp has no {decoder!r};{_meant(decoder, decoders)} expected"
            f" smp:DECODER/ENCODER, with decoders {', '.join(sorted(decoders))}"
        )
    known = _encoders()
    if not slash or encoder not in known:
        what = f"smp has no encoder {encoder!r};" if encoder else "it names no encoder;"
        raise ValueError(
            f"unknown architecture {name!r}: {what}{_meant(encoder, known)} expected smp:DECODER/ENCODER such as"
            " smp:Segformer/mit_b2; smp.encoders.get_encoder_names() lists the encoders, and tu-NAME is a model of timm"
        )
    return PREFIX + encoder, decoder


def _meant(name: str, known: frozenset[str]) -> str:
    lower = {k.lower(): k for k in known}
    close = [lower[k] for k in difflib.get_close_matches(name.lower(), lower, n=3)]
    return f" did you mean {' or '.join(close)}?" if close else ""


@cache
def _decoders() -> frozenset[str]:
    package = _package()
    return frozenset(c.__name__ for c in package.MODEL_ARCHITECTURES_MAPPING.values())


@cache
def _encoders() -> frozenset[str]:
    timm = require_package("timm", "timm")
    names = [*timm.list_models(), *timm.list_models(include_tags=True)]
    return frozenset([*_package().encoders.get_encoder_names(), *(f"tu-{name}" for name in names)])


def _package() -> Any:
    try:
        return require_package("segmentation_models_pytorch", "timm")
    except ModuleNotFoundError as error:
        raise ValueError(f"an architecture {PREFIX}… {error}") from error


class _NumbersOnCPU(TorchFunctionMode):
    """Lets `torch.linspace` make numbers even where tensors are made without content; smp reads them one by one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **({"device": "cpu"} if func is torch.linspace else {}) | (kwargs or {}))


class SMPNet(SegmentationNet):
    """A network of smp. Its logits are at the size of the (padded) image; raises ValueError if it cannot be made."""

    borrowed = True

    def __init__(self, trunk: str, decoder: str, classes: int) -> None:
        super().__init__()
        encoder = trunk.removeprefix(PREFIX)
        model = _create(decoder, encoder, classes)
        self.classes, self.features = classes, classes
        self.encoder, self.decoder, self.segmentation_head = model.encoder, model.decoder, model.segmentation_head
        self.scale_attn = Average()
        self.multiple = _MULTIPLE.get(decoder, 32)
        for name in _unread(decoder, encoder):  # processes that train together wait for every gradient
            self.get_parameter(name).requires_grad_(False)

    def predict(self, images: Tensor, *, context: Tensor | None = None) -> ScaleOutput:
        maps = self.encoder(images)
        # Encoders for DPT return a pair: the maps, and the tokens that stand for no place.
        logits = self.segmentation_head(self.decoder(*maps) if isinstance(maps, tuple) else self.decoder(maps))
        return ScaleOutput(logits, logits)


def _create(decoder: str, encoder: str, classes: int) -> Any:
    reason: Exception | None = None
    for arguments in _ANY_SIZE if encoder.startswith("tu-") else ({},):
        try:
            with _NumbersOnCPU():
                return getattr(_package(), decoder)(encoder, encoder_weights=None, classes=classes, **arguments)
        except (TypeError, ValueError, AssertionError, NotImplementedError, KeyError, RuntimeError) as error:
            if "unexpected keyword argument 'dynamic_img_size'" not in str(error):
                reason = reason or error
    why = f": {str(reason).splitlines()[0]}" if reason else ""
    raise ValueError(f"smp cannot make {PREFIX}{decoder}/{encoder}{why}")


@cache
@torch.inference_mode(False)
@torch.enable_grad()
def _unread(decoder: str, encoder: str) -> tuple[str, ...]:
    """Return the parameters on which no logit depends. Raises ValueError unless a network takes images of any size.

    Both are found out on a network without content.
    """
    side = _MULTIPLE.get(decoder, 32)
    with torch.device("meta"):
        model = _create(decoder, encoder, 2).eval()
    for size in ((2 * side, 3 * side), (side, 5 * side)):
        try:
            logits = model(torch.empty(2, 3, *size, device="meta"))
            given = tuple(logits.shape[-2:])
            reason = "" if given == size else f"logits of {given[0]}x{given[1]} for {size[0]}x{size[1]}"
        except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
            reason = str(error).splitlines()[0]
        if reason:
            raise ValueError(
                f"{PREFIX}{decoder}/{encoder} does not take images of any size ({reason}): choose another encoder;"
                " docs/networks.md says which are known to work"
            )
    logits.sum().backward()
    return tuple(name for name, parameter in model.named_parameters() if parameter.grad is None)
