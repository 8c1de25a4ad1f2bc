"""Formats write what their pages say, and what we read back from them is what went out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import sent
from conftest import contents
from PIL import Image

from autolabel.manifests.formats.cityscapes import LABEL_IDS, CityscapesWriter, stem_of
from autolabel.manifests.formats.exchange import Format, Names, Outgoing, split_of
from autolabel.manifests.formats.hf import HfWriter
from autolabel.manifests.formats.known import FORMATS, known_format
from autolabel.manifests.formats.png import PngWriter
from autolabel.manifests.formats.portable import portable
from autolabel.manifests.formats.style import Style
from autolabel.manifests.formats.ultralytics import UltralyticsWriter
from autolabel.manifests.images import decode_label
from autolabel.manifests.label_space import CAMVID, CITYSCAPES, IGNORE, LabelClass, LabelSpace
from autolabel.manifests.reading import read_photograph
from autolabel.manifests.run.sample_labels import read_sample_label
from autolabel.manifests.samples import Sample, load_manifest
from autolabel.manifests.scan import scan


def items(folder: Path, names: list[str], space: LabelSpace = CAMVID) -> list[Outgoing]:
    """Labels on their way out; the first has a confidence too."""
    drawn = sent.labels(space, names)
    samples = load_manifest(sent.people(folder, drawn, space=space)).samples
    sure = np.arange(samples[0].height * samples[0].width, dtype=np.uint8).reshape(samples[0].height, -1)
    more = [(sure, 0.5), *[(None, None)] * (len(names) - 1)]
    return [
        Outgoing(s, portable(s.sample_id), drawn[s.sample_id], *known) for s, known in zip(samples, more, strict=True)
    ]


def written(writer: Format, outgoing: list[Outgoing], folder: Path) -> list[str]:
    """The files that a format writes."""
    writer.finish(folder, [writer.write(item, folder) for item in outgoing])
    return sorted(contents(folder))


# --- png --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", ["train", "source", "color"])
def test_pngs_are_read_back_by_their_kind_of_ids(ids: str, tmp_path: Path) -> None:
    (item,) = items(tmp_path / "in", ["a"], CITYSCAPES)
    names = written(PngWriter(CITYSCAPES, Style(label_ids=ids)), [item], tmp_path / "out")
    assert names == ["classes.json", "confidence/a.png", "images/a.png", "index.csv", "labels/a.png"]
    label = (tmp_path / "out/labels/a.png").read_bytes()
    assert np.array_equal(decode_label(label, CITYSCAPES, ids=ids), item.label)
    raw = np.asarray(Image.open(tmp_path / "out/labels/a.png"))
    assert (raw[item.label == IGNORE] == 255).all() and (raw[item.label != IGNORE] != 255).all()
    classes = json.loads((tmp_path / "out/classes.json").read_text())
    assert classes["ignored"] == 255
    assert classes["classes"][13] == {"id": 26 if ids == "source" else 13, "name": "car", "color": [0, 0, 142]}
    if ids == "color":
        assert np.array_equal(raw, item.label)


def test_the_index_lists_pairs_that_a_scan_reads(tmp_path: Path) -> None:
    outgoing = items(tmp_path / "in", [*sent.SIZES])
    written(PngWriter(CAMVID, Style()), outgoing, tmp_path / "out")
    manifest, _ = scan(tmp_path / "out", pairs=tmp_path / "out/index.csv", label_space=CAMVID)
    assert len(manifest.samples) == 5
    for item, sample in zip(outgoing, sorted(manifest.samples, key=lambda s: s.sample_id), strict=True):
        assert np.array_equal(read_sample_label(sample, CAMVID), item.label)
        assert np.array_equal(read_photograph(sample), read_photograph(item.sample))


def test_a_class_of_source_id_255_gives_ignored_pixels_another_id_or_is_refused(tmp_path: Path) -> None:
    last = LabelClass("last", (1, 2, 3), (255,))
    with pytest.raises(ValueError, match="source id 255 is a class of label space 'odd', and no id is ignored"):
        PngWriter(LabelSpace("odd", (last,)), Style(label_ids="source"))
    space = LabelSpace("odd", (last,), ignored_ids=(7,))
    (item,) = items(tmp_path / "in", ["a"], space)
    writer = PngWriter(space, Style(label_ids="source"))
    written(writer, [item], tmp_path / "out")
    raw = np.asarray(Image.open(tmp_path / "out/labels/a.png"))
    assert np.array_equal(raw, np.where(item.label == IGNORE, 7, 255))
    assert writer.notes == ("255 is a class there: ignored pixels are 7",)


# --- cityscapes -------------------------------------------------------------------------------------------------------


def test_cityscapes_has_the_official_names_and_ids_and_is_scanned_as_what_went_out(tmp_path: Path) -> None:
    outgoing = items(tmp_path / "in", ["aachen_000000_000019", "val/drive 1/17"], CITYSCAPES)
    stem = stem_of("val/drive 1/17")
    assert written(CityscapesWriter(CITYSCAPES, Style()), outgoing, tmp_path / "out") == sorted([
        "gtFine/aachen_000000_000019/aachen/aachen_000000_000019_gtFine_labelIds.png",
        "leftImg8bit/aachen_000000_000019/aachen/aachen_000000_000019_leftImg8bit.png",
        f"gtFine/val/val-drive-1-17/{stem}_gtFine_labelIds.png",
        f"leftImg8bit/val/val-drive-1-17/{stem}_leftImg8bit.png",
        "names.csv",
    ])  # fmt: skip
    official = {name: i for i, name in enumerate(LABEL_IDS)}
    assert official == LABEL_IDS and all(LABEL_IDS[c.name] == c.source_ids[0] for c in CITYSCAPES.classes)
    raw = np.asarray(Image.open(tmp_path / f"out/gtFine/val/val-drive-1-17/{stem}_gtFine_labelIds.png"))
    assert (raw[outgoing[1].label == IGNORE] == 0).all()
    manifest, _ = scan(tmp_path / "out", layout="cityscapes", splits=["val"])
    (sample,) = manifest.samples
    assert (sample.sample_id, sample.group) == (stem, "val-drive-1-17")
    assert np.array_equal(read_sample_label(sample, CITYSCAPES), outgoing[1].label)


def test_stems_of_ids_that_look_alike_are_apart_and_official_ones_stay() -> None:
    assert stem_of("bad-honnef_000000_000019") == "bad-honnef_000000_000019"
    stems = [stem_of(name) for name in ("a/b", "a-b", "a_b", "///", "\u00fc")]
    assert len(set(stems)) == 5
    assert all(len(stem.split("_")) == 3 and stem.isascii() for stem in stems)


# --- ultralytics ------------------------------------------------------------------------------------------------------


def test_ultralytics_finds_the_mask_of_a_photograph_by_its_path(tmp_path: Path) -> None:
    outgoing = items(tmp_path / "in", ["train/a/1", "val/c.1", "extra/x"])
    writer = UltralyticsWriter(CAMVID, Style())
    names = written(writer, outgoing, tmp_path / "out")
    photographs = [name for name in names if name.startswith("images/")]
    assert photographs == ["images/train/extra/x.png", "images/train/train/a/1.png", "images/val/val/c.1.png"]
    for item in outgoing:
        (photo,) = [name for name in photographs if name.endswith(f"/{item.name}.png")]
        mask = tmp_path / "out" / photo.replace("images", "masks", 1)
        assert np.array_equal(np.asarray(Image.open(mask)), item.label)
    lines = (tmp_path / "out/data.yaml").read_text().splitlines()
    assert lines[1:6] == ["train: images/train", "val: images/val", "masks_dir: masks", "names:", '  0: "sky"']
    assert writer.notes == (
        "Ultralytics has no place for confidence: none is written", "samples of split extra are in train"
    )  # fmt: skip


def test_ultralytics_is_told_that_no_sample_validates(tmp_path: Path) -> None:
    writer = UltralyticsWriter(CAMVID, Style(flat=True))
    written(writer, items(tmp_path / "in", ["train/a/1"]), tmp_path / "out")
    assert "val: images/train" in (tmp_path / "out/data.yaml").read_text()
    assert "no sample is of split val" in writer.notes[1]
    assert (tmp_path / "out/masks/train/train__a__1.png").exists()


# --- hf ---------------------------------------------------------------------------------------------------------------


def test_parquet_holds_the_bytes_of_photographs_and_pngs_and_the_features_that_datasets_reads(tmp_path: Path) -> None:
    outgoing = items(tmp_path / "in", ["train/a/1", "val/d", "train/b/1"])
    writer = HfWriter(CAMVID, Style())
    entries = [writer.write(item, tmp_path / "out") for item in outgoing]
    writer.finish(tmp_path / "out", writer.pack(tmp_path / "out", 0, entries))
    assert sorted(contents(tmp_path / "out")) == [
        "README.md", "data/train-00000.parquet", "data/val-00000.parquet", "id2label.json"
    ]  # fmt: skip
    table = pq.read_table(tmp_path / "out/data/train-00000.parquet")
    first, second = table.to_pylist()
    assert first["image"] == {"bytes": outgoing[0].sample.image.read_bytes(), "path": "train/a/1.png"}
    assert np.array_equal(decode_label(first["label"]["bytes"], CAMVID), outgoing[0].label)
    assert np.array_equal(decode_label(first["confidence"]["bytes"], None), outgoing[0].confidence)
    assert {name: first[name] for name in ("sample_id", "group", "source", "mean_confidence")} == {
        "sample_id": "train/a/1", "group": "a", "source": "fine", "mean_confidence": 0.5
    }  # fmt: skip
    assert second["confidence"] is None and second["mean_confidence"] is None
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"] == {"mode": "L", "_type": "Image"} and list(features) == table.column_names
    assert json.loads((tmp_path / "out/id2label.json").read_text())["10"] == "bicyclist"


# --- names and formats ------------------------------------------------------------------------------------------------


def test_a_tool_that_hands_back_a_spelt_name_means_the_sample() -> None:
    names = Names(["a:b", "con/x", "plain"])
    assert [names.find(name) for name in ("a%3Ab", "in/%63on/x", "%63on__x", "plain", "a:b")] == [
        "a:b", "con/x", "con/x", "plain", "a:b"
    ]  # fmt: skip


def test_the_split_of_a_sample_without_one_is_its_first_folder() -> None:
    def split(name: str, given: str = "") -> str:
        return split_of(Sample(name, Path("x"), 1, 1, split=given))

    assert [split("val/a"), split("validation/a"), split("val"), split("drive/val/a"), split("a", "train_extra")] == [
        "val", "val", "train", "train", "train_extra"
    ]  # fmt: skip


@pytest.mark.parametrize("name", [f.name for f in FORMATS if f.writes])
def test_every_format_that_is_written_is_made_by_its_name_and_refuses_unknown_styles(name: str) -> None:
    writer = known_format(name).writer(CITYSCAPES, Style())
    assert all(note.strip() == note for note in writer.notes)
    with pytest.raises(ValueError, match=r"label ids 'rgb': expected train, source, color"):
        Style(label_ids="rgb")


def test_an_unknown_format_is_refused_and_all_are_named() -> None:
    with pytest.raises(ValueError, match=r"format 'yolo' is unknown: expected png, cityscapes, ultralytics, hf, coco"):
        known_format("yolo")
