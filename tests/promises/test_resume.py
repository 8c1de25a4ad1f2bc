"""A run goes on where it was left: what is done is known by content, and several drivers share it in parts.

If this fails, images are labelled twice or never, labels of two teachers are mixed, or one is that of another image.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import autolabel, contents, labels_of, outcome, photograph, scanned
from drive import NAMES, draw_drive, drive_job
from PIL import Image

from autolabel.manifests.policy import Policy
from autolabel.manifests.run.folder import Accounts, Run, RunFolder
from autolabel.manifests.samples import load_manifest
from autolabel.manifests.tables import BadTable
from autolabel.pipeline import lock
from autolabel.pipeline.job import STORES, LabelJob, Portion
from autolabel.pipeline.preview import preview
from autolabel.pipeline.run import Labelling, generate
from autolabel.pipeline.verify import verify

TABLES = tuple(RunFolder(Path()).table_paths())
LIVE = ("progress.json", ".lock")  # written by every call


def job(place: Path, run: str, **settings: object) -> LabelJob:
    """What the run folder `place`/`run` is asked for; `run` begins with the name of its store."""
    return drive_job(place, run, **{"store": run[:4].removesuffix("-"), **settings})


@pytest.fixture(scope="module")
def originals(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven street images, their manifest, a teacher, and finished runs `zarr` and `png`."""
    made = draw_drive(city, teacher, tmp_path_factory.mktemp("originals"))
    for store in STORES:
        generate(job(made, store))
    return made


@pytest.fixture
def place(originals: Path, tmp_path: Path) -> Path:
    """The same as copies, so that a test may change them."""
    return Path(shutil.copytree(originals, tmp_path / "place"))


def about(asked: LabelJob) -> dict[str, object]:
    return dict(json.loads((asked.out / "run.json").read_text()))


def records(asked: LabelJob) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (asked.out / "units").iterdir()}


def written(run: Path) -> dict[str, tuple[bytes, int]]:
    """What a run folder holds, and when it was written; without what every call writes."""
    return {name: (data, (run / name).stat().st_mtime_ns) for name, data in contents(run).items() if name not in LIVE}


def published(asked: LabelJob) -> list[str]:
    return list(pq.read_table(asked.out / "manifest.parquet")["sample_id"].to_pylist())


def options(asked: LabelJob, *more: object) -> list[str]:
    """The command line that asks for the same."""
    return [
        "generate", str(asked.manifest), "--teacher", str(asked.teacher), "--out", str(asked.out),
        "--scales", "1", "--engine", "local", "--unit-size", str(asked.unit_size), "--store", asked.store,
        *map(str, more),
    ]  # fmt: skip


# --- nothing is done twice --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", STORES)
def test_the_same_call_again_does_nothing_and_writes_nothing(place: Path, store: str) -> None:
    asked = job(place, store)
    generate(asked)  # the folder was copied here: the run says now where its images are
    before = written(asked.out)
    result = autolabel(*options(asked))
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == (
        "7 samples: 7 labelled, 0 quarantined, 0 left for later; nothing was to be done"
    )
    assert written(asked.out) == before


@pytest.mark.parametrize("store", STORES)
def test_a_grown_manifest_labels_only_what_is_new(place: Path, city: Path, store: str) -> None:
    asked = job(place, store)
    before, done = labels_of(asked.out), records(asked)
    photograph(city, place / "drive", [*NAMES, "s00", "s04", "s99"])  # before, between and behind the others
    scanned(city, place / "drive")
    assert outcome(generate(asked)) == (Accounts(10, 10, 0, 0), 3, {}, False)
    assert records(asked).items() > done.items()
    after = labels_of(asked.out)
    assert after.items() > before.items() and after.keys() - before.keys() == {"s00", "s04", "s99"}
    assert sorted(published(asked)) == sorted(after)
    assert verify(asked.out).faults == []
    at_once = replace(asked, out=place / "at once")
    generate(at_once)
    assert labels_of(at_once.out) == after
    assert generate(asked).done == 0


