"""What people outline, and what it says of the pixels that they left out."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import autolabel, labels_of, refused
from numpy.typing import NDArray

from autolabel.manifests.images import read_image
from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.policy import HUMAN_FIRST, Policy, load_policy
from autolabel.manifests.reading import read_coarse
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.samples import Manifest, Sample, load_manifest, save_manifest
from autolabel.pipeline.analysis.audit import audit
from autolabel.pipeline.analysis.stats import outlined
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.relabel import relabel
from autolabel.pipeline.report.layers import Sources
from autolabel.pipeline.report.painter import Painter
from autolabel.pipeline.run import generate
from autolabel.teacher.decide import Undrawn, top_classes
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.networks.fields import InMemory
from autolabel.teacher.predict import Teacher

Map = NDArray[np.uint8]
CPU = torch.device("cpu")
OUTLINED = Policy("ours", 0.3, coarse="human-wins", outlined={"road": 0.9, "building": 0.8, "sky": 0.5})


@pytest.fixture
def job(city: Path, teacher: Path, tmp_path: Path) -> LabelJob:
    """Label the validation images, of which the second has no coarse label."""
    known = load_manifest(city / "val.parquet")
    samples = [replace(s, coarse_label=None) if place == 1 else s for place, s in enumerate(known.samples)]
    asked = Manifest(known.label_space, tuple(samples), known.image_root, known.label_root, {})
    save_manifest(tmp_path / "asked.parquet", asked)
    return LabelJob(tmp_path / "asked.parquet", teacher, tmp_path / "run", (0.5, 1.0), policy=OUTLINED)


def by_hand(job: LabelJob, sample: Sample) -> tuple[Map, NDArray[np.float32], Map | None]:
    """Top class and probability of every pixel, Bayes' rule written out; and the coarse label."""
    teacher, space = load_teacher(job.teacher, device="cpu"), load_manifest(job.manifest).label_space
    logits = teacher.logits(read_image(sample.image), scales=job.scales) / job.policy.temperature
    p = torch.softmax(logits.double(), dim=0).numpy()
    coarse = read_coarse(sample, space)
    if coarse is not None:
        missed = np.array([1 - job.policy.outlined.get(name, 0) for name in space.names])[:, None, None]
        p = np.where(coarse == IGNORE, p * missed, p)
        p /= p.sum(axis=0)
    return p.argmax(axis=0).astype(np.uint8), p.max(axis=0).astype(np.float32), coarse


# --- the decision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_undrawn_pixels_get_the_class_and_probability_of_bayes_rule(temperature: float) -> None:
    """Of two images only some pixels of the first were left out; a megapixel, so that it is decided in bands."""
    logits = 2 * torch.randn(2, 19, 256, 1024, generator=torch.Generator().manual_seed(0))
    where = torch.rand(2, 256, 1024, generator=torch.Generator().manual_seed(1)) < 0.5
    where[1] = False
    shares = torch.linspace(0.01, 1, 19)
    winner, confidence = top_classes(
        InMemory(logits), 2, classes=19, device=CPU, temperature=temperature, undrawn=Undrawn(where, shares)
    )
    p = torch.softmax(logits.double() / temperature, dim=1)
    p = torch.where(where[:, None], p * shares.double().view(-1, 1, 1), p)
    expected, top = (p / p.sum(dim=1, keepdim=True)).max(dim=1)
    close = p.topk(2, dim=1).values.diff(dim=1)[:, 0].abs() < 1e-6
    assert close.float().mean() < 1e-4
    assert torch.equal(winner[~close].long(), top[~close])
    torch.testing.assert_close(confidence.double(), expected, rtol=1e-5, atol=0)
    plain, _ = top_classes(InMemory(logits), 2, classes=19, device=CPU, temperature=temperature)
    assert torch.equal(winner[~where], plain[~where]) and not torch.equal(winner[where], plain[where])


