"""The ranking of likely mistakes in human labels: its table, its files, and what it shows."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv

from autolabel.manifests import storage
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.schemas import ROWS_AT_ONCE
from autolabel.manifests.tables import read_table, writing_table
from autolabel.manifests.wording import Shown, Table, counted, dimensions, number, probability
from autolabel.pipeline.analysis.doubt import LIKELY, Gathered, scores
from autolabel.pipeline.analysis.judges import Judge

TABLE, CSV, IDS = "errors.parquet", "errors.csv", "ids.txt"
ERRORS_SCHEMA = pa.schema(
    [
        ("rank", pa.int64()),
        ("sample_id", pa.string()),
        ("top", pa.int32()),
        ("left", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("human", pa.string()),
        ("suggested", pa.string()),
        ("score", pa.float64()),
        ("pixels", pa.int64()),
        ("region_pixels", pa.int64()),
        ("confidence", pa.float64()),
    ]
)
_MOST_PAIRS = 15  # pairs of classes that are printed
_MOST_FIRST = 5  # regions that are printed


@dataclass(frozen=True)
class LabelErrors(Shown):
    """A ranking in the folder `out`, and its account: images = judged + left out, by reason.

    likely: the numbers of regions and pixels with a score above LIKELY, by (human class, suggested class). doubtful:
    images with any doubt. regions: all that are listed. first: the likeliest, as rows of text for `tables`.
    """

    out: Path
    images: int
    judged: int
    left_out: dict[str, int]
    doubtful: int
    regions: int
    likely: dict[tuple[str, str], tuple[int, int]]
    first: tuple[tuple[str, ...], ...]
    notes: list[str]

    @property
    def table(self) -> pd.DataFrame:
        """The ranked regions, one row each; docs/errors.md has the columns."""
        rows: pd.DataFrame = read_table(self.out / TABLE, ERRORS_SCHEMA).to_pandas()
        return rows

    def lines(self) -> list[str]:
        """The account, and what is likely."""
        out = "".join(f", {number(count)} {why}" for why, count in self.left_out.items() if count)
        likely = sum(regions for regions, _ in self.likely.values())
        return [
            *self.notes,
            f"{counted(self.images, 'image')}: {number(self.judged)} judged{out}",
            f"{counted(self.regions, 'doubtful region')} in {counted(self.doubtful, 'image')},"
            f" {number(likely)} of them likely mistakes (score above {LIKELY:g})",
        ]

    def tables(self) -> list[Table]:
        """The likeliest regions; likely mistakes by class pair, the most frequent first."""
        tables = []
        if self.first:
            header = ["image", "x, y", "width × height", "people say", "the teacher says", "score"]
            tables.append(Table("the likeliest", header, self.first))
        if self.likely:
            ranked = sorted(self.likely.items(), key=lambda item: (-item[1][0], -item[1][1], item[0]))
            rows = [[*pair, number(regions), number(pixels)] for pair, (regions, pixels) in ranked[:_MOST_PAIRS]]
            more = len(ranked) - len(rows)
            notes = [f"and {counted(more, 'more pair')} of classes"] if more else []
            header = ["people say", "the teacher says", "regions", "pixels"]
            tables.append(Table("likely mistakes", header, rows, notes=notes))
        return tables


def rank(found: Sequence[Gathered], judges: Sequence[Judge], worst: int | None) -> pd.DataFrame:
    """All doubts that speak against people, the likeliest first, of the `worst` images; ties by image, then by size."""
    parts = []
    for one, judge in zip(found, judges, strict=True):
        image, doubts = one.all()
        score = scores(doubts, one.counts)
        kept = np.flatnonzero(score > 0)
        names = ("human", "suggested", "pixels", "region_pixels")
        columns = dict(zip(("top", "left", "height", "width"), doubts.box[kept].T, strict=True))
        columns |= {name: getattr(doubts, name)[kept] for name in names}
        confidence = (doubts.levels @ judge.middles)[kept] / columns["pixels"]
        parts.append(pd.DataFrame({"image": image[kept], "score": score[kept], "confidence": confidence, **columns}))
    whole = pd.concat(parts, ignore_index=True)
    whole = whole.take(np.lexsort((whole["image"], -whole["score"])))
    if worst is not None:
        whole = whole[whole["image"].isin(whole["image"].drop_duplicates()[:worst])]
    return whole.reset_index(drop=True)


def write_ranking(
    out: Path, ranked: pd.DataFrame, ids: Sequence[str], space: LabelSpace
) -> dict[tuple[str, str], tuple[int, int]]:
    """Write the table, the CSV and the ids; return the likely mistakes by class pair."""
    names = pa.array(space.names, pa.string())
    with writing_table(out / TABLE, ERRORS_SCHEMA) as write, storage.writing(out / CSV) as file:
        header = True
        for rows in _tables(ranked, ids, names):
            write(rows)
            text = io.BytesIO()
            pyarrow.csv.write_csv(rows, text, pyarrow.csv.WriteOptions(include_header=header))
            file.write(text.getvalue())
            header = False
    order = ranked["image"].drop_duplicates()
    storage.write(out / IDS, "".join(f"{ids[place]}\n" for place in order).encode())
    likely = ranked[ranked["score"] > LIKELY].groupby(["human", "suggested"])["pixels"].agg(["size", "sum"])
    return {
        (space.names[human], space.names[suggested]): (int(regions), int(pixels))
        for (human, suggested), (regions, pixels) in zip(likely.index, likely.to_numpy().tolist(), strict=True)
    }


def _tables(ranked: pd.DataFrame, ids: Sequence[str], names: pa.Array) -> Iterator[pa.Table]:
    for first in range(0, max(len(ranked), 1), ROWS_AT_ONCE):
        rows = ranked.iloc[first : first + ROWS_AT_ONCE]
        columns = {name: rows[name].to_numpy() for name in rows.columns if name != "image"}
        columns |= {
            "rank": np.arange(first + 1, first + 1 + len(rows)),
            "sample_id": pa.array([ids[place] for place in rows["image"]], pa.string()),
            **{name: names.take(pa.array(rows[name].to_numpy())) for name in ("human", "suggested")},
        }
        yield pa.table({name: columns[name] for name in ERRORS_SCHEMA.names}).cast(ERRORS_SCHEMA)


def first_rows(ranked: pd.DataFrame, ids: Sequence[str], space: LabelSpace) -> tuple[tuple[str, ...], ...]:
    """The likeliest regions as rows of text."""
    return tuple(
        (
            ids[row["image"]], f"{row['left']}, {row['top']}", dimensions(row["width"], row["height"]),
            space.names[row["human"]], space.names[row["suggested"]], probability(row["score"]),
        )
        for row in ranked[:_MOST_FIRST].to_dict("records")
    )  # fmt: skip
