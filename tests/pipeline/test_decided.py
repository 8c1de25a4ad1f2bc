"""Audit, review, report and exports are about what decided, polygons weighed in. If this fails, they tell of a label
that the run does not have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import autolabel, contents, refused
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests.evidence import PolygonEvidence
from autolabel.manifests.label_space import CITYSCAPES, IGNORE, VOID
from autolabel.manifests.places import places
from autolabel.manifests.policy import Policy, load_policy
from autolabel.manifests.reading import read_coarse
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.labels import middles
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.samples import Manifest, Sample, load_manifest, save_manifest
from autolabel.manifests.tables import BadTable
from autolabel.pipeline.analysis.audit import audit
from autolabel.pipeline.analysis.errors import find_errors
from autolabel.pipeline.analysis.polygons import count_polygons
from autolabel.pipeline.decided import Decided
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.outgoing import RunMaps
from autolabel.pipeline.relabel import relabel
from autolabel.pipeline.report.layers import Missing, Sources
from autolabel.pipeline.report.notebook import look
from autolabel.pipeline.report.write import write_report
from autolabel.pipeline.review.belief import Belief
from autolabel.pipeline.review.review import review
from autolabel.pipeline.review.survey import Looking
from autolabel.pipeline.run import generate

pytestmark = pytest.mark.thorough

Map = NDArray[np.uint8]


@pytest.fixture(scope="module")
def runs(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `dense` and `plain` of the validation images, which keep confidence, and their manifest.

    The first image has a void polygon, the second no coarse label.
    """
    folder = tmp_path_factory.mktemp("decided")
    known, samples = load_manifest(city / "val.parquet"), list[Sample]()
    for place, sample in enumerate(known.samples):
        assert sample.coarse_label is not None and sample.label_ids == "source"
        ids = np.array(Image.open(sample.coarse_label))
        if place == 0:
            ids[-12:] = 1  # ego vehicle
        Image.fromarray(ids).save(folder / f"{place}.png")
        drawn = None if place == 1 else folder / f"{place}.png"
        samples.append(replace(sample, label=None, source="coarse" if drawn else "none", coarse_label=drawn))
    save_manifest(folder / "asked.parquet", Manifest(known.label_space, tuple(samples), known.image_root, folder, {}))
    evidence = PolygonEvidence(count_polygons(city / "fine.parquet").counts, biases={"pole": 1.0, "road": -0.5})
    policy = Policy("ours", 0.5, coarse="human-wins", polygons=evidence)
    job = LabelJob(folder / "asked.parquet", teacher, folder / "dense", (1.0,), policy=policy, keep_confidence=12)
    generate(job)
    generate(replace(job, out=folder / "plain", policy=replace(policy, polygons=None)))
    return folder


def images(runs: Path) -> Iterator[tuple[str, Map | None, Map, Map]]:
    """Id, coarse label, and the top class and level that decided, of every image."""
    run = Run.open(runs / "dense")
    decided = Decided(run.policy, CITYSCAPES, run.confidence.edges)
    for sample in load_manifest(runs / "asked.parquet").samples:
        coarse = read_coarse(sample, CITYSCAPES, drawn_void=True)
        yield sample.sample_id, coarse, *decided.of(run.confidence, sample.sample_id, coarse)


def unnamed(coarse: Map | None) -> NDArray[np.bool_]:
    assert coarse is not None
    return np.asarray(places(coarse, len(CITYSCAPES)) > 0)


def test_what_decided_is_what_the_label_has_and_elsewhere_what_was_kept(runs: Path) -> None:
    """`generate` knew all probabilities, kept levels tell one: of the pixels that nobody named some differ."""
    run, differ, asked, turned = Run.open(runs / "dense"), 0, 0, 0
    needed = run.confidence.edges.index(0.5) + 1
    for sample_id, coarse, top, level in images(runs):
        own = run.confidence[sample_id]
        if coarse is None:
            assert np.array_equal(top, own[0]) and np.array_equal(level, own[1])
            continue
        where = unnamed(coarse)
        assert np.array_equal(top[~where], own[0][~where]) and np.array_equal(level[~where], own[1][~where])
        told = np.where(level >= needed, top, IGNORE)
        asked, differ = asked + int(where.sum()), differ + int((told != run.labels[sample_id])[where].sum())
        turned += int((top != own[0]).sum())
    assert turned > 100 and 0 < differ < 0.15 * asked


