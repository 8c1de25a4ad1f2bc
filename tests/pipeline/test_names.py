"""If a label cannot be written under its name, a run fails after all its work, and again at every try."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import autolabel, quarantined, refused, scanned
from PIL import Image

from autolabel.pipeline.names import require_png_names, unusable


def refusal(*images: str) -> str:
    with pytest.raises(ValueError) as raised:
        require_png_names(Path("/runs/auto"), lambda: [[image] for image in images])
    return str(raised.value)


@pytest.mark.parametrize(
    "images",
    [
        [],
        ["a.jpg", "b.jpg", "c/a.jpg", "c/d/a.png"],
        ["q.jpg", "q/z.png"],
        ["ä/日.webp", "a.b.jpg", ".hidden.png", "12:30.png", "con.png"],
        ["x" * 251 + ".png"],
    ],
)
def test_usual_names_are_accepted(images: list[str]) -> None:
    require_png_names(Path("/runs/auto"), lambda: [images])


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (["a.jpg", "a.png"], "two images would both write labels/a.png: use --store zarr"),
        (["c/a.webp", "b.png", "c/a.jpeg"], "two images would both write labels/c/a.png: use --store zarr"),
        (["A.jpg", "a.jpg"], "two images would write labels that many disks take for one, labels/a.png"),
        (["X/1.png", "x/1.png"], "two images would write labels that many disks take for one, labels/x/1.png"),
        (["\u00e4.png", "a\u0308.png"], "two images would write labels that many disks take for one, labels/ä.png"),
        (["q.jpg", "q.png/z.png"], "an image would write labels/q.png, which is the folder of another one's label"),
        (["Q.png/z.png", "q.jpg"], "an image would write labels/q.png, which is the folder of another one's label"),
        (["y" * 254 + ".b"], f"the label of image '{'y' * 254}.b' cannot be called 'labels/{'y' * 254}.png': a name has"
                             " at most 255 bytes, not 258"),
        (["日" * 83 + ".jpg"], None),
        (["日" * 85 + ".jpg"], f"the label of image '{'日' * 85}.jpg' cannot be called"),
        (["/".join(["z" * 200] * 25) + ".jpg"], "the label /runs/auto/labels/zzz"),
        (["."], "image '.' has no name to call its label by"),
    ],
)  # fmt: skip
def test_a_name_that_no_label_can_have_is_refused_when_the_run_is_planned(
    images: list[str], reason: str | None
) -> None:
    if reason is None:
        require_png_names(Path("/runs/auto"), lambda: [[image] for image in images])
    else:
        assert refusal(*images).startswith(reason)
        assert "--store zarr" in refusal(*images)


@pytest.mark.parametrize(
    "name",
    ["con.png", "a/AUX.jpg", "nul", "com1.png", "lpt9.x.png", "prn /a.png", "conout$.png", "a./b.png", "a /b.png",
     "12:30.png", 'a"b.png', "a?.png", "a|b.png", "a\x07b.png"],
)  # fmt: skip
def test_windows_cannot_have_some_names_that_others_have(name: str) -> None:
    assert unusable(name, windows=True).startswith("Windows ")
    assert unusable(name, windows=False) == ""


@pytest.mark.parametrize(
    "name", ["console.png", "a/auxiliary.png", "com.png", "com10.png", "a.b.png", ".a.png", "ä b.png"]
)
def test_windows_can_have_names_that_only_look_like_devices(name: str) -> None:
    assert unusable(name, windows=True) == ""


# --- a manifest with such names ---------------------------------------------------------------------------------------


def rewritten(path: Path, image: str) -> Path:
    """The manifest with another image in its first row."""
    table = pq.read_table(path)
    images = [image, *table["image"].to_pylist()[1:]]
    place = table.schema.get_field_index("image")
    table = table.set_column(place, table.schema.field("image"), pa.array(images, pa.string()))
    pq.write_table(table, path.with_name("other.parquet"))
    return path.with_name("other.parquet")


@pytest.fixture
def manifest(city: Path, tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for k in range(3):
        noise = np.random.default_rng(k).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{k}.png")
    return scanned(city, tmp_path / "images")


@pytest.mark.parametrize("store", ["zarr", "png"])
@pytest.mark.parametrize("image", ["", "a\0b.png", "/etc/passwd", "../a.png"])
def test_a_manifest_with_a_path_that_is_none_is_refused_before_anything_is_labelled(
    manifest: Path, teacher: Path, image: str, store: str
) -> None:
    line = refused("generate", rewritten(manifest, image), "--teacher", teacher, "--out", manifest.parent / "run",
                   "--engine", "local", "--scales", "1", "--store", store)  # fmt: skip
    assert "leaves its root" in line and "other.parquet" in line
    assert not list((manifest.parent / "run").rglob("*.parquet"))


@pytest.mark.parametrize("image", ["1.png/z.png", "1.jpg", "x" * 300 + ".png"])
def test_png_labels_that_meet_are_refused_before_anything_is_labelled_and_zarr_takes_them(
    manifest: Path, teacher: Path, image: str
) -> None:
    request = ("generate", rewritten(manifest, image), "--teacher", teacher, "--engine", "local", "--scales", "1")
    assert "--store zarr" in refused(*request, "--out", manifest.parent / "png", "--store", "png")
    assert not (manifest.parent / "png" / "units").exists()
    made = autolabel(*request, "--out", manifest.parent / "zarr")
    assert made.exit_code in (0, 3), made.output
    assert list(quarantined(manifest.parent / "zarr")) == ["0"]
