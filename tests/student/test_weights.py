"""A guess teaches as loudly as a polygon, or a sure label is hushed: the weight lies on another pixel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from autolabel.manifests.label_space import CAMVID
from autolabel.manifests.run.sample_labels import keeps_probability
from autolabel.manifests.run.shards import bucket_of, create_zarr, encode_zarr, write_zarr_shard
from autolabel.manifests.samples import Manifest, Sample, load_manifest
from autolabel.manifests.scan import scan
from autolabel.student.batches import Batch
from autolabel.student.data import Augmentation, ManifestDataset, TrainingCrops
from autolabel.student.job import LOSSES, Mix, TrainJob
from autolabel.student.losses import FORMULAS, BatchCounts
from autolabel.student.request import TrainRequest
from autolabel.student.sampling import Draws
from autolabel.student.train import train
from autolabel.teacher.networks.combine import TrainingOutput

HEIGHT, WIDTH, CLASSES = 96, 128, 5
WEIGHED = [loss for loss in LOSSES if loss != "rmi"]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, a label with ignored pixels, and weights, of four crops; the last has no label."""
    torch.manual_seed(0)
    label = torch.randint(0, CLASSES, (4, 16, 16))
    label[0, 3:], label[3] = 255, 255
    return torch.randn(4, CLASSES, 16, 16).double(), label, torch.randint(0, 256, (4, 16, 16), dtype=torch.uint8)


# --- the loss ---------------------------------------------------------------------------------------------------------


