"""The student learns the teacher's habits: which class it takes for which is known, and nobody tells the loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument
from autolabel.manifests.label_space import CAMVID, LabelSpace
from autolabel.student.batches import Batch
from autolabel.student.job import TrainJob
from autolabel.student.losses import observed
from autolabel.student.noise import LabelNoise
from autolabel.student.request import TrainRequest
from autolabel.teacher.networks.combine import TrainingOutput

NAMES = CAMVID.names


def audit(path: Path, confusion: Any, names: tuple[str, ...] = NAMES) -> Path:
    """An audit as far as the trainer reads it."""
    path.write_text(json.dumps({"classes": [{"name": name} for name in names], "confusion": confusion}))
    return path


def counts(right: int, wrong: int, ignored: int = 7) -> list[list[int]]:
    """Every class is taken for the next one in `wrong` pixels."""
    size = len(NAMES)
    rows = right * np.eye(size, dtype=int) + wrong * np.roll(np.eye(size, dtype=int), 1, axis=1)
    return [[*row, ignored] for row in rows.tolist()]


# --- the probabilities ------------------------------------------------------------------------------------------------


def test_shares_of_many_pixels_are_the_probabilities(tmp_path: Path) -> None:
    found = LabelNoise.read(audit(tmp_path / "audit.json", counts(9_000_000, 1_000_000)), CAMVID).transition()
    assert np.diag(found) == pytest.approx([0.9] * 11, abs=1e-3)
    assert [found[k, (k + 1) % 11] for k in range(11)] == pytest.approx([0.1] * 11, abs=1e-3)
    assert found.sum(axis=1) == pytest.approx([1] * 11)
    assert found.min() > 0


def test_a_class_of_few_pixels_is_as_noisy_as_all_others(tmp_path: Path) -> None:
    rows = counts(8_000_000, 2_000_000)
    rows[2] = [0] * 12
    rows[3] = [0] * 11 + [5]
    rows[3][4] = 1000  # 1000 pixels, all wrong, meet the 1000 that are added
    found = LabelNoise.read(audit(tmp_path / "audit.json", rows), CAMVID).transition()
    assert found[2] == pytest.approx([0.8 if c == 2 else 0.02 for c in range(11)], abs=1e-4)
    assert found[3, 3] == pytest.approx(0.4, abs=1e-4)
    assert found[3, 4] == pytest.approx(0.51, abs=1e-4)


def test_labels_without_an_error_still_leave_room_for_one(tmp_path: Path) -> None:
    found = LabelNoise.read(audit(tmp_path / "audit.json", counts(1000, 0)), CAMVID).transition()
    assert 0 < found[0, 1] < 1e-4
    assert found[0, 0] > 0.9999


@pytest.mark.parametrize(
    ("confusion", "words"),
    [
        ([], "has no confusion matrix: audit the run again with `autolabel audit`"),
        (None, "has no confusion matrix"),
        (counts(0, 0), "no pixel of its images has truth and a label"),
        (counts(10, -1), "expected a confusion of 11 x 12 numbers of pixels"),
        ([[*row[:11]] for row in counts(10, 1)], "expected a confusion of 11 x 12"),
        ([[0.5] * 12] * 11, "expected a confusion of 11 x 12"),
        ([[1] * 12] * 10 + [[1]], "expected a confusion of 11 x 12"),
    ],
)
def test_a_damaged_or_empty_audit_is_named(confusion: Any, words: str, tmp_path: Path) -> None:
    path = audit(tmp_path / "audit.json", confusion)
    with pytest.raises(BadDocument) as refusal:
        LabelNoise.read(path, CAMVID)
    assert str(refusal.value).startswith(f"{path}")
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((*NAMES[:10], "tram"), "class 'tram' is not in it"),
        (NAMES[::-1], "it has 11 of 11, or their order"),
        (NAMES[:10], "it has 10 of 11"),
    ],
)
def test_an_audit_of_another_label_space_is_refused(names: tuple[str, ...], words: str, tmp_path: Path) -> None:
    path = audit(tmp_path / "audit.json", counts(10, 1), names)
    with pytest.raises(BadDocument, match="audits other classes than those of label space 'camvid'") as refusal:
        LabelNoise.read(path, CAMVID)
    assert words in str(refusal.value)


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_automatic_labels_are_compared_with_what_the_truth_would_be_labelled_as() -> None:
    """-log sum_k T[k, label] softmax_k in the images of runs; the others keep every bit."""
    torch.manual_seed(0)
    transition = torch.rand(3, 3)
    transition /= transition.sum(dim=1, keepdim=True)
    logits, label = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    found = observed(logits, transition, torch.tensor([True, False]))
    shares = logits.softmax(dim=1)
    chance = torch.stack([(transition[:, y, None, None] * shares).sum(dim=1) for y in range(3)], dim=1)
    torch.testing.assert_close(F.cross_entropy(found[:1], label[:1]), F.nll_loss(chance[:1].log(), label[:1]))
    assert torch.equal(found[1], logits[1])


def test_the_truth_and_not_the_label_has_the_least_loss_on_average() -> None:
    """A third of the pixels of class 0 is labelled 1. Left alone, the network would end at 2 : 1."""
    transition = torch.tensor([[2 / 3, 1 / 3], [1e-4, 1 - 1e-4]])
    label = torch.tensor([[[0, 0, 1]]])
    logits = torch.zeros(1, 2, 1, 3, requires_grad=True)
    for _ in range(300):
        scores = logits.mean(dim=-1, keepdim=True).expand(-1, -1, -1, 3)
        loss = F.cross_entropy(observed(scores, transition, torch.tensor([True])), label)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 20 * gradient).detach().requires_grad_()
    assert logits.mean(dim=-1).softmax(dim=1)[0, 0].item() > 0.98


def test_only_batches_with_automatic_labels_are_corrected() -> None:
    transition = torch.full((3, 3), 1 / 3)
    logits = torch.randn(2, 3, 8, 8)
    losses = []
    for automatic in ([False, False], [False, True]):
        crops = {"image": torch.zeros(2, 3, 8, 8), "label": torch.zeros(2, 8, 8, dtype=torch.uint8)}
        own = Batch.of(crops | {"automatic": torch.tensor(automatic)}, torch.device("cpu"))
        output = TrainingOutput(logits, None, ())
        given = [
            own.loss("cross-entropy", output, whole=own.counts(), transition=t, scale_weight=0)
            for t in (None, transition)
        ]
        losses.append(given)
    assert torch.equal(*losses[0])
    assert not torch.equal(*losses[1])


# --- the training -----------------------------------------------------------------------------------------------------


def confused(path: Path, space: LabelSpace, wrong: int) -> Path:
    size = len(space)
    return audit(path, [[*([wrong] * size), 0]] * size, space.names)


def test_the_folder_of_a_training_knows_its_audit_and_refuses_another(city: Path, tmp_path: Path) -> None:
    plain = TrainJob(
        city / "fine.parquet", city / "val.parquet", tmp_path / "out", steps=1, batch_size=2, crop=(64, 64)
    )
    space = TrainRequest(plain).space
    path = confused(tmp_path / "audit.json", space, 1)
    asked = replace(plain, noise=path)
    recipe = TrainRequest(asked).recipe
    assert recipe["noise"] == {"audit": str(path), "sha256": storage.sha256(path)}
    (tmp_path / "out").mkdir()
    storage.write_json(tmp_path / "out" / "train.json", recipe)
    TrainRequest(asked)
    confused(path, space, 2)
    with pytest.raises(ValueError, match=r"noise was \{'audit': .*\}, now \{"):
        TrainRequest(asked)
    with pytest.raises(ValueError, match=r"noise was \{'audit': .*\}, now None"):
        TrainRequest(plain)
    with pytest.raises(BadDocument, match=r"missing\.json"):
        TrainRequest(replace(asked, noise=tmp_path / "missing.json"))


def test_noise_is_refused_for_a_loss_of_regions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="noise with loss rmi"):
        TrainJob(tmp_path, tmp_path, tmp_path, loss="rmi", noise=tmp_path / "audit.json")
