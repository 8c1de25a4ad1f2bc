"""If a lock in a bucket can have two holders, or outlives its dead one for ever, runs are torn or cannot go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from autolabel.manifests import bucket_locks, notes, storage
from autolabel.manifests.bucket_locks import Times, hold

FAST = Times(beat=0.1, lease=1.0, look=0.02)  # a busy machine may pause a process for half a second
PATIENT = Times(beat=0.1, lease=600.0, look=0.02)
ELSEWHERE = "bucket_locks.process_space = lambda: 'another machine'"
HOLDER = """
import sys
from pathlib import Path
from autolabel.manifests import bucket_locks, storage
bucket_locks.TIMES = bucket_locks.Times(*map(float, sys.argv[2].split()))
exec(sys.argv[3])
with bucket_locks.hold(Path(sys.argv[1])) as held:
    print("held", flush=True)
    for line in sys.stdin:
        try:
            held.require(surely=line == "surely\\n")
            print("mine", flush=True)
        except storage.Superseded as error:
            print(error, flush=True)
"""
Start = Callable[..., "Other"]


class Other:
    """A process that holds a folder, and says whether it still does."""

    def __init__(self, folder: Path, times: Times, code: str) -> None:
        words = [sys.executable, "-c", HOLDER, str(folder), f"{times.beat} {times.lease} {times.look}", code]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.id = self.process.pid

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, line: str = "") -> str:
        print(line, file=self.process.stdin, flush=True)
        return self.hear()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def begin(times: Times = FAST, code: str = "") -> Other:
            other = Other(tmp_path, times, code)
            stack.callback(other.end)
            assert other.hear() == "held"
            return other

        yield begin


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_locks, "TIMES", FAST)


def lock(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / ".lock").read_bytes())
    return content


def test_a_lock_that_is_renewed_is_refused_naming_its_holder_and_is_free_when_that_ends(
    tmp_path: Path, start: Start
) -> None:
    other = start()
    words = rf"in {tmp_path} \(process {other.id} on .* since .*\): wait for it"
    with pytest.raises(storage.Busy, match=words), hold(tmp_path):
        pass
    with hold(tmp_path, name=".lock.publish"):  # another name is another lock
        assert other.ask("surely") == "mine"
    assert other.process.stdin is not None
    other.process.stdin.close()
    other.process.wait()
    assert lock(tmp_path)["holder"] is None
    with hold(tmp_path) as held:
        held.require(surely=True)
        assert (lock(tmp_path)["number"], lock(tmp_path)["process"]) == (2, os.getpid())


def test_whoever_asks_at_once_is_answered_without_a_look_at_the_heartbeat(tmp_path: Path, start: Start) -> None:
    other = start(PATIENT, ELSEWHERE)
    other.end()
    with pytest.raises(storage.Busy, match=f"process {other.id}"), hold(tmp_path, at_once=True):
        pass


def test_the_lock_of_a_process_killed_on_this_machine_is_free_at_once(tmp_path: Path, start: Start) -> None:
    other = start(PATIENT)
    other.end()
    with hold(tmp_path, at_once=True):
        assert lock(tmp_path)["process"] == os.getpid()


def test_the_lock_of_a_process_killed_on_another_machine_is_taken_over_when_it_has_not_changed_for_its_lease(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = start(FAST, ELSEWHERE)
    other.end()
    monkeypatch.setattr(bucket_locks, "_PATIENCE", 0.0)
    said = list[str]()
    with notes.heard(said.append), hold(tmp_path) as held:
        held.require(surely=True)
    first, second = said
    assert first.startswith(f"{tmp_path / '.lock'} is held (process {other.id} on ")
    assert second.startswith(f"{tmp_path / '.lock'} seems dead (process {other.id} on ")
    assert second.endswith("): without a sign of life it is taken over in 0 s")


@pytest.mark.parametrize("question", ["", "surely"])
def test_a_holder_suspended_beyond_its_lease_learns_that_it_is_superseded_and_leaves_the_lock_to_the_other(
    tmp_path: Path, start: Start, question: str
) -> None:
    first = start(FAST)
    os.kill(first.id, signal.SIGSTOP)
    second = start(PATIENT)
    before = lock(tmp_path)["token"]
    os.kill(first.id, signal.SIGCONT)
    line = first.ask(question)
    assert line.startswith(f"{tmp_path} was taken over by process {second.id} on ")
    assert first.ask() == line
    assert first.process.stdin is not None
    first.process.stdin.close()
    assert first.process.wait() == 0
    assert second.ask("surely") == "mine"
    assert lock(tmp_path)["token"] == before


def test_clocks_that_differ_or_jump_by_an_hour_kill_nobody(tmp_path: Path, start: Start) -> None:
    wrong = "import time; real = time.time; time.time = lambda: real() - 3600 * (1 + int(10 * real()) % 2); "
    other = start(FAST, wrong + ELSEWHERE)
    with pytest.raises(storage.Busy, match=f"process {other.id}"), hold(tmp_path, wait=FAST.lease * 1.5):
        pass
    assert other.ask("") == other.ask("surely") == "mine"


def test_an_observer_whose_clock_is_set_forward_takes_nothing_over(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = start(Times(beat=0.3, lease=600.0), ELSEWHERE)
    real, calls = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() + 3600 * next(calls))
    with pytest.raises(storage.Busy, match=f"process {other.id}"), hold(tmp_path):
        pass


def test_a_lost_reply_is_not_taken_for_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create, replace = storage.create, storage.replace
    replies = iter([False, OSError("no reply"), True, False] * 100)

    def lossy(path: Path, data: bytes, *, unchanged: storage.Stat) -> bool:
        written, reply = replace(path, data, unchanged=unchanged), next(replies)
        if isinstance(reply, OSError):
            raise reply
        return written and reply

    monkeypatch.setattr(storage, "create", lambda path, data: create(path, data) and False)
    monkeypatch.setattr(storage, "replace", lossy)
    with hold(tmp_path) as held:
        time.sleep(3 * FAST.beat)
        for _ in range(20):
            try:
                held.require(surely=True)
            except OSError as error:
                assert str(error) == "no reply"
        held.require()
        assert lock(tmp_path)["process"] == os.getpid()
    assert lock(tmp_path)["holder"] is None
    with hold(tmp_path):
        assert lock(tmp_path)["number"] == 2


def test_a_storage_that_fails_for_a_while_costs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> bool:
        raise OSError("slow down")

    with hold(tmp_path) as held:
        with monkeypatch.context() as patch:
            patch.setattr(storage, "replace", fail)
            time.sleep(3 * FAST.beat)
            held.require()
            with pytest.raises(OSError, match="slow down"):
                held.require(surely=True)
        held.require(surely=True)


def test_a_lock_that_somebody_removes_is_lost(tmp_path: Path) -> None:
    with hold(tmp_path) as held:
        storage.remove(tmp_path / ".lock")
        with pytest.raises(storage.Superseded, match="was taken over by another process"):
            held.require(surely=True)
    assert not (tmp_path / ".lock").exists()


def test_a_lock_that_nobody_can_read_is_taken_over_after_the_usual_lease(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(b"\xff not ours")
    with pytest.raises(storage.Busy, match="an unknown process"), hold(tmp_path, at_once=True):
        pass
    with hold(tmp_path):
        assert lock(tmp_path)["process"] == os.getpid()


def test_a_folder_that_nobody_may_write_to_is_held_by_readers_unless_a_writer_lives(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(*_: object, **__: object) -> bool:
        raise PermissionError(13, "access denied", str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(storage, "create", deny)
        with hold(tmp_path, only_read=True) as held:
            held.require(surely=True)
        with pytest.raises(PermissionError), hold(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []
    other = start(FAST, ELSEWHERE)
    monkeypatch.setattr(storage, "replace", deny)
    with pytest.raises(storage.Busy, match=f"process {other.id}"), hold(tmp_path, only_read=True):
        pass
    other.end()
    with hold(tmp_path, only_read=True):
        assert lock(tmp_path)["process"] == other.id


COUNT = """
import sys
from pathlib import Path
from autolabel.manifests import bucket_locks
bucket_locks.TIMES = bucket_locks.Times(0.2, 600.0, 0.02)
folder = Path(sys.argv[1])
for _ in range(10):
    with bucket_locks.hold(folder, wait=float("inf")) as held:
        (folder / "inside").touch(exist_ok=False)
        count = int((folder / "count").read_text())
        (folder / "count").write_text(str(count + 1))
        (folder / "inside").unlink()
        held.require(surely=True)
"""


def test_processes_that_ask_for_one_lock_hold_it_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    all_of_them = [subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)]) for _ in range(4)]
    assert [process.wait() for process in all_of_them] == [0] * 4
    assert (tmp_path / "count").read_text() == "40"
    assert (lock(tmp_path)["number"], lock(tmp_path)["holder"]) == (40, None)
