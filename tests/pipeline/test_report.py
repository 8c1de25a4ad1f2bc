"""The page opens from disk and shows what the run did. If this fails, nobody looks before they train."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import socket
import tempfile
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, contents
from PIL import Image

from autolabel.manifests import drawing
from autolabel.manifests.evidence import PolygonCounts, PolygonEvidence
from autolabel.manifests.images import colourise, read_image, read_label
from autolabel.manifests.label_space import CITYSCAPES, IGNORE
from autolabel.manifests.policy import DENSE, PAPER, Area, Policy
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.samples import load_manifest
from autolabel.manifests.schemas import FATES
from autolabel.manifests.teachers import TeacherName
from autolabel.pipeline.analysis.audit_record import (
    Audit,
    ClassAudit,
    DiagramBins,
    MeanAudit,
    PixelAudit,
    ReliabilityDiagram,
)
from autolabel.pipeline.analysis.stats import FATE_NAMES, summarise
from autolabel.pipeline.job import LabelJob, Portion
from autolabel.pipeline.report import charts, facts, painter, pictures
from autolabel.pipeline.report.gallery import choose
from autolabel.pipeline.report.layers import Layers, Missing, from_levels
from autolabel.pipeline.report.notebook import look
from autolabel.pipeline.report.specks import find_specks
from autolabel.pipeline.report.write import write_report
from autolabel.pipeline.run import generate
from autolabel.teacher.checkpoints import save_checkpoint
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.networks.build import build


@pytest.fixture(scope="module")
def finished(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("report") / "run"
    generate(LabelJob(city / "coarse.parquet", teacher, run, scales=(1.0,)))
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


LAYERS = ["photograph", "coarse", "auto", "confidence", "disagreement", "fates"]


def gallery(page: Path) -> dict[str, Any]:
    """What the script of the page reads."""
    found = re.search(r'id="gallery-data">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert found
    return dict(json.loads(found[1]))


def by_scale(page: Path) -> list[str]:
    """The kinds of pictures that say what the teacher sees at every scale, from top to bottom."""
    return re.findall(r'<img src="[^"]+-(prediction|attention|combined)', page.read_text(encoding="utf-8"))


def files(page: Path) -> set[str]:
    """Every file that the page shows or links, and those that its viewer opens."""
    text, data = page.read_text(encoding="utf-8"), gallery(page)
    told = {f"{data['folder']}/{c['stem']}-{kind}.webp" for c in data["cards"] for kind in c["kinds"]}
    told |= {f"{data['folder']}/{c['stem']}-ids.js" for c in data["cards"]}
    return told | set(re.findall(r'(?:src|href)="(pictures-[^"]+)"', text))


def on_disk(page: Path) -> set[str]:
    return set(contents(page.parent)) - {"index.html"}


def opened(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(Image.open(path))


def test_every_image_has_all_layers_and_the_folder_holds_what_the_page_shows_and_no_more(run: Path) -> None:
    page = write_report(run, images=10)
    assert [card["kinds"] for card in gallery(page)["cards"]] == [LAYERS] * 10
    assert files(page) == on_disk(page) and len(on_disk(page)) == 10 * (len(LAYERS) + 2)  # thumbnail, ids
    text = page.read_text(encoding="utf-8")
    assert text.count('loading="lazy"') == 20 and "http://" not in text and "https://" not in text


def test_the_pictures_are_the_labels_to_the_pixel(run: Path, city: Path) -> None:
    page = write_report(run, images=3)
    asked = {s.sample_id: s for s in load_manifest(city / "coarse.parquet").samples}
    for card in gallery(page)["cards"]:
        auto, sample = Run.open(run).labels[card["id"]], asked[card["id"]]
        coarse = read_label(sample.coarse_label, CITYSCAPES, ids=sample.label_ids)  # type: ignore[arg-type]
        stem = page.parent / gallery(page)["folder"] / card["stem"]
        for kind, label in (("auto", auto), ("coarse", coarse)):
            drawn = opened(Path(f"{stem}-{kind}.webp"))
            assert (drawn[label != IGNORE] == colourise(label, CITYSCAPES)[label != IGNORE]).all()
            assert set(np.unique(drawn[label == IGNORE])) <= {0, 56}  # hatched
        script = Path(f"{stem}-ids.js").read_text()
        ids = np.asarray(Image.open(io.BytesIO(base64.b64decode(script.split("base64,")[1].split('"')[0]))))
        assert (ids[..., 0] == auto).all() and (ids[..., 1] == coarse).all()
        shares = [((coarse != IGNORE) & (auto == coarse)).mean(), ((coarse != IGNORE) & (auto == IGNORE)).mean()]
        assert card["disagreement"][:2] == pytest.approx(shares, abs=1e-4) and sum(
            card["disagreement"]
        ) == pytest.approx(1, abs=2e-4)


def test_the_page_says_of_every_image_what_the_statistics_say(run: Path) -> None:
    page = write_report(run, images=10)
    images = RunFolder(run).statistics("images").to_pandas().set_index("sample_id")
    classes = RunFolder(run).statistics("classes").to_pandas()
    for card in gallery(page)["cards"]:
        rows, pixels = classes[classes.sample_id == card["id"]].set_index("class_id"), 192 * 96
        told = {i: (round(auto * pixels), round(coarse * pixels)) for i, auto, coarse in card["classes"]}
        there = rows[(rows.pixels > 0) | (rows.coarse_pixels > 0)]
        assert told == {i: (row.pixels, row.coarse_pixels) for i, row in there.iterrows()}
        assert card["agreement"] == pytest.approx(images.agreement_with_coarse[card["id"]], abs=1e-6)
        assert [share for _, share, _ in card["classes"]] == sorted((c[1] for c in card["classes"]), reverse=True)


def test_the_least_trusted_come_first(run: Path) -> None:
    page = write_report(run, images=10)
    review = RunFolder(run).statistics("review").to_pydict()
    cards = gallery(page)["cards"]
    assert [card["id"] for card in cards] == review["sample_id"] and [card["rank"] for card in cards] == review["rank"]
    assert [card["trust"] for card in cards] == pytest.approx(review["trust"], abs=1e-6)


def test_three_quarters_of_the_shown_images_are_the_least_trusted_and_the_rest_is_spread() -> None:
    names = [f"{n:03}" for n in range(100)]
    assert choose(names, 8) == ["000", "001", "002", "003", "004", "005", "029", "076"]
    assert choose(names, 1) == ["000"] and choose(names, 100) == choose(names, 5000) == names and choose([], 3) == []


def test_a_new_report_replaces_the_pictures_of_the_old_one(run: Path) -> None:
    page = write_report(run, images=3)
    (page.parent / "my notes.txt").write_text("kept")
    chosen = sorted(Run.open(run).labels)[4]
    write_report(run, images=8, samples=(chosen,))
    assert [card["id"] for card in gallery(page)["cards"]] == [chosen]
    assert on_disk(page) == files(page) | {"my notes.txt"}


def test_a_report_that_is_interrupted_leaves_the_old_one_as_it_was(run: Path) -> None:
    page = write_report(run, images=2)
    before = contents(page.parent)

    def interrupt(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_report(run, images=5, progress=interrupt)
    assert contents(page.parent) == before


def test_without_its_teacher_the_page_says_what_is_missing(run: Path, tmp_path: Path) -> None:
    replace(Run.open(run), teacher=TeacherName.of(tmp_path / "gone.pt")).save()
    page = write_report(run, images=1)
    rest = [kind for kind in LAYERS if kind not in ("confidence", "fates")]
    assert gallery(page)["cards"][0]["kinds"] == rest and "No confidence maps: " in page.read_text(encoding="utf-8")
    page = write_report(run, images=1, attention=True)
    assert gallery(page)["cards"][0]["kinds"] == rest and by_scale(page) == []
    text = page.read_text(encoding="utf-8")
    assert "no attention" in text and "--teacher" in text


def test_the_teacher_runs_again_for_the_first_images_only(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(painter, "WITH_TEACHER", 2)
    cards = gallery(write_report(run, images=4))["cards"]
    assert ["confidence" in card["kinds"] for card in cards] == [True, True, False, False]
    assert "images only" in cards[2]["missing"]["confidence"]


def test_confidence_that_was_kept_needs_no_teacher(city: Path, teacher: Path, tmp_path: Path) -> None:
    run, mine = tmp_path / "run", Path(shutil.copyfile(teacher, tmp_path / "mine.pt"))
    job = LabelJob(city / "coarse.parquet", mine, run, scales=(1.0,), portion=Portion(limit=2), keep_confidence=4)
    generate(job)
    mine.unlink()
    page = write_report(run, images=5)
    kept = Run.open(run).confidence
    for card in gallery(page)["cards"]:
        drawn = opened(page.parent / gallery(page)["folder"] / f"{card['stem']}-confidence.webp")
        wanted = np.asarray(pictures.draw_share(from_levels(kept[card["id"]][1], kept.edges)))
        assert card["kinds"] == LAYERS and (drawn == wanted).all()
    assert "No confidence maps" not in page.read_text(encoding="utf-8")


def test_a_missing_or_damaged_picture_is_named_in_its_place(run: Path, city: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run, tmp_path / "further" / "down" / "run"))  # its images are found from its place
    page = write_report(moved, images=1)
    (card,) = gallery(page)["cards"]
    assert card["kinds"] == ["coarse", "auto", "disagreement"] and files(page) == on_disk(page)
    assert all("the file is missing" in card["missing"][kind] for kind in ("photograph", "confidence"))
    (shard,) = (run / "labels.zarr").rglob("c.*")
    shard.write_bytes(b"no labels")
    (card,) = gallery(write_report(run, images=1))["cards"]
    assert card["kinds"] == ["photograph", "coarse", "confidence", "fates"]
    assert "damaged" in card["missing"]["auto"] and "damaged" in card["missing"]["disagreement"]


# --- fates, specks, sizes ---------------------------------------------------------------------------------------------


def ids_of(page: Path, card: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What the viewer draws its layers from: (H, W, 3), auto label, coarse label and fates."""
    script = (page.parent / gallery(page)["folder"] / f"{card['stem']}-ids.js").read_text()
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(script.split("base64,")[1].split('"')[0]))))


