"""Count how people's polygons relate to the truth, on images that have fine and coarse labels; write polygons.json.

Images are read once, by threads, and forgotten. Counts are whole numbers that add up, so they are the same for any
number of threads. docs/polygons.md says how to read them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.ahead import ahead
from autolabel.manifests.evidence import INSIDE, OUTSIDE, PolygonCounts
from autolabel.manifests.images import BadImage
from autolabel.manifests.label_space import IGNORE, VOID, LabelSpace
from autolabel.manifests.machine import cores
from autolabel.manifests.places import NOWHERE, depths, places
from autolabel.manifests.reading import read_coarse
from autolabel.manifests.run.place import require_outside_runs
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.run.shards import DamagedLabel, Label
from autolabel.manifests.samples import Sample, load_manifest
from autolabel.manifests.scores import Counts
from autolabel.manifests.wording import MISSING, Progress, Shown, Table, counted, listed, number, percent
from autolabel.pipeline.analysis.truth import exact_samples

FEW = 20  # images below which counts are called few
AGREEMENT = 0.6  # of the pixels that people named; below it, labels are of other images than their coarse ones
_SHOWN = (0, 2, 4, 7, 10, 13)  # bins of distance that a table shows
_FAR = 7  # the bin in which the commonest class is named
_NO_FINE, _NO_COARSE = "without a fine label", "without a coarse label"
_SAME, _UNREADABLE = "whose fine label is their coarse one", "unreadable"


class TwoLabels(NamedTuple):
    """The true label and the coarse one of an image, both (H, W) uint8 train ids."""

    fine: Label
    coarse: Label


class ImageCounts(NamedTuple):
    """The counts of an image: `outside` and `inside` of `PolygonCounts`, and true pixels by class (C,)."""

    outside: Counts
    inside: Counts
    truth: Counts

    @property
    def agreement(self) -> float:
        """Share of the pixels that people named which is right; nan for none."""
        right, wrong = self.inside.sum(axis=(0, 1)).tolist()
        return right / (right + wrong) if right + wrong else float("nan")


def outside_of(pair: TwoLabels, place: NDArray[np.int16], classes: int) -> Counts:
    """True classes of unnamed pixels by the place (H, W) of `evidence.places`: (C, bins, C) int64."""
    bins = len(OUTSIDE) + 1
    counts = (place != NOWHERE) & (pair.fine < classes)
    cells = (place[counts].astype(np.intp) - 1) * classes + pair.fine[counts]
    return np.bincount(cells, minlength=classes * bins * classes).reshape(classes, bins, classes)


def count_image(pair: TwoLabels, classes: int) -> ImageCounts:
    """Count one image."""
    fine, coarse = pair
    levels = len(INSIDE) + 1
    known = fine < classes
    both = known & (coarse < classes)
    cells = (coarse[both].astype(np.intp) * levels + depths(coarse)[both]) * 2 + (coarse[both] != fine[both])
    inside = np.bincount(cells, minlength=classes * levels * 2).reshape(classes, levels, 2)
    return ImageCounts(
        outside_of(pair, places(coarse, classes), classes), inside, np.bincount(fine[known], minlength=classes)
    )


@dataclass(frozen=True)
class PolygonSummary(Shown):
    """Counts of polygons, and their account: images of the manifest = counted + left out, by reason.

    truth (C,): true pixels of the counted images by class.
    """

    manifest: Path
    counts: PolygonCounts
    truth: tuple[int, ...]
    left_out: dict[str, int]
    notes: list[str]

    def written(self, output: Path) -> list[Path]:
        """The files that are written."""
        return [output]

    def lines(self) -> list[str]:
        """The account, and how much people named."""
        out = "".join(f", {number(images)} {why}" for why, images in self.left_out.items() if images)
        right, wrong = np.array(self.counts.inside).sum(axis=(0, 1)).tolist()
        known = sum(self.truth)
        return [
            *self.notes,
            f"{counted(self.counts.images, 'image')} counted{out}",
            f"people named {percent((right + wrong) / known if known else None)} % of the pixels,"
            f" {percent(right / (right + wrong) if right + wrong else None)} % of these rightly",
        ]

    def tables(self) -> list[Table]:
        """One row per class: how much of it is named, how well, and what lies around its polygons."""
        names, outside = self.counts.classes, self.counts.counts
        inside = np.array(self.counts.inside)
        width = _common_width(self.counts.sizes)
        ends = [f"{max(1, round(end * width))} px" for end in OUTSIDE]
        shown = [b for b in _SHOWN if OUTSIDE[b] * width >= 1]  # pixels lie at least one pixel away
        far_px = max(1, round(width * (OUTSIDE[_FAR - 1] + OUTSIDE[_FAR]) / 2))
        summed, nearby = [], []
        for n, name in enumerate(names):
            right, wrong = inside[n].sum(axis=0).tolist()
            if not (self.truth[n] or right + wrong):
                continue
            far = outside[n, _FAR]
            mostly = f"{names[int(far.argmax())]} {_share(far.max(), far.sum())} %" if far.any() else MISSING
            first = _share(inside[n, 0, 0], inside[n, 0].sum())
            share = _share(right, self.truth[n])
            summed.append([name, number(right + wrong), share, _share(right, right + wrong), first, mostly])
            if outside[n].any():
                nearby.append([name, *(_share(outside[n, b, n], outside[n, b].sum()) for b in shown)])
        most = f"{far_px} px outside, mostly"
        header = ["class", "named px", "of the class %", "right %", "right at the edge %", most]
        unseen = [name for n, name in enumerate(names) if name not in {row[0] for row in summed}]
        notes = [f"In no label: {listed(unseen)}."] if unseen else []
        title = "unnamed pixels so far from a polygon of a class, and the % of them that are of this class"
        return [
            Table(f"{self.manifest}: what people named", header, summed, notes=notes),
            Table(title, ["class", *(f"≤ {ends[b]}" for b in shown)], nearby),
        ]


def _share(part: float, whole: float) -> str:
    return percent(part / whole if whole else None)


def _common_width(sizes: Mapping[str, int]) -> int:
    """The width that most images have; sizes are numbers of images by "WIDTHxHEIGHT"."""
    return int(max(sizes, key=sizes.__getitem__).partition("x")[0])


# --- counting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedSamples:
    """The samples of a manifest that have a fine and a coarse label; the others by reason; notes about them."""

    manifest: Path
    space: LabelSpace
    samples: Sequence[Sample]
    left_out: dict[str, int]
    notes: list[str]

    def read(self, sample: Sample) -> TwoLabels | str:
        """Read both labels; return the reason, in words, if one cannot be read or the fine one is the coarse one."""
        try:
            pair = TwoLabels(read_sample_label(sample, self.space), _read_polygons(sample, self.space))
        except (BadImage, DamagedLabel, OSError) as error:
            return str(error)
        undrawn = np.where(pair.coarse == VOID, np.uint8(IGNORE), pair.coarse)
        return _SAME if np.array_equal(pair.fine, undrawn) else pair


def paired_samples(path: Path) -> PairedSamples:
    """Find the samples with both labels. Raises ValueError if there is none, and BadTable.

    A sample has a fine label if people have looked at all of its pixels (fine, or corrected), and if the file is not
    that of the coarse label.
    """
    manifest = load_manifest(path)
    left: Counter[str] = Counter()
    exact, notes = exact_samples(manifest, path)
    left[_NO_FINE] = len(manifest.samples) - len(exact)
    with_coarse = [sample for sample in exact if sample.coarse_label is not None]
    left[_NO_COARSE] = len(exact) - len(with_coarse)
    if not with_coarse:
        raise ValueError(
            f"{path} lists {counted(len(exact), 'image')} with a fine label, none of them with a coarse one: give"
            " `autolabel manifest scan` the folder of --coarse labels too, or draw them with `autolabel manifest"
            " coarsen`"
        )
    both = [sample for sample in with_coarse if sample.coarse_label != sample.label]
    left[_SAME] = len(with_coarse) - len(both)
    if not both:
        raise _all_the_same(path, len(with_coarse))
    return PairedSamples(path, manifest.label_space, both, dict(left), notes)


def _all_the_same(path: Path, images: int) -> ValueError:
    return ValueError(
        f"{path}: the fine label of {'the image' if images == 1 else f'all {images} images'} is the coarse one itself:"
        " what people left out can only be counted where somebody knows it"
    )


def _read_polygons(sample: Sample, space: LabelSpace) -> Label:
    """Read a coarse label; polygons of no class are VOID. Raises BadImage."""
    label = read_coarse(sample, space, drawn_void=True)
    assert label is not None
    return label


def count_polygons(
    manifest: Path, *, output: Path | None = None, workers: int | None = None, progress: Progress | None = None
) -> PolygonSummary:
    """Count polygons on the images of a manifest that have fine and coarse labels; write polygons.json to `output`.

    Images whose labels cannot be read are left out, and counted. `progress(done, total)` counts images. Raises
    ValueError for a manifest without such images, for polygons that contradict the fine labels everywhere, and for an
    output that is no .json or lies in a run; BadTable. Nothing is written then.
    """
    if output is not None:
        require_output(output)
    paired = paired_samples(manifest)
    summary = count_paired(paired, workers=workers, progress=progress)
    if output is not None:
        summary.counts.write(output)
        if storage.exists(policy := output.with_suffix(".toml")):
            note = f"{policy} was made for earlier counts: fit it to these with --teacher, or remove it"
            summary = replace(summary, notes=[*summary.notes, note])
    return summary


def require_output(output: Path) -> None:
    """Raise ValueError unless polygons.json can be written here."""
    if output.suffix != ".json":
        raise ValueError(f"-o {output}: expected a name that ends in .json, such as polygons.json")
    require_outside_runs(output.absolute().parent)


def count_paired(
    paired: PairedSamples, *, workers: int | None = None, progress: Progress | None = None
) -> PolygonSummary:
    """Count polygons on samples that were found. Raises ValueError as `count_polygons`."""
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: expected 1 or more")
    threads = workers or cores()
    space, left_out = paired.space, Counter(paired.left_out)
    classes = len(space)
    outside = np.zeros((classes, len(OUTSIDE) + 1, classes), np.int64)
    inside, truth = np.zeros((classes, len(INSIDE) + 1, 2), np.int64), np.zeros(classes, np.int64)
    sizes, contradicted, bad = Counter[str](), list[tuple[float, str]](), ""
    with ThreadPoolExecutor(threads) as pool:
        work = partial(_look, paired=paired)
        for done, (sample, one) in enumerate(ahead(pool, work, paired.samples, 2 * threads), start=1):
            if isinstance(one, str):
                left_out[_SAME if one == _SAME else _UNREADABLE] += 1
                bad = bad or ("" if one == _SAME else one)
            else:
                outside += one.outside
                inside += one.inside
                truth += one.truth
                sizes[f"{sample.width}x{sample.height}"] += 1
                if one.agreement < AGREEMENT:
                    contradicted.append((one.agreement, sample.sample_id))
            if progress:
                progress(done, len(paired.samples))
    if not sizes:
        if bad:
            raise ValueError(f"no pair of labels of {paired.manifest} can be read: {bad}")
        raise _all_the_same(paired.manifest, left_out[_SAME])
    _require_agreement(paired.manifest, inside)
    try:
        counts = PolygonCounts.of(space, sizes, outside, inside)
    except ValueError as error:
        raise ValueError(f"{paired.manifest}: {error}") from error
    notes = paired.notes + _notes(counts, contradicted)
    notes += [f"left out, the first of {left_out[_UNREADABLE]}: {bad}"] if bad else []
    return PolygonSummary(paired.manifest, counts, tuple(truth.tolist()), dict(left_out), notes)


def _look(sample: Sample, *, paired: PairedSamples) -> tuple[Sample, ImageCounts | str]:
    pair = paired.read(sample)
    return sample, pair if isinstance(pair, str) else count_image(pair, len(paired.space))


def _require_agreement(manifest: Path, inside: Counts) -> None:
    right, wrong = inside.sum(axis=(0, 1)).tolist()
    if right < AGREEMENT * (right + wrong):
        raise ValueError(
            f"{manifest}: fine and coarse labels agree in {percent(right / (right + wrong))} % of the pixels that"
            f" people named, expected {100 * AGREEMENT:g} % or more: they are of different images, or of different ids"
        )


def _notes(counts: PolygonCounts, contradicted: Sequence[tuple[float, str]]) -> list[str]:
    """Say what makes the counts doubtful."""
    notes = []
    if counts.images < FEW:
        notes.append(
            f"{counted(counts.images, 'image')} only: chance shows in the counts; count on {FEW} or more if you can"
        )
    if contradicted:
        agreement, sample_id = min(contradicted)
        notes.append(
            f"in {counted(len(contradicted), 'image')} fewer than {100 * AGREEMENT:g} % of the pixels that people named"
            f" are right, the worst is {sample_id!r} with {percent(agreement)} %: look whether labels were mixed up"
        )
    if counts.unseen:
        notes.append(
            f"no unnamed pixel of {listed(counts.unseen)} was counted: polygons will say nothing for or against"
            f" {'it' if len(counts.unseen) == 1 else 'them'}"
        )
    alone = [
        name
        for name, around in zip(counts.classes, counts.counts.sum(axis=(1, 2)), strict=True)
        if not around and name not in counts.unseen
    ]
    if alone:
        notes.append(
            f"no unnamed pixel near a polygon of {listed(alone)} was counted: around"
            f" {'one' if len(alone) == 1 else 'these'}, the shares of all unnamed pixels count"
        )
    shapes = {round(width / height, 2) for width, height in (map(int, size.split("x")) for size in counts.sizes)}
    if len(shapes) > 1:
        sizes = listed([f"{size} ({images})" for size, images in Counter(dict(counts.sizes)).most_common(4)])
        notes.append(
            f"images of {len(shapes)} shapes, such as {sizes}: distances count as shares of each image's width"
        )
    return notes
