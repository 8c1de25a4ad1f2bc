"""The probability of every label's class, which a run keeps if it is asked to."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import autolabel, labels_of

from autolabel.manifests.images import read_image
from autolabel.manifests.label_space import CAMVID, IGNORE
from autolabel.manifests.policy import HUMAN_FIRST, PAPER, Policy
from autolabel.manifests.reading import read_coarse
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.labels import middles
from autolabel.manifests.run.sample_labels import read_sample_probability
from autolabel.manifests.run.shards import crc32c
from autolabel.manifests.samples import load_manifest
from autolabel.pipeline.job import LabelJob, Portion
from autolabel.pipeline.relabel import relabel
from autolabel.pipeline.rules import Rules
from autolabel.pipeline.run import generate
from autolabel.pipeline.verify import verify
from autolabel.teacher.loading import load_teacher


@pytest.fixture
def job(city: Path, teacher: Path, tmp_path: Path) -> LabelJob:
    """Label the validation images, whose polygons decide where they are."""
    return LabelJob(
        city / "val.parquet", teacher, tmp_path / "run", (1.0,), policy=HUMAN_FIRST, keep_probability=True, unit_size=2
    )


@pytest.mark.parametrize("store", ["zarr", "png"])
def test_it_is_the_teachers_where_the_teacher_decided_and_certain_where_people_did(store: str, job: LabelJob) -> None:
    """Also after a stop; with the layer the labels are the same as without it."""
    job = replace(job, store=store)
    generate(replace(job, portion=Portion(limit=1)))
    generate(job)
    plain = replace(job, out=job.out.parent / "plain", keep_probability=False)
    generate(plain)
    assert labels_of(job.out) == labels_of(plain.out)
    run, network, asked = Run.open(job.out), load_teacher(job.teacher, device="cpu"), load_manifest(job.manifest)
    published = {sample.sample_id: sample for sample in run.manifest.samples()}
    assert set(run.probability) == {sample.sample_id for sample in asked.samples}
    for sample in asked.samples:
        name, coarse = sample.sample_id, read_coarse(sample, asked.label_space)
        _, p = network.confidence(read_image(sample.image), scales=(1.0,))
        assert coarse is not None
        expected = np.where(coarse != IGNORE, 255, np.where(run.labels[name] != IGNORE, np.rint(255 * p), 0))
        assert np.array_equal(run.probability[name], expected)
        assert np.array_equal(read_sample_probability(published[name]), expected)
        window = read_sample_probability(published[name], window=(3, 5, 40, 60))
        assert np.array_equal(window, expected[3:43, 5:65])
    assert not verify(job.out).faults


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("ignore", [200, 200, 0, 0]),
        ("human-wins", [255, 255, 255, 0]),
        ("teacher-wins", [255, 200, 255, 0]),
        ("agree", [255, 0, 0, 0]),
    ],
)
def test_it_is_certain_where_people_named_the_class_of_the_label_and_are_asked(rule: str, expected: list[int]) -> None:
    """They agree; they say something else; the teacher is unsure; and so it is, where they say nothing."""
    codes, coarse = np.array([[3, 3, 2, 2]], np.uint8), np.array([[1, 2, 3, 255]], np.uint8)
    rules = Rules(Policy(coarse=rule), CAMVID, (0.5,))
    found = rules.apply(codes, coarse, np.array([[200, 200, 90, 90]], np.uint8))
    assert found.probability is not None and found.probability.tolist() == [expected]
    assert rules.apply(codes, coarse).probability is None


def test_a_run_that_was_not_asked_has_none_and_says_how_to_get_them(job: LabelJob) -> None:
    generate(replace(job, keep_probability=False))
    run = Run.open(job.out)
    with pytest.raises(ValueError, match="has kept no probabilities: generate or relabel with --keep-probability"):
        _ = run.probability
    with pytest.raises(ValueError, match="has kept no probabilities: generate or relabel with --keep-probability"):
        read_sample_probability(next(run.manifest.samples()))
    with pytest.raises(ValueError, match="keep_probability was false, now true"):
        generate(job)


def test_a_changed_byte_of_it_is_found_and_its_unit_is_done_again(job: LabelJob) -> None:
    generate(job)
    before = Run.open(job.out).probability
    checksums = {name: before.crc32c(name) for name in before}
    (shard,) = (job.out / "probability.zarr").glob("*/c.0.0.0")
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    assert verify(job.out).faults == [f"{shard} differs from what was committed"]
    verify(job.out, repair=True)
    generate(job)
    again = Run.open(job.out).probability
    assert {name: crc32c(again[name]) for name in again} == checksums


def test_relabel_keeps_the_middles_of_the_levels(job: LabelJob, tmp_path: Path) -> None:
    generate(replace(job, policy=PAPER, keep_confidence=6, keep_probability=False))
    source = Run.open(job.out)
    command = "relabel", job.out, "--policy", "human-first", "--out", tmp_path / "again", "--keep-probability"
    assert autolabel(*command).exit_code == 0
    run, space = Run.open(tmp_path / "again"), source.label_space
    middle = np.rint(255 * middles(source.confidence.edges))
    for sample in load_manifest(job.manifest).samples:
        coarse, (_, level) = read_coarse(sample, space), source.confidence[sample.sample_id]
        label = run.labels[sample.sample_id]
        expected = np.where(label == IGNORE, 0, np.where(coarse != IGNORE, 255, middle[level]))
        assert np.array_equal(run.probability[sample.sample_id], expected)
    relabel(source, HUMAN_FIRST, out=tmp_path / "plain")
    assert labels_of(tmp_path / "plain") == labels_of(tmp_path / "again")
