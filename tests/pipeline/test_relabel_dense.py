"""A run that has kept its teacher's confidence is labelled again with polygons weighed in, and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import autolabel, labels_of, refused
from weighed import drawn_counts

import autolabel as al
from autolabel.manifests.evidence import PolygonEvidence
from autolabel.manifests.images import read_image
from autolabel.manifests.label_space import CAMVID, CITYSCAPES, IGNORE, VOID
from autolabel.manifests.places import places
from autolabel.manifests.policy import DENSE, HUMAN_FIRST, PAPER, Policy
from autolabel.manifests.reading import read_coarse
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.run.shards import DamagedLabel
from autolabel.manifests.samples import load_manifest, save_manifest
from autolabel.pipeline.analysis.polygons import count_polygons
from autolabel.pipeline.before import MachineSays
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.posterior import FromLevels
from autolabel.pipeline.relabel import relabel
from autolabel.pipeline.run import generate
from autolabel.pipeline.verify import verify
from autolabel.teacher.loading import load_teacher

EVIDENCE = PolygonEvidence(drawn_counts(CITYSCAPES), biases={"pole": 1.0, "road": -0.5})
WEIGHED = Policy("weighed", 0.5, coarse="human-wins", polygons=EVIDENCE)  # turns many labels


def job(manifest: Path, teacher: Path, out: Path, policy: Policy, **more: object) -> LabelJob:
    asked = LabelJob(manifest, teacher, out, (1.0,), policy=policy, unit_size=4, keep_confidence=8)
    return replace(asked, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def manifest(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of the city; the second has no coarse label."""
    known = load_manifest(city / "coarse.parquet")
    samples = [replace(s, coarse_label=None) if place == 1 else s for place, s in enumerate(known.samples[:6])]
    path = tmp_path_factory.mktemp("asked") / "asked.parquet"
    save_manifest(path, replace(known, samples=tuple(samples)))
    return path


