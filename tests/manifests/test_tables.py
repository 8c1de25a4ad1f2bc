"""If a damaged or foreign table is read as ours, figures and labels are wrong without a word."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from tiny import write_table

from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.schemas import IMAGES_SCHEMA
from autolabel.manifests.tables import BadTable


@pytest.mark.parametrize("table", ["images", "classes", "centroids"])
def test_an_unfinished_run_has_no_statistics_and_says_so(tmp_path: Path, table: str) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(BadTable) as refusal:
        RunFolder(tmp_path).statistics(table)
    assert str(refusal.value) == (
        f"{tmp_path}/stats/{table}.parquet does not exist: finish the run first with `autolabel generate`"
    )


def test_statistics_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        {"sample_id": "a", "height": 6, "labelled_pixels": 40, "ignored_fraction": 1 / 6, "label_crc32c": 2**32 - 1}
    ]
    written = pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA)
    write_table(tmp_path / "stats/images.parquet", written)
    assert RunFolder(tmp_path).statistics().equals(written)
    assert RunFolder(tmp_path).statistics("images").equals(written)


def test_an_unknown_statistics_table_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refusal:
        RunFolder(tmp_path).statistics("pictures")
    assert str(refusal.value) == "no statistics table 'pictures': expected one of images, classes, centroids, review"


def test_a_damaged_statistics_table_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "stats/images.parquet", IMAGES_SCHEMA.empty_table())
    data = (tmp_path / "stats/images.parquet").read_bytes()
    (tmp_path / "stats/images.parquet").write_bytes(data[:-10])
    with pytest.raises(BadTable, match=r"images\.parquet is not a readable parquet file"):
        RunFolder(tmp_path).statistics()
