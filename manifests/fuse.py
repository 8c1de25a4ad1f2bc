"""Join the labelled samples of several manifests into one to train on.

Automatic labels can be left out by the statistics of the runs that made them: the least trusted, and those that fail a
condition. A manifest's provenance names its runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from autolabel.manifests.condition import parse_condition
from autolabel.manifests.metadata import CORRECTS
from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.samples import Manifest, Sample, fingerprints, load_manifest, save_manifest
from autolabel.manifests.schemas import SOURCES
from autolabel.manifests.wording import Shown

NamedManifest = tuple[str, Manifest]  # messages and provenance call the manifest by this name


@dataclass(frozen=True)
class DropCounts:
    """The numbers of automatic labels that were dropped from one manifest.

    worst: the least trusted ones. failed: those that fail the condition. missing: those without a value that the
    condition names.
    """

    worst: int
    failed: int
    missing: int


@dataclass(frozen=True)
class Fused(Shown):
    """A joined manifest, and its account: for every part the name, the samples taken, and the samples without a label.

    drops: the numbers of automatic labels that `drop_worst` and `keep_if` left out, by the name of the part.
    """

    path: Path
    manifest: Manifest
    parts: tuple[tuple[str, int, int], ...]
    drops: Mapping[str, DropCounts]
    drop_worst: float | None = None
    keep_if: str | None = None

    def lines(self) -> list[str]:
        """The account for a terminal."""
        lines = []
        for name, taken, unlabelled in self.parts:
            remark = f", {unlabelled} without a label left out" if unlabelled else ""
            lines.append(f"{name}: {taken} samples{remark}")
            if name in self.drops:
                count = self.drops[name]
                reasons = [f"{count.worst} by --drop-worst"] if self.drop_worst is not None else []
                if self.keep_if is not None:
                    reasons.append(f"{count.failed} by --keep-if, {count.missing} because the value is missing")
                lines.append(f"  dropped: {', '.join(reasons)}")
        return [*lines, f"wrote {self.path}: {len(self.manifest.samples)} samples"]


def fuse(
    manifests: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Mapping[str, float] | None = None,
    leak_check: str | Path | None = None,
    drop_worst: float | None = None,
    keep_if: str | None = None,
) -> Fused:
    """Join the labelled samples of `manifests`, and write them to `out`.

    weights: by source ("auto": 0.5), how often its samples are drawn, in place of their own weights. leak_check: a
    validation manifest with which no image may be shared. drop_worst: share of every run's images that is left out,
    the least trusted first; the number is rounded down. keep_if: a condition that images of runs must meet, see
    `parse_condition`. Raises ValueError, also where `join` and `select` do, and BadTable.
    """
    for source, weight in (weights or {}).items():
        if source not in SOURCES or not 0 <= weight < math.inf:
            raise ValueError(
                f"weight {source}={weight:g}: expected a source ({', '.join(SOURCES)}) and a number, 0 or more"
            )
    parts = [(str(path), load_manifest(path)) for path in manifests]
    held_out = None if leak_check is None else (str(leak_check), load_manifest(leak_check))
    drops: dict[str, DropCounts] = {}
    if drop_worst is not None or keep_if is not None:
        parts, drops = select(parts, drop_worst=drop_worst or 0.0, keep_if=keep_if)
    manifest = join(parts, weights=weights, leak_check=held_out)
    if not manifest.samples:
        reason = " after --drop-worst and --keep-if" if drops else ""
        raise ValueError(f"no labelled sample in these manifests{reason}: nothing to fuse")
    if drops:
        counts = {name: asdict(count) for name, count in drops.items()}
        selection = {"drop_worst": drop_worst, "keep_if": keep_if, "dropped": counts}
        manifest = replace(manifest, provenance={**manifest.provenance, "selection": selection})
    save_manifest(Path(out), manifest)
    counted = tuple((name, len(part.labelled), len(part.samples) - len(part.labelled)) for name, part in parts)
    return Fused(Path(out), manifest, counted, drops, drop_worst, keep_if)


# --- joining ----------------------------------------------------------------------------------------------------------


def join(
    manifests: Sequence[NamedManifest],
    *,
    weights: Mapping[str, float] | None = None,
    leak_check: NamedManifest | None = None,
) -> Manifest:
    """Join the labelled samples of manifests; `weights` and `leak_check` as for `fuse`.

    Raises ValueError for different label spaces, for an image that is listed twice (by content, not by name), and for
    one that is also in the manifest of `leak_check`.
    """
    (first_name, first), *rest = manifests
    for name, manifest in [*rest, *([leak_check] if leak_check else [])]:
        if manifest.label_space != first.label_space:
            raise ValueError(
                f"{name} uses label space {manifest.label_space.name!r} ({len(manifest.label_space)} classes) but"
                f" {first_name} {first.label_space.name!r} ({len(first.label_space)}): fuse only one label space"
            )
    by_content = [(name, _by_content(name, manifest)) for name, manifest in manifests]
    for place, (name, images) in enumerate(by_content):
        for other, earlier in by_content[:place]:
            _refuse_shared(other, name, earlier, images, "leave them out of one manifest")
    if leak_check:
        name, manifest = leak_check
        held_out = dict(zip(fingerprints(manifest.samples), manifest.samples, strict=True))
        for other, images in by_content:
            _refuse_shared(other, name, images, held_out, "a network trained on them cannot be scored on them")
    weights = dict(weights or {})
    samples = tuple(
        replace(s, weight=weights.get(s.source, s.weight)) for _, manifest in manifests for s in manifest.labelled
    )
    corrects = sorted({str(run) for _, manifest in manifests for run in manifest.corrects})
    provenance = {
        "fused": [name for name, _ in manifests],
        "weights": weights,
        "leak_check": leak_check[0] if leak_check else None,
        **({CORRECTS: corrects} if corrects else {}),
    }
    return Manifest.of(first.label_space, samples, provenance=provenance)


def _by_content(name: str, manifest: Manifest) -> dict[str, Sample]:
    """The labelled samples by the fingerprint of their image. Raises ValueError where two share one."""
    images: dict[str, Sample] = {}
    for sample, mark in zip(manifest.labelled, fingerprints(manifest.labelled), strict=True):
        if mark in images:
            raise ValueError(
                f"{name}: {images[mark].sample_id!r} and {sample.sample_id!r} are the same image (same content):"
                " leave one of them out"
            )
        images[mark] = sample
    return images


def _refuse_shared(a: str, b: str, in_a: dict[str, Sample], in_b: dict[str, Sample], advice: str) -> None:
    shared = sorted(in_a.keys() & in_b.keys(), key=lambda mark: in_a[mark].sample_id)
    if shared:
        first = in_a[shared[0]]
        raise ValueError(
            f"{len(shared)} images are in both {a} and {b} (same content; the first is {first.sample_id!r}): {advice}"
        )


# --- selecting by statistics ------------------------------------------------------------------------------------------


def select(
    manifests: Sequence[NamedManifest], *, drop_worst: float = 0.0, keep_if: str | None = None
) -> tuple[list[NamedManifest], dict[str, DropCounts]]:
    """Leave out automatic labels by the statistics of their runs; all other samples stay.

    Parameters as for `fuse`. Returns the manifests, and the numbers dropped from those that have labels of a run.
    Raises ValueError if none has any, BadTable if a run lacks its statistics.
    """
    condition = None if keep_if is None else parse_condition(keep_if)
    remaining: list[NamedManifest] = []
    drops: dict[str, DropCounts] = {}
    for name, manifest in manifests:
        if manifest.runs:
            manifest, drops[name] = _select(manifest, drop_worst, condition)
        remaining.append((name, manifest))
    if not drops:
        raise ValueError(
            f"nothing is known about the images of {', '.join(name for name, _ in manifests)}: to leave some out, give"
            " the manifest.parquet of a run, or a manifest that was fused from one"
        )
    return remaining, drops


def _select(manifest: Manifest, share: float, condition: pc.Expression | None) -> tuple[Manifest, DropCounts]:
    passed: set[tuple[Path | None, str]] = set()
    worst = failed = missing = 0
    for run in manifest.runs:
        ids = pa.array([s.sample_id for s in manifest.labelled if s.run == run], pa.string())
        ranked = _ranked(run)
        ranked = ranked.filter(pc.is_in(ranked["sample_id"], ids))
        least = math.floor(share * len(ids) + 1e-9)  # 0.29 * 100 is 28.999…
        trusted = ranked.slice(least)
        passing = trusted if condition is None else trusted.filter(condition)
        unknown = 0 if condition is None else len(trusted.filter(condition.is_null()))
        worst, missing = worst + least, missing + unknown
        failed += len(trusted) - len(passing) - unknown
        passed |= {(run, sample_id) for sample_id in passing["sample_id"].to_pylist()}
    samples = tuple(s for s in manifest.samples if s.run is None or (s.run, s.sample_id) in passed)
    return replace(manifest, samples=samples), DropCounts(worst, failed, missing)


def _ranked(run: Path) -> pa.Table:
    """The columns that a condition may name, one row per image of a run, the least trusted first."""
    review, images = RunFolder(run).statistics("review"), RunFolder(run).statistics("images")
    images = images.take(pc.index_in(review["sample_id"], images["sample_id"]))
    for name in review.schema.names:
        if name not in images.schema.names:
            images = images.append_column(name, review[name])
    return images