def test_outlined_shares_that_are_equal_for_all_classes_leave_probabilities_as_they_are(city: Path) -> None:
    space = load_manifest(city / "val.parquet").label_space
    assert Policy().prior(space) is None
    assert Policy(outlined=dict.fromkeys(space.names, 0.7)).prior(space) is None
    assert Policy(outlined={"sky": 0.75}).prior(space) == [0.25 if name == "sky" else 1 for name in space.names]


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_labels_are_those_of_bayes_rule_where_people_named_nothing(job: LabelJob, temperature: float) -> None:
    job = replace(job, policy=replace(OUTLINED, temperature=temperature))
    generate(job)
    labels, changed = Run.open(job.out).labels, 0
    for sample in load_manifest(job.manifest).samples:
        top, p, coarse = by_hand(job, sample)
        expected = np.where(p > 0.3, top, IGNORE)
        if coarse is not None:
            expected = np.where(coarse != IGNORE, coarse, expected)
        close = abs(p - 0.3) < 1e-5
        assert np.array_equal(labels[sample.sample_id][~close], expected[~close])
        plain, _, _ = by_hand(replace(job, policy=HUMAN_FIRST), sample)
        changed += int((plain != top).sum())
        assert coarse is not None or np.array_equal(plain, top)  # nobody has looked at this image: nothing was left out
    assert changed > 100


def test_labels_do_not_depend_on_the_batch(job: LabelJob, teacher: Path) -> None:
    """Images of which some have a coarse label, computed one by one and together."""
    network: Teacher = load_teacher(teacher, device="cpu")
    known = load_manifest(job.manifest)
    images = [read_image(s.image) for s in known.samples]
    prior, coarse = OUTLINED.prior(known.label_space), [read_coarse(s, known.label_space) for s in known.samples]

    def codes(batch: int) -> list[NDArray[np.uint8] | NDArray[np.int16]]:
        predictions = network.predict_in_batches(images, batch, edges=(0.3,), scales=(1.0,), prior=prior, coarse=coarse)
        return [prediction.codes for prediction in predictions]

    one, two = codes(1), codes(2)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_outlined_counts_what_people_outline_and_writes_a_policy(job: LabelJob, tmp_path: Path) -> None:
    """The whole way by the command line; the counts are those of a loop over pixels."""
    job = replace(job, policy=HUMAN_FIRST, keep_confidence=4)
    generate(job)
    result = autolabel("outlined", job.out, "-o", tmp_path / "new" / "outlined.toml")
    assert result.exit_code == 0, result.output
    found = outlined(job.out)
    policy = found.policy
    assert load_policy(str(tmp_path / "new/outlined.toml")) == policy
    assert policy == replace(HUMAN_FIRST, name="human-first-outlined", outlined=policy.outlined)
    space, kept = load_manifest(job.manifest).label_space, Run.open(job.out).confidence
    named, left_out = np.zeros((2, len(space)), int)
    for sample in load_manifest(job.manifest).samples:
        coarse = read_coarse(sample, space)
        if coarse is not None:
            top, _ = kept[sample.sample_id]
            named += np.bincount(coarse[coarse != IGNORE], minlength=len(space))
            left_out += np.bincount(top[coarse == IGNORE], minlength=len(space))
    assert found.classes["drawn"].tolist() == named.tolist() and found.classes["undrawn"].tolist() == left_out.tolist()
    for name, n, m in zip(space.names, named, left_out, strict=True):
        assert policy.outlined.get(name) == (round(min(n / (n + m), 0.99), 4) if n + m else None)
        assert f"{n:,}" in result.output
    again = tmp_path / "again"
    command = "generate", job.manifest, "--teacher", job.teacher, "--engine", "local", "--out", again
    result = autolabel(*command, "--policy", tmp_path / "new/outlined.toml")
    assert result.exit_code == 0, result.output
    assert Run.open(again).policy.outlined == policy.outlined
    assert labels_of(again) != labels_of(job.out)
    assert outlined(again).policy.name == policy.name  # counted once more it is still the same kind of policy


