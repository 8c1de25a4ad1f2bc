"""The page opens from disk and shows what the run did. If this fails, nobody looks before they train."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from autolabel.manifests.classes import CITYSCAPES
from autolabel.manifests.images import read_image
from autolabel.manifests.stores import open_labels
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.report import write_report
from autolabel.pipeline.run import generate
from autolabel.teacher.build import build
from autolabel.teacher.checkpoints import save_checkpoint
from autolabel.teacher.predict import load_teacher


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


def kinds(page: Path) -> list[str]:
    """Of the pictures, from top to bottom."""
    return [name.split("-")[-2] for name in pictures(page)]


def nothing(done: int, total: int) -> None:
    pass


def test_every_image_is_shown_four_ways_and_every_picture_is_there(run: Path) -> None:
    page = write_report(run, 2, (), None, nothing)
    assert kinds(page) == ["photograph", "coarse", "auto", "confidence"] * 2
    assert all((page.parent / name).is_file() for name in pictures(page))
    text = page.read_text(encoding="utf-8")
    assert "http://" not in text.replace("http://www.w3.org", "") and "<script" not in text


def test_a_new_report_replaces_the_pictures_of_the_old_one(run: Path) -> None:
    write_report(run, 3, (), None, nothing)
    chosen = next(iter(open_labels(run)))
    page = write_report(run, 8, (chosen,), None, nothing)
    on_disk = {path.name for path in page.parent.iterdir()} - {"index.html"}
    assert on_disk == set(pictures(page)) and len(on_disk) == 4


def test_without_its_teacher_the_page_says_what_is_missing(run: Path, tmp_path: Path) -> None:
    about = (run / "run.json").read_text()
    (run / "run.json").write_text(re.sub(r'"teacher": "[^"]+"', f'"teacher": "{tmp_path}/gone.pt"', about))
    page = write_report(run, 1, (), None, nothing)
    assert [name for name in pictures(page) if "confidence" in name] == []
    assert "No confidence maps: " in page.read_text(encoding="utf-8")
    page = write_report(run, 1, (), None, nothing, attention=True)
    assert kinds(page) == ["photograph", "coarse", "auto"]
    text = page.read_text(encoding="utf-8")
    assert "no attention" in text and "--teacher" in text


def test_an_unknown_sample_is_named(run: Path) -> None:
    with pytest.raises(ValueError, match="sample 'atlantis' has no label"):
        write_report(run, 1, ("atlantis",), None, nothing)


# --- what every scale says --------------------------------------------------------------------------------------------


def labelled(city: Path, checkpoint: Path, out: Path, scales: tuple[float, ...], combine: str = "network") -> Path:
    generate(LabelJob(city / "coarse.parquet", checkpoint, out, scales, combine=combine, engine="local", limit=2))
    return out


def untrained(arch: str, path: Path) -> Path:
    torch.manual_seed(0)
    network = build(arch, len(CITYSCAPES), scales=2)
    for weights in network.scale_attn.parameters():
        torch.nn.init.normal_(weights, std=1.0)  # sure of itself without any reason
    save_checkpoint(path, arch, CITYSCAPES, network, torch.zeros(0, dtype=torch.int64), {})
    return path


@pytest.fixture(scope="module")
def scaled(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled(city, teacher, tmp_path_factory.mktemp("scaled") / "run", (0.5, 1.0, 2.0))


FOUR = ["photograph", "coarse", "auto", "confidence"]


def test_attention_adds_each_scale_with_its_share_and_the_combined_prediction(scaled: Path) -> None:
    page = write_report(scaled, 2, (), None, nothing, attention=True)
    assert kinds(page) == [*FOUR, *["prediction", "attention"] * 3, "combined"] * 2
    assert all((page.parent / name).is_file() for name in pictures(page))
    text = page.read_text(encoding="utf-8")
    for scale in ("0.5×", "1×", "2×"):
        assert f"<b>Prediction at {scale}</b>" in text and f"<b>Attention for {scale}</b>" in text
    assert text.count("<span>what the others leave,</span>") == 2  # the highest scale of both images
    write_report(scaled, 2, (), None, nothing)
    assert kinds(page) == FOUR * 2  # only when it is asked for, and the pictures are gone again
    assert {path.name for path in page.parent.iterdir()} - {"index.html"} == set(pictures(page))


def test_shares_are_those_by_which_the_predictions_become_the_combined_one(city: Path, teacher: Path) -> None:
    network, image = load_teacher(teacher, "cpu"), read_image(next((city / "data").rglob("*_leftImg8bit.png")))
    views = network.views(image, (1.0, 0.5, 2.0))
    assert [view.scale for view in views] == [0.5, 1.0, 2.0]
    half, one, _ = (part.attention for part in network.parts(image, (0.5, 1.0, 2.0)))
    assert half is not None and one is not None and 0 < views[0].share.min() < views[0].share.max() < 1
    np.testing.assert_allclose(sum(view.share for view in views), 1, atol=1e-5)
    np.testing.assert_allclose(views[0].share.mean(), half.mean().item(), atol=0.02)
    combined = network.confidence(image, (0.5, 1.0, 2.0))[0]
    alike = [float((view.label == combined).mean()) for view in views]
    assert all(view.label.shape == view.share.shape == combined.shape for view in views) and max(alike) > 0.5


def test_scales_that_count_equally_have_no_attention_and_the_page_says_so(
    city: Path, teacher: Path, tmp_path: Path
) -> None:
    run = labelled(city, teacher, tmp_path / "run", (0.5, 1.0), "average")
    page = write_report(run, 1, (), None, nothing, attention=True)
    assert kinds(page) == [*FOUR, "prediction", "prediction", "combined"]
    assert "they count equally everywhere" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("arch", ["hrnet18s_ocr_explicit", "hrnet18s_ocr_explicit_pairs", "hrnet18s_ocr_mscale2"])
def test_every_kind_of_attention_can_be_shown(city: Path, tmp_path: Path, arch: str) -> None:
    run = labelled(city, untrained(arch, tmp_path / "net.pt"), tmp_path / "run", (0.5, 1.0))
    page = write_report(run, 1, (), None, nothing, attention=True)
    assert kinds(page) == [*FOUR, *["prediction", "attention"] * 2, "combined"]
    text = page.read_text(encoding="utf-8")
    assert ("need not add up to 1" in text) == ("explicit" in arch)
    assert ("<span>in truth " in text) == (arch == "hrnet18s_ocr_explicit")  # the others' are sigmoids


def test_one_scale_needs_no_attention(run: Path) -> None:
    page = write_report(run, 1, (), None, nothing, attention=True)
    assert kinds(page) == FOUR and "looks at one scale only" in page.read_text(encoding="utf-8")


def test_a_run_from_before_there_was_a_choice_of_combination_is_shown(scaled: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(scaled, tmp_path / "run"))
    about = json.loads((run / "run.json").read_text())
    del about["combine"]
    (run / "run.json").write_text(json.dumps(about))
    assert "attention" in kinds(write_report(run, 1, (), None, nothing, attention=True))


def test_where_a_photograph_is_gone_there_is_nothing_by_scale_and_the_reason_is_there(
    scaled: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(scaled, tmp_path / "further" / "down" / "run"))  # its images are found from its place
    page = write_report(moved, 1, (), None, nothing, attention=True)
    assert kinds(page) == ["coarse", "auto"] and "is gone" in page.read_text(encoding="utf-8")
