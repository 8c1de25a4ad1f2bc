"""A small file of a run is damaged, or from a stranger: one line names it; where it is no truth, nothing happens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import pytest
from click.testing import Result
from conftest import autolabel, labels_of

from autolabel.manifests import storage

RUBBISH = {
    "empty": b"",
    "an object": b"{}",
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "cut": b'{"updated": "2026-',
    "no UTF-8": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "a number of 400 digits": b'{"updated": 1' + b"0" * 400 + b"}",
    "a number of 9000 digits": b"9" * 9000,
    "infinite": b'{"updated": Infinity, "notes": [NaN]}',
    "of other types": b'{"updated": [1], "truth": 5, "classes": {}, "format": {}, "attempt": [1], "sample": 5}',
    "NUL": b'{"updated": "\\u0000\\ud800", "attempt": "\\u0000", "sample": "\\ud800", "ended": 1}',
}


@pytest.fixture(scope="module")
def run(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    made = generate(city, teacher, out)
    assert made.exit_code == 0, made.output
    return out


def generate(city: Path, teacher: Path, out: Path) -> Result:
    return autolabel("generate", city / "coarse.parquet", "--teacher", teacher, "--out", out, "--engine", "local",
                     "--scales", "1", "--limit", 4, "--unit-size", 2)  # fmt: skip


@pytest.fixture
def mine(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def one_line(result: Result) -> str:
    assert result.exit_code == 2, result.output
    *_, line = result.stderr.splitlines()
    assert line.startswith("autolabel: ") and len(line) < 600
    return line.removeprefix("autolabel: ")


def test_counters_that_cannot_be_read_are_unknown(mine: Path) -> None:
    for content in RUBBISH.values():
        (mine / "progress.json").write_bytes(content)
        report = autolabel("report", mine, "--images", 1)
        assert report.exit_code == 0, report.output
        assert "Last label on" not in (mine / "report" / "index.html").read_text()


@pytest.mark.parametrize("kind", RUBBISH)
def test_the_record_of_an_audit_that_cannot_be_read_is_named_with_the_way_to_a_new_one(kind: str, mine: Path) -> None:
    (mine / "audit.json").write_bytes(RUBBISH[kind])
    line = one_line(autolabel("report", mine, "--images", 1))
    assert line.startswith(f"{mine}/audit.json") and line.endswith("run `autolabel audit` again")


@pytest.mark.parametrize("kind", RUBBISH)
def test_a_description_of_a_run_that_cannot_be_read_is_named_by_every_command(
    kind: str, mine: Path, city: Path, teacher: Path
) -> None:
    (mine / "run.json").write_bytes(RUBBISH[kind])
    for result in (
        autolabel("report", mine), autolabel("verify", mine), autolabel("diff", mine, mine),
        autolabel("audit", mine, "--truth", city / "fine.parquet"), generate(city, teacher, mine),
    ):  # fmt: skip
        line = one_line(result)
        assert f"{mine}/run.json" in line and line.endswith("choose another --out")


FORGED: dict[str, Callable[[dict[str, object]], object]] = {
    "accounts of words": lambda d: d.update(accounts={"asked": "4", "labelled": 4, "quarantined": 0, "left": 0}),
    "accounts with more": lambda d: d.update(accounts={"asked": 4, "labelled": 4, "quarantined": 0, "left": 0, "x": 1}),
    "a plan that is a number": lambda d: d.update(plan=5),
    "a plan that is missing": lambda d: d.pop("plan"),
    "budgets that are a text": lambda d: d.update(budgets="abc"),
    "versions that are a list": lambda d: d.update(versions=[]),
    "a teacher with NUL": lambda d: d.update(teacher="\0"),
    "tables that are numbers": lambda d: d.update(tables_sha256={"manifest.parquet": 5}),
    "a recipe that is a list": lambda d: d.update(recipe=[]),
    "scales that are words": lambda d: d["recipe"].update(scales=["1"]),  # type: ignore[attr-defined]
    "a policy that is null": lambda d: d["recipe"].update(policy=None),  # type: ignore[attr-defined]
    "a label space of numbers": lambda d: d["recipe"].update(label_space={"labels": [1]}),  # type: ignore[attr-defined]
    "a unit size that is true": lambda d: d["recipe"].update(unit_size=True),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_description_with_a_right_checksum_is_one_line_too(kind: str, mine: Path) -> None:
    document = json.loads((mine / "run.json").read_text())
    del document["crc32c"]
    FORGED[kind](document)
    checksum = f"{google_crc32c.value(json.dumps(document, sort_keys=True).encode()):08x}"
    storage.write_json(mine / "run.json", {**document, "crc32c": checksum})
    for command in ("verify", "report"):
        assert f"{mine}/run.json is damaged (it" in one_line(autolabel(command, mine))


@pytest.mark.parametrize("kind", RUBBISH)
def test_notes_that_cannot_be_read_make_the_next_process_careful_and_nothing_else(
    kind: str, mine: Path, run: Path, city: Path, teacher: Path
) -> None:
    unit = sorted((mine / "units").iterdir())[0]
    unit.unlink()
    (mine / "attempts").mkdir(exist_ok=True)
    (mine / "attempts" / f"{unit.stem.removesuffix('.0')}.jsonl").write_bytes(RUBBISH[kind] + b"\n")
    made = generate(city, teacher, mine)
    assert made.exit_code == 0, made.output
    assert labels_of(mine) == labels_of(run)
    assert not list((mine / "attempts").iterdir())
