"""Join the labelled samples of several manifests into one to train on.

Where manifests share an image, one label stands: a person's before a machine's. Samples can be left out by their ids,
and automatic labels by the statistics of the runs that made them; a manifest's provenance names its runs.

`fuse` passes over the files several times, and keeps some bytes of each sample; `joined` takes samples in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from autolabel.manifests.contests import Contest, settle
from autolabel.manifests.ids import read_ids
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.locations import location
from autolabel.manifests.marks import (
    HeldSamples,
    Marks,
    Rows,
    SampleRows,
    image_marks,
    key_marks,
    meetings,
    shared_keys,
)
from autolabel.manifests.metadata import CORRECTS, metadata_bytes
from autolabel.manifests.samples import Manifest, load_manifest, writing_rows
from autolabel.manifests.schemas import SOURCES
from autolabel.manifests.selection import DropCounts, NamedManifest, keep_listed, select
from autolabel.manifests.sifted import SiftedManifest, rewritten, roots_of
from autolabel.manifests.wording import Shown, counted


@dataclass(frozen=True)
class PartAccount:
    """The account of one manifest: listed = taken + unlabelled + dropped + unlisted + selected + gave_way.

    unlabelled: samples without a label or a readable image. dropped: those that --drop names. unlisted: those that
    --only does not name. selected: automatic labels left out by their statistics. gave_way: those whose image has
    another label, in another manifest, that stands.
    """

    name: str
    listed: int
    taken: int
    unlabelled: int
    dropped: int
    unlisted: int
    selected: int
    gave_way: int


@dataclass(frozen=True)
class Fused(Shown):
    """A joined manifest and its account.

    contests: which labels stand where manifests share images. notes: sentences about ids that nobody has. drops: the
    numbers of automatic labels that `drop_worst` and `keep_if` left out, by the name of the part.
    """

    path: Path
    samples: int
    parts: tuple[PartAccount, ...]
    contests: tuple[Contest, ...]
    notes: tuple[str, ...]
    drops: Mapping[str, DropCounts]
    drop_worst: float | None = None
    keep_if: str | None = None

    @cached_property
    def manifest(self) -> Manifest:
        """The joined manifest, all of it, as it was written. Raises BadTable."""
        return load_manifest(self.path)

    def lines(self) -> list[str]:
        """The account for a terminal."""
        lines = []
        for part in self.parts:
            reasons = {
                "without a label": part.unlabelled, "by --drop": part.dropped, "not in --only": part.unlisted,
                "that give way": part.gave_way,
            }  # fmt: skip
            left = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
            lines.append(f"{part.name}: {part.taken} samples{f'; left out: {left}' if left else ''}")
            if part.name in self.drops:
                count = self.drops[part.name]
                reasons_of_run = [f"{count.worst} by --drop-worst"] if self.drop_worst is not None else []
                if self.keep_if is not None:
                    reasons_of_run.append(f"{count.failed} by --keep-if, {count.missing} because the value is missing")
                lines.append(f"  dropped: {', '.join(reasons_of_run)}")
        lines += [*map(str, self.contests), *self.notes]
        return [*lines, f"wrote {self.path}: {self.samples} samples"]


def fuse(
    manifests: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Mapping[str, float] | None = None,
    leak_check: str | Path | None = None,
    drop: str | Path | None = None,
    only: str | Path | None = None,
    drop_worst: float | None = None,
    keep_if: str | None = None,
) -> Fused:
    """Join the labelled samples of `manifests`, and write them to `out`.

    weights: by source ("auto": 0.5), how often its samples are drawn, in place of their own weights. leak_check: a
    validation manifest with which no image may be shared. drop, only: files of sample ids (`read_ids`), which are left
    out first, or alone taken, from all manifests. drop_worst: share of every run's images that is left out, the least
    trusted first; the number is rounded down. keep_if: a condition that images of runs must meet, see
    `parse_condition`. Raises ValueError, also where `joined` and `select` do, BadIds and BadTable.
    """
    for source, weight in (weights or {}).items():
        if source not in SOURCES or not 0 <= weight < math.inf:
            raise ValueError(
                f"weight {source}={weight:g}: expected a source ({', '.join(SOURCES)}) and a number, 0 or more"
            )
    parts = [SiftedManifest(path) for path in manifests]
    held_out = None if leak_check is None else SiftedManifest(leak_check)
    stages = [[*map(len, parts)]]  # all, after --drop, --only, and the statistics
    notes: list[str] = []
    drops: dict[str, DropCounts] = {}
    for option, path in (("drop", drop), ("only", only)):
        if path is not None:
            notes += keep_listed(parts, read_ids(path), only=option == "only")
        stages.append([*map(len, parts)])
    if drop_worst is not None or keep_if is not None:
        drops = select(parts, drop_worst=drop_worst or 0.0, keep_if=keep_if)
    stages.append([*map(len, parts)])
    for part in parts:
        part.keep(part.labelled)
    stages.append([*map(len, parts)])
    spaces = [(part.name, part.file.label_space) for part in (*parts, *([held_out] if held_out else []))]
    contests, gave_way = _settled(parts, spaces, held_out)
    total = sum(map(len, parts))
    if not total:
        options = {"--drop": drop, "--only": only, "--drop-worst": drop_worst, "--keep-if": keep_if}
        given = " and ".join(name for name, value in options.items() if value is not None)
        raise ValueError(f"no labelled sample in these manifests{given and f' after {given}'}: nothing to fuse")
    accounts = tuple(map(_account, (part.name for part in parts), zip(*stages, strict=True), gave_way))
    corrects = [run for part in parts for run in part.file.provenance.get(CORRECTS, ())]
    provenance = _provenance(parts, dict(weights or {}), held_out, contests, corrects)
    selection = dict[str, object]()
    if drops:
        counts = {name: asdict(count) for name, count in drops.items()}
        selection = {"drop_worst": drop_worst, "keep_if": keep_if, "dropped": counts}
    selection |= {name: str(path) for name, path in (("drop", drop), ("only", only)) if path is not None}
    provenance |= {
        "parts": [asdict(account) for account in accounts],
        **({"selection": selection} if selection else {}),
    }
    _write(location(out), parts, provenance, weights or {})
    return Fused(location(out), total, accounts, contests, tuple(notes), drops, drop_worst, keep_if)


def _account(name: str, stages: Sequence[int], gave_way: int) -> PartAccount:
    """The account of a part, by the numbers of its samples after each stage."""
    listed, dropped, unlisted, selected, labelled = stages
    return PartAccount(
        name, listed, labelled - gave_way, selected - labelled, listed - dropped, dropped - unlisted,
        unlisted - selected, gave_way,
    )  # fmt: skip


def _write(
    path: Path, parts: Sequence[SiftedManifest], provenance: dict[str, Any], weights: Mapping[str, float]
) -> None:
    """Write all samples, whole or not at all."""
    image_root, label_root = roots_of(parts)
    runs = dict.fromkeys(run for part in parts for run in part.runs_of_labels())
    header = metadata_bytes(
        path, space=parts[0].file.label_space, image_root=image_root, label_root=label_root, provenance=provenance,
        runs=[*runs],
    )  # fmt: skip
    with writing_rows(path, header) as add:
        for rows in rewritten(parts, image_root, label_root, weights):
            add(rows)


# --- joining ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """A joined manifest, which labels stand where manifests share images, and how many of each part give way."""

    manifest: Manifest
    contests: tuple[Contest, ...]
    gave_way: tuple[int, ...]


def join(
    manifests: Sequence[NamedManifest],
    *,
    weights: Mapping[str, float] | None = None,
    leak_check: NamedManifest | None = None,
) -> Manifest:
    """Join the labelled samples of manifests, as `joined` does."""
    return joined(manifests, weights=weights, leak_check=leak_check).manifest


def joined(
    manifests: Sequence[NamedManifest],
    *,
    weights: Mapping[str, float] | None = None,
    leak_check: NamedManifest | None = None,
) -> Joined:
    """Join the labelled samples of manifests; `weights` and `leak_check` as for `fuse`.

    Images are the same if their content is, whatever they are called; `settle` says which label stands. Raises
    ValueError for different label spaces, for an image that one manifest lists twice, for one that is also in the
    manifest of `leak_check`, for two images of one source that share an id, and where `settle` does.
    """
    (_, first), *_ = manifests
    parts = [HeldSamples(name, manifest.labelled) for name, manifest in manifests]
    held_out = HeldSamples(leak_check[0], leak_check[1].samples) if leak_check else None
    spaces = [(name, manifest.label_space) for name, manifest in (*manifests, *([leak_check] if leak_check else []))]
    contests, gave_way = _settled(parts, spaces, held_out)
    weights = dict(weights or {})
    samples = tuple(replace(s, weight=weights.get(s.source, s.weight)) for part in parts for s in part.samples())
    corrects = [str(run) for _, manifest in manifests for run in manifest.corrects]
    provenance = _provenance(parts, weights, held_out, contests, corrects)
    return Joined(Manifest.of(first.label_space, samples, provenance=provenance), contests, gave_way)


def _settled(
    parts: Sequence[SampleRows], spaces: Sequence[tuple[str, LabelSpace]], held_out: SampleRows | None
) -> tuple[tuple[Contest, ...], tuple[int, ...]]:
    """Leave in each part the labels that stand; returns what was decided, and how many of each part give way."""
    (first_name, first), *rest = spaces
    for name, space in rest:
        if space != first:
            raise ValueError(
                f"{name} uses label space {space.name!r} ({len(space)} classes) but"
                f" {first_name} {first.name!r} ({len(first)}): fuse only one label space"
            )
    marked = [(part, _image_marks(part)) for part in parts]
    if held_out is not None:
        validation = image_marks(held_out)
        for part, marks in marked:
            _require_held_out(part, np.flatnonzero(np.isin(marks, validation)), held_out.name)
    losing, contests = settle(marked, first)
    for part, mask in zip(parts, losing, strict=True):
        part.keep(~mask)
    _require_ids(parts)
    return tuple(contests), tuple(int(np.count_nonzero(mask)) for mask in losing)


def _provenance(
    parts: Sequence[SampleRows],
    weights: dict[str, float],
    held_out: SampleRows | None,
    contests: Sequence[Contest],
    corrects: Sequence[str],
) -> dict[str, Any]:
    return {
        "fused": [part.name for part in parts],
        "weights": weights,
        "leak_check": held_out.name if held_out is not None else None,
        **({"contests": [asdict(contest) for contest in contests]} if contests else {}),
        **({CORRECTS: sorted(set(corrects))} if corrects else {}),
    }


def _image_marks(part: SampleRows) -> Marks:
    """The fingerprints of the images. Raises ValueError where two samples share one."""
    marks, again = image_marks(part), (len(part), 0)
    for _, row, mark in meetings([marks]):
        firsts = row[np.searchsorted(mark, mark)]
        later = np.flatnonzero(row != firsts)
        if len(later):
            least = later[row[later].argmin()]
            again = min(again, (int(row[least]), int(firsts[least])))
    if again[0] < len(part):
        one, other = part.samples(np.array(again[::-1]))
        raise ValueError(
            f"{part.name}: {one.sample_id!r} and {other.sample_id!r} are the same image (same content):"
            " leave one of them out"
        )
    return marks


def _require_held_out(part: SampleRows, shared: Rows, held_out: str) -> None:
    if len(shared):
        first = min(sample.sample_id for sample in part.samples(shared))
        raise ValueError(
            f"{len(shared)} images are in both {part.name} and {held_out} (same content; the first is"
            f" {first!r}): a network trained on them cannot be scored on them"
        )


def _require_ids(parts: Sequence[SampleRows]) -> None:
    """Raise ValueError where two parts call two images of one source the same."""
    marks = [key_marks(part) for part in parts]
    if not any(len(mark) for _, _, mark in meetings(marks)):
        return
    del marks
    for place, part in enumerate(parts[1:], 1):
        for earlier in parts[:place]:
            twice = shared_keys(earlier, part)
            if twice:
                raise ValueError(
                    f"{earlier.name} and {part.name} use {counted(len(twice), 'id')} for different images (the first is"
                    f" {twice[0][1]!r}, {twice[0][0]}): scan the folder above both, so that ids tell them apart, or"
                    " leave them out"
                )
