"""If our IoU is not what the benchmark's own scorer says, no figure of ours can be held against a published one.

cityscapesScripts reads label-id PNGs from the official folders and counts by itself; our numbers must be its numbers.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
from cityscapesscripts.helpers.labels import labels as official_labels
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests.images import read_label
from autolabel.manifests.label_space import CITYSCAPES, IGNORE
from autolabel.manifests.scores import Confusion
from autolabel.student.data import ManifestDataset
from autolabel.student.evaluate import evaluate
from autolabel.teacher.loading import load_teacher

EXACT = {"rel": 0, "abs": 1e-6}
TRAIN_TO_ID = np.zeros(256, np.uint8)  # where nothing is predicted the benchmark wants an id that it ignores
TRAIN_TO_ID[: len(CITYSCAPES)] = [c.source_ids[0] for c in CITYSCAPES.classes]
Map = NDArray[np.uint8]


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its settings, quiet. Scores of instances are another benchmark, and use np.in1d, which NumPy 2.4 has no more."""
    for name, value in {"evalInstLevelScore": False, "JSONOutput": False, "quiet": True}.items():
        monkeypatch.setattr(official.args, name, value)
    for name in ("predictionPath", "predictionWalk"):
        monkeypatch.setattr(official.args, name, None)
    return official.args


def official_scores(args: Any, truths: Path, predictions: Path) -> dict[str, Any]:
    """What its command prints for the PNGs under two folders; it finds the pairs by their names."""
    args.predictionPath = str(predictions)
    wanted = [str(path) for path in sorted(truths.rglob("*_gtFine_labelIds.png"))]
    assert wanted
    result: dict[str, Any] = official.evaluateImgLists([official.getPrediction(args, t) for t in wanted], wanted, args)
    return result


def assert_same(iou: dict[str, float | None], miou: float, theirs: dict[str, Any]) -> None:
    for name, ours in iou.items():
        expected = theirs["classScores"][name]
        assert math.isnan(expected) if ours is None else ours == pytest.approx(expected, **EXACT), name
    assert miou == pytest.approx(theirs["averageScoreClasses"], **EXACT)


def by_name(confusion: Confusion) -> dict[str, float | None]:
    return {n: None if np.isnan(v) else float(v) for n, v in zip(CITYSCAPES.names, confusion.iou(), strict=True)}


def test_scores_count_the_classes_that_the_benchmark_scores() -> None:
    counted = sorted((label.trainId, label.name, label.id) for label in official_labels if not label.ignoreInEval)
    assert counted == [(n, c.name, c.source_ids[0]) for n, c in enumerate(CITYSCAPES.classes)]


def test_a_networks_scores_are_those_of_the_official_scorer(
    scorer: Any, teacher: Path, city: Path, tmp_path: Path
) -> None:
    network = load_teacher(teacher, device="cpu")
    for item in ManifestDataset(city / "val.parquet"):
        prediction, _ = network.confidence(item["image"].permute(1, 2, 0).numpy(), scales=(0.5, 1.0), flip=True)
        Image.fromarray(TRAIN_TO_ID[prediction]).save(tmp_path / f"{item['sample_id']}_prediction.png")
    theirs = official_scores(scorer, city / "data" / "gtFine" / "val", tmp_path)
    ours = evaluate(teacher, city / "val.parquet", scales=(0.5, 1.0), device="cpu", flip=True)
    assert 0 < ours.miou < 1 and None in ours.iou.values()
    assert_same(ours.iou, ours.miou, theirs)
    matrix = np.array(theirs["confMatrix"])[np.ix_(TRAIN_TO_ID[:19], TRAIN_TO_ID[:19])]
    assert ours.pixel_accuracy == pytest.approx(np.trace(matrix) / matrix.sum(), **EXACT)


