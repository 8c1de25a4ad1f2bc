"""How much of its images a run's highest scale has seen, and how much of the labels is certified, from its tables."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow.compute as pc

from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.wording import percent


@dataclass(frozen=True)
class FocusCounts:
    """Shares of all images together: of the rows that the highest scale has seen, and of the pixels that it has not.

    certified: share of the kept pixels whose label it could not change; None without a certificate.
    """

    rows: float
    unfocused: float
    certified: float | None = None

    @classmethod
    def of(cls, run: RunFolder) -> FocusCounts | None:
        """The counts of a run's statistics, None without a focus or an image. Raises BadTable."""
        seen = height = pixels = unfocused = certified = kept = 0
        counted = False
        for table in run.stream_statistics("images", ["height", "width", "focus_top", "focus_bottom"]):
            table = table.filter(pc.is_valid(table["focus_top"]))
            tops, bottoms, heights, widths = (
                table[name].to_numpy().astype("int64") for name in ("focus_top", "focus_bottom", "height", "width")
            )
            seen, height = seen + int((bottoms - tops).sum()), height + int(heights.sum())
            pixels += int((heights * widths).sum())
        if not pixels:
            return None
        for table in run.stream_statistics("classes", ["kept_pixels", "unfocused_pixels", "certified_pixels"]):
            unfocused += pc.sum(table["unfocused_pixels"]).as_py() or 0
            counted |= table["certified_pixels"].null_count < len(table)
            kept, certified = (
                total + (pc.sum(table[name]).as_py() or 0)
                for total, name in ((kept, "kept_pixels"), (certified, "certified_pixels"))
            )
        return cls(seen / height, unfocused / pixels, certified / kept if counted and kept else None)

    def __str__(self) -> str:
        certified = "" if self.certified is None else f"; {percent(self.certified)} % of the kept pixels are certified"
        seen, never = percent(self.rows), percent(self.unfocused)
        return f"the highest scale saw {seen} % of the rows, and {never} % of the pixels never{certified}"
