"""The report of a run: a page that opens from disk, to look at the labels before anyone trains on them.

    report/index.html    the page, replaced last: it always shows one whole report
    report/*.jpg, *.png  its pictures, named by their content, so that a new report never changes those of the old page
"""

from __future__ import annotations

import importlib.resources
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests.classes import IGNORE, LabelSpace
from autolabel.manifests.files import fingerprint_bytes, remove_leftovers, sha256, write_bytes
from autolabel.manifests.images import BadImage, colourise, read_image, read_label
from autolabel.manifests.stores import open_labels
from autolabel.manifests.tables import (
    CONFIDENCE_BINS,
    QUARANTINE_SCHEMA,
    BadTable,
    Sample,
    load_manifest,
    read_statistics,
    read_table,
)
from autolabel.pipeline.stats import Summary, coverage_at, summarise
from autolabel.teacher.predict import Teacher, load_teacher

LONGEST = 960  # pixels of a picture's longer side
LISTED = 20  # quarantined samples on the page
_PICTURE = re.compile(r".+-(photograph|coarse|auto|confidence)-[0-9a-f]{16}\.(jpg|png)")
# Viridis at equal steps: perceptually uniform, readable in grey and with colour-blind eyes.
_VIRIDIS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725".split()
_TICKS = (0.0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # of the class shares' square-root axis
_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # whose coverage is printed
_DOUBTFUL = 0.25  # a class that loses this share of its coarse pixels to other classes is pointed out


@dataclass(frozen=True)
class Picture:
    """One picture of an image: its file beside the page, or the reason why there is none."""

    kind: str  # photograph, coarse, auto or confidence
    file: str | None
    size: tuple[int, int]  # (width, height), pixels
    why_not: str = ""


@dataclass(frozen=True)
class Shown:
    """One image on the page. coarse: share of its pixels with a coarse label; shares are NaN where there is nothing."""

    sample: Sample
    why: str
    pictures: tuple[Picture, ...]
    ignored: float
    coarse: float
    confidence: float
    agreement: float


def write_report(
    run: Path, images: int, chosen: Sequence[str], teacher: Path | None, update: Callable[[int, int], None]
) -> Path:
    """Write `report/` of a finished run and return its page; `update(done, total)` follows the images.

    Shown are the `chosen` sample ids, or `images` of our choice. Confidence is computed anew with the run's teacher,
    which is where the run found it unless `teacher` says where it is now. What has gone since the run is named on the
    page instead of shown. Raises BadTable without statistics, ValueError for an unknown sample or another teacher.
    """
    if images < 0:
        raise ValueError(f"images {images}: expected 0 or more")
    summary = summarise(run)
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    table = read_statistics(run, "images").to_pandas().set_index("sample_id")
    quarantine = read_table(run / "quarantine.parquet", QUARANTINE_SCHEMA).to_pylist()
    reasons = _asked(run, chosen, table, quarantine) if chosen else choose(table, images)
    notes: list[str] = []
    teacher_file = _find_teacher(about, teacher, notes)
    originals = _find_originals(Path(about["manifest"]), notes)
    loaded = load_teacher(teacher_file, "auto", about["precision"]) if teacher_file and reasons else None

    manifest = load_manifest(run / "manifest.parquet")
    samples = {s.sample_id: s for s in manifest.samples}
    labels = open_labels(run)
    has_coarse = originals is not None and any(s.coarse_label for s in originals.values())
    folder = run / "report"
    shown: list[Shown] = []
    for done, (sample_id, why) in enumerate(reasons.items()):
        update(done, len(reasons))
        sample, row = samples[sample_id], table.loc[sample_id]
        draw = _drawings(sample, labels[sample_id], manifest.label_space, about, loaded)
        if originals is not None and has_coarse:
            draw["coarse"] = _coarse_drawing(originals.get(sample_id), manifest.label_space)
        pictures = tuple(_picture(folder, sample, kind, draw[kind]) for kind in _KINDS if kind in draw)
        coarse = float(row["coarse_pixels"]) / (sample.height * sample.width)
        numbers = (float(row[name]) for name in ("mean_confidence", "agreement_with_coarse"))
        shown.append(Shown(sample, why, pictures, float(row["ignored_fraction"]), coarse, *numbers))
    page = _render(
        name=run.absolute().name,
        about=about,
        updated=_updated(run),
        accounts=about["accounts"] or {},
        notes=notes,
        findings=_findings(summary),
        summary=summary,
        has_coarse=bool(summary.coarse_coverage > 0),
        threshold=float(about["policy"]["threshold"]),
        shown=shown,
        quarantine=quarantine,
        **_class_rows(summary, manifest.label_space),
        **_confidence_plots(summary, float(about["policy"]["threshold"])),
    )
    write_bytes(folder / "index.html", page.encode())
    _tidy(folder, {p.file for image in shown for p in image.pictures})
    if reasons:
        update(len(reasons), len(reasons))
    return folder / "index.html"