def test_a_class_that_was_never_found_outside_the_polygons_keeps_a_probability(job: LabelJob) -> None:
    generate(replace(job, policy=HUMAN_FIRST))
    path = job.out / "stats/classes.parquet"
    table = RunFolder(job.out).statistics("classes")
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = table.schema.get_field_index("undrawn_pixels")
    pq.write_table(table.set_column(place, "undrawn_pixels", pa.array([0] * len(table), pa.int64())), path)
    policy = outlined(job.out).policy
    assert policy.outlined and set(policy.outlined.values()) == {0.99}


def test_outlined_refuses_a_run_without_coarse_labels(job: LabelJob, tmp_path: Path) -> None:
    known = load_manifest(job.manifest)
    samples = tuple(replace(s, coarse_label=None) for s in known.samples)
    save_manifest(tmp_path / "bare.parquet", replace(known, samples=samples))
    generate(replace(job, manifest=tmp_path / "bare.parquet"))
    assert "has no coarse label: nobody outlined anything" in refused(
        "outlined", job.out, "-o", tmp_path / "outlined.toml"
    )
    assert not (tmp_path / "outlined.toml").exists()


# --- what else must know of it ----------------------------------------------------------------------------------------


def test_relabel_keeps_the_outlined_shares_and_refuses_others(job: LabelJob, tmp_path: Path) -> None:
    generate(replace(job, keep_confidence=4))
    generate(replace(job, out=tmp_path / "strict", policy=replace(OUTLINED, threshold=0.5)))
    relabel(Run.open(job.out), replace(OUTLINED, threshold=0.5), out=tmp_path / "re")
    assert labels_of(tmp_path / "re") == labels_of(tmp_path / "strict")
    one, two = (RunFolder(r).statistics("classes").to_pylist() for r in (tmp_path / "re", tmp_path / "strict"))
    assert one == two
    with pytest.raises(ValueError, match="differ in what is outlined: only `autolabel generate` can change it"):
        relabel(Run.open(job.out), HUMAN_FIRST, out=tmp_path / "no")


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
    assert abs(np.array(found.reliability.all.pixels) - counted).sum() < 10  # those on an edge
    with pytest.raises(ValueError, match="--fit-temperature: policy 'ours' says what is outlined"):
        audit(job.out, city / "val.parquet", fit_temperature=True)


def test_a_report_asks_the_teacher_as_the_run_did(job: LabelJob) -> None:
    """Its maps of confidence are those that the run compared with its thresholds, at the run's temperature."""
    job = replace(job, policy=replace(OUTLINED, temperature=2.0))
    generate(job)
    expected = {s.sample_id: by_hand(job, s)[1] for s in load_manifest(job.manifest).samples}
    sources = Sources(Run.open(job.out), expected)
    painter = Painter(job.out, sources, teacher=load_teacher(job.teacher, device="cpu"), attention=False, specks=64)
    for place, (sample_id, confidence) in enumerate(expected.items()):
        layers, _ = painter.see(place, sample_id, sources.read(sample_id))
        assert isinstance(layers.confidence, np.ndarray) and np.allclose(layers.confidence, confidence, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[outlined]\nsky = 1.0", "outlined 'sky' 1: expected a share of its pixels in [0, 1), such as 0.8"),
        ("[outlined]\nsky = '80 %'", "outlined.sky = '80 %': expected a number"),
        ("outlined = 0.8", "outlined = 0.8: expected a table"),
        ("[outlined]\nskye = 0.8", "'skye' is no class of label space 'cityscapes': did you mean 'sky'?"),
    ],
)
def test_a_problem_of_the_request_is_told_before_anything_is_labelled(text: str, message: str, job: LabelJob) -> None:
    file = job.out.parent / "mine.toml"
    file.write_text(text)
    asked = job.manifest, "--teacher", job.teacher, "--policy", file, "--out", job.out
    assert message in refused("generate", *asked)
    assert not (job.out / "run.json").exists()
