"""Choose what people should correct, and write it down for them: lists, maps of regions, an export.

ids.txt           the images, one a line, in the order of choice
review.parquet    one row for each image or region, with its expected gain; review.csv says the same
regions/ID.png    of images with regions: their numbers, 0 elsewhere
review.json       what was asked for

The gain is that of the mean IoU of the run's labels, in which an ignored pixel is a miss. docs/review.md has the
formula, and how far the expectation is to be trusted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from autolabel.manifests import storage
from autolabel.manifests.formats.known import known_format
from autolabel.manifests.formats.style import Style
from autolabel.manifests.ids import read_ids
from autolabel.manifests.locations import location
from autolabel.manifests.run.folder import Run
from autolabel.manifests.wording import Progress, Shown, Table, counted, duration, percent, points
from autolabel.pipeline.analysis.confidences import kept_in
from autolabel.pipeline.export import export
from autolabel.pipeline.review.choose import choose
from autolabel.pipeline.review.effort import Effort, Pace
from autolabel.pipeline.review.frames import Frames
from autolabel.pipeline.review.lists import IDS, Wish, number, region_maps, table, write
from autolabel.pipeline.review.prospects import Prospects, prospects

_SHOWN = 12  # rows in the terminal


@dataclass(frozen=True)
class Review(Shown):
    """The choice. rows: as in `WORTH_SCHEMA`. iou: the expected mean IoU of the labels before.

    gain: expected of all rows. by_chance: of as many images at random, or as much time for regions at random. unit:
    "image" or "region". images: that the run has labelled. seconds: that the regions take. rate: images that were read
    a second.
    """

    out: Path
    rows: pa.Table
    unit: str
    images: int
    iou: float
    gain: float
    by_chance: float
    seconds: float
    rate: float
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The choice in a sentence, the expected gain, and the notes."""
        what = counted(len(self.rows), self.unit)
        if self.unit == "region":
            what += f" in {counted(len(self.rows['sample_id'].unique()), 'image')} ({duration(self.seconds)})"
        return [
            f"{what} of {counted(self.images, 'labelled image')}: {self.out}/ids.txt, review.parquet, review.csv",
            f"expected gain {points(self.gain, 2)} points of label mean IoU, from {percent(self.iou)} %;"
            f" by chance {points(self.by_chance, 2)}",
            f"read {self.rate:.0f} images a second",
            *self.notes,
        ]

    def tables(self) -> list[Table]:
        """The first rows."""
        regions = self.unit == "region"
        some = self.rows.slice(0, _SHOWN).to_pylist()
        if not some:
            return []
        rows = [
            [str(row["rank"]), row["sample_id"], *([str(row["region"]), f"{row['seconds']:.0f}"] if regions else []),
             row["class"], points(row["expected_gain"], 3)]
            for row in some
        ]  # fmt: skip
        more = len(self.rows) - len(some)
        header = ["rank", "image", *(["region", "seconds"] if regions else []), "most for", "expected gain"]
        return [Table("worth most", header, rows, notes=[f"and {more:,} more"] * (more > 0))]


