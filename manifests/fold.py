"""Cut a manifest into folds, so that every image can be labelled by a teacher that has not seen it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from autolabel.manifests.samples import Sample, load_manifest, save_manifest
from autolabel.manifests.wording import Shown, Table, counted

BLOCK = 16  # consecutive samples that stay together, at most, where there are fewer groups than folds


@dataclass(frozen=True)
class Fold(Shown):
    """The folds of a manifest: by fold the samples of its part and of the rest; a note where groups had to be cut."""

    out: Path
    sizes: tuple[tuple[int, int], ...]
    note: str = ""

    def lines(self) -> list[str]:
        """The note, and what was written."""
        note = [self.note] if self.note else []
        return [
            *note,
            f"wrote {counted(2 * len(self.sizes), 'manifest')} into {self.out}: train on rest-N, label part-N",
        ]

    def tables(self) -> list[Table]:
        """One row for each fold."""
        rows = [[str(n), str(part), str(rest)] for n, (part, rest) in enumerate(self.sizes, start=1)]
        return [Table("folds", ["fold", "samples of its part", "of the rest"], rows)]


def part_path(out: Path, number: int) -> Path:
    """The manifest of the samples of a fold, 1 and up."""
    return out / f"part-{number}.parquet"


def rest_path(out: Path, number: int) -> Path:
    """The manifest of all other samples."""
    return out / f"rest-{number}.parquet"


def fold(manifest: str | Path, out: Path, *, folds: int) -> Fold:
    """Cut the labelled samples of a manifest into `folds` parts; write each, and the rest without it, into `out`.

    Groups stay whole, the largest first into the smallest part; frames of one drive are no independent witnesses. Where
    there are fewer groups than folds, blocks of BLOCK consecutive samples, or fewer of a small manifest, stay together
    instead. Raises ValueError for fewer than two folds and for fewer samples than folds, BadTable.
    """
    if folds < 2:
        raise ValueError(f"--folds {folds}: expected 2 or more")
    whole = load_manifest(manifest)
    samples, note = whole.labelled, ""
    blocks = [s.group for s in samples]
    if len(set(blocks)) < folds:
        block = max(1, min(BLOCK, len(samples) // folds))
        note = (
            f"{manifest} has {counted(len(set(blocks)), 'group')}, fewer than folds: {block} consecutive samples stay"
            " together, so a teacher may know neighbours of an image"
        )
        blocks = [str(place // block) for place in range(len(samples))]
    if len(set(blocks)) < folds:
        raise ValueError(
            f"--folds {folds}: {manifest} has {counted(len(samples), 'labelled sample')}, too few for that"
        )
    parts = _dealt(samples, blocks, folds)
    sizes = []
    for number, part in enumerate(parts, start=1):
        chosen = set(part)
        rest = [place for place in range(len(samples)) if place not in chosen]
        for path, places in ((part_path(out, number), part), (rest_path(out, number), rest)):
            save_manifest(path, replace(whole, samples=tuple(samples[place] for place in places)))
        sizes.append((len(part), len(rest)))
    return Fold(out, tuple(sizes), note)


def _dealt(samples: tuple[Sample, ...], blocks: list[str], folds: int) -> list[list[int]]:
    """The places of the samples of each part, in their order: the largest block goes into the smallest part."""
    part_of, sizes = dict[str, int](), [0] * folds
    for block, count in sorted(Counter(blocks).items(), key=lambda item: (-item[1], item[0])):
        part_of[block] = min(range(folds), key=lambda part: (sizes[part], part))
        sizes[part_of[block]] += count
    return [[place for place in range(len(samples)) if part_of[blocks[place]] == part] for part in range(folds)]
