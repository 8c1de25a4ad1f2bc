"""Join the labelled samples of several manifests into one to train on.

Where manifests share an image, one label stands: a person's before a machine's. Samples can be left out by their ids,
and automatic labels by the statistics of the runs that made them; a manifest's provenance names its runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from autolabel.manifests.contests import Contest, Images, settle
from autolabel.manifests.ids import read_ids
from autolabel.manifests.locations import location
from autolabel.manifests.metadata import CORRECTS
from autolabel.manifests.samples import Manifest, Sample, fingerprints, load_manifest, save_manifest
from autolabel.manifests.schemas import SOURCES
from autolabel.manifests.selection import DropCounts, NamedManifest, listed_only, select
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
    manifest: Manifest
    parts: tuple[PartAccount, ...]
    contests: tuple[Contest, ...]
    notes: tuple[str, ...]
    drops: Mapping[str, DropCounts]
    drop_worst: float | None = None
    keep_if: str | None = None

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
        return [*lines, f"wrote {self.path}: {len(self.manifest.samples)} samples"]


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
    parts = [(str(path), load_manifest(path)) for path in manifests]
    held_out = None if leak_check is None else (str(leak_check), load_manifest(leak_check))
    stages = [parts]  # after --drop, --only, and the statistics
    notes: list[str] = []
    drops: dict[str, DropCounts] = {}
    for option, path in (("drop", drop), ("only", only)):
        if path is not None:
            parts, unknown = listed_only(parts, **{option: read_ids(path)}, known=stages[0])
            notes += unknown
        stages.append(parts)
    if drop_worst is not None or keep_if is not None:
        parts, drops = select(parts, drop_worst=drop_worst or 0.0, keep_if=keep_if)
    stages.append(parts)
    result = joined(parts, weights=weights, leak_check=held_out)
    if not result.manifest.samples:
        options = {"--drop": drop, "--only": only, "--drop-worst": drop_worst, "--keep-if": keep_if}
        given = " and ".join(name for name, value in options.items() if value is not None)
        raise ValueError(f"no labelled sample in these manifests{given and f' after {given}'}: nothing to fuse")
    accounts = tuple(map(_account, zip(*stages, strict=True), result.gave_way))
    manifest, selection = result.manifest, dict[str, object]()
    if drops:
        counts = {name: asdict(count) for name, count in drops.items()}
        selection = {"drop_worst": drop_worst, "keep_if": keep_if, "dropped": counts}
    selection |= {name: str(path) for name, path in (("drop", drop), ("only", only)) if path is not None}
    told = {"parts": [asdict(account) for account in accounts], **({"selection": selection} if selection else {})}
    manifest = replace(manifest, provenance={**manifest.provenance, **told})
    save_manifest(location(out), manifest)
    return Fused(location(out), manifest, accounts, result.contests, tuple(notes), drops, drop_worst, keep_if)


def _account(stages: Sequence[NamedManifest], gave_way: int) -> PartAccount:
    """The account of a part that has gone through --drop, --only and the statistics."""
    name, last = stages[-1]
    listed, dropped, unlisted, selected = (len(manifest.samples) for _, manifest in stages)
    labelled = len(last.labelled)
    return PartAccount(
        name, listed, labelled - gave_way, selected - labelled, listed - dropped, dropped - unlisted,
        unlisted - selected, gave_way,
    )  # fmt: skip


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
    (first_name, first), *rest = manifests
    for name, manifest in [*rest, *([leak_check] if leak_check else [])]:
        if manifest.label_space != first.label_space:
            raise ValueError(
                f"{name} uses label space {manifest.label_space.name!r} ({len(manifest.label_space)} classes) but"
                f" {first_name} {first.label_space.name!r} ({len(first.label_space)}): fuse only one label space"
            )
    by_content = [(name, _by_content(name, manifest)) for name, manifest in manifests]
    if leak_check:
        name, manifest = leak_check
        held_out = dict(zip(fingerprints(manifest.samples), manifest.samples, strict=True))
        for other, images in by_content:
            _require_held_out(other, images, name, held_out)
    losing, contests = settle(by_content, first.label_space)
    given_way = [{images[mark].key for mark in marks} for (_, images), marks in zip(by_content, losing, strict=True)]
    weights = dict(weights or {})
    standing = [
        (name, [s for s in manifest.labelled if s.key not in keys] if keys else manifest.labelled)
        for (name, manifest), keys in zip(manifests, given_way, strict=True)
    ]
    _require_ids(standing)
    samples = tuple(replace(s, weight=weights.get(s.source, s.weight)) for _, of_part in standing for s in of_part)
    corrects = sorted({str(run) for _, manifest in manifests for run in manifest.corrects})
    provenance = {
        "fused": [name for name, _ in manifests],
        "weights": weights,
        "leak_check": leak_check[0] if leak_check else None,
        **({"contests": [asdict(contest) for contest in contests]} if contests else {}),
        **({CORRECTS: corrects} if corrects else {}),
    }
    manifest = Manifest.of(first.label_space, samples, provenance=provenance)
    return Joined(manifest, tuple(contests), tuple(map(len, losing)))


def _by_content(name: str, manifest: Manifest) -> Images:
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


def _require_held_out(name: str, images: Images, held_out: str, validation: Images) -> None:
    shared = sorted(images.keys() & validation.keys(), key=lambda mark: images[mark].sample_id)
    if shared:
        raise ValueError(
            f"{len(shared)} images are in both {name} and {held_out} (same content; the first is"
            f" {images[shared[0]].sample_id!r}): a network trained on them cannot be scored on them"
        )


def _require_ids(parts: Sequence[tuple[str, Sequence[Sample]]]) -> None:
    """Raise ValueError where two parts call two images of one source the same."""
    for place, (name, samples) in enumerate(parts[1:], 1):
        keys = {sample.key for sample in samples}
        for other, earlier in parts[:place]:
            twice = [sample.key for sample in earlier if sample.key in keys]
            if twice:
                raise ValueError(
                    f"{other} and {name} use {counted(len(twice), 'id')} for different images (the first is"
                    f" {twice[0][1]!r}, {twice[0][0]}): scan the folder above both, so that ids tell them apart, or"
                    " leave them out"
                )
