"""Libraries of labelling tools read what we send, and we read what they write. If this fails, corrections are lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import sent
from conftest import autolabel
from real_reader import RealReader

from autolabel.manifests.formats.known import known_format
from autolabel.manifests.label_space import CAMVID
from autolabel.manifests.run.folder import Run

pytestmark = pytest.mark.slow

PYCOCOTOOLS = RealReader("pycocotools", ("pycocotools==2.0.11", "pillow"))
DATUMARO = RealReader("datumaro", ("datumaro==1.13.12",))
LABEL_STUDIO = RealReader("label-studio", ("label-studio-sdk==2.1.2",))


@pytest.fixture(scope="module", params=["zarr", "png"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    labels = sent.labels()
    noise = np.random.default_rng(1).choice(np.array([0, 4, 255], np.uint8), (24, 40))
    return Run.open(sent.machine(tmp_path_factory.mktemp("run"), {**labels, "train/a/2": noise}, store=request.param))


def exported(run: Run, to: str, out: Path) -> Path:
    result = autolabel("export", run.path, "--to", to, "-o", out)
    assert result.exit_code == 0, result.output
    return out


def edited(run: Run, path: Path) -> Iterator[tuple[str, sent.Map]]:
    """The labels of a run with 1 % of their pixels, one at least, repainted; saved under `path` for the scripts."""
    dice = np.random.default_rng(3)
    labels = {}
    for name, label in run.labels.items():
        labels[name] = label.copy()
        for place in dice.choice(label.size, max(1, label.size // 100), replace=False):
            labels[name].flat[place] = dice.choice([value for value in (0, 5, 10, 255) if value != label.flat[place]])
        yield name, labels[name]
    np.savez(path, **{name.replace("/", "|"): label for name, label in labels.items()})


def assert_same(found: Mapping[str, sent.Map], expected: Mapping[str, sent.Map]) -> None:
    assert found.keys() == expected.keys()
    for name, label in expected.items():
        assert np.array_equal(found[name], label), name


def assert_back(run: Run, reads: str, back: Path, labels: dict[str, sent.Map], out: Path) -> None:
    """The reader gives these labels, and `autolabel import` counts exactly the pixels that were repainted."""
    if reads != "label-studio":  # a file of theirs has nothing for an image without any mask
        labels = {name: label for name, label in labels.items() if (label != 255).any()}
    assert_same({one.name: one.label for one in known_format(reads).read(back, CAMVID)}, labels)
    result = autolabel("import", reads, back, "--run", run.path, "-o", out)
    assert result.exit_code == 0, result.output
    changed = sum(int((labels[name] != label).sum()) for name, label in run.labels.items() if name in labels)
    assert f"{changed} pixels changed" in result.output


def test_pycocotools_decodes_every_mask_and_what_it_writes_comes_back(run: Run, tmp_path: Path) -> None:
    out = exported(run, "coco", tmp_path / "out")
    said, read = PYCOCOTOOLS.run("read_coco.py", out)
    assert said == {"names": list(CAMVID.names), "boxes": True}
    expected = {f"{kind}:{name}.png": label for kind in ("stuff", "panoptic") for name, label in run.labels.items()}
    assert_same(read, expected)
    labels = dict(edited(run, tmp_path / "edited.npz"))
    PYCOCOTOOLS.run("write_coco.py", tmp_path / "edited.npz", out / "stuff.json", tmp_path / "back.json")
    assert_back(run, "coco", tmp_path / "back.json", labels, tmp_path / "fixed.parquet")


def test_datumaro_reads_what_cvat_imports_and_what_cvat_exports_comes_back(run: Run, tmp_path: Path) -> None:
    out = exported(run, "cvat", tmp_path / "out")
    said, read = DATUMARO.run("read_cvat.py", out / "masks.zip")
    assert said["names"] == ["background", *CAMVID.names]
    found = {}
    for name, objects in said["objects"].items():
        found[name] = np.full(run.labels[name].shape, 255, np.uint8)
        for mask, label in zip(read[name.replace("/", "|")], objects, strict=True):
            assert (found[name][mask] == 255).all()
            found[name][mask] = CAMVID.names.index(label)
    assert_same(found, dict(run.labels.items()))
    labels = dict(edited(run, tmp_path / "edited.npz"))
    DATUMARO.run("write_cvat.py", tmp_path / "edited.npz", out / "masks.zip", tmp_path / "back.zip")
    assert_back(run, "cvat", tmp_path / "back.zip", labels, tmp_path / "fixed.parquet")


def test_label_studio_decodes_every_stroke_and_what_it_writes_comes_back(run: Run, tmp_path: Path) -> None:
    out = exported(run, "label-studio", tmp_path / "out")
    said, read = LABEL_STUDIO.run("read_label_studio.py", out)
    assert said == {"labels": list(CAMVID.names), "valid": [True] * len(sent.SIZES), "again": True}
    assert_same({name.replace("|", "/"): label for name, label in read.items()}, dict(run.labels.items()))
    labels = dict(edited(run, tmp_path / "edited.npz"))
    LABEL_STUDIO.run("write_label_studio.py", tmp_path / "edited.npz", out, tmp_path / "back.json")
    assert_back(run, "label-studio", tmp_path / "back.json", labels, tmp_path / "fixed.parquet")
