"""A run with a focus: its labels are the teacher's, its counts are true, and it cannot be mixed with another.

If this fails, a label is called certified that is not, or a run has labels of two kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import autolabel, labels_of
from focused import SCALES, SEEN, certificate, columns, drive_of, job
from PIL import Image

from autolabel.manifests.class_map import ClassMap
from autolabel.manifests.focus import Focus
from autolabel.manifests.images import read_image
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.policy import Policy
from autolabel.manifests.recipe import Machine
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import load_manifest
from autolabel.pipeline import prepare
from autolabel.pipeline.analysis.confidences import TeacherConfidences
from autolabel.pipeline.analysis.stats import summarise
from autolabel.pipeline.job import Portion
from autolabel.pipeline.predictor import Decoded, TeacherPredictor
from autolabel.pipeline.relabel import relabel
from autolabel.pipeline.report.pictures import mark_rows
from autolabel.pipeline.report.write import write_report
from autolabel.pipeline.run import generate
from autolabel.teacher.decide import Prediction
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.memory import BATCH_PIXELS, planned_batch


@pytest.fixture(scope="module")
def drive(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drive_of(city, tmp_path_factory.mktemp("focus"))


@pytest.fixture(scope="module")
def run(drive: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("focus") / "run"
    result = generate(job(drive, teacher, out, focus=certificate(teacher), keep_confidence=8))
    assert any("certified" in line for line in result.lines())
    return out


# --- labels and counts ------------------------------------------------------------------------------------------------


def test_labels_and_rows_are_those_of_the_teacher_with_the_same_focus(run: Path, drive: Path, teacher: Path) -> None:
    network = load_teacher(teacher, device="cpu")
    images = [read_image(s.image) for s in load_manifest(drive).samples]
    labels, _ = network.label(np.stack(images), scales=SCALES, focus=0.25)
    whole, _ = network.label(np.stack(images), scales=SCALES)
    assert [label.tobytes() for label in labels] == list(labels_of(run).values())
    assert 0 < (labels != whole).mean() < 0.2
    assert set(columns(run, "images", "focus_top", "focus_bottom")) <= set(SEEN)


def test_counts_are_those_of_a_plain_loop(run: Path, drive: Path, teacher: Path) -> None:
    network, opened = load_teacher(teacher, device="cpu"), Run.open(run)
    swings = np.array([opened.recipe.focus.within, opened.recipe.focus.beyond], np.float32)  # type: ignore[union-attr]
    names = ("sample_id", "class_id", "kept_pixels", "unfocused_pixels", "certified_pixels")
    counted = {(sample, c): tuple(more) for sample, c, *more in columns(run, "classes", *names)}
    fractions = dict(columns(run, "images", "sample_id", "certified_fraction"))
    for sample in load_manifest(drive).samples:
        image = read_image(sample.image)
        (said,) = network.predict_in_batches(
            image[None], 1, edges=(0.5,), scales=SCALES, focus=0.25, swings=swings
        )  # fmt: skip
        assert said.seen is not None and said.least is not None
        top, level = np.divmod(said.codes, 2)
        outside = np.ones(top.shape, np.bool_)
        outside[slice(*said.seen)] = False
        certain = (level == 1) & (said.least == 1)
        mine = {c: counts for (name, c), counts in counted.items() if name == sample.sample_id}
        assert mine == {
            c: tuple(int(((top == c) & where).sum()) for where in (level == 1, outside, certain)) for c in mine
        }
        assert fractions[sample.sample_id] == certain.sum() / (level == 1).sum()
        assert 0 < certain.sum() < (level == 1).sum()


def test_the_summary_says_what_was_seen(run: Path) -> None:
    seen = columns(run, "images", "focus_top", "focus_bottom")
    rows = sum(bottom - top for top, bottom in seen) / (4 * 96)
    kept, certified = (sum(c for (c,) in columns(run, "classes", name)) for name in ("kept_pixels", "certified_pixels"))
    line = (
        f"the highest scale saw {100 * rows:.1f} % of the rows, and {100 * (1 - rows):.1f} % of the pixels never;"
        f" {100 * certified / kept:.1f} % of the kept pixels are certified"
    )
    assert line in summarise(run).lines() and line in autolabel("stats", run).output


def test_without_a_focus_there_is_nothing_to_say(drive: Path, teacher: Path, tmp_path: Path) -> None:
    result = generate(job(drive, teacher, tmp_path / "run", focus=None, portion=Portion(limit=1), scales=(1.0,)))
    nothing = columns(tmp_path / "run", "images", "focus_top", "focus_bottom", "certified_fraction")
    assert nothing == [(None, None, None)]
    assert set(columns(tmp_path / "run", "classes", "unfocused_pixels", "certified_pixels")) == {(None, None)}
    assert summarise(tmp_path / "run").focus is None and not any("highest scale" in x for x in result.lines())
    assert job(drive, teacher, tmp_path, focus=1.0).focus is None


def test_relabelled_rows_seen_are_kept_and_certified_pixels_are_not_known(run: Path, tmp_path: Path) -> None:
    again = relabel(Run.open(run), Policy(threshold=run_edge(run)), out=tmp_path / "again").run
    assert again.recipe.focus == Focus(0.25)
    for table, names in (
        ("images", ["sample_id", "focus_top", "focus_bottom"]),
        ("classes", ["sample_id", "class_id", "unfocused_pixels"]),
    ):
        assert columns(again.path, table, *names) == columns(run, table, *names)
    assert {row[0] for row in columns(again.path, "classes", "certified_pixels")} == {None}
    assert {row[0] for row in columns(again.path, "images", "certified_fraction")} == {None}
    assert str(summarise(again.path).focus) == str(replace(summarise(run).focus, certified=None))  # type: ignore[type-var]


def run_edge(run: Path) -> float:
    """A threshold that a run with kept confidence can tell, and did not use."""
    edges = Run.open(run).recipe.confidence_edges
    assert edges is not None
    return edges[-1]


def test_audits_let_the_teacher_look_as_the_run_did(run: Path, drive: Path, teacher: Path) -> None:
    network, sample = load_teacher(teacher, device="cpu"), load_manifest(drive).samples[0]
    top, confidence = TeacherConfidences(network, Run.open(run), Policy()).of("", sample, None)
    again = network.confidence(read_image(sample.image), scales=SCALES, focus=0.25)
    assert (top == again[0]).all() and (confidence == again[1]).all()
    assert (confidence != network.confidence(read_image(sample.image), scales=SCALES)[1]).any()


# --- the same labels, whoever makes them ------------------------------------------------------------------------------


class LikeAGPU(TeacherPredictor):
    """A teacher on the CPU that is fed as a GPU is."""

    def __init__(self, teacher: Path, run: Run) -> None:
        super().__init__(load_teacher(teacher, device="cpu"), run.recipe)
        self.device, self.batches = "cuda", list[int]()

    def predict(self, batch: Sequence[Decoded]) -> list[Prediction]:
        self.batches.append(len(batch))
        return super().predict(batch)

    def in_flight(self, size: tuple[int, int], *, most: int) -> int:
        return most


def counted(run: Path) -> list[list[tuple[Any, ...]]]:
    """Labels and counts of a run."""
    names = ("sample_id", "class_id", "pixels", "unfocused_pixels", "certified_pixels")
    seen = columns(run, "images", "sample_id", "label_crc32c", "focus_top", "focus_bottom", "certified_fraction")
    return [seen, columns(run, "classes", *names)]


def test_other_workers_units_and_a_call_that_was_stopped_change_nothing(
    run: Path, drive: Path, teacher: Path, tmp_path: Path
) -> None:
    asked = job(
        drive, teacher, tmp_path / "run", focus=certificate(teacher), unit_size=3, machine=Machine("local", 2),
        portion=Portion(limit=2), keep_confidence=8,
    )  # fmt: skip
    assert generate(asked).accounts.left == 2
    generate(replace(asked, portion=Portion(), machine=Machine()))
    assert counted(asked.out) == counted(run) and labels_of(asked.out) == labels_of(run)


def test_a_batch_of_two_makes_the_labels_of_single_images(
    drive: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for images in (1, 2):
        pixels = images * 96 * 192 * 5
        monkeypatch.setattr(prepare, "batch_pixels", lambda device, pixels=pixels: pixels)
        asked = job(drive, teacher, tmp_path / str(images), focus=certificate(teacher), portion=Portion(limit=2))
        made = list[LikeAGPU]()

        def predictor(run: Run, device: str, made: list[LikeAGPU] = made) -> LikeAGPU:
            made.append(LikeAGPU(teacher, run))
            return made[0]

        generate(asked, predictor=predictor)
        assert made[0].batches == [images] * (2 // images) and made[0].planned_batch((96, 192)) == images
        runs.append((counted(asked.out), labels_of(asked.out)))
    assert runs[0] == runs[1]


def test_a_batch_has_more_images_where_the_highest_scale_sees_a_part_of_them() -> None:
    whole, part = (
        planned_batch(1024, 2048, scales=(0.5, 1, 2), pixels=2 * BATCH_PIXELS, focus=f) for f in (None, 0.25)
    )
    assert (whole, part) == (2, 4)  # 5.25 times the pixels of an image; 2.5 times, its halo included
    assert planned_batch(64, 64, scales=(1, 2), pixels=5 * 64 * 64, focus=0.5) == 1  # it is seen whole


@pytest.mark.parametrize("settings", [{"flip": True}, {"combine": "average"}, {"class_map": "coarser"}])
def test_flips_means_and_class_maps_have_a_focus_too(
    drive: Path, teacher: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    if "class_map" in settings:
        settings = {
            "class_map": ClassMap.of(
                {"classes": {name: [name] for name in CITYSCAPES.names[:-1]} | {"car": ["car", CITYSCAPES.names[-1]]}}
            )
        }
    asked = job(drive, teacher, tmp_path / "run", portion=Portion(limit=1), **settings)
    generate(asked)
    loading = {name: value for name, value in settings.items() if name != "flip"}
    network = load_teacher(teacher, device="cpu", space=load_manifest(drive).label_space, **loading)
    image = read_image(load_manifest(drive).samples[0].image)[None]
    (label,), _ = network.label(image, scales=SCALES, flip=asked.flip, focus=0.25)
    assert list(labels_of(asked.out).values()) == [label.tobytes()]
    assert columns(asked.out, "images", "focus_top", "focus_bottom")[0] in SEEN


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_rows_seen_are_marked_in_the_picture_and_its_ends_are_not() -> None:
    grey = Image.new("RGB", (4, 360), (90, 90, 90))
    assert mark_rows(grey, None, height=180) is grey
    marked = np.asarray(mark_rows(grey, (50, 180), height=180))[:, 0, 0]
    assert marked[96:102].tolist() == [0, 0, 255, 255, 90, 90] and set(marked[102:].tolist()) == {90}


def test_the_report_says_what_was_seen_and_marks_it(run: Path) -> None:
    page = write_report(run, images=1, attention=True).read_text(encoding="utf-8")
    assert str(summarise(run).focus) in page and "between the two lines only" in page
    assert page.count("<span>used in rows ") == 2  # the prediction and the attention of the highest scale
