"""The report of a run: a page that opens from disk, to look at the labels before anyone trains on them.

report/index.html    the page, replaced last: it always shows one whole report
report/*.jpeg, *.png  its pictures, named by their content, so that a new report never changes those of the old page
"""

from __future__ import annotations

import importlib.resources
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests.classes import IGNORE, LabelSpace
from autolabel.manifests.files import fingerprint_bytes, remove_leftovers, write_bytes
from autolabel.manifests.images import BadImage, colourise, read_image, read_label
from autolabel.manifests.policy import COMBINE
from autolabel.manifests.stores import DamagedLabel, Label, RunLabels, open_labels
from autolabel.manifests.tables import QUARANTINE_SCHEMA, BadTable, Sample, load_manifest, read_statistics, read_table
from autolabel.pipeline.folder import find_teacher
from autolabel.pipeline.stats import Summary, coverage_at, summarise
from autolabel.teacher.predict import Teacher, load_teacher
from autolabel.teacher.scales import Average, Combination, Explicit, ExplicitPairs

LONGEST = 960  # pixels of a picture's longer side
KINDS = ("photograph", "coarse", "auto", "confidence")  # of pictures, from left to right
SCALE_KINDS = ("prediction", "attention", "combined")  # the same below them, by scale
_OURS = re.compile(rf".+-({'|'.join(KINDS + SCALE_KINDS)})-[0-9a-f]{{16}}\.(jpeg|png)")
# Viridis at equal steps: perceptually uniform, readable in grey and for colour-blind eyes.
_VIRIDIS = bytes.fromhex("440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725")
_TICKS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # shares marked on the axis of the class distribution
_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # whose coverage is printed
_DOUBTFUL = 0.25  # a class that loses this share of its coarse pixels to other classes is pointed out
_ONE_SCALE = "Nothing by scale: this run looks at one scale only, so there is nothing to combine."

About = dict[str, Any]  # run.json
Asked = dict[str, Sample]  # by id
Draw = Callable[[], Image.Image]


@dataclass(frozen=True)
class Picture:
    """One picture of an image: a file beside the page, or the reason why there is none."""

    kind: str
    file: str | None = None
    size: tuple[int, int] = (0, 0)  # width, height
    why_not: str = ""
    scale: float | None = None  # of a prediction or an attention
    shares: tuple[float, float, float] | None = None  # of an attention: mean, least and most of its pixels


def write_report(
    run: Path,
    images: int,
    chosen: Sequence[str],
    teacher: Path | None,
    update: Callable[[int, int], None],
    attention: bool = False,
) -> Path:
    """Write `report/` of a finished run and return its page. `update(done, total)` follows the images.

    Shown are the `chosen` sample ids, else `images` that `choose` finds. Confidence is computed anew by the run's
    teacher, which is at `teacher` or, by default, where the run had it. Of what has gone since, the page says so.
    With `attention` the teacher also shows what it sees at every scale, and how much each counts.
    Raises BadTable if the run is not finished, ValueError for an unknown sample or a `teacher` that is not the run's.
    """
    summary = summarise(run)
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    manifest = load_manifest(run / "manifest.parquet")
    labels = open_labels(run)
    table = read_statistics(run, "images").to_pandas().set_index("sample_id")
    table = table[table.index.isin(list(labels))]  # not what is to be done again, because its unit record was deleted
    quarantine = read_table(run / "quarantine.parquet", QUARANTINE_SCHEMA).to_pylist()
    wanted = _requested(run, chosen, table, quarantine) if chosen else choose(table, images)
    teacher_file, no_teacher = _find_teacher(about, teacher, attention)
    combine = about.get("combine", COMBINE[0])  # not in the runs of older versions, which knew no other
    network = load_teacher(teacher_file, "auto", about["precision"], combine) if teacher_file and wanted else None
    several = network if attention and len(about["scales"]) > 1 else None
    one_scale = _ONE_SCALE if attention and len(about["scales"]) == 1 else ""
    asked, no_coarse = _find_asked(about) if summary.coarse_coverage > 0 else (None, "")
    samples = {s.sample_id: s for s in manifest.samples}
    folder = run / "report"
    shown: list[dict[str, Any]] = []
    for done, (sample_id, why) in enumerate(wanted.items()):
        update(done, len(wanted))
        draws = _draws(samples[sample_id], labels, asked, manifest.label_space, network, about)
        pictures = [_picture(folder, sample_id, kind, draws[kind]) for kind in KINDS if kind in draws]
        by_scale = _by_scale(folder, samples[sample_id], manifest.label_space, several, about) if several else []
        if by_scale:
            by_scale.append(_picture(folder, sample_id, "combined", draws["combined"]))
        row = {"sample_id": sample_id, "why": why, "pictures": pictures, "by_scale": by_scale}
        shown.append({**table.loc[sample_id], **row})
    page = _render(
        run=run.absolute(),
        about=about,
        updated=_updated(run),
        gone=[note for note in (no_teacher, no_coarse, one_scale) if note],
        summary=summary,
        shown=shown,
        weights=_weights(several.combination) if several else "",
        quarantine=quarantine,
        space=manifest.label_space,
        viridis=", ".join(f"#{colour}" for colour in _VIRIDIS.hex(" ", 3).split()),
        **_class_plot(summary, manifest.label_space),
        **_confidence_plots(summary, float(about["policy"]["threshold"])),
    )
    write_bytes(folder / "index.html", page.encode())
    _tidy(folder, {picture.file for image in shown for picture in image["pictures"] + image["by_scale"]})
    update(len(wanted), len(wanted))
    return folder / "index.html"


