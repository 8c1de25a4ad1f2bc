"""The real readers of other people read our exports, every pixel. If this fails, an export is one in name alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sent
from conftest import autolabel
from PIL import Image
from real_reader import RealReader

from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.run.folder import Run
from autolabel.manifests.scores import Confusion
from autolabel.pipeline.outgoing import shades

pytestmark = pytest.mark.slow

CITYSCAPES_SCRIPTS = RealReader("cityscapesscripts", ("cityscapesscripts==2.3.0",))
DATASETS = RealReader("datasets", ("datasets==5.2.0", "pillow"))
TORCH = RealReader("torch")


def exported(source: Path, to: str, out: Path, *options: object) -> Path:
    result = autolabel("export", source, "--to", to, "-o", out, *options)
    assert result.exit_code == 0, result.output
    return out


def expected(run: Path) -> dict[str, sent.Map]:
    """Every picture that an export of a run sends, by its column and sample id."""
    opened = Run.open(run)
    levels = shades(opened.confidence.edges)
    pictures = {f"label:{name}": label for name, label in opened.labels.items()}
    pictures |= {f"confidence:{name}": levels[level] for name, (_, level) in opened.confidence.items()}
    for sample in opened.manifest.samples():
        pictures[f"image:{sample.sample_id}"] = np.asarray(Image.open(sample.image))
    return pictures


def assert_same(read: dict[str, sent.Map], pictures: dict[str, sent.Map]) -> None:
    assert read.keys() == pictures.keys()
    for name, pixels in pictures.items():
        assert np.array_equal(read[name], pixels), name


@pytest.mark.parametrize("store", ["zarr", "png"])
def test_datasets_opens_the_folder_and_gives_every_pixel(store: str, tmp_path: Path) -> None:
    run = sent.machine(tmp_path, sent.labels(), store=store)
    said, read = DATASETS.run("read_hf.py", exported(run, "hf", tmp_path / "hf"))
    assert_same(read, expected(run))
    assert said["streamed"] == dict.fromkeys(sent.SIZES, True)
    assert {name: row["split"] for name, row in said["rows"].items()} == {n: n.split("/")[0] for n in sent.SIZES}
    statistics = Run.open(run).statistics("images", ["sample_id", "mean_confidence"]).to_pylist()
    for row in statistics:
        assert said["rows"][row["sample_id"]]["mean_confidence"] == np.float32(row["mean_confidence"])


def test_datasets_opens_labels_of_people_which_have_no_confidence(tmp_path: Path) -> None:
    drawn = sent.labels()
    said, read = DATASETS.run("read_hf.py", exported(sent.people(tmp_path, drawn), "hf", tmp_path / "hf"))
    assert {name for name in read if name.startswith("confidence")} == set()
    assert all(np.array_equal(read[f"label:{name}"], label) for name, label in drawn.items())
    assert {row["mean_confidence"] for row in said["rows"].values()} == {None}


def test_a_data_loader_of_torch_gives_every_pixel(tmp_path: Path) -> None:
    run = sent.machine(tmp_path, sent.labels())
    _, read = TORCH.run("load_pngs.py", exported(run, "png", tmp_path / "png"))
    assert_same(read, expected(run))


def test_the_official_scorer_gives_our_iou(tmp_path: Path) -> None:
    names = ["aachen_000000_000019", "drive/17", "drive/18"]
    truth, guess = sent.labels(CITYSCAPES, names), sent.labels(CITYSCAPES, names, seed=7)
    for name in names:  # half of the pixels are right
        guess[name][:, ::2] = truth[name][:, ::2]
    folders = []
    for place, drawn in (("truth", truth), ("guess", guess)):
        manifest = sent.people(tmp_path / place, drawn, space=CITYSCAPES)
        folders.append(exported(manifest, "cityscapes", tmp_path / f"{place}-out") / "gtFine")
    confusion = Confusion(len(CITYSCAPES))
    for name in names:
        confusion.add(truth[name], guess[name])
    said, _ = CITYSCAPES_SCRIPTS.run("score_cityscapes.py", *folders)
    assert said["images"] == 3
    for name, ours in zip(CITYSCAPES.names, confusion.iou(), strict=True):
        assert np.isclose(said["iou"][name], ours, rtol=0, atol=1e-6, equal_nan=True), name
    assert said["mean"] == pytest.approx(confusion.mean_iou(), abs=1e-6)
    itself, _ = CITYSCAPES_SCRIPTS.run("score_cityscapes.py", folders[0], folders[0])
    assert itself["mean"] == 1.0
