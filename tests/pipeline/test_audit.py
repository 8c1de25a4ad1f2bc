"""An audit says what labels are worth. If this fails, it flatters them, or suggests a threshold that does not hold."""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import autolabel, refused
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests import storage
from autolabel.manifests.images import read_image
from autolabel.manifests.label_space import CAMVID, CITYSCAPES, IGNORE
from autolabel.manifests.policy import Policy, load_policy
from autolabel.manifests.reading import read_coarse
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.samples import load_manifest, save_manifest
from autolabel.manifests.scan import scan
from autolabel.manifests.scores import BoundaryF, Confusion
from autolabel.manifests.teachers import TeacherName
from autolabel.manifests.wording import percent
from autolabel.pipeline.analysis.audit import audit
from autolabel.pipeline.analysis.audit_record import Audit, CoarseAudit, MeanAudit, PixelAudit
from autolabel.pipeline.analysis.side_by_side import SideBySide
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.relabel import relabel
from autolabel.pipeline.run import generate
from autolabel.teacher.loading import load_teacher

Label = NDArray[np.uint8]


@pytest.fixture(scope="module")
def finished(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over the images that the teacher has learnt from (6) and those held out (3), with PNG labels."""
    folder = tmp_path_factory.mktemp("audit")
    save_manifest(folder / "both.parquet", scan(city / "data", layout="cityscapes", splits=["train", "val"])[0])
    job = LabelJob(folder / "both.parquet", teacher, folder / "run", scales=(1.0,), store="png")
    generate(replace(job, policy=Policy(threshold=0.3), unit_size=4))
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def pairs(run: Path, truth: Path) -> list[tuple[Label, Label]]:
    """(truth, label) of every image that has both, by sample id."""
    labels = Run.open(run).labels
    return [(read_sample_label(s, CITYSCAPES), labels[s.sample_id]) for s in load_manifest(truth).samples]


def scored(truth: Path, teacher: Path, temperature: float = 1.0) -> tuple[Label, Label, NDArray[np.float32]]:
    """Truth, the teacher's top class and its confidence, of all truth pixels of a set."""
    network, found = load_teacher(teacher, device="cpu"), []
    for sample in load_manifest(truth).samples:
        true = read_sample_label(sample, CITYSCAPES)
        top, confidence = network.confidence(read_image(sample.image), scales=(1.0,), temperature=temperature)
        found.append((true[true != IGNORE], top[true != IGNORE], confidence[true != IGNORE]))
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    return columns[0], columns[1], columns[2]


def test_every_number_of_the_labels_is_what_a_slow_count_gives(run: Path, city: Path) -> None:
    found = audit(run, city / "val.parquet")
    assert found.images == 3
    maps = pairs(run, city / "val.parquet")
    truth, label = (np.concatenate([pair[side].ravel() for pair in maps]) for side in (0, 1))
    known = truth != IGNORE
    for k, row in enumerate(found.classes):
        true, given, both = truth == k, (label == k) & known, (truth == k) & (label == k)
        kept = known & (label != IGNORE)
        assert (row.truth_pixels, row.label_pixels) == (true.sum(), given.sum())
        assert row.precision == (both.sum() / given.sum() if given.any() else None)
        assert row.coverage == (both.sum() / true.sum() if true.any() else None)
        assert row.iou == (both.sum() / (true | given).sum() if (true | given).any() else None)
        union = ((true | given) & kept).sum()
        assert row.iou_kept == (both.sum() / union if union else None)
    assert found.auto == PixelAudit((known & kept).sum() / known.sum(), (truth == label)[known].sum() / kept.sum())
    borders = BoundaryF(len(CITYSCAPES))
    for pair in maps:
        borders.add(*pair)
    met = np.array([list(row.boundary_f.values()) for row in found.classes], float).T
    assert np.array_equal(met, borders.f(), equal_nan=True)
    assert (np.nan_to_num(met) > 0).any()
    means = [row.coverage for row in found.classes if row.coverage is not None]
    assert found.mean.coverage == pytest.approx(np.mean(means))
    assert list(found.mean.boundary_f) == ["1", "2", "4"]
    assert found.mean.boundary_f["4"] == pytest.approx(np.nanmean(met[2]))
    assert json.loads((run / "audit.json").read_text()) == asdict(found)
    assert Audit.read(run / "audit.json") == found


def test_the_share_that_people_outlined_is_what_a_slow_count_gives(run: Path, city: Path) -> None:
    found = audit(run, city / "val.parquet")
    samples = load_manifest(city / "val.parquet").samples
    truth = np.concatenate([read_sample_label(s, CITYSCAPES).ravel() for s in samples])
    drawn = np.concatenate([read_coarse(s, CITYSCAPES).ravel() for s in samples])
    known = truth != IGNORE
    for k, row in enumerate(found.classes):
        assert row.outlined == (drawn[truth == k] == k).mean() if (truth == k).any() else row.outlined is None
    named = known & (drawn != IGNORE)
    assert found.human == PixelAudit(named.sum() / known.sum(), (drawn == truth)[named].sum() / named.sum())
    assert found.lines()[0] == (
        f"People had outlined {percent(found.human.labelled)} % of the pixels, {percent(found.human.right)} % of them"
        f" rightly. Now {percent(found.auto.labelled)} % have a label, and {percent(found.auto.right)} % of these are"
        " right."
    )
    confusion, borders = Confusion(len(CITYSCAPES)), BoundaryF(len(CITYSCAPES))
    for sample in samples:
        both = read_sample_label(sample, CITYSCAPES), read_coarse(sample, CITYSCAPES)
        confusion.add(*both)
        borders.add(*both)
    assert found.human_mean is not None
    assert found.human_mean.iou == pytest.approx(np.nanmean(confusion.iou()))
    assert found.human_mean.iou_kept == pytest.approx(np.nanmean(confusion.iou_of_kept()))
    assert list(found.human_mean.boundary_f.values()) == pytest.approx(np.nanmean(borders.f(), axis=1).tolist())


def test_several_runs_become_one_table_beside_the_coarse_labels(run: Path, city: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    val = city / "val.parquet"
    result = autolabel("audit", run, other, "--truth", val)
    assert result.exit_code == 0, result.output
    found = Audit.read(other / "audit.json")
    assert found == Audit.read(run / "audit.json") and found.human and found.human_mean and found.auto

    def cells(pixels: PixelAudit, mean: MeanAudit) -> list[str]:
        numbers = (pixels.labelled, pixels.right, mean.iou_kept, mean.iou, mean.boundary_f["2"])
        return list(map(percent, numbers))

    name = Run.open(run).policy.name
    rows = [line.split() for line in result.output.splitlines() if line.startswith((" coarse ", f" {name} "))]
    assert rows == [
        ["coarse", *cells(found.human, found.human_mean)],
        *([*name.split(), f"({folder})", *cells(found.auto, found.mean)] for folder in (run, other)),
    ]
    few = SideBySide(val, (("a", found), ("b", replace(found, images=2, leaked=1)))).lines()
    assert few == [
        "The runs have labelled different numbers of these images (a 3, b 2): no fair comparison.",
        "The teacher was trained on some of these images (b): that flatters it.",
    ]


def test_without_coarse_labels_nothing_is_said_of_people(run: Path, city: Path, tmp_path: Path) -> None:
    known = load_manifest(Run.open(run).input_manifest)
    bare = tuple(replace(s, coarse_label=None) for s in known.samples)
    save_manifest(Run.open(run).input_manifest, replace(known, samples=bare))
    found = audit(run, city / "val.parquet")
    assert found.human is found.human_mean is None and {row.outlined for row in found.classes} == {None}
    assert found.lines()[0].startswith("Of the pixels with truth, ")
    save_manifest(Run.open(run).input_manifest, known)


def test_without_the_input_manifest_a_note_says_what_is_unknown(run: Path, city: Path, tmp_path: Path) -> None:
    replace(Run.open(run), input_manifest=tmp_path / "gone.parquet").save()
    found = audit(run, city / "val.parquet")
    assert found.human is None and found.auto is not None
    assert f"Nobody can tell how much people outlined of these images: {tmp_path}/gone.parquet" in found.notes[0]


def test_calibration_and_suggestion_hold_on_the_very_truth(run: Path, city: Path, teacher: Path) -> None:
    found = audit(run, city / "val.parquet", target_precision=0.7)
    truth, top, confidence = scored(city / "val.parquet", teacher)
    diagram = found.reliability
    assert sum(diagram.all.pixels) == len(truth)
    assert sum(diagram.all.correct) == (truth == top).sum()
    assert diagram.edges == [k / 20 for k in range(21)]
    error, reached = 0.0, 0
    for b in range(20):
        inside = (confidence > np.float32(b / 20)) & (confidence <= np.float32((b + 1) / 20))
        assert inside.sum() == diagram.all.pixels[b]
        if inside.any():
            error += abs((truth == top)[inside].mean() - confidence[inside].mean(dtype=np.float64)) * inside.mean()
            assert diagram.all.confidence[b] == pytest.approx(confidence[inside].mean(dtype=np.float64))
    assert diagram.ece == pytest.approx(error)
    for k, row in enumerate(found.classes):
        chosen = top == k
        if chosen.sum() < 100:
            assert row.suggested_threshold is None
            continue
        right = (truth == k)[chosen]

        def precision(threshold: float, right: Any = right, p: Any = confidence[chosen]) -> float:
            above = right[p > np.float32(threshold)]
            return float(above.mean()) if len(above) >= 100 else 0.0

        at = row.suggested_threshold
        if precision(at) >= 0.7:
            reached += 1
            assert row.suggested_precision == pytest.approx(precision(at))
        else:
            assert at == 0.99
            assert any(note.startswith(f"{row.name}: no threshold reaches") for note in found.notes)
        assert all(precision(lower / 100) < 0.7 for lower in range(round(at * 100)))
    assert reached


def test_the_suggestion_is_a_policy_file_that_keeps_the_other_rules(run: Path, city: Path) -> None:
    opened = Run.open(run)
    policy = replace(
        opened.policy, threshold=0.3, thresholds={"train": 0.8, "sky": 0.2}, smallest_piece=9, coarse="agree"
    )
    replace(opened, recipe=replace(opened.recipe, policy=policy)).save()
    found = audit(run, city / "val.parquet", target_precision=0.7)
    policy = load_policy(str(run / "suggested.toml"))
    assert (policy.name, policy.threshold, policy.temperature) == ("precision-0.7", 0.3, 1)
    assert (policy.smallest_piece, policy.coarse) == (9, "agree")
    suggested = {c.name: c.suggested_threshold for c in found.classes if c.suggested_threshold is not None}
    assert suggested and "train" not in suggested  # never seen: as it was
    assert policy.thresholds == {"train": 0.8, "sky": 0.2} | suggested
    comments = [line for line in (run / "suggested.toml").read_text().splitlines() if line.startswith("# ")]
    assert len(comments) == len(suggested)


def test_the_suggested_policy_of_a_run_with_kept_confidences_can_be_relabelled_with(
    city: Path, teacher: Path, tmp_path: Path
) -> None:
    val = city / "val.parquet"
    job = LabelJob(val, teacher, tmp_path / "run", scales=(1.0,), keep_confidence=6)
    generate(replace(job, policy=Policy(thresholds={"train": 1 / 3})))
    edges = Run.open(tmp_path / "run").recipe.confidence_edges
    assert edges is not None
    found = audit(tmp_path / "run", val, target_precision=0.7)
    suggested = {c.suggested_threshold for c in found.classes} - {None}
    assert suggested and suggested <= set(edges)
    result = autolabel(
        "relabel", tmp_path / "run", "--policy", tmp_path / "run" / "suggested.toml", "--out", tmp_path / "re"
    )
    assert result.exit_code == 0, result.output
    # Where the target was reached, the labels have the precision that was told.
    again = {c.name: c.precision for c in audit(tmp_path / "re", val, teacher=teacher).classes}
    told = {c.name: c.suggested_precision for c in found.classes if c.suggested_precision}
    assert told and {name: again[name] for name in told} == pytest.approx(told)
    # A new temperature asks for new labels anyway, hence for any threshold.
    audit(tmp_path / "run", val, target_precision=0.7, fit_temperature=True)
    assert "only `autolabel generate` can change it" in refused(
        "relabel", tmp_path / "run", "--policy", tmp_path / "run" / "suggested.toml", "--out", tmp_path / "no"
    )


def test_an_audit_of_kept_confidences_equals_one_by_the_teacher_but_for_the_fineness_of_its_diagram(
    city: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run itself kept them, or the run that it was relabelled from; the teacher never looks."""
    val = city / "val.parquet"
    generate(LabelJob(val, teacher, tmp_path / "run", scales=(1.0,), keep_confidence=8))
    relabel(Run.open(tmp_path / "run"), Policy(threshold=0.7), out=tmp_path / "re")
    looked = audit(tmp_path / "run", val, target_precision=0.7, teacher=teacher)
    with monkeypatch.context() as patch:
        patch.setattr("autolabel.pipeline.analysis.audit.load_for", None)
        kept, relabelled = (audit(tmp_path / name, val, target_precision=0.7) for name in ("run", "re"))

    def chosen(found: Audit) -> list[tuple[object, ...]]:
        return [
            (c.name, c.suggested_threshold, c.suggested_precision, c.suggested_kept, c.truth_pixels)
            for c in found.classes
        ]

    assert chosen(kept) == chosen(relabelled) == chosen(looked)
    assert any(c.suggested_threshold for c in kept.classes)
    assert [(c.iou, c.precision) for c in kept.classes] == [(c.iou, c.precision) for c in looked.classes]
    note = "Confidences are known in the 8 levels that were kept"
    assert all(any(text.startswith(note) for text in found.notes) for found in (kept, relabelled))
    assert not any(text.startswith(note) for text in looked.notes)
    assert kept.reliability and looked.reliability and kept.reliability != looked.reliability


@pytest.mark.parametrize("gone", ["its folder", "its confidence"])
def test_where_the_source_of_a_relabelled_run_has_no_confidence_any_more_the_teacher_looks(
    city: Path, teacher: Path, tmp_path: Path, gone: str
) -> None:
    val = city / "val.parquet"
    generate(LabelJob(val, teacher, tmp_path / "run", scales=(1.0,), keep_confidence=8))
    relabel(Run.open(tmp_path / "run"), Policy(threshold=0.7), out=tmp_path / "re")
    expected = audit(tmp_path / "re", val, teacher=teacher)
    shutil.rmtree(tmp_path / "run")
    if gone == "its confidence":
        generate(LabelJob(val, teacher, tmp_path / "run", scales=(1.0,)))
    assert audit(tmp_path / "re", val) == expected


def test_a_fitted_temperature_is_written_and_used(run: Path, city: Path, teacher: Path) -> None:
    found = audit(run, city / "val.parquet", target_precision=0.7, fit_temperature=True)
    fitted = found.temperature
    assert fitted.before == 1
    assert fitted.nll[1] < fitted.nll[0]
    assert tomllib.loads((run / "suggested.toml").read_text())["temperature"] == fitted.fitted != 1
    # The images are small: every pixel counts, so the sampled ones are all there are.
    assert fitted.ece[0] == pytest.approx(audit(run, city / "val.parquet").reliability.ece, abs=1e-6)
    assert fitted.ece[1] == pytest.approx(found.reliability.ece)
    # Diagram and thresholds are of the scaled confidences.
    confidence = scored(city / "val.parquet", teacher, fitted.fitted)[2]
    counted, _ = np.histogram(confidence, np.array(found.reliability.edges, np.float32))
    assert found.reliability.all.pixels == counted.tolist()
    # Slowly: the likelihood at this temperature beats those beside it.
    network = load_teacher(teacher, device="cpu")

    def loss(temperature: float) -> float:
        total, pixels = 0.0, 0
        for sample in load_manifest(city / "val.parquet").samples:
            true = read_sample_label(sample, CITYSCAPES)
            z = network.logits(read_image(sample.image), scales=(1.0,)).numpy().astype(np.float64) / temperature
            p = z - np.log(np.exp(z).sum(axis=0))
            total -= np.take_along_axis(p, np.where(true == IGNORE, 0, true)[None], axis=0)[0][true != IGNORE].sum()
            pixels += (true != IGNORE).sum()
        return total / pixels

    # The fit reads the loss off a parabola through temperatures 7 % apart: an error of some 1e-5, on every machine.
    assert loss(fitted.fitted) == pytest.approx(fitted.nll[1], abs=1e-4)
    assert min(loss(0.93 * fitted.fitted), loss(1.07 * fitted.fitted)) > loss(fitted.fitted)


def test_sampled_logits_are_those_of_the_whole(city: Path, teacher: Path) -> None:
    network = load_teacher(teacher, device="cpu")
    image = read_image(load_manifest(city / "val.parquet").samples[0].image)
    for scales, flip in (((1.0,), False), ((0.5, 1.0, 2.0), True)):
        whole = network.logits(image, scales=scales, flip=flip).numpy()
        assert np.allclose(
            network.sampled_logits(image, every=7, scales=scales, flip=flip), whole[:, ::7, ::7], atol=1e-4
        )


def test_truth_is_matched_by_content_whatever_its_name(run: Path, city: Path, tmp_path: Path) -> None:
    expected = audit(run, city / "val.parquet")
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for k, sample in enumerate(load_manifest(city / "val.parquet").samples):
        shutil.copyfile(sample.image, tmp_path / "images" / f"renamed{k}.png")
        Image.fromarray(read_sample_label(sample, CITYSCAPES)).save(tmp_path / "labels" / f"renamed{k}.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "images" / "stranger.png")
    Image.new("L", (8, 6)).save(tmp_path / "labels" / "stranger.png")
    save_manifest(
        tmp_path / "t.parquet",
        scan(
            tmp_path / "images", layout="folder", labels=tmp_path / "labels", label_space=CITYSCAPES, label_ids="train"
        )[0],
    )
    found = audit(run, tmp_path / "t.parquet")
    assert (found.classes, found.reliability) == (expected.classes, expected.reliability)
    assert found.notes[0] == f"1 of 4 images of {tmp_path}/t.parquet are not labelled in this run."


def test_coarse_labels_are_a_check_on_every_image(run: Path, city: Path) -> None:
    found = {row.name: row for row in audit(run, city / "val.parquet").coarse}
    rows = [r for r in RunFolder(run).statistics("classes").to_pylist() if r["class_name"] == "road"]
    pixels = sum(r["coarse_pixels"] for r in rows)
    assert len(rows) == 9 and found["road"].coarse_pixels == pixels > 0
    assert found["road"].agreement == sum(r["agreeing_pixels"] for r in rows) / pixels
    assert found["road"].contradicted == sum(r["contradicted_pixels"] for r in rows) / pixels
    assert found["train"] == CoarseAudit("train", 0, None, None)


def test_truth_that_the_teacher_has_seen_is_refused_unless_it_is_recorded(run: Path, city: Path) -> None:
    both = run.parent / "both.parquet"
    save_manifest(both, scan(city / "data", layout="cityscapes", splits=["train", "val"])[0])
    line = refused("audit", run, "--truth", both)
    assert "was trained on 6 of the 9 images" in line and "--allow-leak" in line
    assert not (run / "audit.json").exists()
    result = autolabel("audit", run, "--truth", both, "--allow-leak")
    assert result.exit_code == 0, result.output
    found = json.loads((run / "audit.json").read_text())
    assert (found["images"], found["leaked"], found["truth_sha256"]) == (9, 6, storage.sha256(both))
    assert "trained on 6 of these images" in result.stdout


def test_a_checkpoint_that_does_not_say_what_it_has_seen(city: Path, teacher: Path, tmp_path: Path) -> None:
    weights = torch.load(teacher, weights_only=True)["state_dict"]
    torch.save({"state_dict": weights}, tmp_path / "published.pth")
    val = city / "val.parquet"
    generate(LabelJob(val, tmp_path / "published.pth", tmp_path / "run", scales=(1.0,)))
    found = audit(tmp_path / "run", val)
    assert found.leaked is None and found.reliability
    assert found.notes[0] == "The teacher does not say which images it has seen: a leak is possible."


def test_statistics_that_are_gone_or_damaged_are_named(run: Path, city: Path) -> None:
    path = run / "stats" / "classes.parquet"
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])
    assert f"{path} is not a readable parquet file" in refused("audit", run, "--truth", city / "val.parquet")
    path.unlink()
    assert f"{path} does not exist: finish the run" in refused("audit", run, "--truth", city / "val.parquet")


def test_a_teacher_that_has_moved_is_found_where_the_caller_says(
    run: Path, city: Path, teacher: Path, tmp_path: Path
) -> None:
    expected = audit(run, city / "val.parquet")
    replace(Run.open(run), teacher=TeacherName.of(tmp_path / "gone.pt")).save()
    val = city / "val.parquet"
    line = refused("audit", run, "--truth", val)
    assert f"{tmp_path}/gone.pt does not exist" in line and "--teacher" in line
    assert audit(run, val, teacher=teacher) == expected
    (tmp_path / "another.pt").write_bytes(b"another")
    assert "is not the teacher of this run" in refused(
        "audit", run, "--truth", val, "--teacher", tmp_path / "another.pt"
    )
    (run / "suggested.toml").unlink()
    result = autolabel("audit", run, "--truth", val, "--allow-leak")
    assert result.exit_code == 0, result.output
    found = json.loads((run / "audit.json").read_text())
    assert found["leaked"] is None and found["reliability"] is None
    assert [c["iou"] for c in found["classes"]] == [c.iou for c in expected.classes]
    assert not (run / "suggested.toml").exists()
    assert "No calibration" in result.stdout and "suggested.toml" not in result.stdout
    assert "needs the run's teacher" in refused("audit", run, "--truth", val, "--allow-leak", "--fit-temperature")


def test_an_audit_that_is_impossible_is_refused_in_one_line(
    run: Path, city: Path, teacher: Path, tmp_path: Path
) -> None:
    val = city / "val.parquet"
    assert "expected a share between 0 and 1" in refused("audit", run, "--truth", val, "--target-precision", "95")
    assert "is not a run" in refused("audit", city, "--truth", val)
    assert "does not exist" in refused("audit", run, "--truth", tmp_path / "none.parquet")
    save_manifest(tmp_path / "c.parquet", replace(load_manifest(val), label_space=CAMVID))
    assert "uses label space 'camvid' (11 classes) but" in refused("audit", run, "--truth", tmp_path / "c.parquet")
    line = refused("audit", run, "--truth", city / "coarse.parquet")
    assert "lists no image with a fine or corrected label" in line
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.png").write_bytes(b"not a picture")
    save_manifest(tmp_path / "p.parquet", scan(tmp_path / "photos", layout="folder", label_space=CITYSCAPES)[0])
    generate(LabelJob(tmp_path / "p.parquet", teacher, tmp_path / "empty"))
    assert "holds no labelled image" in refused("audit", tmp_path / "empty", "--truth", val)


def test_truth_that_shares_no_image_with_the_run_is_refused(run: Path, tmp_path: Path) -> None:
    for kind, mode in (("images", "RGB"), ("labels", "L")):
        (tmp_path / kind).mkdir()
        Image.new(mode, (8, 6)).save(tmp_path / kind / "a.png")
    truth = tmp_path / "t.parquet"
    save_manifest(
        truth,
        scan(
            tmp_path / "images", layout="folder", labels=tmp_path / "labels", label_space=CITYSCAPES, label_ids="train"
        )[0],
    )
    assert "none of the 1 fine images" in refused("audit", run, "--truth", truth)
    shutil.copyfile(tmp_path / "images" / "a.png", tmp_path / "images" / "b.png")
    shutil.copyfile(tmp_path / "labels" / "a.png", tmp_path / "labels" / "b.png")
    save_manifest(
        truth,
        scan(
            tmp_path / "images", layout="folder", labels=tmp_path / "labels", label_space=CITYSCAPES, label_ids="train"
        )[0],
    )
    assert "'a' and 'b' are the same image" in refused("audit", run, "--truth", truth)


def test_a_record_that_is_none_is_named(tmp_path: Path) -> None:
    for text in ("{}", "no JSON", '{"classes": 3}', "[]"):
        (tmp_path / "audit.json").write_text(text)
        with pytest.raises(ValueError, match=r"audit\.json .*[:;] run `autolabel audit` again$"):
            Audit.read(tmp_path / "audit.json")


def test_a_damaged_label_is_named_and_the_audit_is_no_damage(run: Path, city: Path) -> None:
    audit(run, city / "val.parquet")
    assert autolabel("verify", run).exit_code == 0
    sample = load_manifest(city / "val.parquet").samples[0]
    path = next((run / "labels").rglob(f"*{Path(sample.image).stem}.png"))
    Image.new("L", (192, 96), 3).save(path)
    assert f"{path}" in refused("audit", run, "--truth", city / "val.parquet")


def test_the_terminal_shows_what_the_file_holds(run: Path, city: Path) -> None:
    result = autolabel("audit", run, "--truth", city / "val.parquet", "--target-precision", "0.7", "--fit-temperature")
    assert result.exit_code == 0, result.output
    found = json.loads((run / "audit.json").read_text())
    building = next(c for c in found["classes"] if c["name"] == "building")
    shown = [line.split() for line in result.stdout.splitlines() if line.split()[:1] == ["building"]]
    values = [building[key] for key in ("precision", "coverage", "iou_kept", "iou")]
    assert shown[0][3:7] == [f"{100 * value:.1f}" for value in values]
    assert shown[1][1:3] == [f"{100 * building['ece']:.1f}", f"{building['suggested_threshold']:g}"]
    assert "temperature 1 →" in result.stdout
    assert f"wrote {run}/audit.json and {run}/suggested.toml" in result.stdout
    assert "score students on others" in result.stdout