@pytest.mark.parametrize("store", STORES)
def test_a_plan_that_is_lost_after_the_manifest_has_grown_moves_no_label(place: Path, city: Path, store: str) -> None:
    """Planned afresh, samples come to other units and other rows; a crop must not be that of the row's old owner."""
    asked = job(place, f"{store}-alone", unit_size=64)
    generate(asked)
    photograph(city, place / "drive", [*NAMES, "s00", "s04", "s99"])
    scanned(city, place / "drive")
    generate(asked)
    before = labels_of(asked.out)
    next(asked.out.glob("plan-*.arrow")).unlink()
    with pytest.raises(BadTable, match="`autolabel verify --repair` makes it again from the manifest"):
        generate(asked)
    verify(asked.out, repair=True)
    assert generate(asked).accounts == Accounts(10, 10, 0, 0)
    labels = Run.open(asked.out).labels
    assert {name: labels.crop(name, (0, 0, 96, 192)).tobytes() for name in labels} == before
    assert labels_of(asked.out) == before
    assert generate(asked).done == 0
    assert verify(asked.out, repair=True).undone == 0
    assert verify(asked.out).faults == []


# --- nothing is mixed -------------------------------------------------------------------------------------------------


def _lose_a_sample(place: Path, city: Path) -> None:
    (place / "drive" / "s03.png").unlink()
    scanned(city, place / "drive")


def _resize_a_sample(place: Path, city: Path) -> None:
    image = place / "drive" / "s03.png"
    Image.open(image).resize((64, 32)).save(image)
    scanned(city, place / "drive")


def _change_an_image(place: Path, city: Path) -> None:
    shutil.copyfile(place / "drive" / "s05.png", place / "drive" / "s03.png")


def _train_on(place: Path, city: Path) -> None:
    loaded = torch.load(place / "teacher.pt", weights_only=True)
    loaded["state_dict"]["ocr.cls_head.bias"] += 1
    torch.save(loaded, place / "teacher.pt")


def _nothing(place: Path, city: Path) -> None:
    pass


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (_lose_a_sample, {}, r"1 samples of this run are not in .*drive\.parquet any more \(the first is 's03'\)"),
        (_resize_a_sample, {}, r"sample 's03' of .*drive\.parquet has changed .*\(height was 96, now 32\)"),
        (_change_an_image, {}, r"image .*/drive/s03\.png has changed since it was labelled"),
        (_train_on, {}, r"\(teacher was \"\w+…\w+\", now \"\w+…\w+\"\)"),
        (_nothing, {"policy": Policy(threshold=0.9)}, r"\(policy: threshold was 0\.5, now 0\.9\)"),
        (_nothing, {"precision": "bfloat16"}, r'\(precision was "float32", now "bfloat16"\)'),
    ],
    ids=["sample gone", "sample resized", "image changed", "teacher", "threshold", "precision"],
)
def test_a_changed_request_is_refused_with_the_difference_and_nothing_is_written(
    place: Path, city: Path, store: str, change: Callable[[Path, Path], None], settings: dict[str, object], message: str
) -> None:
    asked = job(place, store, **settings)
    before = written(asked.out)
    change(place, city)
    with pytest.raises(ValueError, match=message):
        generate(asked)
    assert written(asked.out) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace('"threshold": 0.5', '"threshold": 0.6'), "differs from what was written"),
        (lambda text: text.replace('"labelled": 7', '"labelled": 6'), "differs from what was written"),
        (lambda text: text.replace("{", "[", 1), "is no JSON, or cut off"),
        (lambda text: text[: len(text) // 2], "is no JSON, or cut off"),
        (lambda text: "", "is empty"),
        (lambda text: "7", "is 7: expected an object"),
        (lambda text: text.replace("autolabel-run/10", "autolabel-run/1"), "has format 'autolabel-run/1'"),
    ],
    ids=["threshold", "accounts", "bracket", "half", "empty", "a number", "format"],
)
def test_a_run_json_that_is_not_as_it_was_written_is_refused(
    place: Path, damage: Callable[[str], str], message: str
) -> None:
    asked = job(place, "zarr")
    path = asked.out / "run.json"
    path.write_text(damage(path.read_text()))
    before = written(asked.out)
    for command in (options(asked), options(asked, "--dry-run"), ["verify", asked.out]):
        result = autolabel(*command)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"autolabel: {path} {message}")
        assert len(result.stderr.splitlines()) == 1
    assert written(asked.out) == before


# --- a part of it -----------------------------------------------------------------------------------------------------


