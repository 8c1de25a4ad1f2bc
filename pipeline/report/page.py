"""Everything that the page of a report shows, as typed values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from autolabel.manifests import pages, storage
from autolabel.manifests.drawing import DISAGREEMENT, VIRIDIS
from autolabel.manifests.evidence import PolygonCounts
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import open_manifest
from autolabel.pipeline.analysis.audit_record import Audit
from autolabel.pipeline.analysis.stats import FATE_NAMES, Summary
from autolabel.pipeline.report.charts import FATE_COLOURS, ClassPlot, ConfidencePlot, ReliabilityPlot, colours
from autolabel.pipeline.report.facts import Facts, has_more_rules
from autolabel.pipeline.report.gallery import Gallery
from autolabel.pipeline.report.pictures import KINDS
from autolabel.pipeline.report.surroundings import PolygonPlot

# The keys of the viewer, as it explains them.
KEYS = (
    ("← →", "image before, image after"),
    ("1 … 6", "layer"),
    ("K R F", "keep, reject, fix; once more: no mark; with Shift: mark and next image"),
    ("U", "no mark"),
    ("N", "note; Enter or Esc leaves it"),
    ("Z", "full size, one image pixel on one of the screen; or the whole image"),
    ("+ − 0", "larger, smaller, whole image"),
    ("Shift arrows", "move the picture"),
    (", .", "less, more opacity"),
    ("O S", "outlines in place of areas; rings around specks"),
    ("?", "these keys"),
    ("Esc", "close"),
)


@dataclass(frozen=True)
class Page:
    """The values of one page.

    `updated` is the time of the last label, ISO 8601, or empty. `notes` say what cannot be shown. `quarantine` has
    (sample id, reason). `polygons`: the plots of a policy that weighs people's polygons. `weights` is the kind of
    the combination's weights where the teacher shows its scales.
    """

    run: Run
    summary: Summary
    updated: str
    notes: list[str]
    policy: Facts
    throughput: Facts
    provenance: Facts
    classes: ClassPlot
    confidence: ConfidencePlot
    polygons: PolygonPlot | None
    audit: Audit | None
    gallery: Gallery
    weights: str
    quarantine: list[tuple[str, str]]
    kinds: tuple[str, ...] = field(default=KINDS, init=False)
    keys: tuple[tuple[str, str], ...] = field(default=KEYS, init=False)

    @property
    def space(self) -> LabelSpace:
        """The label space of the run."""
        return self.run.label_space

    @property
    def colours(self) -> dict[str, str]:
        """The colour of every class."""
        return colours(self.space)

    @property
    def fate_colours(self) -> list[tuple[str, str]]:
        """Name and colour of every fate."""
        return [(name, FATE_COLOURS[fate]) for fate, name in FATE_NAMES.items()]

    @property
    def disagreement(self) -> dict[str, str]:
        """The colours of the disagreement of two labels."""
        return {name: f"rgb({r} {g} {b} / {a / 255:.2f})" for name, (r, g, b, a) in DISAGREEMENT.items()}

    @property
    def viridis(self) -> str:
        """The colours of confidence, for a gradient."""
        return ", ".join(f"#{colour}" for colour in VIRIDIS.hex(" ", 3).split())

    @property
    def reliability(self) -> ReliabilityPlot | None:
        """The reliability diagrams of the audit."""
        return ReliabilityPlot.of(self.audit) if self.audit else None

    @property
    def has_more_rules(self) -> bool:
        """True if more than the threshold decides whether a pixel keeps its class."""
        return has_more_rules(self.run.policy)

    def render(self) -> str:
        """The page as HTML."""
        return pages.render("pipeline/report/page.html.j2", page=self)


def write_counts_page(path: Path, counts: PolygonCounts, manifest: Path) -> Path:
    """Draw counts of polygons as a page of their own beside their file; return the page, such as polygons.html.

    Distances are pixels of the commonest width of the images. manifest: its label space has the colours.
    """
    space = open_manifest(manifest).label_space
    counts.require(space)
    commonest = max(counts.sizes, key=lambda size: counts.sizes[size])
    plot = PolygonPlot.of(counts, width=int(commonest.partition("x")[0]))
    page = path.with_suffix(".html")
    values = {"plot": plot, "colours": colours(space), "name": path.name}
    storage.write(page, pages.render("pipeline/report/counts_page.html.j2", **values).encode())
    return page
