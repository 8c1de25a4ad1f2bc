"""The page works in a browser: nothing from the network, by mouse, by keyboard, on a phone, with hundreds of images.

If this fails, a report looks fine in its tests and is of no use to whoever opens it: nobody can decide there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import CHROMIUM, FAINT, playwright
from PIL import Image

from autolabel.manifests.drawing import DISAGREEMENT, disagreement
from autolabel.manifests.evidence import INSIDE, OUTSIDE, PolygonCounts
from autolabel.manifests.ids import read_ids
from autolabel.manifests.images import colourise
from autolabel.manifests.label_space import CITYSCAPES, IGNORE
from autolabel.manifests.policy import PAPER
from autolabel.manifests.reading import read_coarse
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.samples import load_manifest, open_manifest, save_manifest
from autolabel.manifests.scan import scan
from autolabel.manifests.tables import table_bytes
from autolabel.manifests.teachers import TeacherName
from autolabel.pipeline.adopt import Pngs, adopt, adopting_job
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.report.page import write_counts_page
from autolabel.pipeline.report.write import write_report
from autolabel.pipeline.rules import near_boundary
from autolabel.pipeline.run import generate

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium on the PATH, such as Debian's package chromium"
)


@pytest.fixture(scope="module")
def run(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("browser") / "run"
    generate(LabelJob(city / "coarse.parquet", teacher, run, scales=(1.0,)))
    write_report(run, images=100)
    return run


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any, run: Path) -> Iterator[Callable[..., Any]]:
    """Opens a run's page; whatever it complains of or fetches from elsewhere fails the test at its end."""
    complaints: list[str] = []
    contexts = []

    def opened(
        run: Path = run, width: int = 1400, scheme: str = "light", anchor: str = "", among: Any = None, **more: Any
    ) -> Any:
        """`among`: a page whose browser remembers what this one will; else the browser is a new one."""
        size = {"width": width, "height": 900}
        context = among.context if among else chromium.new_context(viewport=size, color_scheme=scheme, **more)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "requestfailed", lambda r: None if "ABORTED" in r.failure else complaints.append(f"{r.failure}: {r.url}")
        )
        local = (run / "report").as_uri()
        page.on("request", lambda r: None if r.url.startswith((local, "data:", "blob:")) else complaints.append(r.url))
        page.goto(f"{local}/index.html{anchor}")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def shown(page: Any) -> list[str]:
    """The sample ids of the cards that can be seen, in order."""
    return list(page.locator(".shot:not([hidden]) .name").all_text_contents())


def opacity(page: Any) -> float:
    return float(page.locator("#drawn").evaluate("canvas => Number(getComputedStyle(canvas).opacity)"))


# What the viewer has drawn over the photograph, RGBA row by row. It is copied: reading a canvas would slow it down.
DRAWN = """() => {
  const drawn = document.getElementById("drawn"), copy = document.createElement("canvas");
  [copy.width, copy.height] = [drawn.width, drawn.height];
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(drawn, 0, 0);
  return Array.from(context.getImageData(0, 0, copy.width, copy.height).data, (v) => String.fromCharCode(v)).join("");
}"""


