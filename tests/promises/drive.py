"""A drive of seven street images with a teacher, which test_resume.py and test_killed.py label."""

from __future__ import annotations

import shutil
from pathlib import Path

from conftest import photograph, scanned

from autolabel.manifests.settings import build_job
from autolabel.pipeline.job import LabelJob

NAMES = [f"s{n:02d}" for n in range(1, 15, 2)]  # s01, s03, … s13: three units of three, three and one


def draw_drive(city: Path, teacher: Path, place: Path) -> Path:
    """Put the images, their manifest and the teacher into `place`, and return it."""
    photograph(city, place / "drive", NAMES)
    scanned(city, place / "drive")
    shutil.copyfile(teacher, place / "teacher.pt")
    return place


def drive_job(place: Path, run: str, **settings: object) -> LabelJob:
    """A job for the run folder `place`/`run`: one scale, this process, units of three, and the settings."""
    defaults = {"scales": (1.0,), "engine": "local", "unit_size": 3}
    paths = {"manifest": place / "drive.parquet", "teacher": place / "teacher.pt", "out": place / run}
    return build_job(LabelJob, {**paths, **defaults, **settings})
