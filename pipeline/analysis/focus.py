"""Try a focus on images before it labels: its time, its labels, its mean IoU, and the swings of its certificate.

The teacher looks at each image whole and with the focus. Swings that were measured on all groups but one are held
against that one, because the images of a drive look alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from autolabel.manifests.ahead import ahead
from autolabel.manifests.focus import Focus, FocusCertificate
from autolabel.manifests.images import BadImage
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.machine import cores
from autolabel.manifests.reading import read_photograph
from autolabel.manifests.run.place import require_outside_runs
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.run.shards import DamagedLabel, Label
from autolabel.manifests.samples import Manifest, Sample, fingerprints, load_manifest
from autolabel.manifests.schemas import EXACT
from autolabel.manifests.scores import Confusion, Counts, PairedGain, paired_gain
from autolabel.manifests.wording import MISSING, Progress, Shown, Table, counted, number, percent, points
from autolabel.pipeline.analysis.certifying import ENOUGH, Certified, ContrastTally, Floats
from autolabel.pipeline.analysis.truth import exact_samples
from autolabel.pipeline.job import LabelJob
from autolabel.teacher.checkpoints import overlap
from autolabel.teacher.contrast import Contrast, Seen, contrasts
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.predict import Teacher

SHARE = 0.25  # of the rows, unless another is asked for
MOST = 100  # images that are looked at, unless others are asked for
_LISTED = 12  # groups that have a row of their own


@dataclass
class FocusTrial:
    """Images seen whole and with one focus, summed up by group; beside truth, the matrices of `Confusion` by image.

    ratios: seconds of the network with the focus, divided by those without, by image.
    """

    classes: int
    groups: dict[str, ContrastTally] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)
    whole: list[Counts] = field(default_factory=list)
    focused: list[Counts] = field(default_factory=list)

    def add(self, group: str, seen: Seen, contrast: Contrast, truth: Label | None) -> None:
        """Add an image, and its truth (H, W) uint8 if it has any."""
        self.groups.setdefault(group, ContrastTally(self.classes)).add(contrast)
        self.ratios.append(contrast.seconds / max(seen.seconds, 1e-9))
        if truth is not None:
            for matrices, top in ((self.whole, seen.top), (self.focused, contrast.top)):
                confusion = Confusion(self.classes)
                confusion.add(truth, top)
                matrices.append(confusion.matrix)

    @property
    def total(self) -> ContrastTally:
        """All images."""
        return ContrastTally.of(self.groups.values(), self.classes)

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return float(np.median(self.ratios))

    def crossed(self) -> dict[str, Certified]:
        """By group, what the swings of the other groups certify there; nothing for one group alone."""
        if len(self.groups) < 2:
            return {}
        return {name: tally.certified(self._swings_without(name)) for name, tally in self.groups.items()}

    def _swings_without(self, group: str) -> Floats:
        others = (tally for name, tally in self.groups.items() if name != group)
        return ContrastTally.of(others, self.classes).swings()

    def gain(self) -> PairedGain | None:
        """How much mean IoU gains with the focus; None without truth."""
        return paired_gain(np.stack(self.whole), np.stack(self.focused)) if self.whole else None

    def ious(self) -> tuple[Floats, Floats] | None:
        """The IoU by class, whole and focused; None without truth."""
        if not self.whole:
            return None
        one, other = (Confusion(self.classes) for _ in range(2))
        one.matrix, other.matrix = np.sum(self.whole, axis=0), np.sum(self.focused, axis=0)
        return one.iou(), other.iou()


@dataclass(frozen=True)
class FocusSummary(Shown):
    """A focus tried on images, and its certificate.

    trial: the numbers. device: "CPU" or "device", whose time was taken. notes: remarks on the images.
    """

    certificate: FocusCertificate
    trial: FocusTrial
    manifest: str
    device: str
    notes: list[str]

    def lines(self) -> list[str]:
        """Sentences on what the focus saves and changes, and on what is certified."""
        total, trial = self.trial.total, self.trial
        lines = [
            *self.notes,
            f"{counted(total.images, 'image')}: the highest scale saw {percent(total.rows / total.images)} % of the"
            f" rows, the network took {trial.ratio:.2f} of the {self.device} time",
            f"{percent(total.differing / total.pixels)} % of the labels differ",
        ]
        focus = self.certificate.focus
        own = total.certified(np.array([focus.within, focus.beyond]))
        lines.append(f"{percent(own.labels / total.pixels)} % of the pixels are certified by the swings of all images")
        gain, ious = trial.gain(), trial.ious()
        if gain is not None and ious is not None and np.isfinite(gain.middle):
            lines.append(
                f"mean IoU {percent(float(np.nanmean(ious[1])))} %, whole {percent(float(np.nanmean(ious[0])))} %:"
                f" {points(gain.middle, 2)} points, 95 % of the draws of images {points(gain.low, 2)} to"
                f" {points(gain.high, 2)}"
            )
        return lines

    def tables(self) -> list[Table]:
        """The certificate held against groups that it has not seen, and the classes."""
        tables = []
        crossed, groups = self.trial.crossed(), self.trial.groups
        if crossed:
            rows = [self._row(name, groups[name], crossed[name]) for name in sorted(groups)[:_LISTED]]
            rows.append(self._row("all", self.trial.total, _added(crossed.values())))
            header = ["group", "images", "labels differ %", "certified %", "of these differ", "share"]
            more = len(groups) - _LISTED
            notes = [f"And {counted(more, 'more group')}, which the last row counts too."] if more > 0 else []
            title = "each group by the swings of all others"
            tables.append(Table(title, header, rows, last_is_total=True, notes=notes))
        focus, ious = self.certificate.focus, self.trial.ious()
        header = ["class", "swing within", "swing beyond", *(["IoU whole", "IoU with focus"] if ious else [])]
        swings = zip(self.certificate.classes, focus.within or (), focus.beyond or (), strict=True)
        rows = [[name, f"{within:.2f}", f"{beyond:.2f}"] for name, within, beyond in swings]
        if ious:
            rows = [[*row, percent(a), percent(b)] for row, a, b in zip(rows, *ious, strict=True)]
        return [*tables, Table(f"classes, with a focus of {focus.share:g}", header, rows)]

    @staticmethod
    def _row(name: str, tally: ContrastTally, certified: Certified) -> list[str]:
        share = certified.changed / certified.labels if certified.labels else None
        return [
            name or MISSING, number(tally.images), percent(tally.differing / tally.pixels),
            percent(certified.labels / tally.pixels), number(certified.changed),
            MISSING if share is None else f"{share:.1e}" if share else "0",
        ]  # fmt: skip


def _added(parts: Iterable[Certified]) -> Certified:
    labels, changed = zip(*parts, strict=True)
    return Certified(sum(labels), sum(changed))


def try_focus(
    job: LabelJob, focus: float = SHARE, *, output: Path, limit: int = MOST, progress: Progress | None = None
) -> FocusSummary:
    """Look at images of `job.manifest` whole and with a focus on this share of the rows, and write the certificate.

    Of the job, the manifest, the teacher and how it looks at images count. limit: images that are looked at, evenly
    over the groups. Raises ValueError for a share outside (0, 1], for a teacher or scales that have no focus, for a
    teacher of another label space, for images that are too small or cannot be read; BadTeacher, BadCheckpoint,
    NotEnoughMemory. Nothing is written then.
    """
    Focus(focus)
    if limit < 1:
        raise ValueError(f"limit {limit}: expected 1 or more")
    if output.suffix != ".json":
        raise ValueError(f"-o {output}: expected a name that ends in .json, such as focus.json")
    require_outside_runs(output.absolute().parent)
    manifest = load_manifest(job.manifest)
    samples = spread([sample for sample in manifest.samples if sample.readable], limit)
    if not samples:
        raise ValueError(f"{job.manifest} lists no image that can be read: nothing to look at")
    teacher = load_teacher(
        job.teacher, device=job.device, precision=job.precision, combine=job.combine, class_map=job.class_map,
        space=manifest.label_space,
    )  # fmt: skip
    scales = job.scales or job.teacher.scales
    teacher.require_space(manifest.label_space, teacher=str(job.teacher), manifest=str(job.manifest))
    teacher.network.require(scales, flip=job.flip, focus=focus)
    looks = FocusLooks(teacher, scales, job.flip, (focus,), manifest.label_space, _exact(manifest, job.manifest))
    trial, bad, whole = FocusTrial(len(manifest.label_space)), list[str](), 0
    for done, one in enumerate(looks.of(samples), start=1):
        if isinstance(one, str):
            bad.append(one)
        else:
            sample, seen, (contrast,), truth = one
            trial.add(sample.group, seen, contrast, truth)
            whole += contrast.rows == (0, sample.height)
        if progress:
            progress(done, len(samples))
    if not trial.ratios:
        raise ValueError(f"{job.manifest}: none of {counted(len(samples), 'image')} can be read, the first: {bad[0]}")
    if whole == len(trial.ratios):
        raise ValueError(
            f"focus {focus:g}: at scale {max(scales):g} a band of the rows and what lies around it are as high as the"
            f" images of {job.manifest}, such as {samples[0].sample_id!r} ({samples[0].width} x {samples[0].height}):"
            " label them without a focus, or give a smaller share"
        )
    total = trial.total
    within, beyond = (tuple(row.tolist()) for row in total.swings())
    certificate = FocusCertificate(
        Focus(focus, within, beyond), teacher.sha256, tuple(scales), job.flip, job.combine,
        manifest.label_space.names, total.images, total.pixels,
    )  # fmt: skip
    notes = [*_about(trial, whole, bad), *_seen_before(teacher, job, samples)]
    summary = FocusSummary(certificate, trial, str(job.manifest), _clock(teacher), notes)
    certificate.write(output)
    return summary


def _clock(teacher: Teacher) -> str:
    return "CPU" if teacher.device.type == "cpu" else "GPU"


def _about(trial: FocusTrial, whole: int, bad: Sequence[str]) -> list[str]:
    """Remarks on the images."""
    notes, images = list[str](), len(trial.ratios)
    if bad:
        notes.append(f"left out, the first of {len(bad)}: {bad[0]}")
    if images < ENOUGH:
        notes.append(
            f"swings of {counted(images, 'image')} only, so every class takes the largest of all: give {ENOUGH} or more"
        )
    if len(trial.groups) < 2:
        notes.append("all images are of one group: nothing says how the certificate holds on another drive")
    if whole:
        notes.append(f"{counted(whole, 'image')} too small for a band: the highest scale sees all of them")
    total = trial.total
    rare = int(((total.shown.sum(axis=0) > 0) & (total.shown < ENOUGH).any(axis=0)).sum())
    if rare and images >= ENOUGH:
        notes.append(
            f"{counted(rare, 'class', 'classes')} shown by fewer than {ENOUGH} images within or beyond the rows seen:"
            " the largest swing of all classes counts there"
        )
    return notes


def _seen_before(teacher: Teacher, job: LabelJob, samples: Sequence[Sample]) -> list[str]:
    if teacher.trained_on is None:
        return []
    seen = len(overlap(teacher.trained_on, fingerprints(samples)))
    return [f"{job.teacher} was trained on {seen} of these images: it may swing more on others"] if seen else []


def spread(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most so many samples, as evenly over the groups as they allow, and evenly within each, in order."""
    groups = defaultdict[str, list[Sample]](list)
    for sample in samples:
        groups[sample.group].append(sample)
    left, chosen = most, list[Sample]()
    for place, members in enumerate(sorted(groups.values(), key=len)):  # the smallest first: others take its rest
        take = min(len(members), -(-left // (len(groups) - place)))
        left -= take
        chosen += [members[number * len(members) // take] for number in range(take)]
    order = {id(sample): place for place, sample in enumerate(samples)}
    return sorted(chosen, key=lambda sample: order[id(sample)])


def _exact(manifest: Manifest, path: Path) -> frozenset[tuple[str, str]]:
    """The keys of the samples whose labels are truth."""
    if not any(sample.source in EXACT for sample in manifest.labelled):
        return frozenset()
    return frozenset(sample.key for sample in exact_samples(manifest, path)[0])


Looked = tuple[Sample, Seen, list[Contrast], Label | None]


@dataclass(frozen=True)
class FocusLooks:
    """Looks at images whole and with the focus of each share. On a CPU, each image takes one thread.

    exact: keys of the samples whose labels are truth.
    """

    teacher: Teacher
    scales: tuple[float, ...]
    flip: bool
    shares: tuple[float, ...]
    space: LabelSpace
    exact: frozenset[tuple[str, str]]

    def of(self, samples: Sequence[Sample]) -> Iterator[Looked | str]:
        """Yield every sample with what was seen and its truth, in order; or why it cannot be read, in words."""
        on_cpu, before = self.teacher.device.type == "cpu", torch.get_num_threads()
        threads, each = (min(cores(), len(samples)), 1) if on_cpu else (1, before)
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(each,)) as pool:
                yield from ahead(pool, self._look, samples, pool.submit(self._at_once, samples, threads).result())
        finally:
            torch.set_num_threads(before)

    def _at_once(self, samples: Sequence[Sample], most: int) -> int:
        _, height, width = max((s.height * s.width, s.height, s.width) for s in samples)
        return self.teacher.budget(scales=self.scales, flip=self.flip).in_flight(height, width, most=most)

    def _look(self, sample: Sample) -> Looked | str:
        try:
            image = read_photograph(sample)
            truth = read_sample_label(sample, self.space) if sample.key in self.exact else None
        except (BadImage, DamagedLabel, OSError) as error:
            return str(error)
        seen, found = contrasts(self.teacher, image, scales=self.scales, flip=self.flip, shares=self.shares)
        return sample, seen, found, truth