@pytest.mark.parametrize("kept", [None, 6])
def test_the_drawn_fates_are_those_that_the_statistics_count(
    city: Path, teacher: Path, tmp_path: Path, kept: int | None
) -> None:
    """With kept confidence, and with a teacher that runs again."""
    policy = Policy("careful", 0.6, boundary=1, smallest_piece=9, coarse="agree")
    run = tmp_path / "run"
    portion = Portion(limit=2)
    generate(
        LabelJob(city / "coarse.parquet", teacher, run, (1.0,), policy=policy, portion=portion, keep_confidence=kept)
    )
    page = write_report(run)
    classes = (
        RunFolder(run).statistics("classes").to_pandas().groupby("sample_id")[[f"{f}_pixels" for f in FATES]].sum()
    )
    for card in gallery(page)["cards"]:
        counted = classes.loc[card["id"]].tolist()
        fates = ids_of(page, card)[..., 2]
        assert np.bincount(fates.ravel(), minlength=len(FATES)).tolist() == counted and min(counted[:3]) > 0
        assert {fate: round(share * fates.size) for fate, share in card["fates"]} == {
            fate: n for fate, n in zip(FATES, counted, strict=True) if n
        }
        specks = card["specks"]
        assert (
            specks["dropped"] and specks["fewest"] == 9 and specks["pixels"] == counted[FATES.index("in_small_piece")]
        )


