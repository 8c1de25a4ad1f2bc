"""Prepare a network for labelling: batch norm folded into the convolution before it, weights cast once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autolabel.teacher.device import PRECISIONS
from autolabel.teacher.networks.decoders import SegmentationNet
from autolabel.teacher.networks.efficientnet_lite import DepthwiseConv, SamePadConv

_CAST = (nn.Conv2d, SamePadConv, DepthwiseConv)


@torch.no_grad()
def fold_batch_norm(network: SegmentationNet) -> int:
    """Fold, in place, every batch norm that reads the output of a convolution; return the number of folded ones.

    One run on a small image finds these pairs, so that nothing is assumed about names. In evaluation a batch norm is a
    fixed scale and shift of each channel, which the convolution can apply itself: w' = w * g / sqrt(v + eps),
    b' = (b - m) * g / sqrt(v + eps) + beta. Networks of other libraries may read a convolution elsewhere as well, or
    make its weights anew for every image: one that predicts otherwise afterwards is put back as it was.
    """
    network.eval()
    wrote: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # keeps the tensor, so that its id is not given to another
    pairs: dict[str, nn.Conv2d] = {}

    def after_conv(module: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        wrote[id(output)] = (module, output)

    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after_conv))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats and module.affine:

            def before_norm(_: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                if id(inputs[0]) in wrote:
                    pairs[name] = wrote[id(inputs[0])][0]

            hooks.append(module.register_forward_pre_hook(before_norm))
    device = next(network.parameters()).device
    network.parts(torch.zeros(1, 3, 64, 64, device=device), network.scale_attn.training_scales)
    for hook in hooks:
        hook.remove()
    before = _predicted(network) if network.borrowed and pairs else None
    undo: list[tuple[nn.Module, str, nn.Module, nn.Conv2d, dict[str, nn.Parameter | None]]] = []
    for name, conv in pairs.items():
        parent, _, own = name.rpartition(".")
        holder = network.get_submodule(parent)
        norm = getattr(holder, own)
        undo.append((holder, own, norm, conv, dict(conv._parameters)))
        _fold(conv, norm)
        # A batch norm of timm has its activation inside.
        setattr(holder, own, nn.Sequential(*norm.children()) if any(True for _ in norm.children()) else nn.Identity())
    if before is not None and not torch.allclose(
        before, _predicted(network), rtol=1e-3, atol=1e-3 * float(before.abs().max())
    ):
        for holder, own, norm, conv, parameters in reversed(undo):
            setattr(holder, own, norm)
            conv._parameters.update(parameters)
        return 0
    return len(pairs)


def _predicted(network: SegmentationNet) -> Tensor:
    """Logits of a small image whose pixels all differ."""
    device = next(network.parameters()).device
    image = torch.linspace(-2, 2, 3 * 64 * 64, device=device).view(1, 3, 64, 64).sin().flip(1) * 2
    return torch.cat([p.logits.flatten() for p in network.parts(image, network.scale_attn.training_scales)])


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    bias = 0.0 if conv.bias is None else conv.bias.double()
    shift = (bias - norm.running_mean.double()) * scale + norm.bias.double()
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter((conv.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype), requires_grad=False)
    conv.bias = nn.Parameter(shift.to(dtype), requires_grad=False)


def cast_convolutions(network: SegmentationNet, precision: str, *, device: str) -> None:
    """Give the convolutions, in place, weights of a precision of PRECISIONS, as autocast would for every image.

    Autocast keeps casts of weights that are trained, and folded ones are not. Labels are the same: a weight is rounded
    once, not again and again. A convolution that computes in the precision of its weights on a CPU keeps them there.
    """
    for module in network.modules():
        if type(module) not in _CAST and network.borrowed:
            continue  # it may compute with its weights before it convolves
        if isinstance(module, nn.Conv2d) and not (isinstance(module, DepthwiseConv) and device == "cpu"):
            module.to(PRECISIONS[precision])
