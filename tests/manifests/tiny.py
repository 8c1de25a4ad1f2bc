"""Photographs and labels of 8 x 6 pixels, and what a scan of them refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from autolabel.manifests.layouts import BadLayout
from autolabel.manifests.samples import Manifest, Sample
from autolabel.manifests.scan import scan

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
