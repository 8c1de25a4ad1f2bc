"""Polygons as evidence in what a teacher's probabilities become."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import autolabel, labels_of, refused
from numpy.typing import NDArray
from PIL import Image
from weighed import drawn_counts, drawn_factors, drawn_places

from autolabel.manifests.evidence import PolygonEvidence
from autolabel.manifests.images import read_image
from autolabel.manifests.label_space import CITYSCAPES, IGNORE, VOID
from autolabel.manifests.places import places
from autolabel.manifests.policy import DENSE, PAPER, Policy
from autolabel.manifests.reading import read_coarse
from autolabel.manifests.recipe import Machine
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.samples import Manifest, Sample, load_manifest, save_manifest
from autolabel.pipeline.analysis.audit import audit
from autolabel.pipeline.job import LabelJob, Portion
from autolabel.pipeline.report.layers import Sources
from autolabel.pipeline.report.painter import Painter
from autolabel.pipeline.rules import Rules
from autolabel.pipeline.run import generate
from autolabel.teacher.decide import Evidence, top_classes
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.networks.fields import InMemory

Map = NDArray[np.uint8]
Floats = NDArray[np.float64]
CPU = torch.device("cpu")
EVIDENCE = PolygonEvidence(drawn_counts(CITYSCAPES), biases={"pole": 1.0, "road": -0.5})
WEIGHED = Policy("ours", 0.3, coarse="human-wins", polygons=EVIDENCE)


@pytest.fixture
def job(city: Path, teacher: Path, tmp_path: Path) -> LabelJob:
    """Label the validation images, of which the second has no coarse label, and the first one void polygons."""
    known = load_manifest(city / "val.parquet")
    samples = []
    for place, sample in enumerate(known.samples):
        assert sample.coarse_label is not None and sample.label_ids == "source"
        ids = np.array(Image.open(sample.coarse_label))
        if place == 0:
            ids[-12:], ids[:3] = 1, 0  # ego vehicle; unlabelled
        Image.fromarray(ids).save(tmp_path / f"{place}.png")
        drawn = None if place == 1 else tmp_path / f"{place}.png"
        samples.append(replace(sample, label=None, source="coarse" if drawn else "none", coarse_label=drawn))
    asked = Manifest(known.label_space, tuple(samples), known.image_root, tmp_path, {})
    save_manifest(tmp_path / "asked.parquet", asked)
    return LabelJob(tmp_path / "asked.parquet", teacher, tmp_path / "run", (0.5, 1.0), policy=WEIGHED)


def posterior(p: Floats, where: NDArray[np.int16], factors: NDArray[np.float32], weight: float) -> Floats:
    """Probabilities (C, H, W) after the evidence, pixel by pixel, written out."""
    found = p.copy()
    for y, x in zip(*np.nonzero(where), strict=True):
        product = p[:, y, x] ** weight * np.exp(factors[where[y, x]].astype(np.float64))
        found[:, y, x] = product / product.sum() * p[:, y, x].sum()
    return found


def by_hand(job: LabelJob, sample: Sample) -> tuple[Map, Floats, Map | None]:
    """Top class and probability of every pixel; and the coarse label, in which drawn void is VOID."""
    teacher, space = load_teacher(job.teacher, device="cpu"), load_manifest(job.manifest).label_space
    logits = teacher.logits(read_image(sample.image), scales=job.scales) / job.policy.temperature
    p = torch.softmax(logits.double(), dim=0).numpy()
    coarse = read_coarse(sample, space, drawn_void=True)
    factors = job.policy.evidence(space)
    if coarse is not None and factors is not None:
        p = posterior(p, places(coarse, len(space)), factors.table, factors.teacher_weight)
    return p.argmax(axis=0).astype(np.uint8), p.max(axis=0), coarse


# --- the decision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("probable", [False, True])
def test_unnamed_pixels_get_the_class_and_probability_of_the_formula(temperature: float, probable: bool) -> None:
    """Of three images the second has no polygons; so wide that it is decided in bands."""
    logits = 2 * torch.randn(3, 19, 60, 1024, generator=torch.Generator().manual_seed(0))
    values = logits
    if probable:
        share = torch.rand(3, 1, 60, 1024, generator=torch.Generator().manual_seed(1))
        values = logits.softmax(dim=1) * (0.95 - 0.9 * share)  # the rest is of no class
    where = np.stack([drawn_places((60, 1024), 19, seed=seed, share=s) for seed, s in ((0, 0.1), (1, 0), (2, 0.4))])
    factors = drawn_factors(19, teacher_weight=0.6)
    evidence = Evidence(torch.from_numpy(where), torch.from_numpy(factors.table.T.copy()), 0.6)
    field = InMemory(values, probable=probable)
    found = top_classes(field, 3, classes=19, device=CPU, temperature=temperature, evidence=evidence)
    plain = top_classes(field, 3, classes=19, device=CPU, temperature=temperature)
    for own, alone in zip(found[2:4], plain[:2], strict=True):
        assert torch.equal(own, alone)
    outside = torch.from_numpy(where == 0)
    assert torch.equal(found.winners[outside], plain.winners[outside])
    assert torch.equal(found.confidences[outside], plain.confidences[outside])
    assert plain.own_winners is plain.winners and not torch.equal(found.winners, plain.winners)
    if probable:
        p = torch.cat([values, 1 - values.sum(dim=1, keepdim=True)], dim=1).double().pow(1 / temperature)
        p = (p / p.sum(dim=1, keepdim=True)).numpy()
    else:
        p = torch.softmax(logits.double() / temperature, dim=1).numpy()
    for image in range(3):
        known = posterior(p[image, :19], where[image], factors.table, 0.6)
        best = np.sort(known, axis=0)
        clear = best[-1] - best[-2] > 1e-5
        assert clear.mean() > 0.999
        assert np.array_equal(found.winners[image].numpy()[clear], known.argmax(axis=0)[clear])
        none = p[image, 19:].sum(axis=0) if probable else np.zeros_like(best[-1])
        close = np.abs(none - best[-1]) < 1e-5
        expected = np.where(none > best[-1], 0, best[-1])
        np.testing.assert_allclose(found.confidences[image].numpy()[~close], expected[~close], rtol=2e-4, atol=2e-6)


def test_images_in_a_batch_get_what_each_gets_alone(job: LabelJob) -> None:
    network, known = load_teacher(job.teacher, device="cpu"), load_manifest(job.manifest)
    images = [read_image(s.image) for s in known.samples]
    evidence = WEIGHED.evidence(known.label_space)
    coarse = [read_coarse(s, known.label_space) for s in known.samples]
    around = [None if label is None else places(label, 19) for label in coarse]

    def codes(batch: int) -> list[NDArray[np.uint8] | NDArray[np.int16]]:
        predictions = network.predict_in_batches(
            images, batch, edges=(0.3,), scales=(1.0,), evidence=evidence, places=around
        )
        return [prediction.codes for prediction in predictions]

    one, two = codes(1), codes(2)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("rule", ["ignore", "agree", "union", "human-wins", "teacher-wins"])
def test_polygons_of_no_class_stay_void_under_a_policy_that_weighs_polygons(rule: str) -> None:
    codes = np.array([[1, 3, 5, 7, 9, 11]], np.uint8)  # sure of every class
    coarse = np.array([[VOID, VOID, IGNORE, IGNORE, 4, 5]], np.uint8)
    weighing = Rules(replace(WEIGHED, threshold=0.5, coarse=rule), CITYSCAPES, (0.5,))
    outcome = weighing.apply(codes, coarse)
    assert outcome.label[0, :4].tolist() == [IGNORE, IGNORE, 2, 3]
    assert weighing.fates(codes, coarse)[0, :2].tolist() == [5, 5] and outcome.fates[:2, 5].tolist() == [1, 1]
    assert outcome.fates.sum() == 6 and outcome.pixels.sum() == (outcome.label != IGNORE).sum()
    plain = Rules(replace(WEIGHED, threshold=0.5, coarse=rule, polygons=None), CITYSCAPES, (0.5,))
    assert plain.apply(codes, coarse).label[0, :4].tolist() == [0, 1, 2, 3]


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "threshold"), [(1.0, 0.3), (0.5, 0.7)])
def test_labels_are_those_of_the_formula(job: LabelJob, temperature: float, threshold: float) -> None:
    policy = replace(WEIGHED, temperature=temperature, threshold=threshold)
    job = replace(job, policy=policy)
    generate(job)
    labels, changed = Run.open(job.out).labels, 0
    for sample in load_manifest(job.manifest).samples:
        top, p, coarse = by_hand(job, sample)
        expected = np.where(p > threshold, top, IGNORE)
        if coarse is not None:
            expected = np.where(coarse < 19, coarse, np.where(coarse == VOID, IGNORE, expected))
        close = abs(p - threshold) < 1e-5
        assert np.array_equal(labels[sample.sample_id][~close], expected[~close])
        plain, _, _ = by_hand(replace(job, policy=PAPER), sample)
        changed += int((plain != top).sum())
        assert coarse is not None or np.array_equal(plain, top)  # nobody has looked at this image
    assert changed > 100


def test_labels_are_the_same_after_a_stop_and_the_teachers_own_confidence_is_kept(
    job: LabelJob, tmp_path: Path
) -> None:
    """It is that of a run without polygons, from which any policy can relabel."""
    kept = replace(job, keep_confidence=6, unit_size=2)
    generate(kept)
    png = replace(kept, out=tmp_path / "png", store="png")
    generate(replace(png, portion=Portion(limit=1)))
    generate(png)
    plain = replace(kept, out=tmp_path / "plain", policy=replace(WEIGHED, polygons=None))
    generate(plain)
    one, other, alone = (Run.open(asked.out) for asked in (kept, png, plain))
    assert labels_of(kept.out) == labels_of(png.out) != labels_of(plain.out)
    for sample_id in one.labels:
        for found, expected, own in zip(
            one.confidence[sample_id], other.confidence[sample_id], alone.confidence[sample_id], strict=True
        ):
            assert np.array_equal(found, expected) and np.array_equal(found, own)
    rows, plain_rows = (RunFolder(folder).statistics("images").to_pylist() for folder in (kept.out, plain.out))
    sure, unsure = ([row["mean_confidence"] for row in of_run] for of_run in (rows, plain_rows))
    assert sure[0] != unsure[0] and sure[1] == unsure[1]  # the second image has no polygons


@pytest.mark.slow
def test_workers_of_ray_make_the_same_labels(job: LabelJob, tmp_path: Path) -> None:
    generate(job)
    generate(replace(job, out=tmp_path / "ray", machine=Machine("ray", 1)))
    assert labels_of(tmp_path / "ray") == labels_of(job.out)


def png_bytes(run: Path) -> dict[Path, bytes]:
    return {p.relative_to(run): p.read_bytes() for p in (run / "labels").rglob("*.png")}


def test_images_without_polygons_get_the_same_bytes_as_without_the_evidence(job: LabelJob, tmp_path: Path) -> None:
    known = load_manifest(job.manifest)
    bare = replace(known, samples=tuple(replace(s, coarse_label=None) for s in known.samples))
    save_manifest(tmp_path / "bare.parquet", bare)
    job, notes = replace(job, manifest=tmp_path / "bare.parquet", store="png"), list[str]()
    generate(job, on_note=notes.append)
    generate(replace(job, out=tmp_path / "plain", policy=replace(WEIGHED, polygons=None)))
    files = png_bytes(job.out)
    assert files == png_bytes(tmp_path / "plain")
    assert "policy 'ours' weighs polygons, but no image has any: the teacher alone decides" in notes


# --- what else must know of it ----------------------------------------------------------------------------------------


def test_an_audit_asks_the_teacher_as_the_run_did(job: LabelJob, city: Path) -> None:
    """So that its thresholds are for the confidences that the run compares with them."""
    generate(job)
    found = audit(job.out, city / "val.parquet", target_precision=0.7)
    counted = np.zeros(20, int)
    for asked, true in zip(
        load_manifest(job.manifest).samples, load_manifest(city / "val.parquet").samples, strict=True
    ):
        _, p, _ = by_hand(job, asked)
        fine = read_coarse(replace(true, coarse_label=true.label), load_manifest(job.manifest).label_space)
        assert fine is not None
        counted += np.histogram(p[fine != IGNORE], bins=np.linspace(0, 1, 21))[0]
    assert found.reliability is not None
    assert abs(np.array(found.reliability.all.pixels) - counted).sum() < 10  # those on an edge
    with pytest.raises(ValueError, match="--fit-temperature: policy 'ours' weighs polygons"):
        audit(job.out, city / "val.parquet", fit_temperature=True)


def test_a_report_asks_the_teacher_as_the_run_did(job: LabelJob) -> None:
    """Its maps of confidence are those that the run compared with its thresholds, at the run's temperature."""
    job = replace(job, policy=replace(WEIGHED, temperature=2.0))
    generate(job)
    expected = {s.sample_id: by_hand(job, s)[1] for s in load_manifest(job.manifest).samples}
    sources = Sources(Run.open(job.out), expected)
    painter = Painter(job.out, sources, teacher=load_teacher(job.teacher, device="cpu"), attention=False, specks=64)
    for place, (sample_id, confidence) in enumerate(expected.items()):
        layers, _ = painter.see(place, sample_id, sources.read(sample_id))
        assert isinstance(layers.confidence, np.ndarray) and np.allclose(layers.confidence, confidence, atol=1e-5)


