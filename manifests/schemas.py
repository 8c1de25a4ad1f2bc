"""Columns and constants of every parquet table: manifests and the statistics of a run."""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 1
ROWS_AT_ONCE = 16_384  # rows of a table in memory, and in one of its row groups
SOURCES = ("fine", "corrected", "coarse", "auto", "none")
AUTO = "auto"  # made by a run
EXACT = ("fine", "corrected")  # labels that a person has looked at pixel by pixel, drawn or taken over and put right
LABEL_IDS = ("train", "source", "color")  # a label file holds train ids, source ids, or the classes' colours


# The fates of a pixel of the teacher, one of which pipeline/rules.py gives it.
FATES = ("kept", "below_threshold", "near_boundary", "in_small_piece", "outside_area", "decided_by_human")


CONFIDENCE_BINS = 20  # equal bins over (0, 1]; bin k holds k/20 < p <= (k+1)/20
MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("image", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("label_index", pa.int64()),
        pa.field("label_ids", pa.string(), nullable=False),
        pa.field("coarse_label", pa.string()),
        pa.field("weight", pa.float32(), nullable=False),
    ]
)
IMAGES_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("unit", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("labelled_pixels", pa.int64()),
        ("ignored_fraction", pa.float64()),
        ("mean_confidence", pa.float64()),
        ("agreement_with_coarse", pa.float64()),
        ("coarse_pixels", pa.int64()),
        ("focus_top", pa.int32()),
        ("focus_bottom", pa.int32()),
        ("certified_fraction", pa.float64()),
        ("label_crc32c", pa.uint32()),
        ("label_bytes", pa.int64()),
        ("decode_ms", pa.float32()),
        ("infer_ms", pa.float32()),
        ("encode_ms", pa.float32()),
        ("worker", pa.string()),
    ]
)
CLASSES_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("class_id", pa.int32()),
        ("class_name", pa.string()),
        ("pixels", pa.int64()),
        ("fraction", pa.float64()),
        ("mean_confidence", pa.float64()),
        ("confidence_hist", pa.list_(pa.int64(), CONFIDENCE_BINS)),
        ("coarse_pixels", pa.int64()),
        ("agreeing_pixels", pa.int64()),
        ("contradicted_pixels", pa.int64()),
        *((f"{fate}_pixels", pa.int64()) for fate in FATES),
        ("from_human_pixels", pa.int64()),
        ("unfocused_pixels", pa.int64()),
        ("certified_pixels", pa.int64()),
    ]
)
CENTROIDS_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("class_id", pa.int32()),
        ("tile_y", pa.int32()),
        ("tile_x", pa.int32()),
        ("y", pa.float32()),
        ("x", pa.float32()),
        ("pixels", pa.int64()),
    ]
)
REVIEW_SCHEMA = pa.schema(
    [
        ("rank", pa.int64()),
        ("sample_id", pa.string()),
        ("trust", pa.float64()),
        ("agreement_with_coarse", pa.float64()),
        ("disagreement", pa.float64()),
        ("mean_confidence", pa.float64()),
        ("ignored_fraction", pa.float64()),
        ("worst_class", pa.string()),
    ]
)
QUARANTINE_SCHEMA = pa.schema([("sample_id", pa.string()), ("image", pa.string()), ("reason", pa.string())])
STATISTICS = {
    "images": IMAGES_SCHEMA,
    "classes": CLASSES_SCHEMA,
    "centroids": CENTROIDS_SCHEMA,
    "review": REVIEW_SCHEMA,  # made from images and classes by manifests/run/review.py
}