def test_what_decided_is_exactly_the_label_of_a_run_that_was_relabelled(runs: Path, tmp_path: Path) -> None:
    source, policy = Run.open(runs / "plain"), Run.open(runs / "dense").policy
    relabel(source, policy, out=tmp_path / "run")
    labels, decided = Run.open(tmp_path / "run").labels, Decided(policy, CITYSCAPES, source.confidence.edges)
    for sample in load_manifest(runs / "asked.parquet").samples:
        coarse = read_coarse(sample, CITYSCAPES, drawn_void=True)
        top, level = decided.of(source.confidence, sample.sample_id, coarse)
        told = np.where(level > source.confidence.edges.index(0.5), top, IGNORE)
        if coarse is not None:
            told = np.where(coarse == IGNORE, told, np.where(coarse == VOID, IGNORE, coarse))
        assert np.array_equal(told, labels[sample.sample_id])


def test_an_audit_of_kept_confidence_is_about_what_decided_and_suggests_a_policy_that_relabels(
    runs: Path, city: Path, tmp_path: Path
) -> None:
    found = audit(runs / "dense", city / "val.parquet", target_precision=0.7)
    truth = {s.sample_id: read_sample_label(s, CITYSCAPES) for s in load_manifest(city / "val.parquet").samples}
    counts, right = np.zeros((2, 20), int)
    middle = middles(Run.open(runs / "dense").confidence.edges).astype(np.float32)
    bins = np.searchsorted((np.arange(1, 20) / 20).astype(np.float32), middle)
    for sample_id, _, top, level in images(runs):
        true = truth[sample_id]
        for counted, where in ((counts, true != IGNORE), (right, true == top)):
            counted += np.bincount(bins[level[where]], minlength=20)
    assert found.reliability is not None
    assert list(found.reliability.all.pixels) == counts.tolist()
    assert list(found.reliability.all.correct) == right.tolist()
    assert found.human is not None and found.human.right is not None  # void polygons name no class
    suggested = load_policy(str(runs / "dense" / "suggested.toml"))
    assert (
        suggested.polygons == Run.open(runs / "dense").policy.polygons
        and suggested.coarse == "human-wins"
        and suggested.thresholds
    )
    again = ("relabel", runs / "dense", "--policy", runs / "dense" / "suggested.toml", "--out", tmp_path / "again")
    result = autolabel(*again)
    assert result.exit_code == 0, result.output
    assert Run.open(tmp_path / "again").policy == suggested


def test_an_audit_by_the_teacher_says_nearly_the_same(runs: Path, city: Path, teacher: Path) -> None:
    kept, looked = (audit(runs / "dense", city / "val.parquet", **more) for more in ({}, {"teacher": teacher}))
    assert kept.reliability and looked.reliability and kept.auto == looked.auto
    rights = [sum(diagram.all.correct) / sum(diagram.all.pixels) for diagram in (kept.reliability, looked.reliability)]
    assert abs(rights[0] - rights[1]) < 0.03 and rights[0] != rights[1]


def test_polygons_that_are_gone_are_missed_by_whatever_asks_what_decided(runs: Path, city: Path) -> None:
    gone = runs / "asked.parquet"
    gone.rename(runs / "moved.parquet")
    try:
        with pytest.raises(BadTable, match=r"asked\.parquet"):
            audit(runs / "dense", city / "val.parquet")
        names = list(Run.open(runs / "dense").labels)
        layers = Sources(Run.open(runs / "dense"), names).read(names[0])
        assert isinstance(layers.confidence, Missing) and isinstance(layers.fates, Missing)
        assert RunMaps(Run.open(runs / "dense")).load(names[0])[1] is None
        notes = review(runs / "dense", 1, out=runs / "fix").notes
        assert any(note.startswith("Nobody can tell what people outlined") for note in notes)
        assert isinstance(Sources(Run.open(runs / "plain"), names).read(names[0]).confidence, np.ndarray)
    finally:
        (runs / "moved.parquet").rename(gone)


