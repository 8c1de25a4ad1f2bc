"""The records of whole units in a row become a chapter in the course of a run; killed anywhere, no record is lost."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import buckets
import pytest
from conftest import autolabel, contents, labels_of, outcome, photograph, scanned
from drive import NAMES, draw_drive, drive_job
from test_killed import dying

from autolabel.manifests import storage
from autolabel.manifests.locations import location
from autolabel.manifests.run import chapters
from autolabel.manifests.run.folder import Accounts, Run
from autolabel.manifests.run.ledger import Ledger
from autolabel.manifests.tables import BadTable
from autolabel.pipeline import prepare
from autolabel.pipeline.job import LabelJob, Portion
from autolabel.pipeline.records import read_rows, tally, tally_of
from autolabel.pipeline.run import generate
from autolabel.pipeline.verify import Verification, verify

ALL = Accounts(7, 7, 0, 0)
WHOLE = Verification(units=7, samples=7, labels=7, images=7)
CLOSED = ["chapters/00000.records", "chapters/00001.records", "units/b512x512.000006.0.parquet"]


@pytest.fixture(scope="module")
def originals(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven street images, each a unit, their manifest, a teacher, and a finished run `plain` without chapters."""
    made = draw_drive(city, teacher, tmp_path_factory.mktemp("originals"))
    generate(job(made, "plain"))
    return made