def test_without_the_teacher_the_shares_of_the_fates_are_still_there(run: Path, tmp_path: Path) -> None:
    replace(Run.open(run), teacher=TeacherName.of(tmp_path / "gone.pt")).save()
    (card,) = gallery(write_report(run, images=1))["cards"]
    assert "fates" not in card["kinds"] and "--keep-confidence" in card["missing"]["fates"]
    assert sum(share for _, share in card["fates"]) == pytest.approx(1, abs=1e-5)


def test_specks_are_the_small_pieces_of_a_label_and_lie_where_they_are() -> None:
    label = np.full((6, 9), 3, np.uint8)
    label[1, 1:4], label[4, 6], label[0, 8] = 5, 7, IGNORE
    layers = Layers(Missing("no photograph"), label, None, None)
    found = find_specks(layers, Policy(), 4)
    assert found and (found.count, found.pixels, found.dropped) == (2, 4, False)
    assert found.places.tolist() == [[2, 1, 3], [6, 4, 1]]  # the largest first
    assert (none := find_specks(layers, Policy(), 1)) and none.count == 0 and none.places.shape == (0, 3)
    dropping = Policy(smallest_piece=4)
    assert find_specks(layers, dropping, 9) is None  # nobody knows what it has dropped
    fates = np.where(label == 5, FATES.index("in_small_piece"), 0).astype(np.uint8)
    found = find_specks(replace(layers, fates=fates), dropping, 9)
    assert found and (found.count, found.pixels, found.dropped, found.fewest) == (1, 3, True, 4)


