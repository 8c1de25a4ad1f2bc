"""A score that is wrong, or taken on pictures that were learnt by heart, sends the worse network onto the road."""

from __future__ import annotations

import hashlib
import json
import re
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import autolabel, contents, refused
from PIL import Image

from autolabel.manifests.drawing import DISAGREEMENT
from autolabel.manifests.label_space import CAMVID, CITYSCAPES
from autolabel.manifests.samples import Manifest, load_manifest, save_manifest
from autolabel.manifests.scan import scan
from autolabel.manifests.scores import BoundaryF, Confusion
from autolabel.student.data import ManifestDataset
from autolabel.student.evaluate import Scores, evaluate, score
from autolabel.student.worst import Worst, draw_sheet, write_sheet
from autolabel.teacher.loading import load_teacher

torch.set_num_threads(1)  # the small network is no slower with one, and never waits for a busy core


@pytest.fixture(scope="module")
def scores(teacher: Path, city: Path) -> Scores:
    return evaluate(teacher, city / "val.parquet", device="cpu")


# --- one network ------------------------------------------------------------------------------------------------------


def test_the_score_is_what_a_plain_count_over_all_pixels_gives(scores: Scores, teacher: Path, city: Path) -> None:
    """IoU of a class = pixels that are both / pixels that are either, over all pictures together, ignore left out."""
    network, truths, predictions = load_teacher(teacher, device="cpu"), [], []
    for item in ManifestDataset(city / "val.parquet"):
        image = item["image"].permute(1, 2, 0).numpy()
        truth, prediction = item["label"].numpy(), network.logits(image, scales=(0.5, 1.0)).argmax(dim=0).byte().numpy()
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


def test_a_network_that_has_learnt_nothing_is_told_from_one_that_has(scores: Scores) -> None:
    assert 0 < scores.commonest_miou < 1
    nothing = replace(scores, miou=scores.commonest_miou)
    assert nothing.lines()[-1].endswith("this network has learnt nothing yet") and not nothing.learnt
    better = replace(scores, miou=scores.commonest_miou + 0.01)
    assert better.lines() == [f"pixel accuracy {100 * scores.pixel_accuracy:.1f} %"]


def test_scales_are_those_of_the_networks_training_unless_others_are_named(teacher: Path, city: Path) -> None:
    network, pictures = load_teacher(teacher, device="cpu"), ManifestDataset(city / "val.parquet")
    assert (
        score(network, pictures)
        == score(network, pictures, scales=(0.5, 1.0))
        != score(network, pictures, scales=(1.0,))
    )


def test_scales_can_be_averaged_instead(teacher: Path, city: Path) -> None:
    averaged = evaluate(teacher, city / "val.parquet", scales=(0.5, 1.0), device="cpu", combine="average")
    assert averaged.iou != evaluate(teacher, city / "val.parquet", scales=(0.5, 1.0), device="cpu").iou


def test_flip_averages_the_logits_with_those_of_the_mirrored_image(teacher: Path, city: Path) -> None:
    network, confusion = load_teacher(teacher, device="cpu"), Confusion(19)
    for item in ManifestDataset(city / "val.parquet"):
        image = item["image"].permute(1, 2, 0).numpy()
        mirrored = network.logits(image[:, ::-1], scales=(0.5, 1.0)).flip(-1)
        mean = (network.logits(image, scales=(0.5, 1.0)) + mirrored) / 2
        confusion.add(item["label"].numpy(), mean.argmax(dim=0).byte().numpy())
    flipped = evaluate(teacher, city / "val.parquet", scales=(0.5, 1.0), device="cpu", flip=True)
    expected = {n: None if np.isnan(v) else v for n, v in zip(CITYSCAPES.names, confusion.iou(), strict=True)}
    assert flipped.iou == expected
    assert flipped.miou != evaluate(teacher, city / "val.parquet", scales=(0.5, 1.0), device="cpu").miou


def test_a_focus_scores_the_labels_that_it_gives_at_the_scales_of_labelling(teacher: Path, city: Path) -> None:
    focused = evaluate(teacher, city / "val.parquet", focus=0.25, device="cpu")
    network, confusion = load_teacher(teacher, device="cpu"), Confusion(len(CITYSCAPES))
    for item in ManifestDataset(city / "val.parquet"):
        image = item["image"].permute(1, 2, 0).numpy()
        confusion.add(item["label"].numpy(), network.confidence(image, scales=(0.5, 1.0, 2.0), focus=0.25)[0])
    assert focused.miou == confusion.mean_iou() and focused.request["focus"] == 0.25
    assert "with a focus of 0.25, 3 images" in focused.tables()[0].title
    whole = evaluate(teacher, city / "val.parquet", scales=(0.5, 1.0, 2.0), device="cpu")
    assert whole.request["focus"] is None and whole.iou != focused.iou
    assert evaluate(teacher, city / "val.parquet", focus=1.0, device="cpu").iou == whole.iou


