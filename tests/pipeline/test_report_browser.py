"""The page works in a browser: nothing from the network, by mouse, by keyboard, on a phone, with thousands of images.

If this fails, a report looks fine in its tests and is of no use to whoever opens it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import CHROMIUM, FAINT, playwright

from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.samples import load_manifest
from autolabel.manifests.tables import table_bytes
from autolabel.manifests.teachers import TeacherName
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.report.write import write_report
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

    def opened(run: Path = run, width: int = 1400, scheme: str = "light", anchor: str = "", **more: Any) -> Any:
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **more)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "requestfailed", lambda r: None if "ABORTED" in r.failure else complaints.append(f"{r.failure}: {r.url}")
        )
        local = (run / "report").as_uri()
        page.on("request", lambda r: None if r.url.startswith((local, "data:")) else complaints.append(r.url))
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
    return float(page.locator("#over").evaluate("image => Number(getComputedStyle(image).opacity)"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_and_can_be_read(visit: Callable[..., Any], width: int, scheme: str) -> None:
    page = visit(width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(FAINT) == []
    page.locator(".shot a").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for key in "12345":
        page.keyboard.press(key)
        assert page.evaluate(FAINT) == []
    for part in ("#stage", "#close", "#opacity", "[data-kind=disagreement]"):
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
    for key, kind in enumerate(("photograph", "coarse", "auto", "confidence", "disagreement"), 1):
        page.keyboard.press(str(key))
        pressed = page.locator(".layers [aria-pressed=true]")
        assert pressed.count() == 1 and pressed.get_attribute("data-kind") == kind
        assert page.locator("#over").is_visible() == (kind != "photograph")
        if kind != "photograph":
            assert page.get_attribute("#over", "src").endswith(f"-{kind}.webp")
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
    assert opacity(page) == 0.2
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


def test_two_thousand_images_stay_usable(visit: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    many = multiplied(run, tmp_path / "run", 200)
    replace(Run.open(many), teacher=TeacherName.of(tmp_path / "gone.pt")).save()
    write_report(many, images=5000)
    page = visit(many)
    page.evaluate("document.getElementById('images').scrollIntoView()")
    loaded = "[...document.images].filter(image => image.naturalWidth).length"
    page.wait_for_function(f"{loaded} > 8")
    assert page.inner_text("#count") == "2000 of 2000 images"
    assert page.evaluate(loaded) < 200
    page.locator("#shot-1999 a").focus()
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    assert page.inner_text("#viewer-place") == "1 of 2000"
    page.keyboard.press("Escape")
    page.fill("#by-name", "~199")
    assert page.inner_text("#count") == "10 of 2000 images" and len(shown(page)) == 10
    assert page.evaluate(loaded) < 400