def test_the_first_images_are_drawn_at_full_size_and_further_ones_smaller(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(painter, "FULL_SIZED", 1)
    monkeypatch.setattr(painter, "LONGEST", 96)
    page = write_report(run, images=2)
    full, small = gallery(page)["cards"]
    folder = page.parent / gallery(page)["folder"]
    assert (full["full"], small["full"]) == ([192, 96], [96, 48])
    assert opened(folder / f"{full['stem']}-photograph.webp").shape == (96, 192, 3) == ids_of(page, full).shape
    assert opened(folder / f"{small['stem']}-photograph.webp").shape == (48, 96, 3) == ids_of(page, small).shape
    assert "(1 image of these is drawn smaller" in page.read_text(encoding="utf-8")


# --- a page that is sent ----------------------------------------------------------------------------------------------


def test_the_page_tells_nothing_of_the_machine_that_made_it(run: Path, tmp_path: Path) -> None:
    """Missing files are named, in notes and in pictures' places: by their names alone."""
    truth, note = str(tmp_path / "truth.parquet"), f"{tmp_path}/net.pt has seen them"
    replace(AUDIT, truth=truth, notes=[note]).write(run / "audit.json")
    moved = Path(shutil.copytree(run, tmp_path / "further" / "down" / "run"))  # its images are found from its place
    replace(
        Run.open(moved), teacher=TeacherName.of(tmp_path / "gone.pt"), input_manifest=tmp_path / "gone.parquet"
    ).save()
    page = write_report(moved, images=2)
    text = "".join(path.read_text(encoding="utf-8") for path in (page, *page.parent.rglob("*.js")))
    assert "against truth.parquet" in text and "<li>net.pt has seen them</li>" in text
    assert "gone.pt does not exist" in text and "gone.parquet" in text and "the file is missing" in text
    for place in (tmp_path, tmp_path.parent, Path(tempfile.gettempdir()), Path.home(), Path.cwd()):
        assert len(str(place)) < 3 or f"{place}/" not in text, place
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text)