def expected(loss: str, logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """The losses as sums over pixels, written down without a library's help."""
    p, valid = weight.double() / 255, label != 255
    surprise = F.cross_entropy(logits, label, ignore_index=255, reduction="none")
    of_class = torch.stack([(p * (label == c)).sum() for c in range(CLASSES)])
    if loss == "cross-entropy":
        return (p * surprise).sum() / p[valid].sum()
    if loss == "balanced":
        each = p * of_class.rsqrt()[label.where(valid, torch.tensor(0))] * valid
        return (each * surprise).sum() / each.sum()
    each = p * (2 - of_class / of_class.sum())[label.where(valid, torch.tensor(0))] * valid
    means = [(e * s).sum() / e.sum() for e, s, v in zip(each, surprise, valid, strict=True) if v.any()]
    return torch.stack(means).sum() / len(label)


@pytest.mark.parametrize("loss", WEIGHED)
def test_the_loss_of_a_pixel_is_multiplied_by_its_weight_and_weights_are_counted_as_pixels(loss: str) -> None:
    logits, label, weight = batch()
    found = FORMULAS[loss].joint(logits, label, weight=weight)
    torch.testing.assert_close(found, expected(loss, logits, label, weight))


@pytest.mark.parametrize("loss", WEIGHED)
def test_a_pixel_of_weight_0_is_an_ignored_one(loss: str) -> None:
    logits, label, weight = batch()
    dropped = label.where(weight > 99, torch.tensor(255))
    cut = weight.where(weight > 99, torch.tensor(0, dtype=torch.uint8))
    torch.testing.assert_close(
        FORMULAS[loss].joint(logits, label, weight=cut), FORMULAS[loss].joint(logits, dropped, weight=weight)
    )


def items(label: Tensor, weight: Tensor | None) -> dict[str, Any]:
    crops = {"image": torch.zeros(4, 3, 16, 16, dtype=torch.uint8), "label": label.to(torch.uint8)}
    return crops | {"automatic": torch.ones(4, dtype=torch.bool)} | ({} if weight is None else {"weight": weight})


@pytest.mark.parametrize("loss", WEIGHED)
def test_weights_of_1_change_no_bit_of_loss_and_gradient(loss: str) -> None:
    logits, label, weight = batch()
    found = []
    for weights in (None, torch.full_like(weight, 255)):
        own, scores = Batch.of(items(label, weights), torch.device("cpu")), logits.float().requires_grad_()
        output = TrainingOutput(scores, scores * 2, ())
        value = own.loss(loss, output, whole=own.counts(), transition=None, scale_weight=0.05)
        value.backward()  # type: ignore[no-untyped-call]
        assert scores.grad is not None
        found += [(value.detach(), scores.grad)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("loss", WEIGHED)
def test_weighed_parts_of_a_batch_add_up_to_the_whole(loss: str) -> None:
    """One part is certain in all its pixels, and takes the way without weights."""
    logits, label, weight = batch()
    weight[2:] = 255
    whole = Batch.of(items(label, weight), torch.device("cpu"))
    halves = whole.parts(2)
    assert len(halves) == 2
    certain = replace(halves[1], certain=True)
    counts = whole.counts().summed(lambda values: values, images=4)
    total = [
        part.loss(loss, TrainingOutput(scores, None, ()), whole=counts, transition=None, scale_weight=0)
        for part, scores in zip((halves[0], certain), logits.chunk(2), strict=True)
    ]
    torch.testing.assert_close(sum(total), FORMULAS[loss].joint(logits, label, weight=weight))


def test_counts_hold_the_exact_sum_of_the_weights() -> None:
    _, label, weight = batch()
    counts = BatchCounts.of(label, weight)
    assert counts.lost is not None
    assert torch.equal(counts.pixels, BatchCounts.of(label).pixels)
    for c in (0, 4, 255):
        assert counts.lost[c] == (255 - weight[label == c].long()).sum()


# --- the crops --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with fine labels, and a run of the same labels in PNGs and in Zarr: a probability equals its label."""
    root = tmp_path_factory.mktemp("weights")
    dice = np.random.default_rng(0)
    labels: list[NDArray[np.uint8]] = [dice.integers(0, 11, (HEIGHT, WIDTH), np.uint8) for _ in "ab"]
    for folder in ("images", "fine", "png/labels", "png/probability"):
        (root / folder).mkdir(parents=True)
        for name, label in zip("ab", labels, strict=True):
            Image.fromarray(label).convert("RGB" if folder == "images" else "L").save(root / folder / f"{name}.png")
    bucket = bucket_of(HEIGHT, WIDTH)
    for layer in ("labels", "probability"):
        create_zarr(root / f"zarr/{layer}.zarr", {bucket: 4}, shard_rows=4, attributes={})
        rows = [None, None, *map(encode_zarr, labels)]
        write_zarr_shard(root / f"zarr/{layer}.zarr/{bucket}", 0, shard_rows=4, labels=rows)
    return root


def fine_and_auto(root: Path, store: str) -> Manifest:
    """The fine labels, and those of the run in a store."""
    fine, _ = scan(root / "images", layout="folder", labels=root / "fine", label_space=CAMVID)
    run, bucket = root / store, bucket_of(HEIGHT, WIDTH)

    def labelled(sample: Sample, n: int) -> Sample:
        here, index = (run / f"labels/{sample.sample_id}.png", None)
        if store == "zarr":
            here, index = run / f"labels.zarr/{bucket}", n + 2
        return replace(sample, source="auto", label=here, label_index=index, run=run)

    auto = tuple(labelled(sample, n) for n, sample in enumerate(fine.samples))
    return Manifest.of(CAMVID, fine.samples + auto)


@pytest.mark.parametrize("store", ["png", "zarr"])
def test_the_weight_stays_on_its_pixel_through_crop_scale_and_flip(store: str, drawn: Path) -> None:
    dataset = ManifestDataset(fine_and_auto(drawn, store))
    draws = Draws(dataset.samples, CAMVID, mix=Mix(class_uniform=0), seed=0, length=40)
    crops = TrainingCrops(dataset, draws, augmentation=Augmentation((64, 80)), weights=True)
    plain = TrainingCrops(dataset, draws, augmentation=Augmentation((64, 80)))
    kinds = set()
    for n in range(len(crops)):
        item, without = crops[n], plain[n]
        wanted = item["label"] if item["automatic"] else torch.full((64, 80), 255, dtype=torch.uint8)
        assert torch.equal(item["weight"], wanted)
        assert "weight" not in without
        assert all(torch.equal(item[name], without[name]) for name in ("image", "label"))
        kinds.add(item["automatic"])
    assert kinds == {True, False}


# --- the training -----------------------------------------------------------------------------------------------------


def job(drawn: Path, out: Path, **settings: Any) -> TrainJob:
    return TrainJob(
        drawn / "all.parquet", drawn / "val.parquet", out, steps=2, batch_size=2, crop=(64, 64), validations=1,
        device="cpu", precision="float32", weights=True, **settings,
    )  # fmt: skip


def test_labels_without_probabilities_are_refused_before_anything_is_trained(city: Path, tmp_path: Path) -> None:
    fine = load_manifest(city / "fine.parquet")
    asked = replace(job(city, tmp_path / "out"), manifest=city / "fine.parquet")
    for run, words in (
        (None, "belongs to no run, so nobody knows its probability: leave out --weights"),
        (tmp_path, f"the run {tmp_path} has not kept the probability of its labels: generate or relabel with --keep-"),
    ):
        auto = tuple(replace(sample, source="auto", run=run) for sample in fine.samples)
        with pytest.raises(ValueError, match=r"^weights: ") as refusal:
            TrainRequest(asked, replace(fine, samples=auto))
        assert words in str(refusal.value)
    assert not keeps_probability(tmp_path)
    assert not (tmp_path / "out").exists()


def test_weights_are_refused_where_they_mean_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights with loss rmi: it judges regions, not single pixels"):
        job(tmp_path, tmp_path, loss="rmi")
    with pytest.raises(ValueError, match="weights and noise both answer for wrong labels: give one of the two"):
        job(tmp_path, tmp_path, noise=tmp_path / "audit.json")


@pytest.mark.thorough
def test_labels_of_people_train_to_the_same_bits_with_and_without_weights(city: Path, tmp_path: Path) -> None:
    """The folder says which it was, and the other is refused there."""
    asked = replace(job(city, tmp_path / "weighed"), manifest=city / "fine.parquet")
    train(asked)
    train(replace(asked, out=tmp_path / "plain", weights=False))
    weighed, plain = (
        torch.load(tmp_path / name / "best.pt", weights_only=False)["state_dict"] for name in ("weighed", "plain")
    )
    assert weighed.keys() == plain.keys()
    assert all(torch.equal(weighed[name], plain[name]) for name in plain)
    with pytest.raises(ValueError, match="weights was True, now False"):
        TrainRequest(replace(asked, weights=False))