def test_limit_counts_from_the_first_sample_and_can_grow(place: Path) -> None:
    asked = job(place, "zarr-limited")
    for limit, done in ((2, 2), (2, 0), (5, 3), (1, 0), (None, 2)):
        result = generate(replace(asked, portion=Portion(limit=limit)))
        labelled = len(labels_of(asked.out))
        assert (result.accounts, result.done) == (Accounts(7, labelled, 0, 7 - labelled), done)
        assert sorted(labels_of(asked.out)) == NAMES[:labelled] == published(asked)
        assert about(asked)["state"] == ("complete" if labelled == 7 else "partial")
    assert labels_of(asked.out) == labels_of(job(place, "zarr").out)


def test_only_labels_what_fits_and_leaves_the_rest(place: Path) -> None:
    asked = job(place, "zarr-only")
    result = generate(replace(asked, portion=Portion(only="s0[37]")))
    assert outcome(result) == (Accounts(7, 2, 0, 5), 2, {}, False)
    assert sorted(labels_of(asked.out)) == ["s03", "s07"]
    result = generate(replace(asked, portion=Portion(only="s*", limit=3)))  # s01, s03 and s05
    assert result.accounts == Accounts(7, 4, 0, 3)
    assert generate(replace(asked, portion=Portion(only="t*"))).done == 0
    assert outcome(generate(asked)) == (Accounts(7, 7, 0, 0), 3, {}, False)
    assert labels_of(asked.out) == labels_of(job(place, "zarr").out)


@pytest.mark.parametrize("store", STORES)
def test_a_unit_that_was_done_in_two_calls_has_the_bytes_of_one(place: Path, store: str) -> None:
    """The first call stops inside the second unit; the other keeps its labels and writes the shard again."""
    asked, whole = job(place, f"{store}-cut"), job(place, store)
    generate(replace(asked, portion=Portion(limit=4)))
    first = records(asked)
    assert generate(asked).done == 3
    assert records(asked)["b512x512.000000.0.parquet"] == first["b512x512.000000.0.parquet"]
    here, there = contents(asked.out), contents(whole.out)
    labels = [name for name in there if name.startswith("labels") and not name.endswith(".json")]
    assert len(labels) == (3 if store == "zarr" else 7)
    assert {name: here[name] for name in labels} == {name: there[name] for name in labels}
    assert verify(asked.out).faults == []


