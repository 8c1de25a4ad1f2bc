"""The loop over Ray's workers, without Ray: who is told to leave, who begins when, and whose unit goes where.

Real machines that come and go: test_engine.py.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, cast
from unittest.mock import MagicMock

import pytest

from autolabel.pipeline import ray_engine, ray_worker
from autolabel.pipeline.engine import EngineFailed, Limits, Work
from autolabel.pipeline.units import Packed, Tally


def unit_of(name: str, folder: Path, wanted: int = 1) -> Work:
    return Work(Packed(name, "b", 0, b"", folder, folder), tuple(map(str, range(wanted))))


def loop_of(units: list[Work], least: int | None = None) -> ray_engine._Loop:
    """A loop over a Ray that is not there; every reference is an iterator of itself."""
    crew, fake = MagicMock(limits=Limits(), least=least, workers=9), MagicMock()
    fake.cluster_resources.return_value = {"CPU": 2}
    fake._private.state.state.get_draining_nodes.return_value = {}
    loop = ray_engine._Loop(fake, crew, iter(units), len(units), MagicMock(), threading.Event())
    loop.new_worker, loop.wanted = MagicMock, 9
    return loop


def tell(loop: ray_engine._Loop, reference: Any, told: Any) -> None:
    """Let a worker say this: the node on which it is ready, or a tick."""
    cast(MagicMock, loop.ray).get.side_effect = [told]
    loop._advance(reference)


def test_a_worker_on_a_machine_that_is_taken_back_gives_its_unit_to_the_front(tmp_path: Path) -> None:
    units = [unit_of(name, tmp_path, 5) for name in "abc"]
    loop = loop_of(units)
    loop.again.append(unit_of("failed", tmp_path))
    slots = [ray_worker.Slot(MagicMock(), node) for node in ("leaving", "staying")]
    for slot in slots:
        loop.live[slot.actor] = slot
        loop._give(slot.actor, slot)
    (first, second) = loop.live
    first.__next__ = second.__next__ = lambda self: self
    loop.ray._private.state.state.get_draining_nodes.return_value = {"leaving": 0}
    for _ in range(2):  # it is told once
        loop._leave_machines()
    slots[0].actor.stop.remote.assert_called_once_with()
    slots[1].actor.stop.remote.assert_not_called()
    tell(loop, first, ray_worker.Tick(Tally(2), {}, leaves=True))
    assert [work.unit.name for work in loop.given_back] == ["a"] and [*loop.live] == [second]
    assert loop.monitor.unit.call_args.kwargs == {"whole": False}  # what it has done still counts
    tell(loop, second, ray_worker.Tick(Tally(5), {}))
    assert [slot.work.unit.name for slot in loop.live.values() if slot.work] == ["a"]
    assert not loop.lost and not loop.crashes and not loop.stop.is_set()
    late = ray_worker.Slot(MagicMock())  # it was hired before the notice
    loop.live["late"] = late
    tell(loop, "late", "leaving")
    loop.ray.kill.assert_called_with(late.actor)


def test_a_command_on_a_machine_that_is_taken_back_stops(tmp_path: Path) -> None:
    loop = loop_of([unit_of("a", tmp_path)])
    loop.ray._private.state.state.get_draining_nodes.return_value = {loop.home: 0}
    loop._leave_machines()
    assert loop.stop.is_set()
    assert loop.monitor.note.call_args.args[0].startswith("the machine of this command will be taken back; stopping: ")


def test_the_first_units_are_handed_out_when_the_least_number_of_workers_is_ready(tmp_path: Path) -> None:
    loop = loop_of([unit_of(name, tmp_path) for name in "abcde"], least=3)
    loop.ray.nodes.return_value = [{"NodeID": name, "Alive": name != "gone"} for name in ("gone", "n1", "n2", "n3")]
    loop._hire()
    starting = [*loop.live]
    assert len(starting) == 5
    for reference, node in zip(starting, ("gone", "n1"), strict=False):
        tell(loop, reference, node)
    loop._leave_machines()  # the first one is not waited for any more
    tell(loop, starting[2], "n2")
    assert loop._busy() == 0 and [slot.node for slot in loop.waiting] == ["n1", "n2"]
    loop.last_life = time.monotonic() - 31
    loop._check_for_life(time.monotonic())
    assert loop.monitor.note.call_args.args[0].startswith("waiting for 3 workers, 2 so far: each needs ")
    with pytest.raises(EngineFailed, match=r"^only 2 of at least 3 workers started in 900 s: each needs "):
        loop._check_for_life(time.monotonic() + 900)
    tell(loop, starting[3], "n3")
    assert [slot.node for slot in loop.live.values() if slot.work] == ["n1", "n2", "n3"] and not loop.waiting


def test_no_more_workers_are_asked_for_than_units_are_left(tmp_path: Path) -> None:
    loop = loop_of([unit_of(name, tmp_path) for name in "abcde"])
    loop._hire()
    kept = [*loop.live][:2]
    assert len(loop.live) == 5
    loop.unseen = 2
    loop._hire()
    assert [*loop.live] == kept and cast(MagicMock, loop.ray).kill.call_count == 3