@pytest.fixture
def place(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as copies, and chapters of three units."""
    monkeypatch.setattr(chapters, "UNITS_OF_A_CHAPTER", 3)
    return Path(shutil.copytree(originals, tmp_path / "place"))


def job(place: Path, run: str = "run", **settings: object) -> LabelJob:
    return drive_job(place, run, unit_size=1, **settings)


def records(run: Path) -> list[str]:
    return [name for name in contents(run) if name.startswith(("chapters/", "units/"))]


def require_like(place: Path, run: Path) -> None:
    assert labels_of(run) == labels_of(place / "plain")
    assert verify(run) == WHOLE
    assert Run.open(run).accounts == ALL


def test_chapters_are_closed_in_the_course_of_a_run_and_nothing_is_done_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = generate(job(place)).run.path
    assert records(run) == CLOSED
    require_like(place, run)
    ledger = Ledger(run)
    rows = [row for name in list(ledger)[:3] for row in read_rows(ledger[name])]
    assert tally_of(ledger.chapters[0].sum()) == tally(rows)
    before = contents(run)
    looked: list[str] = []
    real = prepare.committed
    monkeypatch.setattr(
        prepare, "committed", lambda run, unit, *a, **k: looked.append(unit.name) or real(run, unit, *a, **k)
    )
    assert outcome(generate(job(place))) == (ALL, 0, {}, False)
    assert looked == ["b512x512.000006"]  # closed units are taken from their chapters, and their images not looked at
    assert {name: data for name, data in contents(run).items() if name in before and name != "progress.json"} == {
        name: data for name, data in before.items() if name != "progress.json"
    }


def test_units_that_other_calls_have_made_whole_are_closed_by_the_next_one(place: Path) -> None:
    for part in ((1, 2), (2, 2)):
        generate(job(place, portion=Portion(part=part)))
    generate(job(place))
    assert records(place / "run") == CLOSED
    require_like(place, place / "run")


@pytest.mark.parametrize(
    "where",
    [
        ("create", r"chapters/\.00000\."), ("link", r"chapters/00000\."), ("unlink", r"units/b512x512\.000000\.0"),
        ("unlink", r"units/b512x512\.000002\.0"), ("create", r"chapters/\.00001\."),
        ("create", r"stats/review\.parquet/\.00000"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_kill_at_any_step_of_a_chapter_loses_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[str, str]
) -> None:
    with dying(monkeypatch, where=where) as process:
        generate(job(place))
    assert process.dead
    committed = labels_of(place / "run")
    assert committed.items() <= labels_of(place / "plain").items() and len(committed) >= 3
    ended = generate(job(place))
    assert ended.done == 7 - len(committed)
    assert records(place / "run") == CLOSED
    require_like(place, place / "run")


def test_a_repaired_unit_of_a_chapter_counts_in_its_later_generation(place: Path) -> None:
    run = generate(job(place)).run.path
    chapter = (run / CLOSED[0]).read_bytes()
    shard = run / "labels.zarr" / "b512x512" / "c.1.0.0"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert verify(run, repair=True).undone == 1
    assert sorted(labels_of(run)) == sorted({*NAMES} - {"s03"})
    assert outcome(generate(job(place))) == (ALL, 1, {}, False)
    assert records(run) == [*CLOSED[:2], "units/b512x512.000001.2.parquet", CLOSED[2]]
    assert (run / CLOSED[0]).read_bytes() == chapter
    require_like(place, run)


def test_a_quarantined_image_of_a_chapter_that_is_replaced_is_labelled(place: Path) -> None:
    image = place / "drive" / "s05.png"
    good = image.read_bytes()
    image.write_bytes(good[:1000])
    run = generate(job(place, max_quarantined=1.0)).run.path
    assert (records(run), Run.open(run).accounts) == (CLOSED, Accounts(7, 6, 1, 0))
    assert generate(job(place, max_quarantined=1.0)).done == 0
    assert generate(job(place, max_quarantined=1.0, portion=Portion(retry_quarantined=True))).done == 1
    image.write_bytes(good)
    assert outcome(generate(job(place))) == (ALL, 1, {}, False)
    require_like(place, run)


def test_new_images_of_a_grown_manifest_lie_behind_the_chapters(place: Path, city: Path) -> None:
    run = generate(job(place)).run.path
    photograph(city, place / "drive", [*NAMES, "s20", "s21"])
    scanned(city, place / "drive")
    assert generate(job(place)).accounts == Accounts(9, 9, 0, 0)
    assert records(run) == [*CLOSED[:2], "chapters/00002.records"]


@pytest.mark.parametrize("part", ["the index", "a record", "the end"])
def test_a_flipped_bit_of_a_chapter_is_named_and_repaired(place: Path, part: str) -> None:
    run = generate(job(place)).run.path
    file = run / CLOSED[0]
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[-16:-8], "little")
    data[{"the index": len(data) - 16 - length // 2, "a record": 500, "the end": len(data) - 3}[part]] ^= 4
    file.write_bytes(data)
    with pytest.raises(BadTable, match=f"{file} is damaged"):
        labels_of(run)
    result = autolabel("verify", run)
    assert result.exit_code == 2 and f"damaged: {file} is damaged (" in result.stdout
    assert autolabel("verify", run, "--repair").exit_code == 0
    assert generate(job(place)).done == (1 if part == "a record" else 3)
    require_like(place, run)


def test_a_chapter_that_cannot_be_written_costs_a_note(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, notes = storage.create, list[str]()

    def create(path: Path, data: bytes) -> bool:
        if path.suffix == ".records":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, data)

    monkeypatch.setattr(storage, "create", create)
    run = generate(job(place), on_note=notes.append).run.path
    assert [note for note in notes if note.startswith("chapter 1 was not written, the next call tries again: ")]
    assert len(Ledger(run)) == 7 and not (run / "chapters").exists()
    require_like(place, run)


def test_a_run_in_a_bucket_costs_two_writes_a_unit_and_at_most_two_reads(place: Path) -> None:
    """One shard and one record; when its chapter is closed the record is read and the shard's size asked."""
    with buckets.place() as server:
        run = location(f"{server.url}/run")
        assert generate(job(place, portion=Portion(limit=1), out=run)).accounts == Accounts(7, 1, 0, 6)
        begun = len(server.proxy.passed)
        assert generate(job(place, out=run)).accounts == ALL
        calls = Counter((one.operation, of) for one in server.proxy.passed[begun:] if (of := unit_of(one.key)))
        assert labels_of(run) == labels_of(place / "plain")
        assert sorted(path.name for path in storage.list(run / "chapters")) == ["00000.records", "00001.records"]
        assert [path.name for path in storage.list(run / "units")] == ["b512x512.000006.0.parquet"]
        assert verify(run) == WHOLE
    writes = {of: n for (operation, of), n in calls.items() if operation in ("create", "replace", "put")}
    assert writes == {f"{kind} {number}": 1 for kind in ("record", "shard") for number in range(1, 7)}
    read = Counter(of for operation, of in calls.elements() if operation not in ("create", "replace", "put"))
    assert {of: read[of] for of in writes} == {of: 1 for of in writes} | {"shard 6": 0}  # unit 6 is in no chapter


def unit_of(key: str) -> str | None:
    """The shard or record of a key, by the number of its unit."""
    name = re.search(r"units/b512x512\.0*(\d+)\.\d+\.parquet$|labels\.zarr/b512x512/c\.(\d+)\.", key)
    return None if name is None else f"record {name[1]}" if name[1] else f"shard {name[2]}"
