"""Labels that people have edited, or put, in a run's folder of PNGs are told from damage and are never overwritten.

If this fails, an hour of somebody's work is gone, byte for byte, by the command that the program itself advises.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import autolabel, contents, labels_of, refused
from drive import NAMES, draw_drive, drive_job
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests.images import encode_label
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.run.labels import ChangedLabel
from autolabel.manifests.run.ledger import Commit
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.run.shards import crc32c
from autolabel.manifests.samples import Manifest, load_manifest, save_manifest
from autolabel.pipeline.attempts import Attempt
from autolabel.pipeline.by_hand import set_aside, write_maps
from autolabel.pipeline.job import LabelJob, Portion
from autolabel.pipeline.run import generate
from autolabel.pipeline.units import Unit
from autolabel.pipeline.verify import verify

SAME = ("--store", "png", "--keep-confidence", 8, "--scales", "1", "--unit-size", 3, "--engine", "local")


@pytest.fixture(scope="module")
def originals(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven street images, their manifest, a teacher, and a finished run of PNGs, `run`, that keeps confidence."""
    made = draw_drive(city, teacher, tmp_path_factory.mktemp("by_hand"))
    generate(job(made))
    return made


@pytest.fixture
def place(originals: Path, tmp_path: Path) -> Path:
    """The same as copies, so that a test may change them."""
    return Path(shutil.copytree(originals, tmp_path / "place"))


@pytest.fixture
def bare(place: Path) -> Path:
    """The same without the run."""
    shutil.rmtree(place / "run")
    return place


def job(place: Path, run: str = "run", **settings: object) -> LabelJob:
    return drive_job(place, run, **{"store": "png", "keep_confidence": 8, **settings})


def plain(place: Path, **settings: object) -> LabelJob:
    """A job whose run keeps no confidence."""
    return job(place, **{"keep_confidence": None, **settings})


def png(place: Path, name: str) -> Path:
    return place / "run" / "labels" / f"{name}.png"


def edit(file: Path, mode: str = "L") -> bytes:
    """Paint a car over the upper left corner as a labelling tool would, and save it; returns the file's bytes."""
    ids = painted(file)
    picture = Image.fromarray(ids)
    if mode == "RGB":
        colours = np.frombuffer(CITYSCAPES.palette, np.uint8).reshape(256, 3)
        picture = Image.fromarray(np.where((ids == 255)[..., None], 0, colours[ids]).astype(np.uint8))
    elif mode == "P":
        picture.putpalette(CITYSCAPES.palette)
    picture.save(file)
    return file.read_bytes()


def painted(file: Path) -> NDArray[np.uint8]:
    ids = np.asarray(Image.open(file)).copy()
    ids[:20, :30] = CITYSCAPES.names.index("car")
    ids[:5, :5] = 255
    return ids


def by_hand(place: Path) -> dict[str, bytes]:
    folder = place / "run" / "by-hand"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def fixed(place: Path, edited: Mapping[str, bytes]) -> Path:
    """A manifest of corrections with these label PNGs, in a folder of its own."""
    run = load_manifest(place / "run" / "manifest.parquet")
    folder = place / "fixed" / "labels"
    folder.mkdir(parents=True)
    for name, data in edited.items():
        (folder / f"{name}.png").write_bytes(data)
    samples = tuple(
        replace(s, source="corrected", label=folder / f"{s.sample_id}.png", run=None)
        for s in run.samples
        if s.sample_id in edited
    )
    save_manifest(place / "fixed.parquet", Manifest.of(run.label_space, samples))
    return place / "fixed.parquet"


# --- told from damage -------------------------------------------------------------------------------------------------


