"""Fitted weights are those that made the truth likely. If this fails, the policy dense trusts the wrong one of two."""

from __future__ import annotations

import itertools
import math
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import autolabel, contents, refused
from PIL import Image
from test_polygon_counts import labels, written

from autolabel.manifests.evidence import BESIDE_WEIGHT, TEACHER_WEIGHT, PolygonCounts, beside, logarithms
from autolabel.manifests.label_space import CAMVID, CITYSCAPES
from autolabel.manifests.places import places
from autolabel.manifests.policy import DENSE, load_policy
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import Manifest, Sample, fingerprints, load_manifest, save_manifest
from autolabel.pipeline.analysis.asking import Gatherer, beside_teacher, pixels_beside
from autolabel.pipeline.analysis.polygon_weights import ENOUGH, MOST, _unseen
from autolabel.pipeline.analysis.polygons import count_image, count_polygons, paired_samples
from autolabel.pipeline.analysis.weighing import Pixels, Weights, fit, tell
from autolabel.pipeline.job import LabelJob
from autolabel.teacher.checkpoints import fingerprint_tensor
from autolabel.teacher.loading import load_teacher

C = 4
PLANTED = Weights(0.5, 0.9)


def drawn(images: int, weights: Weights = PLANTED, seed: int = 0, pixels: int = 2000) -> list[Pixels]:
    """Images whose truth is drawn from the posterior of these weights."""
    dice = np.random.default_rng(seed)

    def one() -> Pixels:
        p, a = (dice.dirichlet(np.full(C, 0.7), pixels).clip(1e-4) for _ in range(2))
        made = Pixels(np.log(p).astype(np.float32), np.log(a).astype(np.float32), np.zeros(pixels, np.uint8))
        chances = weights.posterior(made).cumsum(axis=1)
        return made._replace(truth=(dice.random((pixels, 1)) > chances).sum(axis=1).clip(max=C - 1).astype(np.uint8))

    return [one() for _ in range(images)]


def test_a_posterior_is_the_product_of_powers_normalised() -> None:
    pixels = drawn(1, pixels=50)[0]
    for n, found in enumerate(PLANTED.posterior(pixels)):
        p, a = math.e ** pixels.teacher[n].astype(float), math.e ** pixels.polygons[n].astype(float)
        each = [p[c] ** 0.5 * a[c] ** 0.9 for c in range(C)]
        assert found == pytest.approx([value / sum(each) for value in each], rel=1e-6)


def test_the_fit_recovers_planted_weights_and_stays_near_the_defaults_with_few_images() -> None:
    many, few = fit(drawn(60, pixels=500)), fit(drawn(2))
    assert (many.teacher, many.polygons) == pytest.approx((0.5, 0.9), abs=0.09)
    for found, near, planted, default in (
        (few.teacher, many.teacher, 0.5, TEACHER_WEIGHT), (few.polygons, many.polygons, 0.9, BESIDE_WEIGHT)
    ):  # fmt: skip
        assert planted < near < found < default


def test_no_other_weights_have_a_smaller_penalised_loss() -> None:
    images = drawn(3, pixels=300)
    best = fit(images)

    def loss(weights: Weights) -> float:
        away = (weights.teacher - TEACHER_WEIGHT) ** 2 + (weights.polygons - BESIDE_WEIGHT) ** 2
        return tell([weights.posterior(pixels) for pixels in images], images).loss + 3 * away / len(images)

    least = loss(best)
    for place, step in itertools.product(range(2), (-0.02, 0.02)):
        numbers = [best.teacher, best.polygons]
        numbers[place] += step
        assert loss(Weights(*numbers)) > least


def test_polygons_that_mislead_get_weight_0_and_a_class_that_never_is_true_takes_no_part() -> None:
    against = drawn(60, Weights(1.0, -0.5), pixels=500)
    assert fit(against).polygons == 0
    without = [
        Pixels(np.delete(p.teacher, 3, 1)[p.truth < 3], np.delete(p.polygons, 3, 1)[p.truth < 3], p.truth[p.truth < 3])
        for p in drawn(3)
    ]
    more = [
        pixels._replace(**{n: np.insert(getattr(pixels, n), 3, -1, 1) for n in ("teacher", "polygons")})
        for pixels in without
    ]
    assert fit(more) == fit(without)


