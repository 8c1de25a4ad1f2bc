"""The page opens from disk and shows what the run did. If this fails, nobody looks before they train."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from autolabel.manifests.stores import open_labels
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.report import write_report
from autolabel.pipeline.run import generate


@pytest.fixture(scope="module")
def finished(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("report") / "run"
    generate(LabelJob(city / "coarse.parquet", teacher, run, scales=(1.0,), engine="local"))
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def pictures(page: Path) -> list[str]:
    return re.findall(r'<img[^>]+src="([^"]+)"', page.read_text(encoding="utf-8"))


def test_every_image_is_shown_four_ways_and_every_picture_is_there(run: Path) -> None:
    page = write_report(run, 2, (), None, lambda done, total: None)
    shown = pictures(page)
    kinds = [re.search(r"-(photograph|coarse|auto|confidence)-", name) for name in shown]
    assert [kind and kind.group(1) for kind in kinds] == ["photograph", "coarse", "auto", "confidence"] * 2
    assert all((page.parent / name).is_file() for name in shown)
    text = page.read_text(encoding="utf-8")
    assert "http://" not in text.replace("http://www.w3.org", "") and "<script" not in text


def test_a_new_report_replaces_the_pictures_of_the_old_one(run: Path) -> None:
    write_report(run, 3, (), None, lambda done, total: None)
    chosen = next(iter(open_labels(run)))
    page = write_report(run, 8, (chosen,), None, lambda done, total: None)
    on_disk = {path.name for path in page.parent.iterdir()} - {"index.html"}
    assert on_disk == set(pictures(page)) and len(on_disk) == 4


def test_without_its_teacher_the_page_says_what_is_missing(run: Path, tmp_path: Path) -> None:
    about = (run / "run.json").read_text()
    (run / "run.json").write_text(re.sub(r'"teacher": "[^"]+"', f'"teacher": "{tmp_path}/gone.pt"', about))
    page = write_report(run, 1, (), None, lambda done, total: None)
    assert [name for name in pictures(page) if "confidence" in name] == []
    assert "--teacher" in page.read_text(encoding="utf-8")


def test_an_unknown_sample_is_named(run: Path) -> None:
    with pytest.raises(ValueError, match="sample 'atlantis' has no label"):
        write_report(run, 1, ("atlantis",), None, lambda done, total: None)
