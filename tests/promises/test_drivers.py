"""Two drivers of one run: at once, or one that was taken for dead and wakes up. Only one of them may publish."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import buckets
import pytest
from drive import NAMES, draw_drive, drive_job

from autolabel.manifests import bucket_locks, storage
from autolabel.manifests.locations import BucketPath, location
from autolabel.manifests.run.folder import Accounts, Run
from autolabel.manifests.run.ledger import Ledger
from autolabel.pipeline.lock import Lock
from autolabel.pipeline.run import generate
from autolabel.pipeline.verify import verify

TIMES = bucket_locks.Times(beat=0.2, lease=2.0, look=0.05)
FOLDERS = f"{Path(__file__).parents[1]} {Path(__file__).parent}"
LIVE = ("progress.json", ".lock")  # written by every call
DRIVER = """
import sys
from pathlib import Path
from autolabel.manifests import bucket_locks
from autolabel.manifests.locations import BucketPath, location
from autolabel.pipeline import lock, records, run
sys.path += sys.argv[1].split()
from drive import drive_job

bucket_locks.TIMES, lock._LOOK_SECONDS = bucket_locks.Times(beat=0.2, lease=2.0, look=0.05), 0.5
place, out, pauses, part, limit = sys.argv[2:]
pauses = pauses.split()
publish = run.publish

def pause(here):
    if here in pauses:
        pauses.remove(here)
        print(here, flush=True)
        sys.stdin.readline()

def write(*words, **more):
    pause("record")
    return records.write_record(*words, **more)

def publish_with_pauses(*words, before_end, **more):
    def end():
        pause("publish")
        before_end()
        pause("appear")
    return publish(*words, before_end=end, **more)

run.publish = publish_with_pauses
settings = {"part": tuple(map(int, part.split("/")))} if part else {}
settings |= {"limit": int(limit)} if limit else {}
job = drive_job(Path(place), "run", out=location(out), **settings)
try:
    print("done", run.generate(job, write=write).done, flush=True)
except ValueError as error:
    print(type(error).__name__, error, flush=True)
"""


class Driver:
    """A process that labels, and stops where it is told until somebody says a line."""

    def __init__(self, place: Path, out: Path, pauses: str = "", *, part: str = "", limit: str = "") -> None:
        words = [sys.executable, "-c", DRIVER, FOLDERS, str(place), str(out), pauses, part, limit]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def suspend(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def wake(self) -> str:
        """Let it go on; the line with which it ends."""
        os.kill(self.process.pid, signal.SIGCONT)
        print(file=self.process.stdin, flush=True)
        return self.hear()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


Start = Callable[..., Driver]


@pytest.fixture(scope="module")
def drive(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_drive(city, teacher, tmp_path_factory.mktemp("drivers"))


@pytest.fixture
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A new run folder on a disk, and one in a bucket whose locks are quick."""
    monkeypatch.setattr(bucket_locks, "TIMES", TIMES)
    if request.param == "disk":
        yield tmp_path / "run"
    else:
        with buckets.place() as place:
            yield location(f"{place.url}/deep/run")


