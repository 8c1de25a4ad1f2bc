"""A student leaves for the car as one file, and there it must give the labels that it was scored with here.

If this fails, a car sees another road than the one that the scores were measured on.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HEIGHT, WIDTH, autolabel, contents, labels_of, refused
from formula import network_by_formula
from numpy.typing import NDArray

from autolabel.manifests.label_space import CAMVID, CITYSCAPES, LabelSpace
from autolabel.manifests.samples import fingerprints, load_manifest
from autolabel.manifests.scores import Confusion
from autolabel.student.data import ManifestDataset
from autolabel.teacher import export
from autolabel.teacher.agreement import BadExport
from autolabel.teacher.checkpoints import DRAWN_STREETS, save_checkpoint
from autolabel.teacher.export import Exported, export_model
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.networks.build import ARCHITECTURES, build
from autolabel.teacher.networks.combine import rescaled_size

torch.set_num_threads(1)

FIVE = LabelSpace.named("five", ("road", "car", "sky", "pole", "tree"))


def by_formula(folder: Path, arch: str) -> Path:
    path = folder / "best.pt"
    save_checkpoint(path, network_by_formula(arch, len(FIVE)), arch=arch, space=FIVE)
    return path


# --- onnxruntime alone ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher of the tests as ONNX, for images of the city, at scale 1."""
    folder = tmp_path_factory.mktemp("student")
    shutil.copyfile(teacher, folder / "best.pt")
    size = f"{HEIGHT}x{WIDTH}"
    result = autolabel("export-model", folder / "best.pt", "-o", folder / "student.onnx", "--size", size, "--scales", 1)
    assert result.exit_code == 0, result.output
    lines = result.stdout.replace(f"{folder}/", "").splitlines()
    assert lines[0] == "takes RGB images (uint8) of 96 x 192, looks at scales 1, gives each pixel 19 logits (float32)"
    assert lines[1].startswith("checked against the checkpoint on 4 images: largest difference ")
    assert lines[2].endswith(" MB), student.toml, student.seen.txt")
    assert len(lines) == 3 and all(line.startswith("exporting: ") for line in result.stderr.splitlines())
    return folder / "student.onnx"


