"""The label of any sample of a manifest, and what its run has kept beside it: whole, or by crop.

To fetch and to decode are two steps, so that threads can wait for a bucket while one core decodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from autolabel.manifests import storage
from autolabel.manifests.images import BadImage, read_label
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.run.frames import ZarrLabel, fetch_zarr
from autolabel.manifests.run.labels import KEEP_PROBABILITY, PROBABILITY, in_layer, read_png, zarr_folder
from autolabel.manifests.run.shards import DamagedLabel, Label, Window
from autolabel.manifests.samples import Sample


@dataclass(frozen=True)
class FetchedLabel:
    """One sample's label, or another map of it, that was read in one piece: a PNG decoded, or the frames of a store."""

    sample: Sample
    stored: Label | ZarrLabel

    def crop(self, window: Window | None = None) -> Label:
        """(h, w) uint8, whole or the crop `window`. Raises DamagedLabel."""
        top, left, height, width = window or (0, 0, self.sample.height, self.sample.width)
        if isinstance(self.stored, ZarrLabel):
            with _told_of_run(self.sample):
                return self.stored.crop((top, left, height, width))
        return self.stored[top : top + height, left : left + width]


def read_sample_label(sample: Sample, space: LabelSpace, *, window: Window | None = None) -> Label:
    """The label of a manifest's sample as (h, w) uint8 train ids, whole or the crop `window`.

    Raises ValueError if the sample has no label. A label that cannot be read raises DamagedLabel if a run made it,
    which names sample and run and says what to do; else BadImage, DamagedLabel or OSError.
    """
    return fetch_label(sample, space, window=window).crop(window)


def fetch_label(sample: Sample, space: LabelSpace, *, window: Window | None = None) -> FetchedLabel:
    """Read the label of a sample, all of it or what `window` needs. Raises as `read_sample_label`.

    A label of a Zarr store is one range of its shard: its frames lie side by side, and have a hundredth of the bytes
    of the photograph.
    """
    if sample.label is None:
        raise ValueError(f"sample {sample.sample_id!r} has no label")
    with _told_of_run(sample):
        if sample.label_index is not None:
            return FetchedLabel(sample, fetch_zarr(sample.label, sample.label_index, window=_needed(sample, window)))
        size = (sample.height, sample.width)
        return FetchedLabel(sample, read_label(sample.label, space, ids=sample.label_ids, size=size))


@contextlib.contextmanager
def _told_of_run(sample: Sample) -> Iterator[None]:
    """Name sample and run, and say what to do, where a label cannot be read that a run made."""
    try:
        yield
    except (BadImage, DamagedLabel, OSError) as error:
        if sample.run is None:
            raise
        reason = f"{sample.label}: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise DamagedLabel(
            f"sample {sample.sample_id!r} of run {sample.run}: {reason}; `autolabel verify {sample.run}` finds all that"
            " is damaged or was changed by hand, and says what to do"
        ) from error


def keeps_probability(run: Path) -> bool:
    """True if a run has kept the probabilities of its labels."""
    return keeps(run, PROBABILITY)


def keeps(run: Path, layer: str) -> bool:
    """True if a run has the maps of a layer, in a store or as PNGs."""
    return any(storage.is_folder(run / name) for name in (layer, zarr_folder(layer)))


def read_sample_probability(sample: Sample, *, window: Window | None = None) -> Label:
    """The probability of a sample's automatic label in 255ths, (h, w) uint8, whole or the crop `window`.

    Raises as `fetch_layer`, and ValueError if a run has kept no probabilities.
    """
    if sample.run is not None and not keeps_probability(sample.run):
        raise ValueError(f"{sample.run} has kept no probabilities: {KEEP_PROBABILITY}")
    return fetch_layer(sample, PROBABILITY, window=window).crop(window)


def fetch_layer(sample: Sample, layer: str, *, window: Window | None = None) -> FetchedLabel:
    """Read a map that a run has kept beside its label of a sample, as `fetch_label` does, which has that layer.

    Raises ValueError if no run made the label, DamagedLabel if the map cannot be read.
    """
    if sample.label is None or sample.run is None:
        raise ValueError(f"sample {sample.sample_id!r} has no label of a run")
    place = sample.run / in_layer(sample.label.relative_to(sample.run).as_posix(), layer)
    with _told_of_run(sample):
        if sample.label_index is not None:
            return FetchedLabel(sample, fetch_zarr(place, sample.label_index, window=_needed(sample, window)))
        whole = read_png(place)
        if whole.shape != (sample.height, sample.width):
            raise DamagedLabel(f"{place}: its size is not that of the image")
        return FetchedLabel(sample, whole)


def _needed(sample: Sample, window: Window | None) -> Window:
    return window or (0, 0, sample.height, sample.width)
