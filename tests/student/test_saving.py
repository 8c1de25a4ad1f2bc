"""No step may wait for a disk, and no save may be lost without a word."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import names_in

from autolabel.student import saving
from autolabel.student.evaluate import Scores
from autolabel.student.saving import Saves, copied
from autolabel.student.steps import StepReport
from autolabel.student.trackers import Trackers

SCORES = Scores({"road": 0.5}, 0.5, 0.5, 3)


def row(step: int, miou: float | None = None) -> StepReport:
    return StepReport(step, 1.5, 2.0, 0.001, 9.0, miou)


def saves_of(folder: Path) -> Saves:
    return Saves(folder, folder / "last.pt", step=0, trackers=Trackers((), folder, recipe={}))


class Clock:
    """The time that `saving` sees: it stands still unless somebody moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The checkpoints that are written: their names and contents."""
    found: list[tuple[str, Any]] = []
    monkeypatch.setattr(saving, "write_content", lambda path, content: found.append((path.name, content)))
    return found


def test_a_save_that_takes_long_keeps_the_next_one_away_for_fifty_times_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(saving, "write_content", lambda path, content: setattr(clock, "now", clock.now + 2.0))
    saves = saves_of(tmp_path)
    assert saves.due(validated=True)  # the first one
    clock.now += 59
    assert not saves.due(validated=False)
    clock.now += 2
    assert saves.due(validated=False)
    saves.save_last({}, step=1)
    assert saves.finish() == 1
    clock.now += 99
    assert not saves.due(validated=True) and not saves.due(validated=False)
    clock.now += 2
    assert saves.due(validated=True) and saves.due(validated=False)


def test_a_quick_save_is_made_again_after_a_validation_or_a_minute(
    tmp_path: Path, writes: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    saves = saves_of(tmp_path)
    saves.save_last({}, step=1)
    saves.finish()
    clock.now += 1
    assert (saves.due(validated=True), saves.due(validated=False)) == (True, False)
    clock.now += 60
    assert saves.due(validated=False)


def test_nobody_waits_for_a_save_and_files_come_in_the_order_that_a_kill_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk answers when the next step is done."""
    answer, seen = threading.Event(), []

    def write(path: Path, content: object) -> None:
        assert answer.wait(60)
        seen.append((path.name, names_in(tmp_path)))

    monkeypatch.setattr(saving, "write_content", write)
    saves = saves_of(tmp_path)
    saves.add(row(1, 0.5))
    saves.keep(SCORES, {"of": "step 1"}, last=True)
    saves.save_last({}, step=1)
    saves.add(row(2))
    assert names_in(tmp_path) == []
    answer.set()
    assert saves.finish() == 1
    assert seen == [("best.pt", []), ("last.pt", ["last_scores.json", "metrics.jsonl", "scores.json"])]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1  # the second step belongs to the next save


def test_an_error_of_the_disk_is_raised_at_the_next_step_and_again_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(saving, "write_content", full)
    saves = saves_of(tmp_path)
    saves.save_last({}, step=1)
    saves._thread.join()  # type: ignore[union-attr]
    with pytest.raises(OSError, match=r"No space left on device: .*last\.pt"):
        saves.due(validated=False)
    assert saves.finish() == 0


def test_a_copy_does_not_change_with_what_it_was_made_from() -> None:
    state = {"a": torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), "b": [torch.zeros(1), 3]}
    copy = copied(state)
    state["a"].add_(1)  # type: ignore[union-attr]
    state["b"][0].add_(1)  # type: ignore[index]
    assert torch.equal(copy["a"], torch.ones(2, 3, 4, 5))
    assert copy["a"].is_contiguous(memory_format=torch.channels_last)
    assert copy["b"] == [torch.zeros(1), 3]