def by_onnxruntime(path: Path, images: NDArray[np.uint8]) -> NDArray[Any]:
    """Do what a car does: onnxruntime and numpy, nothing of ours."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    output: NDArray[Any] = session.run(["logits"], {"images": images.transpose(0, 3, 1, 2)})[0]
    return output


def test_onnxruntime_alone_gives_the_labels_that_evaluate_scored(student: Path, city: Path, tmp_path: Path) -> None:
    scores, val = tmp_path / "scores.json", city / "val.parquet"
    evaluated = autolabel("evaluate", student.with_name("best.pt"), val, "--scales", 1, "-o", scores)
    assert evaluated.exit_code == 0, evaluated.output
    expected, confusion = json.loads(scores.read_text()), Confusion(len(CITYSCAPES))
    for item in ManifestDataset(val):
        logits = by_onnxruntime(student, item["image"].permute(1, 2, 0).numpy()[None])
        confusion.add(item["label"].numpy(), logits[0].argmax(axis=0).astype(np.uint8))
    iou = {name: None if np.isnan(v) else float(v) for name, v in zip(CITYSCAPES.names, confusion.iou(), strict=True)}
    assert (iou, confusion.mean_iou()) == (expected["iou"], expected["miou"])
    assert confusion.pixel_accuracy() == expected["pixel_accuracy"]


def test_the_file_says_its_classes_and_nothing_about_the_machine_that_made_it(student: Path, city: Path) -> None:
    import onnx

    model = onnx.load(student)
    assert [(entry.key, entry.value) for entry in model.metadata_props] == [("classes", CITYSCAPES.to_json())]
    assert str(Path(export.__file__).parent).encode() not in student.read_bytes()
    assert student.with_suffix(".toml").read_text().splitlines()[1:] == [
        'classes = "cityscapes"', 'dtype = "uint8"', f"size = [{HEIGHT}, {WIDTH}]", 'trained_on = "student.seen.txt"'
    ]  # fmt: skip
    seen = fingerprints(load_manifest(city / "fine.parquet").samples)
    assert student.with_suffix(".seen.txt").read_text().split() == sorted(seen)


def test_the_file_is_a_teacher_that_gives_the_labels_of_its_checkpoint(
    student: Path, city: Path, tmp_path: Path
) -> None:
    runs = {}
    for name in ("best.pt", "student.onnx"):
        out, more = tmp_path / name, ("--scales", 1, "--engine", "local", "--store", "png", "--limit", 4)
        run = ("generate", city / "coarse.parquet", "--teacher", student.with_name(name), "--out", out)
        result = autolabel(*run, *more)
        assert result.exit_code == 0, result.output
        runs[name] = labels_of(out)
    assert len(runs["best.pt"]) == 4 and runs["best.pt"] == runs["student.onnx"]


def test_the_file_knows_the_images_that_its_checkpoint_has_seen(student: Path, city: Path) -> None:
    line = refused("evaluate", student, city / "fine.parquet")
    assert line.startswith(f"{student} was trained on 6 of the 6 images of {city / 'fine.parquet'} (")
    expected = autolabel("evaluate", student.with_name("best.pt"), city / "val.parquet", "--scales", 1)
    result = autolabel("evaluate", student, city / "val.parquet")
    assert result.stdout.replace(str(student), str(student.with_name("best.pt"))) == expected.stdout


# --- any size ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.25, 0.375, 0.5, 1.0, 1.25, 1.5, 2.0])
@pytest.mark.parametrize("nearest", [False, True])
def test_open_lengths_are_rounded_as_known_ones(scale: float, nearest: bool) -> None:
    from autolabel.teacher.networks.combine import _open_length

    for length in range(8, 200):
        known = rescaled_size((length, length), scale, nearest=nearest)[0]
        assert _open_length(length, scale, nearest=nearest) == known


def agreed(exported: Exported) -> tuple[int, int]:
    return exported.agreement.images, exported.agreement.pixels


@pytest.mark.thorough
def test_a_network_without_a_size_takes_any_and_gives_what_the_checkpoint_gives(tmp_path: Path) -> None:
    checkpoint = by_formula(tmp_path, "hrnet18s_plain")
    exported = export_model(checkpoint, tmp_path / "student.pt2", gives="probabilities")
    assert agreed(exported) == (4, 2 * 65 * 129 + 38 * 116 + 106 * 40)
    assert [path.name for path in exported.files] == ["student.pt2", "student.toml", "student.classes.json"]
    assert LabelSpace.from_json((tmp_path / "student.classes.json").read_text()) == FIVE
    program, teacher = torch.export.load(tmp_path / "student.pt2").module(), load_teacher(checkpoint, device="cpu")
    image = np.random.default_rng(5).integers(0, 256, (77, 51, 3), np.uint8)
    with torch.inference_mode():
        probabilities = program(torch.from_numpy(image.transpose(2, 0, 1)[None].copy()))[0]
    expected = teacher.logits(image, scales=(1.0,)).softmax(dim=0)
    assert float((probabilities - expected).abs().max()) < 1e-5


EVERY = [pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHITECTURES]
SMALL = [f"hrnet18s_{head}" for head in ("ocr_mscale", "aspp_explicit", "plain_explicit_pairs", "plain")]
SMALL.append("efficientnet_lite0_ocr_mscale2")


@pytest.mark.parametrize("arch", EVERY)
def test_every_network_leaves_as_a_program_of_torch(arch: str, tmp_path: Path) -> None:
    exported = export_model(by_formula(tmp_path, arch), tmp_path / "student.pt2", size=(48, 72))
    assert agreed(exported) == (4, 4 * 48 * 72)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SMALL)
def test_small_networks_leave_as_onnx_for_any_size(arch: str, tmp_path: Path) -> None:
    exported = export_model(by_formula(tmp_path, arch), tmp_path / "student.onnx", gives="classes")
    assert exported.agreement.images == 4 and exported.size is None


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["timm:mobilenetv3_small_050/plain", "smp:Segformer/mit_b0"])
def test_networks_of_other_libraries_leave_for_images_of_one_size(arch: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "best.pt", build(arch, len(FIVE)), arch=arch, space=FIVE)
    exported = export_model(tmp_path / "best.pt", tmp_path / "student.pt2", size=(50, 70))  # no multiple of the stride
    assert agreed(exported) == (4, 4 * 50 * 70)
    with pytest.raises(BadExport, match="cannot be traced for any height and width: give --size HxW"):
        export_model(tmp_path / "best.pt", tmp_path / "any.pt2")
    assert not (tmp_path / "any.pt2").exists()


# --- nothing is written -----------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_file_that_gives_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher(DRAWN_STREETS, device="cpu")
    monkeypatch.setattr(export, "load_teacher", lambda *_, **__: teacher)

    def fake(logits: Callable[[NDArray[Any]], NDArray[Any]], gives: str) -> str:
        """Export with a program that gives what `logits` makes of the checkpoint's logits; return the message."""

        def run(images: NDArray[np.uint8]) -> NDArray[Any]:
            own = [teacher.logits(image.transpose(1, 2, 0), scales=(1.0,)).numpy() for image in images]
            made = logits(np.stack(own))
            return made.argmax(axis=1).astype(np.uint8) if gives == "classes" else made

        monkeypatch.setattr(export, "_traced", lambda *_, **__: None)
        monkeypatch.setattr(export, "_pt2", lambda _: b"a program")
        monkeypatch.setattr(export, "runner", lambda *_: run)
        try:
            export_model(DRAWN_STREETS, tmp_path / "student.pt2", size=(40, 60), scales=(1.0,), gives=gives)
        except BadExport as error:
            assert contents(tmp_path) == {}
            return str(error)
        (tmp_path / "student.pt2").read_bytes()
        return "written"

    wrong = "the exported file does not give what its checkpoint gives: "
    assert fake(lambda x: x + 0.5, "logits").startswith(wrong + "largest difference 0.5, another class at 0 of 2,400")
    assert fake(lambda x: x * np.nan, "logits").startswith(wrong)
    assert fake(lambda x: np.roll(x, 1, axis=1), "classes").startswith(wrong)
    assert (
        fake(lambda x: x[:, :, ::2], "logits") == "the exported file gives (19, 20, 60) for an image, not (19, 40, 60)"
    )
    assert fake(lambda x: x + 1e-5, "logits") == "written"


