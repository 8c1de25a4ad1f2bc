"""A small drive, jobs with a focus, and a certificate, for the tests of runs with a focus."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import photograph, scanned

from autolabel.manifests.focus import Focus, FocusCertificate
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.run.folder import Run
from autolabel.pipeline.job import LabelJob
from autolabel.teacher.loading import load_teacher

SCALES = (1.0, 2.0)  # at scale 2 the city's images have 192 rows, and a band of a quarter with its halo 160
SEEN = [(0, 48), (48, 96)]  # the rows of an image that one of the two bands sees


def drive_of(city: Path, place: Path) -> Path:
    """The manifest of four images that are put into this place."""
    photograph(city, place / "drive", "abcd")
    return scanned(city, place / "drive")


def job(drive: Path, teacher: Path, out: Path, **settings: Any) -> LabelJob:
    return LabelJob(drive, teacher, out, device="cpu", **{"scales": SCALES, "focus": Focus(0.25), **settings})


def certificate(teacher: Path, **changes: Any) -> FocusCertificate:
    """Swings that leave some pixels certified, and others not."""
    swings = tuple(0.5 + c / 4 for c in range(len(CITYSCAPES)))
    made = FocusCertificate(
        Focus(0.25, swings, tuple(4 * swing for swing in swings)), load_teacher(teacher, device="cpu").sha256, SCALES,
        False, "network", CITYSCAPES.names, images=5, pixels=1000,
    )  # fmt: skip
    return replace(made, **changes)


def columns(run: Path, table: str, *names: str) -> list[tuple[Any, ...]]:
    rows = Run.open(run).statistics(table, names).to_pylist()
    return [tuple(row.values()) for row in rows]
