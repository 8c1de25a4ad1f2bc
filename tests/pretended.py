"""A GPU that is not there: tensors that say they are on cuda and hold no numbers, and a record of what is done to them.

Torch's fake tensors know shapes, types and devices; every operation is checked against the device of its inputs, and
takes no memory. A build of torch without CUDA refuses some calls before they reach them; those are made here another
way. Strides are not to be trusted, and nothing is said about time.

    with PretendedGPU() as gpu:
        teacher = ...  # everything made here is pretended, on the CPU as well
        with gpu.recorded() as record:
            teacher.label(images)
    assert record.launches < 3000

It holds for the thread that opens it.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# They make a tensor or look at one; the device has nothing to compute.
_NO_LAUNCH = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "resize_", "set_",
    "lift_fresh",
}  # fmt: skip
# A GPU has one kernel for them, though torch can tell them in other operations.
_WHOLE = {"upsample_bilinear2d", "upsample_linear1d"}
# The host has to wait for numbers of the device.
_WAITS = {
    "_local_scalar_dense", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "is_nonzero",
    "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "repeat_interleave", "_assert_async",
}  # fmt: skip


class HostWaits(AssertionError):
    """The host asked for a number that the device has yet to compute."""


@dataclass(frozen=True)
class Copy:
    """A copy between host and device. pinned: the host's memory is page-locked. waited: the host waits for the copy."""

    bytes: int
    pinned: bool
    waited: bool


@dataclass
class Record:
    """What happened to tensors of the device.

    launched: kernels by operation (views, and what only makes room, launch none). inputs: the floating types that an
    operation read, outputs: the types that it made. largest: elements of the largest tensor, and its operation. into,
    out: copies to the device, and to the host. waits: how often the host waited for a stream.
    """

    launched: Counter[str] = field(default_factory=Counter)
    inputs: defaultdict[str, set[torch.dtype]] = field(default_factory=lambda: defaultdict(set))
    outputs: defaultdict[str, set[torch.dtype]] = field(default_factory=lambda: defaultdict(set))
    largest: tuple[int, str] = (0, "")
    into: list[Copy] = field(default_factory=list)
    out: list[Copy] = field(default_factory=list)
    waits: int = 0

    @property
    def launches(self) -> int:
        """All kernels together."""
        return self.launched.total()