def drawn(page: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What lies over the photograph in the viewer, (H, W, 4) uint8 RGBA."""
    width, height = page.evaluate("[ids.width, ids.height]")
    return np.frombuffer(page.evaluate(DRAWN).encode("latin-1"), np.uint8).reshape(height, width, 4)


def open_card(page: Any, place: int = 0) -> None:
    page.locator(".shot a").nth(place).click()
    page.wait_for_function("ids !== null")


def saved(page: Any, button: str, to: Path) -> Path:
    """The file that a button saves, under the name that the page gives it, in a folder."""
    with page.expect_download() as download:
        page.click(button)
    path = to / str(download.value.suggested_filename)
    download.value.save_as(path)
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_and_can_be_read(visit: Callable[..., Any], width: int, scheme: str) -> None:
    page = visit(width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    first = page.locator(".shot .thumb").first.bounding_box()
    assert first["y"] + first["height"] < 667  # the screen of a small phone; pictures come before all numbers
    assert page.evaluate(FAINT) == []
    page.locator(".shot a").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for key in "123456?":
        page.keyboard.press(key)
        assert page.evaluate(FAINT) == []
    for part in ("#stage", "#close", "#opacity", "[data-kind=disagreement]", "[data-mark=fix]", "#note", "#zoom-in"):
        box = page.locator(part).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= 900, part
    assert all(page.locator("img:visible").evaluate_all("images => images.map(i => i.hasAttribute('alt'))"))


def test_filters_show_exactly_what_the_statistics_say(visit: Callable[..., Any], run: Path) -> None:
    page = visit()
    classes = RunFolder(run).statistics("classes").to_pandas()
    per_class = classes[classes.pixels > 0].groupby("class_name").sample_id.nunique()
    assert per_class.min() < 10 == page.locator(".shot:visible").count()
    for name, count in per_class.items():
        page.select_option("#by-class", label=f"{name} ({count})")
        assert page.inner_text("#count") == f"{count} of 10 images"
        assert set(shown(page)) == set(classes[(classes.pixels > 0) & (classes.class_name == name)].sample_id)
    page.click("#reset")
    groups = [s.group for s in load_manifest(run / "manifest.parquet").samples]
    for group in set(groups):
        page.select_option("#by-group", group)
        assert len(shown(page)) == groups.count(group) < 10
    page.click("#reset")
    trust = page.evaluate("cards.map(card => card.trust)")
    middle = (trust[3] + trust[4]) / 2
    page.fill("#trust-from", str(middle))
    assert len(shown(page)) == 6
    page.fill("#trust-to", str(middle))
    assert page.inner_text("#count") == "0 of 10 images" and page.locator("#nothing").is_visible()
    page.click("#reset")
    name = shown(page)[7]
    page.fill("#by-name", name.upper())
    assert shown(page) == [name]


def test_the_worst_come_first_and_other_orders_are_at_hand(visit: Callable[..., Any], run: Path) -> None:
    page = visit()
    images = RunFolder(run).statistics("images").to_pandas().set_index("sample_id")
    classes = RunFolder(run).statistics("classes").to_pandas().groupby("sample_id").contradicted_pixels.sum()
    trust = images.mean_confidence * (1 - classes / images.coarse_pixels)
    worst_first = list(trust.sort_values().index)
    assert shown(page) == worst_first
    for order, expected in {
        "best": worst_first[::-1],
        "agreement": list(images.agreement_with_coarse.sort_values().index),
        "confidence": list(images.mean_confidence.sort_values().index),
        "ignored": list(images.ignored_fraction.sort_values(ascending=False).index),
        "name": sorted(images.index),
    }.items():
        page.select_option("#order", order)
        assert shown(page) == expected, order


def test_cards_can_show_every_layer(visit: Callable[..., Any]) -> None:
    page = visit()
    over = page.locator(".shot .over").first
    for kind in ("coarse", "disagreement", "confidence"):
        page.select_option("#layer", kind)
        assert over.get_attribute("src").endswith(f"-{kind}.webp")
    page.select_option("#layer", "photograph")
    assert not over.is_visible()


def test_the_viewer_works_by_keyboard_alone(visit: Callable[..., Any]) -> None:
    page = visit()
    names = shown(page)
    page.locator(".shot a").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    title = page.locator("#viewer-name")
    assert page.locator("#viewer").is_visible() and title.inner_text() == names[1]
    page.keyboard.press("ArrowRight")
    assert title.inner_text() == names[2] and page.inner_text("#viewer-place") == "3 of 10"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")  # there is nothing before the first
    assert title.inner_text() == names[0]
    page.wait_for_function("ids !== null")
    for key, kind in enumerate(("photograph", "coarse", "auto", "confidence", "disagreement", "fates"), 1):
        page.keyboard.press(str(key))
        pressed = page.locator("[data-kind][aria-pressed=true]")
        assert pressed.count() == 1 and pressed.get_attribute("data-kind") == kind
        assert page.locator("#over").is_visible() == (kind == "confidence")
        assert page.locator("#drawn").is_visible() == (kind not in ("photograph", "confidence"))
        if kind == "confidence":
            assert page.get_attribute("#over", "src").endswith("-confidence.webp")
        page.wait_for_function("[...document.querySelectorAll('#stage img:not([hidden])')].every(i => i.naturalWidth)")
    page.focus("#opacity")
    before = opacity(page)
    page.keyboard.press("ArrowLeft")
    assert opacity(page) == pytest.approx(before - 0.01) and title.inner_text() == names[0]
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()
    page.wait_for_function(
        "name => document.activeElement.closest('.shot')?.querySelector('.name').textContent === name", arg=names[0]
    )  # a busy browser gives the focus back a little later


def test_the_viewer_works_by_mouse_and_names_the_class_under_the_pointer(visit: Callable[..., Any], run: Path) -> None:

    page = visit()
    page.locator(".shot a").nth(2).click()
    name = page.inner_text("#viewer-name")
    page.click("[data-kind=auto]")
    page.fill("#opacity", "20")
    assert opacity(page) == 0.2 and page.input_value("#opacity-of-cards") == "20"
    page.keyboard.press(".")
    assert opacity(page) == 0.3
    page.wait_for_function("ids !== null")
    label, box = Run.open(run).labels[name], page.locator("#picture").bounding_box()
    names = load_manifest(run / "manifest.parquet").label_space.names
    for y, x in ((5, 90), (60, 20), (90, 100)):
        page.mouse.move(box["x"] + (x + 0.5) * box["width"] / 192, box["y"] + (y + 0.5) * box["height"] / 96)
        here = int(label[y, x])
        assert page.inner_text("#under").endswith(f"auto: {names[here] if here < len(names) else 'ignored'}")
    page.click("#next")
    assert page.inner_text("#viewer-name") == shown(page)[3]
    page.click("#close")
    assert not page.locator("#viewer").is_visible()


def test_layers_are_drawn_to_the_pixel(visit: Callable[..., Any], run: Path) -> None:
    page = visit()
    open_card(page)
    name, opened = page.inner_text("#viewer-name"), Run.open(run)
    auto, space = opened.labels[name], opened.label_space
    coarse = read_coarse(open_manifest(opened.input_manifest).find([name])[name], space)
    assert coarse is not None
    for key, label in (("3", auto), ("2", coarse)):
        page.keyboard.press(key)
        named, over = label != IGNORE, drawn(page)
        assert (over[named][:, :3] == colourise(label, space)[named]).all() and (over[named][:, 3] == 255).all()
        assert 0 < (over[~named][:, 3] == 0).mean() < 1  # hatched, the photograph between
    page.keyboard.press("5")
    there = coarse != IGNORE
    assert (drawn(page) == np.array(list(DISAGREEMENT.values()), np.uint8)[disagreement(coarse, auto)])[there].all()
    page.keyboard.press("3")
    page.keyboard.press("o")  # outlines: inside an area the photograph alone
    lines = drawn(page)[..., 3] > 0
    inner = ~near_boundary(auto, 4)
    edge = np.zeros_like(lines)
    edge[:, :-1] = (auto[:, 1:] != auto[:, :-1]) & (auto[:, :-1] != IGNORE)
    assert inner.any() and not lines[inner].any() and edge.any() and lines[edge].all()


def test_zoom_shows_single_pixels_and_stays_at_the_pointer(visit: Callable[..., Any]) -> None:
    page = visit()
    open_card(page)
    stage = page.locator("#stage").bounding_box()
    fit = page.locator("#picture").bounding_box()
    assert fit["width"] == pytest.approx(min(stage["width"], 2 * stage["height"]), abs=1)
    x, y = fit["x"] + 0.25 * fit["width"], fit["y"] + 0.5 * fit["height"]
    page.mouse.move(x, y)
    page.mouse.wheel(0, -400)  # e times larger
    page.wait_for_function("view.zoom > 2.7")
    now = page.locator("#picture").bounding_box()
    assert now["width"] == pytest.approx(2.71828 * fit["width"], rel=1e-3)
    assert (x - now["x"]) / now["width"] == pytest.approx(0.25, abs=0.01)
    for _ in range(20):
        page.keyboard.press("+")
    assert page.inner_text("#zoom") == "1600 %"  # no closer
    assert page.locator("#drawn").evaluate("canvas => getComputedStyle(canvas).imageRendering") == "pixelated"
    before = page.locator("#picture").bounding_box()
    page.keyboard.press("Shift+ArrowRight")
    assert page.locator("#picture").bounding_box()["x"] == pytest.approx(before["x"] - 80, abs=1)
    page.mouse.down()
    page.mouse.move(x + 50, y)
    page.mouse.up()
    assert page.locator("#picture").bounding_box()["x"] == pytest.approx(before["x"] - 30, abs=1)
    page.keyboard.press("0")
    assert page.locator("#picture").bounding_box() == fit
    page.keyboard.press("ArrowRight")  # images, even after a zoom
    assert page.inner_text("#viewer-place") == "2 of 10"


def test_a_large_image_is_shown_pixel_by_pixel(visit: Callable[..., Any], tmp_path: Path) -> None:
    """2048 x 1024, whose poles must be judged."""
    folder, dice = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    Image.fromarray(dice.integers(0, 255, (64, 128, 3), np.uint8)).resize((2048, 1024)).save(folder / "a.jpg")
    label = np.zeros((1024, 2048), np.uint8)
    label[:, 1000:1003] = 5  # a pole
    (tmp_path / "labels").mkdir()
    Image.fromarray(label).save(tmp_path / "labels" / "a.png")
    manifest = tmp_path / "images.parquet"
    save_manifest(manifest, scan(folder, label_space=CITYSCAPES)[0])
    adopt(Pngs(tmp_path / "labels"), adopting_job(manifest, tmp_path / "run", PAPER, 1))
    write_report(tmp_path / "run")
    page = visit(tmp_path / "run")
    open_card(page)
    assert page.locator("#photograph").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [2048, 1024]
    assert page.evaluate("[ids.width, ids.height]") == [2048, 1024]
    assert page.evaluate("[999, 1000, 1002, 1003].map(x => ids.data[4 * (500 * 2048 + x)])") == [0, 5, 5, 0]
    page.keyboard.press("z")
    assert page.inner_text("#zoom") == "100 %" and page.locator("#picture").bounding_box()["width"] == 2048


def test_specks_are_counted_and_ringed(visit: Callable[..., Any]) -> None:
    page = visit()
    page.select_option("#order", "specks")
    open_card(page)
    specks = page.evaluate("current.specks")
    assert specks["count"] == specks["marked"] > 0 and not specks["dropped"]
    assert page.inner_text("#of-specks").startswith(f"Specks: {specks['count']} piece")
    assert not page.locator("#rings").is_visible()
    page.keyboard.press("s")
    assert page.locator("#rings circle").count() == specks["count"]


def test_an_image_can_be_linked(visit: Callable[..., Any]) -> None:
    page = visit()
    page.locator(".shot a").nth(4).click()
    name, address = page.inner_text("#viewer-name"), page.evaluate("location.hash")
    assert address == f"#image={name}"
    again = visit(anchor=address)
    assert again.inner_text("#viewer-name") == name
    again.keyboard.press("Escape")
    again.wait_for_function("location.hash === ''")
    assert not visit(anchor="#image=%E0%A4%A").locator("#viewer").is_visible()  # no id, and not even UTF-8


def test_without_script_every_image_still_opens(visit: Callable[..., Any]) -> None:
    page = visit(java_script_enabled=False)
    assert not page.locator("#tools").is_visible() and page.locator("noscript p").is_visible()
    page.locator(".shot a").first.click()
    page.wait_for_url("**/*-auto.webp")


# --- marks ------------------------------------------------------------------------------------------------------------


def test_marks_are_set_by_keys_kept_through_a_reload_and_saved(visit: Callable[..., Any], tmp_path: Path) -> None:
    page = visit()
    names = shown(page)
    page.locator(".shot a").first.focus()
    page.keyboard.press("r")
    page.keyboard.press("Shift+K")  # keep takes the place of reject, and the next image follows
    page.keyboard.press("f")
    page.keyboard.press("Enter")
    assert page.inner_text("#viewer-name") == names[1]
    assert page.get_attribute("#viewer [data-mark=fix]", "aria-pressed") == "true"
    page.keyboard.press("n")
    page.keyboard.type('pole, "bent"; k r f 1')  # letters of a note mark nothing
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+R")
    assert page.inner_text("#viewer-name") == names[3] and page.input_value("#note") == ""
    page.click("#viewer [data-mark=reject]")
    page.keyboard.press("r")  # once more: no mark
    page.keyboard.press("Escape")
    other = visit(among=page)
    for again in (page, other):
        again.reload()
        badges = again.locator(".shot .badge").all_text_contents()
        assert badges[:4] == ["✓ keep", "✎ fix · note", "✕ reject", ""]
        assert again.inner_text("#marked") == "1 keep, 1 reject, 1 fix, 1 with a note"
    rows = [f"{names[0]},keep,", f'{names[1]},fix,"pole, ""bent""; k r f 1"', f"{names[2]},reject,"]
    csv = saved(page, "#save-csv", tmp_path)
    assert csv.name == "marks.csv" and csv.read_text() == "\n".join(["sample_id,mark,note", *rows, ""])
    assert read_ids(csv).names == tuple(names[:3])
    other.locator(".shot a").first.focus()
    other.keyboard.press("u")
    page.wait_for_function("document.getElementById('marked').textContent === '1 reject, 1 fix, 1 with a note'")


def test_ids_are_those_of_the_images_shown(visit: Callable[..., Any], tmp_path: Path) -> None:
    """And the commands read them: `fuse --drop`, `export --ids`."""
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    names = shown(page)
    for place, key in ((1, "f"), (4, "f"), (2, "k")):
        page.locator(".shot a").nth(place).focus()
        page.keyboard.press(key)
    for mark, expected in {
        "fix": [names[1], names[4]],
        "any": [names[1], names[2], names[4]],
        "none": [name for place, name in enumerate(names) if place not in (1, 2, 4)],
        "": names,
    }.items():
        page.select_option("#by-mark", mark)
        assert shown(page) == expected
        ids = saved(page, "#save-ids", tmp_path)
        assert ids.name == "ids.txt" and read_ids(ids).names == tuple(expected)
    page.select_option("#by-mark", "fix")
    page.click("#copy-ids")
    page.wait_for_function(
        "document.getElementById('said').textContent === 'The ids of 2 images are in the clipboard.'"
    )
    assert page.evaluate("navigator.clipboard.readText()") == f"{names[1]}\n{names[4]}\n"
    page.select_option("#by-mark", "reject")
    assert page.locator("#nothing").is_visible() and page.is_disabled("#save-ids")


def test_marks_survive_the_next_report_and_are_removed_only_if_that_is_confirmed(
    visit: Callable[..., Any], run: Path, tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(run, tmp_path / "mine"))
    page = visit(mine)
    names = shown(page)
    page.locator(".shot a").first.focus()
    page.keyboard.press("r")
    page.locator(".shot a").nth(1).focus()
    page.keyboard.press("k")
    write_report(mine, samples=names[:1])
    page.reload()
    assert page.locator(".shot .badge").all_text_contents() == ["✕ reject"]
    assert page.inner_text("#marked") == "1 keep, 1 reject, 1 of them not on this page"
    csv = saved(page, "#save-csv", tmp_path)
    assert csv.read_text() == f"sample_id,mark,note\n{names[0]},reject,\n{names[1]},keep,\n"
    asked: list[str] = []
    page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    page.click("#clear-marks")
    assert page.is_enabled("#clear-marks")
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("#clear-marks")
    assert page.is_disabled("#clear-marks")
    assert asked[0].startswith("Remove the marks and notes of 2 images?")
    page.reload()
    assert page.inner_text("#marked") == "no marks yet"


def test_a_browser_that_keeps_nothing_says_so_and_still_saves_marks(visit: Callable[..., Any], tmp_path: Path) -> None:
    page = visit()
    page.context.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error('no') } })")
    page.reload()
    name = shown(page)[0]
    page.locator(".shot a").first.focus()
    page.keyboard.press("f")
    assert "save them before you leave" in page.inner_text("#marked")
    assert saved(page, "#save-csv", tmp_path).read_text() == f"sample_id,mark,note\n{name},fix,\n"


def multiplied(run: Path, out: Path, times: int) -> Path:
    """The same run with each image so many times, under other names: its tables and records, not its labels."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("report"))
    tables = [out / "manifest.parquet", out / "stats" / "images.parquet", out / "stats" / "classes.parquet"]
    tables.append(out / "stats" / "review.parquet")
    for path in (*(out / "units").glob("*.parquet"), *tables):
        table = pq.read_table(path)
        place, names = table.column_names.index("sample_id"), table["sample_id"].to_pylist()
        copies = [
            table.set_column(place, table.schema.field(place), pa.array([f"{name}~{k}" for name in names]))
            for k in range(times)
        ]
        path.write_bytes(table_bytes(pa.concat_tables(copies)))
    return out


@pytest.mark.thorough
def test_hundreds_of_images_stay_usable(visit: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    many = multiplied(run, tmp_path / "run", 60)
    replace(Run.open(many), teacher=TeacherName.of(tmp_path / "gone.pt")).save()
    write_report(many, images=5000)
    page = visit(many)
    page.evaluate("document.getElementById('images').scrollIntoView()")
    loaded = "[...document.images].filter(image => image.naturalWidth).length"
    page.wait_for_function(f"{loaded} > 8")
    assert page.inner_text("#count") == "600 of 600 images"
    assert page.evaluate(loaded) < 200
    page.locator("#shot-599 a").focus()
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    assert page.inner_text("#viewer-place") == "1 of 600"
    page.keyboard.press("Escape")
    page.fill("#by-name", "~59")
    assert page.inner_text("#count") == "10 of 600 images" and len(shown(page)) == 10
    assert page.evaluate(loaded) < 500  # those near three places of the page; how many is up to the browser


def test_the_curves_of_polygons_fit_and_can_be_read_on_a_phone_and_in_the_dark(
    chromium: Any, city: Path, tmp_path: Path
) -> None:
    outside, inside = np.ones((19, len(OUTSIDE) + 1, 19), np.int64), np.ones((19, len(INSIDE) + 1, 2), np.int64)
    counts = PolygonCounts.of(CITYSCAPES, {"2048x1024": 20}, 30 * outside, inside)
    page = write_counts_page(tmp_path / "mine.json", counts, city / "fine.parquet")
    for width, scheme in ((400, "dark"), (1400, "light")):
        tab = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab.goto(page.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") == width and tab.evaluate(FAINT) == []
        boxes = [plot.bounding_box() for plot in tab.locator("svg").all()]
        assert len(boxes) == 19 and all(box["width"] > 150 and box["x"] + box["width"] <= width for box in boxes)
        tab.close()
