"""`autolabel verify` reads everything that a run has written; what is not as it was written is found, and made again.

If this fails, a disk that rots changes labels, numbers or accounts, and the next training learns from them.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import autolabel, contents, labels_of

from autolabel.manifests import storage
from autolabel.manifests.run.folder import Accounts, Run, RunFolder
from autolabel.manifests.run.record import Fence
from autolabel.manifests.run.shards import DamagedLabel
from autolabel.pipeline.job import STORES, LabelJob
from autolabel.pipeline.run import generate
from autolabel.pipeline.verify import Verification
from autolabel.pipeline.verify import verify as verify_run

TABLES = tuple(RunFolder(Path()).table_paths())
SAMPLES, UNITS = 10, 3  # of up to four samples
MEASURED = ("decode_ms", "infer_ms", "encode_ms", "worker")  # columns that differ from call to call
UNCHECKED = ("progress.json", ".lock")
SECOND = "b512x512.000001.0.parquet"  # the record of the second unit
FLIPS = {"run.json": 20, "plan": 30, "records": 30, "labels": 50, "tables": 20}  # by kind of file


def job(city: Path, teacher: Path, run: Path, store: str) -> LabelJob:
    return LabelJob(
        city / "coarse.parquet", teacher, run, scales=(1.0,), unit_size=4, store=store
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run by its store."""
    made = {store: tmp_path_factory.mktemp("finished") / store for store in STORES}
    for store, run in made.items():
        generate(job(city, teacher, run, store))
    return made


@pytest.fixture(params=STORES)
def asked(
    request: pytest.FixtureRequest, finished: dict[str, Path], city: Path, teacher: Path, tmp_path: Path
) -> LabelJob:
    """What a finished run was asked for; its folder is a copy that the test may damage."""
    shutil.copytree(finished[request.param], tmp_path / "run")
    return job(city, teacher, tmp_path / "run", request.param)


def verify(run: Path, repair: bool = False) -> Verification:
    return verify_run(run, repair=repair)


def found(run: Path) -> list[str]:
    """Everything that verify has to say against a run."""
    try:
        return verify(run).faults
    except (ValueError, FileNotFoundError) as refusal:
        return [str(refusal)]


def files(run: Path, kind: str = "") -> list[Path]:
    """The files of a run that verify answers for; of one kind, or all."""
    return [run / name for name in contents(run) if name not in UNCHECKED and kind in ("", kind_of(name))]


def kind_of(name: str) -> str:
    if name in TABLES:
        return "tables"
    top = "plan" if name.startswith("plan-") else name.partition("/")[0]
    return {"run.json": "run.json", "plan": "plan", "units": "records"}.get(top, "labels")


def flips(run: Path, kind: str) -> Iterator[str]:
    """Flip a bit of a file, one after the other; yields those that verify says nothing about."""
    dice = random.Random(f"{kind} 1")
    written = {path: path.read_bytes() for path in files(run, kind)}
    places = [(path, place) for path, data in written.items() for place in range(len(data))]
    for path, place in dice.sample(places, FLIPS[kind]):
        damaged = bytearray(written[path])
        damaged[place] ^= 1 << dice.randrange(8)
        storage.write(path, damaged)
        if not found(run):
            yield f"{path.relative_to(run)}: byte {place} of {len(damaged)}, was {written[path][place]:#x}"
        storage.write(path, written[path])


def tables_of(run: Path) -> dict[str, object]:
    """What was published, without what differs from call to call."""
    tables = {name: pq.read_table(run / name) for name in TABLES}
    kept = {name: t.select([c for c in t.column_names if c not in MEASURED]) for name, t in tables.items()}
    return {name: (table.to_pylist(), table.schema.metadata) for name, table in kept.items()}


def records(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (run / "units").iterdir()}


def samples_of(run: Path, record: str) -> list[str]:
    return list(pq.read_table(run / "units" / record)["sample_id"].to_pylist())


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


# --- what is found ----------------------------------------------------------------------------------------------------


def test_a_whole_run_has_no_fault_and_is_not_touched(asked: LabelJob) -> None:
    before = contents(asked.out)
    result = autolabel("verify", asked.out)
    assert (result.exit_code, result.stdout) == (0, "labels read: 10, images: 10, units: 3, faults: 0\n")
    assert verify(asked.out, repair=True) == Verification(UNITS, SAMPLES, SAMPLES, SAMPLES)
    assert {**contents(asked.out), ".lock": b""} == {**before, ".lock": b""}


