"""The account of a scan: what was found, what was left aside and why, what is suspicious."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.layouts import Listing
from autolabel.manifests.suspicions import ClassCounts
from autolabel.manifests.walk import RUNS, STRAYS, BadLayout
from autolabel.manifests.wording import Shown, Table, counted, number, percent


@dataclass(frozen=True)
class Account(Shown):
    """The result of a scan in numbers.

    sources: samples by the source of their best label. coarse: samples with a coarse label. sizes: images by (height,
    width). unreadable: images whose header cannot be read, as "path: reason". classes: what the samples' labels hold.
    looked_at: photographs whose pixels were looked at. suspicions: sentences. assumed_space: True if nobody named a
    label space, and none was needed.
    """

    listing: Listing
    sources: Counter[str]
    coarse: int
    sizes: Counter[tuple[int, int]]
    unreadable: list[str]
    classes: ClassCounts = field(default_factory=ClassCounts)
    looked_at: int = 0
    suspicions: tuple[str, ...] = ()
    assumed_space: bool = False

    @property
    def images(self) -> int:
        """Images in the manifest, the unreadable ones among them."""
        return len(self.listing.samples)

    @property
    def without_image(self) -> list[Path]:
        """Labels whose image is missing; they are in no sample."""
        return self.listing.aside.of(STRAYS)

    @property
    def skipped_runs(self) -> list[Path]:
        """Run folders inside the folder; their files are in no sample."""
        return self.listing.aside.of(RUNS)

    def require_plausible(self) -> None:
        """Raise BadLayout, naming the first suspicion, if there is one."""
        if self.suspicions:
            more = f" (and {len(self.suspicions) - 1} more)" if len(self.suspicions) > 1 else ""
            raise BadLayout(f"suspicious: {self.suspicions[0]}{more}; scan without --strict to go on all the same")

    def lines(self) -> list[str]:
        """The account in sentences; `tables` has the classes, what was left aside, and what is suspicious."""
        space, sources = self.listing.label_space, self.sources
        sizes = ", ".join(f"{w} x {h} ({n})" for (h, w), n in self.sizes.most_common(4))
        more = f" and {len(self.sizes) - 4} other sizes" if len(self.sizes) > 4 else ""
        lines = [
            f"{self.images} images, {len(space)} classes of label space {space.name!r}",
            f"  layout              {self.listing.layout} in {self.listing.root}",
            f"  sizes               {sizes or 'unknown'}{more}",
            f"  unreadable images   {_examples(self.unreadable)}",
        ]
        if sources["none"] < self.images or self.without_image:
            lines[2:2] = [
                f"  with fine labels    {sources['fine']}",
                f"  with coarse labels  {self.coarse} ({sources['coarse']} of them have no fine label)",
                f"  without a label     {sources['none']}",
                f"  labels without their image  {_examples(self.without_image)}",
            ]
        if self.skipped_runs:
            lines.append(f"  run folders skipped  {_examples(self.skipped_runs)}")
        if 0 < self.looked_at < sum(self.sizes.values()):
            lines.append(f"  The pixels of {self.looked_at} photographs were looked at, spread over all.")
        if self.assumed_space:
            lines.append(f"  No label space was named, so {space.name!r} is written down; --label-space names another.")
        return lines

    def tables(self) -> list[Table]:
        """Classes, what was left aside and why, what is suspicious; without a table that would be empty."""
        tables = [self._class_table()] if self.classes.images.any() else []
        if len(self.listing.aside):
            tables.append(self.listing.aside.table())
        if self.suspicions:
            title = f"SUSPICIOUS: {counted(len(self.suspicions), 'thing')} to look at before you go on"
            tables.append(Table(title, (), (), notes=[f"  - {text}" for text in self.suspicions]))
        return tables

    def _class_table(self) -> Table:
        images, pixels = self.classes.images, self.classes.pixels
        total = int(pixels.sum())
        ids = [*range(len(self.listing.label_space)), *([IGNORE] if images[IGNORE] else [])]
        rows = [
            [self._name(i), number(int(images[i])), number(int(pixels[i])), f"{percent(float(pixels[i]) / total)} %"]
            for i in ids
        ]
        missing = int(np.count_nonzero(images[: len(self.listing.label_space)] == 0))
        notes = [f"{counted(missing, 'class', 'classes')} in no label"] if missing else []
        return Table("classes in the labels", ["class", "images", "pixels", "share"], rows, notes=notes)

    def _name(self, train_id: int) -> str:
        return "ignored" if train_id == IGNORE else self.listing.label_space.names[train_id]


def _examples(items: Sequence[object]) -> str:
    if not items:
        return "none"
    return f"{len(items)}: {items[0]}" + (f" and {len(items) - 1} more" if len(items) > 1 else "")
