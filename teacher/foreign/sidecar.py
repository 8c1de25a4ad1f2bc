"""The TOML file beside a network of torch.export or ONNX, which says what the network itself does not: `net.toml`.

    classes = "cityscapes"            # a built-in label space, a JSON file beside this one, or the names by channel
    range = [0, 1]                    # the numbers that black and white become; left out if dtype is "uint8"
    mean = [0.485, 0.456, 0.406]      # subtracted from them, for red, green, blue
    std = [0.229, 0.224, 0.225]       # then divided by

All other keys have a default, see `Sidecar`. Names of files are relative to this file. Nothing here loads torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from autolabel.manifests import storage
from autolabel.manifests.documents import MOST_BYTES, BadDocument, read_toml, shaped
from autolabel.manifests.label_space import BUILT_IN, LabelSpace, load_label_space
from autolabel.manifests.samples import fingerprints, load_manifest
from autolabel.manifests.tables import BadTable
from autolabel.manifests.teachers import BadTeacher

Triple = tuple[float, float, float]

LAYOUTS, DTYPES, CHANNELS = ("NCHW", "NHWC"), ("float32", "float16", "uint8"), ("rgb", "bgr")
GIVES = ("logits", "probabilities", "ids")
_PIXELS_AS_THEY_ARE = "uint8"
_LARGEST = 1 << 15  # height or width
_MARK = 16  # hex digits of a fingerprint


@dataclass(frozen=True)
class Sidecar:
    """The account that a user gives of a network. Raises ValueError, naming key and value.

    classes: names by channel, or the name or JSON file of a label space. range: the numbers that pixels 0 and 255
    become before `mean` is subtracted and `std` divides; None where the user has yet to say it. mean, std: always for
    red, green, blue, whatever `channels` is. size: the only height and width that the network takes; None for any.
    multiple: what height and width of any size must be a multiple of; images are filled up to it with mean grey.
    output: its name, "" if the network has one. output_layout: "" for that of the input.
    trained_on: a manifest, or a text file with one fingerprint of an image a line; "" where nobody knows.
    """

    classes: str | tuple[str, ...]
    range: tuple[float, float] | None = None
    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (1.0, 1.0, 1.0)
    channels: str = CHANNELS[0]
    dtype: str = DTYPES[0]
    layout: str = LAYOUTS[0]
    size: tuple[int, int] | None = None
    multiple: int = 1
    gives: str = GIVES[0]
    output: str = ""
    output_layout: str = ""
    trained_on: str = ""

    def __post_init__(self) -> None:
        choices = (("channels", CHANNELS), ("dtype", DTYPES), ("layout", LAYOUTS), ("gives", GIVES),
                   ("output_layout", ("", *LAYOUTS)))  # fmt: skip
        for key, allowed in choices:
            if getattr(self, key) not in allowed:
                expected = ", ".join(json.dumps(value) for value in allowed if value)
                raise ValueError(f"{key} is {json.dumps(getattr(self, key))}: expected one of {expected}")
        if not isinstance(self.classes, str):
            twice = [name for place, name in enumerate(self.classes) if name in self.classes[:place]]
            if twice or not self.classes:
                raise ValueError(f"classes names {twice[0]!r} twice: give each its own name" if twice
                                 else "classes is empty: expected names by channel")  # fmt: skip
        if min(self.std) <= 0:
            raise ValueError(f"std is {list(self.std)}: expected numbers above 0")
        if self.range and self.range[0] >= self.range[1]:
            raise ValueError(f"range is {list(self.range)}: expected the numbers of black and of white, such as [0, 1]")
        if self.dtype == _PIXELS_AS_THEY_ARE and (self.range or any(self.mean) or self.std != (1, 1, 1)):
            raise ValueError('dtype is "uint8", which takes pixels as they are: leave out range, mean and std')
        for side in self.size or ():
            if not 1 <= side <= _LARGEST:
                raise ValueError(f"size is {list(self.size or ())}: expected height and width from 1 to {_LARGEST}")
        if not 1 <= self.multiple <= _LARGEST:
            raise ValueError(f"multiple is {self.multiple}: expected 1 to {_LARGEST}")
        if self.size and self.multiple != 1:
            raise ValueError("size and multiple: a network of one size needs no multiple")

    @property
    def reads_pixels(self) -> bool:
        """True if the network takes pixels as they are, 0 to 255."""
        return self.dtype == _PIXELS_AS_THEY_ARE

    def lines(self) -> list[str]:
        """Return the TOML lines of all keys that have not their default value."""
        return [
            f"{field.name} = {_toml(getattr(self, field.name))}"
            for field in fields(self)
            if field.name == "classes" or getattr(self, field.name) != field.default
        ]


@dataclass(frozen=True)
class Described:
    """A sidecar that was read, with what its names stand for. classes: a label space, or names by channel.

    marks: fingerprints of the images that the network was trained on; None where nobody knows.
    """

    sidecar: Sidecar
    classes: LabelSpace | tuple[str, ...]
    path: Path

    def marks(self) -> list[str] | None:
        """Read the fingerprints of the images that the network has seen, 16 hex digits each. Raises BadTeacher."""
        name = self.sidecar.trained_on
        if not name:
            return None
        path = self.path.parent / name
        try:
            if path.suffix == ".txt":
                return _read_marks(path)
            return fingerprints(load_manifest(path).samples)
        except (OSError, BadTable, BadDocument, ValueError) as error:
            raise BadTeacher(f'{self.path}, trained_on = "{name}": {error}') from error


def sidecar_of(network: Path) -> Path:
    """The place of a network's sidecar."""
    return network.with_suffix(".toml")


