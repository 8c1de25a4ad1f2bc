"""A labelling run loses nothing, mixes nothing, and gives the same labels whoever made them.

If this fails, somebody trains on labels of another picture, or waits for images that were silently dropped.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from conftest import address_space, autolabel, labels_of, outcome, quarantined, scanned
from PIL import Image

import autolabel as al
from autolabel.manifests import storage
from autolabel.manifests.cluster import ClusterFailed
from autolabel.manifests.policy import Policy
from autolabel.manifests.recipe import Recipe
from autolabel.manifests.run.folder import Accounts, Run, RunFolder
from autolabel.manifests.run.ledger import Commit
from autolabel.manifests.samples import load_manifest
from autolabel.manifests.settings import build_job
from autolabel.manifests.teachers import TeacherName
from autolabel.pipeline import engine, prepare
from autolabel.pipeline.analysis.stats import coverage_at, summarise
from autolabel.pipeline.job import LabelJob, Portion
from autolabel.pipeline.predictor import load_for
from autolabel.pipeline.prepare import settle
from autolabel.pipeline.progress import Counters
from autolabel.pipeline.records import write_record
from autolabel.pipeline.run import choose_engine, generate
from autolabel.pipeline.units import Unit
from autolabel.teacher.checkpoints import save_checkpoint
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.networks.build import build
from autolabel.teacher.predict import Teacher


@pytest.fixture
def drive(city: Path, tmp_path: Path) -> Path:
    """Seven street images of our own, in a folder that a test may damage, and their manifest."""
    manifest = load_manifest(city / "coarse.parquet")
    for sample in manifest.samples[:7]:
        target = tmp_path / "drive" / f"{sample.sample_id}.png"
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(sample.image, target)
    scanned(city, tmp_path / "drive")
    return tmp_path / "drive"


def job(drive: Path, teacher: Path, out: str = "run", **settings: object) -> LabelJob:
    defaults = {"engine": "local", "unit_size": 3, "scales": (0.5, 1.0)}
    paths = {"manifest": drive.parent / "drive.parquet", "teacher": teacher, "out": drive.parent / out}
    return build_job(LabelJob, {**paths, **defaults, **settings})


# --- the same labels, whoever made them -------------------------------------------------------------------------------


def test_labels_are_those_of_the_teacher_alone(drive: Path, teacher: Path) -> None:
    asked = job(drive, teacher)
    assert outcome(generate(asked)) == (Accounts(7, 7, 0, 0), 7, {}, False)
    knows = load_teacher(teacher, device="cpu")
    for sample in load_manifest(asked.manifest).samples:
        image = np.asarray(Image.open(sample.image))
        (expected,), _ = knows.label(image[None], threshold=asked.policy.threshold, scales=asked.scales)
        found = Run.open(asked.out).labels[sample.sample_id]
        assert (found != expected).mean() < 1e-4  # one thread against several: the last bits of a tie may differ


@pytest.mark.parametrize(
    "other",
    [
        {"engine": "ray", "workers": 2},
        {"engine": "local", "workers": 1},
        {"engine": "local", "workers": 4},
        {"store": "png"},
        {"unit_size": 64},
    ],
    ids=str,
)
def test_labels_depend_on_neither_engine_workers_store_nor_unit_size(
    drive: Path, teacher: Path, other: dict[str, object]
) -> None:
    here, there = job(drive, teacher), job(drive, teacher, "other", **other)
    generate(here)
    generate(there)
    assert labels_of(here.out) == labels_of(there.out)


def test_a_plain_zarr_reader_sees_the_same_labels(drive: Path, teacher: Path) -> None:
    asked = job(drive, teacher)
    generate(asked)
    group = zarr.open_group(asked.out / "labels.zarr", mode="r")
    rows = load_manifest(asked.out / "manifest.parquet").samples
    for sample in rows:
        assert sample.label is not None and sample.label_index is not None
        plain = group[sample.label.name][sample.label_index, : sample.height, : sample.width]  # type: ignore[index]
        assert np.array_equal(plain, Run.open(asked.out).labels[sample.sample_id])


def test_png_labels_keep_the_images_relative_path(drive: Path, teacher: Path, city: Path) -> None:
    (drive / "a").mkdir()
    (drive / "b").mkdir()
    for place, image in enumerate(sorted(drive.glob("*.png"))):
        image.rename(drive / "ab"[place % 2] / f"{place // 2}.png")  # a/0 and b/0 would collide if flattened
    scanned(city, drive)
    asked = job(drive, teacher, store="png")
    generate(asked)
    found = sorted(p.relative_to(asked.out / "labels").as_posix() for p in (asked.out / "labels").rglob("*.png"))
    assert found == ["a/0.png", "a/1.png", "a/2.png", "a/3.png", "b/0.png", "b/1.png", "b/2.png"]
    with Image.open(asked.out / "labels" / "a" / "0.png") as png:
        assert png.mode == "L" and np.array_equal(np.asarray(png), Run.open(asked.out).labels["a/0"])


# --- one bad image costs one image ------------------------------------------------------------------------------------


def test_bad_images_are_quarantined_with_their_reasons(drive: Path, teacher: Path, city: Path) -> None:
    images = sorted(drive.glob("*.png"))
    whole = images[0].read_bytes()
    images[0].write_bytes(whole[: len(whole) // 2])
    images[1].unlink()
    Image.open(images[2]).convert("CMYK").save(images[2], "JPEG")
    Image.open(images[3]).resize((64, 64)).save(images[3])
    asked = job(drive, teacher, max_quarantined=1.0)
    assert generate(asked).accounts == Accounts(asked=7, labelled=3, quarantined=4, left=0)
    reasons = quarantined(asked.out)
    assert list(reasons) == [image.stem for image in images[:4]]
    truncated, missing, cmyk, resized = reasons.values()
    assert truncated.startswith("damaged or truncated")
    assert missing == "the file is missing"
    assert cmyk == "mode CMYK, 8 bits: expected 8-bit RGB; its colours depend on a printer; save it as RGB"
    assert resized == "the image is 64 x 64 but its manifest says 192 x 96: scan again"
    assert sorted(Run.open(asked.out).labels) == [image.stem for image in images[4:]]
    with pytest.raises(KeyError):
        Run.open(asked.out).labels[images[0].stem]


def test_an_image_that_was_unreadable_at_scan_time_is_in_the_accounts(drive: Path, teacher: Path, city: Path) -> None:
    (drive / "broken.png").write_bytes(b"not a picture")
    scanned(city, drive)
    asked = job(drive, teacher, max_quarantined=1.0)
    assert generate(asked).accounts == Accounts(8, 7, 1, 0)
    assert list(quarantined(asked.out)) == ["broken"]


def test_a_repaired_image_is_labelled_by_the_next_call(drive: Path, teacher: Path) -> None:
    image = sorted(drive.glob("*.png"))[0]
    whole = image.read_bytes()
    image.write_bytes(whole[:1000])
    asked = job(drive, teacher, max_quarantined=1.0)
    assert generate(asked).accounts == Accounts(7, 6, 1, 0)
    untouched = labels_of(asked.out)
    image.write_bytes(whole)
    assert generate(asked).accounts == Accounts(7, 7, 0, 0)
    assert labels_of(asked.out).items() >= untouched.items()


def test_images_of_any_height_and_width_are_labelled(city: Path, teacher: Path, tmp_path: Path) -> None:
    """One row, one column, smaller than any stride, a panorama: the run does not stop at what nobody thought of."""
    sizes = {
        "row": (1, 70),
        "column": (70, 1),
        "pixel": (1, 1),
        "icon": (8, 8),
        "panorama": (32, 20_000),
        "odd": (45, 71),
    }
    (tmp_path / "drive").mkdir()
    whole = Image.open(load_manifest(city / "coarse.parquet").samples[0].image)
    for name, (height, width) in sizes.items():
        whole.resize((width, height)).save(tmp_path / "drive" / f"{name}.png")
    scanned(city, tmp_path / "drive")
    result = autolabel(
        "generate", tmp_path / "drive.parquet", "--teacher", teacher, "--out", tmp_path / "run",
        "--engine", "local",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    labels = Run.open(tmp_path / "run").labels
    assert {name: label.shape for name, label in labels.items()} == sizes
    knows = load_teacher(teacher, device="cpu")
    for name in sizes:
        (expected,), _ = knows.label(np.asarray(Image.open(tmp_path / "drive" / f"{name}.png"))[None])
        assert (labels[name] != expected).mean() < 1e-3
    assert quarantined(tmp_path / "run") == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="limits the memory of the CPU")
def test_an_image_that_does_not_fit_into_memory_costs_one_image(drive: Path, teacher: Path, city: Path) -> None:
    """Its copy at scale 2 alone takes 1.7 GB; the process may take 1.5 GB. The others are labelled as ever."""
    for image in sorted(drive.glob("*.png"))[2:]:
        image.unlink()
    scanned(city, drive)
    asked = job(drive, teacher, scales=(1.0, 2.0), workers=1)
    generate(asked)
    whole = labels_of(asked.out)
    Image.new("RGB", (6000, 6000), (90, 90, 90)).save(drive / "a_huge.png")
    scanned(city, drive)
    again = replace(asked, out=drive.parent / "again", max_quarantined=1.0)
    with address_space(3 << 29):
        assert generate(again).accounts == Accounts(asked=3, labelled=2, quarantined=1, left=0)
    reasons = quarantined(again.out)
    assert list(reasons) == ["a_huge"]
    assert re.fullmatch(
        r"not enough memory on cpu for an image of 6000 x 6000 at scale 2 \(about \d+\.\d GiB needed, \d.* free\):"
        r" leave that scale out, or use a larger device",
        reasons["a_huge"],
    )
    assert labels_of(again.out) == whole


def test_a_run_tells_how_many_images_it_computed_at_once(drive: Path, teacher: Path) -> None:
    asked = job(drive, teacher)
    generate(asked)
    recipe, (plan,) = Run.open(asked.out).recipe, Run.open(asked.out).budgets
    assert set(plan) == {
        "device",
        "precision",
        "bytes_per_pixel",
        "free_bytes",
        "total_bytes",
        "elements_per_pixel",
        "fixed_bytes",
        "images_at_once",
        "batches_in_flight",
    }
    assert plan["precision"] == recipe.precision
    assert recipe.device == "cuda" or plan["device"] == "cpu"
    assert plan["bytes_per_pixel"] > 0 and plan["free_bytes"] > 0
    assert plan["images_at_once"] == {"96x192": 1}  # a thread computes one
    assert 1 <= plan["batches_in_flight"]["96x192"] <= max(8, os.cpu_count() or 1)


@pytest.mark.thorough
def test_a_teacher_that_cannot_weigh_the_scales_is_refused_before_anything_is_done(drive: Path, city: Path) -> None:
    space = load_manifest(city / "coarse.parquet").label_space
    path, arch = drive.parent / "explicit.pt", "hrnet18s_plain_explicit"
    save_checkpoint(path, build(arch, len(space)), arch=arch, space=space)
    asked = job(drive, path, limit=1)
    with pytest.raises(ValueError, match=r"^scales 0\.5,1: this network weighs exactly 3 scales at once$"):
        generate(asked)
    assert not asked.out.exists()
    assert generate(replace(asked, combine="average")).accounts.labelled == 1
    assert generate(replace(asked, scales=(0.5, 1.0, 2.0), out=drive.parent / "three")).accounts.labelled == 1


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "settings", "expected"),
    [
        (0, {}, ("local", "this process does all the work")),
        (0, {"workers": 1}, ("local", "this process does all the work")),
        (0, {"workers": 2}, ("ray", "2 workers")),
        (0, {"address": "10.0.0.1:6379"}, ("ray", "the cluster at 10.0.0.1:6379")),
        (0, {"engine": "ray"}, ("ray", "")),
        (1, {}, ("local", "this process does all the work")),
        (8, {}, ("ray", "one worker for each of 8 GPUs")),
        (8, {"workers": 1}, ("local", "this process does all the work")),
        (8, {"unit_size": 7}, ("local", "one unit of images needs one GPU only")),
    ],
    ids=str,
)
def test_the_automatic_engine_takes_ray_where_several_workers_have_work(
    drive: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, settings: dict[str, Any], expected: object
) -> None:
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    device = "cuda" if gpus else "cpu"
    asked = job(drive, teacher, **{"engine": "auto", "device": device, "precision": "float32", **settings})
    request, _ = settle(asked, "0" * 64, drive)
    assert choose_engine(request) == expected
    if asked.machine.engine == "ray":
        with pytest.raises(ValueError, match="engine ray cannot use a predictor of this process"):
            choose_engine(request, in_process=True)
    else:
        assert choose_engine(request, in_process=True) == ("local", "")


def test_a_local_run_loads_its_teacher_once(drive: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[TeacherName] = []

    def load(name: TeacherName, recipe: Recipe, **more: Any) -> Teacher:
        loaded.append(name)
        return load_for(name, recipe, **more)

    for module in (prepare, engine):
        monkeypatch.setattr(module, "load_for", load)
    generate(job(drive, teacher, "new"))
    assert loaded == [TeacherName.of(teacher)]
    generate(job(drive, teacher, "again"), teacher=load_teacher(teacher, device="cpu"))
    assert loaded == [TeacherName.of(teacher)]
    assert labels_of(drive.parent / "again") == labels_of(drive.parent / "new")


def test_a_loaded_teacher_labels_with_its_own_precision_and_combination_or_not_at_all(
    drive: Path, teacher: Path
) -> None:
    loaded = load_teacher(teacher, device="cpu", combine="average")
    with pytest.raises(ValueError, match=r"^combine 'network': expected 'average', which the loaded teacher has$"):
        generate(job(drive, teacher), teacher=loaded)
    with pytest.raises(ValueError, match=r"^precision 'bfloat16': expected 'float32', which the loaded teacher has$"):
        generate(job(drive, teacher, combine="average", precision="bfloat16"), teacher=loaded)
    nameless = Teacher(loaded.network, loaded.label_space, combine="average")
    with pytest.raises(ValueError, match="a teacher that was never in a file cannot be told from another"):
        generate(job(drive, teacher, combine="average"), teacher=nameless)
    assert not (drive.parent / "run").exists()
    run = al.generate(drive.parent / "drive.parquet", teacher=loaded, out=drive.parent / "run", scales=(1.0,))
    assert (run.recipe.combine, run.recipe.precision) == ("average", "float32")
    assert run.teacher == TeacherName.of(teacher)
    assert run.recipe.teacher_sha256 == storage.sha256(teacher)


# --- resume -----------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_touched_by_the_same_call(drive: Path, teacher: Path) -> None:
    asked = job(drive, teacher)
    generate(asked)
    before = {path: path.stat().st_mtime_ns for path in (asked.out / "units").iterdir()}
    generate(asked)
    assert {path: path.stat().st_mtime_ns for path in (asked.out / "units").iterdir()} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"policy": Policy(threshold=0.9)}, "policy: threshold was 0.5, now 0.9"),
        ({"scales": (1.0,)}, "scales was [0.5, 1.0], now [1.0]"),
        ({"flip": True}, "flip was false, now true"),
        ({"store": "png"}, 'store was "zarr", now "png"'),
        ({"unit_size": 4}, "unit_size was 3, now 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_different_request_is_refused_and_names_both_values(
    drive: Path, teacher: Path, change: dict[str, object], named: str
) -> None:
    generate(job(drive, teacher))
    with pytest.raises(ValueError) as refusal:
        generate(job(drive, teacher, **change))
    assert named in str(refusal.value)


def test_another_teacher_or_manifest_is_refused(drive: Path, teacher: Path, city: Path) -> None:
    asked = job(drive, teacher)
    generate(asked)
    other = drive.parent / "other.pt"
    content = teacher.read_bytes()
    other.write_bytes(content)
    generate(replace(asked, teacher=other))  # a copy under another name is the same teacher
    loaded = torch.load(other, weights_only=True)
    loaded["state_dict"]["ocr.cls_head.bias"] += 1
    torch.save(loaded, other)
    with pytest.raises(ValueError, match="teacher was"):
        generate(replace(asked, teacher=other))
    sorted(drive.glob("*.png"))[0].unlink()
    scanned(city, drive)
    with pytest.raises(ValueError, match=r"1 samples of this run are not in .* any more"):
        generate(asked)


def test_a_changed_image_under_the_same_path_is_noticed(drive: Path, teacher: Path) -> None:
    asked = job(drive, teacher)
    generate(asked)
    first, second = sorted(drive.glob("*.png"))[:2]
    os.utime(first)  # a new date alone is no change
    generate(asked)
    shutil.copyfile(second, first)
    with pytest.raises(ValueError, match=f"image {first} has changed since it was labelled"):
        generate(asked)


def test_a_lost_shard_is_made_again(drive: Path, teacher: Path) -> None:
    asked = job(drive, teacher)
    generate(asked)
    before = labels_of(asked.out)
    (asked.out / "labels.zarr" / "b512x512" / "c.1.0.0").unlink()
    generate(asked)
    assert labels_of(asked.out) == before


def test_a_folder_that_is_no_run_is_refused(drive: Path, teacher: Path) -> None:
    asked = job(drive, teacher)
    asked.out.mkdir()
    (asked.out / "thesis.tex").write_text("ten years of work")
    with pytest.raises(ValueError, match="is not empty and not a run"):
        generate(asked)
    assert [path.name for path in asked.out.iterdir() if path.name != ".lock"] == ["thesis.tex"]


def test_two_drivers_never_share_a_run(drive: Path, teacher: Path) -> None:
    asked = job(drive, teacher)
    asked.out.mkdir()
    hold = "import sys, time, filelock\nwith filelock.FileLock(sys.argv[1]): print(1, flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", hold, asked.out / ".lock"], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    try:
        with pytest.raises(ValueError, match="another autolabel is at work"):
            generate(asked)
    finally:
        other.kill()
        other.wait()
    assert generate(asked).accounts.labelled == 7  # the lock died with its owner


# --- kill it anywhere -------------------------------------------------------------------------------------------------


def command(asked: LabelJob, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "autolabel.cli", "generate", str(asked.manifest), "--teacher",
        str(asked.teacher), "--out", str(asked.out), "--scales", "0.5,1", "--unit-size", "1", *more,
    ]  # fmt: skip


def wait_for_units(run: Path, count: int) -> None:
    deadline = time.monotonic() + 90
    while len(list((run / "units").glob("*.parquet"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)], ids=["SIGKILL", "Ctrl-C"])
def test_a_killed_run_keeps_what_was_committed_and_finishes_the_rest(
    drive: Path, teacher: Path, how: signal.Signals, code: int
) -> None:
    whole = job(drive, teacher, "whole", unit_size=1)
    generate(whole)
    asked = job(drive, teacher, unit_size=1)
    process = subprocess.Popen(command(asked, "--engine", "local", "--workers", "1"), stderr=subprocess.PIPE)
    wait_for_units(asked.out, 2)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in errors
    committed = set((asked.out / "units").glob("*.parquet"))
    before = {path: path.stat().st_mtime_ns for path in committed}
    generate(asked)
    assert {path: path.stat().st_mtime_ns for path in committed} == before  # only the rest was done
    assert labels_of(asked.out) == labels_of(whole.out)
    assert not [path for path in asked.out.rglob("*") if path.suffix == storage.TEMPORARY]


def test_a_killed_ray_worker_costs_no_image(drive: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dies is replaced and its unit is done again; nothing is lost and nothing counted twice."""
    asked = job(drive, teacher, engine="ray", workers=1, unit_size=2)
    killed: list[int] = []

    def kill_once(progress: object) -> None:
        rows = [p for p in (asked.out / "units").glob("*.parquet")]
        if rows and not killed:
            worker = pq.read_table(rows[0], columns=["worker"])["worker"][0].as_py()
            killed.append(int(worker.rpartition(":")[2]))
            os.kill(killed[0], signal.SIGKILL)

    assert generate(asked, on_progress=kill_once).accounts == Accounts(7, 7, 0, 0)
    assert killed
    assert len(RunFolder(asked.out).statistics()) == 7


