"""Labels of another tool become a run. If this fails, they are lost, shifted, or taken for what they are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import autolabel, contents, labels_of, quarantined, refused
from numpy.typing import NDArray
from PIL import Image
from weighed import drawn_counts

from autolabel.manifests.label_space import CAMVID
from autolabel.manifests.policy import PAPER
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import load_manifest
from autolabel.manifests.tables import read_sealed, table_bytes
from autolabel.pipeline.adopt import Pngs, adopt, adopting_job
from autolabel.pipeline.adopted import TABLE, AdoptedPredictor
from autolabel.pipeline.analysis.stats import summarise
from autolabel.pipeline.verify import verify

pytestmark = pytest.mark.thorough

NAMES = ("a/1", "a/2", "b/1")
SIZE = 20, 30
IGNORED = np.s_[15:]  # the lowest rows have no class


def save(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def label_of(number: int) -> NDArray[np.uint8]:
    """Sky above the class of this number, and nothing below."""
    label = np.full(SIZE, number, np.uint8)
    label[:5], label[IGNORED] = 0, 255
    return label


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    """Three images, their manifest, and PNGs of train ids of CamVid."""
    noise = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        save(tmp_path / "images" / f"{name}.png", noise.integers(0, 256, (*SIZE, 3), np.uint8))
        save(tmp_path / "pngs" / f"{name}.png", label_of(3 + number))
    scan = ("manifest", "scan", tmp_path / "images", "--label-space", "camvid", "-o", tmp_path / "drive.parquet")
    assert autolabel(*scan).exit_code == 0
    return tmp_path


def adopted(drive: Path, *options: object, out: str = "run") -> Run:
    """Adopt the PNGs of a drive, which must go well."""
    result = autolabel("adopt", drive / "pngs", "--manifest", drive / "drive.parquet", "--out", drive / out, *options)
    assert result.exit_code == 0, result.stderr
    return Run.open(drive / out)


def refusal(drive: Path, *options: object, out: str = "run") -> str:
    return refused("adopt", drive / "pngs", "--manifest", drive / "drive.parquet", "--out", drive / out, *options)


@pytest.mark.parametrize("store", ["zarr", "png"])
def test_an_adopted_run_has_the_labels_of_the_pngs_and_knows_no_teacher(store: str, drive: Path) -> None:
    run = adopted(drive, "--store", store)
    assert {name: label.tolist() for name, label in run.labels.items()} == {
        name: label_of(3 + number).tolist() for number, name in enumerate(NAMES)
    }
    assert (run.teacher, run.recipe.teacher_sha256, run.state) == (None, "", "complete")
    assert run.find_teacher() == (None, "no teacher is known")
    assert "teacher unknown" in run.lines()[1]
    assert [s.source for s in load_manifest(run.manifest_path).samples] == ["auto"] * 3


def test_statistics_count_confidence_1_where_there_is_a_class_and_nothing_elsewhere(drive: Path) -> None:
    run = adopted(drive)
    rows = {(r["sample_id"], r["class_name"]): r for r in run.statistics("classes").to_pylist()}
    own = dict(zip(NAMES, ("road", "pavement", "tree"), strict=True))
    assert sorted(rows) == [(name, c) for name in NAMES for c in sorted((own[name], "sky"))]
    assert [rows[NAMES[0], "road"][key] for key in ("pixels", "kept_pixels", "mean_confidence")] == [300, 300, 1.0]
    assert rows[NAMES[0], "road"]["confidence_hist"] == [0] * 19 + [300]
    assert {sum(r[f"{fate}_pixels"] for fate in ("kept", "below_threshold")) for r in rows.values()} == {150, 300}
    summary = summarise(run)
    assert (summary.auto_coverage, summary.classes["kept"]["road"]) == (0.75, 1.0)


def test_the_same_again_does_nothing_and_changes_no_byte(drive: Path) -> None:
    adopted(drive)
    before = contents(drive / "run")
    assert (
        "nothing was to be done"
        in autolabel("adopt", drive / "pngs", "--manifest", drive / "drive.parquet", "--out", drive / "run").output
    )
    changed = {name for name, data in contents(drive / "run").items() if before[name] != data}
    assert changed <= {"progress.json"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            lambda d: save(d / "pngs/a/2.png", label_of(4)[:, :20]),
            "{pngs}/a/2.png: the label is 20 x 20 but its image 30 x 20 pixels: repair or remove it, name the right"
            " ids, or go on without it: --max-quarantined SHARE",
            id="another size",
        ),
        pytest.param(
            lambda d: [save(d / "pngs" / f"{n}.png", np.full(SIZE, 40, np.uint8)) for n in NAMES],
            "{pngs}/a/1.png: ids [40] are not in label space 'camvid' (train ids) (and 2 more PNGs): repair or remove",
            id="unknown ids",
        ),
        pytest.param(
            lambda d: save(d / "pngs/a/1.png", np.zeros((*SIZE, 3), np.uint8)),
            "{pngs}/a/1.png: mode RGB, 8 bits: expected 8-bit grey or palette PNG holding one class id a pixel;",
            id="colours",
        ),
        pytest.param(lambda d: (d / "pngs/a/1.png").write_bytes(b"x"), "{pngs}/a/1.png: ", id="no picture"),
        pytest.param(
            lambda d: (d / "pngs/b/1.png").unlink(),
            "image 'b/1' has no PNG b/1.png under {pngs}: list the images that have one with",
            id="one is missing",
        ),
        pytest.param(
            lambda d: [shutil.rmtree(d / "pngs"), save(d / "pngs/other.png", label_of(1))],
            "none of the 1 PNGs under {pngs} belongs to an image of {manifest}: expected e.g. {pngs}/a/1.png",
            id="none fits",
        ),
        pytest.param(
            lambda d: [(d / "pngs" / f"{n}.png").rename(d / "pngs" / f"{n}_pred.png") for n in NAMES],
            "their names are longer by '_pred': try --suffix _pred",
            id="longer names",
        ),
        pytest.param(lambda d: shutil.rmtree(d / "pngs"), "{pngs} is not a folder that exists", id="no folder"),
        pytest.param(
            lambda d: [(d / "pngs" / f"{n}.png").unlink() for n in NAMES],
            "no PNGs under {pngs}: expected e.g. {pngs}/a/1.png",
            id="no file",
        ),
    ],
)
def test_pngs_that_cannot_be_meant_are_one_line_and_nothing_is_written(
    make: Callable[[Path], object], message: str, drive: Path
) -> None:
    make(drive)
    line = refusal(drive)
    assert message.format(pngs=drive / "pngs", manifest=drive / "drive.parquet") in line
    assert not (drive / "run").exists()


def test_source_ids_that_are_read_as_train_ids_are_guessed(drive: Path) -> None:
    for name in NAMES:
        save(drive / "pngs" / f"{name}.png", np.full(SIZE, 23, np.uint8))
    scan = ("manifest", "scan", drive / "images", "--label-space", "cityscapes", "-o", drive / "drive.parquet")
    assert autolabel(*scan).exit_code == 0
    assert "they are source ids of the label space: try --label-ids source" in refusal(drive)
    assert set(adopted(drive, "--label-ids", "source").labels["a/1"].ravel()) == {10}


def test_one_bad_png_of_as_many_as_may_be_is_quarantined_and_retried_when_it_is_mended(drive: Path) -> None:
    save(drive / "pngs/a/2.png", np.full(SIZE, 40, np.uint8))
    (drive / "pngs/b/1.png").unlink()
    run = adopted(drive, "--max-quarantined", "0.7")
    assert quarantined(run.path) == {
        "a/2": f"{drive}/pngs/a/2.png: ids [40] are not in label space 'camvid' (train ids)",
        "b/1": f"no PNG b/1.png under {drive}/pngs",
    }
    assert "is not complete" not in autolabel("stats", run.path).output
    save(drive / "pngs/a/2.png", label_of(4))
    save(drive / "pngs/b/1.png", label_of(5))
    adopted(drive)
    assert quarantined(run.path) == {}
    assert Run.open(run.path).labels["b/1"].tolist() == label_of(5).tolist()


def test_a_png_that_has_changed_is_noticed_by_the_same_command_and_by_verify(drive: Path) -> None:
    run = adopted(drive)
    save(drive / "pngs/a/1.png", label_of(7))
    changed = f"{drive}/pngs/a/1.png has changed since it was adopted"
    assert refusal(drive) == f"{changed}: put the old one back, or adopt into a new --out"
    assert verify(run.path).faults == [changed]
    verify(run.path, repair=True)
    adopted(drive)
    assert Run.open(run.path).labels["a/1"].tolist() == label_of(7).tolist()
    assert verify(run.path).faults == []


def test_a_png_that_is_gone_is_no_fault_of_the_labels_but_the_command_wants_it(drive: Path) -> None:
    run = adopted(drive)
    (drive / "pngs/a/1.png").unlink()
    verification = verify(run.path)
    assert (verification.faults, verification.gone) == ([], [drive / "pngs/a/1.png"])
    assert "image 'a/1' has no PNG a/1.png" in refusal(drive)
    assert "is gone since it was adopted" in refusal(drive, "--max-quarantined", "1")


def test_pngs_that_were_copied_elsewhere_are_the_same(drive: Path) -> None:
    adopted(drive)
    shutil.copytree(drive / "pngs", drive / "moved")
    shutil.rmtree(drive / "pngs")
    (drive / "moved").rename(drive / "pngs")
    assert adopted(drive).state == "complete"
    assert verify(drive / "run").faults == []


def test_a_damaged_table_of_pngs_is_a_fault(drive: Path) -> None:
    run = adopted(drive)
    data = bytearray((run.path / TABLE).read_bytes())
    data[len(data) // 2] ^= 1
    (run.path / TABLE).write_bytes(data)
    assert any(TABLE in fault for fault in verify(run.path).faults)


def test_a_table_of_pngs_that_another_program_has_sealed_is_checked_all_the_same(drive: Path) -> None:
    path = adopted(drive).path / TABLE
    table = read_sealed(path)
    fine = {"folder": "x", "confidence_folder": None, "terms": {}}
    for header, why in (({}, " has no 'folder'"), ({**fine, "folder": 3}, ", 'folder' is 3: expected a path")):
        path.write_bytes(table_bytes(table.replace_schema_metadata({b"adopted": json.dumps(header)})))
        line = f"{path} is damaged (its header{why}): adopt into a new --out"
        assert (verify(drive / "run").faults, refusal(drive)) == ([line], line)


@pytest.fixture
def sure(drive: Path) -> Path:
    """The drive with confidences: 255 in the left half, 102 (0.4) in the right half, 0 in one row."""
    levels = np.full(SIZE, 255, np.uint8)
    levels[:, 15:], levels[5] = 102, 0
    for name in NAMES:
        save(drive / "sure" / f"{name}.png", levels)
    return drive


def test_a_confidence_is_held_against_the_threshold(sure: Path) -> None:
    expected = label_of(3)
    expected[:, 15:], expected[5] = 255, 255
    assert adopted(sure, "--confidence", sure / "sure").labels["a/1"].tolist() == expected.tolist()
    loose = adopted(sure, "--confidence", sure / "sure", "--threshold", "0.3", out="loose")
    expected[:15], expected[5] = label_of(3)[:15], 255
    assert loose.labels["a/1"].tolist() == expected.tolist()


def test_kept_confidence_can_be_relabelled_and_gives_what_adopting_would_have(sure: Path) -> None:
    run = adopted(sure, "--confidence", sure / "sure", "--keep-confidence", "8")
    top, level = run.confidence["a/1"]
    assert run.confidence.edges[0] == 0 and set(level[IGNORED].ravel()) == {0}
    assert (top[0, 0], level[0, 0], level[5, 0]) == (0, len(run.confidence.edges), 0)
    policy = sure / "strict.toml"
    policy.write_text('name = "strict"\nthreshold = 0.5\ncoarse = "human-wins"\n', encoding="utf-8")
    assert autolabel("relabel", run.path, "--policy", policy, "--out", sure / "again").exit_code == 0
    direct = adopted(sure, "--confidence", sure / "sure", "--policy", policy, out="direct")
    assert labels_of(sure / "again") == labels_of(direct.path)
    again, straight = summarise(sure / "again"), summarise(direct.path)
    assert again.classes.equals(straight.classes) and again.fates.equals(straight.fates)
    assert Run.open(sure / "again").teacher is None
    assert verify(sure / "again").faults == []


def test_polygons_are_weighed_beside_the_confidence(sure: Path) -> None:
    """The same labels at once and from kept confidence; pixels of which the PNGs say nothing stay without a class."""
    coarse = np.full(SIZE, 255, np.uint8)
    coarse[6:9, 3:9] = 8
    for name in NAMES[1:]:
        save(sure / "coarse" / f"{name}.png", coarse)
    scan = "manifest", "scan", sure / "images", "--coarse", sure / "coarse", "--label-space", "camvid"
    assert autolabel(*scan, "-o", sure / "drive.parquet").exit_code == 0
    drawn_counts(CAMVID, sizes={"30x20": 40}).write(sure / "polygons.json")
    rules = 'threshold = 0.3\ncoarse = "human-wins"\n[polygons]\ncounts = "polygons.json"\npolygon_weight = 1.5\n'
    (sure / "weighed.toml").write_text(rules, encoding="utf-8")
    dense = "--policy", sure / "weighed.toml"
    options = "--confidence", sure / "sure", "--keep-confidence", "32"
    run, plain = adopted(sure, *options, *dense), adopted(sure, *options, "--threshold", "0.3", out="plain")
    assert autolabel("relabel", plain.path, *dense, "--out", sure / "again").exit_code == 0
    again = Run.open(sure / "again").labels
    assert np.array_equal(run.labels["a/1"], plain.labels["a/1"])
    for name in NAMES[1:]:
        own, weighed = plain.labels[name], run.labels[name]
        assert (weighed[6:9, 3:9] == 8).all() and (weighed[IGNORED] == 255).all() and (weighed[5] == 255).all()
        assert 20 < ((weighed != own) & (coarse == 255)).sum() < 400
        assert np.array_equal(again[name], weighed)
        assert all(map(np.array_equal, run.confidence[name], plain.confidence[name]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threshold", "0.7"), "policy 'threshold 0.7', which has thresholds, needs confidences, but these PNGs"),
        (("--keep-confidence", "8"), "--keep-confidence needs confidences, but these PNGs hold class ids alone"),
        (
            ("--policy", "threshold = 0.5\n[thresholds]\nroad = 0.9"),
            "policy 'p', which has thresholds, needs confidences, but these PNGs",
        ),
        (("--policy", "temperature = 2.0"), "policy 'p' asks for a temperature, which needs the probabilities of all"),
        (("--policy", "[polygons]"), "policy 'p': it weighs what lies around people's polygons, and nobody has named"),
        (
            ("--policy", '[polygons]\ncounts = "../polygons.json"'),
            "policy 'p', which weighs polygons, needs confidences",
        ),
        (("--label-space", "cityscapes"), "the PNGs are of label space 'cityscapes', {d}/drive.parquet of 'camvid':"),
        (
            ("--classes", "cityscapes-to-camvid"),
            "class map 'cityscapes-to-camvid' maps the classes of the PNGs: say with --label-space",
        ),
        (("--confidence", "nowhere"), "nowhere is not a folder that exists"),
    ],
)
def test_what_these_pngs_do_not_hold_is_refused(options: tuple[str, str], message: str, drive: Path) -> None:
    name, value = options
    if name == "--policy":
        drawn_counts(CAMVID, sizes={"30x20": 40}).write(drive.parent / "polygons.json")
        (drive / "p.toml").write_text(value, encoding="utf-8")
        value = str(drive / "p.toml")
    assert message.format(d=drive) in refusal(drive, name, value)
    assert not (drive / "run").exists()


def test_a_policy_whose_one_threshold_changes_nothing_is_taken(drive: Path) -> None:
    assert adopted(drive, "--policy", "human-first").labels["a/1"].tolist() == label_of(3).tolist()


def test_a_class_map_leads_from_the_classes_of_the_pngs_to_those_of_the_manifest(drive: Path) -> None:
    for name in NAMES:
        label = np.full(SIZE, 7, np.uint8)  # road of Cityscapes
        label[:5], label[5:10], label[10:15] = 23, 27, 4  # sky, truck, and one that is ignored
        save(drive / "pngs" / f"{name}.png", label)
    run = adopted(
        drive, "--label-space", "cityscapes", "--label-ids", "source", "--classes", "cityscapes-to-camvid"
    )  # fmt: skip
    expected = [CAMVID.names.index(n) for n in ("sky", "car", "road")]
    label = run.labels["a/1"]
    assert [int(label[row, 0]) for row in (0, 5, 10, 15)] == [expected[0], expected[1], 255, expected[2]]
    line = refusal(drive, "--label-space", "cityscapes", "--classes", "cityscapes-to-camvid")
    assert "adopted with another label ids" in line


def test_a_run_of_a_teacher_is_not_gone_on_with(drive: Path) -> None:
    run = adopted(drive)
    line = refused("generate", drive / "drive.parquet", "--teacher", drive / "no.pt", "--out", run.path)
    assert "no.pt does not exist" in line


def test_audit_and_report_say_that_no_teacher_is_known(drive: Path) -> None:
    run = adopted(drive)
    scan = ("manifest", "scan", drive / "images", "--labels", drive / "pngs", "--label-space", "camvid")
    assert autolabel(*scan, "-o", drive / "truth.parquet").exit_code == 0
    line = refused("audit", run.path, "--truth", drive / "truth.parquet")
    assert line.startswith("no teacher is known, so nobody can tell whether it was trained on ")
    result = autolabel("audit", run.path, "--truth", drive / "truth.parquet", "--allow-leak")
    assert result.exit_code == 0 and "A leak is possible: no teacher is known." in result.output
    assert autolabel("report", run.path, "--images", "1").exit_code == 0
    page = (run.path / "report/index.html").read_text(encoding="utf-8")
    assert "No confidence maps: no teacher is known" in page
    assert "unknown: the labels were adopted" in page
    assert "A tool whose teacher is not known labelled 3 images of" in page and "None" not in page
    line = refused("report", run.path, "--teacher", drive / "x.pt")
    assert line.endswith(f"nobody knows the teacher of {run.path}, its labels were adopted")


def test_a_call_that_is_stopped_anywhere_is_made_good_by_the_next(drive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write is the last one once: what another call then makes is the whole run, with the same labels."""
    from autolabel.manifests import local_storage

    whole = labels_of(adopted(drive, "--unit-size", "2", out="whole").path)
    write = local_storage.LocalStorage.write
    place, done = 0, False
    while not done:
        calls = iter(range(place))

        def stopping(self: object, *arguments: object, calls: object = calls, **more: object) -> None:
            if next(calls, None) is None:  # type: ignore[call-overload]
                raise KeyboardInterrupt
            write(self, *arguments, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(local_storage.LocalStorage, "write", stopping)
        out = drive / f"stopped-{place}"
        job = adopting_job(drive / "drive.parquet", out, Run.open(drive / "whole").policy, 1, unit_size=2)
        try:
            adopt(Pngs(drive / "pngs"), job)
            done = True
        except KeyboardInterrupt:
            monkeypatch.undo()
            adopt(Pngs(drive / "pngs"), job)
        monkeypatch.undo()
        assert labels_of(out) == whole
        assert Run.open(out).state == "complete"
        place += 3
    assert place > 5


def test_a_photograph_that_cannot_be_read_is_quarantined_for_itself(drive: Path) -> None:
    (drive / "images/a/2.png").write_bytes(b"no picture")
    scan = ("manifest", "scan", drive / "images", "--label-space", "camvid", "-o", drive / "drive.parquet")
    assert autolabel(*scan).exit_code == 0
    adopting = ("adopt", drive / "pngs", "--manifest", drive / "drive.parquet", "--out", drive / "run")
    assert autolabel(*adopting).exit_code == 3
    assert list(quarantined(drive / "run")) == ["a/2"] and "png" not in quarantined(drive / "run")["a/2"]
    assert autolabel(*adopting).exit_code == 3
    assert sorted(Run.open(drive / "run").labels) == ["a/1", "b/1"]


def test_a_png_that_changes_while_it_is_adopted_costs_its_image_until_the_next_call(
    drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = adopting_job(drive / "drive.parquet", drive / "run", PAPER, 1, max_quarantined=1.0)
    check = AdoptedPredictor.predict

    def late(self: AdoptedPredictor, batch: Any) -> Any:
        if batch[0].row.sample_id == "a/2":
            save(drive / "pngs/a/2.png", label_of(8))
        return check(self, batch)

    monkeypatch.setattr(AdoptedPredictor, "predict", late)
    adopt(Pngs(drive / "pngs"), job)
    assert "has changed since it was checked: run the same again" in quarantined(drive / "run")["a/2"]
    monkeypatch.undo()
    assert adopt(Pngs(drive / "pngs"), job).run.labels["a/2"].tolist() == label_of(8).tolist()
    assert quarantined(drive / "run") == {} and verify(drive / "run").faults == []
