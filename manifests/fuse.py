"""Join the labelled samples of several manifests, and leave out images of runs by their statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from autolabel.manifests.condition import parse_condition
from autolabel.manifests.samples import Manifest, Sample, fingerprints, with_roots
from autolabel.manifests.tables import read_statistics


def fuse(
    named: Sequence[tuple[str, Manifest]], weights: dict[str, float], leak_check: tuple[str, Manifest] | None
) -> Manifest:
    """Join labelled samples of several manifests. `weights` replaces the weight of a whole source ("auto": 0.5).

    Raises ValueError for different label spaces, an image that is there twice (by content, not by name), or one that
    is also in the manifest of `leak_check`.
    """
    (first_name, first), *rest = named
    for name, manifest in [*rest, *([leak_check] if leak_check else [])]:
        if manifest.label_space != first.label_space:
            raise ValueError(
                f"{name} uses label space {manifest.label_space.name!r} ({len(manifest.label_space)} classes) but"
                f" {first_name} {first.label_space.name!r} ({len(first.label_space)}): fuse only one label space"
            )
    seen: list[tuple[str, dict[str, Sample]]] = []
    for name, manifest in named:
        prints: dict[str, Sample] = {}
        for sample, mark in zip(manifest.labelled, fingerprints(manifest.labelled), strict=True):
            if mark in prints:
                raise ValueError(
                    f"{name}: {prints[mark].sample_id!r} and {sample.sample_id!r} are the same image (same content):"
                    " leave one of them out"
                )
            prints[mark] = sample
        for other, theirs in seen:
            _refuse_shared(other, name, theirs, prints, "leave them out of one manifest")
        seen.append((name, prints))
    if leak_check:
        name, manifest = leak_check
        held_out = dict(zip(fingerprints(manifest.samples), manifest.samples, strict=True))
        for other, theirs in seen:
            _refuse_shared(other, name, theirs, held_out, "a network trained on them cannot be scored on them")
    samples = tuple(
        replace(s, weight=weights.get(s.source, s.weight)) for _, manifest in named for s in manifest.labelled
    )
    return with_roots(
        first.label_space,
        samples,
        {"fused": [name for name, _ in named], "weights": weights, "leak_check": leak_check[0] if leak_check else None},
    )


def _refuse_shared(a: str, b: str, theirs: dict[str, Sample], prints: dict[str, Sample], advice: str) -> None:
    shared = sorted(theirs.keys() & prints.keys(), key=lambda f: theirs[f].sample_id)
    if shared:
        first = theirs[shared[0]]
        raise ValueError(
            f"{len(shared)} images are in both {a} and {b} (same content; the first is {first.sample_id!r}): {advice}"
        )


@dataclass(frozen=True)
class Dropped:
    """Images left out of one manifest: the least trusted, those that fail the condition, and those that lack a value
    that it asks for."""

    worst: int
    failed: int
    missing: int


def select(
    named: Sequence[tuple[str, Manifest]], drop_worst: float | None, keep_if: str | None
) -> tuple[list[tuple[str, Manifest]], dict[str, Dropped]]:
    """Leave automatic labels out of manifests that lie in a run's folder; all others stay as they are.

    `named` has the manifests by their paths. `drop_worst` is a share of every run's images, rounded down; `keep_if` see
    `parse_condition`. Returns the manifests, and what was dropped from those that have statistics. Raises ValueError
    if none has, BadTable.
    """
    condition = None if keep_if is None else parse_condition(keep_if)
    chosen: list[tuple[str, Manifest]] = []
    dropped: dict[str, Dropped] = {}
    for path, manifest in named:
        run = Path(path).absolute().parent
        if (run / "stats" / "images.parquet").is_file():
            kept, dropped[path] = _select(manifest, run, drop_worst or 0.0, condition)
            chosen.append((path, kept))
        else:
            chosen.append((path, manifest))
    if not dropped:
        raise ValueError(
            f"nothing is known about the images of {', '.join(path for path, _ in named)}: to leave some out, give the"
            " manifest.parquet of a run, where it lies beside its stats/"
        )
    return chosen, dropped


def _select(manifest: Manifest, run: Path, share: float, condition: pc.Expression | None) -> tuple[Manifest, Dropped]:
    known = _known(run)
    ours = pa.array([s.sample_id for s in manifest.labelled if s.source == "auto"], pa.string())
    known = known.filter(pc.is_in(known["sample_id"], ours))
    worst = math.floor(share * len(ours) + 1e-9)  # 0.29 * 100 is 28.999…
    kept = known = known.slice(worst)
    missing = 0
    if condition is not None:
        kept, missing = known.filter(condition), len(known.filter(condition.is_null()))
    ids = set(kept["sample_id"].to_pylist())
    samples = tuple(s for s in manifest.samples if s.source != "auto" or s.label is None or s.sample_id in ids)
    return replace(manifest, samples=samples), Dropped(worst, len(known) - len(kept) - missing, missing)


def _known(run: Path) -> pa.Table:
    """What a condition may ask of an image, the least trusted first."""
    review, images = read_statistics(run, "review"), read_statistics(run, "images")
    images = images.take(pc.index_in(review["sample_id"], images["sample_id"]))
    for name in review.schema.names:
        if name not in images.schema.names:
            images = images.append_column(name, review[name])
    return images