def test_a_full_disk_stops_the_run_and_keeps_what_is_there(
    drive: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = job(drive, teacher)
    written: list[str] = []

    def write_until_full(run: RunFolder, unit: Unit, *more: Any) -> Commit:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run.path))
        written.append("one")
        return write_record(run, unit, *more)

    with pytest.raises(OSError, match="No space left on device"):
        generate(asked, write=write_until_full)
    assert len(Run.open(asked.out).labels) == 3
    assert generate(asked).accounts == Accounts(7, 7, 0, 0)


def test_an_unreachable_cluster_is_one_clear_error(drive: Path, teacher: Path) -> None:
    with pytest.raises(ClusterFailed, match=r"nobody listens at 127\.0\.0\.1:1 "):
        generate(job(drive, teacher, engine="ray", address="127.0.0.1:1"))


# --- the plan and the numbers -----------------------------------------------------------------------------------------


def test_the_summary_adds_up_what_the_labels_and_coarse_labels_hold(city: Path, teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = LabelJob(city / "coarse.parquet", teacher, run, scales=(0.5, 1.0))
    generate(asked)
    found = summarise(run)
    labels = Run.open(run).labels
    everything = np.concatenate([label.ravel() for label in labels.values()])
    counts = np.bincount(everything, minlength=256)
    assert found.classes["auto_pixels"].tolist() == counts[:19].tolist()
    assert found.auto_coverage == 1 - counts[255] / everything.size
    assert found.histogram.sum() == everything.size
    assert coverage_at(found.histogram, 0.5) == found.auto_coverage
    from autolabel.manifests.images import read_label

    manifest = load_manifest(city / "coarse.parquet")
    coarse = np.concatenate(
        [
            read_label(s.coarse_label, manifest.label_space, ids="source").ravel()
            for s in sorted(manifest.samples, key=lambda s: s.sample_id)
            if s.coarse_label
        ]
    )
    assert found.classes["coarse_pixels"].tolist() == np.bincount(coarse, minlength=256)[:19].tolist()
    assert found.agreement == ((coarse == everything) & (coarse != 255)).sum() / (coarse != 255).sum()


def test_progress_is_told_and_written(drive: Path, teacher: Path) -> None:
    asked = job(drive, teacher, limit=5)
    seen: list[Counters] = []
    generate(asked, on_progress=seen.append)
    assert {(p.asked, p.before, p.wanted) for p in seen} == {(7, 0, 5)}
    assert sorted({p.done for p in seen}) == [0, 1, 2, 3, 4, 5]
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert {p.workers for p in seen} == {0, 1}
    last = json.loads((asked.out / "progress.json").read_text())
    assert (last["done"], last["quarantined"], last["workers"], last["eta_s"]) == (5, 0, 0, 0.0)
    labels = Run.open(asked.out).labels
    pixels = np.concatenate([label.ravel() for label in labels.values()])
    assert last["coverage"] == (pixels != 255).mean()
    assert last["class_coverage"]["road"] == (pixels == 0).mean()
    assert last["classes"] == len(np.unique(pixels[pixels != 255]))
    # Another call knows what was done before it.
    generate(replace(asked, portion=Portion()), on_progress=seen.append)
    assert (seen[-1].before, seen[-1].done, seen[-1].wanted) == (5, 2, 2)