def drawn(seed: int, places: slice, left_out: tuple[int, ...]) -> tuple[Map, Map]:
    """Truth in all 34 label ids, and train ids predicted: half of the pixels right, some of the others ignored."""
    dice = np.random.default_rng(seed)
    truth = dice.integers(0, 34, (48, 80), np.uint8)
    truth[np.isin(truth, TRAIN_TO_ID[list(left_out)])] = 0
    prediction = dice.integers(0, 19, truth.shape, np.uint8)
    right = np.frombuffer(CITYSCAPES.train_ids, np.uint8)[truth]
    agree = (dice.random(truth.shape) < 0.5) & (right != IGNORE)
    prediction[agree] = right[agree]
    prediction[np.isin(prediction, left_out)] = 0
    prediction[places] = IGNORE
    return truth, prediction


@pytest.mark.parametrize(
    ("places", "left_out"),
    [
        pytest.param(np.s_[:0], (), id="every class"),
        pytest.param(np.s_[:9], (), id="a part is not predicted"),
        pytest.param(np.s_[:9], (3, 14, 18), id="three classes occur nowhere"),
    ],
)
def test_scores_of_drawn_maps_equal_those_of_the_official_scorer(
    scorer: Any, places: slice, left_out: tuple[int, ...], tmp_path: Path
) -> None:
    """Ignored truth counts nowhere, an ignored prediction is a miss, a class that is nowhere leaves the mean alone."""
    confusion = Confusion(19)
    for number in range(3):
        truth, prediction = drawn(number, places, left_out)
        stem = f"ulm_{number:06}_000019"
        folder = tmp_path / "gtFine" / "ulm"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(truth).save(folder / f"{stem}_gtFine_labelIds.png")
        (tmp_path / "results").mkdir(exist_ok=True)
        Image.fromarray(TRAIN_TO_ID[prediction]).save(tmp_path / "results" / f"{stem}.png")
        confusion.add(read_label(folder / f"{stem}_gtFine_labelIds.png", CITYSCAPES, ids="source"), prediction)
    theirs = official_scores(scorer, tmp_path / "gtFine", tmp_path / "results")
    ours = by_name(confusion)
    assert [CITYSCAPES.names.index(name) for name, value in ours.items() if value is None] == list(left_out)
    assert_same(ours, confusion.mean_iou(), theirs)


def test_a_class_that_is_predicted_on_ignored_truth_alone_has_no_score(scorer: Any, tmp_path: Path) -> None:
    truth, prediction = np.full((4, 4), 7, np.uint8), np.zeros((4, 4), np.uint8)
    truth[0], prediction[0] = 4, 13  # "static", and a car there
    Image.fromarray(truth).save(tmp_path / "ulm_000000_000019_gtFine_labelIds.png")
    (tmp_path / "results").mkdir()
    Image.fromarray(TRAIN_TO_ID[prediction]).save(tmp_path / "results" / "ulm_000000_000019.png")
    confusion = Confusion(19)
    confusion.add(np.frombuffer(CITYSCAPES.train_ids, np.uint8)[truth], prediction)
    assert by_name(confusion) == {name: 1.0 if name == "road" else None for name in CITYSCAPES.names}
    theirs = official_scores(scorer, tmp_path, tmp_path / "results")
    assert_same(by_name(confusion), confusion.mean_iou(), theirs)


def test_one_wrong_pixel_differs_from_the_official_score(scorer: Any, tmp_path: Path) -> None:
    """The comparison itself can fail: a pixel more in one of the two is far above 1e-6."""
    truth, prediction = drawn(5, np.s_[:0], ())
    Image.fromarray(truth).save(tmp_path / "ulm_000000_000019_gtFine_labelIds.png")
    (tmp_path / "results").mkdir()
    Image.fromarray(TRAIN_TO_ID[prediction]).save(tmp_path / "results" / "ulm_000000_000019.png")
    theirs = official_scores(scorer, tmp_path, tmp_path / "results")
    ids = np.frombuffer(CITYSCAPES.train_ids, np.uint8)[truth]
    y, x = np.argwhere(ids == prediction)[0]
    prediction[y, x] = (prediction[y, x] + 1) % 19
    confusion = Confusion(19)
    confusion.add(ids, prediction)
    with pytest.raises(AssertionError):
        assert_same(by_name(confusion), confusion.mean_iou(), theirs)