def test_log_loss_and_right_pixels_are_those_of_a_plain_loop() -> None:
    images = drawn(2, pixels=100)
    posteriors = [PLANTED.posterior(pixels) for pixels in images]
    each = [
        (-math.log(row[true]), row.argmax() == true)
        for posterior, pixels in zip(posteriors, images, strict=True)
        for row, true in zip(posterior, pixels.truth, strict=True)
    ]
    assert tell(posteriors, images) == pytest.approx(tuple(np.mean(each, axis=0)))


# --- which images -----------------------------------------------------------------------------------------------------


def photographed(folder: Path, count: int) -> list[Sample]:
    made = []
    for n in range(count):
        (folder / f"{n}.png").write_bytes(f"photo {n}".encode())
        made.append(Sample(f"s{n}", folder / f"{n}.png", 6, 8, source="fine"))
    return made


def chosen(samples: list[Sample], trained_on: Any) -> tuple[list[Sample], list[str]]:
    return _unseen(samples, cast(Any, SimpleNamespace(trained_on=trained_on)), LabelJob(Path("m"), "t.pt", Path()))  # type: ignore[arg-type]


def test_weights_are_fitted_to_images_that_the_teacher_has_not_seen_if_there_are_enough(tmp_path: Path) -> None:
    samples = photographed(tmp_path, ENOUGH + 2)
    seen = fingerprint_tensor(fingerprints(samples[:2]))
    assert chosen(samples, seen) == (
        samples[2:], ["t.pt was trained on 2 of these images: weights are fitted to the others"]
    )  # fmt: skip
    few, notes = chosen(samples[:-1], seen)
    assert few == samples[:-1]
    assert notes[0].startswith(f"t.pt was trained on 2 of the {ENOUGH + 1} images that weights are fitted to: they may")
    assert chosen(samples, fingerprint_tensor([])) == (samples, [])
    everything, notes = chosen(samples, None)
    assert everything == samples and notes[0].startswith("t.pt does not say which images it has seen")


def test_many_images_are_spread_evenly(tmp_path: Path) -> None:
    samples = [Sample(f"s{n}", tmp_path / "x.png", 6, 8) for n in range(MOST * 2 + 1)]
    some, notes = chosen(samples, None)
    assert [s.sample_id for s in some] == [f"s{n * (2 * MOST + 1) // MOST}" for n in range(MOST)]
    assert notes[-1] == f"weights are fitted to {MOST} of 401 images"


class Flat:
    """A teacher that knows nothing."""

    classes = len(CAMVID)
    device = torch.device("cpu")

    def budget(self, **_: Any) -> Any:
        return SimpleNamespace(in_flight=lambda *_, **__: 2)

    def logits(self, image: Any, **_: Any) -> torch.Tensor:
        return torch.zeros(self.classes, *image.shape[:2])


def test_what_an_image_is_fitted_with_leaves_out_its_own_pixels(tmp_path: Path) -> None:
    pairs = [labels(seed) for seed in range(4)]
    path = written(tmp_path, pairs)
    (tmp_path / "images").mkdir()
    for n in range(4):
        Image.new("RGB", (40, 24)).save(tmp_path / f"images/{n}.png")
    space, summary = CAMVID, count_polygons(path)
    gatherer = Gatherer(cast(Any, Flat()), (1.0,), False, paired_samples(path), 10**6)
    looked, bad = gatherer.all(paired_samples(path).samples, None)
    assert bad == [] and len(looked) == 4
    classes = len(space)
    for n, (one, pixels) in enumerate(zip(looked, pixels_beside(looked), strict=True)):
        assert np.array_equal(one.true, count_image(pairs[n], classes).outside)
        others = np.asarray(sum(count_image(pair, classes).outside for k, pair in enumerate(pairs) if k != n))
        said = np.broadcast_to(others.sum(axis=-1, keepdims=True) / classes, others.shape)  # all classes alike
        around = places(pairs[n].coarse, classes)
        where = (around > 0) & (pairs[n].fine < classes)
        table = beside(others, said).reshape(-1, classes)
        assert pixels.polygons == pytest.approx(table[around[where] - 1], abs=1e-5)
        assert np.array_equal(pixels.truth, pairs[n].fine[where])
        assert np.allclose(pixels.teacher, -math.log(classes))
    counts = beside_teacher(summary.counts, looked, teacher="5e")
    assert counts.lifts == pytest.approx(logarithms(summary.counts.counts), abs=1e-3)  # it says the same everywhere
    assert PolygonCounts.from_dict(counts.to_dict()) == counts
    fewer, _ = replace(gatherer, pixels=7).all(paired_samples(path).samples, None)
    assert [len(one.truth) for one in fewer] == [7] * 4
    assert all(np.array_equal(some.true, every.true) for some, every in zip(fewer, looked, strict=True))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def both(city: Path, tmp_path: Path) -> Path:
    """Nine images with fine and coarse labels, six of which the teacher has seen."""
    fine, val = (load_manifest(city / f"{name}.parquet") for name in ("fine", "val"))
    save_manifest(tmp_path / "both.parquet", Manifest.of(CITYSCAPES, (*fine.samples, *val.samples)))
    return tmp_path / "both.parquet"


