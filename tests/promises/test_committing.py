"""Two workers at one unit, lost replies and deaths between two steps: the unit's record and its shards agree, always.

Z was given up as lost and goes on; W was given its unit. Both are real labellers of one run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from conftest import labels_of, outcome
from drive import NAMES, draw_drive, drive_job

from autolabel.manifests import storage
from autolabel.manifests.run.folder import Accounts, Run, RunFolder
from autolabel.manifests.run.ledger import Commit, Ledger, Overtaken, create_record, find_commit
from autolabel.manifests.samples import open_manifest
from autolabel.pipeline.engine import Work
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.label import Labeller
from autolabel.pipeline.predictor import TeacherPredictor
from autolabel.pipeline.prepare import open_plan
from autolabel.pipeline.records import FRESH, Known, RecordWriter, read_rows, write_record
from autolabel.pipeline.run import generate
from autolabel.pipeline.units import Tally, Unit
from autolabel.pipeline.verify import verify
from autolabel.teacher.loading import load_teacher

NAME = "b512x512.000000"
STORES = ("zarr", "png")


@pytest.fixture(scope="module")
def originals(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven street images in one unit, runs `zarr` and `png` that are whole, and those that have not begun."""
    made = draw_drive(city, teacher, tmp_path_factory.mktemp("originals"))
    for store in STORES:
        generate(job(made, store))
        bare = Path(shutil.copytree(made / store, made / f"{store}-bare"))
        shutil.rmtree(bare / "units")
        for layer in ("labels", "top", "confidence"):
            shutil.rmtree(bare / layer, ignore_errors=True)
            (bare / f"{layer}.zarr" / "b512x512" / "c.0.0.0").unlink(missing_ok=True)
    return made


@pytest.fixture
def place(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals, tmp_path / "place"))


def job(place: Path, run: str, **settings: object) -> LabelJob:
    return drive_job(place, run, **{"store": run.partition("-")[0], "keep_confidence": 4, "unit_size": 7, **settings})


