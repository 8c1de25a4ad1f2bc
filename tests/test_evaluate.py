"""A score that is wrong, or taken on pictures that were learnt by heart, sends the worse network onto the road."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import autolabel
from PIL import Image

from autolabel.manifests.classes import CAMVID, CITYSCAPES
from autolabel.manifests.layouts import scan_folder
from autolabel.manifests.tables import load_manifest, save_manifest, with_roots
from autolabel.student.data import ManifestDataset
from autolabel.student.evaluate import Scores, evaluate, score
from autolabel.teacher.predict import load_teacher

torch.set_num_threads(1)  # the small network is no slower with one, and never waits for a busy core


@pytest.fixture(scope="module")
def scores(teacher: Path, city: Path) -> Scores:
    return evaluate(teacher, city / "val.parquet", device="cpu")


def test_the_score_is_what_a_plain_count_over_all_pixels_gives(scores: Scores, teacher: Path, city: Path) -> None:
    """IoU of a class = pixels that are both / pixels that are either, over all pictures together, ignore left out."""
    network, truths, predictions = load_teacher(teacher, "cpu"), [], []
    for item in ManifestDataset(city / "val.parquet"):
        image = item["image"].permute(1, 2, 0).numpy()
        truth, prediction = item["label"].numpy(), network.logits(image, (0.5, 1.0)).argmax(dim=0).byte().numpy()
        assert (prediction.shape, prediction.dtype) == (truth.shape, np.uint8)
        truths.append(truth[truth != 255])
        predictions.append(prediction[truth != 255])
    truth, prediction = np.concatenate(truths), np.concatenate(predictions)
    expected: dict[str, float | None] = {}
    for class_id, name in enumerate(CITYSCAPES.names):
        both = ((truth == class_id) & (prediction == class_id)).sum()
        either = ((truth == class_id) | (prediction == class_id)).sum()
        expected[name] = both / either if either else None
    assert scores.iou == expected
    assert None in expected.values()  # a class that nobody has and nobody sees
    there = [iou for iou in expected.values() if iou is not None]
    assert scores.miou == pytest.approx(sum(there) / len(there), rel=1e-12)
    assert scores.pixel_accuracy == (truth == prediction).mean()
    assert scores.pixel_accuracy > 0.25  # and it has learnt something
    assert scores.images == 3


def test_scales_are_those_of_the_networks_training_unless_others_are_named(teacher: Path, city: Path) -> None:
    network, pictures = load_teacher(teacher, "cpu"), ManifestDataset(city / "val.parquet")
    assert score(network, pictures) == score(network, pictures, (0.5, 1.0)) != score(network, pictures, (1.0,))


def test_scales_can_be_averaged_instead(teacher: Path, city: Path) -> None:
    averaged = evaluate(teacher, city / "val.parquet", (0.5, 1.0), "cpu", combine="average")
    assert averaged != evaluate(teacher, city / "val.parquet", (0.5, 1.0), "cpu")


def test_progress_names_every_picture(teacher: Path, city: Path) -> None:
    seen: list[tuple[int, int]] = []
    score(load_teacher(teacher, "cpu"), ManifestDataset(city / "val.parquet"), (1.0,), lambda *n: seen.append(n))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_scores_come_back_as_they_were_written(scores: Scores, tmp_path: Path) -> None:
    scores.write(tmp_path / "scores.json")
    assert Scores.read(tmp_path / "scores.json") == scores
    assert json.loads((tmp_path / "scores.json").read_text())["iou"]["road"] == scores.iou["road"]


def test_pictures_that_were_trained_on_are_refused_unless_allowed(teacher: Path, city: Path) -> None:
    fine = city / "fine.parquet"
    first = load_manifest(fine).samples[0].sample_id
    message = (
        f"{teacher} was trained on 6 of the 6 images of {fine} (the first is {first!r}): score it on others, or say"
        " --allow-overlap"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evaluate(teacher, fine)
    assert evaluate(teacher, fine, scales=(1.0,), allow_overlap=True).images == 6


def test_one_trained_picture_among_others_is_found_under_another_name(
    teacher: Path, city: Path, tmp_path: Path
) -> None:
    val, seen = load_manifest(city / "val.parquet").samples, load_manifest(city / "fine.parquet").samples[3]
    (tmp_path / "renamed.png").write_bytes(seen.image.read_bytes())
    samples = (*val, replace(seen, sample_id="renamed", image=tmp_path / "renamed.png"))
    save_manifest(tmp_path / "val.parquet", with_roots(CITYSCAPES, samples, {}))
    with pytest.raises(ValueError, match=r"was trained on 1 of the 4 images of .* \(the first is 'renamed'\)"):
        evaluate(teacher, tmp_path / "val.parquet")


def test_the_command_refuses_in_one_line_and_obeys_allow_overlap(teacher: Path, city: Path, tmp_path: Path) -> None:
    asked = ("evaluate", "--checkpoint", teacher, "--manifest", city / "fine.parquet", "--scales", "1")
    refused = autolabel(*asked)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr.startswith(f"autolabel: {teacher} was trained on 6 of the 6 images")
    allowed = autolabel(*asked, "--allow-overlap", "-o", tmp_path / "scores.json")
    assert (allowed.exit_code, Scores.read(tmp_path / "scores.json").images) == (0, 6)


def test_a_manifest_in_another_label_space_is_refused(teacher: Path, tmp_path: Path) -> None:
    for folder, array in (("images", np.zeros((64, 64, 3), np.uint8)), ("labels", np.zeros((64, 64), np.uint8))):
        (tmp_path / folder).mkdir()
        Image.fromarray(array).save(tmp_path / folder / "a.png")
    manifest = tmp_path / "camvid.parquet"
    save_manifest(manifest, scan_folder(tmp_path / "images", tmp_path / "labels", None, CAMVID)[0])
    message = (
        f"{teacher} predicts 19 classes of 'cityscapes', but {manifest} uses label space 'camvid' with 11: use a"
        " checkpoint trained in that label space"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evaluate(teacher, manifest)
