"""The report of a run: a page that opens from disk, to look at the labels before anyone trains on them.

report/index.html     the page with its style and script, replaced last: it always shows one whole report
report/pictures-*/    its pictures, in a folder that no other page uses, so that the old page stays whole until then
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Collection
from pathlib import Path

import pandas as pd

from autolabel.manifests import storage
from autolabel.manifests.run.folder import Run
from autolabel.manifests.teachers import AnyTeacher, TeacherName
from autolabel.manifests.wording import Progress
from autolabel.pipeline.analysis.audit_record import Audit
from autolabel.pipeline.analysis.stats import summarise
from autolabel.pipeline.predictor import load_for
from autolabel.pipeline.progress import last_update
from autolabel.pipeline.report.charts import ClassPlot, ConfidencePlot
from autolabel.pipeline.report.facts import policy_facts, provenance, throughput
from autolabel.pipeline.report.gallery import Gallery, cards, choose
from autolabel.pipeline.report.layers import Sources
from autolabel.pipeline.report.page import Page
from autolabel.pipeline.report.painter import Painter, weights
from autolabel.pipeline.report.specks import SPECKS
from autolabel.pipeline.report.surroundings import PolygonPlot

_PICTURES = re.compile(r"pictures-[0-9a-f]{12}")
_KEY = re.compile(r'<main data-marks="([0-9a-f]{16})">')
_HEAD = 1 << 18  # bytes of a page that hold its style, and then the key
_LOCK = f"{storage.LOCK}.report"  # another one than the run's: a report may be drawn while images are labelled
_ONE_SCALE = "Nothing by scale: this run looks at one scale only, so there is nothing to combine."


def write_report(
    run: Run | Path,
    *,
    images: int = 100,
    samples: Collection[str] = (),
    teacher: AnyTeacher | None = None,
    attention: bool = False,
    specks: int = SPECKS,
    progress: Progress | None = None,
) -> Path:
    """Write `report/` of a finished run and return its page. `progress(done, total)` follows the images.

    The page shows the named `samples`, or `images` that `choose` picks, least trusted first. Confidence is what the run
    has kept of it. If it has kept none, the run's teacher computes it for the first few; it is read from `teacher`, or
    from its place at the time of the run. With `attention` the teacher also shows for the first few what it sees at
    every scale, and how much each counts. Pieces of fewer than `specks` pixels are marked; if the policy drops small
    pieces, those that it has dropped. The page says what is missing.
    Raises BadTable if the run is not finished, ValueError for an unknown sample, a `teacher` that is not the run's, and
    while another report of the run is being written.
    """
    run = Run.open(run)
    summary = summarise(run)
    table = run.statistics("images").to_pandas().set_index("sample_id")
    review = run.statistics("review").to_pandas().set_index("sample_id")[["rank", "trust"]]
    quarantine = [(row["sample_id"], row["reason"]) for row in run.quarantine().to_pylist()]
    # Images whose unit record was deleted are left out: they will be labelled again.
    ranked = review[review.index.isin(list(run.labels))].join(table)
    if samples:
        _require_labelled(run, samples, ranked, dict(quarantine))
    wanted = [name for name in ranked.index if name in set(samples)] if samples else choose(list(ranked.index), images)
    sources = Sources(run, wanted, coarse=summary.has_coarse)
    several = attention and len(run.recipe.scales) > 1
    found, note = _find_teacher(run, teacher, attention) if attention or not sources.has_confidence else (None, "")
    recipe = run.recipe
    network = load_for(found, recipe) if found and wanted else None
    notes = [note, sources.note, _ONE_SCALE if attention and not several else ""]
    pictures = run.report / f"pictures-{uuid.uuid4().hex[:12]}"
    seen = table.loc[wanted, ["focus_top", "focus_bottom"]].dropna().astype(int)
    rows = {str(name): (top, bottom) for name, top, bottom in seen.itertuples(name=None)}
    painter = Painter(pictures, sources, teacher=network, attention=several, specks=specks, seen=rows)
    with storage.hold(run.path, name=_LOCK) as held:
        key = _marks_key(run)
        try:
            painted = dict(zip(wanted, painter.paint_all(wanted, progress=progress), strict=True))
            page = Page(
                run=run,
                summary=summary,
                updated=last_update(run),
                notes=[note for note in notes if note],
                policy=policy_facts(run),
                throughput=throughput(table, run),
                provenance=provenance(run),
                classes=ClassPlot.of(summary),
                confidence=ConfidencePlot.of(summary, run.policy),
                polygons=_polygons(run, table),
                audit=Audit.read(run.audit_path) if storage.exists(run.audit_path) else None,
                gallery=Gallery(
                    cards(run, painted, ranked=ranked, samples=sources.samples),
                    pictures.name,
                    len(ranked),
                    run.label_space,
                    key,
                    run.path.absolute().name,
                ),
                weights=weights(network.combination) if several and network else "",
                quarantine=quarantine,
            )
            held.require(surely=True)
            storage.write(run.report / "index.html", page.render().encode())
        except BaseException:
            storage.remove_folder(pictures)
            raise
        for path in storage.list(run.report):  # older reports' pictures go; what a user has put beside them stays
            if _PICTURES.fullmatch(path.name) and path != pictures:
                storage.remove_folder(path)
        storage.remove_leftovers(run.report)
    return run.report / "index.html"


def _polygons(run: Run, images: pd.DataFrame) -> PolygonPlot | None:
    """The plots of the polygons that the policy weighs, in pixels of the commonest width of the run's images."""
    evidence = run.policy.polygons
    if evidence is None or images.empty:
        return None
    return PolygonPlot.of(evidence.require(run.label_space), width=int(images["width"].mode()[0]))


def _marks_key(run: Run) -> str:
    """The name under which browsers keep the marks of a run: that of its last report, so that marks outlive it."""
    page = run.report / "index.html"
    if storage.exists(page) and (found := _KEY.search(storage.read_range(page, 0, _HEAD).decode(errors="replace"))):
        return found[1]
    return hashlib.sha256(f"{run.recipe.to_dict()} {run.input_sha256}".encode()).hexdigest()[:16]


def _require_labelled(run: Run, samples: Collection[str], ranked: pd.DataFrame, quarantine: dict[str, str]) -> None:
    for sample_id in samples:
        if sample_id not in ranked.index:
            reason = (
                f"quarantined ({quarantine[sample_id]})" if sample_id in quarantine else "unknown, or left for later"
            )
            raise ValueError(f"sample {sample_id!r} has no label in {run.path}: it is {reason}")


def _find_teacher(run: Run, named: AnyTeacher | None, attention: bool) -> tuple[TeacherName | None, str]:
    """The run's teacher, or None and the reason. Raises ValueError if the user named another one."""
    found, reason = run.find_teacher(named)
    missing = "No confidence maps, no predictions by scale and no attention" if attention else "No confidence maps"
    advice = " Name it where it is now: autolabel report … --teacher FILE" if run.teacher else ""
    return found, reason and f"{missing}: {reason}.{advice}"