def test_wrong_requests_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best, here = by_formula(tmp_path, "hrnet18s_plain"), tmp_path / "student"
    published, run = tmp_path / "published.pt", tmp_path / "run"
    torch.save(network_by_formula("hrnet18s_plain", 5).state_dict(), published)
    (tmp_path / "mine.toml").write_text("threshold = 0.9\n")
    run.mkdir()
    (run / "run.json").write_text('{"format": "autolabel-run/7"}')
    before = contents(tmp_path)

    def told(output: Path, *more: object, checkpoint: Path = best) -> str:
        return refused("export-model", checkpoint, "-o", output, *more).replace(f"{tmp_path}/", "")

    assert told(here.with_suffix(".pth")) == "student.pth: expected a name that ends with .onnx or .pt2"
    assert told(here.with_suffix(".pt2"), checkpoint=published) == (
        "published.pt does not name its 5 classes: say which, such as --label-space cityscapes"
    )
    assert told(here.with_suffix(".pt2"), "--label-space", "camvid", checkpoint=published) == (
        f"published.pt predicts 5 classes, label space 'camvid' has {len(CAMVID)}"
    )
    assert told(here.with_suffix(".pt2"), checkpoint=tmp_path / "net.onnx") == (
        "net.onnx is no checkpoint: expected one of `autolabel train`, such as student/best.pt"
    )
    assert told(here.with_suffix(".pt2"), "--size", "0x64") == "--size 0x64: expected height and width from 1 to 8192"
    assert told(here.with_suffix(".pt2"), "--size", "64") == "--size 64: expected HxW, such as 512x1024"
    assert told(here.with_suffix(".pt2"), "--batch", 0) == "--batch 0: expected 1 or more images"
    assert told(here.with_suffix(".pt2"), "--scales", "0.7,1") == (
        "--scales with 0.7 need --size HxW; without it, take scales such as 0.5 or 1.25"
    )
    assert told(here.with_suffix(".pt2"), "--scales", "0.1,1", "--size", "9x64") == (
        "--size 9x64 is nothing at scale 0.1: give a larger one"
    )
    assert told(tmp_path / "mine.onnx") == (
        "mine.toml exists and is not of `autolabel export-model`: give mine.onnx another name"
    )
    assert told(run / "student.onnx") == "run is a run: choose an --out outside it"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    assert told(here.with_suffix(".onnx")) == (
        "student.onnx: ONNX needs the package onnxruntime: pip install 'autolabel[onnx]'; student.pt2 needs nothing"
    )
    assert contents(tmp_path) == before