class Bench:
    """A run that has not begun, and its workers."""

    def __init__(self, place: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.job = job(place, f"{store}-bare")
        self.run, self.whole, self._patch = Run.open(self.job.out), labels_of(place / store), monkeypatch
        assert self.run.teacher is not None
        self._teacher = load_teacher(self.run.teacher, device="cpu")
        self.work = Work(open_plan(self.run, open_manifest(self.run.input_manifest)).packed(0), tuple(NAMES))
        self.every(1e9)

    def every(self, seconds: float) -> None:
        """Commit so often."""
        self._patch.setattr(storage, "commit_interval", lambda path: seconds)

    def worker(
        self, *, wanted: Sequence[str] = NAMES, known: Known = FRESH, write: RecordWriter = write_record
    ) -> Iterator[Tally]:
        labeller = Labeller(self.run, TeacherPredictor(self._teacher, self.run.recipe), write=write)
        return labeller.run(self.work.unit.unit(), wanted, known)

    def require_whole(self) -> None:
        """The next call finishes the rest, and every byte is as it should be."""
        assert generate(self.job).accounts == Accounts(7, 7, 0, 0)
        assert labels_of(self.job.out) == self.whole
        assert verify(self.job.out).faults == []
        assert len(list((self.job.out / "units").iterdir())) == 1
        assert not list((self.job.out / "attempts").glob("*"))


@pytest.fixture(params=STORES)
def bench(request: pytest.FixtureRequest, place: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(place, request.param, monkeypatch)


@pytest.fixture
def zarr(place: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(place, "zarr", monkeypatch)


def last(worker: Iterator[Tally]) -> int:
    """Let a worker go on to its end; the number of samples that it tells then."""
    done = 0
    for tally in worker:
        done = tally.done
    return done


def advance(worker: Iterator[Tally], images: int) -> None:
    for _ in range(images + 1):  # the first one tells what was done before
        next(worker)


# --- two workers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [0.0, 1e9], ids=["committed image by image", "committed at the end"])
@pytest.mark.parametrize("images", [0, 1, 4])
def test_a_worker_that_wakes_when_another_has_made_its_unit_whole_tells_that_ones_result_and_leaves(
    bench: Bench, images: int, interval: float
) -> None:
    bench.every(interval)
    zombie = bench.worker()
    advance(zombie, images)
    winner = bench.work.again(bench.run, careful=False).known
    assert last(bench.worker(known=winner)) == 7
    truth = Ledger(bench.run.path)[NAME]
    assert last(zombie) == 7
    newest = find_commit(bench.run.path, NAME)
    assert newest == truth and {row.worker for row in read_rows(truth)} != set()
    assert labels_of(bench.run.path) == bench.whole
    bench.require_whole()


def test_the_rest_is_handed_out_again_if_the_one_that_was_faster_had_done_less(bench: Bench) -> None:
    zombie, winner = bench.worker(), bench.worker()
    advance(winner, 3)
    bench.every(0.0)
    zombie = bench.worker(wanted=NAMES[:2])
    assert last(zombie) == 2
    assert last(winner) == 2  # overtaken
    rest = bench.work.rest(bench.run, 2)
    assert rest is not None and bench.work.rest(bench.run, 7) is None
    assert last(bench.worker(known=rest.known)) == 7
    assert rest.rest(bench.run, 7) is None
    bench.require_whole()


def test_a_shard_that_was_written_over_before_its_record_came_is_put_back(zarr: Bench) -> None:
    shards = {}

    def zombies(run: RunFolder, unit: Unit, *more: object) -> Commit:
        """W's record comes between Z's shard and Z's record."""
        shards["of Z"] = zarr_shards(run.path)
        records[0]()
        return write_record(run, unit, *more)  # type: ignore[arg-type]

    def winners(run: RunFolder, unit: Unit, *more: object) -> Commit:
        """Z runs between W's shard and W's record."""
        shards["of W"] = zarr_shards(run.path)
        made: list[Commit] = []
        records.append(lambda: made.append(write_record(run, unit, *more)))  # type: ignore[arg-type]
        assert last(zarr.worker(wanted=NAMES[:2], write=zombies)) == 2  # of W's seven, those that Z was to do
        return made[0]

    records: list[Callable[[], None]] = []
    assert last(zarr.worker(write=winners)) == 7
    assert shards["of W"] != shards["of Z"] and zarr_shards(zarr.run.path) == shards["of W"]
    assert verify(zarr.run.path).faults == []
    zarr.require_whole()


def zarr_shards(run: Path) -> dict[str, bytes]:
    return {path.parent.parent.name: path.read_bytes() for path in sorted(run.glob("*.zarr/b512x512/c.0.0.0"))}


def test_a_loser_that_dies_before_it_has_put_the_shard_back_costs_work_and_no_label(
    zarr: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def winners(run: RunFolder, unit: Unit, *more: object) -> Commit:
        def dies(*_: object) -> Commit:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            last(zarr.worker(wanted=NAMES[:2], write=dies))
        return write_record(run, unit, *more)  # type: ignore[arg-type]

    assert last(zarr.worker(write=winners)) == 7
    assert any("differs from what was committed" in fault for fault in verify(zarr.run.path).faults)
    assert generate(zarr.job).done == 7
    zarr.require_whole()


def test_a_record_of_a_generation_that_was_passed_counts_for_nothing(tmp_path: Path) -> None:
    first = create_record(tmp_path, "u", b"first", before=None)
    second = create_record(tmp_path, "u", b"second", before=first)
    assert not first.path.exists()
    late = create_record(tmp_path, "u", b"late", before=None)  # its writer has seen no record
    ledger = Ledger(tmp_path)
    assert ledger["u"] == second and ledger["u"].read() == b"second" and ledger.old == [late.path]
    with pytest.raises(Overtaken) as overtaken:
        create_record(tmp_path, "u", b"again", before=first)
    assert overtaken.value.commit == second
    assert create_record(tmp_path, "u", b"second", before=first) == second  # a lost reply


# --- lost replies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, ConnectionResetError("cut"), TimeoutError("no answer")], ids=str)
def test_replies_that_are_lost_after_the_write_are_no_conflicts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: OSError | None
) -> None:
    """None: the client has asked again by itself, and was told that somebody has written."""
    bench.every(0.0)
    create, change, lost = storage.create, storage.replace, list[str]()

    def reply(path: Path, done: bool) -> bool:
        if path.parent.name == "attempts":
            return done
        lost.append(path.name)
        if error is not None:
            raise error
        return False

    monkeypatch.setattr(storage, "create", lambda path, data: reply(path, create(path, data)))
    monkeypatch.setattr(
        storage, "replace", lambda path, data, *, unchanged: reply(path, change(path, data, unchanged=unchanged))
    )
    assert last(bench.worker()) == 7
    monkeypatch.undo()
    assert f"{NAME}.0.parquet" in lost and (bench.run.recipe.store == "png" or "c.0.0.0" in lost)
    assert labels_of(bench.run.path) == bench.whole
    bench.require_whole()


@pytest.mark.parametrize("what", ["units", "c.0.0.0"])
def test_a_write_that_was_not_made_is_an_error_and_not_a_success(
    zarr: Bench, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    create = storage.create

    def cut(path: Path, data: bytes) -> bool:
        if what in (path.parent.name, path.name):
            raise ConnectionResetError("cut")
        return create(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "create", cut)
        with pytest.raises(ConnectionResetError, match="cut"):
            last(zarr.worker())
    zarr.require_whole()


# --- deaths between two steps -----------------------------------------------------------------------------------------


class Died(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("step", range(1, 9))
def test_a_worker_that_dies_at_any_write_loses_no_image_that_was_committed_before(
    zarr: Bench, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Each commit is three shards, a record, and the removal of the one before."""
    zarr.every(0.0)
    steps = iter(range(1, 100))
    with monkeypatch.context() as patch:
        for name in ("create", "replace", "remove"):
            patch.setattr(storage, name, _dying(getattr(storage, name), steps, step))
        with pytest.raises(Died):
            last(zarr.worker())
    commit = find_commit(zarr.run.path, NAME)
    committed = len(read_rows(commit)) if commit else 0
    assert committed == (0 if step < 5 else 1 if step < 9 else 2)
    assert outcome(generate(zarr.job)) == (Accounts(7, 7, 0, 0), 7 - committed, {}, False)
    zarr.require_whole()


def _dying(call: Callable[..., object], steps: Iterator[int], last: int) -> Callable[..., object]:
    def step(*arguments: object, **options: object) -> object:
        if next(steps) >= last:
            raise Died
        return call(*arguments, **options)

    return step


# --- what a healthy unit costs ----------------------------------------------------------------------------------------


def test_a_healthy_unit_is_written_once_for_each_layer_and_its_record(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    for name in ("stat", "read", "read_range", "list", "create", "replace", "remove", "write", "exists"):
        real = getattr(storage, name)
        monkeypatch.setattr(storage, name, _noting(name, real, bench.run.path, calls))
    assert last(bench.worker()) == 7
    monkeypatch.undo()
    writes = [call for call in calls if call[0] not in ("stat", "read", "read_range", "list", "exists")]
    if bench.run.recipe.store == "zarr":
        layers = ["labels.zarr", "top.zarr", "confidence.zarr"]
        assert sorted(calls) == sorted([("create", layer) for layer in layers] + [("create", "units")])
    else:  # one note for the commit, its removal, and three PNGs for each image
        assert [call for call in writes if call[1] in ("attempts", "units")] == [
            ("create", "attempts"), ("create", "units"), ("remove", "attempts")
        ]  # fmt: skip
        assert len(writes) == 3 + 3 * 7


def _noting(name: str, call: Callable[..., object], run: Path, calls: list[tuple[str, str]]) -> Callable[..., object]:
    def noted(path: Path, *more: object, **options: object) -> object:
        if path.is_relative_to(run):
            calls.append((name, path.relative_to(run).parts[0]))
        return call(path, *more, **options)

    return noted