def test_a_focus_that_cannot_be_had_is_refused_and_no_scores_are_written(
    teacher: Path, city: Path, tmp_path: Path
) -> None:
    command = ("evaluate", teacher, city / "val.parquet", "--device", "cpu", "-o", tmp_path / "scores.json", "--focus")
    assert refused(*command, 0) == "focus 0: expected a share of the rows in (0, 1], such as 0.25"
    assert refused(*command, 1.5).startswith("focus 1.5: expected a share")
    assert refused(*command, 0.25, "--scales", "1").startswith("focus with scales 1: expected a scale above 1 besides")
    assert not list(tmp_path.iterdir())


def test_boundary_f_is_that_of_the_predictions_over_all_pictures(scores: Scores, teacher: Path, city: Path) -> None:
    network, boundary = load_teacher(teacher, device="cpu"), BoundaryF(19)
    for item in ManifestDataset(city / "val.parquet"):
        prediction, _ = network.confidence(item["image"].permute(1, 2, 0).numpy(), scales=(0.5, 1.0))
        boundary.add(item["label"].numpy(), prediction)
    assert list(scores.boundary_f) == list(scores.mean_boundary_f) == ["1", "2", "4"]
    for found, expected in zip(scores.boundary_f.values(), boundary.f(), strict=True):
        assert found == {n: None if np.isnan(v) else v for n, v in zip(CITYSCAPES.names, expected, strict=True)}
    for (distance, mean), expected in zip(scores.mean_boundary_f.items(), boundary.f(), strict=True):
        assert mean == pytest.approx(np.nanmean(expected), rel=1e-12), distance
    near, _, far = scores.mean_boundary_f.values()
    assert near is not None and far is not None and 0 < near < far < 1


def test_a_perfect_and_a_shifted_prediction_by_hand() -> None:
    """Two classes side by side. Moved by two columns, no border pixel is met within 1, all within 2."""
    truth, moved = np.zeros((4, 10), np.uint8), np.zeros((4, 10), np.uint8)
    truth[:, 5:] = moved[:, 7:] = 1
    for prediction, expected in ((truth, [1, 1, 1]), (moved, [0, 1, 1])):
        boundary = BoundaryF(2)
        boundary.add(truth, prediction)
        assert boundary.f().tolist() == [[f, f] for f in expected]
    confusion = Confusion(2)
    confusion.add(truth, moved)
    assert confusion.iou().tolist() == [20 / 28, 12 / 20]


def test_a_training_counts_no_borders(teacher: Path, city: Path) -> None:
    """Its validations take no longer than they have to."""
    plain = score(load_teacher(teacher, device="cpu"), ManifestDataset(city / "val.parquet"), scales=(1.0,))
    assert (plain.boundary_f, plain.mean_boundary_f, plain.worst, plain.request) == ({}, {}, [], {})


def test_the_scores_say_what_was_asked(teacher: Path, city: Path) -> None:
    found = evaluate(teacher, city / "val.parquet", scales=(1.0,), device="cpu", combine="average", flip=True)
    assert found.request == {
        "checkpoint": str(teacher),
        "sha256": hashlib.sha256(teacher.read_bytes()).hexdigest(),
        "manifest": str(city / "val.parquet"),
        "scales": [1.0],
        "flip": True,
        "focus": None,
        "combine": "average",
    }


def test_labels_without_a_class_are_refused(teacher: Path, tmp_path: Path) -> None:
    for folder, array in (("images", np.zeros((64, 64, 3), np.uint8)), ("labels", np.full((64, 64), 255, np.uint8))):
        (tmp_path / folder).mkdir()
        Image.fromarray(array).save(tmp_path / folder / "a.png")
    save_manifest(
        tmp_path / "m.parquet",
        scan(tmp_path / "images", layout="folder", labels=tmp_path / "labels", label_space=CITYSCAPES)[0],
    )
    message = f"{tmp_path / 'm.parquet'}: no pixel of its labels has a class, so there is nothing to score on"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evaluate(teacher, tmp_path / "m.parquet", scales=(1.0,), device="cpu")


def test_progress_names_every_picture(teacher: Path, city: Path) -> None:
    seen: list[tuple[int, int]] = []
    score(
        load_teacher(teacher, device="cpu"),
        ManifestDataset(city / "val.parquet"),
        scales=(1.0,),
        progress=lambda *n: seen.append(n),
    )
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
    save_manifest(tmp_path / "val.parquet", Manifest.of(CITYSCAPES, samples))
    with pytest.raises(ValueError, match=r"was trained on 1 of the 4 images of .* \(the first is 'renamed'\)"):
        evaluate(teacher, tmp_path / "val.parquet")


