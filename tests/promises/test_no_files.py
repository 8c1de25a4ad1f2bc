"""A pipe, a device or a socket in place of a file hangs a command, or fills the memory, where nobody looks first."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from conftest import autolabel, quarantined, refused
from PIL import Image

from autolabel.manifests import storage
from autolabel.manifests.samples import load_manifest

SMALL = ("--steps", 1, "--batch-size", 2, "--crop", "64x64", "--device", "cpu")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def linked_pipe(path: Path) -> None:
    os.mkfifo(path.with_name(f"{path.name}.pipe"))
    path.symlink_to(path.with_name(f"{path.name}.pipe"))


def bound_socket(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:  # its path may have 107 bytes
        made.bind(path.name)


KINDS = {"named pipe": pipe, "device": device, "a pipe behind a link": linked_pipe, "socket": bound_socket}
Make = Callable[[Path], None]


@pytest.fixture(params=KINDS, ids=lambda name: name.replace(" ", "-"))
def make(request: pytest.FixtureRequest) -> Make:
    """Put something at a path that is no file."""

    def put(path: Path) -> None:
        path.unlink(missing_ok=True)
        KINDS[request.param](path)

    return put


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Fail a test that waits, instead of hanging with it."""

    def late(*_: object) -> None:
        raise AssertionError("the command waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of two images and their labels, another for validation, and the manifests of both."""
    for k, name in enumerate(("fine", "val")):
        for folder in ("images", "labels"):
            (tmp_path / name / folder).mkdir(parents=True)
        for place in range(2):
            noise = np.random.default_rng(10 * k + place).integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / name / "images" / f"{place}.png")
            Image.fromarray(noise[..., 0] % 19).save(tmp_path / name / "labels" / f"{place}.png")
        assert scan(tmp_path, name).exit_code == 0
    return tmp_path


def scan(data: Path, name: str) -> Result:
    return autolabel("manifest", "scan", data / name / "images", "--labels", data / name / "labels",
                     "--label-space", "cityscapes", "-o", data / f"{name}.parquet")  # fmt: skip


def test_a_label_that_is_no_file_stops_a_scan_in_one_line(data: Path, make: Make) -> None:
    make(data / "fine" / "labels" / "1.png")
    assert "not a regular file" in refused(
        "manifest", "scan", data / "fine" / "images", "--labels", data / "fine" / "labels",
        "--label-space", "cityscapes", "-o", data / "new.parquet",
    )  # fmt: skip
    assert not (data / "new.parquet").exists()


@pytest.mark.parametrize("command", ["fuse", "evaluate", "train", "train-val"])
def test_an_image_that_is_no_file_is_refused_in_one_line(data: Path, teacher: Path, make: Make, command: str) -> None:
    make(data / ("val" if command == "train-val" else "fine") / "images" / "1.png")
    fine, val = data / "fine.parquet", data / "val.parquet"
    arguments: dict[str, tuple[object, ...]] = {
        "fuse": ("manifest", "fuse", fine, "-o", data / "fused.parquet", "--leak-check", val),
        "evaluate": ("evaluate", teacher, fine, "--device", "cpu"),
        "train": ("train", fine, "--val", val, "--out", data / "out", *SMALL),
        "train-val": ("train", fine, "--val", val, "--out", data / "out", *SMALL),
    }
    assert "not a regular file" in refused(*arguments[command])


@pytest.mark.parametrize("option", ["manifest", "folder", "teacher", "policy", "label space"])
def test_an_input_of_generate_that_is_no_file_is_refused_in_one_line(
    data: Path, teacher: Path, make: Make, option: str
) -> None:
    strange = data / "strange"
    make(strange)
    source = strange if option in ("manifest", "folder") else data / "fine" / "images"
    line = refused(
        "generate", source, "--out", data / "run", "--engine", "local",
        "--teacher", strange if option == "teacher" else teacher,
        *(("--policy", strange) if option == "policy" else ()),
        *(("--label-space", strange) if option == "label space" else ()),
    )  # fmt: skip
    assert "not a regular file" in line
    assert not (data / "run").exists()


def test_images_that_are_no_files_cost_themselves_only(data: Path, teacher: Path, make: Make) -> None:
    make(data / "fine" / "images" / "0.png")
    made = autolabel("generate", data / "fine.parquet", "--teacher", teacher, "--out", data / "run",
                     "--engine", "local", "--scales", "1")  # fmt: skip
    assert made.exit_code in (0, 3), made.output
    (reason,) = quarantined(data / "run").values()
    assert reason.startswith("not a regular file")


def test_no_command_waits_for_a_pipe_in_a_run(data: Path, teacher: Path) -> None:
    """Every command that reads a run, for every file; generate writes over metadata and counters alone."""
    request = ("generate", data / "fine.parquet", "--teacher", teacher, "--engine", "local", "--scales", "1",
               "--keep-confidence", 4)  # fmt: skip
    assert autolabel(*request, "--out", data / "run").exit_code == 0
    files = sorted(path.relative_to(data / "run") for path in (data / "run").rglob("*") if path.is_file())
    assert len(files) == 22
    strange = data / "strange"
    refusals: dict[str, list[str]] = {}
    for file in files:
        shutil.copytree(data / "run", strange)
        (strange / file).unlink()
        os.mkfifo(strange / file)
        for command in (
            ("verify", strange),
            ("stats", strange),
            ("report", strange, "--images", 1),
            ("relabel", strange, "--policy", "paper", "--out", data / "again"),
            (*request, "--out", strange),
        ):
            result = autolabel(*command)
            assert result.exit_code in (0, 2), (file, command, result.output, result.exception)
            if result.exit_code:
                refusals.setdefault(str(command[0]), []).append(file.as_posix())
        shutil.rmtree(strange)
        shutil.rmtree(data / "again", ignore_errors=True)
    everything = [file.as_posix() for file in files]
    assert refusals["generate"] == [
        name for name in everything if name not in (storage.LOCK, "progress.json") and not name.endswith("zarr.json")
    ]
    assert refusals["verify"] == [name for name in everything if name not in (storage.LOCK, "progress.json")]


def test_a_checkpoint_and_a_manifest_that_are_no_files_are_refused_by_every_command(data: Path, make: Make) -> None:
    strange, fine = data / "strange", data / "fine.parquet"
    make(strange)
    for command in (
        ("manifest", "show", strange),
        ("manifest", "fuse", strange, "-o", data / "a.parquet"),
        ("manifest", "fuse", fine, "-o", data / "a.parquet", "--leak-check", strange),
        ("evaluate", strange, fine),
        ("train", strange, "--val", fine, "--out", data / "out", *SMALL),
        ("train", fine, "--val", strange, "--out", data / "out", *SMALL),
        ("train", fine, "--val", data / "val.parquet", "--out", data / "out", "--init", strange, *SMALL),
    ):
        assert "not a regular file" in refused(*command), command
    assert load_manifest(fine).samples
