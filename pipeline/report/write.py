"""The report of a run: a page that opens from disk, to look at the labels before anyone trains on them.

report/index.html     the page with its style and script, replaced last: it always shows one whole report
report/pictures-*/    its pictures, in a folder that no other page uses, so that the old page stays whole until then
"""

from __future__ import annotations

import importlib.resources
import json
import math
import re
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from autolabel.manifests import machine, storage
from autolabel.manifests.drawing import DISAGREEMENT, draw_label, encode_flat, encode_smooth, write_picture
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.reading import read_photograph
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.run.labels import RunConfidence, RunLabels
from autolabel.manifests.run.shards import Label
from autolabel.manifests.samples import Sample, open_manifest
from autolabel.manifests.schemas import QUARANTINE_SCHEMA
from autolabel.manifests.tables import BadTable, read_table
from autolabel.pipeline.analysis.stats import summarise
from autolabel.pipeline.report import charts
from autolabel.pipeline.report.pictures import (
    KINDS,
    VIRIDIS,
    Confidence,
    Drawn,
    Missing,
    Photograph,
    Seen,
    attempt,
    coarse_label,
    draw_share,
    from_levels,
    write_pictures,
)
from autolabel.teacher.networks.combine import Average, Combination, Explicit, ExplicitPairs
from autolabel.teacher.predict import Teacher, load_teacher

_PICTURES = re.compile(r"pictures-[0-9a-f]{12}")
_MOST_THREADS = 8  # each holds one image
_WITH_TEACHER = 24  # images for which the teacher runs again; to run it for all would be to label anew
_WORST = 0.75  # of the images shown are the least trusted, the others are spread over the rest
_ONE_SCALE = "Nothing by scale: this run looks at one scale only, so there is nothing to combine."
_NOT_ALL = f"the teacher runs again for the first {_WITH_TEACHER} images only; --keep-confidence would have kept it"

About = dict[str, Any]  # run.json
Asked = dict[str, Sample]  # by id


def write_report(
    run: Path,
    images: int,
    chosen: Sequence[str],
    teacher: Path | None,
    update: Callable[[int, int], None],
    attention: bool = False,
) -> Path:
    """Write `report/` of a finished run and return its page. `update(done, total)` follows the images.

    Shown are the `chosen` sample ids, else `images` that `choose` finds. Confidence is what the run has kept of it;
    else it is computed anew, for the first few, by the run's teacher, which is at `teacher` or, by default, where the
    run had it. Of what has gone since, the page says so. With `attention` the teacher also shows, for the first few,
    what it sees at every scale, and how much each counts.
    Raises BadTable if the run is not finished, ValueError for an unknown sample or a `teacher` that is not the run's.
    """
    summary = summarise(run)
    opened = Run.open(run)
    manifest = open_manifest(run / "manifest.parquet")
    space, labels = manifest.label_space, opened.labels
    table = opened.statistics("images").to_pandas().set_index("sample_id")
    quarantine = read_table(run / "quarantine.parquet", QUARANTINE_SCHEMA).to_pylist()
    review = opened.statistics("review").to_pandas().set_index("sample_id")[["rank", "trust"]]
    # Not what is to be done again, because its unit record was deleted.
    ranked = review[review.index.isin(list(labels))].join(table)
    wanted = _requested(run, chosen, ranked, quarantine) if chosen else choose(list(ranked.index), images)
    kept = opened.confidence if opened.recipe.confidence_edges else None
    teacher_file, no_teacher = _find_teacher(opened, teacher, attention) if attention or not kept else (None, "")
    recipe = opened.recipe
    network = (
        load_teacher(teacher_file, precision=recipe.precision, combine=recipe.combine)
        if teacher_file and wanted
        else None
    )
    several = attention and len(opened.recipe.scales) > 1
    asked, no_coarse = _find_asked(opened, wanted) if summary.coarse_coverage > 0 else (None, "")
    samples = manifest.find(wanted)
    folder = run / "report"
    pictures = folder / f"pictures-{uuid.uuid4().hex[:12]}"
    paint = Painter(pictures, labels, kept, samples, asked, space, opened, network, several)
    try:
        drawn = _paint_all(paint, wanted, update)
        cards = _cards(run, wanted, drawn, ranked, samples)
        page = _render(
            run=run.absolute(),
            about=opened,
            updated=_updated(run),
            gone=[note for note in (no_teacher, no_coarse, _ONE_SCALE if attention and not several else "") if note],
            summary=summary,
            space=space,
            cards=cards,
            folder=pictures.name,
            gallery=_gallery(cards, space, pictures.name, len(ranked)),
            class_counts=[
                sum(any(i == c and auto for i, auto, _ in card["classes"]) for card in cards) for c in range(len(space))
            ],
            groups=sorted(Counter(card["group"] for card in cards).items()),
            all_kinds=KINDS,
            kinds=[kind for kind in KINDS if any(kind in one.pictures.kinds for one in drawn)],
            by_scale=[(card, one.views) for card, one in zip(cards, drawn, strict=True) if one.views],
            weights=_weights(network.combination) if several and network else "",
            quarantine=quarantine,
            policy=charts.policy_facts(opened),
            throughput=charts.throughput(table, opened),
            histograms=charts.class_histograms(summary, space, opened),
            fates=charts.fates(summary, space),
            fate_kinds=list(charts.SHOWN_FATES.values()),
            **charts.class_plot(summary, space),
            **charts.confidence_plots(summary, opened.policy.threshold),
            **charts.audit(run),
        )
        storage.write(folder / "index.html", page.encode())
    except BaseException:
        storage.remove(pictures)
        raise
    for path in storage.list(folder):  # the pictures of older reports, and nothing that a user may have put beside them
        if _PICTURES.fullmatch(path.name) and path != pictures:
            storage.remove(path)
    storage.remove_leftovers(folder)
    return folder / "index.html"