def test_verify_tells_what_people_have_changed_from_damage_and_from_what_is_only_saved_anew(place: Path) -> None:
    run = place / "run"
    for name, mode in (("s01", "L"), ("s03", "P"), ("s05", "RGB")):
        edit(png(place, name), mode)
    Image.open(png(place, "s07")).save(png(place, "s07"), optimize=True)  # the same pixels
    Image.open(png(place, "s09")).resize((5, 5)).save(png(place, "s09"))
    torn = bytearray(png(place, "s11").read_bytes())
    torn[len(torn) // 2] ^= 1
    png(place, "s11").write_bytes(torn)
    Image.new("L", (192, 96), 3).save(run / "top" / "s13.png")  # no label: a layer of the teacher's
    result = autolabel("verify", run)
    assert result.exit_code == 2
    assert result.stdout.splitlines() == [
        f"damaged: {png(place, 's11')}: damaged or truncated: chunk b'IDAT' has another checksum",
        f"damaged: label of 's13' in {run}/top/s13.png differs from what was committed",
        *(f"changed by hand: {png(place, name)}" for name in ("s01", "s03", "s05")),
        f"put there by another program, and no label of this run: {png(place, 's09')}",
        "labels read: 7, images: 7, units: 3, faults: 2, changed by hand: 4",
    ]
    png(place, "s09").unlink()
    assert autolabel("verify", run).stderr.splitlines()[-1] == (
        f"autolabel: 3 labels of {run} changed by hand (the first is {png(place, 's01')}): `autolabel import png"
        f" {run}/labels --run {run} -o fixed.parquet`, then `autolabel verify {run} --repair --imported fixed.parquet`"
    )


def test_a_label_that_was_only_saved_in_colours_is_a_fault_whose_repair_loses_nothing(place: Path) -> None:
    file = png(place, "s01")
    before, colours = file.read_bytes(), np.frombuffer(CITYSCAPES.palette, np.uint8).reshape(256, 3)
    ids = np.asarray(Image.open(file))
    Image.fromarray(np.where((ids == 255)[..., None], 0, colours[ids]).astype(np.uint8)).save(file)
    assert verify(place / "run").faults == [f"{file} was saved in another form, with the same pixels"]
    assert verify(place / "run", repair=True).undone == 1
    generate(job(place))
    assert file.read_bytes() == before and by_hand(place) == {}


def test_readers_of_a_run_say_that_a_label_was_changed_by_hand_and_what_takes_it_over(place: Path) -> None:
    run, file = place / "run", png(place, "s01")
    edit(file)
    advice = f"`autolabel import png {run}/labels --run {run} -o fixed.parquet` takes it over as a correction"
    with pytest.raises(ChangedLabel) as refusal:
        Run.open(run).labels["s01"]
    assert str(refusal.value) == f"label of 's01' in {file} was changed by hand; {advice}"
    edit(file, "RGB")
    (sample,) = (s for s in load_manifest(run / "manifest.parquet").samples if s.sample_id == "s01")
    with pytest.raises(RuntimeError, match=r"; `autolabel verify .*` finds all that is damaged or was changed by hand"):
        read_sample_label(sample, CITYSCAPES)


# --- repair -----------------------------------------------------------------------------------------------------------


def test_repair_leaves_everything_as_it_is_until_what_people_have_changed_is_imported(place: Path) -> None:
    run = place / "run"
    labels, damaged = labels_of(run), png(place, "s05")
    edited = {"s01": edit(png(place, "s01")), "s11": edit(png(place, "s11"), "RGB")}
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1])
    before = contents(run)
    line = f"2 labels of {run} changed by hand (the first is {png(place, 's01')})"
    assert refused("verify", run, "--repair").startswith(f"{line}: `autolabel import png ")

    one = fixed(place, {"s01": edited["s01"]})
    also = ("verify", run, "--repair", "--imported")
    line = f"1 label of {run} changed by hand (the first is {png(place, 's11')}), not in {one} as they are now: `auto"
    assert refused(*also, one).startswith(line)
    assert refused(*also, run / "manifest.parquet").startswith(f"2 labels of {run} changed by hand")  # itself
    assert {**contents(run), ".lock": b""} == {**before, ".lock": b""}

    asked = ("import", "png", run / "labels" / "s11.png", "--run", run, "-o", place / "s11.parquet")
    assert autolabel(*asked).exit_code == 0
    result = autolabel(*also, one, "--imported", place / "s11.parquet")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "units put back to undone: 2; run the same command again to label them"
    generate(job(place))
    assert labels_of(run) == labels and by_hand(place) == {}
    assert verify(run).lines() == ["labels read: 7, images: 7, units: 3, faults: 0"]


def test_repair_leaves_pictures_of_another_program_alone(place: Path) -> None:
    file = png(place, "s03")
    Image.open(file).resize((7, 7)).save(file)
    data = file.read_bytes()
    said = f"1 picture of another program in {place / 'run'} (the first is {file}): move it out of the run, then `auto"
    assert refused("verify", place / "run", "--repair").startswith(said)
    assert file.read_bytes() == data
    file.rename(place / "elsewhere.png")
    assert autolabel("verify", place / "run", "--repair").exit_code == 0
    assert verify(place / "run").units == 2  # of three


