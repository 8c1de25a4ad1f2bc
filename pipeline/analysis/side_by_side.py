"""Audits of several runs beside each other: whose labels are the best, and what people's polygons were worth before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autolabel.manifests.run.folder import Run
from autolabel.manifests.wording import MISSING, Shown, Table, counted, percent
from autolabel.pipeline.analysis.audit_record import Audit, MeanAudit, PixelAudit

_DISTANCE = "2"  # pixels: the distance of the boundary F in the table


@dataclass(frozen=True)
class SideBySide(Shown):
    """The audits of runs, by the name of each."""

    truth: Path
    audits: tuple[tuple[str, Audit], ...]

    @classmethod
    def of(cls, truth: Path, runs: Sequence[Path], audits: Sequence[Audit]) -> SideBySide:
        """Name the audits by the policies of their runs, or by the folders where two have the same policy."""
        names = [Run.open(run).policy.name for run in runs]
        if len(set(names)) < len(names):
            names = [f"{name} ({run})" for name, run in zip(names, runs, strict=True)]
        return cls(truth, tuple(zip(names, audits, strict=True)))

    def lines(self) -> list[str]:
        """A warning where the runs are not of the same images, and where a teacher has seen some of them."""
        lines = []
        if len({audit.images for _, audit in self.audits}) > 1:
            images = ", ".join(f"{name} {audit.images}" for name, audit in self.audits)
            lines.append(f"The runs have labelled different numbers of these images ({images}): no fair comparison.")
        leaked = [name for name, audit in self.audits if audit.leaked]
        if leaked:
            lines.append(f"The teacher was trained on some of these images ({', '.join(leaked)}): that flatters it.")
        return lines

    def tables(self) -> list[Table]:
        """One row for the coarse labels, if there are any, and one for each run."""
        rows = []
        for _, audit in self.audits:
            if audit.human is not None and audit.human_mean is not None:
                rows = [_row("coarse", audit.human, audit.human_mean)]
                break
        rows += [_row(name, audit.auto, audit.mean) for name, audit in self.audits]
        images = max(audit.images for _, audit in self.audits)
        title = f"labels of {counted(images, 'image')} against {self.truth}, in %"
        return [Table(title, ["labels", "labelled", "right", "IoU kept", "IoU", f"F {_DISTANCE} px"], rows)]


def _row(name: str, pixels: PixelAudit | None, mean: MeanAudit) -> list[str]:
    labelled, right = (MISSING, MISSING) if pixels is None else (percent(pixels.labelled), percent(pixels.right))
    return [name, labelled, right, *map(percent, (mean.iou_kept, mean.iou, mean.boundary_f.get(_DISTANCE)))]
