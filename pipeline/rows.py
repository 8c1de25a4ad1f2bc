"""The columns of a commit record, and one sample's row of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from autolabel.manifests.run.labels import LABELS, LAYERS
from autolabel.manifests.schemas import CENTROIDS_SCHEMA, CLASSES_SCHEMA, IMAGES_SCHEMA

LABELLED, QUARANTINED = "labelled", "quarantined"
_OWN = ("sample_id",)  # nested rows leave out the columns of the outer row


def _nested(schema: pa.Schema) -> pa.DataType:
    return pa.list_(pa.struct([f for f in schema if f.name not in _OWN]))


# One row per sample: its rows of the statistics tables, the place of its label, and the identity of its image file.
RECORD_SCHEMA = pa.schema(
    [
        *IMAGES_SCHEMA,
        pa.field("status", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("label", pa.string()),  # path in the run folder: an array of the Zarr group, or a PNG
        pa.field("label_index", pa.int64()),
        pa.field("top_crc32c", pa.uint32()),  # checksums of the other layers, where they are kept
        pa.field("confidence_crc32c", pa.uint32()),
        pa.field("second_crc32c", pa.uint32()),
        pa.field("probability_crc32c", pa.uint32()),
        pa.field("image_bytes", pa.int64()),
        pa.field("image_mtime_ns", pa.int64()),
        pa.field("image_version", pa.string()),
        pa.field("image_fingerprint", pa.string()),
        pa.field("classes", _nested(CLASSES_SCHEMA)),
        pa.field("centroids", _nested(CENTROIDS_SCHEMA)),
    ]
)
PLACE = ["sample_id", "status", "height", "width", "label", "label_index"]
# The columns that tell whether a sample is done and which pixels have a label: a small part of a record.
BRIEF = [
    *PLACE,
    "image_bytes",
    "image_mtime_ns",
    "image_version",
    "label_crc32c",
    "top_crc32c",
    "confidence_crc32c",
    "probability_crc32c",
    "second_crc32c",
    "image_fingerprint",
    "classes.list.element.class_id",
    "classes.list.element.pixels",
]


@dataclass(frozen=True)
class Row:
    """One sample's row of a record, or the part of it that was read. The fields are the columns of RECORD_SCHEMA.

    A quarantined sample has a reason and no label. `classes` and `centroids` are rows of the statistics tables.
    """

    sample_id: str
    unit: str = ""
    height: int = 0
    width: int = 0
    labelled_pixels: int | None = None
    ignored_fraction: float | None = None
    mean_confidence: float | None = None
    agreement_with_coarse: float | None = None
    coarse_pixels: int | None = None
    focus_top: int | None = None
    focus_bottom: int | None = None
    certified_fraction: float | None = None
    label_crc32c: int | None = None
    label_bytes: int | None = None
    decode_ms: float | None = None
    infer_ms: float | None = None
    encode_ms: float | None = None
    worker: str | None = None
    status: str | None = None
    reason: str | None = None
    label: str | None = None
    label_index: int | None = None
    top_crc32c: int | None = None
    confidence_crc32c: int | None = None
    probability_crc32c: int | None = None
    second_crc32c: int | None = None
    image_bytes: int | None = None
    image_mtime_ns: int | None = None
    image_version: str | None = None
    image_fingerprint: str | None = None
    classes: list[dict[str, Any]] | None = None
    centroids: list[dict[str, Any]] | None = None

    @property
    def labelled(self) -> bool:
        """True if the sample has a label."""
        return self.status == LABELLED

    def layers(self) -> list[str]:
        """The layers in which a labelled sample has a map."""
        return [LABELS, *(name for name in LAYERS[1:] if getattr(self, f"{name}_crc32c") is not None)]
