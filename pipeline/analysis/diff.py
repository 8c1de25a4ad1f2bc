"""Compare two runs over the same manifest pixel by pixel: the effect of another teacher, threshold or policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from autolabel.manifests.label_space import IGNORE, LabelSpace
from autolabel.manifests.run.folder import Run
from autolabel.manifests.scores import count_pairs, shares
from autolabel.manifests.wording import Progress, Shown, Table, percent, points

_MOST_MOVES = 8  # classes whose moves are put into words
_MOST_TARGETS = 3  # classes named for each of them


@dataclass(frozen=True)
class RunDifference(Shown):
    """Two runs, A and B, over the `images` that both have labelled; `identical` of them have the same label throughout.

    `joint` (C + 1, C + 1) int64 counts pixels by A's label and B's label; the last row and column are ignore.
    `only_a` and `only_b` are the images that one run alone has labelled.
    """

    run_a: Path
    run_b: Path
    space: LabelSpace
    joint: NDArray[np.int64]
    images: int
    identical: int
    only_a: int
    only_b: int

    @property
    def classes(self) -> pd.DataFrame:
        """One row per class, indexed by name. Shares of no pixel are NaN.

        a_pixels, b_pixels, a_share, b_share    pixels of the class, and their share of all labelled pixels
        agreement    pixels that are the class in both, of those that are it in either (IoU between the runs)
        lost         share of A's pixels that B ignores
        gained       share of B's pixels that A ignores
        moved        share of A's pixels that are another class in B
        """
        both = np.diagonal(self.joint)[:-1]
        a, b = self.joint[:-1].sum(axis=1), self.joint[:, :-1].sum(axis=0)
        lost, gained = self.joint[:-1, -1], self.joint[-1, :-1]
        columns = {
            "a_pixels": a,
            "b_pixels": b,
            "a_share": shares(a, a.sum()),
            "b_share": shares(b, b.sum()),
            "agreement": shares(both, a + b - both),
            "lost": shares(lost, a),
            "gained": shares(gained, b),
            "moved": shares(a - both - lost, a),
        }
        return pd.DataFrame(columns, index=pd.Index(self.space.names, name="class"))

    @property
    def agreement(self) -> float:
        """Share of the pixels labelled by both runs that have the same class; NaN without such pixels."""
        return float(shares(np.trace(self.joint[:-1, :-1]), self.joint[:-1, :-1].sum()))

    @property
    def coverage(self) -> tuple[float, float]:
        """Shares of all pixels that have a class in A and in B."""
        total = self.joint.sum()
        return float(self.joint[:-1].sum() / total), float(self.joint[:, :-1].sum() / total)

    @property
    def drift(self) -> float:
        """Total variation distance between the class distributions, 0 (the same) to 1; NaN for a run without labels."""
        both = self.classes[["a_share", "b_share"]].to_numpy()
        return float(np.abs(both[:, 0] - both[:, 1]).sum() / 2)

    def moves(self, least: float = 0.01) -> dict[str, list[tuple[str, float]]]:
        """List the classes that A's pixels of each class have in B, as (class, share); the most changed class first.

        Shares below `least` are left out, and larger ones come first.
        """
        names = (*self.space.names, "ignored")
        parts = shares(self.joint, self.joint.sum(axis=1, keepdims=True))
        moves: dict[str, list[tuple[str, float]]] = {}
        for row in np.argsort(np.diagonal(parts), kind="stable"):
            others = [k for k in np.argsort(-parts[row], kind="stable") if k != row and parts[row, k] >= least]
            if others:
                moves[names[row]] = [(names[k], float(parts[row, k])) for k in others]
        return moves

    def lines(self) -> list[str]:
        """The totals, and where the pixels of the most changed classes went."""
        only = f"; only in A: {self.only_a}, only in B: {self.only_b}" if self.only_a or self.only_b else ""
        coverage_a, coverage_b = self.coverage
        lines = [
            f"images in both: {self.images}, of them with the same label: {self.identical}{only}",
            f"pixels with a class: {percent(coverage_a)} % in A, {percent(coverage_b)} % in B",
            f"agreement: {percent(self.agreement, 2)} % of the pixels that both label",
            f"drift: {percent(self.drift, 2)} % of the labels would have to change class (total variation)",
        ]
        for name, targets in list(self.moves().items())[:_MOST_MOVES]:
            (first, share), *others = targets[:_MOST_TARGETS]
            rest = "".join(f", {percent(part)} % {other}" for other, part in others)
            lines.append(f"of A's {name}, {percent(share)} % became {first}{rest}")
        return lines

    def tables(self) -> list[Table]:
        """One row for each class that occurs."""
        rows = [
            [
                str(name), percent(row["a_share"], 2), percent(row["b_share"], 2),
                points(row["b_share"] - row["a_share"], 2), percent(row["agreement"]), percent(row["lost"]),
                percent(row["moved"]), percent(row["gained"]),
            ]
            for name, row in self.classes.iterrows() if row["a_pixels"] or row["b_pixels"]
        ]  # fmt: skip
        header = ["class", "A %", "B %", "change", "agrees %", "A lost %", "A moved %", "B gained %"]
        return [Table(f"A = {self.run_a}, B = {self.run_b}", header, rows)]


def compare(run_a: Run | Path, run_b: Run | Path, *, progress: Progress | None = None) -> RunDifference:
    """Compare the labels of two runs, one image at a time. `progress(done, total)` follows the images.

    Raises FileNotFoundError or ValueError unless both are runs over the same manifest with an image labelled in both,
    DamagedLabel.
    """
    a, b = Run.open(run_a), Run.open(run_b)
    if a.input_sha256 != b.input_sha256:
        raise ValueError(
            f"{a.path} and {b.path} label different manifests ({a.input_manifest}, sha256 {a.input_sha256[:12]}, and"
            f" {b.input_manifest}, sha256 {b.input_sha256[:12]}): compare two runs over the same one"
        )
    labels_a, labels_b = a.labels, b.labels
    shared = [sample_id for sample_id in labels_a if sample_id in labels_b]
    if not shared:
        raise ValueError(f"no image is labelled in both {a.path} ({len(labels_a)}) and {b.path} ({len(labels_b)})")
    space = a.label_space
    joint = np.zeros((256, 256), np.int64)
    identical = 0
    for done, sample_id in enumerate(shared, start=1):
        pairs = count_pairs(labels_a[sample_id], labels_b[sample_id])
        identical += bool(np.trace(pairs) == pairs.sum())
        joint += pairs
        if progress:
            progress(done, len(shared))
    ids = [*range(len(space)), IGNORE]
    only = len(labels_a) - len(shared), len(labels_b) - len(shared)
    return RunDifference(a.path, b.path, space, joint[np.ix_(ids, ids)], len(shared), identical, *only)