def read_sidecar(network: Path) -> Described:
    """Read the sidecar of a network. Raises BadTeacher with one line that names file and key."""
    path = sidecar_of(network)
    if not storage.exists(path):
        raise BadTeacher(
            f"{network} has no {path.name} beside it, which names its classes and how it takes an image: "
            f"`autolabel teacher describe {network} > {path}` drafts it"
        )
    try:
        document = read_toml(path)
        if "classes" not in document:
            raise BadTeacher(f"{path} has no classes: expected the name of a label space, or names by channel")
        sidecar: Sidecar = shaped(Sidecar, document, str(path))
        if sidecar.range is None and not sidecar.reads_pixels:
            raise BadTeacher(
                f"{path} has no range, the numbers that black and white become before mean and std: [0, 1] for most "
                "networks, [0, 255] or [-1, 1] for some; whoever trained the network knows"
            )
        return Described(sidecar, _classes(sidecar.classes, path), path)
    except BadTeacher:
        raise
    except ValueError as error:
        raise BadTeacher(str(error)) from error


def write_sidecar(network: Path, sidecar: Sidecar, *, marks: Sequence[str] = (), comment: str = "") -> Path:
    """Write a network's sidecar, and beside it `NAME.seen.txt` with the fingerprints `marks`, if any; return its path.

    comment: lines without "#" that stand on top.
    """
    path, values = sidecar_of(network), sidecar
    if marks:
        seen = network.with_suffix(".seen.txt")
        storage.write(seen, "".join(f"{mark}\n" for mark in sorted(set(marks))).encode())
        values = Sidecar(**{**{f.name: getattr(sidecar, f.name) for f in fields(sidecar)}, "trained_on": seen.name})
    head = [f"# {line}".rstrip() for line in comment.splitlines()]
    storage.write(path, "\n".join([*head, *values.lines(), ""]).encode())
    return path


def _classes(classes: str | tuple[str, ...], path: Path) -> LabelSpace | tuple[str, ...]:
    if not isinstance(classes, str):
        return classes
    try:
        return load_label_space(classes if classes in BUILT_IN else str(path.parent / classes))
    except ValueError as error:
        raise BadTeacher(f"{path}, classes: {error}") from error


def _read_marks(path: Path) -> list[str]:
    marks = storage.read(path, at_most=MOST_BYTES).decode("ascii").split()
    for place, mark in enumerate(marks, 1):
        if len(mark) != _MARK or not all(digit in "0123456789abcdef" for digit in mark):
            raise ValueError(f"line {place} of {path} is {mark[:40]!r}: expected {_MARK} hex digits")
    return marks


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
