"""Look at images of a run in a notebook: photograph, coarse label and auto label side by side."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from autolabel.manifests.drawing import draw_label, encode_flat, encode_smooth, shrink
from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.places import without_void
from autolabel.manifests.run.folder import Run
from autolabel.manifests.wording import counted, probability
from autolabel.pipeline.report.gallery import choose
from autolabel.pipeline.report.layers import Layers, Missing, Sources

_LONGEST = 480  # pixels of a picture's longer side


@dataclass(frozen=True)
class ImageRow:
    """One image: its pictures as WebP by title, or the reason why one is missing; the ids of its classes."""

    sample_id: str
    trust: float
    pictures: dict[str, bytes | str]
    class_ids: frozenset[int]


@dataclass(frozen=True)
class Look:
    """Images of a run with their labels; a notebook shows them, with the pictures inside the cell."""

    run: Run
    rows: Sequence[ImageRow]

    def __str__(self) -> str:
        names = ", ".join(row.sample_id for row in self.rows)
        return f"{self.run.path}: {counted(len(self.rows), 'image')} ({names}); a notebook shows them"

    def _repr_html_(self) -> str:
        seen = frozenset[int]().union(*(row.class_ids for row in self.rows))
        legend = "".join(
            f'<span style="margin-right:1em;white-space:nowrap"><i style="display:inline-block;width:.9em;height:.9em;'
            f'background:rgb{c.colour}"></i> {html.escape(c.name)}</span>'
            for id, c in enumerate(self.run.label_space.classes)
            if id in seen
        )
        return f"<div>{legend}</div>" + "".join(map(_row, self.rows))


def look(run: Run | Path, n: int = 6, *, samples: Sequence[str] = ()) -> Look:
    """Look at `n` images of a finished run, mostly the least trusted, or at the named `samples`.

    A picture that cannot be drawn gives its reason. Raises BadTable if the run is not finished, ValueError for a sample
    without a label.
    """
    run = Run.open(run)
    review = run.statistics("review", ["sample_id", "trust"]).to_pydict()
    trust = dict(zip(review["sample_id"], review["trust"], strict=True))
    labelled = set(run.labels)
    ranked = [name for name in trust if name in labelled]
    for name in samples:
        if name not in ranked:
            raise ValueError(f"sample {name!r} has no label in {run.path}: name one of its {len(ranked)} labelled ones")
    chosen = list(samples) or choose(ranked, n)
    has_coarse = any(run.statistics("images", ["coarse_pixels"])["coarse_pixels"].to_pylist())
    sources = Sources(run, chosen, coarse=has_coarse)
    return Look(run, [_drawn(run, name, trust[name], sources.read(name)) for name in chosen])


def _drawn(run: Run, sample_id: str, trust: float, layers: Layers) -> ImageRow:
    pictures: dict[str, bytes | str] = {}
    if isinstance(layers.photograph, Missing):
        pictures["photograph"] = str(layers.photograph)
    else:
        photograph = shrink(Image.fromarray(layers.photograph), _LONGEST, how=Image.Resampling.LANCZOS)
        pictures["photograph"] = encode_smooth(photograph)
    ids: set[int] = set()
    coarse = without_void(layers.coarse) if isinstance(layers.coarse, np.ndarray) else layers.coarse
    for title, label in (("coarse label", coarse), ("auto label", layers.auto)):
        if isinstance(label, Missing):
            pictures[title] = str(label)
        elif label is not None:
            small = shrink(draw_label(label, run.label_space), _LONGEST, how=Image.Resampling.NEAREST)
            pictures[title] = encode_flat(small)
            ids |= set(np.unique(label).tolist()) - {IGNORE}
    return ImageRow(sample_id, trust, pictures, frozenset(ids))


def _row(row: ImageRow) -> str:
    name = html.escape(row.sample_id)
    figures = "".join(
        f'<figure style="flex:1;margin:0;min-width:0">{_picture(picture, f"{title} of {name}")}'
        f"<figcaption>{title}</figcaption></figure>"
        for title, picture in row.pictures.items()
    )
    heading = f"<b>{name}</b> trust {probability(row.trust)}"
    return f'<div style="margin-top:1em">{heading}<div style="display:flex;gap:8px">{figures}</div></div>'


def _picture(picture: bytes | str, text: str) -> str:
    if isinstance(picture, str):
        return f"<p>{html.escape(picture)}</p>"
    url = "data:image/webp;base64," + base64.b64encode(picture).decode()
    return f'<img src="{url}" alt="{text}" style="width:100%">'