def test_review_doubts_the_label_that_the_run_has_and_not_what_people_said(runs: Path) -> None:
    run = Run.open(runs / "dense")
    edges = run.confidence.edges
    belief = Belief.of(run, edges, None, np.ones(19))
    looking, by_id = Looking(run, run, belief), {name: (coarse, top) for name, coarse, top, _ in images(runs)}
    kept = edges.index(0.5) + 1
    for row, other in looking.rows():
        coarse, decided = by_id[row.sample_id]
        label, top, keys = looking.maps(row, other)
        if coarse is None:
            continue
        doubted = keys != belief.decided
        assert not doubted[(coarse == VOID) | (coarse < 19)].any()
        where = unnamed(coarse)
        state, level = keys // (19 * (len(edges) + 1)), keys % (len(edges) + 1)
        labelled = where & (label != IGNORE)
        assert labelled.any() and np.array_equal(top[labelled], label[labelled])
        assert (state[labelled] == 0).all() and (level[labelled] >= kept).all()
        assert (state[where & (label == IGNORE)] == 1).all()
        assert np.array_equal(top[where & (label == IGNORE)], decided[where & (label == IGNORE)])
        wrong = belief.chances[0][keys[labelled]]
        assert np.allclose(wrong, 1 - middles(edges)[level[labelled]]) and (wrong > 0).all()


def test_a_report_shows_the_confidence_that_decided_and_the_curves_of_the_polygons(runs: Path) -> None:
    run = Run.open(runs / "dense")
    middle = middles(run.confidence.edges).astype(np.float32)
    names = list(run.labels)
    sources = Sources(run, names)
    for sample_id, _, _, level in images(runs):
        layers = sources.read(sample_id)
        assert np.array_equal(layers.confidence, middle[level])  # type: ignore[arg-type]
        assert not isinstance(layers.fates, Missing)
    text = write_report(run).read_text(encoding="utf-8")
    assert 'id="polygons"' in text and 'href="#polygons"' in text and "counted on 6 images of 192 × 96" in text
    assert run.policy.polygons is not None
    around = run.policy.polygons.counted().counts.any(axis=(1, 2)).sum()
    assert text.count('aria-label="Around polygons of ') == around >= 7 and "pole +1, road −0.5" in text
    first = load_manifest(runs / "asked.parquet").samples[0].sample_id
    assert all(isinstance(picture, bytes) for picture in look(run, samples=[first]).rows[0].pictures.values())
    assert 'id="polygons"' not in write_report(runs / "plain").read_text(encoding="utf-8")


def test_an_export_sends_the_confidence_that_decided(runs: Path) -> None:
    run = Run.open(runs / "dense")
    maps, shades = RunMaps(run), np.rint(255 * middles(run.confidence.edges))
    maps.prepare()
    for sample_id, _, _, level in images(runs):
        sent = maps.load(sample_id)[1]
        assert sent is not None and np.array_equal(sent, shades[level])


def test_human_labels_are_judged_by_the_teacher_alone(runs: Path, tmp_path: Path) -> None:
    for name in ("dense", "plain"):
        find_errors(Run.open(runs / name), tmp_path / name, min_pixels=4)
    assert contents(tmp_path / "dense") == contents(tmp_path / "plain")


def test_a_temperature_is_not_fitted_where_polygons_were_weighed(runs: Path, city: Path) -> None:
    message = refused("audit", runs / "dense", "--truth", city / "val.parquet", "--fit-temperature")
    assert message == ("--fit-temperature: policy 'ours' weighs polygons; fit on a run whose policy does not")
