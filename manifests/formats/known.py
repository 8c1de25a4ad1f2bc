"""The formats by name: which modules write and read each. A module is imported when its format is used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from autolabel.manifests.formats.style import Style
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.wording import listed

if TYPE_CHECKING:
    from autolabel.manifests.formats.exchange import Format, Returned

_FOLDER = "autolabel.manifests.formats"


@dataclass(frozen=True)
class KnownFormat:
    """One format: its name, and the modules of this folder that hold its parts; "" where it has no such part.

    writes: "module:Class" of its writer. reads: the module whose `read(path, space)` yields labels.
    """

    name: str
    writes: str = ""
    reads: str = ""

    def writer(self, space: LabelSpace, style: Style) -> Format:
        """Make its writer. Raises ValueError for a style that it lacks, and for a format that is only read."""
        if not self.writes:
            raise ValueError(f"labels cannot be written as {self.name}: expected {listed(WRITTEN)}")
        module, _, name = self.writes.partition(":")
        return cast("Format", getattr(import_module(f"{_FOLDER}.{module}"), name)(space, style))

    def read(self, path: Path, space: LabelSpace) -> Iterator[Returned]:
        """Yield the labels of a file or folder in this format. Raises BadReturn; ValueError if it is only written."""
        if not self.reads:
            raise ValueError(f"labels cannot be read from {self.name}: expected {listed(READ)}")
        return cast("Iterator[Returned]", import_module(f"{_FOLDER}.{self.reads}").read(path, space))


FORMATS = (
    KnownFormat("png", writes="png:PngWriter", reads="png_back"),
    KnownFormat("cityscapes", writes="cityscapes:CityscapesWriter"),
    KnownFormat("ultralytics", writes="ultralytics:UltralyticsWriter"),
    KnownFormat("hf", writes="hf:HfWriter"),
    KnownFormat("coco", writes="coco:CocoWriter", reads="coco_back"),
    KnownFormat("cvat", writes="cvat:CvatWriter", reads="cvat"),
    KnownFormat("label-studio", writes="label_studio:LabelStudioWriter", reads="label_studio_back"),
)
WRITTEN = tuple(f.name for f in FORMATS if f.writes)
READ = tuple(f.name for f in FORMATS if f.reads)


def known_format(name: str) -> KnownFormat:
    """Return a format by its name. Raises ValueError, naming all formats, for an unknown one."""
    for known in FORMATS:
        if known.name == name:
            return known
    raise ValueError(f"format {name!r} is unknown: expected {listed([f.name for f in FORMATS])}")