@pytest.fixture(scope="module", params=["zarr", "png"])
def kept(
    request: pytest.FixtureRequest, manifest: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run by the policy `paper`, with its confidence kept."""
    run = tmp_path_factory.mktemp("kept") / "run"
    generate(job(manifest, teacher, run, PAPER, store=request.param))
    return run


@pytest.fixture(scope="module")
def weighed(manifest: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that `generate` made with polygons weighed in, with the teacher's own confidence kept."""
    run = tmp_path_factory.mktemp("weighed") / "run"
    generate(job(manifest, teacher, run, WEIGHED))
    return run


def test_the_second_class_is_the_teachers_where_people_named_nothing(kept: Path, teacher: Path, manifest: Path) -> None:
    confidence, knows = Run.open(kept).confidence, load_teacher(teacher, device="cpu")
    for place, sample in enumerate(load_manifest(manifest).samples[:3]):
        second, coarse = confidence.second(sample.sample_id), read_coarse(sample, CITYSCAPES)
        if place == 1:
            assert coarse is None and second is None
            continue
        logits = knows.logits(read_image(sample.image), scales=(1.0,)).numpy()
        expected = np.argsort(-logits, axis=0, kind="stable")[1]
        assert coarse is not None and np.array_equal(second, np.where(coarse == IGNORE, expected, IGNORE))


def test_labels_are_those_of_the_posterior_from_what_is_kept(kept: Path, manifest: Path, tmp_path: Path) -> None:
    run, out = Run.open(kept), tmp_path / "relabelled"
    assert relabel(run, WEIGHED, out=out).accounts.labelled == 6
    labels, decide = Run.open(out).labels, FromLevels(WEIGHED, CITYSCAPES, run.confidence.edges)
    images = RunFolder(out).statistics("images").to_pandas().set_index("sample_id")
    above = run.confidence.edges.index(0.5) + 1
    for sample in load_manifest(manifest).samples:
        coarse = read_coarse(sample, CITYSCAPES, drawn_void=True)
        prediction = decide(
            *run.confidence[sample.sample_id],
            place=decide.places(coarse),
            second=run.confidence.second(sample.sample_id),
        )
        top, level = np.divmod(prediction.codes, prediction.levels)
        expected = np.where(level >= above, top, IGNORE)
        if coarse is not None:
            expected = np.where(coarse < 19, coarse, np.where(coarse == VOID, IGNORE, expected))
            mean = prediction.confidence.sum() / coarse.size
            assert images.loc[sample.sample_id, "mean_confidence"] == pytest.approx(mean, rel=1e-9)
        assert np.array_equal(labels[sample.sample_id], expected)
    assert verify(out).faults == []


def test_few_labels_are_other_ones_than_those_of_generate(
    kept: Path, city: Path, manifest: Path, teacher: Path, tmp_path: Path
) -> None:
    """In polygons none; in images without polygons none; elsewhere few, with counts of the city's own polygons."""
    dense = DENSE.counted(count_polygons(city / "fine.parquet", output=tmp_path / "polygons.json").counts)
    relabel(Run.open(kept), dense, out=tmp_path / "levels")
    generate(job(manifest, teacher, tmp_path / "floats", dense))
    relabel(Run.open(kept), replace(dense, polygons=None), out=tmp_path / "without")
    levels, floats, without = (Run.open(tmp_path / run).labels for run in ("levels", "floats", "without"))
    unnamed = other = turned = 0
    for sample in load_manifest(manifest).samples:
        coarse, name = read_coarse(sample, CITYSCAPES, drawn_void=True), sample.sample_id
        differs = levels[name] != floats[name]
        if coarse is None:
            assert not differs.any()
            continue
        place = places(coarse, 19)
        assert not differs[place == 0].any()
        unnamed, other = unnamed + int((place > 0).sum()), other + int(differs.sum())
        turned += int((floats[name] != without[name]).sum())
    assert 0 < other < min(turned, 0.1 * unnamed), (other, turned, unnamed)


@pytest.mark.parametrize("policy", [HUMAN_FIRST, PAPER], ids=lambda policy: policy.name)
def test_from_a_run_with_polygons_weighed_other_policies_get_the_labels_of_generate(
    policy: Policy, weighed: Path, manifest: Path, teacher: Path, tmp_path: Path
) -> None:
    """Labels to the byte; confidences from the middles of levels."""
    relabel(Run.open(weighed), policy, out=tmp_path / "back")
    generate(job(manifest, teacher, tmp_path / "generated", policy, keep_confidence=None))
    assert labels_of(tmp_path / "back") == labels_of(tmp_path / "generated") != labels_of(weighed)
    back, generated = (
        RunFolder(tmp_path / run).statistics("classes").to_pandas().set_index(["sample_id", "class_id"])
        for run in ("back", "generated")
    )
    for column in generated:
        if column.endswith("_pixels") or column in ("pixels", "fraction"):
            assert back[column].equals(generated[column]), column
    known = generated["mean_confidence"].dropna()
    assert (abs(back["mean_confidence"].dropna() - known) < 0.16).all()
    assert (back["confidence_hist"].map(sum) == generated["confidence_hist"].map(sum)).all()


def test_a_run_with_polygons_weighed_relabels_as_any_other_with_the_same_confidence(
    weighed: Path, kept: Path, tmp_path: Path
) -> None:
    relabel(Run.open(weighed), WEIGHED, out=tmp_path / "one")
    relabel(Run.open(kept), WEIGHED, out=tmp_path / "other")
    one, other = (Run.open(tmp_path / run).labels for run in ("one", "other"))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_relabelling_that_was_stopped_goes_on_with_the_same_counts_alone(kept: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    for out in (whole, run):
        relabel(Run.open(kept), WEIGHED, out=out)
    next((run / "units").iterdir()).unlink()
    assert 0 < relabel(Run.open(kept), WEIGHED, out=run).done < 6
    assert labels_of(run) == labels_of(whole)
    with pytest.raises(ValueError, match=r"teacher_weight was 0\.9, now 0\.5"):
        relabel(Run.open(kept), replace(WEIGHED, polygons=replace(EVIDENCE, teacher_weight=0.5)), out=run)


def test_a_flipped_bit_in_the_second_class_is_found_and_repaired(manifest: Path, teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    generate(job(manifest, teacher, run, PAPER))
    shard = run / "second.zarr/b512x512/c.0.0.0"
    before = shard.read_bytes()
    shard.write_bytes(before[:100] + bytes([before[100] ^ 1]) + before[101:])
    with pytest.raises(DamagedLabel):
        relabel(Run.open(run), WEIGHED, out=tmp_path / "weighed")
    assert relabel(Run.open(run), HUMAN_FIRST, out=tmp_path / "human first").accounts.labelled == 6
    assert any("second.zarr" in fault for fault in verify(run, repair=True).faults)
    generate(job(manifest, teacher, run, PAPER))
    assert shard.read_bytes() == before and verify(run).faults == []


def test_corrections_find_the_label_that_was_decided_from_levels_and_do_not_guess_another(
    kept: Path, weighed: Path, tmp_path: Path
) -> None:
    """Of a run that `generate` made with polygons, nobody can tell from levels which rule decided."""
    relabelled = tmp_path / "relabelled"
    relabel(Run.open(kept), WEIGHED, out=relabelled)
    from_levels, from_floats = MachineSays(Run.open(relabelled)), MachineSays(Run.open(weighed))
    labels = Run.open(relabelled).labels
    for place, name in enumerate(labels):
        one, other = from_levels.before(name), from_floats.before(name)
        assert one.label is not None and one.top is not None and one.fate is not None
        assert np.array_equal(one.label, labels[name])
        assert other.label is not None and (other.fate is not None) == (place == 1)
    if Run.open(relabelled).recipe.store == "png":
        whole = dict(labels)
        for name, stored in from_levels.labels.items():
            stored.path.write_bytes(b"somebody wrote over it")
            assert np.array_equal(from_levels.label(name), whole[name])


def test_both_ways_to_name_the_counts_make_the_same_labels(kept: Path, tmp_path: Path) -> None:
    counts = tmp_path / "polygons.json"
    drawn_counts(CITYSCAPES).write(counts)
    (tmp_path / "polygons.toml").write_text('coarse = "human-wins"\n[polygons]\ncounts = "polygons.json"\n')
    for out, named in (
        ("a", ("--policy", "dense", "--polygons", counts)), ("b", ("--policy", tmp_path / "polygons.toml"))
    ):  # fmt: skip
        result = autolabel("relabel", kept, *named, "--out", tmp_path / out)
        assert result.exit_code == 0, result.output
    al.relabel(kept, policy="dense", polygons=counts, out=tmp_path / "c")
    assert labels_of(tmp_path / "a") == labels_of(tmp_path / "b") == labels_of(tmp_path / "c")


def test_what_relabel_cannot_weigh_is_refused_in_one_line(
    kept: Path, manifest: Path, teacher: Path, tmp_path: Path
) -> None:
    drawn_counts(CITYSCAPES).write(tmp_path / "city.json")
    drawn_counts(CAMVID).write(tmp_path / "camvid.json")
    plain = tmp_path / "plain"
    generate(job(manifest, teacher, plain, PAPER, keep_confidence=None))
    dense = "--policy", "dense"
    for run, options, message in (
        (kept, dense, "nobody has named counts of it: give --polygons polygons.json"),
        (kept, (*dense, "--polygons", tmp_path / "camvid.json"), "counted for other classes than those of label space"),
        (kept, ("--policy", "paper", "--polygons", tmp_path / "city.json"), "does not weigh polygons"),
        (plain, (*dense, "--polygons", tmp_path / "city.json"), "has kept no confidence: generate it anew"),
    ):
        assert message in refused("relabel", run, *options, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