def test_the_command_refuses_in_one_line_and_obeys_allow_overlap(teacher: Path, city: Path, tmp_path: Path) -> None:
    asked = ("evaluate", teacher, city / "fine.parquet", "--scales", "1")
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
    save_manifest(
        manifest, scan(tmp_path / "images", layout="folder", labels=tmp_path / "labels", label_space=CAMVID)[0]
    )
    message = (
        f"{teacher} predicts 19 classes of 'cityscapes', but {manifest} uses label space 'camvid' with 11: use a"
        " teacher of that label space, or map its classes onto it with --classes"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evaluate(teacher, manifest)


# --- the worst images -------------------------------------------------------------------------------------------------


def test_the_worst_are_kept_and_all_others_forgotten() -> None:
    """Brute force over a thousand images in any order, many of them equal: the lowest, of equals the first."""
    dice = np.random.default_rng(3)
    mious = (dice.integers(0, 200, 1000) / 200).tolist()
    mious[17] = mious[18] = float("nan")
    worst, alive = Worst(8), []
    for index, miou in enumerate(mious):
        prediction = np.full((2, 2), index % 256, np.uint8)
        alive.append(weakref.ref(prediction))
        worst.add(index, miou=miou, prediction=prediction)
        del prediction
        assert len(worst) <= 8 and sum(one() is not None for one in alive[-20:]) <= 8
    expected = sorted((miou, index) for index, miou in enumerate(mious) if not np.isnan(miou))[:8]
    assert [(miou, index) for index, miou, _ in worst] == expected
    assert [int(prediction[0, 0]) for *_, prediction in worst] == [index % 256 for _, index in expected]
    assert sum(one() is not None for one in alive) == 8


def test_the_worst_of_fewer_images_than_asked_for_are_all_of_them() -> None:
    worst = Worst(8)
    for index, miou in enumerate((0.5, 0.25, 0.75)):
        worst.add(index, miou=miou, prediction=np.zeros((1, 1), np.uint8))
    assert [index for index, _, _ in worst] == [1, 0, 2]


def test_the_scores_name_the_worst_images_in_order(scores: Scores, teacher: Path, city: Path) -> None:
    network, expected = load_teacher(teacher, device="cpu"), []
    for item in ManifestDataset(city / "val.parquet"):
        one = Confusion(19)
        one.add(item["label"].numpy(), network.confidence(item["image"].permute(1, 2, 0).numpy(), scales=(0.5, 1.0))[0])
        expected.append({"sample_id": item["sample_id"], "miou": one.mean_iou()})
    assert scores.worst == sorted(expected, key=lambda image: image["miou"])


def test_a_sheet_is_photograph_truth_prediction_and_errors() -> None:
    image = np.full((8, 16, 3), 200, np.uint8)
    truth, prediction = np.zeros((8, 16), np.uint8), np.zeros((8, 16), np.uint8)
    truth[:, 12:], prediction[:4] = 255, 1
    sheet = np.asarray(draw_sheet(image, truth, prediction=prediction, space=CITYSCAPES))
    assert sheet.shape == (16, 32, 3)
    road, sidewalk = (c.colour for c in CITYSCAPES.classes[:2])
    colours = {place: tuple(sheet[place].tolist()) for place in ((0, 0), (0, 16), (8, 0), (12, 0), (8, 16), (12, 16))}
    right, wrong = (DISAGREEMENT[name][:3] for name in ("agree", "another class"))
    assert list(colours.values()) == [(200, 200, 200), road, sidewalk, road, wrong, right]
    assert tuple(sheet[8, 28].tolist()) == tuple(sheet[15, 31].tolist()) == (100, 100, 100)  # no truth: dimmed


def test_the_command_draws_the_worst_images(scores: Scores, teacher: Path, city: Path, tmp_path: Path) -> None:
    asked = ("evaluate", teacher, city / "val.parquet", "--pictures", tmp_path / "worst")
    result = autolabel(*asked)
    assert result.exit_code == 0, result.output
    names = [f"{n:02}-{one['sample_id']}-iou{one['miou']:.3f}.webp" for n, one in enumerate(scores.worst, start=1)]
    assert sorted(path.name for path in (tmp_path / "worst").iterdir()) == names
    with Image.open(tmp_path / "worst" / names[0]) as sheet:
        assert (sheet.format, sheet.size) == ("WEBP", (2 * 192, 2 * 96))
    places = [result.stdout.index(one["sample_id"]) for one in scores.worst]
    assert places == sorted(places)
    assert all(column in result.stdout for column in ("IoU", "F 1 px", "F 2 px", "F 4 px", "pixel accuracy"))
    before = contents(tmp_path)
    again = autolabel(*asked)  # other pictures would lie among these
    assert (again.exit_code, again.stderr.count("\n")) == (2, 1)
    assert again.stderr.startswith(f"autolabel: {tmp_path / 'worst'} is not empty")
    assert contents(tmp_path) == before


def test_a_picture_stays_in_its_folder_whatever_its_id(tmp_path: Path) -> None:
    (tmp_path / "worst").mkdir()
    write_sheet(tmp_path / "worst", Image.new("RGB", (2, 2)), rank=3, sample_id="../../etc/a b", miou=0.25)
    assert list(contents(tmp_path)) == ["worst/03-.._.._etc_a_b-iou0.250.webp"]