def review(
    run: Run | str | Path,
    budget: Effort | str | int,
    *,
    out: str | Path,
    pace: Pace | None = None,
    audit: Path | None = None,
    student: Path | None = None,
    done: Path | None = None,
    to: str | None = None,
    progress: Progress | None = None,
) -> Review:
    """Choose the images (a number) or regions (a time) whose correction is expected to gain most; write them to `out`.

    pace: how long people take. audit: of this teacher, by default the run's own if there is one. student: scores that
    `evaluate` wrote; a class counts by what the student gets wrong. done: ids of images that people have done already,
    as in `read_ids`; neither they nor what repeats them are chosen. to: export the images in this format too, into the
    folder of its name.
    Raises ValueError for a budget that cannot be met, for regions where no confidence was kept, and for a folder that
    holds something else; BadTable until the run has published its tables, DamagedLabel for a label that has changed.
    """
    run, out, pace = Run.open(run), location(out), pace or Pace()
    effort = budget if isinstance(budget, Effort) else Effort.of(str(budget))
    by_region = effort.seconds is not None
    if by_region and kept_in(run) is None:
        raise ValueError(
            f"{run.path} has kept no confidence, so nobody knows its regions: ask for a number of images, or generate"
            " anew with --keep-confidence 8"
        )
    if to is not None:
        known_format(to).writer(run.label_space, Style())
    labelled = run.accounts.labelled if run.accounts else 0
    if not labelled:
        raise ValueError(
            f"{run.path} has no labelled image yet: nothing to choose from; finish it with its own command"
        )
    finished = None if done is None else read_ids(done)
    if effort.images is not None and effort.images > labelled:
        raise ValueError(f"a budget of {effort.images} images: {run.path} has {counted(labelled, 'labelled image')}")
    files = [None if path is None else str(path.absolute()) for path in (audit, student, done)]
    request = Wish(str(run.path.absolute()), effort, pace, files[0], files[1], files[2], to)
    request.require_free(out)
    found = prospects(run, pace=pace if by_region else None, audit=audit, student=student, progress=progress)
    unknown = ""
    if finished is not None:
        found, unknown = found.without(finished)
    items, worth, frames = found.items(regions=by_region), found.worth(), Frames(run, found.found.ids)
    for image in found.done.tolist():
        frames.choose(image)
    iou, amount, opening = worth.mean_iou(), float(effort.seconds or effort.images or 0), pace.image * by_region
    chosen = choose(items, worth, amount, opening=opening, likeness=frames)
    some = items.take(chosen.places)
    numbers = number(some)
    rows = table(found, some, chosen, numbers)
    maps = region_maps(found, some, numbers) if by_region else {}
    with storage.hold(out):
        request.require_free(out)
        request.claim(out)
        write(out, rows, maps)
    notes = _notes(found, effort, rows, float(chosen.seconds.sum()), frames) + [unknown] * bool(unknown)
    if to is not None and len(rows):
        notes += export(run, to, out / to, ids=out / IDS, progress=progress).lines()
    return Review(
        out, rows, "region" if by_region else "image", len(found.found.ids), iou, chosen.gain,
        found.expected(items, opening, amount), float(chosen.seconds.sum()),
        len(found.found.ids) / max(found.seconds, 1e-9), tuple(notes),
    )  # fmt: skip


def _notes(found: Prospects, effort: Effort, rows: pa.Table, spent: float, frames: Frames) -> list[str]:
    notes = []
    if found.looking is None:
        notes.append(
            "No confidence was kept: the choice rests on the statistics of whole images. With --keep-confidence it"
            " would know every pixel."
        )
    if found.audit is None or found.audit.reliability is None:
        notes.append(
            "No audit: the teacher's confidences are taken at their word, and teachers are mostly too sure of"
            " themselves. `autolabel audit` makes the expectation honest."
        )
    elif not found.audit.confusion:
        notes.append("The audit has counted no confusions: audit again, and the choice knows what is mixed up.")
    if effort.images is not None and len(rows) < effort.images:
        less = counted(effort.images - len(rows), "image")
        notes.append(f"{less} less than asked for: the others repeat those that were chosen, or gain nothing.")
    if effort.seconds is not None and spent < 0.9 * effort.seconds:
        notes.append(f"{duration(spent)} are enough: no other region gains anything in the time that is left.")
    if effort.seconds is not None:
        notes.append("Regions are chosen for looking best, so expect less: on CamVid two thirds came true.")
    if found.looking is not None and found.looking.gone:
        notes.append(f"Nobody can tell what people outlined, so only the teacher's word counts: {found.looking.gone}.")
    elif found.looking is not None and found.looking.unread:
        count = counted(len(found.looking.unread), "coarse label")
        notes.append(f"{count} could not be read: there, only the teacher's word counts.")
    if found.found.dropped:
        notes.append(f"{found.found.dropped:,} regions of least gain were not compared.")
    if frames.unread:
        notes.append(
            f"{counted(frames.unread, 'photograph')} could not be read: only their neighbours in the order of ids count"
            " as alike."
        )
    return notes
