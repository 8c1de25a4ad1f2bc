"""The truth that a run is held against: images that people have labelled or corrected, found in the run by content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autolabel.manifests import storage
from autolabel.manifests.corrected import MACHINE, CorrectedFolder, folder_of, read_origin
from autolabel.manifests.documents import read_json
from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.machine import cores
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.labels import RunLabels, stored_labels
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.samples import Manifest, Sample, fingerprints, load_manifest, open_manifest
from autolabel.manifests.schemas import EXACT
from autolabel.manifests.tables import BadTable
from autolabel.manifests.wording import counted, percent
from autolabel.pipeline.records import Row, all_rows

_RECORD = ["sample_id", "status", "height", "width", "label", "label_index", "label_crc32c", "image_fingerprint"]


@dataclass(frozen=True)
class MatchedTruth:
    """Truth by sample id of the run, the run's labels of these samples, and notes about the other samples."""

    truth: dict[str, Sample]
    fingerprints: list[str]
    labels: RunLabels
    notes: list[str]


def match_truth(run: Run, truth: Path) -> MatchedTruth:
    """Find the images of a truth manifest among the labelled ones of a run.

    Truth is what people have looked at pixel by pixel: fine labels and whole corrections. Raises ValueError for another
    label space, for a manifest without truth, for an image that is listed twice, and if the run has none of them.
    """
    manifest, space = load_manifest(truth), run.label_space
    if manifest.label_space != space:
        raise ValueError(
            f"{truth} uses label space {manifest.label_space.name!r} ({len(manifest.label_space)} classes) but"
            f" {run.path} {space.name!r} ({len(space)}): audit with truth of the run's own label space"
        )
    exact, notes = exact_samples(manifest, truth)
    known: dict[str, Sample] = {}
    for sample, mark in zip(exact, fingerprints(exact), strict=True):
        if mark in known:
            raise ValueError(
                f"{truth}: {known[mark].sample_id!r} and {sample.sample_id!r} are the same image (same content):"
                " leave one of them out"
            )
        known[mark] = sample
    labelled, rows = 0, list[Row]()
    for row in all_rows(run.path, _RECORD):
        labelled += row.labelled
        rows += [row] if row.labelled and row.image_fingerprint in known else []
    if not labelled:
        raise ValueError(f"{run.path} holds no labelled image: nothing to audit; go on with `autolabel generate`")
    if not rows:
        kinds = "/".join(source for source in EXACT if any(sample.source == source for sample in exact))
        raise ValueError(
            f"none of the {len(known)} {kinds} images of {truth} is among the {labelled} labelled images of {run.path}"
            " (compared by content): label some of them too, in this run or in one of their own"
        )
    found = {str(row.image_fingerprint) for row in rows}
    if len(found) < len(known):
        notes.append(f"{len(known) - len(found)} of {len(known)} images of {truth} are not labelled in this run.")
    truths = {row.sample_id: known[str(row.image_fingerprint)] for row in rows}
    notes += _about_corrections([sample for sample in truths.values() if sample.source == "corrected"], run)
    return MatchedTruth(truths, sorted(found), RunLabels(stored_labels(run.path, map(vars, rows)), space), notes)


def originals(run: Run, matched: MatchedTruth, *, needed: bool) -> tuple[dict[str, Sample], list[str]]:
    """The matched samples in the input manifest, which lists their coarse labels; a note if it is gone.

    Raises BadTable if they are `needed`.
    """
    try:
        return open_manifest(run.input_manifest).find(matched.truth), []
    except BadTable as error:
        if needed:
            raise
        return {}, [f"Nobody can tell how much people outlined of these images: {error}."]


# --- corrections ------------------------------------------------------------------------------------------------------


def exact_samples(manifest: Manifest, path: Path) -> tuple[list[Sample], list[str]]:
    """The samples that are truth, and a note about those that are not. Raises ValueError if there is none."""
    exact = [sample for sample in manifest.labelled if sample.source in EXACT]
    folders = {folder.path for folder in map(folder_of, exact) if folder is not None}
    in_part = {folder for folder in folders if _is_partial(CorrectedFolder(folder))}
    whole = [sample for sample in exact if (folder := folder_of(sample)) is None or folder.path not in in_part]
    if not exact:
        raise ValueError(
            f"{path} lists no image with a fine or corrected label: expected a manifest such as fine.parquet"
        )
    left_out = len(exact) - len(whole)
    images, why = counted(left_out, "image"), "imported with --partial: nobody has looked at all of their pixels"
    if not whole:
        raise ValueError(f"{path} holds {images} {why}, so they are no truth; audit with others")
    return whole, [f"Left out: {images} {why}."] if left_out else []


def _is_partial(folder: CorrectedFolder) -> bool:
    """True if only the changed pixels of these labels were looked at. Raises BadDocument."""
    if not storage.exists(folder.record):
        return False
    record: dict[str, Any] = read_json(folder.record, dict[str, Any], advice="import the corrections again")
    return record.get("partial") is True


def _about_corrections(samples: Sequence[Sample], run: Run) -> list[str]:
    """The way in which truth of corrections differs from fine labels, and how much of it is the machine's own word."""
    if not samples:
        return []

    def count(sample: Sample) -> Counter[str]:
        origin, label = read_origin(sample), read_sample_label(sample, run.label_space)
        known = label != IGNORE
        left = np.zeros_like(known) if origin is None else known & (origin == MACHINE)
        return Counter(known=int(known.sum()), left=int(left.sum()))

    with ThreadPoolExecutor(cores()) as pool:
        pixels = sum(pool.map(count, samples), Counter[str]())
    share = percent(pixels["left"] / pixels["known"] if pixels["known"] else None)
    return [
        f"Corrections are the truth of {counted(len(samples), 'image')}. People chose these images, so they are no"
        f" random sample; and {share} % of their pixels with a class are a machine's that nobody changed, which count"
        " as confirmed: the figures may flatter."
    ]
