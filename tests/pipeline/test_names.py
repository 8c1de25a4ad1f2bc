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
        ["q.jpg", "q/z.png", "q.png/z.png", "p.PNG/z.jpg", "p.jpg"],
        ["", "", "a\0b.png", "a\0b.png", ".", "./", ".png"],
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
        (["q.png/z.png", "q.png_/z.jpg"], "two images would both write labels/q.png_/z.png: use --store zarr"),
        (["y" * 254 + ".b"], f"the label of image '{'y' * 254}.b' cannot be called 'labels/{'y' * 254}.png': a name has"
                             " at most 255 bytes, not 258"),
        (["日" * 83 + ".jpg"], None),
        (["日" * 85 + ".jpg"], f"the label of image '{'日' * 85}.jpg' cannot be called"),
        (["/".join(["z" * 200] * 25) + ".jpg"], "the label /runs/auto/labels/zzz"),
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
@pytest.mark.parametrize("image", ["/etc/passwd", "../a.png", "a/../../b.png"])
def test_a_manifest_with_a_path_that_leaves_it_is_refused_before_anything_is_labelled(
    manifest: Path, teacher: Path, image: str, store: str
) -> None:
    line = refused("generate", rewritten(manifest, image), "--teacher", teacher, "--out", manifest.parent / "run",
                   "--engine", "local", "--scales", "1", "--store", store)  # fmt: skip
    assert "leaves its root" in line and "other.parquet" in line
    assert not list((manifest.parent / "run").rglob("*.parquet"))


@pytest.mark.parametrize("image", ["1.jpg", "x" * 300 + ".png"])
def test_png_labels_that_meet_are_refused_before_anything_is_labelled_and_zarr_takes_them(
    manifest: Path, teacher: Path, image: str
) -> None:
    request = ("generate", rewritten(manifest, image), "--teacher", teacher, "--engine", "local", "--scales", "1")
    assert "--store zarr" in refused(*request, "--out", manifest.parent / "png", "--store", "png")
    assert not (manifest.parent / "png" / "units").exists()
    made = autolabel(*request, "--out", manifest.parent / "zarr")
    assert made.exit_code in (0, 3), made.output
    assert list(quarantined(manifest.parent / "zarr")) == ["0"]


@pytest.mark.parametrize("store", ["zarr", "png"])
@pytest.mark.parametrize(
    ("image", "reason"), [("", "not a regular file"), ("a\0b.png", "the file is missing"), (".", "not a regular file")]
)
def test_a_name_that_no_file_can_have_costs_its_image(
    manifest: Path, teacher: Path, image: str, reason: str, store: str
) -> None:
    request = ("generate", rewritten(manifest, image), "--teacher", teacher, "--out", manifest.parent / "run",
               "--engine", "local", "--scales", "1", "--store", store)  # fmt: skip
    for _ in range(2):
        assert autolabel(*request, "--max-quarantined", 1).exit_code == 0
        assert quarantined(manifest.parent / "run") == {"0": reason}
    assert autolabel("verify", manifest.parent / "run").exit_code == 0


def test_an_image_beside_a_folder_that_is_called_like_its_label_is_labelled(
    city: Path, teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "images" / "q.png").mkdir(parents=True)
    for k, name in enumerate(("q.jpg", "q.png/z.png")):
        noise = np.random.default_rng(k).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / name)
    made = autolabel("generate", scanned(city, tmp_path / "images"), "--teacher", teacher, "--out", tmp_path / "run",
                     "--engine", "local", "--scales", "1", "--store", "png")  # fmt: skip
    assert made.exit_code == 0, made.output
    labels = sorted(path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*.png"))
    assert labels == ["labels/q.png", "labels/q.png_/z.png"]
    assert autolabel("verify", tmp_path / "run").exit_code == 0
