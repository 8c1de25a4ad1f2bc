"""Killed, or the disk full, at any of its writes: the same command again finishes, as if nothing had happened.

A process that is killed does nothing more, so here no change of a file succeeds after the one at which it dies.
benchmarks/ordered_kills.py sends real signals, to more commands; tests/promises/test_chaos.py runs a part of it.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import autolabel, contents, labels_of, photograph, refused, scanned
from drive import NAMES, draw_drive, drive_job

from autolabel.manifests import local_storage, scenes
from autolabel.manifests.policy import Policy
from autolabel.manifests.run.folder import Accounts, Run, RunFolder
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.relabel import relabel
from autolabel.pipeline.report.write import write_report
from autolabel.pipeline.run import generate
from autolabel.pipeline.source import manifest_of
from autolabel.pipeline.verify import verify
from autolabel.student.job import TrainJob
from autolabel.student.metrics import read_metrics
from autolabel.student.train import train

STRICT = Policy(name="strict", threshold=0.7)


class Died(BaseException):
    """The process is gone."""


class Dying:
    """`os` and `open` as local_storage.py sees them, until the process dies at one of its changes.

    at: the number of that change, counted from 1. where: a regular expression of the path and the kind of that change.
    """

    def __init__(self, at: int = 0, where: tuple[str, str] | None = None) -> None:
        self.at, self.where, self.changes, self.dead = at, where, 0, False

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _change(self, call: str, path: object) -> None:
        self.changes += 1
        here = self.where is not None and self.where[0] == call and re.search(self.where[1], str(path))
        self.dead = self.dead or self.changes == self.at or bool(here)
        if self.dead:
            raise Died

    def replace(self, source: Path, target: Path) -> None:
        self._change("replace", target)
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        self._change("link", target)
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        if os.path.lexists(path) or self.dead:
            self._change("unlink", path)
        os.unlink(path)

    def opened(self, path: Path, mode: str, **options: Any) -> Any:
        if "x" in mode or "a" in mode:
            self._change("create" if "x" in mode else "append", path)
        return open(path, mode, **options)


@contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, at: int = 0, where: tuple[str, str] | None = None) -> Iterator[Dying]:
    """Meanwhile the process dies there; what it was about to do is left as it was."""
    process = Dying(at, where)
    with monkeypatch.context() as patch:
        patch.setattr(local_storage, "os", process)
        patch.setattr(local_storage, "open", process.opened, raising=False)
        try:
            yield process
        except Died:
            process.dead = True


def job(place: Path, run: str, **settings: object) -> LabelJob:
    """What the run folder `place`/`run` is asked for."""
    return drive_job(place, run, **{"keep_confidence": 8, **settings})


@pytest.fixture(scope="module")
def originals(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven street images, their manifest, a teacher, and a finished run `whole` with kept confidence."""
    made = draw_drive(city, teacher, tmp_path_factory.mktemp("originals"))
    generate(job(made, "whole"))
    return made


@pytest.fixture
def place(originals: Path, tmp_path: Path) -> Path:
    """The same as copies, so that a test may change them."""
    return Path(shutil.copytree(originals, tmp_path / "place"))


def require_like(run: Path, whole: Path, *, accounts: Accounts = Accounts(7, 7, 0, 0)) -> None:  # noqa: B008
    assert labels_of(run) == labels_of(whole)
    assert Run.open(run).accounts == accounts
    assert Run.open(run).state == "complete"
    assert verify(run).faults == []
    assert names_of(run) - {"input.parquet"} == names_of(whole)


def names_of(run: Path) -> set[str]:
    """The files of a run but for its report; a record may have been committed several times."""
    names = (name for name in contents(run) if not name.startswith((".lock", "report")))
    return {re.sub(r"\.\d+\.parquet", ".parquet", re.sub("plan-.*", "plan", name)) for name in names}


# --- every prefix of a start ------------------------------------------------------------------------------------------


def test_every_prefix_of_the_start_of_a_labelling_can_be_resumed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder of images, with three layers: its manifest, the plan, run.json, the stores, the first unit."""

    def label(out: Path) -> None:
        asked = job(place, out.name)
        manifest = manifest_of(place / "drive", out, teacher=asked.teacher)
        generate(replace(asked, manifest=manifest))

    for at in (1, 3, 5, 7, 10, 12, 14, 16, 22, 28, 32, 37):
        out = place / f"run-{at}"
        with dying(monkeypatch, at) as process:
            label(out)
        assert process.dead
        label(out)
        require_like(out, place / "whole")


def test_every_prefix_of_the_start_of_a_relabelling_can_be_resumed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Run.open(place / "whole")
    relabel(source, STRICT, out=place / "strict")
    for at in (2, 4, 6, 8, 10, 13, 17):
        out = place / f"run-{at}"
        with dying(monkeypatch, at) as process:
            relabel(source, STRICT, out=out)
        assert process.dead
        relabel(source, STRICT, out=out)
        require_like(out, place / "strict")


def test_a_start_that_was_killed_says_so_and_another_request_may_take_its_place(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is labelled yet, so nothing is mixed."""
    asked = job(place, "run")
    with dying(monkeypatch, where=("create", r"/\.plan-")):
        generate(asked)
    assert not RunFolder(asked.out).exists()
    assert refused("report", asked.out) == (
        f"{asked.out} holds no label yet: its command was stopped at once; run the same again"
    )
    generate(replace(asked, unit_size=2))
    assert labels_of(asked.out) == labels_of(place / "whole")


