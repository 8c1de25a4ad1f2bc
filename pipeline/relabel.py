"""New labels from a run that has kept its teacher's confidence, by another policy and without the teacher.

It is a labelling run like any other, but for its worker, who reads what the teacher said instead of asking it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from autolabel.manifests.files import sha256
from autolabel.manifests.images import BadImage
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.policy import Policy, policy_of
from autolabel.manifests.run.folder import About, read_about
from autolabel.manifests.run.labels import CONFIDENCE, TOP
from autolabel.manifests.run.shards import DamagedLabel, crc32c
from autolabel.manifests.samples import Sample
from autolabel.manifests.schemas import CONFIDENCE_BINS
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.label import Decoded, Labelled, Labeller, ahead, check_sizes, read_coarse, read_layer
from autolabel.pipeline.progress import Progress
from autolabel.pipeline.records import QUARANTINED, UNITS, Row, read_record
from autolabel.pipeline.run import Result, generate
from autolabel.pipeline.units import Unit
from autolabel.teacher.decide import Prediction

# What a sample's row takes over from the earlier run: which image file it was.
_IDENTITY = ("image_bytes", "image_mtime_ns", "image_fingerprint")


class Relabeller(Labeller):
    """A worker whose teacher is an earlier run."""

    def _set_up(self, device: str, threads: int) -> None:
        assert self.job.source is not None
        self.source = self.job.source
        self.about = read_about(self.source)
        self.edges = tuple(self.about["confidence_edges"])
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads)
        self._unit, self._rows = "", dict[str, Row]()

    def plan(self) -> dict[str, Any]:
        """What computed: nothing but table lookups."""
        return {"device": f"confidence kept by {self.source.name}", "precision": self.about["precision"]}

    def _fast(self, todo: Sequence[Sample], unit: Unit) -> Iterator[tuple[Sample, Labelled]]:
        asked = self._until_stop(todo)
        return zip(
            todo, ahead(self.pool, lambda sample: self._label_one(sample, unit), asked, self.threads), strict=False
        )

    def run(self, unit: Unit, wanted: Sequence[str]) -> Iterator[Any]:
        """As of `Labeller`."""
        table, _ = read_record(self.source / UNITS / unit.record)
        self._rows = {row["sample_id"]: row for row in table.to_pylist()}
        return super().run(unit, wanted)

    def _label_one(self, sample: Sample, unit: Unit) -> Labelled:
        known, row = self._rows[sample.sample_id], self._start(sample, unit)
        row |= {name: known[name] for name in _IDENTITY}
        if known["status"] == QUARANTINED:
            return Labelled(row | {"status": QUARANTINED, "reason": known["reason"]})
        started = time.perf_counter()
        try:
            coarse = read_coarse(sample, self.space)
            prediction = self._kept(known)
            if coarse is not None:
                check_sizes(sample, prediction.codes, coarse)
        except BadImage as error:
            return Labelled(row | {"status": QUARANTINED, "reason": str(error)})
        row["decode_ms"] = 1e3 * (time.perf_counter() - started)
        return self._finish(Decoded(row, coarse=coarse), (prediction, 0.0))

    def _kept(self, known: Row) -> Prediction:
        """What the earlier run knows of a sample. Raises DamagedLabel."""
        top, level = (read_layer(self.source, known, layer) for layer in (TOP, CONFIDENCE))
        if (crc32c(top), crc32c(level)) != (known["top_crc32c"], known["confidence_crc32c"]):
            raise DamagedLabel(f"{known['sample_id']!r} in {self.source} differs from what was committed: verify it")
        classes, levels = len(self.space), len(self.edges) + 1
        histogram = np.zeros((classes, CONFIDENCE_BINS), np.int64)
        confidence = np.zeros(classes)
        for entry in known["classes"]:
            histogram[entry["class_id"]] = entry["confidence_hist"]
            if entry["mean_confidence"] is not None:
                confidence[entry["class_id"]] = entry["mean_confidence"] * histogram[entry["class_id"]].sum()
        codes = top.astype(np.int16) * np.int16(levels) + level
        return Prediction(codes, levels, histogram, confidence)


def relabel(
    source: Path,
    policy: Policy,
    out: Path,
    on_progress: Callable[[Progress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    workers: int | None = None,
) -> tuple[LabelJob, Result]:
    """Label what `source` has labelled again, by another policy.

    The labels are those that `generate` would have made with it. Raises ValueError if the run has kept too little for
    this policy, is not complete, or its manifest has changed; otherwise as `generate`.
    """
    source = source.absolute()
    about = read_about(source)
    _require_enough(source, about, policy)
    manifest = Path(about["manifest"])
    if not manifest.is_file() or sha256(manifest) != about["manifest_sha256"]:
        raise ValueError(f"{manifest}, the manifest of {source}, is gone or has changed: put it back as it was")
    if about["state"] != "complete":
        raise ValueError(f"{source} is not complete: finish it with the same `autolabel generate` first")
    job = LabelJob(
        manifest, Path(about["teacher"]), out, scales=tuple(about["scales"]), flip=about["flip"],
        combine=about["combine"], policy=policy, source=source, precision=about["precision"], device=about["device"],
        store=about["store"], engine="local", workers=workers or os.cpu_count(), unit_size=about["unit_size"],
    )  # fmt: skip
    return job, generate(job, on_progress, on_note, labeller=Relabeller)


def _require_enough(source: Path, about: About, policy: Policy) -> None:
    edges = about["confidence_edges"]
    if edges is None:
        raise ValueError(f"{source} has kept no confidence: generate it anew with --keep-confidence 8")
    space = LabelSpace.of(about["label_space"])
    policy.require(space)
    before = policy_of(about["policy"])
    if policy.temperature != before.temperature:
        raise ValueError(
            f"policy {policy.name!r} has temperature {policy.temperature:g}, {source} {before.temperature:g}: only"
            " `autolabel generate` can change it"
        )
    if policy.left_out(space) != before.left_out(space):
        raise ValueError(
            f"policy {policy.name!r} and {source} differ in what is outlined: only `autolabel generate` can change it"
        )
    unknown = sorted({policy.threshold, *policy.thresholds.values()}.difference(edges))
    if unknown:
        raise ValueError(
            f"policy {policy.name!r} has threshold {unknown[0]:g}, but {source} can tell apart only"
            f" {', '.join(f'{edge:g}' for edge in edges)}: use these, or generate anew"
        )
