"""Leave samples out of manifests: by their ids, and automatic labels by the statistics of the runs that made them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from autolabel.manifests.condition import columns_of, parse_condition
from autolabel.manifests.ids import Ids
from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.samples import Manifest
from autolabel.manifests.schemas import IMAGES_SCHEMA
from autolabel.manifests.sifted import SiftedManifest

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


def keep_listed(parts: Sequence[SiftedManifest], ids: Ids, *, only: bool) -> list[str]:
    """Leave out the samples that `ids` names, or, with `only`, those that it does not, of whatever source.

    An id that several manifests have means a sample in each. Returns a sentence about ids that none of them had before
    any sample was left out, if there are such ids. Raises BadIds for a list of which they have none.
    """
    found: set[str] = set()
    masks = []
    for part in parts:
        mask = []
        for table in part.tables(("sample_id",), every=True):
            names = table["sample_id"].to_pylist()
            mask.append(np.fromiter((name in ids for name in names), np.bool_, len(names)))
            found.update(name for name, listed in zip(names, mask[-1], strict=True) if listed)
        masks.append(np.concatenate([np.zeros(0, np.bool_), *mask]))
    sentence = ids.unknown(found, where="in these manifests")
    for part, listed in zip(parts, masks, strict=True):
        part.keep_of_all(listed if only else ~listed)
    return [sentence] if sentence else []


def select(
    parts: Sequence[SiftedManifest], *, drop_worst: float = 0.0, keep_if: str | None = None
) -> dict[str, DropCounts]:
    """Leave out automatic labels by the statistics of their runs; all other samples stay.

    Parameters as for `fuse`. Returns the numbers dropped from the manifests that have labels of a run. Raises
    ValueError if none has any, BadTable if a run lacks its statistics.
    """
    condition = None if keep_if is None else parse_condition(keep_if)
    columns = [] if keep_if is None else sorted(columns_of(keep_if))
    drops = {part.name: _select(part, drop_worst, condition, columns) for part in parts if part.runs_of_labels()}
    if not drops:
        raise ValueError(
            f"nothing is known about the images of {', '.join(part.name for part in parts)}: to leave some out, give"
            " the manifest.parquet of a run, or a manifest that was fused from one"
        )
    return drops


def _select(part: SiftedManifest, share: float, condition: pc.Expression | None, columns: Sequence[str]) -> DropCounts:
    labelled, place, first = part.labelled, np.empty(len(part), np.int16), 0
    for _, places in part.runs():
        place[first : first + len(places)] = places
        first += len(places)
    stays = place == -1
    worst = failed = missing = 0
    for run in part.runs_of_labels():
        of_run = place == part.file.runs.index(run)
        ids = _ids(part, of_run)
        known = ids.filter(pa.array(labelled[of_run]))
        ranked = by_trust(run, columns)
        ranked = ranked.filter(pc.is_in(ranked["sample_id"], known))
        least = math.floor(share * len(known) + 1e-9)  # 0.29 * 100 is 28.999…
        trusted = ranked.slice(least)
        passing = trusted if condition is None else trusted.filter(condition)
        missed = 0 if condition is None else len(trusted.filter(condition.is_null()))
        worst, missing = worst + least, missing + missed
        failed += len(trusted) - len(passing) - missed
        stays[of_run] = pc.is_in(ids, passing["sample_id"].combine_chunks()).to_numpy(zero_copy_only=False)
    part.keep(stays)
    return DropCounts(worst, failed, missing)


def _ids(part: SiftedManifest, mask: NDArray[np.bool_]) -> pa.Array:
    """The ids of some samples."""
    first, found = 0, [pa.array([], pa.string())]
    for table in part.tables(("sample_id",)):
        found.append(table["sample_id"].filter(pa.array(mask[first : first + len(table)])).combine_chunks())
        first += len(table)
    return pa.concat_arrays(found)


def by_trust(run: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The columns that a condition may name: a row for each image, the least trusted first. Raises BadTable.

    columns: those that are wanted beside the ids; all of them if there are none.
    """
    folder = RunFolder(run)
    if columns is None:
        review, images = folder.statistics("review"), folder.statistics("images")
    else:
        of_images = [name for name in columns if name in IMAGES_SCHEMA.names]
        of_review = [name for name in columns if name not in IMAGES_SCHEMA.names]
        review = folder.statistics("review", ["sample_id", *of_review])
        if not of_images:
            return review
        images = folder.statistics("images", ["sample_id", *of_images])
    images = images.take(pc.index_in(review["sample_id"], images["sample_id"]))
    for name in review.schema.names:
        if name not in images.schema.names:
            images = images.append_column(name, review[name])
    return images
