"""docs/statistics.md answers real questions. If this fails, its answers are wrong or its code does not run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import HEIGHT, ROOT, WIDTH

from autolabel.manifests.images import read_label
from autolabel.manifests.policy import Policy
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import load_manifest
from autolabel.manifests.schemas import STATISTICS
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.run import generate

PAGE = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
ANSWERS = {
    int(number): code
    for number, code in re.findall(r"^\*\*(\d+)\. .*?^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
}


@pytest.fixture(scope="module")
def folder(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    for name, threshold in (("auto", 0.35), ("strict", 0.5)):
        out = folder / "runs" / name
        generate(LabelJob(city / "coarse.parquet", teacher, out, (1.0,), policy=Policy(threshold=threshold)))
    return folder


@pytest.fixture
def ask(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the code of a question and gives its answer."""
    monkeypatch.chdir(folder)

    def answer(number: int) -> Any:
        names: dict[str, Any] = {}
        exec(ANSWERS[number], names)
        return names["answer"]

    return answer


@pytest.fixture(scope="module")
def labels(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return dict(Run.open(folder / "runs" / "auto").labels)


@pytest.fixture(scope="module")
def coarse(city: Path) -> dict[str, np.ndarray[Any, Any]]:
    manifest = load_manifest(city / "coarse.parquet")
    return {
        s.sample_id: read_label(s.coarse_label, manifest.label_space, ids="source")
        for s in manifest.samples
        if s.coarse_label
    }


def counts(labels: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return np.bincount(np.concatenate([label.ravel() for label in labels.values()]), minlength=256)[:19]


def test_statistics_md_has_ten_answers_in_pandas_pyarrow_and_duckdb() -> None:
    assert list(ANSWERS) == list(range(1, 11))
    for tongue in ("import duckdb", "import pandas", "import pyarrow"):
        assert sum(tongue in code for code in ANSWERS.values()) >= 2
    assert max(len(code.splitlines()) for code in ANSWERS.values()) <= 9


@pytest.mark.parametrize("name", STATISTICS)
def test_a_table_is_one_table_to_everyone_and_every_column_is_explained(folder: Path, name: str) -> None:
    path = folder / "runs" / "auto" / "stats" / f"{name}.parquet"
    table = pq.read_table(path)
    assert len(table) > 0 and table.schema.names == STATISTICS[name].names
    assert pd.read_parquet(path).shape == table.shape == duckdb.sql(f"from '{path}'").shape
    assert duckdb.sql(f"from '{path}'").columns == table.schema.names
    section = PAGE[PAGE.index(f"**`stats/{name}.parquet`**") :].split("\n\n")[1]
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]+)\|", section, re.MULTILINE)))) == set(
        table.schema.names
    )


def test_answer_1_gives_shares_before_and_after(ask: Any, labels: Any, coarse: Any, city: Path) -> None:
    names = load_manifest(city / "coarse.parquet").label_space.names
    found = ask(1).set_index("class_name")
    auto, human = counts(labels), counts(coarse)
    assert {names[c] for c in np.flatnonzero(auto + human)} <= set(found.index)
    for name, row in found.iterrows():
        assert row["auto_share"] == pytest.approx(auto[names.index(name)] / auto.sum())
        assert row["coarse_share"] == pytest.approx(human[names.index(name)] / human.sum())
    assert (found["auto_share"] - found["coarse_share"]).is_monotonic_increasing


def test_answer_2_sorts_cities_by_confidence(ask: Any, labels: Any) -> None:
    found = ask(2)
    assert found["images"].sum() == 10 and found["confidence"].is_monotonic_increasing
    for row in found.itertuples():
        ours = [label for name, label in labels.items() if name.split("_")[0] == row.city]
        assert row.images == len(ours) and row.ignored == pytest.approx(np.mean([(x == 255).mean() for x in ours]))