def test_a_run_without_its_stores_is_not_damaged_but_unfinished(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = job(place, "run")
    with dying(monkeypatch, where=("create", r"labels\.zarr/b512x512/")):
        generate(asked)
    assert Run.open(asked.out).state == "preparing"
    assert refused("verify", asked.out) == (
        f"{asked.out} is not whole yet: its command was stopped at once; run the same again, then verify"
    )
    generate(asked)
    require_like(asked.out, place / "whole")


@pytest.mark.parametrize("name", ["plan-b.txt", "plan-00000000.arrow", "input.parquet", ".run.json", "labels.zarr/x"])
def test_a_folder_with_one_file_of_somebody_else_is_refused_and_stays_as_it_is(place: Path, name: str) -> None:
    """Whatever it is called: a folder is ours because run.json says so, not because names look like ours."""
    out = place / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_bytes(b"mine")
    common = ("--teacher", place / "teacher.pt", "--out", out)
    strict = place / "strict.toml"
    strict.write_text(STRICT.to_toml())
    for command in (
        ("generate", place / "drive.parquet", *common),
        ("generate", place / "drive", *common),
        ("relabel", place / "whole", "--policy", strict, "--out", out),
    ):
        assert refused(*command) == f"{out} is not empty and not a run (no run.json): choose another --out"
    assert contents(out) == {name: b"mine"}


def test_a_demo_that_was_killed_while_it_drew_draws_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise Died

    monkeypatch.setattr(scenes, "write_city", killed)
    for _ in range(2):
        with pytest.raises(Died):
            autolabel("demo", "--out", tmp_path / "demo")
    assert refused("demo", "--out", tmp_path / "demo", "--seed", 1) == (
        f"{tmp_path / 'demo'} is not empty and holds no demo of seed 1: choose another --out"
    )


# --- what is derived again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where",
    [("replace", r"/run\.json$"), ("create", r"/labels\.zarr/.*zarr\.json"), ("unlink", r"/plan-[0-9a-f]+\.arrow$")],
    ids=["before run.json names the new plan", "before the store grows", "before the old plan goes"],
)
def test_a_manifest_that_has_grown_is_planned_again_after_a_kill(
    place: Path, city: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[str, str]
) -> None:
    asked = job(place, "whole")
    before = labels_of(asked.out)
    photograph(city, place / "drive", [*NAMES, "s00", "s04", "s99"])
    scanned(city, place / "drive")
    with dying(monkeypatch, where=where) as process:
        generate(asked)
    assert process.dead
    assert labels_of(asked.out) == before
    assert generate(asked).accounts == Accounts(10, 10, 0, 0)
    generate(replace(asked, out=place / "at once"))
    assert labels_of(asked.out) == labels_of(place / "at once")
    assert len(list(asked.out.glob("plan-*"))) == 1
    assert verify(asked.out).faults == []


@pytest.mark.parametrize(
    "where",
    [("unlink", r"000001\.0\.parquet$"), ("create", r"/\.run\.json"), ("replace", r"/run\.json$")],
    ids=["before the second record goes", "before run.json", "while run.json is written"],
)
@pytest.mark.parametrize("then_repair", [True, False], ids=["repaired again", "labelled at once"])
def test_a_repair_that_was_killed_is_made_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[str, str], then_repair: bool
) -> None:
    asked = replace(job(place, "run"), out=Path(shutil.copytree(place / "whole", place / "run")))
    for number in (0, 1):
        shard = asked.out / "labels.zarr" / "b512x512" / f"c.{number}.0.0"
        shard.write_bytes(shard.read_bytes()[:-1])
    with dying(monkeypatch, where=where) as process:
        verify(asked.out, repair=True)
    assert process.dead
    if then_repair:
        verify(asked.out, repair=True)
    generate(asked)
    require_like(asked.out, place / "whole")