def test_marks_outlive_the_next_report_of_a_run_and_are_not_those_of_another(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    recipe = Run.open(other).recipe
    replace(Run.open(other), recipe=replace(recipe, policy=Policy("another", 0.9))).save()
    key = gallery(write_report(run, images=1))["key"]
    assert gallery(write_report(other, images=1))["key"] != key
    replace(Run.open(run), input_sha256="0" * 64).save()  # the manifest has grown
    assert gallery(write_report(run, images=2))["key"] == key


def test_a_class_that_is_lost_stands_out_in_each_of_its_bad_numbers(run: Path) -> None:
    """All pixels of a lost class go to others: that stands out as much as a share of a doubtful one."""
    summary = summarise(run)
    rows = summary.classes.copy()
    rows[["agreement", "contradicted"]] = 1.0, 0.0
    rows.loc["road", ["coarse_pixels", "auto_pixels", "agreement", "contradicted"]] = [100, 0, 0.0, 1.0]
    rows.loc["sky", ["coarse_pixels", "auto_pixels", "agreement", "contradicted"]] = [100, 50, 0.7, 0.3]
    plot = charts.ClassPlot.of(replace(summary, classes=rows))
    assert plot.lost == ["road"] and list(plot.doubtful) == ["sky"]
    assert {cell for cell in plot.bad if cell[0] == "road"} == {
        ("road", "auto %"), ("road", "agrees %"), ("road", "contradicted %"),
    }  # fmt: skip
    assert [cell for cell in plot.bad if cell[0] == "sky"] == [("sky", "contradicted %")]


def test_an_unknown_sample_is_named(run: Path) -> None:
    with pytest.raises(ValueError, match="sample 'atlantis' has no label"):
        write_report(run, images=1, samples=("atlantis",))
    assert not (run / "report").exists()


# --- colours ----------------------------------------------------------------------------------------------------------


def test_disagreement_is_told_apart_pixel_by_pixel() -> None:
    coarse, auto = np.array([[3, 3, 3, IGNORE, IGNORE]], np.uint8), np.array([[3, IGNORE, 5, 5, IGNORE]], np.uint8)
    assert drawing.disagreement(coarse, auto).tolist() == [[0, 1, 2, 3, 3]]
    drawn = np.asarray(drawing.draw_disagreement(coarse, auto))
    assert [tuple(pixel) for pixel in drawn[0, :4].tolist()] == list(drawing.DISAGREEMENT.values())


def test_levels_of_confidence_are_drawn_as_their_middle() -> None:
    level = np.array([[0, 1, 2]], np.uint8)
    assert from_levels(level, (0.5, 0.9)).tolist() == [[0.25, pytest.approx(0.7), pytest.approx(0.95)]]


# What is left of linear RGB for people without red, green or blue cones: Viénot, Brettel and Mollon 1999 for the first
# two, and for the third Machado, Oliveira and Fernandes 2009.
BLIND = {
    "red": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "green": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    "blue": [[1.25553, -0.07675, -0.17878], [-0.07841, 0.93081, 0.14760], [0.00473, 0.69137, 0.30390]],
}


def linear(colour: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    c = np.array(colour[:3]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Linear RGB -> CIE L*a*b*, D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ rgb.clip(0, 1) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("cones", BLIND)
def test_disagreement_can_be_read_without_one_kind_of_cones(cones: str) -> None:
    seen = {name: lab(np.array(BLIND[cones]) @ linear(c)) for name, c in drawing.DISAGREEMENT.items()}
    for a, b in combinations(seen, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 35, (a, b)


def contrast(a: str, b: str) -> float:
    """The contrast ratio of two colours "#rgb" or "#rrggbb", 1 to 21 (WCAG 2)."""
    bright, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * d for d in colour[1:])
    return float(linear(tuple(bytes.fromhex(digits))) @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_on_every_ground(theme: str) -> None:
    style = (ROOT / "manifests" / "style.css").read_text(encoding="utf-8")
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]+);", light if theme == "light" else dark))
    for text in ("ink", "soft", "accent", "warn"):
        for ground in ("page", "card"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["ink"], colours["warn-card"]) >= 4.5 <= contrast(colours["warn"], colours["warn-card"])
    assert contrast(colours["edge"], colours["page"]) >= 3 <= contrast(colours["edge"], colours["card"])  # of controls


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_policy_is_told_in_words(run: Path) -> None:
    opened = Run.open(run)

    def told(policy: Policy) -> dict[str, str]:
        recipe = replace(opened.recipe, scales=(0.5, 1.0), flip=True, policy=policy)
        return dict(facts.policy_facts(replace(opened, recipe=recipe)))

    plain = told(PAPER)
    assert plain["Scales"] == "0.5×, 1× and mirrored" and plain["By class"] == "the same threshold for all"
    assert plain["Human labels"] == "ignore for all classes"
    assert not facts.has_more_rules(PAPER) and not facts.has_more_rules(Policy("mine", 0.7))
    careful = Policy(
        "careful", 0.9, {"pole": 0.4}, 1.5, Area((0.1, 0.9), (0, 1), "fractions"), 2, 64, "agree",
        {"person": "union", "rider": "union"},
    )  # fmt: skip
    words = told(careful)
    assert words["Name"] == "careful" and words["By class"] == "pole 0.4" and facts.has_more_rules(careful)
    assert words["Human labels"] == "union for person, rider; agree for all others"
    assert words["Area"] == "rows 0.1 to 0.9, columns 0 to 1, fractions"
    assert "2 px" in words["Boundary"] and words["Pieces"] == "pieces smaller than 64 px are ignored"
    counts = PolygonCounts.of(
        CITYSCAPES, {"2048x1024": 60, "1024x512": 1}, np.ones((19, 15, 19), np.int64), np.ones((19, 7, 2), np.int64)
    )
    dense = DENSE.counted(counts)
    assert told(dense)["Polygons"] == (
        "where people named nothing, the teacher weighs 0.9, what lies around polygons 0.4, counted on 60 images of"
        " 2048 × 1024 and 1 image of 1024 × 512"
    )
    fitted = told(replace(dense, polygons=PolygonEvidence(counts, 0.9, 0.5, {"pole": 0.42, "sky": 0.0, "car": -1.5})))
    assert fitted["Biases"] == "pole +0.42, car −1.5: there these classes are likelier (+) or less likely (−)"
    assert "Biases" not in told(dense) and facts.has_more_rules(dense)


def test_the_fates_of_a_class_are_shares_of_its_pixels(run: Path) -> None:
    classes = RunFolder(run).statistics("classes").to_pandas()
    road = classes[classes.class_name == "road"]
    (told,) = (row for row in charts.class_fates(summarise(run)) if row.name == "road")
    top = road[[f"{fate}_pixels" for fate in FATES]].to_numpy().sum()
    assert told.kept == road.kept_pixels.sum() / top
    shares = {name: share for name, _, share in told.parts}
    assert shares == {"kept": told.kept, "below its threshold": road.below_threshold_pixels.sum() / top}
    assert set(charts.FATE_COLOURS) == set(FATE_NAMES) == set(FATES)


AUDIT = Audit(
    truth="val.parquet", truth_sha256="0" * 64, images=3, leaked=1, target_precision=0.95,
    human=PixelAudit(0.4, 0.99), auto=PixelAudit(0.7, 0.9),
    classes=[
        ClassAudit("road", 9, 8, 0.5, 0.875, 0.75, 0.8, 0.7, 0.2, 0.35, 0.96, 0.5, {"1": 0.1, "2": 0.25, "4": 0.3})
    ],
    mean=MeanAudit(0.875, 0.75, 0.8, 0.7, None, {"1": 0.1, "2": 0.25, "4": 0.3}),
    reliability=ReliabilityDiagram(
        edges=[k / 20 for k in range(21)], ece=0.115,
        all=DiagramBins([0] * 18 + [100, 300], [0] * 18 + [50, 300], [None] * 18 + [0.9, 0.98]),
        classes={
            "road": DiagramBins([0] * 19 + [4], [0] * 19 + [3], [None] * 20),
            "sky": DiagramBins([0] * 20, [0] * 20, [None] * 20),
        },
    ),
    temperature=None, coarse=[], notes=["something <to> know"],
)  # fmt: skip


def test_an_audit_is_on_the_page(run: Path) -> None:
    plot = charts.ReliabilityPlot.of(AUDIT)
    assert plot and [(bar.right, bar.share) for bar in plot.bars] == [(0.5, 0.25), (1.0, 0.75)]
    ((name, (bar,), error),) = plot.classes
    assert (name, bar.right, bar.share, error) == ("road", 0.75, 1.0, 0.2)
    assert "Reliability" not in write_report(run, images=1).read_text(encoding="utf-8")
    AUDIT.write(run / "audit.json")
    text = write_report(run, images=1).read_text(encoding="utf-8")
    assert cells(text, "road", after="<h2>Audit") == [
        "100.00",
        "50.0",
        "87.5",
        "75.0",
        "80.0",
        "70.0",
        "10.0",
        "25.0",
        "30.0",
    ]
    assert cells(text, "road", after="Calibration, and") == ["20.0", "0.35", "96.0", "50.0"]
    assert "11.5 %" in text and "something &lt;to&gt; know" in text
    assert "3 images" in text and "Leaked" in text
    assert "People had outlined 40.0 % of the pixels, 99.0 % of them rightly. Now 70.0 % have a label" in text
    replace(AUDIT, reliability=None).write(run / "audit.json")
    assert "Reliability" not in write_report(run, images=1).read_text(encoding="utf-8")


def cells(page: str, row: str, after: str) -> list[str]:
    """The numbers in a row of the first table after a text."""
    found = re.search(rf'<th scope="row">(?:<i [^>]*></i>)?{row}</th>(.*?)</tr>', page[page.index(after) :], re.DOTALL)
    assert found
    return re.findall(r'<td class="[^"]*" data-name="[^"]*">(.*?)</td>', found[1])


def test_the_page_has_the_table_that_the_terminal_prints(run: Path) -> None:
    page, table = write_report(run, images=1).read_text(encoding="utf-8"), summarise(run).class_table()
    assert len(table.rows) > 3
    for name, *numbers in table.rows:
        assert cells(page, name, after="<h2>Classes") == [html.escape(number) for number in numbers]


# --- what every scale says --------------------------------------------------------------------------------------------


def labelled(city: Path, checkpoint: Path, out: Path, scales: tuple[float, ...], combine: str = "network") -> Path:
    generate(LabelJob(city / "coarse.parquet", checkpoint, out, scales, combine=combine, portion=Portion(limit=2)))
    return out


def untrained(arch: str, path: Path) -> Path:
    torch.manual_seed(0)
    network = build(arch, len(CITYSCAPES), scales=2)
    for weights in network.scale_attn.parameters():
        torch.nn.init.normal_(weights, std=1.0)  # sure of itself without any reason
    save_checkpoint(path, network, arch=arch, space=CITYSCAPES)
    return path


@pytest.fixture(scope="module")
def scaled(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled(city, teacher, tmp_path_factory.mktemp("scaled") / "run", (0.5, 1.0, 2.0))


def test_attention_adds_each_scale_with_its_share_and_the_combined_prediction(scaled: Path) -> None:
    page = write_report(scaled, images=2, attention=True)
    assert by_scale(page) == [*["prediction", "attention"] * 3, "combined"] * 2 and files(page) == on_disk(page)
    text = page.read_text(encoding="utf-8")
    for scale in ("0.5×", "1×", "2×"):
        assert f"<b>Prediction at {scale}</b>" in text and f"<b>Attention for {scale}</b>" in text
    assert text.count("<span>what the others leave,</span>") == 2  # the highest scale of both images
    write_report(scaled, images=2)
    assert by_scale(page) == [] and files(page) == on_disk(page)  # only when it is asked for


def test_shares_are_those_by_which_the_predictions_become_the_combined_one(city: Path, teacher: Path) -> None:
    network, image = load_teacher(teacher, device="cpu"), read_image(next((city / "data").rglob("*_leftImg8bit.png")))
    views = network.views(image, scales=(1.0, 0.5, 2.0))
    assert [view.scale for view in views] == [0.5, 1.0, 2.0]
    half, one, _ = (part.attention for part in network.parts(image, scales=(0.5, 1.0, 2.0)))
    assert half is not None and one is not None and 0 < views[0].share.min() < views[0].share.max() < 1
    np.testing.assert_allclose(sum(view.share for view in views), 1, atol=1e-5)
    np.testing.assert_allclose(views[0].share.mean(), half.mean().item(), atol=0.02)
    combined = network.confidence(image, scales=(0.5, 1.0, 2.0))[0]
    alike = [float((view.label == combined).mean()) for view in views]
    assert all(view.label.shape == view.share.shape == combined.shape for view in views) and max(alike) > 0.5


def test_scales_that_count_equally_have_no_attention_and_the_page_says_so(
    city: Path, teacher: Path, tmp_path: Path
) -> None:
    run = labelled(city, teacher, tmp_path / "run", (0.5, 1.0), "average")
    page = write_report(run, images=1, attention=True)
    assert by_scale(page) == ["prediction", "prediction", "combined"]
    assert "they count equally everywhere" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("arch", ["hrnet18s_ocr_explicit", "hrnet18s_ocr_explicit_pairs", "hrnet18s_ocr_mscale2"])
def test_every_kind_of_attention_can_be_shown(city: Path, tmp_path: Path, arch: str) -> None:
    run = labelled(city, untrained(arch, tmp_path / "net.pt"), tmp_path / "run", (0.5, 1.0))
    page = write_report(run, images=1, attention=True)
    assert by_scale(page) == [*["prediction", "attention"] * 2, "combined"]
    text = page.read_text(encoding="utf-8")
    assert ("need not add up to 1" in text) == ("explicit" in arch)
    assert ("<span>in truth " in text) == (arch == "hrnet18s_ocr_explicit")  # the others' are sigmoids


def test_one_scale_computes_no_attention(run: Path) -> None:
    page = write_report(run, images=1, attention=True)
    assert by_scale(page) == [] and "looks at one scale only" in page.read_text(encoding="utf-8")


def test_a_missing_photograph_leaves_out_attention_and_gives_the_reason(scaled: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(scaled, tmp_path / "further" / "down" / "run"))  # its images are found from its place
    page = write_report(moved, images=1, attention=True)
    assert by_scale(page) == [] and "the file is missing" in gallery(page)["cards"][0]["missing"]["photograph"]


# --- in a notebook ----------------------------------------------------------------------------------------------------


def embedded(page: str) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """The pictures inside a page."""
    found = re.findall(r'<img src="data:image/webp;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def test_a_notebook_shows_photograph_coarse_and_auto_label_side_by_side(run: Path) -> None:
    found = look(run, 3)
    ranked = RunFolder(run).statistics("review")["sample_id"].to_pylist()
    assert [row.sample_id for row in found.rows] == choose(ranked, 3)
    page, labels = found._repr_html_(), Run.open(run).labels
    pictures = embedded(page)
    assert "http" not in page and len(pictures) == 9
    for row, auto in zip(found.rows, pictures[2::3], strict=True):
        label = labels[row.sample_id]
        assert (auto[label != IGNORE] == colourise(label, CITYSCAPES)[label != IGNORE]).all()
        assert f"<b>{row.sample_id}</b>" in page
        assert set(np.unique(label[label != IGNORE])) <= row.class_ids
    assert "3 images" in str(found)


def test_a_notebook_shows_named_samples_and_the_reason_where_a_picture_is_missing(run: Path, tmp_path: Path) -> None:
    name = sorted(Run.open(run).labels)[3]
    moved = Path(shutil.copytree(run, tmp_path / "further" / "down" / "run"))  # its images are found from its place
    page = look(moved, samples=[name])._repr_html_()
    assert f"<b>{name}</b>" in page and len(embedded(page)) == 2 and "the file is missing" in page
    with pytest.raises(ValueError, match=r"sample 'atlantis' has no label in .*: name one of its 10 labelled ones"):
        look(run, samples=["atlantis"])
