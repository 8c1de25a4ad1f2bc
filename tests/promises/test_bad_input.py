"""A training of days begins on wrong input, or ends in a traceback instead of one line that says what to do.

`train`, `evaluate` and `compare` on manifests that do not belong together, that are empty, or whose files are gone.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import autolabel, contents
from PIL import Image

from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import Manifest, load_manifest, save_manifest

torch.set_num_threads(1)

SMALL = ("--steps", 1, "--batch-size", 2, "--crop", "64x64", "--device", "cpu")


def refused(result: Result) -> str:
    """The one line of an answer with exit code 2."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    *_, line = result.stderr.splitlines()
    assert line.startswith("autolabel: ")
    assert "Traceback" not in result.stderr
    return line.removeprefix("autolabel: ")


def training(out: Path, manifest: Path, val: Path, *more: object) -> Result:
    return autolabel("train", manifest, "--val", val, "--out", out, *SMALL, *more)


def comparison(city: Path, out: Path, *more: object, **other: Path) -> Result:
    """`autolabel compare` on the city, with some of its arguments replaced."""
    manifests = {name: city / f"{name}.parquet" for name in ("fine", "coarse", "val")} | other
    return autolabel("compare", *(x for name, path in manifests.items() for x in (f"--{name}", path)),
                     "--out", out, *SMALL, *more)  # fmt: skip


def labelled(city: Path, teacher: Path, out: Path, store: str, *more: object) -> Path:
    """A run over the city's ten coarse images, in units of four."""
    made = autolabel("generate", city / "coarse.parquet", "--teacher", teacher, "--out", out,
                     "--engine", "local", "--unit-size", 4, "--store", store, "--scales", "1", *more)  # fmt: skip
    assert made.exit_code == 0, made.output
    return out


