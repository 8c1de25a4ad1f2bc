"""Corrections on disk: beside `fixed.parquet`, a manifest, the folder `fixed/` with labels, their origin, and counts.

labels/ID.png      the corrected label, train ids
origin/ID.png      for each pixel, whose it is: MACHINE, PERSON or NOBODY
changes.parquet    counts of pixels: what the machine had said, what it is now, how sure the teacher was
disagreements.txt  ids of the images in which two people differ, the most pixels first; only if there are any
import.json        what was imported, and when
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from autolabel.manifests import storage
from autolabel.manifests.formats.portable import portable
from autolabel.manifests.images import decode_label, require_size
from autolabel.manifests.locations import location
from autolabel.manifests.run.shards import Label
from autolabel.manifests.samples import Sample

MACHINE, PERSON, NOBODY = 0, 1, 2  # origins of a pixel: the machine's, a person's, unknown because the base is gone
CONFIRMED, CHANGED, GIVEN, ERASED, LEFT, UNKNOWN = CHANGE_FATES = (
    "confirmed", "changed", "given", "erased", "left", "unknown",
)  # fmt: skip
CHANGES_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("fate", pa.string()),  # one of CHANGE_FATES
        ("from_id", pa.int32()),  # 255 for ignored, null where the base is gone
        ("from_class", pa.string()),
        ("to_id", pa.int32()),
        ("to_class", pa.string()),
        ("rule", pa.string()),  # that decided the pixel, one of FATES; null where no confidence was kept
        ("level", pa.int32()),  # of the teacher's confidence; null where none was kept
        ("pixels", pa.int64()),
        ("right_pixels", pa.int64()),  # those in which the teacher's top class is the class now
    ]
)


@dataclass(frozen=True)
class CorrectedFolder:
    """The names of the files beside a manifest of corrections."""

    path: Path

    @classmethod
    def of(cls, manifest: Path) -> CorrectedFolder:
        """The folder of a manifest. Raises ValueError unless its name ends in .parquet."""
        if manifest.suffix != ".parquet":
            raise ValueError(f"-o {manifest}: expected a name that ends in .parquet; labels go into a folder beside it")
        return cls(manifest.with_suffix(""))

    @property
    def record(self) -> Path:
        """The file that says what was imported; it is the first one of the folder."""
        return self.path / "import.json"

    @property
    def changes(self) -> Path:
        """The table of counts."""
        return self.path / "changes.parquet"

    @property
    def disagreements(self) -> Path:
        """A file of ids: the images in which people disagree."""
        return self.path / "disagreements.txt"

    def label(self, sample_id: str) -> Path:
        """The corrected label of a sample."""
        return storage.under(self.path, f"labels/{_png_name(sample_id)}")

    def origin(self, sample_id: str) -> Path:
        """The mask of origins of a sample."""
        return storage.under(self.path, f"origin/{_png_name(sample_id)}")

    def discard(self) -> None:
        """Remove what an import has written here, and the folder if nothing else lies in it."""
        for folder in (self.path / "labels", self.path / "origin"):
            storage.remove_folder(folder)
        for path in (self.changes, self.disagreements, self.record):
            storage.remove(path)
        if storage.is_folder(self.path) and not storage.list(self.path):
            storage.remove_folder(self.path)


def _png_name(sample_id: str) -> str:
    """A relative path of its own for every sample id: a folder called "q.png" becomes "q.png_"."""
    *folders, name = portable(sample_id).split("/")
    return "/".join([*(f"{folder}_" if folder.endswith(".png") else folder for folder in folders), f"{name}.png"])


def folder_of(sample: Sample) -> CorrectedFolder | None:
    """The folder that holds the corrected label of a sample; None for any other label."""
    if sample.source != "corrected" or sample.label is None:
        return None
    text, end = sample.label.as_posix(), f"/labels/{_png_name(sample.sample_id)}"
    return CorrectedFolder(location(text.removesuffix(end))) if text.endswith(end) else None


def read_origin(sample: Sample) -> Label | None:
    """The origins (H, W) uint8 of a corrected sample's pixels; None where no mask of them is there.

    Raises BadImage for a mask that cannot be used, OSError.
    """
    folder = folder_of(sample)
    if folder is None or not storage.exists(path := folder.origin(sample.sample_id)):
        return None
    origin = decode_label(storage.read(path), None)
    require_size(origin, (sample.height, sample.width))
    return origin