@pytest.mark.parametrize("kind", ["run.json", "records", "labels", "tables"])
def test_a_flipped_bit_anywhere_is_found(asked: LabelJob, kind: str) -> None:
    assert list(flips(asked.out, kind)) == []


def test_a_flipped_bit_in_the_plan_is_found(asked: LabelJob) -> None:
    """In a process of its own: Arrow does not check what it maps, and a wrong offset ends the process that reads it."""
    code = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/pipeline']; from test_verify import *\n"
        "for silent in flips(Path(sys.argv[2]), 'plan'): print(silent)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parents[1]), str(asked.out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def _halved(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _without_its_last_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _emptied(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [Path.unlink, _halved, _without_its_last_byte, _emptied], ids=lambda d: d.__name__)
@pytest.mark.parametrize("kind", FLIPS)
def test_a_file_that_is_gone_or_cut_is_found(asked: LabelJob, kind: str, damage: Callable[[Path], None]) -> None:
    for path in files(asked.out, kind):
        data = path.read_bytes()
        damage(path)
        faults = found(asked.out)
        assert faults, f"{path.relative_to(asked.out)}: not a word"
        assert kind == "plan" or any(path.name in fault or str(asked.out) in fault for fault in faults)
        storage.write(path, data)
    assert found(asked.out) == []


def test_another_unit_in_its_place_is_found(asked: LabelJob) -> None:
    """Whole files, each with good checksums; only the plan tells that they are not where they belong."""
    first = asked.out / "units" / "b512x512.000000.0.parquet"
    shutil.copyfile(first, asked.out / "units" / SECOND)
    (fault,) = verify(asked.out).faults
    assert fault.startswith(
        f"{asked.out / 'units' / SECOND} is damaged (sample 'apfeldorf_000000_012629' is not of this unit"
    )


def test_a_record_of_no_unit_is_named_and_removed_by_repair(asked: LabelJob) -> None:
    stray = asked.out / "units" / "b512x512.000099.0.parquet"
    shutil.copyfile(asked.out / "units" / SECOND, stray)
    assert verify(asked.out).faults == [f"{stray} belongs to no unit of the plan"]
    assert verify(asked.out, repair=True).undone == 0
    assert not stray.exists()
    assert generate(asked).done == 0
    assert verify(asked.out).faults == []


def test_faults_are_printed_and_give_exit_code_2(asked: LabelJob) -> None:
    table = asked.out / "stats" / "images.parquet"
    flip(table, 100)
    result = autolabel("verify", asked.out)
    assert result.exit_code == 2
    assert result.stdout.splitlines() == [
        f"damaged: {table} differs from what was published",
        "labels read: 10, images: 10, units: 3, faults: 1",
    ]
    assert result.stderr.splitlines()[-1] == (
        f"autolabel: {asked.out} is damaged: `autolabel verify {asked.out} --repair`, then the same generate again"
    )


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        result = autolabel("verify", folder)
        assert result.exit_code == 2
        assert result.stderr == (
            f"autolabel: {folder} is not a run: it has no run.json; make one with `autolabel generate`\n"
        )
    assert not (tmp_path / "nowhere").exists()


def test_a_run_that_is_being_made_is_not_verified(asked: LabelJob) -> None:
    hold = (
        "import sys; from pathlib import Path; from autolabel.manifests import storage\n"
        "with storage.hold(Path(sys.argv[1])): print(1, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(asked.out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        result = autolabel("verify", asked.out, "--repair")
        other.communicate()
    assert result.exit_code == 2
    assert result.stderr.startswith(f"autolabel: another autolabel is at work in {asked.out} (process {other.pid} on ")
    assert verify(asked.out).faults == []


# --- what repair does -------------------------------------------------------------------------------------------------


def _of_the_second_unit(run: Path) -> Path:
    shard = run / "labels.zarr" / "b512x512" / "c.1.0.0"
    if shard.is_file():
        return shard
    return run / pq.read_table(run / "units" / SECOND)["label"][2].as_py()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit of its labels": lambda run: flip(_of_the_second_unit(run), 200),
    "labels gone": lambda run: _of_the_second_unit(run).unlink(),
    "labels cut": lambda run: _halved(_of_the_second_unit(run)),
    "record cut": lambda run: _halved(run / "units" / SECOND),
    "record of another unit": lambda run: shutil.copyfile(
        run / "units" / "b512x512.000000.0.parquet", run / "units" / SECOND
    ),
}  # fmt: skip