@pytest.mark.parametrize("unit_size", [1, 2, 7, 64, 256])
def test_labels_are_the_same_whatever_the_units(place: Path, unit_size: int) -> None:
    asked = job(place, "zarr-other", unit_size=unit_size)
    generate(asked)
    assert labels_of(asked.out) == labels_of(job(place, "zarr").out)
    assert len(records(asked)) == -(-7 // unit_size)


def test_run_json_tells_what_was_asked_and_how_far_it_is(place: Path) -> None:
    asked = job(place, "zarr-told", limit=3)
    generate(asked)
    part = about(asked)
    assert (part["state"], part["accounts"]) == (
        "partial", {"asked": 7, "labelled": 3, "quarantined": 0, "left": 4},
    )  # fmt: skip
    generate(replace(asked, portion=Portion()))
    whole = about(asked)
    assert (whole["state"], whole["accounts"]) == (
        "complete", {"asked": 7, "labelled": 7, "quarantined": 0, "left": 0},
    )  # fmt: skip
    for told in (part, whole):
        assert set(told["tables_sha256"]) == set(TABLES)  # type: ignore[call-overload]
    assert part["recipe"] == whole["recipe"] and part["input_manifest"] == whole["input_manifest"]
    recipe = Run.open(asked.out).recipe
    assert (recipe.scales, recipe.policy.threshold, recipe.unit_size) == ((1.0,), 0.5, 3)
    assert whole["input_manifest"] == str(place / "drive.parquet")


# --- parts for several machines --------------------------------------------------------------------------------------


def require_like_one_run(asked: LabelJob, place: Path) -> None:
    whole = job(place, "zarr")
    assert labels_of(asked.out) == labels_of(whole.out)
    assert published(asked) == published(whole)
    assert about(asked)["state"] == "complete"
    assert about(asked)["accounts"] == about(whole)["accounts"]
    assert verify(asked.out).faults == []


def test_parts_one_after_the_other_give_the_labels_of_a_whole_run(place: Path) -> None:
    asked = job(place, "zarr-parts")
    for number, done in ((1, 3), (2, 3), (3, 1)):
        assert generate(replace(asked, portion=Portion(part=(number, 3)))).done == done
    require_like_one_run(asked, place)
    before = written(asked.out)
    assert generate(asked).done == 0
    assert written(asked.out) == before


def test_parts_at_the_same_time_give_the_labels_of_a_whole_run(place: Path) -> None:
    asked = job(place, "zarr-parts", unit_size=1)
    commands = [[sys.executable, "-m", "autolabel.cli", *options(asked, "--part", f"{n}/2")] for n in (1, 2)]
    processes = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert any("7 samples: 7 labelled, 0 quarantined, 0 left for later" in out for out, _ in told)
    require_like_one_run(asked, place)


def meanwhile(asked: LabelJob, other: Callable[[], None]) -> Labelling:
    """Do what is asked; when its first unit is committed, `other` happens."""
    happened: list[bool] = []

    def on_progress(now: object) -> None:
        if not happened and list((asked.out / "units").glob("*.parquet")):
            happened.append(True)
            other()

    result = generate(asked, on_progress=on_progress)
    assert happened
    return result


def test_a_part_that_ends_first_leaves_the_run_open(place: Path) -> None:
    asked = job(place, "zarr-parts", unit_size=1)  # units 0, 2, 4, 6 and 1, 3, 5
    first, second = replace(asked, portion=Portion(part=(1, 2))), replace(asked, portion=Portion(part=(2, 2)))
    ended: list[object] = []
    result = outcome(meanwhile(first, lambda: ended.append(outcome(generate(second)))))
    assert ended == [(Accounts(7, 4, 0, 3), 3, {}, False)]
    assert result == (Accounts(7, 7, 0, 0), 4, {}, False)
    require_like_one_run(asked, place)


def test_a_part_that_dies_after_its_last_unit_is_accounted_for_by_the_next_call(place: Path) -> None:
    """The other part has published without it; nothing is left to label, but the tables are not up to date."""
    asked = job(place, "zarr-parts", unit_size=1)
    first, second = replace(asked, portion=Portion(part=(1, 2))), replace(asked, portion=Portion(part=(2, 2)))

    class Died(Exception):
        pass

    def die_at_the_end(now: object) -> None:
        committed = len(list((asked.out / "units").glob("*.parquet")))
        if committed == 2:
            generate(second)
        if committed == 7:
            raise Died

    with pytest.raises(Died):
        generate(first, on_progress=die_at_the_end)
    assert len(labels_of(asked.out)) == 7
    assert outcome(generate(asked)) == (Accounts(7, 7, 0, 0), 0, {}, False)
    require_like_one_run(asked, place)


def test_the_same_part_twice_at_once_is_refused_naming_the_process(place: Path) -> None:
    asked = job(place, "zarr-parts", part=(1, 2))

    def again() -> None:
        with pytest.raises(ValueError) as refusal:
            generate(asked)
        assert re.fullmatch(
            rf"another autolabel is at work in {re.escape(str(asked.out))} \(process {os.getpid()} on .* since .*\):"
            " wait for it, or stop it",
            str(refusal.value),
        )

    assert meanwhile(asked, again).done == 4


def test_a_whole_run_and_a_part_of_it_exclude_each_other(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_SETUP_SECONDS", 0.2)  # a part waits as long for another one that is setting up
    asked = job(place, "zarr-parts", unit_size=1)
    part = replace(asked, portion=Portion(part=(1, 2)))

    def refuse(other: LabelJob) -> Callable[[], None]:
        def check() -> None:
            with pytest.raises(ValueError, match=rf"another autolabel is at work in .*process {os.getpid()} on "):
                generate(other)

        return check

    assert meanwhile(part, refuse(asked)).done == 4
    assert meanwhile(asked, refuse(replace(asked, portion=Portion(part=(2, 2))))).done == 3
    require_like_one_run(asked, place)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0/3", "part 0/3: expected I/N with I from 1 to N"),
        ("4/3", "part 4/3: expected I/N with I from 1 to N"),
        ("1/0", "part 1/0: expected I/N with I from 1 to N"),
        ("x", "--part x: expected I/N, such as 2/8 for the second of eight"),
        ("1/2/3", "--part 1/2/3: expected I/N, such as 2/8 for the second of eight"),
        ("", "--part : expected I/N, such as 2/8 for the second of eight"),
    ],
)
def test_a_part_outside_1_to_n_is_refused(place: Path, text: str, message: str) -> None:
    asked = job(place, "zarr-none")
    result = autolabel(*options(asked, "--part", text))
    assert (result.exit_code, result.stderr) == (2, f"autolabel: {message}\n")
    assert not asked.out.exists()