def test_a_report_that_was_killed_while_it_replaced_its_pictures_is_made_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old page keeps its pictures until the new one is there; afterwards nothing of it is left."""
    run = place / "whole"
    page = write_report(run, images=2)
    old = contents(run / "report")
    for where in (("create", r"-auto\.webp"), ("create", r"/\.index\.html"), ("replace", r"/index\.html$")):
        with dying(monkeypatch, where=where) as process:
            write_report(run, images=2)
        assert process.dead
        now = contents(run / "report")
        assert {name: now.get(name) for name in old} == old
    write_report(run, images=2)
    used = set(re.findall(r"pictures-[0-9a-f]{12}", page.read_text()))
    assert len(used) == 1
    assert {name.split("/")[0] for name in contents(run / "report")} - {".lock"} == {"index.html", *used}


@pytest.mark.parametrize(
    "where",
    [
        ("create", r"/\.train\.json"),
        ("replace", r"/best\.pt$"),
        ("create", r"/\.scores\.json"),
        ("create", r"/\.last_scores\.json"),
        ("append", r"/metrics\.jsonl$"),
        ("create", r"/\.last\.pt"),
        ("replace", r"/last\.pt$"),
    ],
    ids=lambda where: " ".join(where),
)
def test_a_training_that_was_killed_between_its_files_ends_with_the_same(
    city: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[str, str],
    trained: dict[str, object],
) -> None:  # fmt: skip
    """last.pt comes behind best.pt, scores and metrics: it never promises what is not there."""
    asked = small_training(city, tmp_path / "student")
    with dying(monkeypatch, where=where) as process:
        train(asked)
    assert process.dead
    train(asked)
    assert training(asked.out) == trained


@pytest.fixture(scope="module")
def trained(city: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The files of a training that nobody disturbed."""
    asked = small_training(city, tmp_path_factory.mktemp("trained") / "student")
    train(asked)
    return training(asked.out)


def small_training(city: Path, out: Path) -> TrainJob:
    return TrainJob(
        city / "fine.parquet", city / "val.parquet", out, steps=1, batch_size=2, validations=1, crop=(64, 64)
    )


def training(folder: Path) -> dict[str, object]:
    """The files of a training without its speed; checkpoints by their size, because that is in them too."""
    found: dict[str, object] = {
        name: len(data) if name.endswith(".pt") else data for name, data in contents(folder).items()
    }
    found["metrics.jsonl"] = [replace(step, images_per_s=0.0) for step in read_metrics(folder)]
    return {name: data for name, data in found.items() if not name.startswith(".lock")}


# --- a full disk ------------------------------------------------------------------------------------------------------


class Room:
    """A disk with room for so many bytes in all files that are written whose name fits."""

    def __init__(self, room: int, name: str) -> None:
        self.room, self.name = room, name

    def opened(self, path: Path, mode: str, **options: Any) -> Any:
        if "x" not in mode or not re.search(self.name, str(path)):
            return open(path, mode, **options)
        disk = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                if memoryview(data).nbytes > disk.room:
                    super().write(memoryview(data)[: disk.room])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                disk.room -= memoryview(data).nbytes
                return super().write(data)

        return io.BufferedWriter(File(path, mode.replace("b", "")))


@contextmanager
def full_after(monkeypatch: pytest.MonkeyPatch, room: int, name: str = "") -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(local_storage, "open", Room(room, name).opened, raising=False)
        yield


def options(asked: LabelJob) -> list[object]:
    return [
        "generate", asked.manifest, "--teacher", asked.teacher, "--out", asked.out, "--scales", "1", "--engine",
        "local", "--unit-size", asked.unit_size, "--keep-confidence", asked.keep_confidence,
    ]  # fmt: skip


def test_a_disk_that_is_full_in_the_middle_of_a_file_is_told_and_resumed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the claim, the plan, run.json, a store, the second shard of a layer, a record, tables."""
    places = [
        ("/run.json", 20), ("/plan-*.arrow", 1000), ("/run.json", 3000), ("/top.zarr/b512x512/zarr.json", 500),
        ("/labels.zarr/b512x512/c.1.0.0", 1500), ("/units/b512x512.000001.0.parquet", 9000),
        ("/stats/classes.parquet", 4000), ("/manifest.parquet", 100),
    ]  # fmt: skip
    for number, (name, room) in enumerate(places):
        asked = job(place, f"run-{number}")
        folder, _, file = name.rpartition("/")
        with full_after(monkeypatch, room, rf"{folder}/\.{re.escape(file).replace(re.escape('*'), '.*')}"):
            line = refused(*options(asked))
        told = re.sub("plan-[0-9a-f]+", "plan-*", line)
        advice = "free some space and run the same again, finished work is kept"
        assert told == f"No space left on device: {asked.out}{name}; {advice}"
        assert not [name for name in contents(asked.out) if name.endswith("tmp")]
        assert autolabel(*options(asked)).exit_code == 0
        require_like(asked.out, place / "whole")


@pytest.mark.parametrize(
    ("command", "room"),
    [
        (lambda place: ["manifest", "fuse", place / "whole/manifest.parquet", "-o", place / "out.parquet"], 500),
        (
            lambda place: [
                "manifest",
                "scan",
                place / "drive",
                "--label-space",
                "cityscapes",
                "-o",
                place / "s.parquet",
            ],
            9,
        ),
        (lambda place: ["report", place / "whole", "--images", "2"], 3000),
        (lambda place: ["relabel", place / "whole", "--policy", "human-first", "--out", place / "relabelled"], 4000),
    ],
    ids=["fuse", "scan", "report", "relabel"],
)
def test_a_full_disk_is_one_line_and_nothing_is_left_of_what_was_not_whole(
    place: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[[Path], list[object]], room: int
) -> None:
    with full_after(monkeypatch, room):
        line = refused(*command(place))
    assert re.fullmatch(r"No space left on device: /.+; free some space and run the same again, .*", line)
    assert not [name for name in contents(place) if name.endswith("tmp")]
    assert autolabel(*command(place)).exit_code == 0