@pytest.fixture(scope="module")
def run(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled(city, teacher, tmp_path_factory.mktemp("labels") / "run", "zarr")


# --- manifests that do not belong together ----------------------------------------------------------------------------


def test_other_classes_are_refused_wherever_they_come_from(
    city: Path, camvid: Path, teacher: Path, run: Path, tmp_path: Path
) -> None:
    fine, val, out = city / "fine.parquet", city / "val.parquet", tmp_path / "out"
    different = f"{fine} and {camvid} use different label spaces: train and validate in one"
    assert refused(training(out, fine, camvid)) == different
    assert (
        refused(training(out, camvid, val))
        == f"{camvid} and {val} use different label spaces: train and validate in one"
    )
    assert refused(autolabel("evaluate", teacher, camvid)) == (
        f"{teacher} predicts 19 classes of 'cityscapes', but {camvid} uses label space 'camvid' with 11: use a"
        " teacher of that label space, or map its classes onto it with --classes"
    )
    other = load_manifest(camvid)
    for source in ("coarse", "auto"):
        (tmp_path / source).mkdir()
        path = tmp_path / source / "manifest.parquet"
        save_manifest(path, replace(other, samples=tuple(replace(s, source=source) for s in other.samples)))
        arm = () if source == "coarse" else ("--arm", f"other={path}")
        given = {"coarse": path} if source == "coarse" else {}
        assert refused(comparison(city, out, *arm, auto=run, **given)) == (
            f"{path} uses label space 'camvid' (11 classes) but the fine manifest 'cityscapes' (19): fuse only one"
            " label space"
        )
    assert refused(comparison(city, tmp_path / "c", auto=run, val=camvid)).endswith(
        "use different label spaces: train and validate in one"
    )
    assert not out.exists()


def test_validation_images_in_the_training_are_refused(city: Path, teacher: Path, run: Path, tmp_path: Path) -> None:
    fine = city / "fine.parquet"
    shared = r"^6 validation images are also trained on \(the first is '.*'\): the score would mean nothing; "
    assert re.match(shared, refused(training(tmp_path / "out", fine, fine)))
    assert re.match(r".* was trained on 6 of the 6 images of .*: score it on others, or say --allow-overlap$",
                    refused(autolabel("evaluate", teacher, fine)))  # fmt: skip
    assert "was trained on 6 of the 6 validation images" in refused(
        comparison(city, tmp_path / "c", auto=run, val=fine)
    )


@pytest.mark.parametrize("kind", ["empty", "unlabelled"])
def test_a_manifest_without_labels_is_named(kind: str, city: Path, teacher: Path, run: Path, tmp_path: Path) -> None:
    fine, val, bad, out = city / "fine.parquet", city / "val.parquet", tmp_path / f"{kind}.parquet", tmp_path / "out"
    samples = (
        () if kind == "empty" else tuple(replace(s, label=None, source="none") for s in load_manifest(fine).samples)
    )
    save_manifest(bad, Manifest.of(CITYSCAPES, samples))
    nothing = " has no labelled sample: nothing to train on or to score"
    assert refused(training(out, bad, val)) == f"{bad}{nothing}"
    assert refused(training(out, fine, bad)) == f"{bad}{nothing}"
    assert refused(autolabel("evaluate", teacher, bad)) == f"{bad}{nothing}"
    assert refused(comparison(city, tmp_path / "c", auto=run, val=bad)) == f"{bad}{nothing}"
    assert refused(comparison(city, tmp_path / "c", auto=run, coarse=bad)) == (
        f"{bad} has no samples with coarse labels: this arm would only repeat the first"
    )
    assert (
        refused(comparison(city, tmp_path / "c", auto=run, fine=bad)) == f"{tmp_path / 'c' / 'fine.parquet'}{nothing}"
    )
    assert not out.exists()


# --- files that are gone ----------------------------------------------------------------------------------------------


def test_an_image_that_was_deleted_after_the_scan_is_named(
    city: Path, teacher: Path, run: Path, tmp_path: Path
) -> None:
    """Before anything else runs, also where it would be drawn late."""
    shutil.copytree(city, tmp_path / "city")
    for name, commands in (("val", 3), ("fine", 1)):
        manifest = tmp_path / "city" / f"{name}.parquet"
        image = load_manifest(manifest).samples[-1]
        image.image.unlink()
        gone = f"image {image.image} of sample {image.sample_id!r}: No such file or directory"
        fine, val = (tmp_path / "city" / f"{n}.parquet" for n in ("fine", "val"))
        assert refused(training(tmp_path / "out", fine, val if name == "val" else city / "val.parquet")) == gone
        if commands == 3:
            assert refused(autolabel("evaluate", teacher, val)) == gone
            assert refused(comparison(city, tmp_path / "c", auto=run, val=val)) == gone
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("store", ["zarr", "png"])
def test_a_label_that_the_run_has_lost_is_named_with_its_run_and_the_way_back(
    store: str, city: Path, teacher: Path, tmp_path: Path
) -> None:
    """The way back is then taken: verify, generate, train."""
    mine = labelled(city, teacher, tmp_path / "run", store)
    before = contents(mine)
    lost = sorted([*mine.glob("labels.zarr/*/c.*"), *mine.glob("labels/**/*.png")])
    for file in lost:
        file.unlink()
    manifest, val = mine / "manifest.parquet", city / "val.parquet"
    line = refused(training(tmp_path / "out", manifest, val))
    sample, file = re.match(r"sample '(.*?)' of run .*?: (\S*)(?: is missing|: No such file)", line).groups()  # type: ignore[union-attr]
    assert sample in {s.sample_id for s in load_manifest(manifest).samples}
    assert Path(file) in lost
    assert f" of run {mine}: " in line
    assert line.endswith(
        f"; `autolabel verify {mine}` finds all that is damaged or was changed by hand, and says what to do"
    )
    assert re.match(r"sample '.*' of run ", refused(comparison(city, tmp_path / "c", "--steps", 6, auto=mine)))
    assert autolabel("verify", mine, "--repair").exit_code == 0
    after = contents(labelled(city, teacher, mine, store))
    assert all(after[file.relative_to(mine).as_posix()] == before[file.relative_to(mine).as_posix()] for file in lost)
    assert training(tmp_path / "out2", manifest, val).exit_code == 0


def test_an_unfinished_run_lists_what_it_has_committed_and_trains_on_that(
    city: Path, teacher: Path, tmp_path: Path
) -> None:
    run = labelled(city, teacher, tmp_path / "run", "zarr", "--limit", 5)
    listed = [s.sample_id for s in load_manifest(run / "manifest.parquet").labelled]
    assert listed == list(Run.open(run).labels)
    assert len(listed) == 5
    assert training(tmp_path / "out", run / "manifest.parquet", city / "val.parquet").exit_code == 0
    assert json.loads((tmp_path / "out" / "train.json").read_text())["images"] == 5


# --- classes without a pixel ------------------------------------------------------------------------------------------


def no_constant(text: str) -> float:
    raise AssertionError(f"{text} in a file that promises JSON")


@pytest.mark.parametrize("loss", ["cross-entropy", "balanced", "image-weighted", "rmi"])
def test_a_class_without_a_pixel_anywhere_is_a_dash_and_never_nan(loss: str, city: Path, tmp_path: Path) -> None:
    """All labels say road or sky; of the network's 19 classes 17 are in none, and it learns not to predict them."""
    manifests = {}
    for name in ("fine", "val"):
        samples = []
        for place, sample in enumerate(load_manifest(city / f"{name}.parquet").samples):
            label = np.full((sample.height, sample.width), 10, np.uint8)  # sky
            label[sample.height // 2 :] = 0  # road
            path = tmp_path / f"{name}{place}.png"
            Image.fromarray(label).save(path)
            samples.append(replace(sample, label=path, label_ids="train"))
        manifests[name] = tmp_path / f"{name}.parquet"
        save_manifest(manifests[name], Manifest.of(CITYSCAPES, tuple(samples)))
    out = tmp_path / "out"
    done = autolabel("train", manifests["fine"], "--val", manifests["val"], "--out", out, *SMALL,
                     "--steps", 12, "--loss", loss)  # fmt: skip
    assert done.exit_code == 0, done.output
    scores = json.loads((out / "scores.json").read_text(), parse_constant=no_constant)
    missing = [name for name, iou in scores["iou"].items() if iou is None]
    assert missing
    assert {"road", "sky"}.isdisjoint(missing)
    rows = {line.split()[0]: line.split()[-1] for line in done.stdout.splitlines() if line.split()}
    assert rows[missing[0].split()[0]] == "–"
    assert "nan" not in (done.output + (out / "metrics.jsonl").read_text()).lower()
    scored = autolabel("evaluate", out / "best.pt", manifests["val"],
                       "-o", tmp_path / "scores.json")  # fmt: skip
    assert scored.exit_code == 0, scored.output
    assert "nan" not in scored.output.lower()
    json.loads((tmp_path / "scores.json").read_text(), parse_constant=no_constant)
