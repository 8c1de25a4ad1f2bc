"""Corrections come home. If this fails, somebody's work is lost, or the machine's word passes for a person's."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import autolabel, contents, refused
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests.corrected import CorrectedFolder, read_origin
from autolabel.manifests.images import colourise
from autolabel.manifests.label_space import CITYSCAPES, IGNORE
from autolabel.manifests.policy import Policy
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.samples import load_manifest, save_manifest
from autolabel.manifests.scan import scan
from autolabel.manifests.wording import percent
from autolabel.pipeline import corrections
from autolabel.pipeline.adopt import Pngs, adopt, adopting_job
from autolabel.pipeline.analysis.audit import audit
from autolabel.pipeline.corrections import import_corrections
from autolabel.pipeline.imported import Imported

Label = NDArray[np.uint8]
HEIGHT, WIDTH = 40, 60
NAMES = ("a/one", "a/two", "b/three", "four")
SOURCE_IDS = np.array([c.source_ids[0] for c in CITYSCAPES.classes] + [0] * 237, np.uint8)


def save(path: Path, pixels: NDArray[np.uint8], palette: bytes | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    if palette is not None:
        picture.putpalette(palette)
    picture.save(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four drawn images, two of them with polygons, and three runs over them: zarr, png, and bare without confidence.

    The lower fifth of the labels is ignored for its low confidence; polygons decide where the policy asks for them.
    """
    root, random = tmp_path_factory.mktemp("corrections"), np.random.default_rng(4)
    for place, name in enumerate(NAMES):
        save(root / "images" / f"{name}.png", random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
        label = np.repeat(np.repeat(random.integers(0, 19, (8, 12), dtype=np.uint8), 5, axis=0), 5, axis=1)
        save(root / "top" / f"{name}.png", label)
        sure = np.full((HEIGHT, WIDTH), 230, np.uint8)
        sure[32:] = 60
        save(root / "sure" / f"{name}.png", sure)
        coarse = np.full((HEIGHT, WIDTH), IGNORE, np.uint8)
        coarse[:10, :10] = place
        save(root / "coarse" / f"{name}.png", coarse)
    found = scan(root / "images", layout="folder", label_space=CITYSCAPES, coarse=root / "coarse")[0]
    save_manifest(root / "images.parquet", found)
    policy = Policy(threshold=0.5, coarse="human-wins")
    for store in ("zarr", "png"):
        job = adopting_job(
            root / "images.parquet", root / store, policy, keep_confidence=4, store=store, unit_size=3
        )  # fmt: skip
        adopt(Pngs(root / "top", root / "sure"), job)
    adopt(Pngs(root / "top", root / "sure"), adopting_job(root / "images.parquet", root / "bare", policy, store="png"))
    return root


@pytest.fixture
def place(runs: Path, tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def labels_of(run: Path) -> dict[str, Label]:
    return {name: label.copy() for name, label in Run.open(run).labels.items()}


def write_masks(folder: Path, labels: dict[str, Label], kind: str = "train") -> Path:
    for name, label in labels.items():
        path = folder / f"{name}.png"
        if kind == "rgb":
            save(path, colourise(label, CITYSCAPES))
        elif kind == "palette":
            save(path, label, CITYSCAPES.palette)
        elif kind == "other palette":  # as an editor packs the colours that it finds
            used, packed = np.unique(label, return_inverse=True)
            colours = np.frombuffer(CITYSCAPES.palette, np.uint8).reshape(256, 3)[used[::-1]]
            save(
                path,
                (len(used) - 1 - packed.reshape(label.shape)).astype(np.uint8),
                colours.tobytes().ljust(768, b"\1"),
            )
        else:
            save(path, SOURCE_IDS[label] if kind == "source" else label)
    return folder


def edited(run: Path, share: float = 0.01) -> tuple[dict[str, Label], dict[str, NDArray[np.bool_]]]:
    """The labels of a run with so many of their pixels changed, and where."""
    random, labels, where = np.random.default_rng(0), labels_of(run), {}
    for name, label in labels.items():
        where[name] = random.random(label.shape) < share
        was = np.where(label == IGNORE, 0, label)
        label[where[name]] = ((was + 1 + random.integers(0, 17)) % 19)[where[name]]
        assert where[name].any()
    return labels, where


def given(path: Path) -> dict[str, tuple[Label, Label]]:
    """Label and origin of every sample of a manifest of corrections."""
    samples = load_manifest(path).samples
    assert {s.source for s in samples} == {"corrected"}
    found = {}
    for sample in samples:
        origin = read_origin(sample)
        assert origin is not None
        found[sample.sample_id] = read_sample_label(sample, CITYSCAPES), origin
    return found


@pytest.mark.parametrize("store", ["zarr", "png"])
@pytest.mark.parametrize("kind", ["train", "source", "palette", "other palette", "rgb"])
def test_masks_with_some_pixels_edited_change_exactly_those(runs: Path, tmp_path: Path, store: str, kind: str) -> None:
    labels, where = edited(runs / store)
    masks = write_masks(tmp_path / "masks", labels, kind)
    result = import_corrections("png", [masks], run=runs / store, out=tmp_path / "fixed.parquet")
    found = given(tmp_path / "fixed.parquet")
    assert list(found) == sorted(NAMES)
    for name, (label, origin) in found.items():
        assert np.array_equal(label, labels[name])
        assert np.array_equal(origin, where[name])
    assert result.changed_pixels == sum(int(mask.sum()) for mask in where.values())


@pytest.mark.parametrize(("store", "ids"), [("zarr", "train"), ("png", "source"), ("zarr", "color")])
def test_an_export_that_was_edited_comes_back_whole(runs: Path, tmp_path: Path, store: str, ids: str) -> None:
    """The folder that went out, with photographs and confidence beside the labels, one of them edited, as a zip too."""
    out, run = tmp_path / "out", runs / store
    assert autolabel("export", run, "--to", "png", "-o", out, "--label-ids", ids).exit_code == 0
    label = labels_of(run)["a/two"]
    label[4:7, 5:9] = 13
    palette = CITYSCAPES.palette if ids == "color" else None
    save(out / "labels" / "a" / "two.png", SOURCE_IDS[label] if ids == "source" else label, palette)
    shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path, "out")
    for name in ("out", "zipped.zip"):
        fixed = tmp_path / f"back-{name}.parquet"
        result = import_corrections("png", [tmp_path / name], run=run, out=fixed)
        changed = label != labels_of(run)["a/two"]
        assert (result.tally.images, result.unchanged, result.changed_pixels) == (4, 3, int(changed.sum()))
        assert np.array_equal(given(fixed)["a/two"][1], changed)


@pytest.mark.parametrize(
    ("store", "tool", "file"),
    [
        ("zarr", "coco", "panoptic.json"), ("png", "coco", "stuff.json"), ("png", "cvat", ""),
        ("zarr", "cvat", "masks.zip"), ("zarr", "label-studio", ""), ("png", "label-studio", ""),
    ],
)  # fmt: skip
def test_what_was_edited_in_a_tool_is_what_changes(
    runs: Path, tmp_path: Path, store: str, tool: str, file: str
) -> None:
    """Each format, by the commands that a person types. The labels that the tool holds have one pixel of a hundred
    edited: they come from corrections, which go out like any manifest."""
    run, out, fixed = runs / store, tmp_path / "out", tmp_path / "fixed.parquet"
    import_corrections(
        "png", [write_masks(tmp_path / "masks", edited(run)[0])], run=run, out=tmp_path / "first.parquet"
    )
    assert autolabel("export", tmp_path / "first.parquet", "--to", tool, "-o", out).exit_code == 0
    result = autolabel("import", tool, out / file, "--run", run, "-o", fixed)
    assert result.exit_code == 0, result.stderr
    assert "4 images came back: 4 changed" in result.stdout
    first, second = given(tmp_path / "first.parquet"), given(fixed)
    assert list(first) == list(second)
    for name in first:
        for one, other in zip(first[name], second[name], strict=True):
            assert np.array_equal(one, other)


def test_the_account_is_what_a_slow_count_gives(runs: Path, tmp_path: Path) -> None:
    labels = labels_of(runs / "zarr")
    before = labels_of(runs / "zarr")
    del labels["four"]
    one = labels["a/one"]
    one[0, :6], one[35, :5], one[20, :4] = 18, 7, IGNORE
    masks = write_masks(tmp_path / "masks", labels)
    result = import_corrections("png", [masks], run=runs / "zarr", out=tmp_path / "fixed.parquet")
    old = before["a/one"]
    changed = int((old[0, :6] != 18).sum())
    fates = result.tally.fates
    assert (fates["changed"], fates["given"], fates["erased"], fates["unknown"]) == (changed, 5, 4, 0)
    ignored = sum(int((before[name] == IGNORE).sum()) for name in labels)
    assert fates["left"] == ignored - 5
    assert sum(fates.values()) == 3 * HEIGHT * WIDTH
    assert result.tally.dropped == {"below_threshold": [ignored - 5, 5]}
    assert (result.tally.images, result.unchanged, result.changed_pixels) == (3, 2, changed + 9)
    tops = {name: np.asarray(Image.open(runs / "top" / f"{name}.png")) for name in labels}
    confidence = {name: top_level[1] for name, top_level in Run.open(runs / "zarr").confidence.items()}
    for level, row in enumerate(result.tally.levels()):
        looked = {name: (labels[name] != IGNORE) & (confidence[name] == level) for name in labels}
        assert row.looked == sum(int(mask.sum()) for mask in looked.values())
        assert row.right == sum(int((tops[name] == labels[name])[mask].sum()) for name, mask in looked.items())
        assert row.changed == sum(int(((labels[n] != before[n]) & (confidence[n] == level)).sum()) for n in labels)
    rows = pq.read_table(tmp_path / "fixed" / "changes.parquet").to_pandas()
    (only,) = [key for key, _ in rows.groupby(["fate", "from_class", "to_class", "rule"]) if key[0] == "given"]
    assert only == ("given", "ignored", "traffic sign", "below_threshold")
    road = rows[(rows["fate"] == "erased") & (rows["to_class"] == "ignored")]
    assert road["pixels"].sum() == 4 and set(road["sample_id"]) == {"a/one"}
    text = str(result)
    assert "3 images came back: 1 changed, 2 confirmed as they were" in text
    assert "below threshold" in text and "ignored → truck" not in text and "ignored → traffic sign" in text
    assert Imported.read(tmp_path / "fixed.parquet").tally.fates == fates


def test_labels_of_another_run_are_suspected(runs: Path, tmp_path: Path) -> None:
    others = {name: (label + 3) % 19 for name, label in labels_of(runs / "zarr").items()}
    masks = write_masks(tmp_path / "masks", others)
    result = import_corrections("png", [masks], run=runs / "zarr", out=tmp_path / "a.parquet", label_ids="train")
    assert f"that is most of them: were these labels exported from {runs / 'zarr'}?" in result.lines()


def test_the_manifest_says_where_its_labels_come_from(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, _ = edited(runs / "zarr")
    masks = write_masks(tmp_path / "masks", labels)
    monkeypatch.chdir(tmp_path)
    result = autolabel("import", "png", "masks", "--run", runs / "zarr", "-o", "fixed.parquet")
    assert result.exit_code == 0, result.stderr
    assert f"wrote {tmp_path / 'fixed.parquet'}" in result.stdout
    manifest, original = load_manifest(tmp_path / "fixed.parquet"), load_manifest(runs / "images.parquet")
    about = manifest.provenance["corrections"]
    assert manifest.corrects == (runs / "zarr",)
    assert about["reads"] == "png" and len(about["recipe_sha256"]) == 64 and about["date"].endswith("+00:00")
    (files,) = about["files"]
    assert (files["path"], files["number"]) == (str(masks), 4)
    assert [(s.sample_id, s.image, s.height, s.run) for s in manifest.samples] == [
        (s.sample_id, s.image, s.height, None) for s in original.samples
    ]
    assert manifest.label_root == tmp_path / "fixed"
    record = json.loads((tmp_path / "fixed" / "import.json").read_text())
    assert record["date"] == about["date"]


def test_of_unchanged_images_only_those_that_were_looked_at_are_confirmed(runs: Path, tmp_path: Path) -> None:
    labels = labels_of(runs / "zarr")
    labels["a/two"][:, :3] = 13
    masks = write_masks(tmp_path / "masks", labels)
    out = tmp_path / "fixed.parquet"
    result = import_corrections("png", [masks], run=runs / "zarr", out=out, only_changed=True)
    assert list(given(out)) == ["a/two"]
    assert (result.tally.images, result.found.left_out) == (1, 3)
    assert sorted(p.name for p in (tmp_path / "fixed").rglob("*.png")) == ["two.png", "two.png"]
    masks = write_masks(tmp_path / "same", labels_of(runs / "zarr"))
    assert "there is nothing to import" in refused(
        "import", "png", masks, "--run", runs / "zarr", "-o", tmp_path / "none.parquet", "--only-changed"
    )
    assert not (tmp_path / "none").exists()
    result = import_corrections("png", [masks], run=runs / "zarr", out=tmp_path / "all.parquet")
    assert (result.unchanged, result.changed_pixels) == (4, 0)
    assert "nobody has looked at are no confirmation" in str(result)
    assert all(not origin.any() for _, origin in given(tmp_path / "all.parquet").values())


def test_of_a_partial_mask_only_painted_pixels_count(runs: Path, tmp_path: Path) -> None:
    before = labels_of(runs / "zarr")
    painted = {name: np.full_like(label, IGNORE) for name, label in before.items()}
    painted["a/one"][33:36, 5:9] = 11
    painted["a/two"][0, 0] = before["a/two"][0, 0]  # painted, and the same
    masks = write_masks(tmp_path / "masks", painted, "rgb")
    out = tmp_path / "fixed.parquet"
    result = import_corrections("png", [masks], run=runs / "zarr", out=out, partial=True)
    (only,) = given(out).items()
    name, (label, origin) = only
    expected = before["a/one"].copy()
    expected[33:36, 5:9] = 11
    assert name == "a/one" and np.array_equal(label, expected)
    assert np.array_equal(origin, expected != before["a/one"]) and origin.sum() == 12
    assert (result.tally.fates["given"], result.found.left_out) == (12, 3)
    assert "right %" not in str(result)  # nobody has looked at the rest
    result = import_corrections("png", [masks], run=runs / "zarr", out=tmp_path / "whole.parquet")
    assert "if people painted only some pixels, say --partial" in str(result)


def test_of_two_people_the_later_one_stands_where_they_disagree(runs: Path, tmp_path: Path) -> None:
    before = labels_of(runs / "zarr")
    anna, ben = ({name: label.copy() for name, label in before.items()} for _ in range(2))
    anna["a/one"][0, :10], ben["a/one"][0, 5:20] = 18, 17
    anna["a/one"][1, :3] = ben["a/one"][1, :3] = 16
    anna["four"][2, 2] = (before["four"][2, 2] + 1) % 19
    del ben["four"], anna["a/two"]
    paths = [write_masks(tmp_path / "anna", anna), write_masks(tmp_path / "ben", ben, "rgb")]
    result = import_corrections("png", paths, run=runs / "zarr", out=tmp_path / "fixed.parquet")
    found = given(tmp_path / "fixed.parquet")
    expected = before["a/one"].copy()
    expected[0, :10] = 18
    theirs = ben["a/one"] != before["a/one"]
    expected[theirs] = ben["a/one"][theirs]
    assert np.array_equal(found["a/one"][0], expected)
    assert np.array_equal(found["four"][0], anna["four"])
    both = theirs & (anna["a/one"] != before["a/one"]) & (anna["a/one"] != ben["a/one"])
    assert (result.found.disagreeing_images, result.found.disagreeing_pixels) == (1, int(both.sum()))
    assert f"people disagree in 1 image, {both.sum()} pixels: the later one stands" in str(result)
    command = "export", runs / "zarr", "--to", "png", "--ids", tmp_path / "fixed" / "disagreements.txt"
    assert "1 written" in autolabel(*command, "-o", tmp_path / "third").stdout  # for a third person


@pytest.mark.parametrize("kind", ["train", "rgb"])
def test_labels_edited_in_place_are_compared_with_what_the_policy_gives_again(place: Path, kind: str) -> None:
    run, before = place / "png", labels_of(place / "png")
    one = before["a/one"].copy()
    one[5, 5:20] = 12
    write_masks(run / "labels", {"a/one": one}, kind)
    save(run / "labels" / "four.png", before["four"], CITYSCAPES.palette)  # saved in another form, and the same
    was = contents(run / "labels")
    import_corrections("png", [run / "labels"], run=run, out=place / "fixed.parquet")
    ((name, (label, origin)),) = given(place / "fixed.parquet").items()
    assert name == "a/one" and np.array_equal(label, one)
    assert np.array_equal(origin, one != before["a/one"])
    assert contents(run / "labels") == was


def test_without_confidence_nobody_knows_what_was_written_over(place: Path) -> None:
    run, before = place / "bare", labels_of(place / "bare")
    one = before["a/one"].copy()
    one[5, 5:20] = 12
    write_masks(run / "labels", {"a/one": one})
    (run / "labels" / "b" / "three.png").write_bytes(b"\x89PNG")
    result = import_corrections("png", [run / "labels"], run=run, out=place / "fixed.parquet")
    ((_, (label, origin)),) = given(place / "fixed.parquet").items()
    assert np.array_equal(label, one) and (origin == 2).all()
    assert result.tally.fates["unknown"] == HEIGHT * WIDTH
    assert result.found.damaged == ["labels/b/three.png"]
    assert "1 PNG of the run cannot be read as labels, and did not come along" in str(result)
    # Somebody else's mask of the same image stands as a whole, and is counted where it differs.
    other = one.copy()
    other[9, :7] = (one[9, :7] + 1) % 19
    masks = write_masks(place / "masks", {"a/one": other})
    both = import_corrections("png", [run / "labels", masks], run=run, out=place / "both.parquet")
    assert np.array_equal(given(place / "both.parquet")["a/one"][0], other)
    assert both.found.disagreeing_pixels == 7


def test_labels_that_a_run_has_set_aside_are_masks_like_any_others(place: Path) -> None:
    run, before = place / "bare", labels_of(place / "bare")
    one = before["a/one"].copy()
    one[5, 5:20] = 12
    write_masks(run / "by-hand", {"a/one": one})
    import_corrections("png", [run / "by-hand"], run=run, out=place / "fixed.parquet")
    ((_, (label, origin)),) = given(place / "fixed.parquet").items()
    assert np.array_equal(label, one) and np.array_equal(origin, one != before["a/one"])


def test_nothing_edited_in_place_is_nothing_to_import(place: Path) -> None:
    for run, name, message in (
        ("png", "labels", "differs from what the run has written"),
        ("png", "labels/a/one.png", "differs from what the run has written"),
        ("zarr", "", "as a PNG: export them first"),
        ("zarr", "labels.zarr", "no PNGs under"),
    ):
        path = place / run / name
        assert message in refused("import", "png", path, "--run", place / run, "-o", place / "fixed.parquet")
        assert not (place / "fixed").exists()


# --- the audit learns -------------------------------------------------------------------------------------------------


def test_corrections_are_truth_for_an_audit(place: Path) -> None:
    run, before = place / "zarr", labels_of(place / "zarr")
    labels, _ = edited(run, share=0.1)
    labels["a/one"][30:, :] = IGNORE
    import_corrections("png", [write_masks(place / "masks", labels)], run=run, out=place / "fixed.parquet")
    found = audit(run, place / "fixed.parquet", allow_leak=True)
    assert found.images == 4
    true, given = (np.concatenate([both[name].ravel() for name in NAMES]) for both in (labels, before))
    both = (true != IGNORE) & (given != IGNORE)
    assert found.auto is not None and found.auto.right == (true == given)[both].mean()
    left = np.concatenate([((labels[n] == before[n]) & (labels[n] != IGNORE)).ravel() for n in NAMES])
    share = percent(left.sum() / (true != IGNORE).sum())
    (note,) = [note for note in found.notes if "Corrections are the truth of 4 images" in note]
    assert "no random sample" in note and f"{share} % of their pixels with a class are a machine's" in note
    assert found.reliability is not None and (run / "suggested.toml").exists()
    assert sum(found.reliability.all.pixels) == (true != IGNORE).sum()


def test_partial_corrections_are_no_truth(place: Path) -> None:
    run = place / "zarr"
    masks = write_masks(place / "masks", edited(run)[0])
    import_corrections("png", [masks], run=run, out=place / "part.parquet", partial=True)
    message = refused("audit", run, "--truth", place / "part.parquet", "--allow-leak")
    assert "holds 4 images imported with --partial: nobody has looked at all of their pixels" in message


# --- again, and killed ------------------------------------------------------------------------------------------------


def test_the_same_import_again_changes_no_byte_and_another_one_is_refused(runs: Path, tmp_path: Path) -> None:
    labels, _ = edited(runs / "zarr")
    masks, out = write_masks(tmp_path / "masks", labels), tmp_path / "fixed.parquet"
    command = "import", "png", masks, "--run", runs / "zarr", "-o", out
    assert autolabel(*command).exit_code == 0
    was, manifest = contents(tmp_path / "fixed"), out.read_bytes()
    again = autolabel(*command)
    assert again.exit_code == 0 and "holds these corrections already" in again.stdout
    moved = shutil.copytree(masks, tmp_path / "moved")
    assert autolabel("import", "png", moved, *command[3:]).exit_code == 0
    save(masks / "four.png", np.full((HEIGHT, WIDTH), 3, np.uint8))
    assert "choose another name" in refused(*command)
    assert "choose another name" in refused("import", "png", moved, *command[3:], "--partial")
    assert (contents(tmp_path / "fixed"), out.read_bytes()) == (was, manifest)


def test_masks_beside_a_file_of_coco_belong_to_it(runs: Path, tmp_path: Path) -> None:
    out, run = tmp_path / "out", runs / "zarr"
    assert autolabel("export", run, "--to", "coco", "-o", out).exit_code == 0
    command = "import", "coco", out / "panoptic.json", "--run", run, "-o", tmp_path / "fixed.parquet"
    assert autolabel(*command).exit_code == 0
    (files,) = load_manifest(tmp_path / "fixed.parquet").provenance["corrections"]["files"]
    assert files["number"] == 5
    mask = next((out / "panoptic").rglob("*.png"))
    mask.write_bytes(mask.read_bytes() + b"\0")
    assert "holds corrections of other files" in refused(*command)


@pytest.mark.parametrize("at", ["manifest", "mask"])
def test_killed_halfway_it_goes_on_and_ends_equal(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    labels, _ = edited(runs / "zarr")
    masks, out = write_masks(tmp_path / "masks", labels), tmp_path / "fixed.parquet"
    ask: Callable[[], Imported] = lambda: import_corrections("png", [masks], run=runs / "zarr", out=out)  # noqa: E731

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            *((corrections, "_write_manifest") if at == "manifest" else (corrections.Merging, "count")), killed
        )
        with pytest.raises(KeyboardInterrupt):
            ask()
    assert not out.exists()
    half = contents(tmp_path / "fixed")
    other = write_masks(tmp_path / "other", labels_of(runs / "zarr"))
    assert "beginning of another import" in refused("import", "png", other, "--run", runs / "zarr", "-o", out)
    assert contents(tmp_path / "fixed") == half
    assert ask().new
    whole, manifest = contents(tmp_path / "fixed"), out.read_bytes()
    assert half.items() <= whole.items()
    out.unlink()
    ask()
    assert (contents(tmp_path / "fixed"), out.read_bytes()) == (whole, manifest)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def masks(runs: Path, tmp_path: Path) -> Path:
    return write_masks(tmp_path / "masks", labels_of(runs / "zarr"))


def sized(masks: Path) -> None:
    save(masks / "a" / "one.png", np.zeros((10, 20), np.uint8))
    save(masks / "four.png", np.zeros((10, 20), np.uint8))


def coloured(masks: Path) -> None:
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[0, :9], picture[1, :5], picture[2, :3], picture[3, :2] = (1, 1, 1), (2, 2, 2), (3, 3, 3), (4, 4, 4)
    save(masks / "a" / "one.png", picture)
    save(masks / "a" / "two.png", picture)


def numbered(masks: Path) -> None:
    for name, value in (("one", 200), ("two", 201)):
        label = np.zeros((HEIGHT, WIDTH), np.uint8)
        label[:2, :3] = value
        save(masks / "a" / f"{name}.png", label)


def strange(masks: Path) -> None:
    for name in ("x/1", "x/2", "x/3", "x/4"):
        save(masks / f"{name}.png", np.zeros((HEIGHT, WIDTH), np.uint8))


def doubled(masks: Path) -> None:
    shutil.copyfile(masks / "a" / "one.png", masks / "a__one.png")


def photographed(masks: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(masks / "a" / "one.png", "JPEG")


BAD = {
    sized: "labels of another size than their image: 'a/one' is 20 x 10, its image 60 x 40 pixels (and 1 more)",
    coloured: (
        "2 of 4 masks have 38 pixels with colours that label space 'cityscapes' does not have, the most frequent"
        " (1, 1, 1) (18 pixels), (2, 2, 2) (10 pixels) and (3, 3, 3) (6 pixels); the first is"
    ),
    numbered: (
        "2 of 4 masks have 12 pixels with ids that label space 'cityscapes' does not have, the most frequent 200"
        " (6 pixels) and 201 (6 pixels); the first is"
    ),
    strange: "4 labels whose names mean none, or several, of the images",
    doubled: "holds two labels of image 'a/one': keep one of them",
    photographed: "a JPEG file: expected a PNG",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_masks_that_cannot_be_used_are_one_line_and_nothing_is_written(
    runs: Path, masks: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(masks)
    message = refused("import", "png", masks, "--run", runs / "zarr", "-o", tmp_path / "fixed.parquet")
    assert BAD[spoil] in message
    if spoil is strange:
        assert "'x/1', 'x/2' and 'x/3' and 1 more" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["masks"]


def test_names_that_are_longer_take_a_suffix(runs: Path, tmp_path: Path) -> None:
    labels, _ = edited(runs / "zarr")
    masks = write_masks(tmp_path / "masks", {f"{name}_mask": label for name, label in labels.items()})
    write_masks(masks, {f"{name}_colour": label for name, label in labels.items()}, "rgb")
    command = "import", "png", masks, "--run", runs / "zarr", "-o", tmp_path / "fixed.parquet"
    assert "8 labels whose names mean none, or several" in refused(*command)
    shutil.rmtree(masks / "b")
    for path in masks.rglob("*_colour.png"):
        path.unlink()
    assert refused(*command).endswith("; try --suffix _mask")
    assert autolabel(*command, "--suffix", "_mask").exit_code == 0
    assert list(given(tmp_path / "fixed.parquet")) == ["a/one", "a/two", "four"]
    assert "--suffix _x is for png" in refused(
        "import", "cvat", *command[2:-1], tmp_path / "b.parquet", "--suffix", "_x"
    )


def test_a_zip_is_read_as_its_folder_and_a_dangerous_one_is_refused(runs: Path, masks: Path, tmp_path: Path) -> None:
    run, out = runs / "zarr", tmp_path / "fixed.parquet"
    save(masks / "a" / "one.png", np.full((HEIGHT, WIDTH), 3, np.uint8))
    shutil.make_archive(str(tmp_path / "masks"), "zip", tmp_path, "masks")
    import_corrections("png", [tmp_path / "masks.zip"], run=run, out=out)
    import_corrections("png", [masks], run=run, out=tmp_path / "other.parquet")
    zipped, plain = given(out), given(tmp_path / "other.parquet")
    assert list(zipped) == list(plain) == sorted(NAMES)
    assert all(np.array_equal(zipped[name], plain[name]) for name in NAMES)
    small = (masks / "four.png").read_bytes()
    for name, content, message in (
        ("../four.png", small, "a name that leads out of the archive"),
        ("/four.png", small, "a name that leads out of the archive"),
        ("four.png", b"\0" * (1 << 25), "a zip bomb"),
    ):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(name, content)
        assert message in refused("import", "png", tmp_path / "bad.zip", "--run", run, "-o", tmp_path / "bad.parquet")
        assert not (tmp_path / "bad").exists()


def test_a_place_that_cannot_be_written_to_is_refused(runs: Path, masks: Path, tmp_path: Path) -> None:
    run = runs / "zarr"

    def complaint(out: Path, *paths: Path, format: str = "png") -> str:
        return refused("import", format, *(paths or [masks]), "--run", run, "-o", out)

    assert "is a run: choose" in complaint(run / "fixed.parquet")
    assert "is a run: choose" in complaint(run / "stats" / "fixed.parquet")
    assert "lies in" in complaint(masks / "fixed.parquet")
    assert "ends in .parquet" in complaint(tmp_path / "fixed")
    assert "named twice" in complaint(tmp_path / "fixed.parquet", masks, masks)
    assert "does not exist" in complaint(tmp_path / "fixed.parquet", tmp_path / "gone")
    assert "unknown: expected png" in complaint(tmp_path / "fixed.parquet", format="gif")
    assert "do not come back as cityscapes" in complaint(tmp_path / "fixed.parquet", format="cityscapes")
    assert not (tmp_path / "fixed").exists()
    (tmp_path / "fixed").mkdir()
    (tmp_path / "fixed" / "mine.txt").write_text("mine")
    assert "is not empty" in complaint(tmp_path / "fixed.parquet")
    other = tmp_path / "other.parquet"
    shutil.copyfile(runs / "images.parquet", other)
    assert "exists and holds no corrections" in complaint(other)
    assert other.read_bytes() == (runs / "images.parquet").read_bytes()
    assert (tmp_path / "fixed" / "mine.txt").read_text() == "mine"


def test_a_run_that_is_not_finished_takes_no_corrections(place: Path, tmp_path: Path) -> None:
    masks = write_masks(tmp_path / "masks", labels_of(place / "zarr"))
    assert autolabel("verify", place / "zarr").exit_code == 0
    next((place / "zarr" / "units").glob("*.parquet")).write_bytes(b"")
    autolabel("verify", place / "zarr", "--repair")
    message = refused("import", "png", masks, "--run", place / "zarr", "-o", tmp_path / "fixed.parquet")
    assert "is not complete: finish it first" in message


def test_masks_that_may_be_train_ids_or_source_ids_need_a_word(runs: Path, tmp_path: Path) -> None:
    labels = {name: np.full((HEIGHT, WIDTH), 7, np.uint8) for name in NAMES}  # traffic sign, or the source's road
    for label in labels.values():
        label[:20] = 8
    masks, out = write_masks(tmp_path / "masks", labels), tmp_path / "fixed.parquet"
    command = "import", "png", masks, "--run", runs / "zarr", "-o", out
    assert "its masks may show source ids and train ids" in refused(*command)
    assert autolabel(*command, "--label-ids", "source").exit_code == 0
    assert np.unique(given(out)["four"][0]).tolist() == [0, 1]
    assert "only PNGs hold ids" not in refused(*command[:-1], tmp_path / "b.parquet", "--label-ids", "color")


def test_the_folder_knows_its_names() -> None:
    folder = CorrectedFolder(Path("fixed"))
    assert folder.label("a.png/b.c") == Path("fixed/labels/a.png_/b.c.png")
    assert folder.origin("../a:b") == Path("fixed/origin/%2E%2E/a%3Ab.png")