# --- which images -----------------------------------------------------------------------------------------------------


def choose(ranked: Sequence[str], count: int) -> list[str]:
    """Up to `count` sample ids of those in `ranked`, in their order: mostly the first, then some spread over the rest.

    The same ids always give the same choice.
    """
    if len(ranked) <= count:
        return list(ranked)
    worst = math.ceil(_WORST * count)
    rest, more = ranked[worst:], count - worst
    return [*ranked[:worst], *(rest[(2 * k + 1) * len(rest) // (2 * more)] for k in range(more))]


def _requested(run: Path, chosen: Sequence[str], ranked: pd.DataFrame, quarantine: list[dict[str, Any]]) -> list[str]:
    refused = {row["sample_id"]: row["reason"] for row in quarantine}
    for sample_id in chosen:
        if sample_id not in ranked.index:
            why = f"quarantined ({refused[sample_id]})" if sample_id in refused else "unknown, or left for later"
            raise ValueError(f"sample {sample_id!r} has no label in {run}: it is {why}")
    return [sample_id for sample_id in ranked.index if sample_id in set(chosen)]


def _find_asked(opened: Run, wanted: Collection[str]) -> tuple[Asked | None, str]:
    """The samples as the run was asked to label them, for their coarse labels; or why there are none."""
    try:
        return open_manifest(opened.input_manifest).find(wanted), ""
    except BadTable as error:
        return None, f"No pictures of the coarse labels, which only the run's manifest lists: {error}."


def _find_teacher(opened: Run, named: Path | None, attention: bool) -> tuple[Path | None, str]:
    """The file of the run's teacher, or why there is none. Raises ValueError if the user named another one."""
    found, why = opened.find_teacher(named)
    if found:
        return found, ""
    missing = "No confidence maps, no predictions by scale and no attention" if attention else "No confidence maps"
    return None, f"{missing}: {why}. Name it where it is now: autolabel report … --teacher FILE"


def _updated(run: Path) -> str:
    """When the run last finished a unit, ISO 8601; empty if it does not say."""
    path = run / "progress.json"
    return str(json.loads(storage.read(path))["updated"]) if storage.exists(path) else ""


# --- drawing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """One picture of what the teacher sees at a scale; shares of an attention: mean, least and most of its pixels."""

    kind: str  # prediction, attention or combined
    file: str
    size: tuple[int, int]  # width, height
    scale: float | None = None
    shares: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Shown:
    """All pictures of one sample."""

    pictures: Drawn
    views: list[View]


class Painter:
    """Draws samples into a folder, several threads at once; one at a time where the teacher is asked."""

    def __init__(
        self,
        folder: Path,
        labels: RunLabels,
        kept: RunConfidence | None,
        samples: Asked,
        asked: Asked | None,
        space: LabelSpace,
        opened: Run,
        teacher: Teacher | None,
        attention: bool,
    ) -> None:
        self._folder, self._labels, self._kept, self._samples, self._asked = folder, labels, kept, samples, asked
        self._space, self._run, self._teacher, self._attention = space, opened, teacher, attention
        self._policy = opened.policy
        self._left_out = self._policy.left_out(space)
        self._asking = threading.Lock()

    def __call__(self, place: int, sample_id: str) -> Shown:
        """Draw the sample that is shown at this place, from 0."""
        stem = f"{place:05}-{re.sub('[^A-Za-z0-9]+', '_', sample_id)[-60:]}"
        image = attempt(lambda: read_photograph(self._samples[sample_id]))
        auto = attempt(lambda: self._labels[sample_id])
        kept = attempt(lambda: self._levels(sample_id))
        coarse = self._coarse(sample_id)
        again, views = self._teachers(place, stem, image, coarse) if kept is None or self._attention else (None, [])
        seen = Seen(image, auto, coarse, again if kept is None else kept)
        return Shown(write_pictures(self._folder, stem, seen, self._space), views)

    def _coarse(self, sample_id: str) -> Label | Missing | None:
        if self._asked is None:
            return None
        asked = self._asked.get(sample_id)
        return attempt(lambda: coarse_label(asked, self._space))

    def _levels(self, sample_id: str) -> Confidence | None:
        """What the run has kept of the confidence. Raises DamagedLabel."""
        return None if self._kept is None else from_levels(self._kept[sample_id][1], self._kept.edges)

    def _teachers(
        self, place: int, stem: str, image: Photograph | Missing, coarse: Label | Missing | None
    ) -> tuple[Confidence | Missing | None, list[View]]:
        """The confidence, computed anew, and with attention what the teacher sees at every scale."""
        if self._teacher is None:
            return None, []
        if isinstance(image, Missing):
            return image, []
        if place >= _WITH_TEACHER:
            return Missing(_NOT_ALL), []
        with self._asking:
            named = None if isinstance(coarse, Missing) else coarse
            recipe = self._run.recipe
            top, confidence = self._teacher.confidence(
                image, scales=recipe.scales, flip=recipe.flip, temperature=self._policy.temperature,
                prior=self._left_out, coarse=named,
            )  # fmt: skip
            return confidence, self._by_scale(self._teacher, stem, image, top) if self._attention else []

    def _by_scale(self, teacher: Teacher, stem: str, image: Photograph, combined: Label) -> list[View]:
        """What every scale says, and how much it counts unless all count the same; by ascending scale."""

        def written(kind: str, scale: float | None, drawn: Image.Image, encoded: bytes, **more: Any) -> View:
            name = f"{stem}-{kind}{'' if scale is None else f'-{scale:g}'}.webp"
            write_picture(self._folder / name, encoded)
            return View(kind, f"{self._folder.name}/{name}", drawn.size, scale, **more)

        views: list[View] = []
        for view in teacher.views(image, scales=self._run.recipe.scales):
            prediction = draw_label(view.label, self._space)
            views.append(written("prediction", view.scale, prediction, encode_flat(prediction)))
            if _weights(teacher.combination) != "equal":
                attention = draw_share(view.share)
                shares = float(view.share.mean()), float(view.share.min()), float(view.share.max())
                views.append(written("attention", view.scale, attention, encode_smooth(attention), shares=shares))
        whole = draw_label(combined, self._space)
        return [*views, written("combined", None, whole, encode_flat(whole))]


def _weights(combination: Combination) -> str:
    """Where the shares of the scales come from: equal, a chain that leaves a rest to the highest, or free numbers."""
    if isinstance(combination, Average):
        return "equal"
    return "free" if isinstance(combination, Explicit | ExplicitPairs) else "chained"


def _paint_all(paint: Painter, wanted: Sequence[str], update: Callable[[int, int], None]) -> list[Shown]:
    """Draw all of them, as many at once as there are cores."""
    shown: list[Shown] = []
    update(0, len(wanted))
    with ThreadPoolExecutor(min(_MOST_THREADS, machine.cores())) as pool:
        try:
            for one in pool.map(paint, range(len(wanted)), wanted):
                shown.append(one)
                update(len(shown), len(wanted))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return shown


# --- the page ---------------------------------------------------------------------------------------------------------


def _cards(
    run: Path, wanted: Sequence[str], drawn: Sequence[Shown], ranked: pd.DataFrame, samples: Asked
) -> list[dict[str, Any]]:
    """What the page says of every sample: its statistics and pictures, and its classes as (id, auto, coarse pixels)."""
    ids = pa.array(list(wanted), pa.string())
    named: dict[str, list[tuple[int, int, int]]] = {}
    for rows in RunFolder(run).stream_statistics("classes", ["sample_id", "class_id", "pixels", "coarse_pixels"]):
        for row in rows.filter(pc.is_in(rows["sample_id"], ids)).to_pylist():
            if row["pixels"] or row["coarse_pixels"]:
                named.setdefault(row["sample_id"], []).append((row["class_id"], row["pixels"], row["coarse_pixels"]))
    return [
        {
            "sample_id": sample_id,
            **{str(column): value for column, value in row.items()},
            "group": samples[sample_id].group,
            "classes": sorted(named.get(sample_id, []), key=lambda c: -c[1]),
            "pictures": one.pictures,
        }
        for sample_id, row, one in zip(wanted, ranked.loc[list(wanted)].to_dict("records"), drawn, strict=True)
    ]


def _gallery(cards: Sequence[dict[str, Any]], space: LabelSpace, folder: str, images: int) -> dict[str, Any]:
    """What the script of the page needs to know, as JSON."""

    def number(value: float) -> float | None:
        return None if math.isnan(value) else round(float(value), 6)

    def card(one: dict[str, Any]) -> dict[str, Any]:
        pixels = one["height"] * one["width"]
        return {
            "id": one["sample_id"],
            "group": one["group"],
            "size": [one["width"], one["height"]],
            "rank": one["rank"],
            "trust": number(one["trust"]),
            "confidence": number(one["mean_confidence"]),
            "agreement": number(one["agreement_with_coarse"]),
            "ignored": number(one["ignored_fraction"]),
            "stem": one["pictures"].stem,
            "kinds": one["pictures"].kinds,
            "missing": one["pictures"].missing,
            "disagreement": [round(share, 4) for share in one["pictures"].disagreement.values()],
            "classes": [(i, round(auto / pixels, 6), round(coarse / pixels, 6)) for i, auto, coarse in one["classes"]],
        }

    return {
        "folder": folder,
        "images": images,
        "classes": [[c.name, f"rgb{c.colour}"] for c in space.classes],
        "cards": [card(one) for one in cards],
    }


def _percent(share: float | None, digits: int = 1) -> str:
    """0.123 -> "12.3"; a dash where there is no number, and never a 0 for what is only small."""
    if share is None or math.isnan(share):
        return "–"
    smallest = 10.0**-digits
    return f"< {smallest:g}" if 0 < 100 * share < smallest / 2 else f"{100 * share:.{digits}f}"


def _score(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def _resource(name: str) -> str:
    return importlib.resources.files("autolabel.pipeline.report").joinpath(name).read_text(encoding="utf-8")


def _render(**values: Any) -> str:
    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"percent": _percent, "score": _score}
    colours = {name: f"rgb({r} {g} {b} / {a / 255:.2f})" for name, (r, g, b, a) in DISAGREEMENT.items()}
    return env.from_string(_resource("page.html.j2")).render(
        values,
        style=_resource("report.css"),
        script=_resource("report.js"),
        viridis=", ".join(f"#{colour}" for colour in VIRIDIS.hex(" ", 3).split()),
        disagreement=colours,
    )