class PretendedGPU(contextlib.AbstractContextManager["PretendedGPU"]):
    """`free`: bytes that the GPU says are free, of `total`."""

    def __init__(self, *, free: int = 70 << 30, total: int = 80 << 30) -> None:
        self.free, self.total = free, total
        self._record = Record()
        self._pinned = set[int]()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> PretendedGPU:
        enter = self._stack.enter_context
        stream = _Stream(self)
        for owner, name, value in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
            (torch.cuda, "get_device_name", lambda device=None: "pretended"),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.cuda, "mem_get_info", lambda device=None: (self.free, self.total)),
            (torch.cuda, "memory_reserved", lambda device=None: 0),
            (torch.cuda, "memory_allocated", lambda device=None: 0),
            (torch.cuda, "max_memory_allocated", lambda device=None: 1 << 30),
            (torch.cuda, "reset_peak_memory_stats", lambda device=None: None),
            (torch.cuda, "empty_cache", lambda: None),
            (torch.cuda, "Stream", lambda device=None, priority=0: stream),
            (torch.cuda, "current_stream", lambda device=None: stream),
            (torch.cuda, "Event", lambda **_: _Event(stream)),
            (torch.cuda, "default_stream", lambda device=None: stream),
            (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
            (torch.cuda, "synchronize", lambda device=None: stream.synchronize()),
            (nn.Module, "_apply", _apply),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        ):
            enter(patch.object(owner, name, value))
        for name in vars(nn.init):
            if name.endswith("_") and not name.startswith("_"):  # there are no numbers, so weights need no first ones
                enter(patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        enter(torch.backends.cudnn.flags(enabled=True))  # type: ignore[no-untyped-call]  # restored at the end
        enter(FakeTensorMode())
        enter(_Recorder(self))
        enter(_Rewritten(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def recorded(self) -> Iterator[Record]:
        """Record what happens inside, and nothing else."""
        before, self._record = self._record, Record()
        try:
            yield self._record
        finally:
            self._record = before


@dataclass(frozen=True)
class _Stream:
    gpu: PretendedGPU

    def wait_stream(self, other: _Stream) -> None:
        """Wait on the device, which the host does not notice."""

    def synchronize(self) -> None:
        self.gpu._record.waits += 1


@dataclass(frozen=True)
class _Event:
    stream: _Stream

    def record(self, stream: _Stream) -> None:
        """Mark a place in the stream, which the host does not notice."""
        assert stream is self.stream

    def synchronize(self) -> None:
        self.stream.synchronize()


class _Recorder(TorchDispatchMode):
    """Sees every operation before the fake tensors do."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # only asks what a tensor is
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        given = [x for x in _flat([args, kwargs]) if isinstance(x, Tensor)]
        on_device = any(_there(x) for x in given)
        if on_device and (name in _WAITS or _picks(name, args)):
            raise HostWaits(f"{name} makes the host wait for the device")
        if name not in _WHOLE:
            with self:  # a composite operation, such as a matrix product, is what it is composed of
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        made = [x for x in _flat(result) if isinstance(x, Tensor)]
        if on_device or any(_there(x) for x in made):
            self._add(func, name, args, kwargs, given=given, made=made)
        return result

    def _add(self, func: Any, name: str, args: Any, kwargs: Any, *, given: list[Tensor], made: list[Tensor]) -> None:
        record, target = self.gpu._record, made[0] if made else None
        for x in made:
            if x.numel() > record.largest[0]:
                record.largest = x.numel(), name
        if name in ("_to_copy", "copy_") and target is not None:
            source = given[-1]
            waited = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            if _there(source) != _there(target):
                host = target if _there(source) else source
                pinned = host.untyped_storage()._cdata in self.gpu._pinned
                copies = record.out if _there(source) else record.into
                copies.append(Copy(target.numel() * target.element_size(), pinned, waited or not pinned))
                return
        if func.is_view or name in _NO_LAUNCH:
            return
        record.launched[name] += 1
        record.inputs[name].update(x.dtype for x in given if x.is_floating_point())
        record.outputs[name].update(x.dtype for x in made)


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Change all tensors of a module. Torch's own way swaps pretended ones, of which it keeps references elsewhere."""
    with torch.no_grad():
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(change(parameter), parameter.requires_grad)
            for name, tensor in part._buffers.items():
                part._buffers[name] = None if tensor is None else change(tensor)
    return module


def _there(x: Tensor) -> bool:
    return x.device.type == "cuda"  # `is_cuda` would be an operation by itself


def _picks(name: str, args: Any) -> bool:
    """True if places are picked by a mask, whose number of places nobody knows."""
    return name in ("index", "index_put", "index_put_") and any(
        x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
    )


class _Rewritten(TorchFunctionMode):
    """Makes calls another way that a build of torch without CUDA refuses, or that fake tensors do not know."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.ways: dict[Any, Callable[..., Any]] = {
            Tensor.__getitem__: _item,
            Tensor.__setitem__: _set_item,
            Tensor.to: _to,
            Tensor.contiguous: _contiguous,
            F.interpolate: _interpolate,
            Tensor.copy_: aten.copy_.default,
            Tensor.cuda: lambda x, device="cuda": _to(x, device),
            Tensor.numpy: lambda x: np.zeros(x.shape, _NUMPY[x.dtype]),
            Tensor.tolist: lambda x: np.zeros(x.shape, _NUMPY[x.dtype]).tolist(),
            Tensor.pin_memory: lambda x, device=None: self._pinned(torch.empty_like(x)),
            torch.from_numpy: lambda x: torch.empty(x.shape, dtype=_TORCH[x.dtype]),
            torch.tensor: self._tensor,
        }
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _WAITS and any(isinstance(x, Tensor) and _there(x) for x in args):
            raise HostWaits(f"{name} makes the host wait for the device")
        if func is torch.empty and kwargs.pop("pin_memory", False):
            return self._pinned(func(*args, **kwargs))
        return self.ways.get(func, func)(*args, **kwargs)

    def _pinned(self, x: Tensor) -> Tensor:
        self.gpu._pinned.add(x.untyped_storage()._cdata)
        return x

    def _tensor(self, data: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
        known = torch.tensor(data, dtype=dtype)
        made = torch.empty(known.shape, dtype=known.dtype)  # without the numbers, which fake tensors would compute with
        return made if device is None else _to(made, device)


_TORCH = {np.dtype(str(dtype).removeprefix("torch.")): dtype for dtype in (
    torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64, torch.bool,
)}  # fmt: skip
_NUMPY = {dtype: name for name, dtype in _TORCH.items()}


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    device = x.device if device is None else torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    dtype = dtype or x.dtype
    if (device, dtype) == (x.device, x.dtype):
        return x if memory_format is None else _contiguous(x, memory_format=memory_format)
    return aten._to_copy.default(  # type: ignore[no-any-return]
        x, device=device, dtype=dtype, non_blocking=non_blocking, memory_format=memory_format
    )


def _contiguous(x: Tensor, *, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    there = x.is_contiguous(memory_format=memory_format)
    return x if there else aten.clone.default(x, memory_format=memory_format)  # type: ignore[no-any-return]


def _interpolate(x: Tensor, size: Any = None, mode: str = "nearest", **kwargs: Any) -> Tensor:
    """On a GPU autocast reaches the kernel inside of this function, which fake tensors would hide from it."""
    if _there(x) and size is not None and mode == "bilinear" and not kwargs.get("align_corners"):
        return aten.upsample_bilinear2d.default(x, size, False)  # type: ignore[no-any-return]
    return F.interpolate(x, size, mode=mode, **kwargs)


def _item(x: Tensor, index: Any) -> Tensor:
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in [i for i in index if not isinstance(i, Tensor)]:
        place = next(n for n, i in enumerate(index) if i is Ellipsis)
        index = (
            *index[:place],
            *[slice(None)] * (x.ndim - len([i for i in index if i is not None]) + 1),
            *index[place + 1 :],
        )
    dim = 0
    for one in index:
        if one is None:
            x = aten.unsqueeze.default(x, dim)
        elif isinstance(one, slice):
            x = x if one == slice(None) else aten.slice.Tensor(x, dim, one.start, one.stop, one.step or 1)
        elif isinstance(one, Tensor):
            if one.dtype in (torch.bool, torch.uint8):
                raise HostWaits("an index by a mask makes the host wait for the device")
            x = aten.index.Tensor(x, [*[None] * dim, one])
        else:
            x = aten.select.int(x, dim, int(one))
            continue
        dim += 1
    return x


def _set_item(x: Tensor, index: Any, value: Any) -> None:
    part = _item(x, index)
    aten.copy_.default(part, value) if isinstance(value, Tensor) else part.fill_(value)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _flat(one)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value
