"""A request that fails, hangs or takes place twice changes what the storage of buckets says or keeps.

Every fault of the proxy meets every operation once; the operation must end as if nothing had happened.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from buckets import Place, place
from conftest import ROOT

from autolabel.manifests import storage
from autolabel.manifests.locations import location

sys.path.append(str(ROOT / "benchmarks"))
from fault_proxy import (
    CUT_AFTER,
    CUT_BEFORE,
    CUT_WITHIN,
    DELAY,
    FAILED,
    FAILED_AFTER,
    LOST_REPLY,
    SLOW_DOWN,
    TWICE,
    Rule,
)
from object_servers import installed

FAULTS = (DELAY, CUT_BEFORE, CUT_WITHIN, CUT_AFTER, LOST_REPLY, FAILED_AFTER, FAILED, SLOW_DOWN, TWICE)


@pytest.fixture(scope="module", params=installed())
def bucket(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A bucket of every server that can be started here; moto always can."""
    with place(request.param) as found:
        yield found


def create(path: Path) -> None:
    assert storage.create(path, b"ours")


def create_again(path: Path) -> None:
    assert not storage.create(path.with_name("taken"), b"ours")
    assert storage.read(path.with_name("taken")) == b"theirs"


def replace(path: Path) -> None:
    before = storage.stat(path.with_name("old"))
    assert before is not None and storage.replace(path.with_name("old"), b"new one", unchanged=before)
    assert storage.read(path.with_name("old")) == b"new one"


def replace_changed(path: Path) -> None:
    stale = storage.stat(path.with_name("old"))
    assert stale is not None
    storage.write(path.with_name("old"), b"of another")
    assert not storage.replace(path.with_name("old"), b"new", unchanged=stale)
    assert storage.read(path.with_name("old")) == b"of another"


def write(path: Path) -> None:
    storage.write(path, b"ours")


def writing(path: Path) -> None:
    with storage.writing(path) as file:
        file.write(b"ou")
        file.write(b"rs")


def append(path: Path) -> None:
    storage.append(path, b"ou")
    storage.append(path, b"rs")


def read(path: Path) -> None:
    assert storage.read(path.with_name("taken")) == b"theirs"
    with storage.reading(path.with_name("taken")) as file:
        assert file.read(3) == b"the"
    storage.write(path, b"ours")


def read_range(path: Path) -> None:
    version = storage.stat(path.with_name("large"))
    assert version is not None and version.size == 100_000
    assert storage.read_range(path.with_name("large"), 9, 50_000, unchanged=version) == bytes(50_000)
    storage.write(path, b"ours")


def look(path: Path) -> None:
    assert not storage.exists(path)
    assert storage.exists(path.with_name("taken")) and storage.is_folder(path.parent)
    storage.write(path, b"ours")


def find(path: Path) -> None:
    assert [one.name for one in storage.list(path.parent)] == ["gone", "large", "old", "taken"]
    storage.write(path, b"ours")


def remove(path: Path) -> None:
    storage.remove(path.with_name("gone"))
    assert not storage.exists(path.with_name("gone"))
    storage.remove(path.with_name("gone"))
    storage.write(path, b"ours")


GIVEN = {"taken": b"theirs", "old": b"old one", "gone": b"", "large": bytes(100_000)}
OPERATIONS: dict[Callable[[Path], None], tuple[str, ...]] = {  # and the objects that each needs
    create: (), create_again: ("taken",), replace: ("old",), replace_changed: ("old",), write: (), writing: (),
    append: (), read: ("taken",), read_range: ("large",), look: ("taken",), find: tuple(GIVEN), remove: ("gone",),
}  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.__name__)
def test_no_fault_at_any_request_changes_the_outcome(operation: Callable[[Path], None], bucket: Place) -> None:
    root, proxy = location(bucket.url) / operation.__name__, bucket.proxy
    proxy.slow = 0.01

    def try_it(folder: Path, *rules: Rule) -> int:
        for name in OPERATIONS[operation]:
            storage.write(folder / name, GIVEN[name])
        proxy.rules, before = list(rules), len(proxy.passed)
        operation(folder / "file")
        requests, proxy.rules = len(proxy.passed) - before, []
        if operation not in (create_again, replace, replace_changed):
            assert storage.read(folder / "file") == b"ours"
        return requests

    for at in range(try_it(root / "undisturbed")):
        for fault in FAULTS:
            turns = iter([*[False] * at, True])
            proxy.done.clear()
            try_it(root / f"{at}-{fault.replace(' ', '-')}", Rule(fault, when=lambda turns=turns: next(turns, False)))
            assert proxy.done == {fault: 1}, (at, fault)
