"""How a network's own inputs and outputs and its sidecar fit together. Nothing here loads torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from autolabel.manifests.onnx_file import Port
from autolabel.manifests.teachers import BadTeacher
from autolabel.teacher.foreign.sidecar import DTYPES, Described, sidecar_of

_INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Fit:
    """The way of images into a network and of scores out of it.

    place: which output, counted from 0. size: the only height and width that it takes, None for any that is a multiple
    of `multiple`. batch: the only number of images that it takes at once, None for any.
    """

    network: Path
    described: Described
    input: Port
    output: Port
    place: int
    size: tuple[int, int] | None
    multiple: int
    batch: int | None

    @property
    def integers(self) -> bool:
        """True if the network gives class ids."""
        return self.described.sidecar.gives == "ids"

    @property
    def channels_last(self) -> bool:
        """True if the output is (B, h, w, C)."""
        sidecar = self.described.sidecar
        return (sidecar.output_layout or sidecar.layout) == "NHWC"


def fit(network: Path, described: Described, inputs: list[Port], outputs: list[Port]) -> Fit:
    """Hold a sidecar against what the network's file says of itself. Raises BadTeacher with one line."""
    sidecar, beside = described.sidecar, sidecar_of(network)
    image = the_input(network, inputs)
    assert image.shape is not None
    if image.dtype != sidecar.dtype:
        raise BadTeacher(f'{network} takes numbers of type {image.dtype}: {beside.name} says dtype = "{sidecar.dtype}"')
    channel, height, width = (1, 2, 3) if sidecar.layout == "NCHW" else (3, 1, 2)
    if image.shape[channel] not in (3, None):
        raise BadTeacher(
            f"{network} takes images of {image.shape[channel]} channels as {sidecar.layout} {shape_text(image)}: "
            "expected 3, red, green and blue"
        )
    size: list[int | None] = [image.shape[height], image.shape[width]]
    if sidecar.size:
        for own, asked in zip(size, sidecar.size, strict=True):
            if own not in (asked, None):
                raise BadTeacher(
                    f"{network} takes images of {size_text(size)}: {beside.name} says {list(sidecar.size)}"
                )
        size = list(sidecar.size)
    if (size[0] is None) != (size[1] is None):
        raise BadTeacher(f"{network} takes images of {size_text(size)}: give {beside.name} a size = [HEIGHT, WIDTH]")
    place = _output(network, described, outputs)
    fixed = (size[0], size[1]) if size[0] is not None and size[1] is not None else None
    settled = Fit(
        network, described, image, outputs[place], place, fixed, math.lcm(image.multiple, sidecar.multiple),
        image.shape[0],
    )  # fmt: skip
    require_scores(settled, settled.output.shape, settled.output.dtype)
    return settled


def the_input(network: Path, inputs: list[Port]) -> Port:
    """The one input of a network, which takes images. Raises BadTeacher."""
    if len(inputs) != 1:
        raise BadTeacher(f"{network} takes {_listed(inputs) or 'nothing'}: expected one input, the image")
    if inputs[0].shape is None or len(inputs[0].shape) != 4:
        raise BadTeacher(
            f"{network} takes {inputs[0].name} {shape_text(inputs[0])}: expected images (B, 3, H, W) or (B, H, W, 3)"
        )
    if inputs[0].dtype not in DTYPES:
        raise BadTeacher(f"{network} takes numbers of type {inputs[0].dtype}: expected one of {', '.join(DTYPES)}")
    return inputs[0]


def _output(network: Path, described: Described, outputs: list[Port]) -> int:
    name, beside = described.sidecar.output, sidecar_of(network)
    names = [port.name for port in outputs]
    if name:
        if name not in names:
            raise BadTeacher(f'{beside}, output = "{name}": {network} gives {_listed(outputs) or "nothing"}')
        return names.index(name)
    if len(outputs) != 1:
        raise BadTeacher(
            f"{network} gives {_listed(outputs) or 'nothing'}: name one in {beside.name}"
            + (f', such as output = "{names[0]}"' if names else "")
        )
    return 0


def require_scores(settled: Fit, shape: tuple[int | None, ...] | None, dtype: str) -> None:
    """Check the shape and the type of an output, or what is known of them. Raises BadTeacher."""
    sidecar, beside = settled.described.sidecar, settled.described.path.name
    says = f"{settled.network} gives {settled.output.name} {shape_text(Port('', shape, ''))} of type {dtype}"
    if settled.integers:
        if dtype not in _INTEGERS:
            raise BadTeacher(f'{says}: {beside} says gives = "ids", which are integers')
        if shape is None:
            return
        if len(shape) == 4 and shape[3 if settled.channels_last else 1] in (1, None):
            return
        if len(shape) != 3:
            raise BadTeacher(f"{says}: expected class ids (B, h, w) or (B, 1, h, w)")
        return
    if dtype in _INTEGERS:
        raise BadTeacher(f'{says}: {beside} says gives = "{sidecar.gives}"; integers are gives = "ids"')
    if shape is None and dtype in _FLOATS:
        return
    if dtype not in _FLOATS or shape is None or len(shape) != 4:
        form = "(B, h, w, C)" if settled.channels_last else "(B, C, h, w)"
        raise BadTeacher(f"{says}: expected floating point numbers {form}")
    channels, classes = shape[3 if settled.channels_last else 1], len(settled.described.classes)
    if channels not in (classes, None):
        raise BadTeacher(f"{says}, {channels} classes: {beside} names {classes}")


def shape_text(port: Port) -> str:
    """The shape for people, such as (any, 3, 512, 1024)."""
    if port.shape is None:
        return "of unknown shape"
    return f"({', '.join('any' if side is None else str(side) for side in port.shape)})"


def size_text(size: list[int | None]) -> str:
    """Height and width for people."""
    return " x ".join("any" if side is None else str(side) for side in size)


def _listed(ports: list[Port]) -> str:
    names = [port.name for port in ports]
    return f"{len(names)} tensors, {', '.join(names)}" if len(names) > 1 else "".join(names)
