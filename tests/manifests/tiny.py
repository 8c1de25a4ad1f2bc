"""Photographs and labels of 8 x 6 pixels, samples whose image is a few bytes, and what a scan of them refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from autolabel.manifests.label_space import CAMVID, LabelSpace
from autolabel.manifests.layouts import BadLayout
from autolabel.manifests.samples import Manifest, Sample
from autolabel.manifests.scan import scan
from autolabel.manifests.tables import writing_table

Size = tuple[int, int]  # width, height
SIZE: Size = (8, 6)


def photo(file: Path, shade: int = 0, size: Size = SIZE) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(file, lossless=True, quality=100)
    return file


def label(file: Path, class_id: int = 0, size: Size = SIZE, mode: str = "L") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size, class_id)
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
    image.save(file)
    return file


def samples(manifest: Manifest) -> dict[str, Sample]:
    return {s.sample_id: s for s in manifest.samples}


def refusal(root: Path, **options: Any) -> str:
    with pytest.raises(BadLayout) as refused:
        scan(root, **options)
    return str(refused.value)


def sample(root: Path, name: str, content: str | None = None, **fields: Any) -> Sample:
    """A labelled sample whose image file holds `content`; to a manifest, a file is its bytes."""
    image = root / "images" / f"{name}.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes((content or f"photo {name}").encode())
    standard = {"source": "fine", "label": root / "labels" / f"{name}.png"}
    return Sample(name, image, 6, 8, **{**standard, **fields})


def manifest(*samples: Sample, space: LabelSpace = CAMVID) -> Manifest:
    return Manifest.of(space, samples)


def write_table(path: Path, table: pa.Table) -> None:
    with writing_table(path, table.schema) as add:
        add(table)
