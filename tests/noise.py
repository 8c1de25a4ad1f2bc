"""Runs of noise, made without a teacher, in which no two pixels can be taken for each other for long."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import autolabel as al


def noise_run(
    folder: Path, sizes: Sequence[tuple[int, int]], *, damaged: int | None = None, store: str = "zarr", **options: Any
) -> al.Run:
    """Adopt noise as a run, folder/run, of photographs p00.png and so on in folder/photographs.

    The label is a photograph's red channel, 11 classes, and the teacher's probability in 255ths its green one. damaged:
    the number of a photograph that goes bad after the scan.
    """
    dice = np.random.default_rng(7)
    for n, size in enumerate(sizes):
        label, sure = dice.integers(0, 11, size, np.uint8), dice.integers(128, 256, size, np.uint8)
        image = np.stack([label, sure, dice.integers(0, 256, size, np.uint8)], axis=-1)
        for kind, pixels in (("photographs", image), ("pngs", label), ("sure", sure)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / f"p{n:02}.png")
    al.scan(folder / "photographs", folder / "m.parquet", label_space="camvid")
    if damaged is not None:
        (folder / f"photographs/p{damaged:02}.png").write_bytes(b"gone bad")
    return al.adopt(
        folder / "pngs", manifest=folder / "m.parquet", out=folder / "run", confidence=folder / "sure", store=store,
        max_quarantined=0 if damaged is None else 1, **options,
    )  # fmt: skip