# --- told beforehand --------------------------------------------------------------------------------------------------


def told(asked: LabelJob, *more: object) -> dict[str, str]:
    """The lines of `generate --dry-run` by their first word; the table of workers as one."""
    result = autolabel(*options(asked, "--dry-run", "--device", "cpu", *more))
    assert result.exit_code == 0, result.output
    lines, _, table = result.stdout.partition("\nexpected, if workers do not hold each other up\n")
    found = {line[:8].strip(): line[8:] for line in lines.splitlines()}
    return found | ({"workers": " ".join(table.split())} if table else {})


def test_the_plan_of_a_new_run_tells_what_it_would_take_and_writes_nothing(place: Path, city: Path) -> None:
    (place / "drive" / "broken.png").write_bytes(b"")
    scanned(city, place / "drive")
    asked = job(place, "zarr-planned")
    found = told(asked)
    assert not asked.out.exists()
    assert found["images"] == "8 (192 x 96: 7, unreadable: 1)"
    assert found["units"] == "4 of up to 3 images, 4 of them left"
    assert found["done"] == "0 images; this call would do 8"
    assert found["device"] == "cpu, float32"
    number, size = r"\d+\.\d", r"[\d.]+ [kM]?B"
    assert re.fullmatch(rf"\S+ k?B a pixel, {number} GB free; images at once: \d+ of 96x192", found["memory"])
    assert re.fullmatch(rf"{size} each, {size} to come", found["labels"])
    assert re.fullmatch(
        r"7 images, \d+\.\d\d images/s by one worker; each decode \d+ ms, infer \d+ ms, encode \d+ ms", found["probe"]
    )
    assert re.fullmatch(rf"workers images/s time ─+ 1 {number} \d+ s", found["workers"])


def test_the_plan_shows_how_many_images_of_the_trial_are_done(place: Path) -> None:
    heard: list[tuple[int, int]] = []
    preview(job(place, "zarr-planned"), progress=lambda done, total: heard.append((done, total)))
    assert heard == [(n, 7) for n in range(8)]
    shown = autolabel(*options(job(place, "zarr-planned"), "--dry-run", "--device", "cpu"))
    assert "labelling a few on trial: 7/7" in shown.stderr


def test_the_plan_of_a_run_tells_what_is_done(place: Path, city: Path) -> None:
    asked = job(place, "zarr-planned")
    generate(replace(asked, portion=Portion(limit=4)))
    before = written(asked.out)
    found = told(asked)
    assert (found["units"], found["done"]) == (
        "3 of up to 3 images, 2 of them left", "4 images; this call would do 3",
    )  # fmt: skip
    assert told(asked, "--limit", 5)["done"] == "4 images; this call would do 1"
    assert told(asked, "--part", "3/3")["done"] == "4 images; this call would do 1"
    photograph(city, place / "drive", [*NAMES, "s99"])
    scanned(city, place / "drive")
    found = told(asked)
    assert (found["images"], found["done"]) == ("8 (192 x 96: 8)", "4 images; this call would do 4")
    assert written(asked.out) == before


@pytest.mark.parametrize("store", STORES)
def test_the_plan_of_a_finished_run_needs_no_probe(place: Path, store: str) -> None:
    asked = job(place, store)
    before = written(asked.out)
    assert told(asked) == {
        "images": "7 (192 x 96: 7)",
        "units": "3 of up to 3 images, 0 of them left",
        "done": "7 images; this call would do 0",
        "device": "cpu, float32",
    }
    assert written(asked.out) == before


def test_a_plan_of_another_request_is_refused_like_the_run_itself(place: Path) -> None:
    asked = job(place, "zarr")
    result = autolabel(*options(asked, "--dry-run", "--threshold", 0.9))
    assert result.exit_code == 2
    assert "policy: threshold was 0.5, now 0.9" in result.stderr


def test_the_labels_are_those_of_the_manifests_images(place: Path) -> None:
    """What all comparisons above rest upon: every sample has its own label."""
    asked = job(place, "zarr")
    assert [s.sample_id for s in load_manifest(asked.manifest).samples] == NAMES == published(asked)
    assert len(set(labels_of(asked.out).values())) == len(NAMES)