def test_a_fitted_policy_labels_and_says_where_it_comes_from(
    city: Path, both: Path, teacher: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new/polygons.json"
    more = ("--scales", "1", "--target-precision", 0.9)
    result = autolabel("polygons", both, "--teacher", teacher, "-o", output, *more)
    assert result.exit_code == 0, result.output
    assert f"wrote {output} and {output.with_suffix('.toml')}" in result.stdout
    seen = f"{teacher} was trained on 6 of the 9 images that weights are fitted to: they may trust it too much"
    assert seen in result.stdout and "weights fitted to 9 images only" in result.stdout
    text = output.with_suffix(".toml").read_text()
    sha256 = load_teacher(str(teacher), device="cpu").sha256
    assert text.startswith(f"# Fitted by `autolabel polygons` to 9 images of {both}\n")
    assert f"(sha256 {sha256[:12]}), which looked at scales 1.\n" in text and seen in text
    policy = load_policy(str(output.with_suffix(".toml")))
    assert policy.polygons is not None and policy.polygons.counts is not None
    assert policy.polygons.counts.teacher == sha256
    assert replace(policy.polygons.counts, beside_teacher=(), teacher="") == count_polygons(both).counts
    assert policy == replace(
        DENSE, name="dense-precision-0.9", polygons=policy.polygons, thresholds=tomllib.loads(text)["thresholds"]
    )
    assert policy.thresholds and (policy.polygons.teacher_weight, policy.polygons.polygon_weight) != (0.75, 0.6)
    preset = DENSE.counted(policy.polygons.counts).polygons
    assert preset is not None and (preset.teacher_weight, preset.polygon_weight) == (TEACHER_WEIGHT, BESIDE_WEIGHT)
    run = tmp_path / "run"
    labelled = autolabel(
        "generate", city / "coarse.parquet", "--teacher", teacher, "--out", run, "--limit", 2, "--scales", 1,
        "--policy", output.with_suffix(".toml"),
    )  # fmt: skip
    assert labelled.exit_code == 0, labelled.output
    assert Run.open(run).policy == policy


def test_what_cannot_be_fitted_is_refused_and_nothing_is_written(
    both: Path, camvid: Path, teacher: Path, tmp_path: Path
) -> None:
    output = tmp_path / "polygons.json"
    before = contents(tmp_path)
    one = tmp_path / "one.parquet"
    for manifest, more, message in (
        (both, ("--target-precision", 0.9), "--target-precision 0.9: thresholds are of a teacher, name it with"),
        (both, ("--teacher", teacher, "--target-precision", 1.5), "--target-precision 1.5: expected a share between"),
        (both, ("--teacher", tmp_path / "gone.pt"), "gone.pt"),
        (both, ("--teacher", teacher, "--scales", "0.5,2"), "scales 0.5,2: expected distinct numbers"),
    ):
        assert message in refused("polygons", manifest, "-o", output, *more)
    assert contents(tmp_path) == before
    other = written(tmp_path / "other", [labels(0), labels(1)])
    assert "uses label space 'camvid'" in refused("polygons", other, "-o", output, "--teacher", teacher)
    save_manifest(one, replace(load_manifest(both), samples=load_manifest(both).samples[:1]))
    message = refused("polygons", one, "-o", output, "--teacher", teacher, "--scales", "1")
    assert f"{one}: 1 image with unnamed pixels to fit weights to, expected 2 or more" in message
    assert not output.exists() and not output.with_suffix(".toml").exists()