# --- whoever labels looks first ---------------------------------------------------------------------------------------


def _no_record(*_: object) -> Commit:
    """Die after the PNGs of a unit are written, and before its record is."""
    raise OSError(5, "Input/output error")


def _killed_before_the_record(place: Path) -> str:
    with pytest.raises(OSError, match="Input/output error"):
        generate(plain(place), write=_no_record)
    assert png(place, "s01").exists() and not (place / "run" / "units").exists()
    return "s01"


def _record_lost(place: Path) -> str:
    generate(plain(place))
    for record in (place / "run" / "units").iterdir():
        record.write_bytes(record.read_bytes()[:-1])
    return "s09"


def _quarantined(place: Path) -> str:
    """A person draws the label that the program could not make."""
    image = place / "drive" / "s03.png"
    good = image.read_bytes()
    image.write_bytes(good[:-100])
    generate(plain(place, max_quarantined=1.0))
    image.write_bytes(good)
    shutil.copyfile(png(place, "s01"), png(place, "s03"))
    return "s03"


def _before_its_turn(place: Path) -> str:
    generate(plain(place, portion=Portion(limit=3)))
    shutil.copyfile(png(place, "s01"), png(place, "s11"))
    return "s11"


@pytest.mark.parametrize("moment", [_killed_before_the_record, _record_lost, _quarantined, _before_its_turn])
def test_a_label_of_a_person_in_the_place_of_a_new_one_goes_into_a_folder_of_its_own_and_is_named(
    bare: Path, originals: Path, moment: Callable[[Path], str]
) -> None:
    run, name = bare / "run", moment(bare)
    edited = edit(png(bare, name))
    if moment is _record_lost:
        assert autolabel("verify", run, "--repair").exit_code == 0
    notes: list[str] = []
    generate(plain(bare, max_quarantined=1.0, portion=Portion(retry_quarantined=True)), on_note=notes.append)
    assert by_hand(bare) == {f"{name}.png": edited}
    assert labels_of(run) == labels_of(originals / "run")
    said = (
        f"1 label that this program had not written lies in {run}/by-hand, from where the run has its own: `autolabel"
        f" import png {run}/by-hand --run {run} -o fixed.parquet` takes it over as a correction"
    )
    assert notes[-1] == said and said in verify(run).lines()
    if moment is not _quarantined:
        return
    imported = autolabel("import", "png", run / "by-hand", "--run", run, "-o", bare / "fixed.parquet")
    assert imported.exit_code == 0, imported.stderr
    (sample,) = load_manifest(bare / "fixed.parquet").samples
    assert sample.key == ("corrected", name)
    assert (read_sample_label(sample, CITYSCAPES)[:20, :30] == painted(run / "labels" / f"{name}.png")[:20, :30]).all()


def _within_a_unit(place: Path) -> str:
    generate(plain(place, portion=Portion(limit=2)))
    return "s01"


def _where_a_process_died(place: Path) -> str:
    """What is left of the unit is done carefully, and committed image by image."""
    generate(plain(place, portion=Portion(limit=1)))
    Attempt(RunFolder(place / "run"), Unit("b512x512.000000", "b512x512", 0, ())).begin("s03")
    return "s01"


def _of_another_part(place: Path) -> str:
    generate(plain(place, portion=Portion(part=(2, 2))))
    png(place, "s11").unlink()  # so that its unit is done again
    return "s07"


@pytest.mark.parametrize("moment", [_within_a_unit, _where_a_process_died, _of_another_part])
def test_a_label_that_was_committed_before_it_was_edited_is_not_written_again(
    bare: Path, originals: Path, moment: Callable[[Path], str]
) -> None:
    run, name = bare / "run", moment(bare)
    edited = edit(png(bare, name))
    generate(plain(bare))
    assert png(bare, name).read_bytes() == edited and by_hand(bare) == {}
    assert verify(run).changed == {name: png(bare, name)} and not verify(run).faults
    shutil.copyfile(png(originals, name), png(bare, name))
    assert labels_of(run) == labels_of(originals / "run")


def test_a_label_whose_image_has_changed_is_removed_by_repair_and_not_taken_for_a_persons(bare: Path) -> None:
    place = bare
    generate(plain(place))
    shutil.copyfile(place / "drive" / "s01.png", place / "drive" / "s09.png")
    before = png(place, "s09").read_bytes()
    assert autolabel("verify", place / "run", "--repair").exit_code == 0
    generate(plain(place))
    assert png(place, "s09").read_bytes() != before and by_hand(place) == {}


