"""Leave samples out of manifests: by their ids, and automatic labels by the statistics of the runs that made them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from autolabel.manifests.condition import parse_condition
from autolabel.manifests.ids import Ids
from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.samples import Manifest

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


def listed_only(
    manifests: Sequence[NamedManifest],
    *,
    known: Sequence[NamedManifest],
    drop: Ids | None = None,
    only: Ids | None = None,
) -> tuple[list[NamedManifest], list[str]]:
    """Leave out the samples that `drop` names, or those that `only` does not, of whatever source.

    An id that several manifests have means a sample in each. Returns the manifests, and sentences about ids that none
    of those `known` has. Raises BadIds for a list of which they have none.
    """
    names = {sample.sample_id for _, manifest in known for sample in manifest.samples}
    unknown = [ids.unknown(names, where="in these manifests") for ids in (drop, only) if ids is not None]
    remaining = []
    for name, manifest in manifests:
        kept = tuple(
            s
            for s in manifest.samples
            if (drop is None or s.sample_id not in drop) and (only is None or s.sample_id in only)
        )
        remaining.append((name, replace(manifest, samples=kept)))
    return remaining, [sentence for sentence in unknown if sentence]


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
        ranked = by_trust(run)
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


def by_trust(run: Path) -> pa.Table:
    """The columns that a condition may name: a row for each image, the least trusted first. Raises BadTable."""
    review, images = RunFolder(run).statistics("review"), RunFolder(run).statistics("images")
    images = images.take(pc.index_in(review["sample_id"], images["sample_id"]))
    for name in review.schema.names:
        if name not in images.schema.names:
            images = images.append_column(name, review[name])
    return images
