"""Commands that write into one folder at once, into another run, or into a run that nobody may write to."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import autolabel, contents, photograph, refused, scanned

from autolabel.manifests import storage
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.run.place import require_outside_runs
from autolabel.manifests.scan import scan

SMALL = ("--steps", 1, "--batch-size", 2, "--crop", "64x64", "--device", "cpu")


@pytest.fixture(scope="module")
def finished(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held")
    photograph(city, folder / "drive", ["a", "b", "c"])
    manifest = scanned(city, folder / "drive")
    made = autolabel("generate", manifest, "--teacher", teacher, "--out", folder / "run", "--engine", "local",
                     "--scales", "1", "--keep-confidence", 4)  # fmt: skip
    assert made.exit_code == 0, made.output
    return folder / "run"


@pytest.fixture
def run(finished: Path) -> Iterator[Path]:
    """A copy of the finished run beside its images."""
    yield Path(shutil.copytree(finished, finished.parent / "copy"))
    shutil.rmtree(finished.parent / "copy")


# --- two at once ------------------------------------------------------------------------------------------------------


def test_a_second_report_of_a_run_is_refused_and_the_page_of_the_first_has_its_pictures(run: Path) -> None:
    assert autolabel("report", run, "--images", 2).exit_code == 0
    with storage.hold(run, name=".lock.report"):
        before = contents(run / "report")
        assert refused("report", run, "--images", 1).startswith(f"another autolabel is at work in {run} (process ")
        assert contents(run / "report") == before
    commands = [[sys.executable, "-m", "autolabel", "report", str(run), "--images", "3"]] * 2
    both = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    for one in both:
        _, words = one.communicate()
        assert one.returncode == 0 or (one.returncode == 2 and "another autolabel is at work" in words)
    assert 0 in [one.returncode for one in both]
    (pictures,) = set(re.findall(r"pictures-[0-9a-f]{12}", (run / "report" / "index.html").read_text(encoding="utf-8")))
    assert [path.name for path in (run / "report").glob("pictures-*")] == [pictures]
    assert len(list((run / "report" / pictures).glob("*-thumb.webp"))) == 3


def test_a_report_is_drawn_while_images_are_labelled(run: Path) -> None:
    with storage.hold(run):
        assert autolabel("report", run, "--images", 1).exit_code == 0


def test_two_audits_do_not_mix_their_files(
    city: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, truth = tmp_path / "run", city / "fine.parquet"
    made = autolabel("generate", truth, "--teacher", teacher, "--out", run, "--engine", "local", "--scales", "1",
                     "--keep-confidence", 4, "--limit", 2)  # fmt: skip
    assert made.exit_code == 0, made.output
    monkeypatch.setattr("autolabel.pipeline.analysis.audit._PATIENCE", 0.0)
    with storage.hold(run, name=".lock.audit"):
        line = refused("audit", run, "--truth", truth, "--allow-leak")
        assert line.startswith(f"another autolabel is at work in {run} (process {os.getpid()} on ")
        assert not (run / "audit.json").exists() and not (run / "suggested.toml").exists()
    assert autolabel("audit", run, "--truth", truth, "--allow-leak").exit_code == 0
    assert (run / "audit.json").exists() and (run / "suggested.toml").exists()


# --- a run in a run ---------------------------------------------------------------------------------------------------


def test_no_command_fills_a_folder_of_a_run(run: Path, city: Path, teacher: Path) -> None:
    manifest = run.parent / "drive.parquet"
    before = contents(run)
    commands: list[tuple[object, ...]] = [
        ("train", city / "fine.parquet", "--val", city / "val.parquet", "--out", out, *SMALL)
        for out in (run, run / "student", run / "labels.zarr" / "a" / "b")
    ]
    for out in (run / "x", run / "units" / "deep" / "er"):
        commands += [
            ("generate", manifest, "--teacher", teacher, "--out", out, "--engine", "local", "--scales", "1"),
            ("generate", run.parent / "drive", "--teacher", teacher, "--out", out, "--engine", "local"),
            ("generate", manifest, "--teacher", teacher, "--out", out, "--engine", "local", "--dry-run"),
            ("relabel", run, "--policy", "paper", "--out", out),
        ]
    for command in commands:
        assert refused(*command).endswith(f"{run} is a run: choose an --out outside it")
    assert contents(run) == before


def test_a_link_into_a_run_lies_in_it(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run / "report")
    with pytest.raises(ValueError, match=f"{run} is a run: choose an --out outside it"):
        require_outside_runs(tmp_path / "link" / "deep")


@pytest.mark.parametrize("data", [b"{}", b"", b'{"format": "another-program/1"}', b"\xff" * 100])
def test_the_run_json_of_another_program_is_no_run(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "run.json").write_bytes(data)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "run.json").mkdir()
    require_outside_runs(tmp_path / "folder" / "deep")


def test_a_run_among_its_images_is_not_scanned_with_them(city: Path, teacher: Path, tmp_path: Path) -> None:
    photograph(city, tmp_path / "drive", ["a", "b"])
    out = tmp_path / "drive" / "deep" / "run"
    for _ in range(2):  # the second one scans the folder again
        made = autolabel("generate", tmp_path / "drive", "--teacher", teacher, "--out", out, "--engine", "local",
                         "--scales", "1", "--store", "png")  # fmt: skip
        assert made.exit_code == 0, made.output
    assert len(list(out.rglob("*.png"))) == 2
    manifest, _ = scan(tmp_path / "drive", layout="folder", label_space=CITYSCAPES)
    assert [sample.sample_id for sample in manifest.samples] == ["a", "b"]


# --- a run that nobody may write to -----------------------------------------------------------------------------------


def _mounted_read_only(run: Path) -> Callable[[], None]:
    """Make a folder read-only for this process: by its mode, or for root, who may write anywhere, by a mount."""

    def prepare() -> None:
        if os.getuid():
            return
        system, path = ctypes.CDLL(None), str(run).encode()
        steps = [
            system.unshare(0x20000),
            system.mount(b"none", b"/", None, 1 << 18 | 1 << 14, None),
            system.mount(path, path, None, 4096, None),
            system.mount(None, path, None, 4096 | 32 | 1, None),
        ]
        if any(steps):
            os._exit(99)

    return prepare


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a folder read-only")
@pytest.mark.parametrize("lock", ["with its lock", "copied without hidden files"])
def test_a_run_that_is_read_only_is_verified(run: Path, lock: str) -> None:
    if lock != "with its lock":
        (run / ".lock").unlink()
    else:
        (run / ".lock").chmod(0o444)
    before = contents(run)
    run.chmod(0o555)
    try:
        for command, code in ((["verify"], 0), (["stats"], 0), (["verify", "--repair"], 2), (["report"], 2)):
            made = subprocess.run(
                [sys.executable, "-m", "autolabel", *command, str(run)],
                capture_output=True, text=True, preexec_fn=_mounted_read_only(run), check=False,
            )  # fmt: skip
            if made.returncode == 99:
                pytest.skip("root may not mount here")
            assert made.returncode == code, made.stderr
            assert len(made.stderr.splitlines()) <= 2 and "Traceback" not in made.stderr
    finally:
        run.chmod(0o755)
    assert contents(run) == before


HOLD = """
import sys
from pathlib import Path
from autolabel.manifests import storage
with storage.hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_read_only_reader_does_not_come_in_while_another_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import filelock

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    with storage.hold(tmp_path):
        pass
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        monkeypatch.setattr(filelock.FileLock, "acquire", refuse)  # as for somebody who mounts the same folder so
        with (
            pytest.raises(storage.Busy, match=rf"at work in .* \(process {other.pid} on "),
            storage.hold(tmp_path, only_read=True),
        ):
            pass
        with pytest.raises(OSError, match="Read-only file system"), storage.hold(tmp_path):
            pass
        other.kill()
        other.wait()
    with storage.hold(tmp_path, only_read=True):
        pass
