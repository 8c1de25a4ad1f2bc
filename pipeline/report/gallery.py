"""The gallery of a report: which images it shows, in which order, and what its script knows of each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from autolabel.manifests.drawing import DISAGREEMENT
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.pages import without_folders
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import Sample
from autolabel.manifests.schemas import FATES
from autolabel.pipeline.analysis.stats import FATE_NAMES
from autolabel.pipeline.report.painter import Painted, ScalePicture
from autolabel.pipeline.report.pictures import FATE_OVERLAY, KINDS, Drawn

_WORST = 0.75  # share of the images shown that are the least trusted; the others are spread over the rest


def choose(ranked: Sequence[str], count: int) -> list[str]:
    """Choose up to `count` sample ids in their order: mostly the first ones, then some spread over the rest.

    The same ids always give the same choice.
    """
    if len(ranked) <= count:
        return list(ranked)
    worst = math.ceil(_WORST * count)
    rest, more = ranked[worst:], count - worst
    return [*ranked[:worst], *(rest[(2 * k + 1) * len(rest) // (2 * more)] for k in range(more))]


@dataclass(frozen=True)
class Card:
    """One image: its rank and statistics, its classes as (id, auto pixels, coarse pixels), and its pictures.

    A number that does not exist is None. fates: pixels by fate, of those that occur.
    """

    sample_id: str
    group: str
    width: int
    height: int
    rank: int
    trust: float | None
    confidence: float | None
    agreement: float | None
    ignored: float | None
    classes: list[tuple[int, int, int]]
    fates: dict[str, int]
    pictures: Drawn
    by_scale: list[ScalePicture]

    def data(self) -> dict[str, Any]:
        """The card as JSON values."""
        pixels = self.height * self.width
        return {
            "id": self.sample_id,
            "group": self.group,
            "size": [self.width, self.height],
            "rank": self.rank,
            "trust": self.trust,
            "confidence": self.confidence,
            "agreement": self.agreement,
            "ignored": self.ignored,
            "stem": self.pictures.stem,
            "kinds": self.pictures.kinds,
            "missing": {kind: without_folders(reason) for kind, reason in self.pictures.missing.items()},
            "full": self.pictures.size,
            "fates": [[fate, round(count / pixels, 6)] for fate, count in self.fates.items()],
            "specks": self.pictures.specks and self.pictures.specks.data(),
            "disagreement": [round(share, 4) for share in self.pictures.disagreement.values()],
            "classes": [(i, round(auto / pixels, 6), round(coarse / pixels, 6)) for i, auto, coarse in self.classes],
        }


@dataclass(frozen=True)
class Gallery:
    """The cards, the name of the folder with their pictures, and the number of images in the run.

    key: the name under which a browser keeps the marks of this run; title: the name of the run.
    """

    cards: list[Card]
    folder: str
    images: int
    space: LabelSpace
    key: str
    title: str

    @property
    def kinds(self) -> list[str]:
        """The layers that some image has."""
        return [kind for kind in KINDS if any(kind in card.pictures.kinds for card in self.cards)]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The groups of the images, with their numbers of images."""
        return sorted(Counter(card.group for card in self.cards).items())

    @property
    def class_counts(self) -> list[tuple[int, str, int]]:
        """Id, name and number of images of every class that some auto label has."""
        counts = Counter(i for card in self.cards for i, auto, _ in card.classes if auto)
        return [(i, name, counts[i]) for i, name in enumerate(self.space.names) if counts[i]]

    @property
    def legend(self) -> list[tuple[str, str]]:
        """Name and colour of the classes in the labels of the images shown, those with most pixels first."""
        pixels: Counter[int] = Counter()
        for card in self.cards:
            pixels.update({i: auto + coarse for i, auto, coarse in card.classes})
        return [(self.space.classes[i].name, f"rgb{self.space.classes[i].colour}") for i, _ in pixels.most_common()]

    @property
    def reduced(self) -> int:
        """The number of images whose pictures are smaller than they are."""
        return sum(
            card.pictures.size != (card.width, card.height) for card in self.cards if "auto" in card.pictures.kinds
        )

    def data(self) -> dict[str, Any]:
        """The gallery as JSON values, for the script of the page."""
        return {
            "key": self.key,
            "title": self.title,
            "folder": self.folder,
            "images": self.images,
            "classes": [[c.name, list(c.colour)] for c in self.space.classes],
            "fates": [[fate, FATE_NAMES[fate], colour] for fate, colour in FATE_OVERLAY.items()],
            "comparison": list(DISAGREEMENT.values()),
            "cards": [card.data() for card in self.cards],
        }


def cards(
    run: Run, painted: Mapping[str, Painted], *, ranked: pd.DataFrame, samples: Mapping[str, Sample]
) -> list[Card]:
    """The cards of the painted samples; `ranked` has their statistics and ranks, by sample id."""
    ids = pa.array(list(painted), pa.string())
    classes: dict[str, list[tuple[int, int, int]]] = {}
    fates: dict[str, Counter[str]] = {}
    columns = ["sample_id", "class_id", "pixels", "coarse_pixels", *(f"{fate}_pixels" for fate in FATES)]
    for rows in run.stream_statistics("classes", columns):
        for row in rows.filter(pc.is_in(rows["sample_id"], ids)).to_pylist():
            if row["pixels"] or row["coarse_pixels"]:
                counts = row["class_id"], row["pixels"], row["coarse_pixels"]
                classes.setdefault(row["sample_id"], []).append(counts)
            counted = {fate: row[f"{fate}_pixels"] for fate in FATES if row[f"{fate}_pixels"]}
            fates.setdefault(row["sample_id"], Counter()).update(counted)

    def number(value: float) -> float | None:
        return None if math.isnan(value) else round(float(value), 6)

    return [
        Card(
            sample_id=sample_id,
            group=samples[sample_id].group,
            width=row["width"],
            height=row["height"],
            rank=row["rank"],
            trust=number(row["trust"]),
            confidence=number(row["mean_confidence"]),
            agreement=number(row["agreement_with_coarse"]),
            ignored=number(row["ignored_fraction"]),
            classes=sorted(classes.get(sample_id, []), key=lambda c: -c[1]),
            fates={fate: count for fate in FATES if (count := fates.get(sample_id, Counter())[fate])},
            pictures=painted[sample_id].pictures,
            by_scale=painted[sample_id].by_scale,
        )
        for sample_id, row in zip(painted, ranked.loc[list(painted)].to_dict("records"), strict=True)
    ]
