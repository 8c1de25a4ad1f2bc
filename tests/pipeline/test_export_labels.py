"""Labels go out whole: every pixel, every sample accounted for, and the same bytes whenever an export was killed."""

from __future__ import annotations

import csv
import errno
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sent
from conftest import autolabel, contents, refused
from PIL import Image

from autolabel.manifests import local_storage, storage
from autolabel.manifests.formats.known import WRITTEN
from autolabel.manifests.label_space import CAMVID, CITYSCAPES
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import Manifest, Sample, load_manifest, save_manifest
from autolabel.pipeline import export as exporting
from autolabel.pipeline.export import Export, export
from autolabel.pipeline.outgoing import shades

LOCK = ".lock"


@pytest.fixture
def fine(tmp_path: Path) -> Path:
    """A manifest of five labels that people made."""
    return sent.people(tmp_path, sent.labels())


@pytest.fixture(scope="module", params=["zarr", "png"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of five labels, which nobody changes."""
    folder = tmp_path_factory.mktemp(request.param)
    sent.machine(folder, sent.labels(), store=request.param)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """All that an export wrote, but for its lock."""
    return {name: data for name, data in contents(folder).items() if name != LOCK}


def index(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "index.csv", newline="", encoding="utf-8") as file:
        return {row["sample_id"]: row for row in csv.DictReader(file)}


def left_out(out: Path) -> dict[str, tuple[str, str]]:
    with open(out / "left_out.csv", newline="", encoding="utf-8") as file:
        return {row["sample_id"]: (row["kind"], row["reason"]) for row in csv.DictReader(file)}


def pixels(path: Path) -> sent.Map:
    return np.asarray(Image.open(path))


# --- the account ------------------------------------------------------------------------------------------------------


def test_an_export_of_a_manifest_says_how_many_samples_it_wrote(fine: Path, tmp_path: Path) -> None:
    result = autolabel("export", fine, "--to", "png", "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "5 samples: 5 written, 0 not asked for, 0 left out", f"wrote {tmp_path}/out: png"
    ]  # fmt: skip
    assert not (tmp_path / "out" / "left_out.csv").exists() and not (tmp_path / "out" / ".export").exists()


def test_what_cannot_be_sent_is_left_out_by_name_and_reason_and_the_command_ends_with_3(
    fine: Path, tmp_path: Path
) -> None:
    samples = load_manifest(fine).samples
    Path(samples[0].label or "").write_bytes(b"no label")
    Path(samples[1].label or "").unlink()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(samples[2].label or "")
    samples[3].image.write_bytes(samples[3].image.read_bytes()[:-30])
    silent = Sample("silent", samples[4].image, *sent.SIZES["val/d"], source="none")
    blind = Sample("blind", samples[4].image, 0, 0, source="fine", label=samples[4].label)
    save_manifest(fine, Manifest.of(CAMVID, (*samples, silent, blind)))
    result = autolabel("export", fine, "--to", "png", "-o", tmp_path / "out")
    assert result.exit_code == 3
    assert result.stdout.splitlines()[:2] == [
        "7 samples: 1 written, 0 not asked for, 6 left out",
        "  left out: no label 1; unreadable photograph 2; changed or damaged label 3"
        f" ({tmp_path}/out/left_out.csv names each)",
    ]
    reasons = left_out(tmp_path / "out")
    assert {name: kind for name, (kind, _) in reasons.items()} == {
        "silent": "no label",
        **dict.fromkeys(("blind", "val/c.1"), "unreadable photograph"),
        **dict.fromkeys(("train/a/1", "train/a/2", "train/b/1"), "changed or damaged label"),
    }
    assert "the label is 2 x 2 but its image 24 x 40 pixels" in reasons["train/b/1"][1]
    assert str(samples[3].image) in reasons["val/c.1"][1]
    assert list(index(tmp_path / "out")) == ["val/d"]


@pytest.mark.thorough
def test_a_run_sends_labels_confidence_and_scores(finished: Path, tmp_path: Path) -> None:
    result = export(finished / "run", "png", tmp_path / "out")
    assert result == Export(tmp_path / "out", "png", 5, 5) and result.balanced()
    run = Run.open(finished / "run")
    levels = shades(run.confidence.edges)
    scores = {row["sample_id"]: row["mean_confidence"] for row in run.statistics().to_pylist()}
    for name, row in index(tmp_path / "out").items():
        assert np.array_equal(pixels(tmp_path / "out" / row["label"]), run.labels[name])
        assert np.array_equal(pixels(tmp_path / "out" / row["confidence"]), levels[run.confidence[name][1]])
        assert float(row["mean_confidence"]) == pytest.approx(scores[name], abs=1e-6)


def test_a_level_of_confidence_is_sent_as_its_middle() -> None:
    assert shades((0.5, 0.9))[:4].tolist() == [64, 178, 242, 255]  # 0.25, 0.7, 0.95 times 255


@pytest.mark.thorough
def test_labels_of_a_run_in_a_fused_manifest_bring_their_confidence_along(finished: Path, tmp_path: Path) -> None:
    people = sent.people(tmp_path / "people", sent.labels(names=["val/z"], seed=9))
    fused = tmp_path / "fused.parquet"
    assert autolabel("manifest", "fuse", finished / "run/manifest.parquet", people, "-o", fused).exit_code == 0
    export(fused, "png", tmp_path / "out")
    assert {name: bool(row["confidence"]) for name, row in index(tmp_path / "out").items()} == {
        **dict.fromkeys(sent.SIZES, True), "val/z": False
    }  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("store", ["zarr", "png"])
def test_quarantined_changed_and_damaged_images_of_a_run_are_left_out(store: str, tmp_path: Path) -> None:
    drawn = sent.labels()
    sent.people(tmp_path, drawn)
    broken = tmp_path / "images" / "val" / "d.png"
    run = sent.machine(tmp_path, drawn, store=store)
    broken.write_bytes(b"")
    again = ("adopt", tmp_path / "labels", "--manifest", tmp_path / "fine.parquet", "--confidence", tmp_path / "sure")
    shutil.rmtree(run)
    assert autolabel(*again, "--out", run, "--store", store, "--max-quarantined", "1").exit_code == 0
    sent.photograph(tmp_path / "images" / "train" / "a" / "1.png", (24, 40), 77)
    expected = {"val/d": "quarantined", "train/a/1": "unreadable photograph"}
    if store == "png":
        Image.fromarray(np.zeros((24, 40), np.uint8)).save(run / "labels" / "train" / "a" / "2.png")  # by a person
        expected["train/a/2"] = "changed or damaged label"
    result = export(run, "png", tmp_path / "out")
    assert (result.samples, result.written, result.balanced()) == (5, 5 - len(expected), True)
    reasons = left_out(tmp_path / "out")
    assert {name: kind for name, (kind, _) in reasons.items()} == expected
    assert "has changed since it was labelled" in reasons["train/a/1"][1]
    if store == "png":
        assert "2.png was changed by hand; `autolabel import png" in reasons["train/a/2"][1]


# --- killed anywhere --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """No handler of errors catches it, as none catches a kill."""


def ending_at(step: int, error: Callable[[Path], BaseException]) -> Callable[..., Any]:
    """`local_storage._replacing` that fails before it gives the step-th file its name."""
    steps, replacing = itertools.count(), local_storage._replacing

    def replaced(target: Path, durable: bool) -> Any:
        if next(steps) >= step:
            raise error(target)
        return replacing(target, durable)

    return replaced


@pytest.mark.thorough
@pytest.mark.parametrize("to", WRITTEN)
def test_an_export_that_is_killed_before_any_file_goes_on_to_the_same_bytes(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_CHUNK", 2)
    names = [*sent.SIZES][:3]
    space = CITYSCAPES if to == "cityscapes" else CAMVID
    manifest = sent.people(tmp_path, sent.labels(space, names), space=space)
    export(manifest, to, tmp_path / "whole")
    expected = files(tmp_path / "whole")
    for step in itertools.count(step=2):
        with monkeypatch.context() as patch:
            patch.setattr(local_storage, "_replacing", ending_at(step, lambda _: Killed()))
            try:
                export(manifest, to, tmp_path / "out")
            except Killed:
                pass
            else:
                break
        export(manifest, to, tmp_path / "out")
        assert files(tmp_path / "out") == expected
        shutil.rmtree(tmp_path / "out")
    assert step > len(expected)


def test_what_was_sent_before_a_kill_is_not_sent_again(
    fine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_CHUNK", 2)

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(fine, "png", tmp_path / "out", progress=stop)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "labels").rglob("*.png") if p.stem != "d"}
    assert len(before) == 4
    counted: list[tuple[int, int]] = []
    export(fine, "png", tmp_path / "out", progress=lambda *now: counted.append(now))
    assert {p: p.stat().st_mtime_ns for p in before} == before and counted == [(5, 5)]


@pytest.mark.parametrize("to", ["png", "ultralytics", "coco", "cvat"])
def test_a_mask_that_somebody_edits_in_a_stopped_export_is_not_written_over(
    to: str, fine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(fine, to, out, progress=stop)
    (mask, *_) = (path for path in sorted(out.rglob("*.png")) if path.relative_to(out).parts[0] != "images")
    written = mask.read_bytes()
    mask.write_bytes(b"edited")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(mask))} is not as this export writes it, so somebody has"):
        export(fine, to, out)
    assert mask.read_bytes() == b"edited"
    mask.write_bytes(written)
    assert export(fine, to, out).balanced()


def test_a_full_disk_is_one_line_that_names_the_file_and_loses_nothing(
    fine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        full = ending_at(6, lambda path: OSError(errno.ENOSPC, "No space left on device", str(path)))
        patch.setattr(local_storage, "_replacing", full)
        assert refused("export", fine, "--to", "png", "-o", tmp_path / "out").startswith(
            f"No space left on device: {tmp_path}/out/"
        )
    export(fine, "png", tmp_path / "out")
    export(fine, "png", tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_complete_export_is_left_as_it_is(fine: Path, tmp_path: Path) -> None:
    first = export(fine, "png", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.name != LOCK}
    again = export(fine, "png", tmp_path / "out")
    assert again == Export(first.path, "png", 5, 5, repeated=True)
    assert "complete before: nothing to do" in again.lines()[0]
    assert {path: path.stat().st_mtime_ns for path in before} == before


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(fine: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    message = refused("export", fine, "--to", "png", "-o", tmp_path / "out")
    assert message == (f"{tmp_path}/out holds something else (thesis.txt, no export.json): choose another folder")
    assert contents(tmp_path / "out") == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--to", "ultralytics"), "to png before, ultralytics now"),
        (("--to", "png", "--flat"), "flat False before, True now"),
        (("--to", "png", "--label-ids", "color"), "label ids train before, color now"),
        (("--to", "png", "--keep-if", "split == 'val'"), "asked 5 before, 2 now"),
    ],
)
def test_an_export_that_was_asked_for_differently_is_refused(
    options: tuple[str, ...], reason: str, fine: Path, tmp_path: Path
) -> None:
    export(fine, "png", tmp_path / "out")
    before = files(tmp_path / "out")
    message = refused("export", fine, *options, "-o", tmp_path / "out")
    assert f"holds an export that was asked for differently ({reason}): ask the same again" in message
    assert files(tmp_path / "out") == before


def test_other_samples_of_the_same_number_are_another_export(fine: Path, tmp_path: Path) -> None:
    export(fine, "png", tmp_path / "out", keep_if="sample_id == 'train/a/1'")
    with pytest.raises(ValueError, match=r"asked for differently \(samples and labels"):
        export(fine, "png", tmp_path / "out", keep_if="sample_id == 'train/a/2'")


def test_labels_that_have_changed_since_are_another_export(fine: Path, tmp_path: Path) -> None:
    export(fine, "png", tmp_path / "out")
    before = files(tmp_path / "out")
    label = tmp_path / "labels" / "train" / "a" / "1.png"
    Image.fromarray(np.zeros((24, 40), np.uint8)).save(label)
    assert "asked for differently (samples and labels " in refused(
        "export", fine, "--to", "png", "-o", tmp_path / "out"
    )
    assert files(tmp_path / "out") == before


@pytest.mark.thorough
def test_a_run_that_was_made_anew_with_other_labels_is_another_export(tmp_path: Path) -> None:
    run = sent.machine(tmp_path, sent.labels())
    export(run, "png", tmp_path / "out")
    shutil.rmtree(run)
    sent.machine(tmp_path, sent.labels())
    assert export(run, "png", tmp_path / "out").repeated  # the same labels
    shutil.rmtree(run)
    sent.machine(tmp_path, sent.labels(seed=50))
    with pytest.raises(ValueError, match="samples and labels"):
        export(run, "png", tmp_path / "out")


def test_an_export_is_a_folder_and_lies_in_no_run(fine: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file: expected a new folder"):
        export(fine, "png", tmp_path / "file")
    storage.write_json(tmp_path / "run" / "run.json", {"format": "autolabel-run/7"})
    with pytest.raises(ValueError, match="is a run: choose an --out outside it"):
        export(fine, "png", tmp_path / "run" / "out")
    assert not (tmp_path / "run" / "out").exists()


def test_two_exports_into_one_folder_at_once_are_refused(fine: Path, tmp_path: Path) -> None:
    export(fine, "png", tmp_path / "out")
    with storage.hold(tmp_path / "out"), pytest.raises(storage.Busy, match="another autolabel is at work in"):
        export(fine, "png", tmp_path / "out")


def test_a_record_of_another_program_is_refused(fine: Path, tmp_path: Path) -> None:
    storage.write_json(tmp_path / "out" / "export.json", {"format": "coco"})
    with pytest.raises(ValueError, match="is none of 'autolabel-export/1': choose another folder"):
        export(fine, "png", tmp_path / "out")


def test_a_source_without_anything_to_send_is_refused_before_a_folder_is_made(fine: Path, tmp_path: Path) -> None:
    message = refused("export", fine, "--to", "png", "-o", tmp_path / "out", "--keep-if", "trust > 0.5")
    assert message == (f"{fine}: no label to send (5 samples left out by --keep-if, because the value is missing)")
    assert "nobody knows the trust" in refused("export", fine, "--to", "png", "-o", tmp_path / "out", "--worst", "3")
    assert "is not a run: it has no run.json" in refused("export", tmp_path, "--to", "png", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_that_are_all_damaged_are_one_line(fine: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "labels")
    message = refused("export", fine, "--to", "png", "-o", tmp_path / "out")
    assert message.startswith("none of 5 labels can be sent; of 'train/a/1': ")


# --- selection --------------------------------------------------------------------------------------------------------


def test_ids_of_a_file_are_sent_and_unknown_ones_are_named(fine: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("# mine\nval/d\ntrain/a/1\nnobody\n")
    result = export(fine, "png", tmp_path / "out", ids=tmp_path / "ids.txt")
    assert (result.written, result.not_selected, result.balanced()) == (2, {"--ids": 3}, True)
    assert result.notes == (f"{tmp_path}/ids.txt: 1 of its 3 ids not in {fine}: 'nobody'",)
    assert list(index(tmp_path / "out")) == ["val/d", "train/a/1"]  # the order of the file


@pytest.mark.thorough
def test_the_worst_are_sent_in_the_order_of_the_review_list(finished: Path, tmp_path: Path) -> None:
    ranked = Run.open(finished / "run").statistics("review")["sample_id"].to_pylist()
    result = export(finished / "run", "png", tmp_path / "out", worst=2)
    assert (result.written, result.not_selected) == (2, {"--worst": 3})
    assert list(index(tmp_path / "out")) == ranked[:2]
    (tmp_path / "ids.txt").write_text("\n".join(ranked[1:4]))
    export(finished / "run", "png", tmp_path / "both", worst=2, ids=tmp_path / "ids.txt")
    assert list(index(tmp_path / "both")) == ranked[1:3]


@pytest.mark.thorough
def test_a_condition_may_name_statistics_and_texts(finished: Path, tmp_path: Path) -> None:
    rows = Run.open(finished / "run").statistics().to_pylist()
    middle = sorted(row["mean_confidence"] for row in rows)[2]
    expected = [r["sample_id"] for r in rows if r["mean_confidence"] <= middle and r["sample_id"].startswith("train")]
    condition = f"mean_confidence <= {middle!r} and split == 'train'"
    export(finished / "run", "png", tmp_path / "out", keep_if=condition)
    assert list(index(tmp_path / "out")) == expected


# --- names and photographs --------------------------------------------------------------------------------------------


def listing(tmp_path: Path, *names: str, source: str = "fine") -> tuple[Sample, ...]:
    """Samples of these ids, which share one image and one label."""
    label = tmp_path / "one" / "label.png"
    image = sent.photograph(tmp_path / "one" / "image.png", (4, 6), 0)
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(label)
    return tuple(Sample(name, image, 4, 6, source=source, label=label) for name in names)


def saved(tmp_path: Path, *samples: Sample) -> Path:
    save_manifest(tmp_path / "listing.parquet", Manifest.of(CAMVID, samples))
    return tmp_path / "listing.parquet"


def test_names_that_windows_lacks_are_spelt_and_no_name_leaves_the_folder(tmp_path: Path) -> None:
    names = ["con", "a:b", "a%3Ab", "..", "../../x", "/abs", "end.", ".hidden", "aux.1/x", "tab\tx", "ordinary/x_1-2.3"]
    export(saved(tmp_path, *listing(tmp_path, *names)), "png", tmp_path / "out", style=None)
    spelt = {name: row["label"] for name, row in index(tmp_path / "out").items()}
    assert {name: label.removeprefix("labels/").removesuffix(".png") for name, label in spelt.items()} == {
        "con": "%63on", "a:b": "a%3Ab", "a%3Ab": "a%253Ab", "..": "%2E%2E", "../../x": "%2E%2E/%2E%2E/x",
        "/abs": "%/abs", "end.": "end%2E", ".hidden": "%2Ehidden", "aux.1/x": "%61ux.1/x", "tab\tx": "tab%09x",
        "ordinary/x_1-2.3": "ordinary/x_1-2.3",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "options", "meeting"),
    [
        (("A/x", "a/x"), (), "a/x"),
        (("caf\u00e9", "cafe\u0301"), (), "caf\u00e9"),
        (("a/b", "a__b"), ("--flat",), "a__b"),
    ],
)
def test_names_that_meet_on_some_disks_are_refused(
    names: tuple[str, ...], options: tuple[str, ...], meeting: str, tmp_path: Path
) -> None:
    manifest = saved(tmp_path, *listing(tmp_path, *names))
    message = refused("export", manifest, "--to", "png", "-o", tmp_path / "out", *options)
    assert message.startswith(f"two samples would be called '{meeting}' on many disks")
    assert not (tmp_path / "out").exists()


def test_names_that_are_too_long_for_a_disk_are_refused(tmp_path: Path) -> None:
    manifest = saved(tmp_path, *listing(tmp_path, "\u00e9" * 101))
    assert "makes a name of 202 bytes: expected at most 200" in refused(
        "export", manifest, "--to", "png", "-o", tmp_path / "out"
    )


def test_one_id_of_two_sources_is_told_apart_by_the_source(tmp_path: Path) -> None:
    samples = (*listing(tmp_path, "1", "2"), *listing(tmp_path, "1", source="auto"))
    export(saved(tmp_path, *samples), "png", tmp_path / "out")
    names = sorted(name for name in contents(tmp_path / "out") if name.startswith("labels/"))
    assert names == ["labels/auto/1.png", "labels/fine/1.png", "labels/fine/2.png"]


@pytest.mark.parametrize("to", ["png", "ultralytics"])
def test_a_photograph_that_exif_turns_leaves_upright(to: str, tmp_path: Path) -> None:
    lying = np.random.default_rng(3).integers(0, 256, (6, 4, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = tmp_path / "turned.png"
    Image.fromarray(lying).save(image, exif=exif)
    (sample,) = listing(tmp_path, "turned")
    upright = np.rot90(lying, -1)
    export(saved(tmp_path, Sample("turned", image, 4, 6, source="fine", label=sample.label)), to, tmp_path / "out")
    (photo,) = (tmp_path / "out" / "images").rglob("*.png")
    assert np.array_equal(pixels(photo), upright) and Image.open(photo).getexif() == {}


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".bmp", ".tif", ".jfif"])
def test_a_photograph_leaves_as_it_is_where_the_target_reads_it_and_as_png_elsewhere(
    suffix: str, tmp_path: Path
) -> None:
    manifest = sent.people(tmp_path, sent.labels(CITYSCAPES, ["a"]), space=CITYSCAPES, suffix=suffix)
    image = load_manifest(manifest).samples[0].image
    export(manifest, "png", tmp_path / "png")
    (photo,) = (tmp_path / "png" / "images").iterdir()
    assert photo.read_bytes() == image.read_bytes() and photo.suffix == {".jfif": ".jpg"}.get(suffix, suffix)
    export(manifest, "cityscapes", tmp_path / "cityscapes")
    (photo,) = (tmp_path / "cityscapes" / "leftImg8bit").rglob("*.*")
    assert photo.suffix == ".png" and np.array_equal(pixels(photo), pixels(image))


def test_photographs_are_links_or_left_at_home_if_one_asks(fine: Path, tmp_path: Path) -> None:
    assert autolabel("export", fine, "--to", "png", "-o", tmp_path / "links", "--images", "link").exit_code == 0
    link = tmp_path / "links" / "images" / "train" / "a" / "1.png"
    assert link.is_symlink() and link.resolve() == (tmp_path / "images" / "train" / "a" / "1.png").resolve()
    assert autolabel("export", fine, "--to", "png", "-o", tmp_path / "none", "--images", "none").exit_code == 0
    assert not (tmp_path / "none" / "images").exists() and index(tmp_path / "none")["val/d"]["image"] == ""


def test_choices_that_a_format_does_not_have_are_refused(fine: Path, tmp_path: Path) -> None:
    for to, options, spelt in (
        ("ultralytics", ("--label-ids", "source"), "--label-ids source"),
        ("ultralytics", ("--images", "none"), "--images none"),
        ("hf", ("--flat",), "--flat"),
        ("hf", ("--images", "link"), "--images link"),
    ):
        message = refused("export", fine, "--to", to, "-o", tmp_path / "out", *options)
        assert message == f"{to} does not know {spelt}: leave it out"
    assert "Cityscapes has no class 'pavement', 'tree' and 'sign'" in refused(
        "export", fine, "--to", "cityscapes", "-o", tmp_path / "out"
    )
