"""If two drivers can both believe that a run folder is theirs, they overwrite each other's plan, tables and labels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path

import pytest

from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.storage import Busy
from autolabel.pipeline import lock
from autolabel.pipeline.lock import Lock, remove_leftovers

DRIVER = """
import sys
from pathlib import Path
from autolabel.pipeline.lock import Lock
part = tuple(map(int, sys.argv[2].split("/"))) if sys.argv[2] else None
with Lock(Path(sys.argv[1]), part).held() as lock:
    print(lock.alone, flush=True)
    for line in sys.stdin:
        if line == "share\\n":
            lock.share()
            print(lock.alone, flush=True)
        elif line == "publish\\n":
            with lock.publishing():
                print("publishing", flush=True)
                sys.stdin.readline()
"""
Driver = tuple[Callable[[str], str], "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Driver]]:
    """Start a driver in a process of its own; it says whether it is alone, and what it does it is told."""
    with ExitStack() as stack:

        def begin(part: str) -> Driver:
            process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, tmp_path, part], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.wait)
            stack.callback(process.kill)

            def tell(line: str) -> str:
                assert process.stdin is not None and process.stdout is not None
                if line:
                    print(line, file=process.stdin, flush=True)
                return process.stdout.readline().strip()

            return tell, process

        yield begin


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def enter(out: Path, part: tuple[int, int] | None) -> bool:
    """Whether a driver that comes now is alone. Raises Busy."""
    with Lock(out, part).held() as own:
        return own.alone


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_SETUP_SECONDS", 0.3)


def test_the_driver_of_a_whole_run_shares_it_with_nobody(
    tmp_path: Path, start: Callable[[str], Driver], hurried: None
) -> None:
    tell, process = start("")
    assert tell("") == "True"
    assert tell("share") == "True"  # nothing to share
    for part in (None, (1, 2)):
        with pytest.raises(Busy, match=rf"\(process {process.pid} on .* since .*\)"):
            enter(tmp_path, part)
    end(process)
    for part in (None, (1, 2)):
        assert enter(tmp_path, part)


def test_a_part_that_prepares_keeps_all_others_out_and_then_lets_other_parts_in(
    tmp_path: Path, start: Callable[[str], Driver], hurried: None
) -> None:
    tell, process = start("1/3")
    assert tell("") == "True"
    for part in (None, (1, 3), (2, 3)):
        with pytest.raises(Busy, match=rf"\(process {process.pid} on"):
            enter(tmp_path, part)
    assert tell("share") == "False"
    for part in (None, (1, 3)):
        with pytest.raises(Busy, match=rf"\(process {process.pid} on"):
            enter(tmp_path, part)
    assert not enter(tmp_path, (2, 3))
    end(process)
    assert enter(tmp_path, (2, 3))
    assert enter(tmp_path, None)


def test_a_part_waits_for_another_that_prepares(tmp_path: Path, start: Callable[[str], Driver]) -> None:
    first, _ = start("1/2")
    assert first("") == "True"
    second, process = start("2/2")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    assert first("share") == "False"
    assert second("") == "False"


def test_of_parts_that_come_at_the_same_time_one_prepares(tmp_path: Path, start: Callable[[str], Driver]) -> None:
    drivers = [start(f"{number}/4")[0] for number in (1, 2, 3, 4)]
    # Whoever is alone keeps the others waiting until it shares.
    with ThreadPoolExecutor(4) as pool:
        waiting = {pool.submit(tell, ""): tell for tell in drivers}
        done, rest = wait(waiting, return_when=FIRST_COMPLETED)
        (first,) = done
        assert first.result() == "True"
        assert not wait(rest, 0.5).done
        assert waiting[first]("share") == "False"
        assert [other.result() for other in rest] == ["False"] * 3


def test_parts_publish_one_after_the_other(tmp_path: Path, start: Callable[[str], Driver]) -> None:
    first, publisher = start("1/2")
    assert (first(""), first("share")) == ("True", "False")
    second, process = start("2/2")
    assert second("") == "False"
    assert first("publish") == "publishing"
    assert process.stdin is not None
    print("publish", file=process.stdin, flush=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    print(file=publisher.stdin, flush=True)
    assert second("") == "publishing"


def test_the_lock_of_a_driver_that_is_killed_while_it_prepares_is_free(
    tmp_path: Path, start: Callable[[str], Driver]
) -> None:
    tell, process = start("1/2")
    assert tell("") == "True"
    end(process)
    assert enter(tmp_path, (1, 2))


def test_leftovers_are_removed_from_the_folders_that_a_run_fills_and_from_no_others(tmp_path: Path) -> None:
    ours = ["", "units/", "attempts/", "stats/", "labels.zarr/b512x512/", "top.zarr/", "labels/a/b/", "confidence/a/"]
    others = ["report/", "mine/", "mine/run/units/"]
    for folder in ours + others:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / ".a.0123456789ab.autolabel-tmp").write_bytes(b"x")
        (tmp_path / folder / "film.mp4.partial").write_bytes(b"x")
        (tmp_path / folder / ".draft.tmp").write_bytes(b"x")
    remove_leftovers(RunFolder(tmp_path))
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(".a.*"))
    assert left == sorted(f"{folder}.a.0123456789ab.autolabel-tmp" for folder in others)
    assert len(list(tmp_path.rglob("*.partial"))) == len(list(tmp_path.rglob(".draft.tmp"))) == len(ours + others)
