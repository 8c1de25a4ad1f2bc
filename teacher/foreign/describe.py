"""Drafts the sidecar of a network from what its file says, with comments on what a person has to check."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path

from autolabel.manifests.label_space import BUILT_IN, LabelSpace, load_label_space
from autolabel.manifests.onnx_file import Port
from autolabel.manifests.teachers import EXPORTED, ONNX, BadTeacher, TeacherPlace
from autolabel.teacher.foreign.archive import clean
from autolabel.teacher.foreign.onnx import read_checked
from autolabel.teacher.foreign.ports import shape_text, the_input
from autolabel.teacher.foreign.sidecar import sidecar_of

_NAMES = ("names", "classes", "class_names", "labels", "id2label")  # keys under which writers note classes
_SHOWN = 1000  # bytes of a text in the file that may be names


def describe(network: Path, *, classes: LabelSpace | None = None) -> list[str]:
    """Return the lines of a sidecar for a network.

    classes: those that it predicts, if a label space has them. Raises BadTeacher, also where their number is another.
    """
    place = TeacherPlace.of(network)
    metadata: dict[str, str] = {}
    if place.kind == EXPORTED:
        program = clean(network)
        inputs, outputs = program.inputs, program.outputs
    elif place.kind == ONNX:
        _, file = read_checked(network)
        inputs, outputs, metadata = file.inputs, file.outputs, file.metadata
    else:
        raise BadTeacher(f"{network}: expected a file of torch.export, .pt2, or of ONNX, .onnx")
    image = the_input(network, inputs)
    layout = _layout(network, image)
    output = outputs[0] if len(outputs) == 1 else None
    lines = [f"# {network.name} takes {_port(image)} and gives {', '.join(map(_port, outputs))}."]
    lines += [f"# Drafted by `autolabel teacher describe`: check each line, and save it as {sidecar_of(network).name}."]
    last = _channels_last(output, layout) if output else layout == "NHWC"
    lines += _classes(network, output, last, classes, metadata)
    lines += _numbers(image)
    lines += [f'layout = "{layout}"'] if layout != "NCHW" else []
    return lines + _output(outputs, output, ("NHWC" if last else "NCHW"), layout)


def _layout(network: Path, image: Port) -> str:
    shape = image.shape or ()
    if 3 in (shape[1], shape[3]):
        return "NCHW" if shape[1] == 3 else "NHWC"
    if None not in (shape[1], shape[3]):
        raise BadTeacher(f"{network} takes {_port(image)}: expected images of 3 channels, red, green and blue")
    return "NCHW" if shape[1] is None else "NHWC"


def _channels_last(output: Port, layout: str) -> bool:
    """Guess where the classes are: the smaller of the two numbers that are known, else as in the input."""
    if output.shape is None or len(output.shape) != 4 or output.shape[1] == output.shape[3]:
        return layout == "NHWC"
    first, last = output.shape[1] or 1 << 31, output.shape[3] or 1 << 31
    return last < first


def _classes(
    network: Path, output: Port | None, last: bool, space: LabelSpace | None, metadata: dict[str, str]
) -> list[str]:
    channels = None
    if output is not None and output.shape is not None and len(output.shape) == 4 and "int" not in output.dtype:
        channels = output.shape[3 if last else 1]
    if space is not None:
        if channels not in (None, len(space)):
            raise BadTeacher(f"{network} gives {channels} classes: {space.name} has {len(space)}")
        built_in = space.name in BUILT_IN and load_label_space(space.name) == space
        return [f"classes = {_toml(space.name if built_in else space.names)}"]
    noted = _noted(metadata, channels)
    if noted:
        return [f"classes = {_toml(noted)}  # as the file notes them"]
    form = 'or the name of a label space, such as "cityscapes"'
    if channels is None:
        return [f'# classes = ["road", "sky"]  # FILL IN: the names in the order of their ids, {form}']
    return [
        f"# Placeholders: put the names here in the order of the {channels} channels, {form}.",
        f"classes = {_toml([f'class {place}' for place in range(channels)])}",
    ]


def _noted(metadata: dict[str, str], channels: int | None) -> list[str] | None:
    """Return the names that a file's writer has noted, as a list or by number, in JSON or Python's spelling."""
    for key in _NAMES:
        try:
            value = ast.literal_eval(metadata.get(key, "")[: 1 << 16].strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, dict):
            value = [value.get(place, value.get(str(place))) for place in range(len(value))]
        fine = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
        if fine and len(value) == (channels or len(value)) and 0 < len(set(value)) == len(value):
            return list(value)
    return None


def _numbers(image: Port) -> list[str]:
    if image.dtype == "uint8":
        return ['dtype = "uint8"  # pixels as they are, 0 to 255']
    lines = [] if image.dtype == "float32" else [f'dtype = "{image.dtype}"']
    return [
        *lines,
        "# range = [0, 1]  # FILL IN: what black and white become before mean and std: [0, 1], [0, 255] or [-1, 1]",
        "# mean = [0.485, 0.456, 0.406]  # of red, green, blue, where it was trained with them; these are ImageNet's",
        "# std = [0.229, 0.224, 0.225]",
        '# channels = "bgr"  # if it was trained on images that OpenCV has read',
    ]


def _output(outputs: Sequence[Port], output: Port | None, own: str, layout: str) -> list[str]:
    lines = []
    if output is None:
        lines = [f"# output = {_toml(port.name)}  # FILL IN: one of the {len(outputs)}" for port in outputs]
    if output is not None and own != layout:
        lines.append(f'output_layout = "{own}"')
    if output is not None and "int" in output.dtype:
        lines.append('gives = "ids"  # class numbers; their confidence is 1')
    else:
        lines.append('gives = "logits"  # or "probabilities", if it ends in a softmax or sigmoid')
    return [
        *lines, "# multiple = 32  # if height and width must be multiples of a number",
        '# trained_on = "fine.parquet"  # manifest of the images that it has seen, so that no audit is held on them',
    ]  # fmt: skip


def _port(port: Port) -> str:
    return f"{port.name[:_SHOWN]} {shape_text(port)} {port.dtype}"


def _toml(value: str | Sequence[str]) -> str:
    text = json.dumps(value if isinstance(value, str) else list(value), ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")
