"""`autolabel manifest coarsen`. If this fails, polygons are drawn over something, or are not those asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import autolabel, refused
from PIL import Image

from autolabel.manifests.coarsen import coarsen_manifest
from autolabel.manifests.hands import coarsen
from autolabel.manifests.images import decode_label, encode_label
from autolabel.manifests.label_space import CAMVID, CITYSCAPES, LabelSpace
from autolabel.manifests.samples import Manifest, Sample, load_manifest, save_manifest


def drawn(folder: Path, *, space: LabelSpace = CAMVID, ids: str = "train", **fields: Any) -> Path:
    """A manifest of two images whose fine labels have two halves, and of one without a label."""
    samples = []
    for n, name in enumerate(("drive/a.png/1", "drive/b")):
        label = np.full((60, 90), 7, np.uint8)
        label[:, 45 - 10 * n :] = 3
        label[:4] = 255
        path = folder / f"{n}.png"
        stored = np.array([c.source_ids[0] for c in space.classes] + [255] * (256 - len(space)), np.uint8)
        palette = space.palette if ids == "color" else None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_label(stored[label] if ids == "source" else label, palette=palette))
        sample = Sample(name, folder / f"{n}.jpg", 60, 90, source="fine", label=path, label_ids=ids)
        samples.append(replace(sample, **fields))
    samples.append(Sample("bare", folder / "bare.jpg", 60, 90))
    save_manifest(folder / "fine.parquet", Manifest.of(space, tuple(samples)))
    return folder / "fine.parquet"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_fine_label_gets_polygons_and_the_command_says_how_much_they_name(tmp_path: Path) -> None:
    result = autolabel("manifest", "coarsen", drawn(tmp_path), "-o", tmp_path / "even.parquet", "--hand", "even")
    assert result.exit_code == 0
    assert "2 images drawn by hand 'even', seed 0; 1 sample without a fine label left out" in result.output
    assert "of these 100.00 % are right" in result.output
    before, after = (load_manifest(tmp_path / name).samples for name in ("fine.parquet", "even.parquet"))
    assert [replace(sample, coarse_label=None) for sample in after] == list(before[:2])
    assert [s.coarse_label for s in after] == [tmp_path / f"even/drive/{n}.png" for n in ("a.png_/1", "b")]
    for sample in after:
        assert sample.label is not None and sample.coarse_label is not None
        fine = decode_label(sample.label.read_bytes(), CAMVID)
        coarse = decode_label(sample.coarse_label.read_bytes(), CAMVID)
        np.testing.assert_array_equal(coarse, coarsen(fine, "even"))


@pytest.mark.parametrize(("ids", "space"), [("source", CITYSCAPES), ("color", CAMVID)])
def test_polygons_hold_what_the_fine_labels_hold(ids: str, space: LabelSpace, tmp_path: Path) -> None:
    account = coarsen_manifest(drawn(tmp_path, space=space, ids=ids), tmp_path / "c.parquet", hand="rough", seed=4)
    assert account.samples == 2 and 0 < account.named < 1
    (first, _) = load_manifest(tmp_path / "c.parquet").samples
    assert first.label is not None and first.coarse_label is not None
    fine, coarse = (decode_label(p.read_bytes(), space, ids=ids) for p in (first.label, first.coarse_label))
    np.testing.assert_array_equal(coarse, coarsen(fine, "rough", seed="4 drive/a.png/1"))
    if ids == "source":
        assert 0 in np.asarray(Image.open(first.coarse_label))  # "unlabeled" of Cityscapes: nobody has drawn anything


def test_a_command_that_was_killed_goes_on_and_a_complete_one_changes_nothing(tmp_path: Path) -> None:
    whole = coarsen_manifest(drawn(tmp_path), tmp_path / "c.parquet", hand="crossing")
    written = files(tmp_path)
    again = coarsen_manifest(tmp_path / "fine.parquet", tmp_path / "c.parquet", hand="crossing")
    assert again.lines() == [f"{tmp_path}/c.parquet was complete before: nothing to do", *whole.lines()]
    assert files(tmp_path) == written
    for name in ("c.parquet", "c/drive/b.png"):
        (tmp_path / name).unlink()
    on = coarsen_manifest(tmp_path / "fine.parquet", tmp_path / "c.parquet", hand="crossing")
    assert (on.lines(), on.tables()) == (whole.lines(), whole.tables())
    assert files(tmp_path) == written


def test_what_cannot_be_drawn_is_refused_and_nothing_is_written_over(tmp_path: Path) -> None:
    fine = drawn(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/of_mine.txt").write_text("mine")
    coarsen_manifest(fine, tmp_path / "c.parquet", hand="rough")
    bare = tmp_path / "bare/fine.parquet"
    (tmp_path / "bare").mkdir()
    save_manifest(bare, Manifest.of(CAMVID, (load_manifest(fine).samples[2],)))
    before = files(tmp_path)
    command = ("manifest", "coarsen")
    for arguments, message in (
        ((bare, "-o", tmp_path / "x.parquet"), f"{bare} has no fine label to draw polygons out of"),
        ((fine, "-o", tmp_path / "notes.parquet"), f"{tmp_path}/notes/of_mine.txt is there already, and not by this"),
        ((fine, "-o", fine), f"{fine} is there already, and not by this command"),
        ((fine, "-o", tmp_path / "c.parquet", "--seed", 1), "asked for differently (seed 0, not 1)"),
        ((fine, "-o", tmp_path / "c.parquet", "--hand", "even"), "asked for differently (hand rough, not even)"),
        ((fine, "-o", tmp_path / "d"), "expected a name that ends in .parquet"),
    ):
        assert message in refused(*command, *arguments)
    assert files(tmp_path) == before


def test_a_fine_label_that_is_damaged_is_named_and_no_manifest_is_written(tmp_path: Path) -> None:
    fine = drawn(tmp_path)
    (tmp_path / "1.png").write_bytes(b"no PNG")
    assert f"{tmp_path}/1.png" in refused("manifest", "coarsen", fine, "-o", tmp_path / "c.parquet")
    assert not (tmp_path / "c.parquet").exists()
