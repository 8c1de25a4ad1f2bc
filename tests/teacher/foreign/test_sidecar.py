"""The TOML file beside a network: what it says, what is refused, what it changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from autolabel.manifests.label_space import CAMVID, CITYSCAPES
from autolabel.manifests.samples import fingerprints, load_manifest
from autolabel.manifests.teachers import BadTeacher, TeacherName
from autolabel.teacher.foreign.sidecar import Sidecar, read_sidecar, sidecar_of, write_sidecar

MINIMAL = 'classes = ["road", "sky"]\nrange = [0, 1]\n'


def written(folder: Path, text: str) -> Path:
    """A network that nobody opens, with this sidecar."""
    network = folder / "net.onnx"
    network.write_bytes(b"network")
    sidecar_of(network).write_text(text)
    return network


def test_a_sidecar_that_was_written_reads_back_the_same(tmp_path: Path) -> None:
    sidecar = Sidecar(
        ("road", 'a "q"\\\x7fü\n'), range=(-1.0, 1.0), mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 1.0), channels="bgr",
        layout="NHWC", size=(64, 96), gives="probabilities", output="y", output_layout="NCHW",
    )  # fmt: skip
    write_sidecar(tmp_path / "net.pt2", sidecar, comment="Made by hand.\n\nTwice.")
    assert read_sidecar(tmp_path / "net.pt2").sidecar == sidecar
    assert (tmp_path / "net.toml").read_text().startswith("# Made by hand.\n#\n# Twice.\nclasses = ")
    write_sidecar(tmp_path / "net.pt2", Sidecar("camvid", dtype="uint8", multiple=32))
    read = read_sidecar(tmp_path / "net.pt2")
    assert read.classes == CAMVID and read.sidecar.multiple == 32 and read.marks() is None


def test_classes_are_a_label_space_by_name_or_file_or_names_by_channel(tmp_path: Path) -> None:
    assert read_sidecar(written(tmp_path, MINIMAL)).classes == ("road", "sky")
    assert read_sidecar(written(tmp_path, 'classes = "cityscapes"\nrange = [0, 1]')).classes == CITYSCAPES
    (tmp_path / "own.json").write_text(CAMVID.to_json())
    assert read_sidecar(written(tmp_path, 'classes = "own.json"\nrange = [0, 1]')).classes == CAMVID


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("range = [0, 1]", "net.toml has no classes: expected the name of a label space, or names by channel"),
        ('classes = "atlantis"\nrange = [0, 1]', "net.toml, classes: label space '"),
        ('classes = ["a"]', "net.toml has no range, the numbers that black and white become before mean and std"),
        ('classes = ["a", "a"]', "net.toml: classes names 'a' twice: give each its own name"),
        ("classes = []", "net.toml: classes is empty: expected names by channel"),
        (MINIMAL + "means = [0, 0, 0]", "net.toml has an unknown key 'means': did you mean 'mean'?"),
        (MINIMAL + "mean = 0.5", "net.toml, 'mean' is 0.5: expected a list"),
        (MINIMAL + "mean = [1, 2]", "net.toml, 'mean' is [1, 2]: expected a list of 3"),
        (MINIMAL + "mean = [0, 0, nan]", "net.toml, 'mean'[2] is nan: expected a finite number"),
        (MINIMAL + "std = [1, 1, 0]", "net.toml: std is [1.0, 1.0, 0.0]: expected numbers above 0"),
        (MINIMAL + 'layout = "CHW"', 'net.toml: layout is "CHW": expected one of "NCHW", "NHWC"'),
        (MINIMAL + 'output_layout = "HW"', 'net.toml: output_layout is "HW": expected one of "NCHW", "NHWC"'),
        (MINIMAL + 'dtype = "uint8"', 'net.toml: dtype is "uint8", which takes pixels as they are: leave out range'),
        (MINIMAL + "size = [0, 4]", "net.toml: size is [0, 4]: expected height and width from 1 to 32768"),
        (MINIMAL + "size = 512", "net.toml, 'size' is 512: expected"),
        (MINIMAL + "multiple = 0", "net.toml: multiple is 0: expected 1 to 32768"),
        (MINIMAL + "size = [8, 8]\nmultiple = 8", "net.toml: size and multiple: a network of one size needs no"),
        ('classes = ["a"]\nrange = [1, 1]', "net.toml: range is [1.0, 1.0]: expected the numbers of black and of"),
        ("classes", "net.toml is no TOML"),
    ],
)
def test_each_mistake_in_a_sidecar_gives_one_line(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(BadTeacher) as error:
        read_sidecar(written(tmp_path, text))
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_network_without_a_sidecar_is_told_which_command_drafts_one(tmp_path: Path) -> None:
    with pytest.raises(BadTeacher, match=r"net.onnx has no net.toml beside it, .*`autolabel teacher describe .*toml`"):
        read_sidecar(tmp_path / "net.onnx")


def test_what_a_network_has_seen_comes_from_a_manifest_or_a_list(city: Path, tmp_path: Path) -> None:
    seen = fingerprints(load_manifest(city / "fine.parquet").samples)
    network = written(tmp_path, f"{MINIMAL}trained_on = '{city / 'fine.parquet'}'")
    assert read_sidecar(network).marks() == seen
    write_sidecar(network, Sidecar(("a",), range=(0, 1)), marks=seen)
    assert read_sidecar(network).marks() == sorted(seen)
    (tmp_path / "net.seen.txt").write_text("0123456789abcdef\nroad\n")
    with pytest.raises(BadTeacher, match=r"line 2 of .*net.seen.txt is 'road': expected 16 hex digits"):
        read_sidecar(network).marks()
    (tmp_path / "net.seen.txt").unlink()
    with pytest.raises(BadTeacher, match=r'net.toml, trained_on = "net.seen.txt": .*No such file'):
        read_sidecar(network).marks()


def test_the_digest_counts_network_sidecar_and_label_space_but_not_what_it_was_trained_on(tmp_path: Path) -> None:
    network = written(tmp_path, 'classes = "own.json"\nrange = [0, 1]\ntrained_on = "seen.txt"\n')
    (tmp_path / "own.json").write_text(CAMVID.to_json())
    (tmp_path / "seen.txt").write_text("0" * 16)
    digests = [TeacherName.of(network).digest()]
    (tmp_path / "seen.txt").write_text("1" * 16)
    assert TeacherName.of(network).digest() == digests[0]
    for name in ("own.json", "net.toml", "net.onnx"):
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        digests.append(TeacherName.of(network).digest())
    assert len(set(digests)) == 4
    shutil.copytree(tmp_path, tmp_path / "moved")
    assert TeacherName.of(tmp_path / "moved" / "net.onnx").digest() == digests[-1]
