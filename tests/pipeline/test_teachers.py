"""A run with a teacher that is none of our networks: everything that holds for ours holds for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import labels_of, photograph, quarantined, refused, scanned
from PIL import Image

import autolabel as al
from autolabel.manifests.class_map import ClassMap
from autolabel.manifests.label_space import CITYSCAPES, IGNORE
from autolabel.manifests.policy import PRESETS, Policy
from autolabel.manifests.run.folder import Run
from autolabel.manifests.settings import build_job
from autolabel.manifests.teachers import BadTeacher, TeacherName
from autolabel.pipeline.job import LabelJob, Portion
from autolabel.pipeline.predictor import Decoded, Predictor, TeacherPredictor
from autolabel.pipeline.relabel import relabel
from autolabel.pipeline.report.facts import policy_facts
from autolabel.pipeline.run import generate
from autolabel.teacher.decide import Prediction
from autolabel.teacher.loading import load_teacher

pytestmark = pytest.mark.thorough

SOURCE = '''
import torch
import torch.nn.functional as F


class Teacher:
    """Dark is road, bright is sky, reddish is car; it sees blocks of 4 x 4 pixels."""

    classes = ["road", "sky", "car"]

    def __init__(self, device):
        self.mix = torch.tensor([[-9.0, -9, -9], [9, 9, 9], [24, -12, -12]], device=device)

    def predict(self, images):
        assert not (images[0, :, 0, 0] == torch.tensor([1, 2, 3])).all(), "a corner that nobody can bear"
        return torch.einsum("kc,bchw->bkhw", self.mix, F.avg_pool2d(images.float() / 255 - 0.45, 4))


class Ids(Teacher):
    gives = "ids"

    def predict(self, images):
        return super().predict(images).argmax(dim=1)


class Loud(Teacher):
    def predict(self, images):
        return super().predict(images) * float("nan")
'''
MAP = ClassMap({"road": ("road",), "sky": ("sky",), "ignore": ("car",)})


class LikeAGPU(TeacherPredictor):
    """A teacher on the CPU that is fed as a GPU is, in batches."""

    def __init__(self, run: Run) -> None:
        assert run.teacher is not None
        super().__init__(load_teacher(run.teacher, device="cpu", space=run.label_space), run.recipe)
        self.device = "cuda"
        self.batches: list[int] = []

    def predict(self, batch: Sequence[Decoded]) -> list[Prediction]:
        self.batches.append(len(batch))
        return super().predict(batch)


@pytest.fixture(scope="module")
def place(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    photograph(city, root / "drive", [f"street{n}" for n in range(7)])
    scanned(city, root / "drive")
    (root / "mine.py").write_text(SOURCE)
    return root


def job(place: Path, out: str, teacher: str | TeacherName = "Teacher", **settings: Any) -> LabelJob:
    """The seven streets, in a folder of their own name, by a class of `mine.py`; one process, units of three."""
    name = teacher if isinstance(teacher, TeacherName) else f"{place}/mine.py:{teacher}"
    paths = {"manifest": place / "drive.parquet", "teacher": name, "out": place / out}
    settings = {"engine": "local", "unit_size": 3, "device": "cpu", "class_map": MAP, **settings}
    return build_job(LabelJob, paths | settings)


@pytest.fixture(scope="module")
def whole(place: Path) -> Run:
    return generate(job(place, "whole", keep_confidence=8)).run


def test_labels_are_those_of_the_class_alone(place: Path, whole: Run) -> None:
    assert (whole.recipe.scales, whole.recipe.class_map) == ((1.0,), MAP)
    assert str(whole.teacher) == f"{place}/mine.py:Teacher"
    classes = [CITYSCAPES.names.index(name) for name in ("road", "sky")]
    for name, label in whole.labels.items():
        image = np.asarray(Image.open(place / "drive" / f"{name}.png"))
        logits = load_teacher(f"{place}/mine.py:Teacher", device="cpu").logits(image, scales=(1.0,)).numpy()
        p = np.exp(logits - logits.max(axis=0))
        p /= p.sum(axis=0)
        known = p[:2].max(axis=0)
        clear = (np.abs(known - 0.5) > 1e-5) & (np.abs(p[0] - p[1]) > 1e-5)
        expected = np.where(known > 0.5, np.choose(p[:2].argmax(axis=0), classes), IGNORE)
        assert clear.mean() > 0.99
        assert np.array_equal(label[clear], expected[clear])
        assert (label == IGNORE).any() and (label != IGNORE).any()


def test_units_limits_resume_and_batches_like_those_of_a_gpu_change_no_label(place: Path, whole: Run) -> None:
    assert labels_of(generate(job(place, "units", unit_size=2)).run.path) == labels_of(whole.path)
    for limit in (1, 4, None):
        resumed = generate(replace(job(place, "resumed"), portion=Portion(limit=limit))).run
    assert labels_of(resumed.path) == labels_of(whole.path)


def test_a_batch_of_a_gpu_is_planned_and_full_for_any_model(place: Path) -> None:
    made: list[LikeAGPU] = []

    def predictor(run: Run, device: str) -> Predictor:
        planned = replace(run, recipe=replace(run.recipe, batch_pixels=4 * 96 * 192))
        made.append(LikeAGPU(planned))
        return made[-1]

    batched = generate(job(place, "batched", class_map=None, manifest=_own_space(place)), predictor=predictor).run
    one_by_one = generate(job(place, "one by one", class_map=None, manifest=_own_space(place))).run
    assert sorted(made[0].batches) == [1, 3, 3]
    assert labels_of(batched.path) == labels_of(one_by_one.path)


def _own_space(place: Path) -> Path:
    """A manifest of the same images in the classes of the teacher itself."""
    path = place / "own.parquet"
    if not path.exists():
        al.scan(place / "drive", path, label_space=load_teacher(f"{place}/mine.py:Teacher", device="cpu").label_space)
    return path


def test_kept_confidence_decides_again_without_the_class(place: Path, whole: Run) -> None:
    strict = Policy(threshold=whole.recipe.confidence_edges[4])
    again = relabel(whole, strict, out=place / "again").run
    assert labels_of(again.path) == labels_of(generate(job(place, "strict", policy=strict)).run.path)
    assert labels_of(again.path) != labels_of(whole.path)


def test_another_file_another_map_or_windows_are_another_run(place: Path, whole: Run, tmp_path: Path) -> None:
    asked = job(place, "whole", keep_confidence=8)
    (tmp_path / "mine.py").write_text(SOURCE + "\n")
    other = ClassMap({"road": ("road", "car"), "sky": ("sky",)})
    for change, words in (
        ({"teacher": f"{tmp_path}/mine.py:Teacher"}, "teacher was"),
        ({"class_map": other}, "class_map was"),
        ({"window": (64, 64)}, "window was"),
    ):
        with pytest.raises(ValueError, match=f"holds a run that was asked for differently \\({words}"):
            generate(replace(asked, **change))


def test_an_image_that_the_class_cannot_bear_is_quarantined_alone(place: Path, city: Path, tmp_path: Path) -> None:
    photograph(city, tmp_path / "drive", ["a", "b", "c"])
    image = np.asarray(Image.open(tmp_path / "drive" / "b.png")).copy()
    image[0, 0] = (1, 2, 3)
    Image.fromarray(image).save(tmp_path / "drive" / "b.png")
    asked = replace(
        job(place, "x", max_quarantined=1.0), manifest=scanned(city, tmp_path / "drive"), out=tmp_path / "r"
    )
    generate(asked)
    (reason,) = quarantined(tmp_path / "r").values()
    assert reason.startswith(f"{place}/mine.py:Teacher cannot predict an image: AssertionError: a corner")
    assert "mine.py, line 15" in reason


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"keep_confidence": 8}, "--keep-confidence"),
        ({"policy": Policy(threshold=0.7)}, "policy 'threshold 0.7', which has thresholds,"),
    ],
    ids=["kept", "threshold"],
)
def test_of_class_ids_nobody_can_ask_how_sure_they_are(place: Path, asked: dict[str, Any], what: str) -> None:
    with pytest.raises(
        ValueError, match=f"^{what}.* was asked for, but .*mine.py:Ids gives class ids without probabilities"
    ):
        generate(job(place, "ids", "Ids", **asked))
    assert not (place / "ids").exists()


def test_class_ids_are_labels_as_they_are_under_a_preset_too(place: Path, whole: Run) -> None:
    asked = job(place, "sure", "Ids", class_map=None, manifest=_own_space(place), policy=PRESETS["human-first"])
    run = generate(asked).run
    confidences = run.statistics("images", ["mean_confidence"]).column("mean_confidence").to_pylist()
    assert set(confidences) == {1.0}
    assert all((label != IGNORE).all() for label in run.labels.values())


def test_a_model_that_gives_nan_labels_nothing(place: Path) -> None:
    with pytest.raises(BadTeacher, match=r"mine.py:Loud gives nan for an image of noise"):
        generate(job(place, "loud", "Loud"))
    assert not (place / "loud").exists()


def test_two_teachers_label_together_and_one_of_them_needs_the_map(place: Path, teacher: Path) -> None:
    both = [f"{place}/mine.py:Teacher", str(teacher)]
    run = generate(job(place, "both", teacher=TeacherName.of(both))).run
    assert run.recipe.scales == (1.0,)
    assert [str(one) for one in run.teacher.places] == both  # type: ignore[union-attr]
    maps = (MAP, None)
    mine, ours = (
        load_teacher(one, device="cpu", class_map=map_, space=CITYSCAPES) for one, map_ in zip(both, maps, strict=True)
    )
    name, label = next(iter(run.labels.items()))
    image = np.asarray(Image.open(place / "drive" / f"{name}.png"))
    logits = [one.logits(image, scales=(1.0,)).softmax(dim=0).numpy()[:19] for one in (mine, ours)]
    p = sum(logits) / 2
    clear = np.abs(p.max(axis=0) - 0.5) > 1e-5
    assert np.array_equal(label[clear], np.where(p.max(axis=0) > 0.5, p.argmax(axis=0), IGNORE)[clear])


def test_the_line_says_what_a_teacher_of_other_classes_needs(place: Path) -> None:
    line = refused("generate", place / "drive.parquet", "--teacher", f"{place}/mine.py:Teacher", "--out", place / "no")
    assert line.endswith("use a teacher of that label space, or map its classes onto it with --classes")
    line = refused(
        "generate", place / "drive", "--teacher", f"{place}/mine.py:Teacher", "--classes", "ade20k-to-cityscapes",
        "--out", place / "no",
    )  # fmt: skip
    assert line == f"--classes leads to a label space: name it with --label-space to label {place / 'drive'}"
    assert not (place / "no").exists()


def test_the_report_says_how_probabilities_were_combined_and_classes_mapped(place: Path, whole: Run) -> None:
    facts = dict(policy_facts(replace(whole, recipe=replace(whole.recipe, window=(64, 96)))))
    assert facts["Combined"] == "mean of the probabilities"
    assert (facts["Windows"], facts["Classes"]) == ("96 × 64", "the teacher's, mapped as run.json says")