def test_what_an_attempt_has_noted_is_the_runs_own_and_every_other_picture_is_kept(tmp_path: Path) -> None:
    run, (new, other, drawn, again) = RunFolder(tmp_path), (np.full((4, 6), n, np.uint8) for n in range(4))
    file = tmp_path / "labels/a/b.png"

    def lies_there(data: bytes) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        write_maps(
            run, "labels/a/b.png", {"labels": encode_label(new), "top": encode_label(new)}, {crc32c(other), None}
        )
        assert file.read_bytes() == (tmp_path / "top/a/b.png").read_bytes() == encode_label(new)

    kept = tmp_path / "by-hand/a"
    for ours in (encode_label(new), encode_label(other), encode_label(drawn)[:-3], b"", b"no picture"):
        lies_there(ours)
        assert not kept.exists()
    rgb = tmp_path / "rgb.png"
    Image.new("RGB", (6, 4)).save(rgb)
    for theirs in (encode_label(drawn), encode_label(drawn), rgb.read_bytes(), encode_label(again)):
        lies_there(theirs)
    folders = ["by-hand", "by-hand-2", "by-hand-3"]
    found = [(tmp_path / folder / "a/b.png").read_bytes() for folder in folders]
    assert found == [encode_label(drawn), rgb.read_bytes(), encode_label(again)]
    named = " ".join(str(tmp_path / folder) for folder in folders)
    assert f"`autolabel import png {named} --run {tmp_path} -o fixed.parquet`" in set_aside(run)


def test_notes_tell_which_labels_earlier_attempts_have_written(tmp_path: Path) -> None:
    unit = Unit("b512x512.000000", "b512x512", 0, ())
    first = Attempt(RunFolder(tmp_path), unit)
    first.begin("a")
    first.writes({"a": 7, "b": 2**32 - 1})
    second = Attempt(RunFolder(tmp_path), unit)
    assert second.written == {"a": {7}, "b": {2**32 - 1}} and second.deaths == {"a": 1}
    second.writes({"a": 8})
    second.end(committed=False)
    assert Attempt(RunFolder(tmp_path), unit).written["a"] == {7, 8}


# --- corrections live by themselves -----------------------------------------------------------------------------------


def test_no_command_touches_corrections_or_edited_labels_and_both_can_be_withdrawn(place: Path) -> None:
    run, file = place / "run", png(place, "s03")
    edited = edit(file)
    asked = ("import", "png", run / "labels", "--run", run, "-o", place / "fixed.parquet")
    assert autolabel(*asked).exit_code == 0
    shutil.copytree(place, place.parent / "before")
    (place / "mine.toml").write_text("threshold = 0.5\n")
    for command in (
        ("relabel", run, "--policy", place / "mine.toml", "--out", place / "again"),
        ("relabel", run, "--policy", place / "mine.toml", "--out", place / "again"),
        ("generate", place / "drive.parquet", "--teacher", place / "teacher.pt", *SAME, "--out", run),
        ("report", run),
        ("verify", place / "again"),
        ("export", place / "again", "--to", "png", "-o", place / "out"),
        asked,
    ):
        result = autolabel(*command)
        assert result.exit_code == 0, (command, result.stderr)
    for folder in ("run/labels", "fixed"):
        assert contents(place / folder) == contents(place.parent / "before" / folder)
    assert (place / "fixed.parquet").read_bytes() == (place.parent / "before/fixed.parquet").read_bytes()
    assert file.read_bytes() == edited and not (place / "again" / "by-hand").exists()

    fuse = ("manifest", "fuse", place / "again" / "manifest.parquet")
    assert autolabel(*fuse, place / "fixed.parquet", "-o", place / "with.parquet").exit_code == 0
    assert autolabel(*fuse, "-o", place / "without.parquet").exit_code == 0
    sources = {name: load_manifest(place / f"{name}.parquet").samples for name in ("with", "without")}
    assert [s.source for s in sources["with"]] == ["auto"] * 6 + ["corrected"]
    assert [s.sample_id for s in sources["without"]] == NAMES
    corrected = sources["with"][-1]
    assert (read_sample_label(corrected, CITYSCAPES) == painted(png(place.parent / "before", "s03"))).all()
