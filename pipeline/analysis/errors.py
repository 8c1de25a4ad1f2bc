"""Likely mistakes in human labels, ranked by region and by image, from the confidence that runs have kept.

errors.parquet, errors.csv    one row for each doubtful region, the likeliest mistake first
ids.txt                       the images in the order of their likeliest mistake

Images are read once, by threads, and forgotten; what remains of one are its doubts (docs/errors.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from autolabel.manifests import storage
from autolabel.manifests.ahead import ahead
from autolabel.manifests.images import BadImage
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.locations import location
from autolabel.manifests.machine import cores
from autolabel.manifests.reading import read_coarse, read_photograph
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.run.place import require_outside_runs
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.run.shards import DamagedLabel, Label
from autolabel.manifests.samples import ManifestFile, Sample, open_manifest
from autolabel.manifests.tables import read_pieces
from autolabel.manifests.wording import Progress, counted, number
from autolabel.pipeline.analysis.doubt import Doubts, Floats, Gathered, look
from autolabel.pipeline.analysis.errors_pictures import FOLDER, clear, draw_region, write_region
from autolabel.pipeline.analysis.errors_table import (
    CSV,
    ERRORS_SCHEMA,
    IDS,
    TABLE,
    LabelErrors,
    first_rows,
    rank,
    write_ranking,
)
from autolabel.pipeline.analysis.judges import SEEN, UNKNOWN, Judge, judge_of, require_one_space

BORDER = 0.005  # of an image's diagonal: so far from the class that the teacher names, a border is no mistake
SMALLEST = 0.0003  # of an image's pixels: a smaller piece is no doubt
_NO_LABEL, _NOT_LABELLED = "without a human label", "not in these runs"


@dataclass(frozen=True)
class _Verdict:
    """One image: who judged it, what is known of that teacher, its counts and doubts; or why it was left out."""

    sample_id: str
    judge: int = 0
    knows: int = 0
    counts: Floats | None = None
    doubts: Doubts | None = None
    why: str = ""


def find_errors(
    source: Run | str | Path,
    out: Path,
    *,
    runs: Sequence[Run | Path] = (),
    coarse: bool = False,
    worst: int | None = None,
    pictures: int = 0,
    border: int | None = None,
    min_pixels: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> LabelErrors:
    """Rank the regions and images whose human label is likely wrong; write the ranking into the folder `out`.

    source: a run, whose input manifest has the human labels, or a manifest whose labels `runs` judge. coarse: judge
    coarse labels also where there are fine ones. worst: list so many images at most. pictures: draw so many regions.
    border: rows and columns from the class that the teacher names in which a pixel does not count, BORDER of the
    diagonal by default. min_pixels: of the smallest piece, SMALLEST of the image by default. Neither order nor digits
    depend on `workers`.
    Raises ValueError for runs without kept confidence or of another label space, if no image has a human label or none
    is in the runs, and for a folder that holds something else; BadTable.
    """
    for name, value, least in (
        ("worst", worst, 1),
        ("pictures", pictures, 0),
        ("border", border, 0),
        ("min-pixels", min_pixels, 1),
        ("workers", workers, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: expected {least} or more")
    paths = [run.path if isinstance(run, Run) else run for run in runs]
    manifest, judges, own = _opened(source.path if isinstance(source, Run) else location(source), paths)
    _require_place(out)
    spaces = f"the labels of {manifest.path}"
    require_one_space(manifest.label_space, judges, of=spaces)
    space = manifest.label_space
    found = [Gathered(len(space), judge.levels) for judge in judges]
    ids, left_out, knows, bad = list[str](), Counter[str](), Counter[tuple[int, int]](), ""
    work = partial(_look, judges=judges, own=own, space=space, coarse=coarse, limits=(border, min_pixels))
    threads = workers or cores()
    total = sum(len(table) for table in manifest.tables())
    with ThreadPoolExecutor(threads) as pool:
        for done, view in enumerate(ahead(pool, work, manifest.samples(), 2 * threads), start=1):
            if view.counts is None or view.doubts is None:
                unreadable = view.why not in (_NO_LABEL, _NOT_LABELLED)
                bad = bad or (view.why if unreadable else "")
                left_out["unreadable" if unreadable else view.why] += 1
            else:
                found[view.judge].add(len(ids), view.counts, view.doubts)
                knows[view.judge, view.knows] += 1
                ids.append(view.sample_id)
            if progress:
                progress(done, total)
    _require_any(manifest, judges, left_out, judged=len(ids), bad=bad)
    notes = _notes(judges, knows) + ([f"left out, the first of {left_out['unreadable']}: {bad}"] if bad else [])
    ranked = rank(found, judges, worst)
    likely = write_ranking(out, ranked, ids, space)
    if pictures or storage.is_folder(out / FOLDER):
        clear(out / FOLDER)
    notes += _draw(out, manifest, judges, own=own, coarse=coarse, most=pictures)
    images, regions = len(set(ranked["image"].tolist())), len(ranked)
    first = first_rows(ranked, ids, space)
    return LabelErrors(out, total, len(ids), dict(left_out), images, regions, likely, first, notes)


# --- who judges what --------------------------------------------------------------------------------------------------


def _opened(source: Path, runs: Sequence[Path]) -> tuple[ManifestFile, list[Judge], bool]:
    """The manifest of the human labels, the judges, and True if it is their own input manifest."""
    if RunFolder(source).exists():
        if runs:
            raise ValueError(f"{source} is a run and --run names {runs[0]}: give a run alone, or a manifest and runs")
        run = Run.open(source)
        return open_manifest(run.input_manifest), [Judge.of(run)], True
    manifest = open_manifest(source)
    if not runs:
        raise ValueError(f"{source} is a manifest: name the runs over its images with --run, or give a run alone")
    return manifest, [Judge.of(Run.open(run)) for run in dict.fromkeys(runs)], False


def _require_place(out: Path) -> None:
    """Raise ValueError if the folder holds anything but an earlier ranking, or lies in a run."""
    require_outside_runs(out.absolute())
    ours = (TABLE, CSV, IDS, FOLDER)
    others = [x for x in storage.list(out) if x.name not in ours and not x.name.endswith(storage.TEMPORARY)]
    if others:
        raise ValueError(f"{out} holds {others[0].name}, which is no ranking of label errors: choose another -o")


def _require_any(manifest: ManifestFile, judges: Sequence[Judge], left: Counter[str], *, judged: int, bad: str) -> None:
    if judged:
        return
    if left["unreadable"]:
        raise ValueError(f"no human label of {manifest.path} can be read: {bad}")
    if left[_NOT_LABELLED]:
        names = ", ".join(str(judge.run.path) for judge in judges)
        raise ValueError(
            f"none of the {left[_NOT_LABELLED]} images of {manifest.path} that have a human label is among the labelled"
            f" images of {names} (compared by content): `autolabel generate` labels them too"
        )
    raise ValueError(f"{manifest.path} has no human labels, fine or coarse: nothing to look for mistakes in")


def _notes(judges: Sequence[Judge], knows: Counter[tuple[int, int]]) -> list[str]:
    """Say which judges have seen images that they judged, and of which nobody knows."""
    notes = []
    for place, judge in enumerate(judges):
        seen, unknown = knows[place, SEEN], knows[place, UNKNOWN]
        if seen:
            notes.append(
                f"the teacher of {judge.run.path} was trained on {number(seen)} of the images that it judges: it may"
                " have learnt their mistakes; `autolabel manifest fold` makes manifests for teachers that have not"
            )
        if unknown:
            notes.append(
                f"nobody can tell whether the teacher of {judge.run.path} has seen these images ({judge.why}): one that"
                " has finds fewer mistakes"
            )
    return notes


def _look(
    sample: Sample,
    *,
    judges: Sequence[Judge],
    own: bool,
    space: LabelSpace,
    coarse: bool,
    limits: tuple[int | None, int | None],
) -> _Verdict:
    """Hold the human label of one image against what its judge has kept."""
    try:
        if not _has_human_label(sample, coarse=coarse):
            return _Verdict(sample.sample_id, why=_NO_LABEL)
        judge = judge_of(sample, judges, own=own)
        if judge is None:
            return _Verdict(sample.sample_id, why=_NOT_LABELLED)
        place, sample_id, knows = judge
        human = _human_label(sample, space, coarse=coarse)
        top, level = judges[place].kept[sample_id]
        if human.shape != top.shape:
            raise BadImage(
                f"sample {sample.sample_id!r}: its label is {human.shape[1]} x {human.shape[0]} but"
                f" {judges[place].run.path} has labelled {top.shape[1]} x {top.shape[0]}"
            )
    except (BadImage, DamagedLabel, OSError) as error:
        return _Verdict(sample.sample_id, why=str(error))
    height, width = human.shape
    border, min_pixels = limits
    counts, doubts = look(
        human,
        top,
        level=level,
        shape=(len(space), judges[place].levels),
        reach=round(BORDER * np.hypot(height, width)) if border is None else border,
        smallest=max(1, round(SMALLEST * height * width)) if min_pixels is None else min_pixels,
        spoken=level > 0 if judges[place].silent else None,
    )
    return _Verdict(sample.sample_id, place, knows, counts, doubts)


def _has_human_label(sample: Sample, *, coarse: bool) -> bool:
    return sample.readable and (sample.coarse_label is not None or (not coarse and _is_human(sample)))


def _is_human(sample: Sample) -> bool:
    return sample.label is not None and sample.run is None and sample.source not in ("auto", "none")


def _human_label(sample: Sample, space: LabelSpace, *, coarse: bool) -> Label:
    if _is_human(sample) and not (coarse and sample.coarse_label):
        return read_sample_label(sample, space)
    label = read_coarse(sample, space)
    assert label is not None
    return label


def _draw(
    out: Path, manifest: ManifestFile, judges: Sequence[Judge], *, own: bool, coarse: bool, most: int
) -> list[str]:
    """Draw the likeliest regions; return a note about those that cannot be drawn."""
    if not most:
        return []
    first = next(read_pieces(out / TABLE, ERRORS_SCHEMA), None)
    if first is None:
        return []
    rows = first.slice(0, most).to_pandas()
    samples, missing = manifest.find(set(rows["sample_id"])), list[str]()
    for _, row in rows.iterrows():
        sample = samples[row["sample_id"]]
        try:
            judge = judge_of(sample, judges, own=own)
            if judge is None:
                raise BadImage(f"image {sample.image} has changed")
            top, _ = judges[judge[0]].kept[judge[1]]
            human = _human_label(sample, manifest.label_space, coarse=coarse)
            box = int(row["top"]), int(row["left"]), int(row["height"]), int(row["width"])
            picture = draw_region(read_photograph(sample), human, top, box=box, space=manifest.label_space)
        except (BadImage, DamagedLabel, OSError) as error:
            missing.append(str(error))
            continue
        write_region(out / FOLDER, row, picture)
    return [f"{counted(len(missing), 'region')} not drawn, the first: {missing[0]}"] if missing else []