def test_answer_3_gives_the_coverage_of_another_threshold(ask: Any, folder: Path) -> None:
    found = ask(3)
    rows = pq.read_table(folder / "runs" / "auto" / "stats" / "classes.parquet").to_pylist()
    for name in found.index:
        histograms = [row["confidence_hist"] for row in rows if row["class_name"] == name]
        total, kept = sum(map(sum, histograms)), sum(sum(h[14:]) for h in histograms)
        assert found[name] == kept / total if total else np.isnan(found[name])
    assert found.max() > 0


def test_answer_4_lists_the_images_to_look_at(ask: Any, labels: Any, coarse: Any, folder: Path) -> None:
    found = ask(4).to_pylist()
    assert [row["rank"] for row in found] == [1, 2, 3, 4, 5]
    trust = {}
    for row in pq.read_table(folder / "runs" / "auto" / "stats" / "images.parquet").to_pylist():
        auto, human = labels[row["sample_id"]], coarse[row["sample_id"]]
        contradicted = ((human != 255) & (auto != 255) & (auto != human)).sum() / (human != 255).sum()
        trust[row["sample_id"]] = (1 - contradicted) * row["mean_confidence"]
    assert {row["sample_id"]: row["trust"] for row in found} == pytest.approx(
        dict(sorted(trust.items(), key=lambda item: item[1])[:5])
    )


def test_answer_5_gives_what_was_contradicted(ask: Any, labels: Any, coarse: Any, city: Path) -> None:
    found = ask(5)
    auto, human = (np.concatenate([x[name].ravel() for name in sorted(labels)]) for x in (labels, coarse))
    for c, name in enumerate(load_manifest(city / "coarse.parquet").label_space.names):
        drawn = human == c
        assert (name in found.index) == drawn.any()
        if drawn.any():
            assert found[name] == ((auto != c) & (auto != 255) & drawn).sum() / drawn.sum()


def test_answer_6_sorts_images_by_their_share_of_road(ask: Any, labels: Any) -> None:
    expected = {name: (label == 0).mean() for name, label in labels.items()}
    found = ask(6).to_pylist()
    assert found and set(found) == {name for name, share in expected.items() if share >= 0.1}
    assert [expected[name] for name in found] == sorted((expected[name] for name in found), reverse=True)


def test_answer_7_gives_the_time_by_worker(ask: Any, folder: Path) -> None:
    found = ask(7)
    rows = pq.read_table(folder / "runs" / "auto" / "stats" / "images.parquet").to_pylist()
    assert set(found.index) == {row["worker"] for row in rows} and found["images"].sum() == 10
    assert found["infer_ms"].sum() == pytest.approx(sum(row["infer_ms"] for row in rows) / 1000, rel=1e-5)


def test_answer_8_gives_the_bytes_an_image(ask: Any) -> None:
    found = ask(8)
    assert 0 < found["bytes_an_image"] < HEIGHT * WIDTH
    assert found["gigabytes_a_million"] == pytest.approx(found["bytes_an_image"] / 1000)


def test_answer_9_finds_images_that_are_listed_twice(
    ask: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(ask(9)) == 0
    table = pq.read_table(folder / "runs" / "auto" / "stats" / "images.parquet")
    row = table.slice(3, 1)
    twin = row.set_column(0, "sample_id", [["twin"]])
    (tmp_path / "runs" / "auto" / "stats").mkdir(parents=True)
    pq.write_table(pa.concat_tables([table, twin]), tmp_path / "runs" / "auto" / "stats" / "images.parquet")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(ANSWERS[9], names)
    (samples,) = names["answer"]["samples"]
    assert sorted(samples) == sorted([row["sample_id"][0].as_py(), "twin"])


def test_answer_10_compares_two_runs(ask: Any, labels: Any, folder: Path, city: Path) -> None:
    names = load_manifest(city / "coarse.parquet").label_space.names
    strict = counts(dict(Run.open(folder / "runs" / "strict").labels))
    auto = counts(labels)
    found = ask(10).set_index("class_name")
    for name, row in found.iterrows():
        c = names.index(name)
        assert row["auto_share"] == pytest.approx(auto[c] / auto.sum())
        assert row["strict_share"] == pytest.approx(strict[c] / strict.sum())