# --- the command line -------------------------------------------------------------------------------------------------


def asked(job: LabelJob, *options: object) -> list[object]:
    return ["generate", job.manifest, "--teacher", job.teacher, "--out", job.out, "--engine", "local", *options]


def test_dense_takes_the_counts_that_it_is_given_and_goes_on_with_no_others(job: LabelJob, tmp_path: Path) -> None:
    counts = drawn_counts(CITYSCAPES)
    counts.write(tmp_path / "polygons.json")
    result = autolabel(*asked(job, "--policy", "dense", "--polygons", tmp_path / "polygons.json"))
    assert result.exit_code == 0, result.output
    assert Run.open(job.out).policy == DENSE.counted(counts)
    other = drawn_counts(CITYSCAPES, sizes={"192x96": 41})
    other.write(tmp_path / "other.json")
    message = refused(*asked(job, "--policy", "dense", "--polygons", tmp_path / "other.json"))
    assert "policy: polygons.counts was " in message and len(message) < 500
    assert "'; policy: polygons was" not in message
    (tmp_path / "mine.toml").write_text(DENSE.to_toml(counts="polygons.json"))
    assert autolabel(*asked(job, "--policy", tmp_path / "mine.toml")).exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policy", "dense"), "policy 'dense': it weighs what lies around people's polygons, and nobody has named"),
        (("--policy", "human-first", "--polygons", "{d}/polygons.json"), "'human-first' does not weigh polygons"),
        (("--polygons", "{d}/polygons.json"), "policy 'paper' does not weigh polygons: give --policy dense"),
        (("--policy", "dense", "--polygons", "{d}/nowhere.json"), "nowhere.json"),
        (("--policy", "dense", "--polygons", "{d}/square.json"),
         "counted on images of 200 x 200: count them on images of this shape"),
    ],
)  # fmt: skip
def test_what_polygons_cannot_do_is_told_before_anything_is_labelled(
    options: tuple[str, ...], message: str, job: LabelJob, tmp_path: Path
) -> None:
    drawn_counts(CITYSCAPES).write(tmp_path / "polygons.json")
    drawn_counts(CITYSCAPES, sizes={"200x200": 40}).write(tmp_path / "square.json")
    assert message in refused(*asked(job, *(o.format(d=tmp_path) for o in options)))
    assert not job.out.exists()


def test_what_is_odd_about_the_counts_is_told_in_notes(job: LabelJob) -> None:
    few = drawn_counts(CITYSCAPES, sizes={"384x192": 5})
    bare = np.array(few.outside)
    bare[..., 3] = 0
    lifts = np.zeros(bare.shape).tolist()
    counts = replace(few, outside=bare.tolist(), beside_teacher=lifts, teacher="5e1f")
    notes = list[str]()
    generate(replace(job, policy=DENSE.counted(counts)), on_note=notes.append)
    told = [note for note in notes if "polygons" in note]
    assert len(told) == 4
    assert "another teacher" in told[0] and "5 images" in told[1] and "384 x 192" in told[2] and "wall" in told[3]