@pytest.fixture
def start(drive: Path, out: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def begin(pauses: str = "", **more: str) -> Driver:
            driver = Driver(drive, out, pauses, **more)
            stack.callback(driver.kill)
            return driver

        yield begin


def forget_lock(out: Path) -> None:
    """Make a disk lose its locks, as network drives do. In a bucket they run out by themselves."""
    if not isinstance(out, BucketPath):
        storage.remove(out / storage.LOCK)


def stored(out: Path) -> dict[str, bytes]:
    """Every file of the run that is no sign of life, and no record that a later one has replaced."""
    files = set(storage.list(out, recursive=True)).difference(Ledger(out).old)
    return {str(path): storage.read(path) for path in files if not path.name.startswith(LIVE)}


BUCKET = pytest.mark.parametrize("out", ["moto"], indirect=True)


@pytest.mark.parametrize(
    ("out", "moment"),
    [
        ("moto", "publish"),
        pytest.param("moto", "record", marks=pytest.mark.slow),
        ("disk", "record"),
        pytest.param("disk", "publish", marks=pytest.mark.slow),
    ],
    indirect=["out"],
)
def test_a_driver_that_was_suspended_while_another_finished_ends_with_one_line_and_changes_nothing(
    drive: Path, out: Path, start: Start, moment: str
) -> None:
    first = start(moment)
    assert first.hear() == moment
    first.suspend()
    forget_lock(out)
    second = generate(drive_job(drive, "run", out=out))
    assert (second.accounts, second.run.state) == (Accounts(7, 7, 0, 0), "complete")
    before = stored(out)
    line = first.wake()
    assert line.startswith(f"Superseded {out} was taken over by "), line
    assert first.process.wait() == 0 and first.hear() == ""
    assert stored(out) == before
    assert verify(out).faults == []
    assert Run.open(out).fence.drivers == {}


@pytest.mark.slow
@pytest.mark.parametrize("out", ["disk", "moto"], indirect=True)
def test_a_driver_that_wakes_while_another_labels_ends_and_the_other_publishes(
    drive: Path, out: Path, start: Start
) -> None:
    first = start("publish")
    assert first.hear() == "publish"
    first.suspend()
    forget_lock(out)
    storage.remove_folder(out / "units")  # so that the second one has something to label
    second = start("record")
    assert second.hear() == "record"
    line = first.wake()
    assert line.startswith(f"Superseded {out} was taken over by ") and f"process {second.process.pid} on" in line
    assert Run.open(out).accounts is None
    assert second.wake() == "done 7"
    assert Run.open(out).accounts == Accounts(7, 7, 0, 0) and verify(out).faults == []


@pytest.mark.slow
@pytest.mark.parametrize("out", ["disk", "moto"], indirect=True)
def test_a_driver_that_is_suspended_as_its_tables_appear_cannot_publish_and_verify_tells(
    drive: Path, out: Path, start: Start
) -> None:
    first = start("appear", limit="3")
    assert first.hear() == "appear"
    first.suspend()
    forget_lock(out)
    generate(drive_job(drive, "run", out=out))
    published = Run.open(out)
    line = first.wake()
    assert line.startswith(f"Superseded {out} was taken over by ")
    assert Run.open(out) == published and published.accounts == Accounts(7, 7, 0, 0)
    damaged = {name.partition(" ")[0] for name in verify(out).faults}
    tables = {str(path) for path in published.table_paths().values()}
    # On a disk the other has removed the temporary files behind the tables, so that they never appear.
    assert damaged == (tables - {str(out / "quarantine.parquet")} if isinstance(out, BucketPath) else set())
    assert verify(out, repair=bool(damaged)).undone == 0
    assert generate(drive_job(drive, "run", out=out)).done == 0
    assert verify(out).faults == []


@BUCKET
def test_the_run_of_a_killed_driver_is_taken_over_at_once_on_its_machine_and_its_death_is_known(
    drive: Path, out: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start("record")
    assert first.hear() == "record"
    first.kill()
    monkeypatch.setattr(bucket_locks, "TIMES", bucket_locks.Times(beat=1.0, lease=600.0))
    with Lock(out, None).held() as lock:
        assert lock.after_death
    assert generate(drive_job(drive, "run", out=out)).accounts == Accounts(7, 7, 0, 0)
    with Lock(out, None).held() as lock:
        assert not lock.after_death


@pytest.mark.slow
@pytest.mark.parametrize("out", ["disk", "moto"], indirect=True)
def test_of_drivers_that_begin_at_once_one_labels_and_the_others_are_told_who(out: Path, start: Start) -> None:
    drivers = [start() for _ in range(3)]
    lines = [driver.hear() for driver in drivers]
    told = [line for line in lines if line.startswith("Busy another autolabel is at work in ")]
    assert set(lines) - set(told) <= {"done 7", "done 0"} and lines.count("done 7") == 1
    assert Run.open(out).accounts == Accounts(7, 7, 0, 0) and verify(out).faults == []


@BUCKET
def test_parts_of_a_run_that_begin_at_once_all_finish_and_refuse_one_another_nothing(out: Path, start: Start) -> None:
    drivers = [start(part=f"{number}/3") for number in (1, 2, 3)]
    assert sorted(driver.hear() for driver in drivers) == ["done 1", "done 3", "done 3"]
    run = Run.open(out)
    assert (run.accounts, run.state, run.fence.drivers) == (Accounts(7, 7, 0, 0), "complete", {})
    assert list(run.labels) == NAMES and verify(out).faults == []