def _after(run: Path, generation: int) -> tuple[str, int]:
    """The record of the second unit in a later generation, and its time."""
    path = run / "units" / f"b512x512.000001.{generation}.parquet"
    return path.name, path.stat().st_mtime_ns


@pytest.mark.parametrize("damage", DAMAGES)
def test_repair_has_exactly_the_damaged_unit_labelled_again(asked: LabelJob, damage: str) -> None:
    run = asked.out
    before, tables, labels = contents(run), tables_of(run), labels_of(run)
    written, lost = records(run), samples_of(run, SECOND)
    DAMAGES[damage](run)
    result = autolabel("verify", run, "--repair")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == ("units put back to undone: 1; run the same command again to label them")
    assert json.loads((run / "run.json").read_text())["state"] == "partial"
    del written[SECOND]
    assert {name for name in records(run).items() - written.items()} == {_after(run, 1)}  # it names no sample
    assert labels_of(run) == {name: label for name, label in labels.items() if name not in lost}
    again = generate(asked)
    assert (again.accounts, again.done) == (Accounts(SAMPLES, SAMPLES, 0, 0), len(lost))
    assert {name for name in records(run).items() - written.items()} == {_after(run, 2)}
    after = contents(run)
    assert {*after} - {f"units/{_after(run, 2)[0]}"} == {*before} - {f"units/{SECOND}"}
    for name, data in before.items():
        if kind_of(name) in ("labels", "plan") and name not in UNCHECKED:
            assert after[name] == data, name
    assert labels_of(run) == labels and tables_of(run) == tables
    assert verify(run) == Verification(UNITS, SAMPLES, SAMPLES, SAMPLES)


@pytest.mark.parametrize("name", ["labels.zarr/zarr.json", "labels.zarr/b512x512/zarr.json", "plan-*.arrow"])
@pytest.mark.parametrize("damage", [Path.unlink, _halved], ids=lambda d: d.__name__)
def test_repair_writes_damaged_metadata_and_a_damaged_plan_again(
    finished: dict[str, Path], city: Path, teacher: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    asked = job(city, teacher, tmp_path / "run", "zarr")
    shutil.copytree(finished["zarr"], asked.out)
    (path,) = asked.out.glob(name)
    written, before = records(asked.out), path.read_bytes()
    damage(path)
    repaired = verify(asked.out, repair=True)
    assert (repaired.units, repaired.labels, repaired.undone, len(repaired.faults)) == (UNITS, SAMPLES, 0, 1)
    assert path.read_bytes() == before
    assert generate(asked).done == 0
    assert records(asked.out) == written
    assert verify(asked.out) == Verification(UNITS, SAMPLES, SAMPLES, SAMPLES)


@pytest.mark.parametrize("name", TABLES)
def test_a_damaged_table_undoes_no_unit_and_is_written_again(asked: LabelJob, name: str) -> None:
    written, before, run = records(asked.out), contents(asked.out), Run.open(asked.out)
    flip(asked.out / name, 50)
    assert verify(asked.out, repair=True).undone == 0
    result = generate(asked)
    assert (result.accounts, result.done) == (Accounts(SAMPLES, SAMPLES, 0, 0), 0)
    assert records(asked.out) == written
    assert Run.open(asked.out) == replace(run, fence=Fence(run.fence.number + 2))  # the repair, and the call after it
    several = {"progress.json": b"", ".lock": b"", "run.json": b""}
    assert {**contents(asked.out), **several} == {**before, **several}


# --- what readers are given -------------------------------------------------------------------------------------------


def test_readers_are_never_given_a_label_that_nobody_vouches_for(asked: LabelJob) -> None:
    run, lost = asked.out, samples_of(asked.out, SECOND)
    whole = Run.open(run).labels
    for read in (whole.__getitem__, lambda name: whole.crop(name, (0, 0, 1, 1))):
        with pytest.raises(KeyError, match="never heard of"):
            read("never heard of")
    file = _of_the_second_unit(run)
    kept = file.rename(run / "elsewhere")
    for read in (whole.__getitem__, lambda name: whole.crop(name, (0, 0, 1, 1))):
        with pytest.raises(DamagedLabel, match=re.escape(file.name)):
            read(lost[2])
    kept.rename(file)
    (run / "units" / SECOND).unlink()  # the labels lie there, but the unit is not committed
    left = Run.open(run).labels
    assert set(left) == set(whole) - set(lost)
    for name in lost:
        with pytest.raises(KeyError, match=name):
            left[name]
        with pytest.raises(KeyError, match=name):
            left.crop(name, (0, 0, 1, 1))
