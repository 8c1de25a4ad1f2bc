"""Corrections come home: labels that people have put right in another tool become a manifest of source "corrected".

What comes back is compared with the run's committed labels, pixel by pixel. The files of the result are described in
manifests/corrected.py. The first one says what is imported, the manifest comes last: a call that was killed is simply
made again, and a call for other files never writes over anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from autolabel.manifests import storage
from autolabel.manifests.corrected import CorrectedFolder
from autolabel.manifests.formats.known import READ, known_format
from autolabel.manifests.metadata import CORRECTS
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import ManifestFile, Sample, in_pieces, writing_manifest
from autolabel.manifests.wording import Progress, listed
from autolabel.pipeline.import_request import Terms, claim, done_before, request_of, require_place
from autolabel.pipeline.imported import KEY, Found, Imported
from autolabel.pipeline.merging import PNG, Merging, items_of


def import_corrections(
    reads: str,
    paths: Sequence[Path],
    *,
    run: Run | Path,
    out: Path,
    partial: bool = False,
    only_changed: bool = False,
    label_ids: str | None = None,
    suffix: str = "",
    progress: Progress | None = None,
) -> Imported:
    """Take over what people made of a run's labels, as the manifest `out` and the folder beside it.

    reads: name of the format. paths: files and folders of it; where two of them change a pixel differently, the later
    one stands. partial: pixels without a class are as the machine had them; only the others are a person's.
    only_changed: images in which nothing was changed are left out; else they are confirmed. label_ids: "train",
    "source" or "color", what PNGs hold; None to find out. suffix: the end of their names that is no part of the
    images'. `progress(done, total)` counts labels.

    Where `out` holds these corrections already, nothing is written. Raises ValueError, and then leaves nothing behind,
    for an `out` of other corrections or inside the run or a path, for a run that is not complete, for labels of unknown
    images, other sizes or unknown classes, and for an image that comes twice in one path; BadReturn for files that the
    format cannot read; DamagedLabel.
    """
    run, folder = Run.open(run), CorrectedFolder.of(out := out.absolute())
    _require_readable(reads, label_ids, suffix)
    if run.state != "complete":
        raise ValueError(f"{run.path} is not complete: finish it first, with the command that began it")
    require_place(out, paths)
    terms = Terms(partial, only_changed, label_ids, suffix)
    request = request_of(reads, paths, run=run, terms=terms)
    if storage.exists(out):
        return done_before(out, request)
    record = claim(folder, request)
    try:
        merging = Merging(run, folder, terms, progress)
        for path in paths:
            merging.add(path, items_of(reads, path, merging))
        found = merging.count()
        _write_manifest(out, folder, merging, found, record=record)
    except Exception:
        folder.discard()
        raise
    return Imported.read(out, new=True)


def _require_readable(reads: str, label_ids: str | None, suffix: str) -> None:
    """Raise ValueError for a format that nobody reads, and for what only PNGs have."""
    known_format(reads)
    if reads not in READ:
        raise ValueError(f"labels do not come back as {reads}: expected {listed(READ)}")
    if reads != PNG and (label_ids is not None or suffix):
        shown = f"--suffix {suffix}" if suffix else f"--label-ids {label_ids}"
        raise ValueError(f"{shown} is for png: leave it out, {reads} names its images and classes itself")


def _write_manifest(
    out: Path, folder: CorrectedFolder, merging: Merging, found: Found, *, record: dict[str, Any]
) -> None:
    run = merging.run
    manifest = run.manifest
    about = {KEY: {**record, "found": asdict(found)}, CORRECTS: [str(run.path.absolute())]}
    with writing_manifest(
        out, run.label_space, image_root=manifest.image_root, label_root=folder.path, provenance=about
    ) as write:
        for some in in_pieces(_corrected(manifest, folder, merging.kept)):
            write(some)


def _corrected(manifest: ManifestFile, folder: CorrectedFolder, kept: set[str]) -> Iterator[Sample]:
    for sample in manifest.samples():
        if sample.sample_id in kept:
            yield replace(
                sample, source="corrected", label=folder.label(sample.sample_id), label_index=None, label_ids="train",
                coarse_label=None, weight=1.0, run=None,
            )  # fmt: skip