def choose(images: pd.DataFrame, count: int) -> dict[str, str]:
    """Up to `count` sample ids and why each is worth a look: the extremes, the median, then some spread over the run.

    `images` is `stats/images.parquet` by sample id. The same table always gives the same choice.
    """
    if images.empty:
        return {}
    agreement = images["agreement_with_coarse"].dropna()
    by_ignored = images["ignored_fraction"].sort_values(kind="stable").index
    remarkable = [
        (by_ignored[-1], "most ignored pixels"),
        *([(agreement.idxmin(), "least agreement with its coarse label")] if len(agreement) else []),
        (images["mean_confidence"].idxmin(), "lowest mean confidence"),
        (by_ignored[len(by_ignored) // 2], "median by ignored pixels"),
        (by_ignored[0], "fewest ignored pixels"),
    ]
    why: dict[str, str] = {}
    for sample_id, reason in remarkable:
        if sample_id in why:
            why[sample_id] += f", {reason}"
        elif len(why) < count:
            why[sample_id] = reason
    others = [sample_id for sample_id in images.index if sample_id not in why]
    more = max(0, min(count - len(why), len(others)))
    spread = [others[(2 * k + 1) * len(others) // (2 * more)] for k in range(more)]
    return why | dict.fromkeys(spread, "spread evenly over the run")


def _requested(
    run: Path, chosen: Sequence[str], images: pd.DataFrame, quarantine: list[dict[str, Any]]
) -> dict[str, str]:
    refused = {row["sample_id"]: row["reason"] for row in quarantine}
    for sample_id in chosen:
        if sample_id not in images.index:
            why = f"quarantined ({refused[sample_id]})" if sample_id in refused else "unknown, or left for later"
            raise ValueError(f"sample {sample_id!r} has no label in {run}: it is {why}")
    return dict.fromkeys(chosen, "requested")


def _find_teacher(about: About, named: Path | None, attention: bool) -> tuple[Path | None, str]:
    """The file of the run's teacher, or why there is none. Raises ValueError if the user named another one."""
    found, why = find_teacher(about, named)
    if found:
        return found, ""
    missing = "No confidence maps, no predictions by scale and no attention" if attention else "No confidence maps"
    return None, f"{missing}: {why}. Name it where it is now: autolabel report … --teacher FILE"


def _find_asked(about: About) -> tuple[Asked | None, str]:
    """The samples as the run was asked to label them, for their coarse labels; or why there are none."""
    try:
        return {s.sample_id: s for s in load_manifest(about["manifest"]).samples}, ""
    except BadTable as error:
        return None, f"No pictures of the coarse labels, which only the run's manifest lists: {error}."


def _updated(run: Path) -> str:
    """When the run last finished a unit, ISO 8601; empty if it does not say."""
    path = run / "progress.json"
    return str(json.loads(path.read_text(encoding="utf-8"))["updated"]) if path.is_file() else ""


# --- pictures ---------------------------------------------------------------------------------------------------------


def _draws(
    sample: Sample, labels: RunLabels, asked: Asked | None, space: LabelSpace, teacher: Teacher | None, about: About
) -> dict[str, Draw]:
    """How to draw each picture of a sample, by kind; kinds that the whole run lacks are left out."""

    def coarse(original: Sample | None) -> Label:
        if original is None or original.coarse_label is None:
            raise BadImage("this image has no coarse label" if original else "the run's manifest lists it no more")
        return read_label(original.coarse_label, space, original.label_ids)

    draws: dict[str, Draw] = {
        "photograph": lambda: _shrink(Image.fromarray(_photograph(sample)), Image.Resampling.LANCZOS),
        "auto": lambda: draw_label(labels[sample.sample_id], space),
    }
    if asked is not None:
        draws["coarse"] = lambda: draw_label(coarse(asked.get(sample.sample_id)), space)
    if teacher is not None:
        decided = cache(lambda: teacher.confidence(_photograph(sample), about["scales"], about["flip"]))
        draws["confidence"] = lambda: draw_share(decided()[1])
        draws["combined"] = lambda: draw_label(decided()[0], space)
    return draws


def _photograph(sample: Sample) -> NDArray[np.uint8]:
    image = read_image(sample.image)
    if image.shape[:2] != (sample.height, sample.width):
        raise BadImage(f"{sample.image} has changed since it was labelled: its size is another")
    return image


def _by_scale(folder: Path, sample: Sample, space: LabelSpace, teacher: Teacher, about: About) -> list[Picture]:
    """What every scale says of a sample, and how much it counts unless all count the same; by ascending scale.

    Nothing where the photograph is at fault: the other pictures say so.
    """
    try:
        views = teacher.views(_photograph(sample), about["scales"])
    except (BadImage, FileNotFoundError):
        return []
    pictures = []
    for view in views:
        prediction = _picture(folder, sample.sample_id, "prediction", partial(draw_label, view.label, space))
        pictures.append(replace(prediction, scale=view.scale))
        if _weights(teacher.combination) != "equal":
            attention = _picture(folder, sample.sample_id, "attention", partial(draw_share, view.share))
            shares = float(view.share.mean()), float(view.share.min()), float(view.share.max())
            pictures.append(replace(attention, scale=view.scale, shares=shares))
    return pictures


def _weights(combination: Combination) -> str:
    """Where the shares of the scales come from: equal, a chain that leaves a rest to the highest, or free numbers."""
    if isinstance(combination, Average):
        return "equal"
    return "free" if isinstance(combination, Explicit | ExplicitPairs) else "chained"


def _shrink(image: Image.Image, how: Image.Resampling) -> Image.Image:
    """The picture with its longer side at most LONGEST; never enlarged."""
    factor = min(1.0, LONGEST / max(image.size))
    return image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), how)


def draw_label(label: Label, space: LabelSpace) -> Image.Image:
    """(H, W) uint8 train ids in the label space's colours. Ignore is hatched: some classes are nearly black."""
    small = np.asarray(_shrink(Image.fromarray(label), Image.Resampling.NEAREST))
    colours = colourise(small, space)
    y, x = np.indices(small.shape)
    period = max(8, max(small.shape) // 40)
    colours[(small == IGNORE) & ((x + y) % period < period // 4)] = 56
    return Image.fromarray(colours)


def draw_share(share: NDArray[np.float32]) -> Image.Image:
    """(H, W) float32 in the colours of viridis, 0 to 1; what lies outside is drawn as the nearer of the two."""
    small = np.asarray(_shrink(Image.fromarray(share.clip(0, 1)), Image.Resampling.BOX))
    steps = np.frombuffer(_VIRIDIS, np.uint8).reshape(-1, 3)
    channels = [np.interp(small, np.linspace(0, 1, len(steps)), channel) for channel in steps.T]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def _picture(folder: Path, sample_id: str, kind: str, draw: Draw) -> Picture:
    """Draw and write one picture; where its source is at fault, say so in its place."""
    try:
        image = draw()
    except (BadImage, DamagedLabel) as error:
        return Picture(kind, why_not=str(error))
    except FileNotFoundError as error:
        return Picture(kind, why_not=f"{error.filename} is gone")
    form, buffer = "JPEG" if kind == "photograph" else "PNG", io.BytesIO()
    image.save(buffer, form, quality=88, optimize=True)
    data = buffer.getvalue()
    name = f"{re.sub('[^A-Za-z0-9]+', '_', sample_id)[-60:]}-{kind}-{fingerprint_bytes(data)}.{form.lower()}"
    write_bytes(folder / name, data)
    return Picture(kind, name, image.size)


def _tidy(folder: Path, used: set[str | None]) -> None:
    """Remove the pictures of older reports, and nothing that a user may have put beside them."""
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in used:
            path.unlink(missing_ok=True)
    remove_leftovers(folder)


# --- numbers ----------------------------------------------------------------------------------------------------------


def _class_plot(summary: Summary, space: LabelSpace) -> dict[str, Any]:
    """Rows and axis of the class table. Bars are on a square-root scale, in per cent of the widest.

    Shares span four orders of magnitude and may be 0: a linear scale hides the rare, a logarithm has no 0.
    """
    rows = [dict(row) for row in summary.classes.to_dict("records")]
    widest = float(np.nan_to_num(summary.classes[["coarse_share", "auto_share"]].to_numpy()).max())

    def place(share: float) -> float:
        return 100 * math.sqrt(share / widest) if share > 0 else 0.0

    for c, row in zip(space.classes, rows, strict=True):
        row |= {"name": c.name, "colour": c.colour}
        row |= {"before": place(row["coarse_share"]), "after": place(row["auto_share"])}
    seen = [row for row in rows if row["coarse_pixels"] or not math.isnan(row["kept"])]
    return {
        "seen": seen,
        "unseen": [row["name"] for row in rows if row not in seen],
        "lost": [row["name"] for row in seen if row["coarse_pixels"] and not row["auto_pixels"]],
        "doubtful": [row for row in seen if row["auto_pixels"] and row["overridden"] > _DOUBTFUL],
        "ticks": [(tick, place(tick)) for tick in _TICKS if tick <= widest],
    }


def _confidence_plots(summary: Summary, threshold: float) -> dict[str, Any]:
    """The share of pixels in every bin of confidence, and the share that any threshold would keep, both over 0..1."""
    pixels, edges = int(summary.histogram.sum()), np.linspace(0, 1, len(summary.histogram) + 1).tolist()
    return {
        "threshold": threshold,
        "bins": (summary.histogram / pixels).tolist() if pixels else [],
        "curve": [(edge, coverage_at(summary.histogram, edge)) for edge in edges],
        "would_keep": [(t, coverage_at(summary.histogram, t)) for t in _THRESHOLDS],
    }


def _percent(share: float | None, digits: int = 1) -> str:
    """0.123 -> "12.3"; a dash where there is no number, and never a 0 for what is only small."""
    if share is None or math.isnan(share):
        return "–"
    smallest = 10.0**-digits
    return f"< {smallest:g}" if 0 < 100 * share < smallest / 2 else f"{100 * share:.{digits}f}"


def _render(**values: Any) -> str:
    source = importlib.resources.files("autolabel.pipeline").joinpath("report.html.j2").read_text(encoding="utf-8")
    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters["percent"] = _percent
    env.filters["score"] = lambda value: "–" if math.isnan(value) else f"{value:.3f}"
    return env.from_string(source).render(values)
