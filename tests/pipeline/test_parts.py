"""A run of many units publishes its tables in parts, by several processes; every reader takes them as one table.

If this fails, a long run has other statistics than a short one, or a part that was finished is made again for ever.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from autolabel.manifests.fuse import fuse
from autolabel.manifests.run import chapters, review
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import load_manifest, open_manifest
from autolabel.manifests.schemas import STATISTICS
from autolabel.manifests.tables import BadTable, part_path, parts_of, read_group, read_groups, table_sha256
from autolabel.pipeline import parts, publish
from autolabel.pipeline.analysis.stats import summarise
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.run import generate
from autolabel.pipeline.verify import verify


@pytest.fixture(scope="module")
def asked(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> LabelJob:
    folder = tmp_path_factory.mktemp("parts")
    asked = LabelJob(city / "coarse.parquet", teacher, folder / "whole", scales=(1.0,), unit_size=2)
    generate(asked)
    shutil.copytree(asked.out, folder / "parts")
    return asked


@pytest.fixture
def both(asked: LabelJob, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Run, LabelJob]:
    """The same run of five units with tables in one file each, and in parts of two units."""
    monkeypatch.setattr(chapters, "UNITS_OF_A_CHAPTER", 2)
    monkeypatch.setattr(publish, "cores", lambda: 2)
    again = dataclasses.replace(asked, out=asked.out.with_name("parts"))
    run = Run.open(again.out)
    if len(parts_of(run.statistics_path("images"))) == 1:
        dataclasses.replace(run, tables_sha256=None).save()
        assert generate(again).done == 0
    return Run.open(asked.out), Run.open(again.out), again


def test_parts_hold_the_same_rows_in_the_same_order_and_everybody_reads_them(both: tuple[Run, Run, LabelJob]) -> None:
    whole, run, _ = both
    assert run.accounts == whole.accounts and set(run.tables_sha256 or {}) == set(whole.tables_sha256 or {})
    for table in STATISTICS:
        path = run.statistics_path(table)
        names = [part.name for part in parts_of(path)]
        assert names == ["00000.parquet"] if table == "review" else ["00000.parquet", "00001.parquet", "00002.parquet"]
        assert run.statistics(table).equals(whole.statistics(table))
        assert [read_group(path, STATISTICS[table], n) for n in range(len(names))] == list(
            read_groups(path, STATISTICS[table])
        )
        assert pa.concat_tables(run.stream_statistics(table)).equals(whole.statistics(table))
        assert ds.dataset(path).to_table().equals(ds.dataset(whole.statistics_path(table)).to_table())
        assert pd.read_parquet(path).equals(pd.read_parquet(whole.statistics_path(table)))
    assert run.quarantine().equals(whole.quarantine())
    assert str(summarise(run).classes) == str(summarise(whole).classes)


def test_the_manifest_in_parts_is_a_manifest_and_so_is_each_part(
    both: tuple[Run, Run, LabelJob], tmp_path: Path
) -> None:
    whole, run, _ = both
    known = {
        s.sample_id: dataclasses.replace(s, label=None, run=None) for s in load_manifest(whole.manifest_path).samples
    }
    listed = load_manifest(run.manifest_path)
    assert {s.sample_id: dataclasses.replace(s, label=None, run=None) for s in listed.samples} == known
    assert listed.runs == (run.path,) and all(s.label and s.label.is_relative_to(run.path) for s in listed.samples)
    pieces = [load_manifest(part) for part in parts_of(run.manifest_path)]
    assert tuple(s for piece in pieces for s in piece.samples) == listed.samples
    fused = fuse([run.manifest_path], tmp_path / "fused.parquet", drop_worst=0.2)
    alone = fuse([whole.manifest_path], tmp_path / "alone.parquet", drop_worst=0.2)
    assert [s.sample_id for s in fused.manifest.samples] == [s.sample_id for s in alone.manifest.samples]


def test_a_call_with_nothing_to_do_makes_no_part_again(both: tuple[Run, Run, LabelJob]) -> None:
    _, run, again = both
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*.parquet")}
    assert generate(again).done == 0
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*.parquet")} == before


@pytest.mark.parametrize("change", ["flip", "gone"])
def test_a_damaged_part_is_found_by_verify(both: tuple[Run, Run, LabelJob], tmp_path: Path, change: str) -> None:
    shutil.copytree(both[1].path, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert verify(run.path).faults == []
    part = part_path(run.statistics_path("classes"), 1)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data) if change == "flip" else part.unlink()
    assert verify(run.path).faults == [f"{run.statistics_path('classes')} differs from what was published"]


def test_a_part_that_is_a_link_is_refused(both: tuple[Run, Run, LabelJob], tmp_path: Path) -> None:
    shutil.copytree(both[1].path, tmp_path / "run")
    part = part_path(Run.open(tmp_path / "run").statistics_path("images"), 0)
    part.unlink()
    part.symlink_to(part_path(both[1].statistics_path("images"), 0))
    with pytest.raises(ValueError, match="is a link"):
        Run.open(tmp_path / "run").statistics("images")


def test_a_table_changes_its_shape_with_the_run(
    both: tuple[Run, Run, LabelJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(both[1].path, tmp_path / "run")
    run, root = Run.open(tmp_path / "run"), open_manifest(both[2].manifest).image_root
    plan = publish.Plan(run.plan_path, 2, root, root)
    for size, name in ((8, "images.parquet"), (2, "00000.parquet")):
        monkeypatch.setattr(chapters, "UNITS_OF_A_CHAPTER", size)
        accounts, digests = publish.publish(run, plan, root, {})
        assert accounts == run.accounts and parts_of(run.statistics_path("images"))[0].name == name
        assert digests["stats/images.parquet"] == table_sha256(run.statistics_path("images"))


def test_a_damaged_record_is_named_by_the_process_that_reads_it(
    both: tuple[Run, Run, LabelJob], tmp_path: Path
) -> None:
    _, run, again = both
    shutil.copytree(run.path, tmp_path / "run")
    run = dataclasses.replace(Run.open(tmp_path / "run"), tables_sha256=None)
    run.save()
    chapter = run.path / "chapters" / "00001.records"
    data = bytearray(chapter.read_bytes())
    data[100] ^= 1
    chapter.write_bytes(data)
    with pytest.raises(BadTable, match=r"00001\.records is damaged"):
        plan = publish.Plan(run.plan_path, 2, *[open_manifest(again.manifest).image_root] * 2)
        publish.publish(run, plan, open_manifest(again.manifest).image_root, {})


def test_parts_of_closed_chapters_are_made_once(both: tuple[Run, Run, LabelJob], tmp_path: Path) -> None:
    whole, run, again = both
    shutil.copytree(run.path, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    again = dataclasses.replace(again, out=run.path)
    dataclasses.replace(run, tables_sha256=None).save()  # the copy's chapters are other files: all is made once more
    assert generate(again).done == 0
    (record,) = run.units.iterdir()  # that of the fifth unit: the others are in two chapters
    record.unlink()
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("0000?.parquet")}
    assert generate(again).done == 2
    changed = {path.relative_to(run.path).as_posix() for path, at in before.items() if path.stat().st_mtime_ns != at}
    assert changed == {
        *(f"stats/{name}.parquet/00002.parquet" for name in ("images", "classes", "centroids")),
        "stats/review.parquet/00000.parquet", "manifest.parquet/00002.parquet", "quarantine.parquet/00002.parquet",
    }  # fmt: skip
    assert run.statistics("review").equals(whole.statistics("review")) and verify(run.path).faults == []


def test_a_process_that_ends_by_itself_is_no_silence(
    both: tuple[Run, Run, LabelJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run, again = both
    monkeypatch.setattr(parts.sys, "executable", shutil.which("true") or os.devnull)
    plan = publish.Plan(run.plan_path, 2, *[open_manifest(again.manifest).image_root] * 2)
    with pytest.raises(OSError):
        publish.publish(run, plan, open_manifest(again.manifest).image_root, {"policy": "other"})


def test_a_ranking_that_is_merged_is_the_one_that_is_sorted_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    count = 5000
    images = pa.table(
        {
            "sample_id": [f"s{n:05d}" for n in rng.permutation(count)],
            "agreement_with_coarse": pa.array(rng.random(count)),
            "mean_confidence": pa.array(np.where(rng.random(count) < 0.1, np.nan, rng.integers(0, 9, count) / 8)),
            "ignored_fraction": pa.array(rng.random(count)),
            "coarse_pixels": pa.array(np.full(count, 8)),
        }
    )
    classes = pa.table(
        {
            "sample_id": images["sample_id"],
            "class_id": pa.array(rng.integers(0, 3, count), pa.int32()),
            "contradicted_pixels": pa.array(rng.integers(0, 2, count)),
        }
    )

    def ranked(name: str, size: int, *, in_parts: bool) -> Path:
        with review.writing_review(tmp_path / name, ("a", "b", "c"), parts=in_parts) as add:
            for first in range(0, count, size):
                add(images.slice(first, size), classes.slice(first, size))
        return tmp_path / name

    expected = pd.read_parquet(ranked("whole", 700, in_parts=False))
    monkeypatch.setattr(review, "IN_MEMORY", 600)
    monkeypatch.setattr(review, "ROWS_AT_ONCE", 200)
    monkeypatch.setattr(review, "_BLOCK", 64)
    merged = ranked("merged", 90, in_parts=True)
    assert len(parts_of(merged)) > 3 and pd.read_parquet(merged).equals(expected)
    assert list(expected["rank"]) == list(range(1, count + 1))
    before = table_sha256(merged)
    count = 1000
    assert len(parts_of(ranked("merged", 90, in_parts=True))) < 4 and table_sha256(merged) != before
